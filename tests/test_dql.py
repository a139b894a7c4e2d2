"""dql.py against the authors' released code (the oracle), against literal readings of the paper, and against itself.

Everything is tested twice: plain, and as kernels/eager.py makes it. Bounds against the oracle are twice the released float32
code's own error against the same float64 numbers.
"""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import dql
from dql import (
    Batch,
    DiffusionBC,
    DiffusionPolicy,
    DiffusionQL,
    TwinCritic,
    UpdateNoise,
    beta_schedule,
)
from kernels import eager

NOISE_ERROR, CHAIN_ERROR, LOSS_ERROR, UPDATE_ERROR = 2 * 1.7e-6, 2 * 9e-6, 2 * 1.4e-6, 2 * 1e-4
NORM_ERROR = 2e-6  # relative
CHAINS = {"vp": ("chain_vp_T5_a1.0", 5), "cosine": ("chain_cosine_T10_a1.0", 10)}


def error(ours, expected) -> float:
    assert ours.shape == expected.shape
    return (ours.detach().double() - expected).abs().max().item()


@pytest.fixture(params=[False, True], ids=["plain", "quick"], autouse=True)
def quick(request, monkeypatch):
    """Whether what is made below is made quick by kernels/eager.py."""
    monkeypatch.setattr(sys.modules[__name__], "QUICK", request.param)
    return request.param


QUICK = False


def made(network):
    """A policy or a critic as it is tested."""
    if QUICK:
        is_policy = isinstance(network, DiffusionPolicy)
        eager.speed_up_networks([network] if is_policy else [], [] if is_policy else [network])
    return network


def made_agent(agent):
    if QUICK:
        eager.speed_up(agent)
    return agent


def loaded(module, parameters):
    module.load_state_dict(parameters)
    return made(module)


def oracle_policy(oracle, **kwargs):
    return loaded(DiffusionPolicy(29, 8, **kwargs), oracle.named("params/actor/"))


def oracle_agent(oracle, **kwargs):
    agent = made_agent(DiffusionQL(29, 8, **kwargs))
    for name, net in (
        ("policy", "actor"),
        ("policy_ema", "ema"),
        ("critic", "critic"),
        ("critic_target", "target"),
    ):
        getattr(agent, name).load_state_dict(oracle.named(f"params/{net}/"))
    return agent


def small_agent(algo="ql", **kwargs):
    """An agent whose averages and targets differ from what they follow."""
    make = {"ql": DiffusionQL, "bc": DiffusionBC}[algo]
    agent = made_agent(make(3, 2, **{"hidden_dim": 16, "grad_norm": 0.0, **kwargs}))
    torch.manual_seed(5)
    for module in (agent.policy_ema, agent.critic_target):
        for p in module.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return agent


def random_batch(n=32, state_dim=3, action_dim=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    state, action, next_state, reward = (
        torch.randn(n, d, generator=g) for d in (state_dim, action_dim, state_dim, 1)
    )
    return Batch(
        state,
        action.clamp(-1, 1),
        next_state,
        reward,
        (torch.rand(n, 1, generator=g) > 0.2).float(),
    )


def vector(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


# --- against the released code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [5, 10])
@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
def test_schedule_is_the_released_one(oracle, schedule, T):
    expected = oracle.named(f"schedule/{schedule}/T{T}/")
    betas = beta_schedule(schedule, T)
    assert betas.dtype == torch.float64 and torch.equal(betas.float(), expected["betas"].float())
    policy = DiffusionPolicy(3, 2, n_timesteps=T, schedule=schedule)
    sigma = (0.5 * expected["posterior_log_variance_clipped"]).exp()
    for ours, theirs in (
        (policy.x0_from_x, expected["sqrt_recip_alphas_cumprod"]),
        (policy.x0_from_eps, expected["sqrt_recipm1_alphas_cumprod"]),
        (policy.mean_from_x0, expected["posterior_mean_coef1"]),
        (policy.mean_from_x, expected["posterior_mean_coef2"]),
        (policy.sigma, sigma),
    ):
        torch.testing.assert_close(
            torch.tensor(ours, dtype=torch.float64), theirs, rtol=1e-12, atol=1e-15
        )
    alpha_bar = expected["alphas_cumprod"]
    assert torch.equal(policy.sqrt_alpha_bar, alpha_bar.sqrt().float())
    assert torch.equal(policy.sqrt_one_minus_alpha_bar, (1 - alpha_bar).sqrt().float())


def test_time_embedding_and_its_mlp(oracle):
    policy = oracle_policy(oracle)
    assert error(policy.time_mlp(torch.arange(100)), oracle["out/time_mlp"]) < NOISE_ERROR


def test_predicted_noise(oracle):
    epsilon = oracle_policy(oracle).predict_noise(
        oracle["in/x"], oracle["in/t_T5"], oracle["in/state"]
    )
    assert error(epsilon, oracle["out/mlp_out"]) < NOISE_ERROR


@pytest.mark.parametrize("schedule", CHAINS)
def test_reverse_chain(oracle, schedule):
    chain, T = CHAINS[schedule]
    policy = oracle_policy(oracle, n_timesteps=T, schedule=schedule)
    action = policy.sample(
        oracle["in/state"], x_T=oracle[f"in/{chain}/xT"], noises=oracle[f"in/{chain}/eps"]
    )
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
    loss = policy.bc_loss(
        oracle["in/state"], oracle["in/action"], t=oracle["in/t_T5"], noise=oracle["in/bc_eps"]
    )
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
    monkeypatch.setattr(
        agent.policy_ema, "sample", lambda state, x_T, noises: oracle["in/next_action"]
    )
    batch, targets, mse_loss = (
        Batch(*(oracle[f"in/{name}"] for name in Batch._fields)),
        [],
        F.mse_loss,
    )
    monkeypatch.setattr(F, "mse_loss", lambda q, y: targets.append(y) or mse_loss(q, y))
    assert error(agent.update(batch)["critic_loss"], oracle["out/critic_loss"]) < LOSS_ERROR
    assert error(targets[0], oracle["out/target_q"]) < NOISE_ERROR and targets[1] is targets[0]


@pytest.mark.parametrize("head, coin", [(1, 0.7), (2, 0.3)])
def test_q_loss_for_both_sides_of_the_coin(oracle, head, coin):
    chain, _ = CHAINS["vp"]
    agent = oracle_agent(
        oracle, critic_lr=0.0
    )  # a critic that stays, as the oracle's q loss is not of an updated one
    noise = agent.draw_noise(64)
    noise.actor_x_T, noise.actor_noises = oracle[f"in/{chain}/xT"], oracle[f"in/{chain}/eps"]
    noise.coin = coin
    metrics = agent.update(Batch(*(oracle[f"in/{name}"] for name in Batch._fields)), noise)
    assert error(metrics["q_loss"], oracle[f"out/q_loss_head{head}"]) < LOSS_ERROR


def test_one_whole_update(oracle):
    agent = oracle_agent(
        oracle, eta=0.5, grad_norm=2.0, ema_start=0
    )  # update/config; the rest are the defaults
    given = oracle.named("update/in/step0/")
    order = ("tgt_xT", "tgt_eps", "t", "bc_eps", "act_xT", "act_eps", "coin")
    noise = UpdateNoise(*(given[name] for name in order))
    metrics = agent.update([given[name] for name in Batch._fields], noise)

    for name in ("bc_loss", "q_loss", "actor_loss", "critic_loss"):
        expected = oracle[f"update/out/{'ql_loss' if name == 'q_loss' else name}"]
        assert error(metrics[name], expected) < LOSS_ERROR, name
    for ours, theirs in {
        "actor_grad_norm": "Actor Grad Norm",
        "critic_grad_norm": "Critic Grad Norm",
    }.items():
        expected = oracle[f"update/out/log/{theirs}"]
        assert error(metrics[ours], expected) < NORM_ERROR * expected, ours
    for name, net in (
        ("policy", "actor"),
        ("policy_ema", "ema"),
        ("critic", "critic"),
        ("critic_target", "target"),
    ):
        before, expected = oracle.named(f"params/{net}/"), oracle.named(f"update/after1/{net}/")
        difference = update = 0
        for key, after in expected.items():
            difference += (
                (rows_of(getattr(agent, name).get_parameter(key).detach(), after) - after)
                .square()
                .sum()
            )
            update += (after - rows_of(before[key], after)).square().sum()
        assert (difference / update).sqrt() < UPDATE_ERROR, name


# --- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("sqrt", 5), ("vp", 0), ("cosine", -1)])
def test_bad_schedules_are_refused_in_one_line(arguments):
    name, T = arguments
    for call in (
        lambda: beta_schedule(name, T),
        lambda: DiffusionPolicy(3, 2, schedule=name, n_timesteps=T),
    ):
        with pytest.raises(ValueError) as refusal:
            call()
        message = str(refusal.value)
        assert "\n" not in message and (repr(name) in message or str(T) in message)


def test_one_step_schedules_are_finite():
    for schedule in ("vp", "linear", "cosine"):
        action = made(DiffusionPolicy(3, 2, n_timesteps=1, schedule=schedule)).sample(
            torch.zeros(4, 3)
        )
        assert action.shape == (4, 2) and action.isfinite().all()


def test_samples_differentiate_through_the_whole_chain_and_both_clamps():
    torch.manual_seed(0)
    policy = made(DiffusionPolicy(3, 2, hidden_dim=16, max_action=0.7)).double()
    state, x_T, noises = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((64, 3), (64, 2), (5, 64, 2))
    )
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
            for p, p0, d in zip(
                policy.parameters(), parameters, direction.split([p.numel() for p in parameters])
            ):
                p.copy_(p0 + sign * h * d.view_as(p))
            values.append((policy.sample(state, x_T=x_T, noises=noises) * weight).sum())
    slope = (values[0] - values[1]) / (2 * h)
    assert abs(slope - gradient.norm()) < 1e-5 * gradient.norm()


def test_no_gradient_passes_where_the_last_clamp_is_active():
    torch.manual_seed(0)
    policy = made(DiffusionPolicy(3, 2, hidden_dim=16, max_action=0.7))
    x_T = torch.randn(64, 2, requires_grad=True)
    action = policy.sample(torch.randn(64, 3), x_T=x_T)
    (gradient,) = torch.autograd.grad(action[(action.abs() == 0.7).all(dim=1)].sum(), x_T)
    assert gradient.abs().max() == 0
    assert (
        torch.autograd.grad(policy.sample(torch.randn(64, 3), x_T=x_T).sum(), x_T)[0].abs().max()
        > 0
    )


def test_several_chains_per_state_equal_chains_of_repeated_states():
    torch.manual_seed(0)
    policy, critic = (
        made(DiffusionPolicy(3, 2, hidden_dim=16)),
        made(TwinCritic(3, 2, hidden_dim=16)),
    )
    state, x_T, noises = torch.randn(4, 3), torch.randn(28, 2), torch.randn(5, 28, 2)
    repeated = state.repeat_interleave(7, dim=0)
    actions = policy.sample(state, x_T=x_T, noises=noises)
    torch.testing.assert_close(
        actions, policy.sample(repeated, x_T=x_T, noises=noises), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        critic(state, actions), critic(repeated, actions), rtol=1e-5, atol=1e-6
    )


def test_the_last_noise_is_ignored_and_the_others_are_not():
    torch.manual_seed(0)
    policy = made(DiffusionPolicy(3, 2, hidden_dim=16))
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
        target[0].weight.data[:, 3:] *= (
            10  # steep in the action, so that the critics disagree on which is best
        )
    noise = agent.draw_noise(6)
    assert noise.target_x_T.shape == (60, 2) and noise.target_noises.shape == (5, 60, 2)
    targets, gap = [], []
    for b in range(6):
        best1 = best2 = best = -math.inf
        for j in range(10):
            row = slice(10 * b + j, 10 * b + j + 1)
            state = batch.next_state[b : b + 1]
            action = agent.policy_ema.sample(
                state, x_T=noise.target_x_T[row], noises=noise.target_noises[:, row]
            )
            q1, q2 = agent.critic_target(state, action)
            best1, best2, best = (
                max(best1, q1.item()),
                max(best2, q2.item()),
                max(best, min(q1.item(), q2.item())),
            )
        gap.append(min(best1, best2) - best)
        targets.append(batch.reward[b].item() + 0.9 * batch.not_done[b].item() * min(best1, best2))
    assert max(gap) > 1e-2  # min of max and max of min are told apart
    target = torch.tensor(targets)[:, None]
    q1, q2 = agent.critic(batch.state, batch.action)
    expected = F.mse_loss(q1, target) + F.mse_loss(q2, target)
    torch.testing.assert_close(
        agent.update(batch, noise)["critic_loss"], expected.detach(), rtol=1e-5, atol=1e-6
    )


def test_the_coin_says_which_critic_is_climbed_and_which_normalises():
    for coin, signs in ((0.9, (-1.0, 1.0)), (0.1, (1.0, -1.0))):
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
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, list(agent.policy.parameters()))]
    )
    agent.update(batch, noise)
    torch.testing.assert_close(
        agent.state_dict()["policy_optimizer.exp_avg"] / 0.1, gradient, rtol=1e-4, atol=1e-6
    )


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
        assert moment.norm().item() == pytest.approx(
            0.1 * norm * (share if clipped else 1.0), rel=1e-4
        )


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
        torch.testing.assert_close(
            vector(agent.critic_target), 0.8 * target + 0.2 * vector(agent.critic)
        )


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


def test_behaviour_cloning_touches_no_critic(monkeypatch):
    agent, batch = small_agent(algo="bc"), random_batch()

    def called(*args):
        raise AssertionError("a critic was used")

    for critic in (agent.critic, agent.critic_target):
        monkeypatch.setattr(critic, "forward", called)
    critics, policy = (vector(agent.critic), vector(agent.critic_target)), vector(agent.policy)
    metrics = agent.update(batch)
    assert metrics.keys() == {"bc_loss", "actor_grad_norm"}
    assert torch.equal(vector(agent.critic), critics[0]) and torch.equal(
        vector(agent.critic_target), critics[1]
    )
    assert not torch.equal(vector(agent.policy), policy)
    assert agent.act(np.zeros((4, 3), dtype=np.float32)).shape == (4, 2)


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
    assert not torch.equal(
        vector(b.policy), vector(DiffusionQL(3, 2, hidden_dim=16, seed=2).policy)
    )


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
    monkeypatch.setattr(
        agent.policy, "sample", lambda state, x_T, noises: candidates.repeat(len(state), 1)
    )
    monkeypatch.setattr(
        agent.critic_target, "forward", lambda state, action: (2 * action[:, :1], 1 - action[:, :1])
    )
    actions = agent.act(np.zeros((20_000, 3), dtype=np.float32), n_candidates=n)
    counts = np.array([(actions[:, 0] == a).sum() for a in candidates[:, 0].numpy()])
    q = torch.minimum(2 * candidates[:, 0], 1 - candidates[:, 0]).double().numpy()
    expected = 20_000 * np.exp(q) / np.exp(q).sum()
    assert counts.sum() == 20_000
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 16.27  # chi-square, 3 degrees of freedom, p = 0.001


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


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ql", "bc"])
def test_a_restored_agent_continues_bit_for_bit(algo):
    kwargs = dict(algo=algo, max_q_backup=algo == "ql", ema_start=2, ema_every=2)
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
    assert state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in expected
    )
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
    actions = [
        agent.act(state, generator=torch.Generator().manual_seed(0)) for agent in (first, second)
    ]
    assert np.array_equal(*actions)


def test_a_state_of_another_shape_or_with_a_name_missing_is_refused():
    state = small_agent().state_dict()
    with pytest.raises(RuntimeError):
        DiffusionQL(3, 2, hidden_dim=32).load_state_dict(state)
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        small_agent().load_state_dict(state | {"policy_optimizer.exp_avg": torch.zeros(1)})
    del state["critic.q1_model.0.bias"]
    with pytest.raises((KeyError, RuntimeError)):
        small_agent().load_state_dict(state)


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
    hidden = {
        "tasks",
        "trainer",
        "kernels",
        "bench",
        "mujoco",
        "gymnasium",
        "h5py",
        "tqdm",
        "matplotlib",
    }
    hidden |= {"imageio", "tyro", "safetensors", "tensorboard", "wandb", "einops"}
    script = COPIED_ALONE.format(hidden=hidden)
    done = subprocess.run(
        [sys.executable, "-E", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hidden", "(2,)"]


# --- data ------------------------------------------------------------------------------------------------------------


def test_transitions_are_sampled_uniformly_with_replacement_and_rows_stay_together():
    n = np.arange(10, dtype=np.float32)
    data = dql.Transitions(
        np.stack([n] * 3, 1), np.stack([n] * 2, 1), np.stack([n + 1] * 3, 1), 2 * n, n == 4
    )
    batch = data.sample(20_000, torch.Generator().manual_seed(0))
    row = batch.state[:, 0]
    assert len(data) == 10 and [tuple(x.shape[1:]) for x in batch] == [(3,), (2,), (3,), (1,), (1,)]
    assert all(x.dtype == torch.float32 for x in batch)
    assert torch.equal(batch.action[:, 1], row) and torch.equal(batch.next_state[:, 2], row + 1)
    assert torch.equal(batch.reward[:, 0], 2 * row) and torch.equal(
        batch.not_done[:, 0], (row != 4).float()
    )
    counts = np.bincount(row.long().numpy(), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


# --- learning --------------------------------------------------------------------------------------------------------


def two_modes(n=2000, seed=0):
    """A bandit: actions ±0.8 with equal frequency, reward 1 on the left and 0 on the right, one step long."""
    rng = np.random.default_rng(seed)
    side = rng.choice([-1.0, 1.0], size=(n, 1))
    action = (0.8 * side + 0.05 * rng.normal(size=(n, 1))).astype(np.float32)
    state = np.zeros((n, 1), dtype=np.float32)
    return dql.Transitions(
        state, action, state, (side[:, 0] < 0).astype(np.float32), np.ones(n, dtype=bool)
    )


def trained_on_two_modes(n_updates, lr, algo, **kwargs):
    """-> 1000 actions of an agent trained for a few seconds, its rates decaying to 0."""
    data, sampler = two_modes(), torch.Generator().manual_seed(0)
    make = {"ql": DiffusionQL, "bc": DiffusionBC}[algo]
    agent = made_agent(make(1, 1, hidden_dim=32, lr=lr, critic_lr=lr, **kwargs))
    for step in range(n_updates):
        for optimizer in (agent.policy_optimizer, agent.critic_optimizer):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / n_updates))
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
