"""What a run says: output that cannot break it, progress bars, commands to paste.

Words and pictures are decoration: a closed pipe, a full disk or an old terminal must not end a run.
"""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS_A_LINE = 30  # between a bar's lines where there is no terminal, as in a log file


class SteadyStream:
    """A text stream that drops what it cannot write. `error` is then the first reason, an OSError.

    Characters that the stream's encoding lacks are replaced. stream may be None, a closed one.
    """

    def __init__(self, stream):
        # Opened here, a closed stream's number is taken: no file of the run gets it.
        self._stream = open(os.devnull, "w") if stream is None else stream
        self.error: OSError | None = None
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        self.flush()
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def _attempt(self, do, *args) -> None:
        try:
            do(*args)
        except OSError as e:
            self.error = self.error or e
            # What is still in the buffer would fail again, at the latest when Python ends.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def steady_output() -> Iterator[SteadyStream]:
    """sys.stdout and sys.stderr as SteadyStreams -> stdout's"""
    out, err = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out


def say(line: str) -> None:
    """Print a line at once, above any progress bar."""
    from tqdm import tqdm

    tqdm.write(line)


class _Lines:
    """What a bar writes, as lines: each of its states begins with a carriage return."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> None:
        for state in filter(None, map(str.strip, text.split("\r"))):
            self._stream.write(f"{state}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(**how):
    """A tqdm(**how) on a terminal; elsewhere it prints a line every SECONDS_A_LINE."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        rarely = {"mininterval": SECONDS_A_LINE, "delay": SECONDS_A_LINE, "ncols": 80}
        return tqdm(file=_Lines(sys.stderr), **rarely, **how)
    columns = 0
    with contextlib.suppress(OSError, ValueError):
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    # Some terminals, as those that `script` makes, have no size: nothing would be shown.
    width = {"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}
    return tqdm(file=sys.stderr, **width, **how)


def command(*words) -> str:
    """`python dql.py` with these words as it can be pasted here, with the python that runs this."""
    python = sys.executable or "python"
    if shutil.which("python") == python:
        python = "python"
    return shlex.join(map(str, (_nearby(python), _nearby(ROOT / "dql.py"), *words)))


def _nearby(path: str | Path) -> str:
    """A path from the current folder where it lies below it."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).relative_to(Path.cwd()))
    return str(path)


@contextlib.contextmanager
def decoration(what: str) -> Iterator[None]:
    """A block that may fail without harm: the reason is said in a line."""
    try:
        yield
    except Exception as e:
        say(f"{what} is left out: {first_line(e)}")


def first_line(error: Exception) -> str:
    """What an error says, on one line and without characters that a terminal would obey."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in line)
