"""tasks/hdf5.py: files that are locked, private or odd, or that lead to other files."""

import errno
import fcntl
import os

import h5py
import numpy as np
import pytest
from dataset_files import TASK, Walks, arrays, assert_same, error_of, four_walks, quiet, write

import tasks
from tasks import datasets, hdf5

PEN = tasks.get("pen-human-v1")


def read(path, **options):
    return hdf5.read_hdf5(path, TASK, log=quiet, **options)


# ---- Files that may be sound ---------------------------------------------------------------------


def test_a_locked_file_is_called_locked(tmp_path, d4rl_folder):
    """By its path and as D4RL's, which is neither replaced nor to be deleted."""
    mine = write(tmp_path / "mine.hdf5", arrays())
    d4rls = write(d4rl_folder / "Ant_maze.hdf5", arrays())
    for source, path in ((mine, mine), ("auto", d4rls), ("d4rl", d4rls)):
        with open(path, "rb") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            message = error_of(datasets.load, TASK, source, log=quiet)
        assert message.startswith(f"{path} cannot be read, another process has locked it: wait")
        assert len(datasets.load(TASK, source, log=quiet))


SYSTEM_ERRORS = {
    "private": (PermissionError(errno.EACCES, "of h5py"), "this user has no permission"),
    "disk": (OSError(errno.EIO, "of h5py"), f"{os.strerror(errno.EIO)}: look at the disk"),
    "no locks": (OSError(errno.ENOLCK, "of h5py"), f"{os.strerror(errno.ENOLCK)}: look at"),
    "open": (OSError("file is already open for write"), "its writer has not closed it"),
}


@pytest.mark.parametrize("error, words", SYSTEM_ERRORS.values(), ids=SYSTEM_ERRORS)
def test_the_systems_errors_are_not_the_files(d4rl_folder, monkeypatch, error, words):
    def refuse(*args):
        raise error

    write(d4rl_folder / "Ant_maze.hdf5", arrays())
    monkeypatch.setattr(h5py, "File", refuse)
    message = error_of(datasets.load, TASK, log=quiet)
    assert words in message and "of h5py" not in message
    assert "delete" not in message and "whole" not in message


def test_an_unknown_compression_is_not_called_damage(tmp_path):
    made = arrays()
    path = write(tmp_path / "a.hdf5", made)
    with h5py.File(path, "a") as file:
        del file["actions"]
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk((50, 8))
        layout.set_filter(32_767, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((50, 8))
        actions = h5py.h5d.create(file.id, b"actions", h5py.h5t.IEEE_F32LE, space, layout)
        actions.write_direct_chunk((0, 0), made["actions"].tobytes(), filter_mask=0)
    message = error_of(read, path)
    assert "actions is compressed by 32767, unknown here; write it again with gzip" in message


# ---- What is no file, or no whole one ------------------------------------------------------------


def test_garbage_and_parts_are_no_whole_files(tmp_path):
    whole = write(tmp_path / "whole.hdf5", arrays()).read_bytes()
    for content in (b"", b"<html>404</html>", os.urandom(5000), whole[: len(whole) // 2]):
        (tmp_path / "a.hdf5").write_bytes(content)
        assert "a.hdf5 is not a whole HDF5 file" in error_of(read, tmp_path / "a.hdf5")


def test_folders_and_devices_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.hdf5")
    for path in (tmp_path, tmp_path / "pipe.hdf5", "/dev/null"):
        assert f"{path} is a folder or a device" in error_of(read, path)


@pytest.mark.parametrize("name", ["no.hdf5", "whole.hdf5/a", "a\0b", "x" * 300])
def test_a_name_without_a_file_is_an_error_in_a_line(tmp_path, name):
    write(tmp_path / "whole.hdf5", arrays())
    assert ("File name too long" if len(name) > 99 else "no file") in error_of(
        read, tmp_path / name
    )


def test_what_is_odd_in_a_files_name_is_not_printed(tmp_path):
    """Escapes and line ends, and bytes that are no text."""
    lines = []
    for name in (b"a\n\x1b[31mb.hdf5", b"\xff.hdf5"):
        path = write(tmp_path / os.fsdecode(name), arrays())
        data = datasets.load(TASK, path, log=lines.append)
        lines += [data.label, data.reason, error_of(hdf5.read_hdf5, path, PEN)]
    assert all(line.isprintable() for line in lines)


# ---- Odd contents --------------------------------------------------------------------------------


def put(key, value):
    def edit(file):
        file.pop(key, None)
        if value is not None:
            file[key] = value

    return edit


def put_group(key):
    def edit(file):
        file.pop(key, None)
        file.create_group(key)

    return edit


def loop(file):
    del file["rewards"]
    file["rewards"] = h5py.SoftLink("/rewards")


def odd_type(file):
    del file["rewards"]
    h5py.h5d.create(file.id, b"rewards", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((50,)))


def generated_for(task):
    return lambda file: file.attrs.update({"recipe_version": 3, "task": task})


ODD = {
    "empty observations": (put("observations", h5py.Empty("f4")), "observations is not an array"),
    "empty timeouts": (put("timeouts", h5py.Empty("?")), "timeouts is not an array"),
    "scalar rewards": (put("rewards", 1.0), "rewards has shape ()"),
    "scalar observations": (put("observations", 1.0), "observations ()"),
    "group of timeouts": (put_group("timeouts"), "timeouts is not an array"),
    "group of actions": (put_group("actions"), "actions is not an array"),
    "broken link": (put("timeouts", h5py.SoftLink("/nowhere")), "timeouts is not an array"),
    "loop": (loop, "is damaged"),
    "time": (odd_type, "is damaged"),
    "records": (put("rewards", np.zeros(50, [("\x1b[31m", "f4")])), "rewards holds [("),
    "names": (lambda file: file.move("actions", "\x1b[31m\n"), "it has ?[31m, observations"),
    "generated for many": (generated_for(["a", "b"]), "generated for ['a' 'b']"),
    "generated for nothing": (generated_for(h5py.Empty("f4")), "generated for"),
    "generated for another": (generated_for("pen-human-v1"), "generated for pen-human-v1, not"),
}


@pytest.mark.parametrize("edit, words", ODD.values(), ids=ODD)
def test_odd_contents_are_an_error_in_one_printable_line(tmp_path, edit, words):
    path = write(tmp_path / "odd.hdf5", arrays())
    with h5py.File(path, "a") as file:
        edit(file)
    message = error_of(read, path)
    assert message.startswith(f"{path}") and words in message and message.isprintable()


def test_attributes_and_links_of_the_users_own_are_no_error(tmp_path):
    made = arrays()
    path = write(tmp_path / "a.hdf5", made)
    plain = read(path)
    with h5py.File(path, "a") as file:
        file.attrs["task"] = ["hopper", "walker"]
        file.move("rewards", "mine/rewards")
        file["rewards"] = h5py.SoftLink("/mine/rewards")
        file["elsewhere"] = h5py.SoftLink("/nowhere")
    assert_same(read(path), plain)


def test_damaged_bytes_are_an_error_in_one_line_or_are_read(tmp_path):
    """Anywhere in the file's structure; nothing else than a TaskError comes out."""
    walks, rng = Walks(four_walks()), np.random.default_rng(0)
    path = write(tmp_path / "a.hdf5", walks.made)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    with h5py.File(path) as file:
        inside = np.zeros(len(whole), bool)
        for array in (file["observations"], file["actions"]):
            inside[array.id.get_offset() :][: array.nbytes] = True
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.choice(np.flatnonzero(~inside), 2)] = rng.integers(0, 256, 2)
        path.write_bytes(damaged.tobytes())
        try:
            read(path, repair=True)
        except hdf5.TaskError as error:
            refused += "\n" not in str(error)
    assert 20 < refused < 300


# ---- Files that lead to others -------------------------------------------------------------------


def external_link(file, key, other):
    file[key] = h5py.ExternalLink(other, key)


def link_to_a_link(file, key, other):
    file["away"] = h5py.ExternalLink(other, "/")
    file[key] = h5py.SoftLink(f"/away/{key}")


def external_bytes(file, key, other):
    file.create_dataset(key, (110, 29), "f4", external=[(other, 0, 110 * 29 * 4)])


def virtual(file, key, other):
    layout = h5py.VirtualLayout((110, 29), "f4")
    layout[:] = h5py.VirtualSource(other, key, (110, 29))
    file.create_virtual_dataset(key, layout)


@pytest.mark.parametrize("key", ["observations", "infos/goal"])
@pytest.mark.parametrize("lead", [external_link, link_to_a_link, external_bytes, virtual])
def test_what_is_stored_in_another_file_is_refused(tmp_path, monkeypatch, lead, key):
    """Before that one is opened. Repairing reads infos/goal as well."""
    made = Walks(four_walks()).made
    path, other = (write(tmp_path / name, made) for name in ("a.hdf5", "private.hdf5"))
    with h5py.File(path, "a") as file:
        del file[key]
        lead(file, key, str(other))
    other.unlink()
    os.mkfifo(other)  # whoever opens it waits for ever
    what = "away" if lead is link_to_a_link else key
    message = error_of(read, path, repair=True)
    assert message == f"{path}: {what} is stored in another file; copy all into one file"
