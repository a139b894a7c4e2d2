"""D4RL's pen-human-v1 and pen-cloned-v1: a hand of 24 joints turns a pen in its palm until it lies as a second, fixed pen does.

The model is gymnasium-robotics' (AdroitHandPen-v1), which is D4RL's. Its environment never terminates and runs for 200 steps;
D4RL's ends when the pen has been dropped, after 100 steps at the latest.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import mujoco
import numpy as np

from .simulation import Simulation, checked_actions, compile_spec, load_spec
from .task import Task, World

FRAME_SKIP = 5  # simulation steps of 0.002 s
N_HAND = 24  # the hand's joints come first in qpos, then the pen's six
NEAR = 0.075  # metres from the wanted place within which turning the pen well is paid extra
DROPPED = 0.075  # metres: the height below which the pen lies on the table


@lru_cache
def build_model() -> mujoco.MjModel:
    """The hand and the pen, with D4RL's actuators, and sensors of the pen's place and direction."""
    spec = load_spec("gymnasium_robotics", "envs/assets/adroit_hand/adroit_pen.xml")
    for name, kind in (
        ("pen_place", mujoco.mjtSensor.mjSENS_FRAMEPOS),
        ("pen_direction", mujoco.mjtSensor.mjSENS_FRAMEZAXIS),
    ):
        spec.add_sensor(name=name, type=kind, objtype=mujoco.mjtObj.mjOBJ_XBODY, objname="Object")
    model = compile_spec(spec)
    # D4RL's environment changes the actuators' stiffness after loading; the wrist's come before the fingers'.
    names = [model.actuator(i).name for i in range(model.nu)]
    for first, last, stiffness in (("A_WRJ1", "A_WRJ0", 10.0), ("A_FFJ3", "A_THJ0", 1.0)):
        chosen = slice(names.index(first), names.index(last) + 1)
        model.actuator_gainprm[chosen, :3] = [stiffness, 0.0, 0.0]
        model.actuator_biasprm[chosen, :3] = [0.0, -stiffness, 0.0]
    return model


class PenWorld(World):
    """n hands. wanted (n, 3) is the direction in which each pen is to point.

    Observation (45): the hand's joints (24); the pen's place (3), velocity (6) and direction (3); the wanted direction (3); and
    the differences of place (3) and direction (3). Place and direction are the sensors', from one simulation step (2 ms) before
    joints and velocity, as D4RL reads them.
    """

    def __init__(self, n: int, n_threads: int | None = None):
        model = build_model()
        self.simulation = Simulation(model, n, n_threads)
        self.place_at, self.direction_at = (
            model.sensor(name).adr[0] for name in ("pen_place", "pen_direction")
        )
        self.wanted_place = model.site(
            "eps_ball"
        ).pos.copy()  # a site of the world's body, which does not move
        self.wanted = np.tile([0.0, 0.0, 1.0], (n, 1))
        low, high = model.actuator_ctrlrange.T
        self.middle, self.reach = (low + high) / 2, (high - low) / 2

    def _pen(self) -> tuple[np.ndarray, np.ndarray]:
        """Place (n, 3) in metres and direction (n, 3), a unit vector, of each pen."""
        sensors = self.simulation.sensors
        return sensors[:, self.place_at : self.place_at + 3], sensors[
            :, self.direction_at : self.direction_at + 3
        ]

    @property
    def observations(self) -> np.ndarray:
        place, direction = self._pen()
        joints, velocity = self.simulation.qpos[:, :N_HAND], self.simulation.qvel[:, -6:]
        apart = place - self.wanted_place, direction - self.wanted
        return np.concatenate([joints, place, velocity, direction, self.wanted, *apart], axis=1)

    def reset(self, who: np.ndarray, rng: np.random.Generator) -> None:
        """Hand and pen at rest at qpos0; the wanted direction is "up", turned by U(±1) radians about y, then about x."""
        a, b = rng.uniform(-1.0, 1.0, (len(who), 2)).T
        self.wanted[who] = np.stack(
            [np.sin(b), -np.sin(a) * np.cos(b), np.cos(a) * np.cos(b)], axis=1
        )
        model = self.simulation.model
        self.place(who, model.qpos0, np.zeros(model.nv), rng)

    def show(self, model: mujoco.MjModel) -> None:
        """The model's second pen points as is wanted. In the simulation it does not: nothing comes near enough to touch it."""
        mujoco.mju_quatZ2Vec(model.body("target").quat, self.wanted[0])

    def step(
        self, who: np.ndarray, actions: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        actions = checked_actions(actions, (len(who), len(self.middle)))
        self.simulation.step(who, self.middle + self.reach * actions, FRAME_SKIP)
        place, direction = (sensor[who] for sensor in self._pen())
        distance = np.linalg.norm(place - self.wanted_place, axis=1)
        likeness = (direction * self.wanted[who]).sum(axis=1)
        near, dropped = distance < NEAR, place[:, 2] < DROPPED
        bonus = 10.0 * (near & (likeness > 0.9)) + 50.0 * (near & (likeness > 0.95))
        return likeness - distance + bonus - 5.0 * dropped, dropped


@dataclass(frozen=True)
class Pen(Task):
    """pen-human-v1 or pen-cloned-v1."""

    family: ClassVar[str] = "adroit"
    step_seconds: ClassVar[float] = 0.01

    def world(self, n: int, n_threads: int | None = None) -> PenWorld:
        return PenWorld(n, n_threads)

    def camera(self, model: mujoco.MjModel) -> mujoco.MjvCamera:
        """From above the palm."""
        camera = mujoco.MjvCamera()
        camera.lookat[:], camera.distance, camera.azimuth, camera.elevation = (
            [0.0, -0.25, 0.2],
            0.9,
            90.0,
            -55.0,
        )
        return camera
