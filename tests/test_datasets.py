"""tasks/datasets.py: D4RL's reading rules, where data come from, and what bad files and bad networks get."""

import errno
import http.server
import os
import socket
import sys
import threading
import tracemalloc
import types
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest

from tasks import datasets
from tasks.task import TaskError


@dataclass(frozen=True)
class Task:
    name: str = "antmaze-umaze-v0"
    state_dim: int = 29
    action_dim: int = 8
    episode_limit: int = 7
    dataset_file: str = "ant_maze_new/Ant_maze.hdf5"


TASK = Task()


def arrays(n=50, seed=0, timeouts=True, state_dim=29, action_dim=8):
    rng = np.random.default_rng(seed)
    made = {
        "observations": rng.standard_normal((n, state_dim), np.float32),
        "actions": rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        "rewards": rng.standard_normal(n, np.float32),
        "terminals": rng.random(n) < 0.2,
    }
    return made | ({"timeouts": rng.random(n) < 0.2} if timeouts else {})


def write(path, made, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in made.items():
            file.create_dataset(key, data=value, **options)
    return path


def read_slowly(made, limit):
    """SPEC 6 and D4RL's step counter, one row at a time."""
    transitions, step = [], 0
    for i in range(len(made["rewards"]) - 1):
        cut = made["timeouts"][i] if "timeouts" in made else step == limit - 1
        if cut:
            step = 0
            continue
        step = 1 if made["terminals"][i] else step + 1
        transitions.append(i)
    i = np.array(transitions, int)
    return {
        "observations": made["observations"][i],
        "actions": made["actions"][i],
        "next_observations": made["observations"][i + 1],
        "rewards": made["rewards"][i],
        "terminals": made["terminals"][i],
    }


def quiet(line):
    pass


def assert_same(read, expected):
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(read[key], value, err_msg=key)
        assert read[key].dtype == (bool if key == "terminals" else np.float32), key


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(TaskError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------
# Reading

@pytest.mark.parametrize("n", [2, 3, 8, 50, 301])
@pytest.mark.parametrize("seed", range(4))
def test_timeouts_are_cut_as_a_slow_loop_cuts_them(tmp_path, n, seed):
    made = arrays(n, seed)
    made["timeouts"][0] = False
    assert_same(datasets.read_hdf5(write(tmp_path / "a.hdf5", made), TASK), read_slowly(made, 7))


@pytest.mark.parametrize("limit", [2, 3, 7, 1000])
@pytest.mark.parametrize("terminal_rate", [0, 0.02, 0.3, 0.9])
def test_without_timeouts_the_episode_limit_cuts_as_a_slow_loop_does(tmp_path, limit, terminal_rate):
    made = arrays(400, timeouts=False)
    made["terminals"] = np.random.default_rng(limit).random(400) < terminal_rate
    expected = read_slowly(made, limit)
    assert_same(datasets.read_hdf5(write(tmp_path / "a.hdf5", made), Task(episode_limit=limit)), expected)


def test_blocks_of_rows_join_without_a_seam(tmp_path, monkeypatch):
    made = arrays(103)
    path = write(tmp_path / "a.hdf5", made)
    for rows in (1, 2, 51, 102, 103, 104):
        monkeypatch.setattr(datasets, "ROWS", rows)
        assert_same(datasets.read_hdf5(path, TASK), read_slowly(made, 7))


def test_float64_columns_and_byte_flags_in_a_compressed_file_read_the_same(tmp_path):
    made = arrays()
    stored = {key: value.astype("f8" if value.dtype == np.float32 else "u1") for key, value in made.items()}
    stored = {key: value[:, None] if value.ndim == 1 else value for key, value in stored.items()}
    read = datasets.read_hdf5(write(tmp_path / "a.hdf5", stored, compression="gzip"), TASK)
    assert_same(read, read_slowly(made, 7))


def test_memory_beyond_the_result_is_that_of_a_few_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "ROWS", 4096)
    n = 32 * datasets.ROWS
    path = write(tmp_path / "a.hdf5", {
        "observations": np.zeros((n, 29), np.float32),
        "actions": np.zeros((n, 8), np.float32),
        "rewards": np.zeros(n, np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
    })
    tracemalloc.start()
    read = datasets.read_hdf5(path, TASK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = sum(value.nbytes for value in read.values())
    assert peak - result < 6 * datasets.ROWS * 29 * 4
    assert peak < 2 * path.stat().st_size


def test_statistics_are_those_of_the_transitions(tmp_path):
    data = datasets.load(TASK, write(tmp_path / "a.hdf5", arrays()), log=quiet)
    assert datasets.statistics(data) == {
        "n": len(data.rewards),
        "terminal_share": data.terminals.sum() / len(data),
        "reward_min": data.rewards.min(),
        "reward_mean": pytest.approx(data.rewards.mean(), abs=1e-6),
        "reward_max": data.rewards.max(),
    }


# ---------------------------------------------------------------------------------------------------------
# Bad files

def change(key, value):
    def edit(made):
        made[key][value[0]] = value[1]
    return edit


def replace(key, value):
    return lambda made: made.update({key: value})


def drop(*keys):
    return lambda made: [made.pop(key) for key in keys]


def shorten(key):
    return lambda made: made.update({key: made[key][:-1]})


def shape(observations, actions):
    return lambda made: made.update(arrays(state_dim=observations, action_dim=actions))


def keep_rows(n):
    return lambda made: made.update({key: value[:n] for key, value in made.items()})


BAD_FILES = {
    "keys missing": (drop("actions", "terminals"), ["lacks actions, terminals", "observations, rewards"]),
    "halfcheetah": (shape(17, 6), ["(50, 17)", "(50, 6)", "of halfcheetah or walker2d", "(N, 29)", "(N, 8)"]),
    "unknown shape": (shape(28, 8), ["(50, 28)", "(N, 29)"]),
    "short actions": (shorten("actions"), ["differ in length", "actions 49", "rewards 50"]),
    "short timeouts": (shorten("timeouts"), ["differ in length", "timeouts 49"]),
    "observation nan": (change("observations", ((13, 4), np.nan)), ["observations", "nan", "row 13"]),
    "last action -inf": (change("actions", ((49, 0), -np.inf)), ["actions", "-inf", "row 49"]),
    "reward inf": (change("rewards", (7, np.inf)), ["rewards", "inf", "row 7"]),
    "action outside": (change("actions", ((31, 5), 1.01)), ["actions", "1.01", "row 31", "[-1, 1]"]),
    "no rows": (keep_rows(0), ["empty", "0 rows"]),
    "one row": (keep_rows(1), ["empty", "1 rows"]),
    "all cut": (lambda made: made["timeouts"].fill(True), ["no transitions"]),
    "two rewards a row": (replace("rewards", np.zeros((50, 2))), ["rewards", "(50, 2)"]),
    "rewards of text": (replace("rewards", np.full(50, b"one")), ["rewards", "not numbers"]),
    "beyond float32": (replace("rewards", np.full(50, 1e300)), ["rewards", "inf", "row 0"]),
    "terminals nan": (replace("terminals", np.full(50, np.nan)), ["terminals", "nan", "row 0"]),
}


@pytest.mark.parametrize("edit, words", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_says_what_is_wrong(tmp_path, monkeypatch, edit, words):
    monkeypatch.setattr(datasets, "ROWS", 3)  # so that a row's number is not its place in a block
    made = arrays()
    edit(made)
    message = error_of(datasets.load, TASK, write(tmp_path / "bad.hdf5", made), log=quiet)
    for word in ["bad.hdf5", *words]:
        assert word in message


def test_an_action_a_rounding_error_outside_the_box_is_taken(tmp_path):
    made = arrays()
    made["actions"][3, 5] = 1.0005
    datasets.read_hdf5(write(tmp_path / "a.hdf5", made), TASK)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "no.hdf5" in error_of(datasets.load, TASK, tmp_path / "no.hdf5", log=quiet)
    assert str(tmp_path) in error_of(datasets.load, TASK, str(tmp_path), log=quiet)


def test_text_and_a_truncated_file_are_told_apart_from_a_whole_one(tmp_path):
    (tmp_path / "text.hdf5").write_text("<html>404</html>")
    whole = write(tmp_path / "whole.hdf5", arrays()).read_bytes()
    (tmp_path / "short.hdf5").write_bytes(whole[: len(whole) // 2])
    assert "signature" in error_of(datasets.load, TASK, tmp_path / "text.hdf5", log=quiet)
    assert "truncated" in error_of(datasets.load, TASK, tmp_path / "short.hdf5", log=quiet)


def test_a_damaged_compressed_block_is_an_error_and_not_data(tmp_path):
    path = write(tmp_path / "a.hdf5", arrays(2000), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["observations"].id.get_chunk_info(0)
    damaged = bytearray(path.read_bytes())
    damaged[chunk.byte_offset : chunk.byte_offset + 64] = bytes(64)
    path.write_bytes(damaged)
    assert "damaged" in error_of(datasets.load, TASK, path, log=quiet)


# ---------------------------------------------------------------------------------------------------------
# Where the data come from

class Server:
    """Answers GET from `files` (path -> body); a path in `cut` gets the right size and half of the body."""

    def __init__(self):
        self.files, self.cut, self.unsized, self.asked = {}, set(), set(), []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                body = server.files.get(self.path)
                if body is None:
                    return self.send_error(404)
                self.send_response(200)
                if self.path not in server.unsized:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if self.path in server.cut else body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty D4RL folder, and no address that answers."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(datasets, "D4RL_URL", f"{closed}/offline_rl/")
    monkeypatch.setattr(datasets, "MIRROR_URL", f"{closed}/mirror/")
    monkeypatch.setattr(datasets, "TIMEOUT", 5)
    return tmp_path / "d4rl"


@pytest.fixture
def server(folder, monkeypatch):
    server = Server()
    monkeypatch.setattr(datasets, "D4RL_URL", f"{server.url}/offline_rl/")
    monkeypatch.setattr(datasets, "MIRROR_URL", f"{server.url}/mirror/")
    yield server
    server.http.shutdown()
    server.http.server_close()


FIRST, SECOND = "/offline_rl/ant_maze_new/Ant_maze.hdf5", "/mirror/Ant_maze.hdf5"


@pytest.fixture
def body(tmp_path):
    return write(tmp_path / "served.hdf5", arrays()).read_bytes()


@pytest.fixture
def generator(tmp_path, monkeypatch):
    """Stands in for tasks/generate.py; the list of its calls."""
    calls = []

    def cached(task, *, n_transitions=1_000_000, seed=0, log=print):
        calls.append((task.name, seed))
        return write(tmp_path / f"made-{seed}.hdf5", arrays(1200, seed))

    monkeypatch.setitem(sys.modules, "tasks.generate", types.SimpleNamespace(cached=cached))
    return calls


def load(source, **kwargs):
    """The data set and all that was logged, as one string."""
    lines = []
    data = datasets.load(TASK, source, log=lines.append, **kwargs)
    assert all("\n" not in line for line in lines)
    return data, " | ".join(lines)


def test_a_path_is_read_and_labelled_with_its_name(tmp_path, folder, generator):
    data, said = load(str(write(tmp_path / "mine.hdf5", arrays())))
    assert (data.source, data.label) == ("file", "file mine.hdf5 (task antmaze-umaze-v0)")
    assert str(tmp_path / "mine.hdf5") in said and str(tmp_path / "mine.hdf5") in data.reason
    assert generator == []


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_d4rls_file_on_disk_is_taken_first_and_the_network_is_not_asked(folder, server, generator, source):
    write(folder / "Ant_maze.hdf5", arrays())
    data, said = load(source)
    assert (data.source, data.label) == ("d4rl", "D4RL antmaze-umaze-v0")
    assert str(folder) in data.reason and data.reason in said
    assert server.asked == [] and generator == []


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_a_missing_d4rl_file_is_downloaded_and_then_found(folder, server, body, generator, source):
    server.files[FIRST] = body
    data, said = load(source)
    assert data.label == "D4RL antmaze-umaze-v0"
    assert server.url + FIRST in data.reason and server.url + FIRST in said
    assert os.listdir(folder) == ["Ant_maze.hdf5"] and (folder / "Ant_maze.hdf5").read_bytes() == body
    assert "found in" in load(source)[0].reason
    assert server.asked == [FIRST] and generator == []


def test_auto_generates_when_no_address_answers_and_says_so(folder, generator):
    data, said = load("auto", seed=3)
    assert data.source == "generated"
    assert data.label == "GENERATED antmaze-umaze-v0 (seed 3, 1,200 transitions; not D4RL's data)"
    for words in (f"no D4RL file in {folder}", "download failed (connection refused)", "generated here"):
        assert words in data.reason
    assert data.reason in said and "NOT D4RL's" in said
    assert generator == [("antmaze-umaze-v0", 3)]


def test_an_unknown_host_is_called_name_resolution(folder, generator, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "download failed (name resolution)" in load("auto")[0].reason


def test_d4rl_refuses_to_substitute_and_names_each_address_and_the_ways_on(folder, server, generator):
    server.files[SECOND] = b"<html>moved</html>"
    message = error_of(load, "d4rl")
    assert f"{server.url}{FIRST}: HTTP 404" in message
    assert f"{server.url}{SECOND}: what came is not a whole HDF5 file" in message
    assert "--data PATH" in message and "--data generated" in message
    assert generator == [] and os.listdir(folder) == []


def test_generated_asks_neither_disk_nor_network(folder, server, generator):
    write(folder / "Ant_maze.hdf5", arrays())
    data, said = load("generated")
    assert data.source == "generated" and "NOT D4RL's" in said
    assert server.asked == [] and generator == [("antmaze-umaze-v0", 0)]


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_a_broken_d4rl_file_is_reported_and_left_alone(folder, server, body, generator, source):
    server.files[FIRST] = body
    folder.mkdir()
    (folder / "Ant_maze.hdf5").write_bytes(body[:1000])
    message = error_of(load, source)
    assert str(folder / "Ant_maze.hdf5") in message and "delete it" in message
    assert (folder / "Ant_maze.hdf5").read_bytes() == body[:1000]
    assert server.asked == [] and generator == []


def test_a_broken_generated_file_is_reported_with_its_path(folder, tmp_path, monkeypatch):
    broken = tmp_path / "made.hdf5"
    broken.write_bytes(b"half")
    fake = types.SimpleNamespace(cached=lambda task, **kwargs: broken)
    monkeypatch.setitem(sys.modules, "tasks.generate", fake)
    message = error_of(load, "generated")
    assert str(broken) in message and "delete it" in message


def test_the_d4rl_folder_is_d4rls_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    assert datasets.d4rl_folder() == tmp_path / ".d4rl/datasets"
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "elsewhere"))
    assert datasets.d4rl_folder() == tmp_path / "elsewhere"


# ---------------------------------------------------------------------------------------------------------
# Downloads that go wrong

def test_a_body_cut_short_is_discarded_and_the_mirror_is_asked(folder, server, body):
    server.files = {FIRST: body, SECOND: body}
    server.cut = {FIRST}
    assert datasets.download(TASK) == server.url + SECOND
    assert server.asked == [FIRST, SECOND]
    assert (folder / "Ant_maze.hdf5").read_bytes() == body and os.listdir(folder) == ["Ant_maze.hdf5"]


@pytest.mark.parametrize("sized", [True, False])
def test_bodies_cut_short_everywhere_leave_nothing(folder, server, body, sized):
    server.files = {FIRST: body, SECOND: body}
    server.cut = {FIRST, SECOND}
    server.unsized = set() if sized else {FIRST, SECOND}
    message = error_of(datasets.download, TASK)
    assert (f"connection lost after {len(body) // 2:,}" if sized else "not a whole HDF5 file") in message
    assert os.listdir(folder) == []


def test_an_interrupt_leaves_nothing_and_goes_through(folder, server, body, generator, monkeypatch):
    seen = []

    def interrupted(response, total):
        yield body[:100]
        seen.extend(os.listdir(folder))
        raise KeyboardInterrupt

    server.files[FIRST] = body
    monkeypatch.setattr(datasets, "_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("auto")
    assert seen == [f"Ant_maze.hdf5.part-{os.getpid()}"]
    assert os.listdir(folder) == [] and generator == []


def test_a_folder_that_cannot_be_written_is_named_before_the_network_is_asked(folder, server, generator):
    folder.write_text("a file stands here")
    message = error_of(load, "d4rl")
    assert str(folder) in message and "D4RL_DATASET_DIR" in message
    assert server.asked == []
    assert "folder not writable" in load("auto")[0].reason


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that root cannot write to either")
def test_a_read_only_folder_is_reported_before_the_network_is_asked(server, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", "/sys")
    assert "cannot write to /sys" in error_of(datasets.download, TASK)
    assert server.asked == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_in_auto_too_and_leaves_nothing(folder, server, body, generator):
    server.files[FIRST] = body
    folder.mkdir()
    (folder / f"Ant_maze.hdf5.part-{os.getpid()}").symlink_to("/dev/full")
    message = error_of(load, "auto")
    assert os.strerror(errno.ENOSPC) in message and str(folder) in message
    assert os.listdir(folder) == [] and generator == [] and server.asked == [FIRST]
