"""experiments/d4rl_policies.py: small made-up policies from files to the table and the JSON."""

import json

import numpy as np
import pytest

from experiments import d4rl_policies
from experiments.d4rl_policies import normal, squashed_normal


def save_squashed(path, state_dim, action_dim, hidden=4):
    rng = np.random.default_rng(0)
    sizes = {
        "fc0": (hidden, state_dim),
        "fc1": (hidden, hidden),
        "last_fc": (action_dim, hidden),
        "last_fc_log_std": (action_dim, hidden),
    }
    net = {}
    for layer, (n_out, n_in) in sizes.items():
        net[f"{layer}.weight"] = rng.standard_normal((n_out, n_in)).astype(np.float32)
        net[f"{layer}.bias"] = np.zeros(n_out, np.float32)
    np.savez(path, **net)


def save_normal(path):
    rng = np.random.default_rng(0)
    net = {"w0": (3, 45), "w1": (3, 3), "w2": (24, 3)}
    net = {name: rng.standard_normal(shape) for name, shape in net.items()}
    biases = {"b0": np.zeros(3), "b1": np.zeros(3), "b2": np.zeros(24)}
    np.savez(path, **net, **biases, log_std=np.full(24, -1.0))


def test_returns_and_walkers_are_written_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(d4rl_policies, "NOISES", (0.0,))
    save_squashed(tmp_path / "d4rl_hopper_online_10.npz", 11, 3)
    save_squashed(tmp_path / "d4rl_ant_policy.npz", 29, 8)
    save_normal(tmp_path / "dapg_pen_policy.npz")
    d4rl_policies.main([str(tmp_path), "--episodes", "2", "--out", str(tmp_path / "results")])
    found = json.loads((tmp_path / "results" / "d4rl_policies.json").read_text())
    hopper, pen = found["returns"]  # the walker2d's file is missing
    assert (hopper["task"], pen["task"]) == ("hopper-medium-v2", "pen-human-v1")
    for row in (hopper, pen):
        first, second = row["returns"]
        assert row["here"] == pytest.approx((first + second) / 2)
        assert row["standard_error"] == pytest.approx(abs(first - second) / 2)
        error = (row["here"] - row["published"]) / row["standard_error"]
        assert row["difference_in_standard_errors"] == pytest.approx(error)
    made_up, ours = found["walkers"]
    assert made_up["success"] == 0.0 and made_up["steps_to_goal"] is None
    assert ours["success"] >= 0.5 and 1.0 < ours["metres_per_second"] < 3.0
    assert found["commit"] is not None and found["mujoco"]
    printed = capsys.readouterr().out
    assert "1291 ± 86" in printed and "3233 ± 121" in printed
    assert printed.endswith(f"figures in {tmp_path / 'results' / 'd4rl_policies.json'}\n")


def test_actions_are_drawn_from_each_networks_distribution():
    rng, states = np.random.default_rng(0), np.full((20_000, 1), 2.0)
    one, zero = np.ones((1, 1)), np.zeros(1)
    names = ("fc0", "fc1", "last_fc", "last_fc_log_std")
    net = {f"{name}.weight": 0.5 * one for name in names}
    net |= {f"{name}.bias": zero for name in names} | {"last_fc_log_std.bias": np.log([0.1])}
    drawn = np.arctanh(squashed_normal(net, states, rng))
    assert drawn.mean() == pytest.approx(0.25, abs=0.01)  # two ReLU layers and a last one halve
    assert drawn.std() == pytest.approx(0.1 * np.exp(0.25), rel=0.05)
    net = {"w0": one, "w1": one, "w2": one, "b0": zero, "b1": zero, "b2": zero + 3.0}
    drawn = normal(net | {"log_std": np.log([0.2])}, states, rng)
    assert drawn.mean() == pytest.approx(3 + np.tanh(np.tanh(2)), abs=0.01)
    assert drawn.std() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("more", [[], ["--episodes", "1"]])
def test_no_policies_and_one_episode_are_refused(tmp_path, more):
    if more:
        save_normal(tmp_path / "dapg_pen_policy.npz")
    with pytest.raises(SystemExit) as end:
        d4rl_policies.main([str(tmp_path), *more])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
