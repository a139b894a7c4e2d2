"""The update, from plain dql.py to a handful of fused launches, for one agent and for several.

    python -m bench.training              # on a GPU: every rung; on a CPU: one thread, then all cores; minutes
    python -m bench.training --quick      # less than a minute, for a first look
    python -m bench.training --full-run   # instead: the paper's antmaze-umaze run, 1M updates and 20 evaluations, on generated data

Rungs: plain (dql.py as it is), eager (as kernels/eager.py makes it), compile (that under torch.compile), and on a GPU graph (the
eager update in CUDA graphs), compile + graph, and kernels.FusedUpdate at each precision. Each rung draws
its own minibatches from transitions on the device. Before anything is timed they are given the same weights, batch and noise and
must agree, or are left out and named; a graph replays what was checked. Then they take turns, so that a busy moment of the
machine meets them all; quoted are the 20th, 50th and 80th percentiles of an update in ms, and the ratio of medians to the first.
On a GPU the profiler counts launches, and says what share of the time each kernel takes. Every figure goes to
bench/results/training_DEVICE.json, and a line each to training.csv.
"""

import argparse
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from bench.timing import (
    QUANTILES,
    RESULTS,
    Figures,
    ceiling,
    device_name,
    device_slug,
    peaks,
)
from dql import Batch, DiffusionQL, Transitions, Updates
from kernels import eager
from trainer.folder import save_json
from trainer.provenance import describe

STATE_DIM, ACTION_DIM, BATCH, HIDDEN, T = 29, 8, 256, 256, 5
SETTINGS = dict(eta=0.5, grad_norm=2.0, ema_start=0)
BASELINE = "plain"
FUSED = (
    "fp16",
    "tf32",
    "fp16x3",
    "fp32",
)  # measured with one agent without max-Q; elsewhere the first alone
COLUMNS = [
    "threads",
    "workload",
    "contestant",
    "seeds",
    *QUANTILES,
    "ratio",
    "updates_per_s",
    "launches",
    "share",
]


def random_batch(n: int, seed: int = 0, device="cpu") -> Batch:
    g = torch.Generator().manual_seed(seed)
    state, next_state = torch.randn(2, n, STATE_DIM, generator=g)
    action = torch.rand(n, ACTION_DIM, generator=g) * 2 - 1
    reward, not_done = (
        torch.randn(n, 1, generator=g),
        (torch.rand(n, 1, generator=g) > 0.05).float(),
    )
    return Batch(*(x.to(device) for x in (state, action, next_state, reward, not_done)))


def random_transitions(n: int, device) -> Transitions:
    state, action, next_state, reward, not_done = (x.numpy() for x in random_batch(n))
    return Transitions(state, action, next_state, reward[:, 0], 1 - not_done[:, 0], device=device)


def make_agents(n: int, max_q_backup: bool, device="cpu") -> list:
    how = {"max_q_backup": max_q_backup, **SETTINGS, "device": device}
    return [DiffusionQL(STATE_DIM, ACTION_DIM, seed=i, **how) for i in range(n)]


def make_quick(n: int, max_q_backup: bool, device, compiled: bool = False) -> list:
    agents = make_agents(n, max_q_backup, device)
    for agent in agents:
        eager.speed_up(agent)
        if compiled:
            eager.compile_update(agent)
    return agents


def contestants(max_q_backup: bool, compiled: bool, device="cpu") -> dict:
    """Name -> () -> agent, or for a fused rung the FusedUpdate of one; all on the same weights."""

    def agent():
        return make_agents(1, max_q_backup, device)[0]

    def fused(precision):
        from kernels import FusedUpdate

        return FusedUpdate(agent(), None, BATCH, precision)

    found = {BASELINE: agent, "eager": lambda: make_quick(1, max_q_backup, device)[0]}
    if compiled:
        found["compile"] = lambda: make_quick(1, max_q_backup, device, True)[0]
    if torch.device(device).type == "cuda":
        found |= {f"fused {p}": lambda p=p: fused(p) for p in precisions(1, max_q_backup)}
    return found


def precisions(n_seeds: int, max_q_backup: bool) -> tuple:
    return FUSED if n_seeds == 1 and not max_q_backup else FUSED[:1]


def parameters(agent) -> torch.Tensor:
    agent = getattr(agent, "agent", agent)  # a FusedUpdate's
    modules = agent.policy, agent.critic, agent.policy_ema, agent.critic_target
    return torch.cat([p.detach().reshape(-1) for module in modules for p in module.parameters()])


def check_updates(agents: dict, n_updates: int = 3, device="cpu") -> None:
    """Three updates with the same noise: the same losses, and weights within 1e-3 of the distance they have moved.

    Adam turns rounding in a tiny gradient into a share of the learning rate, hence the measure by the distance. What rounds
    its products, to fp16 or tf32, may be 1 % off in losses and a fifth in Adam's first steps, which go by signs.
    """
    batch, start = random_batch(BATCH, device=device), parameters(agents["eager"])
    for _ in range(n_updates):
        noise = agents["eager"].draw_noise(BATCH)
        losses = {
            name: agent.step(batch, noise)
            if name.startswith("fused")
            else agent.update(batch, noise)
            for name, agent in agents.items()
        }
        for name in agents:
            rtol, atol = (1e-2, 1e-2) if rounds(name) else (1e-4, 1e-5)
            for key, expected in losses[BASELINE].items():
                close = torch.isclose(losses[name][key], expected, rtol=rtol, atol=atol)
                assert close, f"{name}: {key} is {losses[name][key]:.7g}, not {expected:.7g}"
    expected = parameters(agents[BASELINE])
    for name, agent in agents.items():
        apart = (parameters(agent) - expected).norm() / (expected - start).norm()
        allowed = 0.2 if rounds(name) else 1e-2 if name.startswith("fused") else 1e-3
        assert apart < allowed, (
            f"{name}: after {n_updates} updates the weights are {apart:.1e} of their way apart"
        )


def rounds(name: str) -> bool:
    return name in ("fused fp16", "fused tf32")


def rungs(n_seeds: int, max_q_backup: bool, compiled: bool, transitions, device) -> dict:
    """Name -> () -> an object whose run(n) makes n updates of n_seeds agents; the fused one makes them side by side."""

    def plain():
        return make_agents(n_seeds, max_q_backup, device)

    def quick(compiled=False):
        return make_quick(n_seeds, max_q_backup, device, compiled)

    def fused(precision):
        from kernels import FusedUpdate

        return FusedUpdate(plain(), transitions, BATCH, precision)

    def in_graphs(agents):
        from kernels.graphs import GraphUpdates

        return GraphUpdates(agents, transitions, BATCH)

    on_gpu, found = device.type == "cuda", {}
    if n_seeds == 1:
        found[BASELINE] = lambda: Updates(plain(), transitions, BATCH)
        found["eager"] = lambda: Updates(quick(), transitions, BATCH)
        if on_gpu:
            found["graph"] = lambda: in_graphs(quick())
        if compiled:
            found["compile"] = lambda: Updates(quick(True), transitions, BATCH)
            if on_gpu:
                found["compile, graph"] = lambda: in_graphs(quick(True))
    if on_gpu:
        found |= {f"fused {p}": lambda p=p: fused(p) for p in precisions(n_seeds, max_q_backup)}
    return found


def flops_per_update(max_q_backup: bool) -> int:
    """Multiplications and additions of an update's matrix products: what a share of the matrix units' peak is of."""
    policy = HIDDEN * (STATE_DIM + ACTION_DIM + 2 * HIDDEN + ACTION_DIM)
    critic = HIDDEN * (STATE_DIM + ACTION_DIM + 2 * HIDDEN + 1)
    n = 10 if max_q_backup else 1
    target = n * (T * policy + 2 * critic)
    fit = 3 * (2 * critic + policy)  # forward, and twice as much backward
    climb = (
        3 * T * policy + 3 * critic
    )  # the chain; one critic forward, one forward and back to its action
    return 2 * BATCH * (target + fit + climb)


def profile(run, n: int) -> dict:
    """Launches an update, and each kernel's share of their time, over run(n)."""
    run(n)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(n)
        torch.cuda.synchronize()
    count, spent = 0, Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count += 1
            spent[event.name] += event.device_time
    total = sum(spent.values()) or 1
    return {
        "launches": round(count / n, 2),
        "kernels": {name: round(t / total, 4) for name, t in spent.most_common(12)},
    }


def right_contestants(figures: Figures, workload: str, makers: dict, device) -> list:
    """The names of those whose updates agree with the baseline's."""

    def check(name):
        check_updates(
            {n: makers[n]() for n in dict.fromkeys((BASELINE, "eager", name))}, device=device
        )
        return name

    return [
        name
        for name in makers
        if figures.attempt(f"{workload}, {name} against {BASELINE}", lambda: check(name))
    ]


def tried(rung, n: int):
    """The rung, after n updates: what it compiles or captures is done or has failed."""
    rung.run(n)
    return rung


def full_run(options) -> None:
    """The paper's run on generated data, by the command line's own function. Into bench/results/full_run_DEVICE.json."""
    from trainer.loop import train  # only here: it brings the environments
    from trainer.options import recipe_options

    how = {"data": "generated", "out": str(options.runs), "precision": options.precision}
    config = replace(recipe_options("antmaze-umaze-v0"), **how)
    start = time.perf_counter()
    run = train(config)[0]
    wall = time.perf_counter() - start
    epochs = [r for r in run.records if r["kind"] == "epoch"]
    evaluations = run.evaluations()
    found = {
        "env": config.env, "precision": config.precision, "wall_s": round(wall, 1), "updates": epochs[-1]["step"],
        "updating_s": round(sum(config.updates_per_epoch / r["updates_per_second"] for r in epochs), 1),
        "evaluating_s": round(sum(e["seconds"] for e in evaluations), 1),
        "evaluations": [{k: e[k] for k in ("step", "score", "bc_loss", "seconds")} for e in evaluations],
        "selection": run.select(config.top_k),
    }  # fmt: skip
    where = describe()
    save_json(options.out / f"full_run_{device_slug(where)}.json", {**where, **found})
    print(
        {k: found[k] for k in ("wall_s", "updating_s", "evaluating_s")},
        f"last score {evaluations[-1]['score']:.1f}",
    )


def main(argv: list[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="under a minute: fewer rungs, one thread, 2 s per workload",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="on a CPU also the compiled rung, after a minute of compiling",
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        help="CPU threads to measure with; default 1 and all cores",
    )
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--full-run",
        action="store_true",
        help="the paper's whole antmaze-umaze run instead of the ladder",
    )
    parser.add_argument("--precision", default="fp16", choices=FUSED, help="of the full run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the full run")
    options = parser.parse_args(argv)
    if options.full_run:
        return full_run(options)
    device, on_gpu = options.device, options.device.type == "cuda"
    compiled = (
        (on_gpu or options.compile) and eager.has_compiler() and not (on_gpu and options.quick)
    )
    if options.compile and not eager.has_compiler():
        print("no C++ compiler found (install g++ or set CXX): the compiled rungs are left out")
    threads = [torch.get_num_threads()] if on_gpu else options.threads
    threads = threads or ([1] if options.quick else sorted({1, torch.get_num_threads()}))
    seconds = 2.0 if options.quick else 4.0 if on_gpu else 15.0
    seeds = (1, 8) if on_gpu and options.quick else (1, 2, 4, 8, 16) if on_gpu else (1,)
    transitions = random_transitions(1_000_000 if on_gpu else 10_000, device)

    figures = Figures("training", COLUMNS, options.out, quick=options.quick)
    print(
        f"{device_name(figures.where)}, torch {torch.__version__}; ms per update of all seeds, p50 (p20 to p80)"
    )
    found_peaks = peaks(device) if on_gpu else {}
    for n_threads in threads:
        torch.set_num_threads(n_threads)
        if compiled:
            torch.compiler.reset()  # compiled code is laid out for a number of threads
        for workload, max_q_backup in {"update": False, "update, max-Q": True}.items():
            right = right_contestants(
                figures, workload, contestants(max_q_backup, compiled, device), device
            )
            for n in seeds:
                climbed, chunk = {}, {}
                for name, make in rungs(n, max_q_backup, compiled, transitions, device).items():
                    if name.replace("compile, graph", "compile").replace("graph", "eager") in right:
                        # Updates a call: a whole replay of the fused graph, and no more of a slow rung than the clock needs.
                        chunk[name] = 1 if not on_gpu else 100 if name.startswith("fused") else 5
                        climbed[name] = figures.attempt(
                            f"{workload}, {n} seeds, {name}", lambda: tried(make(), chunk[name])
                        )
                climbed = {name: rung for name, rung in climbed.items() if rung is not None}
                calls = {
                    name: lambda rung=rung, k=chunk[name]: rung.run(k)
                    for name, rung in climbed.items()
                }
                times = figures.time(f"{workload}, {n} seeds", calls, seconds, device)
                first = (
                    next(iter(times.values()))["p50"] / chunk[next(iter(times))] if times else 0.0
                )
                for contestant, t in times.items():
                    t = {k: v / chunk[contestant] if k in QUANTILES else v for k, v in t.items()}
                    t["ratio"] = round(first / t["p50"], 3)
                    rate = n * 1e3 / t["p50"]
                    figure = {
                        "threads": n_threads,
                        "workload": workload,
                        "contestant": contestant,
                        "seeds": n,
                        **t,
                    }
                    figure["updates_per_s"] = round(rate, 1)
                    if on_gpu:
                        most = ceiling(
                            found_peaks,
                            contestant.removeprefix("fused ") if "fused" in contestant else "fp32",
                        )
                        figure["share"] = (
                            round(rate * flops_per_update(max_q_backup) / 1e12 / most, 4)
                            if most
                            else None
                        )
                        if n in (1, 8):
                            profiled = lambda: profile(climbed[contestant].run, chunk[contestant])  # noqa: E731
                            figure |= (
                                figures.attempt(f"profile of {contestant}, {n} seeds", profiled)
                                or {}
                            )
                    figures.add([figure], peaks=found_peaks)
                    spread = f"{t['p50']:9.3f} ({t['p20']:.3f} to {t['p80']:.3f})"
                    launches = f"{figure['launches']:8.1f} launches" if "launches" in figure else ""
                    print(
                        f"{n_threads:2d} threads  {workload:14s} {n:2d} seeds  {contestant:16s} {spread:32s} {t['ratio']:7.2f}x "
                        f"{rate:10.1f}/s{launches}",
                        flush=True,
                    )
    return figures.finish()


if __name__ == "__main__":
    sys.exit(main())
