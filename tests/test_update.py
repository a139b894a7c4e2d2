"""The fused update against eager updates in float64 and in its own precision, at sizes that fill no tile."""

import gc
import math
import warnings
import weakref

import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
import hopper  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from reference import (  # noqa: E402
    DEVICE,
    away_from_clamps,
    doubled,
    error,
    first_moment,
    flat,
    fused,
    gradient,
    imitate,
    make_agent,
    make_batch,
    make_noise,
    make_transitions,
    needs_interpreter,
    steepen,
    to_float64,
)

import dql  # noqa: E402
import kernels  # noqa: E402
from bench.rounding import allowed  # noqa: E402
from dql import Batch, DiffusionQL, UpdateNoise  # noqa: E402
from kernels import (  # noqa: E402
    FusedSampler,
    FusedUpdate,
    UnsupportedError,
    eager,
    gradients,
    optimizer,
    training,
)
from kernels.packing import PRECISIONS  # noqa: E402
from kernels.tiles import Tile, choose_update_tile  # noqa: E402

# What later launches read is garbage until an earlier one has written it.
# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------

# state, action, hidden, T, max_action, max-Q, rows, coin
SIZES = [
    (11, 3, 128, 5, 1.0, False, 37, 0.2),
    (29, 8, 256, 5, 1.0, False, 50, 0.8),
    (17, 24, 128, 3, 0.7, True, 5, 0.2),
    (1, 1, 128, 1, 2.0, False, 33, 0.8),
    (60, 9, 128, 17, 1.0, False, 9, 0.2),
]
FLOAT32 = 4e-7  # a few roundings, by which two ways of adding up may differ


def assert_gradients_are_right(monkeypatch, size, precision, limit, prepare=lambda agent: None):
    """One update's gradients err at most limit times as much as eager ones at the same precision. -> both's metrics"""
    state_dim, action_dim, hidden_dim, T, max_action, max_q, n, coin = size
    # critic_lr 0: both actors climb the same critic. No clipping: what is left in the vectors are the gradients.
    how = dict(
        hidden_dim=hidden_dim,
        n_timesteps=T,
        max_action=max_action,
        max_q_backup=max_q,
        critic_lr=0.0,
        grad_norm=0.0,
        eta=2.0,
    )
    agents = [make_agent(state_dim, action_dim, **how) for _ in range(3)]
    for agent in agents:
        prepare(agent)
    batch, noise = away_from_clamps(agents[0], n)
    noise.coin = coin
    exact, plain, ours = to_float64(agents[0]), agents[1], agents[2]
    exact.update(*doubled(batch, noise))
    update = fused(ours, n, precision)
    metrics = update.step(batch, noise)
    imitate(monkeypatch, precision)
    expected = plain.update(batch, noise)
    for name, trained in (("policy", update.policy), ("critic", update.critic)):
        target = gradient(getattr(exact, name))
        most = limit * error(gradient(getattr(plain, name)), target)
        found = error(trained.vectors.gradient[0], target)
        assert found <= max(most, FLOAT32), f"{name}: fused {found:.2e}, allowed {most:.2e}"
    return metrics, expected


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_err_no_more_than_eager_ones_allow(size, precision, monkeypatch):
    metrics, expected = assert_gradients_are_right(
        monkeypatch, size, precision, allowed(precision, DEVICE == "cuda")
    )
    tolerance = (
        dict(rtol=0.02, atol=5e-3) if precision in ("fp16", "tf32") else dict(rtol=1e-5, atol=1e-6)
    )
    for name in expected:
        torch.testing.assert_close(metrics[name], expected[name], **tolerance)


@needs_interpreter
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES[:2])
def test_gradients_are_right_in_hoppers_arithmetic(size, precision, monkeypatch):
    hopper.install(monkeypatch)
    assert_gradients_are_right(monkeypatch, size, precision, allowed(precision, on_gpu=True))


@pytest.mark.parametrize("steepness", [400.0, 100_000.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_of_a_steep_critic_neither_overflow_nor_vanish(precision, steepness, monkeypatch):
    """400: what a critic has learned of a fall that costs 800 of 1,000 after 3,000 updates."""
    limit = allowed(precision, DEVICE == "cuda")
    assert_gradients_are_right(
        monkeypatch, SIZES[0], precision, limit, lambda agent: steepen(agent, steepness)
    )


@needs_interpreter  # on a GPU the tiles are those that are shipped
@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_of_each_parameter_of_each_layer_are_right(transposed):
    agents = [make_agent(grad_norm=0.0, critic_lr=0.0) for _ in range(2)]
    batch, noise = away_from_clamps(agents[0], 20)
    exact = to_float64(agents[0])
    exact.update(*doubled(batch, noise))
    update = fused(agents[1], 20, tile=Tile(transposed, 32, 64, 4, 2))
    update.step(batch, noise)
    for name, trained in (("policy", update.policy), ("critic", update.critic)):
        module = getattr(exact, name)
        sizes = [p.numel() for p in module.parameters()]
        for (key, p), ours in zip(
            module.named_parameters(), trained.vectors.gradient[0].split(sizes)
        ):
            assert error(ours, p.grad.flatten()) < 2e-5, f"{name}.{key}"


def test_no_gradient_passes_where_a_clamp_is_active():
    """In a box that small every chain is clamped at every step, so that nothing but cloning is left in the policy's gradient."""
    agents = [make_agent(grad_norm=0.0, eta=eta, max_action=1e-5) for eta in (0.0, 50.0)]
    batch, noise = make_batch(agents[0], 16), agents[0].draw_noise(16)
    gradients = []
    for agent in agents:
        update = fused(agent, 16)
        update.step(batch, noise)
        gradients.append(update.policy.vectors.gradient[0].clone())
    assert torch.equal(*gradients)


@triton.jit
def corrections(n, out, LOG_BETA: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out + i, optimizer._one_minus_power(LOG_BETA, tl.load(n + i)))


@pytest.mark.parametrize("arithmetic", ["exact", pytest.param("hopper", marks=needs_interpreter)])
@pytest.mark.parametrize("beta", [0.9, 0.999])
def test_bias_corrections_are_exact_from_the_first_step_to_the_last(beta, arithmetic, monkeypatch):
    if arithmetic == "hopper":  # with exponentials up to two ulps off, at random
        hopper.install(monkeypatch, ulps=2.0)
    for n in (1, 2, 4, 5, 10, 99, 101, 499, 501, 1000, 1_000_000):
        out = torch.empty(256, device=DEVICE)
        corrections[(1,)](torch.full((256,), float(n), device=DEVICE), out, LOG_BETA=math.log(beta))
        assert out.tolist() == pytest.approx([1 - beta**n] * 256, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Whole updates
# ---------------------------------------------------------------------------------------------------------------------


def weights(agent):
    """Everything an update changes but the count of steps: name -> flat vector."""
    found = {name: flat(network) for name, network in agent.networks().items()}
    state = agent.state_dict()
    return found | {name: state[name] for name in state if "optimizer.exp_avg" in name}


def scale_rates(agents, share):
    """Learning rates as a schedule sets them."""
    for agent in agents:
        agent.policy_optimizer.param_groups[0]["lr"] = share * agent.config.lr
        agent.critic_optimizer.param_groups[0]["lr"] = share * agent.config.critic_lr


def test_twenty_updates_stay_as_near_to_float64_as_eager_ones():
    """Differences are measured by the way: ‖difference‖ / ‖update‖. Averages, decaying rates and both sides of the coin are in it."""
    how = dict(
        n_timesteps=2, max_q_backup=True, eta=0.5, grad_norm=0.5, lr=1e-3, critic_lr=2e-3, tau=0.05, ema_decay=0.9, ema_every=3,
        ema_start=6,
    )  # fmt: skip
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
        way = (target - start[name]).norm()
        allowed, found = ((x[name] - target).norm() / way for x in (near, mine))
        assert found < max(3 * allowed, 1e-5), f"{name}: fused {found:.1e}, eager {allowed:.1e}"
    states = [s for o in (ours.policy_optimizer, ours.critic_optimizer) for s in o.state.values()]
    assert ours.step == 20 and all(int(state["step"]) == 20 for state in states)


def test_one_whole_update_of_the_released_code(oracle):
    agent = DiffusionQL(29, 8, eta=0.5, grad_norm=2.0, ema_start=0, device=DEVICE)
    for name, net in (
        ("policy", "actor"),
        ("policy_ema", "ema"),
        ("critic", "critic"),
        ("critic_target", "target"),
    ):
        getattr(agent, name).load_state_dict(oracle.named(f"params/{net}/"))
    given = {name: value.to(DEVICE) for name, value in oracle.named("update/in/step0/").items()}
    noise = UpdateNoise(
        *(given[name] for name in ("tgt_xT", "tgt_eps", "t", "bc_eps", "act_xT", "act_eps", "coin"))
    )
    metrics = fused(agent, 64, "fp32").step([given[name] for name in Batch._fields], noise)
    for name in ("bc_loss", "q_loss", "actor_loss", "critic_loss"):
        expected = float(oracle[f"update/out/{'ql_loss' if name == 'q_loss' else name}"])
        assert float(metrics[name]) == pytest.approx(
            expected, abs=2e-6 * max(1.0, abs(expected))
        ), name
    for ours, theirs in {
        "actor_grad_norm": "Actor Grad Norm",
        "critic_grad_norm": "Critic Grad Norm",
    }.items():
        assert float(metrics[ours]) == pytest.approx(
            float(oracle[f"update/out/log/{theirs}"]), rel=1e-5
        ), ours
    for name, net in (
        ("policy", "actor"),
        ("policy_ema", "ema"),
        ("critic", "critic"),
        ("critic_target", "target"),
    ):
        before, difference, update = oracle.named(f"params/{net}/"), 0.0, 0.0
        for key, after in oracle.named(f"update/after1/{net}/").items():
            rows = slice(None, None, len(before[key]) // len(after)) if after.ndim else ...
            difference += (
                (getattr(agent, name).get_parameter(key).detach().cpu()[rows] - after)
                .square()
                .sum()
            )
            update += (after - before[key][rows]).square().sum()
        assert (difference / update).sqrt() < 2e-3, (
            name
        )  # Adam makes the whole step of a gradient that is rounding


def test_a_rate_that_has_decayed_to_nothing_changes_nothing():
    agent = make_agent()
    before, update = flat(agent.policy), fused(agent, 8)
    scale_rates([agent], 0.0)
    update.step(make_batch(agent, 8), agent.draw_noise(8))
    assert torch.equal(flat(agent.policy), before)


@pytest.mark.parametrize(
    "start, every, due", [(0, 1, True), (0, 5, True), (1, 1, False), (0, 4, True), (5, 5, False)]
)
def test_the_average_follows_its_schedule(start, every, due):
    agent = make_agent(ema_start=start, ema_every=every, ema_decay=0.9, lr=1e-2)
    before, update = flat(agent.policy_ema), fused(agent, 8)
    update.step(make_batch(agent, 8), agent.draw_noise(8))
    expected = torch.lerp(before, flat(agent.policy), 0.1) if due else before
    torch.testing.assert_close(flat(agent.policy_ema), expected, rtol=1e-6, atol=1e-8)


def test_behaviour_cloning_touches_no_critic():
    agents = [make_agent(algo="bc", n_timesteps=3) for _ in range(2)]
    batch, noise = make_batch(agents[0], 20), agents[0].draw_noise(20)
    critic = flat(agents[1].critic)
    expected, metrics = agents[0].update(batch, noise), fused(agents[1], 20).step(batch, noise)
    assert metrics.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(metrics[name], expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(flat(agents[1].critic), critic)
    assert (
        error(first_moment(agents[1], "policy"), first_moment(agents[0], "policy").double()) < 1e-5
    )


@pytest.mark.parametrize("algo, n_launches, n_agents", [("ql", 9, 1), ("ql", 9, 3), ("bc", 5, 1)])
def test_an_update_is_a_handful_of_launches_however_many_agents_there_are(
    monkeypatch, algo, n_launches, n_agents
):
    agents, launched = [make_agent(algo=algo, seed=seed) for seed in range(n_agents)], []
    update = FusedUpdate(agents, make_transitions(agents[0]), 8)

    class Counted:
        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(grid)

    for module, names in (
        (training, ("sample", "fit", "climb")),
        (gradients, ("weight_gradients", "time_gradient")),
        (optimizer, ("adam", "finish")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted())
    update.run(1)
    assert len(launched) == n_launches and {grid[-1] for grid in launched} == {n_agents}


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers of its own
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def draws(index, t, heads, seed, n_transitions, T: tl.constexpr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    draw = tl.program_id(0)
    tl.store(
        index + draw * ROWS + row,
        training._transitions(draw * 0, row, seed, draw, n_transitions, ROWS, False),
    )
    step = training._below(
        training._words(seed, draw, training.TIMESTEP, row), tl.full([], T, tl.int32)
    )
    tl.store(t + draw * ROWS + row, step)
    tl.store(heads + draw, training._heads(seed, draw).to(tl.int32))


def test_transitions_timesteps_and_coins_are_uniform_and_fresh_at_each_step():
    n, calls, rows, T = 1_000_003, 64, 1024, 5
    index, t = (torch.empty(calls, rows, dtype=torch.int64, device=DEVICE) for _ in range(2))
    heads = torch.empty(calls, dtype=torch.int32, device=DEVICE)
    draws[(calls,)](index, t, heads, 7, n, T=T, ROWS=rows)
    index, t = index.cpu().double(), t.cpu()
    assert index.min() >= 0 and index.max() < n and index.max() > 0.999 * n
    tenths = torch.histc(index, 10, 0, n)
    assert (
        (tenths - calls * rows / 10) ** 2 / (calls * rows / 10)
    ).sum() < 30  # chi-square, 9 degrees of freedom
    counts = torch.bincount(t.flatten(), minlength=T).double()
    assert len(counts) == T and ((counts - calls * rows / T) ** 2 / (calls * rows / T)).sum() < 20
    assert 16 < heads.sum() < 48
    assert len(index.unique()) > 0.96 * calls * rows  # another step, other transitions
    together = torch.stack([index.flatten() / n, t.flatten() / T]) - 0.45
    assert abs(torch.corrcoef(together)[0, 1]) < 0.02


def test_a_step_on_drawn_numbers_is_a_step_on_the_transitions_it_says():
    """One transition repeated: whatever is drawn, critics regress on that one."""
    agent = make_agent(n_timesteps=2, discount=0.0, grad_norm=0.0, critic_lr=1e-2)
    batch = make_batch(agent, 1)
    arrays = [
        x.cpu().numpy()
        for x in (
            batch.state,
            batch.action,
            batch.next_state,
            batch.reward[:, 0],
            1 - batch.not_done[:, 0],
        )
    ]
    with torch.no_grad():
        expected = sum(
            (q - batch.reward).square().mean() for q in agent.critic(batch.state, batch.action)
        )
    update = fused(agent, 8, transitions=dql.Transitions(*arrays, device=DEVICE))
    torch.testing.assert_close(update.run(1)["critic_loss"], expected, rtol=1e-5, atol=1e-6)


def test_cloning_noise_is_standard_normal_and_timesteps_differ():
    """ε̂ = 0 where the last layer is: the loss then is the mean square of the noise."""
    agent = make_agent(algo="bc", lr=0.0)
    with torch.no_grad():
        agent.policy.final_layer.weight.zero_(), agent.policy.final_layer.bias.zero_()
    update = fused(agent, 512, transitions=make_transitions(agent))
    losses = [float(update.run(1)["bc_loss"]) for _ in range(3)]
    assert (
        all(abs(loss - 1) < 4 * math.sqrt(2 / (512 * 3)) for loss in losses)
        and len(set(losses)) == 3
    )


# ---------------------------------------------------------------------------------------------------------------------
# Runs: determinism, seeds, resuming
# ---------------------------------------------------------------------------------------------------------------------

SMALL = dict(n_timesteps=2, ema_every=2, lr=1e-3)


def small_run(seed, **how):
    agent = make_agent(5, 2, seed=seed, **SMALL | how)
    return agent, fused(agent, 6, "fp16", make_transitions(agent))


def tensors(agent):
    return {
        name: value.clone() for name, value in agent.state_dict().items() if name != "generator"
    }


def assert_same(agent, expected):
    found = tensors(agent)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


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


@pytest.mark.parametrize("max_q", [False, True])
def test_agents_side_by_side_get_the_numbers_that_each_gets_alone(max_q):
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
    batches, draws = (
        [make_batch(agents[0], 6, seed=s) for s in (3, 4)],
        [a.draw_noise(6) for a in agents],
    )
    metrics = fused(agents, 6).step(batches, draws)
    for i, agent in enumerate(alone):
        assert fused(agent, 6).step(batches[i], draws[i]) == metrics[i]
        assert_same(agent, tensors(agents[i]))


def test_a_resumed_run_goes_on_bit_for_bit(history):
    states, _ = history
    agent = make_agent(5, 2, seed=1, **SMALL)
    agent.load_state_dict(states[0] | {"generator": agent.generator.get_state()})
    fused(agent, 6, "fp16", make_transitions(agent)).run(1)
    assert_same(agent, states[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adam_packs_what_packing_packs(precision):
    """So that a resumed run reads the same bits."""
    agent = make_agent(5, 2, **SMALL)
    update = fused(agent, 6, precision, make_transitions(agent))
    update.run(1)
    packed = [
        p
        for trained in (update.policy, update.critic)
        for p in (trained.packed.weights, trained.packed.low, trained.packed.bias)
    ]
    before = [p.clone() for p in packed]
    update.refresh()
    assert all(map(torch.equal, packed, before))


def test_what_is_loaded_between_runs_is_what_is_trained(history):
    states, _ = history
    agent, update = small_run(1)
    update.run(1)
    agent.load_state_dict(states[1] | {"generator": agent.generator.get_state()})
    update.run(1)
    assert_same(agent, states[2])


def test_the_modules_see_what_is_trained_and_so_do_other_kernels():
    agent = make_agent(**SMALL | {"lr": 1e-2})
    sampler, (state, x_T, noises) = FusedSampler(agent.policy, "fp32"), make_noise(agent.policy, 10)
    update = fused(agent, 8, "fp32", make_transitions(agent))
    with torch.no_grad():
        before = agent.policy.sample(state, x_T=x_T, noises=noises)
        update.run(1)
        after = agent.policy.sample(state, x_T=x_T, noises=noises)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(sampler(state, x_T, noises), after, rtol=0, atol=2e-5)
    assert (
        agent.policy.final_layer.weight.untyped_storage().data_ptr()
        == update.policy.vectors.parameters.untyped_storage().data_ptr()
    )
    agent.update(make_batch(agent, 8))  # and plain torch goes on from there, and back
    update.run(1)
    assert agent.step == 3 and int(agent.state_dict()["policy_optimizer.step"]) == 3


def test_nan_in_one_update_is_nan_in_the_mean():
    agent = make_agent(5, 2, **SMALL)
    transitions = make_transitions(agent)
    update = fused(agent, 6, transitions=transitions)
    transitions.columns[3].fill_(math.nan)
    assert update.run(1)["critic_loss"].isnan()


def test_fp16_gradients_of_huge_and_tiny_errors_neither_overflow_nor_vanish():
    """A million, and a millionth: fp16 has neither."""
    for size in (1e6, 1e-6):
        agents = [make_agent(grad_norm=0.0, discount=0.0) for _ in range(2)]
        batch, noise = make_batch(agents[0], 16), agents[0].draw_noise(16)
        with torch.no_grad():
            for model in (m for a in agents for m in (a.critic.q1_model, a.critic.q2_model)):
                model[-1].weight.mul_(1e-3 * min(size, 1)), model[-1].bias.zero_()
        batch = batch._replace(reward=batch.reward * size)
        agents[0].update(batch, noise)
        update = fused(agents[1], 16, "fp16")
        update.step(batch, noise)
        assert error(update.critic.vectors.gradient[0], gradient(agents[0].critic).double()) < 2e-3


# ---------------------------------------------------------------------------------------------------------------------
# In CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


def replaying(agent, precision="fp16"):
    """A FusedUpdate whose run() replays a graph, also an imitated one."""
    update = fused(agent, 256 if DEVICE == "cuda" else 6, precision, make_transitions(agent))
    update.replays = True
    return update


@pytest.mark.parametrize("precision", PRECISIONS if DEVICE == "cuda" else ["fp16"])
def test_replays_of_the_graph_equal_single_launches(cuda_graphs, precision, monkeypatch):
    monkeypatch.setattr(kernels.update, "PER_REPLAY", 2)
    monkeypatch.setattr(kernels.graphs, "WARM_UP", 1)
    agents = [make_agent(5, 2, seed=1, **SMALL) for _ in range(2)]
    replayed, launched = (replaying(agent, precision) for agent in agents)
    metrics = replayed.run(3)
    assert replayed.graph is not None
    singles = [launched.run(1) for _ in range(3)]
    assert launched.graph is None
    assert_same(agents[0], tensors(agents[1]))
    for name, mean in metrics.items():
        torch.testing.assert_close(mean, torch.stack([m[name] for m in singles]).mean())


@needs_interpreter
def test_a_captured_update_is_launches_alone(cuda_graphs, monkeypatch):
    """Whatever torch did there would be one more launch, or memory that the graph has to keep."""
    monkeypatch.setattr(kernels.update, "PER_REPLAY", 2)
    agent = make_agent(5, 2, **SMALL)
    monkeypatch.setattr(kernels.graphs, "WARM_UP", 1)
    update = replaying(agent)
    before = tensors(agent)
    update.capture()
    assert update.graph.graph.launches == 2 * [
        "sample", "fit", "weight_gradients", "adam", "climb", "weight_gradients", "time_gradient", "adam", "finish"
    ]  # fmt: skip
    assert update.graph.graph.operations == []
    assert_same(agent, before)


def test_an_update_and_its_graph_die_with_their_last_reference(cuda_graphs, monkeypatch):
    """A graph that the garbage collector destroys may do so during another capture, and break it."""
    monkeypatch.setattr(kernels.update, "PER_REPLAY", 1)
    monkeypatch.setattr(kernels.graphs, "WARM_UP", 1)
    update = replaying(make_agent(5, 2, **SMALL))
    update.capture()
    gone = weakref.ref(update.graph)
    gc.disable()
    try:
        del update
        assert gone() is None
    finally:
        gc.enable()


def test_captured_eager_updates_equal_launched_ones(cuda_graphs):
    """Both sides of the coin are in it, and updates in which the averaged policy moves or does not."""
    from kernels.graphs import GraphUpdates

    n = 200 if DEVICE == "cuda" else 5
    agents = [make_agent(5, 2, **SMALL) for _ in range(2)]
    eager.speed_up(agents[0])  # which has the graph's Adam
    transitions = make_transitions(agents[0])
    before = tensors(agents[1])
    eager.speed_up(agents[1])
    update = GraphUpdates([agents[1]], transitions, 6)
    assert_same(agents[1], before)
    metrics = []
    for share, k in ((1.0, n - 2), (0.5, 2)):
        if DEVICE == "cuda":  # the imitation keeps the rate
            scale_rates(agents, share)
        metrics.append([dql.Updates([agents[0]], transitions, 6).run(k)[0], update.run(k)[0]])
    assert agents[0].step == agents[1].step == n
    # On a GPU cuBLAS may choose another product for another stream.
    close = dict(rtol=1e-3, atol=1e-4) if DEVICE == "cuda" else dict(rtol=0, atol=0)
    torch.testing.assert_close(tensors(agents[1]), tensors(agents[0]), **close)
    for launched, captured in metrics:
        torch.testing.assert_close(captured, launched, **close)


# ---------------------------------------------------------------------------------------------------------------------
# What is not supported
# ---------------------------------------------------------------------------------------------------------------------


def test_states_that_fp16_cannot_hold_are_refused():
    agent = make_agent()
    transitions = make_transitions(agent)
    transitions.columns[2][3, 4] = 1e5
    for precision in ("fp16", "fp16x3"):
        with pytest.raises(
            UnsupportedError,
            match=f"next_state reaches 1e\\+05, which {precision} cannot hold: normalise states",
        ):
            FusedUpdate(agent, transitions, 8, precision)
    for precision in ("tf32", "fp32"):
        FusedUpdate(agent, transitions, 8, precision)


def test_states_of_which_eleven_bits_tell_nothing_get_a_warning():
    agent = make_agent()
    transitions = make_transitions(agent)
    for states in transitions.columns[::2][:2]:
        states[:, 2] = 1000.0  # always the same: nothing is lost
        states[:, 7] = 1000.0 + 0.1 * torch.rand(len(states), device=DEVICE)
    for precision in ("fp16", "tf32"):
        with pytest.warns(
            UserWarning,
            match=rf"column 7 of state varies by 0\.\d+ and reaches 1e\+03, so {precision} hardly sees it",
        ):
            FusedUpdate(agent, transitions, 8, precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedUpdate(agent, transitions, 8, "fp16x3")
        FusedUpdate(agent, make_transitions(agent), 8, "fp16")


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(hidden_dim=100), "hidden_dim 100 is not one of"),
        (dict(n_timesteps=101), "n_timesteps 101"),
        (dict(state_dim=129), "state_dim 129"),
    ],
)
def test_networks_of_other_sizes_are_refused(how, message):
    with pytest.raises(UnsupportedError, match=message):
        FusedUpdate(make_agent(**how), None, 8)


def test_batches_precisions_and_optimizers_that_it_does_not_know_are_refused():
    agent = make_agent()
    for batch_size in (0, 4097):
        with pytest.raises(UnsupportedError, match="batch_size"):
            FusedUpdate(agent, None, batch_size)
    with pytest.raises(UnsupportedError, match="precision 'fp8'"):
        FusedUpdate(agent, None, 8, "fp8")
    agent.policy_optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(UnsupportedError, match="weight_decay=0.1"):
        FusedUpdate(agent, None, 8)


def test_agents_that_differ_in_more_than_their_seeds_are_refused():
    with pytest.raises(UnsupportedError, match="share eta"):
        FusedUpdate([make_agent(eta=1.0), make_agent(eta=2.0)], None, 8)
    with pytest.raises(UnsupportedError, match="same sizes"):
        FusedUpdate([make_agent(), make_agent(state_dim=12)], None, 8)
    with pytest.raises(UnsupportedError, match="schedule"):
        FusedUpdate([make_agent(), make_agent(schedule="linear")], None, 8)
    with pytest.raises(UnsupportedError, match="no agents"):
        FusedUpdate([], None, 8)


def test_an_agent_that_another_update_has_taken_over_is_refused_not_trained_in_dead_memory():
    agent = make_agent()
    first = FusedUpdate(agent, make_transitions(agent), 8)
    FusedUpdate(agent, make_transitions(agent), 8)
    with pytest.raises(UnsupportedError, match="another FusedUpdate has taken over"):
        first.run(1)


def test_batches_and_data_of_other_shapes_are_refused():
    agent = make_agent()
    with pytest.raises(UnsupportedError, match="action is"):
        FusedUpdate(agent, make_transitions(make_agent(action_dim=2)), 8)
    update = FusedUpdate(agent, None, 8)
    with pytest.raises(UnsupportedError, match="without transitions"):
        update.run(1)
    with pytest.raises(UnsupportedError, match=r"state is \(7, 11\)"):
        update.step(make_batch(agent, 7), agent.draw_noise(8))
    with pytest.raises(UnsupportedError, match="target and actor noise"):
        update.step(make_batch(agent, 8), agent.draw_noise(7))
    with pytest.raises(UnsupportedError, match="2 agents need"):
        FusedUpdate([agent, make_agent(seed=1)], None, 8).step(
            [make_batch(agent, 8)], [agent.draw_noise(8)]
        )


def test_want_of_memory_says_how_much_is_wanted(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (3 << 20, 8 << 20))
    monkeypatch.setattr(kernels.launches, "PackedPolicy", full)
    with pytest.raises(
        UnsupportedError, match=r"of 1 agents needs 6\d MiB of GPU memory, and 3 MiB are free"
    ):
        FusedUpdate(make_agent(29, 8, hidden_dim=256), None, 1024)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_eight_agents_in_a_graph_get_the_numbers_that_each_gets_alone():
    agents = [make_agent(29, 8, hidden_dim=256, seed=seed, max_q_backup=True) for seed in range(8)]
    transitions = make_transitions(agents[0], 10_000)
    FusedUpdate(agents, transitions, 256).run(200)
    for seed in (0, 7):
        alone = make_agent(29, 8, hidden_dim=256, seed=seed, max_q_backup=True)
        FusedUpdate(alone, transitions, 256).run(200)
        assert_same(alone, tensors(agents[seed]))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_learns_what_eager_training_learns(precision):
    """Cloning one action for each state: after 2,000 updates both have the same loss, within a tenth."""
    losses = []
    for how in ("eager", "fused"):
        agent = make_agent(29, 8, hidden_dim=256, lr=1e-3, algo="bc")
        transitions = make_transitions(agent, 1000)
        update = (
            FusedUpdate(agent, transitions, 256, precision)
            if how == "fused"
            else dql.Updates([agent], transitions, 256)
        )
        update.run(1900)
        found = update.run(100)
        losses.append(float((found[0] if isinstance(found, list) else found)["bc_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.gpu
def test_a_million_transitions_and_an_agent_take_less_than_two_gigabytes():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    agent = make_agent(29, 8, hidden_dim=256, max_q_backup=True)
    transitions = make_transitions(agent, 1_000_000)
    FusedUpdate(agent, transitions, 256).run(100)
    assert torch.cuda.max_memory_allocated() - before < 2 << 30


def test_the_tile_does_not_depend_on_how_many_agents_there_are():
    agents = [make_agent(seed=seed) for seed in range(3)]
    tiles = {FusedUpdate(group, None, 8).launches.tile for group in (agents[0], agents)}
    assert tiles == {choose_update_tile("fp16", hidden_dim=128)}
