"""tasks/env.py: copies, models, specs, scores, wrong use and films of the environments."""

import copy
import json
import pickle
import sys
import types

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec

import tasks
from tasks import TaskError
from tasks.env import Camera, film

ONE_EACH = [
    "hopper-medium-v2",
    "halfcheetah-medium-v2",
    "walker2d-medium-v2",
    "pen-human-v1",
    "kitchen-mixed-v0",
    "antmaze-umaze-v0",
]
HOPPER = "hopper-medium-v2"


def make(name: str, **options) -> gymnasium.Env:
    return gymnasium.make(name, disable_env_checker=True, **options)


def play(env: gymnasium.Env, actions) -> list:
    """All that the environment returns, as plain lists."""
    return [[np.asarray(part).tolist() for part in env.step(action)[:4]] for action in actions]


def some_actions(env: gymnasium.Env, n: int, seed: int = 0) -> np.ndarray:
    shape = (n, *env.action_space.shape)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture
def camera():
    """An environment that was asked for pictures, if this machine has OpenGL."""
    env = make("antmaze-umaze-v0", render_mode="rgb_array", width=80, height=60)
    env.reset(seed=0)
    try:
        env.render()
    except TaskError as error:
        pytest.skip(f"no OpenGL here: {error}")
    yield env
    env.close()


# ---- Copies --------------------------------------------------------------------------------------


def by_cloudpickle(env):
    cloudpickle = pytest.importorskip("cloudpickle")
    return pickle.loads(cloudpickle.dumps(env))


COPIES = [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env)), by_cloudpickle]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "cloudpickle"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_copy_goes_on_as_the_original(name, copied):
    """Through gymnasium's wrappers: same state, goal, random numbers and step limit."""
    env = make(name, max_episode_steps=12)
    env.reset(seed=3)
    env.action_space.seed(3)
    actions = some_actions(env, 9)
    play(env, actions[:4])
    other = copied(env)
    ours, theirs = play(env, actions[4:]), play(other, actions[4:])
    assert ours == theirs
    assert env.action_space.sample().tolist() == other.action_space.sample().tolist()
    once, again = env.reset(), other.reset()
    np.testing.assert_array_equal(once[0], again[0])
    assert once[1].keys() == again[1].keys() and other.spec == env.spec
    play(other, actions[:2])
    np.testing.assert_array_equal(env.unwrapped._observation(), once[0])


def test_a_copy_makes_pictures_of_its_own(camera):
    others = [copied(camera) for copied in COPIES]
    picture = camera.render()
    camera.close()
    for other in others:
        np.testing.assert_array_equal(other.render(), picture)
        other.close()


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_can_be_pickled(name):
    assert pickle.loads(pickle.dumps(tasks.get(name))) == tasks.get(name)


# ---- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_EACH)
def test_each_environment_has_a_model_of_its_own(name):
    """Changing it changes neither others nor the task's evaluation."""
    task, env, other = tasks.get(name), make(name), make(name)
    assert isinstance(env.unwrapped.model, mujoco.MjModel)
    actions = some_actions(env, 5)
    env.reset(seed=0)
    other.reset(seed=0)
    expected = play(other, actions)
    env.unwrapped.model.opt.gravity[:] = 0.0
    env.unwrapped.model.body_mass[:] *= 3.0
    for untouched in (other, make(name)):
        untouched.reset(seed=0)
        assert play(untouched, actions) == expected
    assert play(env, actions) != expected
    with task.world(1, 1) as world:
        assert world.simulation.model.opt.gravity[2] == -9.81


def test_a_changed_time_step_is_paid_by_its_own_seconds():
    env = make(HOPPER).unwrapped
    env.reset(seed=0)
    env.model.opt.timestep /= 2
    x = env.world.simulation.qpos[0, 0]
    _, reward, _, _, _ = env.step(np.zeros(3))
    moved = env.world.simulation.qpos[0, 0] - x
    assert reward == pytest.approx(moved / (4 * env.model.opt.timestep) + 1.0)


# ---- gymnasium and D4RL --------------------------------------------------------------------------


@pytest.mark.parametrize("name", tasks.names())
def test_an_environment_is_made_again_from_its_json(name):
    spec = make(name).spec.to_json()
    again = gymnasium.make(EnvSpec.from_json(json.dumps(json.loads(spec))))
    assert again.spec.id == name and again.unwrapped.task == tasks.get(name)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", [HOPPER, "antmaze-umaze-v0"])
def test_gymnasium_steps_several_at_once(name, mode):
    """Each as one alone with its seed."""
    envs = gymnasium.make_vec(name, num_envs=3, vectorization_mode=mode)
    try:
        observations, _ = envs.reset(seed=[4, 5, 6])
        actions = some_actions(envs, 3)
        seen = [observations, *(envs.step(action)[0] for action in actions)]
    finally:
        envs.close()
    alone = make(name)
    for i, seed in enumerate((4, 5, 6)):
        mine = [alone.reset(seed=seed)[0], *(alone.step(action[i])[0] for action in actions)]
        np.testing.assert_array_equal([step[i] for step in seen], mine)


@pytest.mark.parametrize("name", tasks.names())
def test_normalized_scores_are_d4rls_fractions(name):
    """D4RL's users multiply them by 100 themselves."""
    env, task = make(name).unwrapped, tasks.get(name)
    assert (env.ref_min_score, env.ref_max_score) == (task.ref_min, task.ref_max)
    assert env.get_normalized_score(task.ref_min) == 0.0
    assert env.get_normalized_score(task.ref_max) == 1.0
    returns = [task.ref_min, 5.0, 7.0]
    expected = task.normalized_score(returns) / 100
    np.testing.assert_allclose(env.get_normalized_score(returns), expected, rtol=1e-14)


# ---- Wrong use -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [HOPPER, "antmaze-umaze-v0"])
def test_an_action_may_be_whatever_numpy_reads(name):
    """A list, a tensor, integers, or a view of a larger array."""
    env = make(name)
    action = some_actions(env, 1)[0]
    strided = np.repeat(action, 2)[::2]
    assert not strided.flags.c_contiguous
    results = []
    for same in (action, action.tolist(), torch.from_numpy(action), strided):
        env.reset(seed=0)
        results.append(play(env, [same]))
    assert all(result == results[0] for result in results)
    env.step([0] * len(action))


NOT_ACTIONS = [
    None,
    {"action": 1},
    ["0.5"] * 3,
    [[0.0], [0.0, 1.0], 2.0],
    np.ones(3, complex),
    torch.ones(3, requires_grad=True),
    np.zeros((1, 3)),
    np.zeros((3, 1)),
]


@pytest.mark.parametrize("action", NOT_ACTIONS, ids=lambda action: type(action).__name__)
def test_what_is_no_action_is_refused_in_one_line(action):
    env = make(HOPPER)
    env.reset(seed=0)
    state = env.unwrapped._observation()
    with pytest.raises(TaskError, match="^actions ") as error:
        env.step(action)
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(env.unwrapped._observation(), state)


def test_a_wrong_shape_is_told_as_the_user_gave_it():
    env = make(HOPPER)
    env.reset(seed=0)
    with pytest.raises(TaskError, match=r"shape \(1, 3\); give them with shape \(3,\)"):
        env.step(np.zeros((1, 3)))


@pytest.mark.parametrize("qpos, qvel", [
    (np.zeros(5), np.zeros(6)),
    (0.0, np.zeros(6)),
    (np.zeros(6), np.zeros((1, 6))),
    (np.full(6, np.nan), np.zeros(6)),
    (np.zeros(6), ["fast"] * 6),
])  # fmt: skip
def test_a_state_that_is_none_is_refused(qpos, qvel):
    env = make(HOPPER).unwrapped
    observation, _ = env.reset(seed=0)
    with pytest.raises(TaskError, match="^q(pos|vel) ") as error:
        env.set_state(qpos, qvel)
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(env._observation(), observation)


@pytest.mark.parametrize("name", ONE_EACH)
def test_nothing_but_a_reset_begins_an_episode(name):
    env = make(name, render_mode="rgb_array").unwrapped
    for use in (lambda: env.step(np.zeros(env.action_space.shape)), env.render):
        with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
            use()


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_closed_environment_can_be_used_again(name):
    """Closing it twice is no error either."""
    env, other = make(name), make(name)
    actions = some_actions(env, 4)
    for one in (env, other):
        one.reset(seed=0)
        play(one, actions[:2])
    env.close()
    env.close()
    assert play(env, actions[2:]) == play(other, actions[2:])
    np.testing.assert_array_equal(env.reset(seed=1)[0], other.reset(seed=1)[0])


def test_a_reset_has_no_options():
    env = make(HOPPER)
    with_options, _ = env.reset(seed=0, options={"speed": 2})
    np.testing.assert_array_equal(with_options, env.reset(seed=0)[0])


# ---- Pictures and films --------------------------------------------------------------------------


def test_all_pictures_have_the_same_light(camera):
    """The first one too."""
    env = copy.deepcopy(camera).unwrapped
    first = env.render()
    simulation = env.world.simulation
    env.set_state(simulation.qpos[0].copy(), simulation.qvel[0].copy())
    np.testing.assert_array_equal(env.render(), first)
    env.close()


def test_a_picture_shows_what_was_done_to_the_model_and_goal(camera):
    env = camera.unwrapped
    before = env.render()
    env.goal = env.goal + [0.0, -3.0]
    moved = env.render()
    env.model.geom_rgba[:, :3] *= 0.5
    assert (moved != before).any() and env.render().mean() < 0.9 * moved.mean()
    camera.close()
    assert camera.render().mean() < 0.9 * moved.mean()


def test_a_camera_that_fails_gives_its_context_back(monkeypatch):
    contexts = []

    class GLContext:
        def __init__(self, width, height):
            contexts.append(self)

        def make_current(self):
            raise RuntimeError("no such\ndevice")

        def free(self):
            contexts.remove(self)

    monkeypatch.setenv("MUJOCO_GL", "broken")
    monkeypatch.setattr("sys.platform", "linux")
    module = types.SimpleNamespace(GLContext=GLContext)
    monkeypatch.setitem(sys.modules, "mujoco.broken", module)
    model = make(HOPPER).unwrapped.model
    with pytest.raises(TaskError, match="no such device.*MUJOCO_GL=egl"):
        Camera(model, mujoco.MjvCamera(), 8, 8)
    assert not contexts


class Stub:
    """Stands in for an environment that is filmed."""

    metadata = {"render_fps": 10}
    used = closed = False

    def reset(self, seed):
        self.used = True
        return np.zeros(3), {}

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)

    def step(self, action):
        return np.zeros(3), 1.0, True, False, {}

    def close(self):
        self.closed = True


@pytest.mark.parametrize("path, said", [
    ("ant.mp4", "end in .gif"),
    ("ant", "end in .gif"),
    ("missing/ant.gif", "make its folder"),
    ("file/ant.gif", "make its folder"),
    ("folder.gif", "is a folder"),
])  # fmt: skip
def test_a_film_that_cannot_be_written_is_not_made(tmp_path, path, said):
    (tmp_path / "file").touch()
    (tmp_path / "folder.gif").mkdir()
    env = Stub()
    with pytest.raises(TaskError, match=said) as error:
        film(env, lambda observation: np.zeros(3), tmp_path / path, seed=0)
    assert "\n" not in str(error.value) and not env.used
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.gif"]


def test_an_environment_is_closed_whether_filmed_or_not(tmp_path):
    env = Stub()
    assert film(env, lambda observation: np.zeros(3), tmp_path / "ant.GIF", seed=0) == 1.0
    assert env.closed and (tmp_path / "ant.GIF").read_bytes().startswith(b"GIF")

    def fails(observation):
        raise ValueError("no action")

    env = Stub()
    with pytest.raises(ValueError, match="no action"):
        film(env, fails, tmp_path / "bee.gif", seed=0)
    assert env.closed and not (tmp_path / "bee.gif").exists()
