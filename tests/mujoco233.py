"""Steps recorded on MuJoCo 2.3.3, made again in our worlds: see data/make_tasks_mujoco233.py."""

from pathlib import Path

import numpy as np

from tasks.adroit import PenWorld
from tasks.kitchen import KitchenWorld
from tasks.locomotion import LocomotionWorld

RECORDED = np.load(Path(__file__).parent / "data" / "tasks_mujoco233.npz")


def make_world(name: str, n: int):
    """By the name of a recording."""
    if name == "pen":
        return PenWorld(n, 1)
    if name == "kitchen":
        return KitchenWorld(("microwave",), n, 1)
    return LocomotionWorld(name, n, 1)


def step_recorded(name: str):
    """Every recorded step made again. -> the world, its largest errors in qpos and qvel (N,)"""
    names = ("qpos", "qvel", "action", "next_qpos", "next_qvel")
    qpos, qvel, action, next_qpos, next_qvel = (RECORDED[f"{name}/{key}"] for key in names)
    who, rng = np.arange(len(qpos)), np.random.default_rng(0)
    assert (RECORDED[f"{name}/n_contacts"] > 0).sum() > 20
    with make_world(name, len(qpos)) as world:
        world.place(who, qpos, qvel, rng)
        if name == "kitchen":
            world.observations[:, :30] = qpos  # the recording's controller saw no noise
        world.step(who, action, rng)
        qpos_error = np.abs(world.simulation.qpos - next_qpos).max(axis=1)
        qvel_error = np.abs(world.simulation.qvel - next_qvel).max(axis=1)
        return world, qpos_error, qvel_error
