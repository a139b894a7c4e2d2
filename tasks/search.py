"""Linear policies for the locomotion bodies, found by augmented random search; generated data are made with them.

    python -m tasks.search hopper --seconds 600        # writes tasks/policies/hopper.json
    python -m tasks.search hopper --seconds 0          # measures the policies that are there again

The search (Mania, Guy, Recht, 2018, ARS V2-t) perturbs one matrix in random directions, ±, runs an episode with each, and moves the
matrix along the best directions, weighted by the differences of their returns. States are normalised by all that was seen. What
is kept are the policies on the way, each with its mean return, and that with the data's noise: action = clip(weights·s + bias, ±1),
a function of the observation alone. The bonus for being alive is left out of the returns that are climbed, or standing still
would do.
"""

import argparse
import json
import time
from typing import NamedTuple

import mujoco
import numpy as np

from atomic import written_whole

from . import get
from .locomotion import BODIES, LocomotionWorld
from .locomotion_data import POLICIES, Recipe

EPISODES = 16  # that measure a policy on the way


class Settings(NamedTuple):
    directions: int
    best: int  # of them, which are followed
    rate: float
    noise: float  # σ of a direction's entries
    limit: int = 1000  # environment steps


SETTINGS = {
    "hopper": Settings(16, 8, 0.02, 0.04),
    "halfcheetah": Settings(16, 4, 0.02, 0.03),
    "walker2d": Settings(32, 16, 0.03, 0.03),
}


class Normaliser:
    """Running mean and standard deviation of the states seen, by Chan's update."""

    def __init__(self, dim: int):
        self.n, self.mean, self.squares = 0, np.zeros(dim), np.zeros(dim)

    def see(self, states: np.ndarray) -> None:
        n, mean = len(states), states.mean(axis=0)
        off, total = mean - self.mean, self.n + n
        self.squares += ((states - mean) ** 2).sum(axis=0) + off**2 * self.n * n / total
        self.mean += off * n / total
        self.n = total

    def fold(self, matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Matrices (k, A, S) for normalised states -> weights (k, A, S) and bias (k, A) for states as they are."""
        std = np.sqrt(self.squares / max(self.n, 1))
        weights = matrices / np.where(std > 1e-7, std, 1.0)
        return weights, -weights @ self.mean


def run(
    world: LocomotionWorld, weights, bias, rng, limit: int, noise=0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One episode for each of k policies, noise () or (k, 1) times normals added to its actions.

    -> returns (k,), lengths (k,), the states seen (sum of lengths, S)
    """
    noise = np.broadcast_to(noise, (len(weights), 1))
    who = np.arange(len(weights))
    returns, lengths, seen = np.zeros(len(who)), np.zeros(len(who), int), []
    world.reset(who, rng)
    for _ in range(limit):
        states = world.observations[who]
        seen.append(states)
        actions = np.einsum("kas,ks->ka", weights[who], states) + bias[who]
        actions += noise[who] * rng.standard_normal(actions.shape)
        rewards, over = world.step(who, actions, rng)
        returns[who] += rewards
        lengths[who] += 1
        who = who[~over]
        if not len(who):
            break
    return returns, lengths, np.concatenate(seen)


def search(body: str, seconds: float, seed: int, report=print) -> list[dict]:
    """Climb for a number of seconds. -> the policies on the way: dicts of steps, weights, bias, episode_return, noisy_return"""
    settings, task = SETTINGS[body], get(f"{body}-medium-v2")
    rng, normaliser = np.random.default_rng(seed), Normaliser(task.state_dim)
    matrix, steps, began, found, measured_at = (
        np.zeros((task.action_dim, task.state_dim)),
        0,
        time.monotonic(),
        [],
        0.0,
    )
    alive = BODIES[body].alive
    with task.world(2 * settings.directions, 1) as world:
        while time.monotonic() - began < seconds:
            deltas = rng.standard_normal((settings.directions, *matrix.shape))
            tried = np.concatenate(
                [matrix + settings.noise * deltas, matrix - settings.noise * deltas]
            )
            returns, lengths, states = run(world, *normaliser.fold(tried), rng, settings.limit)
            normaliser.see(states)
            steps += lengths.sum()
            plus, minus = np.split(returns - alive * lengths, 2)
            best = np.argsort(np.maximum(plus, minus))[-settings.best :]
            spread = np.concatenate([plus[best], minus[best]]).std() + 1e-8
            step = np.tensordot(plus[best] - minus[best], deltas[best], axes=1)
            matrix += settings.rate / (settings.best * spread) * step
            if time.monotonic() - measured_at > min(10.0, seconds / 20):
                measured_at = time.monotonic()
                (weights,), (bias,) = normaliser.fold(matrix[None])
                policy = {
                    "steps": int(steps),
                    "weights": weights.round(5).tolist(),
                    "bias": bias.round(5).tolist(),
                }
                found.append(policy | measured(body, policy))
                report(
                    f"{steps:,} steps: return {found[-1]['episode_return']:.0f}, with noise {found[-1]['noisy_return']:.0f}"
                )
    return found


def measured(body: str, policy: dict) -> dict:
    """A policy's mean return as it is and with the data's noise, the same episodes for every policy."""
    weights, bias = (
        np.array(policy[key])[None].repeat(EPISODES, axis=0) for key in ("weights", "bias")
    )
    found, limit = {}, SETTINGS[body].limit
    with get(f"{body}-medium-v2").world(EPISODES, 1) as world:
        for name, (low, high) in (("episode_return", (0.0, 0.0)), ("noisy_return", Recipe().noise)):
            rng = np.random.default_rng(0)
            returns, _, _ = run(
                world, weights, bias, rng, limit, rng.uniform(low, high, (EPISODES, 1))
            )
            found[name] = float(returns.mean())
    return found


def ladder(found: list[dict], n: int = 12) -> list[dict]:
    """Of the policies found, at most n whose returns rise from the first to the best, evenly."""
    rising = [found[0]]
    for policy in found[1:]:
        if policy["episode_return"] > rising[-1]["episode_return"]:
            rising.append(policy)
    marks = np.linspace(rising[0]["episode_return"], rising[-1]["episode_return"], n)
    returns = np.array([policy["episode_return"] for policy in rising])
    return [rising[i] for i in np.unique(np.abs(returns - marks[:, None]).argmin(axis=1))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("body", choices=list(SETTINGS))
    parser.add_argument(
        "--seconds", type=float, default=600, help="0: measure the policies that are there"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = POLICIES / f"{options.body}.json"
    if options.seconds > 0:
        how = {
            "seconds": options.seconds,
            "seed": options.seed,
            **SETTINGS[options.body]._asdict(),
            "mujoco": mujoco.__version__,
        }
        policies = ladder(search(options.body, options.seconds, options.seed))
    else:
        saved = json.loads(path.read_text())
        how, policies = saved["search"], [p | measured(options.body, p) for p in saved["policies"]]
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as temporary:
        lines = ",\n".join(map(json.dumps, policies))
        temporary.write_text(f'{{"search": {json.dumps(how)},\n"policies": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
