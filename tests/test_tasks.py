"""All twenty tasks: sizes, limits, scores and files; and of locomotion, pen and kitchen the dynamics, rewards and ends."""

import copy
import dataclasses
import warnings
from pathlib import Path

import gymnasium
import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import dql
import tasks
from tasks import TaskError
from tasks.adroit import PenWorld
from tasks.kitchen import DONE_WITHIN, NOISE, START, SUBTASKS, KitchenWorld
from tasks.locomotion import BODIES, LocomotionWorld
from tasks.simulation import margins_add
from tasks.task import Task

RECORDED = np.load(Path(__file__).parent / "data" / "tasks_mujoco233.npz")
OTHERS = [name for name in tasks.names() if tasks.get(name).family != "antmaze"]
ONE_EACH = [
    "hopper-medium-v2",
    "halfcheetah-medium-replay-v2",
    "walker2d-medium-expert-v2",
    "pen-human-v1",
    "kitchen-mixed-v0",
]
LIMITS = {"locomotion": 1000, "adroit": 100, "kitchen": 280}
SIZES = {
    "hopper": (11, 3),
    "halfcheetah": (17, 6),
    "walker2d": (17, 6),
    "pen": (45, 24),
    "kitchen": (60, 9),
}
SCORES = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "pen": (96.262799, 3076.8331),
    "kitchen": (0.0, 4.0),
}


def make_world(name: str, n: int):
    """By the name of a recording."""
    return {
        "pen": lambda: PenWorld(n, 1),
        "kitchen": lambda: KitchenWorld(("microwave",), n, 1),
    }.get(name, lambda: LocomotionWorld(name, n, 1))()


def shortened(name: str, limit: int) -> Task:
    return dataclasses.replace(tasks.get(name), episode_limit=limit)


# ---------------------------------------------------------------------------------------------------------------------
# Names, sizes, scores


def test_the_tasks_are_the_papers_twenty():
    assert sorted(tasks.names()) == sorted(dql.RECIPES) and len(tasks.names()) == 20


@pytest.mark.parametrize("name", OTHERS)
def test_each_task_has_d4rls_sizes_limit_and_score_and_is_registered(name):
    task, env, kind = tasks.get(name), gymnasium.make(name), name.split("-")[0]
    assert (task.state_dim, task.action_dim) == SIZES[kind]
    assert env.spec.max_episode_steps == task.episode_limit == LIMITS[task.family]
    assert env.observation_space.shape == (task.state_dim,) and env.action_space.shape == (
        task.action_dim,
    )
    np.testing.assert_allclose(task.normalized_score(np.array(SCORES[kind])), [0.0, 100.0])


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


def test_an_unknown_task_gets_the_nearest_names_in_one_line():
    with pytest.raises(TaskError, match="walker2d-medium-v2") as error:
        tasks.get("walker-medium-v2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "scores", [(np.nan, np.nan), (0.0, np.nan), (1.0, 1.0), (2.0, 1.0), (0.0, np.inf)]
)
def test_a_task_without_reference_scores_is_refused_in_one_line(scores):
    with pytest.raises(TaskError, match="hopper-medium-v2 has no reference scores") as error:
        dataclasses.replace(tasks.get("hopper-medium-v2"), ref_min=scores[0], ref_max=scores[1])
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Dynamics, against values recorded on MuJoCo 2.3.3


def step_recorded(name: str):
    """Every recorded step made again. -> the world, and the largest error in qpos and in qvel of each (N,)"""
    names = ("qpos", "qvel", "action", "next_qpos", "next_qvel")
    qpos, qvel, action, next_qpos, next_qvel = (RECORDED[f"{name}/{key}"] for key in names)
    who, rng = np.arange(len(qpos)), np.random.default_rng(0)
    with make_world(name, len(qpos)) as world:
        world.place(who, qpos, qvel, rng)
        if name == "kitchen":
            world.observations[:, :30] = qpos  # the recording's controller saw no noise
        world.step(who, action, rng)
        simulation = world.simulation
        assert (RECORDED[f"{name}/n_contacts"] > 0).sum() > 20
        return (
            world,
            np.abs(simulation.qpos - next_qpos).max(axis=1),
            np.abs(simulation.qvel - next_qvel).max(axis=1),
        )


@pytest.mark.parametrize("body", BODIES)
def test_a_step_of_locomotion_is_mujoco_233s_to_rounding(body):
    """On MuJoCo 4.0 the largest error in qvel is 3e-13; with the hopper's margins left to add up it is 0.15."""
    _, qpos_error, qvel_error = step_recorded(body)
    assert qpos_error.max() < 1e-11 and qvel_error.max() < 1e-10


def test_a_step_of_the_pen_is_mujoco_233s_but_for_contacts_that_mujoco_changed():
    """On MuJoCo 4.0 the usual error in qpos is 5e-5, the largest 9e-3; with the margins left to add up it is 8e-4 and 1.3e-2."""
    world, qpos_error, _ = step_recorded("pen")
    assert (
        np.median(qpos_error) < 2e-4
        and np.quantile(qpos_error, 0.9) < 3e-3
        and qpos_error.max() < 0.03
    )
    place, direction = world._pen()
    assert np.median(np.abs(place - RECORDED["pen/place"]).max(axis=1)) < 1e-4
    assert np.median(np.abs(direction - RECORDED["pen/direction"]).max(axis=1)) < 1e-3
    np.testing.assert_allclose(np.linalg.norm(direction, axis=1), 1.0)


def test_a_step_of_the_kitchen_is_mujoco_233s_but_for_contacts_that_mujoco_changed():
    """On MuJoCo 4.0 45 of 64 steps agree to 1e-8, and the largest error is 6e-3; with the margins left to add up none does."""
    _, qpos_error, _ = step_recorded("kitchen")
    assert (qpos_error < 1e-8).mean() > 0.6 and qpos_error.max() < 0.02


@pytest.mark.parametrize("name", ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4"])
def test_an_episode_of_locomotion_is_gymnasiums(name):
    """gymnasium's own environment, its margins mended, walks the same way, is paid the same and falls at the same step.

    Its solver is started cold at each step, as ours is; left warm they part by the solver's tolerance, and a cheetah's legs amplify it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a -v5; and an attribute of half_cheetah.xml
        theirs = gymnasium.make(name, disable_env_checker=True).unwrapped
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
    assert terminated == (
        name != "HalfCheetah-v4"
    )  # random legs fall within 200 steps; a cheetah's episode goes on


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and ends, on states made by hand


def placed(body: str, changes: dict):
    """One body at rest at qpos0, but for changes: index in [qpos, qvel] -> value."""
    world = LocomotionWorld(body, 1, 1)
    model = world.simulation.model
    state = np.concatenate([model.qpos0, np.zeros(model.nv)])
    state[list(changes)] = list(changes.values())
    world.place(np.array([0]), state[: model.nq], state[model.nq :], np.random.default_rng(0))
    return world


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
def test_a_body_that_has_fallen_ends_its_episode_and_a_cheetah_never(body, changes, over):
    with placed(body, changes) as world:
        _, terminated = world.step(
            np.array([0]), np.zeros((1, world.simulation.model.nu)), np.random.default_rng(0)
        )
    assert terminated.tolist() == [over]


PAY = [("hopper", 1, 1e-3, 0.008), ("halfcheetah", 0, 0.1, 0.05), ("walker2d", 1, 1e-3, 0.008)]


@pytest.mark.parametrize("body, alive, cost, seconds", PAY)
def test_running_is_paid_and_effort_costs(body, alive, cost, seconds):
    n = SIZES[body][1]
    action = np.linspace(-2.0, 1.0, n)[None]  # the first is clipped, and costs as -1 does
    with placed(body, {len(mujoco_qpos(body)): 1.5}) as world:
        before = world.simulation.qpos[0, 0]
        rewards, _ = world.step(np.array([0]), action, np.random.default_rng(0))
        moved = world.simulation.qpos[0, 0] - before
    assert moved > 0.5 * 1.5 * seconds
    assert rewards[0] == pytest.approx(
        moved / seconds + alive - cost * (action.clip(-1, 1) ** 2).sum()
    )


def mujoco_qpos(body: str) -> np.ndarray:
    with LocomotionWorld(body, 1, 1) as world:
        return world.simulation.model.qpos0


@pytest.mark.parametrize(
    "body, clipped", [("hopper", True), ("walker2d", True), ("halfcheetah", False)]
)
def test_observations_leave_x_out_and_clip_the_speeds_that_gym_clips(body, clipped):
    n = len(mujoco_qpos(body))
    with placed(body, {0: 7.0, n + 3: 25.0}) as world:
        observation = world.observations[0]
    assert observation.shape == (SIZES[body][0],) and 7.0 not in observation
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


def pen_held(place=(0.0, -0.2, 0.25), wanted=(0.0, 0.0, 1.0)):
    """A world whose pen has just been put somewhere, lying along x as at the start, and a direction that is asked for."""
    world = PenWorld(1, 1)
    model = world.simulation.model
    qpos, turn = model.qpos0.copy(), np.zeros(9)
    mujoco.mju_quat2Mat(
        turn, model.body("Object").quat
    )  # the pen's slides are along axes that the model has turned
    qpos[-6:-3] = turn.reshape(3, 3).T @ (np.array(place) - [0.0, -0.2, 0.25])
    world.reset(np.array([0]), np.random.default_rng(0))
    world.place(np.array([0]), qpos, np.zeros(model.nv), np.random.default_rng(0))
    world.wanted[0] = wanted
    return world


def test_a_pens_observation_is_d4rls_in_order():
    with pen_held(wanted=(0.0, 0.6, 0.8)) as world:
        observation = world.observations[0]
        place, direction = world._pen()
    np.testing.assert_array_equal(observation[:24], 0.0)  # the hand's joints
    np.testing.assert_allclose(observation[24:27], [0.0, -0.2, 0.25], atol=1e-12)
    np.testing.assert_array_equal(observation[27:33], 0.0)  # the pen's velocity
    np.testing.assert_allclose(observation[33:36], direction[0])
    np.testing.assert_allclose(
        np.abs(direction[0]), [1.0, 0.0, 0.0], atol=1e-3
    )  # it begins lying, by the model's 1.57
    np.testing.assert_allclose(observation[36:39], [0.0, 0.6, 0.8])
    np.testing.assert_allclose(observation[39:42], 0.0, atol=1e-12)
    np.testing.assert_allclose(observation[42:45], direction[0] - [0.0, 0.6, 0.8])


def test_a_wanted_direction_is_up_turned_as_robotics_turns_it():
    """The same as gymnasium-robotics' environment, whose target body is turned by a quaternion of two drawn angles."""
    rotations = pytest.importorskip("gymnasium_robotics.utils.rotations")
    with PenWorld(50, 1) as world:
        world.reset(np.arange(50), np.random.default_rng(3))
        angles = np.random.default_rng(3).uniform(-1, 1, (50, 2))
        for (a, b), wanted in zip(angles, world.wanted):
            turned = np.zeros(3)
            mujoco.mju_rotVecQuat(
                turned, np.array([0.0, 0.0, 1.0]), rotations.euler2quat(np.array([a, b, 0.0]))
            )
            np.testing.assert_allclose(wanted, turned, atol=1e-12)


@pytest.mark.parametrize("turned, bonus", [(0.0, 60.0), (0.38, 10.0), (0.6, 0.0)])
def test_a_pen_that_lies_as_wanted_is_paid_more(turned, bonus):
    """cos 0.38 = 0.93 and cos 0.6 = 0.83, where 0.9 and 0.95 are the bounds."""
    with pen_held() as world:
        world.wanted[0] = np.array([np.cos(turned), np.sin(turned), 0.0])  # the pen points along +x
        reward, over = world.step(np.array([0]), np.zeros((1, 24)), np.random.default_rng(0))
        place, direction = world._pen()
    likeness, distance = (
        direction[0] @ world.wanted[0],
        np.linalg.norm(place[0] - [0.0, -0.2, 0.25]),
    )
    assert distance < 0.075 and not over[0]
    assert reward[0] == pytest.approx(likeness - distance + bonus)


@pytest.mark.parametrize("height, dropped", [(0.07, True), (0.085, False)])
def test_a_dropped_pen_ends_the_episode_and_costs_five(height, dropped):
    with pen_held(place=(0.3, -0.4, height)) as world:
        reward, over = world.step(np.array([0]), np.zeros((1, 24)), np.random.default_rng(0))
        place, direction = world._pen()
    likeness, distance = (
        direction[0] @ world.wanted[0],
        np.linalg.norm(place[0] - [0.0, -0.2, 0.25]),
    )
    assert over.tolist() == [dropped]
    assert reward[0] == pytest.approx(likeness - distance - 5.0 * dropped)


ASKED = {
    "kitchen-complete-v0": ("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-partial-v0": ("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-mixed-v0": ("microwave", "kettle", "bottom burner", "light switch"),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_kitchens_observation_is_noisy_qpos_and_the_goals_that_are_asked(name):
    with tasks.get(name).world(300, 1) as world:
        world.reset(np.arange(300), np.random.default_rng(0))
        off = world.observations[:, :30] - START
    assert (np.abs(off).max(axis=0) <= NOISE).all() and (
        np.abs(off).max(axis=0) > 0.95 * NOISE
    ).all()
    np.testing.assert_allclose(
        NOISE[[0, 9, 11, 17, 20, 23, 26, 29]], [0.01, 5e-4, 5e-5, 5e-4, 0.01, 5e-4, 0.01, 5e-4]
    )
    goals = np.zeros(30)
    for subtask in ASKED[name]:
        goals[SUBTASKS[subtask][0]] = SUBTASKS[subtask][1]
    np.testing.assert_array_equal(world.observations[:, 30:], np.tile(goals, (300, 1)))


def test_each_subtask_pays_once_and_the_last_one_ends_the_episode():
    rng, who, still = np.random.default_rng(0), np.array([0]), np.zeros((1, 9))
    with tasks.get("kitchen-mixed-v0").world(1, 1) as world:
        world.reset(who, rng)
        qpos, qvel, paid = START.copy(), np.zeros(29), []
        for subtask in ("microwave", None, "light switch", "bottom burner", "kettle"):
            if subtask:
                qpos[SUBTASKS[subtask][0]] = SUBTASKS[subtask][1]
            world.place(who, qpos, qvel, rng)
            reward, over = world.step(who, still, rng)
            paid.append((float(reward[0]), bool(over[0])))
        assert paid == [(1, False), (0, False), (1, False), (1, False), (1, True)]
        world.reset(who, rng)
        assert world.missing.all()


@pytest.mark.parametrize("off, done", [(0.9 * DONE_WITHIN, 1.0), (1.2 * DONE_WITHIN, 0.0)])
def test_a_subtask_is_done_within_its_distance(off, done):
    rng, who = np.random.default_rng(0), np.array([0])
    with tasks.get("kitchen-partial-v0").world(1, 1) as world:
        world.reset(who, rng)
        qpos = START.copy()
        qpos[19] = SUBTASKS["slide cabinet"][1][0] - off
        world.place(who, qpos, np.zeros(29), rng)
        reward, _ = world.step(who, np.zeros((1, 9)), rng)
    assert reward[0] == done


def test_an_arms_command_is_a_speed_added_to_the_joints_that_were_seen():
    rng, who = np.random.default_rng(0), np.array([0])
    with KitchenWorld(("microwave",), 1, 1) as world:
        asked = []
        world.reset(who, rng)
        seen = world.observations[0, :9].copy()
        world.simulation.step = lambda who, control, n_substeps: asked.append(
            (control[0].copy(), n_substeps)
        )
        world.step(who, np.array([[1.0, -1.0, 0.5, 3.0, 0, 0, 0, 1.0, -1.0]]), rng)
    (control, n_substeps) = asked[0]
    wanted = seen + 0.16 * np.array([1, -1, 0.5, 1, 0, 0, 0, 1, -1])
    assert wanted[1] < -1.8 and wanted[7] > 0.04 and wanted[8] < 0.0
    wanted[[1, 7, 8]] = -1.8, 0.04, 0.0  # the second joint and the fingers are at their limits
    np.testing.assert_allclose(control, wanted)
    assert n_substeps == 40


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and environment


@pytest.mark.parametrize("name", ONE_EACH)
def test_an_evaluation_is_determined_by_its_seed_and_adds_up(name):
    task = shortened(name, 25)

    def act(observations):
        assert observations.dtype == np.float32 and observations.shape[1] == task.state_dim
        return np.tanh(3 * observations[:, : task.action_dim])

    one, two, other = (
        task.evaluate(act, 4, seed=1),
        task.evaluate(act, 4, seed=1, n_threads=1),
        task.evaluate(act, 4, seed=2),
    )
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


@pytest.mark.parametrize("name", ONE_EACH)
def test_gymnasium_finds_nothing_wrong_with_an_environment(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an observation has no bounds
        check_env(gymnasium.make(name).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("bad", ["NaN", "too few", "a matrix"])
def test_a_bad_action_is_refused_in_one_line(name, bad):
    env, n = gymnasium.make(name, disable_env_checker=True).unwrapped, tasks.get(name).action_dim
    env.reset(seed=0)
    action = {"NaN": np.full(n, np.nan), "too few": np.zeros(n - 1), "a matrix": np.zeros((1, n))}[
        bad
    ]
    with pytest.raises(TaskError) as error:
        env.step(action)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hopper-medium-v2", "pen-human-v1"])
def test_an_environment_is_drawn_from_its_side(name):
    env = gymnasium.make(
        name, render_mode="rgb_array", width=160, height=120, disable_env_checker=True
    )
    env.reset(seed=0)
    try:
        picture = env.render()
    except TaskError as error:
        pytest.skip(f"no OpenGL here: {error}")
    finally:
        env.close()
    assert picture.shape == (120, 160, 3) and picture.std() > 10


def test_a_picture_of_the_pen_shows_the_direction_that_is_wanted():
    with PenWorld(1, 1) as world, PenWorld(1, 1) as other:
        world.reset(np.array([0]), np.random.default_rng(1))
        shown = copy.copy(world.simulation.model)
        world.show(shown)
        data = mujoco.MjData(shown)
        mujoco.mj_forward(shown, data)
        np.testing.assert_allclose(
            data.body("target").xmat.reshape(3, 3)[:, 2], world.wanted[0], atol=1e-12
        )
        np.testing.assert_array_equal(
            other.simulation.model.body("target").quat, [1, 0, 0, 0]
        )  # no other world's is turned


def test_episodes_are_drawn_to_a_file_that_is_whole_or_not_there(tmp_path):
    task = tasks.get("hopper-medium-v2")
    rewards = [np.full(50, 2.0), np.full(20, 1.0)]
    episodes = tasks.Episodes(
        np.array([100.0, 20.0]), np.array([50, 20]), np.array([False, True]), rewards
    )
    task.draw(episodes, tmp_path / "episodes.png", "two straight lines")
    picture = imageio.imread(tmp_path / "episodes.png")[..., :3].astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (np.abs(picture - colour).max(axis=-1) < 60).sum() > 20
    with pytest.raises(TaskError, match="cannot write"):
        task.draw(episodes, tmp_path / "missing" / "episodes.png", "nowhere")
    assert [file.name for file in tmp_path.iterdir()] == ["episodes.png"]


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr("tasks.simulation.find_spec", lambda name: None)
    with pytest.raises(TaskError, match="gymnasium-robotics is missing.*pip install") as error:
        from tasks.simulation import load_spec

        load_spec("gymnasium_robotics", "envs/assets/adroit_hand/adroit_pen.xml")
    assert "\n" not in str(error.value)
