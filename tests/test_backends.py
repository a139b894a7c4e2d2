"""trainer/backends.py: what acts and what trains is tried first, and falls back where it may.

On a CPU the fused kernels run in Triton's interpreter.
"""

import math
import time

import numpy as np
import pytest
import torch
from tiny_runs import ENV, TINY, refused

import dql
import tasks
from dql import DiffusionBC, DiffusionQL
from kernels import eager
from trainer import backends
from trainer.backends import FusedActing, choose_acting
from trainer.data import load_transitions
from trainer.evaluation import evaluate
from trainer.options import Options, UserError

pytestmark = pytest.mark.usefixtures("short_episodes")

SMALL = dict(hidden_dim=128, n_timesteps=2)


def generator():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="triton has no package for this platform")
    if torch.cuda.is_available():
        pytest.skip("these agents are on the CPU, where kernels need the interpreter")
    import kernels

    return kernels


@pytest.mark.parametrize("make", [DiffusionQL, DiffusionBC])
def test_fused_acting_takes_the_actions_of_plain_acting(kernels, make):
    agent = make(5, 2, **SMALL)
    act, states, differs = FusedActing(agent, 6, "fp16"), torch.randn(4, 5).numpy(), []
    for state in (states, states[0]):
        action, expected = act(state, generator()), agent.act(state, 6, generator=generator())
        assert isinstance(action, np.ndarray) and action.shape == expected.shape
        # fp16's rounding; another candidate would be further away
        np.testing.assert_allclose(action, expected, rtol=0, atol=2e-3)
        differs.append((action != expected).any())
    assert any(differs), "the kernels did not act"


@pytest.mark.parametrize("make", [DiffusionQL, DiffusionBC])
def test_kernels_that_act_differently_are_refused(kernels, monkeypatch, make):
    agent, refresh = make(5, 2, **SMALL), kernels.packing.PackedPolicy.refresh

    def broken(packed):
        refresh(packed)
        packed.bias[:, 3 * packed.hidden_dim :] += 0.5

    monkeypatch.setattr(kernels.packing.PackedPolicy, "refresh", broken)
    with pytest.raises(ValueError, match="away from plain torch's"):
        FusedActing(agent, 6, "fp16")


def test_acting_falls_back_with_a_line_or_refuses(kernels, monkeypatch, capsys):
    class OnGPU:
        device = torch.device("cuda")

    def refuse(*_):
        raise kernels.UnsupportedError("hidden_dim 100 is not one of (128, 256, 512)")

    monkeypatch.setattr(backends, "FusedActing", refuse)
    choose_acting(Options(backend="auto"), [OnGPU()])
    line = capsys.readouterr().out
    assert "plain torch" in line and "hidden_dim 100" in line and line.count("\n") == 1
    with pytest.raises(UserError, match="--backend fused is not available: hidden_dim 100"):
        choose_acting(Options(backend="fused"), [OnGPU()])
    monkeypatch.setattr(kernels, "why_not", lambda: "no CUDA GPU was found")
    with pytest.raises(UserError, match="no CUDA GPU"):
        choose_acting(Options(backend="fused"), [DiffusionQL(5, 2, **SMALL)])
    choose_acting(Options(backend="auto"), [DiffusionQL(5, 2, **SMALL)])  # on a CPU: expected
    choose_acting(Options(backend="eager"), [OnGPU()])
    assert capsys.readouterr().out == ""


DIVERGED = {
    "not finite at update 7": math.nan,
    "at update 7 .* cannot hold: take --precision tf32": 1e6,
}


@pytest.mark.parametrize("message, weight", DIVERGED.items())
def test_kernels_name_a_diverged_policy(kernels, message, weight):
    agent = DiffusionQL(5, 2, **SMALL)
    act = FusedActing(agent, 3, "fp16")
    with torch.no_grad():
        agent.policy.final_layer.weight[0, 0] = weight

    class Task:
        episode_limit = 1

        def evaluate(self, act, *_, **__):
            act(np.zeros((1, 5), np.float32))

    with pytest.raises(UserError, match=message):
        evaluate(act, Task(), Options(n_candidates=3), 1, 7, agent.device)


def test_auto_compiles_a_long_run_where_it_can(monkeypatch):
    tried, agents = [], [DiffusionQL(3, 2, hidden_dim=16)]
    monkeypatch.setattr(backends, "make_updates", lambda backend, *_: tried.append(backend))
    for compiler, updates in ((True, 20_000), (True, 19_999), (False, 20_000)):
        monkeypatch.setattr(backends.eager, "has_compiler", lambda: compiler)
        backends.choose_updates(Options(epochs=1, updates_per_epoch=updates), agents, None)
    assert tried == ["compile", "eager", "eager"]


def tiny_agents(n=1):
    return [dql.DiffusionQL(29, 8, hidden_dim=128, n_timesteps=2, seed=seed) for seed in range(n)]


def copy_of(agent):
    return {name: value.clone() for name, value in agent.state_dict().items()}


def assert_unchanged(agent, state):
    for name, value in agent.state_dict().items():
        assert torch.equal(value, state[name]), name


def transitions_of(data):
    task = tasks.get(ENV)
    dataset = tasks.load(task, data, log=lambda line: None)
    return load_transitions(Options(), dataset, "cpu")


def test_trying_the_fused_update_changes_nothing(data, few_programs):
    agents = tiny_agents(2)
    before = [copy_of(agent) for agent in agents]
    backends.make_updates("fused", Options(batch_size=8), agents, transitions_of(data))
    for agent, state in zip(agents, before):
        assert_unchanged(agent, state)


def test_a_fused_update_that_is_wrong_is_refused(data, few_programs, monkeypatch):
    right = few_programs.update.Launches._policy_gradients

    def wrong(launches):
        right(launches)
        launches.norms.policy.mul_(1.3)

    monkeypatch.setattr(few_programs.update.Launches, "_policy_gradients", wrong)
    with pytest.raises(ValueError, match="its actor_grad_norm is"):
        backends.make_updates("fused", Options(batch_size=8), tiny_agents(), transitions_of(data))


def test_a_failed_capture_leaves_the_agents_as_they_were(
    data, few_programs, cuda_graphs, monkeypatch
):
    """So the next slower backend trains the same agents."""
    agents, whole = tiny_agents(), few_programs.FusedUpdate
    before = copy_of(agents[0])

    def replaying(*args):
        update = whole(*args)
        update.replays = True
        return update

    def broken(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(few_programs, "FusedUpdate", replaying)
    monkeypatch.setattr("kernels.update.PER_REPLAY", 1)
    monkeypatch.setattr("kernels.graphs.WARM_UP", 1)
    monkeypatch.setattr(torch.cuda, "graph", broken)
    for backend in ("fused", "graph"):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            backends.make_updates(backend, Options(batch_size=8), agents, transitions_of(data))
        assert_unchanged(agents[0], before)


def test_auto_falls_back_with_a_line_that_says_why(monkeypatch, capsys):
    """To the next slower backend."""

    class OnGPU:
        device = torch.device("cuda")

    def make(backend, *_):
        if backend != "eager":
            raise ValueError(f"{backend} is broken\nand here is why at length")
        return backend

    monkeypatch.setattr(backends, "make_updates", make)
    assert backends.choose_updates(Options(), [OnGPU()], None) == "eager"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "updates will not be fused: fused is broken",
        "updates will not be graph: graph is broken",
    ]
    for backend in ("fused", "compile"):
        why = f"--backend {backend} is not available: {backend} is broken$"
        with pytest.raises(UserError, match=why):
            backends.choose_updates(Options(backend=backend), [OnGPU()], None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_unavailable_backend_is_refused_with_the_reason(tmp_path, data, capsys, monkeypatch):
    pytest.importorskip("triton", reason="triton has no package for this platform")
    import kernels

    def message(backend):
        options = ["--data", data, "--out", tmp_path, "--backend", backend]
        return refused(capsys, *TINY, *options)

    unavailable = "--backend {} is not available: {}".format
    assert unavailable("graph", "CUDA graphs need a CUDA GPU") in message("graph")
    assert unavailable("fused", "hidden_dim 16 is not one of") in message("fused")
    monkeypatch.setattr(kernels, "why_not", lambda: "no CUDA GPU was found")
    assert unavailable("fused", "no CUDA GPU") in message("fused")
    monkeypatch.setattr(eager.shutil, "which", lambda name: None)
    assert unavailable("compile", "it needs a C++ compiler") in message("compile")


# ---- Threads -------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("slow, chosen", [(2, 1), (1, 2)])
def test_updates_take_the_faster_number_of_threads(
    two_threads, data, monkeypatch, capsys, slow, chosen
):
    """The state is what it was, and one thread is said."""
    whole, seen = DiffusionQL.update, []

    def update(agent, *how):
        seen.append(torch.get_num_threads())
        time.sleep(0.3 * (seen[-1] == slow))
        return whole(agent, *how)

    monkeypatch.setattr(DiffusionQL, "update", update)
    agent = dql.DiffusionQL(29, 8, hidden_dim=16, n_timesteps=1)
    before = agent.state_dict()
    backends.choose_threads(Options(batch_size=8), [agent], transitions_of(data))
    assert torch.get_num_threads() == chosen and {1, 2} <= set(seen) and len(seen) < 18
    assert all(torch.equal(v, before[k]) for k, v in agent.state_dict().items())
    assert ("updates take one thread" in capsys.readouterr().out) == (chosen == 1)


@pytest.mark.parametrize("how, found", [({"threads": 3}, 2), ({"made_with": 1}, 1)])
def test_a_number_of_threads_that_is_given_is_not_timed(two_threads, monkeypatch, how, found):
    """By the user, or by a run that is resumed: the same number gives the same bits."""
    monkeypatch.setattr(DiffusionQL, "update", None)
    options = Options(threads=how.pop("threads", 0))
    backends.choose_threads(options, [DiffusionQL(3, 2, hidden_dim=16)], None, **how)
    assert torch.get_num_threads() == found


@pytest.mark.skipif(not eager.has_compiler(), reason="there is no C++ compiler")
def test_compiled_updates_are_the_eager_ones(data):
    agents = [dql.DiffusionBC(29, 8, hidden_dim=16, n_timesteps=1) for _ in range(2)]
    for agent, backend in zip(agents, ("eager", "compile")):
        options, transitions = Options(batch_size=8), transitions_of(data)
        means = backends.make_updates(backend, options, [agent], transitions).run(2)
    assert agents[1].step == 2 and set(means[0]) == {"bc_loss", "actor_grad_norm"}
    states = [agent.policy.state_dict() for agent in agents]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)
