"""The table of twenty tasks without training: experiments.d4rl with d4rl_program.py as dql.py."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
from conftest import ROOT
from safetensors.numpy import save_file

import dql
from experiments import d4rl
from experiments.runs import find_run

UMAZE, MEDIUM, LARGE = "antmaze-umaze-v0", "antmaze-medium-play-v0", "antmaze-large-play-v0"


class D4RL:
    """The command in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.out, self.results = folder, folder / "runs", folder / "results"
        self.broken, self.seconds = {}, 0.0
        shutil.copy(ROOT / "tests" / "d4rl_program.py", folder / "program.py")
        monkeypatch.setattr(d4rl, "PROGRAM", (str(folder / "program.py"),))

    def __call__(self, *arguments, tasks=(UMAZE,), seeds=(0, 1), passed=()) -> int:
        known = [task for task in tasks if task in dql.RECIPES]
        self.ask({task: self.job(task, seeds, passed).configs for task in known})
        where = ["--out", str(self.out), "--results", str(self.results)]
        named = ["--tasks", *tasks, "--seeds", *map(str, seeds)]
        return d4rl.main([*arguments, *named, *where, "--", *passed])

    def ask(self, configs: dict) -> None:
        """Tell the program what to do."""
        asked = {"configs": configs, "broken": self.broken, "seconds": self.seconds}
        (self.folder / "program.json").write_text(json.dumps(asked))

    def job(self, task=UMAZE, seeds=(0, 1), passed=()):
        return d4rl.make_d4rl_job(task, list(seeds), list(passed), self.out, 0)

    def calls(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, seed: int, task=UMAZE) -> Path:
        return find_run(self.out / task, self.job(task, [seed]).configs[seed])

    def interrupt(self, seed: int, step: int) -> None:
        """As if the run had been killed after this update."""
        run = self.run(seed)
        (run / "selection.json").unlink()
        save_file({"step": np.array(step)}, run / "resume.safetensors")

    def table(self) -> dict:
        return json.loads((self.results / "d4rl.json").read_text())


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.05)
