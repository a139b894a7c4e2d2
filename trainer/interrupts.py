"""Ctrl-C and the signals that end a process: raised at once, or where a run has been saved.

as_exceptions()    a block in which SIGINT, SIGTERM and SIGHUP raise Stopped
held()             a block in it where the first one is only noted, and raised at the end
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = "SIGINT", "SIGTERM", "SIGHUP"  # Ctrl-C; kill, and what a cluster sends; a closed terminal


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. status: its exit status then, 128 + the number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class Held:
    """number: of the signal that came, or 0."""

    number = 0


_held: list[Held] = []


def _arrived(number, frame) -> None:
    if _held and not _held[-1].number:
        _held[-1].number = number
    else:
        raise Stopped(number)


@contextmanager
def held() -> Iterator[Held]:
    """Look at .number where it is safe to stop. A second signal is raised at once."""
    stop = Held()
    _held.append(stop)
    try:
        yield stop
    finally:
        _held.remove(stop)
    if stop.number:
        raise Stopped(stop.number)


@contextmanager
def as_exceptions() -> Iterator[None]:
    """In another thread than the main one, which signals do not reach, nothing changes; nor does
    a signal that is ignored, as by nohup."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in NAMES:
            number = getattr(signal, name, None)  # not every system has each
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _arrived)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
