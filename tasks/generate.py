"""Data made here, where D4RL's files cannot be had: a D4RL HDF5 file, in the user's cache folder.

    path = cached(tasks.get("hopper-medium-v2"), n_transitions=1_000_000, seed=0)

It is another data set, not a copy of D4RL's: scores on it must be quoted for it. antmaze_data.py and locomotion_data.py say how it
is made; the other tasks have no generator, since nothing as simple as theirs turns a pen or runs a kitchen.
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

# Each has VERSION, Recipe, simulate(task, n_transitions, seed, recipe, n_threads) -> arrays by key, and statistics(arrays).
MAKERS = {"antmaze": ".antmaze_data", "locomotion": ".locomotion_data"}


def maker(task: Task):
    """The module that makes a task's data. Raises TaskError for a task without one."""
    if not task.can_generate:
        raise TaskError(
            f"there are no generated data for {task.name}: give D4RL's file, or another with --data PATH"
        )
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
    """Make n_transitions of data for a task and write them to path as a D4RL HDF5 file, atomically.

    The data depend on task, n_transitions and seed only, not on n_threads (default: all cores). Keys, each with n_transitions
    rows: observations, actions, rewards and infos/... in float32, terminals and timeouts in bool. Attributes: the recipe, its
    version, the seed, and the statistics that are also logged. Raises TaskError for a bad n_transitions, for a task without a
    generator, or when path cannot be written.
    """
    path, makes = Path(path), maker(task)
    if n_transitions < 2:
        raise TaskError(
            f"n_transitions is {n_transitions}: a data set needs at least 2 transitions"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.touch()  # a folder that cannot be written is noticed now, not after minutes of work
            log(
                f"generating {n_transitions:,} transitions for {task.name}, seed {seed}, recipe {makes.VERSION}"
            )
            recipe = makes.Recipe()
            data = makes.simulate(task, n_transitions, seed, recipe, n_threads)
            facts = makes.statistics(data)
            log(
                "generated data: "
                + ", ".join(f"{name} {value:.7g}" for name, value in facts.items())
            )
            _write(
                temporary,
                data,
                dict(task=task.name, seed=seed, recipe_version=makes.VERSION)
                | facts
                | asdict(recipe),
            )
    except OSError as error:
        message = f"cannot write generated data to {path}: {error}; free the disk or choose another folder"
        raise TaskError(message) from error


def _write(path: Path, data: dict[str, np.ndarray], facts: dict) -> None:
    """Not compressed: gzip would save an eighth of these floats and make reading seven times slower."""
    versions = {"mujoco_version": mujoco.__version__, "numpy_version": np.__version__}
    with h5py.File(path, "w") as file:
        for key, array in data.items():
            file[key] = array
        file.attrs.update(facts | versions)


def cached(
    task: Task, *, n_transitions: int = 1_000_000, seed: int = 0, log: Callable[[str], None] = print
) -> Path:
    """The generated file of this task, size, seed and recipe in the cache folder; made when not there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-ql"
    path = folder / f"{task.name}-seed{seed}-{n_transitions}-r{maker(task).VERSION}.hdf5"
    if path.exists():
        try:
            with h5py.File(path) as file:
                log(
                    f"using {path}, generated earlier, of mean return {file.attrs['mean_return']:.4g}"
                )
            return path
        except (OSError, KeyError) as error:
            log(f"cannot open {path} ({error}); generating it again")
    generate(task, path, n_transitions=n_transitions, seed=seed, log=log)
    return path
