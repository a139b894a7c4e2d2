"""tasks/locomotion.py: steps against MuJoCo 2.1.0 and gymnasium, rewards, ends and resets."""

import warnings

import gymnasium
import mujoco
import numpy as np
import pytest
from mujoco210 import step_recorded

import tasks
from tasks.locomotion import BODIES, LocomotionWorld
from tasks.simulation import margins_add, restore_masses


@pytest.mark.parametrize("body", BODIES)
def test_a_step_is_mujoco_210s_to_rounding(body):
    """States, observations, rewards and ends; the largest error is 3e-13.

    Before MuJoCo's masses of capsules were undone, the usual one was 0.01 to 0.4.
    """
    errors = step_recorded(body)
    assert np.median(errors.largest()) < 1e-9 and errors.largest().max() < 1e-6
    assert not errors.over.any()


@pytest.mark.parametrize("name", ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4"])
def test_an_episode_is_gymnasiums(name):
    """gymnasium's own environment, its masses and margins mended: same states, rewards and end.

    Its solver is started cold at each step, as ours is. Left warm, the two differ by the solver's
    tolerance, and a cheetah's legs amplify it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a -v5; and an attribute of half_cheetah.xml
        theirs = gymnasium.make(name, disable_env_checker=True).unwrapped
        restore_masses(theirs.model, mujoco.MjSpec.from_file(theirs.fullpath))
    if margins_add():
        theirs.model.geom_margin[:] *= 0.5
    theirs.reset(seed=0)
    ours = gymnasium.make(f"{name[:-3].lower()}-medium-v2", disable_env_checker=True).unwrapped
    ours.reset(seed=0)
    start = theirs.data.qpos.copy(), theirs.data.qvel.copy()
    np.testing.assert_allclose(ours.set_state(*start), theirs._get_obs())
    for action in np.random.default_rng(0).uniform(-1, 1, (200, theirs.action_space.shape[0])):
        theirs.data.qacc_warmstart[:] = 0.0
        seen, reward, terminated, _, _ = theirs.step(action)
        observation, paid, over, _, _ = ours.step(action)
        np.testing.assert_allclose(observation, seen, atol=1e-9)
        assert abs(paid - reward) < 1e-9 and over == terminated
        if terminated:
            break
    # Random legs fall within 200 steps; a cheetah's episode goes on.
    assert terminated == (name != "HalfCheetah-v4")


# ---- Rewards and ends, on states made by hand ----------------------------------------------------


def placed(body: str, changes: dict):
    """One body at rest at qpos0, but for changes: index in [qpos, qvel] -> value."""
    world = LocomotionWorld(body, 1, 1)
    model = world.simulation.model
    state = np.concatenate([model.qpos0, np.zeros(model.nv)])
    state[list(changes)] = list(changes.values())
    world.place(np.array([0]), state[: model.nq], state[model.nq :], np.random.default_rng(0))
    return world


def n_qpos(body: str) -> int:
    with LocomotionWorld(body, 1, 1) as world:
        return world.simulation.model.nq


@pytest.mark.parametrize("body, changes, over", [
    ("hopper", {}, False),
    ("hopper", {2: 0.15}, False),
    ("hopper", {2: 0.25}, True),
    ("hopper", {1: 0.6}, True),
    ("hopper", {6: 90.0}, False),
    ("hopper", {6: 110.0}, True),
    ("walker2d", {2: 0.9}, False),
    ("walker2d", {2: 1.1}, True),
    ("walker2d", {1: 2.1}, True),
    ("walker2d", {1: 0.7}, True),
    ("halfcheetah", {1: 3.0, 2: 3.0}, False),
])  # fmt: skip
def test_a_fallen_body_ends_its_episode_and_a_cheetah_never(body, changes, over):
    with placed(body, changes) as world:
        action = np.zeros((1, world.simulation.model.nu))
        _, terminated = world.step(np.array([0]), action, np.random.default_rng(0))
    assert terminated.tolist() == [over]


PAY = [("hopper", 1, 1e-3, 0.008), ("halfcheetah", 0, 0.1, 0.05), ("walker2d", 1, 1e-3, 0.008)]


@pytest.mark.parametrize("body, alive, cost, seconds", PAY)
def test_running_is_paid_and_effort_costs(body, alive, cost, seconds):
    n = tasks.get(f"{body}-medium-v2").action_dim
    action = np.linspace(-2.0, 1.0, n)[None]  # the first is clipped, and costs as -1 does
    with placed(body, {n_qpos(body): 1.5}) as world:
        before = world.simulation.qpos[0, 0]
        rewards, _ = world.step(np.array([0]), action, np.random.default_rng(0))
        moved = world.simulation.qpos[0, 0] - before
    assert moved > 0.5 * 1.5 * seconds
    effort = (action.clip(-1, 1) ** 2).sum()
    assert rewards[0] == pytest.approx(moved / seconds + alive - cost * effort)


CLIPPED = [("hopper", True), ("walker2d", True), ("halfcheetah", False)]


@pytest.mark.parametrize("body, clipped", CLIPPED)
def test_observations_leave_x_out_and_clip_speeds_as_gym(body, clipped):
    n = n_qpos(body)
    with placed(body, {0: 7.0, n + 3: 25.0}) as world:
        observation = world.observations[0]
    state_dim = tasks.get(f"{body}-medium-v2").state_dim
    assert observation.shape == (state_dim,) and 7.0 not in observation
    assert observation[n - 1 + 3] == (10.0 if clipped else 25.0)


@pytest.mark.parametrize("body", BODIES)
def test_bodies_begin_as_gyms(body):
    noise, normal = BODIES[body].reset_noise, BODIES[body].normal_velocity
    with LocomotionWorld(body, 400, 1) as world:
        world.reset(np.arange(400), np.random.default_rng(0))
        off = world.simulation.qpos - world.simulation.model.qpos0
        assert 0.99 * noise < np.abs(off).max() <= noise
        speed = world.simulation.qvel
    np.testing.assert_allclose(speed.std(), noise if normal else noise / np.sqrt(3), rtol=0.05)
    assert (np.abs(speed).max() > noise) == normal
