"""kernels/graphs.py: captured chains, actors and updates, eager and fused.

On a GPU the graphs are torch's own, elsewhere the imitation in recorded.py.
"""

import gc
import weakref

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
import recorded  # noqa: E402
from reference import (  # noqa: E402
    DEVICE,
    SMALL,
    assert_same,
    make_agent,
    make_batch,
    make_critic,
    make_noise,
    make_policy,
    make_transitions,
    needs_interpreter,
    scale_rates,
    tensors,
)

import dql  # noqa: E402
from kernels import FusedActor, FusedSampler, UnsupportedError, eager, graphs  # noqa: E402

# ---- The capture ---------------------------------------------------------------------------------


@needs_interpreter
def test_without_a_gpu_graphs_are_refused():
    with pytest.raises(UnsupportedError, match="need a CUDA GPU"):
        graphs.Captured(torch.neg, torch.zeros(3))
    with pytest.raises(UnsupportedError, match="no CUDA GPU"):
        graphs.NumpyActor(FusedActor(make_policy(), make_critic()), state_dim=11)


def test_changed_networks_are_packed_again_before_a_replay(cuda_graphs):
    policy, critic = make_policy(), make_critic()
    sampler, actor = FusedSampler(policy), FusedActor(policy, critic, 5)
    state = make_noise(policy, 2)[0]
    graph = graphs.Captured(lambda s: (sampler(s), actor(s)), state, fused=[sampler, actor])
    assert graph.packed == [sampler.packed, actor.policy, actor.critic]
    sampler(state)  # is no part of the graph
    assert len(graph.packed) == 3
    critic.q1_model[-1].bias += 1.0
    assert [packed.stale() for packed in graph.packed] == [False, False, True]
    graph(state)
    assert not any(packed.stale() for packed in graph.packed)
    with pytest.raises(UnsupportedError, match="captured for an input"):
        graph(state[:1])


def test_what_waits_for_the_device_cannot_be_captured(cuda_graphs):
    """The error says why, and afterwards the stream is the one before and generators draw.

    torch itself would stay on the capture's stream, and in 2.11 generators would refuse to draw.
    """
    x, generator = torch.ones(3, device=DEVICE), torch.Generator(DEVICE)
    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)
    try:
        with pytest.raises(RuntimeError, match="not permitted when .*stream is capturing"):
            graphs.Captured(lambda x: x * float(x.sum()), x, generators=[generator])
        assert torch.cuda.current_stream() == stream and not recorded.refusing
        torch.rand(1, device=DEVICE)
        torch.rand(1, device=DEVICE, generator=generator)
    finally:
        torch.cuda.set_stream(torch.cuda.default_stream() if DEVICE == "cuda" else stream)
    assert graphs.Captured(lambda x: x * 2, x).replay().tolist() == [2.0, 2.0, 2.0]


@needs_interpreter
def test_a_capture_is_made_on_the_device_of_its_tensors(cuda_graphs):
    """On another one the current stream would record nothing."""
    current = []

    def function(x):
        current.append(recorded.current_device[-1])
        return x + 1

    graph = graphs.Captured(function, torch.ones(3), device="cuda:1")
    assert current == [1] * (graphs.WARM_UP + 1)
    assert graph.graph.device == 1 and recorded.current_device == [0]
    assert graph.replay().tolist() == [2.0, 2.0, 2.0]


def test_garbage_is_collected_before_a_capture_and_not_within(cuda_graphs):
    class Cycle:
        def __init__(self):
            self.me = self

    dead, collecting = weakref.ref(Cycle()), []

    def function(x):
        collecting.append(gc.isenabled())
        return x + 1

    graphs.Captured(function, torch.ones(3, device=DEVICE))
    assert dead() is None
    assert collecting == [True] * graphs.WARM_UP + [False] and gc.isenabled()


def test_a_capture_that_fails_leaves_everything_as_it_was(cuda_graphs):
    counter, generator = torch.zeros(1, device=DEVICE), torch.Generator(DEVICE)
    before, calls = generator.get_state(), []

    def function():
        counter.add_(1)
        torch.rand(1, device=DEVICE, generator=generator)
        if len(calls) == graphs.WARM_UP:
            raise ValueError("this cannot be captured")
        calls.append(1)

    with pytest.raises(ValueError, match="this cannot be captured"):
        graphs.Captured(function, unchanged=[counter], generators=[generator])
    assert counter.item() == 0 and torch.equal(generator.get_state(), before) and gc.isenabled()


# ---- Replays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 50, pytest.param(5000, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fused", [False, True])
def test_a_replay_equals_a_direct_call(cuda_graphs, n, fused):
    policy = make_policy(29, 8, hidden_dim=128 if DEVICE == "cpu" else 256)
    sampler = FusedSampler(policy) if fused else lambda s, x, z: policy.sample(s, x_T=x, noises=z)
    graph = graphs.Captured(sampler, *make_noise(policy, n))
    # On a GPU cuBLAS may choose another product for another stream.
    close = 0 if fused or DEVICE == "cpu" else 1e-5
    for seed in (2, 3):
        inputs = make_noise(policy, n, seed=seed)
        torch.testing.assert_close(graph(*inputs), sampler(*inputs), rtol=0, atol=close)


@pytest.mark.parametrize("kind", ["eager", "sampler", "actor"])
def test_each_replay_draws_new_noise(cuda_graphs, kind):
    policy = make_policy(n_timesteps=2)
    functions = {
        "eager": policy.sample,
        "sampler": FusedSampler(policy),
        "actor": FusedActor(policy, make_critic(), 5),
    }
    graph = graphs.Captured(functions[kind], make_noise(policy, 3)[0])
    first = graph.replay().clone()
    assert (graph.replay() - first).abs().mean() > 0.01


def test_replays_and_direct_calls_share_one_sequence_of_draws(cuda_graphs):
    policy = make_policy()
    state = make_noise(policy, 10)[0]
    sampler = FusedSampler(policy, seed=4)
    direct = [sampler(state).clone() for _ in range(graphs.WARM_UP + 2)]
    graph = graphs.Captured(FusedSampler(policy, seed=4), state)  # its warm-up draws too
    for expected in direct[graphs.WARM_UP :]:
        assert torch.equal(graph.replay(), expected)


@pytest.mark.parametrize("how", ["a write", "an optimizer", "an agent's update"])
def test_a_replay_sees_what_was_trained_since_the_capture(cuda_graphs, how):
    agent = dql.DiffusionQL(11, 3, hidden_dim=128, lr=1e-2, device=DEVICE)
    policy = agent.policy
    sampler = FusedSampler(policy, "fp32")
    inputs = make_noise(policy, 10)
    graph = graphs.Captured(lambda *given: sampler(*given), *inputs, fused=[sampler])
    before = graph(*inputs).clone()
    if how == "a write":
        with torch.no_grad():
            policy.final_layer.bias += 0.5
    elif how == "an optimizer":
        policy.bc_loss(inputs[0], inputs[1]).backward()
        torch.optim.Adam(policy.parameters(), lr=1e-2).step()
    else:
        agent.update(make_batch(agent, 32))
    after = graph(*inputs)
    assert not torch.equal(after, before)
    with torch.no_grad():
        expected = policy.sample(inputs[0], x_T=inputs[1], noises=inputs[2])
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-5)


def test_inputs_of_another_shape_are_refused(cuda_graphs):
    """And nothing is overwritten."""
    policy = make_policy()
    state = make_noise(policy, 10)[0]
    graph = graphs.Captured(FusedSampler(policy), state)
    for wrong in (state[:5], state.double(), state.to("meta")):
        with pytest.raises(UnsupportedError, match="captured for an input"):
            graph(wrong)
    with pytest.raises(UnsupportedError, match="2 inputs given to a graph of 1"):
        graph(state, state)
    assert torch.equal(graph.inputs[0], state)


def test_a_graph_survives_later_calls_with_more_states(cuda_graphs):
    policy, critic = make_policy(), make_critic(gain=3.0)
    actor = FusedActor(policy, critic, 5, greedy=True, seed=1)
    state = make_noise(policy, 1)[0]
    graph = graphs.Captured(actor, state)
    actor(make_noise(policy, 7 if DEVICE == "cpu" else 1000)[0])
    # Were the actor's first memory free, this would get it.
    torch.empty(1 << 20, device=DEVICE).fill_(float("nan"))
    assert graph.replay().isfinite().all()


@pytest.mark.gpu
def test_a_capture_that_names_no_fused_sampler_is_refused():
    """Its replays would go on with the weights of today."""
    sampler = FusedSampler(make_policy())
    with pytest.raises(UnsupportedError, match="fused="):
        graphs.Captured(lambda s: sampler(s), make_noise(make_policy(), 3)[0])


# ---- Updates -------------------------------------------------------------------------------------


def test_captured_eager_updates_equal_launched_ones(cuda_graphs):
    """With both sides of the coin, and updates in which the averaged policy moves or does not."""
    n = 200 if DEVICE == "cuda" else 5
    agents = [make_agent(5, 2, **SMALL) for _ in range(2)]
    eager.speed_up(agents[0])  # so that it has the graph's Adam
    transitions = make_transitions(agents[0])
    before = tensors(agents[1])
    eager.speed_up(agents[1])
    updates = graphs.GraphUpdates([agents[1]], transitions, 6)
    assert_same(agents[1], before)
    metrics = []
    for share, k in ((1.0, n - 2), (0.5, 2)):
        if DEVICE == "cuda":  # the imitation keeps the rate
            scale_rates(agents, share)
        launched = dql.Updates([agents[0]], transitions, 6).run(k)
        metrics.append((launched[0], updates.run(k)[0]))
    assert agents[0].step == agents[1].step == n
    # On a GPU cuBLAS may choose another product for another stream.
    close = dict(rtol=1e-3, atol=1e-4) if DEVICE == "cuda" else dict(rtol=0, atol=0)
    torch.testing.assert_close(tensors(agents[1]), tensors(agents[0]), **close)
    for launched, captured in metrics:
        torch.testing.assert_close(captured, launched, **close)


# ---- From numpy to numpy -------------------------------------------------------------------------


def test_a_numpy_actor_acts_as_the_actor_does(cuda_graphs):
    policy, critic = make_policy(29, 8, n_timesteps=2), make_critic(29, 8)
    state = make_noise(policy, 3)[0]
    direct, actor = (FusedActor(policy, critic, 5, seed=2) for _ in range(2))
    act = graphs.NumpyActor(actor, state_dim=29, n_states=3, device=DEVICE)
    for _ in range(graphs.WARM_UP + 1):  # the warm-up, and before it a call to learn the shape
        direct(state)
    for _ in range(2):
        assert np.array_equal(act(state.cpu().numpy()), direct(state).cpu().numpy())
    alone = graphs.NumpyActor(FusedActor(policy, critic, 5), state_dim=29, device=DEVICE)
    assert alone(state[0].cpu().numpy()).shape == (8,)
    with pytest.raises(UnsupportedError, match="captured for"):
        alone(np.zeros(28, np.float32))


@needs_interpreter
def test_a_numpy_actor_waits_for_its_own_device(cuda_graphs):
    act = graphs.NumpyActor(lambda state: state * 2, state_dim=4, device=DEVICE)
    act.captured.device = torch.device("cuda:1")
    act(np.ones(4))
    assert recorded.synchronized == [1]


@pytest.mark.parametrize(
    "n_states, shape, fits",
    [
        (1, (4,), True),
        (1, (1, 4), True),
        (3, (3, 4), True),
        (3, (4,), False),
        (3, (1, 4), False),
        (1, (1,), False),
        (1, (), False),
    ],
)
def test_an_observation_of_another_shape_is_refused(cuda_graphs, n_states, shape, fits):
    double = lambda state: state[:, :2] * 2  # noqa: E731
    act = graphs.NumpyActor(double, state_dim=4, n_states=n_states, device=DEVICE)
    if fits:
        assert np.array_equal(act(np.ones(shape)), np.full((*shape[:-1], 2), 2.0))
    else:
        # numpy alone would broadcast it.
        with pytest.raises(UnsupportedError, match="captured for"):
            act(np.ones(shape))
        assert (act.state == 0).all()
