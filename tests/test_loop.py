"""trainer/loop.py: what a run in miniature leaves behind, several seeds at once, and rates.

Interrupted and resumed runs are in test_resume.py.
"""

import dataclasses
import json

import numpy as np
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
    records,
    selection_of,
    train,
    write_hdf5,
)

import dql
import tasks
from trainer import folder, loop
from trainer.options import Options
from trainer.setup import make_agent

pytestmark = pytest.mark.usefixtures("short_episodes")


def test_a_run_leaves_everything_a_reader_looks_for(tmp_path, data, capsys):
    run = train(data, tmp_path / "runs", "--seed", 3, "--algo", "bc")
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
    means = [np.mean(bc_loss[:2]), np.mean(bc_loss[2:])]
    assert [e["bc_loss"] for e in evaluations] == pytest.approx(means)

    selection = selection_of(run)
    assert selection.keys() == {"last", "best", "offline", "offline_released"}
    for chosen in selection.values():
        assert chosen["data"] == label
        tensors, about = folder.load_tensors(run / chosen["checkpoint"])
        assert all(about[name] == chosen[name] for name in ("step", "data", "score"))
        networks = {name.split(".")[0] for name in tensors}
        assert networks == {"policy", "policy_ema", "critic", "critic_target"}
    assert int(load_file(run / "resume.safetensors")["step"]) == 20

    assert list(run.glob("events.out.tfevents.*"))
    for picture in ("curve.png", "episodes_00000010.png", "episodes_00000020.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG"), picture
    assert not any(list(run.rglob(pattern)) for pattern in ("*.part", "*.pkl", "*.pt"))

    lines = printed.splitlines()
    assert all(label in line for line in lines if "score" in line)
    *summary, hint = lines[lines.index(f"normalised scores, {label}:") + 1 :]
    assert hint.endswith(f"--eval {run}")
    assert [line.split()[0] for line in summary] == ["last", "best", "offline", "offline_released"]


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_trains_and_is_evaluated_and_scored(
    tmp_path, monkeypatch, capsys, no_pictures, name
):
    """With the paper's recipe, rewards tuned as it says; and evaluated again from its folder."""
    task = dataclasses.replace(tasks.get(name), episode_limit=3)
    monkeypatch.setitem(tasks._TASKS, name, task)
    file = write_hdf5(tmp_path / "data.hdf5", state_dim=task.state_dim, action_dim=task.action_dim)
    size = "--epochs 1 --updates-per-epoch 2 --eval-every 1".split()
    run = train(file, tmp_path / "runs", "--env", name, *size)
    (evaluation,) = records(run, "evaluation")
    assert np.isfinite(evaluation["score"]) and np.isfinite(records(run, "epoch")[0]["bc_loss"])
    assert config_of(run)["eta"] == dql.RECIPES[name].eta
    capsys.readouterr()
    evaluate = ["--eval", str(run), "--episodes", "2", "--threads", "1", "--device", "cpu"]
    assert dql.main(evaluate) == 0
    assert f"{name}, last (update 2)" in capsys.readouterr().out


def test_tensorboard_holds_the_logged_numbers(tmp_path, data, no_pictures):
    run = train(data, tmp_path / "runs")
    assert len(records(run)) == 6
    assert_tensorboard_holds_the_log(run)


def test_tensorboard_has_losses_early_and_the_pictures(tmp_path, data, monkeypatch):
    """After LOG_EVERY updates, not after an epoch of a thousand; also of a run that is resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(loop, "LOG_EVERY", 3)
    run = train(data, tmp_path / "runs")
    first = records(run, "first")
    assert [r["step"] for r in first] == [3]
    for _ in range(2):
        assert_tensorboard_holds_the_log(run)
        events = EventAccumulator(str(run)).Reload()
        assert [e.step for e in events.Scalars("epoch/bc_loss")] == [3, 5, 10, 15, 20]
        assert [e.step for e in events.Images("episodes")] == [10, 20]
        assert dql.main(["--resume", str(run)]) == 0


def test_generated_data_are_called_so_beside_every_score(
    tmp_path, monkeypatch, capsys, no_pictures
):
    from tasks import generate

    full = generate.cached
    few = lambda task, **how: full(task, **{**how, "n_transitions": 60})  # noqa: E731
    monkeypatch.setattr(generate, "cached", few)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = train("generated", tmp_path / "runs")
    printed = capsys.readouterr().out.splitlines()
    assert "GENERATED" in printed[0]
    assert all("GENERATED" in line for line in printed if "score" in line)
    assert run.name.startswith(f"{ENV}-ql-generated-seed0-")
    named = [*records(run, "evaluation"), *selection_of(run).values()]
    assert all(entry["data"].startswith("GENERATED") for entry in named)
    assert json.loads((run / "config.json").read_text())["data"]["label"].startswith("GENERATED")

    assert dql.main(["--eval", str(run)]) == 0
    assert "GENERATED" in capsys.readouterr().out


def test_evaluating_more_often_does_not_change_the_training(tmp_path, data, no_pictures):
    often = train(data, tmp_path / "often", "--eval-every", 1)
    rarely = train(data, tmp_path / "rarely", "--eval-every", 2)
    assert len(records(often, "evaluation")) == 4 and len(records(rarely, "evaluation")) == 2
    assert records(often, "epoch") == records(rarely, "epoch")
    assert_same_tensors(often / "resume.safetensors", rarely / "resume.safetensors")


def test_a_run_is_a_function_of_its_seed(tmp_path, data, no_pictures):
    first, again = train(data, tmp_path / "first"), train(data, tmp_path / "again")
    other = train(data, tmp_path / "other", "--seed", 1)
    assert_same_run(first, again)
    weights = [load_file(run / "resume.safetensors") for run in (first, other)]
    assert not torch.equal(*(w["policy.final_layer.weight"] for w in weights))


def test_seeds_side_by_side_are_the_runs_each_would_be_alone(tmp_path, data, no_pictures, capsys):
    assert call(data, tmp_path / "both", "--seeds", 3, 1) == 0
    printed = capsys.readouterr().out
    runs = by_seed(tmp_path / "both")
    assert list(sorted(runs)) == [1, 3] and "seeds 3 1" in printed
    assert "seed 3, update 10: score" in printed and "seed 1, update 20: score" in printed
    assert "over 2 seeds" in printed
    scores = [selection_of(runs[seed])["last"]["score"] for seed in (3, 1)]
    mean_and_spread = f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
    assert mean_and_spread in printed.split("normalised scores")[1]
    for seed, run in runs.items():
        alone = train(data, tmp_path / f"alone{seed}", "--seed", seed)
        assert_same_run(run, alone)
        ours, theirs = config_of(run), config_of(alone)
        assert all(ours[k] == theirs[k] for k in ours.keys() - {"out"})


# ---- Learning rates ------------------------------------------------------------------------------


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
    """As torch's cosine, stepped after every epoch, or as the released code after evaluations."""
    sizes = dict(hidden_dim=16, n_timesteps=2, updates_per_epoch=2, eval_every=3, epochs=6)
    config = dataclasses.replace(Options(lr=0.01, critic_lr=0.02, lr_decay=kind), **sizes)
    found = rates(config, 14)  # two updates more than the run has
    groups = [{"params": torch.zeros(1), "lr": lr} for lr in (0.01, 0.02)]
    optimizer = torch.optim.SGD(groups)
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
