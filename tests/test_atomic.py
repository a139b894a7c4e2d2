"""atomic.py: writers with one name, modes, locks."""

import os
import subprocess
import sys

import filelock
import pytest
from conftest import ROOT

from atomic import lock, written_whole


def test_two_writers_of_one_process_number_do_not_meet(tmp_path, monkeypatch):
    """As in two containers that share a folder, where each is process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with written_whole(tmp_path / "a") as first:
        first.write_text("half")
        with written_whole(tmp_path / "a") as second:
            assert second != first
            second.write_text("second")
        assert (tmp_path / "a").read_text() == "second" and first.read_text() == "half"
        first.write_text("first")
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "before" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_user_s_default_mode(tmp_path, mask, mode):
    """Whatever the library that writes them does."""
    before = os.umask(mask)
    try:
        with written_whole(tmp_path / "a") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


HOLDS = """
import sys
from atomic import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    input()
"""


def test_a_lock_ends_with_its_process(tmp_path):
    words = [sys.executable, "-c", HOLDS, str(tmp_path / "a")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(filelock.Timeout):
            lock(tmp_path / "a").acquire(timeout=0)
        other.kill()
        other.wait()
    with lock(tmp_path / "a").acquire(timeout=10):
        pass
