"""A local stand-in for D4RL's locomotion data, made with linear policies from a random search.

D4RL made its data with a policy trained by soft actor-critic to a third of an expert's score
(medium), with everything seen during that training (medium-replay), and with that policy and an
expert, half and half (medium-expert). Here they are made with the policies that search.py saved to
policies/, from bad to best: action = clip(weights·s + bias + σ·noise, ±1), with a new σ for each
trajectory.

    medium          the policy whose return with noise is nearest to half the best one's without
    medium-replay   for each trajectory a random one of the policies up to medium's
    medium-expert   half the rows from medium's policy, half from the best

The best policy is this search's, not D4RL's expert: policies/BODY.json has its return. A trajectory
ends with terminals where the task ends it, else with timeouts at the task's limit. The last one of
each simulated body is cut off where the data end.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .locomotion import Locomotion

VERSION = 3  # part of the cached file's name: raise it when the same seed would give other data
POLICIES = Path(__file__).parent / "policies"
MAX_BODIES = 128  # simulated at once: enough to hide numpy's overhead behind the physics


@dataclass(frozen=True)
class Recipe:
    """What makes the trajectories differ."""

    # σ of a trajectory's action noise ~ U: no two trajectories are equally good. With twice as much
    # noise the walker falls at once.
    noise: tuple[float, float] = (0.0, 0.1)


class Ladder(NamedTuple):
    """K policies that the search for a body found on its way, the best last."""

    weights: np.ndarray  # (K, A, S)
    bias: np.ndarray  # (K, A)
    returns: np.ndarray  # (K,) mean over episodes
    noisy_returns: np.ndarray  # (K,) the same with the noise of Recipe


def load_ladder(body: str) -> Ladder:
    """The saved policies of a body: policies/BODY.json."""
    policies = json.loads((POLICIES / f"{body}.json").read_text())["policies"]
    keys = ("weights", "bias", "episode_return", "noisy_return")
    return Ladder(*(np.array([policy[key] for policy in policies]) for key in keys))


def rungs(quality: str, ladder: Ladder) -> np.ndarray:
    """Indices of the policies that data of a quality are made with, equally likely."""
    medium = int(np.abs(ladder.noisy_returns - ladder.returns[-1] / 2).argmin())
    best = len(ladder.returns) - 1
    return {
        "medium": np.array([medium]),
        "medium-replay": np.arange(medium + 1),
        "medium-expert": np.array([medium, best]),
    }[quality]


def simulate(
    task: Locomotion, n_transitions: int, seed: int, recipe: Recipe, n_threads: int | None = None
) -> dict[str, np.ndarray]:
    """The arrays of the HDF5 file by key.

    Each body takes the same number of steps; its trajectories follow one another.
    """
    n = min(MAX_BODIES, -(-n_transitions // task.episode_limit))
    n_steps = -(-n_transitions // n)
    rng = np.random.default_rng(seed)
    ladder = load_ladder(task.body)
    weights, bias, allowed = ladder.weights, ladder.bias, rungs(task.quality, ladder)
    policy = np.zeros(n, int)  # index in the ladder
    noise = np.zeros((n, 1))
    age = np.zeros(n, int)

    def begin(world, who):
        if task.quality == "medium-expert":
            # Each body has one policy throughout. Drawn per trajectory, the better one would take
            # more than half of the rows, since its trajectories are longer.
            policy[who] = allowed[who % 2]
        else:
            policy[who] = rng.choice(allowed, len(who))
        noise[who] = rng.uniform(*recipe.noise, (len(who), 1))
        age[who] = 0
        world.reset(who, rng)

    # disable=None: no progress bar where the output is not a terminal.
    progress = tqdm(total=n * n_steps, unit=" transitions", disable=None)
    with task.world(n, n_threads) as world, progress:
        model = world.simulation.model
        widths = {
            "observations": task.state_dim,
            "actions": task.action_dim,
            "infos/qpos": model.nq,
            "infos/qvel": model.nv,
        }
        data = {key: np.zeros((n, n_steps, width), np.float32) for key, width in widths.items()}
        data["rewards"] = np.zeros((n, n_steps), np.float32)
        data |= {key: np.zeros((n, n_steps), bool) for key in ("terminals", "timeouts")}
        everyone = np.arange(n)
        begin(world, everyone)
        for t in range(n_steps):
            states = world.observations
            actions = np.einsum("nas,ns->na", weights[policy], states) + bias[policy]
            actions += noise * rng.standard_normal((n, task.action_dim))
            data["observations"][:, t] = states
            data["actions"][:, t] = actions.clip(-1, 1)
            data["infos/qpos"][:, t] = world.simulation.qpos
            data["infos/qvel"][:, t] = world.simulation.qvel
            data["rewards"][:, t], terminals = world.step(everyone, data["actions"][:, t], rng)
            age += 1
            cut = ~terminals & ((age >= task.episode_limit) | (t == n_steps - 1))
            data["terminals"][:, t] = terminals
            data["timeouts"][:, t] = cut
            begin(world, np.flatnonzero(terminals | cut))
            progress.update(n)
    data = {key: array.reshape(-1, *array.shape[2:])[:n_transitions] for key, array in data.items()}
    data["timeouts"][-1] = not data["terminals"][-1]
    return data


def statistics(data: dict[str, np.ndarray]) -> dict[str, float]:
    """Size, episodes, returns, terminals and lengths of a generated data set."""
    ends = np.flatnonzero(data["timeouts"] | data["terminals"])
    starts = np.concatenate([[0], ends[:-1] + 1])
    returns = np.add.reduceat(data["rewards"].astype(np.float64), starts)
    return {
        "transitions": len(data["rewards"]),
        "episodes": len(ends),
        "mean_return": float(returns.mean()),
        "max_return": float(returns.max()),
        "terminal_share": float(data["terminals"].mean()),
        "mean_length": float((ends - starts + 1).mean()),
    }
