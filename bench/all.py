"""Everything that a new device should be asked, in one command: correctness first, then all timings, then the picture.

    python -m bench.all              # on a GPU under eight minutes
    python -m bench.all --quick      # under three

On a GPU the kernels' tests run first, on the hardware, those marked gpu included; where one fails nothing is timed. Figures go
to bench/results (--out), as each benchmark says.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import acting, plot, sampling
from bench.timing import RESULTS

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = ("test_sampler.py", "test_actor.py", "test_graphs.py")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    start = time.perf_counter()

    def say(what):
        print(f"== {time.perf_counter() - start:4.0f} s: {what}", flush=True)

    if torch.cuda.is_available():
        say("the kernels' tests, on this GPU")
        files = [str(ROOT / "tests" / name) for name in KERNEL_TESTS]
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", *files], cwd=ROOT)
        if done.returncode:
            raise SystemExit("a kernel is wrong on this GPU (see above): nothing was timed")
    arguments = [*(["--quick"] if options.quick else []), "--out", str(options.out)]
    for bench in (sampling, acting):
        say(bench.__name__)
        bench.main(arguments)
    say("the picture")
    plot.main(["--results", str(options.out)])
    say("done")


if __name__ == "__main__":
    sys.exit(main())
