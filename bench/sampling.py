"""Sampling actions from a diffusion policy: eager, compiled, in CUDA graphs, and fused into one kernel.

    python -m bench.sampling              # on a CPU about a minute; not run on a GPU yet
    python -m bench.sampling --quick      # a few sizes, under two minutes

plain is dql.py's chain as it is, eager the one that kernels/eager.py makes of it. On a GPU also that in a CUDA graph, under
torch.compile (default, that in a graph, and max-autotune with its own), and the fused kernel launched directly and in a graph, at
every precision; on a CPU also that compiled. Each contestant draws its own noise. Before it is timed, it gets the noise handed in and may differ from the
chain in float64 by so many times what the eager chain does at the same precision (bench/rounding.py), or is left out and named.

Figures: milliseconds a call (20th, 50th and 80th percentile), actions/s, the ratio to the first contestant, and TFLOP/s with
its share of the ceiling, which a large matrix product of that precision sets in the same run.
Written to bench/results/sampling_DEVICE.json, a line per figure appended to bench/results/sampling.csv.
"""

import copy
import gc
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bench.rounding import allowed, to_tf32
from bench.timing import Figures, ceiling, measure, parse_options, peaks
from dql import DiffusionPolicy
from kernels import eager

STATE_DIM, ACTION_DIM = 29, 8
COLUMNS = [
    "T",
    "batch",
    "contestant",
    "precision",
    "p20",
    "p50",
    "p80",
    "ratio",
    "actions_per_s",
    "tflops",
    "share",
    "error",
]
CHECKED_ROWS = 64, 4096  # at least and at most: of a few numbers, rounding errors cancel by luck


class Contestant(NamedTuple):
    draw: Callable  # () -> actions, noise drawn on the way: what is timed
    given: Callable  # (state, x_T, noises) -> actions: what is checked
    precision: str = "fp32"


def make_policy(T: int, device) -> DiffusionPolicy:
    torch.manual_seed(0)
    return DiffusionPolicy(STATE_DIM, ACTION_DIM, n_timesteps=T).requires_grad_(False).to(device)


def make_noise(policy, n: int, device, seed: int = 1):
    """The tensors that a contestant may be handed: state (n,S), x_T (n,A), noises (T,n,A)."""
    g = torch.Generator(device).manual_seed(seed)
    shapes = (n, STATE_DIM), (n, ACTION_DIM), (policy.n_timesteps, n, ACTION_DIM)
    return [torch.randn(*shape, generator=g, device=device) for shape in shapes]


def flops_per_action(policy) -> int:
    """Multiplications and additions of the chain's matrix products; the time embedding needs none, it is a table."""
    H = policy.final_layer.in_features
    return 2 * policy.n_timesteps * ((STATE_DIM + ACTION_DIM) * H + 2 * H * H + H * ACTION_DIM)


def draw_outside(function, state, policy):
    """() -> function(state, fresh noise): for what is compiled, so that one compilation serves timing and checking."""

    def draw():
        x_T = torch.randn(len(state), ACTION_DIM, device=state.device)
        return function(
            state, x_T, torch.randn(policy.n_timesteps, *x_T.shape, device=state.device)
        )

    return draw


def sped_up(policy):
    policy = copy.deepcopy(policy)
    eager.speed_up_networks([policy], [])
    return policy


def chain_of(policy):
    return lambda state, x_T, noises: policy.sample(state, x_T=x_T, noises=noises)


def cpu_contestants(policy, state, compiled: bool) -> dict:
    """Name -> () -> Contestant."""
    quick = sped_up(policy)
    chain = chain_of(quick)

    def compiled_chain():
        compiled = torch.compile(chain)
        return Contestant(draw_outside(compiled, state, policy), compiled)

    found = {
        "plain": lambda: Contestant(lambda: policy.sample(state), chain_of(policy)),
        "eager": lambda: Contestant(lambda: quick.sample(state), chain),
    }
    return found | ({"compile": compiled_chain} if compiled else {})


def gpu_contestants(policy, state, compiled: bool, autotuned: bool, precisions) -> dict:
    """Name -> () -> Contestant."""
    from kernels import FusedSampler
    from kernels.graphs import Captured

    sped = sped_up(policy)
    chain = chain_of(sped)

    @lru_cache
    def quick(mode):
        return torch.compile(chain, mode=mode, dynamic=False)

    def fused(precision, graph):
        sampler = FusedSampler(policy, precision)
        draw = Captured(sampler, state).replay if graph else lambda: sampler(state)
        return Contestant(draw, sampler, precision)

    found = {
        "plain": lambda: Contestant(lambda: policy.sample(state), chain_of(policy)),
        "eager": lambda: Contestant(lambda: sped.sample(state), chain),
        "eager, graph": lambda: Contestant(Captured(sped.sample, state).replay, chain),
    }
    if compiled:
        draw = lambda: draw_outside(quick("default"), state, policy)  # noqa: E731
        found["compile"] = lambda: Contestant(draw(), quick("default"))
        found["compile, graph"] = lambda: Contestant(
            Captured(draw(), device=state.device).replay, quick("default")
        )
    if autotuned:  # it makes a graph of its own
        tuned = lambda: draw_outside(quick("max-autotune"), state, policy)  # noqa: E731
        found["compile max-autotune, graph"] = lambda: Contestant(tuned(), quick("max-autotune"))
    for precision in precisions:
        found[f"fused {precision}"] = lambda p=precision: fused(p, False)
        if precision in ("fp16", "fp16x3"):
            found[f"fused {precision}, graph"] = lambda p=precision: fused(p, True)
    return found


class RoundedProducts(TorchFunctionMode):
    """Float32 products of operands rounded to TF32: cuBLAS, where it may use TF32, still may not for few rows."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            args = to_tf32(args[0]), to_tf32(args[1]), *args[2:]
        return function(*args, **(kwargs or {}))


def arithmetic(precision: str, device: str):
    """A context that has dql.py's matrix products at a precision; fp16x3 is judged as fp32."""
    return (
        RoundedProducts()
        if precision == "tf32"
        else torch.autocast(device, torch.float16, enabled=precision == "fp16")
    )


def check(policy, contestant: Contestant, n: int) -> float:
    """The relative error ‖a - a₆₄‖/‖a₆₄‖ of n rows at a time. Raises SystemExit where it is over what rounding.allowed() grants."""
    device, in_float64, (least, most) = (
        next(policy.parameters()).device,
        copy.deepcopy(policy).double(),
        CHECKED_ROWS,
    )
    exact, eager, found = [], [], []
    for seed in range(1, 1 + math.ceil(least / n)):
        inputs = make_noise(policy, n, device, seed)
        state, x_T, noises = inputs[0][:most], inputs[1][:most], inputs[2][:, :most]
        exact.append(in_float64.sample(state.double(), x_T=x_T.double(), noises=noises.double()))
        with arithmetic(contestant.precision, device.type):
            eager.append(policy.sample(state, x_T=x_T, noises=noises).double())
        found.append(contestant.given(*inputs)[:most].double())
    exact, eager, found = (torch.cat(actions) for actions in (exact, eager, found))
    eager, found = (((actions - exact).norm() / exact.norm()).item() for actions in (eager, found))
    times = allowed(contestant.precision, device.type == "cuda")
    if not found <= times * eager:
        raise SystemExit(
            f"error {found:.2e}, the eager chain's {eager:.2e} allows {times * eager:.2e}"
        )
    first, second = contestant.draw().clone(), contestant.draw()
    if not (
        second.isfinite().all()
        and second.abs().max() <= policy.max_action
        and (first != second).any()
    ):
        raise SystemExit("what it draws is not finite, outside the box, or always the same")
    return found


def run_case(
    figures: Figures, T: int, n: int, device, seconds: float, found_peaks: dict, how: dict
) -> list[dict]:
    policy = make_policy(T, device)
    state = make_noise(policy, n, device)[0]
    make, right, errors = gpu_contestants if device.type == "cuda" else cpu_contestants, {}, {}
    case = f"T={T}, {n} rows"
    for name, made in (figures.attempt(case, lambda: make(policy, state, **how)) or {}).items():

        def checked():
            right[name] = made()
            return check(policy, right[name], n)

        errors[name] = figures.attempt(f"{case}, {name}", checked)
    right = {name: contestant for name, contestant in right.items() if errors[name] is not None}
    measured = figures.time(
        case, {name: contestant.draw for name, contestant in right.items()}, seconds, device
    )
    found = []
    for name, t in measured.items():
        precision, tflops = right[name].precision, flops_per_action(policy) * n / t["p50"] / 1e9
        most = ceiling(found_peaks, precision)
        figure = {
            "T": T,
            "batch": n,
            "contestant": name,
            "precision": precision,
            **t,
            "error": float(f"{errors[name]:.3g}"),
        }
        figure |= {"actions_per_s": round(n / t["p50"] * 1e3), "tflops": round(tflops, 4)}
        found.append(figure | {"share": most and round(tflops / most, 4)})
    return found


def tile_figures(batches, device, seconds: float) -> list[dict]:
    """Both tiles at the sizes around the one where choose_tile changes over: does it choose the faster?"""
    from kernels import FusedSampler
    from kernels.tiles import choose_tile

    figures = []
    for n in batches:
        policy = make_policy(5, device)
        state = make_noise(policy, n, device)[0]
        for precision in ("fp16", "fp16x3"):
            sampler = FusedSampler(policy, precision)
            tiles = {
                name: choose_tile(rows, precision, sampler.arch)
                for name, rows in (("small", 1), ("large", 1 << 30))
            }
            calls = {
                name: lambda tile=tile: sampler(state, tile=tile) for name, tile in tiles.items()
            }
            measured = measure(calls, seconds, device)
            chosen = (
                "small" if choose_tile(n, precision, sampler.arch) == tiles["small"] else "large"
            )
            best = min(measured, key=lambda name: measured[name]["p50"])
            lost = measured[chosen]["p50"] / measured[best]["p50"] - 1
            figure = {
                "batch": n,
                "precision": precision,
                "chosen": chosen,
                "faster": best,
                "lost": round(lost, 4),
            }
            figures.append(figure | measured)
    return figures


def cases(device, quick: bool) -> list[tuple[int, int, dict]]:
    """(T, batch, which contestants)."""
    if device.type != "cuda":
        compiled = eager.has_compiler()
        sizes = {5: (1, 256)} if quick else {5: (1, 64, 256, 2560, 16384), 50: (1, 256)}
        return [
            (T, n, {"compiled": compiled and T == 5})
            for T, batches in sizes.items()
            for n in batches
        ]
    from kernels.packing import PRECISIONS

    compiled = (
        (64, 1 << 20) if quick else (1, 64, 4096, 1 << 20)
    )  # each size is compiled on its own
    short = (
        (1, 64, 1 << 20)
        if quick
        else (1, 8, 64, 256, 1024, 4096, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
    )
    long = () if quick else (1, 64, 4096, 1 << 20)
    found = []
    for T, sizes in ((5, short), (50, long)):  # 50 unrolled steps would compile for minutes
        for n in sizes:
            how = {
                "compiled": T == 5 and n in compiled,
                "autotuned": T == 5 and n == 1 << 20 and not quick,
            }
            found.append((T, n, how | {"precisions": PRECISIONS}))
    return found


def main(argv: list[str] | None = None) -> int:
    options = parse_options(__doc__, "a few sizes, under two minutes", argv)
    device = options.device
    seconds = (
        (0.2 if options.quick else 0.4)
        if device.type == "cuda"
        else (2.0 if options.quick else 5.0)
    )
    figures = Figures(
        "sampling", COLUMNS, options.out, quick=options.quick, threads=options.threads
    )
    found_peaks = peaks(device)
    print("ceilings:", found_peaks, flush=True)
    for T, n, how in cases(device, options.quick):
        found = run_case(figures, T, n, device, seconds, found_peaks, how)
        figures.add(found, peaks=found_peaks)
        for f in found:
            share = f"{f['share']:7.1%}" if f["share"] is not None else ""
            rate = f"{f['actions_per_s']:13,} actions/s {f['ratio']:8.2f}x {f['tflops']:8.2f} TFLOP/s {share}"
            print(
                f"T={T:2d} {n:8d} rows  {f['contestant']:28s}{f['p50']:10.4f} ms {rate}  error {f['error']:.1e}",
                flush=True,
            )
        gc.collect()  # graphs hold their memory until they are gone
    if device.type == "cuda":
        sizes = (
            (1024, 16384)
            if options.quick
            else (1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15)
        )
        tiles = figures.attempt("both tiles", lambda: tile_figures(sizes, device, seconds)) or []
        figures.add([], tiles=tiles)
        for t in tiles:
            found = f"tile chosen {t['chosen']}, faster {t['faster']}, lost {t['lost']:.1%}"
            print(f"{t['batch']:8d} rows {t['precision']:7s} {found}")
    return figures.finish()


if __name__ == "__main__":
    sys.exit(main())
