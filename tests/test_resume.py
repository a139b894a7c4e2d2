"""--resume: a run that was interrupted or killed anywhere continues bit for bit."""

import dataclasses
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    ENV,
    assert_same_run,
    assert_same_tensors,
    assert_tensorboard_holds_the_log,
    by_seed,
    call,
    config_of,
    data_of,
    draw_nothing,
    files_of,
    on_call,
    records,
    refused,
    shorten_episodes,
    the_run,
    train,
    write_hdf5,
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


# ---- Signals -------------------------------------------------------------------------------------


def sends(number):
    """For on_call: send this process a signal."""
    return lambda *_: os.kill(os.getpid(), number)


terminate = sends(signal.SIGTERM)
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def saved_step(run) -> int:
    return int(load_file(run / "resume.safetensors")["step"])


def pasted(printed) -> list[str]:
    """The words of the command that an interrupted run says to go on with."""
    [line] = [line for line in printed.splitlines() if "go on with: " in line]
    return shlex.split(line.split("go on with: ")[1])


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("update", [1, 7, 10, 18])
def test_a_signal_saves_the_update_that_it_met(
    tmp_path, monkeypatch, finished, capsys, number, update
):
    """And the run, in a folder whose name a shell would split, goes on bit for bit."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 1e9)
    out, before = tmp_path / "my $runs", signal.getsignal(number)
    with monkeypatch.context() as patch:
        stopped = on_call(update, dql.DiffusionQL.update, sends(number))
        patch.setattr(dql.DiffusionQL, "update", lambda *args: stopped(*args))
        assert call(data_of(finished), out) == ENDS[number]
    assert signal.getsignal(number) is before
    run = the_run(out)
    assert saved_step(run) == update
    python, program, *words = pasted(capsys.readouterr().out)
    assert Path(program).samefile(dql.__file__) and words == ["--resume", str(run)]
    assert Path(shutil.which(python)).samefile(sys.executable)
    assert dql.main(words) == 0
    assert_same_run(run, finished)


def test_a_second_signal_ends_a_run_at_once(tmp_path, monkeypatch, data, capsys):
    saved, again = [], sends(signal.SIGINT)
    monkeypatch.setattr(loop.Training, "finish_epoch_and_save", lambda *args: saved.append(args))

    def twice(*_):
        again(), again()

    stopped = on_call(2, dql.DiffusionQL.update, twice)
    monkeypatch.setattr(dql.DiffusionQL, "update", lambda *args: stopped(*args))
    assert call(data, tmp_path / "runs") == 130
    assert not saved and "--resume" in capsys.readouterr().out


def test_a_signal_in_an_evaluation_ends_it_at_once(tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch:
        stopped = on_call(2, tasks.antmaze.AntBatch.step, terminate)
        patch.setattr(tasks.antmaze.AntBatch, "step", lambda *args: stopped(*args))
        assert call(data_of(finished), tmp_path / "runs") == 143
    assert saved_step(the_run(tmp_path / "runs")) == 10
    resume_and_compare(tmp_path / "runs", finished)


def test_a_signal_before_a_run_begins_leaves_nothing(tmp_path, monkeypatch, data, capsys):
    load = on_call(1, tasks.load, terminate)
    monkeypatch.setattr(tasks, "load", lambda *args, **how: load(*args, **how))
    assert call(data, tmp_path / "runs") == 143
    assert "no run was begun" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


# ---- What may change -----------------------------------------------------------------------------


def interrupted_run(data, out, monkeypatch, *options, update=12):
    with monkeypatch.context() as patch:
        stopped = on_call(update, dql.DiffusionQL.update, terminate)
        patch.setattr(dql.DiffusionQL, "update", lambda *args: stopped(*args))
        assert call(data, out, *options) == 143
    return the_run(out)


def test_data_that_have_moved_are_named_anew(tmp_path, monkeypatch, finished, capsys):
    """And remembered; other transitions are refused, under whatever name."""
    data = shutil.copy(data_of(finished), tmp_path / "before.hdf5")
    run = interrupted_run(data, tmp_path / "runs", monkeypatch)
    Path(data).rename(tmp_path / "after.hdf5")
    assert dql.main(["--resume", str(run)]) == 1
    assert "before.hdf5" in capsys.readouterr().err
    other = write_hdf5(tmp_path / "other.hdf5", seed=1)
    assert dql.main(["--resume", str(run), "--data", str(other)]) == 1
    assert "not the same transitions" in capsys.readouterr().err
    assert dql.main(["--resume", str(run), "--data", str(tmp_path / "after.hdf5")]) == 0
    assert data_of(run) == str(tmp_path / "after.hdf5")
    assert_same_tensors(run / "resume.safetensors", finished / "resume.safetensors")


def test_a_run_keeps_its_source_of_data(tmp_path, monkeypatch):
    """One on generated data goes on with them, although D4RL's file is there now."""
    asked, dataset = [], tasks.load

    def load(task, source, **how):
        asked.append(source)
        found = dataset(task, str(tmp_path / "tiny.hdf5"), **how)
        return dataclasses.replace(found, source="generated")

    write_hdf5(tmp_path / "tiny.hdf5")
    monkeypatch.setattr(tasks, "load", load)
    run = interrupted_run("auto", tmp_path / "runs", monkeypatch)
    assert dql.main(["--resume", str(run)]) == 0
    assert dql.main(["--resume", str(run), "--data", "generated"]) == 0
    assert asked == ["auto", "generated", "generated"]


def test_a_run_can_be_made_longer(tmp_path, data, capsys):
    """Each epoch is that of a run which was as long from the beginning."""
    constant = ("--lr-decay", "none")
    long = train(data, tmp_path / "long", *constant, "--epochs", 6)
    short = train(data, tmp_path / "short", *constant)
    assert dql.main(["--resume", str(short), "--epochs", "6"]) == 0
    assert_same_run(short, long)
    assert dql.main(["--resume", str(short)]) == 0  # remembered
    assert dql.main(["--resume", str(short), "--epochs", "5"]) == 1
    assert "only be made longer" in capsys.readouterr().err


def test_a_longer_run_keeps_how_its_rates_decay(tmp_path, data, capsys):
    run = train(data, tmp_path / "runs", "--lr-decay", "cosine")
    assert dql.main(["--resume", str(run), "--epochs", "5"]) == 0
    assert "over 4 epochs as before" in capsys.readouterr().out
    config = config_of(run)
    assert (config["epochs"], config["decay_epochs"]) == (5, 4)
    at_4, at_5 = [load_file(run / f"checkpoints/step_{n:08d}.safetensors") for n in (20, 25)]
    assert torch.equal(at_4["policy.final_layer.weight"], at_5["policy.final_layer.weight"])


def test_another_machine_is_said_to_round_differently(tmp_path, data, monkeypatch, capsys):
    run = interrupted_run(data, tmp_path / "runs", monkeypatch)
    about = folder.load_json(run / "config.json")
    about["versions"] |= {"device": "an abacus", "torch": "1.0"}
    folder.save_json(run / "config.json", about)
    assert dql.main(["--resume", str(run), "--device", "cpu"]) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if "not bit for bit" in x]
    assert "device an abacus -> " in line and "torch 1.0 -> " in line and "threads" not in line


def test_noise_of_another_kind_of_device_is_drawn_anew(tmp_path, data, monkeypatch, capsys):
    """A GPU's generator has 16 bytes, a CPU's 5056."""
    run = interrupted_run(data, tmp_path / "runs", monkeypatch)
    tensors = load_file(run / "resume.safetensors")
    of_a_gpu = {"generator": torch.zeros(16, dtype=torch.uint8)}
    folder.save_tensors(run / "resume.safetensors", tensors | of_a_gpu)
    assert dql.main(["--resume", str(run)]) == 0
    assert "drawn anew" in capsys.readouterr().out


def test_a_run_has_one_process_at_a_time(capsys, run):
    with folder.RunFolder(run).claimed():
        before = files_of(run)
        assert "another process" in refused(capsys, "--resume", run)
        assert files_of(run) == before
    assert dql.main(["--resume", str(run)]) == 0


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


# Saves: at the start, after each update, and the checkpoints of 10 and of 20.
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
    assert_tensorboard_holds_the_log(run)


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


def test_runs_that_do_not_belong_together_are_refused(tmp_path, data, capsys):
    run = train(data, tmp_path / "run")
    other = train(data, tmp_path / "other", "--seed", 1, "--eta", 0.1)
    assert dql.main(["--resume", str(run), str(other)]) == 1
    assert "another --eta" in capsys.readouterr().err


@pytest.mark.parametrize("behind", [1, 8, 13])
def test_a_seed_that_is_behind_catches_up(tmp_path, data, monkeypatch, behind):
    """As after a kill between the saves of two seeds, wherever in an epoch that was."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 1e9)
    assert call(data, tmp_path / "whole", "--seeds", 0, 1) == 0
    ends = {0: 14, 1: behind}
    for seed, update in ends.items():
        with monkeypatch.context() as patch:
            stopped = on_call(update, dql.DiffusionQL.update, terminate)
            patch.setattr(dql.DiffusionQL, "update", lambda *args: stopped(*args))
            assert call(data, tmp_path / "cut", "--seed", seed) == 143
    runs = by_seed(tmp_path / "cut")
    assert {seed: saved_step(run) for seed, run in runs.items()} == ends
    assert dql.main(["--resume", str(runs[0]), str(runs[1])]) == 0
    for seed, run in by_seed(tmp_path / "whole").items():
        assert_same_run(runs[seed], run)


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
        interrupted = on_call(2, loop.Training.run_updates, interrupt)
        patch.setattr(loop.Training, "run_updates", lambda *args: interrupted(*args))
        assert call(data, tmp_path / "alone", *FUSED, "--seed", 1) == 130
    resume_and_compare(tmp_path / "alone", by_seed(tmp_path / "both")[1])
