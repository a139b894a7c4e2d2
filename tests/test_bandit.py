"""The bandit: what the paper shows comes out at a small budget, baselines are the released ones, the command keeps its word.

What is asserted of trained policies leaves a margin to what several seeds gave; those figures are beside it. The full recipe's
claims are asserted of bench/results/bandit.json.
"""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT

import kernels
from bench import bandit
from bench.bandit import CRITICS_FIRST, NAMES, REWARDS, Recipe, draw_actions, figures, released_data
from bench.bandit_policies import CLIMBING, CLONING, METHODS, laplacian_mmd, train
from dql import DiffusionQL
from run_folder import load_tensors

TRANSITIONS = bandit.transitions()
DATA = draw_actions(np.random.default_rng(5), 1000)


def make(name, seed=0, n_timesteps=5, eta=2.5, recipe=Recipe(), **how):
    return bandit.build(bandit.Cell(name, seed, eta, n_timesteps, recipe._replace(**how)))


def trained(name, updates, lr, critic_first=0, n_timesteps=0, seed=0):
    """What the table says of a policy trained with a decaying rate."""
    method = make(name, seed, n_timesteps, updates=updates, lr=lr, decay=True)
    train(method, TRANSITIONS, updates, critic_first)
    return figures(method.sample(1000).numpy(), DATA)


# ---------------------------------------------------------------------------------------------------------------------
# What the paper shows
# ---------------------------------------------------------------------------------------------------------------------


def test_diffusion_clones_all_four_modes():
    found = trained("BC-Diffusion", 2000, 3e-3, n_timesteps=50)
    assert found["outside"] < 0.10  # four seeds: 0.044 to 0.063
    assert all(0.15 < share < 0.35 for share in found["shares"].values())  # 0.222 to 0.258
    assert found["mmd"] < 0.08  # 0.040 to 0.045; two draws of the data: 0.029


def test_a_gaussian_does_not():
    found = trained("BC-MLE", 500, 6e-3)
    assert found["outside"] > 0.90 and found["mmd"] > 0.3  # three seeds: 0.968 to 0.974, 0.405 to 0.408


def test_diffusion_with_q_goes_to_the_best_corner():
    # Five steps, 800 updates. The full recipe's figures are asserted below.
    found = trained("Diffusion-QL", 800, 6e-3, 6000, n_timesteps=5)
    assert found["shares"]["lower right"] > 0.65  # four seeds: 0.715 to 0.848; with 2,000 updates of the critics first 0.188
    assert found["reward"] > 3.2  # 3.58 to 4.24
    assert sum(found["shares"].values()) - found["shares"]["lower right"] < 0.02  # at most 0.001


@pytest.mark.parametrize("name", ["TD3+BC", "BCQ", "BEAR-MMD"])
def test_the_baselines_with_q_do_not(name):
    found = trained(name, 400, 6e-3, 500)
    assert found["reward"] < 1.0 and found["shares"]["lower right"] < 0.2  # two seeds each: at most 0.26 and 0.025


@pytest.fixture(scope="module")
def full():
    """The committed runs of the full recipe: name -> one for each seed."""
    path = ROOT / "bench/results/bandit.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if not results or results["quick"] or set(results["methods"]) != {"data", *METHODS, CRITICS_FIRST}:
        pytest.skip("the full recipe's results are not there")
    assert all(len(runs) >= 3 for name, runs in results["methods"].items() if name != "data")
    return results["methods"]


def goes_to_the_best_corner(runs, full):
    others = [run["reward"] for name in CLIMBING if name != "Diffusion-QL" for run in full[name]]
    return all(run["shares"]["lower right"] >= 0.90 and run["reward"] >= 4.5 and run["reward"] > max(others) for run in runs)


def test_the_full_recipe_clones_as_the_paper_shows(full):
    for run in full["BC-Diffusion"]:
        assert run["outside"] <= 0.10 and all(0.15 <= share <= 0.35 for share in run["shares"].values())
        assert all(run["mmd"] < other["mmd"] for name in CLONING if name != "BC-Diffusion" for other in full[name])
    assert all(run["outside"] > 0.10 for run in full["BC-MLE"])


def test_diffusion_ql_after_its_critics_goes_to_the_best_corner_as_the_paper_shows(full):
    assert goes_to_the_best_corner(full[CRITICS_FIRST], full)


@pytest.mark.xfail(strict=True, reason="as released two of three seeds end at the edge of the square: README")
def test_diffusion_ql_as_released_goes_to_the_best_corner_as_the_paper_shows(full):
    assert goes_to_the_best_corner(full["Diffusion-QL"], full)


# ---------------------------------------------------------------------------------------------------------------------
# Data and figures
# ---------------------------------------------------------------------------------------------------------------------


def test_the_data_are_the_papers():
    actions, rewards = released_data()
    assert actions.shape == (10_000, 2) and np.abs(actions).max() <= 1
    expected = {"upper left": (-0.8, 0.8, 3.0), "lower left": (-0.8, -0.8, 0.0), "upper right": (0.8, 0.8, 1.5)}
    expected["lower right"] = (0.8, -0.8, 5.0)
    for i, name in enumerate(NAMES):
        of_corner = slice(2500 * i, 2500 * (i + 1))
        columns = [*actions[of_corner].T, rewards[of_corner]]
        for column, mean, sigma in zip(columns, expected[name], (0.05, 0.05, 0.5)):
            assert abs(column.mean() - mean) < 5 * sigma / 50 and abs(column.std() / sigma - 1) < 0.08
    assert np.allclose(TRANSITIONS.columns[1].numpy(), actions) and not TRANSITIONS.columns[0].any()


def test_the_data_are_those_that_the_authors_seed_draws():
    """All actions, then all rewards, corner by corner, from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2022)
        corners = [torch.tensor(xy) for xy in ((-0.8, 0.8), (-0.8, -0.8), (0.8, 0.8), (0.8, -0.8))]
        actions = [torch.distributions.Normal(xy, torch.full((2,), 0.05)).sample((2500,)).clip(-1, 1) for xy in corners]
        rewards = [mean + 0.5 * torch.randn(2500, 1) for mean in (3.0, 0.0, 1.5, 5.0)]
    ours = released_data()
    assert np.array_equal(ours[0], torch.cat(actions).numpy()) and np.array_equal(ours[1], torch.cat(rewards)[:, 0].numpy())


def test_only_what_lies_at_a_corner_is_counted_and_paid():
    at = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8], [0.8, -0.651], [0.8, -0.649], [1.0, -1.0], [0.0, 0.0]])
    found = figures(at, DATA)
    assert list(found["shares"].values()) == [1 / 8, 1 / 8, 1 / 8, 2 / 8]
    assert found["outside"] == 3 / 8 and found["reward"] == (3.0 + 0.0 + 1.5 + 2 * 5.0) / 8
    of_data = figures(draw_actions(np.random.default_rng(6), 1000), DATA)
    assert 0.97 < 1 - of_data["outside"] < 1 and abs(of_data["reward"] - REWARDS.mean()) < 0.1 and of_data["mmd"] < 0.05


def test_the_mmd_is_that_of_its_definition():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 2)) * 0.1

    def k(a, b):
        return math.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / (2 * 0.1**2))

    squared = sum(k(a, b) + k(c, d) - 2 * k(a, d) for a, c in zip(x, y) for b, d in zip(x, y)) / 49
    assert bandit.mmd(x, y) == pytest.approx(math.sqrt(squared)) and bandit.mmd(x, x) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The policies
# ---------------------------------------------------------------------------------------------------------------------


def test_diffusion_ql_is_dqls_own_update_where_nothing_follows():
    method = make("Diffusion-QL", seed=3)
    agent = DiffusionQL(2, 2, hidden_dim=128, eta=2.5, discount=0.0, grad_norm=0.0, seed=3)
    for _ in range(3):
        batch, noise = TRANSITIONS.sample(100, agent.generator), agent.draw_noise(100)
        agent.update(batch, noise), method.update(batch, noise)
    for vector in ("policy_vector", "critic_vector"):
        torch.testing.assert_close(getattr(method, vector), getattr(agent, vector), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if "Diffusion" not in name])
def test_each_loss_moves_its_own_network_alone(name):
    method, batch = make(name), TRANSITIONS.sample(100, torch.Generator().manual_seed(0))
    method.update(batch)  # an actor's step tells the multiplier how far it is off
    modules = {step: module for step, (module, _, _) in method.descents().items()}
    for step in modules:
        before = {other: [p.clone() for p in module.parameters()] for other, module in modules.items()}
        method.steps[step](batch)
        for other, module in modules.items():
            unchanged = all(torch.equal(p, q) for p, q in zip(before[other], module.parameters()))
            assert unchanged == (other != step), f"{step} and {other}"


def test_the_gaussians_loss_is_its_negative_log_likelihood():
    method, batch = make("BC-MLE"), TRANSITIONS.sample(100, torch.Generator().manual_seed(0))
    mean, log_std = method.actor(batch.state).split(2, dim=1)
    expected = 0.5 * ((batch.action - mean) / log_std.exp()) ** 2 + log_std + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(method.actor_loss(batch), expected.sum(dim=1).mean())


def test_the_auto_encoders_loss_is_the_error_and_half_the_divergence():
    method, batch = make("BC-CVAE"), TRANSITIONS.sample(100, torch.Generator().manual_seed(0))
    method.generator.manual_seed(1)
    found = method.cvae_loss(batch)
    mean, log_std = method.encoder(torch.cat([batch.state, batch.action], dim=1)).split(4, dim=1)
    posterior = torch.distributions.Normal(mean, log_std.exp())
    z = mean + log_std.exp() * torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
    decoded = torch.tanh(method.decoder(torch.cat([batch.state, z], dim=1)))
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(found, (decoded - batch.action).square().mean() + 0.5 * kl)


def test_bcq_moves_the_auto_encoders_actions_by_at_most_a_twentieth():
    method = make("BCQ")
    with torch.no_grad():
        method.perturbation[-1].bias += 10.0  # its tanh is 1
    method.generator.manual_seed(1)
    moved = method.sample(50)
    method.generator.manual_seed(1)
    with torch.no_grad():
        plain = super(type(method), method).propose(torch.zeros(50, 2))
    torch.testing.assert_close(moved, plain + 0.05)


def test_the_laplacian_discrepancy_is_that_of_its_definition():
    x, y = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))

    def mean_k(a, b):
        return np.mean([math.exp(-float((p - q).abs().sum()) / 40) for p in a for q in b])

    expected = [math.sqrt(mean_k(a, a) + mean_k(b, b) - 2 * mean_k(a, b) + 1e-6) for a, b in zip(x, y)]
    torch.testing.assert_close(laplacian_mmd(x, y), torch.tensor(expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize("excess, rises", [(0.1, True), (-0.04, False)])
def test_bears_multiplier_rises_while_the_discrepancy_is_too_large(excess, rises):
    method = make("BEAR-MMD")
    before = method.multiplier.log_lambda.item()
    method.excess = excess
    method.steps["multiplier"](None)
    assert (method.multiplier.log_lambda.item() > before) == rises
    assert abs(method.multiplier.log_lambda.item() - before) == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is its rate


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_gives_the_same_policy_whatever_else_draws_random_numbers(name):
    drawn = []
    for other in (0, 1):
        torch.manual_seed(other)
        method = make(name, seed=7)
        train(method, TRANSITIONS, 2)
        drawn.append(method.sample(10))
    assert torch.equal(*drawn) and drawn[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command at a budget of a few updates, in folders of its own. -> call it with options"""
    monkeypatch.setattr(bandit, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(bandit, "STEPS", (2, 3))
    monkeypatch.setattr(bandit, "SAMPLES", 64)
    monkeypatch.setattr(bandit, "QUICK", dict.fromkeys(bandit.QUICK, Recipe(2, 3e-3, True, 1)))
    return lambda *options: bandit.main(["--quick", "--jobs", "1", "--out", str(tmp_path / "out"), *options])


def test_the_command_draws_writes_and_goes_on_where_it_was_interrupted(small, tmp_path, monkeypatch, capsys):
    small("--T", "3", "--seeds", "4", "5")
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {f"bandit_quick{end}" for end in (".json", ".png", "_course.png", "_steps.png")}
    written = json.loads((out / "bandit_quick.json").read_text())
    assert {"cpu", "torch", "commit", "date", "recipes"} <= written.keys()
    assert list(written["methods"]) == ["data", *METHODS] and list(written["steps"]) == ["2", "3"]
    assert [run["seed"] for run in written["methods"]["BCQ"]] == [4, 5]
    assert written["steps"]["3"] == written["methods"]["BC-Diffusion"]  # the same policies, trained once
    printed = capsys.readouterr().out
    assert "18 of 18 policies" in printed and all(name in printed for name in METHODS)

    cells = sorted((tmp_path / "cells").iterdir())
    assert len(cells) == 18
    cells[0].unlink()
    train_cell, again = bandit.train_cell, []
    monkeypatch.setattr(bandit, "train_cell", lambda cell, compiled: again.append(cell) or train_cell(cell, compiled))
    small("--T", "3", "--seeds", "4", "5")
    assert len(again) == 1 and sorted((tmp_path / "cells").iterdir()) == cells
    small("--T", "3", "--seeds", "4", "--eta", "1")  # of which only these two know
    assert [cell.method for cell in again[1:]] == ["Diffusion-QL", "TD3+BC"]


def test_the_papers_recipe_also_trains_diffusion_ql_after_its_critics(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bandit, "Recipe", lambda: Recipe(4, 3e-3))
    monkeypatch.setattr(bandit, "FULL_CRITICS_FIRST", Recipe(3, 3e-3, True, 2))
    options = ["--methods", "Diffusion-QL", "BC-Diffusion", "TD3+BC", "--T", "2", "--seeds", "4", "5", "--jobs", "1"]
    bandit.main([*options, "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out/bandit.json").read_text())
    methods, recipes = written["methods"], written["recipes"]
    assert list(methods) == ["data", "BC-Diffusion", "TD3+BC", "Diffusion-QL", CRITICS_FIRST]
    assert [recipes[name]["critic_first"] for name in ("TD3+BC", "Diffusion-QL", CRITICS_FIRST)] == [0, 0, 2]
    assert [len(run["course"]) for run in methods["Diffusion-QL"] + methods[CRITICS_FIRST]] == [4, 4, 3, 3]
    assert recipes["BC-Diffusion"]["updates"] == 4 and recipes["steps"]["updates"] == 2  # those by T are always quick
    assert written["steps"]["2"] != methods["BC-Diffusion"]
    assert "course" not in methods["TD3+BC"][0] and (tmp_path / "out/bandit_course.png").exists()


def test_looking_at_the_course_changes_nothing_of_it(small, monkeypatch):
    cell = bandit.Cell("Diffusion-QL", 4, 2.5, 2, Recipe(8, 3e-3))
    monkeypatch.setattr(bandit, "COURSE", 4)
    bandit.CELLS.mkdir()
    bandit.train_cell(cell, compiled=False)
    tensors, _ = load_tensors(cell.path())
    method = bandit.build(cell)
    train(method, TRANSITIONS, 8)
    samples = method.sample(bandit.SAMPLES)
    assert torch.equal(tensors["samples"], samples)
    assert tensors["course"].shape == (4, 4) and np.array_equal(tensors["course"][-1], bandit.shares(samples.numpy()))


def test_some_methods_are_drawn_alone(small, tmp_path):
    small("--methods", "BCQ", "BC-MLE", "--seed", "4")
    assert list(json.loads((tmp_path / "out/bandit_quick.json").read_text())["methods"]) == ["data", "BC-MLE", "BCQ"]
    assert not (tmp_path / "out/bandit_quick_steps.png").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--methods", "BC-Diffusion", "SAC"], "unknown method 'SAC'; known: BC-MLE, .*Diffusion-QL"),
        (["--T", "0"], "--T must be at least 1, not 0"),
        (["--eta", "-1"], "--eta must be at least 0, not -1"),
        (["--eta", "nan"], "--eta must be at least 0, not nan"),
        (["--eta", "inf"], "--eta must be finite"),
        (["--seeds", "-1"], "--seeds must be at least 0, not -1"),
        (["--seeds", "1", "1"], "names a seed twice"),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--out", str(ROOT / "README.md")], "README.md.*--out"),
        (["--fused"], "--fused cannot be used: no CUDA GPU was found"),
        (["--compile"], r"--compile needs a C\+\+ compiler"),
    ],
)
def test_bad_input_gets_one_line_before_anything_is_trained(small, monkeypatch, options, message):
    monkeypatch.setattr(bandit, "train_cell", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(kernels, "why_not", lambda: "no CUDA GPU was found")
    monkeypatch.setattr(bandit, "has_compiler", lambda: False)
    with pytest.raises(SystemExit, match=message) as e:
        small(*options)
    assert "\n" not in str(e.value)


def test_more_steps_than_the_fused_sampler_takes_are_refused(small, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(bandit, "train_cell", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="--fused cannot be used: .*n_timesteps 101"):
        small("--fused", "--T", "101")


def test_a_broken_policy_is_named(small, tmp_path):
    small("--methods", "BC-MLE")
    (path,) = (tmp_path / "cells").iterdir()
    path.write_bytes(b"not safetensors")
    with pytest.raises(SystemExit, match=f"{path}.*broken"):
        small("--methods", "BC-MLE")


# ---------------------------------------------------------------------------------------------------------------------
# The fused sampler. On a CPU in Triton's interpreter
# ---------------------------------------------------------------------------------------------------------------------


def fused_policy(n_timesteps, updates):
    pytest.importorskip("triton")
    method = make("BC-Diffusion", n_timesteps=n_timesteps, updates=updates, lr=3e-3, decay=True)
    train(method, TRANSITIONS, updates)
    return method.policy.to(bandit.fused_device())


def test_fused_samples_are_as_far_from_eager_ones_as_these_from_each_other(monkeypatch):
    policy = fused_policy(5, 200)
    samples, found = bandit.compare_fused(policy, 128)
    assert samples.shape == (128, 2) and found["same"], found
    fused = kernels.FusedSampler
    monkeypatch.setattr(kernels, "FusedSampler", lambda *how: lambda *what, **more: 0.7 * fused(*how)(*what, **more))
    assert not bandit.compare_fused(policy, 128)[1]["same"]


def test_the_picture_with_the_fused_sampler(small, tmp_path):
    pytest.importorskip("triton")
    small("--fused", "--T", "2", "--methods", "BC-Diffusion", "Diffusion-QL")
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {f"bandit_quick_fused{end}" for end in (".json", ".png", "_steps.png")}
    methods = json.loads((tmp_path / "out/bandit_quick_fused.json").read_text())["methods"]
    assert all(len(methods[name][0]["fused"]["eager"]) == 20 for name in ("BC-Diffusion", "Diffusion-QL"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "tf32", "fp16x3", "fp32"])
def test_on_a_gpu_the_fused_sampler_draws_the_four_modes(precision):
    samples, found = bandit.compare_fused(fused_policy(50, 2000), 1000, precision=precision)
    assert found["same"], found
    assert figures(samples, DATA)["outside"] < 0.10
