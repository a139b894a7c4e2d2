"""D4RL's tasks on today's MuJoCo: a name gives an environment, a data set and a score.

task = tasks.get("antmaze-umaze-v0")      # limits, score, task.evaluate(act, ...), task.draw
data = tasks.load(task)                   # D4RL's file, else downloaded, else generated
env = gymnasium.make("antmaze-umaze-v0")  # importing tasks registers them with gymnasium
"""

import difflib
import os

import gymnasium

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

# D4RL's reference returns (random policy, expert), and the sizes of observations and actions.
_BODIES = {
    "halfcheetah": (-280.178953, 12135.0, 17, 6),
    "hopper": (-20.272305, 3234.3, 11, 3),
    "walker2d": (1.629008, 4592.3, 17, 6),
}
# Kind of data -> maze, and part of the name of D4RL's file.
_MAZES = {
    "umaze": ("umaze", "u-maze_noisy_multistart_False_multigoal_False"),
    "umaze-diverse": ("umaze", "u-maze_noisy_multistart_True_multigoal_True"),
    "medium-play": ("medium", "big-maze_noisy_multistart_True_multigoal_False"),
    "medium-diverse": ("medium", "big-maze_noisy_multistart_True_multigoal_True"),
    "large-play": ("large", "hardest-maze_noisy_multistart_True_multigoal_False"),
    "large-diverse": ("large", "hardest-maze_noisy_multistart_True_multigoal_True"),
}
# Kind of data -> D4RL's file, and the subtasks that are asked for.
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
    return Locomotion(
        name=f"{body}-{quality}-v2",
        dataset_file=f"gym_mujoco_v2/{body}_{quality.replace('-', '_')}-v2.hdf5",
        state_dim=state_dim,
        action_dim=action_dim,
        episode_limit=1000,
        ref_min=ref_min,
        ref_max=ref_max,
        body=body,
        quality=quality,
    )


def _antmaze(kind: str) -> AntMaze:
    maze, file = _MAZES[kind]
    return AntMaze(
        name=f"antmaze-{kind}-v0",
        dataset_file=f"ant_maze_new/Ant_maze_{file}_sparse.hdf5",
        state_dim=29,
        action_dim=8,
        episode_limit=700 if maze == "umaze" else 1000,
        ref_min=0.0,
        ref_max=1.0,
        maze=maze,
        diverse="diverse" in kind,
    )


def _pen(kind: str) -> Pen:
    return Pen(
        name=f"pen-{kind}-v1",
        dataset_file=f"hand_dapg_v1/pen-{kind}-v1.hdf5",
        state_dim=45,
        action_dim=24,
        episode_limit=100,
        ref_min=96.262799,
        ref_max=3076.8331017826877,
    )


def _kitchen(kind: str) -> Kitchen:
    file, subtasks = _KITCHENS[kind]
    return Kitchen(
        name=f"kitchen-{kind}-v0",
        dataset_file=f"kitchen/{file}-v0.hdf5",
        state_dim=60,
        action_dim=9,
        episode_limit=280,
        ref_min=0.0,
        ref_max=4.0,
        subtasks=subtasks,
    )


_QUALITIES = ("medium", "medium-replay", "medium-expert")
_ALL: list[Task] = [
    *(_locomotion(body, quality) for quality in _QUALITIES for body in _BODIES),
    *map(_antmaze, _MAZES),
    *map(_pen, ("human", "cloned")),
    *map(_kitchen, _KITCHENS),
]
_TASKS = {task.name: task for task in _ALL}


def names() -> list[str]:
    """The names of all tasks."""
    return list(_TASKS)


def get(name: str) -> Task:
    """The task of this name. Raises TaskError, naming the nearest tasks, if there is none."""
    if name not in _TASKS:
        nearest = ", ".join(difflib.get_close_matches(name, _TASKS, n=3, cutoff=0.0))
        raise TaskError(f"no task is called {name!r}; the nearest are {nearest}")
    return _TASKS[name]


def film(name: str, act, path: str | os.PathLike, seed: int) -> float:
    """Film one episode of the task `name` as an animated GIF (tasks.env.film). -> its return"""
    from . import env

    filmed = gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True)
    return env.film(filmed, act, path, seed)


def _register(task: Task) -> None:
    """Make gymnasium.make(task.name) work. What it is made with can be written as JSON."""
    kind = "antmaze_env:AntMazeEnv" if isinstance(task, AntMaze) else "env:TaskEnv"
    limit, options = task.episode_limit, {"task": task.name}
    gymnasium.register(task.name, f"tasks.{kind}", max_episode_steps=limit, kwargs=options)


for _task in _ALL:
    _register(_task)
