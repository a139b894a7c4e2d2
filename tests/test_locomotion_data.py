"""Generated locomotion data and the search behind it: D4RL's layout, true rewards, and better data
from better policies.
"""

import dataclasses
import json

import h5py
import numpy as np
import pytest

import tasks
from tasks import search
from tasks.datasets import load
from tasks.generate import cached, generate
from tasks.locomotion import BODIES
from tasks.locomotion_data import Ladder, Recipe, load_ladder, rungs, simulate, statistics

QUIET = dict(log=lambda line: None)


def small(name="hopper-medium-replay-v2", limit=80):
    """A task with short episodes, so that a test sees many ends of trajectories quickly."""
    return dataclasses.replace(tasks.get(name), episode_limit=limit)


@pytest.fixture(scope="module")
def data():
    return simulate(small(), 40 * 80, seed=1, recipe=Recipe())


@pytest.mark.parametrize("body", BODIES)
def test_the_policies_rise_to_a_good_one(body):
    ladder, task = load_ladder(body), tasks.get(f"{body}-medium-v2")
    assert ladder.weights.shape[1:] == (task.action_dim, task.state_dim)
    assert ladder.bias.shape[1:] == (task.action_dim,)
    assert (np.diff(ladder.returns) > 0).all() and len(ladder.returns) >= 5
    assert task.normalized_score(ladder.returns[-1]) > 20


@pytest.mark.parametrize("body", BODIES)
def test_the_best_policy_earns_what_its_file_says(body):
    """In a fifth of an episode, from other starts, a fifth of its return, give or take a third."""
    weights, bias, returns, _ = load_ladder(body)
    task = dataclasses.replace(tasks.get(f"{body}-medium-v2"), episode_limit=200)
    best = lambda states: (states @ weights[-1].T + bias[-1]).clip(-1, 1)  # noqa: E731
    episodes = task.evaluate(best, 4, seed=7)
    assert np.mean(episodes.returns) == pytest.approx(returns[-1] / 5, rel=1 / 3)


def test_medium_is_the_policy_half_as_good_as_the_best():
    """Under its noise. Replay goes up to it, expert is the best."""
    returns, noisy_returns = [10.0, 40.0, 55.0, 80.0, 100.0], [5.0, 20.0, 30.0, 45.0, 90.0]
    ladder = Ladder(None, None, np.array(returns), np.array(noisy_returns))
    assert rungs("medium", ladder).tolist() == [3]
    assert rungs("medium-replay", ladder).tolist() == [0, 1, 2, 3]
    assert rungs("medium-expert", ladder).tolist() == [3, 4]


@pytest.mark.parametrize("body", BODIES)
def test_medium_data_earn_about_half_of_the_best(body):
    data = simulate(tasks.get(f"{body}-medium-v2"), 12_000, 0, Recipe())
    assert 0.3 < statistics(data)["mean_return"] / load_ladder(body).returns[-1] < 0.75


def test_half_the_rows_of_medium_expert_are_the_experts():
    task = dataclasses.replace(tasks.get("walker2d-medium-expert-v2"), episode_limit=100)
    ladder, data = load_ladder("walker2d"), simulate(task, 40 * 100, 0, Recipe())
    off = []
    for k in rungs("medium-expert", ladder):
        actions = data["observations"] @ ladder.weights[k].T + ladder.bias[k]
        off.append(np.abs(actions.clip(-1, 1) - data["actions"]).mean(axis=1))
    nearest = np.argmin(off, axis=0)
    assert (nearest == 1).mean() == pytest.approx(0.5, abs=0.05)


def test_rows_are_transitions_of_the_tasks_own_environment(data):
    """From a recorded state, the recorded action earns its reward and leads to the next state."""
    inside = np.flatnonzero(~data["terminals"] & ~data["timeouts"])[::97]
    with small().world(len(inside), 1) as world:
        who, rng = np.arange(len(inside)), np.random.default_rng(0)
        world.place(who, data["infos/qpos"][inside], data["infos/qvel"][inside], rng)
        np.testing.assert_allclose(world.observations, data["observations"][inside], atol=1e-5)
        rewards, over = world.step(who, data["actions"][inside], rng)
        # The state was rounded to float32.
        np.testing.assert_allclose(rewards, data["rewards"][inside], atol=2e-3)
        assert not over.any()
        np.testing.assert_allclose(world.observations, data["observations"][inside + 1], atol=5e-3)


def test_trajectories_end_by_falling_or_by_the_limit(data):
    """Never by both."""
    assert not (data["terminals"] & data["timeouts"]).any()
    assert data["terminals"].any() and data["timeouts"].any()
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    assert ends[-1] == len(data["rewards"]) - 1
    assert np.diff(ends).max() <= 80 and ends[0] < 80
    fallen = data["observations"][np.flatnonzero(data["terminals"])]
    assert (np.abs(fallen[:, 1]) > 0.05).mean() > 0.5  # leaning, in the state before the last step


def test_better_data_have_better_returns():
    returns = []
    for quality in ("medium-replay", "medium", "medium-expert"):
        data = simulate(small(f"hopper-{quality}-v2", limit=300), 30 * 300, 0, Recipe())
        returns.append(statistics(data)["mean_return"])
    assert returns[0] < returns[1] < returns[2]


def test_actions_are_within_the_box_and_noisy(data):
    assert np.abs(data["actions"]).max() <= 1.0
    weights, bias, *_ = load_ladder("hopper")
    clean = np.einsum("kas,ns->nka", weights, data["observations"]) + bias
    off = np.abs(data["actions"][:, None] - clean.clip(-1, 1)).mean(axis=2).min(axis=1)
    assert 0.01 < off.mean() < 0.1


def test_the_same_seed_gives_the_same_data_on_any_threads():
    one, two, other = (
        simulate(small(), 800, seed, Recipe(), threads)
        for seed, threads in ((3, 1), (3, 2), (4, 1))
    )
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])
    assert not np.array_equal(one["actions"], other["actions"])


def test_a_file_has_d4rls_keys_and_reads_as_generated(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task = small("halfcheetah-medium-v2", limit=50)
    path = cached(task, n_transitions=500, seed=2, **QUIET)
    widths = {
        "observations": (17,),
        "actions": (6,),
        "rewards": (),
        "terminals": (),
        "timeouts": (),
    }
    widths |= {"infos/qpos": (9,), "infos/qvel": (9,)}
    with h5py.File(path) as file:
        for key, width in widths.items():
            assert file[key].shape == (500, *width)
        columns = {key: file[key][()] for key in ("rewards", "terminals", "timeouts")}
        assert file.attrs["seed"] == 2
        assert file.attrs["mean_return"] == pytest.approx(statistics(columns)["mean_return"])
    dataset = load(task, "generated", seed=2, n_generated=500, **QUIET)
    assert dataset.source == "generated" and "not D4RL's data" in dataset.label
    assert len(dataset) == 490  # the last step of each of ten trajectories has no successor


def test_a_task_without_a_generator_says_what_to_do(tmp_path):
    why = "no generated data for pen-human-v1.*--data PATH"
    with pytest.raises(tasks.TaskError, match=why) as error:
        generate(tasks.get("pen-human-v1"), tmp_path / "data.hdf5", n_transitions=100)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_short_search_climbs_and_keeps_policies_that_rise(tmp_path, monkeypatch):
    """Two seconds of a smaller search; what is kept is then measured again, to the same returns."""
    monkeypatch.setitem(search.SETTINGS, "hopper", search.Settings(8, 4, 0.05, 0.05, limit=100))
    monkeypatch.setattr(search, "EPISODES", 4)
    monkeypatch.setattr(search, "POLICIES", tmp_path)

    def searched(seconds):
        monkeypatch.setattr("sys.argv", ["search", "hopper", "--seconds", seconds])
        search.main()
        return json.loads((tmp_path / "hopper.json").read_text())

    found, again = searched("2"), searched("0")
    returns = [policy["episode_return"] for policy in found["policies"]]
    assert returns == sorted(returns) and returns[-1] > returns[0]
    assert found == again


def test_a_running_mean_is_that_of_all_states():
    normaliser = search.Normaliser(3)
    states = np.random.default_rng(0).normal([1, -5, 1e3], [1, 0.1, 50], (1000, 3))
    for piece in np.split(states, [3, 400, 990]):
        normaliser.see(piece)
    np.testing.assert_allclose(normaliser.mean, states.mean(axis=0))
    np.testing.assert_allclose(normaliser.squares / 1000, states.var(axis=0))
    weights, bias = normaliser.fold(np.ones((1, 1, 3)))
    expected = ((states - states.mean(axis=0)) / states.std(axis=0)).sum(axis=1)
    np.testing.assert_allclose(states @ weights[0, 0] + bias[0, 0], expected)
