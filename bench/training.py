"""Updates per second, from plain dql.py to a few fused launches, for one agent and for several.

    python -m bench.training             # minutes; a CPU: one thread, then all cores
    python -m bench.training --quick     # a first look, under a minute on an idle machine
    python -m bench.training --full-run  # instead: the paper's antmaze-umaze run on generated data,
                                         # 1M updates and 20 evaluations
    python -m bench.training --compile --threads 1 --out bench/results  # README's figures anew

Variants: plain (dql.py as it is), eager (made faster by kernels/eager.py), compile (eager under
torch.compile), and on a GPU graph (eager in CUDA graphs), "compile, graph", and kernels.FusedUpdate
at each precision. Each draws its own minibatches from transitions on the device. Before anything is
timed, all variants get the same weights, batch and noise and must agree; one that does not is left
out and reported. A graph replays what was checked. Then the variants are timed in turns, so that a
busy moment of the machine affects all of them.

Figures: ms per update of all seeds (20th, 50th and 80th percentile), the ratio of the first
variant's median to this one's, and updates/s of all seeds together. On a GPU also the share of the
ceiling, which large matrix products of that precision set in the same run; and, for 1 and 8 seeds,
the profiler's launches per update and each kernel's share of their time. Written to
runs/bench/training_DEVICE.json; a line for each is appended to training.csv.
"""

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from bench.folders import make_folder
from bench.full_run import full_run
from bench.timing import QUANTILES, Figures, device_name, options_parser, peaks, precision_of, speed
from dql import Batch, DiffusionQL, Transitions, Updates
from kernels import eager
from trainer.terminal import steady_output

STATE_DIM, ACTION_DIM, BATCH, HIDDEN, T = 29, 8, 256, 256, 5
SETTINGS = dict(eta=0.5, grad_norm=2.0, ema_start=0)
WORKLOADS = {"update": False, "update, max-Q": True}  # name -> max_q_backup
BASELINE = "plain"
# All are measured with one agent without max-Q; elsewhere only the first.
FUSED = ("fp16", "tf32", "fp16x3", "fp32")
COLUMNS = "threads workload variant seeds p20 p50 p80 ratio updates_per_s launches share".split()


def random_batch(n: int, seed: int = 0, device="cpu") -> Batch:
    g = torch.Generator().manual_seed(seed)
    state, next_state = torch.randn(2, n, STATE_DIM, generator=g)
    action = torch.rand(n, ACTION_DIM, generator=g) * 2 - 1
    reward = torch.randn(n, 1, generator=g)
    not_done = (torch.rand(n, 1, generator=g) > 0.05).float()
    return Batch(*(x.to(device) for x in (state, action, next_state, reward, not_done)))


def random_transitions(n: int, device) -> Transitions:
    state, action, next_state, reward, not_done = (x.numpy() for x in random_batch(n))
    return Transitions(state, action, next_state, reward[:, 0], 1 - not_done[:, 0], device=device)


def make_agents(n: int, max_q_backup: bool, device="cpu") -> list:
    how = {"max_q_backup": max_q_backup, **SETTINGS, "device": device}
    return [DiffusionQL(STATE_DIM, ACTION_DIM, seed=i, **how) for i in range(n)]


def make_eager(n: int, max_q_backup: bool, device, compiled: bool = False) -> list:
    agents = make_agents(n, max_q_backup, device)
    for agent in agents:
        eager.speed_up(agent)
        if compiled:
            eager.compile_update(agent)
    return agents


def fused_precisions(n_seeds: int, max_q_backup: bool) -> tuple:
    return FUSED if n_seeds == 1 and not max_q_backup else FUSED[:1]


# ---- The checks ----------------------------------------------------------------------------------


def variants_to_check(max_q_backup: bool, compiled: bool, device="cpu") -> dict:
    """Name -> () -> agent, or for a fused variant its FusedUpdate; all with the same weights."""

    def make_fused(precision):
        from kernels import FusedUpdate

        return FusedUpdate(make_agents(1, max_q_backup, device)[0], None, BATCH, precision)

    found = {
        BASELINE: lambda: make_agents(1, max_q_backup, device)[0],
        "eager": lambda: make_eager(1, max_q_backup, device)[0],
    }
    if compiled:
        found["compile"] = lambda: make_eager(1, max_q_backup, device, True)[0]
    if torch.device(device).type == "cuda":
        for precision in fused_precisions(1, max_q_backup):
            found[f"fused {precision}"] = partial(make_fused, precision)
    return found


def parameters(agent) -> torch.Tensor:
    agent = getattr(agent, "agent", agent)  # a FusedUpdate's
    modules = agent.policy, agent.critic, agent.policy_ema, agent.critic_target
    return torch.cat([p.detach().reshape(-1) for module in modules for p in module.parameters()])


def check_updates(agents: dict, n_updates: int = 3, device="cpu") -> None:
    """Three updates with the same noise must give the same losses, and weights that differ by less
    than 1e-3 of the distance that they have moved.

    The distance is the measure because Adam turns rounding in a tiny gradient into a share of the
    learning rate. Variants whose products are rounded to fp16 or tf32 may be 1 % off in losses, and
    a fifth in the weights: Adam's first steps depend on signs alone.
    """
    batch, start = random_batch(BATCH, device=device), parameters(agents["eager"])
    for _ in range(n_updates):
        noise, losses = agents["eager"].draw_noise(BATCH), {}
        for name, agent in agents.items():
            update = agent.step if name.startswith("fused") else agent.update
            losses[name] = update(batch, noise)
        for name in agents:
            rtol, atol = (1e-2, 1e-2) if rounds(name) else (1e-4, 1e-5)
            for key, expected in losses[BASELINE].items():
                close = torch.isclose(losses[name][key], expected, rtol=rtol, atol=atol)
                assert close, f"{name}: {key} is {losses[name][key]:.7g}, not {expected:.7g}"
    expected = parameters(agents[BASELINE])
    for name, agent in agents.items():
        apart = (parameters(agent) - expected).norm() / (expected - start).norm()
        allowed = 0.2 if rounds(name) else 1e-2 if name.startswith("fused") else 1e-3
        why = f"after {n_updates} updates the weights differ by {apart:.1e} of the way they moved"
        assert apart < allowed, f"{name}: {why}"


def rounds(name: str) -> bool:
    return name in ("fused fp16", "fused tf32")


def agreeing(figures: Figures, workload: str, makers: dict, device) -> list:
    """The names of the variants whose updates agree with the baseline's."""

    def check(name):
        names = dict.fromkeys((BASELINE, "eager", name))
        check_updates({n: makers[n]() for n in names}, device=device)
        return name

    checks = {name: partial(check, name) for name in makers}
    return list(figures.attempt_each(f"{workload}, against {BASELINE}", checks))


# ---- The timings ---------------------------------------------------------------------------------


def variants_to_time(n_seeds: int, max_q_backup: bool, compiled: bool, transitions, device) -> dict:
    """Name -> () -> an object whose run(n) makes n updates of n_seeds agents.

    With several seeds only the fused variants, which update them side by side.
    """

    def plain():
        return make_agents(n_seeds, max_q_backup, device)

    def quick(compiled=False):
        return make_eager(n_seeds, max_q_backup, device, compiled)

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
        if on_gpu and compiled:
            found["compile, graph"] = lambda: in_graphs(quick(True))
    if on_gpu:
        for precision in fused_precisions(n_seeds, max_q_backup):
            found[f"fused {precision}"] = partial(fused, precision)
    return found


def checked_as(name: str) -> str:
    """A graph replays what was checked as launched."""
    return {"graph": "eager", "compile, graph": "compile"}.get(name, name)


def flops_per_update(max_q_backup: bool) -> int:
    """Multiplications and additions of an update's matrix products, for its share of the peak."""
    policy = HIDDEN * (STATE_DIM + ACTION_DIM + 2 * HIDDEN + ACTION_DIM)
    critic = HIDDEN * (STATE_DIM + ACTION_DIM + 2 * HIDDEN + 1)
    n = 10 if max_q_backup else 1
    target = n * (T * policy + 2 * critic)
    fit = 3 * (2 * critic + policy)  # forward, and twice as much backward
    # The policy's step on Q: the chain; one critic forward, one forward and back to its action.
    improve = 3 * T * policy + 3 * critic
    return 2 * BATCH * (target + fit + improve)


def profile(run, n: int) -> dict:
    """Launches per update, and each kernel's share of their time, over run(n)."""
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
    shares = {name: round(t / total, 4) for name, t in spent.most_common(12)}
    return {"launches": round(count / n, 2), "kernels": shares}


def updates_per_call(name: str, device) -> int:
    """A whole replay of the fused graph; of a slow variant no more than the clock needs."""
    if device.type != "cuda":
        return 1
    return 100 if name.startswith("fused") else 5


def tried(make, n: int):
    """make(), after n updates: what it compiles or captures is done or has failed."""
    updates = make()
    updates.run(n)
    return updates


def measure_case(figures: Figures, case: dict, makers: dict, seconds: float, device) -> None:
    """Time variants in turns, profile them on a GPU; save and print their figures.

    case: "threads", "workload" and "seeds". makers: of those that variants_to_time() returns for
    it, the ones that passed the check.
    """
    workload, n_seeds = case["workload"], case["seeds"]
    what = f"{workload}, {n_seeds} seeds"
    n_updates = {name: updates_per_call(name, device) for name in makers}
    tries = {name: partial(tried, make, n_updates[name]) for name, make in makers.items()}
    made = figures.attempt_each(what, tries)
    calls = {name: partial(updates.run, n_updates[name]) for name, updates in made.items()}
    first = None
    for name, t in figures.time(what, calls, seconds, device).items():
        t = t | {q: t[q] / n_updates[name] for q in QUANTILES}
        first = first or t["p50"]
        t["ratio"] = round(first / t["p50"], 3)
        figure = {**case, "variant": name, **t}
        figure["updates_per_s"] = round(n_seeds * 1e3 / t["p50"], 1)
        if device.type == "cuda":
            flops = n_seeds * flops_per_update(WORKLOADS[workload])
            reached = speed(flops, t["p50"], precision_of(name), figures.more["peaks"])
            figure["share"] = reached["share"]
            if n_seeds in (1, 8):
                profiled = partial(profile, made[name].run, n_updates[name])
                figure |= figures.attempt(f"profile of {name}, {n_seeds} seeds", profiled) or {}
        figures.add([figure])
        print_figure(figure)


def print_figure(f: dict) -> None:
    case = f"{f['threads']:2d} threads  {f['workload']:14s} {f['seeds']:2d} seeds"
    spread = f"{f['p50']:9.3f} ({f['p20']:.3f} to {f['p80']:.3f})"
    speeds = f"{f['ratio']:7.2f}x {f['updates_per_s']:10.1f}/s"
    launches = f"{f['launches']:8.1f} launches" if "launches" in f else ""
    print(f"{case}  {f['variant']:16s} {spread:32s} {speeds}{launches}", flush=True)


# ---- The command line ----------------------------------------------------------------------------


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = options_parser(__doc__, "fewer variants, one thread, 2 s per workload")
    add = parser.add_argument
    what = "on a CPU also the compiled variant, after a minute of compiling"
    add("--compile", action="store_true", help=what)
    what = "CPU threads to measure with; default 1 and all cores"
    add("--threads", type=int, nargs="+", help=what)
    what = "the paper's whole antmaze-umaze run instead of the variants"
    add("--full-run", action="store_true", help=what)
    add("--precision", default="fp16", choices=FUSED, help="of the full run")
    add("--runs", type=Path, default=Path("runs"), help="folder of the full run")
    options = parser.parse_args(argv)
    make_folder(options.out)
    return options


def thread_counts(options) -> list[int]:
    if options.device.type == "cuda":
        return [torch.get_num_threads()]
    return options.threads or ([1] if options.quick else sorted({1, torch.get_num_threads()}))


def seed_counts(options) -> tuple:
    if options.device.type != "cuda":
        return (1,)
    return (1, 8) if options.quick else (1, 2, 4, 8, 16)


def compiles(options) -> bool:
    """Whether there are compiled variants; prints why not if they were asked for."""
    wanted = not options.quick if options.device.type == "cuda" else options.compile
    if options.compile and not eager.has_compiler():
        print("no C++ compiler found (install g++ or set CXX): the compiled variants are left out")
    return wanted and eager.has_compiler()


@steady_output()
def main(argv: list[str] | None = None) -> int | None:
    options = parse_options(argv)
    if options.full_run:
        return full_run(options)
    device, on_gpu, compiled = options.device, options.device.type == "cuda", compiles(options)
    transitions = random_transitions(1_000_000 if on_gpu else 10_000, device)
    seconds = 2.0 if options.quick else 4.0 if on_gpu else 15.0
    how = {"quick": options.quick, "peaks": peaks(device) if on_gpu else {}}
    figures = Figures("training", COLUMNS, options.out, **how)
    what = "ms per update of all seeds, p50 (p20 to p80)"
    print(f"{device_name(figures.where)}, torch {torch.__version__}; {what}")
    for n_threads in thread_counts(options):
        torch.set_num_threads(n_threads)
        if compiled:
            torch.compiler.reset()  # compiled code is laid out for a number of threads
        for workload, max_q_backup in WORKLOADS.items():
            to_check = variants_to_check(max_q_backup, compiled, device)
            agreed = agreeing(figures, workload, to_check, device)
            for n in seed_counts(options):
                makers = variants_to_time(n, max_q_backup, compiled, transitions, device)
                checked = {name: makers[name] for name in makers if checked_as(name) in agreed}
                case = {"threads": n_threads, "workload": workload, "seeds": n}
                measure_case(figures, case, checked, seconds, device)
    return figures.finish()


if __name__ == "__main__":
    sys.exit(main())
