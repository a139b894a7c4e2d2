"""D4RL's tasks on today's MuJoCo: a name gives an environment, a data set and a score.

    task = tasks.get("antmaze-umaze-v0")        # limits, score, task.evaluate(act, ...), task.draw_paths(...)
    data = tasks.load(task)                     # D4RL's file where it can be had, else data generated here
    env = gymnasium.make("antmaze-umaze-v0")    # importing this package registers every task with gymnasium
"""

import difflib

import gymnasium

from .antmaze import AntMaze
from .antmaze_env import film
from .datasets import load
from .task import Dataset, Episodes, TaskError

__all__ = ["AntMaze", "Dataset", "Episodes", "TaskError", "film", "get", "load", "names"]


def _antmaze(name: str, maze: str, file: str) -> AntMaze:
    limit = 700 if maze == "umaze" else 1000
    return AntMaze(name, maze, "-diverse-" in name, limit, f"ant_maze_new/Ant_maze_{file}_sparse.hdf5")


_TASKS = {
    task.name: task
    for task in (
        _antmaze("antmaze-umaze-v0", "umaze", "u-maze_noisy_multistart_False_multigoal_False"),
        _antmaze("antmaze-umaze-diverse-v0", "umaze", "u-maze_noisy_multistart_True_multigoal_True"),
        _antmaze("antmaze-medium-play-v0", "medium", "big-maze_noisy_multistart_True_multigoal_False"),
        _antmaze("antmaze-medium-diverse-v0", "medium", "big-maze_noisy_multistart_True_multigoal_True"),
        _antmaze("antmaze-large-play-v0", "large", "hardest-maze_noisy_multistart_True_multigoal_False"),
        _antmaze("antmaze-large-diverse-v0", "large", "hardest-maze_noisy_multistart_True_multigoal_True"),
    )
}


def names() -> list[str]:
    """The names of all tasks."""
    return list(_TASKS)


def get(name: str) -> AntMaze:
    """The task of this name. Raises TaskError with the nearest names if there is none."""
    if name not in _TASKS:
        nearest = ", ".join(difflib.get_close_matches(name, _TASKS, n=3, cutoff=0.0))
        raise TaskError(f"no task is called {name!r}; the nearest are {nearest}")
    return _TASKS[name]


for _task in _TASKS.values():
    gymnasium.register(
        id=_task.name,
        entry_point="tasks.antmaze_env:AntMazeEnv",
        kwargs={"maze": _task.maze},
        max_episode_steps=_task.episode_limit,
    )
