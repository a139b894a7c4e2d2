"""All twenty tasks: sizes, limits, scores, files, evaluation and the gymnasium environment."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import tasks
from tasks import TaskError
from tasks.task import Task

ONE_EACH = [
    "hopper-medium-v2",
    "halfcheetah-medium-replay-v2",
    "walker2d-medium-expert-v2",
    "pen-human-v1",
    "kitchen-mixed-v0",
]
ENVIRONMENTS = [*ONE_EACH, "antmaze-umaze-v0"]
# By the first word of a task's name: state and action sizes, and the returns of scores 0 and 100.
FACTS = {
    "hopper": (11, 3, -20.272305, 3234.3),
    "halfcheetah": (17, 6, -280.178953, 12135.0),
    "walker2d": (17, 6, 1.629008, 4592.3),
    "pen": (45, 24, 96.262799, 3076.8331017826877),
    "kitchen": (60, 9, 0.0, 4.0),
    "antmaze": (29, 8, 0.0, 1.0),
}


def limit_of(name: str) -> int:
    if name.startswith("antmaze-umaze"):
        return 700
    return {"pen": 100, "kitchen": 280}.get(name.split("-")[0], 1000)


def shortened(name: str, limit: int) -> Task:
    return dataclasses.replace(tasks.get(name), episode_limit=limit)


# ---- Names, sizes, scores ------------------------------------------------------------------------


@pytest.mark.parametrize("name", tasks.names())
def test_each_task_has_d4rls_sizes_limit_and_score(name):
    """And is registered with gymnasium."""
    task, env = tasks.get(name), gymnasium.make(name)
    state_dim, action_dim, low, high = FACTS[name.split("-")[0]]
    assert (task.state_dim, task.action_dim) == (state_dim, action_dim)
    assert env.spec.max_episode_steps == task.episode_limit == limit_of(name)
    assert env.observation_space.shape == (state_dim,)
    assert env.action_space.shape == (action_dim,)
    returns = low + (high - low) * np.array([0.0, 0.25, 1.0])
    np.testing.assert_allclose(task.normalized_score(returns), [0.0, 25.0, 100.0], atol=1e-12)


@pytest.mark.parametrize("name, file", [
    ("halfcheetah-medium-expert-v2", "gym_mujoco_v2/halfcheetah_medium_expert-v2.hdf5"),
    ("walker2d-medium-replay-v2", "gym_mujoco_v2/walker2d_medium_replay-v2.hdf5"),
    ("pen-cloned-v1", "hand_dapg_v1/pen-cloned-v1.hdf5"),
    ("kitchen-complete-v0", "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5"),
    ("kitchen-partial-v0", "kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5"),
    ("kitchen-mixed-v0", "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"),
])  # fmt: skip
def test_files_lie_where_d4rl_put_them(name, file):
    assert tasks.get(name).dataset_file == file


@pytest.mark.parametrize("unknown, nearest", [
    ("walker-medium-v2", "walker2d-medium-v2"),
    ("antmaze-umaze-v2", "antmaze-umaze-v0"),
])  # fmt: skip
def test_an_unknown_task_gets_the_nearest_names_in_one_line(unknown, nearest):
    with pytest.raises(TaskError, match=nearest) as error:
        tasks.get(unknown)
    assert "\n" not in str(error.value)


NO_SCORES = [(np.nan, np.nan), (0.0, np.nan), (1.0, 1.0), (2.0, 1.0), (0.0, np.inf)]


@pytest.mark.parametrize("low, high", NO_SCORES)
def test_a_task_without_reference_scores_is_refused(low, high):
    with pytest.raises(TaskError, match="hopper-medium-v2 has no reference scores") as error:
        dataclasses.replace(tasks.get("hopper-medium-v2"), ref_min=low, ref_max=high)
    assert "\n" not in str(error.value)


def test_importing_tasks_imports_nothing_to_draw_with():
    """So that a program's --help comes at once."""
    heavy = "{'matplotlib', 'imageio', 'PIL', 'scipy', 'torch', 'tasks.env'}"
    program = f"import sys, tasks; print(*{heavy} & set(sys.modules))"
    root = Path(__file__).parent.parent
    asked = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True
    )
    assert (asked.stdout, asked.returncode) == ("\n", 0), asked.stderr


# ---- Evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_EACH)
def test_an_evaluation_is_determined_by_its_seed(name):
    """On any number of threads; and its returns are the sums of its rewards."""
    task = shortened(name, 25)

    def act(observations):
        assert observations.dtype == np.float32 and observations.shape[1] == task.state_dim
        return np.tanh(3 * observations[:, : task.action_dim])

    one, two = task.evaluate(act, 4, seed=1), task.evaluate(act, 4, seed=1, n_threads=1)
    other = task.evaluate(act, 4, seed=2)
    np.testing.assert_array_equal(one.returns, two.returns)
    assert not np.array_equal(one.rewards[0], other.rewards[0]) or task.family == "kitchen"
    for total, length, over, rewards in zip(one.returns, one.lengths, one.terminated, one.rewards):
        assert len(rewards) == length and total == pytest.approx(rewards.sum())
        assert over or length == 25


@pytest.mark.parametrize("name", ONE_EACH)
def test_an_environment_steps_as_an_evaluation_does(name):
    """The same generator, the same actions: the same returns."""
    task = shortened(name, 8)
    env = gymnasium.make(name, disable_env_checker=True).unwrapped
    actions = np.random.default_rng(5).uniform(-1, 1, (8, 1, task.action_dim)).astype(np.float32)
    steps = iter(actions)
    expected = task.evaluate(lambda observations: next(steps), 1, seed=3)
    env.reset()
    env.np_random = np.random.default_rng(3)
    env.reset()
    total, length = 0.0, 0
    for action in actions[:, 0]:
        _, reward, terminated, _, _ = env.step(action)
        total, length = total + reward, length + 1
        if terminated:
            break
    assert total == pytest.approx(expected.returns[0]) and length == expected.lengths[0]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_policy_may_return_whatever_numpy_reads(name):
    """Lists and tensors count as arrays do; what holds no numbers is refused in one line."""
    task = shortened(name, 3)
    as_arrays = lambda observations: np.tanh(observations[:, : task.action_dim])  # noqa: E731
    expected = task.evaluate(as_arrays, 2, seed=0)
    for change in (np.ndarray.tolist, torch.from_numpy, np.asfortranarray):
        found = task.evaluate(lambda seen: change(as_arrays(seen)), 2, seed=0)
        np.testing.assert_array_equal(found.rewards, expected.rewards)
    needs_gradients = lambda array: torch.tensor(array, requires_grad=True)  # noqa: E731
    for change in (lambda array: None, lambda array: {"action": array}, str, needs_gradients):
        with pytest.raises(TaskError, match="^actions ") as error:
            task.evaluate(lambda seen: change(as_arrays(seen)), 2, seed=0)
        assert "\n" not in str(error.value)


def test_episodes_are_drawn_to_a_whole_file_or_none(tmp_path):
    task = tasks.get("hopper-medium-v2")
    rewards = [np.full(50, 2.0), np.full(20, 1.0)]
    returns, lengths, ended = np.array([100.0, 20.0]), np.array([50, 20]), np.array([False, True])
    episodes = tasks.Episodes(returns, lengths, ended, rewards)
    task.draw(episodes, tmp_path / "episodes.png", "two straight lines")
    assert (tmp_path / "episodes.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TaskError, match="cannot write"):
        task.draw(episodes, tmp_path / "missing" / "episodes.png", "nowhere")
    assert [file.name for file in tmp_path.iterdir()] == ["episodes.png"]


# ---- The gymnasium environment -------------------------------------------------------------------


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_gymnasium_finds_nothing_wrong_with_an_environment(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an observation has no bounds
        check_env(gymnasium.make(name).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_bad_actions_are_refused_in_one_line(name):
    env, n = gymnasium.make(name, disable_env_checker=True).unwrapped, tasks.get(name).action_dim
    env.reset(seed=0)
    wrong_shapes = [np.zeros(n - 1), np.zeros((1, n)), 0.0]
    for action in [np.full(n, np.nan), np.full(n, np.inf), *wrong_shapes]:
        with pytest.raises(TaskError) as error:
            env.step(action)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hopper-medium-v2", "pen-human-v1", "antmaze-umaze-v0"])
def test_rendering_shows_something_and_changes_nothing(name):
    size = dict(width=160, height=120)
    env = gymnasium.make(name, render_mode="rgb_array", **size, disable_env_checker=True)
    blind = gymnasium.make(name, disable_env_checker=True)
    for one in (env, blind):
        one.reset(seed=0)
    try:
        picture = env.render()
    except TaskError as error:
        pytest.skip(f"no OpenGL here: {error}")
    assert picture.shape == (120, 160, 3) and picture.dtype == np.uint8 and picture.std() > 10
    action = np.ones(env.action_space.shape)
    np.testing.assert_array_equal(env.step(action)[0], blind.step(action)[0])
    env.close()


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    from tasks.simulation import load_spec

    monkeypatch.setattr("tasks.simulation.find_spec", lambda name: None)
    with pytest.raises(TaskError, match="gymnasium-robotics is missing.*pip install") as error:
        load_spec("gymnasium_robotics", "envs/assets/adroit_hand/adroit_pen.xml")
    assert "\n" not in str(error.value)
