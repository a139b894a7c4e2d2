"""bench/folders.py, and what every command of bench/ and experiments/ has: results in runs/ unless
it is told otherwise, and output that any terminal can show."""

import io
import os
import sys
from argparse import ArgumentParser

import pytest
from conftest import ROOT

from bench import folders

FILES = sorted([*ROOT.glob("bench/*.py"), *ROOT.glob("experiments/*.py")])
COMMANDS = [f"{p.parent.name}.{p.stem}" for p in FILES if "\ndef main(" in p.read_text()]
NO_RESULTS = "bench.all"  # its parts have


class Parsed(Exception):
    """Ends a command that has parsed its options."""


@pytest.mark.parametrize("name", COMMANDS)
def test_results_go_to_runs_by_default(name, monkeypatch):
    """Nothing replaces the committed figures unless it is told to."""

    def parse_args(parser, _):
        raise Parsed({option.dest: option.default for option in parser._actions})

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed) as parsed:
        pytest.importorskip(name).main([])
    (defaults,) = parsed.value.args
    results, package = defaults.get("results", defaults.get("out")), name.split(".")[0]
    assert results == (None if name == NO_RESULTS else ROOT / "runs" / package)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_character_that_a_terminal_lacks_is_replaced(name, monkeypatch):
    def parse_args(*_):
        print("55.3 ± 13.3")
        raise Parsed

    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        pytest.importorskip(name).main([])
    assert shown.getvalue() == b"55.3 ? 13.3\n"


def test_the_folder_is_made_or_a_line_says_why_not(tmp_path):
    folders.make_folder(tmp_path / "new" / "deep")
    assert not os.listdir(tmp_path / "new" / "deep")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit, match=f"cannot write into {folder}.*another --results") as e:
            folders.make_folder(folder, "--results")
        assert "\n" not in str(e.value)
