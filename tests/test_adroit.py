"""tasks/adroit.py, the pen: steps against MuJoCo 2.1.0, observations, rewards and ends."""

import mujoco
import numpy as np
import pytest
from mujoco210 import step_recorded

from tasks.adroit import PenWorld

START = [0.0, -0.2, 0.25]  # where the pen begins, metres


def pen_held(place=START, wanted=(0.0, 0.0, 1.0)):
    """A world whose pen has just been put somewhere, lying along x, and the direction asked for."""
    world = PenWorld(1, 1)
    model = world.simulation.model
    # The pen's slides are along axes that the model has rotated.
    qpos, rotation = model.qpos0.copy(), np.zeros(9)
    mujoco.mju_quat2Mat(rotation, model.body("Object").quat)
    qpos[-6:-3] = rotation.reshape(3, 3).T @ (np.array(place) - START)
    world.reset(np.array([0]), np.random.default_rng(0))
    world.place(np.array([0]), qpos, np.zeros(model.nv), np.random.default_rng(0))
    world.wanted[0] = wanted
    return world


def step_still(world):
    """-> the reward, whether it is over, the pen's likeness to what is wanted, and its distance"""
    reward, over = world.step(np.array([0]), np.zeros((1, 24)), np.random.default_rng(0))
    place, direction = world._pen()
    return reward[0], over[0], direction[0] @ world.wanted[0], np.linalg.norm(place[0] - START)


def test_a_step_is_mujoco_210s_to_rounding():
    """States, observations, rewards and ends; the largest error is 1e-13.

    With MuJoCo 3's own way to find contacts of convex shapes, the usual one is 2e-3.
    """
    errors = step_recorded("pen")
    assert np.median(errors.largest()) < 1e-9 and errors.largest().max() < 1e-6
    assert not errors.over.any()


def test_an_observation_is_d4rls_in_order():
    with pen_held(wanted=(0.0, 0.6, 0.8)) as world:
        observation = world.observations[0]
        place, direction = world._pen()
    np.testing.assert_array_equal(observation[:24], 0.0)  # the hand's joints
    np.testing.assert_allclose(observation[24:27], START, atol=1e-12)
    np.testing.assert_array_equal(observation[27:33], 0.0)  # the pen's velocity
    np.testing.assert_allclose(observation[33:36], direction[0])
    # It begins lying, by the model's 1.57.
    np.testing.assert_allclose(np.abs(direction[0]), [1.0, 0.0, 0.0], atol=1e-3)
    np.testing.assert_allclose(observation[36:39], [0.0, 0.6, 0.8])
    np.testing.assert_allclose(observation[39:42], 0.0, atol=1e-12)
    np.testing.assert_allclose(observation[42:45], direction[0] - [0.0, 0.6, 0.8])


def test_a_wanted_direction_is_drawn_as_robotics_draws_it():
    """gymnasium-robotics rotates its target by a quaternion of two drawn angles."""
    rotations = pytest.importorskip("gymnasium_robotics.utils.rotations")
    with PenWorld(50, 1) as world:
        world.reset(np.arange(50), np.random.default_rng(3))
        angles = np.random.default_rng(3).uniform(-1, 1, (50, 2))
        for (a, b), wanted in zip(angles, world.wanted):
            quaternion, rotated = rotations.euler2quat(np.array([a, b, 0.0])), np.zeros(3)
            mujoco.mju_rotVecQuat(rotated, np.array([0.0, 0.0, 1.0]), quaternion)
            np.testing.assert_allclose(wanted, rotated, atol=1e-12)


@pytest.mark.parametrize("angle, bonus", [(0.0, 60.0), (0.38, 10.0), (0.6, 0.0)])
def test_a_pen_that_lies_as_wanted_is_paid_more(angle, bonus):
    """cos 0.38 = 0.93 and cos 0.6 = 0.83, where 0.9 and 0.95 are the bounds."""
    wanted = (np.cos(angle), np.sin(angle), 0.0)  # the pen points along +x
    with pen_held(wanted=wanted) as world:
        reward, over, likeness, distance = step_still(world)
    assert distance < 0.075 and not over
    assert reward == pytest.approx(likeness - distance + bonus)


@pytest.mark.parametrize("height, dropped", [(0.07, True), (0.085, False)])
def test_a_dropped_pen_ends_the_episode_and_costs_five(height, dropped):
    with pen_held(place=(0.3, -0.4, height)) as world:
        reward, over, likeness, distance = step_still(world)
    assert over == dropped
    assert reward == pytest.approx(likeness - distance - 5.0 * dropped)


def test_a_picture_shows_the_direction_that_is_wanted():
    """The simulation's own model has the target where it was."""
    with PenWorld(1, 1) as world:
        world.reset(np.array([0]), np.random.default_rng(1))
        up = world.posed().body("target").xmat.reshape(3, 3)[:, 2]
        np.testing.assert_allclose(up, world.wanted[0], atol=1e-12)
        unmoved = world.simulation.model.body("target").quat
        np.testing.assert_array_equal(unmoved, [1, 0, 0, 0])
