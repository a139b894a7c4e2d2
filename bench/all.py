"""All checks and benchmarks for a new GPU in one command, the most important first.

    python -m bench.all                     # half an hour with 16 cores, estimated
    python -m bench.all --minutes 10        # what fits into ten minutes
    python -m bench.all --parts tests run   # some parts only

Parts, in this order: first (bench.first: the kernels against float64, and a few timings), tests
(the kernels' tests on this GPU), training, acting, sampling, run (the paper's whole antmaze-umaze
run on generated data), tiles (bench.tiles: would others be faster?), bandit (experiments.bandit,
drawn by the fused sampler) and pictures.
Without a GPU only training, acting, sampling and pictures are run. Each part is a process of its
own that prints as it goes and writes figures as soon as they are known. If one fails or takes too
long, the next one starts; failures are listed at the end and make the exit status 1. Figures go to
runs/bench and runs/experiments, or with --out all to one folder.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from bench.folders import ROOT, make_folder
from trainer.terminal import steady_output

TESTED = (
    "ops packing sampler actor gradients optimizer training trained update graphs rounding".split()
)
TESTS = [f"tests/test_{name}.py" for name in TESTED]
OVERRUN = 2  # times its estimate: then a part is ended, so that one that hangs leaves others time
GRACE = 5  # seconds that a part has to report what it has found when it is ended


class Part(NamedTuple):
    command: list  # after python -m
    seconds: int  # on 16 cores; of first and tests as measured, of others estimated
    quick_seconds: int = 0  # with --quick; 0 if the part does not have that option
    needs_gpu: bool = False


def parts(out: Path | None) -> dict:
    """Name -> Part, the most valuable first. out: folder of the figures, None for each its own."""
    to = ["--out", str(out)] if out else []
    pytest = ["pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *TESTS]
    # No signal interrupts a test that hangs in a GPU call; with xdist its worker is replaced.
    pytest += ["-n", str(os.cpu_count())] if find_spec("xdist") else []
    if find_spec("pytest_timeout"):
        pytest += ["--timeout", "120", "--timeout-method", "thread"]
    bandit = ["experiments.bandit", "--quick", "--fused", *to]
    pictures = ["bench.plot", *(["--results", str(out)] if out else [])]
    return {
        "first": Part(["bench.first", *to], 120, needs_gpu=True),
        "tests": Part(pytest, 180, needs_gpu=True),
        "training": Part(["bench.training", *to], 300, 100),
        "acting": Part(["bench.acting", *to], 180, 60),
        "sampling": Part(["bench.sampling", *to], 330, 100),
        "run": Part(["bench.training", "--full-run", *to], 330, needs_gpu=True),
        "tiles": Part(["bench.tiles", *to], 240, needs_gpu=True),
        "bandit": Part(bandit, 120, needs_gpu=True),
        "pictures": Part(pictures, 15),
    }


def fitted(part: Part, left: float, quick: bool) -> tuple[list, float] | None:
    """(command, estimate) of the part or its quick form, whichever fits into the seconds left."""
    if part.seconds <= left and not (quick and part.quick_seconds):
        return part.command, part.seconds
    if part.quick_seconds and part.quick_seconds <= left:
        return [*part.command, "--quick"], part.quick_seconds
    return None


def hear_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command: list, limit: float) -> str:
    """python -m command, which prints as it goes -> why it failed, or an empty string."""
    words = [sys.executable, "-m", *command]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # A session of its own, so that it can be ended with all the processes that it has started.
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=hear_interrupts
    )
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)  # pytest reports what it has found
            process.wait(GRACE)
        return f"ended after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit status {status}, see above" if status else ""


@steady_output()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, ever = parser.add_argument, float("inf")
    add("--minutes", type=float, default=ever, help="how long it may take; default: any time")
    add("--quick", action="store_true", help="each part's quick form, if it has one")
    add("--parts", nargs="+", choices=list(parts(None)), help="default: all")
    add("--out", type=Path, help="one folder for all results; default: each part's own")
    options = parser.parse_args(argv)
    if options.out:
        make_folder(options.out)
    start, outcome, on_gpu = time.monotonic(), {}, torch.cuda.is_available()

    def say(what):
        print(f"== {time.monotonic() - start:4.0f} s: {what}", flush=True)

    for name, part in parts(options.out and options.out.absolute()).items():
        if options.parts and name not in options.parts:
            continue
        if part.needs_gpu and not on_gpu:
            say(f"{name} is left out: no CUDA GPU was found")
            continue
        left = 60 * options.minutes - (time.monotonic() - start)
        fits = fitted(part, left, options.quick)
        if fits is None:
            takes = f"it takes about {part.quick_seconds or part.seconds} s"
            say(f"{name} is left out: {takes}, and {left:.0f} s are left")
            continue
        command, seconds = fits
        say(f"{name}: python -m {' '.join(command)}")
        outcome[name] = run(command, min(left, OVERRUN * seconds))
    failed = {name: why for name, why in outcome.items() if why}
    where = options.out or "runs/bench and runs/experiments"
    say(f"{len(outcome)} parts, {len(failed)} of them failed; figures in {where}")
    for name, why in failed.items():
        print(f"FAILED: {name}: {why}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
