"""Broken runs and runs asked for what they are not get one line, and nothing of them is lost."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import ENV, files_of, refused, stopped, write_hdf5

import dql

pytestmark = pytest.mark.usefixtures("short_episodes")


def test_resuming_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    for option in ("--resume", "--eval"):
        assert "not a run's folder" in refused(capsys, option, tmp_path / "nowhere")
        assert "not a run's folder" in refused(capsys, option, tmp_path)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(capsys, "--resume", tmp_path / "file")


NO_CONFIGS = ["", "{", "[]", "{}", '{"config": {"no_such_field": 1}}', '{"config": 3}']


@pytest.mark.parametrize("content", NO_CONFIGS)
@pytest.mark.parametrize("option", ["--resume", "--eval"])
def test_a_config_that_cannot_be_read_is_named(capsys, run, option, content):
    (run / "config.json").write_text(content)
    assert "config.json" in refused(capsys, option, run)


WRONG = {
    "epochs": ["4", None, [4], 4.0, True, float("inf"), 0],
    "seed": [1.5, -1],
    "batch_size": ["256"],
    "eta": [None, float("nan"), float("inf")],
    "schedule": ["other", 3],
    "env": [["antmaze-umaze-v0"]],
    "quick": [1],
    "no_such_option": [0],
}


@pytest.mark.parametrize("name, value", [(k, v) for k, values in WRONG.items() for v in values])
def test_an_option_of_another_type_is_named(capsys, run, name, value):
    config = json.loads((run / "config.json").read_text())
    config["config"][name] = value
    (run / "config.json").write_text(json.dumps(config))
    for option in ("--resume", "--eval"):
        message = refused(capsys, option, run)
        assert name.replace("_", "-") in message.replace("_", "-")


@pytest.mark.parametrize("part", ["config", "data", "versions", "crc32"])
@pytest.mark.parametrize("option", ["--resume", "--eval"])
def test_a_config_that_lacks_a_part_is_refused(capsys, run, option, part):
    config = json.loads((run / "config.json").read_text())
    config.pop(part, None), config.get("data", {}).pop(part, None)
    (run / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused(capsys, option, run)


@pytest.mark.parametrize("name", ["config.json", "selection.json"])
def test_deeply_nested_files_are_refused(capsys, run, name):
    (run / name).write_text("[" * 100_000)
    assert name in refused(capsys, "--eval" if name == "selection.json" else "--resume", run)


@pytest.mark.parametrize("content", ["", "[" * 100_000])
def test_a_log_that_has_lost_epochs_is_refused(capsys, run, content):
    (run / "log.jsonl").write_text(content)
    assert "has 0 of the 4 epochs" in refused(capsys, "--resume", run)


STEPS = [-5, 25, 1 << 60]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_the_run_does_not_have_is_refused(capsys, run, step):
    path = run / "resume.safetensors"
    save_file(load_file(path) | {"step": torch.tensor(step)}, path)
    assert "which a run of 20 does not have" in refused(capsys, "--resume", run)


@pytest.mark.parametrize("about", ["[]", "{", '{"sums": 3}', '{"sums": {"bc_loss": "1"}}'])
def test_sums_that_cannot_be_are_refused(capsys, run, about):
    path = run / "resume.safetensors"
    save_file(load_file(path), path, {"json": about})
    assert str(path) in refused(capsys, "--resume", run)


def test_a_generator_of_another_kind_is_refused(capsys, run):
    path = run / "resume.safetensors"
    save_file(load_file(path) | {"generator": torch.zeros(5056)}, path)
    assert str(path) in refused(capsys, "--resume", run)


def test_a_selection_cannot_lead_out_of_its_folder(run, tmp_path, no_pictures):
    """The checkpoint is that of the step, whatever its path says."""
    selection = json.loads((run / "selection.json").read_text())
    selection["last"]["checkpoint"] = "../../other.safetensors"
    (run / "selection.json").write_text(json.dumps(selection))
    assert dql.main(["--eval", str(run), "--episodes", "1"]) == 0


SELECTIONS = [[], {}, {"last": 3}, {"last": {"step": "../x", "score": 1.0, "data": "D"}}]


@pytest.mark.parametrize("content", SELECTIONS)
def test_a_selection_of_another_kind_is_refused(capsys, run, content):
    (run / "selection.json").write_text(json.dumps(content))
    assert "selection.json does not say which" in refused(capsys, "--eval", run)


RECORDS = ["3", "[]", "{}", '{"kind": "epoch"}', '{"kind": "evaluation", "step": 5}']
RECORDS += ['{"kind": "epoch", "step": 5, "bc_loss": NaN}', '{"kind": "epoch", "step": "5"}']


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_of_another_kind_is_named_by_its_line(capsys, run, record):
    path = run / "log.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, record, *others]) + "\n")
    assert f"line 2 of {path}" in refused(capsys, "--resume", run)


def test_a_folder_in_a_leftover_file_s_place_is_named(capsys, run):
    (run / ".resume.safetensors.12345678.part").mkdir()
    assert str(run) in refused(capsys, "--resume", run)


@pytest.mark.parametrize("content", ["", "{"])
def test_a_selection_that_cannot_be_read_is_named(capsys, run, content):
    (run / "selection.json").write_text(content)
    assert "selection.json" in refused(capsys, "--eval", run)


def test_a_run_without_an_evaluation_cannot_be_evaluated(capsys, run):
    (run / "selection.json").unlink()
    message = refused(capsys, "--eval", run)
    assert "not been evaluated yet, it is after 10 updates" in message and "--resume" in message


def test_a_broken_checkpoint_is_refused(capsys, run):
    path = run / "resume.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in refused(capsys, "--resume", run)
    kept = run / "checkpoints/step_00000020.safetensors"
    kept.write_bytes(b"")
    assert str(kept) in refused(capsys, "--eval", run)
    kept.unlink()
    assert str(kept) in refused(capsys, "--eval", run)


NETWORKS = ("policy.", "policy_ema.", "critic.", "critic_target.")


def of_another_size(tensors):
    return dql.DiffusionQL(29, 8, hidden_dim=32, n_timesteps=2).state_dict()


def without_the_step(tensors):
    return {k: v for k, v in tensors.items() if k != "step"}


def without_a_network(tensors):
    return {k: v for k, v in tensors.items() if not k.startswith("critic_target")}


def networks_alone(tensors):
    return {k: v for k, v in tensors.items() if k.startswith(NETWORKS)}


UNFIT = [of_another_size, without_the_step, without_a_network, networks_alone]


@pytest.mark.parametrize("change", UNFIT)
def test_a_checkpoint_that_does_not_fit_is_refused(capsys, run, change):
    """And stays as it is."""
    path = run / "resume.safetensors"
    save_file({k: v.contiguous().clone() for k, v in change(load_file(path)).items()}, path)
    before = files_of(run)
    assert str(path) in refused(capsys, "--resume", run)
    assert files_of(run) == before


@pytest.mark.parametrize("algo", ["ql", "bc"])
@pytest.mark.parametrize("network", ["policy", "critic_target"])
def test_evaluating_a_broken_network_is_an_error(capsys, run, algo, network):
    if (algo, network) == ("bc", "critic_target"):
        pytest.skip("behaviour cloning does not ask the critics")
    path = run / "checkpoints/step_00000020.safetensors"
    tensors = load_file(path)
    broken = {k: v * float("nan") for k, v in tensors.items() if k.startswith(f"{network}.")}
    save_file(tensors | broken, path)
    stopped(capsys, "--eval", run, "--algo", algo)


# ---- Runs asked for what they are not ------------------------------------------------------------


def test_resuming_on_other_data_is_refused(capsys, run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["config"]["data"] = str(write_hdf5(tmp_path / "other.hdf5", seed=1))
    (run / "config.json").write_text(json.dumps(config))
    before = (run / "log.jsonl").read_text()
    assert "not the same transitions" in refused(capsys, "--resume", run)
    assert (run / "log.jsonl").read_text() == before


OTHER = ["--eta 3", "--env antmaze-large-play-v0", "--epochs 3", "--seed 1", "--algo bc"]
OTHER += ["--decay-epochs 2", "--quick"]


@pytest.mark.parametrize("option", OTHER)
def test_resuming_with_another_option_is_refused(capsys, run, option):
    before = files_of(run)
    assert option.split()[0] in refused(capsys, "--resume", run, *option.split())
    assert files_of(run) == before


def test_resuming_with_the_same_option_spelt_out_is_fine(run, no_pictures):
    assert dql.main(["--resume", str(run), "--env", ENV, "--epochs", "4"]) == 0


@pytest.mark.parametrize("option", ["--hidden-dim 32", "--algo bc", "--env antmaze-large-play-v0"])
def test_evaluating_another_kind_of_run_is_refused(capsys, run, option):
    """With an option that it was not trained with."""
    message = refused(capsys, "--eval", run, *option.split())
    assert f"another {option.split()[0]}" in message
