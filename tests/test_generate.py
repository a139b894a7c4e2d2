"""Generated data as a file: what it holds, and the cache it lies in, shared, broken or missing."""

import dataclasses
import errno
import fcntl
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from dataset_files import quiet

import tasks
from tasks import antmaze_data, generate as generator
from tasks.antmaze_data import simulate
from tasks.datasets import load
from tasks.generate import cached, generate
from tasks.task import TaskError


def small(name="antmaze-umaze-v0", limit=150):
    """A task with short episodes, so that a test sees many ends of trajectories quickly."""
    return dataclasses.replace(tasks.get(name), episode_limit=limit)


def test_file_has_d4rls_keys_shapes_and_types(tmp_path):
    lines = []
    generate(small(), tmp_path / "data.hdf5", n_transitions=1001, seed=5, log=lines.append)
    widths = {
        "observations": (29,),
        "actions": (8,),
        "rewards": (),
        "terminals": (),
        "timeouts": (),
    }
    widths |= {"infos/goal": (2,), "infos/qpos": (15,), "infos/qvel": (14,)}
    with h5py.File(tmp_path / "data.hdf5") as file:
        for key, width in widths.items():
            assert file[key].shape == (1001, *width)
            assert file[key].dtype == (bool if key in ("terminals", "timeouts") else np.float32)
        np.testing.assert_array_equal(file["observations"][:, 15:], file["infos/qvel"][:])
        assert file.attrs["seed"] == 5 and file.attrs["transitions"] == 1001
        assert "wander" in file.attrs
    assert "success" in lines[-1] and "terminal share 0," in lines[-1]


@pytest.mark.parametrize("where", ["simulate", "statistics"])
def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(antmaze_data, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(small(), tmp_path / "data.hdf5", n_transitions=200, log=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generator.os, "replace", full)
    with pytest.raises(TaskError, match="No space left on device.: free some space or set XDG"):
        generate(small(), tmp_path / "data.hdf5", n_transitions=200, log=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_end_is_called_full(tmp_path, monkeypatch):
    class File(h5py.File):
        def __exit__(self, *how):
            super().__exit__(*how)
            raise RuntimeError("Can't decrement id ref count (..., errno = 28, ...)")

    monkeypatch.setattr(h5py, "File", File)
    with pytest.raises(TaskError, match="No space left on device.: free some space"):
        generate(small(), tmp_path / "data.hdf5", n_transitions=200, log=quiet)
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_folder_is_noticed_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(antmaze_data, "simulate", lambda *_: pytest.fail("simulated first"))
    with pytest.raises(TaskError, match="cannot write .*: look at the folder or set XDG_CACHE"):
        generate(small(), tmp_path / "file" / "data.hdf5", n_transitions=200)


def test_too_few_transitions_are_refused(tmp_path):
    with pytest.raises(TaskError, match="at least 2"):
        generate(small(), tmp_path / "data.hdf5", n_transitions=1)


def test_data_of_an_earlier_recipe_are_made_again(tmp_path, monkeypatch):
    """With a line that says so; the old file stays, for runs that name it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(antmaze_data, "VERSION", 1)
    old = cached(small(), n_transitions=300, seed=2, log=quiet)
    monkeypatch.setattr(antmaze_data, "VERSION", 2)
    lines = []
    new = cached(small(), n_transitions=300, seed=2, log=lines.append)
    assert new != old and old.exists() and "recipe 2" in lines[1]
    assert str(old) in lines[0] and "earlier recipe" in lines[0]
    cached(small(), n_transitions=300, seed=2, log=lines.append)
    assert "generated earlier" in lines[-1]


def test_the_cache_is_reused_and_a_broken_file_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = []
    path = cached(small(), n_transitions=300, seed=2, log=lines.append)
    whole = path.read_bytes()
    assert path.parent == tmp_path / "diffusion-ql"
    assert "umaze" in path.name and "seed2" in path.name
    assert cached(small(), n_transitions=300, seed=2, log=lines.append) == path
    assert "generated earlier" in lines[-1]
    path.write_bytes(whole[: len(whole) // 2])
    cached(small(), n_transitions=300, seed=2, log=lines.append)
    assert any("generating it again" in line for line in lines)
    with h5py.File(path) as file:
        assert len(file["rewards"]) == 300


def test_figures_are_printed_to_be_read(tmp_path, monkeypatch):
    facts = {"transitions": 1_000_000, "terminal_share": 0.010690001, "mean_return": 3244.9999}
    monkeypatch.setattr(antmaze_data, "statistics", lambda data: facts)
    lines = []
    generate(small(), tmp_path / "data.hdf5", n_transitions=50, log=lines.append)
    named = "transitions 1,000,000, terminal share 0.01069, mean return 3,245"
    assert lines[-1] == f"generated data: {named}"


# ---- The cache, shared and broken ----------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "diffusion-ql"


def get(log=quiet):
    return cached(small(), n_transitions=300, seed=2, log=log)


def test_the_second_of_two_waits_for_the_firsts_file(cache, monkeypatch):
    waits, simulated = threading.Event(), []

    def slowly(*how):
        assert waits.wait(timeout=20)
        simulated.append(how)
        return simulate(*how)

    def log(line):
        lines.append(line)
        if "another process is generating" in line:
            waits.set()

    lines = []
    monkeypatch.setattr(antmaze_data, "simulate", slowly)
    with ThreadPoolExecutor(2) as two:
        first, second = two.map(get, [log, log])
    assert first == second and len(simulated) == 1
    assert f"another process is generating {first}: waiting for it" in lines
    assert lines[-1].startswith(f"using {first}, generated earlier")


def test_what_a_killed_process_left_is_removed(cache):
    cache.mkdir()
    path = get()
    left, others = (cache / f".{name}.0123abcd.part" for name in (path.name, "other.hdf5"))
    for part in (left, others):
        part.write_bytes(b"half")
    get()
    assert left.exists()  # nothing was generated, so nobody looked
    path.unlink()
    get()
    assert not left.exists() and others.exists()


def test_a_whole_file_is_used_without_the_lock(cache, monkeypatch):
    """The folder may be read-only."""
    path = get()
    monkeypatch.setattr(generator, "lock", lambda path: pytest.fail("locked"))
    assert get() == path


@pytest.mark.parametrize("error", [NotImplementedError, OSError(errno.ENOLCK, "no locks")])
def test_without_locks_data_are_generated_all_the_same(cache, monkeypatch, error):
    def refuse(path):
        raise error

    monkeypatch.setattr(generator, "lock", refuse)
    assert get().exists()


def test_a_locked_file_is_not_generated_again(cache):
    path = get()
    whole = path.read_bytes()
    with open(path, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(TaskError, match="another process has locked it") as caught:
            load(small(), "generated", seed=2, n_generated=300, log=quiet)
    assert "delete" not in str(caught.value) and path.read_bytes() == whole
    get()


def test_a_home_that_may_not_be_entered_names_the_variable(cache, monkeypatch):
    """As root's, for another user in a container."""

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tasks.hdf5.os.stat", refuse)
    with pytest.raises(TaskError, match="no permission: .*, or set XDG_CACHE_HOME to another"):
        get()


@pytest.mark.parametrize("value", [None, "many", [1.0, 2.0], h5py.Empty("f4")])
def test_a_file_without_its_mean_return_is_made_again(cache, value):
    path, lines = get(), []
    with h5py.File(path, "a") as file:
        del file.attrs["mean_return"]
        if value is not None:
            file.attrs["mean_return"] = value
    get(lines.append)
    assert "generating it again" in lines[0]
    with h5py.File(path) as file:
        assert np.isfinite(file.attrs["mean_return"])


def test_a_folder_in_the_files_place_is_an_error(cache):
    path = get()
    path.unlink()
    path.mkdir()
    with pytest.raises(TaskError, match="is a folder or a device"):
        get()


def test_without_a_home_the_variable_to_set_is_named(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(TaskError, match="no home directory for ~/.cache: set XDG_CACHE_HOME"):
        get()


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that root cannot write to")
@pytest.mark.parametrize("home", ["/sys", "/dev/null"])
def test_a_cache_that_cannot_be_written_is_not_called_full(monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    with pytest.raises(TaskError) as caught:
        get()
    message = str(caught.value)
    assert "look at the folder or set XDG_CACHE_HOME" in message and "space" not in message


def test_an_interrupted_process_leaves_no_part(cache):
    """Ctrl-C, while the physics is at work."""
    program = (
        "import tasks; from tasks.generate import cached; "
        "cached(tasks.get('antmaze-umaze-v0'), log=lambda line: print(line, flush=True))"
    )
    root = Path(generator.__file__).parents[1]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": root}
    with subprocess.Popen([sys.executable, "-c", program], **options) as child:
        assert "generating 1,000,000 transitions" in child.stdout.readline()
        (part,) = cache.glob(".*.part")
        child.send_signal(signal.SIGINT)
        assert child.stderr.read().rstrip().endswith("KeyboardInterrupt")
    assert not part.exists()
