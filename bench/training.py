"""The update: dql.py, plain and compiled, against a straightforward transcription of the paper.

    python -m bench.training              # one thread, then all cores; about two minutes
    python -m bench.training --quick      # less than a minute, one thread, for a first look
    python -m bench.training --compile    # with torch.compile'd losses as well, which needs a C++ compiler

Before anything is timed, the contestants are given the same weights and the same noise and must agree. Then they
take turns, one call each, so that a busy moment of the machine meets them all; quoted are the 20th, 50th and 80th
percentiles of a call and the ratio of medians. Every figure goes to bench/results/training_cpu.json, and a line per
figure is appended to bench/results/training.csv. Sampling and acting are bench.sampling's and bench.acting's.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench.machine import describe
from bench.straightforward import StraightforwardDQL
from bench.timing import QUANTILES, RESULTS, has_compiler, measure, save_figures
from dql import Batch, DiffusionQL

STATE_DIM, ACTION_DIM, BATCH = 29, 8, 256
SETTINGS = dict(eta=0.5, grad_norm=2.0, ema_start=0)
BASELINE = "straightforward"
COLUMNS = ["threads", "workload", "contestant", *QUANTILES, "ratio"]


def random_batch(n: int, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    state, next_state = torch.randn(2, n, STATE_DIM, generator=g)
    action = torch.rand(n, ACTION_DIM, generator=g) * 2 - 1
    reward, not_done = torch.randn(n, 1, generator=g), (torch.rand(n, 1, generator=g) > 0.05).float()
    return Batch(state, action, next_state, reward, not_done)


def contestants(max_q_backup: bool, compiled: bool) -> dict:
    """Name -> agent, all on the same weights."""

    def agent():
        return DiffusionQL(STATE_DIM, ACTION_DIM, max_q_backup=max_q_backup, **SETTINGS, seed=0)

    agents = {BASELINE: StraightforwardDQL(agent()), "dql": agent()}
    if compiled:
        agents["dql compiled"] = agent()
        agents["dql compiled"].compile()
    return agents


def parameters(agent) -> torch.Tensor:
    modules = agent.policy, agent.critic, agent.policy_ema, agent.critic_target
    return torch.cat([p.detach().reshape(-1) for module in modules for p in module.parameters()])


def check_updates(agents: dict, n_updates: int = 3) -> None:
    """Three updates with the same noise: the same losses, and weights within 1e-3 of the distance they have moved.

    Adam turns rounding in a tiny gradient into a share of the learning rate, hence the measure by the distance.
    """
    batch, start = random_batch(BATCH), parameters(agents["dql"])
    for _ in range(n_updates):
        noise = agents["dql"].draw_noise(BATCH)
        losses = {name: agent.update(batch, noise) for name, agent in agents.items()}
        for name in agents:
            for key, expected in losses[BASELINE].items():
                close = torch.isclose(losses[name][key], expected, rtol=1e-4, atol=1e-5)
                assert close, f"{name}: {key} is {losses[name][key]:.7g}, not {expected:.7g}"
    expected = parameters(agents[BASELINE])
    for name, agent in agents.items():
        apart = (parameters(agent) - expected).norm() / (expected - start).norm()
        assert apart < 1e-3, f"{name}: after {n_updates} updates the weights are {apart:.1e} of their way apart"


def update_workload(max_q_backup: bool, compiled: bool) -> dict:
    agents = contestants(max_q_backup, compiled)
    check_updates(agents)
    batch = random_batch(BATCH)
    return {name: lambda agent=agent: agent.update(batch) for name, agent in agents.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: one thread, 2 s per workload")
    parser.add_argument("--compile", action="store_true", help="also time the update with dql.py's losses compiled")
    parser.add_argument("--threads", type=int, nargs="+", help="CPU threads to measure with; default 1 and all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of training_cpu.json and training.csv")
    options = parser.parse_args(argv)
    compiled = options.compile and has_compiler()
    if options.compile and not compiled:
        print("no C++ compiler found (install g++ or set CXX): the compiled column is left out")
    threads = options.threads or ([1] if options.quick else sorted({1, torch.get_num_threads()}))
    seconds = 2.0 if options.quick else 15.0
    workloads = {"update": False, "update, max-Q": True}

    where, figures = describe(), []
    print(f"{where['cpu']}, torch {where['torch']}; ms per call, p50 (p20 to p80)")
    for n in threads:
        torch.set_num_threads(n)
        if compiled:
            torch.compiler.reset()  # compiled code is laid out for a number of threads
        for workload, max_q_backup in workloads.items():
            for contestant, t in measure(update_workload(max_q_backup, compiled), seconds).items():
                figures.append({"threads": n, "workload": workload, "contestant": contestant, **t})
                spread = f"{t['p50']:9.2f} ({t['p20']:.2f} to {t['p80']:.2f})"
                print(f"{n:2d} threads  {workload:20s}  {contestant:16s} {spread:32s} {t['ratio']:5.2f}x", flush=True)
    save_figures("training", figures, COLUMNS, options.out, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
