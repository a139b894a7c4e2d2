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

import warnings

import numpy as np
from gymnasium import spaces

from .task import TaskError, finite, in_box, one_line


def read(name: str, task) -> dict[str, np.ndarray]:
    """The arrays of a tasks.Dataset from the local Minari data set `name`.

    Each of an episode's T steps is a transition, the last one too: an episode has T+1 observations.
    done is Minari's termination; a truncation is not terminal. Raises TaskError if Minari or the
    data set is missing, if observations or actions are not the task's, if values are not finite,
    and if actions lie outside [-1, 1].
    """
    where = f"Minari's {name}"
    data = _opened(name)
    _check_spaces(data, where, task)
    n = data.total_steps
    arrays = {
        "observations": np.empty((n, task.state_dim), np.float32),
        "actions": np.empty((n, task.action_dim), np.float32),
        "next_observations": np.empty((n, task.state_dim), np.float32),
        "rewards": np.empty(n, np.float32),
        "terminals": np.empty(n, bool),
    }
    start = 0
    try:
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
            start = rows.stop
        if start != n or not n:
            raise ValueError(f"it has {start:,} steps and announces {n:,}")
    except (OSError, ValueError, KeyError, AssertionError) as error:
        what = f"{where} is damaged, {one_line(error)}"
        raise TaskError(f"{what}: delete it and download or make it again") from error
    return arrays


def _opened(name: str):
    try:
        import minari
    except ImportError as error:
        what = f"reading Minari's {name} takes the package minari"
        raise TaskError(f"{what}: pip install -r requirements.txt") from error
    try:
        return minari.load_dataset(name)
    except FileNotFoundError:
        what = f"there is no local Minari data set {name!r}{_local(minari)}"
        get = f"get it with: minari download {name or 'NAME'}"
        raise TaskError(f"{what}; {get}") from None
    except (OSError, ValueError, KeyError, TypeError, ImportError, AssertionError) as error:
        raise TaskError(f"Minari's {name} cannot be opened: {one_line(error)}") from error


def _local(minari) -> str:
    """For an error message: the data sets that are there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other folders that are not whole data sets
            return ", only " + (", ".join(minari.list_local_datasets()) or "an empty folder")
    except (OSError, ValueError, TypeError):  # a folder whose name is not a data set's
        return ""


def _check_spaces(data, where: str, task) -> None:
    wanted = {
        "observations": (data.observation_space, task.state_dim),
        "actions": (data.action_space, task.action_dim),
    }
    for what, (space, size) in wanted.items():
        if not isinstance(space, spaces.Box):
            parts = f" of {', '.join(space)}" if isinstance(space, spaces.Dict) else ""
            has = f"{where} has {what} in a {type(space).__name__} space{parts}"
            needs = f"{task.name} needs {size} numbers"
            raise TaskError(f"{has}, {needs}: they are another task's")
        if space.shape != (size,):
            has = f"{where} has {what} of shape {space.shape}"
            raise TaskError(f"{has}, {task.name} needs ({size},): they are another task's")
