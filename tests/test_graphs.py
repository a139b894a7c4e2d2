"""CUDA graphs of the eager and the fused chain. What a graph does is tested on a GPU alone; nothing captures on a CPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
from reference import DEVICE, make_critic, make_noise, make_policy  # noqa: E402

from dql import DiffusionQL  # noqa: E402
from kernels import FusedActor, FusedSampler, UnsupportedError, graphs  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_graphs_are_refused():
    with pytest.raises(UnsupportedError, match="need a CUDA GPU"):
        graphs.Captured(torch.neg, torch.zeros(3))
    with pytest.raises(UnsupportedError, match="no CUDA GPU"):
        graphs.NumpyActor(FusedActor(make_policy(), make_critic()), state_dim=11)


class FakeGraph:
    """Stands in for a CUDA graph: a "replay" does nothing, as far as Python sees."""

    replays = 0

    def replay(self):
        self.replays += 1


def test_a_capture_finds_the_networks_that_its_function_packed_and_packs_them_again_before_a_replay(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    policy, critic = make_policy(), make_critic()
    sampler, actor = FusedSampler(policy), FusedActor(policy, critic, 5)
    state = make_noise(policy, 2)[0]
    graph = graphs.Captured(lambda s: (sampler(s), actor(s)), state)
    assert graph.packed == [sampler.packed, actor.policy, actor.critic]
    sampler(state)  # later calls belong to no graph
    assert len(graph.packed) == 3
    critic.q1_model[-1].bias += 1.0
    assert [packed.stale() for packed in graph.packed] == [False, False, True]
    graph(state)
    assert graph.graph.replays == 1 and not any(packed.stale() for packed in graph.packed)
    with pytest.raises(UnsupportedError, match="captured for an input"):
        graph(state[:1])


@pytest.mark.parametrize(
    "n_states, shape, fits",
    [(1, (4,), True), (1, (1, 4), True), (3, (3, 4), True), (3, (4,), False), (3, (1, 4), False), (1, (1,), False), (1, (), False)],
)
def test_an_observation_of_another_shape_is_refused_not_repeated(monkeypatch, n_states, shape, fits):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    act = object.__new__(graphs.NumpyActor)  # without the capture
    act.state, act.action, act.captured = np.zeros((n_states, 4)), np.zeros((n_states, 2)), FakeGraph()
    if fits:
        assert act(np.ones(shape)).shape == (*shape[:-1], 2) and (act.state == 1).all()
    else:
        with pytest.raises(UnsupportedError, match="captured for"):
            act(np.ones(shape))
        assert act.captured.replays == 0 and (act.state == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 50, 5000])
@pytest.mark.parametrize("fused", [False, True])
def test_a_replay_equals_a_direct_call(n, fused):
    policy = make_policy(29, 8, hidden_dim=256)
    sampler = FusedSampler(policy) if fused else lambda s, x, z: policy.sample(s, x_T=x, noises=z)
    graph = graphs.Captured(sampler, *make_noise(policy, n))
    for seed in (2, 3):
        inputs = make_noise(policy, n, seed=seed)
        assert torch.equal(graph(*inputs), sampler(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["eager", "sampler", "actor"])
def test_each_replay_draws_new_noise(kind):
    policy = make_policy()
    function = {"eager": policy.sample, "sampler": FusedSampler(policy), "actor": FusedActor(policy, make_critic())}[kind]
    graph = graphs.Captured(function, make_noise(policy, 10)[0])
    first = graph.replay().clone()
    assert (graph.replay() - first).abs().mean() > 0.01


@pytest.mark.gpu
def test_replays_and_direct_calls_share_one_sequence_of_draws():
    policy = make_policy()
    state = make_noise(policy, 10)[0]
    sampler = FusedSampler(policy, seed=4)
    direct = [sampler(state).clone() for _ in range(graphs.WARM_UP + 2)]
    graph = graphs.Captured(FusedSampler(policy, seed=4), state)  # its warm-up draws too
    for expected in direct[graphs.WARM_UP :]:
        assert torch.equal(graph.replay(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["a write", "an optimizer", "an agent's update"])
def test_a_replay_sees_what_was_trained_since_the_capture(how):
    agent = DiffusionQL(11, 3, hidden_dim=128, lr=1e-2, device=DEVICE)
    policy = agent.policy
    sampler = FusedSampler(policy, "fp32")
    inputs = make_noise(policy, 10)
    graph = graphs.Captured(lambda *given: sampler(*given), *inputs)  # found although it is wrapped
    before = graph(*inputs).clone()
    if how == "a write":
        with torch.no_grad():
            policy.final_layer.bias += 0.5
    elif how == "an optimizer":
        policy.bc_loss(inputs[0], inputs[1]).backward()
        torch.optim.Adam(policy.parameters(), lr=1e-2, fused=True).step()
    else:
        batch = torch.randn(32, 11), torch.rand(32, 3), torch.randn(32, 11), torch.randn(32, 1), torch.ones(32, 1)
        agent.update([x.to(DEVICE) for x in batch])
    after = graph(*inputs)
    assert not torch.equal(after, before)
    with torch.no_grad():
        expected = policy.sample(inputs[0], x_T=inputs[1], noises=inputs[2])
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-5)


@pytest.mark.gpu
def test_inputs_of_another_shape_are_refused_and_nothing_is_overwritten():
    policy = make_policy()
    state = make_noise(policy, 10)[0]
    graph = graphs.Captured(FusedSampler(policy), state)
    for wrong in (state[:5], state.double(), state.cpu()):
        with pytest.raises(UnsupportedError, match="captured for an input"):
            graph(wrong)
    with pytest.raises(UnsupportedError, match="2 inputs given to a graph of 1"):
        graph(state, state)
    assert torch.equal(graph.inputs[0], state)


@pytest.mark.gpu
def test_a_graph_survives_later_calls_with_more_states():
    policy, critic = make_policy(), make_critic(gain=3.0)
    actor = FusedActor(policy, critic, greedy=True, seed=1)
    state = make_noise(policy, 1)[0]
    graph = graphs.Captured(actor, state)
    actor(make_noise(policy, 1000)[0])
    torch.empty(1 << 20, device=DEVICE).fill_(float("nan"))  # whoever got the actor's first memory would write here
    assert graph.replay().isfinite().all()


@pytest.mark.gpu
def test_a_numpy_actor_acts_as_the_actor_does():
    policy, critic = make_policy(29, 8), make_critic(29, 8)
    state = make_noise(policy, 3)[0]
    actor, before = FusedActor(policy, critic, seed=2), graphs.WARM_UP + 1  # calls that the capture makes
    expected = [actor(state) for _ in range(before + 2)][before:]
    act = graphs.NumpyActor(FusedActor(policy, critic, seed=2), state_dim=29, n_states=3)
    first = act(state.cpu().numpy())
    second = act(state.cpu().numpy())
    assert np.array_equal(first, expected[0].cpu().numpy()) and np.array_equal(second, expected[1].cpu().numpy())
    alone = graphs.NumpyActor(FusedActor(policy, critic), state_dim=29)
    assert alone(state[0].cpu().numpy()).shape == (8,)
    with pytest.raises(UnsupportedError, match="captured for"):
        alone(np.zeros(28, np.float32))
