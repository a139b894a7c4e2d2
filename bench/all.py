"""Everything that a new GPU should be asked, in one command: what matters most first, and nothing waits for anything to be right.

    python -m bench.all                     # half an hour with 16 cores, by estimate; not run on a GPU yet
    python -m bench.all --minutes 10        # what fits into ten minutes
    python -m bench.all --parts tests run   # some of it

Parts, in this order: first (bench.first: the kernels against float64, and a few timings), tests (the kernels' tests on this GPU),
training, acting, sampling, run (the paper's whole antmaze-umaze run on generated data), bandit (drawn by the fused sampler) and
pictures. Without a GPU there are training, acting, sampling and pictures. Each is a process of its own that prints as it goes and
writes what it knows; one that fails or overruns is named in the end, where the exit status says so, and the next one begins.
Figures go to bench/results (--out), as each part says.
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

from bench.timing import RESULTS

ROOT = Path(__file__).resolve().parents[1]
TESTS = [f"tests/test_{name}.py" for name in ("ops", "packing", "sampler", "actor", "update", "graphs", "rounding")]
OVERRUN = 2  # times its estimate, after which a part is ended: one that hangs leaves time to the others
GRACE = 5  # seconds to say so


class Part(NamedTuple):
    command: list  # after python -m
    seconds: int  # estimated of compilers' CPU time and 16 cores; measured on no GPU yet
    quick_seconds: int = 0  # with --quick, where there is that
    asks_gpu: bool = False  # and nothing else


def parts(out: Path) -> dict:
    """Name -> Part, the most valuable first."""
    to = ["--out", str(out)]
    pytest = ["pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *TESTS]
    # A test that hangs in a call to the GPU hears no signal; where it is a worker's, that is ended and replaced.
    pytest += ["-n", str(os.cpu_count())] if find_spec("xdist") else []
    pytest += ["--timeout", "120", "--timeout-method", "thread"] if find_spec("pytest_timeout") else []
    return {
        "first": Part(["bench.first", *to], 240, asks_gpu=True),
        "tests": Part(pytest, 200, asks_gpu=True),
        "training": Part(["bench.training", *to], 300, 100),
        "acting": Part(["bench.acting", *to], 180, 60),
        "sampling": Part(["bench.sampling", *to], 330, 100),
        "run": Part(["bench.training", "--full-run", *to], 330, asks_gpu=True),
        "bandit": Part(["bench.bandit", "--quick", "--fused", *to], 120, asks_gpu=True),
        "pictures": Part(["bench.plot", "--results", str(out)], 15),
    }


def fitted(part: Part, left: float, quick: bool) -> tuple[list, float] | None:
    """(command, estimate) of the part or of its quick form, whichever fits into the seconds that are left; None if neither does."""
    if part.seconds <= left and not (quick and part.quick_seconds):
        return part.command, part.seconds
    if part.quick_seconds and part.quick_seconds <= left:
        return [*part.command, "--quick"], part.quick_seconds
    return None


def run(command: list, limit: float) -> str:
    """python -m command, which prints as it goes. -> why it failed, or nothing"""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # A session of its own, so that it can be ended with all the processes that it has started.
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)  # pytest says what it has found
            process.wait(GRACE)
        return f"ended after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit status {status}, see above" if status else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="how long it may take; default: as long as it does")
    parser.add_argument("--quick", action="store_true", help="each part's quick form, where it has one")
    parser.add_argument("--parts", nargs="+", choices=list(parts(RESULTS)), help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    start, outcome, on_gpu = time.monotonic(), {}, torch.cuda.is_available()

    def say(what):
        print(f"== {time.monotonic() - start:4.0f} s: {what}", flush=True)

    for name, part in parts(options.out.absolute()).items():
        if options.parts and name not in options.parts:
            continue
        if part.asks_gpu and not on_gpu:
            say(f"{name} is left out: no CUDA GPU was found")
            continue
        left = 60 * options.minutes - (time.monotonic() - start)
        fits = fitted(part, left, options.quick)
        if fits is None:
            say(f"{name} is left out: it takes about {part.quick_seconds or part.seconds} s, and {left:.0f} s are left")
            continue
        command, seconds = fits
        say(f"{name}: python -m {' '.join(command)}")
        outcome[name] = run(command, min(left, OVERRUN * seconds))
    failed = {name: why for name, why in outcome.items() if why}
    say(f"{len(outcome)} parts, {len(failed)} of them failed")
    for name, why in failed.items():
        print(f"FAILED: {name}: {why}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
