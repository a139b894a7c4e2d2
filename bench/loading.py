"""How long a D4RL file of two million rows takes to load, and how much memory.

    python -m bench.loading                # two shapes, plain and gzip: two minutes if idle
    python -m bench.loading --rows 200000  # smaller files

The files have D4RL's layout and the chunks that h5py chooses when it compresses: observations,
actions and rewards, random numbers in float32, and terminals and timeouts in bool. Each file is
loaded in fresh processes, from the system's file cache.

Figures: "data" is the size of these arrays, uncompressed; "seconds" the median time to load them;
"result" the size of the data set's arrays; "peak" how much more memory a process ever used than
before it loaded them, with the data set included. Written to runs/bench/loading.json. Linux only.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

import tasks
from bench.folders import ROOT, add_results_option, make_folder
from trainer.terminal import steady_output

TASKS = ("antmaze-umaze-v0", "halfcheetah-medium-expert-v2")  # the second has 2M rows
ROWS = 1 << 16  # made at a time
MIB = 1 << 20


def make(path: Path, task, n: int, compression: str | None = None) -> int:
    """Write a file of n rows for task. -> the size of its arrays in bytes."""
    rng = np.random.default_rng(0)
    columns = {
        "observations": lambda i: rng.standard_normal((len(i), task.state_dim), np.float32),
        "actions": lambda i: rng.uniform(-1, 1, (len(i), task.action_dim)).astype(np.float32),
        "rewards": lambda i: rng.standard_normal(len(i), np.float32),
        "terminals": lambda i: rng.random(len(i)) < 0.01,
        "timeouts": lambda i: (i + 1) % task.episode_limit == 0,
    }
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            first = column(np.arange(1))
            shape = (n, *first.shape[1:])
            array = file.create_dataset(key, shape, first.dtype, compression=compression)
            for start in range(0, n, ROWS):
                array[start : start + ROWS] = column(np.arange(start, min(start + ROWS, n)))
        return sum(array.nbytes for array in file.values())


def measure(path: Path, task_name: str) -> dict:
    """Load a file in a new process. -> "seconds", and in bytes "peak" and "result"."""
    call = f"from bench.loading import load; load({str(path)!r}, {task_name!r})"
    run = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        why = (run.stderr.strip() or "no reason given").splitlines()[-1]
        raise SystemExit(f"loading {path} failed: {why}")
    return json.loads(run.stdout)


def load(path: str, task_name: str) -> None:
    """Load a file and print what measure() returns, as JSON."""
    task = tasks.get(task_name)
    # Reset the peak: importing had one of its own.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    dataset = tasks.load(task, path, log=lambda line: None)
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    names = ("observations", "actions", "next_observations", "rewards", "terminals")
    result = sum(getattr(dataset, name).nbytes for name in names)
    print(json.dumps({"seconds": seconds, "peak": peak, "result": result}))


def resident(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most.

    Not ru_maxrss: a process inherits its parent's.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{which}:\s+(\d+) kB$", status, re.MULTILINE)[1])


def measure_file(task_name: str, compression: str | None, rows: int, repeats: int) -> dict:
    """The figures of loading one made file, `repeats` times."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.hdf5"
        try:
            data = make(path, tasks.get(task_name), rows, compression)
        except OSError as error:
            why = f"{error.strerror or error}; set TMPDIR to a folder with more room"
            raise SystemExit(f"cannot write {path}: {why}") from error
        found = [measure(path, task_name) for _ in range(repeats)]
        disk = path.stat().st_size
    peak = max(one["peak"] for one in found)
    return {
        "task": task_name,
        "compression": compression or "none",
        "rows": rows,
        "file MiB": round(disk / MIB, 1),
        "data MiB": round(data / MIB, 1),
        "seconds": round(statistics.median(one["seconds"] for one in found), 3),
        "result MiB": round(found[0]["result"] / MIB, 1),
        "peak MiB": round(peak / MIB, 1),
        "peak / data": round(peak / data, 3),
    }


@steady_output()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="processes a file")
    add_results_option(parser, "bench")
    options = parser.parse_args(argv)
    if options.rows < 2 or options.repeats < 1:
        raise SystemExit("--rows must be at least 2 and --repeats at least 1")
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("bench.loading reads a process's memory from /proc: it needs Linux")
    make_folder(options.out)
    figures = []
    for name in TASKS:
        for compression in (None, "gzip"):
            figures.append(measure_file(name, compression, options.rows, options.repeats))
            print(", ".join(f"{key} {value}" for key, value in figures[-1].items()), flush=True)
    save(figures, options)


def save(figures: list[dict], options: argparse.Namespace) -> None:
    # Only here: they import torch, and a process that is measured should be small.
    from trainer.folder import save_json
    from trainer.provenance import describe

    path, found = options.out / "loading.json", {**describe(), "repeats": options.repeats}
    save_json(path, {**found, "figures": figures})
    print(f"{len(figures)} figures in {path}")


if __name__ == "__main__":
    sys.exit(main())
