"""From a task and a source to a `Dataset`: D4RL's own file, a file of the user's, Minari's, or data generated here.

    load(task)                          D4RL's file, else downloaded, else generated; says which, and why
    load(task, "d4rl")                  D4RL's file or an error, never a substitute
    load(task, "generated", seed=3)     made here and cached, for tasks with a generator
    load(task, "mine.hdf5")             any HDF5 file in D4RL's layout
    load(task, "minari:NAME")           a local Minari data set (tasks/minari.py)
    load(task, "d4rl", repair=True)     antmaze: without the known defects of D4RL's files

The label of what comes back names the data a score is quoted for. It says "D4RL" alone only for D4RL's file.
"""

import os
from pathlib import Path
from typing import Callable

import h5py
import numpy as np

from . import fetch
from .antmaze import GOAL_RADIUS
from .task import Dataset, TaskError, one_line

ROWS = 1 << 14  # rows taken from a file at a time: bounds the memory used beyond the result itself
ACTION_SLACK = 1e-3  # how far outside [-1, 1] an action may lie before the file is refused
MAX_STEP = 1.0  # metres in 0.1 s that an ant may move; of 190,000 simulated steps, walking or at random full torque, none was 0.32
ROUNDING = (
    1e-3  # metres by which a stored goal may differ from the one that rewards were computed with
)
MINARI = "minari:"  # what a source that names a Minari data set begins with
REPAIRED = {False: "", True: ", repaired"}  # added to a label

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


class RepairError(TaskError):
    """Data that can be read, but not be repaired: nothing is known to be broken, or what it takes is not there."""


# ---------------------------------------------------------------------------------------------------------
# Which data


def load(
    task,
    source: str | os.PathLike = "auto",
    *,
    seed: int = 0,
    n_generated: int = 1_000_000,
    repair: bool = False,
    log: Callable[[str], None] = print,
) -> Dataset:
    """The task's transitions from `source`: "auto", "d4rl", "generated", "minari:NAME", or the path of an HDF5 file.

    seed and n_generated, a number of transitions, are the generator's. repair asks for the repaired reading of a
    D4RL antmaze file (read_hdf5); the label then says so. What was taken and why goes to `log` and into
    Dataset.reason. A D4RL file that is there but broken is an error, with "auto" too: replacing it would
    quietly change what a score is quoted for. Raises TaskError.
    """
    named = str(source)
    if repair:
        _check_repair(task, named if named == "generated" or named.startswith(MINARI) else "")
    if source == "generated":
        return _generated(task, seed, n_generated, "asked for by name", log)
    if named.startswith(MINARI):
        return _minari(task, named.removeprefix(MINARI), log)
    if source not in ("auto", "d4rl"):
        return _file(task, Path(source).expanduser(), repair, log)
    path = fetch.d4rl_folder() / fetch.base_name(task)
    if os.path.exists(path):
        return _d4rl(task, path, f"found in {path.parent}", repair, log)
    log(f"data: no D4RL file for {task.name} in {path.parent}, trying to download it")
    try:
        url = fetch.fetch(task)
    except fetch.DownloadError as error:
        why = f"no D4RL file in {path.parent}, download failed ({error.short})"
        if source == "d4rl":
            raise
        if repair:
            raise TaskError(
                f"{why}, and data generated here need no repair: give --data PATH, or no --repair-data"
            ) from error
        if not task.can_generate:
            raise TaskError(f"{why}; {_by_hand(task)}") from error
        return _generated(task, seed, n_generated, f"{why}, so the data were generated here", log)
    return _d4rl(task, path, f"downloaded from {url} to {path.parent}", repair, log)


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


def _check_repair(task, other_source: str = "") -> None:
    if other_source or task.family != "antmaze":
        what = f"{other_source or task.name} data"
        raise RepairError(
            f"nothing is known to be broken in {what}, only in D4RL's antmaze files: leave out --repair-data"
        )


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
    from . import get, names  # only here: the package imports this module

    others = {fetch.base_name(get(name)): name for name in names() if name != task.name}
    if path.name in others:
        raise TaskError(
            f"{path} is D4RL's file of {others[path.name]}, not of {task.name}; give another file or another task"
        )
    reason = f"the file {path}, asked for by its path"
    log(f"data: {reason}")
    arrays = read_hdf5(path, task, repair=repair, log=log)
    return Dataset(
        task.name,
        "file",
        f"file {path.name} (task {task.name}){REPAIRED[repair]}",
        reason,
        **arrays,
    )


def _minari(task, name: str, log) -> Dataset:
    from . import minari  # only here: it checks what it reads with this module

    reason = f"the Minari data set {name}, asked for by its name"
    log(f"data: {reason}")
    return Dataset(
        task.name,
        "minari",
        f"Minari {name} (its scores are not D4RL's)",
        reason,
        **minari.read(name, task),
    )


def _generated(task, seed: int, n_transitions: int, reason: str, log) -> Dataset:
    if not task.can_generate:
        raise TaskError(_by_hand(task))
    from .generate import cached  # only here: reading a file needs no simulator

    log(
        f"data: GENERATED for {task.name}, NOT D4RL's: scores on it are not comparable with published ones"
    )
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
    name = fetch.base_name(task)
    return (
        f"there are no generated data for {task.name}: put D4RL's {task.dataset_file} ({fetch.D4RL_URL}{task.dataset_file}) "
        f"into {fetch.d4rl_folder()} as {name}, or give --data PATH"
    )


# ---------------------------------------------------------------------------------------------------------
# Reading, by D4RL's rules for Q-learning


def read_hdf5(
    path: str | os.PathLike, task, *, repair: bool = False, log: Callable[[str], None] = print
) -> dict[str, np.ndarray]:
    """The arrays of a `Dataset` from a file of N rows in D4RL's layout.

    Row i in 0..N-2 becomes a transition to row i+1 with done = terminals[i], unless an episode was cut off
    there: timeouts[i] or, in a file without timeouts, the task's episode limit. The row after a cut belongs
    to another episode, so a cut row is left out. This is how D4RL reads its files for Q-learning, and how
    published scores were made. A next_observations in the file is not looked at.

    All values must be finite and all actions in [-1, 1], up to ACTION_SLACK: the scripts that made D4RL's
    files clip the actions of pen's demonstrations and policies to that box, and those of kitchen to 0.999.
    From some hundred thousand rows on it takes less memory, its result included, than twice the file's
    observations, actions, rewards, terminals and timeouts take in float32 and bool (bench/loading.py). Raises TaskError.

    repair=True, for antmaze files, reads what the ant did instead of what the flags say (repaired); what that
    changed goes to log.
    """
    if repair:
        _check_repair(task)
    path = Path(path)
    with _opened(path) as file:
        try:
            n = _check_layout(file, path, task)
            terminals = _flags(file["terminals"], path)
            cut = (
                _flags(file["timeouts"], path)
                if "timeouts" in file
                else limit_cuts(terminals, task.episode_limit)
            )
            keep, ended, relabelled = ~cut[:-1], terminals[:-1], False
            if repair:
                keep, ended, relabelled = repaired(file, path, terminals, cut, log)
            if not keep.any():
                raise TaskError(f"{path} has no transitions, all {n} rows are cut off: use another")
            first, second = (
                np.append(keep, False),
                np.append(False, keep),
            )  # rows that begin a transition, that end one
            observations, next_observations = _taken(file["observations"], path, first, second)
            (actions,) = _taken(file["actions"], path, first, check=in_box)
            (rewards,) = _taken(file["rewards"], path, first)
        except OSError as error:
            raise TaskError(
                f"{path} is damaged ({one_line(error)}); get or make it again"
            ) from error
    terminals = ended[keep]
    return {
        "observations": observations,
        "actions": actions,
        "next_observations": next_observations,
        "rewards": terminals.astype(np.float32) if relabelled else rewards.reshape(-1),
        "terminals": terminals,
    }


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


def repaired(
    file: h5py.File, path: Path, terminals: np.ndarray, cut: np.ndarray, log: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray, bool]:
    """What an antmaze file's rows 0..N-2 are by the ant's path, where D4RL's flags, terminals and cut (N,) bool, are wrong.

    -> whether a row is a transition to the next one (N-1,) bool, the terminals (N-1,) bool, and whether these are
    new, so that they are the rewards too. Two things are wrong in D4RL's antmaze-v0 files. In medium-diverse and
    umaze-diverse the timeouts are out of step with the trajectories (D4RL's issues 77 and 146): rows where one
    trajectory ends and another begins are read as steps of up to 21 m, and rows in the middle of one are left out.
    In umaze-diverse one row a trajectory is rewarded and terminal, in the others every row that ends within
    0.5 m of the goal (issue 199).

    Successors: cut is not used. Row i+1 follows row i unless the torso is more than MAX_STEP away there or
    infos/goal is another, for D4RL's script draws a goal whenever it resets the ant, and only then. A row that
    nothing follows is left out, unless it is a terminal near its goal: being done, it needs no successor. What
    is not noticed is a new start within MAX_STEP and for the same goal.

    Terminals and rewards: where the file's own terminals lie within 0.5 m of infos/goal, they become 1 in
    every row that ends there, else 0. Where they do not, infos/goal is only where the collecting ant was sent, and
    they stay as they are: D4RL's relabelling script drew one goal for a whole file, which it did not store,
    but it did look at every row. Raises RepairError without infos/goal, or where all terminals would be lost.
    """
    goals = file.get("infos/goal") if isinstance(file.get("infos"), h5py.Group) else None
    if (
        not isinstance(goals, h5py.Dataset)
        or goals.shape != (len(terminals), 2)
        or goals.dtype.kind != "f"
    ):
        raise RepairError(
            f"{path} has no infos/goal, (N, 2): it cannot be repaired; leave out --repair-data"
        )
    xy = finite(file["observations"][:, :2], f"{path}: observations")
    goal = finite(goals[:], f"{path}: infos/goal")
    follows = (_apart(xy[1:], xy[:-1]) <= MAX_STEP) & (goal[1:] == goal[:-1]).all(axis=1)
    near = _apart(xy[:-1], goal[:-1]) <= GOAL_RADIUS + MAX_STEP
    left = _apart(xy[1:], goal[:-1])
    marked, cut = terminals[:-1], cut[:-1]
    fits = np.where(follows, left <= GOAL_RADIUS + ROUNDING, near)
    relabel = bool(fits[marked & follows].all() and fits[marked].any())
    ended = np.where(follows, left <= GOAL_RADIUS, marked & near) if relabel else marked & follows
    keep = follows | ended
    if marked.any() and not ended.any():
        raise RepairError(
            f"{path} cannot be repaired, its terminals have no successors and are not at infos/goal; leave out --repair-data"
        )
    how = "by infos/goal" if relabel else "as the file has them, for another goal than infos/goal"
    log(
        f"data: repaired: {np.sum(keep & cut):,} rows taken in spite of their timeouts, {np.sum(~keep & ~cut):,} more left out; "
        f"{np.sum(ended):,} terminals {how}, where the file has {np.sum(marked):,}"
    )
    return keep, ended, relabel


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - b, axis=1)


def finite(rows: np.ndarray, where: str, first: int = 0) -> np.ndarray:
    """The rows as float32. Raises TaskError if not all are finite, naming `where` and the row, counted from first."""
    with np.errstate(
        over="ignore"
    ):  # a float64 beyond float32 becomes inf, and is reported as that
        rows = rows.astype(np.float32, copy=False)
    good = np.isfinite(rows)
    if not good.all():
        place = tuple(np.argwhere(~good)[0])
        raise TaskError(
            f"{where} has {rows[place]} in row {first + place[0]}; repair the data or use others"
        )
    return rows


def in_box(actions: np.ndarray, where: str, first: int = 0) -> np.ndarray:
    """The actions, finite and as float32. Raises TaskError if one lies more than ACTION_SLACK outside [-1, 1]."""
    actions = finite(actions, where, first)
    outside = np.abs(actions) > 1 + ACTION_SLACK
    if outside.any():
        row, column = np.argwhere(outside)[0]
        value = f"{actions[row, column]:.4g} in row {first + row}"
        raise TaskError(f"{where} has {value}, outside [-1, 1]; scale the actions to that box")
    return actions


def _taken(
    array: h5py.Dataset, path: Path, *masks: np.ndarray, check: Callable = finite
) -> list[np.ndarray]:
    """For each mask (N,) the rows of array (N, ...) where it is True, as float32; all of array is read once and checked."""
    chunk = array.chunks[0] if array.chunks else 1
    step = max(1, ROWS // chunk) * chunk  # no chunk is unpacked twice
    taken, counts = (
        [np.empty((mask.sum(), *array.shape[1:]), np.float32) for mask in masks],
        [0] * len(masks),
    )
    for start in range(0, len(array), step):
        rows = check(array[start : start + step], f"{path}: {array.name.lstrip('/')}", start)
        for k, mask in enumerate(masks):
            chosen = rows[mask[start : start + step]]
            taken[k][counts[k] : counts[k] + len(chosen)] = chosen
            counts[k] += len(chosen)
    return taken


def _opened(path: Path) -> h5py.File:
    if not os.path.isfile(path):
        raise TaskError(
            f"there is no file {path}: give auto, d4rl, generated, minari:NAME, or the path of an HDF5 file"
        )
    try:
        return h5py.File(path, "r")
    except OSError as error:
        message = f"{path} is not a whole HDF5 file ({one_line(error)}); get or make it again"
        raise TaskError(message) from error


def _check_layout(file: h5py.File, path: Path, task) -> int:
    """The number of rows, after a check that every array is there, of the task's shape and that long."""
    keys = ("observations", "actions", "rewards", "terminals")
    missing = [key for key in keys if not isinstance(file.get(key), h5py.Dataset)]
    if missing:
        there = ", ".join(sorted(file)[:8]) or "nothing"
        raise TaskError(
            f"{path} lacks {', '.join(missing)} (it has {there}); use a file in D4RL's layout"
        )
    made_for = file.attrs.get("task", task.name)  # data generated here say it
    if made_for != task.name:
        raise TaskError(
            f"{path} was generated for {made_for}, not for {task.name}; give another file or another task"
        )
    arrays = {key: file[key] for key in (*keys, "timeouts") if key in file}
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise TaskError(
                f"{path}: {key} holds {array.dtype}, not numbers; use a file in D4RL's layout"
            )
        if key not in ("observations", "actions") and array.shape not in (
            (array.size,),
            (array.size, 1),
        ):
            raise TaskError(
                f"{path}: {key} has shape {array.shape}, not one number a row; use another file"
            )
    _check_shapes(file["observations"].shape, file["actions"].shape, path, task)
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} {length:,}" for key, length in lengths.items())
        raise TaskError(
            f"{path}: the arrays differ in length ({counts}); get or make the file again"
        )
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
    raise TaskError(
        f"{path} holds another task's data{f', probably of {family}' if family else ''}: observations "
        f"{observations} and actions {actions}, where {task.name} needs (N, {task.state_dim}) and "
        f"(N, {task.action_dim}); give another file or another task"
    )


def _flags(array: h5py.Dataset, path: Path) -> np.ndarray:
    return finite(array[:], f"{path}: {array.name.lstrip('/')}").reshape(-1).astype(bool)
