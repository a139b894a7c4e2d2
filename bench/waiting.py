"""How torch's threads should wait for each other: an update on an idle and on a busy machine.

    python -m bench.waiting            # about seven minutes; the machine must be idle
    python -m bench.waiting --quick    # half of that, with more noise

Two threads that share an operation meet at its end. The faster one spins, so as to go on at once,
and after a while sleeps. By default it spins for long, which on a core that another process needs
is time lost for both; if it sleeps at once (passive), each operation waits for a thread to wake. So
a run takes one thread where that is faster when it begins (trainer/backends.choose_threads). Here
updates of kernels/eager.py are timed in processes of their own, in turns, with each way to wait and
with one thread, beside 0, 2 and 4 processes that never rest. Written to runs/bench/waiting.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

from bench.folders import ROOT, add_results_option, make_folder
from trainer.folder import save_json
from trainer.provenance import describe
from trainer.terminal import steady_output

WAYS = {
    "torch's default": {},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = (0, 2, 4)  # processes beside it
SECONDS = 4.0  # of updates in a process


def time_updates() -> float:
    """Milliseconds an update in this process: batch 256, state 29, action 8."""
    from dql import DiffusionQL, Transitions, Updates
    from kernels import eager

    def draw(*shape):
        return torch.randn(5000, *shape, generator=torch.Generator().manual_seed(0))

    data = Transitions(draw(29), draw(8).tanh(), draw(29), draw(), draw() > 1)
    agent = DiffusionQL(29, 8)
    eager.speed_up(agent)
    updates = Updates([agent], data, 256)
    updates.run(3)
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        updates.run(1)
        n += 1
    return (time.perf_counter() - start) / n * 1e3


def measure(way: dict) -> float:
    words = [sys.executable, "-c", "from bench.waiting import time_updates; print(time_updates())"]
    others = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in others} | way
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=True)
    return float(done.stdout)


@steady_output()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds instead of four")
    add_results_option(parser, "bench")
    options = parser.parse_args(argv)
    make_folder(options.out)
    found = {}
    for n_busy in BUSY:
        others = [subprocess.Popen([sys.executable, "-c", "while 1: 0"]) for _ in range(n_busy)]
        try:
            times = {name: [] for name in WAYS}
            for _ in range(2 if options.quick else 4):
                for name, way in WAYS.items():
                    times[name].append(measure(way))
        finally:
            for other in others:
                other.kill()
        found[f"beside {n_busy}"] = {
            name: {"ms": round(statistics.median(each), 1), "each": [round(t, 1) for t in each]}
            for name, each in times.items()
        }
        row = (f"{name} {f['ms']:.1f}" for name, f in found[f"beside {n_busy}"].items())
        print(f"ms an update beside {n_busy} busy processes: {', '.join(row)}", flush=True)
    path = options.out / "waiting.json"
    save_json(path, {**describe(), "updates": found})
    print(f"figures in {path}")


if __name__ == "__main__":
    main()
