"""How fast episodes are stepped: every task's evaluation against gymnasium's vector environments.

    python -m bench.evaluation                       # all kinds of task, two threads: some minutes
    python -m bench.evaluation --tasks hopper-medium-v2 --threads 1

Environment steps per second with random actions: only the physics and its bookkeeping. Variants: a
task's world with as many episodes as the paper evaluates, and with 10; gymnasium's SyncVectorEnv
(one process steps all) and AsyncVectorEnv (a process per episode), both with 10. Episodes that end
are started again. Tasks that differ only in their data are measured once. The variants are timed in
turns; the median over the rounds is written to runs/bench/evaluation.json.
"""

import argparse
import json
import time

import gymnasium
import mujoco
import numpy as np

import tasks
from bench.folders import add_results_option, make_folder
from tasks.simulation import available_cores
from trainer.folder import save_json
from trainer.options import recipe_options
from trainer.provenance import describe
from trainer.terminal import steady_output

KINDS = [
    "hopper-medium-v2",
    "halfcheetah-medium-v2",
    "walker2d-medium-v2",
    "antmaze-umaze-v0",
    "antmaze-medium-play-v0",
    "antmaze-large-play-v0",
    "pen-human-v1",
    "kitchen-partial-v0",
]
FEW = 10
LIMIT = 100  # environment steps of each episode in a round


def step_task(task, n_episodes: int, n_threads: int) -> tuple[int, float]:
    """-> environment steps made, seconds. Episodes that end are started again, so that all are
    stepped all the time."""
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
    """-> environment steps made, seconds."""
    rng, shape = np.random.default_rng(0), (LIMIT, *envs.action_space.shape)
    actions = rng.uniform(-1, 1, shape).astype(np.float32)
    envs.reset(seed=0)
    began = time.perf_counter()
    for action in actions:
        envs.step(action)
    return LIMIT * envs.num_envs, time.perf_counter() - began


def measure(name: str, n_threads: int, rounds: int) -> dict:
    """Variant -> steps per second, the median over the rounds."""
    task, many = tasks.get(name), recipe_options(name).eval_episodes
    sync = gymnasium.make_vec(name, num_envs=FEW, vectorization_mode="sync")
    parallel = gymnasium.make_vec(name, num_envs=FEW, vectorization_mode="async")
    variants = {
        f"{many} episodes": lambda: step_task(task, many, n_threads),
        f"{FEW} episodes": lambda: step_task(task, FEW, n_threads),
        f"SyncVectorEnv, {FEW}": lambda: step_vector(sync),
        f"AsyncVectorEnv, {FEW}": lambda: step_vector(parallel),
    }
    rates = {label: [] for label in variants}
    for _ in range(rounds):
        for label, run in variants.items():
            steps, seconds = run()
            rates[label].append(steps / seconds)
    sync.close()
    parallel.close()
    return {label: round(float(np.median(values))) for label, values in rates.items()}


@steady_output()
def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tasks", nargs="+", default=KINDS)
    parser.add_argument("--threads", type=int, default=min(2, available_cores()))
    parser.add_argument("--rounds", type=int, default=5)
    add_results_option(parser, "bench")
    options = parser.parse_args(argv)
    try:
        for name in options.tasks:
            tasks.get(name)
    except tasks.TaskError as e:
        raise SystemExit(str(e)) from e
    if min(options.threads, options.rounds) < 1:
        raise SystemExit("--threads and --rounds must be at least 1")
    make_folder(options.out)
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
    path = options.out / "evaluation.json"
    save_json(path, {**describe(), **how, "steps_per_second": found})
    print(f"figures of {len(found)} tasks in {path}")


if __name__ == "__main__":
    main()
