"""Data generated where D4RL's are not available: an HDF5 file like D4RL's, in the cache folder.

    path = cached(tasks.get("hopper-medium-v2"), n_transitions=1_000_000, seed=0)

It is another data set, not a copy of D4RL's: a score on it must be quoted with its name.
antmaze_data.py and locomotion_data.py say how it is made. The other tasks have no generator: no
controller as simple as those turns a pen or works a kitchen.
"""

import errno
import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import h5py
import mujoco
import numpy as np

from atomic import lock, written_whole

from .hdf5 import AccessError, opened
from .task import NO_SPACE, Task, TaskError, expanded, one_line, readable, system_reason

# Task family -> module. Each module has VERSION, Recipe, statistics(arrays), and
# simulate(task, n_transitions, seed, recipe, n_threads) -> arrays by key.
MAKERS = {"antmaze": ".antmaze_data", "locomotion": ".locomotion_data"}


def maker(task: Task):
    """The module that makes a task's data. Raises TaskError for a task without one."""
    if not task.can_generate:
        what = f"there are no generated data for {task.name}"
        raise TaskError(f"{what}: give D4RL's file, or another with --data PATH")
    return importlib.import_module(MAKERS[task.family], __package__)


def generate(
    task: Task,
    path: str | Path,
    *,
    n_transitions: int = 1_000_000,
    seed: int = 0,
    n_threads: int | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Generate n_transitions for a task and write them to path like a D4RL HDF5 file, atomically.

    The data depend on task, n_transitions and seed only, not on n_threads (default: all cores).
    Keys, each with n_transitions rows: observations, actions, rewards and infos/... in float32,
    terminals and timeouts in bool. Attributes: the recipe, its version, the seed, and the
    statistics that are also logged. Raises TaskError if n_transitions is less than 2, if the task
    has no generator, or if path cannot be written.
    """
    path, makes = Path(path), maker(task)
    if n_transitions < 2:
        what = f"n_transitions is {n_transitions}"
        raise TaskError(f"{what}: a data set needs at least 2 transitions")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder that is not writable fails here, not after minutes of work.
        with written_whole(path) as temporary:
            what = f"{n_transitions:,} transitions for {task.name}"
            log(f"generating {what}, seed {seed}, recipe {makes.VERSION}")
            recipe = makes.Recipe()
            data = makes.simulate(task, n_transitions, seed, recipe, n_threads)
            facts = makes.statistics(data)
            named = (f"{name.replace('_', ' ')} {readable(value)}" for name, value in facts.items())
            log(f"generated data: {', '.join(named)}")
            origin = {"task": task.name, "seed": seed, "recipe_version": makes.VERSION}
            _write(temporary, data, origin | facts | asdict(recipe))
    except OSError as error:
        what = f"cannot write generated data to {one_line(path)} ({system_reason(error)})"
        todo = "free some space" if error.errno in NO_SPACE else "look at the folder"
        raise TaskError(f"{what}: {todo} or set XDG_CACHE_HOME to another one") from error


def _write(path: Path, data: dict[str, np.ndarray], facts: dict) -> None:
    # Not compressed: gzip would save an eighth of the space and make reading seven times slower.
    versions = {"mujoco_version": mujoco.__version__, "numpy_version": np.__version__}
    try:
        with h5py.File(path, "w") as file:
            for key, array in data.items():
                file[key] = array
            file.attrs.update(facts | versions)
    except RuntimeError as error:  # h5py's for a disk that is full when the file is closed
        number = re.search(r"errno = (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, one_line(error)) from error


def cached(
    task: Task, *, n_transitions: int = 1_000_000, seed: int = 0, log: Callable[[str], None] = print
) -> Path:
    """The generated file of this task, size, seed and recipe in the cache folder, made if missing.

    -> its path. The folder is $XDG_CACHE_HOME/diffusion-ql, else ~/.cache/diffusion-ql. Of several
    processes that need the same file one makes it, and the others wait. A file that is not whole is
    made again, and one of an earlier recipe is not used: a line says so. Raises TaskError as
    generate() does, where there is no home directory, and AccessError for a file that may be sound
    but cannot be read.
    """
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = expanded(parent, "set XDG_CACHE_HOME to a folder for generated data") / "diffusion-ql"
    name, version = f"{task.name}-seed{seed}-{n_transitions}", maker(task).VERSION
    path = folder / f"{name}-r{version}.hdf5"
    if _usable(path, log):  # without the lock: the folder may be another user's
        return path
    with _alone(path, log):
        if _usable(path, log):  # made by another process meanwhile
            return path
        if path.exists():
            log(f"{one_line(path)} is not a whole file of generated data; generating it again")
        else:
            for earlier in sorted(folder.glob(f"{name}-r*.hdf5")):
                why = f"of an earlier recipe or physics, not of recipe {version}"
                log(f"{one_line(earlier)} is {why}; not used")
        generate(task, path, n_transitions=n_transitions, seed=seed, log=log)
    return path


def _usable(path: Path, log: Callable[[str], None]) -> bool:
    """Whether a whole file is there. Raises AccessError if that cannot be said."""
    try:
        with opened(path) as file:
            mean_return = float(file.attrs["mean_return"])
    except AccessError as error:
        raise AccessError(f"{error}, or set XDG_CACHE_HOME to another folder") from error
    except TaskError:
        return False
    log(f"using {one_line(path)}, generated earlier, of mean return {readable(mean_return)}")
    return True


@contextmanager
def _alone(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keeps other processes from generating path meanwhile, where the file system has locks.

    What killed processes left of it is removed.
    """
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mine = lock(path)
            try:
                mine.acquire(timeout=0)
            except TimeoutError:
                log(f"another process is generating {one_line(path)}: waiting for it")
                mine.acquire()
            held.callback(mine.release)
            for left in path.parent.glob(f".{path.name}.*.part"):
                left.unlink()
        except (OSError, NotImplementedError):
            pass  # no lock: at worst two make the same file. generate() names a bad folder
        yield
