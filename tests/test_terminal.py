"""trainer/terminal.py and trainer/command.py: what is said never ends a run."""

import errno
import io
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_runs import call, make_finished_run, the_run, train, write_hdf5

import dql
from trainer import terminal


def python(program, *words, **how):
    """A process of its own, which ends with status 0 unless it is looked at."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment |= how.pop("environment", {})
    command = [sys.executable, *how.pop("flags", ()), program, *map(str, words)]
    return subprocess.run(command, env=environment, **how)


# ---- Streams -------------------------------------------------------------------------------------


class Full(io.StringIO):
    def __init__(self, number):
        self.number, self.tried = number, 0
        super().__init__()

    def write(self, text):
        self.tried += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.usefixtures("short_episodes", "no_pictures")
@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 1), (errno.EPIPE, 0)])
def test_output_that_cannot_be_written_loses_nothing(
    tmp_path, data, monkeypatch, capsys, number, status
):
    """The run is whole; a full disk is said at the end, a pipe that was closed is not."""
    out = Full(number)
    monkeypatch.setattr(sys, "stdout", out)
    assert call(data, tmp_path / "runs") == status
    assert out.tried and (the_run(tmp_path / "runs") / "selection.json").exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == status and all("No space left" in line for line in said)


@pytest.mark.usefixtures("short_episodes", "no_pictures")
def test_closed_streams_do_not_end_a_run(tmp_path, data, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert call(data, tmp_path / "runs") == 0
    assert (the_run(tmp_path / "runs") / "selection.json").exists()


def test_a_character_that_a_terminal_lacks_is_replaced():
    raw = io.BytesIO()
    stream = terminal.SteadyStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("51.2 ± 3.4, θ", file=stream)
    assert raw.getvalue() == b"51.2 ? 3.4, ?\n"
    assert stream.error is None and stream.encoding == "ascii"


def test_help_needs_letters_neither_home_nor_docstrings():
    environment = {"PYTHONIOENCODING": "ascii", "HOME": "/nonexistent"}
    how = {"environment": environment, "flags": ["-OO"], "capture_output": True}
    shown = python("dql.py", "--help", cwd=ROOT, **how)
    assert shown.returncode == 0 and not shown.stderr
    assert b"antmaze-{umaze,umaze-diverse" in shown.stdout


def test_help_goes_through_a_pipe_that_closes():
    read, write = os.pipe()
    os.close(read)
    shown = python("dql.py", "--help", cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert shown.returncode == 0 and not shown.stderr


def test_help_loads_nothing_heavy():
    """It is there in three seconds on an idle machine: torch takes one of them."""
    seen = (
        "import sys, dql\ntry: dql.main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    shown = python("-c", seen, cwd=ROOT, capture_output=True, text=True)
    loaded = set(shown.stderr.split())
    heavy = {"triton", "matplotlib", "scipy", "tensorboard", "imageio"}
    assert "torch" in loaded and not loaded & heavy


# ---- Bars ----------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_in_a_file_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(terminal, "SECONDS_A_LINE", 0.05)
    with terminal.progress(total=3000) as bar:
        for _ in range(3000):
            bar.update()
            if bar.n == 1500:
                time.sleep(0.1)
    text = sys.stderr.getvalue()
    assert "\r" not in text and 1 <= len(text.splitlines()) <= 6
    assert all(re.search(r"\d+/3000", line) for line in text.splitlines())


def test_a_short_bar_leaves_no_line_in_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with terminal.progress(total=3, leave=False) as bar:
        bar.update(3)
    assert sys.stderr.getvalue() == ""


@pytest.mark.usefixtures("short_episodes", "no_pictures")
def test_the_bar_says_what_matters_within_80_columns(tmp_path, data, monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    train(data, tmp_path / "runs")
    states = [s.strip("\n") for s in shown.getvalue().split("\r")]
    last = [s for s in states if s.startswith("ql 100%")][-1]
    assert len(last) <= 80
    assert re.search(r"20\.0/20\.0 .*\d/s .* left, bc \d\.\d{4}, Q -?\d+\.\d, score \d+\.\d", last)


# ---- Commands to paste, and pictures -------------------------------------------------------------


def test_a_command_can_be_pasted(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(terminal.command("--resume", "runs/my run's"))
    assert words[1:] == ["dql.py", "--resume", "runs/my run's"]
    assert not Path(words[1]).is_absolute()
    monkeypatch.chdir(tmp_path)
    assert Path(shlex.split(terminal.command())[1]) == ROOT / "dql.py"


@pytest.mark.usefixtures("short_episodes")
def test_names_in_titles_are_text(tmp_path):
    """Not formulas: matplotlib would try to set what stands between dollars."""
    data = write_hdf5(tmp_path / "cost$5^_$x {é}.hdf5")
    run = train(data, tmp_path / "runs")
    assert (run / "curve.png").stat().st_size and (run / "episodes_00000020.png").stat().st_size


@pytest.mark.usefixtures("short_episodes")
def test_a_picture_that_fails_is_left_out(tmp_path, data, monkeypatch, capsys):
    import tasks
    from trainer.folder import RunFolder

    def fails(*_):
        raise ValueError("no ink\nat all")

    monkeypatch.setattr(tasks.Task, "draw", fails)
    monkeypatch.setattr(RunFolder, "draw_curve", fails)
    run = train(data, tmp_path / "runs")
    said = capsys.readouterr().out
    assert "picture of the episodes is left out: no ink\n" in said and "curve's picture" in said
    assert dql.main(["--eval", str(run), "--episodes", "1"]) == 0
    printed = capsys.readouterr().out
    assert "(one episode;" in printed and "±" not in printed


@pytest.mark.usefixtures("short_episodes")
def test_a_run_that_may_only_be_read_is_evaluated(tmp_path, monkeypatch, capsys):
    run = make_finished_run(tmp_path)
    for path in run.rglob("*"):
        path.chmod(0o444 if path.is_file() else 0o555)
    run.chmod(0o555)
    capsys.readouterr()
    if os.access(run, os.W_OK):  # root may write everywhere
        monkeypatch.setattr("tasks.task.written_whole", no_disk)
    assert dql.main(["--eval", str(run), "--episodes", "2"]) == 0
    score, picture = capsys.readouterr().out.splitlines()
    assert "standard error of 2 episodes" in score and "left out" in picture
    run.chmod(0o755)


def no_disk(path):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_help_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        shown = python("dql.py", "--help", cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert shown.returncode == 1 and b"could not be written" in shown.stderr
