"""The launches of an update that go by rows: sample, fit and climb.

One Diffusion-QL update, for several agents at once (program_id(last axis) is the agent):

    sample            a' by the averaged policies and its target values; a⁰ by the policies
    fit               beside it: Q(s, a), dQ/du; the policy against the noise, forward and backward
    weight_gradients  of the critics, against r + γ·(1-done)·min Q'          (gradients.py)
    adam              clip, Adam, target average, packed copies              (optimizer.py)
    climb             Q(s, a⁰), dQ/da, and back through all T steps of the chain; critics' losses
    weight_gradients  of the policies
    time_gradient     of the time embedding's network                        (gradients.py)
    adam              as above
    finish            tables of the time embedding, metrics, step counts     (optimizer.py)

Q is a number, so the gradient of a critic's loss is that of Q times the error of each row: fit goes
back through the critics before the targets are known. So the chain of dependencies holds one pass
of the policy's chain forward and one backward. Rows (of the batch, in each timestep) stay within a
program, from the draw of the transition to the gradients of the pre-activations. These go through
L2 to the products over rows that make the weights' gradients: no atomics, sums in a fixed order, so
that two runs agree bit for bit.

Shapes, for n agents, B transitions, N target samples per state, R = (T + 1)·B rows of the policy:
first the B of cloning, then B for each iteration of the chain. Packed networks lie averaged before
current: policies [average, current], critics [both targets, both current] of agent 0, then of agent
1. Random numbers are a function of the agent's own seed, its step and the row, so that agents
neither see each other nor how the batch is cut.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .network import (
    Noise,
    Saved,
    Stream,
    Trace,
    chain_gradient,
    further,
    load_states,
    network,
    network_gradient,
    nth_network,
    reverse_chain,
    shift_weights,
    store_inputs,
)
from .ops import clamp, features, load_features, normals, rows, store_features

# What a random number is for: the third word of Philox's counter.
# The chain takes CHAIN to CHAIN + T.
TRANSITION, TIMESTEP, COIN, CLONING, CHAIN = (tl.constexpr(i) for i in range(5))


class Columns(NamedTuple):
    """The transitions to draw from, (n_transitions, ·) each; or given batches, (n, B, ·)."""

    state: torch.Tensor
    action: torch.Tensor
    next_state: torch.Tensor
    reward: torch.Tensor
    not_done: torch.Tensor


class CloningNoise(NamedTuple):
    """The noise of the cloning loss, where it is given and not drawn."""

    timesteps: torch.Tensor  # (n, B)
    noise: torch.Tensor  # (n, B, action_dim)


class Random(NamedTuple):
    """Where each agent's random numbers come from."""

    seeds: torch.Tensor  # (n,) int64
    steps: torch.Tensor  # (n,): updates so far


class Forward(NamedTuple):
    """The forward process: a_t = √ᾱ_t·a + √(1-ᾱ_t)·ε."""

    sqrt_alpha_bar: torch.Tensor  # (T,)
    sqrt_one_minus_alpha_bar: torch.Tensor  # (T,)


class Activations(NamedTuple):
    """What the weights' gradients of one kind of network are made of."""

    inputs: torch.Tensor  # policy (n, R, ·), critics (n, B, ·): see network.store_inputs()
    saved: Saved  # of (n, R, 3·H), (n, 2, B, 3·H)
    du: torch.Tensor  # like saved.u: its gradients
    dy: torch.Tensor  # (n, R, A), (n, 2, B, 16): gradients of the outputs


class Bellman(NamedTuple):
    """What the critics' errors are made of, see td_errors()."""

    q: torch.Tensor  # (n, 2, B): Q(s, a)
    target_values: torch.Tensor  # (n, 2, N·B): both target critics at a'
    reward: torch.Tensor  # (n, B)
    discount: torch.Tensor  # (n, B): γ·(1-done)


class Memory(NamedTuple):
    """What one launch leaves for a later one."""

    policy: Activations
    critic: Activations
    bellman: Bellman
    epsilons: torch.Tensor  # (n, R, A): ε_θ of the chain
    actions: torch.Tensor  # (n, B, A): a⁰, not yet clamped
    losses: torch.Tensor  # (n, 3, tiles): sums of squared errors: both critics, policy
    q_sums: torch.Tensor  # (n, 2, tiles): sums of Q_i and |Q_j|


class Counts(NamedTuple):
    """How many there are of what, as one compile-time constant."""

    targets: int  # N, target samples per state
    sides: int  # programs of a tile of them: 1, or 2 with a target critic each
    critics: int  # per agent: 2, or 0 if it only clones
    tiles: int  # of a batch
    norms: int  # programs that each leave a sum of squared gradients, of an agent's policy
    critic_norms: int  # and of its critics


@triton.jit
def _words(seed, draw, purpose, row):
    """32 random bits for each row, as uint32."""
    zero = row * 0
    word, _, _, _ = tl.philox(seed, row, zero, zero + purpose, zero + draw)
    return word


@triton.jit
def _below(word, n):
    """uint32 -> an integer within 0 to n - 1, uniform to n/2³²."""
    return ((word.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def _heads(seed, draw):
    """A fair coin."""
    return tl.max((_words(seed, draw, COIN, tl.arange(0, 16) * 0) >> 31).to(tl.int32), 0) == 1


@triton.jit
def _transitions(agent, row, seed, draw, n_transitions, B, GIVEN: tl.constexpr):
    """Which transition each row of the batch is: drawn uniformly with replacement, or given."""
    if GIVEN:
        index = agent.to(tl.int64) * B + row
    else:
        index = _below(_words(seed, draw, TRANSITION, row), n_transitions)
    return index


@triton.jit
def td_errors(bellman, agent, critic, b, valid, B, N: tl.constexpr):
    """Q_i(s, a) - (r + γ·(1-done)·min(Q'₁, Q'₂)(s', a')) of the batch's rows b; 0 if not valid.

    Q' are the largest of N samples of a', of those that are not NaN.
    """
    j = tl.arange(0, triton.next_power_of_2(N))
    values = bellman.target_values + 2 * agent * N * B + b[:, None] * N + j[None, :]
    known = valid[:, None] & (j < N)[None, :]
    q_1 = tl.max(tl.load(values, mask=known, other=float("-inf")), 1)
    q_2 = tl.max(tl.load(values + N * B, mask=known, other=float("-inf")), 1)
    least = tl.minimum(q_1, q_2, propagate_nan=tl.PropagateNan.ALL)
    reward = tl.load(bellman.reward + agent * B + b, mask=valid, other=0.0)
    discount = tl.load(bellman.discount + agent * B + b, mask=valid, other=0.0)
    q = tl.load(bellman.q + (2 * agent + critic) * B + b, mask=valid, other=0.0)
    return tl.where(valid, q - (reward + discount * least), 0.0)


@triton.jit(do_not_specialize=["n_transitions"])
def sample(
    data, n_transitions, noise, random, chain, nets, memory, B, zero,
    counts: tl.constexpr, sizes: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Programs (tile, agent): first tiles of N·B rows for targets, then tiles of B for the policy.

    With two sides each tile of targets is made twice, once for each critic. Leaves target_values,
    actions, and what the chain's gradient needs. noise: a Noise, (n, (N + 1)·B, action_dim) and
    (n, T, ...), the targets' rows first, with data that are batches; or None, to draw both. nets
    and sizes: of policies and critics.
    """
    N: tl.constexpr = counts.targets
    POLICY: tl.constexpr = sizes.policy
    CRITIC: tl.constexpr = sizes.critic
    A: tl.constexpr = POLICY.A
    H: tl.constexpr = POLICY.H
    T: tl.constexpr = POLICY.T
    ACTION_DIM: tl.constexpr = POLICY.action_dim
    TRANSPOSED: tl.constexpr = tile.transposed
    agent = tl.program_id(1)
    target_tiles = tl.cdiv(N * B, tile.rows)
    side, part = tl.program_id(0) // target_tiles, tl.program_id(0) % target_tiles
    current = side >= counts.sides
    part = tl.where(current, tl.program_id(0) - counts.sides * target_tiles, part)
    r = part * tile.rows + tl.arange(0, tile.rows)
    valid = r < tl.where(current, B, N * B)
    row = tl.where(current, N * B, 0) + r
    b = tl.where(current, r, r // N)
    seed, draw = tl.load(random.seeds + agent), tl.load(random.steps + agent).to(tl.int32)
    index = _transitions(agent, b, seed, draw, n_transitions, B, noise is not None)
    if current:
        s = load_states(data.state, index, valid, POLICY, tile)
    else:
        s = load_states(data.next_state, index, valid, POLICY, tile)
    n_rows = (N + 1) * B
    R, wide = (T + 1) * B, agent.to(tl.int64)
    own_noise = None
    if noise is not None:
        x_T = noise.x_T + wide * n_rows * ACTION_DIM
        own_noise = Noise(x_T, noise.noises + wide * T * n_rows * ACTION_DIM)
    trace = Trace(
        memory.policy.inputs + wide * R * POLICY.inputs,
        further(memory.policy.saved, wide * R * 3 * H),
        memory.epsilons + wide * R * A,
        B + b, B, valid & current,
    )  # fmt: skip
    net = nth_network(nets.policy, 2 * agent + tl.where(current, 1, 0), POLICY)
    stream = Stream(seed, draw, CHAIN)
    x = reverse_chain(
        s, own_noise, stream, row, valid, n_rows, chain, net, zero, POLICY, tile, trace
    )
    a = tl.arange(0, A)
    store_features(memory.actions + agent * B * A, b, a, A, x, trace.mask, TRANSPOSED)
    if not current:
        x = clamp(x, chain.max_action)
        EACH: tl.constexpr = 2 // counts.sides
        for k in tl.range(side * EACH, side * EACH + EACH):
            q_net = nth_network(nets.critic, 4 * agent + k, CRITIC)
            y = network(s, x, shift_weights(q_net, k * zero), CRITIC, tile)
            values = memory.bellman.target_values + (2 * agent + k) * N * B
            tl.store(values + r, tl.sum(y, 0 if TRANSPOSED else 1), mask=valid)


@triton.jit
def _first_output(valid, sizes: tl.constexpr, tile: tl.constexpr):
    """The gradient (ROWS, OUT) of the sum of the first outputs of the valid rows."""
    out = tl.arange(0, sizes.OUT)
    first = features(out == 0, tile.transposed) & rows(valid, tile.transposed)
    return tl.where(first, 1.0, 0.0)


@triton.jit(do_not_specialize=["n_transitions"])
def fit(
    data, n_transitions, cloning, random, forward, discount, nets, memory, B, zero,
    counts: tl.constexpr, sizes: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Programs (tile, network, agent): networks 0 and 1 are the critics, if any; then the policy.

    Needs nothing of this update, so that it runs beside sample. Of the critics it leaves Q(s, a)
    and du, the gradient of the sum of Q over the batch: weight_gradients() multiplies its rows by
    td_errors(). Of the policy du and dy, gradients of the sum of squared errors of ε_θ(a_t, t, s)
    against ε, of which weight_gradients() makes those of a mean. cloning: a CloningNoise, with data
    that are batches; or None, to draw both.
    """
    POLICY: tl.constexpr = sizes.policy
    CRITIC: tl.constexpr = sizes.critic
    A: tl.constexpr = POLICY.A
    H: tl.constexpr = POLICY.H
    T: tl.constexpr = POLICY.T
    ACTION_DIM: tl.constexpr = POLICY.action_dim
    TRANSPOSED: tl.constexpr = tile.transposed
    part, which, agent = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = part * tile.rows + tl.arange(0, tile.rows)
    valid = b < B
    seed, draw = tl.load(random.seeds + agent), tl.load(random.steps + agent).to(tl.int32)
    index = _transitions(agent, b, seed, draw, n_transitions, B, cloning is not None)
    s = load_states(data.state, index, valid, POLICY, tile)
    a = tl.arange(0, A)
    within = features(a < ACTION_DIM, TRANSPOSED) & rows(valid, TRANSPOSED)
    where = rows(index, TRANSPOSED) * ACTION_DIM + features(a, TRANSPOSED)
    x = tl.load(data.action + where, mask=within, other=0.0)
    wide = agent.to(tl.int64)
    if which < counts.critics:
        own = (2 * wide + which) * B
        saved = further(memory.critic.saved, own * 3 * H)
        if which == 0:
            reward = tl.load(data.reward + index, mask=valid, other=0.0)
            not_done = tl.load(data.not_done + index, mask=valid, other=0.0)
            tl.store(memory.bellman.reward + wide * B + b, reward, mask=valid)
            tl.store(memory.bellman.discount + wide * B + b, discount * not_done, mask=valid)
            inputs = memory.critic.inputs + wide * B * CRITIC.inputs
            store_inputs(inputs, b, valid, s, x, b, CRITIC, tile)
        net = nth_network(nets.critic, 4 * agent + 2 + which, CRITIC)
        net = shift_weights(net, zero)
        q = network(s, x, net, CRITIC, tile, saved, b, valid)
        tl.store(memory.bellman.q + own + b, tl.sum(q, 0 if TRANSPOSED else 1), mask=valid)
        dq, du = _first_output(valid, CRITIC, tile), memory.critic.du + own * 3 * H
        network_gradient(dq, net, saved.u, du, b, valid, CRITIC, tile)
    else:
        if cloning is None:
            t = _below(_words(seed, draw, TIMESTEP, b), tl.full([], T, tl.int32)).to(tl.int32)
            z = normals(seed, draw, CLONING, b, A)
            if TRANSPOSED:
                z = tl.trans(z)
            z = tl.where(within, z, 0.0)
        else:
            t = tl.load(cloning.timesteps + agent * B + b, mask=valid, other=0).to(tl.int32)
            at = (wide * B + rows(b, TRANSPOSED)) * ACTION_DIM + features(a, TRANSPOSED)
            z = tl.load(cloning.noise + at, mask=within, other=0.0)
        signal = rows(tl.load(forward.sqrt_alpha_bar + t), TRANSPOSED)
        spread = rows(tl.load(forward.sqrt_one_minus_alpha_bar + t), TRANSPOSED)
        x = signal * x + spread * z
        R = (T + 1) * B
        saved = further(memory.policy.saved, wide * R * 3 * H)
        du = memory.policy.du + wide * R * 3 * H
        inputs = memory.policy.inputs + wide * R * POLICY.inputs
        store_inputs(inputs, b, valid, s, x, t, POLICY, tile)
        net = shift_weights(nth_network(nets.policy, 2 * agent + 1, POLICY), zero)
        y = network(s, x, net, POLICY, tile, saved, b, valid, t)
        e = tl.where(within, y - z, 0.0)
        losses = memory.losses + (3 * agent + 2) * counts.tiles
        tl.store(losses + part, tl.sum(tl.sum(e * e, 1), 0))
        dy = memory.policy.dy + wide * R * A
        store_features(dy, b, a, A, 2.0 * e, valid, TRANSPOSED)
        network_gradient(2.0 * e, net, saved.u, du, b, valid, POLICY, tile)


@triton.jit(do_not_specialize=["n_transitions"])
def climb(
    data, n_transitions, coin, random, chain, nets, memory, B, zero,
    counts: tl.constexpr, sizes: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Programs (tile, role, agent). A coin chooses critic i for the actor to climb; j is the other.

    Role 0: gradients of the sum over the batch of Q_i(s, a⁰) with respect to the chain's
    pre-activations. Role 1: Q_j(s, a⁰), and the critics' losses, since it has time. Both leave
    their sums in values, of which weight_gradients() makes -η·mean Q_i / mean |Q_j|, since a
    gradient is linear.

    coin (n,): above 0.5 to climb the first critic, with data that are batches; or None, to draw
    both.
    """
    POLICY: tl.constexpr = sizes.policy
    CRITIC: tl.constexpr = sizes.critic
    A: tl.constexpr = POLICY.A
    H: tl.constexpr = POLICY.H
    TRANSPOSED: tl.constexpr = tile.transposed
    part, role, agent = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = part * tile.rows + tl.arange(0, tile.rows)
    valid = b < B
    seed, draw = tl.load(random.seeds + agent), tl.load(random.steps + agent).to(tl.int32)
    index = _transitions(agent, b, seed, draw, n_transitions, B, coin is not None)
    s = load_states(data.state, index, valid, POLICY, tile)
    if coin is None:
        heads = _heads(seed, draw)
    else:
        heads = tl.load(coin + agent) > 0.5
    a, wide = tl.arange(0, A), agent.to(tl.int64)
    unclamped = load_features(memory.actions + agent * B * A, b, a, A, valid, TRANSPOSED)
    x = clamp(unclamped, chain.max_action)
    q_net = nth_network(nets.critic, 4 * agent + 2 + tl.where(heads, role, 1 - role), CRITIC)
    q_net = shift_weights(q_net, zero)
    # What the critics' own gradients needed is no longer needed. (Nobody reads h from here.)
    q_saved = further(memory.critic.saved, 2 * wide * B * 3 * H)
    y = network(s, x, q_net, CRITIC, tile, q_saved, b, valid & (role == 0))
    q = tl.where(valid, tl.sum(y, 0 if TRANSPOSED else 1), 0.0)
    values = memory.q_sums + (2 * agent + role) * counts.tiles
    tl.store(values + part, tl.sum(tl.where(role == 0, q, tl.abs(q)), 0))
    if role == 0:
        dq = _first_output(valid, CRITIC, tile)
        g = network_gradient(dq, q_net, q_saved.u, None, b, valid, CRITIC, tile)
        g = tl.where(tl.abs(unclamped) <= chain.max_action, g, 0.0)
        R = (POLICY.T + 1) * B
        trace = Trace(
            memory.policy.inputs + wide * R * POLICY.inputs,
            further(memory.policy.saved, wide * R * 3 * H),
            memory.epsilons + wide * R * A,
            B + b, B, valid,
        )  # fmt: skip
        du = memory.policy.du + wide * R * 3 * H
        dy = memory.policy.dy + wide * R * A
        net = nth_network(nets.policy, 2 * agent + 1, POLICY)
        chain_gradient(g, trace, du, dy, chain, net, zero, POLICY, tile)
    else:
        for k in tl.static_range(0, 2):
            miss = td_errors(memory.bellman, agent, k, b, valid, B, counts.targets)
            losses = memory.losses + (3 * agent + k) * counts.tiles
            tl.store(losses + part, tl.sum(miss * miss, 0))
