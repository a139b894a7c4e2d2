"""One cell of bench.d4rl: a task with all its seeds, trained by `python dql.py`, on whatever machine this is called.

    train(cell)                  # makes, continues or skips its runs, says what failed, brings back what the table needs
    find_run(folder, config)     # the run folder that was made with this config, if there is one

A cell's runs lie in OUT/TASK, a folder a seed, and dql.py's output in OUT/TASK/output.txt. A cluster's worker imports this
file alone, without torch, which dql.py does in a process of its own: what only waits for a training takes little memory.
"""

import asyncio
import json
import os
import signal
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

ROOT = Path(__file__).resolve().parents[1]
FREE = ("out", "threads", "backend")  # a run that differs in these is the same run: dql.py --resume lets them change
KEPT = ("config.json", "log.jsonl", "selection.json")  # of a run, in the order in which they are written
STOP_SECONDS = 20  # for dql.py to end by itself after an interrupt

# Were dql.py to outlive a worker that is killed, it would write into the run that another node continues.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which an exec keeps
if os.getppid() == int(sys.argv[1]):  # else it is dead already
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Cell(NamedTuple):
    task: str
    options: tuple[str, ...]  # for dql.py
    configs: dict[int, dict]  # seed -> the config.json's "config" that dql.py writes with these options
    out: str  # an absolute path
    program: str = "dql.py"  # relative to the repository


class Outcome(NamedTuple):
    failure: dict | None  # {"reason": one line, "exit_code": of dql.py, or None where it was not what failed}
    runs: dict[str, dict[str, str]]  # finished run's folder -> its KEPT files' text


def load(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def common(configs: dict[int, dict]) -> dict:
    """Of a cell's configs: what makes its runs, whatever the seed."""
    config = next(iter(configs.values()))
    return {k: v for k, v in config.items() if k not in (*FREE, "seed")}


def finished(run: Path) -> bool:
    """Whether the run has evaluated its last update."""
    saved, selection = load(run / "config.json"), load(run / "selection.json")
    if not saved or not selection:
        return False
    return selection["last"]["step"] == saved["config"]["epochs"] * saved["config"]["updates_per_epoch"]


def updates_made(run: Path) -> int:
    """The update at which the run can be resumed, -1 if it cannot."""
    try:
        with safe_open(run / "resume.safetensors", framework="numpy") as file:
            return int(file.get_tensor("step"))
    except (OSError, SafetensorError):
        return -1


def find_run(folder: Path, config: dict) -> Path | None:
    """The run in folder made with this config that is finished, or else can be resumed furthest on."""
    wanted = {k: v for k, v in config.items() if k not in FREE}
    found = []
    for path in folder.glob("*/config.json"):
        saved, run = load(path), path.parent
        if saved and {k: v for k, v in saved["config"].items() if k not in FREE} == wanted:
            found.append((finished(run), updates_made(run), run))
    done, step, run = max(found, default=(False, -1, None))
    return run if done or step >= 0 else None


def commands(cell: Cell) -> list[list[str]]:
    """What dql.py must still be called with: runs that stand at the same update go on together, missing seeds are made."""
    folder, standing, missing = Path(cell.out) / cell.task, defaultdict(list), []
    for seed, config in cell.configs.items():
        run = find_run(folder, config)
        if run is None:
            missing.append(str(seed))
        elif not finished(run):
            how = ("--threads", str(config["threads"]), "--backend", config["backend"])
            standing[updates_made(run), how].append(str(run))
    calls = [["--resume", *runs, *how] for (_, how), runs in standing.items()]
    if missing:
        calls.append(["--env", cell.task, *cell.options, "--out", str(folder), "--seeds", *missing])
    return calls


def reason(output: str, exit_code: int) -> str:
    """Why dql.py failed, in one line."""
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    memory = [line for line in lines if "out of memory" in line.lower()]
    if exit_code < 0 and not errors:
        return f"killed by signal {-exit_code}{' (out of memory?)' if exit_code == -signal.SIGKILL else ''}"
    return textwrap.shorten((errors or memory or lines or [f"exit status {exit_code}"])[-1], 300)


async def call(arguments: list[str], output: Path) -> int:
    """Run python with these arguments, its output appended to a file; -> its exit status. Cancelled, it interrupts it first."""
    last_will = ["-c", DIE_WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
    with output.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *last_will, *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,  # a terminal's Ctrl-C reaches it once, through us
        )  # fmt: skip
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()


async def train_async(cell: Cell) -> Outcome:
    """Do what is left to do of a cell. A call that fails does not stop the next."""
    folder, failure = Path(cell.out) / cell.task, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / "output.txt"
        for arguments in commands(cell):
            before = output.stat().st_size if output.exists() else 0
            exit_code = await call([str(ROOT / cell.program), *arguments], output)
            if exit_code:
                said = output.read_bytes()[before:].decode(errors="replace")
                failure = {"reason": reason(said, exit_code), "exit_code": exit_code}
    except OSError as e:
        failure = {"reason": f"cannot write {folder}: {e.strerror or e}; choose another --out", "exit_code": None}
    if not failure and commands(cell):
        failure = {"reason": f"dql.py ended well and left no finished run in {folder}: another version?", "exit_code": 0}
    runs = [find_run(folder, config) for config in cell.configs.values()]
    return Outcome(failure, {run.name: {f: (run / f).read_text() for f in KEPT} for run in runs if run and finished(run)})


def train(cell: Cell) -> Outcome:
    return asyncio.run(train_async(cell))
