"""experiments/d4rl_table.py: the table's rows, intervals and means over tasks."""

import json
import math

import numpy as np
import pytest
from conftest import ROOT
from legible import assert_legible

import dql
from experiments import d4rl_table
from experiments.d4rl_table import (
    PUBLISHED,
    described,
    iqm,
    make_aggregates,
    make_rows,
    markdown,
    shown,
    statistics,
)

UMAZE, MEDIUM, LARGE = "antmaze-umaze-v0", "antmaze-medium-play-v0", "antmaze-large-play-v0"
SEEDS = range(3)


def made(task, seed, score, source="d4rl", crc32=1, best=None):
    """A finished run, as d4rl_table.collect gives it."""
    scores = {"last": score, "best": score if best is None else best}
    scores |= {"offline": score - 1, "offline_released": score - 2}
    data = {"source": source, "label": f"{source.upper()} {task}", "crc32": crc32}
    selection = {rule: {"step": 1, "score": score} for rule, score in scores.items()}
    return {"task": task, "seed": seed, "data": data, "selection": selection}


def test_a_row_has_mean_spread_and_interval_of_each_rule():
    runs = [made(UMAZE, i, score, best=90.0 + i) for i, score in enumerate((60.0, 71.0, 82.0))]
    (row,) = make_rows({UMAZE: SEEDS}, runs, {})
    last, best, offline, released = row["rules"].values()
    assert last["mean"] == pytest.approx(71.0)
    assert last["std"] == pytest.approx(11.0)  # √((11² + 11²) / 2)
    half = 4.302652729749464 * 11.0 / math.sqrt(3)  # Student's t for two degrees of freedom
    assert (last["low"], last["high"]) == pytest.approx((71.0 - half, 71.0 + half))
    assert best["mean"] == 91.0 and offline["mean"] == pytest.approx(70.0)
    assert released["scores"] == [58.0, 69.0, 80.0]
    assert row["published"] == {"offline": 93.4, "offline_spread": 3.4, "online": 96.0}
    assert (row["kind"], row["note"]) == ("D4RL", "")


def test_one_seed_has_no_spread_and_equal_seeds_have_0():
    alone = {"scores": [5.0], "mean": 5.0, "std": None, "low": None, "high": None}
    assert statistics([5.0]) == alone and shown(alone) == "5.0"
    assert shown(statistics([5.0, 5.0])) == "5.0 ± 0.0 [5.0, 5.0]"


def test_the_interquartile_mean_is_of_all_runs():
    """Its bootstrap draws again within each task."""
    scores = [[float(x) for x in np.random.default_rng(i).integers(0, 100, 4)] for i in range(3)]
    middle = sorted(np.concatenate(scores))[3:9]  # a quarter of twelve off each end
    assert iqm(scores)["iqm"] == pytest.approx(sum(middle) / 6)
    # Of sixteen equally likely draws, the lowest is 0 0 50 50 and the highest 10 10 90 90; a
    # sixteenth is more than 2.5 %.
    assert iqm([[0.0, 10.0], [50.0, 90.0]]) == {"iqm": 30.0, "low": 25.0, "high": 50.0}
    assert iqm([[0.0, 10.0], [50.0]])["low"] is None


def test_generated_and_d4rl_data_are_never_in_one_mean():
    runs = [made(UMAZE, 0, 90.0), made(MEDIUM, 0, 50.0, "minari")]
    runs += [made(UMAZE, 1, 10.0, "generated"), made(UMAZE, 2, 20.0, "generated")]
    rows = make_rows({UMAZE: SEEDS, MEDIUM: SEEDS}, runs, {})
    means = [(UMAZE, "D4RL", 90.0), (UMAZE, "GENERATED", 15.0), (MEDIUM, "MINARI", 50.0)]
    assert [(r["task"], r["kind"], r["rules"]["last"]["mean"]) for r in rows] == means
    aggregates = make_aggregates(rows)
    found = [(a["group"], a["kind"], a["rules"]["last"]["iqm"]) for a in aggregates]
    assert found == [(group, *mean[1:]) for mean in means for group in ("antmaze", "all")]
    text = markdown(rows, aggregates, [], {"date": "", "options": []})
    lines = [line for line in text.splitlines() if line.startswith(f"| {UMAZE}")]
    assert "GENERATED" not in lines[0] and "**GENERATED**, not D4RL" in lines[1]


def test_other_transitions_of_the_same_name_are_another_row():
    rows = make_rows({UMAZE: SEEDS}, [made(UMAZE, 0, 90.0), made(UMAZE, 1, 10.0, crc32=2)], {})
    assert [r["rules"]["last"]["scores"] for r in rows] == [[90.0], [10.0]]
    assert [a["tasks"] for a in make_aggregates(rows)] == [1, 1]


def test_a_repaired_file_is_not_counted_as_d4rls():
    run = made(UMAZE, 0, 90.0)
    run["data"]["label"] += ", repaired"
    rows = make_rows({UMAZE: SEEDS}, [run, made(UMAZE, 1, 10.0)], {})
    found = [(r["kind"], r["rules"]["last"]["mean"]) for r in rows]
    assert found == [("D4RL", 10.0), ("REPAIRED", 90.0)]


def test_a_group_is_complete_with_all_its_tasks():
    """And says so if it is not."""
    everything = list(PUBLISHED)
    assert everything == list(dql.RECIPES)
    runs = [made(task, seed, 1.0 * seed) for task in everything for seed in SEEDS]
    rows = make_rows(dict.fromkeys(everything, SEEDS), runs, {})
    complete = make_aggregates(rows)
    groups = [("locomotion", 9, 27), ("antmaze", 6, 18), ("adroit", 2, 6), ("kitchen", 3, 9)]
    assert [(a["group"], a["tasks"], a["runs"]) for a in complete] == [*groups, ("all", 20, 60)]
    assert [described(a) for a in complete] == ["9", "6", "2", "3", "20"]
    few = (UMAZE, MEDIUM, "pen-human-v1", "pen-cloned-v1")
    some = make_aggregates([r for r in rows if r["task"] in few])
    assert [described(a) for a in some] == ["2 of 6 tasks", "2", "4 of 20 tasks"]


def test_a_task_without_a_finished_run_is_a_row_that_says_why():
    seeds = {UMAZE: SEEDS, MEDIUM: SEEDS, LARGE: SEEDS}
    rows = make_rows(seeds, [made(LARGE, 0, 3.0)], {UMAZE: "no memory"})
    notes = ["failed: no memory", "0 of 3 seeds finished", "1 of 3 seeds finished"]
    assert [r["note"] for r in rows] == notes


def test_the_picture_can_be_read(tmp_path, monkeypatch):
    committed = json.loads((ROOT / "experiments/results/d4rl.json").read_text())
    path, picture = tmp_path / "drawn.png", (committed["rows"], committed)
    assert_legible(lambda: d4rl_table.draw(*picture, path), path, monkeypatch)
