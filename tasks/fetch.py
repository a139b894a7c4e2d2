"""D4RL's own files: the folder where they lie, and fetching one that is not there, from D4RL's host or a mirror."""

import contextlib
import errno
import http.client
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import h5py
from tqdm import tqdm

from .task import TaskError, one_line

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"  # down at times, hence the mirror
MIRROR_URL = (
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/"  # the same base names, no folders
)
TIMEOUT = 10  # seconds, for the connection and for each read
BLOCK = 1 << 20  # bytes taken from the network at a time


class DownloadError(TaskError):
    """D4RL's file could not be fetched. `short` is the reason in a few words."""

    def __init__(self, message: str, short: str):
        super().__init__(message)
        self.short = short


def d4rl_folder() -> Path:
    """Where D4RL keeps its files: $D4RL_DATASET_DIR, as D4RL itself honours it, else ~/.d4rl/datasets."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def base_name(task) -> str:
    """The name of D4RL's file in that folder."""
    return task.dataset_file.rsplit("/", 1)[-1]


def fetch(task) -> str:
    """Fetches D4RL's file into d4rl_folder() and returns the address that gave it.

    The file gets its name once it is as long as the server said and opens as HDF5. Until then it is called
    <name>.part-<pid> and stands in the same folder; that one is removed whatever happens. Raises
    DownloadError when no address gives the file or the folder cannot be written to, TaskError when the disk
    fails or is full.
    """
    folder, name = d4rl_folder(), base_name(task)
    part = folder / f"{name}.part-{os.getpid()}"
    go_on = "go on with a file of yours (--data PATH)" + (
        " or with --data generated" if task.can_generate else ""
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.touch()  # asked before the network is
    except OSError as error:
        message = f"cannot write to {folder} ({error.strerror}): set D4RL_DATASET_DIR elsewhere, or {go_on}"
        raise DownloadError(message, f"folder not writable: {error.strerror}") from error
    failures = {}
    try:
        for url in (D4RL_URL + task.dataset_file, MIRROR_URL + name):
            try:
                _fetch_one(url, part, name)
                os.replace(part, folder / name)
                return url
            except _NoAnswer as failure:
                failures[url] = str(failure)
    except OSError as error:  # the network's are all _NoAnswer by now, so this is the disk's
        todo = "free some space" if error.errno == errno.ENOSPC else "look at the disk"
        message = (
            f"cannot save {name} in {folder} ({error.strerror}): {todo} or set D4RL_DATASET_DIR"
        )
        raise TaskError(message) from error
    finally:
        with contextlib.suppress(OSError):  # a clean-up that fails must not hide why it was needed
            part.unlink(missing_ok=True)
    each = "; ".join(f"{url}: {why}" for url, why in failures.items())
    short = ", ".join(dict.fromkeys(failures.values()))
    raise DownloadError(f"cannot download {name} ({each}); {go_on}", short)


class _NoAnswer(Exception):
    """An address did not give the file. The text is the reason in a few words."""


def _fetch_one(url: str, part: Path, name: str) -> None:
    """Writes what url gives to part: _NoAnswer when that is not a whole HDF5 file, OSError for the disk."""
    try:
        response = urllib.request.urlopen(url, timeout=TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        raise _NoAnswer(_reason(error)) from error
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name, leave=False)
    with response, bar, open(part, "wb") as file:
        for block in _blocks(response, total):
            file.write(block)
            bar.update(len(block))
    try:
        h5py.File(
            part, "r"
        ).close()  # an error page is an answer too, and without a size HDF5 knows its own
    except OSError as error:
        raise _NoAnswer("what came is not a whole HDF5 file") from error


def _blocks(response: http.client.HTTPResponse, total: int | None) -> Iterator[bytes]:
    """The body. Network errors become _NoAnswer here, so that the OSErrors of writing are told from them."""
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
