"""Sampling actions from a diffusion policy: eager, compiled, in CUDA graphs, fused into one kernel.

    python -m bench.sampling          # on an idle CPU about a minute; on a GPU one with --quick
    python -m bench.sampling --quick  # a few sizes

Variants: plain is dql.py's chain as it is, eager the one that kernels/eager.py makes of it. On a
CPU also compile, eager under torch.compile. On a GPU also eager in a CUDA graph; eager under
torch.compile (default, default in a graph, and max-autotune, which makes a graph itself); and the
fused kernel at every precision, launched directly and for two of them in a graph.

Each variant draws its own noise. Before it is timed, it is given noise and compared with the chain
in float64: its error may be so many times the eager chain's at the same precision (allowed() in
bench/rounding.py). A variant that fails is left out and reported.

Figures: milliseconds per call (20th, 50th and 80th percentile), actions/s, the ratio of the first
variant's median to this one's, TFLOP/s, their share of the ceiling that a large matrix product of
that precision sets in the same run, and the relative error against float64. Written to
runs/bench/sampling_DEVICE.json; a line for each is appended to sampling.csv.
"""

import copy
import gc
import math
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bench.rounding import allowed, error, to_tf32
from bench.timing import Figures, measure, parse_options, peaks, speed, speed_text
from dql import DiffusionPolicy
from kernels import eager
from trainer.terminal import steady_output

STATE_DIM, ACTION_DIM = 29, 8
COLUMNS = "T batch variant precision p20 p50 p80 ratio actions_per_s tflops share error".split()
# Rows to check, at least and at most: over a few numbers, rounding errors may cancel by chance.
CHECKED_ROWS = 64, 4096


class Variant(NamedTuple):
    draw: Callable  # () -> actions, with noise drawn on the way: what is timed
    given: Callable  # (state, x_T, noises) -> actions: what is checked
    precision: str = "fp32"


def make_policy(T: int, device) -> DiffusionPolicy:
    torch.manual_seed(0)
    return DiffusionPolicy(STATE_DIM, ACTION_DIM, n_timesteps=T).requires_grad_(False).to(device)


def make_noise(policy, n: int, device, seed: int = 1) -> list[torch.Tensor]:
    """What a variant can be given: state (n,S), x_T (n,A), noises (T,n,A)."""
    g = torch.Generator(device).manual_seed(seed)
    shapes = (n, STATE_DIM), (n, ACTION_DIM), (policy.n_timesteps, n, ACTION_DIM)
    return [torch.randn(*shape, generator=g, device=device) for shape in shapes]


def flops_per_action(policy) -> int:
    """Multiplications and additions of the chain's matrix products. The time embedding needs none:
    it is a table."""
    H = policy.final_layer.in_features
    return 2 * policy.n_timesteps * ((STATE_DIM + ACTION_DIM) * H + 2 * H * H + H * ACTION_DIM)


# ---- The variants --------------------------------------------------------------------------------


def draw_outside(function, state, policy):
    """() -> function(state, new noise). With the noise drawn outside of what is compiled, one
    compilation serves timing and checking."""

    def draw():
        x_T = torch.randn(len(state), ACTION_DIM, device=state.device)
        noises = torch.randn(policy.n_timesteps, *x_T.shape, device=state.device)
        return function(state, x_T, noises)

    return draw


def sped_up(policy):
    policy = copy.deepcopy(policy)
    eager.speed_up_networks([policy], [])
    return policy


def chain_of(policy):
    return lambda state, x_T, noises: policy.sample(state, x_T=x_T, noises=noises)


def cpu_variants(policy, state, compiled: bool) -> dict:
    """Name -> () -> Variant."""
    quick = sped_up(policy)
    chain = chain_of(quick)

    def compiled_chain():
        function = torch.compile(chain)
        return Variant(draw_outside(function, state, policy), function)

    found = {
        "plain": lambda: Variant(lambda: policy.sample(state), chain_of(policy)),
        "eager": lambda: Variant(lambda: quick.sample(state), chain),
    }
    return found | ({"compile": compiled_chain} if compiled else {})


def gpu_variants(policy, state, compiled: bool, autotuned: bool, precisions) -> dict:
    """Name -> () -> Variant."""
    from kernels import FusedSampler
    from kernels.graphs import Captured

    quick = sped_up(policy)
    chain = chain_of(quick)

    @lru_cache
    def compile_chain(mode):
        return torch.compile(chain, mode=mode, dynamic=False)

    def compiled_chain(mode, graph=False):
        function = compile_chain(mode)
        draw = draw_outside(function, state, policy)
        return Variant(Captured(draw, device=state.device).replay if graph else draw, function)

    def fused(precision, graph=False):
        sampler = FusedSampler(policy, precision)
        draw = Captured(sampler, state).replay if graph else lambda: sampler(state)
        return Variant(draw, sampler, precision)

    found = {
        "plain": lambda: Variant(lambda: policy.sample(state), chain_of(policy)),
        "eager": lambda: Variant(lambda: quick.sample(state), chain),
        "eager, graph": lambda: Variant(Captured(quick.sample, state).replay, chain),
    }
    if compiled:
        found["compile"] = lambda: compiled_chain("default")
        found["compile, graph"] = lambda: compiled_chain("default", graph=True)
    if autotuned:  # it makes a graph of its own
        found["compile max-autotune, graph"] = lambda: compiled_chain("max-autotune")
    for precision in precisions:
        found[f"fused {precision}"] = partial(fused, precision)
        if precision in ("fp16", "fp16x3"):
            found[f"fused {precision}, graph"] = partial(fused, precision, graph=True)
    return found


# ---- The check -----------------------------------------------------------------------------------


class RoundedProducts(TorchFunctionMode):
    """Float32 products of operands rounded to TF32. Allowing cuBLAS to use TF32 is not enough: it
    may still not do so for few rows."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            args = to_tf32(args[0]), to_tf32(args[1]), *args[2:]
        return function(*args, **(kwargs or {}))


def arithmetic(precision: str, device: str):
    """A context in which dql.py's matrix products have a precision; for fp16x3 it is fp32."""
    if precision == "tf32":
        return RoundedProducts()
    return torch.autocast(device, torch.float16, enabled=precision == "fp16")


def check(policy, variant: Variant, n: int) -> float:
    """The relative error ‖a - a₆₄‖/‖a₆₄‖ of actions that are drawn n at a time.

    Raises SystemExit if it is over what rounding.allowed() grants, or if what the variant draws
    without being given noise is not finite, out of bounds, or always the same.
    """
    device, (least, most) = next(policy.parameters()).device, CHECKED_ROWS
    in_float64 = copy.deepcopy(policy).double()
    exact, reference, found = [], [], []
    for seed in range(1, 1 + math.ceil(least / n)):
        inputs = make_noise(policy, n, device, seed)
        state, x_T, noises = inputs[0][:most], inputs[1][:most], inputs[2][:, :most]
        exact.append(in_float64.sample(state.double(), x_T=x_T.double(), noises=noises.double()))
        with arithmetic(variant.precision, device.type):
            reference.append(policy.sample(state, x_T=x_T, noises=noises).double())
        found.append(variant.given(*inputs)[:most].double())
    exact, reference, found = (torch.cat(actions) for actions in (exact, reference, found))
    found, eager_error = error(found, exact), error(reference, exact)
    limit = allowed(variant.precision, device.type == "cuda") * eager_error
    if not found <= limit:
        eager_one = f"the eager chain's {eager_error:.2e}"
        raise SystemExit(f"error {found:.2e}, {eager_one} allows {limit:.2e}")
    first, second = variant.draw().clone(), variant.draw()
    bounded = second.isfinite().all() and second.abs().max() <= policy.max_action
    if not (bounded and (first != second).any()):
        raise SystemExit("what it draws is not finite, out of bounds, or always the same")
    return found


# ---- The timings ---------------------------------------------------------------------------------


def measure_case(figures: Figures, T: int, n: int, how: dict, seconds: float, device) -> list[dict]:
    """Check variants, time them in turns, and return their figures. how: which variants."""
    policy = make_policy(T, device)
    state = make_noise(policy, n, device)[0]
    make_variants = gpu_variants if device.type == "cuda" else cpu_variants

    def checked(make):
        variant = make()
        return variant, check(policy, variant, n)

    case = f"T={T}, {n} rows"
    makers = figures.attempt(case, lambda: make_variants(policy, state, **how)) or {}
    checks = {name: partial(checked, make) for name, make in makers.items()}
    right = figures.attempt_each(case, checks)
    calls = {name: variant.draw for name, (variant, _) in right.items()}
    found = []
    for name, t in figures.time(case, calls, seconds, device).items():
        (_, _, precision), apart = right[name]
        figure = {"T": T, "batch": n, "variant": name, "precision": precision, **t}
        figure |= {"error": float(f"{apart:.3g}"), "actions_per_s": round(n / t["p50"] * 1e3)}
        flops = n * flops_per_action(policy)
        found.append(figure | speed(flops, t["p50"], precision, figures.more["peaks"]))
    return found


def print_figure(f: dict) -> None:
    case = f"T={f['T']:2d} {f['batch']:8d} rows  {f['variant']:28s}"
    print(f"{case}{speed_text(f, 'actions_per_s')}  error {f['error']:.1e}", flush=True)


def cases(device, quick: bool) -> list[tuple[int, int, dict]]:
    """(T, batch, which variants)."""
    found = []
    if device.type != "cuda":
        compiled = eager.has_compiler()
        sizes = {5: (1, 256)} if quick else {5: (1, 64, 256, 2560, 16384), 50: (1, 256)}
        for T, batches in sizes.items():
            found += [(T, n, {"compiled": compiled and T == 5}) for n in batches]
        return found
    from kernels.packing import PRECISIONS

    # Each size is compiled on its own, and 50 unrolled steps would compile for minutes.
    if quick:
        short, long, compiled = (1, 64, 1 << 20), (), (64, 1 << 20)
    else:
        short = (1, 8, 64, 256, 1024, 4096, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
        long = compiled = (1, 64, 4096, 1 << 20)
    for n in short:
        how = {"compiled": n in compiled, "autotuned": n == 1 << 20 and not quick}
        found.append((5, n, how | {"precisions": PRECISIONS}))
    how = {"compiled": False, "autotuned": False, "precisions": PRECISIONS}
    return found + [(50, n, how) for n in long]


def tile_name(tile) -> str:
    """As in bench.tiles: transposed, rows, chunk, warps, stages."""
    return " ".join(str(int(field)) for field in tile)


def measure_tiles(batches, device, seconds: float) -> list[dict]:
    """All tiles at sizes around those where choose_tile() changes: does it choose the fastest?"""
    from kernels import FusedSampler
    from kernels.tiles import choose_tile

    figures, rows = [], [1 << k for k in range(21)]
    for n in batches:
        policy = make_policy(5, device)
        state = make_noise(policy, n, device)[0]
        for precision in ("fp16", "fp16x3"):
            sampler = FusedSampler(policy, precision)
            shipped = dict.fromkeys(choose_tile(m, precision, sampler.arch) for m in rows)
            calls = {tile_name(tile): partial(sampler, state, tile=tile) for tile in shipped}
            measured = measure(calls, seconds, device)
            chosen = tile_name(choose_tile(n, precision, sampler.arch))
            best = min(measured, key=lambda name: measured[name]["p50"])
            lost = round(measured[chosen]["p50"] / measured[best]["p50"] - 1, 4)
            figure = {"batch": n, "precision": precision, "chosen": chosen, "faster": best}
            figures.append({**figure, "lost": lost, **measured})
    return figures


def add_tiles(figures: Figures, quick: bool, seconds: float, device) -> None:
    sizes = (1024, 16384) if quick else [1 << k for k in range(9, 16)]
    tiles = figures.attempt("tiles", lambda: measure_tiles(sizes, device, seconds)) or []
    figures.add([], tiles=tiles)
    for t in tiles:
        found = f"tile chosen {t['chosen']}, faster {t['faster']}, lost {t['lost']:.1%}"
        print(f"{t['batch']:8d} rows {t['precision']:7s} {found}")


@steady_output()
def main(argv: list[str] | None = None) -> int:
    options = parse_options(__doc__, "a few sizes", argv)
    device, quick = options.device, options.quick
    on_gpu = device.type == "cuda"
    seconds = (0.2 if quick else 0.4) if on_gpu else (2.0 if quick else 5.0)
    how = {"quick": quick, "threads": options.threads, "peaks": peaks(device)}
    print("ceilings:", how["peaks"], flush=True)
    figures = Figures("sampling", COLUMNS, options.out, **how)
    for T, n, variants in cases(device, quick):
        found = measure_case(figures, T, n, variants, seconds, device)
        figures.add(found)
        for figure in found:
            print_figure(figure)
        gc.collect()  # graphs keep their memory until they are collected
    if on_gpu:
        add_tiles(figures, quick, seconds, device)
    return figures.finish()


if __name__ == "__main__":
    sys.exit(main())
