"""Steps recorded on MuJoCo 2.1.0, made again in our worlds: see data/make_steps_mujoco210.py."""

from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from tasks.adroit import PenWorld
from tasks.antmaze import MazeWorld
from tasks.kitchen import KitchenWorld
from tasks.locomotion import LocomotionWorld

NAMES = ["hopper", "halfcheetah", "walker2d", "ant", "pen", "kitchen"]
PATH = Path(__file__).parent / "data" / "steps_mujoco210.npz"


class Errors(NamedTuple):
    """Of N steps, without signs."""

    qpos: np.ndarray  # (N, nq)
    qvel: np.ndarray  # (N, nv)
    observation: np.ndarray  # (N, S)
    reward: np.ndarray  # (N,)
    over: np.ndarray  # (N,) bool: the episode ends in one of the two only

    def largest(self) -> np.ndarray:
        """Of all numbers of each step, (N,)."""
        return np.column_stack(self[:4]).max(axis=1)


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(PATH) as file:
        return {key.split("/")[1]: file[key] for key in file.files if key.startswith(name + "/")}


def make_world(name: str, n: int):
    """By the name of a recording."""
    if name == "ant":
        return MazeWorld("umaze", n, 1)
    if name == "pen":
        return PenWorld(n, 1)
    if name == "kitchen":
        return KitchenWorld(("microwave",), n, 1)
    return LocomotionWorld(name, n, 1)


def step_recorded(name: str) -> Errors:
    """Make every recorded step again."""
    steps, rng = recorded(name), np.random.default_rng(0)
    who = np.arange(len(steps["qpos"]))
    assert (steps["n_contacts"] > 0).mean() > 0.5
    with make_world(name, len(who)) as world:
        world.place(who, steps["qpos"], steps["qvel"], rng)
        if name == "kitchen":
            world.observations[:, :30] = steps["qpos"]  # the recording's controller saw no noise
        elif name == "ant":
            world.goals[:] = steps["wanted"]
        elif name == "pen":
            world.wanted[:] = steps["wanted"]
        rewards, over = world.step(who, steps["action"], rng)
        # The kitchen's observation is its qpos, with noise.
        seen = world.simulation.qpos if name == "kitchen" else world.observations
        pairs = {"qpos": world.simulation.qpos, "qvel": world.simulation.qvel, "obs": seen}
        errors = [np.abs(mine - steps[f"next_{key}"]) for key, mine in pairs.items()]
    return Errors(*errors, np.abs(rewards - steps["reward"]), over != steps["done"])


def inertias(diagonals: np.ndarray, quaternions: np.ndarray) -> np.ndarray:
    """Bodies' tensors (B, 3, 3) from their principal moments (B, 3) and axes, quaternions (B, 4).

    Symmetric bodies have more than one choice of axes.
    """
    axes = np.zeros((len(quaternions), 9))
    for matrix, quaternion in zip(axes, quaternions):
        mujoco.mju_quat2Mat(matrix, quaternion)
    axes = axes.reshape(-1, 3, 3)
    return np.einsum("bij,bj,bkj->bik", axes, diagonals, axes)
