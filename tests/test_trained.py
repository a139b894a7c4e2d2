"""kernels/trained.py: agents handed over, side by side, resumed, changed in between, taken away."""

import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
from reference import (  # noqa: E402
    SMALL,
    assert_same,
    fused,
    make_agent,
    make_batch,
    make_noise,
    make_transitions,
    tensors,
)

from kernels import FusedSampler, FusedUpdate, UnsupportedError  # noqa: E402


def small_run(seed, **how):
    agent = make_agent(5, 2, seed=seed, **SMALL | how)
    return agent, fused(agent, 6, "fp16", make_transitions(agent))


@pytest.fixture(scope="module")
def history():
    """One agent's state after each of three updates, and what they reported."""
    agent, update = small_run(1)
    states, metrics = [], []
    for _ in range(3):
        metrics.append(update.run(1))
        states.append(tensors(agent))
    return states, metrics


def test_two_runs_agree_bit_for_bit_however_they_are_cut_up(history):
    states, metrics = history
    agent, update = small_run(1)
    means = update.run(3)
    assert_same(agent, states[2])
    for name, mean in means.items():
        torch.testing.assert_close(mean, torch.stack([m[name] for m in metrics]).mean())
        assert mean.isfinite()


# ---- Several agents ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_q", [False, True])
def test_agents_side_by_side_get_what_each_gets_alone(max_q):
    seeds = 1, 2_000_000_000
    agents = [make_agent(5, 2, seed=seed, max_q_backup=max_q, **SMALL) for seed in seeds]
    metrics = fused(agents, 6, "fp16", make_transitions(agents[0])).run(1)
    for seed, agent, found in zip(seeds, agents, metrics):
        alone, update = small_run(seed, max_q_backup=max_q)
        assert update.run(1) == found
        assert_same(agent, tensors(alone))
    assert metrics[0]["bc_loss"] != metrics[1]["bc_loss"]


def test_agents_side_by_side_may_be_given_a_batch_each():
    agents, alone = ([make_agent(5, 2, seed=seed, **SMALL) for seed in (1, 2)] for _ in range(2))
    batches = [make_batch(agents[0], 6, seed=seed) for seed in (3, 4)]
    draws = [agent.draw_noise(6) for agent in agents]
    metrics = fused(agents, 6).step(batches, draws)
    for i, agent in enumerate(alone):
        assert fused(agent, 6).step(batches[i], draws[i]) == metrics[i]
        assert_same(agent, tensors(agents[i]))


# ---- Between updates -----------------------------------------------------------------------------


def test_a_resumed_run_goes_on_bit_for_bit(history):
    states, _ = history
    agent = make_agent(5, 2, seed=1, **SMALL)
    agent.load_state_dict(states[0] | {"generator": agent.generator.get_state()})
    fused(agent, 6, "fp16", make_transitions(agent)).run(1)
    assert_same(agent, states[1])


def test_what_is_loaded_between_runs_is_what_is_trained(history):
    states, _ = history
    agent, update = small_run(1)
    update.run(1)
    agent.load_state_dict(states[1] | {"generator": agent.generator.get_state()})
    update.run(1)
    assert_same(agent, states[2])


def test_modules_and_other_kernels_see_what_is_trained():
    """And plain torch can go on from there, and the kernels from what plain torch has made."""
    agent = make_agent(**SMALL | {"lr": 1e-2})
    sampler, (state, x_T, noises) = FusedSampler(agent.policy, "fp32"), make_noise(agent.policy, 10)
    update = fused(agent, 8, "fp32", make_transitions(agent))
    with torch.no_grad():
        before = agent.policy.sample(state, x_T=x_T, noises=noises)
        update.run(1)
        after = agent.policy.sample(state, x_T=x_T, noises=noises)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(sampler(state, x_T, noises), after, rtol=0, atol=2e-5)
    own, trained = agent.policy.final_layer.weight, update.policy.vectors.parameters
    assert own.untyped_storage().data_ptr() == trained.untyped_storage().data_ptr()
    agent.update(make_batch(agent, 8))
    update.run(1)
    assert agent.step == 3 and int(agent.state_dict()["policy_optimizer.step"]) == 3


def test_an_agent_that_another_update_took_over_is_refused():
    """Its tensors are in the other's memory now: what the first one trained would be lost."""
    agent = make_agent()
    first = FusedUpdate(agent, make_transitions(agent), 8)
    FusedUpdate(agent, make_transitions(agent), 8)
    with pytest.raises(UnsupportedError, match="another FusedUpdate has taken over"):
        first.run(1)
