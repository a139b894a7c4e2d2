"""experiments/bandit_pictures.py: every picture can be read."""

import json

import numpy as np
import pytest
from conftest import ROOT
from legible import assert_legible

from experiments import bandit_pictures
from experiments.bandit_data import draw_actions
from experiments.bandit_pictures import CRITICS_FIRST

NOTE = "η = 2.5, T = 50, the paper's recipe, seeds 2022, 2023, 2024; 2026-11-26, commit $^+changes"


@pytest.fixture(scope="module")
def committed():
    return json.loads((ROOT / "experiments/results/bandit.json").read_text())


def test_the_table_and_its_panels_can_be_read(committed, tmp_path, monkeypatch):
    rng, path, results = np.random.default_rng(0), tmp_path / "drawn.png", committed["methods"]
    samples = {name: rng.normal(0, 0.8, (200, 2)) for name in results if name != "data"}
    picture = samples, results, draw_actions(rng, 200), NOTE, path
    assert_legible(lambda: bandit_pictures.draw(*picture), path, monkeypatch)


def test_captions_of_panels_do_not_collide(committed, tmp_path, monkeypatch):
    path, data = tmp_path / "drawn.png", draw_actions(np.random.default_rng(0), 200)
    runs = {int(n): found for n, found in committed["steps"].items()}
    picture = dict.fromkeys(runs, data), runs, data, NOTE, path
    assert_legible(lambda: bandit_pictures.draw_steps(*picture), path, monkeypatch)


def test_training_curves_can_be_read(committed, tmp_path, monkeypatch):
    path, names = tmp_path / "drawn.png", ("Diffusion-QL", CRITICS_FIRST)
    runs = {name: committed["methods"][name] for name in names}
    updates = {name: committed["recipes"][name]["updates"] for name in names}
    picture = runs, updates, NOTE, path
    assert_legible(lambda: bandit_pictures.draw_training(*picture), path, monkeypatch)
