"""How fast episodes are stepped: every task's evaluation against gymnasium's vector environments.

    python -m bench.evaluation                       # all kinds of task, two threads: some minutes
    python -m bench.evaluation --tasks hopper-medium-v2 --threads 1

Environment steps a second with random actions, so of the physics and its bookkeeping alone: a task's world with as many episodes
as the paper evaluates, ended ones begun anew, and with 10, against gymnasium's SyncVectorEnv (one process steps all) and
AsyncVectorEnv (a process an episode), both with 10. Tasks that differ in their data alone are measured once. The contestants take turns; the median of the
rounds is what is written to bench/results/evaluation.json.
"""

import argparse
import json
import time
from pathlib import Path

import gymnasium
import mujoco
import numpy as np

import tasks
from bench.timing import RESULTS
from tasks.simulation import available_cores
from trainer.folder import save_json
from trainer.options import recipe_options
from trainer.provenance import describe

KINDS = [
    "hopper-medium-v2", "halfcheetah-medium-v2", "walker2d-medium-v2",
    "antmaze-umaze-v0", "antmaze-medium-play-v0", "antmaze-large-play-v0", "pen-human-v1", "kitchen-partial-v0",
]  # fmt: skip
FEW = 10
LIMIT = 100  # environment steps of each episode in a round


def step_task(task, n_episodes: int, n_threads: int) -> tuple[int, float]:
    """-> environment steps made, seconds. An episode that ends is begun anew, so that all are stepped all the time."""
    rng, everyone = np.random.default_rng(0), np.arange(n_episodes)
    actions = rng.uniform(-1, 1, (LIMIT, n_episodes, task.action_dim))
    with task.world(n_episodes, n_threads) as world:
        world.reset(everyone, rng)
        began = time.perf_counter()
        for action in actions:
            world.observations.astype(np.float32)  # as an evaluation hands them to the policy
            _, over = world.step(everyone, action, rng)
            world.reset(np.flatnonzero(over), rng)
        return LIMIT * n_episodes, time.perf_counter() - began


def step_vector(envs) -> tuple[int, float]:
    actions = (
        np.random.default_rng(0)
        .uniform(-1, 1, (LIMIT, *envs.action_space.shape))
        .astype(np.float32)
    )
    envs.reset(seed=0)
    began = time.perf_counter()
    for action in actions:
        envs.step(action)
    return LIMIT * envs.num_envs, time.perf_counter() - began


def measure(name: str, n_threads: int, rounds: int) -> dict:
    """-> contestant: steps a second, the median of the rounds"""
    task, many = tasks.get(name), recipe_options(name).eval_episodes
    make = lambda mode: gymnasium.make_vec(name, num_envs=FEW, vectorization_mode=mode)  # noqa: E731
    sync, parallel = make("sync"), make("async")
    contestants = {
        f"{many} episodes": lambda: step_task(task, many, n_threads),
        f"{FEW} episodes": lambda: step_task(task, FEW, n_threads),
        f"SyncVectorEnv, {FEW}": lambda: step_vector(sync),
        f"AsyncVectorEnv, {FEW}": lambda: step_vector(parallel),
    }
    rates = {label: [] for label in contestants}
    for _ in range(rounds):
        for label, run in contestants.items():
            steps, seconds = run()
            rates[label].append(steps / seconds)
    sync.close()
    parallel.close()
    return {label: round(float(np.median(values))) for label, values in rates.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=KINDS)
    parser.add_argument("--threads", type=int, default=min(2, available_cores()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of evaluation.json")
    options = parser.parse_args(argv)
    try:
        for name in options.tasks:
            tasks.get(name)
    except tasks.TaskError as e:
        raise SystemExit(str(e)) from e
    if min(options.threads, options.rounds) < 1:
        raise SystemExit("--threads and --rounds must be at least 1")
    found = {}
    for name in options.tasks:
        found[name] = measure(name, options.threads, options.rounds)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    how = {
        "threads": options.threads,
        "rounds": options.rounds,
        "steps_per_episode": LIMIT,
        "mujoco": mujoco.__version__,
    }
    save_json(options.out / "evaluation.json", {**describe(), **how, "steps_per_second": found})


if __name__ == "__main__":
    main()
