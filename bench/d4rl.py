"""The paper's table: Diffusion-QL on D4RL's twenty tasks, several seeds each, on a laptop, one GPU or a Ray cluster.

    python -m bench.d4rl --tasks antmaze-umaze-v0 --seeds 0 1 2 -- --quick --data generated
    python -m bench.d4rl -- --data d4rl                         # all tasks, five seeds, the paper's recipes and data
    python -m bench.d4rl --jobs 4 -- --data d4rl                # four tasks side by side on this machine
    python -m bench.d4rl --ray -- --data d4rl                   # as many as fit on this machine's cores and GPUs
    python -m bench.d4rl --ray HOST:6379 --gpus-per-task 0.25 -- --data d4rl    # on a cluster, four tasks a GPU
    python -m bench.d4rl --table -- --data d4rl                 # only the table, of what is finished so far

What follows `--` goes to dql.py. Without --data d4rl there, a task whose file cannot be had is trained on generated data, where
there are any; a run keeps the data that it began with. A task with its seeds is one process, `python dql.py --env TASK --seeds
...`, whose runs go to runs/d4rl/TASK (--out). Call it again, with the same options, to go on: finished runs stay, interrupted
ones are resumed. A task that fails leaves failed.json with the reason there, the others go on, and the next call tries it again.
The table, with the paper's scores, goes to bench/results/d4rl.md, .csv, .json and .png (--results); bench/d4rl_table.py says how
it is made.

On a cluster every node needs requirements.txt installed; this repository's code is sent. --out is the same path on every node,
and so is a data file named after `--data`; D4RL's own are looked for in each node's cache. Where --out is a shared folder, a
task whose node was lost is continued elsewhere; else it begins again, and what comes back to this machine is what the table
needs: configs, logs and scores, not the networks. Ray (requirements-cluster.txt) decides what runs where, and sees to lost nodes.
"""

import argparse
import asyncio
import difflib
import json
import os
import shlex
import socket
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from atomic import written_whole
from bench import d4rl_table
from bench.d4rl_cell import Cell, Outcome, common, find_run, finished, load, train, train_async
from bench.timing import RESULTS
from dql import RECIPES, UserError, parse_arguments
from run_folder import RunError, RunFolder, commit, save_json

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "dql.py"
OURS = ("--env", "--seed", "--seeds", "--out", "--resume", "--eval", "--export", "--which", "--episodes", "--render")
GPUS_PER_TASK = 0.25
LOST_NODES = 5  # that a task may see before it counts as failed
ANSWER_SECONDS = 5  # for a cluster's address
NOT_SENT = [".git", ".venv", "runs", "tests", "bench/results", "*.hdf5", "*.safetensors"]  # to the nodes


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def make_cell(task: str, seeds: list[int], passed: list[str], out: Path, threads: int) -> Cell:
    """Raises UserError for options that dql.py refuses."""
    options = ["--threads", str(threads), *passed]
    config = parse_arguments(["--env", task, *options])
    options += ["--data", config.data]  # again, as an absolute path: the last counts
    configs = {seed: json.loads(json.dumps(asdict(replace(config, seed=seed)))) for seed in seeds}  # tuples are lists there
    return Cell(task, tuple(options), configs, str(out.absolute()), PROGRAM)


def unfinished(cell: Cell) -> Cell:
    """The cell with those seeds alone that have no finished run here."""
    runs = {seed: find_run(Path(cell.out) / cell.task, config) for seed, config in cell.configs.items()}
    return cell._replace(configs={seed: cell.configs[seed] for seed, run in runs.items() if not (run and finished(run))})


def keep(cell: Cell, outcome: Outcome) -> None:
    """Write what came of a cell into its folder, as far as it is not there already, and say it."""
    folder, configs = Path(cell.out) / cell.task, {cell.task: cell.configs}
    for run, files in outcome.runs.items():
        (folder / run).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if not (folder / run / name).exists():
                with written_whole(folder / run / name) as temporary:
                    temporary.write_text(text)
    keep_failure(cell, outcome.failure)
    if outcome.failure:
        say(f"{cell.task}: failed: {outcome.failure['reason']}")
    for row in d4rl_table.make_rows(configs, d4rl_table.collect(Path(cell.out), configs), {}):
        if row["seeds"]:
            scores = ", ".join(f"{rule} {d4rl_table.shown(figures)}" for rule, figures in row["rules"].items())
            say(f"{cell.task}: seeds {' '.join(map(str, row['seeds']))} done, {scores} ({row['data']})")


def keep_failure(cell: Cell, failure: dict | None) -> None:
    """Write failed.json, which also says with what config; or remove it, if it is of this one."""
    path, config = Path(cell.out) / cell.task / "failed.json", common(cell.configs)
    if failure:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, {**failure, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "config": config})
    elif path.exists() and load(path)["config"] == config:
        path.unlink()


async def train_here(cells: list[Cell], jobs: int, done: Callable) -> None:
    """Train cells on this machine, `jobs` at a time; done(cell, outcome) as each ends."""
    free = asyncio.Semaphore(jobs)

    async def one(cell):
        async with free:
            say(f"{cell.task}: begins, its output goes to {Path(cell.out) / cell.task / 'output.txt'}")
            return cell, await train_async(cell)

    for next_one in asyncio.as_completed([asyncio.create_task(one(cell)) for cell in cells]):  # tasks begin in their order
        done(*await next_one)


# ---------------------------------------------------------------------------------------------------------------------
# Ray
# ---------------------------------------------------------------------------------------------------------------------


def connect(address: str):
    """Start Ray on this machine ("local") or connect to a cluster ("auto", "HOST:PORT"). -> the module, connected

    Raises SystemExit, with one line, where it is not installed or the address does not answer.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_task_oom_retries"] = "0"  # else what does not fit into a node's memory is tried for ever
    try:
        import ray
    except ImportError:
        raise SystemExit("--ray needs Ray: pip install -r requirements-cluster.txt") from None
    if address not in ("local", "auto"):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        except (OSError, ValueError, OverflowError) as e:
            raise SystemExit(f"no Ray cluster answers at {address} ({e}); give the HOST:PORT that ray start --head named") from e
    sent = {"working_dir": str(ROOT), "excludes": NOT_SENT, "env_vars": {"DQL_COMMIT": commit()}}
    how = {"runtime_env": sent, "log_to_driver": False, "logging_level": "warning"}
    if address == "local":
        how["include_dashboard"] = False
    try:
        ray.init(address, **how)
    except Exception as e:  # of many kinds: ConnectionError, RuntimeError, ValueError, those of its transport
        raise SystemExit(f"cannot use Ray at {address}: {str(e).strip().splitlines()[0]}") from e
    return ray


def why_lost(error: Exception) -> str:
    """In one line, why Ray gave a task up: for memory, because its nodes were lost too often, or it could not even begin."""
    from ray.exceptions import OutOfMemoryError, RayTaskError

    if isinstance(error, OutOfMemoryError):
        return "out of memory: Ray ended it to save its node; with more --cpus-per-task fewer share one"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[-1 if isinstance(error, RayTaskError) else 0]  # the last of a traceback
    return textwrap.shorten(f"{type(error).__name__}: {said}", 300)


def train_on_ray(cells: list[Cell], address: str, cpus: int, gpus: float | None, done: Callable) -> None:
    """Train each cell as a Ray task; done(cell, outcome) as each ends, in the order in which they do."""
    ray = connect(address)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if gpus is None:
            gpus = GPUS_PER_TASK if any("GPU" in node for node in nodes) else 0
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            say(f"no node has {cpus} CPUs and {gpus:g} GPUs for a task (--cpus-per-task, --gpus-per-task): waiting for one")
        # Retried is what Ray lost, a worker or a node; what dql.py fails at comes back as an Outcome.
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=LOST_NODES)(train)
        waiting = {task.remote(cell): cell for cell in cells}
        say(f"{len(waiting)} tasks given to Ray")
        while waiting:
            (ended,), _ = ray.wait(list(waiting))
            cell = waiting.pop(ended)
            try:
                outcome = ray.get(ended)
            except ray.exceptions.RayError as e:
                outcome = Outcome({"reason": why_lost(e), "exit_code": None}, {})
            done(cell, outcome)
    finally:
        ray.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """-> our options, dql.py's. Raises SystemExit, with one line, for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["all"], metavar="TASK", help="all, or names of tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="tasks side by side, without --ray")
    parser.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help="on a cluster; without an address, Ray here")
    parser.add_argument("--cpus-per-task", type=int, default=1, help="with --ray; also dql.py's threads")
    parser.add_argument("--gpus-per-task", type=float, help=f"with --ray; default {GPUS_PER_TASK}, four tasks a GPU, or none")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "d4rl", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    split = argv.index("--") if "--" in argv else len(argv)
    options, passed = parser.parse_args(argv[:split]), argv[split + 1 :]

    options.tasks = list(RECIPES) if options.tasks == ["all"] else list(dict.fromkeys(options.tasks))
    for task in options.tasks:
        if task not in RECIPES:
            nearest = ", ".join(difflib.get_close_matches(task, RECIPES, n=3, cutoff=0.0))
            raise SystemExit(f"no task is called {task!r}; the nearest are {nearest}")
    if len(set(options.seeds)) < len(options.seeds):
        raise SystemExit(f"--seeds {' '.join(map(str, options.seeds))} names a seed twice")
    for name, value, least in (("jobs", options.jobs, 1), ("cpus-per-task", options.cpus_per_task, 1)):
        if value < least:
            raise SystemExit(f"--{name} must be at least {least}, not {value}")
    if options.gpus_per_task is not None and not 0 <= options.gpus_per_task <= 1:
        raise SystemExit(f"--gpus-per-task must lie between 0 and 1, not {options.gpus_per_task}")
    if not all(0 <= seed < 2**31 for seed in options.seeds):
        raise SystemExit(f"--seeds must be at least 0 and less than 2**31, not {' '.join(map(str, options.seeds))}")
    for word in passed:
        if word.split("=")[0].replace("_", "-") in OURS:
            raise SystemExit(f"{word} cannot be passed on to dql.py: tasks, seeds and folders are named before the --")
    return options, passed


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options, passed = read_arguments(argv)
    threads = options.cpus_per_task if options.ray else 0 if options.jobs == 1 else max(1, os.cpu_count() // options.jobs)
    try:
        for folder in (options.out, options.results):
            RunFolder.require_writable(str(folder))
            folder.mkdir(parents=True, exist_ok=True)
        cells = [make_cell(task, options.seeds, passed, options.out, threads) for task in options.tasks]
        configs = {cell.task: cell.configs for cell in cells}
        left = [] if options.table else [cell for cell in map(unfinished, cells) if cell.configs]
        if left and options.ray:
            train_on_ray(left, options.ray, options.cpus_per_task, options.gpus_per_task, keep)
        elif left:
            asyncio.run(train_here(left, options.jobs, keep))
        runs = d4rl_table.collect(options.out, configs)
        if options.table and not runs:
            raise SystemExit(f"no finished run in {options.out} was made with these seeds and, after --, these options of dql.py")
        rows = d4rl_table.write(options.results, options.out, configs, runs, passed)
    except (UserError, RunError, OSError) as e:
        raise SystemExit(str(e)) from e
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: python -m bench.d4rl {shlex.join(argv)}", file=sys.stderr)
        return 130
    failed = [row for row in rows if row["note"].startswith("failed")]
    print(f"{options.results / 'd4rl.md'}: {sum(bool(row['seeds']) for row in rows)} rows with scores, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
