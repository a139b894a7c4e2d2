"""D4RL's kitchen-{complete,partial,mixed}-v0: a Franka arm is to do four of seven things in a kitchen, in any order.

The model is gymnasium-robotics' (FrankaKitchen), which is D4RL's; its environment is not used, since it does not run on MuJoCo 4
and observes something else. Whatever D4RL's environment reads of the state has noise: the observation, whether a subtask is
done, and the joint angles that a velocity command is added to. So a step depends on the observation before it.
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
N_ARM = 9  # seven joints and two fingers come first in qpos; then 14 things with one number each, and the kettle's 7
SPEED = 2.0  # rad/s, or m/s of a finger, for an action of 1
DONE_WITHIN = 0.3  # distance from its goal within which a subtask is done, angles, metres and quaternion taken together

START = np.array([
    0.148388023, -1.76848573, 1.84390296, -2.4768576, 0.260252026, 0.712533105, 1.59515394, 0.0479267505, 0.0371350919,
    -2.6627985e-4, -5.18043486e-5, 3.12877220e-5, -4.51199853e-5, -3.90842156e-6, -4.22629655e-5, 6.28065475e-5,
    4.04984708e-5, 4.62730939e-4, -2.26906415e-4, -4.65501369e-4, -6.44129196e-3, -1.77048263e-3, 1.08009684e-3,
    -0.269397440, 0.350383255, 1.61944683, 1.00618764, 4.06395120e-3, -6.62095997e-3, -2.68278933e-4,
])  # fmt: skip
# Noise of an observed qpos is a tenth of this times U(±1).
NOISE = 0.1 * np.repeat(
    [0.1, 0.005, 0.0005, 0.005, 0.1, 0.005, 0.1, 0.005], [9, 2, 6, 3, 3, 3, 3, 1]
)
# Between these the controller keeps what it asks of the arm's joints.
JOINT_LOW = np.array([-2.9, -1.8, -2.9, -3.1, -2.9, 0.0, -2.9, 0.0, 0.0])
JOINT_HIGH = np.array([2.9, 1.8, 2.9, 0.0, 2.9, 3.8, 2.9, 0.04, 0.04])

# Each subtask: where it is in qpos, and what is to be there.
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
    """gymnasium-robotics' Franka arm and kitchen."""
    return compile_spec(
        load_spec(
            "gymnasium_robotics", "envs/assets/kitchen_franka/kitchen_assets/kitchen_env_model.xml"
        )
    )


class KitchenWorld(World):
    """n kitchens. observations (n, 60): noisy qpos (30), then the goals (30), 0 where nothing is asked. missing (n, subtasks):
    what is not done yet."""

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
        self.observations[who, :30] = self.simulation.qpos[who] + NOISE * rng.uniform(
            -1.0, 1.0, (len(who), 30)
        )

    def step(
        self, who: np.ndarray, actions: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        velocity = SPEED * checked_actions(actions, (len(who), N_ARM))
        wanted = self.observations[who, :N_ARM] + STEP_SECONDS * velocity
        self.simulation.step(who, wanted.clip(JOINT_LOW, JOINT_HIGH), FRAME_SKIP)
        self._observe(who, rng)
        seen = self.observations[who]
        off = np.stack(
            [np.linalg.norm(seen[:, where] - goal, axis=1) for where, goal in self.subtasks], axis=1
        )
        newly_done = self.missing[who] & (off < DONE_WITHIN)
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

    def camera(self, model: mujoco.MjModel) -> mujoco.MjvCamera:
        """Over the robot's shoulder."""
        camera = mujoco.MjvCamera()
        camera.lookat[:], camera.distance, camera.azimuth, camera.elevation = (
            [-0.2, 0.5, 2.0],
            2.2,
            70.0,
            -35.0,
        )
        return camera
