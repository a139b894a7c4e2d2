"""Whole runs in miniature, by the command line, and how they are compared.

Their fixtures are in conftest.py.
"""

import dataclasses
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dql
import tasks
from trainer import folder

ENV = "antmaze-umaze-v0"


# 4 epochs of 5 updates, an evaluation after every second. All that a resumed run has to restore
# is in use.
TINY = (
    "--hidden-dim 16 --n-timesteps 2 --updates-per-epoch 5 --epochs 4 --eval-every 2 "
    "--eval-episodes 2 --batch-size 8 --n-candidates 2 --ema-start 4 --ema-every 2 "
    "--lr-decay cosine --threads 1 --device cpu"
).split()


def write_hdf5(path, n=200, seed=0, state_dim=29, action_dim=8):
    """Random transitions in D4RL's layout."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.standard_normal((n, state_dim), np.float32)
        file["actions"] = rng.uniform(-1, 1, (n, action_dim)).astype(np.float32)
        file["rewards"] = (rng.random(n) < 0.1).astype(np.float32)
        file["terminals"] = rng.random(n) < 0.1
        file["timeouts"] = rng.random(n) < 0.05
    return path


def shorten_episodes(set_item=dict.__setitem__):
    set_item(tasks._TASKS, ENV, dataclasses.replace(tasks.get(ENV), episode_limit=3))


def draw_nothing(set_attribute=setattr):
    set_attribute(tasks.Task, "draw", lambda *_: None)
    set_attribute(folder.RunFolder, "draw_curve", lambda *_: None)


# ---- Making runs ---------------------------------------------------------------------------------


def call(data, out, *options) -> int:
    """The command line's exit code."""
    return dql.main([*TINY, "--data", str(data), "--out", str(out), *map(str, options)])


def train(data, out, *options) -> Path:
    """A run that must end well; -> its folder."""
    assert call(data, out, *options) == 0
    return the_run(out)


def make_finished_run(where: Path) -> Path:
    """A run in where/runs on where/tiny.hdf5; -> its folder."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_episodes(patch.setitem)
        draw_nothing(patch.setattr)
        return train(write_hdf5(where / "tiny.hdf5"), where / "runs")


def the_run(out) -> Path:
    (run,) = Path(out).iterdir()
    return run


def by_seed(out) -> dict:
    return {config_of(run)["seed"]: run for run in Path(out).iterdir()}


def on_call(n, what, before):
    """`what`, but its n-th call runs `before` on the arguments first."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == n:
            before(*args)
        return what(*args, **kwargs)

    return wrapped


# ---- Bad input -----------------------------------------------------------------------------------


def refused(capsys, *options) -> str:
    """main's only line on stderr, after its non-zero exit."""
    capsys.readouterr()
    assert dql.main([str(o) for o in options]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.endswith("\n"), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr.rstrip()


def stopped(capsys, *options) -> str:
    """The same for an error during training: its line stands below the progress bar."""
    capsys.readouterr()
    assert dql.main([str(o) for o in options]) == 1
    *bars, line = re.split("[\r\n]+", capsys.readouterr().err.rstrip("\n"))
    assert line.startswith("error: ")
    assert not any("Traceback" in bar or "error" in bar for bar in bars)
    return line


# ---- What a run holds ----------------------------------------------------------------------------


def records(run, kind=None):
    """The log's records, without how long things took."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    timing = ("seconds", "updates_per_second")
    wanted = [r for r in lines if kind in (None, r["kind"])]
    return [{k: v for k, v in r.items() if k not in timing} for r in wanted]


def config_of(run) -> dict:
    return json.loads((run / "config.json").read_text())["config"]


def assert_tensorboard_holds_the_log(run):
    """Every number of every record, at its update, and nothing else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found, logged = {}, {}
    for tag in events.Tags()["scalars"]:
        found[tag] = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)]
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        kind, step = record.pop("kind").replace("first", "epoch"), record.pop("step")
        for name, value in record.items():
            if isinstance(value, float):
                logged.setdefault(f"{kind}/{name}", []).append((step, value))
    assert logged == found


def data_of(run) -> str:
    """The path of its data."""
    return config_of(run)["data"]


def selection_of(run) -> dict:
    return json.loads((run / "selection.json").read_text())


def files_of(run) -> dict:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def assert_same_tensors(path, other):
    tensors, others = load_file(path), load_file(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def assert_same_run(run, other):
    """Every tensor of the final state, every kept checkpoint, every number logged and selected."""
    assert_same_tensors(run / "resume.safetensors", other / "resume.safetensors")
    checkpoints = sorted(p.name for p in (other / "checkpoints").iterdir())
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == checkpoints
    for name in checkpoints:
        assert_same_tensors(run / "checkpoints" / name, other / "checkpoints" / name)
    assert records(run) == records(other)
    assert (run / "selection.json").read_text() == (other / "selection.json").read_text()


class Film:
    """Stands in for the gymnasium environment: n steps, then done.

    Its pictures are grey and grow lighter.
    """

    metadata = {"render_fps": 10}

    def __init__(self, n=6):
        self.n, self.t, self.closed = n, 0, False

    def reset(self, seed):
        return np.zeros(29), {}

    def step(self, action):
        assert action.shape == (8,) and np.abs(action).max() <= 1
        self.t += 1
        done = self.t == self.n
        return np.zeros(29), float(done), done, False, {}

    def render(self):
        return np.full((8, 8, 3), 40 * self.t, np.uint8)

    def close(self):
        self.closed = True
