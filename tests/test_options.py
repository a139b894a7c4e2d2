"""trainer/options.py: the paper's recipes, and every option over them."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import dql
import tasks
import tasks.antmaze
from trainer import options
from trainer.options import Options
from trainer.setup import choose_device

pytestmark = pytest.mark.usefixtures("short_episodes")


def parsed(argv):
    return options.parse(argv, "")


PAPER = """
    halfcheetah-medium-v2          1.0   no   none       2000  9  1  3e-4
    hopper-medium-v2               1.0   no   none       2000  9  2  3e-4
    walker2d-medium-v2             1.0   no   none       2000  1  1  3e-4
    halfcheetah-medium-replay-v2   1.0   no   none       2000  2  0  3e-4
    hopper-medium-replay-v2        1.0   no   none       2000  4  2  3e-4
    walker2d-medium-replay-v2      1.0   no   none       2000  4  1  3e-4
    halfcheetah-medium-expert-v2   1.0   no   none       2000  7  0  3e-4
    hopper-medium-expert-v2        1.0   no   none       2000  5  2  3e-4
    walker2d-medium-expert-v2      1.0   no   none       2000  5  1  3e-4
    antmaze-umaze-v0               0.5   no   cql        1000  2  2  3e-4
    antmaze-umaze-diverse-v0       2.0   yes  cql        1000  3  2  3e-4
    antmaze-medium-play-v0         2.0   yes  cql        1000  2  1  1e-3
    antmaze-medium-diverse-v0      3.0   yes  cql        1000  1  1  3e-4
    antmaze-large-play-v0          4.5   yes  cql        1000 10  2  3e-4
    antmaze-large-diverse-v0       3.5   yes  cql        1000  7  1  3e-4
    pen-human-v1                   0.15  no   normalize  1000  7  2  3e-5
    pen-cloned-v1                  0.1   no   normalize  1000  8  2  3e-5
    kitchen-complete-v0            0.005 no   none        250  9  2  3e-4
    kitchen-partial-v0             0.005 no   none       1000 10  2  3e-4
    kitchen-mixed-v0               0.005 no   none       1000 10  0  3e-4
"""
PAPER = {row.split()[0]: row.split()[1:] for row in PAPER.strip().splitlines()}
# In the paper and the released code.
SAME_FOR_ALL = {
    "critic_lr": 3e-4, "discount": 0.99, "tau": 0.005, "batch_size": 256, "n_timesteps": 5,
    "schedule": "vp", "hidden_dim": 256, "n_candidates": 50, "ema_decay": 0.995, "ema_start": 1000,
    "ema_every": 5, "lr_decay": "none", "updates_per_epoch": 1000, "eval_every": 50,
}  # fmt: skip


@pytest.mark.parametrize("env", PAPER)
def test_a_task_has_the_papers_recipe(env):
    eta, max_q, reward_tune, epochs, grad_norm, top_k, lr = PAPER[env]
    config = parsed(["--env", env])
    assert config.env == env and config.algo == "ql"
    assert (config.eta, config.grad_norm, config.lr) == (float(eta), float(grad_norm), float(lr))
    assert (config.max_q_backup, config.reward_tune) == (max_q == "yes", reward_tune)
    assert (config.epochs, config.top_k) == (int(epochs), int(top_k))
    assert config.eval_episodes == (10 if env.endswith("v2") else 100)
    assert SAME_FOR_ALL.items() <= dataclasses.asdict(config).items()


def test_every_task_has_a_recipe():
    assert sorted(tasks.names()) == sorted(PAPER) == sorted(dql.RECIPES)


OVERRIDES = {
    "algo": "bc", "data": "/x.hdf5", "n_generated": 500, "seed": 7, "out": "elsewhere",
    "device": "cpu", "threads": 1, "epochs": 3, "updates_per_epoch": 10, "eval_every": 2,
    "eval_episodes": 5, "batch_size": 32, "n_timesteps": 10, "schedule": "cosine",
    "hidden_dim": 64, "eta": 0.25, "reward_tune": "normalize", "lr": 1e-4, "critic_lr": 2e-4,
    "lr_decay": "released", "decay_epochs": 2, "grad_norm": 0.5, "discount": 0.9, "tau": 0.1,
    "ema_decay": 0.9, "ema_start": 0, "ema_every": 1, "n_candidates": 3, "top_k": 0, "which": "best", "episodes": 4,
    "backend": "eager", "precision": "tf32", "matmul_precision": "high",
}  # fmt: skip


@pytest.mark.parametrize("quick", [[], ["--quick"]], ids=["paper", "quick"])
def test_any_field_can_be_set_over_any_recipe(quick):
    env = ["--env", "antmaze-large-play-v0", *quick]
    others = "max_q_backup quick repair_data env seeds resume eval export render".split()
    assert OVERRIDES.keys() | set(others) == {f.name for f in dataclasses.fields(Options)}
    recipe = parsed(env)
    for field, value in OVERRIDES.items():
        config = parsed([*env, f"--{field.replace('_', '-')}", str(value)])
        assert getattr(recipe, field) != value, "the test asks for what is there already"
        assert config == dataclasses.replace(recipe, **{field: value})
    assert parsed([*env, "--no-max-q-backup"]) == dataclasses.replace(recipe, max_q_backup=False)
    assert parsed([*env, "--seeds", "3", "1"]) == dataclasses.replace(recipe, seeds=(3, 1))


def test_the_last_of_quick_and_no_quick_counts():
    paper, quick = parsed(["--env", "antmaze-umaze-v0"]), parsed(["--quick"])
    assert parsed(["--quick", "--no-quick"]) == paper != quick
    assert parsed(["--no-quick", "--quick"]) == quick


def comments():
    """Options' fields and what is said of each."""
    found, said, sources = {}, [], ""
    for module, begin, end in (
        (options, "class TaskOptions:", "GROUPS ="),
        (dql, "class Config:", "class Recipe"),
    ):
        sources += Path(module.__file__).read_text().split(begin)[1].split(end)[0]
    for line in map(str.strip, sources.splitlines()):
        field = re.match(r"(\w+): [^#]*(?:#(.*))?", line)
        if line.startswith("#"):
            said.append(line[1:].strip())
        elif field:
            found.setdefault(field[1], " ".join(" ".join([*said, field[2] or ""]).split()))
            said = []
    return found


@pytest.mark.parametrize("env", tasks.names())
def test_quick_changes_what_it_says_and_nothing_else(env):
    paper, quick = parsed(["--env", env]), parsed(["--env", env, "--quick"])
    changed = {k for k, v in dataclasses.asdict(quick).items() if v != getattr(paper, k)}
    may = "quick epochs eval_every eval_episodes lr critic_lr lr_decay tau matmul_precision"
    assert changed <= {*may.split(), "reward_tune", "eta", "max_q_backup"}
    assert (quick.lr, quick.critic_lr, quick.lr_decay, quick.tau) == (3e-3, 1e-3, "cosine", 0.02)
    assert quick.eval_episodes == min(paper.eval_episodes, 50)
    expected = (paper.reward_tune, paper.max_q_backup)
    if tasks.get(env).family == "antmaze":
        expected = ("sparse", True)
    assert (quick.reward_tune, quick.max_q_backup) == expected
    assert quick.eta == pytest.approx(0.1 * paper.eta)
    said, numbers = comments()["quick"], (f"{quick.epochs} epochs", f"tau {quick.tau}")
    for words in (*numbers, "at most 50 episodes", "3e-3", "1e-3", "0.1·η", "mazes: max-Q, sparse"):
        assert words in said


@pytest.mark.parametrize("precision", ["medium", "highest"])
def test_float32_products_are_computed_as_asked(precision):
    try:
        choose_device(Options(matmul_precision=precision, device="cpu"))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_help_shows_every_field_with_its_comment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")  # one column of groups
    with pytest.raises(SystemExit) as end:
        dql.main(["--env", "antmaze-large-play-v0", "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert comments().keys() == {f.name for f in dataclasses.fields(Options)}
    for field, comment in comments().items():
        assert f"--{field.replace('_', '-')} " in shown.replace(",", " ")
        assert comment in shown
    assert "(default: 4.5)" in shown  # the recipe's, not the class's
