"""bench/all.py: every part is run in order of value and within the time, whatever fails."""

import signal

import pytest
import torch
from conftest import ROOT

from bench import all as everything


@pytest.fixture
def ran(monkeypatch):
    """What the parts were called with; the first one fails."""
    calls = []

    def run(command, limit):
        calls.append((command, limit))
        return "broken" if len(calls) == 1 else ""

    monkeypatch.setattr(everything, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


def test_every_part_is_run_whatever_fails(tmp_path, ran, capsys):
    assert everything.main(["--out", str(tmp_path)]) == 1
    commands = [command for command, _ in ran]
    modules = [command[0].rpartition(".")[2] for command in commands]
    order = "first pytest training acting sampling training tiles bandit plot"
    assert modules == order.split()
    assert "--full-run" in commands[5] and "--fused" in commands[7]
    assert all(str(tmp_path) in command for command in commands if command[0] != "pytest")
    printed = capsys.readouterr().out
    assert "FAILED: first: broken" in printed
    assert f"9 parts, 1 of them failed; figures in {tmp_path}" in printed


def test_a_part_that_does_not_fit_is_quick_or_left_out(tmp_path, ran, capsys):
    fitted, whole = everything.fitted, everything.Part(["bench.x"], 100, 10)
    slow, quick = everything.Part(["bench.y"], 100), (["bench.x", "--quick"], 10)
    assert fitted(whole, 200, False) == (["bench.x"], 100)
    assert fitted(whole, 200, True) == fitted(whole, 50, False) == quick
    assert fitted(whole, 5, False) is None and fitted(slow, 50, True) is None
    asked = ["--minutes", "2.5", "--parts", "tests", "training", "--out", str(tmp_path)]
    assert everything.main(asked) == 1
    ((command, limit),) = ran
    assert command[0] == "bench.training" and "--quick" in command and limit <= 150
    left_out = "tests is left out: it takes about 180 s, and 150 s are left"
    assert left_out in capsys.readouterr().out


def test_parts_that_need_a_gpu_are_left_out_without_one(ran, monkeypatch, capsys):
    """Without --out each part writes to its own folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    everything.main(["--quick"])
    modules = ["bench.training", "bench.acting", "bench.sampling", "bench.plot"]
    assert [command[0] for command, _ in ran] == modules
    assert not any("--out" in command for command, _ in ran)
    assert capsys.readouterr().out.count("is left out: no CUDA GPU was found") == 5


def test_a_part_that_fails_or_overruns_is_ended():
    assert everything.run(["json.tool", "/nowhere"], 60).startswith("exit status")
    sleeps = ["timeit", "-n1", "-r1", "import time; time.sleep(60)"]
    assert everything.run(sleeps, 2) == "ended after 2 s"
    assert everything.run(["timeit", "-n1", "-r1", "pass"], 60) == ""


def test_tests_that_overrun_say_what_they_have_found(tmp_path, capfd):
    file = tmp_path / "test_slow.py"
    slow = "import time\ndef test_right(): pass\ndef test_hangs(): time.sleep(60)\n"
    file.write_text(slow)
    tests = ["pytest", "-q", "-p", "no:cacheprovider", str(file)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    try:
        assert everything.run(tests, 4) == "ended after 4 s"
    finally:
        signal.signal(signal.SIGINT, before)
    assert "1 passed" in capfd.readouterr().out


def test_every_part_and_test_file_exists():
    assert all((ROOT / file).exists() for file in everything.TESTS)
    for part in everything.parts(None).values():
        path = ROOT / f"{part.command[0].replace('.', '/')}.py"
        assert part.command[0] == "pytest" or path.exists()
