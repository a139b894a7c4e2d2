"""tasks/antmaze_env.py: observations, goals, rewards, ends and pictures of one ant."""

import dataclasses

import gymnasium
import numpy as np
import pytest

import tasks
from tasks import TaskError
from tasks.antmaze_env import AntMazeEnv


UMAZE, MEDIUM = "antmaze-umaze-v0", "antmaze-medium-play-v0"


def env_near_goal(distance: float) -> AntMazeEnv:
    """An environment whose ant lies still on the floor, this far from the goal along x."""
    env = AntMazeEnv(UMAZE)
    env.reset(seed=0)
    qpos, qvel = env.model.qpos0.copy(), np.zeros(14)
    qpos[:2] = env.goal - [distance, 0.0]
    env.set_state(qpos, qvel)
    return env


def test_an_observation_is_qpos_and_qvel_without_the_goal():
    env = AntMazeEnv(UMAZE)
    observation, info = env.reset(seed=3)
    simulation = env.world.simulation
    state = np.concatenate([simulation.qpos[0], simulation.qvel[0]])
    np.testing.assert_array_equal(observation, state)
    env.goal = env.goal + 1.0
    again, _, _, _, _ = env.step(np.zeros(8))
    env.set_state(observation[:15], observation[15:])
    env.goal = env.goal - 5.0
    np.testing.assert_array_equal(env.step(np.zeros(8))[0], again)


@pytest.mark.parametrize("distance, reached", [(0.45, True), (0.55, False)])
def test_an_episode_is_paid_and_ends_within_half_a_metre(distance, reached):
    """Of its goal."""
    _, reward, terminated, truncated, info = env_near_goal(distance).step(np.zeros(8))
    assert (reward, terminated, info["success"]) == (float(reached), reached, reached)
    assert not truncated


def test_an_ant_on_its_back_goes_on_until_the_limit():
    env = gymnasium.make(UMAZE)
    env.reset(seed=0)
    upside_down = np.concatenate([[0.0, 0.0, 0.4, 0.0, 1.0, 0.0, 0.0], np.zeros(8)])
    env.unwrapped.set_state(upside_down, np.zeros(14))
    for step in range(1, 701):
        _, reward, terminated, truncated, _ = env.step(np.zeros(8))
        assert reward == 0.0 and not terminated and truncated == (step == 700)


def test_the_seed_decides_the_episode():
    def walk(seed):
        env = AntMazeEnv(MEDIUM)
        observation, info = env.reset(seed=seed)
        steps = [env.step(action)[0] for action in np.random.default_rng(0).uniform(-1, 1, (10, 8))]
        return np.concatenate([info["goal"], observation, *steps])

    np.testing.assert_array_equal(walk(1), walk(1))
    assert not np.array_equal(walk(1)[:2], walk(2)[:2])


def test_the_goal_stays_between_resets():
    """One that is set before the first reset too, and until a reset has a seed."""
    env = AntMazeEnv(MEDIUM)
    first, info = env.reset(seed=1)
    second, again = env.reset()
    np.testing.assert_array_equal(info["goal"], again["goal"])
    assert not np.array_equal(first, second)
    env = AntMazeEnv(MEDIUM)
    env.goal = [3.0, 4.0]
    np.testing.assert_array_equal(env.reset()[1]["goal"], [3.0, 4.0])
    np.testing.assert_array_equal(env.reset(seed=1)[1]["goal"], info["goal"])


def test_an_ant_walks_as_in_an_evaluation():
    """The same seed, the same actions: the same goal and path, to the bit."""
    task = dataclasses.replace(tasks.get(UMAZE), episode_limit=30)
    actions = np.random.default_rng(5).uniform(-1, 1, (30, 8))
    steps = iter(actions)
    expected = task.evaluate(lambda observations: next(steps)[None], 1, seed=3)
    env = AntMazeEnv(UMAZE)
    observation, info = env.reset(seed=3)
    path = [observation[:2], *(env.step(action)[0][:2] for action in actions)]
    np.testing.assert_array_equal(path, expected.paths[0])
    np.testing.assert_array_equal(info["goal"], expected.goals[0])


def test_what_is_recorded_of_an_episode_is_dropped_by_the_next():
    env = AntMazeEnv(UMAZE)
    for _ in range(3):
        env.reset()
        env.step(np.zeros(8))
    assert len(env.world.trail) == 2


def test_an_action_outside_the_box_is_clipped():
    env = AntMazeEnv(UMAZE)
    env.reset(seed=0)
    far = env.step(np.full(8, 5.0))[0]
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(np.ones(8))[0], far)


def test_rendering_without_opengl_says_what_to_install(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nothing")
    monkeypatch.setattr("sys.platform", "linux")
    env = AntMazeEnv(UMAZE, render_mode="rgb_array")
    env.reset(seed=0)
    with pytest.raises(TaskError, match="MUJOCO_GL=egl") as error:
        env.render()
    assert "\n" not in str(error.value)
