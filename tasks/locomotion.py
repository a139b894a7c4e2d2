"""D4RL's nine locomotion tasks: hopper, halfcheetah and walker2d, as in gym's -v2 environments.

The models are gymnasium's, compiled as MuJoCo 2.1.0 would have done it (tasks.simulation): one step
agrees with a recording of that version to 3e-13. gymnasium's -v4 environments are the same tasks,
one episode at a time and with the masses and margins of the installed MuJoCo; the tests compare
them with these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import mujoco
import numpy as np

from .simulation import Simulation, checked_actions, compile_spec, load_spec
from .task import Task, World


class Body(NamedTuple):
    """What differs between the three bodies.

    State (k, nq + nv) = [qpos, qvel], where qpos begins with x, z and the torso's angle.
    """

    xml: str
    frame_skip: int  # simulation steps in one environment step
    control_cost: float  # the reward subtracts this times the squared action
    alive: float  # reward for each step
    velocity_clip: float  # limit of observed velocities
    reset_noise: float  # qpos and qvel start at qpos0 and 0, plus U(±reset_noise)
    normal_velocity: bool  # the initial qvel is normal instead, with reset_noise as σ
    healthy: Callable[[np.ndarray], np.ndarray]  # states -> (k,) bool; False: terminated


def _hopper_is_healthy(state):
    z, angle = state[:, 1], state[:, 2]
    bounded = (np.abs(state[:, 2:]) < 100).all(axis=1)  # False for NaN too
    return (z > 0.7) & (np.abs(angle) < 0.2) & bounded


def _walker_is_healthy(state):
    z, angle = state[:, 1], state[:, 2]
    return (z > 0.8) & (z < 2.0) & (np.abs(angle) < 1.0)


def _always(state):
    return np.ones(len(state), bool)


BODIES = {
    "hopper": Body("hopper.xml", 4, 1e-3, 1.0, 10.0, 5e-3, False, _hopper_is_healthy),
    "halfcheetah": Body("half_cheetah.xml", 5, 0.1, 0.0, np.inf, 0.1, True, _always),
    "walker2d": Body("walker2d.xml", 4, 1e-3, 1.0, 10.0, 5e-3, False, _walker_is_healthy),
}


@lru_cache
def build_model(body: str) -> mujoco.MjModel:
    """gymnasium's model of one of BODIES."""
    return compile_spec(load_spec("gymnasium", f"envs/mujoco/assets/{BODIES[body].xml}"))


class LocomotionWorld(World):
    """n bodies, rewarded for running to +x. Observation: qpos without x, then qvel, clipped."""

    def __init__(self, body: str, n: int, n_threads: int | None = None):
        self.body = BODIES[body]
        self.simulation = Simulation(build_model(body), n, n_threads)

    @property
    def observations(self) -> np.ndarray:
        clip = self.body.velocity_clip
        velocities = self.simulation.qvel.clip(-clip, clip)
        return np.concatenate([self.simulation.qpos[:, 1:], velocities], axis=1)

    def reset(self, who: np.ndarray, rng: np.random.Generator) -> None:
        model, noise = self.simulation.model, self.body.reset_noise
        qpos = model.qpos0 + rng.uniform(-noise, noise, (len(who), model.nq))
        shape = (len(who), model.nv)
        if self.body.normal_velocity:
            qvel = noise * rng.standard_normal(shape)
        else:
            qvel = rng.uniform(-noise, noise, shape)
        self.place(who, qpos, qvel, rng)

    def step(
        self, who: np.ndarray, actions: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        body, simulation = self.body, self.simulation
        actions = checked_actions(actions, (len(who), simulation.model.nu))
        x = simulation.qpos[who, 0]
        simulation.step(who, actions, body.frame_skip)
        seconds = body.frame_skip * simulation.model.opt.timestep
        velocity = (simulation.qpos[who, 0] - x) / seconds
        rewards = velocity + body.alive - body.control_cost * (actions**2).sum(axis=1)
        return rewards, ~body.healthy(simulation.states[who])


@dataclass(frozen=True)
class Locomotion(Task):
    """One of D4RL's {hopper,halfcheetah,walker2d}-*-v2 tasks."""

    body: str  # a key of BODIES
    quality: str  # of the data: "medium", "medium-replay", "medium-expert"
    family: ClassVar[str] = "locomotion"
    can_generate: ClassVar[bool] = True

    @property
    def step_seconds(self) -> float:
        return BODIES[self.body].frame_skip * build_model(self.body).opt.timestep

    def world(self, n: int, n_threads: int | None = None) -> LocomotionWorld:
        return LocomotionWorld(self.body, n, n_threads)

    def camera(self, model: mujoco.MjModel, aspect: float) -> mujoco.MjvCamera:
        """From the side, following the torso."""
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING
        camera.trackbodyid = model.body("torso").id
        camera.distance, camera.azimuth, camera.elevation = 4.0, 90.0, -15.0
        return camera
