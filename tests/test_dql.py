"""dql.py against the authors' released code (the oracle), against literal readings of the paper, and against itself.

Bounds against the oracle are twice the released float32 code's own error against the same float64 numbers.
"""

import copy
import io
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import dql
from dql import Batch, DiffusionPolicy, DiffusionQL, Mish, TwinCritic, UpdateNoise, beta_schedule, load_released_checkpoint

NOISE_ERROR, CHAIN_ERROR, LOSS_ERROR, UPDATE_ERROR = 2 * 1.7e-6, 2 * 9e-6, 2 * 1.4e-6, 2 * 1e-4
NORM_ERROR = 2e-6  # relative
CHAINS = {"vp": ("chain_vp_T5_a1.0", 5), "cosine": ("chain_cosine_T10_a1.0", 10)}


def error(ours, expected) -> float:
    assert ours.shape == expected.shape
    return (ours.detach().double() - expected).abs().max().item()


def loaded(module, parameters):
    module.load_state_dict(parameters)
    return module


def oracle_policy(oracle, **kwargs):
    return loaded(DiffusionPolicy(29, 8, **kwargs), oracle.named("params/actor/"))


def oracle_agent(oracle, **kwargs):
    agent = DiffusionQL(29, 8, **kwargs)
    for name, net in (("policy", "actor"), ("policy_ema", "ema"), ("critic", "critic"), ("critic_target", "target")):
        getattr(agent, name).load_state_dict(oracle.named(f"params/{net}/"))
    return agent


def small_agent(**kwargs):
    """A quick agent whose averages and targets differ from what they follow."""
    agent = DiffusionQL(3, 2, **{"hidden_dim": 16, "grad_norm": 0.0, **kwargs})
    torch.manual_seed(5)
    for module in (agent.policy_ema, agent.critic_target):
        for p in module.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return agent


def random_batch(n=32, state_dim=3, action_dim=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    state, action, next_state, reward = (torch.randn(n, d, generator=g) for d in (state_dim, action_dim, state_dim, 1))
    return Batch(state, action.clamp(-1, 1), next_state, reward, (torch.rand(n, 1, generator=g) > 0.2).float())


def vector(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


# --- against the released code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [5, 10])
@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
def test_schedule_is_the_released_one(oracle, schedule, T):
    expected = oracle.named(f"schedule/{schedule}/T{T}/")
    betas = beta_schedule(schedule, T)
    assert betas.dtype == torch.float32 and torch.equal(betas, expected["betas"].float())
    policy = DiffusionPolicy(3, 2, n_timesteps=T, schedule=schedule)
    sigma = (0.5 * expected["posterior_log_variance_clipped"]).exp()
    for ours, theirs in (
        (policy.x0_from_x, expected["sqrt_recip_alphas_cumprod"]),
        (policy.x0_from_eps, expected["sqrt_recipm1_alphas_cumprod"]),
        (policy.mean_from_x0, expected["posterior_mean_coef1"]),
        (policy.mean_from_x, expected["posterior_mean_coef2"]),
        (policy.sigma, sigma),
    ):
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs, rtol=1e-12, atol=1e-15)
    alpha_bar = expected["alphas_cumprod"]
    assert torch.equal(policy.sqrt_alpha_bar, alpha_bar.sqrt().float())
    assert torch.equal(policy.sqrt_one_minus_alpha_bar, (1 - alpha_bar).sqrt().float())


def test_time_embedding_and_its_mlp(oracle):
    policy = oracle_policy(oracle)
    assert error(policy.time_mlp(torch.arange(100)), oracle["out/time_mlp"]) < NOISE_ERROR


def test_predicted_noise(oracle):
    epsilon = oracle_policy(oracle).predict_noise(oracle["in/x"], oracle["in/t_T5"], oracle["in/state"])
    assert error(epsilon, oracle["out/mlp_out"]) < NOISE_ERROR


@pytest.mark.parametrize("schedule", CHAINS)
def test_reverse_chain(oracle, schedule):
    chain, T = CHAINS[schedule]
    policy = oracle_policy(oracle, n_timesteps=T, schedule=schedule)
    action = policy.sample(oracle["in/state"], x_T=oracle[f"in/{chain}/xT"], noises=oracle[f"in/{chain}/eps"])
    assert error(action, oracle[f"out/{chain}/action"]) < CHAIN_ERROR


@pytest.mark.parametrize("schedule", CHAINS)
def test_float64_modules_are_limited_only_by_their_float32_frequencies(oracle, schedule):
    chain, T = CHAINS[schedule]
    policy = oracle_policy(oracle, n_timesteps=T, schedule=schedule).double()
    state = oracle["in/state"].double()
    if T == 5:
        epsilon = policy.predict_noise(oracle["in/x"].double(), oracle["in/t_T5"], state)
        assert error(epsilon, oracle["out/mlp_out"]) < 5e-8
    x_T, noises = oracle[f"in/{chain}/xT"].double(), oracle[f"in/{chain}/eps"].double()
    assert error(policy.sample(state, x_T=x_T, noises=noises), oracle[f"out/{chain}/action"]) < 5e-8


def test_float64_critics(oracle):
    critic = loaded(TwinCritic(29, 8), oracle.named("params/critic/")).double()
    q1, q2 = critic(oracle["in/state"].double(), oracle["in/action"].double())
    assert error(q1, oracle["out/q1"]) < 1e-14 and error(q2, oracle["out/q2"]) < 1e-14


def test_behaviour_cloning_loss_and_its_gradient(oracle):
    policy = oracle_policy(oracle)
    loss = policy.bc_loss(oracle["in/state"], oracle["in/action"], t=oracle["in/t_T5"], noise=oracle["in/bc_eps"])
    assert error(loss, oracle["out/bc_l2_eps"]) < LOSS_ERROR
    loss.backward()
    for name, expected in oracle.named("out/bc_grad/").items():
        ours = rows_of(policy.get_parameter(name).grad, expected).double()
        assert (ours - expected).norm() < 2e-6 * expected.norm(), name


def rows_of(ours, expected):
    """Those rows of a tensor that the oracle has: the cut keeps every 16th of the large ones."""
    return ours[:: len(ours) // len(expected)] if ours.ndim else ours


def test_twin_critics(oracle):
    critic = loaded(TwinCritic(29, 8), oracle.named("params/critic/"))
    q1, q2 = critic(oracle["in/state"], oracle["in/action"])
    assert error(q1, oracle["out/q1"]) < NOISE_ERROR
    assert error(q2, oracle["out/q2"]) < NOISE_ERROR
    assert error(torch.min(q1, q2), oracle["out/qmin"]) < NOISE_ERROR


def test_critic_loss_and_target(oracle, monkeypatch):
    agent = oracle_agent(oracle)
    # The oracle's target is valued at a given next action, so the averaged policy has to propose that one.
    monkeypatch.setattr(agent.policy_ema, "sample", lambda state, x_T, noises: oracle["in/next_action"])
    batch = Batch(*(oracle[f"in/{name}"] for name in Batch._fields))
    assert error(agent._target(batch, agent.draw_noise(64)), oracle["out/target_q"]) < NOISE_ERROR
    assert error(agent.update(batch)["critic_loss"], oracle["out/critic_loss"]) < LOSS_ERROR


@pytest.mark.parametrize("head, coin", [(1, 0.7), (2, 0.3)])
def test_q_loss_for_both_sides_of_the_coin(oracle, head, coin):
    chain, _ = CHAINS["vp"]
    agent = oracle_agent(oracle, critic_lr=0.0)  # a critic that stays, as the oracle's q loss is not of an updated one
    noise = agent.draw_noise(64)
    noise.actor_x_T, noise.actor_noises = oracle[f"in/{chain}/xT"], oracle[f"in/{chain}/eps"]
    noise.coin = torch.tensor(coin)
    metrics = agent.update(Batch(*(oracle[f"in/{name}"] for name in Batch._fields)), noise)
    assert error(metrics["q_loss"], oracle[f"out/q_loss_head{head}"]) < LOSS_ERROR


def test_one_whole_update(oracle):
    agent = oracle_agent(oracle, eta=0.5, grad_norm=2.0, ema_start=0)  # update/config; the rest are the defaults
    given = oracle.named("update/in/step0/")
    order = ("tgt_xT", "tgt_eps", "t", "bc_eps", "act_xT", "act_eps", "coin")
    noise = UpdateNoise(*(given[name] for name in order))
    metrics = agent.update([given[name] for name in Batch._fields], noise)

    for name in ("bc_loss", "q_loss", "actor_loss", "critic_loss"):
        expected = oracle[f"update/out/{'ql_loss' if name == 'q_loss' else name}"]
        assert error(metrics[name], expected) < LOSS_ERROR, name
    for ours, theirs in {"actor_grad_norm": "Actor Grad Norm", "critic_grad_norm": "Critic Grad Norm"}.items():
        expected = oracle[f"update/out/log/{theirs}"]
        assert error(metrics[ours], expected) < NORM_ERROR * expected, ours
    for name, net in (("policy", "actor"), ("policy_ema", "ema"), ("critic", "critic"), ("critic_target", "target")):
        before, expected = oracle.named(f"params/{net}/"), oracle.named(f"update/after1/{net}/")
        difference = update = 0
        for key, after in expected.items():
            difference += (rows_of(getattr(agent, name).get_parameter(key).detach(), after) - after).square().sum()
            update += (after - rows_of(before[key], after)).square().sum()
        assert (difference / update).sqrt() < UPDATE_ERROR, name


# --- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("sqrt", 5), ("vp", 0), ("cosine", -1)])
def test_bad_schedules_are_refused_in_one_line(arguments):
    name, T = arguments
    for call in (lambda: beta_schedule(name, T), lambda: DiffusionPolicy(3, 2, schedule=name, n_timesteps=T)):
        with pytest.raises(ValueError) as refusal:
            call()
        message = str(refusal.value)
        assert "\n" not in message and (repr(name) in message or str(T) in message)


def test_one_step_schedules_are_finite():
    for schedule in ("vp", "linear", "cosine"):
        action = DiffusionPolicy(3, 2, n_timesteps=1, schedule=schedule).sample(torch.zeros(4, 3))
        assert action.shape == (4, 2) and action.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 5e-14)])
def test_mish_and_its_gradient_over_the_whole_range(dtype, tolerance):
    x = torch.linspace(-100, 100, 20_001, dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = Mish()(x.clone()), F.mish(exact)  # a clone, since it is overwritten
    scale = expected.detach().abs().clamp(min=1)
    assert ((y.detach() - expected).abs() / scale).max() < tolerance
    weight = torch.linspace(0.5, 2, len(x), dtype=torch.float64)  # so that the incoming gradient matters
    (gradient,) = torch.autograd.grad((y * weight.to(dtype)).sum(), x)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), exact)
    assert error(gradient, expected_gradient) < 2 * tolerance
    with torch.no_grad():
        taken = x.clone()
        without_graph = Mish()(taken)
        assert without_graph.data_ptr() == taken.data_ptr()  # the result takes the input's place, as the class says
    assert ((without_graph - expected).abs() / scale).max() < tolerance


def test_an_agent_refuses_a_deep_copy_whose_training_would_do_nothing():
    with pytest.raises(TypeError, match="load_state_dict"):
        copy.deepcopy(DiffusionQL(3, 2, hidden_dim=16))


def test_samples_differentiate_through_the_whole_chain_and_both_clamps():
    torch.manual_seed(0)
    policy = DiffusionPolicy(3, 2, hidden_dim=16, max_action=0.7).double()
    state, x_T, noises = (torch.randn(*shape, dtype=torch.float64) for shape in ((64, 3), (64, 2), (5, 64, 2)))
    action = policy.sample(state, x_T=x_T, noises=noises)
    clipped = (action.abs() == 0.7).double().mean()
    assert 0.1 < clipped < 0.9  # both sides of the clamps are there to be got wrong
    weight = torch.randn_like(action)
    gradients = torch.autograd.grad((action * weight).sum(), list(policy.parameters()))
    gradient = torch.cat([g.reshape(-1) for g in gradients])

    parameters = [p.detach().clone() for p in policy.parameters()]
    direction, h, values = gradient / gradient.norm(), 1e-7, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, p0, d in zip(policy.parameters(), parameters, direction.split([p.numel() for p in parameters])):
                p.copy_(p0 + sign * h * d.view_as(p))
            values.append((policy.sample(state, x_T=x_T, noises=noises) * weight).sum())
    slope = (values[0] - values[1]) / (2 * h)
    assert abs(slope - gradient.norm()) < 1e-5 * gradient.norm()


def test_no_gradient_passes_where_the_last_clamp_is_active():
    torch.manual_seed(0)
    policy = DiffusionPolicy(3, 2, hidden_dim=16, max_action=0.7)
    x_T = torch.randn(64, 2, requires_grad=True)
    action = policy.sample(torch.randn(64, 3), x_T=x_T)
    (gradient,) = torch.autograd.grad(action[(action.abs() == 0.7).all(dim=1)].sum(), x_T)
    assert gradient.abs().max() == 0
    assert torch.autograd.grad(policy.sample(torch.randn(64, 3), x_T=x_T).sum(), x_T)[0].abs().max() > 0


def test_several_chains_per_state_equal_chains_of_repeated_states():
    torch.manual_seed(0)
    policy, critic = DiffusionPolicy(3, 2, hidden_dim=16), TwinCritic(3, 2, hidden_dim=16)
    state, x_T, noises = torch.randn(4, 3), torch.randn(28, 2), torch.randn(5, 28, 2)
    repeated = state.repeat_interleave(7, dim=0)
    actions = policy.sample(state, x_T=x_T, noises=noises)
    torch.testing.assert_close(actions, policy.sample(repeated, x_T=x_T, noises=noises), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(critic(state, actions), critic(repeated, actions), rtol=1e-5, atol=1e-6)


def test_the_last_noise_is_ignored_and_the_others_are_not():
    torch.manual_seed(0)
    policy = DiffusionPolicy(3, 2, hidden_dim=16)
    state, x_T, noises = torch.randn(4, 3), 0.1 * torch.randn(4, 2), 0.1 * torch.randn(5, 4, 2)
    actions = policy.sample(state, x_T=x_T, noises=noises)
    for k in range(5):
        other = noises.clone()
        other[k] = math.nan
        assert torch.equal(policy.sample(state, x_T=x_T, noises=other), actions) == (k == 4)


# --- the update ------------------------------------------------------------------------------------------------------


def test_max_q_target_is_the_smaller_of_the_best_of_ten_for_each_critic():
    agent, batch = small_agent(max_q_backup=True, critic_lr=0.0, discount=0.9), random_batch(6)
    for target in (agent.critic_target.q1_model, agent.critic_target.q2_model):
        target[0].weight.data[:, 3:] *= 10  # steep in the action, so that the critics disagree on which is best
    noise = agent.draw_noise(6)
    assert noise.target_x_T.shape == (60, 2) and noise.target_noises.shape == (5, 60, 2)
    targets, gap = [], []
    for b in range(6):
        best1 = best2 = best = -math.inf
        for j in range(10):
            row = slice(10 * b + j, 10 * b + j + 1)
            state = batch.next_state[b : b + 1]
            action = agent.policy_ema.sample(state, x_T=noise.target_x_T[row], noises=noise.target_noises[:, row])
            q1, q2 = agent.critic_target(state, action)
            best1, best2, best = max(best1, q1.item()), max(best2, q2.item()), max(best, min(q1.item(), q2.item()))
        gap.append(min(best1, best2) - best)
        targets.append(batch.reward[b].item() + 0.9 * batch.not_done[b].item() * min(best1, best2))
    assert max(gap) > 1e-2  # min of max and max of min are told apart
    target = torch.tensor(targets)[:, None]
    q1, q2 = agent.critic(batch.state, batch.action)
    expected = F.mse_loss(q1, target) + F.mse_loss(q2, target)
    torch.testing.assert_close(agent.update(batch, noise)["critic_loss"], expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_coin_says_which_critic_is_climbed_and_which_normalises():
    for coin, signs in ((0.9, (-1.0, 1.0)), (0.1, (1.0, -1.0))):
        agent, batch = small_agent(critic_lr=0.0), random_batch()
        noise = agent.draw_noise(32)
        noise.coin = torch.tensor(coin)
        action = agent.policy.sample(batch.state, x_T=noise.actor_x_T, noises=noise.actor_noises)
        q1, q2 = agent.critic(batch.state, action)
        climbed, scale = (q1, q2) if coin > 0.5 else (q2, q1)
        expected = -climbed.mean() / scale.abs().mean()
        torch.testing.assert_close(agent.update(batch, noise)["q_loss"], expected.detach())


def test_the_normalising_critic_passes_no_gradient():
    """The actor's gradient is that of -climbed/constant: nothing comes through mean|Q|."""
    agent, batch = small_agent(critic_lr=0.0, eta=2.0), random_batch()
    noise = agent.draw_noise(32)
    noise.coin = torch.tensor(0.9)
    action = agent.policy.sample(batch.state, x_T=noise.actor_x_T, noises=noise.actor_noises)
    q1, q2 = agent.critic(batch.state, action)
    bc = agent.policy.bc_loss(batch.state, batch.action, t=noise.t, noise=noise.bc_noise)
    loss = bc - 2.0 * q1.mean() / q2.detach().abs().mean()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(agent.policy.parameters()))])
    agent.update(batch, noise)
    torch.testing.assert_close(agent.state_dict()["policy_optimizer.exp_avg"] / 0.1, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share, clipped", [(0.5, True), (2.0, False), (0.0, False)])
def test_gradients_are_clipped_only_above_the_norm(share, clipped):
    """share: of the gradient's own norm; 0 turns clipping off."""
    batch = random_batch()
    free = small_agent()
    noise = free.draw_noise(32)
    norms = free.update(batch, noise)
    for name in ("critic", "actor"):
        norm = norms[f"{name}_grad_norm"].item()
        agent = small_agent(grad_norm=share * norm, critic_lr=3e-4)
        reported = agent.update(batch, noise)[f"{name}_grad_norm"].item()
        assert reported == pytest.approx(norm, rel=1e-5)  # the norm before clipping
        # Adam's first moment is 0.1 × the gradient it was given.
        moment = agent.state_dict()[f"{'policy' if name == 'actor' else name}_optimizer.exp_avg"]
        assert moment.norm().item() == pytest.approx(0.1 * norm * (share if clipped else 1.0), rel=1e-4)


def test_averages_follow_their_schedules():
    agent = small_agent(ema_start=4, ema_every=3, ema_decay=0.9, tau=0.2, lr=1e-2, critic_lr=1e-2)
    batch = random_batch()
    for step in range(11):
        assert agent.step.item() == step
        ema, target = vector(agent.policy_ema), vector(agent.critic_target)
        agent.update(batch)
        if step in (6, 9):
            ema = 0.9 * ema + 0.1 * vector(agent.policy)
            torch.testing.assert_close(vector(agent.policy_ema), ema)
        else:
            assert torch.equal(vector(agent.policy_ema), ema)
        torch.testing.assert_close(vector(agent.critic_target), 0.8 * target + 0.2 * vector(agent.critic))


def test_target_actions_come_from_the_averaged_policy_and_are_valued_by_the_target_critics():
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


@pytest.mark.parametrize("every, steps", [(1000, 30), (50_000, 1000)], ids=["per epoch", "per evaluation"])
def test_learning_rates_decay_by_a_cosine(every, steps):
    agent, batch = small_agent(lr=1e-2, critic_lr=2e-2, lr_decay_every=every, lr_decay_steps=steps), random_batch()
    for step in (0, every - 1, every, 7 * every + 3, steps * every, 2 * steps * every):
        agent.step.fill_(step)
        agent.update(batch)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, (step // every) / steps)))
        for optimizer, lr in ((agent.policy_optimizer, 1e-2), (agent.critic_optimizer, 2e-2)):
            assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(lr * share, rel=1e-5, abs=1e-9)
    before = vector(agent.policy)
    agent.update(batch)
    assert torch.equal(vector(agent.policy), before)  # the rate has reached 0 and stays there


def test_rates_of_an_agent_on_a_gpu_change_where_they_are():
    """There a captured update reads them."""
    agent, rates = small_agent(lr=0.1, critic_lr=0.2, lr_decay_every=1, lr_decay_steps=2), (torch.tensor(0.1), torch.tensor(0.2))
    for optimizer, rate in zip((agent.policy_optimizer, agent.critic_optimizer), rates):
        optimizer.param_groups[0]["lr"] = rate
    agent.device = SimpleNamespace(type="cuda")
    agent.step.fill_(1)
    agent._decay_rates()
    assert [float(rate) for rate in rates] == pytest.approx([0.05, 0.1])


def test_behaviour_cloning_touches_no_critic(monkeypatch):
    agent, batch = small_agent(algo="bc"), random_batch()

    def called(*args):
        raise AssertionError("a critic was used")

    for critic in (agent.critic, agent.critic_target):
        monkeypatch.setattr(critic, "forward", called)
    critics, policy = (vector(agent.critic), vector(agent.critic_target)), vector(agent.policy)
    metrics = agent.update(batch)
    assert not any("critic" in name for name in metrics) and metrics["actor_loss"] == metrics["bc_loss"]
    assert torch.equal(vector(agent.critic), critics[0]) and torch.equal(vector(agent.critic_target), critics[1])
    assert not torch.equal(vector(agent.policy), policy)
    assert agent.act(np.zeros((4, 3), dtype=np.float32)).shape == (4, 2)


def test_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="sarsa"):
        DiffusionQL(3, 2, algo="sarsa")


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kwargs", [{}, {"max_q_backup": True}, {"algo": "bc"}], ids=["ql", "max_q", "bc"])
def test_an_update_never_asks_for_a_value(kwargs):
    """On a GPU each of these operations would wait for the device. The optimizers' steps are included."""
    agent, batch = small_agent(grad_norm=1.0, **kwargs), random_batch()
    agent.update(batch)
    with _Operations() as operations:
        agent.update(batch)
    assert "addmm" in operations.seen  # the mode does see what runs
    assert not operations.seen & {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"}


def test_the_weights_of_every_network_stay_views_of_its_vector():
    agent = small_agent()
    agent.load_state_dict(small_agent(seed=3).state_dict())
    agent.update(random_batch())
    for name in ("policy", "policy_ema", "critic", "critic_target"):
        assert torch.equal(vector(getattr(agent, name)), getattr(agent, f"{name}_vector").detach()), name


def test_averaged_nets_start_equal_and_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    a, b = DiffusionQL(3, 2, hidden_dim=16, seed=1), DiffusionQL(3, 2, hidden_dim=16, seed=1)
    a.update(random_batch())
    a.act(np.zeros(3, dtype=np.float32))
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(vector(b.policy), vector(b.policy_ema))
    assert torch.equal(vector(b.critic), vector(b.critic_target))
    assert not torch.equal(vector(b.policy), vector(DiffusionQL(3, 2, hidden_dim=16, seed=2).policy))


# --- acting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ql", "bc"])
def test_actions_have_the_kind_and_shape_of_the_state(algo):
    agent = small_agent(algo=algo)
    numpys = np.zeros(3), np.zeros((5, 3), dtype=np.float32)
    for state in (*numpys, torch.zeros(3), torch.zeros(5, 3, dtype=torch.float64)):
        action = agent.act(state, n_candidates=4)
        assert type(action) is type(state) and tuple(action.shape) == (*state.shape[:-1], 2)
        assert str(action.dtype).endswith("float32") and abs(action).max() <= 1


def test_candidates_are_picked_by_softmax_of_the_smaller_target_q(monkeypatch):
    agent, n = small_agent(), 4
    candidates = torch.tensor([[-0.6, 0.0], [-0.2, 0.0], [0.2, 0.0], [0.6, 0.0]])
    monkeypatch.setattr(agent.policy, "sample", lambda state, x_T, noises: candidates.repeat(len(state), 1))
    monkeypatch.setattr(agent.critic_target, "forward", lambda state, action: (2 * action[:, :1], 1 - action[:, :1]))
    actions = agent.act(np.zeros((20_000, 3), dtype=np.float32), n_candidates=n)
    counts = np.array([(actions[:, 0] == a).sum() for a in candidates[:, 0].numpy()])
    q = torch.minimum(2 * candidates[:, 0], 1 - candidates[:, 0]).double().numpy()
    expected = 20_000 * np.exp(q) / np.exp(q).sum()
    assert counts.sum() == 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 16.27  # chi-square, 3 degrees of freedom, p = 0.001


def test_each_state_gets_one_of_its_own_candidates_of_the_current_policy():
    agent = small_agent()
    state = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    action = agent.act(state, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(6, 48, 2, generator=torch.Generator().manual_seed(1))
    own = agent.policy.sample(state, x_T=noise[0], noises=noise[1:]).detach().view(6, 8, 2)
    assert ((own - action[:, None]).abs().amax(dim=2).amin(dim=1) < 1e-5).all()


def test_a_generator_makes_acting_repeatable_and_leaves_the_agent_s_own_alone():
    agent, state = small_agent(), np.ones((5, 3), dtype=np.float32)
    before = agent.generator.get_state()
    first, second = (agent.act(state, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert np.array_equal(first, second) and torch.equal(agent.generator.get_state(), before)
    assert not np.array_equal(agent.act(state), agent.act(state))


@pytest.mark.parametrize("kwargs", [{}, {"max_q_backup": True}])
def test_cutting_large_batches_for_the_cache_changes_nothing(monkeypatch, kwargs):
    batch, state, results = random_batch(), np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32), []
    for rows in (1, 30, 10**9):
        monkeypatch.setattr(dql, "CPU_ROWS", rows)
        agent = small_agent(**kwargs)
        action = agent.act(state, 7, generator=torch.Generator().manual_seed(0))
        results.append((action, agent.update(batch)["critic_loss"]))
    for action, loss in results[:-1]:
        np.testing.assert_allclose(action, results[-1][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, results[-1][1], rtol=1e-5, atol=1e-6)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ql", "bc"])
def test_a_restored_agent_continues_bit_for_bit(algo):
    kwargs = dict(algo=algo, max_q_backup=algo == "ql", ema_start=2, ema_every=2, lr_decay_every=2, lr_decay_steps=5)
    batch, through = random_batch(), small_agent(**kwargs)
    for _ in range(3):
        through.update(batch)
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    restored = small_agent(seed=9, **kwargs)
    restored.load_state_dict(torch.load(file))
    for _ in range(3):
        expected, metrics = through.update(batch), restored.update(batch)
    assert all(torch.equal(metrics[name], expected[name]) for name in expected)
    expected = through.state_dict()
    state = restored.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    observation = np.zeros(3, dtype=np.float32)
    assert np.array_equal(through.act(observation), restored.act(observation))


def test_restoring_does_not_tie_two_agents_together():
    first = small_agent()
    first.update(random_batch())
    second = small_agent(seed=9)
    second.load_state_dict(first.state_dict())
    before = {name: v.clone() for name, v in first.state_dict().items()}
    second.update(random_batch())
    assert all(torch.equal(v, before[name]) for name, v in first.state_dict().items())


def test_weights_alone_are_enough_to_act():
    first = small_agent()
    first.update(random_batch())
    second = small_agent(seed=9)
    networks = ("policy.", "policy_ema.", "critic.", "critic_target.")
    weights = {name: v for name, v in first.state_dict().items() if name.startswith(networks)}
    second.load_state_dict(weights, weights_only=True)
    state = np.ones(3, dtype=np.float32)
    actions = [agent.act(state, generator=torch.Generator().manual_seed(0)) for agent in (first, second)]
    assert np.array_equal(*actions)


def test_a_state_of_another_shape_or_with_a_name_missing_is_refused():
    state = small_agent().state_dict()
    with pytest.raises(RuntimeError):
        DiffusionQL(3, 2, hidden_dim=32).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"policy_optimizer.exp_avg is \(1,\)"):
        small_agent().load_state_dict(state | {"policy_optimizer.exp_avg": torch.zeros(1)})
    del state["critic.q1_model.0.bias"]
    with pytest.raises((KeyError, RuntimeError)):
        small_agent().load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# The authors' checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def save_as_released(folder, oracle, schedule="vp", T=5, id=3, **other):
    """The oracle's networks in files as the authors' code writes them: the schedule's buffers beside the model's parameters."""
    betas = beta_schedule(schedule, T)
    actor = {"betas": betas, "alphas_cumprod": torch.cumprod(1 - betas, 0)}
    actor |= {f"model.{name}": value for name, value in oracle.named("params/actor/").items()}
    torch.save(actor | other, folder / f"actor_{id}.pth")
    torch.save(oracle.named("params/critic/"), folder / f"critic_{id}.pth")


@pytest.mark.parametrize("schedule", CHAINS)
def test_released_checkpoints_act_as_the_released_code_does(oracle, tmp_path, schedule):
    chain, T = CHAINS[schedule]
    save_as_released(tmp_path, oracle, schedule, T)
    agent = load_released_checkpoint(tmp_path, 3, eta=0.5)
    assert (agent.policy.schedule, agent.policy.n_timesteps, agent.eta) == (schedule, T, 0.5)
    action = agent.policy.sample(oracle["in/state"], x_T=oracle[f"in/{chain}/xT"], noises=oracle[f"in/{chain}/eps"])
    assert error(action, oracle[f"out/{chain}/action"]) < CHAIN_ERROR
    assert error(torch.min(*agent.critic_target(oracle["in/state"], oracle["in/action"])), oracle["out/qmin"]) < NOISE_ERROR
    assert agent.act(oracle["in/state"][0].numpy()).shape == (8,)
    before = vector(agent.policy)
    agent.update([oracle[f"in/{name}"] for name in Batch._fields])  # and it can be trained on
    assert not torch.equal(vector(agent.policy), before) and torch.equal(vector(agent.policy_ema), before)


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("was_run"),))


def test_checkpoints_that_are_none_of_the_authors_are_refused_in_a_line(oracle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no .*actor_3.pth"):
        load_released_checkpoint(tmp_path, 3)
    save_as_released(tmp_path, oracle, other=torch.zeros(2))
    load_released_checkpoint(tmp_path, 3)  # the authors' buffers are many: what is not of the model is not looked at
    wrong = {
        "there is no .*critic.pth": lambda: save_as_released(tmp_path, oracle) or torch.save({}, tmp_path / "actor.pth"),
        "another network: .*extra": lambda: save_as_released(tmp_path, oracle, **{"model.extra": torch.zeros(2)}),
        "another network: .*size mismatch": lambda: save_as_released(tmp_path, oracle, **{"model.mid_layer.2.bias": torch.zeros(2)}),
        "none of the schedules": lambda: save_as_released(tmp_path, oracle, betas=torch.full((5,), 0.3)),
        "no state_dict of tensors": lambda: torch.save([1, 2], tmp_path / "actor_3.pth"),
        "'betas' is missing": lambda: torch.save({"weight": torch.zeros(2)}, tmp_path / "actor_3.pth"),
        "cannot be read as tensors alone .*nothing in it was run": lambda: torch.save({"betas": Code()}, tmp_path / "actor_3.pth"),
        "actor_3.pth cannot be read": lambda: (tmp_path / "actor_3.pth").write_bytes(b"no pickle"),
    }
    for message, make in wrong.items():
        make()
        with pytest.raises(ValueError, match=message) as e:
            load_released_checkpoint(tmp_path, None if "critic.pth" in message else 3)
        assert "\n" not in str(e.value)
    assert not Path("was_run").exists()


COPIED_ALONE = """
import sys
from pathlib import Path
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import numpy as np, torch
from dql import DiffusionQL
agent = DiffusionQL(3, 2, hidden_dim=16)
batch = [torch.randn(8, d) for d in (3, 2, 3, 1)] + [torch.ones(8, 1)]
agent.update(batch)
try:
    import tqdm
except ModuleNotFoundError:
    print("hidden")
print(agent.act(np.zeros(3, dtype=np.float32)).shape)
"""


def test_copied_alone_the_file_trains_and_acts_on_torch_and_numpy(tmp_path):
    (tmp_path / "dql.py").write_bytes((ROOT / "dql.py").read_bytes())
    hidden = {"tasks", "kernels", "bench", "run_folder", "mujoco", "gymnasium", "h5py", "tqdm", "matplotlib"}
    hidden |= {"imageio", "tyro", "safetensors", "tensorboard", "wandb", "einops"}
    script = COPIED_ALONE.format(hidden=hidden)
    done = subprocess.run([sys.executable, "-E", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hidden", "(2,)"]


# --- data ------------------------------------------------------------------------------------------------------------


def test_reward_tuning():
    rewards = np.array([0, 1, 0, 3], dtype=np.float32)
    expected = {
        "none": rewards,
        "cql": (rewards - 0.5) * 4,
        "sparse": rewards * 200,
        "normalize": (rewards - 1) / np.sqrt(1.5, dtype=np.float32),
        "iql_antmaze": rewards - 1,
        "antmaze": (rewards - 0.25) * 2,
    }
    for how, values in expected.items():
        tuned = dql.tune_rewards(rewards, how)
        assert tuned.dtype == np.float32
        np.testing.assert_allclose(tuned, values, rtol=1e-6)
    with pytest.raises(ValueError, match="cubic"):
        dql.tune_rewards(rewards, "cubic")


def test_locomotion_rewards_are_scaled_by_the_spread_of_returns():
    """Three trajectories: one ends by a terminal, one because the next row starts elsewhere, one with the data."""
    rewards = np.array([1, 2, 3, 4, 5, 6], dtype=np.float32)
    terminals = np.array([False, True, False, False, False, False])
    observations = np.array([[0], [1], [2], [3], [7], [8]], dtype=np.float32)
    next_observations = np.array([[1], [2], [3], [4], [8], [9]], dtype=np.float32)
    tuned = dql.tune_rewards(
        rewards, "iql_locomotion", terminals=terminals, observations=observations, next_observations=next_observations
    )
    np.testing.assert_allclose(tuned, rewards / (11 - 3) * 1000, rtol=1e-6)  # returns 3, 7, 11


def test_transitions_are_sampled_uniformly_with_replacement_and_rows_stay_together():
    n = np.arange(10, dtype=np.float32)
    data = dql.Transitions(np.stack([n] * 3, 1), np.stack([n] * 2, 1), np.stack([n + 1] * 3, 1), 2 * n, n == 4)
    batch = data.sample(20_000, torch.Generator().manual_seed(0))
    row = batch.state[:, 0]
    assert len(data) == 10 and [tuple(x.shape[1:]) for x in batch] == [(3,), (2,), (3,), (1,), (1,)]
    assert all(x.dtype == torch.float32 for x in batch)
    assert torch.equal(batch.action[:, 1], row) and torch.equal(batch.next_state[:, 2], row + 1)
    assert torch.equal(batch.reward[:, 0], 2 * row) and torch.equal(batch.not_done[:, 0], (row != 4).float())
    counts = np.bincount(row.long().numpy(), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


# --- learning --------------------------------------------------------------------------------------------------------


def two_modes(n=2000, seed=0):
    """A bandit: actions ±0.8 with equal frequency, reward 1 on the left and 0 on the right, one step long."""
    rng = np.random.default_rng(seed)
    side = rng.choice([-1.0, 1.0], size=(n, 1))
    action = (0.8 * side + 0.05 * rng.normal(size=(n, 1))).astype(np.float32)
    state = np.zeros((n, 1), dtype=np.float32)
    return dql.Transitions(state, action, state, (side[:, 0] < 0).astype(np.float32), np.ones(n, dtype=bool))


def trained_on_two_modes(n_updates, lr, **kwargs):
    """-> 1000 actions of an agent trained for a few seconds, its rates decaying to 0."""
    data, sampler = two_modes(), torch.Generator().manual_seed(0)
    agent = DiffusionQL(1, 1, hidden_dim=32, lr=lr, critic_lr=lr, lr_decay_every=1, lr_decay_steps=n_updates, **kwargs)
    for _ in range(n_updates):
        agent.update(data.sample(64, sampler))
    torch.manual_seed(0)
    with torch.no_grad():
        return agent.policy.sample(torch.zeros(1000, 1))


def test_the_learned_q_moves_the_policy_to_the_better_of_two_modes():
    action = trained_on_two_modes(120, 1e-2, algo="ql", eta=2.0)
    assert (action < 0).float().mean() > 0.9


def test_behaviour_cloning_keeps_both_modes():
    # Ten steps: a perfect denoiser puts 97 % within 0.2 of a mode in ten steps, 70 % in five.
    action = trained_on_two_modes(700, 2e-2, algo="bc", n_timesteps=10)
    assert 0.4 < (action < 0).float().mean() < 0.6
    assert ((action.abs() - 0.8).abs() < 0.2).float().mean() > 0.75


# ---------------------------------------------------------------------------------------------------------------------
# Acting with the fused kernels, on a CPU in Triton's interpreter
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="triton has no package for this platform")
    if torch.cuda.is_available():
        pytest.skip("these agents are on the CPU, where kernels need the interpreter")
    import kernels

    return kernels


@pytest.mark.parametrize("algo", ["ql", "bc"])
def test_a_fused_agent_takes_the_actions_that_it_would_take_otherwise(kernels, algo):
    agent = DiffusionQL(5, 2, hidden_dim=128, n_timesteps=2, algo=algo)
    state = torch.randn(4, 5)
    actions = []
    for fused in (False, True):
        if fused:
            agent.fuse(n_candidates=6)
        both = [agent.act(s, 6, generator=torch.Generator().manual_seed(1)) for s in (state, state[0], state.numpy())]
        assert both[1].shape == (2,) and isinstance(both[2], np.ndarray)
        actions.append(torch.cat([both[0], both[1][None], torch.from_numpy(both[2])]))
    torch.testing.assert_close(*actions, rtol=0, atol=2e-3)  # fp16's rounding; another candidate would be further away
    assert (actions[0] - actions[1]).abs().max() > 0, "the kernels did not act"


@pytest.mark.parametrize("algo", ["ql", "bc"])
def test_an_agent_refuses_kernels_that_act_differently(kernels, monkeypatch, algo):
    agent = DiffusionQL(5, 2, hidden_dim=128, n_timesteps=2, algo=algo)
    refresh = kernels.packing.PackedPolicy.refresh

    def broken(packed):
        refresh(packed)
        packed.bias[:, 3 * packed.hidden_dim :] += 0.5

    monkeypatch.setattr(kernels.packing.PackedPolicy, "refresh", broken)
    with pytest.raises(ValueError, match="away from plain torch's"):
        agent.fuse(n_candidates=6)
    assert agent.act(torch.zeros(5), 6, generator=torch.Generator().manual_seed(1)).isfinite().all()


def test_acting_falls_back_with_a_line_where_they_may_and_refuse_where_they_may_not(kernels, monkeypatch, capsys):
    class OnGPU:
        device = torch.device("cuda")

        def fuse(self, n_candidates, precision):
            raise kernels.UnsupportedError("hidden_dim 100 is not one of (128, 256, 512)")

    dql.choose_acting(dql.Config(backend="auto"), [OnGPU()])
    line = capsys.readouterr().out
    assert "plain torch" in line and "hidden_dim 100" in line and line.count("\n") == 1
    with pytest.raises(dql.UserError, match="--backend fused cannot be had: hidden_dim 100"):
        dql.choose_acting(dql.Config(backend="fused"), [OnGPU()])
    monkeypatch.setattr(kernels, "why_not", lambda: "no CUDA GPU was found")
    with pytest.raises(dql.UserError, match="no CUDA GPU"):
        dql.choose_acting(dql.Config(backend="fused"), [small_agent()])
    dql.choose_acting(dql.Config(backend="auto"), [small_agent()])  # on a CPU plain torch is what one expects
    dql.choose_acting(dql.Config(backend="eager"), [OnGPU()])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("weight, message", [(math.nan, "not finite at update 7"), (1e6, "at update 7 .* cannot hold: take --precision tf32")])
def test_a_diverged_policy_is_named_where_the_kernels_find_it(kernels, weight, message):
    agent = DiffusionQL(5, 2, hidden_dim=128, n_timesteps=2)
    agent.fuse(n_candidates=3)
    with torch.no_grad():
        agent.policy.final_layer.weight[0, 0] = weight

    class Task:
        episode_limit = 1

        def evaluate(self, act, *_, **__):
            act(np.zeros((1, 5), np.float32))

    with pytest.raises(dql.UserError, match=message):
        dql.evaluate(agent, Task(), dql.Config(n_candidates=3), 1, 7)
