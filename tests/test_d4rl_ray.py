"""experiments.d4rl on a Ray cluster: a real one of two nodes, one of which is killed half-way.

Also addresses that do not answer, and the reasons that Ray gives when it gives up.
"""

import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from d4rl_runs import UMAZE, alive, wait_for

from experiments import d4rl
from experiments.runs import Outcome, train

TASKS = [task for task in d4rl.RECIPES if task.startswith("antmaze")]
INSTALL = "ray is not installed: pip install -r requirements-cluster.txt"


@pytest.fixture
def cluster(monkeypatch):
    """Its head, a node of one core, which notices within a second when another is gone."""
    pytest.importorskip("ray", reason=INSTALL)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home folder
    from ray.cluster_utils import Cluster

    attentive = {"initial_delay_ms": 0, "period_ms": 200, "failure_threshold": 5}
    attentive = {f"health_check_{name}": value for name, value in attentive.items()}
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}
    head["_system_config"] = attentive
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        processes = [node.all_processes.values() for node in cluster.list_all_nodes()]
        pids = [info.process.pid for kinds in processes for infos in kinds for info in infos]
        cluster.shutdown()
        wait_for(lambda: not any(map(alive, pids)))


def test_no_task_is_lost_when_a_node_is_killed(cluster, d4rl_command, capsys):
    node = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
    raylet = str(node.all_processes["raylet"][0].process.pid)
    why, lost = "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB", []
    d4rl_command.seconds, d4rl_command.broken = 4, {UMAZE: why}

    def done(call):
        return any((d4rl_command.out / call["task"]).glob("*/selection.json"))

    def under_way(call):
        both = len(list((d4rl_command.out / call["task"]).glob("*/resume.safetensors"))) == 2
        return call["raylet"] == raylet and both and not done(call)

    def half_way():
        calls = d4rl_command.calls()
        lately = [call for call in calls if time.time() - call["began"] < 1]
        return any(map(done, calls)) and any(map(under_way, lately))

    def kill():
        wait_for(half_way, 60)
        cluster.remove_node(node, allow_graceful=False)
        there = [call for call in d4rl_command.calls() if call["raylet"] == raylet]
        wait_for(lambda: not any(alive(call["pid"]) for call in there))  # one may end by itself
        lost.extend(filter(under_way, there))

    killer = threading.Thread(target=kill)
    killer.start()
    assert d4rl_command("--ray", cluster.address, tasks=TASKS) == 1
    killer.join()

    assert lost and not any(alive(call["pid"]) for call in lost)
    for call in lost:  # continued on the other node: its runs lie in a folder that both see
        of_task = [c for c in d4rl_command.calls() if c["task"] == call["task"]]
        (again,) = (c for c in of_task if c["pid"] != call["pid"])
        assert again["raylet"] != raylet and again["arguments"][0] == "--resume"
    notes = {row["task"]: (row["seeds"], row["note"]) for row in d4rl_command.table()["rows"]}
    assert notes.pop(UMAZE) == ([], f"failed: {d4rl_command.broken[UMAZE]}")
    assert notes == dict.fromkeys([task for task in TASKS if task != UMAZE], ([0, 1], ""))
    printed = capsys.readouterr().out
    for task in TASKS:
        assert (f"{task}: seeds 0 1 done" in printed) == (task != UMAZE)

    before, d4rl_command.broken, d4rl_command.seconds = len(d4rl_command.calls()), {}, 0
    assert d4rl_command(tasks=TASKS) == 0
    assert len(d4rl_command.calls()) == before + 1  # what failed there is made here
    assert [row["seeds"] for row in d4rl_command.table()["rows"]] == [[0, 1]] * len(TASKS)


class HeadDies:
    """Stands in for ray: the head dies after the first task, whose outcome has come back."""

    def __init__(self, exceptions):
        self.exceptions, self.jobs, self.lost = exceptions, [], False

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]

    def remote(self, **_):
        return lambda function: SimpleNamespace(remote=self.begin)

    def begin(self, job):
        self.jobs.append(job)
        return len(self.jobs) - 1

    def wait(self, waiting):
        return waiting[:1], waiting[1:]

    def get(self, task):
        if self.lost:
            raise self.exceptions.NodeDiedError("the head is gone")
        self.lost = True
        return train(self.jobs[task])

    def shutdown(self):
        pass


def test_when_the_head_dies_what_is_done_stays(d4rl_command, monkeypatch):
    """The rest is marked as failed, and made by the next call."""
    exceptions = pytest.importorskip("ray.exceptions", reason=INSTALL)
    head = HeadDies(exceptions)
    monkeypatch.setattr(d4rl, "connect", lambda address: head)
    assert d4rl_command("--ray", "HEAD:6379", tasks=TASKS) == 1
    first, *others = d4rl_command.table()["rows"]
    assert (first["seeds"], first["note"]) == ([0, 1], "")
    for row in others:
        assert row["seeds"] == [] and row["note"].startswith("failed: NodeDiedError")
    failed = sorted(path.parent.name for path in d4rl_command.out.glob("*/failed.json"))
    assert failed == sorted(TASKS[1:])
    assert d4rl_command(tasks=TASKS) == 0
    assert [call["task"] for call in d4rl_command.calls()] == TASKS
    assert [row["note"] for row in d4rl_command.table()["rows"]] == [""] * len(TASKS)


def test_an_address_that_does_not_answer_is_refused_in_a_line(d4rl_command):
    pytest.importorskip("ray", reason=INSTALL)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for address in (f"127.0.0.1:{port}", "nonsense"):
            why = f"no Ray cluster answers at {address}.*ray start --head"
            with pytest.raises(SystemExit, match=why) as refused:
                d4rl_command("--ray", address)
            assert "\n" not in str(refused.value)
    assert not d4rl_command.calls() and not list(d4rl_command.out.rglob("failed.json"))


def test_a_task_that_ray_gives_up_has_a_reason_of_one_line():
    exceptions = pytest.importorskip("ray.exceptions", reason=INSTALL)
    full = d4rl.why_lost(exceptions.OutOfMemoryError("a page\nof advice"))
    assert full.startswith("out of memory: Ray ended it")
    crashed = d4rl.why_lost(exceptions.WorkerCrashedError())
    assert crashed.startswith("WorkerCrashedError: The worker died")
    last = "ModuleNotFoundError: No module named 'safetensors'"
    failed = exceptions.RayTaskError("train", f"Traceback:\n  a line\n{last}", None)
    assert d4rl.why_lost(failed) == f"RayTaskError: {last}"


@pytest.mark.parametrize("exit_code, waits", [(-signal.SIGKILL, True), (143, True), (1, False)])
def test_a_kill_is_reported_only_by_a_worker_that_lives_on(exit_code, waits, monkeypatch):
    """A worker that lost its node kills its children and ends: the task then goes on elsewhere."""
    outcome, slept = Outcome({"reason": "why", "exit_code": exit_code}, {}), []
    monkeypatch.setattr(d4rl, "train", lambda job: outcome)
    monkeypatch.setattr(time, "sleep", slept.append)
    assert d4rl.train_on_a_node(None) == outcome
    assert slept == [d4rl.LOST_SECONDS] * waits


def test_without_ray_a_line_says_what_to_install(d4rl_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    install = "--ray needs Ray: pip install -r requirements-cluster.txt"
    with pytest.raises(SystemExit, match=install):
        d4rl_command("--ray")
