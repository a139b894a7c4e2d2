"""tasks/simulation.py: threads, copies, and models as D4RL's MuJoCo had them.

The tasks' tests look at its steps.
"""

import copy
import pickle
import threading

import mujoco
import numpy as np
import pytest
from mujoco210 import NAMES, inertias, make_world, recorded

from tasks import simulation
from tasks.locomotion import LocomotionWorld, build_model
from tasks.simulation import Simulation, compile_spec, start_threads, startable_threads


@pytest.mark.parametrize("name", NAMES)
def test_bodies_are_mujoco_210s(name):
    """Masses, centres and inertias.

    The kitchen's inertias come from meshes, boxes and cylinders in single precision; the pen's hand
    has capsules, but its masses and inertias are given.
    """
    expected = recorded(name)
    bound = 1e-6 if name == "kitchen" else 1e-12
    with make_world(name, 1) as world:
        model = world.simulation.model
        np.testing.assert_allclose(model.body_mass, expected["body_mass"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(model.body_ipos, expected["body_ipos"], rtol=0, atol=bound)
        mine = inertias(model.body_inertia, model.body_iquat)
    theirs = inertias(expected["body_inertia"], expected["body_iquat"])
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=bound)


CAPSULES = {
    "by its ends": 'fromto="1 2 3 1 2 3.8" size="0.1"',
    "by its length": 'pos="1 2 3.4" size="0.1 0.4"',
}


@pytest.mark.parametrize("where", CAPSULES.values(), ids=CAPSULES)
@pytest.mark.parametrize("mass", [None, 7.0])
def test_a_capsule_weighs_as_a_cylinder_half_a_radius_longer(where, mass):
    """At each end. A mass that is given stays, and so does the shape that collides."""
    given = "" if mass is None else f'mass="{mass}"'
    geom = f'<geom type="capsule" density="500" {where} {given}/>'
    body = f"<body><freejoint/>{geom}</body>"
    spec = mujoco.MjSpec.from_string(f"<mujoco><worldbody>{body}</worldbody></mujoco>")
    model = compile_spec(spec)
    r, length = 0.1, 0.8 + 0.1
    m = mass or 500 * np.pi * r**2 * length
    across, along = m * (3 * r**2 + length**2) / 12, m * r**2 / 2
    np.testing.assert_allclose(model.body_mass[1], m)
    np.testing.assert_allclose(model.body_ipos[1], [1, 2, 3.4])
    tensor = inertias(model.body_inertia, model.body_iquat)[1]
    np.testing.assert_allclose(tensor, np.diag([across, across, along]), atol=1e-12)
    np.testing.assert_allclose(model.geom_size[0, :2], [0.1, 0.4])
    np.testing.assert_allclose(model.body_subtreemass[0], m)


def test_a_body_with_given_inertia_keeps_it():
    inertial = '<inertial pos="0 0 1" mass="2" diaginertia="3 3 1"/>'
    body = f'<body>{inertial}<freejoint/><geom type="capsule" size="0.1 0.4"/></body>'
    spec = mujoco.MjSpec.from_string(f"<mujoco><worldbody>{body}</worldbody></mujoco>")
    model = compile_spec(spec)
    assert model.body_mass[1] == 2.0
    np.testing.assert_array_equal(model.body_ipos[1], [0, 0, 1])
    np.testing.assert_allclose(np.sort(model.body_inertia[1]), [1, 3, 3])


# ---- Threads -------------------------------------------------------------------------------------


def some_steps(n_threads: int) -> np.ndarray:
    """The states of four hoppers after three steps."""
    with LocomotionWorld("hopper", 4, n_threads) as world:
        rng = np.random.default_rng(0)
        world.reset(np.arange(4), rng)
        for _ in range(3):
            world.step(np.arange(4), rng.uniform(-1, 1, (4, 3)), rng)
        return world.simulation.states.copy()


@pytest.mark.parametrize("startable, used", [(0, 0), (3, 0), (5, 2), (8, 4), (100, 4)])
def test_a_machine_without_threads_steps_with_fewer(monkeypatch, startable, used):
    """To the same states. A pool gets half of what starts: threads that ended may still count."""
    start, started, expected = threading.Thread.start, [], some_steps(1)

    def limited(thread):
        if len(started) >= startable:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    assert startable_threads(8) == min(8, startable) and not any(t.is_alive() for t in started)
    started.clear()
    pool = start_threads(4)
    assert pool.nthread == used
    pool.close()
    started.clear()
    np.testing.assert_array_equal(some_steps(4), expected)


def test_a_pool_that_cannot_start_is_done_without(monkeypatch):
    whole, expected = simulation.Rollout, some_steps(1)

    def refused(nthread):
        if nthread:
            raise RuntimeError("Caught an unknown exception!")
        return whole(nthread=0)

    monkeypatch.setattr(simulation, "Rollout", refused)
    np.testing.assert_array_equal(some_steps(4), expected)


def test_only_a_step_starts_threads_and_close_ends_them(monkeypatch):
    """So nothing is left running if a simulation is made, but not used."""
    pools, start = [], start_threads

    def counted(n):
        pools.append(start(n))
        return pools[-1]

    monkeypatch.setattr(simulation, "start_threads", counted)
    copies = Simulation(build_model("hopper"), 4, 2)
    assert not pools
    for _ in range(2):
        for _ in range(3):
            copies.step(np.arange(4), np.zeros((4, 3)), 1)
        copies.close()
        copies.close()
    assert len(pools) == 2 and all(pool.rollout_ is None for pool in pools)


# ---- Copies --------------------------------------------------------------------------------------


def walk(world, seed: int, n_steps: int) -> list[np.ndarray]:
    """Observations, rewards and ends of all episodes at random actions."""
    rng, who = np.random.default_rng(seed), np.arange(len(world.observations))
    seen = []
    for _ in range(n_steps):
        actions = rng.uniform(-1, 1, (len(who), world.simulation.model.nu))
        seen += [*world.step(who, actions, rng), world.observations.copy()]
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_world_goes_on_as_the_original(name):
    """And neither moves the other."""
    with make_world(name, 3) as world:
        world.reset(np.arange(3), np.random.default_rng(1))
        walk(world, 2, 2)
        before = world.simulation.states.copy()
        copies = [copy.deepcopy(world), pickle.loads(pickle.dumps(world))]
        walks = [walk(other, 3, 4) for other in copies]
        np.testing.assert_array_equal(world.simulation.states, before)
        expected = walk(world, 3, 4)
    for other, seen in zip(copies, walks):
        for mine, theirs in zip(seen, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        other.simulation.qpos[1, 0] = 7.0
        assert other.simulation.states[1, 0] == 7.0 != world.simulation.qpos[1, 0]


def test_a_change_of_one_model_changes_no_other():
    expected = some_steps(1)
    with LocomotionWorld("hopper", 4, 1) as world:
        world.simulation.model.opt.gravity[:] = 0.0
        world.simulation.model.body_mass[:] *= 2.0
    np.testing.assert_array_equal(some_steps(1), expected)
