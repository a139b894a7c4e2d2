"""--eval and --export: a finished run by the command line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ENV, Film, selection_of

import dql
import tasks
from trainer import evaluation, folder, setup
from trainer.options import saved_options

pytestmark = pytest.mark.usefixtures("short_episodes")


def test_a_run_is_exported_by_its_chosen_checkpoint(tmp_path, run, capsys):
    """With what is known of it; and the program acts as the agent of that checkpoint."""
    file, best = tmp_path / "policy.pt2", selection_of(run)["best"]
    assert dql.main(["--export", str(run), str(file), "--which", "best", "--device", "cpu"]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    about = json.loads(file.with_suffix(".json").read_text())
    facts = about["facts"]
    assert all(facts[name] == best[name] for name in ("step", "score", "data"))
    assert facts["task"] == ENV and facts["versions"]["torch"] and about["n_candidates"] == 2
    weights, kept = load_file(file.with_suffix(".safetensors")), load_file(run / best["checkpoint"])
    assert weights and all(torch.equal(value, kept[name]) for name, value in weights.items())

    agent = setup.make_agent(saved_options(run), tasks.get(ENV), "cpu")
    folder.restore(agent, run / best["checkpoint"], weights_only=True)
    g = torch.Generator().manual_seed(0)
    state, x_T, noises = (torch.randn(*n, generator=g) for n in ((3, 29), (6, 8), (2, 6, 8)))
    first = torch.tensor([[1e9, 0.0]] * 3)  # in place of Gumbel noise: the first candidate
    action = torch.export.load(file).module()(state, x_T, noises, first)
    expected = agent.policy.sample(state, x_T=x_T, noises=noises).detach()[::2]
    torch.testing.assert_close(action, expected)


def test_a_run_is_evaluated_by_each_rule_with_a_picture(run, capsys):
    before = (run / "log.jsonl").read_text()
    for which, chosen in selection_of(run).items():
        capsys.readouterr()
        assert dql.main(["--eval", str(run), "--which", which, "--episodes", "3"]) == 0
        printed = capsys.readouterr().out
        assert f"{which} (update {chosen['step']})" in printed
        assert f"file tiny.hdf5 (task {ENV})" in printed and "3 episodes" in printed
        assert (run / f"episodes_eval_{which}.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "log.jsonl").read_text() == before


def test_an_evaluation_uses_the_chosen_checkpoint(run, monkeypatch, no_pictures):
    selection = selection_of(run)
    selection["best"] |= {"checkpoint": "checkpoints/step_00000010.safetensors", "step": 10}
    (run / "selection.json").write_text(json.dumps(selection))
    agents = []

    def evaluate(act, task, *_):
        agents.append(act.agent)
        still = lambda states: np.zeros((len(states), 8))  # noqa: E731
        return 0.0, task.evaluate(still, 1, 0, n_threads=1)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert dql.main(["--eval", str(run), "--which", "best"]) == 0
    kept = load_file(run / "checkpoints/step_00000010.safetensors")
    for name, network in agents[0].networks().items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, kept[f"{name}.{key}"]), f"{name}.{key}"


def test_an_episode_is_filmed(tmp_path, run, monkeypatch, capsys, no_pictures):
    import gymnasium
    import imageio.v3 as iio

    film = Film()
    monkeypatch.setattr(gymnasium, "make", lambda name, **how: film)
    assert dql.main(["--eval", str(run), "--render", str(tmp_path / "ant.gif")]) == 0
    frames = iio.imread(tmp_path / "ant.gif", index=None)
    assert frames.shape == (4, 8, 8, 3)  # the start and every second step
    assert [int(f.mean()) for f in frames] == pytest.approx([0, 80, 160, 240], abs=3)
    assert film.closed and "return 1.0" in capsys.readouterr().out
