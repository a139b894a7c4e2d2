"""Everything that a new device should be asked, in one command: correctness first, then all timings, then the picture.

    python -m bench.all              # laid out for eight minutes on a GPU, where it has not been run yet
    python -m bench.all --quick      # fewer sizes, and not the paper's whole run

On a GPU the kernels' tests run first, on the hardware, those marked gpu included; where one fails nothing is timed. Figures go
to bench/results (--out), as each benchmark says.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import acting, plot, sampling, training
from bench.timing import RESULTS
from kernels.packing import PRECISIONS

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = [str(ROOT / "tests" / name) for name in ("test_sampler.py", "test_actor.py", "test_graphs.py", "test_update.py")]
# Each accuracy test compiles a kernel for seconds, on one core: they run side by side, the others in a process of their own.
SHARDS = [f"twice and {precision}- and {tile}" for precision in PRECISIONS for tile in ("small", "large")]
SHARDS += [f"test_update and twice and {precision}" for precision in ("tf32", "fp16", "fp32")]
SHARDS += ["not twice and not test_update", "test_update and not twice"]


def test_kernels() -> None:
    """The kernels' tests on this GPU. Raises SystemExit if one fails, or if a shard has lost its tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *KERNEL_TESTS, "-k"]
    shards = [subprocess.Popen([*command, shard], cwd=ROOT, stdout=subprocess.PIPE, text=True) for shard in SHARDS]
    broken = []
    for name, process in zip(SHARDS, shards):
        output = process.communicate()[0]
        print(f"{name:28s}{output.strip().splitlines()[-1]}" if process.returncode == 0 else output, flush=True)
        broken += [name] if process.returncode else []
    if broken:
        raise SystemExit(f"a kernel is wrong on this GPU, see above ({'; '.join(broken)}): nothing was timed")


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
        test_kernels()
    arguments = [*(["--quick"] if options.quick else []), "--out", str(options.out)]
    for bench in (training, sampling, acting):
        say(bench.__name__)
        bench.main(arguments)
    say("the picture")
    plot.main(["--results", str(options.out)])
    if torch.cuda.is_available() and not options.quick:
        say("the paper's whole antmaze-umaze run, after its data are generated")
        training.main(["--full-run", "--out", str(options.out)])
    say("done")


if __name__ == "__main__":
    sys.exit(main())
