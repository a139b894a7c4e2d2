"""From a task and a source to a `Dataset`: D4RL's own file, a file of the user's, or data generated here.

    load(task)                        D4RL's file, else downloaded, else generated; says which, and why
    load(task, "d4rl")                D4RL's file or an error, never a substitute
    load(task, "generated", seed=3)   made by tasks/generate.py, cached
    load(task, "mine.hdf5")           any HDF5 file in D4RL's layout

The label of what comes back names the data a score is quoted for. It says "D4RL" alone only for D4RL's file.
"""

import contextlib
import errno
import http.client
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable, Iterator

import h5py
import numpy as np
from tqdm import tqdm

from .task import Dataset, TaskError

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"  # down at times, hence the mirror
MIRROR_URL = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"  # the same base names, no folders
TIMEOUT = 10  # seconds, for the connection and for each read
BLOCK = 1 << 20  # bytes taken from the network at a time
ROWS = 1 << 16  # rows taken from a file at a time: bounds the memory used beyond the result itself
ACTION_SLACK = 1e-3  # how far outside [-1, 1] an action may lie before the file is refused

# (observations, actions) of D4RL's families, to say what a file of the wrong shape probably is.
FAMILIES = {
    (4, 2): "maze2d",
    (11, 3): "hopper",
    (17, 6): "halfcheetah or walker2d",
    (29, 8): "antmaze",
    (45, 24): "pen",
    (60, 9): "kitchen",
    (111, 8): "ant",
}


class DownloadError(TaskError):
    """D4RL's file could not be fetched. `short` is the reason in a few words."""

    def __init__(self, message: str, short: str):
        super().__init__(message)
        self.short = short


# ---------------------------------------------------------------------------------------------------------
# Which data

def load(
    task,
    source: str | os.PathLike = "auto",
    *,
    seed: int = 0,
    n_generated: int = 1_000_000,
    log: Callable[[str], None] = print,
) -> Dataset:
    """The task's transitions from `source`: "auto", "d4rl", "generated", or the path of an HDF5 file.

    seed and n_generated, a number of transitions, are the generator's. What was taken and why goes to `log` and
    into Dataset.reason. A D4RL file that is there but broken is an error, with "auto" too: replacing it would
    quietly change what a score is quoted for. Raises TaskError.
    """
    if source == "generated":
        return _generated(task, seed, n_generated, "asked for by name", log)
    if source not in ("auto", "d4rl"):
        return _file(task, Path(source).expanduser(), log)
    path = d4rl_folder() / _base_name(task)
    if os.path.exists(path):
        return _d4rl(task, path, f"found in {path.parent}", log)
    log(f"data: no D4RL file for {task.name} in {path.parent}, trying to download it")
    try:
        url = download(task)
    except DownloadError as error:
        if source == "d4rl":
            raise
        why = f"no D4RL file in {path.parent}, download failed ({error.short})"
        return _generated(task, seed, n_generated, f"{why}, so the data were generated here", log)
    return _d4rl(task, path, f"downloaded from {url} to {path.parent}", log)


def d4rl_folder() -> Path:
    """Where D4RL keeps its files: $D4RL_DATASET_DIR, as D4RL itself honours it, else ~/.d4rl/datasets."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def statistics(dataset: Dataset) -> dict[str, float]:
    """n, the share of terminals, and the smallest, mean and largest reward, as they are in the data."""
    rewards = dataset.rewards
    return {
        "n": len(dataset),
        "terminal_share": float(dataset.terminals.mean()),
        "reward_min": float(rewards.min()),
        "reward_mean": float(rewards.mean(dtype=np.float64)),
        "reward_max": float(rewards.max()),
    }


def _d4rl(task, path: Path, reason: str, log) -> Dataset:
    log(f"data: D4RL {task.name} ({reason})")
    try:
        arrays = read_hdf5(path, task)
    except TaskError as error:
        message = f"D4RL's cached file is unusable, delete it to have it downloaded again: {error}"
        raise TaskError(message) from error
    return Dataset(task.name, "d4rl", f"D4RL {task.name}", reason, **arrays)


def _file(task, path: Path, log) -> Dataset:
    reason = f"the file {path}, asked for by its path"
    log(f"data: {reason}")
    return Dataset(task.name, "file", f"file {path.name} (task {task.name})", reason, **read_hdf5(path, task))


def _generated(task, seed: int, n_transitions: int, reason: str, log) -> Dataset:
    from .generate import cached  # only here: reading a file needs no simulator

    log(f"data: GENERATED for {task.name}, NOT D4RL's: scores on it are not comparable with published ones")
    log(f"data: why: {reason}")
    path = Path(cached(task, n_transitions=n_transitions, seed=seed, log=log))
    try:
        arrays = read_hdf5(path, task)
    except TaskError as error:
        message = f"the cached generated file is unusable, delete it to have it made again: {error}"
        raise TaskError(message) from error
    with h5py.File(path, "r") as file:
        n_rows = len(file["rewards"])
    label = f"GENERATED {task.name} (seed {seed}, {n_rows:,} transitions; not D4RL's data)"
    return Dataset(task.name, "generated", label, reason, **arrays)


# ---------------------------------------------------------------------------------------------------------
# Reading, by D4RL's rules for Q-learning

def read_hdf5(path: str | os.PathLike, task) -> dict[str, np.ndarray]:
    """The arrays of a `Dataset` from a file of N rows in D4RL's layout.

    Row i in 0..N-2 becomes a transition to row i+1 with done = terminals[i], unless an episode was cut off
    there: timeouts[i] or, in a file without timeouts, the task's episode limit. The row after a cut belongs
    to another episode, so a cut row is left out. All values must be finite and all actions in [-1, 1]. Memory
    for ROWS rows is used beyond the result. Raises TaskError.
    """
    path = Path(path)
    with _opened(path) as file:
        try:
            n = _check_layout(file, path, task)
            terminals = _flags(file["terminals"], path)
            if "timeouts" in file:
                cut = _flags(file["timeouts"], path)
            else:
                cut = limit_cuts(terminals, task.episode_limit)
            keep = ~cut[:-1]
            if not keep.any():
                raise TaskError(f"{path} has no transitions, all {n} rows are cut off: use another")
            return _transitions(file, path, keep) | {"terminals": terminals[:-1][keep]}
        except OSError as error:
            raise TaskError(f"{path} is damaged ({_one_line(error)}); get or make it again") from error


def limit_cuts(terminals: np.ndarray, limit: int) -> np.ndarray:
    """Rows cut off by an episode limit, (N,) bool -> (N,) bool, as D4RL counts where a file has no timeouts.

    D4RL's step counter starts at 0. A row where it stands at limit-1 is cut, terminal or not, and the next
    row has 0. Another terminal row sets it to 0 and then counts itself, so the next row has 1 and that
    episode's cut comes a row early. We keep that, because published scores were trained on files read so.
    """
    cut = np.zeros(len(terminals), bool)
    first = 0  # the row where the counter is 0, or was set to 0 after the fact
    for row in np.flatnonzero(terminals):
        cut[first + limit - 1 : row + 1 : limit] = True
        first = row + 1 if cut[row] else row
    cut[first + limit - 1 :: limit] = True
    return cut


def _transitions(file: h5py.File, path: Path, keep: np.ndarray) -> dict[str, np.ndarray]:
    """All arrays but the terminals, of those rows i of 0..N-2 where keep[i]."""
    n, count = len(keep) + 1, int(keep.sum())
    width = {key: file[key].shape[1] for key in ("observations", "actions")}
    arrays = {
        "observations": np.empty((count, width["observations"]), np.float32),
        "actions": np.empty((count, width["actions"]), np.float32),
        "next_observations": np.empty((count, width["observations"]), np.float32),
        "rewards": np.empty(count, np.float32),
    }
    done = 0
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        obs = _finite(file["observations"], start, min(stop + 1, n), path)  # the last row's successor too
        act = _finite(file["actions"], start, stop, path)
        rew = _finite(file["rewards"], start, stop, path).reshape(-1)
        _check_box(act, start, path)
        rows = np.flatnonzero(keep[start:stop])
        into = slice(done, done + len(rows))
        arrays["observations"][into], arrays["next_observations"][into] = obs[rows], obs[rows + 1]
        arrays["actions"][into], arrays["rewards"][into] = act[rows], rew[rows]
        done += len(rows)
    return arrays


def _opened(path: Path) -> h5py.File:
    if not os.path.isfile(path):
        raise TaskError(f"there is no file {path}: give auto, d4rl, generated, or the path of an HDF5 file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        message = f"{path} is not a whole HDF5 file ({_one_line(error)}); get or make it again"
        raise TaskError(message) from error


def _check_layout(file: h5py.File, path: Path, task) -> int:
    """The number of rows, after a check that every array is there, of the task's shape and that long."""
    keys = ("observations", "actions", "rewards", "terminals")
    missing = [key for key in keys if not isinstance(file.get(key), h5py.Dataset)]
    if missing:
        there = ", ".join(sorted(file)[:8]) or "nothing"
        raise TaskError(f"{path} lacks {', '.join(missing)} (it has {there}); use a file in D4RL's layout")
    arrays = {key: file[key] for key in (*keys, "timeouts") if key in file}
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise TaskError(f"{path}: {key} holds {array.dtype}, not numbers; use a file in D4RL's layout")
        if key not in ("observations", "actions") and array.shape not in ((array.size,), (array.size, 1)):
            raise TaskError(f"{path}: {key} has shape {array.shape}, not one number a row; use another file")
    _check_shapes(file["observations"].shape, file["actions"].shape, path, task)
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {length:,}" for key, length in lengths.items())
        raise TaskError(f"{path}: the arrays differ in length ({counts}); get or make the file again")
    n = lengths["rewards"]
    if n < 2:
        raise TaskError(f"{path} is empty: it has {n} rows, one transition takes 2; use another")
    return n


def _check_shapes(observations: tuple[int, ...], actions: tuple[int, ...], path: Path, task) -> None:
    if observations[1:] == (task.state_dim,) and actions[1:] == (task.action_dim,):
        return
    family = FAMILIES.get((*observations[1:], *actions[1:]))
    raise TaskError(
        f"{path} holds another task's data{f', probably of {family}' if family else ''}: observations "
        f"{observations} and actions {actions}, where {task.name} needs (N, {task.state_dim}) and "
        f"(N, {task.action_dim}); give another file or another task"
    )


def _flags(array: h5py.Dataset, path: Path) -> np.ndarray:
    return _finite(array, 0, len(array), path).reshape(-1).astype(bool)


def _finite(array: h5py.Dataset, start: int, stop: int, path: Path) -> np.ndarray:
    """Rows start..stop-1 as float32, all finite."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is reported as that
        rows = array[start:stop].astype(np.float32, copy=False)
    finite = np.isfinite(rows)
    if not finite.all():
        where = tuple(np.argwhere(~finite)[0])
        name, row = array.name.lstrip("/"), start + where[0]
        raise TaskError(f"{path}: {name} has {rows[where]} in row {row}; repair the file or use another")
    return rows


def _check_box(actions: np.ndarray, start: int, path: Path) -> None:
    outside = np.abs(actions) > 1 + ACTION_SLACK
    if outside.any():
        row, column = np.argwhere(outside)[0]
        value = f"{actions[row, column]:.4g} in row {start + row}"
        raise TaskError(f"{path}: actions has {value}, outside [-1, 1]; scale the actions to that box")


# ---------------------------------------------------------------------------------------------------------
# Downloading

def download(task) -> str:
    """Fetches D4RL's file into d4rl_folder() and returns the address that gave it.

    The file gets its name once it is as long as the server said and opens as HDF5. Until then it is called
    <name>.part-<pid> and stands in the same folder; that one is removed whatever happens. Raises
    DownloadError when no address gives the file or the folder cannot be written to, TaskError when the disk
    fails or is full.
    """
    folder, name = d4rl_folder(), _base_name(task)
    part = folder / f"{name}.part-{os.getpid()}"
    go_on = "go on with a file of yours (--data PATH) or with --data generated"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.touch()  # asked before the network is
    except OSError as error:
        message = f"cannot write to {folder} ({error.strerror}): set D4RL_DATASET_DIR elsewhere, or {go_on}"
        raise DownloadError(message, f"folder not writable: {error.strerror}") from error
    failures = {}
    try:
        for url in (D4RL_URL + task.dataset_file, MIRROR_URL + name):
            try:
                _fetch(url, part, name)
                os.replace(part, folder / name)
                return url
            except _NoAnswer as failure:
                failures[url] = str(failure)
    except OSError as error:  # the network's are all _NoAnswer by now, so this is the disk's
        todo = "free some space" if error.errno == errno.ENOSPC else "look at the disk"
        message = f"cannot save {name} in {folder} ({error.strerror}): {todo} or set D4RL_DATASET_DIR"
        raise TaskError(message) from error
    finally:
        with contextlib.suppress(OSError):  # a clean-up that fails must not hide why it was needed
            part.unlink(missing_ok=True)
    each = "; ".join(f"{url}: {why}" for url, why in failures.items())
    short = ", ".join(dict.fromkeys(failures.values()))
    raise DownloadError(f"cannot download {name} ({each}); {go_on}", short)


class _NoAnswer(Exception):
    """An address did not give the file. The text is the reason in a few words."""


def _fetch(url: str, part: Path, name: str) -> None:
    """Writes what url gives to part: _NoAnswer when that is not a whole HDF5 file, OSError for the disk."""
    try:
        response = urllib.request.urlopen(url, timeout=TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        raise _NoAnswer(_reason(error)) from error
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name, leave=False)
    with response, bar, open(part, "wb") as file:
        for block in _blocks(response, total):
            file.write(block)
            bar.update(len(block))
    try:
        h5py.File(part, "r").close()  # an error page is an answer too, and without a size HDF5 knows its own
    except OSError as error:
        raise _NoAnswer("what came is not a whole HDF5 file") from error


def _blocks(response: http.client.HTTPResponse, total: int | None) -> Iterator[bytes]:
    """The body. Network errors become _NoAnswer here, so that the OSErrors of writing are told from them."""
    received = 0
    try:
        while block := response.read(BLOCK):
            received += len(block)
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _NoAnswer(f"connection lost after {received:,} bytes, {_reason(error)}") from error
    if total is not None and received != total:
        raise _NoAnswer(f"connection lost after {received:,} of {total:,} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return _one_line(f"HTTP {error.code} {error.reason}")
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        return "name resolution"
    if isinstance(cause, TimeoutError):
        return f"no answer in {TIMEOUT} s"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    return _one_line(cause)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _base_name(task) -> str:
    return task.dataset_file.rsplit("/", 1)[-1]
