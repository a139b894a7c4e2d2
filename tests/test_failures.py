"""What goes wrong during training, evaluation or filming: one line, and the last good state."""

import errno
import os

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    TINY,
    Film,
    assert_same_run,
    data_of,
    on_call,
    records,
    stopped,
    the_run,
    train,
)

import dql
from trainer import folder, loop

pytestmark = pytest.mark.usefixtures("short_episodes")


def saved_step(run) -> int:
    return int(load_file(run / "resume.safetensors")["step"])


# ---- Memory and disk -----------------------------------------------------------------------------

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual."
CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
FULL_MEMORY = {
    "the GPU's memory is full (CUDA out": torch.OutOfMemoryError(CUDA),
    "memory is full (Unable to allocate": MemoryError("Unable to allocate 7.45 GiB for an array"),
    "memory is full ([enforce": RuntimeError(CPU),
}


@pytest.mark.parametrize("said, error", FULL_MEMORY.items(), ids=["GPU", "numpy", "CPU"])
def test_a_full_memory_says_what_would_take_less(capsys, tmp_path, data, monkeypatch, said, error):
    def full(self, batch, noise=None):
        raise error

    monkeypatch.setattr(dql.DiffusionQL, "update", full)
    message = stopped(capsys, *TINY, "--data", data, "--out", tmp_path / "out")
    assert said in message and "--batch-size" in message


@pytest.mark.parametrize("nth, step", [(3, 1), (12, 10)], ids=["the state", "a kept checkpoint"])
@pytest.mark.parametrize("what", ["save_file", "replace"])
def test_a_full_disk_while_saving_leaves_the_last_state(
    capsys, tmp_path, finished, monkeypatch, no_pictures, what, nth, step
):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        owner = folder if what == "save_file" else os
        nth += what == "replace"  # config.json is moved first
        patch.setattr(owner, what, on_call(nth, getattr(owner, what), no_space))
        where = ["--data", data_of(finished), "--out", tmp_path / "runs"]
        message = stopped(capsys, *TINY, *where)
    assert "No space left" in message and "untouched" in message
    run = the_run(tmp_path / "runs")
    assert saved_step(run) == step
    assert not list(run.rglob("*.part"))
    assert dql.main(["--resume", str(run)]) == 0
    assert_same_run(run, finished)


# ---- Numbers -------------------------------------------------------------------------------------


def act_with(monkeypatch, value):
    act = lambda self, states, *_, **__: np.full((len(states), 8), value)  # noqa: E731
    monkeypatch.setattr(dql.DiffusionQL, "act", act)


def test_actions_outside_the_box_are_clipped(tmp_path, data, monkeypatch, no_pictures):
    act_with(monkeypatch, 1e3)
    far = train(data, tmp_path / "far")
    act_with(monkeypatch, 1.0)
    assert records(far) == records(train(data, tmp_path / "edge"))


def test_an_action_that_is_nan_stops_the_evaluation(
    capsys, tmp_path, data, run, monkeypatch, no_pictures
):
    act_with(monkeypatch, np.nan)
    assert "NaN" in stopped(capsys, *TINY, "--data", data, "--out", tmp_path / "new")
    assert "NaN" in stopped(capsys, "--eval", run)


def test_a_loss_that_becomes_nan_keeps_the_last_good_state(
    capsys, tmp_path, data, monkeypatch, no_pictures
):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    whole, count = dql.DiffusionQL.update, 0

    def breaks(agent, *batch):
        nonlocal count
        count += 1
        metrics = whole(agent, *batch)
        if count == 13:
            metrics["critic_loss"] = metrics["critic_loss"] * float("nan")
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(dql.DiffusionQL, "update", breaks)
        message = stopped(capsys, *TINY, "--data", data, "--out", tmp_path / "runs")
    assert "critic_loss became nan between updates 12 and 13" in message
    run = the_run(tmp_path / "runs")
    assert saved_step(run) == 12
    assert [r["step"] for r in records(run)] == [5, 10, 10]
    assert dql.main(["--resume", str(run)]) == 0


def test_a_loss_that_explodes_by_itself_is_noticed(capsys, tmp_path, data, no_pictures):
    options = [*TINY, "--data", data, "--out", tmp_path / "runs", "--lr", "1e30"]
    assert "between updates 1 and 2" in stopped(capsys, *options)
    run = the_run(tmp_path / "runs")
    tensors = load_file(run / "resume.safetensors")
    assert saved_step(run) == 0 and all(v.isfinite().all() for v in tensors.values())


def test_a_diverged_seed_is_named(tmp_path, data, no_pictures, monkeypatch, capsys):
    whole = dql.DiffusionQL.update

    def diverging(agent, *batch):
        metrics = whole(agent, *batch)
        if agent.seed == 7:
            metrics["q_loss"] = metrics["q_loss"] * float("nan")
        return metrics

    monkeypatch.setattr(dql.DiffusionQL, "update", diverging)
    message = stopped(capsys, *TINY, "--data", data, "--out", tmp_path, "--seeds", "5", "7")
    assert "seed 7: q_loss became nan" in message


# ---- Films ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere/ant.gif", "file/ant.gif"])
@pytest.mark.usefixtures("no_pictures")
def test_a_film_that_cannot_be_written_is_refused(capsys, tmp_path, run, monkeypatch, path):
    monkeypatch.setattr(gymnasium, "make", lambda name, **how: Film())
    (tmp_path / "file").touch()
    assert str(tmp_path / path) in stopped(capsys, "--eval", run, "--render", tmp_path / path)


@pytest.mark.usefixtures("no_pictures")
def test_filming_without_opengl_says_what_to_install(capsys, tmp_path, run, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    assert "MUJOCO_GL" in stopped(capsys, "--eval", run, "--render", tmp_path / "ant.gif")
    assert not (tmp_path / "ant.gif").exists()
