"""From a task and a source to a `Dataset`: D4RL's file, your own file, Minari's or generated data.

    load(task)                          D4RL's file, else downloaded, else generated; says which
    load(task, "d4rl")                  D4RL's file or an error, never a substitute
    load(task, "generated", seed=3)     generated here and cached, for tasks with a generator
    load(task, "mine.hdf5")             any HDF5 file in D4RL's layout
    load(task, "minari:NAME")           a local Minari data set (tasks/minari.py)
    load(task, "d4rl", repair=True)     antmaze: without the known defects (tasks/repair.py)

Scores are quoted with the label of what is returned. It is "D4RL NAME" only for D4RL's own file.
"""

import os
from pathlib import Path
from typing import Callable

import h5py
import numpy as np

from . import fetch, minari
from .repair import RepairError, check_repairable, repaired
from .task import Dataset, TaskError, finite, in_box, one_line

ROWS = 1 << 14  # rows read from a file at a time: bounds the memory used beyond the result itself
MINARI = "minari:"  # prefix of a source that names a Minari data set
REPAIRED = {False: "", True: ", repaired"}  # appended to a label

# (observations, actions) of D4RL's families, to guess what a file of the wrong shape is.
FAMILIES = {
    (4, 2): "maze2d",
    (11, 3): "hopper",
    (17, 6): "halfcheetah or walker2d",
    (29, 8): "antmaze",
    (45, 24): "pen",
    (60, 9): "kitchen",
    (111, 8): "ant",
}


# ---- Which data ----------------------------------------------------------------------------------


def load(
    task,
    source: str | os.PathLike = "auto",
    *,
    seed: int = 0,
    n_generated: int = 1_000_000,
    repair: bool = False,
    log: Callable[[str], None] = print,
) -> Dataset:
    """The task's transitions from a source.

    source is "auto", "d4rl", "generated", "minari:NAME", or the path of an HDF5 file. seed and
    n_generated, a number of transitions, are for the generator. repair reads an antmaze file by
    the ant's path instead of its flags (tasks/repair.py); the label then says so. What was loaded
    and why goes to `log` and into Dataset.reason.

    A D4RL file that exists but is broken is an error, even for "auto": replacing it would quietly
    change what a score is quoted for. Raises TaskError.
    """
    name = str(source)
    if repair:
        not_a_file = name == "generated" or name.startswith(MINARI)
        check_repairable(task, name if not_a_file else "")
    if source == "generated":
        return _generated(task, seed, n_generated, "asked for by name", log)
    if name.startswith(MINARI):
        return _minari(task, name.removeprefix(MINARI), log)
    if source not in ("auto", "d4rl"):
        return _file(task, Path(source).expanduser(), repair, log)
    path = fetch.d4rl_folder() / fetch.base_name(task)
    if os.path.exists(path):
        return _d4rl(task, path, f"found in {path.parent}", repair, log)
    log(f"data: no D4RL file for {task.name} in {path.parent}, trying to download it")
    try:
        url = fetch.fetch(task)
    except fetch.DownloadError as error:
        if source == "d4rl":
            raise
        why = f"no D4RL file in {path.parent}, download failed ({error.short})"
        if repair:
            todo = "give --data PATH, or leave out --repair-data"
            raise TaskError(f"{why}, and generated data need no repair: {todo}") from error
        if not task.can_generate:
            raise TaskError(f"{why}; {_by_hand(task)}") from error
        return _generated(task, seed, n_generated, f"{why}, so the data were generated here", log)
    return _d4rl(task, path, f"downloaded from {url} to {path.parent}", repair, log)


def statistics(dataset: Dataset) -> dict[str, float]:
    """n, the share of terminals, and the smallest, mean and largest reward, as in the data."""
    rewards = dataset.rewards
    return {
        "n": len(dataset),
        "terminal_share": float(dataset.terminals.mean()),
        "reward_min": float(rewards.min()),
        "reward_mean": float(rewards.mean(dtype=np.float64)),
        "reward_max": float(rewards.max()),
    }


def _d4rl(task, path: Path, reason: str, repair: bool, log) -> Dataset:
    log(f"data: D4RL {task.name} ({reason})")
    try:
        arrays = read_hdf5(path, task, repair=repair, log=log)
    except RepairError:
        raise
    except TaskError as error:
        message = f"D4RL's cached file is unusable, delete it to have it downloaded again: {error}"
        raise TaskError(message) from error
    return Dataset(task.name, "d4rl", f"D4RL {task.name}{REPAIRED[repair]}", reason, **arrays)


def _file(task, path: Path, repair: bool, log) -> Dataset:
    from . import get, names  # not at the top: the package imports this module

    others = {fetch.base_name(get(name)): name for name in names() if name != task.name}
    if path.name in others:
        what = f"{path} is D4RL's file of {others[path.name]}, not of {task.name}"
        raise TaskError(f"{what}; give another file or another task")
    reason = f"the file {path}, asked for by its path"
    log(f"data: {reason}")
    arrays = read_hdf5(path, task, repair=repair, log=log)
    label = f"file {path.name} (task {task.name}){REPAIRED[repair]}"
    return Dataset(task.name, "file", label, reason, **arrays)


def _minari(task, name: str, log) -> Dataset:
    reason = f"the Minari data set {name}, asked for by its name"
    log(f"data: {reason}")
    label = f"Minari {name} (its scores are not D4RL's)"
    return Dataset(task.name, "minari", label, reason, **minari.read(name, task))


def _generated(task, seed: int, n_transitions: int, reason: str, log) -> Dataset:
    if not task.can_generate:
        raise TaskError(_by_hand(task))
    from .generate import cached  # only needed here: files are read without the generator

    what = f"GENERATED for {task.name}, NOT D4RL's"
    log(f"data: {what}: scores on it are not comparable with published ones")
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


def _by_hand(task) -> str:
    """For a task without a generator: which file to put where."""
    file, url = task.dataset_file, fetch.D4RL_URL + task.dataset_file
    return (
        f"there are no generated data for {task.name}: put D4RL's {file} ({url}) "
        f"into {fetch.d4rl_folder()} as {fetch.base_name(task)}, or give --data PATH"
    )


# ---- Reading, by D4RL's rules for Q-learning -----------------------------------------------------


def read_hdf5(
    path: str | os.PathLike, task, *, repair: bool = False, log: Callable[[str], None] = print
) -> dict[str, np.ndarray]:
    """The arrays of a `Dataset` from a file of N rows in D4RL's layout.

    Row i in 0..N-2 becomes a transition to row i+1 with done = terminals[i], unless an episode was
    cut off there: by timeouts[i] or, in a file without timeouts, by the task's episode limit. The
    row after a cut belongs to another episode, so a cut row is left out. This is how D4RL reads
    its files for Q-learning, and how published scores were made. A next_observations in the file
    is ignored.

    All values must be finite and all actions in [-1, 1], up to ACTION_SLACK: the scripts that made
    D4RL's files clip the actions of pen's demonstrations and policies to that box, and kitchen's
    to 0.999. From some hundred thousand rows on, reading takes less memory, the result included,
    than twice what the file's observations, actions, rewards, terminals and timeouts take in
    float32 and bool (bench/loading.py).

    repair=True, for antmaze files, goes by what the ant did instead of the flags (tasks/repair.py);
    what that changed goes to log. Raises TaskError, and RepairError for a file that is sound but
    cannot be repaired.
    """
    if repair:
        check_repairable(task)
    path = Path(path)
    with _opened(path) as file:
        try:
            n = _check_layout(file, path, task)
            terminals = _flags(file["terminals"], path)
            if "timeouts" in file:
                cut = _flags(file["timeouts"], path)
            else:
                cut = limit_cuts(terminals, task.episode_limit)
            begins, done, relabelled = ~cut[:-1], terminals[:-1], False
            if repair:
                begins, done, relabelled = repaired(file, path, terminals, cut, log)
            if not begins.any():
                raise TaskError(f"{path} has no transitions, all {n} rows are cut off: use another")
            first, second = np.append(begins, False), np.append(False, begins)
            observations, next_observations = _taken(file["observations"], path, first, second)
            (actions,) = _taken(file["actions"], path, first, check=in_box)
            (rewards,) = _taken(file["rewards"], path, first)
        except OSError as error:
            reason = one_line(error)
            raise TaskError(f"{path} is damaged ({reason}); get or make it again") from error
    terminals = done[begins]
    return {
        "observations": observations,
        "actions": actions,
        "next_observations": next_observations,
        "rewards": terminals.astype(np.float32) if relabelled else rewards.reshape(-1),
        "terminals": terminals,
    }


def limit_cuts(terminals: np.ndarray, limit: int) -> np.ndarray:
    """Rows cut off by an episode limit, (N,) bool -> (N,) bool, for a file without timeouts.

    As D4RL counts: its step counter starts at 0. A row where it stands at limit-1 is cut, terminal
    or not, and the next row has 0. Any other terminal row sets it to 0 and then counts itself, so
    the next row has 1 and that episode is cut a row early. We do the same, because published
    scores were trained on files read this way.
    """
    cut = np.zeros(len(terminals), bool)
    first = 0  # the row where the counter is 0, or was reset to 0
    for row in np.flatnonzero(terminals):
        cut[first + limit - 1 : row + 1 : limit] = True
        first = row + 1 if cut[row] else row
    cut[first + limit - 1 :: limit] = True
    return cut


def _taken(
    array: h5py.Dataset, path: Path, *masks: np.ndarray, check: Callable = finite
) -> list[np.ndarray]:
    """For each mask (N,), the rows of array (N, ...) where it is True, as float32.

    All of array is read once and checked, whatever the masks.
    """
    chunk = array.chunks[0] if array.chunks else 1
    step = max(1, ROWS // chunk) * chunk  # no chunk is decompressed twice
    taken = [np.empty((mask.sum(), *array.shape[1:]), np.float32) for mask in masks]
    counts = [0] * len(masks)
    for start in range(0, len(array), step):
        rows = check(array[start : start + step], _place(array, path), start)
        for k, mask in enumerate(masks):
            chosen = rows[mask[start : start + step]]
            taken[k][counts[k] : counts[k] + len(chosen)] = chosen
            counts[k] += len(chosen)
    return taken


def _flags(array: h5py.Dataset, path: Path) -> np.ndarray:
    return finite(array[:], _place(array, path)).reshape(-1).astype(bool)


def _place(array: h5py.Dataset, path: Path) -> str:
    """For a message: the file and the array in it."""
    return f"{path}: {array.name.lstrip('/')}"


# ---- Checks of a file's layout -------------------------------------------------------------------


def _opened(path: Path) -> h5py.File:
    if not os.path.isfile(path):
        sources = "auto, d4rl, generated, minari:NAME, or the path of an HDF5 file"
        raise TaskError(f"there is no file {path}: give {sources}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        message = f"{path} is not a whole HDF5 file ({one_line(error)}); get or make it again"
        raise TaskError(message) from error


def _check_layout(file: h5py.File, path: Path, task) -> int:
    """The number of rows.

    Raises TaskError unless all arrays are there, of numbers, of the task's shapes and equally long.
    """
    keys = ("observations", "actions", "rewards", "terminals")
    missing = [key for key in keys if not isinstance(file.get(key), h5py.Dataset)]
    if missing:
        there = ", ".join(sorted(file)[:8]) or "nothing"
        lacks = f"{path} lacks {', '.join(missing)} (it has {there})"
        raise TaskError(f"{lacks}; use a file in D4RL's layout")
    made_for = file.attrs.get("task", task.name)  # generated files name their task
    if made_for != task.name:
        what = f"{path} was generated for {made_for}, not for {task.name}"
        raise TaskError(f"{what}; give another file or another task")
    arrays = {key: file[key] for key in (*keys, "timeouts") if key in file}
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            what = f"{path}: {key} holds {array.dtype}, not numbers"
            raise TaskError(f"{what}; use a file in D4RL's layout")
        columns = [(array.size,), (array.size, 1)]
        if key not in ("observations", "actions") and array.shape not in columns:
            what = f"{path}: {key} has shape {array.shape}, not one number a row"
            raise TaskError(f"{what}; use another file")
    _check_shapes(file["observations"].shape, file["actions"].shape, path, task)
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {length:,}" for key, length in lengths.items())
        message = f"{path}: the arrays differ in length ({counts}); get or make the file again"
        raise TaskError(message)
    n = lengths["rewards"]
    if n < 2:
        raise TaskError(f"{path} is empty: it has {n} rows, one transition takes 2; use another")
    return n


def _check_shapes(
    observations: tuple[int, ...], actions: tuple[int, ...], path: Path, task
) -> None:
    if observations[1:] == (task.state_dim,) and actions[1:] == (task.action_dim,):
        return
    family = FAMILIES.get((*observations[1:], *actions[1:]))
    guess = f", probably of {family}" if family else ""
    raise TaskError(
        f"{path} holds another task's data{guess}: observations {observations} and actions "
        f"{actions}, where {task.name} needs (N, {task.state_dim}) and (N, {task.action_dim}); "
        "give another file or another task"
    )
