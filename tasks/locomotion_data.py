"""A local stand-in for D4RL's locomotion data, made with linear policies that random search has found (search.py).

D4RL made its data with a policy trained by soft actor-critic to a third of an expert's score (medium), with all that was seen
while it was trained (medium-replay), and with that policy and an expert, half and half (medium-expert). Here they come from the
ladder of policies that search.py left in policies/: action = clip(weights·s + bias + σ·noise, ±1), σ drawn anew for each trajectory.

    medium          the policy whose return under that noise is nearest to half the best one's without
    medium-replay   each trajectory another policy of the ladder, up to medium's
    medium-expert   half the rows medium's, half the best one's

The best policy is this search's, not D4RL's expert: policies/BODY.json has its return. A trajectory ends by terminals where the
task ends it, else by timeouts at the task's limit; the last of each simulated body is cut off where the data end.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .locomotion import Locomotion

VERSION = 2  # raise it whenever the same seed would give other data: part of the cached file's name
POLICIES = Path(__file__).parent / "policies"
MAX_BODIES = 128  # enough to hide numpy's overhead behind the physics


@dataclass(frozen=True)
class Recipe:
    """σ of a trajectory's action noise ~ U(noise): no two trajectories are equally good. Twice as much fells the walker at once."""

    noise: tuple[float, float] = (0.0, 0.1)


class Ladder(NamedTuple):
    """A body's policies on the way of its search, the best last."""

    weights: np.ndarray  # (K, A, S)
    bias: np.ndarray  # (K, A)
    returns: np.ndarray  # (K,) mean over episodes
    noisy_returns: np.ndarray  # (K,) the same with a Recipe's noise


def load_ladder(body: str) -> Ladder:
    policies = json.loads((POLICIES / f"{body}.json").read_text())["policies"]
    return Ladder(
        *(
            np.array([policy[key] for policy in policies])
            for key in ("weights", "bias", "episode_return", "noisy_return")
        )
    )


def rungs(quality: str, ladder: Ladder) -> np.ndarray:
    """The policies that data of a quality are made with, equally likely."""
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
    """The arrays of the HDF5 file by key. Every body makes equally many steps, its trajectories end to end."""
    n = min(MAX_BODIES, -(-n_transitions // task.episode_limit))
    n_steps = -(-n_transitions // n)
    rng = np.random.default_rng(seed)
    ladder = load_ladder(task.body)
    weights, bias, allowed = ladder.weights, ladder.bias, rungs(task.quality, ladder)
    rung, noise, age = np.zeros(n, int), np.zeros((n, 1)), np.zeros(n, int)

    def begin(world, who):
        # A body keeps to one of medium-expert's two, for the better one's trajectories are longer and would fill the data.
        rung[who] = (
            allowed[who % 2] if task.quality == "medium-expert" else rng.choice(allowed, len(who))
        )
        noise[who] = rng.uniform(*recipe.noise, (len(who), 1))
        age[who] = 0
        world.reset(who, rng)

    with (
        task.world(n, n_threads) as world,
        tqdm(total=n * n_steps, unit=" transitions", disable=None) as progress,
    ):
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
            actions = (
                np.einsum("nas,ns->na", weights[rung], states)
                + bias[rung]
                + noise * rng.standard_normal((n, task.action_dim))
            )
            data["observations"][:, t], data["actions"][:, t] = states, actions.clip(-1, 1)
            data["infos/qpos"][:, t], data["infos/qvel"][:, t] = (
                world.simulation.qpos,
                world.simulation.qvel,
            )
            data["rewards"][:, t], terminals = world.step(everyone, data["actions"][:, t], rng)
            age += 1
            cut = ~terminals & ((age >= task.episode_limit) | (t == n_steps - 1))
            data["terminals"][:, t], data["timeouts"][:, t] = terminals, cut
            begin(world, np.flatnonzero(terminals | cut))
            progress.update(n)
    data = {key: array.reshape(-1, *array.shape[2:])[:n_transitions] for key, array in data.items()}
    data["timeouts"][-1] = not data["terminals"][-1]
    return data


def statistics(data: dict[str, np.ndarray]) -> dict[str, float]:
    """What a data set holds, in numbers."""
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
