"""Augmented random search for the linear policies that generated locomotion data are made with.

    python -m tasks.search hopper --seconds 600        # writes tasks/policies/hopper.json
    python -m tasks.search hopper --seconds 0          # measures the saved policies again

The search (Mania, Guy, Recht, 2018, ARS V2-t) perturbs one matrix in random directions, ±, runs an
episode with each, and moves the matrix along the best directions, weighted by the differences of
their returns. States are normalised with the mean and standard deviation of all states seen. The
bonus for being alive is left out of the returns that the search climbs: it would pay for standing
still. Some seeds learn to fall forwards and stay there (walker2d's 0 and 3 do): take another.

Saved are policies found on the way, action = clip(weights·s + bias, ±1), each with its mean return
without and with the data's noise.
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

EPISODES = 16  # to measure a policy with


class Settings(NamedTuple):
    directions: int  # tried in each step of the search
    best: int  # how many of them are followed
    rate: float  # step size
    noise: float  # σ of a direction's entries
    limit: int = 1000  # environment steps of an episode


SETTINGS = {
    "hopper": Settings(16, 8, 0.02, 0.04),
    "halfcheetah": Settings(16, 4, 0.02, 0.03),
    "walker2d": Settings(32, 16, 0.03, 0.03),
}


class Normaliser:
    """Running mean and sum of squared deviations of the states seen, by Chan's update."""

    def __init__(self, dim: int):
        self.n, self.mean, self.squares = 0, np.zeros(dim), np.zeros(dim)

    def see(self, states: np.ndarray) -> None:
        n, mean = len(states), states.mean(axis=0)
        off, total = mean - self.mean, self.n + n
        self.squares += ((states - mean) ** 2).sum(axis=0) + off**2 * self.n * n / total
        self.mean += off * n / total
        self.n = total

    def fold(self, matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Matrices (k, A, S) for normalised states -> weights (k, A, S), bias (k, A) for raw."""
        std = np.sqrt(self.squares / max(self.n, 1))
        weights = matrices / np.where(std > 1e-7, std, 1.0)
        return weights, -weights @ self.mean


def run(
    world: LocomotionWorld, weights, bias, rng, limit: int, noise=0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One episode for each of k policies, weights (k, A, S) and bias (k, A).

    noise, a number or (k, 1), is the σ of normal noise that is added to the actions. Returns
    (k,) returns, (k,) lengths, and the states seen (sum of lengths, S).
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
    """Search for a number of seconds.

    Returns the policies found on the way, in order: dicts of steps, weights, bias, episode_return
    and noisy_return.
    """
    settings, task = SETTINGS[body], get(f"{body}-medium-v2")
    alive = BODIES[body].alive
    rng = np.random.default_rng(seed)
    normaliser = Normaliser(task.state_dim)
    matrix = np.zeros((task.action_dim, task.state_dim))
    found, steps = [], 0
    began, measured_at = time.monotonic(), 0.0
    with task.world(2 * settings.directions, 1) as world:
        while time.monotonic() - began < seconds:
            deltas = rng.standard_normal((settings.directions, *matrix.shape))
            offsets = settings.noise * deltas
            tried = np.concatenate([matrix + offsets, matrix - offsets])
            returns, lengths, states = run(world, *normaliser.fold(tried), rng, settings.limit)
            normaliser.see(states)
            steps += lengths.sum()
            plus, minus = np.split(returns - alive * lengths, 2)
            best = np.argsort(np.maximum(plus, minus))[-settings.best :]
            spread = np.concatenate([plus[best], minus[best]]).std() + 1e-8
            step = np.tensordot(plus[best] - minus[best], deltas[best], axes=1)
            matrix += settings.rate / (settings.best * spread) * step
            if time.monotonic() - measured_at > min(5.0, seconds / 20):
                measured_at = time.monotonic()
                (weights,), (bias,) = normaliser.fold(matrix[None])
                policy = {
                    "steps": int(steps),
                    "weights": weights.round(5).tolist(),
                    "bias": bias.round(5).tolist(),
                }
                policy |= measured(body, policy)
                found.append(policy)
                clean, noisy = policy["episode_return"], policy["noisy_return"]
                report(f"{steps:,} steps: return {clean:.0f}, with noise {noisy:.0f}")
    return found


def measured(body: str, policy: dict) -> dict:
    """A policy's mean returns without and with the data's noise: episode_return, noisy_return.

    The episodes are the same for every policy.
    """
    weights = np.array(policy["weights"])[None].repeat(EPISODES, axis=0)
    bias = np.array(policy["bias"])[None].repeat(EPISODES, axis=0)
    limit = SETTINGS[body].limit
    found = {}
    with get(f"{body}-medium-v2").world(EPISODES, 1) as world:
        for name, (low, high) in (("episode_return", (0.0, 0.0)), ("noisy_return", Recipe().noise)):
            rng = np.random.default_rng(0)
            noise = rng.uniform(low, high, (EPISODES, 1))
            returns, _, _ = run(world, weights, bias, rng, limit, noise)
            found[name] = float(returns.mean())
    return found


def ladder(found: list[dict], n: int = 12) -> list[dict]:
    """At most n of the policies found, whose returns rise evenly from the first to the best."""
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
    measure = "0: measure the saved policies again"
    parser.add_argument("--seconds", type=float, default=600, help=measure)
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
        how = saved["search"]
        policies = [policy | measured(options.body, policy) for policy in saved["policies"]]
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as temporary:
        lines = ",\n".join(map(json.dumps, policies))
        temporary.write_text(f'{{"search": {json.dumps(how)},\n"policies": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
