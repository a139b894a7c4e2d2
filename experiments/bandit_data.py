"""The paper's 2-D bandit: its data, and what the table says of samples.

Four corners of a square, σ = 0.05, are equally likely in the data; they pay 3.0, 0.0, 1.5 and 5.0
on average. There is one state, the zero vector.

A sample is a corner's if it lies within 3σ of it, as 98.9 % of the data do, and then is worth that
corner's mean reward. Outside all four it is worth nothing, as little as at the worst corner: no
data say what is paid there, and what Q promises there is not counted. The MMD to 1,000 other draws
of the data sees the corners' shares as well as their shape; two draws of the data give its floor.
"""

import numpy as np
import torch

from dql import Transitions

STATE_DIM, ACTION_DIM = 2, 2
CORNERS = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
NAMES = ("upper left", "lower left", "upper right", "lower right")
REWARDS = np.array([3.0, 0.0, 1.5, 5.0])
SIGMA, REWARD_SIGMA = 0.05, 0.5
N_DATA, DATA_SEED = 10_000, 2022
BANDWIDTH = 0.1  # h of the MMD


def draw_actions(rng, n) -> np.ndarray:
    """n other actions (n,2) like the data's, one corner after the other."""
    corner = np.arange(n) * len(CORNERS) // n
    return (CORNERS[corner] + SIGMA * rng.standard_normal((n, ACTION_DIM))).clip(-1, 1)


def released_data() -> tuple[np.ndarray, np.ndarray]:
    """The authors' actions (N_DATA,2) and rewards (N_DATA,): torch's generator at their seed, asked
    in the order of their code."""
    generator, each = torch.Generator().manual_seed(DATA_SEED), N_DATA // len(CORNERS)
    sigma, actions = torch.full((each, ACTION_DIM), SIGMA), []
    for mean in torch.tensor(CORNERS, dtype=torch.float32):
        drawn = torch.normal(mean.expand(each, -1), sigma, generator=generator)
        actions.append(drawn.clip(-1, 1))
    rewards = [m + REWARD_SIGMA * torch.randn(each, generator=generator) for m in REWARDS]
    return torch.cat(actions).numpy(), torch.cat(rewards).numpy()


def transitions() -> Transitions:
    actions, rewards = released_data()
    states = np.zeros((N_DATA, STATE_DIM))
    return Transitions(states, actions, states, rewards, np.ones(N_DATA))


def mmd(x, y, h=BANDWIDTH) -> float:
    """Maximum mean discrepancy of two samples (n,2), (m,2), kernel exp(-‖x-y‖²/2h²).

    Pairs of a point with itself are included.
    """

    def mean_kernel(x, y):
        return np.exp(((x[:, None] - y) ** 2).sum(axis=-1) / (-2 * h**2)).mean()

    squared = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    return float(np.sqrt(max(squared, 0.0)))


def shares(samples) -> np.ndarray:
    """Of samples (n,2): the share within 3σ of each corner (4,)."""
    distances = np.linalg.norm(samples[:, None] - CORNERS, axis=-1)
    return (distances <= 3 * SIGMA).mean(axis=0)


def figures(samples, data) -> dict:
    """What the table says of samples (n,2), by the rules above; data (m,2)."""
    found = shares(samples)
    return {
        "shares": dict(zip(NAMES, found.tolist())),
        "outside": float(1 - found.sum()),
        "reward": float(found @ REWARDS),
        "mmd": mmd(samples, data),
    }
