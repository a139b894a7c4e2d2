"""HDF5 files: opened with care, checked for D4RL's layout, and read by its rules for Q-learning.

A file may be anybody's. Whatever is in it, reading gives the arrays of a `Dataset` or a TaskError
in one line, and opens no other file.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import h5py
import numpy as np

from .repair import check_repairable, repaired
from .task import TaskError, finite, in_box, one_line, readable, summary, system_reason

ROWS = 1 << 14  # rows read from a file at a time: bounds the memory used beyond the result itself
DAMAGE = (OSError, RuntimeError, LookupError, TypeError, ValueError)  # h5py's, for damaged files
KEYS = ("observations", "actions", "rewards", "terminals")  # what a file must have

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


# ---- Opening -------------------------------------------------------------------------------------


class AccessError(TaskError):
    """A file that may well be sound is not read: it is locked, private or needs another file."""


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[h5py.File]:
    """The file, open for reading; nothing in it leads to another file.

    What h5py raises in the block becomes a TaskError too. Raises TaskError if there is no file or
    if it is not a whole HDF5 file, and AccessError if that cannot be said.
    """
    where = one_line(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe is to wait for its writer
            raise AccessError(f"{where} is a folder or a device: give the path of an HDF5 file")
        file = h5py.File(path, "r")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        sources = "auto, d4rl, generated, minari:NAME, or the path of an HDF5 file"
        raise TaskError(f"there is no file {where}: give {sources}") from error
    except OSError as error:
        raise _unreadable(where, "is not a whole HDF5 file", error) from error
    with file:
        try:
            _refuse_other_files(file, where)
            yield file
        except TaskError:
            raise
        except DAMAGE as error:
            raise _unreadable(where, "is damaged", error) from error


def _unreadable(where: str, broken: str, error: Exception) -> TaskError:
    """What to raise for an error of h5py's. Only one without an errno is the file's own fault."""
    if isinstance(error, BlockingIOError):
        why = "another process has locked it: wait until that has closed it"
    elif "already open" in str(error):
        why = "its writer has not closed it: wait for that, or make it again"
    elif isinstance(error, PermissionError):
        why = "this user has no permission: change that, or use another file"
    elif getattr(error, "errno", None):
        why = f"{system_reason(error)}: look at the disk, or use another file"
    else:
        return TaskError(f"{where} {broken} ({one_line(error)}); get or make it again")
    return AccessError(f"{where} cannot be read, {why}")


def _refuse_other_files(file: h5py.File, where: str) -> None:
    """Raises AccessError if a part of the file is stored in another one.

    HDF5 would open that one, whatever it is: a private file, a pipe, a device.
    """

    def of_a_link(name: bytes, link) -> bytes | None:
        return None if link.type in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT) else name

    def of_an_array(name: str, item) -> str | None:
        elsewhere = isinstance(item, h5py.Dataset) and (item.is_virtual or item.external)
        return name if elsewhere else None

    # Neither follows soft or external links; each stops at the first name that is returned.
    name = file.id.links.visit(of_a_link, info=True) or file.visititems(of_an_array)
    if name:
        name = one_line(name.decode(errors="replace") if isinstance(name, bytes) else name)
        raise AccessError(f"{where}: {name} is stored in another file; copy all into one file")


# ---- Reading, by D4RL's rules for Q-learning -----------------------------------------------------


def read_hdf5(
    path: str | os.PathLike,
    task,
    *,
    repair: bool = False,
    own: bool = False,
    log: Callable[[str], None] = print,
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
    what that changed goes to log, as does a summary of what was read and, of a user's own file,
    what its timeouts take away. Raises TaskError: RepairError
    for a file that is sound but cannot be repaired, AccessError for one that may be sound but
    cannot be read.
    """
    if repair:
        check_repairable(task)
    where, lines = one_line(path), []
    with opened(path) as file:
        n = _check_layout(file, where, task)
        terminals = _column(file["terminals"], where).astype(bool)
        rewards = _column(file["rewards"], where)
        if "timeouts" in file:
            cut = _column(file["timeouts"], where).astype(bool)
        else:
            cut = limit_cuts(terminals, task.episode_limit)
            if own:
                every = f"episodes are cut after {task.episode_limit} steps"
                lines.append(f"data: no timeouts in the file: {every}; mark where others end")
        relabelled = False
        if repair:
            begins, done, ends, relabelled = repaired(file, where, terminals, cut, lines.append)
            rewards = np.append(done, False).astype(np.float32) if relabelled else rewards
        else:
            # An antmaze's trajectory goes on after it has reached its goal.
            goes_on = task.family == "antmaze" and cut.any()
            begins, done, ends = ~cut[:-1], terminals[:-1], cut if goes_on else cut | terminals
            lines += _lost(terminals, cut, rewards) if own else []
        if not begins.any():
            raise TaskError(f"{where} has no transitions, all {n} rows are cut off: use another")
        starts = np.append(0, np.flatnonzero(ends[:-1]) + 1)
        returns = np.add.reduceat(rewards, starts, dtype=np.float64)
        del rewards, cut, ends  # the rewards are read again below: that takes less memory
        first, second = np.append(begins, False), np.append(False, begins)
        observations, next_observations = _taken(file["observations"], where, first, second)
        (actions,) = _taken(file["actions"], where, first, check=in_box)
        (rewards,) = _taken(file["rewards"], where, first)
    terminals = done[begins]
    for line in (*lines, summary(n, observations, terminals, returns)):
        log(line)
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


def _lost(terminals: np.ndarray, cut: np.ndarray, rewards: np.ndarray) -> list[str]:
    """For the log: what the rows that are terminal and cut, both (N,) bool, take with them."""
    lost = terminals & cut
    if not lost.any():
        return []
    reward, total = (readable(float(part.sum())) for part in (rewards[lost], rewards))
    what = f"{lost.sum():,} of {terminals.sum():,} terminals and {reward} of {total} reward"
    why = f"data: warning: D4RL's rule leaves out rows that timed out, and with them {what}"
    return [f"{why}; clear timeouts on rows where the episode really ended"]


def _taken(
    array: h5py.Dataset, where: str, *masks: np.ndarray, check: Callable = finite
) -> list[np.ndarray]:
    """For each mask (N,), the rows of array (N, ...) where it is True, as float32.

    All of array is read once and checked, whatever the masks.
    """
    chunk = array.chunks[0] if array.chunks else 1
    step = max(1, ROWS // chunk) * chunk  # no chunk is decompressed twice
    taken = [np.empty((mask.sum(), *array.shape[1:]), np.float32) for mask in masks]
    counts = [0] * len(masks)
    for start in range(0, len(array), step):
        rows = check(array[start : start + step], _place(array, where), start)
        for k, mask in enumerate(masks):
            chosen = rows[mask[start : start + step]]
            taken[k][counts[k] : counts[k] + len(chosen)] = chosen
            counts[k] += len(chosen)
    return taken


def _column(array: h5py.Dataset, where: str) -> np.ndarray:
    """One number a row, (N,) float32."""
    return finite(array[:], _place(array, where)).reshape(-1)


def _place(array: h5py.Dataset, where: str) -> str:
    """For a message: the file and the array in it."""
    return f"{where}: {array.name.lstrip('/')}"


# ---- Checks of a file's layout -------------------------------------------------------------------


def _check_layout(file: h5py.File, where: str, task) -> int:
    """The number of rows.

    Raises TaskError unless all arrays are there, of numbers, of the task's shapes and equally long.
    """
    there = sorted(map(str, file))  # a damaged name comes as bytes
    missing = [key for key in KEYS if key not in there]
    if missing:
        has = ", ".join(map(one_line, there[:8])) or "nothing"
        lacks = f"{where} lacks {', '.join(missing)} (it has {has})"
        raise TaskError(f"{lacks}; use a file in D4RL's layout")
    _check_origin(file, where, task)
    arrays = {key: file.get(key) for key in (*KEYS, "timeouts") if key in there}
    for key, array in arrays.items():
        _check_array(array, f"{where}: {key}")
        columns = [(array.size,), (array.size, 1)]
        if key not in ("observations", "actions") and array.shape not in columns:
            what = f"{where}: {key} has shape {array.shape}, not one number a row"
            raise TaskError(f"{what}; use another file")
    _check_shapes(file["observations"].shape, file["actions"].shape, where, task)
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {length:,}" for key, length in lengths.items())
        message = f"{where}: the arrays differ in length ({counts}); get or make the file again"
        raise TaskError(message)
    n = lengths["rewards"]
    if n < 2:
        raise TaskError(f"{where} is empty: it has {n} rows, one transition takes 2; use another")
    return n


def _check_origin(file: h5py.File, where: str, task) -> None:
    """Refuse what our generator made for another task: some have the same sizes."""
    if "recipe_version" in file.attrs:
        made_for = one_line(file.attrs.get("task"))
        if made_for != task.name:
            what = f"{where} was generated for {made_for}, not for {task.name}"
            raise TaskError(f"{what}; give another file or another task")


def _check_array(array: h5py.HLObject | None, where: str) -> None:
    wrong = ""
    if not isinstance(array, h5py.Dataset) or array.shape is None:
        wrong = "is not an array, but a group, an empty value or a broken link"
    elif array.dtype.kind not in "biuf":
        wrong = f"holds {one_line(array.dtype)}, not numbers"
    if wrong:
        raise TaskError(f"{where} {wrong}; use a file in D4RL's layout")
    filters = array.id.get_create_plist()
    for number, *_, name in map(filters.get_filter, range(filters.get_nfilters())):
        if not h5py.h5z.filter_avail(number):
            what = f"is compressed by {one_line(name.decode(errors='replace')) or number}"
            raise AccessError(f"{where} {what}, unknown here; write it again with gzip")


def _check_shapes(
    observations: tuple[int, ...], actions: tuple[int, ...], where: str, task
) -> None:
    if observations[1:] == (task.state_dim,) and actions[1:] == (task.action_dim,):
        return
    family = FAMILIES.get((*observations[1:], *actions[1:]))
    guess = f", probably of {family}" if family else ""
    raise TaskError(
        f"{where} holds another task's data{guess}: observations {observations} and actions "
        f"{actions}, where {task.name} needs (N, {task.state_dim}) and (N, {task.action_dim}); "
        "give another file or another task"
    )
