"""D4RL's kitchen-{complete,partial,mixed}-v0: a Franka arm does four subtasks of seven.

The order of the four is free. The model is gymnasium-robotics' (FrankaKitchen), which is
D4RL's but for one column; its environment is not used, since it has other observations.

Everything that D4RL's environment reads from the state has noise: the observation, whether a
subtask is done, and the joint angles to which a velocity command is added. A step therefore depends
on the observation before it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import mujoco
import numpy as np

from .simulation import Simulation, checked_actions, compile_spec, load_spec
from .task import Task, World

FRAME_SKIP = 40  # simulation steps of 0.002 s
STEP_SECONDS = 0.08
N_ARM = 9  # joints of the arm: seven, and two fingers
SPEED = 2.0  # rad/s, or m/s of a finger, for an action of 1
# A subtask is done within this distance of its goal: angles, metres and quaternion taken together.
DONE_WITHIN = 0.3

# qpos (30,) at the start of an episode: the arm (9), one number for each of 14 joints of the
# kitchen, and the kettle (7).
START = np.array([
    0.148388023, -1.76848573, 1.84390296, -2.4768576, 0.260252026, 0.712533105, 1.59515394,
    0.0479267505, 0.0371350919,
    -2.6627985e-4, -5.18043486e-5, 3.12877220e-5, -4.51199853e-5, -3.90842156e-6, -4.22629655e-5,
    6.28065475e-5, 4.04984708e-5, 4.62730939e-4, -2.26906415e-4, -4.65501369e-4, -6.44129196e-3,
    -1.77048263e-3, 1.08009684e-3,
    -0.269397440, 0.350383255, 1.61944683, 1.00618764, 4.06395120e-3, -6.62095997e-3,
    -2.68278933e-4,
])  # fmt: skip
# The noise of an observed qpos (30,) is this times U(±1).
_AMPLITUDES, _WIDTHS = [0.1, 0.005, 0.0005, 0.005, 0.1, 0.005, 0.1, 0.005], [9, 2, 6, 3, 3, 3, 3, 1]
NOISE = 0.1 * np.repeat(_AMPLITUDES, _WIDTHS)
# The controller clips its joint commands to these limits.
JOINT_LOW = np.array([-2.9, -1.8, -2.9, -3.1, -2.9, 0.0, -2.9, 0.0, 0.0])
JOINT_HIGH = np.array([2.9, 1.8, 2.9, 0.0, 2.9, 3.8, 2.9, 0.04, 0.04])

# Subtask -> its indices in qpos, and their goal.
SUBTASKS = {
    "bottom burner": ([11, 12], [-0.88, -0.01]),
    "top burner": ([15, 16], [-0.92, -0.01]),
    "light switch": ([17, 18], [-0.69, -0.05]),
    "slide cabinet": ([19], [0.37]),
    "hinge cabinet": ([20, 21], [0.0, 1.45]),
    "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
}


@lru_cache
def build_model() -> mujoco.MjModel:
    """gymnasium-robotics' Franka arm and kitchen; as in D4RL a column touches nothing."""
    xml = "envs/assets/kitchen_franka/kitchen_assets/kitchen_env_model.xml"
    spec = load_spec("gymnasium_robotics", xml)
    column = next(g for g in spec.geoms if g.type == mujoco.mjtGeom.mjGEOM_CYLINDER)
    column.contype = column.conaffinity = 0
    return compile_spec(spec)


class KitchenWorld(World):
    """n kitchens.

    observations (n, 60): noisy qpos (30), then the goals (30), 0 where there is none.
    missing (n, subtasks) bool: the subtasks not done yet.
    """

    def __init__(self, subtasks: tuple[str, ...], n: int, n_threads: int | None = None):
        self.simulation = Simulation(build_model(), n, n_threads)
        self.subtasks = [SUBTASKS[name] for name in subtasks]
        self.observations = np.zeros((n, 60))
        for where, goal in self.subtasks:
            self.observations[:, 30 + np.array(where)] = goal
        self.missing = np.ones((n, len(subtasks)), bool)

    def reset(self, who: np.ndarray, rng: np.random.Generator) -> None:
        self.missing[who] = True
        self.place(who, START, np.zeros(self.simulation.model.nv), rng)

    def place(
        self, who: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, rng: np.random.Generator
    ) -> None:
        super().place(who, qpos, qvel, rng)
        self._observe(who, rng)

    def _observe(self, who: np.ndarray, rng: np.random.Generator) -> None:
        noise = NOISE * rng.uniform(-1.0, 1.0, (len(who), 30))
        self.observations[who, :30] = self.simulation.qpos[who] + noise

    def step(
        self, who: np.ndarray, actions: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        velocity = SPEED * checked_actions(actions, (len(who), N_ARM))
        wanted = self.observations[who, :N_ARM] + STEP_SECONDS * velocity
        self.simulation.step(who, wanted.clip(JOINT_LOW, JOINT_HIGH), FRAME_SKIP)
        self._observe(who, rng)
        seen = self.observations[who]
        off = [np.linalg.norm(seen[:, where] - goal, axis=1) for where, goal in self.subtasks]
        newly_done = self.missing[who] & (np.stack(off, axis=1) < DONE_WITHIN)
        self.missing[who] &= ~newly_done
        return newly_done.sum(axis=1).astype(float), ~self.missing[who].any(axis=1)


@dataclass(frozen=True)
class Kitchen(Task):
    """One of D4RL's kitchen-*-v0 tasks. Its return is the number of subtasks done, of four."""

    subtasks: tuple[str, ...]  # keys of SUBTASKS
    family: ClassVar[str] = "kitchen"
    step_seconds: ClassVar[float] = STEP_SECONDS

    def world(self, n: int, n_threads: int | None = None) -> KitchenWorld:
        return KitchenWorld(self.subtasks, n, n_threads)

    def camera(self, model: mujoco.MjModel, aspect: float) -> mujoco.MjvCamera:
        """Over the robot's shoulder."""
        camera = mujoco.MjvCamera()
        camera.lookat[:] = [-0.2, 0.5, 2.0]
        camera.distance, camera.azimuth, camera.elevation = 2.2, 70.0, -35.0
        return camera
