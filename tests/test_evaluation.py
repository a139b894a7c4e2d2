"""trainer/evaluation.py and --export: a finished run by the command line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ENV, Film, train

import dql
from trainer import evaluation

pytestmark = pytest.mark.usefixtures("short_episodes")


def test_a_run_is_exported_by_its_chosen_checkpoint(tmp_path, data, no_pictures, capsys):
    run, file = train(data, tmp_path / "runs"), tmp_path / "policy.pt2"
    assert dql.main(["--export", str(run), str(file), "--which", "best", "--device", "cpu"]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    about, best = (
        json.loads(file.with_suffix(".json").read_text()),
        json.loads((run / "selection.json").read_text())["best"],
    )
    assert (
        about["facts"]["step"] == best["step"]
        and about["facts"]["data"] == best["data"]
        and about["n_candidates"] == 2
    )
    weights, kept = load_file(file.with_suffix(".safetensors")), load_file(run / best["checkpoint"])
    assert all(torch.equal(value, kept[name]) for name, value in weights.items())
    action = torch.export.load(file).module()(
        torch.zeros(3, 29), torch.zeros(6, 8), torch.zeros(2, 6, 8), torch.zeros(3, 2)
    )
    assert action.shape == (3, 8)


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
    fake = lambda act, task, *_: seen.append(act.agent) or evaluated(task)  # noqa: E731
    monkeypatch.setattr(evaluation, "evaluate", fake)
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
