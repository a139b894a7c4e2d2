"""D4RL's pen-human-v1 and pen-cloned-v1: a hand rotates a pen to a given direction.

A hand of 24 joints holds the pen in its palm; a second, fixed pen shows the direction. The model is
gymnasium-robotics' (AdroitHandPen-v1), which is D4RL's. Its environment never terminates and runs
for 200 steps; D4RL's ends when the pen has been dropped, and after 100 steps at the latest.
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
NEAR = 0.075  # metres from the wanted place: nearer, the right direction earns a bonus
DROPPED = 0.075  # metres: a pen below this height has been dropped


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
    # D4RL's environment changes the actuators' stiffness after loading. The wrist's actuators come
    # before the fingers'.
    names = [model.actuator(i).name for i in range(model.nu)]
    for first, last, stiffness in (("A_WRJ1", "A_WRJ0", 10.0), ("A_FFJ3", "A_THJ0", 1.0)):
        chosen = slice(names.index(first), names.index(last) + 1)
        model.actuator_gainprm[chosen, :3] = [stiffness, 0.0, 0.0]
        model.actuator_biasprm[chosen, :3] = [0.0, -stiffness, 0.0]
    return model


class PenWorld(World):
    """n hands. wanted (n, 3) is the direction in which each pen should point.

    Observation (45): the hand's joints (24); the pen's place (3), velocity (6) and direction (3);
    the wanted direction (3); how far place (3) and direction (3) are from the wanted ones. Place
    and direction come from sensors and so are one simulation step (2 ms) older than joints and
    velocity, as in D4RL.
    """

    def __init__(self, n: int, n_threads: int | None = None):
        model = build_model()
        self.simulation = Simulation(model, n, n_threads)
        place, direction = model.sensor("pen_place"), model.sensor("pen_direction")
        self.place_at = slice(place.adr[0], place.adr[0] + 3)
        self.direction_at = slice(direction.adr[0], direction.adr[0] + 3)
        self.wanted_place = model.site("eps_ball").pos.copy()  # fixed in the world
        self.wanted = np.tile([0.0, 0.0, 1.0], (n, 1))
        low, high = model.actuator_ctrlrange.T
        self.middle, self.reach = (low + high) / 2, (high - low) / 2

    def _pen(self) -> tuple[np.ndarray, np.ndarray]:
        """Each pen's place (n, 3), metres, and direction (n, 3), a unit vector."""
        sensors = self.simulation.sensors
        return sensors[:, self.place_at], sensors[:, self.direction_at]

    @property
    def observations(self) -> np.ndarray:
        place, direction = self._pen()
        joints, velocity = self.simulation.qpos[:, :N_HAND], self.simulation.qvel[:, -6:]
        apart = place - self.wanted_place, direction - self.wanted
        return np.concatenate([joints, place, velocity, direction, self.wanted, *apart], axis=1)

    def reset(self, who: np.ndarray, rng: np.random.Generator) -> None:
        """Hand and pen at rest at qpos0.

        The wanted direction is "up", rotated by U(±1) radians about y, then about x.
        """
        a, b = rng.uniform(-1.0, 1.0, (len(who), 2)).T
        x, y, z = np.sin(b), -np.sin(a) * np.cos(b), np.cos(a) * np.cos(b)
        self.wanted[who] = np.stack([x, y, z], axis=1)
        model = self.simulation.model
        self.place(who, model.qpos0, np.zeros(model.nv), rng)

    def posed(self) -> mujoco.MjData:
        """With the model's second pen in the wanted direction.

        The simulation leaves that pen alone: nothing comes near enough to touch it.
        """
        target = self.simulation.model.body("target")
        straight = target.quat.copy()
        mujoco.mju_quatZ2Vec(target.quat, self.wanted[0])
        data = super().posed()
        target.quat[:] = straight
        return data

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

    def camera(self, model: mujoco.MjModel, aspect: float) -> mujoco.MjvCamera:
        """From above the palm."""
        camera = mujoco.MjvCamera()
        camera.lookat[:] = [0.0, -0.25, 0.2]
        camera.distance, camera.azimuth, camera.elevation = 0.9, 90.0, -55.0
        return camera
