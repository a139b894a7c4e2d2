"""Data generated where D4RL's are not available: an HDF5 file like D4RL's, in the cache folder.

    path = cached(tasks.get("hopper-medium-v2"), n_transitions=1_000_000, seed=0)

It is another data set, not a copy of D4RL's: a score on it must be quoted with its name.
antmaze_data.py and locomotion_data.py say how it is made. The other tasks have no generator: no
controller as simple as those turns a pen or works a kitchen.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import h5py
import mujoco
import numpy as np

from atomic import written_whole

from .task import Task, TaskError

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
        with written_whole(path) as temporary:
            temporary.touch()  # fail now if the folder is not writable, not after minutes of work
            what = f"{n_transitions:,} transitions for {task.name}"
            log(f"generating {what}, seed {seed}, recipe {makes.VERSION}")
            recipe = makes.Recipe()
            data = makes.simulate(task, n_transitions, seed, recipe, n_threads)
            facts = makes.statistics(data)
            figures = ", ".join(f"{name} {value:.7g}" for name, value in facts.items())
            log(f"generated data: {figures}")
            origin = {"task": task.name, "seed": seed, "recipe_version": makes.VERSION}
            _write(temporary, data, origin | facts | asdict(recipe))
    except OSError as error:
        what = f"cannot write generated data to {path}: {error}"
        raise TaskError(f"{what}; free the disk or choose another folder") from error


def _write(path: Path, data: dict[str, np.ndarray], facts: dict) -> None:
    # Not compressed: gzip would save an eighth of the space and make reading seven times slower.
    versions = {"mujoco_version": mujoco.__version__, "numpy_version": np.__version__}
    with h5py.File(path, "w") as file:
        for key, array in data.items():
            file[key] = array
        file.attrs.update(facts | versions)


def cached(
    task: Task, *, n_transitions: int = 1_000_000, seed: int = 0, log: Callable[[str], None] = print
) -> Path:
    """The generated file of this task, size, seed and recipe in the cache folder, made if missing.

    -> its path. The folder is $XDG_CACHE_HOME/diffusion-ql, else ~/.cache/diffusion-ql. A file that
    cannot be opened is made again, and one of an earlier recipe is not used: a line says so. Raises
    TaskError as generate() does.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-ql"
    name, version = f"{task.name}-seed{seed}-{n_transitions}", maker(task).VERSION
    path = folder / f"{name}-r{version}.hdf5"
    if path.exists():
        try:
            with h5py.File(path) as file:
                mean_return = file.attrs["mean_return"]
            log(f"using {path}, generated earlier, of mean return {mean_return:.4g}")
            return path
        except (OSError, KeyError) as error:
            log(f"cannot open {path} ({error}); generating it again")
    else:
        for earlier in sorted(folder.glob(f"{name}-r*.hdf5")):
            log(f"{earlier} is of an earlier recipe or physics, not of recipe {version}; not used")
    generate(task, path, n_transitions=n_transitions, seed=seed, log=log)
    return path
