"""The table of twenty tasks: what is trained, skipped, resumed and recorded, and the figures that come of it."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread
from safetensors.numpy import save_file
from test_run import write_hdf5

import atomic
import dql
from bench import d4rl, d4rl_table
from bench.d4rl_cell import KEPT, find_run, reason

UMAZE, MEDIUM, LARGE = "antmaze-umaze-v0", "antmaze-medium-play-v0", "antmaze-large-play-v0"
FILES = ["d4rl.csv", "d4rl.json", "d4rl.md", "d4rl.png"]


class Bench:
    """bench.d4rl in a folder of its own, with a program in dql.py's place."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.out, self.results = folder, folder / "runs", folder / "results"
        self.broken, self.seconds = {}, 0.0
        shutil.copy(ROOT / "tests" / "d4rl_program.py", folder / "program.py")
        monkeypatch.setattr(d4rl, "PROGRAM", str(folder / "program.py"))

    def __call__(self, *arguments, tasks=(UMAZE,), seeds=(0, 1), passed=()) -> int:
        configs = {task: self.cell(task, seeds, passed).configs for task in tasks if task in dql.RECIPES}
        asked = {"configs": configs, "broken": self.broken, "seconds": self.seconds}
        (self.folder / "program.json").write_text(json.dumps(asked))
        where = ["--out", str(self.out), "--results", str(self.results)]
        return d4rl.main([*arguments, "--tasks", *tasks, "--seeds", *map(str, seeds), *where, "--", *passed])

    def cell(self, task=UMAZE, seeds=(0, 1), passed=()):
        return d4rl.make_cell(task, list(seeds), list(passed), self.out, 0)

    def calls(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, seed: int, task=UMAZE) -> Path:
        return find_run(self.out / task, self.cell(task, [seed]).configs[seed])

    def interrupt(self, seed: int, step: int) -> None:
        """As if the run had been killed after this update."""
        run = self.run(seed)
        (run / "selection.json").unlink()
        save_file({"step": np.array(step)}, run / "resume.safetensors")

    def table(self) -> dict:
        return json.loads((self.results / "d4rl.json").read_text())


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def test_a_cell_is_one_process_with_all_seeds_and_is_not_made_again(bench):
    assert bench(tasks=(UMAZE, MEDIUM)) == 0
    assert [call["task"] for call in bench.calls()] == [UMAZE, MEDIUM]
    arguments = bench.calls()[0]["arguments"]
    assert arguments[arguments.index("--seeds") :] == ["--seeds", "0", "1"]
    assert arguments[arguments.index("--out") + 1] == str(bench.out / UMAZE)
    assert bench(tasks=(UMAZE, MEDIUM)) == 0 and len(bench.calls()) == 2
    assert [row["seeds"] for row in bench.table()["rows"]] == [[0, 1], [0, 1]]


def test_only_missing_seeds_are_made_and_other_options_make_other_runs(bench):
    bench(seeds=(0,))
    bench(seeds=(0, 2))
    assert bench.calls()[1]["arguments"][-2:] == ["--seeds", "2"]
    bench(seeds=(0, 2), passed=("--threads", "3", "--backend", "eager"))  # what a resumed run may change, too
    assert len(bench.calls()) == 2
    bench(seeds=(0, 2), passed=("--eta", "7"))
    assert bench.calls()[2]["arguments"][-3:] == ["--seeds", "0", "2"] and len(bench.calls()) == 3


def test_interrupted_runs_are_resumed_those_at_the_same_update_together(bench):
    bench(seeds=(0, 1, 3))
    bench(seeds=(2,), passed=("--threads", "3"))  # a run of another machine's share of cores is the same run
    for seed, step in ((0, 50), (1, 20), (2, 50)):
        bench.interrupt(seed, step)
    runs = [str(bench.run(seed)) for seed in range(3)]
    (bench.run(3) / "resume.safetensors").write_bytes(b"broken")
    (bench.run(3) / "selection.json").unlink()
    assert bench(seeds=(0, 1, 2, 3)) == 0
    resumed = [call["arguments"] for call in bench.calls()[2:]]
    assert [arguments[:2] for arguments in resumed] == [["--resume", runs[0]], ["--resume", runs[1]], ["--env", UMAZE]]
    assert resumed[0][2] == runs[2] and resumed[2][-2:] == ["--seeds", "3"]
    assert dql.parse_arguments(resumed[0]).seeds == (0, 2)  # dql.py takes it so
    assert bench.table()["rows"][0]["seeds"] == [0, 1, 2, 3]


def test_a_failed_cell_is_recorded_and_tried_again_and_the_others_go_on(bench, capsys):
    bench.broken = {UMAZE: "10%|#\rerror: eta became nan: lower it", MEDIUM: int(signal.SIGKILL)}
    assert bench("--jobs", "2", tasks=(UMAZE, MEDIUM, LARGE)) == 1
    failed = json.loads((bench.out / UMAZE / "failed.json").read_text())
    assert (failed["reason"], failed["exit_code"]) == ("eta became nan: lower it", 1) and failed["date"]
    notes = [row["note"] for row in bench.table()["rows"]]
    assert notes == ["failed: eta became nan: lower it", "failed: killed by signal 9 (out of memory?)", ""]
    assert "eta became nan" in (bench.results / "d4rl.md").read_text() and "eta became nan" in capsys.readouterr().out
    bench.broken = {}
    assert bench(tasks=(UMAZE, MEDIUM, LARGE)) == 0
    assert not list(bench.out.rglob("failed.json")) and [row["note"] for row in bench.table()["rows"]] == ["", "", ""]


def test_a_failure_is_that_of_its_options_alone(bench):
    bench.broken = {UMAZE: "error: eta became nan"}
    assert bench(passed=("--eta", "9"), tasks=(UMAZE, MEDIUM)) == 1
    bench.broken = {}
    assert bench() == 0 and bench.table()["rows"][0]["note"] == ""
    assert bench("--table", passed=("--eta", "9"), tasks=(UMAZE, MEDIUM)) == 1
    assert bench.table()["rows"][0]["note"] == "failed: eta became nan"


def test_a_program_that_leaves_no_run_is_a_failure(bench):
    (bench.folder / "program.py").write_text("pass")
    assert bench() == 1
    assert "left no finished run" in bench.table()["rows"][0]["note"]


@pytest.mark.parametrize(
    "output, exit_code, expected",
    [
        ("error: no\nupdate 3\nerror: disk full\n", 1, "disk full"),
        ("Traceback\ntorch.OutOfMemoryError: CUDA out of memory.\n 5%|\r 6%|", 1, "torch.OutOfMemoryError: CUDA out of memory."),
        ("Traceback (most recent call last):\nKeyError: 'x'\n", 1, "KeyError: 'x'"),
        ("update 3", -9, "killed by signal 9 (out of memory?)"),
        ("update 3", -15, "killed by signal 15"),
        ("", 3, "exit status 3"),
    ],
)
def test_a_failure_has_a_reason_of_one_line(output, exit_code, expected):
    assert reason(output, exit_code) == expected


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.05)


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the test runner's parent has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_children_and_says_how_to_go_on(bench, capsys, interruptible):
    bench.seconds = 60

    def interrupt():
        wait_for(lambda: len(bench.calls()) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert bench("--jobs", "2", tasks=(UMAZE, MEDIUM, LARGE)) == 130
    thread.join()
    assert not any(alive(call["pid"]) for call in bench.calls()) and len(bench.calls()) == 2
    assert f"go on with: python -m bench.d4rl --jobs 2 --tasks {UMAZE}" in capsys.readouterr().err
    assert not list(bench.out.rglob("failed.json"))
    bench.seconds = 0
    assert bench(tasks=(UMAZE, MEDIUM, LARGE)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_training_ends_with_the_process_that_watches_it(bench):
    asked = {"configs": {UMAZE: bench.cell().configs}, "broken": {}, "seconds": 60}
    (bench.folder / "program.json").write_text(json.dumps(asked))
    watch = "import sys, json; from bench.d4rl_cell import Cell, train; train(Cell(*json.loads(sys.argv[1])))"
    watcher = subprocess.Popen([sys.executable, "-c", watch, json.dumps(bench.cell())], cwd=ROOT)
    wait_for(bench.calls)
    (call,) = bench.calls()
    assert alive(call["pid"])
    watcher.kill()
    watcher.wait()
    wait_for(lambda: not alive(call["pid"]))


def test_what_comes_back_from_a_node_is_all_that_the_table_needs(bench):
    bench()
    node = bench.out.rename(bench.folder / "node")
    files = {run.name: {f: (run / f).read_text() for f in KEPT} for run in (node / UMAZE).glob("*/")}
    outcome = d4rl.Outcome(None, files)
    bench.out.mkdir()
    d4rl.keep(bench.cell(), outcome)
    assert bench() == 0 and len(bench.calls()) == 1  # finished: not made again
    assert bench.table()["rows"][0]["rules"]["last"]["scores"] == [10.0, 11.0]
    (bench.run(0) / "log.jsonl").write_text("mine")
    d4rl.keep(bench.cell(), outcome)
    assert (bench.run(0) / "log.jsonl").read_text() == "mine"


def test_a_real_cell_is_trained_and_found_again(tmp_path):
    write_hdf5(tmp_path / "tiny.hdf5")
    tiny = "--epochs 1 --updates-per-epoch 2 --eval-episodes 1 --hidden-dim 16 --n-timesteps 2 --n-candidates 2 --batch-size 8"
    call = ["--tasks", UMAZE, "--seeds", "3", "4", "--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    call += ["--", "--data", str(tmp_path / "tiny.hdf5"), "--device", "cpu", *tiny.split()]
    assert d4rl.main(call) == 0
    (row,) = json.loads((tmp_path / "d4rl.json").read_text())["rows"]
    assert (row["seeds"], row["kind"], row["data"]) == ([3, 4], "FILE", f"file tiny.hdf5 (task {UMAZE})")
    runs = sorted((tmp_path / "runs" / UMAZE).glob("*/"))
    assert d4rl.main(call) == 0 and sorted((tmp_path / "runs" / UMAZE).glob("*/")) == runs and len(runs) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def made(task, seed, score, source="d4rl", crc32=1, best=None):
    """A finished run, as d4rl_table.collect gives it."""
    scores = {"last": score, "best": score if best is None else best, "offline": score - 1, "offline_released": score - 2}
    data = {"source": source, "label": f"{source.upper()} {task}", "crc32": crc32}
    selection = {rule: {"step": 1, "score": score} for rule, score in scores.items()}
    return {"task": task, "seed": seed, "data": data, "selection": selection}


def configs_of(*tasks, seeds=3):
    return {task: {seed: {} for seed in range(seeds)} for task in tasks}


def test_a_row_has_mean_spread_and_interval_of_each_rule():
    scores = [60.0, 71.0, 82.0]
    runs = [made(UMAZE, i, score, best=90.0 + i) for i, score in enumerate(scores)]
    (row,) = d4rl_table.make_rows(configs_of(UMAZE), runs, {})
    last = row["rules"]["last"]
    assert last["mean"] == pytest.approx(71.0) and last["std"] == pytest.approx(11.0)  # (11² + 11²) / 2
    half = 4.302652729749464 * 11.0 / math.sqrt(3)  # Student's t, two degrees of freedom, from a table
    assert (last["low"], last["high"]) == pytest.approx((71.0 - half, 71.0 + half))
    assert row["rules"]["best"]["mean"] == 91.0 and row["rules"]["offline"]["mean"] == pytest.approx(70.0)
    assert row["rules"]["offline_released"]["scores"] == [58.0, 69.0, 80.0]
    assert (row["kind"], row["note"], row["published"]) == ("D4RL", "", {"offline": 93.4, "offline_spread": 3.4, "online": 96.0})


def test_one_seed_has_no_spread_and_equal_seeds_an_interval_of_nothing():
    assert d4rl_table.statistics([5.0]) == {"scores": [5.0], "mean": 5.0, "std": None, "low": None, "high": None}
    assert d4rl_table.shown(d4rl_table.statistics([5.0])) == "5.0"
    assert d4rl_table.shown(d4rl_table.statistics([5.0, 5.0])) == "5.0 ± 0.0 [5.0, 5.0]"


def test_the_interquartile_mean_is_of_all_runs_and_its_bootstrap_keeps_to_tasks():
    scores = [[float(x) for x in np.random.default_rng(i).integers(0, 100, 4)] for i in range(3)]
    middle = sorted(np.concatenate(scores))[3:9]  # a quarter of twelve off each end
    assert d4rl_table.iqm(scores)["iqm"] == pytest.approx(sum(middle) / 6)
    # Of sixteen equally likely draws, the lowest is 0 0 50 50 and the highest 10 10 90 90; a sixteenth is more than 2.5 %.
    assert d4rl_table.iqm([[0.0, 10.0], [50.0, 90.0]]) == {"iqm": 30.0, "low": 25.0, "high": 50.0}
    assert d4rl_table.iqm([[0.0, 10.0], [50.0]])["low"] is None


def test_generated_and_d4rl_data_are_never_in_one_mean():
    runs = [made(UMAZE, 0, 90.0), made(UMAZE, 1, 10.0, "generated"), made(UMAZE, 2, 20.0, "generated")]
    runs.append(made(MEDIUM, 0, 50.0, "minari"))
    rows = d4rl_table.make_rows(configs_of(UMAZE, MEDIUM), runs, {})
    assert [(r["task"], r["kind"], r["rules"]["last"]["mean"]) for r in rows] == [
        (UMAZE, "D4RL", 90.0), (UMAZE, "GENERATED", 15.0), (MEDIUM, "MINARI", 50.0)
    ]  # fmt: skip
    aggregates = d4rl_table.make_aggregates(rows)
    assert [(a["group"], a["kind"], a["rules"]["last"]["iqm"]) for a in aggregates] == [
        (group, *row) for row in (("D4RL", 90.0), ("GENERATED", 15.0), ("MINARI", 50.0)) for group in ("antmaze", "all")
    ]
    text = d4rl_table.markdown(rows, aggregates, [], {"date": "", "options": []})
    lines = [line for line in text.splitlines() if line.startswith(f"| {UMAZE}")]
    assert "GENERATED" not in lines[0] and "**GENERATED**, not D4RL" in lines[1]


def test_other_transitions_of_the_same_name_are_another_row():
    rows = d4rl_table.make_rows(configs_of(UMAZE), [made(UMAZE, 0, 90.0), made(UMAZE, 1, 10.0, crc32=2)], {})
    assert [r["rules"]["last"]["scores"] for r in rows] == [[90.0], [10.0]]
    assert [a["tasks"] for a in d4rl_table.make_aggregates(rows)] == [1, 1]


def test_a_repaired_file_is_not_d4rls():
    run = made(UMAZE, 0, 90.0)
    run["data"]["label"] += ", repaired"
    rows = d4rl_table.make_rows(configs_of(UMAZE), [run, made(UMAZE, 1, 10.0)], {})
    assert [(r["kind"], r["rules"]["last"]["mean"]) for r in rows] == [("D4RL", 10.0), ("REPAIRED", 90.0)]


def test_a_group_is_complete_with_all_its_tasks_and_says_so_if_not():
    everything = list(d4rl_table.PUBLISHED)
    assert everything == list(dql.RECIPES)
    rows = d4rl_table.make_rows(configs_of(*everything), [made(t, s, 1.0 * s) for t in everything for s in range(3)], {})
    complete = d4rl_table.make_aggregates(rows)
    assert [(a["group"], a["tasks"], a["runs"]) for a in complete] == [
        ("locomotion", 9, 27), ("antmaze", 6, 18), ("adroit", 2, 6), ("kitchen", 3, 9), ("all", 20, 60)
    ]  # fmt: skip
    assert [d4rl_table.described(a) for a in complete] == ["9", "6", "2", "3", "20"]
    some = d4rl_table.make_aggregates([r for r in rows if r["task"] in (UMAZE, MEDIUM, "pen-human-v1", "pen-cloned-v1")])
    assert [d4rl_table.described(a) for a in some] == ["2 of 6 tasks", "2", "4 of 20 tasks"]


def test_a_task_without_a_finished_run_is_a_row_that_says_why():
    rows = d4rl_table.make_rows(configs_of(UMAZE, MEDIUM, LARGE), [made(LARGE, 0, 3.0)], {UMAZE: "no memory"})
    assert [r["note"] for r in rows] == ["failed: no memory", "0 of 3 seeds finished", "1 of 3 seeds finished"]


# ---------------------------------------------------------------------------------------------------------------------
# Files and bad input


def test_the_table_can_be_made_while_runs_are_unfinished_and_twice_the_same(bench):
    bench(seeds=(0, 1, 2))
    bench.interrupt(1, 50)
    written = []
    for _ in range(2):
        assert bench("--table", seeds=(0, 1, 2)) == 0
        written.append({name: (bench.results / name).read_bytes() for name in FILES})
    assert written[0] == written[1] and len(bench.calls()) == 1
    (row,) = bench.table()["rows"]
    assert row["seeds"] == [0, 2] and row["note"] == "2 of 3 seeds finished"
    assert bench.table()["runs"][0].keys() >= {"seed", "started", "data", "versions", "config", "selection"}
    assert bench.table().keys() >= {"date", "commit", "cpu", "torch", "options"}
    with (bench.results / "d4rl.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = [(line["rule"], line["seeds"], float(line["mean"]), line["kind"]) for line in lines]
    assert found == [(rule, "2", 11.0, "D4RL") for rule in d4rl_table.RULES]


@pytest.mark.parametrize("tasks", [[UMAZE], list(d4rl_table.PUBLISHED)])
def test_the_picture_has_a_band_for_each_row(tmp_path, tasks):
    runs = [made(task, seed, 50.0 + seed, "generated") for task in tasks[:19] for seed in range(3)]
    rows = d4rl_table.make_rows(configs_of(*tasks), runs, {})
    d4rl_table.draw(rows, {"date": "2026-01-01"}, tmp_path / "d4rl.png")
    height = imread(tmp_path / "d4rl.png").shape[0]
    assert 190 + 60 * len(rows) < height < 200 + 70 * len(rows)


def test_a_full_disk_leaves_the_table_that_was_there(bench, monkeypatch):
    bench()
    before = {name: (bench.results / name).read_bytes() for name in FILES}
    bench(seeds=(0, 1, 2))

    def full(*_):
        raise OSError(28, "No space left on device")

    after = {name: (bench.results / name).read_bytes() for name in FILES}
    assert before["d4rl.md"] != after["d4rl.md"]
    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        bench("--table")
    assert {name: (bench.results / name).read_bytes() for name in FILES} == after
    assert sorted(p.name for p in bench.results.iterdir()) == FILES


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--tasks", "antmaze-umase-v0"], "no task is called 'antmaze-umase-v0'; the nearest are antmaze-umaze-v0"),
        (["--tasks", UMAZE, "--seeds", "1", "1"], "--seeds 1 1 names a seed twice"),
        (["--tasks", UMAZE, "--seeds", "-1"], "--seeds must be at least 0"),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--ray", "--gpus-per-task", "nan"], "--gpus-per-task must lie between 0 and 1, not nan"),
        (["--ray", "--cpus-per-task", "0"], "--cpus-per-task must be at least 1, not 0"),
        (["--tasks", UMAZE, "--", "--out", "x"], "--out cannot be passed on"),
        (["--tasks", UMAZE, "--", "--seed=3"], "--seed=3 cannot be passed on"),
        (["--tasks", UMAZE, "--", "--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--tasks", UMAZE, "--table"], "no finished run in .* was made with these seeds and"),
        (["--tasks", UMAZE, "--out", "/proc/nowhere"], "cannot make a run's folder in /proc/nowhere"),
    ],
)
def test_bad_input_is_refused_in_a_line(tmp_path, arguments, expected):
    where = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match=expected) as refused:
        d4rl.main([*where, *arguments])
    assert "\n" not in str(refused.value) and not list(tmp_path.glob("d4rl.*"))
