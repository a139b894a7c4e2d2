"""The yardstick is the same algorithm as dql.py, to rounding; the benchmark runs and writes its figures."""

import csv
import json

import pytest
import torch
from conftest import ROOT

from bench import training
from bench.straightforward import StraightforwardDQL
from dql import DiffusionQL


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_three_updates_agree_with_dql(max_q_backup):
    training.check_updates(training.contestants(max_q_backup, compiled=False))


def test_an_update_that_differs_is_noticed():
    agents = training.contestants(False, compiled=False)
    agents[training.BASELINE].tau = 0.1
    with pytest.raises(AssertionError):
        training.check_updates(agents)


@pytest.mark.parametrize("n", [3, 33])
def test_sampling_agrees_with_dql(n):
    training.sampling_workload(n)  # asserts that it does


@pytest.mark.parametrize("n", [1, 5])
def test_acting_agrees_with_dql(n):
    training.acting_workload(n)


def test_averages_agree_with_dql_where_the_schedule_is_not_trivial():
    agent = DiffusionQL(29, 8, hidden_dim=16, ema_start=2, ema_every=2, grad_norm=0.0)
    other, batch = StraightforwardDQL(agent), training.random_batch(16)
    for _ in range(5):
        noise = agent.draw_noise(16)
        agent.update(batch, noise), other.update(batch, noise)
    torch.testing.assert_close(training.parameters(agent), training.parameters(other), rtol=1e-3, atol=1e-5)


def test_figures_are_written_whole_and_appended(tmp_path, monkeypatch):
    calls = {"straightforward": lambda: None, "dql": lambda: None}
    for workload in ("update_workload", "sampling_workload", "acting_workload"):
        monkeypatch.setattr(training, workload, lambda *arguments: calls)
    monkeypatch.setattr(training, "measure", lambda calls, seconds: {
        "straightforward": dict(p20=3.0, p50=4.0, p80=5.0, rounds=7), "dql": dict(p20=1.0, p50=2.0, p80=3.0, rounds=7)
    })  # fmt: skip
    for _ in range(2):
        training.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "training_cpu.json").read_text())
    assert {"cpu", "torch", "numpy", "python", "commit", "date", "figures"} <= written.keys()
    assert len(written["figures"]) == 12 and {f["ratio"] for f in written["figures"]} == {1.0, 2.0}
    with (tmp_path / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and set(rows[0]) == set(training.COLUMNS) and all(rows[0].values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["training.csv", "training_cpu.json"]


def test_timing_takes_turns():
    order = []
    times = training.measure({name: lambda name=name: order.append(name) for name in (training.BASELINE, "dql")}, 0.0)
    assert order[4:] == [training.BASELINE, "dql"] * 5 and times["dql"]["rounds"] == 5
    assert times["dql"]["p20"] <= times["dql"]["p50"] <= times["dql"]["p80"]


def test_the_yardstick_is_independent_of_dql():
    source = (ROOT / "bench/straightforward.py").read_text()
    assert "import dql" not in source and "from dql" not in source
