"""The command that asks a GPU everything: in the order of value, as far as time allows, whatever fails."""

import pytest
import torch
from conftest import ROOT

from bench import all as everything


@pytest.fixture
def ran(monkeypatch):
    """What the parts were called with; the first one fails."""
    calls = []
    outcome = lambda command, limit: calls.append((command, limit)) or ("broken" if len(calls) == 1 else "")  # noqa: E731
    monkeypatch.setattr(everything, "run", outcome)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


def test_every_part_is_run_whatever_fails(tmp_path, ran, capsys):
    assert everything.main(["--out", str(tmp_path)]) == 1
    modules = [command[0].removeprefix("bench.") for command, _ in ran]
    assert modules == ["first", "pytest", "training", "acting", "sampling", "training", "bandit", "plot"]
    assert "--full-run" in ran[5][0] and "--fused" in ran[6][0] and all(str(tmp_path) in c for c, _ in ran if c[0] != "pytest")
    printed = capsys.readouterr().out
    assert "FAILED: first: broken" in printed and "8 parts, 1 of them failed" in printed


def test_what_does_not_fit_into_the_time_is_quick_or_left_out(tmp_path, ran, capsys):
    whole, slow = everything.Part(["bench.x"], 100, 10), everything.Part(["bench.y"], 100)
    assert everything.fitted(whole, 200, False) == (["bench.x"], 100)
    assert everything.fitted(whole, 200, True) == everything.fitted(whole, 50, False) == (["bench.x", "--quick"], 10)
    assert everything.fitted(whole, 5, False) is None and everything.fitted(slow, 50, True) is None
    assert everything.main(["--minutes", "3", "--parts", "tests", "training", "--out", str(tmp_path)]) == 1
    assert [(command[0], "--quick" in command) for command, _ in ran] == [("bench.training", True)] and ran[0][1] <= 180
    assert "tests is left out: it takes about 200 s, and 180 s are left" in capsys.readouterr().out


def test_without_a_gpu_the_parts_that_ask_nothing_else_are_left_out(tmp_path, ran, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    everything.main(["--quick", "--out", str(tmp_path)])
    assert [command[0] for command, _ in ran] == ["bench.training", "bench.acting", "bench.sampling", "bench.plot"]
    assert capsys.readouterr().out.count("is left out: no CUDA GPU was found") == 4


def test_a_part_that_fails_or_overruns_is_ended_with_its_children():
    assert everything.run(["json.tool", "/nowhere"], 60).startswith("exit status")
    assert everything.run(["timeit", "-n1", "-r1", "import time; time.sleep(60)"], 2) == "ended after 2 s"
    assert everything.run(["timeit", "-n1", "-r1", "pass"], 60) == ""


def test_tests_that_overrun_say_what_they_have_found(tmp_path, capfd):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_right(): pass\ndef test_hangs(): time.sleep(60)\n")
    assert everything.run(["pytest", "-q", "-p", "no:cacheprovider", str(file)], 4) == "ended after 4 s"
    assert "1 passed" in capfd.readouterr().out


def test_the_kernels_tests_are_there():
    assert all((ROOT / file).exists() for file in everything.TESTS)
