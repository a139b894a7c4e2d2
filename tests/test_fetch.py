"""Where data come from: tasks.load's choice of a source, and tasks/fetch.py's downloads."""

import contextlib
import errno
import http.server
import os
import re
import socket
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dataset_files import TASK, arrays, error_of, quiet, write

import tasks
from atomic import written_whole
from tasks import datasets, fetch

FIRST, SECOND = "/offline_rl/ant_maze_new/Ant_maze.hdf5", "/mirror/Ant_maze.hdf5"
PEN = tasks.get("pen-human-v1")


class Server:
    """Answers GET from files: path -> body.

    cut: paths that get the right size and half of the body. unsized: paths without a size.
    size, refusal, moved: other texts for the size, for why a path is not found, and where it went.
    wait: is called when half of a body is out.
    """

    def __init__(self):
        self.files, self.cut, self.unsized, self.asked = {}, set(), set(), []
        self.size, self.refusal, self.moved, self.wait = None, None, None, lambda: None
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                body = server.files.get(self.path)
                if body is None:
                    return self.send_error(404, server.refusal)
                self.send_response(302 if server.moved else 200)
                if server.moved:
                    self.send_header("Location", server.moved)
                if self.path not in server.unsized:
                    self.send_header("Content-Length", server.size or str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                server.wait()
                if self.path not in server.cut:
                    self.wfile.write(body[len(body) // 2 :])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(d4rl_folder, monkeypatch):
    server = Server()
    monkeypatch.setattr(fetch, "D4RL_URL", f"{server.url}/offline_rl/")
    monkeypatch.setattr(fetch, "MIRROR_URL", f"{server.url}/mirror/")
    yield server
    server.http.shutdown()
    server.http.server_close()


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


@pytest.fixture
def no_home(monkeypatch):
    """A user without HOME and without an entry in the system's list of users."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "D4RL_DATASET_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def load(source, **kwargs):
    """The data set and all that was logged, as one string."""
    lines = []
    data = datasets.load(TASK, source, log=lines.append, **kwargs)
    assert all("\n" not in line for line in lines)
    return data, " | ".join(lines)


def files_in(folder) -> list[str]:
    return sorted(os.listdir(folder))


# ---- Which source is taken -----------------------------------------------------------------------


def test_a_path_is_read_and_labelled_with_its_name(tmp_path, d4rl_folder, generator):
    data, said = load(str(write(tmp_path / "mine.hdf5", arrays())))
    assert (data.source, data.label) == ("file", "file mine.hdf5 (task antmaze-umaze-v0)")
    assert str(tmp_path / "mine.hdf5") in said and str(tmp_path / "mine.hdf5") in data.reason
    assert generator == []


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_d4rls_file_on_disk_is_taken_before_a_download(d4rl_folder, server, generator, source):
    write(d4rl_folder / "Ant_maze.hdf5", arrays())
    data, said = load(source)
    assert (data.source, data.label) == ("d4rl", "D4RL antmaze-umaze-v0")
    assert str(d4rl_folder) in data.reason and data.reason in said
    assert server.asked == [] and generator == []


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_a_missing_file_is_downloaded_once(d4rl_folder, server, body, generator, source):
    server.files[FIRST] = body
    data, said = load(source)
    assert data.label == "D4RL antmaze-umaze-v0"
    assert server.url + FIRST in data.reason and server.url + FIRST in said
    assert files_in(d4rl_folder) == ["Ant_maze.hdf5"]
    assert (d4rl_folder / "Ant_maze.hdf5").read_bytes() == body
    assert "found in" in load(source)[0].reason
    assert server.asked == [FIRST] and generator == []


def test_auto_generates_when_no_address_answers_and_says_so(d4rl_folder, generator):
    data, said = load("auto", seed=3)
    assert data.source == "generated"
    assert data.label == "GENERATED antmaze-umaze-v0 (seed 3, 1,200 transitions; not D4RL's data)"
    assert f"no D4RL file in {d4rl_folder}" in data.reason
    assert "download failed (connection refused)" in data.reason
    assert "generated here" in data.reason
    assert data.reason in said and "NOT D4RL's" in said
    assert generator == [("antmaze-umaze-v0", 3)]


def test_an_unknown_host_is_called_name_resolution(d4rl_folder, generator, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "download failed (name resolution)" in load("auto")[0].reason


def test_without_a_generator_a_line_says_which_file_goes_where(d4rl_folder, generator):
    by_hand = (
        "there are no generated data for pen-human-v1: put D4RL's hand_dapg_v1/pen-human-v1.hdf5 "
        f"({fetch.D4RL_URL}hand_dapg_v1/pen-human-v1.hdf5) into {d4rl_folder} "
        "as pen-human-v1.hdf5, or give --data PATH"
    )
    assert error_of(datasets.load, PEN, "generated", log=quiet) == by_hand
    message = error_of(datasets.load, PEN, "auto", log=quiet)
    why = f"no D4RL file in {d4rl_folder}, download failed (connection refused)"
    assert message == f"{why}; {by_hand}"
    message = error_of(datasets.load, PEN, "d4rl", log=quiet)
    assert "--data PATH" in message and "generated" not in message
    assert generator == []


def test_a_file_put_there_by_hand_is_found(d4rl_folder):
    write(d4rl_folder / "pen-human-v1.hdf5", arrays(state_dim=45, action_dim=24))
    assert datasets.load(PEN, log=quiet).label == "D4RL pen-human-v1"


def test_d4rl_is_never_substituted(d4rl_folder, server, generator):
    """The error names each address that was asked, and what else can be done."""
    server.files[SECOND] = b"<html>moved</html>"
    message = error_of(load, "d4rl")
    assert f"{server.url}{FIRST}: HTTP 404" in message
    assert f"{server.url}{SECOND}: what came is not a whole HDF5 file" in message
    assert "--data PATH" in message and "--data generated" in message
    assert generator == [] and files_in(d4rl_folder) == []


def test_generated_asks_neither_disk_nor_network(d4rl_folder, server, generator):
    write(d4rl_folder / "Ant_maze.hdf5", arrays())
    data, said = load("generated")
    assert data.source == "generated" and "NOT D4RL's" in said
    assert server.asked == [] and generator == [("antmaze-umaze-v0", 0)]


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_a_broken_d4rl_file_is_named_and_kept(d4rl_folder, server, body, generator, source):
    server.files[FIRST] = body
    d4rl_folder.mkdir()
    (d4rl_folder / "Ant_maze.hdf5").write_bytes(body[:1000])
    message = error_of(load, source)
    assert str(d4rl_folder / "Ant_maze.hdf5") in message and "delete it" in message
    assert (d4rl_folder / "Ant_maze.hdf5").read_bytes() == body[:1000]
    assert server.asked == [] and generator == []


def test_a_broken_generated_file_is_reported_with_its_path(d4rl_folder, tmp_path, monkeypatch):
    broken = tmp_path / "made.hdf5"
    broken.write_bytes(b"half")
    fake = types.SimpleNamespace(cached=lambda task, **kwargs: broken)
    monkeypatch.setitem(sys.modules, "tasks.generate", fake)
    message = error_of(load, "generated")
    assert str(broken) in message and "delete it" in message


def test_nothing_is_asked_for_what_cannot_be_repaired(d4rl_folder, server, generator, tmp_path):
    """No network, no generator; what the messages say is in test_datasets_repair.py."""
    for source in ("auto", "d4rl", tmp_path / "mine.hdf5"):
        error_of(datasets.load, PEN, source, repair=True, log=quiet)
    error_of(load, "generated", repair=True)
    assert server.asked == []
    error_of(load, "auto", repair=True)
    assert server.asked == [FIRST, SECOND] and generator == []


def test_the_d4rl_folder_is_d4rls_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    assert fetch.d4rl_folder() == tmp_path / ".d4rl/datasets"
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "elsewhere"))
    assert fetch.d4rl_folder() == tmp_path / "elsewhere"


# ---- Downloads that go wrong ---------------------------------------------------------------------


def test_a_body_cut_short_is_discarded_and_the_mirror_asked(d4rl_folder, server, body):
    server.files = {FIRST: body, SECOND: body}
    server.cut = {FIRST}
    assert fetch.fetch(TASK) == server.url + SECOND
    assert server.asked == [FIRST, SECOND]
    assert files_in(d4rl_folder) == ["Ant_maze.hdf5"]
    assert (d4rl_folder / "Ant_maze.hdf5").read_bytes() == body


@pytest.mark.parametrize("sized", [True, False])
def test_bodies_cut_short_everywhere_leave_nothing(d4rl_folder, server, body, sized):
    server.files = {FIRST: body, SECOND: body}
    server.cut = {FIRST, SECOND}
    server.unsized = set() if sized else {FIRST, SECOND}
    why = f"connection lost after {len(body) // 2:,}" if sized else "not a whole HDF5 file"
    assert why in error_of(fetch.fetch, TASK)
    assert files_in(d4rl_folder) == []


def test_an_interrupt_leaves_nothing(d4rl_folder, server, body, generator, monkeypatch):
    """And is not taken for a download that failed."""
    seen = []

    def interrupted(response, total):
        yield body[:100]
        seen.extend(os.listdir(d4rl_folder))
        raise KeyboardInterrupt

    server.files[FIRST] = body
    monkeypatch.setattr(fetch, "_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("auto")
    (part,) = seen
    assert re.fullmatch(r"\.Ant_maze\.hdf5\.\w+\.part", part)
    assert files_in(d4rl_folder) == [] and generator == []


def test_an_unwritable_folder_is_named_before_any_download(d4rl_folder, server, generator):
    d4rl_folder.write_text("a file stands here")
    message = error_of(load, "d4rl")
    assert str(d4rl_folder) in message and "D4RL_DATASET_DIR" in message
    assert server.asked == []
    assert "folder not writable" in load("auto")[0].reason


def test_two_downloads_at_once_do_not_meet(d4rl_folder, server, body):
    """Also of one process number, as in two containers with one folder."""
    server.files[FIRST] = body
    server.wait = threading.Barrier(2, timeout=10).wait
    with ThreadPoolExecutor(2) as two:
        came = list(two.map(lambda _: fetch.fetch(TASK), range(2)))
    assert came == [server.url + FIRST] * 2 and files_in(d4rl_folder) == ["Ant_maze.hdf5"]
    assert (d4rl_folder / "Ant_maze.hdf5").read_bytes() == body


@pytest.mark.parametrize("size", ["²", "x", "-1", "9" * 5000])
def test_a_size_that_is_no_number_is_an_unknown_size(d4rl_folder, server, body, size):
    server.files[FIRST], server.size = body, size
    assert fetch.fetch(TASK) == server.url + FIRST


@pytest.mark.parametrize(
    "address", ["http://.a/", "http://[a/", "http://a:b/", "file:///etc/passwd"]
)
def test_an_impossible_redirection_is_no_answer(d4rl_folder, server, address):
    server.files = {FIRST: b"", SECOND: b""}
    server.moved = address
    assert f"cannot download Ant_maze.hdf5 ({server.url}" in error_of(fetch.fetch, TASK)


def test_a_servers_words_do_not_steer_the_terminal(d4rl_folder, server):
    server.refusal = "\x1b]0;owned\x07\x1b[31mgone\r\x9b2J"
    message = error_of(fetch.fetch, TASK)
    assert message.isprintable() and "HTTP 404 ?]0;owned??[31mgone" in message


# ---- Folders -------------------------------------------------------------------------------------


def test_without_a_home_a_line_says_which_variable_to_set(no_home, generator):
    message = error_of(datasets.load, TASK, "d4rl", log=quiet)
    assert message == (
        "there is no home directory for ~/.d4rl/datasets: "
        "set D4RL_DATASET_DIR to a folder for D4RL's files"
    )
    assert "set D4RL_DATASET_DIR" in error_of(datasets.load, PEN, log=quiet)
    assert "give the file's whole path" in error_of(datasets.load, TASK, "~/a.hdf5", log=quiet)


def test_without_a_home_auto_goes_on_to_generated_data(no_home, generator):
    data, said = load("auto")
    assert data.reason.startswith("no folder for D4RL's file, no home directory, so the data were")
    assert data.reason in said and generator == [("antmaze-umaze-v0", 0)]


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that root cannot write to")
def test_a_read_only_folder_is_named_before_any_download(server, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", "/sys")
    assert "cannot write to /sys" in error_of(fetch.fetch, TASK)
    assert server.asked == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_and_leaves_nothing(
    d4rl_folder, server, body, generator, monkeypatch
):
    """In auto too: nothing is generated instead."""

    @contextlib.contextmanager
    def on_a_full_disk(path):
        with written_whole(path) as part:
            part.unlink()
            part.symlink_to("/dev/full")
            yield part

    server.files[FIRST] = body
    monkeypatch.setattr(fetch, "written_whole", on_a_full_disk)
    message = error_of(load, "auto")
    assert os.strerror(errno.ENOSPC) in message and str(d4rl_folder) in message
    assert "free some space or set D4RL_DATASET_DIR" in message
    assert files_in(d4rl_folder) == [] and generator == [] and server.asked == [FIRST]
