"""experiments/runs.py: what is trained, found again, resumed and refused; and what uses it."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from d4rl_runs import LARGE, MEDIUM, UMAZE, alive, wait_for
from legible import assert_legible

from experiments import learning_curves, precision
from experiments.runs import complete, finished_runs, make_job, reason
from trainer.options import parse
from trainer.scores import mean_and_spread


def test_a_job_is_one_process_and_is_not_made_again(d4rl_command):
    assert d4rl_command(tasks=(UMAZE, MEDIUM)) == 0
    assert [call["task"] for call in d4rl_command.calls()] == [UMAZE, MEDIUM]
    arguments = d4rl_command.calls()[0]["arguments"]
    assert arguments[arguments.index("--seeds") :] == ["--seeds", "0", "1"]
    assert arguments[arguments.index("--out") + 1] == str(d4rl_command.out / UMAZE)
    assert d4rl_command(tasks=(UMAZE, MEDIUM)) == 0 and len(d4rl_command.calls()) == 2
    assert [row["seeds"] for row in d4rl_command.table()["rows"]] == [[0, 1], [0, 1]]


def test_only_missing_seeds_are_made(d4rl_command):
    """Other options make other runs, but not those that a resumed run may change too."""
    d4rl_command(seeds=(0,))
    d4rl_command(seeds=(0, 2))
    assert d4rl_command.calls()[1]["arguments"][-2:] == ["--seeds", "2"]
    d4rl_command(seeds=(0, 2), passed=("--threads", "3", "--backend", "eager"))
    assert len(d4rl_command.calls()) == 2
    d4rl_command(seeds=(0, 2), passed=("--eta", "7"))
    assert d4rl_command.calls()[2]["arguments"][-3:] == ["--seeds", "0", "2"]
    assert len(d4rl_command.calls()) == 3


def test_interrupted_runs_are_resumed(d4rl_command):
    """Those that stand at the same update go on together; a broken one is made anew."""
    d4rl_command(seeds=(0, 1, 3))
    # A run with another machine's threads is the same run.
    d4rl_command(seeds=(2,), passed=("--threads", "3"))
    for seed, step in ((0, 50), (1, 20), (2, 50)):
        d4rl_command.interrupt(seed, step)
    paths = [str(d4rl_command.run(seed)) for seed in range(3)]
    (d4rl_command.run(3) / "resume.safetensors").write_bytes(b"broken")
    (d4rl_command.run(3) / "selection.json").unlink()
    assert d4rl_command(seeds=(0, 1, 2, 3)) == 0
    resumed = [call["arguments"] for call in d4rl_command.calls()[2:]]
    first = [["--resume", paths[0]], ["--resume", paths[1]], ["--env", UMAZE]]
    assert [arguments[:2] for arguments in resumed] == first
    assert resumed[0][2] == paths[2] and resumed[2][-2:] == ["--seeds", "3"]
    assert parse(resumed[0], "").seeds == (0, 2)  # dql.py takes it so
    assert d4rl_command.table()["rows"][0]["seeds"] == [0, 1, 2, 3]


FAILURES = [
    ("error: no\nupdate 3\nerror: disk full\n", 1, "disk full"),
    ("Traceback\nX: CUDA out of memory.\n 5%|\r 6%|", 1, "X: CUDA out of memory."),
    ("Traceback (most recent call last):\nKeyError: 'x'\n", 1, "KeyError: 'x'"),
    ("update 3", -9, "killed by signal 9 (out of memory?)"),
    ("update 3", -11, "killed by signal 11"),
    ("update 3", -15, "interrupted"),
    ("interrupted; go on with: python dql.py --resume x", 143, "interrupted"),
    ("", 3, "exit status 3"),
]


@pytest.mark.parametrize("output, exit_code, expected", FAILURES)
def test_a_failure_has_a_reason_of_one_line(output, exit_code, expected):
    assert reason(output, exit_code) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_training_ends_with_the_process_that_watches_it(d4rl_command):
    job, d4rl_command.seconds = d4rl_command.job(), 60
    d4rl_command.ask({UMAZE: job.configs})
    watch = "import sys, json; from experiments.runs import Job, train"
    watch += "; train(Job(*json.loads(sys.argv[1])))"
    watcher = subprocess.Popen([sys.executable, "-c", watch, json.dumps(job)], cwd=ROOT)
    wait_for(d4rl_command.calls)
    (call,) = d4rl_command.calls()
    assert alive(call["pid"])
    watcher.kill()
    watcher.wait()
    wait_for(lambda: not alive(call["pid"]))


def test_a_worker_that_only_waits_does_without_torch():
    loaded = "import sys, experiments.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT).returncode == 0


def test_missing_runs_are_made_or_a_line_says_why(d4rl_command):
    """The others are trained first, and stay."""
    jobs = [d4rl_command.job(task, (3, 4)) for task in (UMAZE, MEDIUM, LARGE)]
    d4rl_command.broken = {MEDIUM: "error: eta became nan", LARGE: int(signal.SIGKILL)}
    d4rl_command.ask({job.task: job.configs for job in jobs})
    with pytest.raises(SystemExit, match=f"^{MEDIUM} failed: eta became nan$"):
        complete(jobs)
    assert list(finished_runs(jobs[0])) == [3, 4]
    d4rl_command.broken = {MEDIUM: 143}
    d4rl_command.ask({job.task: job.configs for job in jobs})
    with pytest.raises(SystemExit, match=f"^{MEDIUM} was interrupted: the same command goes on"):
        complete(jobs)
    d4rl_command.broken = {}
    d4rl_command.ask({job.task: job.configs for job in jobs})
    paths = complete(jobs, at_once=2)
    assert [path.parent.name for path in paths] == [UMAZE] * 2 + [MEDIUM] * 2 + [LARGE] * 2
    made = [call["task"] for call in d4rl_command.calls()]
    assert made == [UMAZE, MEDIUM, LARGE] + [MEDIUM, LARGE] + [MEDIUM]
    assert complete(jobs) == paths and len(d4rl_command.calls()) == len(made)


def test_options_that_dql_refuses_are_refused_in_a_line(tmp_path):
    for task, options in (("antmaze-x-v0", []), (UMAZE, ["--epochs", "0"])):
        with pytest.raises(SystemExit) as refused:
            make_job(task, [0], options, tmp_path)
        assert "\n" not in str(refused.value)


def test_a_lone_seed_has_no_spread():
    assert mean_and_spread([5.0]) == "5.0" and mean_and_spread([1.0, 3.0], 2) == "2.00 ± 1.41"


# ---- The experiments that train with dql.py ------------------------------------------------------

TINY = "--epochs 1 --updates-per-epoch 2 --eval-every 1 --eval-episodes 1 --hidden-dim 16".split()
TINY += "--n-timesteps 2 --n-candidates 2 --batch-size 8 --device cpu".split()


@pytest.fixture
def tiny(tmp_path, monkeypatch, data):
    """Every job trains for two updates on the tiny data set."""

    def make_tiny_job(task, seeds, options, folder, **more):
        return make_job(task, seeds, [*options, *TINY, "--data", data], folder, **more)

    for module in (learning_curves, precision):
        monkeypatch.setattr(module, "make_job", make_tiny_job)
    return data


def test_learning_curves_are_trained_once_and_drawn(tiny, tmp_path, monkeypatch, capsys):
    options = ["--data", tiny, "--seeds", "3", "--algos", "bc", "ql", "--jobs", "2"]
    options += ["--threads", "1", "--backend", "eager"]
    options += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    learning_curves.main(options)
    written = json.loads((tmp_path / "learning_curves.json").read_text())
    made = [(run["algo"], run["seed"], len(run["evaluations"])) for run in written["runs"]]
    assert made == [("bc", 3, 1), ("ql", 3, 1)]
    assert written["summary"]["ql"]["seeds"] == [3]
    assert written["summary"]["bc"]["last"].keys() == {"scores", "mean", "std"}
    path = tmp_path / "learning_curves"
    printed = capsys.readouterr().out
    assert "begins" in printed
    assert printed.endswith(f"figures in {path}.json, curves in {path}.png\n")
    folders = [next((tmp_path / "runs").glob(f"*-{run['algo']}-*/")) for run in written["runs"]]
    for run in written["runs"]:
        run["data"]["label"] = "file $x^.hdf5 (task antmaze-umaze-v0)"  # where TeX sees an error
    picture = written["runs"], folders, UMAZE, path.with_suffix(".png")
    assert_legible(lambda: learning_curves.draw(*picture), picture[-1], monkeypatch)
    before = sorted((tmp_path / "runs").iterdir())
    learning_curves.main(options)
    assert sorted((tmp_path / "runs").iterdir()) == before
    assert "begins" not in capsys.readouterr().out


def test_precisions_are_compared_with_plain_torch(tiny, tmp_path, monkeypatch, capsys):
    """On a CPU in a process that rounds, so that the losses differ, and by little."""
    monkeypatch.setattr(precision.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "has_compiler", lambda: False)
    where = ["--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    precision.main(["--seeds", "0", "--epochs", "1", *where])
    figures = json.loads((tmp_path / "precision_cpu.json").read_text())["figures"]
    assert [f["precision"] for f in figures] == ["fp32", "fp16"]
    plain, rounded = (f["bc_loss"] for f in figures)
    assert plain != rounded and plain == pytest.approx(rounded, rel=1e-2)
    assert f"figures in {tmp_path / 'precision_cpu.json'}" in capsys.readouterr().out
