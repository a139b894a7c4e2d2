"""trainer/folder.py: whole files or none, the log and its rewinding, the choice of checkpoints."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from trainer import folder, provenance
from trainer.folder import (
    RunError,
    RunFolder,
    load_json,
    load_tensors,
    save_json,
    save_tensors,
    select_checkpoints,
)


def evaluations(bc_loss, score=None):
    """One at each of the steps 0, 1, 2, ..."""
    score = score or list(range(len(bc_loss)))
    steps = range(len(bc_loss))
    return [
        dict(kind="evaluation", step=i, bc_loss=bc_loss[i], score=score[i], data="D") for i in steps
    ]


def steps(bc_loss, top_k, score=None):
    """rule -> the step that it selects"""
    selected = select_checkpoints(evaluations(bc_loss, score), top_k)
    return {rule: e["step"] for rule, e in selected.items()}


def error_of(call, *args) -> str:
    with pytest.raises(RunError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- Selection -----------------------------------------------------------------------------------


def test_the_four_rules_on_evaluations_worked_out_by_hand():
    # In order of BC loss the evaluations are 2, 4, 0, 1, 3: argsort(bc) == 1 holds at place 3.
    bc_loss, score = [0.3, 0.4, 0.1, 0.5, 0.2], [10.0, 70.0, 20.0, 5.0, 30.0]
    assert steps(bc_loss, 0, score) == {"last": 4, "best": 1, "offline": 2, "offline_released": 2}
    assert steps(bc_loss, 1, score) == {"last": 4, "best": 1, "offline": 4, "offline_released": 3}
    assert steps(bc_loss, 2, score) == {"last": 4, "best": 1, "offline": 0, "offline_released": 0}


@pytest.mark.parametrize("top_k", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_offline_rules_are_the_papers_and_the_released_one(seed, top_k):
    bc_loss = np.random.default_rng(seed).permutation(7) / 10
    chosen = steps(bc_loss.tolist(), top_k)
    assert (bc_loss < bc_loss[chosen["offline"]]).sum() == top_k
    assert chosen["offline_released"] == np.flatnonzero(np.argsort(bc_loss) == top_k)[0]


def test_the_first_of_equally_good_evaluations_is_the_best():
    assert steps([0.3, 0.2, 0.1], 0, score=[0.0, 5.0, 5.0])["best"] == 1


def test_few_evaluations_select_the_largest_bc_loss():
    """Fewer than the rank asks for."""
    assert steps([0.2], 2) == {"last": 0, "best": 0, "offline": 0, "offline_released": 0}
    assert steps([0.1, 0.2], 2) == {"last": 1, "best": 1, "offline": 1, "offline_released": 1}
    assert steps([0.2, 0.1], 2)["offline"] == 0


# ---- Files ---------------------------------------------------------------------------------------


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {
        "weights": torch.randn(3, 4),
        "step": torch.tensor(7),
        "generator": torch.Generator().manual_seed(0).get_state(),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"score": 1.5, "data": "GENERATED é"})
    loaded, about = load_tensors(tmp_path / "a.safetensors")
    assert about == {"score": 1.5, "data": "GENERATED é"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(-1).nan_to_num(9), tensor.reshape(-1).nan_to_num(9))


def test_views_of_one_vector_can_be_saved(tmp_path):
    vector = torch.arange(10.0)
    save_tensors(tmp_path / "a.safetensors", {"a": vector[:4], "b": vector[4:]})
    loaded, _ = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(loaded["a"], vector[:4]) and torch.equal(loaded["b"], vector[4:])


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_as_the_library_says_it(tensors, path, metadata):
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })")


FULL_DISKS = [
    (folder, "save_file", full_disk),
    (folder, "save_file", full_disk_as_the_library_says_it),
    (os, "replace", full_disk),
]


@pytest.mark.parametrize("owner, name, fails", FULL_DISKS)
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch, owner, name, fails):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(3)})
    monkeypatch.setattr(owner, name, fails)
    message = error_of(save_tensors, path, {"x": torch.zeros(3)})
    assert str(path) in message and "untouched" in message
    assert torch.equal(load_tensors(path)[0]["x"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    save_json(path, {"x": 1})
    with pytest.raises(TypeError):
        save_json(path, {"x": object()})
    monkeypatch.setattr(os, "replace", full_disk)
    error_of(save_json, path, {"x": 2})
    assert load_json(path) == {"x": 1} and list(tmp_path.iterdir()) == [path]


BROKEN = {"empty": b"", "garbage": b"\x10" * 100, "huge header": b"\xff" * 9, "cut": None}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    message = error_of(load_tensors, path)
    assert str(path) in message and "broken" in message


def test_a_missing_checkpoint_or_folder_is_named(tmp_path):
    assert "no checkpoint" in error_of(load_tensors, tmp_path / "a.safetensors")
    assert "not a run's folder" in error_of(RunFolder(tmp_path / "nowhere").config)
    assert "not a run's folder" in error_of(RunFolder(tmp_path).config)
    (tmp_path / "config.json").write_text('{"config": ')
    assert "cannot be read" in error_of(RunFolder(tmp_path).config)
    (tmp_path / "file").touch()
    error_of(RunFolder(tmp_path / "file").config)


# ---- The folder ----------------------------------------------------------------------------------


def test_runs_of_one_name_get_folders_of_their_own(tmp_path):
    made = [{"config": {}, "data": {"crc32": n}, "versions": {}} for n in range(3)]
    runs = [RunFolder.create(str(tmp_path / "a/b"), "run", config) for config in made]
    assert [run.path.name for run in runs] == ["run", "run-2", "run-3"]
    assert [run.config() for run in runs] == made


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = error_of(RunFolder.create, str(tmp_path / "file"), "run", {})
    assert str(tmp_path / "file") in message and "--out" in message
    assert "--out" in error_of(RunFolder.create, str(tmp_path / "file/below"), "run", {})


@pytest.fixture
def run(tmp_path):
    run = RunFolder.create(str(tmp_path), "run", {})
    for step in (5, 10, 15):
        run.log("epoch", step, bc_loss=0.1 * step)
        if step == 10:
            run.log("evaluation", step, score=50.0, bc_loss=0.75, data="D")
    return run


def test_the_log_is_one_json_object_a_line(run):
    lines = (run.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.records
    evaluation = {"kind": "evaluation", "step": 10, "score": 50.0, "bc_loss": 0.75, "data": "D"}
    assert run.records[2] == evaluation
    assert run.evaluations() == [run.records[2]]


def test_rewinding_drops_what_will_be_made_again(run):
    again = RunFolder(run.path)
    again.rewind_log(10)
    left = [(r["kind"], r["step"]) for r in again.records]
    assert left == [("epoch", 5), ("epoch", 10), ("evaluation", 10)]
    again.log("epoch", 15, bc_loss=1.0)
    last = RunFolder(run.path)
    last.rewind_log(100)
    assert last.records == again.records and last.records[-1]["bc_loss"] == 1.0


HALF_LINES = ['{"kind": "epoch", "st', '{"kind": "epoch", "step": 20}', '{"ki\n{"kind"', "\x00\x00"]


@pytest.mark.parametrize("half", HALF_LINES)
def test_a_line_cut_short_by_a_kill_is_dropped(run, half):
    with open(run.path / "log.jsonl", "a") as file:
        file.write(half)
    again = RunFolder(run.path)
    again.rewind_log(15)
    assert again.records == run.records
    again.log("epoch", 20, bc_loss=2.0)
    lines = (run.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 10, 15, 20]


def test_a_run_killed_before_its_first_record_has_no_log(tmp_path):
    run = RunFolder.create(str(tmp_path), "run", {})
    run.rewind_log(0)
    assert run.records == []


def test_a_log_that_cannot_be_written_is_an_error_in_one_line(run):
    (run.path / "log.jsonl").unlink()
    (run.path / "log.jsonl").mkdir()
    assert "checkpoints are untouched" in error_of(lambda: run.log("epoch", 20, bc_loss=1.0))


def test_selection_names_each_rules_checkpoint_and_data(run):
    selection = run.select(top_k=1)
    assert selection == load_json(run.path / "selection.json")
    expected = {"checkpoint": "checkpoints/step_00000010.safetensors", "step": 10}
    expected |= {"score": 50.0, "data": "D"}
    assert selection == {rule: expected for rule in ("last", "best", "offline", "offline_released")}


def test_the_curve_is_drawn_to_a_whole_file(run):
    run.draw_curve("title")
    assert (run.path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.path.glob(".*"))


def test_a_run_says_of_which_commit_it_is(monkeypatch):
    """Nothing where git is missing."""
    assert provenance.describe()["commit"] == provenance.commit()
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == ""
    monkeypatch.setenv("DQL_COMMIT", "abc1234")  # as a node of a cluster is told
    assert provenance.describe()["commit"] == "abc1234"
