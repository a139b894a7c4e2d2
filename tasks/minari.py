"""A local Minari data set as a task's transitions.

    pip install "minari[hf]"                     [hf] is for downloads; reading does not need it
    minari download mujoco/hopper/medium-v0      to ~/.minari/datasets, or $MINARI_DATASETS_PATH
    tasks.load(task, "minari:mujoco/hopper/medium-v0")

Minari's data sets are not D4RL's, not even those it calls D4RL: they were made again in the
environments of Gymnasium and Gymnasium-Robotics. Accepted are those whose observations and actions
are single arrays of the task's sizes. Ant mazes and kitchens are refused: their observations have
several parts there. Joined in D4RL's order, an ant's would have D4RL's 29 numbers, but its position
would be relative to the middle of the maze, not to where D4RL's ant starts.
"""

import os
import warnings
from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium import spaces

from .hdf5 import opened
from .task import TaskError, expanded, finite, in_box, one_line, summary

# What Minari and the libraries below it raise for data sets that are not as they should be.
ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    NotImplementedError,
    gymnasium.error.Error,
)


def read(name: str, task, *, log: Callable[[str], None] = print) -> dict[str, np.ndarray]:
    """The arrays of a tasks.Dataset from the local Minari data set `name`.

    Each of an episode's T steps is a transition, the last one too: an episode has T+1 observations.
    done is Minari's termination; a truncation is not terminal. A summary goes to log. Raises
    TaskError if Minari or the data set is missing, if its environment, observations or actions are
    not the task's, if values are not finite, and if actions lie outside [-1, 1].
    """
    where = f"Minari's {one_line(name)}"
    data = _opened(name, where)
    _check_spaces(data, where, task)
    _check_environment(data, where, task)
    _check_file(data)
    start, returns = 0, []
    try:
        n = data.total_steps
        arrays = {
            "observations": np.empty((n, task.state_dim), np.float32),
            "actions": np.empty((n, task.action_dim), np.float32),
            "next_observations": np.empty((n, task.state_dim), np.float32),
            "rewards": np.empty(n, np.float32),
            "terminals": np.empty(n, bool),
        }
        for episode in data.iterate_episodes():
            here = f"{where}, episode {episode.id}"
            rows = slice(start, start + len(episode))
            columns = (episode.actions, episode.rewards, episode.terminations)
            if {len(episode.observations) - 1, *map(len, columns)} != {len(episode)}:
                raise ValueError(f"the columns of episode {episode.id} differ in length")
            observations = finite(episode.observations, f"{here}: observations")
            arrays["observations"][rows] = observations[:-1]
            arrays["next_observations"][rows] = observations[1:]
            arrays["actions"][rows] = in_box(episode.actions, f"{here}: actions")
            arrays["rewards"][rows] = finite(episode.rewards, f"{here}: rewards")
            arrays["terminals"][rows] = episode.terminations
            returns.append(arrays["rewards"][rows].sum(dtype=np.float64))
            start = rows.stop
        if start != n or not n:
            raise ValueError(f"it has {start:,} steps and announces {n:,}")
    except ERRORS as error:
        what = f"{where} is damaged, {one_line(error) or type(error).__name__}"
        raise TaskError(f"{what}: delete it and download or make it again") from error
    log(summary(n, arrays["observations"], arrays["terminals"], np.array(returns)))
    return arrays


def _opened(name: str, where: str):
    try:
        import minari
    except ImportError as error:
        what = f"reading {where} takes the package minari"
        raise TaskError(f"{what}: pip install -r requirements.txt") from error
    if "MINARI_DATASETS_PATH" not in os.environ:
        expanded("~", "set MINARI_DATASETS_PATH to the folder of Minari's data sets")
    try:
        return minari.load_dataset(name)
    except FileNotFoundError:
        what = f"there is no local Minari data set {name!r}{_local(minari)}"
        get = f"get it with: minari download {one_line(name) or 'NAME'}"
        raise TaskError(f"{what}; {get}") from None
    except ERRORS as error:
        why = one_line(error) or type(error).__name__
        raise TaskError(f"{where} cannot be opened: {why}") from error


def _local(minari) -> str:
    """For an error message: the data sets that are there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other folders that are not whole data sets
            found = ", ".join(minari.list_local_datasets())
            return f", only {one_line(found) or 'an empty folder'}"
    except ERRORS:  # a folder whose name is not a data set's
        return ""


def _check_file(data) -> None:
    """Raises TaskError if Minari's HDF5 file cannot be read: Minari's own errors say less."""
    path = data.storage.data_path / "main_data.hdf5"
    if path.exists():  # there is none in its other format
        with opened(path):
            pass


def _check_environment(data, where: str, task) -> None:
    """Halfcheetahs and walkers have the same sizes. A data set need not say where it is from."""
    kind = task.name.split("-")[0]
    if data.env_spec is not None and kind not in str(data.env_spec.id).lower():
        made_in = one_line(data.env_spec.id)
        what = f"{where} was recorded in {made_in}, {task.name} needs a {kind}'s data"
        raise TaskError(f"{what}: give another data set or another task")


def _check_spaces(data, where: str, task) -> None:
    wanted = {
        "observations": (data.observation_space, task.state_dim),
        "actions": (data.action_space, task.action_dim),
    }
    for what, (space, size) in wanted.items():
        if not isinstance(space, spaces.Box):
            parts = f" of {one_line(', '.join(space))}" if isinstance(space, spaces.Dict) else ""
            has = f"{where} has {what} in a {type(space).__name__} space{parts}"
            needs = f"{task.name} needs {size} numbers"
            raise TaskError(f"{has}, {needs}: they are another task's")
        if space.shape != (size,):
            has = f"{where} has {what} of shape {space.shape}"
            raise TaskError(f"{has}, {task.name} needs ({size},): they are another task's")
