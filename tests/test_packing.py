"""kernels/packing.py: networks are packed again when they have changed, only then, and exactly."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
from reference import (  # noqa: E402
    DEVICE,
    fused,
    make_agent,
    make_batch,
    make_critic,
    make_noise,
    make_policy,
    make_transitions,
)

from kernels import FusedActor, FusedSampler, UnsupportedError, eager  # noqa: E402
from kernels.graphs import GraphUpdates  # noqa: E402
from kernels.packing import PackedCritic, PackedPolicy  # noqa: E402


def train_another(how):
    if how == "an agent":
        other = make_agent(seed=1)
        other.update(make_batch(other, 8))
    elif how == "an agent, fused":
        other = make_agent(5, 2, seed=1, n_timesteps=2)
        fused(other, 6, "fp16", make_transitions(other)).run(1)
    else:
        weights = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
        weights.grad = torch.ones_like(weights)
        torch.optim.Adam([weights], fused=True).step()


@pytest.mark.parametrize("how", ["an agent", "an agent, fused", "a fused optimizer"])
def test_training_elsewhere_leaves_what_is_packed_as_it_is(how):
    agent = make_agent()
    packed = PackedPolicy([agent.policy], "fp16"), PackedCritic([agent.critic_target], "fp16")
    train_another(how)
    assert not any(p.stale() for p in packed)


def test_updates_in_turns_pack_nothing_again(monkeypatch):
    agents = [make_agent(5, 2, seed=seed, n_timesteps=2) for seed in range(2)]
    updates = [fused(agent, 6, "fp16", make_transitions(agent)) for agent in agents]
    packed = []
    monkeypatch.setattr("kernels.packing._Packed.refresh", lambda self: packed.append(self))
    for _ in range(2):
        for update in updates:
            update.run(1)
    assert packed == []


@pytest.mark.parametrize("network", ["policy", "policy_ema", "critic", "critic_target"])
@pytest.mark.parametrize(
    "how", ["update", "quick update", "captured update", "fused update", "load_state_dict"]
)
def test_whatever_changes_a_network_of_an_agent_is_seen(network, how, cuda_graphs):
    agent = make_agent(5, 2, n_timesteps=2)
    kind = PackedPolicy if network.startswith("policy") else PackedCritic
    packed = kind([getattr(agent, network)], "fp16")
    if how == "quick update":
        eager.speed_up(agent)
    if how.endswith("k update") or how == "update":
        agent.update(make_batch(agent, 6))
    elif how == "captured update":
        updates = GraphUpdates([agent], make_transitions(agent), 6)
        packed.refresh()
        updates.run(1)
    elif how == "fused update":
        update = fused(agent, 6, "fp16", make_transitions(agent))
        packed.refresh()  # making it has moved the weights
        update.run(1)
    else:
        agent.load_state_dict(agent.state_dict())
    assert packed.stale()


def test_the_table_of_timesteps_is_in_full_precision():
    """All chains read it: neither autocast nor bfloat16 or TF32, as with --quick, may round it."""
    policy = make_policy(29, 8, hidden_dim=256)
    exact = copy.deepcopy(policy).double()
    w_time = exact.mid_layer[0].weight[:, 8:24]
    t = torch.arange(5, dtype=torch.float64, device=DEVICE)
    expected = exact.time_mlp(t) @ w_time.t() + exact.mid_layer[0].bias
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(DEVICE, torch.bfloat16):
            packed = PackedPolicy([policy], "fp32")
    finally:
        torch.set_float32_matmul_precision(before)
    found = packed.bias[:, :256] / 1.4426950408889634
    assert (found - expected).abs().max() < 2e-7 * expected.abs().max()


@pytest.mark.parametrize(
    "precision, most, said", [("fp16", 65504, "65,504"), ("fp16x3", 4094, "4,094")]
)
def test_weights_that_a_precision_cannot_hold_are_refused(precision, most, said):
    critic = make_critic()
    critic.q1_model[2].bias[0] = 1e6  # biases are float32
    critic.q1_model[2].weight[0, 0] = 0.99 * most
    PackedCritic([critic], precision)
    critic.q1_model[2].weight[0, 0] = 1.01 * most
    beyond = f"weights of the critic reach {said}, which {precision} cannot hold"
    with pytest.raises(UnsupportedError, match=beyond):
        PackedCritic([critic], precision)
    PackedCritic([critic], "tf32")


def test_a_state_beyond_fp16_gives_nan_not_a_wrong_action():
    policy, critic = make_policy(n_timesteps=2), make_critic()
    state = make_noise(policy, 4)[0]
    state[1, 0] = 1e6
    for act in (FusedSampler(policy), FusedActor(policy, critic, 5)):
        action = act(state)
        assert action[1].isnan().all() and action[[0, 2, 3]].isfinite().all()
