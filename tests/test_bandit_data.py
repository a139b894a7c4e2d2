"""experiments/bandit_data.py: the data are the paper's, the figures follow their definitions."""

import math

import numpy as np
import pytest
import torch

from experiments.bandit_data import (
    NAMES,
    REWARDS,
    draw_actions,
    figures,
    mmd,
    released_data,
    transitions,
)

MEANS = {"upper left": (-0.8, 0.8), "lower left": (-0.8, -0.8), "upper right": (0.8, 0.8)}
MEANS["lower right"] = (0.8, -0.8)
DATA = draw_actions(np.random.default_rng(5), 1000)


def test_the_data_are_the_papers():
    actions, rewards = released_data()
    assert actions.shape == (10_000, 2) and np.abs(actions).max() <= 1
    paid = dict(zip(MEANS, (3.0, 0.0, 1.5, 5.0)))
    for i, name in enumerate(NAMES):
        of_corner = slice(2500 * i, 2500 * (i + 1))
        columns = [*actions[of_corner].T, rewards[of_corner]]
        means, sigmas = (*MEANS[name], paid[name]), (0.05, 0.05, 0.5)
        for column, mean, sigma in zip(columns, means, sigmas):
            assert abs(column.mean() - mean) < 5 * sigma / 50
            assert abs(column.std() / sigma - 1) < 0.08
    state, action, *_ = transitions().columns
    assert np.allclose(action.numpy(), actions) and not state.any()


def test_the_data_are_those_of_the_authors_seed():
    """All actions, then all rewards, corner by corner, from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2022)
        sigma, actions = torch.full((2,), 0.05), []
        for mean in MEANS.values():
            corner = torch.distributions.Normal(torch.tensor(mean), sigma)
            actions.append(corner.sample((2500,)).clip(-1, 1))
        rewards = [mean + 0.5 * torch.randn(2500, 1) for mean in (3.0, 0.0, 1.5, 5.0)]
    ours = released_data()
    assert np.array_equal(ours[0], torch.cat(actions).numpy())
    assert np.array_equal(ours[1], torch.cat(rewards)[:, 0].numpy())


def test_only_samples_at_a_corner_are_counted_and_paid():
    at = [*MEANS.values(), (0.8, -0.651), (0.8, -0.649), (1.0, -1.0), (0.0, 0.0)]
    found = figures(np.array(at), DATA)
    assert list(found["shares"].values()) == [1 / 8, 1 / 8, 1 / 8, 2 / 8]
    assert found["outside"] == 3 / 8 and found["reward"] == (3.0 + 0.0 + 1.5 + 2 * 5.0) / 8
    of_data = figures(draw_actions(np.random.default_rng(6), 1000), DATA)
    assert 0.97 < 1 - of_data["outside"] < 1 and of_data["mmd"] < 0.05
    assert abs(of_data["reward"] - REWARDS.mean()) < 0.1


def test_the_mmd_is_as_defined():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 2)) * 0.1

    def k(a, b):
        return math.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / (2 * 0.1**2))

    pairs = [(a, b, c, d) for a, c in zip(x, y) for b, d in zip(x, y)]
    squared = sum(k(a, b) + k(c, d) - 2 * k(a, d) for a, b, c, d in pairs) / 49
    assert mmd(x, y) == pytest.approx(math.sqrt(squared)) and mmd(x, x) == 0
