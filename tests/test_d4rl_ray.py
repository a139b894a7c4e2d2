"""The table on a Ray cluster: a real one of two nodes, one of which is killed half-way; and addresses that do not answer."""

import socket
import sys
import threading
import time

import pytest
from test_d4rl import UMAZE, Bench, alive, wait_for

from bench import d4rl

TASKS = [task for task in d4rl.RECIPES if task.startswith("antmaze")]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


@pytest.fixture
def cluster(monkeypatch):
    """Its head, a node of one core, which notices within a second when another is gone."""
    pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-cluster.txt")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home folder
    from ray.cluster_utils import Cluster

    attentive = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 5}
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20, "_system_config": attentive}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        pids = [info.process.pid for node in cluster.list_all_nodes() for infos in node.all_processes.values() for info in infos]
        cluster.shutdown()
        wait_for(lambda: not any(map(alive, pids)))


def test_every_cell_ends_and_none_is_lost_when_a_node_is_killed(cluster, bench, capsys):
    node = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
    raylet = str(node.all_processes["raylet"][0].process.pid)
    bench.seconds, bench.broken, lost = 4, {UMAZE: "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"}, []

    def done(call):
        return any((bench.out / call["task"]).glob("*/selection.json"))

    def under_way(call):
        both = len(list((bench.out / call["task"]).glob("*/resume.safetensors"))) == 2
        return call["raylet"] == raylet and both and not done(call)

    def half_way():
        calls = bench.calls()
        return any(map(done, calls)) and any(under_way(call) and time.time() - call["began"] < 1 for call in calls)

    def kill():
        wait_for(half_way, 60)
        cluster.remove_node(node, allow_graceful=False)
        there = [call for call in bench.calls() if call["raylet"] == raylet]
        wait_for(lambda: not any(alive(call["pid"]) for call in there))  # one may end by itself in its last moment
        lost.extend(filter(under_way, there))

    killer = threading.Thread(target=kill)
    killer.start()
    assert bench("--ray", cluster.address, tasks=TASKS) == 1
    killer.join()

    assert lost and not any(alive(call["pid"]) for call in lost)
    for call in lost:  # continued on the other node: its runs lie in a folder that both see
        again = [c for c in bench.calls() if c["task"] == call["task"] and c["pid"] != call["pid"]]
        assert [c["raylet"] != raylet and c["arguments"][0] == "--resume" for c in again] == [True]
    notes = {row["task"]: (row["seeds"], row["note"]) for row in bench.table()["rows"]}
    assert notes.pop(UMAZE) == ([], f"failed: {bench.broken[UMAZE]}")
    assert notes == dict.fromkeys([task for task in TASKS if task != UMAZE], ([0, 1], ""))
    said = capsys.readouterr().out
    assert [f"{task}: seeds 0 1 done" in said for task in TASKS] == [task != UMAZE for task in TASKS]

    before, bench.broken, bench.seconds = len(bench.calls()), {}, 0
    assert bench(tasks=TASKS) == 0 and len(bench.calls()) == before + 1  # what failed there is made here
    assert [row["seeds"] for row in bench.table()["rows"]] == [[0, 1]] * len(TASKS)


def test_an_address_that_does_not_answer_is_refused_in_a_line(bench):
    pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-cluster.txt")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for address in (f"127.0.0.1:{port}", "nonsense"):
            with pytest.raises(SystemExit, match=f"no Ray cluster answers at {address}.*ray start --head") as refused:
                bench("--ray", address)
            assert "\n" not in str(refused.value)
    assert not bench.calls() and not list(bench.out.rglob("failed.json"))


def test_a_task_that_ray_gives_up_has_a_reason_of_one_line():
    exceptions = pytest.importorskip("ray.exceptions", reason="ray is not installed: pip install -r requirements-cluster.txt")
    assert d4rl.why_lost(exceptions.OutOfMemoryError("a page\nof advice")).startswith("out of memory: Ray ended it")
    assert d4rl.why_lost(exceptions.WorkerCrashedError()).startswith("WorkerCrashedError: The worker died")
    failed = exceptions.RayTaskError("train", "Traceback:\n  a line\nModuleNotFoundError: No module named 'safetensors'", None)
    assert d4rl.why_lost(failed) == "RayTaskError: ModuleNotFoundError: No module named 'safetensors'"


def test_without_ray_a_line_says_what_to_install(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="--ray needs Ray: pip install -r requirements-cluster.txt"):
        bench("--ray")
