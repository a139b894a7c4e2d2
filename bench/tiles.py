"""Which tiles are fastest on this GPU: candidates for kernels/tiles.py, timed beside each other.

    python -m bench.tiles                                # four minutes with 16 cores, estimated
    python -m bench.tiles "sampler fp16 1 16 64 4 3"     # compile and check one, in this process

A candidate is a kind (sampler, actor, update or product: an update's weight gradients), a precision
and the fields of a tile. Each is first compiled and checked, samples and values against float64,
updates against plain torch, in a process of its own, many at once: some do not fit, and some become
machine code that reads beyond its memory. Those that are right are then timed, in graphs: the
sampler at several batch sizes, the actor at several numbers of states, an update with 1 and 8
agents, with the time of each launch. Results are in microseconds (median), in
runs/bench/tiles_DEVICE.json as soon as they are known. The committed one is an earlier form's.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from unittest.mock import patch

import torch

from bench import training
from bench.acting import CANDIDATES, agent_at, check_fused
from bench.folders import add_results_option, make_folder
from bench.sampling import Variant, check, make_noise, make_policy
from bench.timing import device_slug, measure
from trainer.folder import save_json
from trainer.provenance import describe
from trainer.terminal import steady_output

# Of a tile: transposed, rows, chunk, warps, stages.
NETWORK = {
    "fp16": (
        "1 16 64 4 2", "1 16 64 4 3", "1 16 64 8 3", "1 16 128 8 1", "1 32 64 4 3", "1 32 64 8 3",
        "1 64 64 8 3", "0 64 32 4 3", "0 64 64 4 2", "0 64 64 4 3", "0 128 32 8 3", "0 128 64 8 3",
    ),
    "tf32": ("1 16 32 4 3", "1 32 32 4 2", "0 64 32 8 1", "0 64 32 8 2", "0 64 32 4 1"),
    "fp16x3": (
        "1 16 32 4 3", "1 16 32 8 3", "1 16 64 4 2", "1 32 32 4 2", "0 64 16 8 3", "0 64 16 4 3",
        "0 64 32 4 2", "0 128 16 8 2",
    ),
    "fp32": ("1 16 16 4 3", "0 64 32 8 3"),
}  # fmt: skip
UPDATES = {
    "fp16": ("1 16 64 4 2", "1 16 64 4 3", "1 16 32 4 3", "1 32 64 4 3"),
    "fp16x3": ("1 16 32 4 3", "1 16 32 8 3", "1 16 64 4 2"),
}
# Of a product's tile: outputs, inputs, rows, warps, stages.
PRODUCTS = {
    "fp16": ("32 64 64 4 3", "16 64 64 4 3", "32 32 64 4 3", "32 128 64 4 3", "32 64 128 4 3"),
}
BATCHES = (1, 256, 2048, 4096, 8192, 1 << 14, 1 << 16, 1 << 20)
STATES = (1, 8, 32, 100, 1000)
SEEDS = (1, 8)
CHECKED = 5000  # rows that a sampler is checked with


def candidates() -> list[str]:
    kinds = {"sampler": NETWORK, "actor": NETWORK, "update": UPDATES, "product": PRODUCTS}
    return [
        f"{kind} {precision} {fields}"
        for kind, by_precision in kinds.items()
        for precision, tiles in by_precision.items()
        for fields in tiles
    ]


def chosen(kind: str, fields: list[int]):
    """A context in which kernels of this kind are made with this tile."""
    from kernels import actor, launches, sampler
    from kernels.tiles import ProductTile, Tile

    tile = ProductTile(*fields) if kind == "product" else Tile(bool(fields[0]), *fields[1:])
    module, choice = {
        "sampler": (sampler, "choose_tile"),
        "actor": (actor, "choose_actor_tile"),
        "update": (launches, "choose_update_tile"),
        "product": (launches, "choose_product_tile"),
    }[kind]
    return patch.object(module, choice, lambda *_: tile)


def check_one(kind: str, precision: str, device) -> None:
    """Raises SystemExit, AssertionError or what the kernel raises."""
    from kernels import FusedActor, FusedSampler, FusedUpdate

    if kind == "sampler":
        policy = make_policy(5, device)
        state, fused = make_noise(policy, CHECKED, device)[0], FusedSampler(policy, precision)
        check(policy, Variant(lambda: fused(state), fused, precision), CHECKED)
    elif kind == "actor":
        agent = agent_at(device, False)
        act = FusedActor(agent.policy, agent.critic_target, CANDIDATES, precision)
        check_fused(agent, act, make_noise(agent.policy, 100, device)[0])
    else:
        agents = {"plain": training.make_agents(1, False, device)[0]}
        agents["eager"] = training.make_eager(1, False, device)[0]
        agent = training.make_agents(1, False, device)[0]
        agents[f"fused {precision}"] = FusedUpdate(agent, None, training.BATCH, precision)
        training.check_updates(agents, device=device)


def time_one(kind: str, precision: str, device) -> dict:
    """Rows, states or agents -> microseconds of a call or an update, and an update's launches."""
    from kernels import FusedActor, FusedSampler, FusedUpdate
    from kernels.graphs import Captured

    def microseconds(call):
        return round(1e3 * measure({"call": call}, 0.1, device)["call"]["p50"], 2)

    if kind == "sampler":
        policy = make_policy(5, device)
        fused = FusedSampler(policy, precision)
        states = {n: make_noise(policy, n, device)[0] for n in BATCHES}
        return {n: microseconds(Captured(fused, state).replay) for n, state in states.items()}
    if kind == "actor":
        agent = agent_at(device, False)
        act = FusedActor(agent.policy, agent.critic_target, CANDIDATES, precision)
        states = {n: make_noise(agent.policy, n, device)[0] for n in STATES}
        return {n: microseconds(Captured(act, state).replay) for n, state in states.items()}
    data, found = training.random_transitions(1_000_000, device), {}
    for n in SEEDS:
        agents = training.make_agents(n, False, device)
        update = FusedUpdate(agents, data, training.BATCH, precision)
        update.capture()
        run = partial(update.run, 100)
        found[n] = microseconds(run) / 100
        found[f"{n}, launches"] = launches_of(run)
    return found


def launches_of(run) -> list:
    """[name, microseconds (median)] of each launch of an update. sample and fit run side by side,
    of others that have one name the critics' is the first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = []
    for name in ("sample", "fit", "weight_gradients", "adam", "climb", "time_gradient", "finish"):
        events = [event for event in profiler.events() if event.name == name]
        times = [e.device_time for e in sorted(events, key=lambda e: e.time_range.start)]
        each = 2 if name in ("weight_gradients", "adam") else 1
        found += [[name, round(median(times[i::each]), 2)] for i in range(each)]
    return found


def is_right(name: str) -> str:
    """Check a candidate in a process of its own -> why not, or an empty string."""
    words = [sys.executable, "-m", "bench.tiles", name]
    try:
        how = {"capture_output": True, "text": True, "errors": "replace"}
        done = subprocess.run(words, **how, timeout=120)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashed"])[-1]


@steady_output()
def main(argv: list[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("candidate", nargs="?", help="only check this one, in this process")
    add_results_option(parser, "bench")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.tiles times a CUDA GPU, and none was found")
    device = torch.device("cuda")
    if options.candidate:
        kind, precision, *fields = options.candidate.split()
        with chosen(kind, list(map(int, fields))):
            check_one(kind, precision, device)
            torch.cuda.synchronize()
        return
    make_folder(options.out)
    where, found = describe(), {}
    path = options.out / f"tiles_{device_slug(where)}.json"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        whys = dict(zip(candidates(), pool.map(is_right, candidates())))
    for name, why in whys.items():
        kind, precision, *fields = name.split()
        if not why:
            try:
                with chosen(kind, list(map(int, fields))):
                    found[name] = time_one(kind, precision, device)
            except Exception as e:
                whys[name] = why = str(e).partition("\n")[0] or type(e).__name__
        print(f"{name:34s} {why or found[name]}", flush=True)
        wrong = {name: why for name, why in whys.items() if why}
        save_json(path, {**where, "wrong": wrong, "microseconds": found})
    print(f"{len(found)} of {len(whys)} candidates are timed in {path}")
    return int(not found)


if __name__ == "__main__":
    sys.exit(main())
