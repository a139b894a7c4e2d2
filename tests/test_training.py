"""kernels/training.py: whole updates with given noise, and the random numbers of its own."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from reference import (  # noqa: E402
    DEVICE,
    away_from_clamps,
    doubled,
    error,
    flat,
    fused,
    make_agent,
    make_batch,
    make_transitions,
    scale_rates,
    to_float64,
    transitions_of,
)
from small_agents import ORACLE_NETWORKS, rows_of  # noqa: E402

from dql import Batch, DiffusionQL, UpdateNoise  # noqa: E402
from kernels import training  # noqa: E402

# ---- Whole updates -------------------------------------------------------------------------------


def weights(agent):
    """Everything an update changes but the count of steps: name -> flat vector."""
    found = {name: flat(network) for name, network in agent.networks().items()}
    state = agent.state_dict()
    return found | {name: state[name] for name in state if "optimizer.exp_avg" in name}


def test_twenty_updates_stay_as_near_to_float64_as_eager_ones():
    """With averages, decaying rates and both sides of the coin."""
    how = dict(
        n_timesteps=2,
        max_q_backup=True,
        eta=0.5,
        grad_norm=0.5,
        lr=1e-3,
        critic_lr=2e-3,
        tau=0.05,
        ema_decay=0.9,
        ema_every=3,
        ema_start=6,
    )
    exact, plain, ours = (make_agent(5, 2, **how) for _ in range(3))
    start, exact, update, coins = weights(plain), to_float64(exact), fused(ours, 6, "fp16x3"), []
    for i in range(20):
        scale_rates((exact, plain, ours), 1 - i // 4 / 4)
        batch, noise = away_from_clamps(plain, 6, seed=i)
        coins.append(noise.coin > 0.5)
        exact.update(*doubled(batch, noise))
        plain.update(batch, noise)
        update.step(batch, noise)
    assert 2 < sum(coins) < 18
    far, near, mine = weights(exact), weights(plain), weights(ours)
    for name, target in far.items():
        moved = (target - start[name]).norm()  # errors are relative to that
        eager, found = ((x[name] - target).norm() / moved for x in (near, mine))
        assert found < max(3 * eager, 1e-5), f"{name}: fused {found:.1e}, eager {eager:.1e}"
    states = [s for o in (ours.policy_optimizer, ours.critic_optimizer) for s in o.state.values()]
    assert ours.step == 20 and all(int(state["step"]) == 20 for state in states)


def test_one_whole_update_of_the_released_code(oracle):
    agent = DiffusionQL(29, 8, eta=0.5, grad_norm=2.0, ema_start=0, device=DEVICE)
    for name, theirs in ORACLE_NETWORKS.items():
        getattr(agent, name).load_state_dict(oracle.named(f"params/{theirs}/"))
    given = {name: value.to(DEVICE) for name, value in oracle.named("update/in/step0/").items()}
    order = ("tgt_xT", "tgt_eps", "t", "bc_eps", "act_xT", "act_eps", "coin")
    noise = UpdateNoise(*(given[name] for name in order))
    metrics = fused(agent, 64, "fp32").step([given[name] for name in Batch._fields], noise)

    for name in ("bc_loss", "q_loss", "actor_loss", "critic_loss"):
        expected = float(oracle[f"update/out/{'ql_loss' if name == 'q_loss' else name}"])
        close = pytest.approx(expected, abs=2e-6 * max(1.0, abs(expected)))
        assert float(metrics[name]) == close, name
    for name in ("actor", "critic"):
        expected = float(oracle[f"update/out/log/{name.title()} Grad Norm"])
        assert float(metrics[f"{name}_grad_norm"]) == pytest.approx(expected, rel=1e-5), name
    for name, theirs in ORACLE_NETWORKS.items():
        network, before = getattr(agent, name), oracle.named(f"params/{theirs}/")
        difference = update = 0.0
        for key, after in oracle.named(f"update/after1/{theirs}/").items():
            ours = rows_of(network.get_parameter(key).detach().cpu(), after)
            difference += (ours - after).square().sum()
            update += (after - rows_of(before[key], after)).square().sum()
        # Adam makes a whole step even of a gradient that is nothing but rounding.
        assert (difference / update).sqrt() < 2e-3, name


def test_behaviour_cloning_touches_no_critic():
    agents = [make_agent(algo="bc", n_timesteps=3) for _ in range(2)]
    batch, noise = make_batch(agents[0], 20), agents[0].draw_noise(20)
    critic = flat(agents[1].critic)
    expected, metrics = agents[0].update(batch, noise), fused(agents[1], 20).step(batch, noise)
    assert metrics.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(metrics[name], expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(flat(agents[1].critic), critic)
    moments = [weights(agent)["policy_optimizer.exp_avg"] for agent in agents]
    assert error(moments[1], moments[0].double()) < 1e-5


# ---- Random numbers of its own -------------------------------------------------------------------


@triton.jit
def draws(index, t, heads, seed, n_transitions, T: tl.constexpr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    draw = tl.program_id(0)
    drawn = training._transitions(draw * 0, row, seed, draw, n_transitions, ROWS, False)
    tl.store(index + draw * ROWS + row, drawn)
    words = training._words(seed, draw, training.TIMESTEP, row)
    tl.store(t + draw * ROWS + row, training._below(words, tl.full([], T, tl.int32)))
    tl.store(heads + draw, training._heads(seed, draw).to(tl.int32))


def chi_square(counts):
    """Of counts that are expected to be equal."""
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum()


def test_drawn_transitions_timesteps_and_coins_are_uniform():
    """And each step draws new ones."""
    n, calls, rows, T = 1_000_003, 64, 1024, 5
    index, t = (torch.empty(calls, rows, dtype=torch.int64, device=DEVICE) for _ in range(2))
    heads = torch.empty(calls, dtype=torch.int32, device=DEVICE)
    draws[(calls,)](index, t, heads, 7, n, T=T, ROWS=rows)
    index, t = index.cpu().double(), t.cpu()
    assert index.min() >= 0 and index.max() < n and index.max() > 0.999 * n
    assert chi_square(torch.histc(index, 10, 0, n)) < 30  # 9 degrees of freedom
    counts = torch.bincount(t.flatten(), minlength=T).double()
    assert len(counts) == T and chi_square(counts) < 20
    assert 16 < heads.sum() < 48
    assert len(index.unique()) > 0.96 * calls * rows  # another step, other transitions
    together = torch.stack([index.flatten() / n, t.flatten() / T]) - 0.45
    assert abs(torch.corrcoef(together)[0, 1]) < 0.02


def test_an_update_trains_on_the_transitions_that_it_draws():
    """There is only one: whatever is drawn, the critics regress on that one."""
    agent = make_agent(n_timesteps=2, discount=0.0, grad_norm=0.0, critic_lr=1e-2)
    batch = make_batch(agent, 1)
    with torch.no_grad():
        both = agent.critic(batch.state, batch.action)
        expected = sum((q - batch.reward).square().mean() for q in both)
    update = fused(agent, 8, transitions=transitions_of(batch))
    torch.testing.assert_close(update.run(1)["critic_loss"], expected, rtol=1e-5, atol=1e-6)


def test_cloning_noise_is_standard_normal_and_always_new():
    """With a last layer of zeros ε_θ is 0, so the loss is the mean square of the noise."""
    agent = make_agent(algo="bc", lr=0.0)
    with torch.no_grad():
        agent.policy.final_layer.weight.zero_(), agent.policy.final_layer.bias.zero_()
    update = fused(agent, 512, transitions=make_transitions(agent))
    losses = [float(update.run(1)["bc_loss"]) for _ in range(3)]
    assert all(abs(loss - 1) < 4 * math.sqrt(2 / (512 * 3)) for loss in losses)
    assert len(set(losses)) == 3
