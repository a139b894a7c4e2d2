"""Where figures and pictures go: runs/bench and runs/experiments, which git ignores.

What README and docs/ quote is committed in bench/results and experiments/results. A command
replaces it only when it is told to: python -m bench.training --out bench/results. Whatever reads
figures, as bench.plot does, reads them from the folder that it writes to.
"""

import tempfile
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def add_results_option(parser: ArgumentParser, package: str, option: str = "--out") -> None:
    """package: bench or experiments. option is another where --out names the folder of runs."""
    what = f"folder of the results; default runs/{package} ({package}/results: as committed)"
    parser.add_argument(option, type=Path, default=ROOT / "runs" / package, help=what)


def make_folder(folder: Path, option: str = "--out") -> None:
    """Raises SystemExit, with one line, if files cannot be written there: call it before anything
    is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        why = f"cannot write into {folder}: {e.strerror or e}"
        raise SystemExit(f"{why}; choose another {option}") from e
