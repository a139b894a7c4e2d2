"""The antmaze tasks: D4RL's mazes, dynamics, resets, goals, rewards and limits, alone and in batches."""

from pathlib import Path

import gymnasium
import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import tasks
from tasks import TaskError
from tasks.antmaze import (
    MAZES,
    AntBatch,
    MazeEpisodes,
    build_model,
    cell_xy,
    free_cells,
    sample_goals,
    sample_states,
)
from tasks.antmaze_env import AntMazeEnv

NAMES = [
    "antmaze-umaze-v0",
    "antmaze-umaze-diverse-v0",
    "antmaze-medium-play-v0",
    "antmaze-medium-diverse-v0",
    "antmaze-large-play-v0",
    "antmaze-large-diverse-v0",
]
LAYOUTS = [("umaze", (5, 5), 18), ("medium", (8, 8), 38), ("large", (9, 12), 62)]
GOAL_CELL_XY = {"umaze": (0.0, 8.0), "medium": (20.0, 20.0), "large": (32.0, 24.0)}


def env_near_goal(maze: str, distance: float) -> AntMazeEnv:
    """An environment whose ant lies still on the floor, this far from the goal along x."""
    env = AntMazeEnv(maze)
    env.reset(seed=0)
    qpos, qvel = env.model.qpos0.copy(), np.zeros(14)
    qpos[:2] = env.goal - [distance, 0.0]
    env.set_state(qpos, qvel)
    return env


# ------------------------------------------------------------------------------------------------------------
# The maze and the model


@pytest.mark.parametrize("maze, shape, n_walls", LAYOUTS)
def test_walls_stand_on_the_cells_that_are_not_free(maze, shape, n_walls):
    assert (len(MAZES[maze]), len(MAZES[maze][0])) == shape
    model = build_model(maze)
    walls = [i for i in range(model.ngeom) if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_BOX]
    assert len(walls) == n_walls == shape[0] * shape[1] - len(free_cells(maze))
    free = {cell_xy(maze, row, col) for row, col in free_cells(maze)}
    assert not free & {tuple(model.geom_pos[i, :2]) for i in walls}
    np.testing.assert_array_equal(model.geom_pos[walls, 2], 1.0)
    np.testing.assert_array_equal(model.geom_size[walls], [[2.0, 2.0, 1.0]] * n_walls)


@pytest.mark.parametrize("maze", MAZES)
def test_start_is_the_origin_and_goals_lie_in_d4rls_square(maze):
    assert cell_xy(maze, 1, 1) == (0.0, 0.0)
    goals = sample_goals(maze, 20_000, np.random.default_rng(0))
    offset = goals - GOAL_CELL_XY[maze]
    assert offset.min() >= 0.0 and offset.max() <= 1.5
    np.testing.assert_allclose(offset.mean(axis=0), 0.75, atol=0.02)
    np.testing.assert_allclose(offset.std(axis=0), np.sqrt((1.0**2 + 0.5**2) / 12), atol=0.01)


def test_an_ant_cannot_leave_its_corridor():
    """Shoved at 8 m/s against the walls beside its start, it stays between them."""
    with AntBatch("umaze", 2) as ants:
        ants.qvel[:, 1] = [-8.0, 8.0]
        for _ in range(20):
            ants.step(np.zeros((2, 8)))
        assert np.abs(ants.qpos[:, 1]).max() < 2.0
        assert np.abs(ants.qpos[:, 1]).min() > 0.2  # and it did move


def test_model_has_d4rls_constants():
    model = build_model("umaze")
    assert model.opt.timestep == 0.02
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    np.testing.assert_array_equal(model.actuator_gear[:, 0], 1.0)
    np.testing.assert_array_equal(model.actuator_ctrlrange, [[-30.0, 30.0]] * 8)
    np.testing.assert_array_equal(model.geom_solimp[:, :3], [[0.8, 0.8, 0.01]] * model.ngeom)
    joints = [model.joint(model.actuator_trnid[i, 0]).name for i in range(8)]
    assert joints == [
        "hip_4",
        "ankle_4",
        "hip_1",
        "ankle_1",
        "hip_2",
        "ankle_2",
        "hip_3",
        "ankle_3",
    ]
    assert (model.nq, model.nv, model.nu) == (15, 14, 8)
    assert model.qpos0[2] == 0.75


def test_the_ant_meets_floor_and_wall_at_one_margin_not_two():
    """Whatever rule this MuJoCo joins margins by, contact begins at 0.01: there at 0.009, not at 0.011."""
    model = build_model("umaze")
    data = mujoco.MjData(model)
    for gap, touches in ((0.009, True), (0.011, False)):
        over_floor = (0.0, 0.0, 0.25 + gap)  # the torso is a sphere of 0.25
        before_wall = (10.0 - (0.8 + 0.08) - gap, 4.0, 1.5)  # two straight legs end at x + 0.8
        for place in (over_floor, before_wall):
            mujoco.mj_resetData(model, data)
            data.qpos[:3] = place
            mujoco.mj_forward(model, data)
            assert (data.ncon > 0) is touches, (place, gap)


def test_one_step_agrees_with_mujoco_233():
    """Against steps recorded on an old MuJoCo, which joins margins as D4RL's did (see make_ant_mujoco233.py).

    MuJoCo 3.2 to 3.5 repeats them to 1e-14 but for a few: how a capsule meets a box was changed after 3.0. On
    4.0 the usual error in qvel is 1e-4. With the margins left to add up it is 0.2.
    """
    recorded = np.load(Path(__file__).parent / "data" / "ant_mujoco233.npz")
    n = len(recorded["qpos"])
    with AntBatch("umaze", n) as ants:
        ants.qpos[:], ants.qvel[:] = recorded["qpos"], recorded["qvel"]
        ants.step(recorded["action"])
        qpos_error = np.abs(ants.qpos - recorded["next_qpos"]).max(axis=1)
        qvel_error = np.abs(ants.qvel - recorded["next_qvel"]).max(axis=1)
    assert (recorded["n_contacts"] > 0).sum() > 40
    assert np.median(qpos_error) < 5e-5 and np.median(qvel_error) < 3e-4
    assert np.mean(qvel_error < 2e-3) >= 0.88
    assert qpos_error.max() < 0.02 and qvel_error.max() < 0.2


def test_states_are_reset_within_d4rls_bounds():
    model = build_model("umaze")
    qpos, qvel = sample_states(model, 5000, np.random.default_rng(0))
    assert qpos.shape == (5000, 15) and qvel.shape == (5000, 14)
    others = [0, 1, 2, *range(7, 15)]
    noise = (qpos - model.qpos0)[:, others]
    assert 0.099 < np.abs(noise).max() <= 0.1
    np.testing.assert_allclose(np.linalg.norm(qpos[:, 3:7], axis=1), 1.0)
    assert 0.08 < np.abs(qpos[:, 4:7]).max() < 0.12
    np.testing.assert_allclose(qvel.std(), 0.1, rtol=0.02)


# ------------------------------------------------------------------------------------------------------------
# The environment


@pytest.mark.parametrize("name", NAMES)
def test_every_task_is_registered_with_its_limit(name):
    env = gymnasium.make(name)
    task = tasks.get(name)
    assert env.spec.max_episode_steps == task.episode_limit == (700 if "umaze" in name else 1000)
    assert env.unwrapped.maze == task.maze and task.diverse == ("diverse" in name)
    assert env.observation_space.shape == (task.state_dim,) and env.action_space.shape == (
        task.action_dim,
    )


def test_gymnasium_finds_nothing_wrong_with_the_environment():
    check_env(gymnasium.make("antmaze-umaze-v0").unwrapped, skip_render_check=True)


def test_observation_is_qpos_then_qvel_and_says_nothing_of_the_goal():
    env = AntMazeEnv("umaze")
    observation, info = env.reset(seed=3)
    np.testing.assert_array_equal(observation, np.concatenate([env.data.qpos, env.data.qvel]))
    env.goal = env.goal + 1.0
    again, _, _, _, _ = env.step(np.zeros(8))
    env.set_state(observation[:15], observation[15:])
    env.goal = env.goal - 5.0
    np.testing.assert_array_equal(env.step(np.zeros(8))[0], again)


def test_reward_and_end_come_within_half_a_metre_of_the_goal_and_not_before():
    _, reward, terminated, truncated, info = env_near_goal("umaze", 0.45).step(np.zeros(8))
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    _, reward, terminated, truncated, info = env_near_goal("umaze", 0.55).step(np.zeros(8))
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)


def test_an_ant_on_its_back_goes_on_until_the_limit():
    env = gymnasium.make("antmaze-umaze-v0")
    env.reset(seed=0)
    upside_down = np.concatenate([[0.0, 0.0, 0.4, 0.0, 1.0, 0.0, 0.0], np.zeros(8)])
    env.unwrapped.set_state(upside_down, np.zeros(14))
    for step in range(1, 701):
        _, reward, terminated, truncated, _ = env.step(np.zeros(8))
        assert reward == 0.0 and not terminated and truncated == (step == 700)


def test_seed_decides_the_episode_and_the_goal_stays_between_resets():
    def walk(seed):
        env = AntMazeEnv("medium")
        observation, info = env.reset(seed=seed)
        steps = [env.step(action)[0] for action in np.random.default_rng(0).uniform(-1, 1, (10, 8))]
        return np.concatenate([info["goal"], observation, *steps])

    np.testing.assert_array_equal(walk(1), walk(1))
    assert not np.array_equal(walk(1)[:2], walk(2)[:2])
    env = AntMazeEnv("medium")
    first, info = env.reset(seed=1)
    second, again = env.reset()
    np.testing.assert_array_equal(info["goal"], again["goal"])
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "bad", [np.full(8, np.nan), np.full(8, np.inf), np.zeros(7), np.zeros((1, 8)), 0.0]
)
def test_a_bad_action_is_refused_in_one_line(bad):
    env = AntMazeEnv("umaze")
    env.reset(seed=0)
    with pytest.raises(TaskError) as error:
        env.step(bad)
    assert "\n" not in str(error.value)


def test_an_action_outside_the_box_is_clipped():
    env = AntMazeEnv("umaze")
    env.reset(seed=0)
    far = env.step(np.full(8, 5.0))[0]
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(np.ones(8))[0], far)


def test_render_shows_the_maze_the_ant_and_the_goal():
    env = gymnasium.make("antmaze-umaze-v0", render_mode="rgb_array")
    env.reset(seed=0)
    before = env.unwrapped.data.qpos.copy()
    try:
        picture = env.render()
    except TaskError as error:
        pytest.skip(str(error))
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8
    red, green, blue = picture.astype(int).transpose(2, 0, 1)
    assert (blue - red > 40).mean() > 0.15  # walls
    assert 50 < (red - blue > 80).sum() < 5000  # the ant
    assert 50 < (green - np.maximum(red, blue) > 60).sum() < 5000  # the goal
    np.testing.assert_array_equal(env.unwrapped.data.qpos, before)
    drawn = env.step(np.ones(8))[0]
    blind = AntMazeEnv("umaze")
    blind.reset(seed=0)
    np.testing.assert_array_equal(blind.step(np.ones(8))[0], drawn)
    env.close()


def test_rendering_without_opengl_says_what_to_install(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nothing")
    monkeypatch.setattr("sys.platform", "linux")
    env = AntMazeEnv("umaze", render_mode="rgb_array")
    env.reset(seed=0)
    with pytest.raises(TaskError, match="MUJOCO_GL=egl") as error:
        env.render()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# Many ants, and the task


def test_a_batch_walks_as_single_environments_do():
    """Both start the solver cold at each step, so they agree to the last bit, contacts included."""
    rng = np.random.default_rng(0)
    with AntBatch("umaze", 5, n_threads=2) as ants:
        ants.reset(np.arange(5), rng)
        ants.qpos[3:, :2] += [9.2, 4.0]  # two of them against a wall
        touched = np.zeros(5, dtype=bool)
        envs = [AntMazeEnv("umaze") for _ in range(5)]
        for env, qpos, qvel in zip(envs, ants.qpos, ants.qvel):
            env.reset(seed=0)
            env.set_state(qpos, qvel)
        for _ in range(60):
            actions = rng.uniform(-1.5, 1.5, (5, 8)).astype(np.float32)
            ants.step(actions)
            alone = [env.step(action)[0] for env, action in zip(envs, actions)]
            np.testing.assert_array_equal(ants.observations, alone)
            touched |= [env.data.ncon > 0 for env in envs]
        assert touched.all()


def test_starting_the_solver_cold_changes_a_step_by_rounding_only():
    model = build_model("umaze")
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    with AntBatch("umaze", 1) as ants:
        for _ in range(100):
            action = rng.uniform(-1, 1, 8)
            ants.qpos[0], ants.qvel[0] = data.qpos, data.qvel
            ants.step(action[None])
            data.ctrl[:] = 30.0 * action
            mujoco.mj_step(model, data, 5)
            warm = np.concatenate([data.qpos, data.qvel])
            np.testing.assert_allclose(ants.observations[0], warm, rtol=0, atol=1e-6)


def test_only_the_ants_asked_for_move():
    with AntBatch("umaze", 4) as ants:
        ants.reset(np.arange(4), np.random.default_rng(0))
        before = ants.observations.copy()
        ants.step(np.ones((2, 8)), np.array([2, 0]))
        moved = (ants.observations != before).any(axis=1)
        np.testing.assert_array_equal(moved, [True, False, True, False])
        ants.step(np.zeros((0, 8)), np.array([], dtype=int))
        with pytest.raises(TaskError):
            ants.step(np.ones((4, 8)), np.array([0]))


def test_evaluation_is_determined_by_its_seed_and_shows_only_running_episodes():
    task = tasks.get("antmaze-umaze-v0")
    task = type(task)(**{**vars(task), "episode_limit": 25})
    shown = []

    def act(observations):
        assert observations.dtype == np.float32 and observations.shape[1] == 29
        shown.append(len(observations))
        return np.tanh(observations[:, :8])

    one, two = task.evaluate(act, 6, seed=1), task.evaluate(act, 6, seed=1, n_threads=1)
    other = task.evaluate(act, 6, seed=2)
    assert shown == [6] * 75
    for a, b in zip(one.paths, two.paths):
        assert a.shape == (26, 2)
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.goals, two.goals)
    assert len(np.unique(one.goals[:, 0])) == 6  # each episode has its own
    assert not np.array_equal(one.paths[0], other.paths[0])
    np.testing.assert_array_equal(one.lengths, 25)
    np.testing.assert_array_equal(one.returns, 0.0)


def test_an_episode_ends_at_its_goal_and_is_no_longer_stepped(monkeypatch):
    task = tasks.get("antmaze-umaze-v0")
    task = type(task)(**{**vars(task), "episode_limit": 8})
    far, here = [0.0, 8.0], [0.0, 0.0]
    monkeypatch.setattr(
        "tasks.antmaze.sample_goals", lambda maze, n, rng: np.array([far, here, far, here])
    )
    seen, left = [], []
    episodes = task.evaluate(
        lambda observations: seen.append(len(observations)) or np.zeros((len(observations), 8)),
        4,
        seed=0,
        on_step=lambda t, alive: left.append((t, alive)),
    )
    np.testing.assert_array_equal(episodes.returns, [0, 1, 0, 1])
    np.testing.assert_array_equal(episodes.lengths, [8, 1, 8, 1])
    assert [len(path) for path in episodes.paths] == [9, 2, 9, 2]
    assert seen == [4] + [2] * 7
    assert left == [(t, 2) for t in range(1, 9)]
    np.testing.assert_allclose(task.normalized_score(episodes.returns.mean()), 50.0)


@pytest.mark.parametrize(
    "bad", [lambda o: np.full((len(o), 8), np.nan), lambda o: np.zeros((len(o), 7))]
)
def test_an_evaluation_refuses_bad_actions(bad):
    with pytest.raises(TaskError):
        tasks.get("antmaze-umaze-v0").evaluate(bad, 2, seed=0)


def test_score_is_the_percentage_of_goals_reached():
    task = tasks.get("antmaze-large-play-v0")
    np.testing.assert_allclose(
        task.normalized_score(np.array([0.0, 0.25, 1.0])), [0.0, 25.0, 100.0]
    )


def test_names_are_d4rls_and_an_unknown_one_gets_the_nearest():
    assert [name for name in tasks.names() if tasks.get(name).family == "antmaze"] == NAMES
    with pytest.raises(TaskError, match="antmaze-umaze-v0") as error:
        tasks.get("antmaze-umaze-v2")
    assert "\n" not in str(error.value)
    with pytest.raises(TaskError, match="umaze, medium, large"):
        build_model("huge")


def test_paths_are_drawn_to_a_file_that_is_whole_or_not_there(tmp_path):
    task = tasks.get("antmaze-medium-play-v0")
    goals = sample_goals("medium", 3, np.random.default_rng(0))
    paths = [np.linspace([0.0, 0.0], goal, 50) for goal in goals]
    returns = np.array([1.0, 0.0, 1.0])
    episodes = MazeEpisodes(returns, np.full(3, 49), returns > 0, [np.zeros(49)] * 3, paths, goals)
    task.draw(episodes, tmp_path / "paths.png", "three straight lines")
    picture = imageio.imread(tmp_path / "paths.png")[..., :3].astype(int)
    assert min(picture.shape[:2]) > 500
    for colour in (
        (0x8D, 0x99, 0xAE),
        (0x00, 0x72, 0xB2),
        (0xD5, 0x5E, 0x00),
    ):  # wall, success, failure
        assert (np.abs(picture - colour).max(axis=-1) < 12).sum() > 20
    assert [file.name for file in tmp_path.iterdir()] == ["paths.png"]
    with pytest.raises(TaskError, match="cannot write"):
        task.draw(episodes, tmp_path / "missing" / "paths.png", "nowhere")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(TaskError, match="cannot write"):
        task.draw(episodes, tmp_path / "folder.png", "in the way")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.png", "paths.png"]
