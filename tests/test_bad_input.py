"""Bad input by name. Each gets one line on stderr that says what is wrong, a non-zero exit, and nothing is lost."""

import errno
import json
import os
import re
import shutil

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import (
    ENV,
    TINY,
    Film,
    assert_same_run,
    draw_nothing,
    on_call,
    records,
    shorten_episodes,
    the_run,
    train,
    write_hdf5,
)

import dql
import tasks.fetch
from trainer import folder, loop

pytestmark = pytest.mark.usefixtures("short_episodes")


def refused(capsys, *options) -> str:
    """main's only line on stderr, after its non-zero exit."""
    capsys.readouterr()
    assert dql.main([str(o) for o in options]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), (
        stderr
    )
    return stderr.rstrip()


def stopped(capsys, *options) -> str:
    """The same for what is only noticed in the middle of training: the line then stands below the progress bar."""
    capsys.readouterr()
    assert dql.main([str(o) for o in options]) == 1
    *bars, line = re.split("[\r\n]+", capsys.readouterr().err.rstrip("\n"))
    assert line.startswith("error: ") and not any(
        "Traceback" in bar or "error" in bar for bar in bars
    )
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, not to be changed, and its data."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        shorten_episodes(patch.setitem)
        draw_nothing(patch.setattr)
        return train(write_hdf5(folder / "tiny.hdf5"), folder / "runs")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be broken."""
    return shutil.copytree(finished, tmp_path / "runs" / finished.name)


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_an_unknown_task_lists_the_nearest(capsys):
    message = refused(capsys, "--env", "antmaze-umase-v0")
    assert "'antmaze-umase-v0'" in message and "antmaze-umaze-v0" in message


@pytest.mark.parametrize(
    "option, known",
    [
        ("--algo", "ql, bc"),
        ("--schedule", "vp, linear, cosine"),
        ("--reward-tune", "none, cql, sparse, normalize, iql_antmaze, antmaze, iql_locomotion"),
        ("--lr-decay", "none, cosine, released"),
        ("--which", "last, best, offline, offline_released"),
        ("--backend", "auto, eager, compile, graph, fused"),
        ("--matmul-precision", "highest, high, medium"),
    ],
)
def test_an_unknown_choice_lists_the_known_ones(capsys, option, known):
    message = refused(capsys, option, "nonsense")
    assert option in message and "'nonsense'" in message and known in message


@pytest.mark.parametrize(
    "option, value",
    [
        ("--epochs", 0),
        ("--updates-per-epoch", 0),
        ("--eval-every", 0),
        ("--eval-episodes", 0),
        ("--batch-size", 0),
        ("--n-timesteps", 0),
        ("--hidden-dim", 0),
        ("--n-candidates", 0),
        ("--ema-every", 0),
        ("--top-k", -1),
        ("--threads", -1),
        ("--seed", -1),
        ("--seed", 2**31),
        ("--threads", 2**40),
        ("--ema-start", 10**30),
        ("--eta", -0.5),
        ("--eta", "nan"),
        ("--lr", -1e-3),
        ("--lr", "nan"),
        ("--grad-norm", -1),
        ("--discount", 1.5),
        ("--discount", "nan"),
        ("--tau", -0.1),
        ("--ema-decay", 2),
    ],
)
def test_a_number_no_run_can_have_is_refused(capsys, option, value):
    assert option in refused(capsys, f"{option}={value}")


@pytest.mark.parametrize(
    "options", [["--epochs", "many"], ["--no-such-option"], ["--env"], ["stray"], ["--quick=3"]]
)
def test_a_command_line_that_cannot_be_read_exits_non_zero(capsys, options):
    with pytest.raises(SystemExit) as end:
        dql.main(options)
    assert end.value.code not in (0, None)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", ""])
def test_a_device_that_cannot_be_used_is_refused(capsys, tmp_path, data, device):
    message = refused(
        capsys, *TINY, "--data", data, "--out", tmp_path / "runs", f"--device={device}"
    )
    assert "--device" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(capsys, data):
    assert "--device cuda" in refused(capsys, *TINY, "--data", data, "--device", "cuda")


def test_impossible_seeds_are_refused(capsys):
    assert "names a seed twice" in refused(capsys, "--seeds", "1", "2", "1")
    assert "less than 2**31, not 2147483648" in refused(capsys, "--seeds", "0", str(2**31))


def test_resume_and_eval_exclude_each_other(capsys, finished):
    assert "exclude" in refused(capsys, "--resume", finished, "--eval", finished)


@pytest.mark.parametrize("option", ["--resume", "--eval"])
def test_an_empty_name_of_a_run_does_not_start_a_new_one(capsys, tmp_path, option):
    assert option in refused(capsys, option, "", "--out", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_folder_for_runs_that_cannot_be_made_is_noticed_before_the_data_are_read(
    capsys, tmp_path, data
):
    (tmp_path / "file").touch()
    message = refused(
        capsys, *TINY, "--data", "no such file.hdf5", "--out", tmp_path / "file" / "runs"
    )
    assert str(tmp_path / "file") in message and "--out" in message


def test_an_export_takes_a_run_and_a_file(capsys, tmp_path, finished):
    assert "--export runs/NAME policy.pt2" in refused(capsys, "--export", finished)
    assert "exclude each other" in refused(
        capsys, "--export", finished, tmp_path / "policy.pt2", "--eval", finished
    )
    assert ".pt2" in refused(capsys, "--export", finished, tmp_path / "policy.onnx")
    assert str(tmp_path / "run") in refused(
        capsys, "--export", tmp_path / "run", tmp_path / "policy.pt2"
    )
    assert not (tmp_path / "policy.pt2").exists()


def test_filming_without_a_run_to_film_is_refused(capsys, data):
    assert "--eval" in refused(capsys, "--data", data, "--render", "ant.gif")


# ---------------------------------------------------------------------------------------------------------------------
# Data


def another_tasks_shape(path):
    write_hdf5(path, state_dim=17, action_dim=6)


def truncated(path):
    content = write_hdf5(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def with_nan(path):
    with h5py.File(write_hdf5(path), "r+") as file:
        file["observations"][7, 3] = np.nan


def outside_the_box(path):
    with h5py.File(write_hdf5(path), "r+") as file:
        file["actions"][7, 3] = 1.5


def text(path):
    path.write_text("not HDF5\n")


def missing(path):
    pass


@pytest.mark.parametrize(
    "make", [missing, text, truncated, another_tasks_shape, with_nan, outside_the_box]
)
def test_unusable_data_are_refused_before_a_run_is_begun(capsys, tmp_path, make):
    path = tmp_path / "bad.hdf5"
    make(path)
    assert str(path) in refused(capsys, *TINY, "--data", path, "--out", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_file_without_timeouts_is_cut_at_the_episode_limit(tmp_path, no_pictures):
    path = write_hdf5(tmp_path / "tiny.hdf5")
    with h5py.File(path, "r+") as file:
        del file["timeouts"]
    assert records(train(path, tmp_path / "runs"), "evaluation")


def test_d4rl_without_file_or_network_is_refused_and_not_substituted(capsys, tmp_path, monkeypatch):
    nobody = "http://127.0.0.1:9/"
    monkeypatch.setattr(tasks.fetch, "D4RL_URL", nobody)
    monkeypatch.setattr(tasks.fetch, "MIRROR_URL", nobody)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    message = refused(capsys, *TINY, "--data", "d4rl", "--out", tmp_path / "runs")
    assert "cannot download" in message and "--data generated" in message
    assert not (tmp_path / "runs").exists()


def test_a_d4rl_folder_that_cannot_be_written_is_named(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file" / "below"))
    assert str(tmp_path / "file") in refused(
        capsys, *TINY, "--data", "d4rl", "--out", tmp_path / "runs"
    )


def test_a_cache_folder_that_cannot_be_written_is_named(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert str(tmp_path / "file") in refused(
        capsys, *TINY, "--data", "generated", "--out", tmp_path / "runs"
    )


@pytest.mark.parametrize("how", ["normalize", "iql_locomotion"])
def test_rewards_that_cannot_be_scaled_are_refused(capsys, tmp_path, how):
    path = write_hdf5(tmp_path / "tiny.hdf5")
    with h5py.File(path, "r+") as file:
        file["rewards"][:] = 0
    assert "--reward-tune" in stopped(
        capsys, *TINY, "--data", path, "--out", tmp_path / "runs", "--reward-tune", how
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def test_a_run_folder_that_cannot_be_written_is_named(capsys, tmp_path, data):
    (tmp_path / "file").touch()
    message = refused(capsys, *TINY, "--data", data, "--out", tmp_path / "file")
    assert str(tmp_path / "file") in message and "--out" in message


@pytest.mark.parametrize("nth", [3, 4], ids=["the state", "a kept checkpoint"])
@pytest.mark.parametrize("what", ["save_file", "replace"])
def test_a_disk_full_while_saving_leaves_the_last_state(
    capsys, tmp_path, data, monkeypatch, no_pictures, what, nth
):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    straight = train(data, tmp_path / "straight")

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        owner = folder if what == "save_file" else os
        nth += what == "replace"  # config.json is moved first
        patch.setattr(owner, what, on_call(nth, getattr(owner, what), no_space))
        message = stopped(capsys, *TINY, "--data", data, "--out", tmp_path / "runs")
    assert "No space left" in message and "untouched" in message
    run = the_run(tmp_path / "runs")
    assert int(load_file(run / "resume.safetensors")["step"]) == (
        5 if nth - (what == "replace") == 3 else 10
    )
    assert not list(run.rglob("*.part"))
    assert dql.main(["--resume", str(run)]) == 0
    assert_same_run(run, straight)


def test_resuming_what_is_no_run_is_refused(capsys, tmp_path):
    for option in ("--resume", "--eval"):
        assert "not a run's folder" in refused(capsys, option, tmp_path / "nowhere")
        assert "not a run's folder" in refused(capsys, option, tmp_path)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(capsys, "--resume", tmp_path / "file")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"config": {"no_such_field": 1}}', '{"config": 3}']
)
@pytest.mark.parametrize("option", ["--resume", "--eval"])
def test_a_config_that_cannot_be_read_is_named(capsys, run, option, content):
    (run / "config.json").write_text(content)
    assert "config.json" in refused(capsys, option, run)


@pytest.mark.parametrize("content", ["", "{"])
def test_a_selection_that_cannot_be_read_is_named(capsys, run, content):
    (run / "selection.json").write_text(content)
    assert "selection.json" in refused(capsys, "--eval", run)


def test_a_run_without_an_evaluation_cannot_be_evaluated(capsys, run):
    (run / "selection.json").unlink()
    assert "selection.json" in refused(capsys, "--eval", run)


def test_a_broken_checkpoint_is_refused(capsys, run):
    path = run / "resume.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in refused(capsys, "--resume", run)
    kept = run / "checkpoints/step_00000020.safetensors"
    kept.write_bytes(b"")
    assert str(kept) in refused(capsys, "--eval", run)
    kept.unlink()
    assert str(kept) in refused(capsys, "--eval", run)


def of_another_size(tensors):
    return dql.DiffusionQL(29, 8, hidden_dim=32, n_timesteps=2).state_dict()


def without_the_step(tensors):
    return {k: v for k, v in tensors.items() if k != "step"}


def without_a_network(tensors):
    return {k: v for k, v in tensors.items() if not k.startswith("critic_target")}


def networks_alone(tensors):
    return {
        k: v
        for k, v in tensors.items()
        if k.startswith(("policy.", "policy_ema.", "critic.", "critic_target."))
    }


@pytest.mark.parametrize(
    "change", [of_another_size, without_the_step, without_a_network, networks_alone]
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(capsys, run, change):
    path = run / "resume.safetensors"
    save_file({k: v.contiguous().clone() for k, v in change(load_file(path)).items()}, path)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert str(path) in refused(capsys, "--resume", run)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_resuming_on_other_data_is_refused(capsys, run):
    config = json.loads((run / "config.json").read_text())
    write_hdf5(config["config"]["data"] + ".other", seed=1)
    config["config"]["data"] += ".other"
    (run / "config.json").write_text(json.dumps(config))
    before = (run / "log.jsonl").read_text()
    assert "not the same transitions" in refused(capsys, "--resume", run)
    assert (run / "log.jsonl").read_text() == before


@pytest.mark.parametrize(
    "option",
    [
        "--eta 3",
        "--env antmaze-large-play-v0",
        "--epochs 8",
        "--seed 1",
        "--algo bc",
        "--data other.hdf5",
        "--quick",
    ],
)
def test_resuming_with_another_option_is_refused(capsys, run, option):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert option.split()[0] in refused(capsys, "--resume", run, *option.split())
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_resuming_with_the_same_option_spelt_out_is_fine(run, no_pictures):
    assert dql.main(["--resume", str(run), "--env", ENV, "--epochs", "4"]) == 0


@pytest.mark.parametrize(
    "option", [("--hidden-dim", 32), ("--algo", "bc"), ("--env", "antmaze-large-play-v0")]
)
def test_evaluating_with_what_a_run_was_not_trained_with_is_refused(capsys, run, option):
    assert f"another {option[0]}" in refused(capsys, "--eval", run, *option)


# ---------------------------------------------------------------------------------------------------------------------
# In the middle of things


@pytest.mark.parametrize("error, whose", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual."), "the GPU's memory is full (CUDA out"),
    (MemoryError("Unable to allocate 7.45 GiB for an array"), "memory is full (Unable to allocate"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), "memory is full ([enforce"),
])  # fmt: skip
def test_a_full_memory_says_what_would_take_less(capsys, tmp_path, data, monkeypatch, error, whose):
    def full(self, batch, noise=None):
        raise error

    monkeypatch.setattr(dql.DiffusionQL, "update", full)
    message = stopped(capsys, *TINY, "--data", data, "--out", tmp_path / "out")
    assert whose in message and "--batch-size" in message


def act_with(monkeypatch, value):
    monkeypatch.setattr(
        dql.DiffusionQL, "act", lambda self, states, *_, **__: np.full((len(states), 8), value)
    )


def test_actions_outside_the_box_are_clipped(tmp_path, data, monkeypatch, no_pictures):
    act_with(monkeypatch, 1e3)
    far = train(data, tmp_path / "far")
    act_with(monkeypatch, 1.0)
    assert records(far) == records(train(data, tmp_path / "edge"))


def test_an_action_that_is_not_a_number_stops_the_evaluation(
    capsys, tmp_path, data, run, monkeypatch, no_pictures
):
    act_with(monkeypatch, np.nan)
    assert "NaN" in stopped(capsys, *TINY, "--data", data, "--out", tmp_path / "new")
    assert "NaN" in stopped(capsys, "--eval", run)


@pytest.mark.parametrize("algo", ["ql", "bc"])
@pytest.mark.parametrize("network", ["policy", "critic_target"])
def test_broken_networks_are_told_from_good_ones_when_evaluated(capsys, run, algo, network):
    if (algo, network) == ("bc", "critic_target"):
        pytest.skip("behaviour cloning does not ask the critics")
    path = run / "checkpoints/step_00000020.safetensors"
    tensors = load_file(path)
    broken = {k: v * float("nan") for k, v in tensors.items() if k.startswith(f"{network}.")}
    save_file(tensors | broken, path)
    stopped(capsys, "--eval", run, "--algo", algo)


def test_a_loss_that_turns_nan_keeps_the_last_good_checkpoint(
    capsys, tmp_path, data, monkeypatch, no_pictures
):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    whole, count = dql.DiffusionQL.update, 0

    def breaks(agent, *batch):
        nonlocal count
        count += 1
        metrics = whole(agent, *batch)
        return (
            metrics | {"critic_loss": metrics["critic_loss"] * float("nan")}
            if count == 13
            else metrics
        )

    with monkeypatch.context() as patch:
        patch.setattr(dql.DiffusionQL, "update", breaks)
        message = stopped(capsys, *TINY, "--data", data, "--out", tmp_path / "runs")
    assert "critic_loss became nan between updates 10 and 15" in message
    run = the_run(tmp_path / "runs")
    assert int(load_file(run / "resume.safetensors")["step"]) == 10
    assert [r["step"] for r in records(run)] == [5, 10, 10]
    assert dql.main(["--resume", str(run)]) == 0


def test_a_loss_that_explodes_by_itself_is_noticed(capsys, tmp_path, data, no_pictures):
    options = [*TINY, "--data", data, "--out", tmp_path / "runs", "--lr", "1e30"]
    message = stopped(capsys, *options)
    assert "between updates 0 and 5" in message
    tensors = load_file(the_run(tmp_path / "runs") / "resume.safetensors")
    assert int(tensors["step"]) == 0 and all(v.isfinite().all() for v in tensors.values())


@pytest.mark.parametrize("path", ["nowhere/ant.gif", "file/ant.gif"])
def test_a_film_that_cannot_be_written_is_refused(
    capsys, tmp_path, run, monkeypatch, path, no_pictures
):
    monkeypatch.setattr(gymnasium, "make", lambda name, **how: Film())
    (tmp_path / "file").touch()
    assert str(tmp_path / path) in stopped(capsys, "--eval", run, "--render", tmp_path / path)


def test_filming_without_opengl_says_what_to_install(
    capsys, tmp_path, run, monkeypatch, no_pictures
):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    assert "MUJOCO_GL" in stopped(capsys, "--eval", run, "--render", tmp_path / "ant.gif")
    assert not (tmp_path / "ant.gif").exists()
