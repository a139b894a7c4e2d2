"""The paper's table: Diffusion-QL on D4RL's twenty tasks, on a laptop, one GPU or a Ray cluster.

    python -m experiments.d4rl --tasks antmaze-umaze-v0 --seeds 0 1 2 -- --quick --data generated
    python -m experiments.d4rl -- --data d4rl             # the paper: all tasks, five seeds
    python -m experiments.d4rl --jobs 4 -- --data d4rl    # four tasks side by side on this machine
    python -m experiments.d4rl --ray -- --data d4rl       # as many as this machine's cores and GPUs
    python -m experiments.d4rl --ray HOST:6379 --gpus-per-task 0.25 -- --data d4rl  # on a cluster
    python -m experiments.d4rl --table -- --data d4rl     # only the table, of what is finished

What follows `--` goes to dql.py. Without --data d4rl there, a task whose file is not available is
trained on generated data where there are any; a run keeps the data that it began with. A task with
its seeds is one process, `python dql.py --env TASK --seeds ...`, whose runs go to runs/d4rl/TASK
(--out). Call it again with the same options to go on: finished runs stay, interrupted ones are
resumed. A task that fails leaves failed.json with the reason there; the others go on, and the next
call tries it again. The table, with the paper's scores, goes to runs/experiments/d4rl.md, .csv,
.json and .png (--results); d4rl_table.py says how it is made.

On a cluster every node needs requirements.txt installed; this repository's code is sent. --out is
the same path on every node, and so is a data file named after `--data`; D4RL's own are looked for
in each node's cache. Where --out is a shared folder, a task whose node was lost is continued
elsewhere; else it begins again, and what comes back to this machine is what the table needs:
configs, logs and scores, not the networks. Ray (requirements-cluster.txt) decides what runs where
and replaces lost nodes.
"""

import argparse
import difflib
import os
import shlex
import signal
import socket
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from bench.folders import add_results_option, make_folder
from dql import RECIPES
from experiments import d4rl_table
from experiments.runs import (
    ROOT,
    Job,
    Outcome,
    load,
    make_job,
    say,
    train,
    train_here,
    unfinished,
)
from trainer.folder import RunError, RunFolder, save_json, saved
from trainer.interrupts import Stopped, as_exceptions
from trainer.provenance import commit
from trainer.terminal import steady_output

PROGRAM = ("dql.py",)
OURS = "--env --seed --seeds --out --resume --eval --export --which --episodes --render".split()
GPUS_PER_TASK = 0.25
LOST_NODES = 5  # that a task may see before it counts as failed
LOST_SECONDS = 5  # for a worker that has lost its node to end
ANSWER_SECONDS = 5  # for a cluster's address
# What the nodes do not need.
NOT_SENT = [".git", ".venv", "runs", "tests", "results", "*.hdf5", "*.safetensors", "*.whl"]


def make_d4rl_job(task: str, seeds: list[int], passed: list[str], out: Path, threads: int) -> Job:
    options = ["--threads", str(threads), *passed]
    return make_job(task, seeds, options, out / task, program=PROGRAM)


def record(job: Job, outcome: Outcome) -> None:
    """Write what came of a job into its folder, as far as it is not there already, and say it."""
    folder = Path(job.folder)
    for run, files in outcome.runs.items():
        (folder / run).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if not (folder / run / name).exists():
                with saved(folder / run / name) as temporary:
                    temporary.write_text(text)
    record_failure(job, None if outcome.interrupted else outcome.failure)
    if outcome.interrupted:
        say(f"{job.task}: interrupted; the next call goes on with it")
    elif outcome.failure:
        say(f"{job.task}: failed: {outcome.failure['reason']}")
    for row in d4rl_table.make_rows({job.task: job.configs}, d4rl_table.collect([job]), {}):
        if row["seeds"]:
            scores = (f"{rule} {d4rl_table.shown(s)}" for rule, s in row["rules"].items())
            seeds = " ".join(map(str, row["seeds"]))
            say(f"{job.task}: seeds {seeds} done, {', '.join(scores)} ({row['data']})")


def record_failure(job: Job, failure: dict | None) -> None:
    """Write failed.json, which also holds the config; or remove it, if it is of this one."""
    path, config = Path(job.folder) / "failed.json", d4rl_table.common(job)
    if failure:
        path.parent.mkdir(parents=True, exist_ok=True)
        date = time.strftime("%Y-%m-%d %H:%M:%S")
        save_json(path, {**failure, "date": date, "config": config})
    elif path.exists() and load(path)["config"] == config:
        path.unlink()


# ---- Ray -----------------------------------------------------------------------------------------


def connect(address: str):
    """Start Ray here ("local") or connect to a cluster ("auto", "HOST:PORT") -> its module

    Raises SystemExit, with one line, if it is not installed or the address does not answer.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Otherwise a task that does not fit into a node's memory is tried for ever.
    os.environ["RAY_task_oom_retries"] = "0"
    try:
        import ray
    except ImportError:
        raise SystemExit("--ray needs Ray: pip install -r requirements-cluster.txt") from None
    if address not in ("local", "auto"):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        except (OSError, ValueError, OverflowError) as e:
            advice = "give the HOST:PORT that ray start --head named"
            raise SystemExit(f"no Ray cluster answers at {address} ({e}); {advice}") from e
    sent = {"working_dir": str(ROOT), "excludes": NOT_SENT, "env_vars": {"DQL_COMMIT": commit()}}
    how = {"runtime_env": sent, "log_to_driver": False, "logging_level": "warning"}
    if address == "local":
        how["include_dashboard"] = False
    try:
        ray.init(address, **how)
    except Exception as e:  # of many kinds: ConnectionError, RuntimeError, ValueError, gRPC's
        why = str(e).strip().splitlines()[0]
        raise SystemExit(f"cannot use Ray at {address}: {why}") from e
    return ray


def why_lost(error: Exception) -> str:
    """In one line, why Ray gave a task up: memory, nodes lost too often, or it could not begin."""
    from ray.exceptions import OutOfMemoryError, RayTaskError

    if isinstance(error, OutOfMemoryError):
        advice = "with more --cpus-per-task fewer share one"
        return f"out of memory: Ray ended it to save its node; {advice}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1 if isinstance(error, RayTaskError) else 0]  # the last of a traceback
    return textwrap.shorten(f"{type(error).__name__}: {line}", 300)


def train_on_a_node(job: Job) -> Outcome:
    """A Ray task. A worker that has lost its node, or whose node is being stopped, ends after its
    children: what they were doing has not failed, so give the worker time to end before that is
    said. Ray then goes on elsewhere."""
    outcome = train(job)
    killed = outcome.failure and outcome.failure["exit_code"] == -signal.SIGKILL
    if killed or outcome.interrupted:
        time.sleep(LOST_SECONDS)
    return outcome


def train_on_ray(jobs: list[Job], address: str, cpus: int, gpus: float | None, done: Callable):
    """Train each job as a Ray task; done(job, outcome) as each ends."""
    ray = connect(address)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if gpus is None:
            gpus = GPUS_PER_TASK if any("GPU" in node for node in nodes) else 0
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            options = "(--cpus-per-task, --gpus-per-task)"
            say(f"no node has {cpus} CPUs and {gpus:g} GPUs for a task {options}: waiting for one")
        # Ray retries when it lost a worker or a node; when dql.py fails, that is an Outcome.
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=LOST_NODES)(train_on_a_node)
        waiting = {task.remote(job): job for job in jobs}
        say(f"{len(waiting)} tasks given to Ray")
        while waiting:
            (ended,), _ = ray.wait(list(waiting))
            job = waiting.pop(ended)
            try:
                outcome = ray.get(ended)
            except ray.exceptions.RayError as e:
                outcome = Outcome({"reason": why_lost(e), "exit_code": None}, {})
            done(job, outcome)
    finally:
        ray.shutdown()


# ---- Command line --------------------------------------------------------------------------------


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """-> our options, dql.py's. Raises SystemExit, with one line, for what cannot be."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add, n_gpus = parser.add_argument, f"default {GPUS_PER_TASK}, four tasks a GPU, or none"
    add("--tasks", nargs="+", default=["all"], metavar="TASK", help="all, or names of tasks")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    add("--jobs", type=int, default=1, help="tasks side by side, without --ray")
    where = "on a cluster; without an address, Ray here"
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help=where)
    add("--cpus-per-task", type=int, default=1, help="with --ray; also dql.py's threads")
    add("--gpus-per-task", type=float, help=f"with --ray; {n_gpus}")
    add("--table", action="store_true", help="train nothing")
    add("--out", type=Path, default=ROOT / "runs" / "d4rl", help="folder of the runs")
    add_results_option(parser, "experiments", "--results")
    split = argv.index("--") if "--" in argv else len(argv)
    options, passed = parser.parse_args(argv[:split]), argv[split + 1 :]

    named, seeds = list(dict.fromkeys(options.tasks)), " ".join(map(str, options.seeds))
    options.tasks = list(RECIPES) if named == ["all"] else named
    for task in options.tasks:
        if task not in RECIPES:
            nearest = ", ".join(difflib.get_close_matches(task, RECIPES, n=3, cutoff=0.0))
            raise SystemExit(f"no task is called {task!r}; the nearest are {nearest}")
    if len(set(options.seeds)) < len(options.seeds):
        raise SystemExit(f"--seeds {seeds} names a seed twice")
    for name, value in (("jobs", options.jobs), ("cpus-per-task", options.cpus_per_task)):
        if value < 1:
            raise SystemExit(f"--{name} must be at least 1, not {value}")
    gpus = options.gpus_per_task
    if gpus is not None and not 0 <= gpus <= 1:
        raise SystemExit(f"--gpus-per-task must lie between 0 and 1, not {gpus}")
    if not all(0 <= seed < 2**31 for seed in options.seeds):
        raise SystemExit(f"--seeds must be at least 0 and less than 2**31, not {seeds}")
    for word in passed:
        if word.split("=")[0].replace("_", "-") in OURS:
            why = "tasks, seeds and folders are named before the --"
            raise SystemExit(f"{word} cannot be passed on to dql.py: {why}")
    return options, passed


def say_how_to_go_on(argv: list[str]) -> None:
    command = f"python -m experiments.d4rl {shlex.join(argv)}"
    print(f"\ninterrupted; go on with: {command}", file=sys.stderr)


@steady_output()
@as_exceptions()
def main(argv: list[str] | None = None) -> int:
    """-> the exit status: 1 if a task failed; when interrupted 128 + the signal"""
    argv = sys.argv[1:] if argv is None else argv
    options, passed = read_arguments(argv)
    out, results = options.out, options.results
    share = 0 if options.jobs == 1 else max(1, os.cpu_count() // options.jobs)
    threads = options.cpus_per_task if options.ray else share
    try:
        RunFolder.require_writable(str(out))
        out.mkdir(parents=True, exist_ok=True)
        make_folder(results, "--results")
        jobs = [make_d4rl_job(t, options.seeds, passed, out, threads) for t in options.tasks]
        left = [] if options.table else [job for job in map(unfinished, jobs) if job.configs]
        if left and options.ray:
            train_on_ray(left, options.ray, options.cpus_per_task, options.gpus_per_task, record)
        elif left:
            train_here(left, options.jobs, record)
        runs = d4rl_table.collect(jobs)
        if options.table and not runs:
            how = "was made with these seeds and, after --, these options of dql.py"
            raise SystemExit(f"no finished run in {out} {how}")
        rows = d4rl_table.write(results, jobs, runs, passed)
    except (RunError, OSError) as e:
        raise SystemExit(str(e)) from e
    except Stopped as e:
        say_how_to_go_on(argv)
        return e.status
    failed = sum(row["note"].startswith("failed") for row in rows)
    with_scores = sum(bool(row["seeds"]) for row in rows)
    print(f"{results / 'd4rl.md'}: {with_scores} rows with scores, {failed} failed")
    if not failed and any(unfinished(job).configs for job in left):  # someone stopped dql.py
        say_how_to_go_on(argv)
        return 128 + signal.SIGINT
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
