"""Files that are there whole or not at all, and folders with one writer at a time."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new, empty file beside `path`, which replaces `path` when the block succeeds.

    Its name, .NAME.XXXXXXXX.part, is no other writer's. A block that fails leaves what was at
    `path` before, and no temporary file. OSErrors pass through, that of a folder which cannot be
    written to before the block begins.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    temporary.touch(exist_ok=False)
    try:
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # the user's default: some libraries write for the owner alone
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a clean-up that fails must not hide why it was needed
            temporary.unlink(missing_ok=True)


def lock(path: str | os.PathLike) -> filelock.FileLock:
    """The lock of the file or folder `path`, for `with lock(path):`, which waits for it.

    lock(path).acquire(timeout=0) raises filelock.Timeout where another process has it. It is
    released when its process ends, however it ends. OSErrors pass through.
    """
    path = Path(path)
    return filelock.FileLock(path.with_name(f".{path.name}.lock"))
