"""D4RL's own files: their folder on disk, and downloads from D4RL's host or a mirror."""

import http.client
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import h5py
from tqdm import tqdm

from atomic import written_whole

from .task import NO_SPACE, TaskError, expanded, one_line, system_reason

# D4RL's host is down at times. The mirror has the same base names, but no folders.
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
MIRROR_URL = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"
TIMEOUT = 10  # seconds, for the connection and for each read
BLOCK = 1 << 20  # bytes read from the network at a time


class DownloadError(TaskError):
    """D4RL's file could not be downloaded. `short` says so without advice."""

    def __init__(self, message: str, short: str):
        super().__init__(message)
        self.short = short


def d4rl_folder() -> Path:
    """Where D4RL keeps its files: $D4RL_DATASET_DIR, else ~/.d4rl/datasets, as in D4RL itself.

    Raises DownloadError where there is no home directory.
    """
    folder = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    try:
        return expanded(folder, "set D4RL_DATASET_DIR to a folder for D4RL's files")
    except TaskError as error:
        raise DownloadError(str(error), "no folder for D4RL's file, no home directory") from error


def base_name(task) -> str:
    """The name of the task's file in that folder."""
    return task.dataset_file.rsplit("/", 1)[-1]


def fetch(task) -> str:
    """Download D4RL's file into d4rl_folder(). -> the URL it came from

    The file gets its name once it is as long as the server said and opens as HDF5. Until then it
    has a name of its own in the same folder (atomic.py). Raises DownloadError if no URL gives the
    file or the folder is not writable, TaskError if the disk fails or is full.
    """
    folder, name = d4rl_folder(), base_name(task)
    shown = one_line(folder)
    instead = "go on with a file of yours (--data PATH)"
    if task.can_generate:
        instead += " or with --data generated"
    part, failures = None, {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / name) as part:  # fails now in a folder that is not writable
            for url in (D4RL_URL + task.dataset_file, MIRROR_URL + name):
                try:
                    _fetch_one(url, part, name)
                    return url
                except _NoAnswer as failure:
                    failures[url] = str(failure)
            raise _NoAnswer
    except _NoAnswer:
        each = "; ".join(f"{url}: {why}" for url, why in failures.items())
        why = ", ".join(dict.fromkeys(failures.values()))
        short = f"no D4RL file in {shown}, download failed ({why})"
        raise DownloadError(f"cannot download {name} ({each}); {instead}", short) from None
    except OSError as error:  # of the disk: network errors were turned into _NoAnswer
        why = system_reason(error)
        if part is None:
            what = f"cannot write to {shown} ({why})"
            short = f"no D4RL file in {shown}, folder not writable ({why})"
            todo = f"set D4RL_DATASET_DIR elsewhere, or {instead}"
            raise DownloadError(f"{what}: {todo}", short) from error
        todo = "free some space" if error.errno in NO_SPACE else "look at the disk"
        what = f"cannot save {name} in {shown} ({why})"
        raise TaskError(f"{what}: {todo} or set D4RL_DATASET_DIR") from error


class _NoAnswer(Exception):
    """A URL did not give the file. The text is the reason in a few words."""


def _fetch_one(url: str, part: Path, name: str) -> None:
    """Download url to part.

    Raises _NoAnswer if that gives no whole HDF5 file, OSError if the disk fails.
    """
    try:
        response = urllib.request.urlopen(url, timeout=TIMEOUT)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a bad address
        raise _NoAnswer(_reason(error)) from error
    length = response.headers.get("Content-Length", "")
    total = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
    how = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
    bar = tqdm(total=total, desc=name, disable=None, **how)  # None: only on a terminal
    with response, bar, open(part, "wb") as file:
        for block in _blocks(response, total):
            file.write(block)
            bar.update(len(block))
    # The answer may be an error page, or have come without a size and been cut short.
    try:
        h5py.File(part, "r").close()
    except OSError as error:
        if error.errno:  # the disk's
            raise
        raise _NoAnswer("what came is not a whole HDF5 file") from error


def _blocks(response: http.client.HTTPResponse, total: int | None) -> Iterator[bytes]:
    """The body in blocks. Network errors become _NoAnswer: other OSErrors are then the disk's."""
    received = 0
    try:
        while block := response.read(BLOCK):
            received += len(block)
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _NoAnswer(f"connection lost after {received:,} bytes, {_reason(error)}") from error
    if total is not None and received != total:
        raise _NoAnswer(f"connection lost after {received:,} of {total:,} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return one_line(f"HTTP {error.code} {error.reason}")
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        return "name resolution"
    if isinstance(cause, TimeoutError):
        return f"no answer in {TIMEOUT} s"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    return one_line(cause)
