"""dql.py's policy and critics: against the released code (the oracle), and the chain's own rules.

Everything is tested twice: plain, and as kernels/eager.py makes it.
"""

import math

import pytest
import torch
from small_agents import (
    CHAINS,
    CHAIN_ERROR,
    LOSS_ERROR,
    NOISE_ERROR,
    error,
    loaded,
    made,
    oracle_policy,
    rows_of,
)

from dql import DiffusionPolicy, TwinCritic

pytestmark = pytest.mark.usefixtures("plain_and_quick")


# ---- Against the released code -------------------------------------------------------------------


def test_time_embedding_and_its_mlp(oracle):
    policy = oracle_policy(oracle)
    assert error(policy.time_mlp(torch.arange(100)), oracle["out/time_mlp"]) < NOISE_ERROR


def test_predicted_noise(oracle):
    policy = oracle_policy(oracle)
    epsilon = policy.predict_noise(oracle["in/x"], oracle["in/t_T5"], oracle["in/state"])
    assert error(epsilon, oracle["out/mlp_out"]) < NOISE_ERROR


@pytest.mark.parametrize("schedule", CHAINS)
def test_reverse_chain(oracle, schedule):
    chain, T = CHAINS[schedule]
    policy = oracle_policy(oracle, n_timesteps=T, schedule=schedule)
    noise = dict(x_T=oracle[f"in/{chain}/xT"], noises=oracle[f"in/{chain}/eps"])
    action = policy.sample(oracle["in/state"], **noise)
    assert error(action, oracle[f"out/{chain}/action"]) < CHAIN_ERROR


@pytest.mark.parametrize("schedule", CHAINS)
def test_a_float64_policy_is_exact_but_for_its_frequencies(oracle, schedule):
    """Those of the time embedding are float32."""
    chain, T = CHAINS[schedule]
    policy = oracle_policy(oracle, n_timesteps=T, schedule=schedule).double()
    state = oracle["in/state"].double()
    if T == 5:
        epsilon = policy.predict_noise(oracle["in/x"].double(), oracle["in/t_T5"], state)
        assert error(epsilon, oracle["out/mlp_out"]) < 5e-8
    x_T, noises = oracle[f"in/{chain}/xT"].double(), oracle[f"in/{chain}/eps"].double()
    assert error(policy.sample(state, x_T=x_T, noises=noises), oracle[f"out/{chain}/action"]) < 5e-8


def test_behaviour_cloning_loss_and_its_gradient(oracle):
    policy = oracle_policy(oracle)
    noise = dict(t=oracle["in/t_T5"], noise=oracle["in/bc_eps"])
    loss = policy.bc_loss(oracle["in/state"], oracle["in/action"], **noise)
    assert error(loss, oracle["out/bc_l2_eps"]) < LOSS_ERROR
    loss.backward()
    for name, expected in oracle.named("out/bc_grad/").items():
        ours = rows_of(policy.get_parameter(name).grad, expected).double()
        assert (ours - expected).norm() < 2e-6 * expected.norm(), name


def test_twin_critics(oracle):
    critic = loaded(TwinCritic(29, 8), oracle.named("params/critic/"))
    q1, q2 = critic(oracle["in/state"], oracle["in/action"])
    assert error(q1, oracle["out/q1"]) < NOISE_ERROR
    assert error(q2, oracle["out/q2"]) < NOISE_ERROR
    assert error(torch.min(q1, q2), oracle["out/qmin"]) < NOISE_ERROR


def test_float64_critics_are_exact(oracle):
    critic = loaded(TwinCritic(29, 8), oracle.named("params/critic/")).double()
    q1, q2 = critic(oracle["in/state"].double(), oracle["in/action"].double())
    assert error(q1, oracle["out/q1"]) < 1e-14 and error(q2, oracle["out/q2"]) < 1e-14


# ---- The chain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
def test_one_step_schedules_are_finite(schedule):
    policy = made(DiffusionPolicy(3, 2, n_timesteps=1, schedule=schedule))
    action = policy.sample(torch.zeros(4, 3))
    assert action.shape == (4, 2) and action.isfinite().all()


def test_samples_differentiate_through_chain_and_clamps():
    """The gradient of a weighted sum is its slope, measured in float64."""
    torch.manual_seed(0)
    policy = made(DiffusionPolicy(3, 2, hidden_dim=16, max_action=0.7)).double()
    shapes = ((64, 3), (64, 2), (5, 64, 2))
    state, x_T, noises = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    action = policy.sample(state, x_T=x_T, noises=noises)
    clipped = (action.abs() == 0.7).double().mean()
    assert 0.1 < clipped < 0.9  # both sides of the clamps are tested
    weight = torch.randn_like(action)
    gradients = torch.autograd.grad((action * weight).sum(), list(policy.parameters()))
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()

    before, h, values = [p.detach().clone() for p in policy.parameters()], 1e-7, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, p0, gradient in zip(policy.parameters(), before, gradients):
                p.copy_(p0 + sign * h * gradient / norm)
            values.append((policy.sample(state, x_T=x_T, noises=noises) * weight).sum())
    slope = (values[0] - values[1]) / (2 * h)
    assert abs(slope - norm) < 1e-5 * norm


def test_no_gradient_passes_where_the_last_clamp_is_active():
    torch.manual_seed(0)
    policy = made(DiffusionPolicy(3, 2, hidden_dim=16, max_action=0.7))
    x_T = torch.randn(64, 2, requires_grad=True)
    action = policy.sample(torch.randn(64, 3), x_T=x_T)
    (gradient,) = torch.autograd.grad(action[(action.abs() == 0.7).all(dim=1)].sum(), x_T)
    assert gradient.abs().max() == 0
    (gradient,) = torch.autograd.grad(policy.sample(torch.randn(64, 3), x_T=x_T).sum(), x_T)
    assert gradient.abs().max() > 0


def test_several_chains_a_state_equal_those_of_repeated_states():
    torch.manual_seed(0)
    policy = made(DiffusionPolicy(3, 2, hidden_dim=16))
    critic = made(TwinCritic(3, 2, hidden_dim=16))
    state, noise = torch.randn(4, 3), dict(x_T=torch.randn(28, 2), noises=torch.randn(5, 28, 2))
    repeated = state.repeat_interleave(7, dim=0)
    actions, close = policy.sample(state, **noise), dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actions, policy.sample(repeated, **noise), **close)
    torch.testing.assert_close(critic(state, actions), critic(repeated, actions), **close)


def test_the_last_noise_is_ignored_and_the_others_are_not():
    torch.manual_seed(0)
    policy = made(DiffusionPolicy(3, 2, hidden_dim=16))
    state, x_T, noises = torch.randn(4, 3), 0.1 * torch.randn(4, 2), 0.1 * torch.randn(5, 4, 2)
    actions = policy.sample(state, x_T=x_T, noises=noises)
    for k in range(5):
        other = noises.clone()
        other[k] = math.nan
        assert torch.equal(policy.sample(state, x_T=x_T, noises=other), actions) == (k == 4)
