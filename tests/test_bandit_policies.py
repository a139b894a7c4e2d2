"""experiments/bandit_policies.py: diffusion is dql.py's, each baseline's loss the released one."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dql import DiffusionBC, DiffusionQL
from experiments.bandit_data import transitions
from experiments.bandit_policies import METHODS, laplacian_mmd, train

TRANSITIONS = transitions()


def make(name, seed=0):
    return METHODS[name](eta=2.5, n_timesteps=5, lr=3e-4, seed=seed)


@pytest.fixture
def batch():
    return TRANSITIONS.sample(100, torch.Generator().manual_seed(0))


ALGORITHMS = {"BC-Diffusion": DiffusionBC, "Diffusion-QL": DiffusionQL}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_diffusion_is_dqls_own_update(name):
    method = make(name, seed=3)
    agent = ALGORITHMS[name](2, 2, hidden_dim=128, eta=2.5, grad_norm=0.0, seed=3)
    for _ in range(3):
        batch = TRANSITIONS.sample(100, agent.generator)
        torch.testing.assert_close(TRANSITIONS.sample(100, method.generator), batch)
        agent.update(batch)
        method.update(batch)
    for network in ("policy", "critic"):
        found, expected = getattr(method.agent, network), getattr(agent, network)
        for p, q in zip(found.parameters(), expected.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_critics_trained_first_learn_only_the_reward(batch):
    method = make("Diffusion-QL")
    agent, before = method.agent, [p.clone() for p in method.policy.parameters()]
    q1, q2 = agent.critic(batch.state, batch.action)
    loss = (q1 - batch.reward).square().mean() + (q2 - batch.reward).square().mean()
    expected = torch.autograd.grad(loss, list(agent.critic.parameters()))
    method.critic_update(batch)
    for p, gradient in zip(agent.critic.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient)
    assert all(torch.equal(p, q) for p, q in zip(before, method.policy.parameters()))
    critic = [p.clone() for p in make("BC-Diffusion").agent.critic.parameters()]
    clone = make("BC-Diffusion")
    clone.critic_update(batch)  # it has no critics to train
    assert all(torch.equal(p, q) for p, q in zip(critic, clone.agent.critic.parameters()))


@pytest.mark.parametrize("name", ["BEAR-MMD", "Diffusion-QL"])
def test_rates_fall_to_0_by_half_a_cosine(name):
    method, rates = make(name), []
    first = [optimizer.param_groups[0]["lr"] for optimizer in method.optimizers]

    def watch(done):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in method.optimizers])

    train(method, TRANSITIONS, 4, decay=True, critic_first=2, watch=watch)
    expected = [[0.5 * (1 + math.cos(math.pi * i / 4)) * r for r in first] for i in range(4)]
    assert np.allclose(rates, expected)


@pytest.mark.parametrize("name", [name for name in METHODS if "Diffusion" not in name])
def test_each_loss_moves_only_its_own_network(name, batch):
    method = make(name)
    method.update(batch)  # an actor's step tells the multiplier how far it is off
    modules = {step: module for step, (module, _, _) in method.losses().items()}
    for step in modules:
        before = {other: [p.clone() for p in m.parameters()] for other, m in modules.items()}
        method.steps[step](batch)
        for other, module in modules.items():
            same = all(torch.equal(p, q) for p, q in zip(before[other], module.parameters()))
            assert same == (other != step), f"{step} and {other}"


def test_the_gaussians_loss_is_its_negative_log_likelihood(batch):
    method = make("BC-MLE")
    mean, log_std = method.actor(batch.state).split(2, dim=1)
    expected = 0.5 * ((batch.action - mean) / log_std.exp()) ** 2 + log_std
    expected = (expected + 0.5 * math.log(2 * math.pi)).sum(dim=1).mean()
    torch.testing.assert_close(method.actor_loss(batch), expected)


def test_the_auto_encoders_loss_is_error_and_half_divergence(batch):
    method = make("BC-CVAE")
    method.generator.manual_seed(1)
    found = method.cvae_loss(batch)
    x = torch.cat([batch.state, batch.action], dim=1)
    mean, log_std = method.encoder(x).split(4, dim=1)
    noise = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
    z = torch.cat([batch.state, mean + log_std.exp() * noise], dim=1)
    error = (torch.tanh(method.decoder(z)) - batch.action).square().mean()
    kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(found, error + 0.5 * kl)


def test_bcq_moves_actions_by_at_most_a_twentieth():
    method = make("BCQ")
    with torch.no_grad():
        method.perturbation[-1].bias += 10.0  # its tanh is 1
    method.generator.manual_seed(1)
    moved = method.sample(50)
    method.generator.manual_seed(1)
    with torch.no_grad():
        plain = super(type(method), method).propose(torch.zeros(50, 2))
    torch.testing.assert_close(moved, plain + 0.05)


def test_the_laplacian_discrepancy_is_as_defined():
    x, y = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))

    def mean_k(a, b):
        return np.mean([math.exp(-float((p - q).abs().sum()) / 40) for p in a for q in b])

    squared = [mean_k(a, a) + mean_k(b, b) - 2 * mean_k(a, b) + 1e-6 for a, b in zip(x, y)]
    expected = torch.tensor([math.sqrt(value) for value in squared])
    torch.testing.assert_close(laplacian_mmd(x, y), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("excess, rises", [(0.1, True), (-0.04, False)])
def test_bears_multiplier_rises_with_the_discrepancy(excess, rises):
    method = make("BEAR-MMD")
    before = method.multiplier.log_lambda.item()
    method.excess = excess
    method.steps["multiplier"](None)
    moved = method.multiplier.log_lambda.item() - before
    assert (moved > 0) == rises
    assert abs(moved) == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is its rate


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_alone_decides_the_policy(name):
    drawn = []
    for other in (0, 1):
        torch.manual_seed(other)
        method = make(name, seed=7)
        train(method, TRANSITIONS, 2)
        drawn.append(method.sample(10))
    assert torch.equal(*drawn) and drawn[0].isfinite().all()
