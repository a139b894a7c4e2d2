"""Bad options and bad data get one line that says what is wrong, and no run is begun.

Runs that are broken are in test_bad_runs.py, what goes wrong during training in test_failures.py.
"""

import h5py
import numpy as np
import pytest
import torch
from tiny_runs import TINY, records, refused, stopped, train, write_hdf5

import dql
import tasks

pytestmark = pytest.mark.usefixtures("short_episodes")


# ---- Options -------------------------------------------------------------------------------------


def test_an_unknown_task_lists_the_nearest(capsys):
    message = refused(capsys, "--env", "antmaze-umase-v0")
    assert "'antmaze-umase-v0'" in message and "antmaze-umaze-v0" in message


CHOICES = {
    "--algo": "ql, bc",
    "--schedule": "vp, linear, cosine",
    "--reward-tune": "none, cql, sparse, normalize, iql_antmaze, antmaze, iql_locomotion",
    "--lr-decay": "none, cosine, released",
    "--which": "last, best, offline, offline_released",
    "--backend": "auto, eager, compile, graph, fused",
    "--matmul-precision": "highest, high, medium",
}


@pytest.mark.parametrize("option, known", CHOICES.items(), ids=CHOICES)
def test_an_unknown_choice_lists_the_known_ones(capsys, option, known):
    message = refused(capsys, option, "nonsense")
    assert option in message and "'nonsense'" in message and known in message


IMPOSSIBLE = """
    --epochs=0 --updates-per-epoch=0 --eval-every=0 --eval-episodes=0 --batch-size=0
    --n-timesteps=0 --hidden-dim=0 --n-candidates=0 --ema-every=0 --top-k=-1 --threads=-1 --seed=-1
    --seed=2147483648 --threads=1099511627776 --threads=1025 --decay-epochs=-1
    --eta=inf --ema-start=1000000000000000000000000000000
    --eta=-0.5 --eta=nan --lr=-0.001 --lr=nan --grad-norm=-1 --discount=1.5 --discount=nan
    --tau=-0.1 --ema-decay=2
"""


@pytest.mark.parametrize("argument", IMPOSSIBLE.split())
def test_an_impossible_number_is_refused(capsys, argument):
    assert argument.split("=")[0] in refused(capsys, argument)


UNREADABLE = ["--epochs many", "--no-such-option", "--env", "stray", "--quick=3"]


@pytest.mark.parametrize("options", UNREADABLE)
def test_a_command_line_that_cannot_be_read_exits_non_zero(capsys, options):
    with pytest.raises(SystemExit) as end:
        dql.main(options.split())
    assert end.value.code not in (0, None)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", ""])
def test_a_device_that_cannot_be_used_is_refused(capsys, tmp_path, data, device):
    where = ["--data", data, "--out", tmp_path / "runs"]
    assert "--device" in refused(capsys, *TINY, *where, f"--device={device}")
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


def test_an_unusable_out_is_noticed_before_data_are_read(capsys, tmp_path):
    (tmp_path / "file").touch()
    where = ["--data", "no such file.hdf5", "--out", tmp_path / "file" / "runs"]
    message = refused(capsys, *TINY, *where)
    assert str(tmp_path / "file") in message and "--out" in message


def test_a_file_as_out_is_named(capsys, tmp_path, data):
    (tmp_path / "file").touch()
    message = refused(capsys, *TINY, "--data", data, "--out", tmp_path / "file")
    assert str(tmp_path / "file") in message and "--out" in message


def test_an_export_takes_a_run_and_a_file(capsys, tmp_path, finished):
    file, no_run = tmp_path / "policy.pt2", tmp_path / "run"
    assert "--export runs/NAME policy.pt2" in refused(capsys, "--export", finished)
    both = refused(capsys, "--export", finished, file, "--eval", finished)
    assert "exclude each other" in both
    assert ".pt2" in refused(capsys, "--export", finished, tmp_path / "policy.onnx")
    assert str(no_run) in refused(capsys, "--export", no_run, file)
    assert not file.exists()


@pytest.mark.parametrize("name", ["x.mp4", "x", "nowhere/x.gif", "file/x.gif", "folder.gif"])
def test_a_film_is_refused_before_the_evaluation(capsys, tmp_path, finished, monkeypatch, name):
    (tmp_path / "file").touch(), (tmp_path / "folder.gif").mkdir()
    monkeypatch.setattr(tasks.Task, "evaluate", None)
    film = tmp_path / name
    assert str(film) in refused(capsys, "--eval", finished, "--render", film)


def test_a_home_that_is_nobody_s_is_named(capsys):
    assert "~no-such-user/x" in refused(capsys, "--data", "~no-such-user/x.hdf5")


def test_filming_without_a_run_to_film_is_refused(capsys, data):
    assert "--eval" in refused(capsys, "--data", data, "--render", "ant.gif")


# ---- Data ----------------------------------------------------------------------------------------


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


UNUSABLE = [missing, text, truncated, another_tasks_shape, with_nan, outside_the_box]


@pytest.mark.parametrize("make", UNUSABLE)
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


def test_d4rl_data_are_never_substituted(capsys, tmp_path, d4rl_folder):
    message = refused(capsys, *TINY, "--data", "d4rl", "--out", tmp_path / "runs")
    assert "cannot download" in message and "--data generated" in message
    assert not (tmp_path / "runs").exists()


FOLDERS = {"d4rl": "D4RL_DATASET_DIR", "generated": "XDG_CACHE_HOME"}


@pytest.mark.parametrize("source", FOLDERS)
def test_a_data_folder_that_cannot_be_written_is_named(capsys, tmp_path, monkeypatch, source):
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDERS[source], str(tmp_path / "file" / "below"))
    message = refused(capsys, *TINY, "--data", source, "--out", tmp_path / "runs")
    assert str(tmp_path / "file") in message


@pytest.mark.parametrize("how", ["normalize", "iql_locomotion"])
def test_rewards_that_cannot_be_scaled_are_refused(capsys, tmp_path, how):
    path = write_hdf5(tmp_path / "tiny.hdf5")
    with h5py.File(path, "r+") as file:
        file["rewards"][:] = 0
    where = ["--data", path, "--out", tmp_path / "runs"]
    assert "--reward-tune" in stopped(capsys, *TINY, *where, "--reward-tune", how)
