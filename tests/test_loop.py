"""trainer/loop.py: a whole run in miniature: what it leaves behind, and that it can be interrupted anywhere."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    ENV,
    TINY,
    assert_same_run,
    assert_same_tensors,
    by_seed,
    draw_nothing,
    on_call,
    records,
    shorten_episodes,
    the_run,
    train,
    write_hdf5,
)

import dql
import tasks
import tasks.antmaze
from trainer import folder, loop
from trainer.options import Options
from trainer.setup import make_agent

pytestmark = pytest.mark.usefixtures("short_episodes")


def test_a_run_leaves_everything_a_reader_looks_for(tmp_path, data, capsys):
    run = train(data, tmp_path / "runs", "--seed", "3", "--algo", "bc")
    printed = capsys.readouterr().out
    label = f"file tiny.hdf5 (task {ENV})"
    assert run.name.startswith(f"{ENV}-bc-file-seed3-")

    config = json.loads((run / "config.json").read_text())
    assert config["config"]["seed"] == 3 and config["config"]["hidden_dim"] == 16
    assert config["data"]["label"] == label and config["data"]["n"] > 0
    assert {"torch", "numpy", "mujoco", "gymnasium", "python"} <= config["versions"].keys()

    assert [r["step"] for r in records(run, "epoch")] == [5, 10, 15, 20]
    evaluations = records(run, "evaluation")
    assert [e["step"] for e in evaluations] == [10, 20]
    assert all(e["data"] == label and 0 <= e["score"] <= 100 for e in evaluations)
    # The BC loss that selects a checkpoint is the mean since the evaluation before.
    bc_loss = [r["bc_loss"] for r in records(run, "epoch")]
    assert [e["bc_loss"] for e in evaluations] == pytest.approx(
        [np.mean(bc_loss[:2]), np.mean(bc_loss[2:])]
    )

    selection = json.loads((run / "selection.json").read_text())
    assert selection.keys() == {"last", "best", "offline", "offline_released"}
    for chosen in selection.values():
        assert chosen["data"] == label
        tensors, about = folder.load_tensors(run / chosen["checkpoint"])
        assert (
            about["step"] == chosen["step"]
            and about["data"] == label
            and about["score"] == chosen["score"]
        )
        assert {name.split(".")[0] for name in tensors} == {
            "policy",
            "policy_ema",
            "critic",
            "critic_target",
        }
    assert int(load_file(run / "resume.safetensors")["step"]) == 20

    assert list(run.glob("events.out.tfevents.*"))
    for picture in ("curve.png", "episodes_00000010.png", "episodes_00000020.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG"), picture
    assert (
        not list(run.rglob("*.part"))
        and not list(run.rglob("*.pkl"))
        and not list(run.rglob("*.pt"))
    )

    lines = printed.splitlines()
    assert all(label in line for line in lines if "score" in line)
    summary = lines[lines.index(f"normalised scores, {label}:") + 1 :]
    assert [line.split()[0] for line in summary] == ["last", "best", "offline", "offline_released"]


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_trains_evaluates_and_is_scored_on_a_file_of_its_shape(
    tmp_path, monkeypatch, capsys, no_pictures, name
):
    """With the paper's recipe for it, rewards tuned as it says; and evaluated again from its folder."""
    task = dataclasses.replace(tasks.get(name), episode_limit=3)
    monkeypatch.setitem(tasks._TASKS, name, task)
    file = write_hdf5(tmp_path / "data.hdf5", state_dim=task.state_dim, action_dim=task.action_dim)
    size = "--epochs 1 --updates-per-epoch 2 --eval-every 1".split()
    assert (
        dql.main(
            [*TINY, "--env", name, "--data", str(file), "--out", str(tmp_path / "runs"), *size]
        )
        == 0
    )
    run = the_run(tmp_path / "runs")
    (evaluation,) = records(run, "evaluation")
    assert np.isfinite(evaluation["score"]) and np.isfinite(records(run, "epoch")[0]["bc_loss"])
    assert json.loads((run / "config.json").read_text())["config"]["eta"] == dql.RECIPES[name].eta
    capsys.readouterr()
    assert (
        dql.main(["--eval", str(run), "--episodes", "2", "--threads", "1", "--device", "cpu"]) == 0
    )
    assert f"{name}, last (update 2)" in capsys.readouterr().out


def test_tensorboard_holds_the_logged_numbers(tmp_path, data, no_pictures):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(data, tmp_path / "runs")
    events = EventAccumulator(str(run)).Reload()
    for kind, name in (("epoch", "bc_loss"), ("epoch", "critic_loss"), ("evaluation", "score")):
        logged = [(r["step"], r[name]) for r in records(run, kind)]
        shown = [(e.step, e.value) for e in events.Scalars(f"{kind}/{name}")]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged], name


def test_generated_data_are_called_generated_beside_every_score(
    tmp_path, monkeypatch, capsys, no_pictures
):
    from tasks import generate

    full, cache = generate.cached, tmp_path / "cache"
    monkeypatch.setattr(
        generate, "cached", lambda task, **how: full(task, **{**how, "n_transitions": 60})
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    run = train("generated", tmp_path / "runs")
    printed = capsys.readouterr().out.splitlines()
    assert "GENERATED" in printed[0]
    assert all("GENERATED" in line for line in printed if "score" in line)
    assert run.name.startswith(f"{ENV}-ql-generated-seed0-")
    named = [
        *records(run, "evaluation"),
        *json.loads((run / "selection.json").read_text()).values(),
    ]
    assert all(entry["data"].startswith("GENERATED") for entry in named)
    assert json.loads((run / "config.json").read_text())["data"]["label"].startswith("GENERATED")

    assert dql.main(["--eval", str(run)]) == 0
    assert "GENERATED" in capsys.readouterr().out


def test_evaluating_more_often_does_not_change_the_training(tmp_path, data, no_pictures):
    often = train(data, tmp_path / "often", "--eval-every", "1")
    rarely = train(data, tmp_path / "rarely", "--eval-every", "2")
    assert len(records(often, "evaluation")) == 4 and len(records(rarely, "evaluation")) == 2
    assert records(often, "epoch") == records(rarely, "epoch")
    assert_same_tensors(often / "resume.safetensors", rarely / "resume.safetensors")


def test_a_run_is_a_function_of_its_seed(tmp_path, data, no_pictures):
    first, again = train(data, tmp_path / "first"), train(data, tmp_path / "again")
    other = train(data, tmp_path / "other", "--seed", "1")
    assert_same_run(first, again)
    weights = [
        load_file(run / "resume.safetensors")["policy.final_layer.weight"] for run in (first, other)
    ]
    assert not torch.equal(*weights)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nothing interrupted: its data, its folder."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        shorten_episodes(patch.setitem)
        draw_nothing(patch.setattr)
        data = write_hdf5(folder / "tiny.hdf5")
        return data, train(data, folder / "runs")


def resume_and_compare(out, straight_run):
    run = the_run(out)
    assert dql.main(["--resume", str(run)]) == 0
    assert_same_run(run, straight_run)


@pytest.mark.parametrize(
    "save_seconds", [-1, 1e9], ids=["saved each epoch", "saved at evaluations"]
)
@pytest.mark.parametrize("update", [1, 7, 10, 18])
def test_an_interrupted_run_continues_bit_for_bit(
    tmp_path, monkeypatch, straight, no_pictures, capsys, update, save_seconds
):
    data, straight_run = straight
    monkeypatch.setattr(loop, "SAVE_SECONDS", save_seconds)
    whole, count = dql.DiffusionQL.update, 0

    def interrupted(agent, *batch):
        nonlocal count
        count += 1
        if count == update:
            raise KeyboardInterrupt
        return whole(agent, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(dql.DiffusionQL, "update", interrupted)
        assert dql.main([*TINY, "--data", str(data), "--out", str(tmp_path / "runs")]) == 130
    assert f"--resume {the_run(tmp_path / 'runs')}" in capsys.readouterr().out
    resume_and_compare(tmp_path / "runs", straight_run)


def test_a_finished_run_resumes_to_itself(tmp_path, data, no_pictures, capsys):
    run = train(data, tmp_path / "runs")
    before = {p: p.read_bytes() for p in run.rglob("*.safetensors")}
    scores = capsys.readouterr().out.split("normalised scores")[1]
    assert dql.main(["--resume", str(run)]) == 0
    assert capsys.readouterr().out.split("normalised scores")[1] == scores
    assert {p: p.read_bytes() for p in run.rglob("*.safetensors")} == before
    assert len(records(run, "evaluation")) == 2


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(tensors, path, metadata):
    Path(path).write_bytes(b"\x10" * 100)
    die()


def half_a_line(run, kind, step, **numbers):
    with open(run.path / "log.jsonl", "a") as f:
        f.write('{"kind": "epoch", "st')
    die()


def run_and_die(moment, data, out):
    """In a process of its own: a tiny run that saves after each epoch and is killed at the given moment."""
    torch.set_num_threads(1)
    shorten_episodes()
    draw_nothing()
    loop.SAVE_SECONDS = -1

    def kill(owner, name, nth, how=lambda *_: die()):
        setattr(owner, name, on_call(nth, getattr(owner, name), how))

    MOMENTS[moment](kill)
    if moment == "from outside":
        kill(dql.DiffusionQL, "update", 1, lambda *_: (Path(out) / "training").touch())
    dql.main([*TINY, "--data", data, "--out", str(Path(out) / "runs")])


# Saves: at the start, after the epochs to 5 and 10, the checkpoint of 10, the epochs to 15 and 20, that of 20.
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


PATIENCE = 300  # seconds; a second is enough where nobody else wants the cores


def killed(moment, data, out):
    """run_and_die, in a child whose parent has the imports done and has used no threads; it must have been killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["dql", "trainer.command", "tasks", "tyro", "torch.utils.tensorboard"]
    )
    child = context.Process(target=run_and_die, args=(moment, str(data), str(out)))
    child.start()
    try:
        if moment == "from outside":
            give_up = time.monotonic() + PATIENCE
            while not (out / "training").exists() and time.monotonic() < give_up:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5))
            child.kill()
        child.join(PATIENCE)
        # Killed from outside, a fast machine may be done before.
        assert child.exitcode == -signal.SIGKILL or (
            moment == "from outside" and child.exitcode == 0
        )
    finally:
        child.kill()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_continues_bit_for_bit(tmp_path, straight, no_pictures, moment):
    data, straight_run = straight
    killed(moment, data, tmp_path)
    run = the_run(tmp_path / "runs")
    for file in [run / "resume.safetensors", *(run / "checkpoints").glob("*.safetensors")]:
        folder.load_tensors(file)  # what has its final name is whole
    resume_and_compare(tmp_path / "runs", straight_run)


def test_seeds_side_by_side_leave_the_runs_that_each_would_leave_alone(
    tmp_path, data, no_pictures, capsys
):
    assert (
        dql.main([*TINY, "--data", data, "--out", str(tmp_path / "both"), "--seeds", "3", "1"]) == 0
    )
    printed = capsys.readouterr().out
    runs = by_seed(tmp_path / "both")
    assert list(sorted(runs)) == [1, 3] and "seeds 3 1" in printed
    assert "seed 3, update 10: score" in printed and "seed 1, update 20: score" in printed
    assert "over 2 seeds" in printed
    scores = [
        json.loads((runs[seed] / "selection.json").read_text())["last"]["score"] for seed in (3, 1)
    ]
    assert (
        f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
        in printed.split("normalised scores")[1]
    )
    for seed, run in runs.items():
        alone = train(data, tmp_path / f"alone{seed}", "--seed", str(seed))
        assert_same_run(run, alone)
        configs = [json.loads((r / "config.json").read_text())["config"] for r in (run, alone)]
        assert all(configs[0][k] == configs[1][k] for k in configs[0].keys() - {"out"})


def test_seeds_side_by_side_are_resumed_together_or_alone(
    tmp_path, data, no_pictures, monkeypatch, capsys
):
    options = [*TINY, "--data", data, "--seeds", "0", "1"]
    assert dql.main([*options, "--out", str(tmp_path / "whole")]) == 0
    for how in ("together", "alone"):
        with monkeypatch.context() as patch:
            interrupt = on_call(
                25, dql.DiffusionQL.update, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            patch.setattr(dql.DiffusionQL, "update", lambda *args: interrupt(*args))
            assert dql.main([*options, "--out", str(tmp_path / how)]) == 130
        runs = by_seed(tmp_path / how)
        assert f"--resume {runs[0]} {runs[1]}" in capsys.readouterr().out
        for folders in [[runs[0], runs[1]]] if how == "together" else [[runs[1]], [runs[0]]]:
            assert dql.main(["--resume", *map(str, folders)]) == 0
        for seed, run in by_seed(tmp_path / "whole").items():
            assert_same_run(runs[seed], run)


def test_runs_that_do_not_belong_together_are_not_resumed_together(
    tmp_path, data, no_pictures, monkeypatch, capsys
):
    run = train(data, tmp_path / "run")
    other = train(data, tmp_path / "other", "--seed", "1", "--eta", "0.1")
    assert dql.main(["--resume", str(run), str(other)]) == 1
    assert "another --eta" in capsys.readouterr().err
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    behind = train(data, tmp_path / "behind", "--seed", "2")
    tensors = load_file(behind / "resume.safetensors")
    folder.save_tensors(behind / "resume.safetensors", tensors | {"step": tensors["step"] - 5})
    assert dql.main(["--resume", str(run), str(behind)]) == 1
    assert "(15, 20): resume them one by one" in capsys.readouterr().err


def test_a_diverged_seed_is_named(tmp_path, data, no_pictures, monkeypatch, capsys):
    whole = dql.DiffusionQL.update

    def diverging(agent, *batch):
        metrics = whole(agent, *batch)
        return metrics | ({"q_loss": metrics["q_loss"] * float("nan")} if agent.seed == 7 else {})

    monkeypatch.setattr(dql.DiffusionQL, "update", diverging)
    assert dql.main([*TINY, "--data", data, "--out", str(tmp_path), "--seeds", "5", "7"]) == 1
    assert "seed 7: q_loss became nan" in capsys.readouterr().err


FUSED = "--hidden-dim 128 --n-timesteps 2 --updates-per-epoch 1 --eval-every 2 --backend fused --precision fp16x3".split()


def test_fused_runs_of_several_seeds_resume_bit_for_bit(
    tmp_path, data, no_pictures, monkeypatch, few_programs
):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    options = [*TINY, *FUSED, "--data", data, "--epochs", "2"]
    assert dql.main([*options, "--seeds", "0", "1", "--out", str(tmp_path / "both")]) == 0
    both = by_seed(tmp_path / "both")
    with monkeypatch.context() as patch:
        interrupt = on_call(2, loop.run_epoch, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(loop, "run_epoch", lambda *args: interrupt(*args))
        assert dql.main([*options, "--seed", "1", "--out", str(tmp_path / "alone")]) == 130
    assert dql.main(["--resume", str(the_run(tmp_path / "alone"))]) == 0
    assert_same_run(the_run(tmp_path / "alone"), both[1])


def rates(config, n_updates):
    """The policy's and the critics' rate at each of n_updates updates."""
    agent, found = make_agent(config, tasks.get(ENV), "cpu"), []
    for agent.step in range(n_updates):
        loop.set_rates(config, [agent])
        optimizers = agent.policy_optimizer, agent.critic_optimizer
        found.append([float(o.param_groups[0]["lr"]) for o in optimizers])
    return np.array(found)


@pytest.mark.parametrize("kind, updates_a_step", [("none", 0), ("cosine", 2), ("released", 6)])
def test_rates_decay_as_named(kind, updates_a_step):
    sizes = dict(hidden_dim=16, n_timesteps=2, updates_per_epoch=2, eval_every=3, epochs=6)
    config = dataclasses.replace(Options(lr=0.01, critic_lr=0.02, lr_decay=kind), **sizes)
    found = rates(config, 14)  # two updates more than the run has
    # torch's own cosine, stepped after every epoch, or after every evaluation as the released code does.
    optimizer = torch.optim.SGD(
        [{"params": torch.zeros(1), "lr": 0.01}, {"params": torch.zeros(1), "lr": 0.02}]
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6, eta_min=0.0)
    expected = []
    for update in range(12):
        expected.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if updates_a_step and (update + 1) % updates_a_step == 0:
            scheduler.step()
    np.testing.assert_allclose(found[:12], expected, rtol=1e-5, atol=1e-9)
    if kind == "cosine":
        assert not found[12:].any()  # and does not rise again
