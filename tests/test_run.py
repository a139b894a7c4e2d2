"""A whole run through the command line, in miniature: what it leaves behind, resuming, evaluating, recipes."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dql
import run_folder
import tasks
import tasks.antmaze

ENV = "antmaze-umaze-v0"
# 4 epochs of 5 updates, an evaluation after every second. Everything that a resumed run has to restore is in use.
TINY = (
    "--hidden-dim 16 --n-timesteps 2 --updates-per-epoch 5 --epochs 4 --eval-every 2 --eval-episodes 2 --batch-size 8 "
    "--n-candidates 2 --ema-start 4 --ema-every 2 --lr-decay cosine --threads 1 --device cpu"
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
    set_attribute(run_folder.RunFolder, "draw_curve", lambda *_: None)


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch):
    shorten_episodes(monkeypatch.setitem)


@pytest.fixture
def no_pictures(monkeypatch):
    draw_nothing(monkeypatch.setattr)


@pytest.fixture
def data(tmp_path):
    return str(write_hdf5(tmp_path / "tiny.hdf5"))


def train(data, out, *options) -> Path:
    """A run by the command line, which must end well; -> its folder."""
    assert dql.main([*TINY, "--data", str(data), "--out", str(out), *options]) == 0
    return the_run(out)


def the_run(out) -> Path:
    (run,) = Path(out).iterdir()
    return run


def records(run, kind=None):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    timing = ("seconds", "updates_per_second")
    return [{k: v for k, v in r.items() if k not in timing} for r in lines if kind in (None, r["kind"])]


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


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


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
    assert [e["bc_loss"] for e in evaluations] == pytest.approx([np.mean(bc_loss[:2]), np.mean(bc_loss[2:])])

    selection = json.loads((run / "selection.json").read_text())
    assert selection.keys() == {"last", "best", "offline", "offline_released"}
    for chosen in selection.values():
        assert chosen["data"] == label
        tensors, about = run_folder.load_tensors(run / chosen["checkpoint"])
        assert about["step"] == chosen["step"] and about["data"] == label and about["score"] == chosen["score"]
        assert {name.split(".")[0] for name in tensors} == {"policy", "policy_ema", "critic", "critic_target"}
    assert int(load_file(run / "resume.safetensors")["step"]) == 20

    assert list(run.glob("events.out.tfevents.*"))
    for picture in ("curve.png", "episodes_00000010.png", "episodes_00000020.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG"), picture
    assert not list(run.rglob("*.part")) and not list(run.rglob("*.pkl")) and not list(run.rglob("*.pt"))

    lines = printed.splitlines()
    assert all(label in line for line in lines if "score" in line)
    summary = lines[lines.index(f"normalised scores, {label}:") + 1 :]
    assert [line.split()[0] for line in summary] == ["last", "best", "offline", "offline_released"]


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_trains_evaluates_and_is_scored_on_a_file_of_its_shape(tmp_path, monkeypatch, capsys, no_pictures, name):
    """With the paper's recipe for it, rewards tuned as it says; and evaluated again from its folder."""
    task = dataclasses.replace(tasks.get(name), episode_limit=3)
    monkeypatch.setitem(tasks._TASKS, name, task)
    file = write_hdf5(tmp_path / "data.hdf5", state_dim=task.state_dim, action_dim=task.action_dim)
    size = "--epochs 1 --updates-per-epoch 2 --eval-every 1".split()
    assert dql.main([*TINY, "--env", name, "--data", str(file), "--out", str(tmp_path / "runs"), *size]) == 0
    run = the_run(tmp_path / "runs")
    (evaluation,) = records(run, "evaluation")
    assert np.isfinite(evaluation["score"]) and np.isfinite(records(run, "epoch")[0]["bc_loss"])
    assert json.loads((run / "config.json").read_text())["config"]["eta"] == dql.RECIPES[name].eta
    capsys.readouterr()
    assert dql.main(["--eval", str(run), "--episodes", "2", "--threads", "1", "--device", "cpu"]) == 0
    assert f"{name}, last (update 2)" in capsys.readouterr().out


def test_tensorboard_holds_the_logged_numbers(tmp_path, data, no_pictures):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(data, tmp_path / "runs")
    events = EventAccumulator(str(run)).Reload()
    for kind, name in (("epoch", "bc_loss"), ("epoch", "critic_loss"), ("evaluation", "score")):
        logged = [(r["step"], r[name]) for r in records(run, kind)]
        shown = [(e.step, e.value) for e in events.Scalars(f"{kind}/{name}")]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged], name


def test_generated_data_are_called_generated_beside_every_score(tmp_path, monkeypatch, capsys, no_pictures):
    from tasks import generate

    full, cache = generate.cached, tmp_path / "cache"
    monkeypatch.setattr(generate, "cached", lambda task, **how: full(task, **{**how, "n_transitions": 60}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    run = train("generated", tmp_path / "runs")
    printed = capsys.readouterr().out.splitlines()
    assert "GENERATED" in printed[0]
    assert all("GENERATED" in line for line in printed if "score" in line)
    assert run.name.startswith(f"{ENV}-ql-generated-seed0-")
    named = [*records(run, "evaluation"), *json.loads((run / "selection.json").read_text()).values()]
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
    weights = [load_file(run / "resume.safetensors")["policy.final_layer.weight"] for run in (first, other)]
    assert not torch.equal(*weights)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


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


@pytest.mark.parametrize("save_seconds", [-1, 1e9], ids=["saved each epoch", "saved at evaluations"])
@pytest.mark.parametrize("update", [1, 7, 10, 18])
def test_an_interrupted_run_continues_bit_for_bit(
    tmp_path, monkeypatch, straight, no_pictures, capsys, update, save_seconds
):
    data, straight_run = straight
    monkeypatch.setattr(dql, "SAVE_SECONDS", save_seconds)
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
    dql.SAVE_SECONDS = -1

    def kill(owner, name, nth, how=lambda *_: die()):
        setattr(owner, name, on_call(nth, getattr(owner, name), how))

    MOMENTS[moment](kill)
    if moment == "from outside":
        kill(dql.DiffusionQL, "update", 1, lambda *_: (Path(out) / "training").touch())
    dql.main([*TINY, "--data", data, "--out", str(Path(out) / "runs")])


# Saves: at the start, after the epochs to 5 and 10, the checkpoint of 10, the epochs to 15 and 20, that of 20.
MOMENTS = {
    "in an update": lambda kill: kill(dql.DiffusionQL, "update", 13),
    "writing a save": lambda kill: kill(run_folder, "save_file", 3, half_a_file),
    "before a save is moved into place": lambda kill: kill(os, "replace", 4),
    "writing a kept checkpoint": lambda kill: kill(run_folder, "save_file", 4, half_a_file),
    "writing the log": lambda kill: kill(run_folder.RunFolder, "log", 2, half_a_line),
    "between log and save": lambda kill: kill(run_folder, "save_tensors", 3),
    "in an evaluation": lambda kill: kill(tasks.antmaze.AntBatch, "step", 2),
    "in the last evaluation": lambda kill: kill(tasks.antmaze.AntBatch, "step", 5),
    "before an evaluation is logged": lambda kill: kill(run_folder.RunFolder, "log", 3),
    "before a selection": lambda kill: kill(run_folder.RunFolder, "select", 1),
    "before the last selection": lambda kill: kill(run_folder.RunFolder, "select", 2),
    "from outside": lambda kill: None,
}


PATIENCE = 300  # seconds; a second is enough where nobody else wants the cores


def killed(moment, data, out):
    """run_and_die, in a child whose parent has the imports done and has used no threads; it must have been killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dql", "run_folder", "tasks", "tyro", "torch.utils.tensorboard"])
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
        assert child.exitcode == -signal.SIGKILL or (moment == "from outside" and child.exitcode == 0)
    finally:
        child.kill()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_continues_bit_for_bit(tmp_path, straight, no_pictures, moment):
    data, straight_run = straight
    killed(moment, data, tmp_path)
    run = the_run(tmp_path / "runs")
    for file in [run / "resume.safetensors", *(run / "checkpoints").glob("*.safetensors")]:
        run_folder.load_tensors(file)  # what has its final name is whole
    resume_and_compare(tmp_path / "runs", straight_run)


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds, and what makes the updates


def by_seed(out) -> dict:
    return {json.loads((run / "config.json").read_text())["config"]["seed"]: run for run in Path(out).iterdir()}


def test_seeds_side_by_side_leave_the_runs_that_each_would_leave_alone(tmp_path, data, no_pictures, capsys):
    assert dql.main([*TINY, "--data", data, "--out", str(tmp_path / "both"), "--seeds", "3", "1"]) == 0
    printed = capsys.readouterr().out
    runs = by_seed(tmp_path / "both")
    assert list(sorted(runs)) == [1, 3] and "seeds 3 1" in printed
    assert "seed 3, update 10: score" in printed and "seed 1, update 20: score" in printed
    assert "over 2 seeds" in printed
    scores = [json.loads((runs[seed] / "selection.json").read_text())["last"]["score"] for seed in (3, 1)]
    assert f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}" in printed.split("normalised scores")[1]
    for seed, run in runs.items():
        alone = train(data, tmp_path / f"alone{seed}", "--seed", str(seed))
        assert_same_run(run, alone)
        configs = [json.loads((r / "config.json").read_text())["config"] for r in (run, alone)]
        assert all(configs[0][k] == configs[1][k] for k in configs[0].keys() - {"out"})


def test_seeds_side_by_side_are_resumed_together_or_alone(tmp_path, data, no_pictures, monkeypatch, capsys):
    options = [*TINY, "--data", data, "--seeds", "0", "1"]
    assert dql.main([*options, "--out", str(tmp_path / "whole")]) == 0
    for how in ("together", "alone"):
        with monkeypatch.context() as patch:
            interrupt = on_call(25, dql.DiffusionQL.update, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            patch.setattr(dql.DiffusionQL, "update", lambda *args: interrupt(*args))
            assert dql.main([*options, "--out", str(tmp_path / how)]) == 130
        runs = by_seed(tmp_path / how)
        assert f"--resume {runs[0]} {runs[1]}" in capsys.readouterr().out
        for folders in [[runs[0], runs[1]]] if how == "together" else [[runs[1]], [runs[0]]]:
            assert dql.main(["--resume", *map(str, folders)]) == 0
        for seed, run in by_seed(tmp_path / "whole").items():
            assert_same_run(runs[seed], run)


def test_runs_that_do_not_belong_together_are_not_resumed_together(tmp_path, data, no_pictures, monkeypatch, capsys):
    run = train(data, tmp_path / "run")
    other = train(data, tmp_path / "other", "--seed", "1", "--eta", "0.1")
    assert dql.main(["--resume", str(run), str(other)]) == 1
    assert "another --eta" in capsys.readouterr().err
    monkeypatch.setattr(dql, "SAVE_SECONDS", -1)
    behind = train(data, tmp_path / "behind", "--seed", "2")
    tensors = load_file(behind / "resume.safetensors")
    run_folder.save_tensors(behind / "resume.safetensors", tensors | {"step": tensors["step"] - 5})
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


@pytest.fixture
def few_programs(monkeypatch):
    """Triton's interpreter pays by the program."""
    pytest.importorskip("triton", reason="triton has no package for this platform")
    from reference import UPDATE_TILES

    import kernels

    if torch.cuda.is_available():
        pytest.skip("a test of the interpreter's")
    whole = kernels.FusedUpdate
    monkeypatch.setattr(kernels, "FusedUpdate", lambda *args: whole(*args, **UPDATE_TILES))
    return kernels


def test_fused_runs_of_several_seeds_resume_bit_for_bit(tmp_path, data, no_pictures, monkeypatch, few_programs):
    monkeypatch.setattr(dql, "SAVE_SECONDS", -1)
    options = [*TINY, *FUSED, "--data", data, "--epochs", "2"]
    assert dql.main([*options, "--seeds", "0", "1", "--out", str(tmp_path / "both")]) == 0
    both = by_seed(tmp_path / "both")
    with monkeypatch.context() as patch:
        interrupt = on_call(2, dql.run_epoch, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(dql, "run_epoch", lambda *args: interrupt(*args))
        assert dql.main([*options, "--seed", "1", "--out", str(tmp_path / "alone")]) == 130
    assert dql.main(["--resume", str(the_run(tmp_path / "alone"))]) == 0
    assert_same_run(the_run(tmp_path / "alone"), both[1])


def tiny_agents(n=1):
    return [dql.DiffusionQL(29, 8, hidden_dim=128, n_timesteps=2, seed=seed) for seed in range(n)]


def transitions_of(data):
    task = tasks.get(ENV)
    dataset = tasks.load(task, data, log=lambda line: None)
    return dql.load_transitions(dql.Config(), task, dataset, "cpu")


def test_trying_the_fused_update_changes_nothing(data, few_programs):
    agents = tiny_agents(2)
    before = [{name: value.clone() for name, value in agent.state_dict().items()} for agent in agents]
    dql.fuse_updates(agents, transitions_of(data), 8, "fp16")
    for agent, state in zip(agents, before):
        for name, value in agent.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_a_fused_update_that_is_wrong_is_refused(data, few_programs, monkeypatch):
    adam = few_programs.FusedUpdate(tiny_agents(), None, 8).__class__._weight_gradients

    def wrong(update, trained, *args):
        adam(update, trained, *args)
        update.norms.mul_(1.3)

    monkeypatch.setattr(few_programs.update.FusedUpdate, "_weight_gradients", wrong)
    with pytest.raises(ValueError, match="the kernels' actor_grad_norm is"):
        dql.fuse_updates(tiny_agents(), transitions_of(data), 8, "fp16")


def test_a_backend_that_cannot_be_captured_leaves_agents_as_they_were(data, few_programs, cuda_graphs, monkeypatch):
    """So the next slower one trains what was to be trained."""
    agents, whole = tiny_agents(), few_programs.FusedUpdate
    before = {name: value.clone() for name, value in agents[0].state_dict().items()}

    def replaying(*args):
        update = whole(*args)
        update.replays = True
        return update

    def broken(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(few_programs, "FusedUpdate", replaying)
    monkeypatch.setattr("kernels.update.PER_REPLAY", 1)
    monkeypatch.setattr("kernels.graphs.WARM_UP", 1)
    monkeypatch.setattr(torch.cuda, "graph", broken)
    for backend in ("fused", "graph"):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            dql.make_updates(backend, dql.Config(batch_size=8), agents, transitions_of(data))
        for name, value in agents[0].state_dict().items():
            assert torch.equal(value, before[name]), f"{backend}: {name}"


def test_auto_takes_the_next_slower_backend_with_a_line_that_says_why(monkeypatch, capsys):
    class OnGPU:
        device = torch.device("cuda")

    def make(backend, *_):
        if backend != "eager":
            raise ValueError(f"{backend} is broken\nand here is why at length")
        return backend

    monkeypatch.setattr(dql, "make_updates", make)
    assert dql.choose_updates(dql.Config(), [OnGPU()], None) == "eager"
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["updates will not be fused: fused is broken", "updates will not be graph: graph is broken"]
    for backend in ("fused", "compile"):
        with pytest.raises(dql.UserError, match=f"--backend {backend} cannot be had: {backend} is broken$"):
            dql.choose_updates(dql.Config(backend=backend), [OnGPU()], None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backends_that_this_machine_cannot_have_are_refused_by_name(tmp_path, data, capsys, monkeypatch):
    pytest.importorskip("triton", reason="triton has no package for this platform")
    import kernels

    arguments = [*TINY, "--data", data, "--out", str(tmp_path)]
    assert dql.main([*arguments, "--backend", "graph"]) == 1
    assert "--backend graph cannot be had: CUDA graphs need a CUDA GPU" in capsys.readouterr().err
    assert dql.main([*arguments, "--backend", "fused"]) == 1
    assert "--backend fused cannot be had: hidden_dim 16 is not one of" in capsys.readouterr().err
    monkeypatch.setattr(kernels, "why_not", lambda: "no CUDA GPU was found")
    assert dql.main([*arguments, "--backend", "fused"]) == 1
    assert "--backend fused cannot be had: no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(dql.shutil, "which", lambda name: None)
    assert dql.main([*arguments, "--backend", "compile"]) == 1
    assert "--backend compile cannot be had: it needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.skipif(dql.shutil.which("c++") is None, reason="there is no C++ compiler")
def test_compiled_updates_are_the_eager_ones(data):
    agents = [dql.DiffusionQL(29, 8, hidden_dim=16, n_timesteps=1, algo="bc") for _ in range(2)]
    for agent, backend in zip(agents, ("eager", "compile")):
        updates = dql.make_updates(backend, dql.Config(batch_size=8), [agent], transitions_of(data))
        means = updates.run(2)
    assert int(agents[1].step) == 2 and set(means[0]) == {"bc_loss", "q_loss", "actor_loss", "actor_grad_norm"}
    torch.testing.assert_close(agents[1].policy_vector, agents[0].policy_vector, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluating a run


def test_a_run_is_exported_by_its_chosen_checkpoint(tmp_path, data, no_pictures, capsys):
    run, file = train(data, tmp_path / "runs"), tmp_path / "policy.pt2"
    assert dql.main(["--export", str(run), str(file), "--which", "best", "--device", "cpu"]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    about, best = json.loads(file.with_suffix(".json").read_text()), json.loads((run / "selection.json").read_text())["best"]
    assert about["facts"]["step"] == best["step"] and about["facts"]["data"] == best["data"] and about["n_candidates"] == 2
    weights, kept = load_file(file.with_suffix(".safetensors")), load_file(run / best["checkpoint"])
    assert all(torch.equal(value, kept[name]) for name, value in weights.items())
    action = torch.export.load(file).module()(torch.zeros(3, 29), torch.zeros(6, 8), torch.zeros(2, 6, 8), torch.zeros(3, 2))
    assert action.shape == (3, 8)


class Film:
    """Stands in for the gymnasium environment: n steps, then done; its pictures are grey and grow lighter."""

    metadata = {"render_fps": 10}

    def __init__(self, n=6):
        self.n, self.t, self.closed = n, 0, False

    def reset(self, seed):
        return np.zeros(29), {}

    def step(self, action):
        assert action.shape == (8,) and np.abs(action).max() <= 1
        self.t += 1
        return np.zeros(29), float(self.t == self.n), self.t == self.n, False, {}

    def render(self):
        return np.full((8, 8, 3), 40 * self.t, np.uint8)

    def close(self):
        self.closed = True


def test_a_run_is_evaluated_by_each_rule_with_a_picture(tmp_path, data, capsys):
    run = train(data, tmp_path / "runs")
    before = (run / "log.jsonl").read_text()
    for which in ("last", "best", "offline", "offline_released"):
        capsys.readouterr()
        assert dql.main(["--eval", str(run), "--which", which, "--episodes", "3"]) == 0
        printed = capsys.readouterr().out
        step = json.loads((run / "selection.json").read_text())[which]["step"]
        assert f"{which} (update {step})" in printed and f"file tiny.hdf5 (task {ENV})" in printed
        assert "3 episodes" in printed
        assert (run / f"episodes_eval_{which}.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "log.jsonl").read_text() == before


def test_an_evaluation_uses_the_chosen_checkpoint(tmp_path, data, monkeypatch, no_pictures):
    run = train(data, tmp_path / "runs")
    selection = json.loads((run / "selection.json").read_text())
    selection["best"] |= {"checkpoint": "checkpoints/step_00000010.safetensors", "step": 10}
    (run / "selection.json").write_text(json.dumps(selection))
    seen = []
    monkeypatch.setattr(dql, "evaluate", lambda agent, task, config, n, step: seen.append(agent) or evaluated(task))
    assert dql.main(["--eval", str(run), "--which", "best"]) == 0
    kept = load_file(run / "checkpoints/step_00000010.safetensors")
    for name, network in seen[0].networks().items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, kept[f"{name}.{key}"]), f"{name}.{key}"


def evaluated(task):
    still = lambda states: np.zeros((len(states), 8))  # noqa: E731
    return 0.0, task.evaluate(still, 1, 0, n_threads=1)


def test_an_episode_is_filmed(tmp_path, data, monkeypatch, capsys, no_pictures):
    import gymnasium
    import imageio.v3 as iio

    run, film = train(data, tmp_path / "runs"), Film()
    monkeypatch.setattr(gymnasium, "make", lambda name, **how: film)
    assert dql.main(["--eval", str(run), "--render", str(tmp_path / "ant.gif")]) == 0
    frames = iio.imread(tmp_path / "ant.gif", index=None)
    assert frames.shape == (4, 8, 8, 3)  # the start and every second step
    assert [int(f.mean()) for f in frames] == pytest.approx([0, 80, 160, 240], abs=3)
    assert film.closed and "return 1.0" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and options

# The paper's table: eta, max-Q, reward tuning, epochs, gradient norm, top_k, rate.
PAPER = """
    halfcheetah-medium-v2          1.0   no   none       2000  9  1  3e-4
    hopper-medium-v2               1.0   no   none       2000  9  2  3e-4
    walker2d-medium-v2             1.0   no   none       2000  1  1  3e-4
    halfcheetah-medium-replay-v2   1.0   no   none       2000  2  0  3e-4
    hopper-medium-replay-v2        1.0   no   none       2000  4  2  3e-4
    walker2d-medium-replay-v2      1.0   no   none       2000  4  1  3e-4
    halfcheetah-medium-expert-v2   1.0   no   none       2000  7  0  3e-4
    hopper-medium-expert-v2        1.0   no   none       2000  5  2  3e-4
    walker2d-medium-expert-v2      1.0   no   none       2000  5  1  3e-4
    antmaze-umaze-v0               0.5   no   cql        1000  2  2  3e-4
    antmaze-umaze-diverse-v0       2.0   yes  cql        1000  3  2  3e-4
    antmaze-medium-play-v0         2.0   yes  cql        1000  2  1  1e-3
    antmaze-medium-diverse-v0      3.0   yes  cql        1000  1  1  3e-4
    antmaze-large-play-v0          4.5   yes  cql        1000 10  2  3e-4
    antmaze-large-diverse-v0       3.5   yes  cql        1000  7  1  3e-4
    pen-human-v1                   0.15  no   normalize  1000  7  2  3e-5
    pen-cloned-v1                  0.1   no   normalize  1000  8  2  3e-5
    kitchen-complete-v0            0.005 no   none        250  9  2  3e-4
    kitchen-partial-v0             0.005 no   none       1000 10  2  3e-4
    kitchen-mixed-v0               0.005 no   none       1000 10  0  3e-4
"""
PAPER = {row.split()[0]: row.split()[1:] for row in PAPER.strip().splitlines()}


@pytest.mark.parametrize("env", PAPER)
def test_a_task_has_the_papers_recipe(env):
    eta, max_q, reward_tune, epochs, grad_norm, top_k, lr = PAPER[env]
    config = dql.parse_arguments(["--env", env])
    assert config.env == env and config.algo == "ql"
    assert (config.eta, config.grad_norm, config.lr) == (float(eta), float(grad_norm), float(lr))
    assert (config.max_q_backup, config.reward_tune) == (max_q == "yes", reward_tune)
    assert (config.epochs, config.top_k) == (int(epochs), int(top_k))
    assert config.eval_episodes == (10 if env.endswith("v2") else 100)
    # The same for every task in the paper and the released code.
    assert (config.critic_lr, config.discount, config.tau, config.batch_size) == (3e-4, 0.99, 0.005, 256)
    assert (config.n_timesteps, config.schedule, config.hidden_dim, config.n_candidates) == (5, "vp", 256, 50)
    assert (config.ema_decay, config.ema_start, config.ema_every, config.lr_decay) == (0.995, 1000, 5, "none")
    assert (config.updates_per_epoch, config.eval_every) == (1000, 50)


def test_every_task_has_a_recipe():
    assert set(tasks.names()) == set(PAPER) == set(dql.RECIPES)


OVERRIDES = {
    "algo": "bc", "data": "/x.hdf5", "n_generated": 500, "seed": 7, "out": "elsewhere", "device": "cpu", "threads": 1, "epochs": 3,
    "updates_per_epoch": 10, "eval_every": 2, "eval_episodes": 5, "batch_size": 32, "n_timesteps": 10,
    "schedule": "cosine", "hidden_dim": 64, "eta": 0.25, "reward_tune": "normalize", "lr": 1e-4, "critic_lr": 2e-4,
    "lr_decay": "released", "grad_norm": 0.5, "discount": 0.9, "tau": 0.1, "ema_decay": 0.9, "ema_start": 0,
    "ema_every": 1, "n_candidates": 3, "top_k": 0, "which": "best", "episodes": 4,
    "backend": "eager", "precision": "tf32", "matmul_precision": "high",
}  # fmt: skip


@pytest.mark.parametrize("quick", [[], ["--quick"]], ids=["paper", "quick"])
def test_any_field_can_be_set_over_any_recipe(quick):
    env = ["--env", "antmaze-large-play-v0", *quick]
    flags = {"max_q_backup", "quick", "repair_data"}
    assert OVERRIDES.keys() | flags | {"env", "seeds", "resume", "eval", "export", "render"} == {f.name for f in dataclasses.fields(dql.Config)}
    recipe = dql.parse_arguments(env)
    for field, value in OVERRIDES.items():
        config = dql.parse_arguments([*env, f"--{field.replace('_', '-')}", str(value)])
        assert getattr(recipe, field) != value, "the test asks for what is there already"
        assert config == dataclasses.replace(recipe, **{field: value})
    assert dql.parse_arguments([*env, "--no-max-q-backup"]) == dataclasses.replace(recipe, max_q_backup=False)
    assert dql.parse_arguments([*env, "--seeds", "3", "1"]) == dataclasses.replace(recipe, seeds=(3, 1))


def comments():
    """Config's fields and what is said of each."""
    source = Path(dql.__file__).read_text().split("class Config:")[1].split("# ----")[0]
    lines = [line.split("  # ") for line in source.splitlines() if "  # " in line]
    return {field.split(":")[0].strip(): " ".join(comment.split()) for field, comment in lines}


@pytest.mark.parametrize("env", tasks.names())
def test_quick_changes_what_it_says_and_nothing_else(env):
    paper, quick = dql.parse_arguments(["--env", env]), dql.parse_arguments(["--env", env, "--quick"])
    changed = {k for k, v in dataclasses.asdict(quick).items() if v != getattr(paper, k)}
    assert changed <= {
        "quick", "epochs", "eval_every", "eval_episodes", "lr", "critic_lr", "lr_decay", "tau", "matmul_precision", "reward_tune",
        "eta", "max_q_backup"
    }  # fmt: skip
    assert (quick.lr, quick.critic_lr, quick.lr_decay, quick.tau) == (3e-3, 1e-3, "cosine", 0.02)
    assert quick.eval_episodes == min(paper.eval_episodes, 50)
    maze = tasks.get(env).family == "antmaze"
    assert (quick.reward_tune, quick.max_q_backup) == (("sparse", True) if maze else (paper.reward_tune, paper.max_q_backup))
    assert quick.eta == pytest.approx(0.1 * paper.eta)
    said = comments()["quick"]
    for words in (f"{quick.epochs} epochs", f"tau {quick.tau}", "at most 50 episodes", "3e-3", "1e-3", "0.1·η", "mazes: max-Q, sparse"):
        assert words in said


@pytest.mark.parametrize("precision", ["medium", "highest"])
def test_float32_products_are_computed_as_asked(precision):
    try:
        dql.choose_device(dql.Config(matmul_precision=precision, device="cpu"))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_help_shows_every_field_with_its_comment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        dql.main(["--env", "antmaze-large-play-v0", "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert comments().keys() == {f.name for f in dataclasses.fields(dql.Config)}
    for field, comment in comments().items():
        assert f"--{field.replace('_', '-')} " in shown.replace(",", " ")
        assert comment in shown
    assert "(default: 4.5)" in shown  # the recipe's, not the class's


# ---------------------------------------------------------------------------------------------------------------------
# Rates and rewards


def rates(config, n_updates):
    """The policy's and the critics' rate at each of n_updates updates."""
    agent = dql.make_agent(config, tasks.get(ENV), "cpu")
    rng = torch.Generator().manual_seed(0)
    shapes = (4, 29), (4, 8), (4, 29), (4, 1), (4, 1)
    found = []
    for _ in range(n_updates):
        agent.update([torch.randn(*shape, generator=rng) for shape in shapes])
        found.append([float(o.param_groups[0]["lr"]) for o in (agent.policy_optimizer, agent.critic_optimizer)])
    return np.array(found)


@pytest.mark.parametrize("kind, updates_a_step", [("none", 0), ("cosine", 2), ("released", 6)])
def test_rates_decay_as_named(kind, updates_a_step):
    sizes = dict(hidden_dim=16, n_timesteps=2, updates_per_epoch=2, eval_every=3, epochs=6)
    config = dataclasses.replace(dql.Config(lr=0.01, critic_lr=0.02, lr_decay=kind), **sizes)
    found = rates(config, 14)  # two updates more than the run has
    # torch's own cosine, stepped after every epoch, or after every evaluation as the released code does.
    optimizer = torch.optim.SGD([{"params": torch.zeros(1), "lr": 0.01}, {"params": torch.zeros(1), "lr": 0.02}])
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


@pytest.mark.parametrize("seed", range(3))
def test_iql_locomotion_scales_by_the_spread_of_trajectory_returns(seed):
    rng = np.random.default_rng(seed)
    n = 60
    states = rng.standard_normal((n + 1, 3)).astype(np.float32)
    observations, following = states[:-1], states[1:].copy()
    terminals = rng.random(n) < 0.1
    following[rng.choice(n, 5, replace=False)] += 1.0  # cut off: the next row starts somewhere else
    rewards = rng.standard_normal(n).astype(np.float32)

    returns, total = [], 0.0
    for i in range(n):
        total += float(rewards[i])
        if i == n - 1 or terminals[i] or not np.array_equal(observations[i + 1], following[i]):
            returns.append(total)
            total = 0.0
    tuned = dql.tune_rewards(
        rewards, "iql_locomotion", terminals=terminals, observations=observations, next_observations=following
    )
    assert len(returns) > 3 and tuned.dtype == np.float32
    np.testing.assert_allclose(tuned, rewards / (max(returns) - min(returns)) * 1000, rtol=1e-5)


def test_tuned_rewards_and_ends_reach_the_update(tmp_path):
    task = tasks.get(ENV)
    dataset = tasks.load(task, str(write_hdf5(tmp_path / "tiny.hdf5")), log=lambda line: None)
    transitions = dql.load_transitions(dql.Config(reward_tune="cql"), task, dataset, "cpu")
    assert len(transitions) == len(dataset)
    batch = transitions.sample(400, torch.Generator().manual_seed(0))
    rows = [np.flatnonzero((dataset.observations == state.numpy()).all(axis=1)).item() for state in batch.state]
    assert len(set(rows)) > 100 and len(set(rows)) < 400  # uniform, with replacement
    np.testing.assert_array_equal(batch.action, dataset.actions[rows])
    np.testing.assert_array_equal(batch.next_state, dataset.next_observations[rows])
    np.testing.assert_array_equal(batch.reward[:, 0], (dataset.rewards[rows] - 0.5) * 4)
    np.testing.assert_array_equal(batch.not_done[:, 0], 1.0 - dataset.terminals[rows])
