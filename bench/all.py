"""Everything that a new device should be asked, in one command: correctness first, then all timings, the pictures, a whole run.

    python -m bench.all                      # on a GPU; laid out for fourteen minutes with 16 cores, but it has not been run yet
    python -m bench.all --quick              # fewer sizes, and not the whole run
    python -m bench.all --parts tests        # or timings, or run: where a command may not take that long

On a GPU the kernels' tests run first, on the hardware, those marked gpu included; where one fails nothing is timed. The run is
the paper's whole antmaze-umaze run on generated data. Figures go to bench/results (--out), as each benchmark says.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import acting, bandit, plot, sampling, training
from bench.timing import RESULTS

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = [str(ROOT / "tests" / f"test_{name}.py") for name in ("sampler", "actor", "graphs", "update")]
PYTEST = [sys.executable, "-m", "pytest", "-q"]


def kernel_tests() -> list[str]:
    """The names of the kernels' tests, as pytest takes them."""
    collected = subprocess.run([*PYTEST, "--collect-only", *KERNEL_TESTS], cwd=ROOT, capture_output=True, text=True)
    if collected.returncode:
        raise SystemExit(f"the kernels' tests cannot be collected:\n{collected.stdout}{collected.stderr}")
    return [line for line in collected.stdout.splitlines() if "::" in line]


def test_kernels(n_processes: int = os.cpu_count()) -> None:
    """The kernels' tests on this GPU. Raises SystemExit if one fails.

    Most of their time is a compiler's, on one core: they are dealt out to as many processes as there are cores.
    """
    names = kernel_tests()
    hands = [names[i::n_processes] for i in range(min(n_processes, len(names)))]
    processes = [subprocess.Popen([*PYTEST, "-rs", *hand], cwd=ROOT, stdout=subprocess.PIPE, text=True) for hand in hands]
    outputs = [process.communicate()[0] for process in processes]
    broken = [output for process, output in zip(processes, outputs) if process.returncode]
    if broken:
        print("\n".join(broken))
        raise SystemExit(f"a kernel is wrong on this GPU, see above ({len(broken)} of {len(hands)} processes): nothing was timed")
    print(f"{len(names)} tests passed or had a reason to be skipped")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, and not the whole run")
    parser.add_argument("--parts", nargs="+", choices=("tests", "timings", "run"), default=["tests", "timings", "run"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    start, on_gpu = time.perf_counter(), torch.cuda.is_available()

    def say(what):
        print(f"== {time.perf_counter() - start:4.0f} s: {what}", flush=True)

    if on_gpu and "tests" in options.parts:
        say("the kernels' tests, on this GPU")
        test_kernels()
    if "timings" in options.parts:
        arguments = [*(["--quick"] if options.quick else []), "--out", str(options.out)]
        for bench in (training, sampling, acting):
            say(bench.__name__)
            bench.main(arguments)
        say("the pictures")
        plot.main(["--results", str(options.out)])
    if on_gpu and "timings" in options.parts:
        say("the bandit's policies, trained on the CPU, drawn by the fused sampler and by the eager one")
        bandit.main(["--quick", "--fused", "--out", str(options.out)])
    if on_gpu and "run" in options.parts and not options.quick:
        say("the paper's whole antmaze-umaze run, after its data are generated")
        training.main(["--full-run", "--out", str(options.out)])
    say("done")


if __name__ == "__main__":
    sys.exit(main())
