"""experiments/bandit.py: what the paper shows comes out at a small budget, and the command.

Bounds on trained policies leave a margin to what several seeds gave, which is beside them. The full
recipe's claims are tested on the committed experiments/results/bandit.json.
"""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

import kernels
from experiments import bandit
from experiments.bandit import Recipe
from experiments.bandit_data import draw_actions, figures, shares, transitions
from experiments.bandit_pictures import CRITICS_FIRST
from experiments.bandit_policies import CLIMBING, CLONING, DIFFUSION, METHODS, train
from trainer.folder import load_tensors

TRANSITIONS = transitions()
DATA = draw_actions(np.random.default_rng(5), 1000)


def trained(name, updates, lr, critic_first=0, n_timesteps=0):
    """A policy trained with a decaying rate."""
    method = METHODS[name](eta=2.5, n_timesteps=n_timesteps, lr=lr, seed=0)
    train(method, TRANSITIONS, updates, decay=True, critic_first=critic_first)
    return method


def figures_of(*how, **more):
    return figures(trained(*how, **more).sample(1000).numpy(), DATA)


# ---- What the paper shows ------------------------------------------------------------------------


def test_diffusion_clones_all_four_modes():
    found = figures_of("BC-Diffusion", 2000, 3e-3, n_timesteps=50)
    assert found["outside"] < 0.10  # four seeds: 0.044 to 0.063
    assert all(0.15 < share < 0.35 for share in found["shares"].values())  # 0.222 to 0.258
    assert found["mmd"] < 0.08  # 0.040 to 0.045; two draws of the data: 0.029


def test_a_gaussian_does_not_clone_the_modes():
    found = figures_of("BC-MLE", 500, 6e-3)
    assert found["outside"] > 0.90  # three seeds: 0.968 to 0.974
    assert found["mmd"] > 0.3  # 0.405 to 0.408


def test_diffusion_with_q_goes_to_the_best_corner():
    # Five steps, 800 updates. The full recipe's figures are asserted below.
    found = figures_of("Diffusion-QL", 800, 6e-3, 6000, n_timesteps=5)
    # Four seeds: 0.715 to 0.848; with only 2,000 updates of the critics first 0.188.
    assert found["shares"]["lower right"] > 0.65
    assert found["reward"] > 3.2  # 3.58 to 4.24
    assert sum(found["shares"].values()) - found["shares"]["lower right"] < 0.02  # at most 0.001


@pytest.mark.parametrize("name", ["TD3+BC", "BCQ", "BEAR-MMD"])
def test_the_baselines_with_q_miss_the_best_corner(name):
    found = figures_of(name, 400, 6e-3, 500)
    assert found["reward"] < 1.0  # two seeds each: at most 0.26
    assert found["shares"]["lower right"] < 0.2  # 0.025


@pytest.fixture(scope="module")
def full():
    """The committed runs of the full recipe: name -> one for each seed."""
    path, wanted = ROOT / "experiments/results/bandit.json", {"data", *METHODS, CRITICS_FIRST}
    results = json.loads(path.read_text()) if path.exists() else {}
    if not results or results["quick"] or set(results["methods"]) != wanted:
        pytest.skip("the full recipe's results are not there")
    assert all(len(runs) >= 3 for name, runs in results["methods"].items() if name != "data")
    return results["methods"]


def goes_to_the_best_corner(runs, full):
    others = [name for name in CLIMBING if name != "Diffusion-QL"]
    most = max(4.5, *(run["reward"] for name in others for run in full[name]))
    return all(run["shares"]["lower right"] >= 0.90 and run["reward"] > most for run in runs)


def test_the_full_recipe_clones_as_the_paper_shows(full):
    others = [name for name in CLONING if name != "BC-Diffusion"]
    for run in full["BC-Diffusion"]:
        assert run["outside"] <= 0.10
        assert all(0.15 <= share <= 0.35 for share in run["shares"].values())
        assert all(run["mmd"] < other["mmd"] for name in others for other in full[name])
    assert all(run["outside"] > 0.10 for run in full["BC-MLE"])


def test_the_full_recipe_with_critics_first_finds_the_best(full):
    """As the paper shows."""
    assert goes_to_the_best_corner(full[CRITICS_FIRST], full)


EDGE = "as released two of three seeds end at the edge of the square: README"


@pytest.mark.xfail(strict=True, reason=EDGE)
def test_the_full_recipe_as_released_finds_the_best(full):
    assert goes_to_the_best_corner(full["Diffusion-QL"], full)


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command at a budget of a few updates, in folders of its own -> call it with options"""
    monkeypatch.setattr(bandit, "POLICIES", tmp_path / "policies")
    monkeypatch.setattr(bandit, "STEPS", (2, 3))
    monkeypatch.setattr(bandit, "SAMPLES", 64)
    monkeypatch.setattr(bandit, "QUICK", dict.fromkeys(bandit.QUICK, Recipe(2, 3e-3, True, 1)))
    common = ["--quick", "--jobs", "1", "--out", str(tmp_path / "out")]
    return lambda *options: bandit.main([*common, *options])


def written_by(tmp_path) -> dict:
    return json.loads((tmp_path / "out/bandit_quick.json").read_text())


def test_the_command_goes_on_where_it_was_interrupted(small, tmp_path, monkeypatch, capsys):
    small("--T", "3", "--seeds", "4", "5")
    ends = (".json", ".png", "_course.png", "_steps.png")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"bandit_quick{e}" for e in ends}
    written = written_by(tmp_path)
    assert {"cpu", "torch", "commit", "date", "recipes"} <= written.keys()
    assert list(written["methods"]) == ["data", *METHODS] and list(written["steps"]) == ["2", "3"]
    assert [run["seed"] for run in written["methods"]["BCQ"]] == [4, 5]
    # The same policies, trained once.
    assert written["steps"]["3"] == written["methods"]["BC-Diffusion"]
    printed = capsys.readouterr().out
    assert "18 of 18 policies" in printed and all(name in printed for name in METHODS)
    where = tmp_path / "out/bandit_quick"
    assert printed.splitlines()[-1] == f"figures in {where}.json, pictures in {where}*.png"

    policies = sorted((tmp_path / "policies").iterdir())
    assert len(policies) == 18
    policies[0].unlink()
    train_job, again = bandit.train_job, []
    counted = lambda job, compiled: again.append(job) or train_job(job, compiled)  # noqa: E731
    monkeypatch.setattr(bandit, "train_job", counted)
    small("--T", "3", "--seeds", "4", "5")
    assert len(again) == 1 and sorted((tmp_path / "policies").iterdir()) == policies
    small("--T", "3", "--seeds", "4", "--eta", "1")  # of which only these two know
    assert [job.method for job in again[1:]] == ["Diffusion-QL", "TD3+BC"]


def test_the_papers_recipe_also_trains_with_critics_first(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bandit, "Recipe", lambda: Recipe(4, 3e-3))
    monkeypatch.setattr(bandit, "FULL_CRITICS_FIRST", Recipe(3, 3e-3, True, 2))
    options = ["--methods", "Diffusion-QL", "BC-Diffusion", "TD3+BC", "--T", "2", "--jobs", "1"]
    bandit.main([*options, "--seeds", "4", "5", "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out/bandit.json").read_text())
    methods, recipes = written["methods"], written["recipes"]
    assert list(methods) == ["data", "BC-Diffusion", "TD3+BC", "Diffusion-QL", CRITICS_FIRST]
    critics = [recipes[name]["critic_first"] for name in ("TD3+BC", "Diffusion-QL", CRITICS_FIRST)]
    assert critics == [0, 0, 2]
    looked_at = methods["Diffusion-QL"] + methods[CRITICS_FIRST]
    assert [len(run["course"]) for run in looked_at] == [4, 4, 3, 3]
    assert recipes["BC-Diffusion"]["updates"] == 4
    assert recipes["steps"]["updates"] == 2  # always quick
    assert written["steps"]["2"] != methods["BC-Diffusion"]
    assert "course" not in methods["TD3+BC"][0] and (tmp_path / "out/bandit_course.png").exists()


def test_sampling_on_the_way_does_not_change_training(small, monkeypatch):
    job = bandit.Job("Diffusion-QL", 4, 2.5, 2, Recipe(8, 3e-3))
    monkeypatch.setattr(bandit, "LOOKS", 4)
    bandit.POLICIES.mkdir()
    bandit.train_job(job, compiled=False)
    tensors, _ = load_tensors(job.path())
    method = bandit.build(job)
    train(method, TRANSITIONS, 8)
    samples = method.sample(bandit.SAMPLES)
    assert torch.equal(tensors["samples"], samples) and tensors["course"].shape == (4, 4)
    assert np.array_equal(tensors["course"][-1], shares(samples.numpy()))


def test_some_methods_can_be_asked_for(small, tmp_path):
    small("--methods", "BCQ", "BC-MLE", "--seed", "4")
    assert list(written_by(tmp_path)["methods"]) == ["data", "BC-MLE", "BCQ"]
    assert not (tmp_path / "out/bandit_quick_steps.png").exists()


BAD_INPUT = {
    "--methods BC-MLE SAC": "unknown method 'SAC'; known: BC-MLE, .*Diffusion-QL",
    "--T 0": "--T must be at least 1, not 0",
    "--eta -1": "--eta must be at least 0, not -1",
    "--eta nan": "--eta must be at least 0, not nan",
    "--eta inf": "--eta must be finite",
    "--seeds -1": "--seeds must be at least 0, not -1",
    "--seeds 1 1": "names a seed twice",
    "--jobs 0": "--jobs must be at least 1, not 0",
    f"--out {ROOT / 'README.md'}": "README.md.*--out",
    "--fused": "--fused cannot be used: no CUDA GPU was found",
    "--compile": r"--compile needs a C\+\+ compiler",
}


@pytest.mark.parametrize("options, message", BAD_INPUT.items())
def test_bad_input_gets_one_line_before_anything_is_trained(small, monkeypatch, options, message):
    monkeypatch.setattr(bandit, "train_job", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(kernels, "why_not", lambda: "no CUDA GPU was found")
    monkeypatch.setattr(bandit, "has_compiler", lambda: False)
    with pytest.raises(SystemExit, match=message) as e:
        small(*options.split())
    assert "\n" not in str(e.value)


def test_more_steps_than_the_fused_sampler_takes_are_refused(small, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(bandit, "train_job", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="--fused cannot be used: .*n_timesteps 101"):
        small("--fused", "--T", "101")


def test_a_broken_policy_is_named(small, tmp_path):
    small("--methods", "BC-MLE")
    (path,) = (tmp_path / "policies").iterdir()
    path.write_bytes(b"not safetensors")
    with pytest.raises(SystemExit, match=f"{path}.*broken"):
        small("--methods", "BC-MLE")


# ---- The fused sampler; on a CPU in Triton's interpreter -----------------------------------------


def fused_policy(n_timesteps, updates):
    pytest.importorskip("triton")
    method = trained("BC-Diffusion", updates, 3e-3, n_timesteps=n_timesteps)
    return method.policy.to(bandit.fused_device())


def test_fused_samples_are_distributed_as_eager_ones(monkeypatch):
    policy = fused_policy(5, 200)
    samples, found = bandit.compare_fused(policy, 128)
    assert samples.shape == (128, 2) and found["same"], found
    sampler = kernels.FusedSampler

    def shrunken(*how):
        return lambda *what, **more: 0.7 * sampler(*how)(*what, **more)

    monkeypatch.setattr(kernels, "FusedSampler", shrunken)
    assert not bandit.compare_fused(policy, 128)[1]["same"]


def test_the_picture_with_the_fused_sampler(small, tmp_path):
    pytest.importorskip("triton")
    small("--fused", "--T", "2", "--methods", *DIFFUSION)
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {f"bandit_quick_fused{end}" for end in (".json", ".png", "_steps.png")}
    path = tmp_path / "out/bandit_quick_fused.json"
    methods = json.loads(path.read_text())["methods"]
    assert all(len(methods[name][0]["fused"]["eager"]) == 20 for name in DIFFUSION)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "tf32", "fp16x3", "fp32"])
def test_on_a_gpu_the_fused_sampler_draws_the_four_modes(precision):
    samples, found = bandit.compare_fused(fused_policy(50, 2000), 1000, precision=precision)
    assert found["same"], found
    assert figures(samples, DATA)["outside"] < 0.10
