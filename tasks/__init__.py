"""D4RL's tasks on today's MuJoCo: a name gives an environment, a data set and a score.

task = tasks.get("antmaze-umaze-v0")        # limits, score, task.evaluate(act, ...), task.draw(...)
data = tasks.load(task)                     # D4RL's file where it can be had, else data generated here
env = gymnasium.make("antmaze-umaze-v0")    # importing this package registers every task with gymnasium
"""

import difflib
import os

import gymnasium

from . import env
from .adroit import Pen
from .antmaze import AntMaze
from .datasets import load
from .kitchen import Kitchen
from .locomotion import Locomotion
from .task import Dataset, Episodes, Task, TaskError

__all__ = [
    "AntMaze",
    "Dataset",
    "Episodes",
    "Kitchen",
    "Locomotion",
    "Pen",
    "Task",
    "TaskError",
    "film",
    "get",
    "load",
    "names",
]

# Returns of a random policy and of an expert, by D4RL, and sizes of observation and action.
_BODIES = {
    "halfcheetah": (-280.178953, 12135.0, 17, 6),
    "hopper": (-20.272305, 3234.3, 11, 3),
    "walker2d": (1.629008, 4592.3, 17, 6),
}
_MAZES = {
    "umaze": ("umaze", "u-maze_noisy_multistart_False_multigoal_False"),
    "umaze-diverse": ("umaze", "u-maze_noisy_multistart_True_multigoal_True"),
    "medium-play": ("medium", "big-maze_noisy_multistart_True_multigoal_False"),
    "medium-diverse": ("medium", "big-maze_noisy_multistart_True_multigoal_True"),
    "large-play": ("large", "hardest-maze_noisy_multistart_True_multigoal_False"),
    "large-diverse": ("large", "hardest-maze_noisy_multistart_True_multigoal_True"),
}
_KITCHENS = {
    "complete": (
        "mini_kitchen_microwave_kettle_light_slider",
        ("microwave", "kettle", "light switch", "slide cabinet"),
    ),
    "partial": (
        "kitchen_microwave_kettle_light_slider",
        ("microwave", "kettle", "light switch", "slide cabinet"),
    ),
    "mixed": (
        "kitchen_microwave_kettle_bottomburner_light",
        ("microwave", "kettle", "bottom burner", "light switch"),
    ),
}


def _locomotion(body: str, quality: str) -> Locomotion:
    ref_min, ref_max, state_dim, action_dim = _BODIES[body]
    file = f"gym_mujoco_v2/{body}_{quality.replace('-', '_')}-v2.hdf5"
    return Locomotion(
        f"{body}-{quality}-v2", file, state_dim, action_dim, 1000, ref_min, ref_max, body, quality
    )


def _antmaze(kind: str) -> AntMaze:
    maze, file = _MAZES[kind]
    limit = 700 if maze == "umaze" else 1000
    return AntMaze(
        f"antmaze-{kind}-v0",
        f"ant_maze_new/Ant_maze_{file}_sparse.hdf5",
        29,
        8,
        limit,
        0.0,
        1.0,
        maze,
        "diverse" in kind,
    )


def _pen(kind: str) -> Pen:
    return Pen(
        f"pen-{kind}-v1", f"hand_dapg_v1/pen-{kind}-v1.hdf5", 45, 24, 100, 96.262799, 3076.8331
    )


def _kitchen(kind: str) -> Kitchen:
    file, subtasks = _KITCHENS[kind]
    return Kitchen(f"kitchen-{kind}-v0", f"kitchen/{file}-v0.hdf5", 60, 9, 280, 0.0, 4.0, subtasks)


_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(
            _locomotion(body, quality)
            for quality in ("medium", "medium-replay", "medium-expert")
            for body in _BODIES
        ),
        *map(_antmaze, _MAZES),
        *map(_pen, ("human", "cloned")),
        *map(_kitchen, _KITCHENS),
    )
}


def names() -> list[str]:
    """The names of all tasks."""
    return list(_TASKS)


def get(name: str) -> Task:
    """The task of this name. Raises TaskError with the nearest names if there is none."""
    if name not in _TASKS:
        nearest = ", ".join(difflib.get_close_matches(name, _TASKS, n=3, cutoff=0.0))
        raise TaskError(f"no task is called {name!r}; the nearest are {nearest}")
    return _TASKS[name]


def film(name: str, act, path: str | os.PathLike, seed: int) -> float:
    """One episode of the task `name` as an animated GIF (tasks.env.film). -> its return"""
    return env.film(
        gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True), act, path, seed
    )


for _task in _TASKS.values():
    maze = isinstance(_task, AntMaze)
    gymnasium.register(
        id=_task.name,
        entry_point="tasks.antmaze_env:AntMazeEnv" if maze else "tasks.env:TaskEnv",
        kwargs={"maze": _task.maze} if maze else {"task": _task},
        max_episode_steps=_task.episode_limit,
    )
