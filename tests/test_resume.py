"""--resume: a run that was interrupted or killed anywhere continues bit for bit."""

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    ENV,
    assert_same_run,
    by_seed,
    call,
    data_of,
    draw_nothing,
    on_call,
    records,
    shorten_episodes,
    the_run,
    train,
)

import dql
import tasks
import tasks.antmaze
from trainer import folder, loop

pytestmark = pytest.mark.usefixtures("short_episodes", "no_pictures")

PATIENCE = 300  # seconds; one is enough on an idle machine


def interrupt(*_):
    raise KeyboardInterrupt


def resume_and_compare(out, expected):
    run = the_run(out)
    assert dql.main(["--resume", str(run)]) == 0
    assert_same_run(run, expected)


SAVED = {"saved each epoch": -1, "saved at evaluations": 1e9}


@pytest.mark.parametrize("save_seconds", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("update", [1, 7, 10, 18])
def test_an_interrupted_run_continues_bit_for_bit(
    tmp_path, monkeypatch, finished, capsys, update, save_seconds
):
    monkeypatch.setattr(loop, "SAVE_SECONDS", save_seconds)
    with monkeypatch.context() as patch:
        interrupted = on_call(update, dql.DiffusionQL.update, interrupt)
        patch.setattr(dql.DiffusionQL, "update", lambda *args: interrupted(*args))
        assert call(data_of(finished), tmp_path / "runs") == 130
    assert f"--resume {the_run(tmp_path / 'runs')}" in capsys.readouterr().out
    resume_and_compare(tmp_path / "runs", finished)


def test_a_finished_run_resumes_to_itself(tmp_path, data, capsys):
    run = train(data, tmp_path / "runs")
    before = {p: p.read_bytes() for p in run.rglob("*.safetensors")}
    scores = capsys.readouterr().out.split("normalised scores")[1]
    assert dql.main(["--resume", str(run)]) == 0
    assert capsys.readouterr().out.split("normalised scores")[1] == scores
    assert {p: p.read_bytes() for p in run.rglob("*.safetensors")} == before
    assert len(records(run, "evaluation")) == 2


# ---- Killed --------------------------------------------------------------------------------------


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(tensors, path, metadata):
    Path(path).write_bytes(b"\x10" * 100)
    die()


def half_a_line(run, kind, step, **numbers):
    with open(run.path / "log.jsonl", "a") as f:
        f.write('{"kind": "epoch", "st')
    die()


def run_and_die(moment, data, out):
    """A tiny run that saves after each epoch and is killed then; in a process of its own."""
    torch.set_num_threads(1)
    shorten_episodes()
    draw_nothing()
    loop.SAVE_SECONDS = -1

    def kill(owner, name, nth, how=die):
        setattr(owner, name, on_call(nth, getattr(owner, name), how))

    MOMENTS[moment](kill)
    if moment == "from outside":
        kill(dql.DiffusionQL, "update", 1, lambda *_: (Path(out) / "training").touch())
    call(data, Path(out) / "runs")


# Saves: at the start, after the epochs to 5 and 10, the checkpoint of 10, the epochs to 15 and 20,
# that of 20.
MOMENTS = {
    "in an update": lambda kill: kill(dql.DiffusionQL, "update", 13),
    "writing a save": lambda kill: kill(folder, "save_file", 3, half_a_file),
    "before a save is moved into place": lambda kill: kill(os, "replace", 4),
    "writing a kept checkpoint": lambda kill: kill(folder, "save_file", 4, half_a_file),
    "writing the log": lambda kill: kill(folder.RunFolder, "log", 2, half_a_line),
    "between log and save": lambda kill: kill(loop, "save_tensors", 3),
    "in an evaluation": lambda kill: kill(tasks.antmaze.AntBatch, "step", 2),
    "in the last evaluation": lambda kill: kill(tasks.antmaze.AntBatch, "step", 5),
    "before an evaluation is logged": lambda kill: kill(folder.RunFolder, "log", 3),
    "before a selection": lambda kill: kill(folder.RunFolder, "select", 1),
    "before the last selection": lambda kill: kill(folder.RunFolder, "select", 2),
    "from outside": lambda kill: None,
}
PRELOADED = ["dql", "trainer.command", "tasks", "tyro", "torch.utils.tensorboard"]


def killed(moment, data, out):
    """run_and_die, in a child whose parent has imported all and used no threads.

    It must have been killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=run_and_die, args=(moment, str(data), str(out)))
    child.start()
    allowed = [-signal.SIGKILL]
    try:
        if moment == "from outside":
            allowed.append(0)  # a fast machine may be done before
            give_up = time.monotonic() + PATIENCE
            while not (out / "training").exists() and time.monotonic() < give_up:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5))
            child.kill()
        child.join(PATIENCE)
        assert child.exitcode in allowed
    finally:
        child.kill()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_continues_bit_for_bit(tmp_path, finished, moment):
    killed(moment, data_of(finished), tmp_path)
    run = the_run(tmp_path / "runs")
    for file in [run / "resume.safetensors", *(run / "checkpoints").glob("*.safetensors")]:
        folder.load_tensors(file)  # what has its final name is whole
    resume_and_compare(tmp_path / "runs", finished)


# ---- Several seeds -------------------------------------------------------------------------------


def test_seeds_side_by_side_are_resumed_together_or_alone(tmp_path, data, monkeypatch, capsys):
    seeds = ("--seeds", 0, 1)
    assert call(data, tmp_path / "whole", *seeds) == 0
    for how in ("together", "alone"):
        with monkeypatch.context() as patch:
            interrupted = on_call(25, dql.DiffusionQL.update, interrupt)
            patch.setattr(dql.DiffusionQL, "update", lambda *args: interrupted(*args))
            assert call(data, tmp_path / how, *seeds) == 130
        runs = by_seed(tmp_path / how)
        assert f"--resume {runs[0]} {runs[1]}" in capsys.readouterr().out
        for folders in [[runs[0], runs[1]]] if how == "together" else [[runs[1]], [runs[0]]]:
            assert dql.main(["--resume", *map(str, folders)]) == 0
        for seed, run in by_seed(tmp_path / "whole").items():
            assert_same_run(runs[seed], run)


def test_runs_that_do_not_belong_together_are_refused(tmp_path, data, monkeypatch, capsys):
    """When they are resumed together: other options, or another update."""
    run = train(data, tmp_path / "run")
    other = train(data, tmp_path / "other", "--seed", 1, "--eta", 0.1)
    assert dql.main(["--resume", str(run), str(other)]) == 1
    assert "another --eta" in capsys.readouterr().err
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    behind = train(data, tmp_path / "behind", "--seed", 2)
    tensors = load_file(behind / "resume.safetensors")
    folder.save_tensors(behind / "resume.safetensors", tensors | {"step": tensors["step"] - 5})
    assert dql.main(["--resume", str(run), str(behind)]) == 1
    assert "(15, 20): resume them one by one" in capsys.readouterr().err


FUSED = (
    "--hidden-dim 128 --n-timesteps 2 --updates-per-epoch 1 --epochs 2 --eval-every 2 "
    "--backend fused --precision fp16x3"
).split()


def test_fused_runs_of_several_seeds_resume_bit_for_bit(tmp_path, data, monkeypatch, few_programs):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    one_step = dataclasses.replace(tasks.get(ENV), episode_limit=1)
    monkeypatch.setitem(tasks._TASKS, ENV, one_step)  # the interpreter's acting is slow
    assert call(data, tmp_path / "both", *FUSED, "--seeds", 0, 1) == 0
    with monkeypatch.context() as patch:
        interrupted = on_call(2, loop.run_epoch, interrupt)
        patch.setattr(loop, "run_epoch", lambda *args: interrupted(*args))
        assert call(data, tmp_path / "alone", *FUSED, "--seed", 1) == 130
    resume_and_compare(tmp_path / "alone", by_seed(tmp_path / "both")[1])
