"""experiments/d4rl.py, the command of twenty tasks: failures, files and bad input."""

import csv
import json
import os
import signal
import threading
import time

import pytest
from d4rl_runs import LARGE, MEDIUM, UMAZE, alive, wait_for

from experiments import d4rl
from experiments.d4rl_table import RULES
from experiments.runs import KEPT, Outcome

FILES = ["d4rl.csv", "d4rl.json", "d4rl.md", "d4rl.png"]


def test_a_failed_task_is_recorded_and_tried_again(d4rl_command, capsys):
    """The others go on."""
    broken = {UMAZE: "10%|#\rerror: eta became nan: lower it", MEDIUM: int(signal.SIGKILL)}
    d4rl_command.broken = broken
    assert d4rl_command("--jobs", "2", tasks=(UMAZE, MEDIUM, LARGE)) == 1
    failed = json.loads((d4rl_command.out / UMAZE / "failed.json").read_text())
    assert failed["reason"] == "eta became nan: lower it" and failed["exit_code"] == 1
    assert failed["date"]
    notes = [row["note"] for row in d4rl_command.table()["rows"]]
    killed = "failed: killed by signal 9 (out of memory?)"
    assert notes == ["failed: eta became nan: lower it", killed, ""]
    assert "eta became nan" in (d4rl_command.results / "d4rl.md").read_text()
    assert "eta became nan" in capsys.readouterr().out
    d4rl_command.broken = {}
    assert d4rl_command(tasks=(UMAZE, MEDIUM, LARGE)) == 0
    assert not list(d4rl_command.out.rglob("failed.json"))
    assert [row["note"] for row in d4rl_command.table()["rows"]] == ["", "", ""]


def test_a_failure_is_recorded_for_its_options_only(d4rl_command):
    d4rl_command.broken = {UMAZE: "error: eta became nan"}
    assert d4rl_command(passed=("--eta", "9"), tasks=(UMAZE, MEDIUM)) == 1
    d4rl_command.broken = {}
    assert d4rl_command() == 0 and d4rl_command.table()["rows"][0]["note"] == ""
    assert d4rl_command("--table", passed=("--eta", "9"), tasks=(UMAZE, MEDIUM)) == 1
    assert d4rl_command.table()["rows"][0]["note"] == "failed: eta became nan"


def test_a_program_that_leaves_no_run_is_a_failure(d4rl_command):
    (d4rl_command.folder / "program.py").write_text("pass")
    assert d4rl_command() == 1
    assert "left no finished run" in d4rl_command.table()["rows"][0]["note"]


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the test runner's parent has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_children(d4rl_command, capsys, interruptible, number):
    """They can save what they have done; and a line says how to go on."""
    d4rl_command.seconds = 60

    def interrupt():
        wait_for(lambda: len(list(d4rl_command.out.glob("*/*/resume.safetensors"))) == 4)
        time.sleep(0.5)  # for them to go to sleep
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert d4rl_command("--jobs", "2", tasks=(UMAZE, MEDIUM, LARGE)) == 128 + number
    thread.join()
    calls = d4rl_command.calls()
    assert len(calls) == 2 and not any(alive(call["pid"]) for call in calls)
    assert all((d4rl_command.folder / f"stopped-{call['pid']}").exists() for call in calls)
    command = f"python -m experiments.d4rl --jobs 2 --tasks {UMAZE}"
    assert f"go on with: {command}" in capsys.readouterr().err
    assert not list(d4rl_command.out.rglob("failed.json"))
    d4rl_command.seconds = 0
    assert d4rl_command(tasks=(UMAZE, MEDIUM, LARGE)) == 0


@pytest.mark.parametrize("status", [129, 130, 143, int(signal.SIGTERM)])
def test_what_was_interrupted_has_not_failed(d4rl_command, capsys, status):
    """By exit status, or by the signal itself, which it dies of where it has not begun."""
    d4rl_command.broken = {UMAZE: "error: eta became nan"}
    d4rl_command()
    d4rl_command.broken = {UMAZE: status}
    assert d4rl_command(tasks=(UMAZE, MEDIUM)) == 130
    assert not list(d4rl_command.out.rglob("failed.json"))
    rows = d4rl_command.table()["rows"]
    assert [row["note"] for row in rows] == ["0 of 2 seeds finished", ""]
    printed = capsys.readouterr()
    assert f"{UMAZE}: interrupted; the next call goes on with it" in printed.out
    assert "go on with: python -m experiments.d4rl" in printed.err
    d4rl_command.broken = {}
    assert d4rl_command(tasks=(UMAZE, MEDIUM)) == 0
    resumed = d4rl_command.calls()[-1]["arguments"][0] == "--resume"
    assert resumed == (status >= 128)  # else it had begun nothing


def test_after_an_interrupt_nothing_is_begun(d4rl_command):
    """Its seeds that are not there yet would have been the next call."""
    d4rl_command(seeds=(0,))
    d4rl_command.interrupt(0, 50)
    d4rl_command.broken = {UMAZE: 143}
    assert d4rl_command(seeds=(0, 1)) == 130 and len(d4rl_command.calls()) == 2
    d4rl_command.broken = {}
    assert d4rl_command(seeds=(0, 1)) == 0 and len(d4rl_command.calls()) == 4


def test_what_a_node_sends_back_is_enough_for_the_table(d4rl_command):
    """What is here already is not overwritten."""
    d4rl_command()
    node = d4rl_command.out.rename(d4rl_command.folder / "node")
    runs = (node / UMAZE).glob("*/")
    outcome = Outcome(None, {r.name: {f: (r / f).read_text() for f in KEPT} for r in runs})
    d4rl_command.out.mkdir()
    d4rl.record(d4rl_command.job(), outcome)
    assert d4rl_command() == 0 and len(d4rl_command.calls()) == 1  # finished: not made again
    assert d4rl_command.table()["rows"][0]["rules"]["last"]["scores"] == [10.0, 11.0]
    (d4rl_command.run(0) / "log.jsonl").write_text("mine")
    d4rl.record(d4rl_command.job(), outcome)
    assert (d4rl_command.run(0) / "log.jsonl").read_text() == "mine"


def test_a_real_job_is_trained_and_found_again(tmp_path, data):
    runs = tmp_path / "runs"
    call = ["--tasks", UMAZE, "--seeds", "3", "4", "--out", str(runs), "--results", str(tmp_path)]
    call += ["--", "--data", data, *"--device cpu --epochs 1 --updates-per-epoch 2".split()]
    call += "--eval-episodes 1 --hidden-dim 16 --n-timesteps 2 --n-candidates 2".split()
    assert d4rl.main(call) == 0
    (row,) = json.loads((tmp_path / "d4rl.json").read_text())["rows"]
    assert (row["seeds"], row["kind"]) == ([3, 4], "FILE")
    assert row["data"] == f"file tiny.hdf5 (task {UMAZE})"
    made = sorted((runs / UMAZE).glob("*/"))
    assert d4rl.main(call) == 0 and sorted((runs / UMAZE).glob("*/")) == made and len(made) == 2


# ---- Files and bad input -------------------------------------------------------------------------


def test_the_table_can_be_made_while_runs_are_unfinished(d4rl_command):
    """And twice, with the same bytes."""
    d4rl_command(seeds=(0, 1, 2))
    d4rl_command.interrupt(1, 50)
    written = []
    for _ in range(2):
        assert d4rl_command("--table", seeds=(0, 1, 2)) == 0
        written.append({name: (d4rl_command.results / name).read_bytes() for name in FILES})
    assert written[0] == written[1] and len(d4rl_command.calls()) == 1
    table = d4rl_command.table()
    (row,) = table["rows"]
    assert row["seeds"] == [0, 2] and row["note"] == "2 of 3 seeds finished"
    known = {"seed", "started", "data", "versions", "config", "selection"}
    assert table["runs"][0].keys() >= known
    assert table.keys() >= {"date", "commit", "cpu", "torch", "options"}
    with (d4rl_command.results / "d4rl.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = [(line["rule"], line["seeds"], float(line["mean"]), line["kind"]) for line in lines]
    assert found == [(rule, "2", 11.0, "D4RL") for rule in RULES]


def test_a_full_disk_leaves_the_table_that_was_there(d4rl_command, monkeypatch):
    d4rl_command()
    before = {name: (d4rl_command.results / name).read_bytes() for name in FILES}
    d4rl_command(seeds=(0, 1, 2))

    def full(*_):
        raise OSError(28, "No space left on device")

    after = {name: (d4rl_command.results / name).read_bytes() for name in FILES}
    assert before["d4rl.md"] != after["d4rl.md"]
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        d4rl_command("--table")
    assert {name: (d4rl_command.results / name).read_bytes() for name in FILES} == after
    assert sorted(p.name for p in d4rl_command.results.iterdir()) == FILES


UNKNOWN = "no task is called 'antmaze-umase-v0'; the nearest are antmaze-umaze-v0"
BAD_INPUT = {
    "--tasks antmaze-umase-v0": UNKNOWN,
    f"--tasks {UMAZE} --seeds 1 1": "--seeds 1 1 names a seed twice",
    f"--tasks {UMAZE} --seeds -1": "--seeds must be at least 0",
    "--jobs 0": "--jobs must be at least 1, not 0",
    "--ray --gpus-per-task nan": "--gpus-per-task must lie between 0 and 1, not nan",
    "--ray --cpus-per-task 0": "--cpus-per-task must be at least 1, not 0",
    f"--tasks {UMAZE} -- --out x": "--out cannot be passed on",
    f"--tasks {UMAZE} -- --seed=3": "--seed=3 cannot be passed on",
    f"--tasks {UMAZE} -- --epochs 0": "--epochs must be at least 1, not 0",
    f"--tasks {UMAZE} --table": "no finished run in .* was made with these seeds and",
    f"--tasks {UMAZE} --out /proc/x": "cannot make a run's folder in /proc/x",
}


@pytest.mark.parametrize("arguments, expected", BAD_INPUT.items())
def test_bad_input_is_refused_in_a_line(tmp_path, arguments, expected):
    where = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match=expected) as refused:
        d4rl.main([*where, *arguments.split()])
    assert "\n" not in str(refused.value) and not list(tmp_path.glob("d4rl.*"))
