"""Runs of dql.py: how every experiment makes them, finds them again, continues and reads them.

    job = make_job("antmaze-umaze-v0", [0, 1], ["--quick"], folder)
    paths = complete([job])        # train what is missing -> the folder of each run
    train(job)                     # one job -> why it failed, and the files of its runs
    find_run(folder, config)       # the run folder that was made with this config, if there is one

A worker of a cluster imports this file alone, and waits for a process that imports torch. So torch
is not imported here at the top: a process that only waits should need little memory.
"""

import asyncio
import json
import os
import signal
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from trainer import interrupts

ROOT = Path(__file__).resolve().parents[1]
# A run that differs in these is the same run: dql.py --resume lets them change.
FREE = ("out", "threads", "backend")
KEPT = ("config.json", "log.jsonl", "selection.json")  # in the order in which they are written
STOP_SECONDS = 20  # for dql.py to end by itself after an interrupt
STOPS = [getattr(signal, name) for name in interrupts.NAMES if hasattr(signal, name)]
# dql.py's exit status when one of these stopped it: it saved its runs first, or had not begun.
INTERRUPTED = [128 + number for number in STOPS] + [-number for number in STOPS]

# If dql.py outlived a killed worker, it would write into a run that another node continues.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which an exec keeps
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job would ignore
if os.getppid() == int(sys.argv[1]):  # else it is dead already
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Job(NamedTuple):
    """Seeds of one task, trained in one process."""

    task: str
    options: tuple[str, ...]  # of dql.py
    configs: dict[int, dict]  # seed -> the "config" of the config.json that these options give
    folder: str  # absolute; of the runs
    name: str  # for messages
    output: str = "output.txt"  # file in the folder that gets what dql.py prints
    program: tuple[str, ...] = ("dql.py",)  # what python is called with, from the repository's root


class Outcome(NamedTuple):
    failure: dict | None  # {"reason": one line, "exit_code": dql.py's; None if it was not called}
    runs: dict[str, dict[str, str]]  # name of a finished run's folder -> its KEPT files' text

    @property
    def interrupted(self) -> bool:
        """The job was stopped from outside, and the next call goes on with it."""
        return self.failure is not None and self.failure["exit_code"] in INTERRUPTED


def make_job(task: str, seeds: list[int], options: list[str], folder: Path, **more) -> Job:
    """more: name, output, program. Raises SystemExit, with one line, for what dql.py refuses."""
    from dataclasses import asdict, replace

    from tasks import TaskError
    from trainer.options import UserError, parse

    try:
        parsed = parse(["--env", task, *options], "")
    except (UserError, TaskError) as e:
        raise SystemExit(str(e)) from e
    options = (*options, "--data", parsed.data)  # as an absolute path: of two, the last one counts
    # By way of JSON, since there tuples are lists.
    configs = {seed: json.loads(json.dumps(asdict(replace(parsed, seed=seed)))) for seed in seeds}
    return Job(task, options, configs, str(folder.absolute()), **{"name": task, **more})


# ---- Finding and reading -------------------------------------------------------------------------


def load(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def records(run: Path, kind: str) -> list[dict]:
    """A run's log: kind is "epoch" or "evaluation"."""
    lines = (run / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def finished(run: Path) -> bool:
    """Whether the run has evaluated its last update."""
    saved, selection = load(run / "config.json"), load(run / "selection.json")
    if not saved or not selection:
        return False
    total = saved["config"]["epochs"] * saved["config"]["updates_per_epoch"]
    return selection["last"]["step"] == total


def updates_made(run: Path) -> int:
    """The update at which the run can be resumed, -1 if it cannot."""
    try:
        with safe_open(run / "resume.safetensors", framework="numpy") as file:
            return int(file.get_tensor("step"))
    except (OSError, SafetensorError):
        return -1


def without_free(config: dict) -> dict:
    return {k: v for k, v in config.items() if k not in FREE}


def find_run(folder: str | Path, config: dict) -> Path | None:
    """The run in folder made with this config: a finished one, else the one with most updates."""
    found = []
    for path in Path(folder).glob("*/config.json"):
        saved, run = load(path), path.parent
        if saved and without_free(saved["config"]) == without_free(config):
            found.append((finished(run), updates_made(run), run))
    done, step, run = max(found, default=(False, -1, None))
    return run if done or step >= 0 else None


def finished_runs(job: Job) -> dict[int, Path]:
    """Seed -> run"""
    found = {seed: find_run(job.folder, config) for seed, config in job.configs.items()}
    return {seed: run for seed, run in found.items() if run and finished(run)}


def unfinished(job: Job) -> Job:
    """The job with only the seeds that have no finished run here."""
    done = finished_runs(job)
    return job._replace(configs={s: config for s, config in job.configs.items() if s not in done})


# ---- Making --------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def commands(job: Job) -> list[list[str]]:
    """What dql.py still has to be called with: one call resumes all runs that stand at the same
    update, one makes the missing seeds."""
    to_resume, missing = defaultdict(list), []
    for seed, config in unfinished(job).configs.items():
        run = find_run(job.folder, config)
        if run is None:
            missing.append(str(seed))
        else:
            how = ("--threads", str(config["threads"]), "--backend", config["backend"])
            to_resume[updates_made(run), how].append(str(run))
    calls = [["--resume", *runs, *how] for (_, how), runs in to_resume.items()]
    if missing:
        where = ["--out", job.folder, "--seeds", *missing]
        calls.append(["--env", job.task, *job.options, *where])
    return calls


def reason(output: str, exit_code: int) -> str:
    """Why dql.py failed, in one line."""
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    memory = [line for line in lines if "out of memory" in line.lower()]
    if exit_code in INTERRUPTED:
        return "interrupted"
    if exit_code < 0 and not errors:
        guess = " (out of memory?)" if exit_code == -signal.SIGKILL else ""
        return f"killed by signal {-exit_code}{guess}"
    return textwrap.shorten((errors or memory or lines or [f"exit status {exit_code}"])[-1], 300)


async def call(words: list[str], output: Path) -> int:
    """Run python with these words, its output appended to a file -> its exit status.

    When cancelled, it interrupts the process and waits for it.
    """
    watched = ["-c", DIE_WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
    with output.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *watched,
            *words,
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a terminal's Ctrl-C reaches it once, through us
        )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()


async def train_async(job: Job) -> Outcome:
    """Do what is left to do of a job. After a call that fails comes the next one, after an
    interrupted one none."""
    folder, failure = Path(job.folder), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / job.output
        for arguments in commands(job):
            before = output.stat().st_size if output.exists() else 0
            exit_code = await call([*job.program, *arguments], output)
            if exit_code:
                printed = output.read_bytes()[before:].decode(errors="replace")
                failure = {"reason": reason(printed, exit_code), "exit_code": exit_code}
            if exit_code in INTERRUPTED:
                break
    except OSError as e:
        why = f"cannot write {folder}: {e.strerror or e}; choose another --out"
        failure = {"reason": why, "exit_code": None}
    if not failure and commands(job):
        why = f"dql.py ended well and left no finished run in {folder}: another version?"
        failure = {"reason": why, "exit_code": 0}
    runs = finished_runs(job).values()
    return Outcome(failure, {r.name: {f: (r / f).read_text() for f in KEPT} for r in runs})


def train(job: Job) -> Outcome:
    return asyncio.run(train_async(job))


def train_here(jobs: list[Job], at_once: int, done: Callable) -> None:
    """Train jobs on this machine, some of them at once; done(job, outcome) as each ends."""

    async def train_all():
        free = asyncio.Semaphore(at_once)

        async def one(job):
            async with free:
                say(f"{job.name}: begins, its output goes to {Path(job.folder) / job.output}")
                return job, await train_async(job)

        for ended in asyncio.as_completed([asyncio.create_task(one(job)) for job in jobs]):
            done(*await ended)

    asyncio.run(train_all())


def complete(jobs: list[Job], at_once: int = 1) -> list[Path]:
    """Train what has no finished run here -> the folders of all runs, job by job.

    Raises SystemExit, with one line, if a job fails or is interrupted; the others are trained
    first. A signal interrupts all of them; the same call goes on.
    """
    failures = []

    def done(job, outcome):
        if outcome.interrupted:
            failures.append(f"{job.name} was interrupted: the same command goes on with it")
        elif outcome.failure:
            failures.append(f"{job.name} failed: {outcome.failure['reason']}")

    try:
        train_here([job for job in jobs if unfinished(job).configs], at_once, done)
    except interrupts.Stopped as e:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(e.status) from None
    if failures:
        raise SystemExit(failures[0])
    return [run for job in jobs for run in finished_runs(job).values()]
