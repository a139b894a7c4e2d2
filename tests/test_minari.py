"""tasks/minari.py: a local Minari data set as a task's transitions, and what it is refused for."""

import fcntl
import json
import re
import sys
import types
import warnings

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

import tasks
from tasks import datasets, minari as reader
from tasks.task import TaskError

minari = pytest.importorskip("minari")
EpisodeBuffer = pytest.importorskip("minari.data_collector").EpisodeBuffer


TASK = tasks.get("hopper-medium-v2")
NAME = "tests/hopper-v0"
BOX = spaces.Box(-np.inf, np.inf, (11,), np.float64)
ACTIONS = spaces.Box(-1.0, 1.0, (3,), np.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def episode(number: int, steps: int, **flags) -> EpisodeBuffer:
    """Random numbers; flags: terminated or truncated at the last step."""
    rng = np.random.default_rng(number)
    last = np.arange(steps) == steps - 1
    return EpisodeBuffer(
        id=number,
        observations=rng.standard_normal((steps + 1, 11)),
        actions=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        rewards=rng.standard_normal(steps),
        terminations=last & flags.get("terminated", False),
        truncations=last & flags.get("truncated", False),
    )


EPISODES = [
    episode(0, 5, terminated=True),
    episode(1, 1, truncated=True),
    episode(2, 7, truncated=True),
    episode(3, 4, terminated=True),
]


def create(episodes, observation_space=BOX, action_space=ACTIONS, name=NAME):
    where = dict(observation_space=observation_space, action_space=action_space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about authors and descriptions
        minari.create_dataset_from_buffers(name, episodes, **where)


def load(source=f"minari:{NAME}", **options):
    lines = []
    return datasets.load(TASK, source, log=lines.append, **options), lines


def error_of(source=f"minari:{NAME}", **options) -> str:
    with pytest.raises(TaskError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_step_is_a_transition():
    """And only terminations are terminal."""
    create(EPISODES)
    data, _ = load()
    for column, expected in {
        "observations": [e.observations[:-1] for e in EPISODES],
        "next_observations": [e.observations[1:] for e in EPISODES],
        "actions": [e.actions for e in EPISODES],
        "rewards": [e.rewards for e in EPISODES],
    }.items():
        read = getattr(data, column)
        expected = np.concatenate(expected).astype(np.float32)
        np.testing.assert_array_equal(read, expected, err_msg=column)
        assert read.dtype == np.float32, column
    assert data.terminals.dtype == bool
    assert np.flatnonzero(data.terminals).tolist() == [4, 16]


def test_the_label_says_that_scores_are_not_d4rls():
    create(EPISODES)
    data, lines = load()
    assert (data.source, data.label) == ("minari", f"Minari {NAME} (its scores are not D4RL's)")
    assert lines[0] == f"data: {data.reason}" and NAME in data.reason


def test_a_missing_data_set_is_named_with_its_download():
    """And with those that are there."""
    assert "minari download mujoco/hopper/medium-v0" in error_of("minari:mujoco/hopper/medium-v0")
    create(EPISODES)
    message = error_of("minari:mujoco/hopper/medium-v0")
    assert "'mujoco/hopper/medium-v0'" in message and f"only {NAME};" in message


@pytest.mark.parametrize("name", ["", "no name of Minari's", "../elsewhere-v0"])
def test_an_impossible_name_is_an_error_in_one_line(folder, name):
    (folder / "not a data set" / "data").mkdir(parents=True)
    assert "there is no local Minari data set" in error_of(f"minari:{name}")


def test_without_the_package_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    assert "takes the package minari: pip install -r requirements.txt" in error_of()


SIZES = {"observation": 7, "achieved_goal": 2, "desired_goal": 2}
GOALS = spaces.Dict({part: spaces.Box(-1, 1, (size,)) for part, size in SIZES.items()})
DICT = "observations in a Dict space of achieved_goal, desired_goal, observation"
SPACES = {
    "goals": (GOALS, ACTIONS, [DICT, "11 numbers"]),
    "discrete actions": (BOX, spaces.Discrete(3), ["actions in a Discrete space", "3 numbers"]),
    "another size": (spaces.Box(-1, 1, (17,)), ACTIONS, ["observations of shape (17,)", "(11,)"]),
    "other actions": (BOX, spaces.Box(-1, 1, (6,)), ["actions of shape (6,)", "(3,)"]),
}


@pytest.mark.parametrize("observation_space, action_space, words", SPACES.values(), ids=SPACES)
def test_other_spaces_than_the_tasks_are_refused(observation_space, action_space, words):
    def many(space, n):
        if isinstance(space, spaces.Dict):
            return {key: many(part, n) for key, part in space.items()}
        return np.stack([space.sample() for _ in range(n)])

    flags = np.zeros(5, bool)
    made = EpisodeBuffer(
        id=0,
        observations=many(observation_space, 6),
        actions=many(action_space, 5),
        rewards=np.zeros(5),
        terminations=flags,
        truncations=flags,
    )
    create([made], observation_space, action_space)
    message = error_of()
    for word in [NAME, "hopper-medium-v2", *words]:
        assert word in message


def test_a_bad_value_is_named_with_its_episode_and_row():
    """Not finite, or an action outside the box."""
    bad = [episode(0, 4), episode(1, 4)]
    bad[1].observations[3, 2] = np.nan
    create(bad)
    assert "episode 1: observations has nan in row 3" in error_of()
    bad = [episode(0, 4), episode(1, 4)]
    bad[1].actions[2, 1] = 1.5
    create(bad, action_space=spaces.Box(-2.0, 2.0, (3,), np.float32), name="tests/wide-v0")
    message = error_of("minari:tests/wide-v0")
    assert "episode 1: actions has 1.5 in row 2, outside [-1, 1]" in message


def edit(folder, change):
    with h5py.File(folder / NAME / "data" / "main_data.hdf5", "a") as file:
        change(file)


def shorten(file):
    observations = file["episode_2/observations"][:2]
    del file["episode_2/observations"]
    file["episode_2/observations"] = observations


DAMAGE = {
    "a short column": shorten,
    "a missing column": lambda file: file.__delitem__("episode_1/rewards"),
    "a missing episode": lambda file: file.__delitem__("episode_3"),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_data_set_is_an_error(folder, change):
    create(EPISODES)
    edit(folder, change)
    assert f"Minari's {NAME} is damaged" in error_of()


def test_a_data_set_without_its_description_cannot_be_opened(folder):
    create(EPISODES)
    (folder / NAME / "data" / "metadata.json").unlink()
    assert f"Minari's {NAME} cannot be opened" in error_of()


@pytest.mark.parametrize("key, value", [("total_steps", -1), ("total_steps", "x"), ("env_spec", 3)])
def test_an_odd_description_is_an_error_in_one_line(folder, key, value):
    create(EPISODES)
    describe(folder, **{key: value})
    assert re.search(r"is damaged, \w|cannot be opened: \w", error_of())


def describe(folder, **what):
    path = folder / NAME / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | what))


def recorded_in(environment):
    return EnvSpec(environment, entry_point="nowhere:Nothing").to_json()


@pytest.mark.parametrize("environment", ["Hopper-v5", "hopper-medium-v2", "mine/SlowHopper-v0", ""])
def test_data_of_the_tasks_body_are_taken(folder, environment):
    create(EPISODES)
    if environment:
        describe(folder, env_spec=recorded_in(environment))
    assert len(load()[0]) == 17


def test_data_of_another_body_of_the_same_sizes_are_refused(folder):
    """As walkers' for a halfcheetah. Here the names alone differ."""
    create(EPISODES)
    describe(folder, env_spec=recorded_in("Walker2d-v5"))
    message = error_of()
    assert "was recorded in Walker2d-v5, hopper-medium-v2 needs a hopper's data" in message


ENVIRONMENTS = {
    "halfcheetah-medium-v2": "HalfCheetah-v5",
    "walker2d-medium-replay-v2": "Walker2d-v5",
    "pen-human-v1": "AdroitHandPen-v1",
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_body_is_known_by_its_environment(name):
    for environment in ENVIRONMENTS.values():
        data = types.SimpleNamespace(env_spec=EnvSpec(environment))
        if environment == ENVIRONMENTS[name]:
            reader._check_environment(data, "it", tasks.get(name))
        else:
            with pytest.raises(TaskError, match=environment):
                reader._check_environment(data, "it", tasks.get(name))


def test_a_line_sums_up_what_was_read():
    create(EPISODES)
    line, returns = load()[1][-1], [episode.rewards.sum() for episode in EPISODES]
    assert line == (
        f"data: 17 transitions of 17 rows, 4 episodes of mean return {np.mean(returns):.4g} "
        f"and best {max(returns):.4g}, 2 terminals"
    )


def test_a_locked_data_set_is_not_called_damaged(folder):
    create(EPISODES)
    with open(folder / NAME / "data" / "main_data.hdf5", "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        message = error_of()
    assert "another process has locked it" in message and "delete" not in message


def test_a_data_set_that_leads_to_other_files_is_refused(folder):
    def lead(file):
        del file["episode_1/rewards"]
        file["episode_1/rewards"] = h5py.ExternalLink("private.hdf5", "/rewards")

    create(EPISODES)
    edit(folder, lead)
    assert "episode_1/rewards is stored in another file" in error_of()


def test_without_a_home_the_variable_to_set_is_named(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "MINARI_DATASETS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert "no home directory for ~: set MINARI_DATASETS_PATH" in error_of()


def test_there_is_nothing_to_repair():
    create(EPISODES)
    assert "nothing is known to be broken" in error_of(repair=True)
