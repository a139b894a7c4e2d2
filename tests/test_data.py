"""trainer/data.py: rewards tuned as the recipes say."""

import numpy as np
import pytest
import torch
from tiny_runs import ENV, write_hdf5

import tasks
from trainer.data import load_transitions, tune_rewards
from trainer.options import Options


def test_reward_tuning():
    rewards = np.array([0, 1, 0, 3], dtype=np.float32)
    expected = {
        "none": rewards,
        "cql": (rewards - 0.5) * 4,
        "sparse": rewards * 200,
        "normalize": (rewards - 1) / np.sqrt(1.5, dtype=np.float32),
        "iql_antmaze": rewards - 1,
        "antmaze": (rewards - 0.25) * 2,
    }
    for how, values in expected.items():
        tuned = tune_rewards(rewards, how)
        assert tuned.dtype == np.float32
        np.testing.assert_allclose(tuned, values, rtol=1e-6)
    with pytest.raises(ValueError, match="cubic"):
        tune_rewards(rewards, "cubic")


def tuned_by_returns(rewards, terminals, observations, next_observations):
    columns = dict(observations=observations, next_observations=next_observations)
    return tune_rewards(rewards, "iql_locomotion", terminals=terminals, **columns)


def test_locomotion_rewards_are_scaled_by_the_spread_of_returns():
    """Trajectories end by a terminal, where the next row starts elsewhere, and with the data."""
    rewards = np.array([1, 2, 3, 4, 5, 6], dtype=np.float32)
    terminals = np.array([False, True, False, False, False, False])
    observations = np.array([[0], [1], [2], [3], [7], [8]], dtype=np.float32)
    next_observations = np.array([[1], [2], [3], [4], [8], [9]], dtype=np.float32)
    tuned = tuned_by_returns(rewards, terminals, observations, next_observations)
    np.testing.assert_allclose(tuned, rewards / (11 - 3) * 1000, rtol=1e-6)  # returns 3, 7, 11


@pytest.mark.parametrize("seed", range(3))
def test_the_spread_of_returns_is_that_of_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    n = 60
    states = rng.standard_normal((n + 1, 3)).astype(np.float32)
    observations, following = states[:-1], states[1:].copy()
    terminals = rng.random(n) < 0.1
    following[rng.choice(n, 5, replace=False)] += 1.0  # cut off: the next row starts somewhere else
    rewards = rng.standard_normal(n).astype(np.float32)

    returns, total = [], 0.0
    for i in range(n):
        total += float(rewards[i])
        if i == n - 1 or terminals[i] or not np.array_equal(observations[i + 1], following[i]):
            returns.append(total)
            total = 0.0
    tuned = tuned_by_returns(rewards, terminals, observations, following)
    assert len(returns) > 3 and tuned.dtype == np.float32
    np.testing.assert_allclose(tuned, rewards / (max(returns) - min(returns)) * 1000, rtol=1e-5)


def test_tuned_rewards_and_ends_reach_the_update(tmp_path):
    task = tasks.get(ENV)
    dataset = tasks.load(task, str(write_hdf5(tmp_path / "tiny.hdf5")), log=lambda line: None)
    transitions = load_transitions(Options(reward_tune="cql"), dataset, "cpu")
    assert len(transitions) == len(dataset)
    batch = transitions.sample(400, torch.Generator().manual_seed(0))
    same = (dataset.observations[None] == batch.state.numpy()[:, None]).all(axis=2)
    rows = [np.flatnonzero(row).item() for row in same]
    assert 100 < len(set(rows)) < 400  # uniform, with replacement
    np.testing.assert_array_equal(batch.action, dataset.actions[rows])
    np.testing.assert_array_equal(batch.next_state, dataset.next_observations[rows])
    np.testing.assert_array_equal(batch.reward[:, 0], (dataset.rewards[rows] - 0.5) * 4)
    np.testing.assert_array_equal(batch.not_done[:, 0], 1.0 - dataset.terminals[rows])
