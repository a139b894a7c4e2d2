"""A local Minari data set as a task's transitions.

    pip install "minari[hf]"                        what downloads takes more than what reads: [hf]
    minari download mujoco/hopper/medium-v0         into ~/.minari/datasets, or $MINARI_DATASETS_PATH
    tasks.load(task, "minari:mujoco/hopper/medium-v0")

Minari's data sets are not D4RL's, not even those it calls D4RL: they were made anew in the environments of Gymnasium and
Gymnasium-Robotics. Taken are those whose observations and actions are single arrays of the task's sizes. Ant mazes and kitchens
have observations of several parts there and are refused: put together in D4RL's order, an ant's would have D4RL's 29 numbers, but
its place would be counted from the middle of the maze and not from where D4RL's ant starts.
"""

import warnings

import numpy as np
from gymnasium import spaces

from .datasets import finite, in_box
from .task import TaskError, one_line


def read(name: str, task) -> dict[str, np.ndarray]:
    """The arrays of a tasks.Dataset from the local Minari data set `name`.

    Each of an episode's T steps is a transition, the last one too, for an episode has T+1 observations. done is
    Minari's termination; a truncation is not terminal. Raises TaskError without Minari or the data set, for observations
    or actions that are not the task's, and for values that are not finite or actions outside [-1, 1].
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
            of, columns = (
                f"{where}, episode {episode.id}",
                (episode.actions, episode.rewards, episode.terminations),
            )
            into = slice(start, start + len(episode))
            if {len(episode.observations) - 1, *map(len, columns)} != {len(episode)}:
                raise ValueError(f"the columns of episode {episode.id} differ in length")
            observations = finite(episode.observations, f"{of}: observations")
            arrays["observations"][into], arrays["next_observations"][into] = (
                observations[:-1],
                observations[1:],
            )
            arrays["actions"][into] = in_box(episode.actions, f"{of}: actions")
            arrays["rewards"][into] = finite(episode.rewards, f"{of}: rewards")
            arrays["terminals"][into] = episode.terminations
            start = into.stop
        if start != n or not n:
            raise ValueError(f"it has {start:,} steps and announces {n:,}")
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise TaskError(
            f"{where} is damaged, {one_line(error)}: delete it and download or make it again"
        ) from error
    return arrays


def _opened(name: str):
    try:
        import minari
    except ImportError as error:
        raise TaskError(
            f"reading Minari's {name} takes the package minari: pip install -r requirements.txt"
        ) from error
    try:
        return minari.load_dataset(name)
    except FileNotFoundError:
        get = f"get it with: minari download {name or 'NAME'}"
        raise TaskError(
            f"there is no local Minari data set {name!r}{_local(minari)}; {get}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, ImportError, AssertionError) as error:
        raise TaskError(f"Minari's {name} cannot be opened: {one_line(error)}") from error


def _local(minari) -> str:
    """What there is instead, for an error's text."""
    try:
        with warnings.catch_warnings():  # of neighbours that are not whole data sets
            warnings.simplefilter("ignore")
            return ", only " + (", ".join(minari.list_local_datasets()) or "an empty folder")
    except (OSError, ValueError, TypeError):  # of a folder whose name is not a data set's
        return ""


def _check_spaces(data, where: str, task) -> None:
    wanted = {
        "observations": (data.observation_space, task.state_dim),
        "actions": (data.action_space, task.action_dim),
    }
    for what, (space, size) in wanted.items():
        if not isinstance(space, spaces.Box):
            parts = f" of {', '.join(space)}" if isinstance(space, spaces.Dict) else ""
            raise TaskError(
                f"{where} has {what} in a {type(space).__name__} space{parts}, {task.name} needs {size} numbers: "
                "they are another task's"
            )
        if space.shape != (size,):
            raise TaskError(
                f"{where} has {what} of shape {space.shape}, {task.name} needs ({size},): they are another task's"
            )
