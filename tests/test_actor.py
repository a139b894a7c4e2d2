"""kernels/actor.py: candidates and values against float64, the choice against softmax of Q."""

import copy
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

triton = pytest.importorskip("triton", reason="triton has no package for this platform")
import hopper  # noqa: E402
import triton.language as tl  # noqa: E402
from reference import (  # noqa: E402
    DEVICE,
    actor_tile,
    critic_at,
    eager_at,
    error,
    exact,
    make_batch,
    make_critic,
    make_noise,
    make_policy,
    needs_interpreter,
)

from bench.rounding import allowed  # noqa: E402
from dql import DiffusionQL  # noqa: E402
from kernels import FusedActor, UnsupportedError  # noqa: E402
from kernels.ops import gumbels  # noqa: E402
from kernels.packing import HIDDEN_DIMS, PRECISIONS  # noqa: E402
from kernels.tiles import choose_actor_tile  # noqa: E402

# states, candidates, state, action, hidden, T; enough states that no error is one number's luck.
SIZES = [
    (4, 50, 29, 8, 128, 2),
    (6, 17, 11, 3, 256, 2),
    (3, 65, 17, 6, 128, 1),
    (24, 1, 60, 9, 128, 2),
    (6, 3, 45, 24, 512, 1),
]


def make_gumbel(n_states, n_candidates, seed=2):
    g = torch.Generator().manual_seed(seed)
    return -torch.empty(n_states, n_candidates).exponential_(generator=g).log().to(DEVICE)


def make_inputs(policy, n_states, n_candidates):
    _, x_T, noises = make_noise(policy, n_states * n_candidates)
    return make_noise(policy, n_states, seed=5)[0], x_T, noises, make_gumbel(n_states, n_candidates)


def chosen(actor, best):
    """Of each state the candidate whose number is in best."""
    n_states = len(best)
    return actor.candidates.view(n_states, actor.n_candidates, -1)[torch.arange(n_states), best]


def assert_decisions_are_right(sizes, precision, gain, size, limit):
    """Candidates and values err at most limit times as much as eager ones at the same precision.

    And the action is the candidate that they and the Gumbel noise choose.
    """
    n_states, n_candidates, state_dim, action_dim, hidden_dim, T = sizes
    policy = make_policy(state_dim, action_dim, hidden_dim=hidden_dim, n_timesteps=T, gain=gain)
    critic = make_critic(state_dim, action_dim, hidden_dim=hidden_dim, gain=gain)
    state, x_T, noises, gumbel = make_inputs(policy, n_states, n_candidates)
    actor = FusedActor(policy, critic, n_candidates, precision)
    tile = actor_tile(size, n_candidates, precision, hidden_dim)
    action = actor(state, x_T, noises, gumbel, tile=tile)

    repeated = state.repeat_interleave(n_candidates, 0)
    expected = exact(policy, repeated, x_T, noises)
    eager = error(eager_at(policy, precision, repeated, x_T, noises), expected)
    assert error(actor.candidates, expected) <= limit * eager
    # The critic is judged on the fused candidates, or it would inherit their error.
    exact_critic = copy.deepcopy(critic).double()
    exact_q = torch.minimum(*exact_critic(repeated.double(), actor.candidates.double()))[:, 0]
    eager = error(critic_at(critic, precision, repeated, actor.candidates), exact_q)
    if DEVICE == "cuda" and precision == "fp32":
        # Kernels add one product after the other, cuBLAS in parts: that error grows with the root
        # of their number. On an H100 values of 512 hidden units err 4.3 times as much.
        limit *= max(1.0, hidden_dim / 256) ** 0.5
    assert error(actor.values, exact_q) <= limit * eager
    best = (actor.values.view(n_states, n_candidates) + gumbel).argmax(1)
    assert torch.equal(action, chosen(actor, best))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "sizes, gain, size",
    [
        *((sizes, 1.0, "small") for sizes in SIZES),
        *((sizes, *how) for sizes in SIZES[1:3] for how in ((3.0, "small"), (1.0, "large"))),
    ],
)
def test_candidates_and_values_are_about_as_exact_as_eager_ones(sizes, precision, gain, size):
    assert_decisions_are_right(sizes, precision, gain, size, allowed(precision, DEVICE == "cuda"))


@needs_interpreter
@pytest.mark.parametrize("precision", PRECISIONS)
def test_decisions_are_right_in_hoppers_arithmetic(precision, monkeypatch):
    hopper.install(monkeypatch)
    assert_decisions_are_right(SIZES[0], precision, 1.0, "small", allowed(precision, on_gpu=True))


def test_policy_and_critic_may_differ_in_width():
    policy, critic = make_policy(hidden_dim=128), make_critic(hidden_dim=256)
    state, x_T, noises, gumbel = make_inputs(policy, 2, 5)
    actor = FusedActor(policy, critic, 5, "fp32")
    actor(state, x_T, noises, gumbel)
    q = torch.minimum(*critic(state.repeat_interleave(5, 0), actor.candidates))[:, 0]
    torch.testing.assert_close(actor.values, q, rtol=1e-5, atol=1e-6)


def test_a_greedy_actor_takes_the_best_candidate():
    policy, critic = make_policy(), make_critic(gain=3.0)
    state, x_T, noises, _ = make_inputs(policy, 3, 20)
    actor = FusedActor(policy, critic, 20, greedy=True)
    action = actor(state, x_T, noises)
    assert torch.equal(action, chosen(actor, actor.values.view(3, 20).argmax(1)))


@triton.jit
def draw_gumbels(out, seed, call, step, N: tl.constexpr):
    row = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + row, gumbels(seed, call, step, row))


def drawn_gumbels(n, seed=7, call=0, step=1, block=1024):
    out = torch.empty(triton.cdiv(n, block) * block, device=DEVICE)
    draw_gumbels[(len(out) // block,)](out, seed, call, step, N=block)
    return out[:n]


def test_drawn_gumbel_noise_has_the_gumbel_distribution():
    """And is independent of that of other calls, steps and rows."""
    n = 1 << 15
    drawn = [drawn_gumbels(n, call=call, step=step) for call in (0, 1) for step in (1, 6)]
    for out in drawn:
        cumulative = torch.exp(-torch.exp(-out.double().sort().values)).cpu()
        ranks = torch.arange(n + 1) / n
        distance = max((ranks[1:] - cumulative).max(), (cumulative - ranks[:-1]).max())
        assert distance * n**0.5 < 1.95  # Kolmogorov-Smirnov at 0.1 %
    correlations = torch.corrcoef(torch.stack([*drawn, drawn[0].roll(1)])).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / n**0.5


def test_a_choice_is_the_argmax_of_value_and_drawn_gumbel_noise():
    policy, critic = make_policy(n_timesteps=1), make_critic(gain=3.0)
    n_states, n, unmoved = 4, 16, 0
    actor = FusedActor(policy, critic, n, seed=3)
    state = make_noise(policy, n_states)[0]
    for call in range(2):
        action = actor(state)
        values = actor.values.view(n_states, n)
        gumbel = drawn_gumbels(n_states * n, seed=3, call=call, step=policy.n_timesteps + 1)
        best = (values + gumbel.view(n_states, n)).argmax(1)
        assert torch.equal(action, chosen(actor, best))
        unmoved += int((best == values.argmax(1)).sum())
    assert unmoved < 2 * n_states, "the noise never mattered"


def test_drawn_gumbel_noise_picks_values_as_softmax_does():
    q, n = torch.tensor([0.0, -1.0, 2.0, 0.5], device=DEVICE), 1 << 13
    counts = torch.bincount((q + drawn_gumbels(4 * n).view(n, 4)).argmax(1), minlength=4)
    expected = n * torch.softmax(q.double(), 0)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 16.27, f"{counts.tolist()}, expected {expected.tolist()}"  # 0.1 %


def test_draws_depend_neither_on_the_tile_nor_on_other_states():
    policy, critic = make_policy(29, 8, n_timesteps=2), make_critic(29, 8)
    state = make_noise(policy, 3)[0]
    actor = FusedActor(policy, critic, 20, "fp32")
    small, large = (actor_tile(size, 20, "fp32") for size in ("small", "large"))
    actions = actor(state, seed=3, tile=small)
    torch.testing.assert_close(actions, actor(state, seed=3, tile=large), rtol=0, atol=2e-5)
    assert torch.equal(actions[:2], actor(state[:2], seed=3, tile=small))


def test_calls_differ_and_a_seed_repeats():
    policy, critic = make_policy(n_timesteps=2), make_critic()
    state = make_noise(policy, 3)[0]
    actor = FusedActor(policy, critic, 10)
    first, second = actor(state), actor(state)
    assert (first - second).abs().mean() > 0.05
    assert torch.equal(actor(state, seed=3), actor(state, seed=3))
    assert torch.equal(FusedActor(policy, critic, 10)(state), first)  # another of the same seed


def test_every_action_is_written_and_nothing_past_the_end():
    policy, critic = make_policy(17, 6), make_critic(17, 6)
    actor = FusedActor(policy, critic, 20)
    memory = torch.full((9, 6), math.nan, device=DEVICE)
    actor.candidates = torch.full((100, 6), math.nan, device=DEVICE)
    actor.values = torch.full((100,), math.nan, device=DEVICE)
    actor.done = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    actor(make_noise(policy, 3)[0], out=memory[2:5])
    assert memory[2:5].isfinite().all() and memory[:2].isnan().all() and memory[5:].isnan().all()
    assert actor.candidates[:60].isfinite().all() and actor.candidates[60:].isnan().all()
    assert actor.values[:60].isfinite().all() and actor.values[60:].isnan().all()
    assert not actor.done.any()  # ready for the next call


def test_networks_changed_after_packing_are_packed_again():
    policy, critic = make_policy(), make_critic()
    state, x_T, noises, gumbel = make_inputs(policy, 2, 10)
    actor = FusedActor(policy, critic, 10, "fp32")
    actor(state, x_T, noises, gumbel)
    before = actor.values.clone()
    critic.q1_model[-1].bias += 1.0
    critic.q2_model[-1].bias += 1.0
    actor(state, x_T, noises, gumbel)
    torch.testing.assert_close(actor.values, before + 1, rtol=1e-5, atol=1e-5)


def test_updates_of_an_agent_reach_its_actor():
    """Though its fused Adam raises no version counter."""
    agent = DiffusionQL(11, 3, hidden_dim=128, lr=1e-2, critic_lr=1e-2, tau=0.5, device=DEVICE)
    state, x_T, noises, gumbel = make_inputs(agent.policy, 2, 10)
    actor = FusedActor(agent.policy, agent.critic_target, 10, "fp32")
    actor(state, x_T, noises, gumbel)
    before = actor.candidates.clone()
    agent.update(make_batch(agent, 32))
    actor(state, x_T, noises, gumbel)
    assert not torch.equal(actor.candidates, before)
    repeated = state.repeat_interleave(10, 0)
    expected = agent.policy.sample(repeated, x_T=x_T, noises=noises).detach()
    torch.testing.assert_close(actor.candidates, expected, rtol=0, atol=2e-5)
    q = torch.minimum(*agent.critic_target(repeated, actor.candidates))[:, 0]
    torch.testing.assert_close(actor.values, q, rtol=1e-5, atol=1e-5)


def test_a_value_of_nan_makes_the_action_of_its_state_alone_nan():
    policy, critic = make_policy(), make_critic()
    state = make_noise(policy, 3)[0]
    state[1, 0] = math.nan
    action = FusedActor(policy, critic, 10)(state)
    assert action[1].isnan().all()
    assert action[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "n_states, n_candidates", [(1, 1), (1, 50), (100, 50), (4096, 50), (4096, 200)]
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiles_have_at_most_64_rows(n_states, n_candidates, precision):
    """The rows of a program belong to one state."""
    for arch in (80, 90, 100):
        for hidden_dim in HIDDEN_DIMS:
            assert choose_actor_tile(n_states, n_candidates, precision, arch, hidden_dim).rows <= 64


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, x, z, g: (s[:, :-1].contiguous(), x, z, g), r"state is \(4, 10\).*\(4, 11\)"),
        (lambda s, x, z, g: (s, x, None, g), "together"),
        (lambda s, x, z, g: (s, x, z, None), "gumbel is given where"),
        (lambda s, x, z, g: (s, None, None, g), "gumbel is given where"),
        (lambda s, x, z, g: (s, x[:-1], z, g), r"x_T is \(19, 3\).*\(20, 3\)"),
        (lambda s, x, z, g: (s, x, z[:, 1:].contiguous(), g), "noises is"),
        (lambda s, x, z, g: (s, x, z, g.double()), "gumbel is.*float64"),
        (lambda s, x, z, g: (s.t().contiguous().t(), x, z, g), "contiguous"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(change, message):
    policy = make_policy()
    with pytest.raises(UnsupportedError, match=message):
        FusedActor(policy, make_critic(), 5)(*change(*make_inputs(policy, 4, 5)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FusedActor(make_policy(), make_critic(), 0), "n_candidates 0"),
        (lambda: FusedActor(make_policy(), make_critic(12, 3)), r"\(12, 3\).*\(11, 3\)"),
        (lambda: FusedActor(make_policy(), make_critic(hidden_dim=100)), "hidden_dim 100"),
        (lambda: FusedActor(make_policy(), make_critic().to("meta")), "meta"),
        (lambda: FusedActor(make_policy(), make_critic(gain=math.nan)), "critic hold NaN"),
    ],
)
def test_networks_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UnsupportedError, match=message):
        make()


SANITIZED = """
import torch, kernels
from dql import DiffusionQL
agent = DiffusionQL(11, 3, hidden_dim=128, device="cuda")
kernels.FusedSampler(agent.policy)(torch.randn(50, 11, device="cuda"))
kernels.FusedSampler(agent.policy)(torch.randn(5000, 11, device="cuda"))
kernels.FusedActor(agent.policy, agent.critic, 50)(torch.randn(3, 11, device="cuda"))
batch = [torch.randn(100, n, device="cuda") for n in (11, 3, 11, 1, 1)]
kernels.FusedUpdate(agent, None, 100).step(batch, agent.draw_noise(100))
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(
    not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not installed"
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    # Errors of the API are not the kernels': torch probes for what a driver may lack.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    options += ["--tool", tool, "--error-exitcode", "3"]
    command = ["compute-sanitizer", *options, sys.executable, "-c", SANITIZED]
    # Without caching each tensor has bounds of its own.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
        )
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer was not done after 110 s")
    assert done.returncode == 0, done.stdout[-3000:]
