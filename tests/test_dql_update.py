"""dql.py's update: against the released code (the oracle), the paper's formulas, what it learns.

Everything is tested twice: plain, and as kernels/eager.py makes it.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_agents import (
    CHAINS,
    LOSS_ERROR,
    NOISE_ERROR,
    NORM_ERROR,
    ORACLE_NETWORKS,
    UPDATE_ERROR,
    error,
    made_agent,
    oracle_agent,
    oracle_batch,
    random_batch,
    rows_of,
    small_agent,
    vector,
)

from dql import Batch, DiffusionBC, DiffusionQL, Transitions, UpdateNoise

pytestmark = pytest.mark.usefixtures("plain_and_quick")


# ---- Against the released code -------------------------------------------------------------------


def test_critic_loss_and_target(oracle, monkeypatch):
    agent = oracle_agent(oracle)
    # The oracle's target is of a given next action: the averaged policy proposes that one.
    propose = lambda state, x_T, noises: oracle["in/next_action"]  # noqa: E731
    monkeypatch.setattr(agent.policy_ema, "sample", propose)
    targets, mse_loss = [], F.mse_loss
    monkeypatch.setattr(F, "mse_loss", lambda q, y: targets.append(y) or mse_loss(q, y))
    metrics = agent.update(oracle_batch(oracle))
    assert error(metrics["critic_loss"], oracle["out/critic_loss"]) < LOSS_ERROR
    assert error(targets[0], oracle["out/target_q"]) < NOISE_ERROR and targets[1] is targets[0]


@pytest.mark.parametrize("head, coin", [(1, 0.7), (2, 0.3)])
def test_q_loss_for_both_sides_of_the_coin(oracle, head, coin):
    chain, _ = CHAINS["vp"]
    agent = oracle_agent(oracle, critic_lr=0.0)  # the oracle's q loss is not of updated critics
    noise = agent.draw_noise(64)
    noise.actor_x_T, noise.actor_noises = oracle[f"in/{chain}/xT"], oracle[f"in/{chain}/eps"]
    noise.coin = coin
    metrics = agent.update(oracle_batch(oracle), noise)
    assert error(metrics["q_loss"], oracle[f"out/q_loss_head{head}"]) < LOSS_ERROR


def test_one_whole_update(oracle):
    # update/config; the rest are the defaults
    agent = oracle_agent(oracle, eta=0.5, grad_norm=2.0, ema_start=0)
    given = oracle.named("update/in/step0/")
    order = ("tgt_xT", "tgt_eps", "t", "bc_eps", "act_xT", "act_eps", "coin")
    noise = UpdateNoise(*(given[name] for name in order))
    metrics = agent.update([given[name] for name in Batch._fields], noise)

    for name in ("bc_loss", "q_loss", "actor_loss", "critic_loss"):
        expected = oracle[f"update/out/{'ql_loss' if name == 'q_loss' else name}"]
        assert error(metrics[name], expected) < LOSS_ERROR, name
    for name in ("actor", "critic"):
        expected = oracle[f"update/out/log/{name.title()} Grad Norm"]
        assert error(metrics[f"{name}_grad_norm"], expected) < NORM_ERROR * expected, name
    for name, theirs in ORACLE_NETWORKS.items():
        network, before = getattr(agent, name), oracle.named(f"params/{theirs}/")
        difference = update = 0
        for key, after in oracle.named(f"update/after1/{theirs}/").items():
            ours = rows_of(network.get_parameter(key).detach(), after)
            difference += (ours - after).square().sum()
            update += (after - rows_of(before[key], after)).square().sum()
        assert (difference / update).sqrt() < UPDATE_ERROR, name


# ---- Against the paper's formulas ----------------------------------------------------------------


def test_max_q_target_is_the_smaller_of_two_best_of_ten():
    """Each critic's best of ten next actions; then the smaller of the two."""
    agent, batch = small_agent(max_q_backup=True, critic_lr=0.0, discount=0.9), random_batch(6)
    # Steep in the action, so that the critics disagree on which is best.
    for target in (agent.critic_target.q1_model, agent.critic_target.q2_model):
        target[0].weight.data[:, 3:] *= 10
    noise = agent.draw_noise(6)
    assert noise.target_x_T.shape == (60, 2) and noise.target_noises.shape == (5, 60, 2)
    targets, gap = [], []
    for b in range(6):
        state, values = batch.next_state[b : b + 1], []
        for j in range(10 * b, 10 * b + 10):
            given = dict(x_T=noise.target_x_T[[j]], noises=noise.target_noises[:, [j]])
            action = agent.policy_ema.sample(state, **given)
            values.append([q.item() for q in agent.critic_target(state, action)])
        best = min(max(q1 for q1, _ in values), max(q2 for _, q2 in values))
        gap.append(best - max(map(min, values)))
        targets.append(batch.reward[b].item() + 0.9 * batch.not_done[b].item() * best)
    assert max(gap) > 1e-2  # min of max and max of min are told apart
    target = torch.tensor(targets)[:, None]
    q1, q2 = agent.critic(batch.state, batch.action)
    expected = (F.mse_loss(q1, target) + F.mse_loss(q2, target)).detach()
    found = agent.update(batch, noise)["critic_loss"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("coin", [0.9, 0.1])
def test_the_coin_says_which_critic_is_climbed(coin):
    """The other one normalises."""
    agent, batch = small_agent(critic_lr=0.0), random_batch()
    noise = agent.draw_noise(32)
    noise.coin = coin
    action = agent.policy.sample(batch.state, x_T=noise.actor_x_T, noises=noise.actor_noises)
    q1, q2 = agent.critic(batch.state, action)
    climbed, scale = (q1, q2) if coin > 0.5 else (q2, q1)
    expected = -climbed.mean() / scale.abs().mean()
    torch.testing.assert_close(agent.update(batch, noise)["q_loss"], expected.detach())


def test_the_normalising_critic_passes_no_gradient():
    """The actor's gradient is that of -climbed/constant: nothing comes through mean|Q|."""
    agent, batch = small_agent(critic_lr=0.0, eta=2.0), random_batch()
    noise = agent.draw_noise(32)
    noise.coin = 0.9
    action = agent.policy.sample(batch.state, x_T=noise.actor_x_T, noises=noise.actor_noises)
    q1, q2 = agent.critic(batch.state, action)
    bc = agent.policy.bc_loss(batch.state, batch.action, t=noise.t, noise=noise.bc_noise)
    loss = bc - 2.0 * q1.mean() / q2.detach().abs().mean()
    gradients = torch.autograd.grad(loss, list(agent.policy.parameters()))
    expected = torch.cat([g.reshape(-1) for g in gradients])
    agent.update(batch, noise)
    found = agent.state_dict()["policy_optimizer.exp_avg"] / 0.1  # Adam's first moment
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share, clipped", [(0.5, True), (2.0, False), (0.0, False)])
def test_gradients_are_clipped_only_above_the_norm(share, clipped):
    """share: of the gradient's own norm; 0 turns clipping off."""
    batch = random_batch()
    free = small_agent()
    noise = free.draw_noise(32)
    norms = free.update(batch, noise)
    for name, optimizer in (("critic", "critic_optimizer"), ("actor", "policy_optimizer")):
        norm = norms[f"{name}_grad_norm"].item()
        agent = small_agent(grad_norm=share * norm, critic_lr=3e-4)
        reported = agent.update(batch, noise)[f"{name}_grad_norm"].item()
        assert reported == pytest.approx(norm, rel=1e-5)  # the norm before clipping
        # Adam's first moment is 0.1 × the gradient it was given.
        moment = agent.state_dict()[f"{optimizer}.exp_avg"].norm().item()
        assert moment == pytest.approx(0.1 * norm * (share if clipped else 1.0), rel=1e-4)


def test_averages_follow_their_schedules():
    agent = small_agent(ema_start=4, ema_every=3, ema_decay=0.9, tau=0.2, lr=1e-2, critic_lr=1e-2)
    batch = random_batch()
    for step in range(11):
        assert agent.step == step
        ema, target = vector(agent.policy_ema), vector(agent.critic_target)
        agent.update(batch)
        if step in (6, 9):
            ema = 0.9 * ema + 0.1 * vector(agent.policy)
            torch.testing.assert_close(vector(agent.policy_ema), ema)
        else:
            assert torch.equal(vector(agent.policy_ema), ema)
        target = 0.8 * target + 0.2 * vector(agent.critic)
        torch.testing.assert_close(vector(agent.critic_target), target)


def test_targets_are_of_averaged_policy_and_target_critics():
    batch = random_batch()
    agent = small_agent(critic_lr=0.0)
    noise = agent.draw_noise(32)
    losses = {}
    for name in ("policy_ema", "critic_target", "none"):
        other = small_agent(critic_lr=0.0)
        if name != "none":
            for p in getattr(other, name).parameters():
                p.data.add_(0.05)
        losses[name] = other.update(batch, noise)["critic_loss"].item()
    assert len(set(losses.values())) == 3
    agent.policy.load_state_dict({k: v + 0.05 for k, v in agent.policy.state_dict().items()})
    assert agent.update(batch, noise)["critic_loss"].item() == losses["none"]


def test_behaviour_cloning_touches_no_critic(monkeypatch):
    agent, batch = small_agent(algo="bc"), random_batch()

    def called(*args):
        raise AssertionError("a critic was used")

    critics = (agent.critic, agent.critic_target)
    for critic in critics:
        monkeypatch.setattr(critic, "forward", called)
    before, policy = [vector(critic) for critic in critics], vector(agent.policy)
    metrics = agent.update(batch)
    assert metrics.keys() == {"bc_loss", "actor_grad_norm"}
    assert all(torch.equal(vector(critic), old) for critic, old in zip(critics, before))
    assert not torch.equal(vector(agent.policy), policy)
    assert agent.act(np.zeros((4, 3), dtype=np.float32)).shape == (4, 2)


# ---- What is learnt ------------------------------------------------------------------------------


def two_modes(n=2000, seed=0):
    """A bandit: actions ±0.8 equally often, reward 1 on the left and 0 on the right, one step."""
    rng = np.random.default_rng(seed)
    side = rng.choice([-1.0, 1.0], size=(n, 1))
    action = (0.8 * side + 0.05 * rng.normal(size=(n, 1))).astype(np.float32)
    state = np.zeros((n, 1), dtype=np.float32)
    reward = (side[:, 0] < 0).astype(np.float32)
    return Transitions(state, action, state, reward, np.ones(n, dtype=bool))


def trained_on_two_modes(n_updates, lr, make, **kwargs):
    """-> 1000 actions of an agent trained for a few seconds, its rates decaying to 0."""
    data, sampler = two_modes(), torch.Generator().manual_seed(0)
    agent = made_agent(make(1, 1, hidden_dim=32, lr=lr, critic_lr=lr, **kwargs))
    for step in range(n_updates):
        for optimizer in (agent.policy_optimizer, agent.critic_optimizer):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / n_updates))
        agent.update(data.sample(64, sampler))
    torch.manual_seed(0)
    with torch.no_grad():
        return agent.policy.sample(torch.zeros(1000, 1))


def test_the_learned_q_moves_the_policy_to_the_better_mode():
    action = trained_on_two_modes(120, 1e-2, DiffusionQL, eta=2.0)
    assert (action < 0).float().mean() > 0.9


def test_behaviour_cloning_keeps_both_modes():
    # A perfect denoiser puts 97 % within 0.2 of a mode in ten steps, 70 % in five.
    action = trained_on_two_modes(700, 2e-2, DiffusionBC, n_timesteps=10)
    assert 0.4 < (action < 0).float().mean() < 0.6
    assert ((action.abs() - 0.8).abs() < 0.2).float().mean() > 0.75
