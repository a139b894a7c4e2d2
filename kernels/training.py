"""The launches of one Diffusion-QL update, for several agents at once: program_id(last axis) is the agent.

    sample            a' by the averaged policies and its target values; a⁰ by the policies, leaving what its gradient needs
    fit               both critics against r + γ·(1-done)·min Q', and the policy against the noise: forward and backward
    weight_gradients  of the critics
    adam              clip, Adam, target average, packed copies
    climb             Q(s, a⁰), dQ/da, and back through all T steps of the chain
    weight_gradients  of the policies
    time_gradient     of the time embedding's network
    adam              as above
    finish            tables of the time embedding, metrics, step counts

What only depends on the policy (its samples, its cloning loss) is done in the first two launches, beside the critics' part, so
that the chain of dependencies holds one pass of the chain forward and one backward. Rows (of the batch, in each timestep) stay
within a program, from the draw of the transition to the gradients of the pre-activations; these go through L2 to the products
over rows that make the weights' gradients: no atomics, sums in a fixed order, so that two runs agree bit for bit.

Shapes, for n agents, B transitions, N target samples per state, R = (T + 1)·B rows of the policy: first the B of cloning, then B
for each iteration of the chain. Packed networks lie averaged before current: policies [average, current], critics [both
targets, both current] of agent 0, then of agent 1. A function of the agent's own seed, its step and the row is all that
random numbers are, so agents neither see each other nor how the batch is cut.
"""

import triton
import triton.language as tl

from .network import chain_gradient, load_states, network, network_gradient, reverse_chain
from .ops import (
    clamp,
    features,
    load_features,
    mish,
    mish_slope,
    normals,
    operand,
    power_of_two,
    rows,
    store_features,
    store_inputs,
    to_tf32,
)

# What a random number is for: the third word of Philox's counter. The chain takes CHAIN to CHAIN + T.
TRANSITION, TIMESTEP, COIN, CLONING, CHAIN = (tl.constexpr(i) for i in range(5))
LOG2E = tl.constexpr(1.4426950408889634)


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
def _transitions(agent, b, seed, draw, n_transitions, B, GIVEN: tl.constexpr):
    """Which transition each row b of the batch is: drawn uniformly with replacement, or row b of the agent's given batch."""
    if GIVEN:
        index = agent.to(tl.int64) * B + b
    else:
        index = _below(_words(seed, draw, TRANSITION, b), n_transitions)
    return index


@triton.jit(do_not_specialize=["n_transitions"])
def sample(
    state, next_state, n_transitions, x_T, noises, seeds, steps, zero, coefficients, bias, max_action, weights, weights_low,
    q_bias, q_weights, q_weights_low, target_values, inputs, saved, epsilons, actions, B,
    N: tl.constexpr, STATE_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, T: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs (tile, agent): first tiles of N·B rows for the targets, then tiles of B rows for the policy.

    Noise is given as x_T (n, (N + 1)·B, ACTION_DIM) and noises (n, T, ...), the targets' rows first. target_values (n, 2, N·B);
    actions (n, B, A), not yet clamped; inputs (n, R, ·), saved (n, R, 3·H), epsilons (n, R, A).
    """
    agent = tl.program_id(1)
    target_tiles = tl.cdiv(N * B, ROWS)
    current = tl.program_id(0) >= target_tiles
    first = tl.where(current, (tl.program_id(0) - target_tiles) * ROWS, tl.program_id(0) * ROWS)
    r = first + tl.arange(0, ROWS)
    valid = r < tl.where(current, B, N * B)
    row = tl.where(current, N * B, 0) + r
    b = tl.where(current, r, r // N)
    seed, draw = tl.load(seeds + agent), tl.load(steps + agent).to(tl.int32)
    index = _transitions(agent, b, seed, draw, n_transitions, B, GIVEN)
    if current:
        st = load_states(state, index, valid, STATE_DIM, S, PRECISION, TURNED)
    else:
        st = load_states(next_state, index, valid, STATE_DIM, S, PRECISION, TURNED)
    n_rows = (N + 1) * B
    BLOCK: tl.constexpr = H * (S + A + 2 * H + A)
    TIMES: tl.constexpr = (T + 15) // 16 * 16
    which = 2 * agent + tl.where(current, 1, 0)
    R, wide = (T + 1) * B, agent.to(tl.int64)
    keep = valid & current
    x = reverse_chain(
        st, x_T + wide * n_rows * ACTION_DIM, noises + wide * T * n_rows * ACTION_DIM, seed, draw, row, valid, n_rows, zero,
        coefficients, bias + which * T * (3 * H + A), max_action, weights + which * BLOCK, weights_low + which * BLOCK,
        ACTION_DIM, T, GIVEN, ROWS, S, A, H, CHUNK, SCALE, PRECISION, TURNED, STAGES,
        CHAIN, saved + wide * R * 3 * H, inputs + wide * R * (S + A + TIMES), epsilons + wide * R * A, B + b, B, keep,
    )  # fmt: skip
    store_features(actions + agent * B * A, b, tl.arange(0, A), A, x, keep, TURNED)
    if not current:
        Q_BLOCK: tl.constexpr = H * (S + A + 2 * H + 16)
        x = clamp(x, max_action)
        for k in tl.range(0, 2):
            q_which = 4 * agent + k
            y = network(
                st, x, q_bias + q_which * (3 * H + 16), q_weights + q_which * Q_BLOCK, q_weights_low + q_which * Q_BLOCK,
                k * zero, ROWS, S, A, H, 16, CHUNK, SCALE, PRECISION, TURNED, STAGES,
            )  # fmt: skip
            tl.store(target_values + (2 * agent + k) * N * B + r, tl.sum(y, 0 if TURNED else 1), mask=valid)


@triton.jit(do_not_specialize=["n_transitions"])
def fit(
    state, action, reward, not_done, n_transitions, timesteps, noise, seeds, steps, zero, discount, sqrt_alpha_bar,
    sqrt_one_minus_alpha_bar, bias, weights, weights_low, q_bias, q_weights, q_weights_low, target_values,
    inputs, saved, du, dy, q_inputs, q_saved, q_du, q_dy, losses, B,
    N: tl.constexpr, N_PADDED: tl.constexpr, CRITICS: tl.constexpr, TILES: tl.constexpr,
    STATE_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, T: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs (tile, network, agent): networks 0 and 1 of CRITICS = 2 are the critics, the last one is the policy.

    Squared errors: of Q(s, a) against the Bellman target, and of ε_θ(√ᾱ·a + √(1-ᾱ)·ε, t, s) against ε. du and dy are gradients of
    the sum over the batch and the action's numbers; weight_gradients() makes it a mean. losses (n, 3, TILES) gets a tile's sums.
    q_inputs (n, B, S + A), q_saved and q_du (n, 2, B, 3·H), q_dy (n, 2, B, 16); the policy's as in sample(), dy (n, R, A).
    """
    tile, which, agent = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = tile * ROWS + tl.arange(0, ROWS)
    valid = b < B
    seed, draw = tl.load(seeds + agent), tl.load(steps + agent).to(tl.int32)
    index = _transitions(agent, b, seed, draw, n_transitions, B, GIVEN)
    st = load_states(state, index, valid, STATE_DIM, S, PRECISION, TURNED)
    a = tl.arange(0, A)
    within = features(a < ACTION_DIM, TURNED) & rows(valid, TURNED)
    x = tl.load(action + rows(index, TURNED) * ACTION_DIM + features(a, TURNED), mask=within, other=0.0)
    wide = agent.to(tl.int64)
    if which < CRITICS:
        r, nd = tl.load(reward + index, mask=valid, other=0.0), tl.load(not_done + index, mask=valid, other=0.0)
        j = tl.arange(0, N_PADDED)
        values = target_values + 2 * agent * N * B + b[:, None] * N + j[None, :]
        known = valid[:, None] & (j < N)[None, :]
        q_1 = tl.max(tl.load(values, mask=known, other=float("-inf")), 1)
        q_2 = tl.max(tl.load(values + N * B, mask=known, other=float("-inf")), 1)
        target = r + discount * nd * tl.minimum(q_1, q_2, propagate_nan=tl.PropagateNan.ALL)
        Q_BLOCK: tl.constexpr = H * (S + A + 2 * H + 16)
        q_which, own = 4 * agent + 2 + which, (2 * wide + which) * B
        block, low = q_weights + q_which * Q_BLOCK, q_weights_low + q_which * Q_BLOCK
        if which == 0:
            store_inputs(q_inputs + wide * B * (S + A), b, valid, st, x, b, ROWS, S, A, 0, TURNED)
        q = network(
            st, x, q_bias + q_which * (3 * H + 16), block, low, zero,
            ROWS, S, A, H, 16, CHUNK, SCALE, PRECISION, TURNED, STAGES, q_saved + own * 3 * H, b, valid,
        )  # fmt: skip
        miss = tl.where(valid, tl.sum(q, 0 if TURNED else 1) - target, 0.0)
        tl.store(losses + (3 * agent + which) * TILES + tile, tl.sum(miss * miss, 0))
        out = tl.arange(0, 16)
        dq = tl.where(features(out == 0, TURNED), rows(2.0 * miss, TURNED), 0.0)
        store_features(q_dy + own * 16, b, out, 16, dq, valid, TURNED)
        network_gradient(
            dq, q_saved + own * 3 * H, q_du + own * 3 * H, b, valid, block, low, zero,
            ROWS, S, A, H, 16, CHUNK, SCALE, PRECISION, TURNED, STAGES,
        )  # fmt: skip
    else:
        if GIVEN:
            t = tl.load(timesteps + agent * B + b, mask=valid, other=0).to(tl.int32)
            z = tl.load(noise + (wide * B + rows(b, TURNED)) * ACTION_DIM + features(a, TURNED), mask=within, other=0.0)
        else:
            t = _below(_words(seed, draw, TIMESTEP, b), tl.full([], T, tl.int32)).to(tl.int32)
            z = normals(seed, draw, CLONING, b, A)
            if TURNED:
                z = tl.trans(z)
            z = tl.where(within, z, 0.0)
        x = rows(tl.load(sqrt_alpha_bar + t), TURNED) * x + rows(tl.load(sqrt_one_minus_alpha_bar + t), TURNED) * z
        BLOCK: tl.constexpr = H * (S + A + 2 * H + A)
        TIMES: tl.constexpr = (T + 15) // 16 * 16
        R, p_which = (T + 1) * B, 2 * agent + 1
        block, low = weights + p_which * BLOCK, weights_low + p_which * BLOCK
        activations, gradients = saved + wide * R * 3 * H, du + wide * R * 3 * H
        store_inputs(inputs + wide * R * (S + A + TIMES), b, valid, st, x, t, ROWS, S, A, T, TURNED)
        y = network(
            st, x, bias + p_which * T * (3 * H + A), block, low, zero,
            ROWS, S, A, H, A, CHUNK, SCALE, PRECISION, TURNED, STAGES, activations, b, valid, t,
        )  # fmt: skip
        e = tl.where(within, y - z, 0.0)
        tl.store(losses + (3 * agent + 2) * TILES + tile, tl.sum(tl.sum(e * e, 1), 0))
        store_features(dy + wide * R * A, b, a, A, 2.0 * e, valid, TURNED)
        network_gradient(
            2.0 * e, activations, gradients, b, valid, block, low, zero,
            ROWS, S, A, H, A, CHUNK, SCALE, PRECISION, TURNED, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_transitions"])
def climb(
    state, n_transitions, coin, seeds, steps, zero, coefficients, max_action, weights, weights_low,
    q_bias, q_weights, q_weights_low, q_saved, inputs, saved, epsilons, actions, du, dy, values, B,
    TILES: tl.constexpr, STATE_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, T: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs (tile, role, agent). Role 0: gradients of the sum over the batch of Q_i(s, a⁰) with respect to the chain's
    pre-activations; i is the coin's choice. Role 1: Q_j(s, a⁰) of the other critic.

    values (n, 2, TILES) gets a tile's sums of Q_i and |Q_j|. weight_gradients() makes -η·mean Q_i / mean |Q_j| of it, since a
    gradient is linear.
    """
    tile, role, agent = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = tile * ROWS + tl.arange(0, ROWS)
    valid = b < B
    seed, draw = tl.load(seeds + agent), tl.load(steps + agent).to(tl.int32)
    index = _transitions(agent, b, seed, draw, n_transitions, B, GIVEN)
    st = load_states(state, index, valid, STATE_DIM, S, PRECISION, TURNED)
    if GIVEN:
        heads = tl.load(coin + agent) > 0.5
    else:
        heads = _heads(seed, draw)
    a, out, wide = tl.arange(0, A), tl.arange(0, 16), agent.to(tl.int64)
    unclamped = load_features(actions + agent * B * A, b, a, A, valid, TURNED)
    x = clamp(unclamped, max_action)
    Q_BLOCK: tl.constexpr = H * (S + A + 2 * H + 16)
    which = 4 * agent + 2 + tl.where(heads, role, 1 - role)
    block, low = q_weights + which * Q_BLOCK, q_weights_low + which * Q_BLOCK
    q_saved += 2 * wide * B * 3 * H  # what the critics' own gradients needed is no longer needed
    y = network(
        st, x, q_bias + which * (3 * H + 16), block, low, zero,
        ROWS, S, A, H, 16, CHUNK, SCALE, PRECISION, TURNED, STAGES, q_saved, b, valid & (role == 0),
    )  # fmt: skip
    q = tl.where(valid, tl.sum(y, 0 if TURNED else 1), 0.0)
    tl.store(values + (2 * agent + role) * TILES + tile, tl.sum(tl.where(role == 0, q, tl.abs(q)), 0))
    if role == 0:
        one = tl.where(features(out == 0, TURNED) & rows(valid, TURNED), 1.0, 0.0)
        g = network_gradient(
            one, q_saved, None, b, valid, block, low, zero, ROWS, S, A, H, 16, CHUNK, SCALE, PRECISION, TURNED, STAGES
        )
        g = tl.where(tl.abs(unclamped) <= max_action, g, 0.0)
        BLOCK: tl.constexpr = H * (S + A + 2 * H + A)
        INPUTS: tl.constexpr = S + A + (T + 15) // 16 * 16
        R, policy = (T + 1) * B, 2 * agent + 1
        chain_gradient(
            g, saved + wide * R * 3 * H, inputs + wide * R * INPUTS, epsilons + wide * R * A, du + wide * R * 3 * H,
            dy + wide * R * A, B + b, B, valid, zero, coefficients, max_action, weights + policy * BLOCK,
            weights_low + policy * BLOCK,
            ACTION_DIM, T, INPUTS, ROWS, S, A, H, CHUNK, SCALE, PRECISION, TURNED, STAGES,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Weight gradients
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _product(
    du, du_stride, o, v, v_stride, i, i_end, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ du[r, o]·v[r, i] over the rows FIRST to LAST, (len(o), len(i)), and Σ du[r, o]. ACTIVATION: of mish(v)."""
    total = o[:, None] * 0.0 + i[None, :] * 0.0
    sums = o * 0.0
    for start in tl.range(FIRST, LAST, BLOCK, num_stages=STAGES):
        r = start + tl.arange(0, BLOCK)
        d = tl.load(du + r[None, :] * du_stride + o[:, None], mask=(r < LAST)[None, :], other=0.0)
        x = tl.load(v + r[:, None] * v_stride + i[None, :], mask=(r < LAST)[:, None] & (i < i_end)[None, :], other=0.0)
        if ACTIVATION:
            x = mish(x, PRECISION)
        sums += tl.sum(d, 1)
        if PRECISION == "fp16x3":
            up, down = power_of_two(d, PRECISION)
            x_up, x_down = power_of_two(x, PRECISION)
            d, x = d * up, x * x_up
            d_high, x_high = d.to(tl.float16), x.to(tl.float16)
            d_rest, x_rest = (d - d_high.to(tl.float32)).to(tl.float16), (x - x_high.to(tl.float32)).to(tl.float16)
            part = tl.dot(d_rest, x_high)
            part = tl.dot(d_high, x_rest, part)
            part = tl.dot(d_high, x_high, part)
            total += (down * x_down) * part
        elif PRECISION == "fp16" or PRECISION == "tf32":
            # tf32 in both: fp16's eleven bits, and float32's range for whatever sizes rows have.
            total = tl.dot(to_tf32(d), to_tf32(x), total, input_precision="tf32")
        else:
            total = tl.dot(d, x, total, input_precision="ieee")
    return total, sums


@triton.jit
def _layer(
    du, du_stride, v, v_stride, v_width, gradient, table, tile, n_tiles_in, n_out, cloned, climbed, norms,
    B: tl.constexpr, N_ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATE_AT: tl.constexpr, ACTION_AT: tl.constexpr,
    STATE_DIM: tl.constexpr, ACTION_DIM: tl.constexpr,
    S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, T: tl.constexpr, FIRST: tl.constexpr, CLIMBS: tl.constexpr,
    FACTOR: tl.constexpr, BIAS_FACTOR: tl.constexpr,
    OUT_TILE: tl.constexpr, IN_TILE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of one layer's weight gradient, and with the first tile of a row its bias's, into gradient: (n_out, COLUMNS) and
    (n_out,). The first layer's inputs are in store_inputs()'s order; those of t go to table (T, H)."""
    tile_in = tile % n_tiles_in
    o = (tile // n_tiles_in) * OUT_TILE + tl.arange(0, OUT_TILE)
    i = tile_in * IN_TILE + tl.arange(0, IN_TILE)
    total, sums = _product(du, du_stride, o, v, v_stride, i, v_width, 0, B, BLOCK, not FIRST, PRECISION, STAGES)
    total, sums = total * cloned, sums * cloned
    if CLIMBS:
        more, more_sums = _product(
            du, du_stride, o, v, v_stride, i, v_width, B, N_ROWS, BLOCK, not FIRST, PRECISION, STAGES
        )
        total, sums = total + more * climbed, sums + more_sums * climbed
    total, sums = total * FACTOR, sums * BIAS_FACTOR
    if FIRST:
        column = tl.where(i < S, STATE_AT + i, ACTION_AT + i - S)
        there = tl.where(i < S, i < STATE_DIM, i - S < ACTION_DIM)
        if T > 0:
            t = i - S - A
            tl.store(table + t[None, :] * H + o[:, None], total, mask=((t >= 0) & (t < T))[None, :] & (o < n_out)[:, None])
    else:
        column, there = i, i < COLUMNS
    within = (o < n_out)[:, None] & there[None, :]
    tl.store(gradient + o[:, None] * COLUMNS + column[None, :], total, mask=within)
    norm = tl.sum(tl.sum(tl.where(within, total * total, 0.0), 1), 0)
    if tile_in == 0:
        tl.store(gradient + n_out * COLUMNS + o, sums, mask=o < n_out)
        norm += tl.sum(tl.where(o < n_out, sums * sums, 0.0), 0)
    tl.store(norms, norm)


@triton.jit
def weight_gradients(
    inputs, saved, du, dy, gradient, table, norms, values, eta, cloned,
    B: tl.constexpr, N_ROWS: tl.constexpr, BASE: tl.constexpr, SIZE: tl.constexpr, NETWORKS: tl.constexpr,
    COLUMNS: tl.constexpr, STATE_AT: tl.constexpr, ACTION_AT: tl.constexpr, STATE_DIM: tl.constexpr, ACTION_DIM: tl.constexpr,
    N_OUT: tl.constexpr, OUT: tl.constexpr,
    S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, T: tl.constexpr, CLIMBS: tl.constexpr, TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr, NORMS: tl.constexpr, OUT_TILE: tl.constexpr, IN_TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs (tile, network, agent): dW = Σ du ⊗ v over the rows, of all four layers, in the order of module.parameters().

    gradient (n, BASE + NETWORKS·SIZE): a network's weights and biases stand from BASE + network·SIZE on; COLUMNS is its first
    layer's width, with the state's and the action's columns at STATE_AT and ACTION_AT. cloned: what makes the rows before B a mean
    loss; the others get -η/(B·mean|Q_j|) from values. norms (n, NORMS) gets a program's sum of squares. table (n, T, H).
    """
    pid, network_, agent = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wide = agent.to(tl.int64)
    INPUTS: tl.constexpr = S + A + (T + 15) // 16 * 16
    own = (wide * NETWORKS + network_) * N_ROWS
    inputs += wide * N_ROWS * INPUTS
    saved, du, dy = saved + own * 3 * H, du + own * 3 * H, dy + own * OUT
    gradient += wide * (BASE + NETWORKS * SIZE) + BASE + network_ * SIZE
    table += agent * T * H
    norms += agent * NORMS + network_ * tl.num_programs(0) + pid
    climbed = 0.0
    if CLIMBS:
        tile = tl.arange(0, TILES_PADDED)
        scale = tl.sum(tl.load(values + (2 * agent + 1) * TILES + tile, mask=tile < TILES, other=0.0), 0)
        climbed = -eta / scale  # mean Q_i / mean|Q_j| = sum Q_i / sum|Q_j|
    OUT_TILES: tl.constexpr = H // OUT_TILE
    IN_TILES: tl.constexpr = H // IN_TILE
    FIRST_IN: tl.constexpr = (INPUTS + IN_TILE - 1) // IN_TILE
    FIRST_TILES: tl.constexpr = OUT_TILES * FIRST_IN
    HIDDEN_TILES: tl.constexpr = OUT_TILES * IN_TILES
    SECOND: tl.constexpr = H * COLUMNS + H
    if pid < FIRST_TILES:
        _layer(
            du, 3 * H, inputs, INPUTS, INPUTS, gradient, table, pid, FIRST_IN, H, cloned, climbed, norms,
            B, N_ROWS, COLUMNS, STATE_AT, ACTION_AT, STATE_DIM, ACTION_DIM, S, A, H, T, True, CLIMBS, LOG2E, LOG2E,
            OUT_TILE, IN_TILE, BLOCK, PRECISION, STAGES,
        )  # fmt: skip
    elif pid < FIRST_TILES + 2 * HIDDEN_TILES:
        third = (pid - FIRST_TILES) // HIDDEN_TILES
        _layer(
            du + (1 + third) * H, 3 * H, saved + third * H, 3 * H, H, gradient + SECOND + third * (H * H + H), table,
            (pid - FIRST_TILES) % HIDDEN_TILES, IN_TILES, H, cloned, climbed, norms,
            B, N_ROWS, H, STATE_AT, ACTION_AT, STATE_DIM, ACTION_DIM, S, A, H, T, False, CLIMBS, 1.0, LOG2E,
            OUT_TILE, IN_TILE, BLOCK, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _layer(
            dy, OUT, saved + 2 * H, 3 * H, H, gradient + SECOND + 2 * (H * H + H), table,
            pid - FIRST_TILES - 2 * HIDDEN_TILES, IN_TILES, N_OUT, cloned, climbed, norms,
            B, N_ROWS, H, STATE_AT, ACTION_AT, STATE_DIM, ACTION_DIM, S, A, H, T, False, CLIMBS, 1.0 / LOG2E, 1.0,
            OUT, IN_TILE, BLOCK, PRECISION, STAGES,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The time embedding's network, in float32: sin/cos -> D -> 2·D -> D, D = 16
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _embedding(parameters, sinusoids, t, T: tl.constexpr, D: tl.constexpr):
    """-> sinusoids (len(t), D), log2(e)·pre-activations (len(t), 2·D), embedding (len(t), D)."""
    d, wide = tl.arange(0, D), tl.arange(0, 2 * D)
    wave = tl.load(sinusoids + t[:, None] * D + d[None, :], mask=(t < T)[:, None], other=0.0)
    w_1 = tl.load(parameters + wide[None, :] * D + d[:, None])  # (D, 2·D): transposed
    u = tl.dot(wave, w_1, input_precision="ieee") + tl.load(parameters + 2 * D * D + wide)[None, :]
    u = u * LOG2E
    w_2 = tl.load(parameters + 2 * D * D + 2 * D + d[None, :] * 2 * D + wide[:, None])  # (2·D, D): transposed
    embedding = tl.dot(mish(u, "fp32") * (1.0 / LOG2E), w_2, input_precision="ieee")
    return wave, u, embedding + tl.load(parameters + 4 * D * D + 2 * D + d)[None, :]


@triton.jit
def time_gradient(
    parameters, sinusoids, table, gradient, norms,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, TIME_AT: tl.constexpr, H: tl.constexpr, T: tl.constexpr,
    T_PADDED: tl.constexpr, D: tl.constexpr, NORMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Programs (agent,): from table (n, T, H), the gradient with respect to the first layer's pre-activations summed for each t,
    that of the time columns of the first layer and of the network that embeds t, into gradient (n, SIZE)."""
    agent = tl.program_id(0)
    parameters, gradient = parameters + agent * SIZE, gradient + agent * SIZE
    BASE: tl.constexpr = 4 * D * D + 3 * D
    t, d, wide = tl.arange(0, T_PADDED), tl.arange(0, D), tl.arange(0, 2 * D)
    wave, u, embedding = _embedding(parameters, sinusoids, t, T, D)
    d_embedding = tl.zeros([T_PADDED, D], tl.float32)
    norm = 0.0
    for start in tl.range(0, H, CHUNK):
        h = start + tl.arange(0, CHUNK)
        g = tl.load(table + (agent * T + t[:, None]) * H + h[None, :], mask=(t < T)[:, None], other=0.0)
        where = BASE + h[:, None] * COLUMNS + TIME_AT + d[None, :]
        d_embedding = tl.dot(g, tl.load(parameters + where), d_embedding, input_precision="ieee")
        dw = tl.dot(tl.trans(g), embedding, input_precision="ieee")
        tl.store(gradient + where, dw)
        norm += tl.sum(tl.sum(dw * dw, 1), 0)
    w_2 = tl.load(parameters + 2 * D * D + 2 * D + d[:, None] * 2 * D + wide[None, :])
    dw_2 = tl.dot(tl.trans(d_embedding), mish(u, "fp32") * (1.0 / LOG2E), input_precision="ieee")
    db_2 = tl.sum(d_embedding, 0)
    du = tl.dot(d_embedding, w_2, input_precision="ieee") * mish_slope(u)
    dw_1 = tl.dot(tl.trans(du), wave, input_precision="ieee")
    db_1 = tl.sum(du, 0)
    tl.store(gradient + wide[:, None] * D + d[None, :], dw_1)
    tl.store(gradient + 2 * D * D + wide, db_1)
    tl.store(gradient + 2 * D * D + 2 * D + d[:, None] * 2 * D + wide[None, :], dw_2)
    tl.store(gradient + 4 * D * D + 2 * D + d, db_2)
    norm += tl.sum(tl.sum(dw_1 * dw_1, 1), 0) + tl.sum(db_1 * db_1, 0) + tl.sum(tl.sum(dw_2 * dw_2, 1), 0) + tl.sum(db_2 * db_2, 0)
    tl.store(norms + agent * NORMS + NORMS - 1, norm)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _one_minus_power(base_log, n):
    """1 - exp(base_log·n) for base_log < 0; by the exponential's series where the difference would cancel."""
    y = base_log * n
    small, series = tl.maximum(y, -0.5), 1.0
    for k in tl.static_range(0, 9):
        series = 1.0 + series * small / (10 - k)
    return tl.where(y > -0.5, -y * series, 1.0 - tl.exp(y))


@triton.jit
def adam(
    parameters, gradient, momentum, variance, average, place, factor, weights, weights_low, bias, norms, steps, adam_steps, rates,
    rate_every, max_norm, rate, average_start, average_every,
    SIZE: tl.constexpr, NORMS: tl.constexpr, NORMS_PADDED: tl.constexpr, RATES: tl.constexpr, CLIPS: tl.constexpr,
    BETA_1: tl.constexpr, BETA_2: tl.constexpr, LOG_BETA_1: tl.constexpr, LOG_BETA_2: tl.constexpr, EPS: tl.constexpr,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (block, agent) over flat parameters (n, SIZE): clip by the global norm, Adam, average ← average + rate·(p - average),
    every average_every-th step from average_start on, and the packed copies of both.

    steps (n,), adam_steps (n,); rates (RATES + 1,): the learning rate in each period of rate_every steps, the last one from then
    on. place (SIZE,): where in an agent's packed weights (WEIGHTS numbers of a copy) a parameter goes, times factor; -1: nowhere;
    -2 - k: number k of its packed biases (BIASES of a copy).
    """
    agent = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < SIZE
    at = agent.to(tl.int64) * SIZE + i
    g = tl.load(gradient + at, mask=there, other=0.0)
    if CLIPS:
        r = tl.arange(0, NORMS_PADDED)
        norm = tl.sqrt(tl.sum(tl.load(norms + agent * NORMS + r, mask=r < NORMS, other=0.0), 0))
        g = g * tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    step, n = tl.load(steps + agent), tl.load(adam_steps + agent) + 1.0
    lr = tl.load(rates + tl.minimum(step // rate_every, RATES))
    m, v = tl.load(momentum + at, mask=there, other=0.0), tl.load(variance + at, mask=there, other=0.0)
    m = m + (1.0 - BETA_1) * (g - m)
    v = BETA_2 * v + (1.0 - BETA_2) * g * g
    p = tl.load(parameters + at, mask=there, other=0.0)
    size = lr / _one_minus_power(LOG_BETA_1, n)
    p = p - size * m / (tl.sqrt(v) / tl.sqrt(_one_minus_power(LOG_BETA_2, n)) + EPS)
    e = tl.load(average + at, mask=there, other=0.0)
    due = (step % average_every == 0) & (step >= average_start)
    e = tl.where(due, e + rate * (p - e), e)
    tl.store(momentum + at, m, mask=there)
    tl.store(variance + at, v, mask=there)
    tl.store(parameters + at, p, mask=there)
    tl.store(average + at, e, mask=there)
    to, f = tl.load(place + i, mask=there, other=-1), tl.load(factor + i, mask=there, other=0.0)
    for copy in tl.static_range(0, 2):
        value = (e if copy == 0 else p) * f
        where = (2 * agent + copy) * WEIGHTS + to
        high = operand(value, PRECISION).to(weights.dtype.element_ty)
        tl.store(weights + where, high, mask=to >= 0)
        if PRECISION == "fp16x3":
            tl.store(weights_low + where, (value - high.to(tl.float32)).to(tl.float16), mask=to >= 0)
        tl.store(bias + (2 * agent + copy) * BIASES - 2 - to, value, mask=to < -1)


@triton.jit
def finish(
    parameters, average, sinusoids, bias, losses, values, norms, q_norms, eta, metrics, steps, adam_steps, B,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, TIME_AT: tl.constexpr, ACTION_DIM: tl.constexpr, OUT: tl.constexpr,
    H: tl.constexpr, T: tl.constexpr, T_PADDED: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, CHUNK: tl.constexpr,
    TILES: tl.constexpr, TILES_PADDED: tl.constexpr, NORMS: tl.constexpr, NORMS_PADDED: tl.constexpr, Q_NORMS: tl.constexpr,
    Q_NORMS_PADDED: tl.constexpr, CRITICS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Programs (copy, agent): the packed biases (T, 3·H + OUT) of the policies, averaged (copy 0) and current (copy 1).

    COUNTS: the second program also adds the update's metrics to metrics (n, 6), those of FusedUpdate.METRICS, and counts the step.
    """
    copy, agent = tl.program_id(0), tl.program_id(1)
    if copy == 0:
        own = average + agent * SIZE
    else:
        own = parameters + agent * SIZE
    BASE: tl.constexpr = 4 * D * D + 3 * D
    UNIT: tl.constexpr = LOG2E / SCALE
    t, d = tl.arange(0, T_PADDED), tl.arange(0, D)
    known = (t < T)[:, None]
    _, _, embedding = _embedding(own, sinusoids, t, T, D)
    to = bias + ((2 * agent + copy) * T + t[:, None]) * (3 * H + OUT)
    for start in tl.range(0, H, CHUNK):
        h = start + tl.arange(0, CHUNK)
        w = tl.load(own + BASE + h[None, :] * COLUMNS + TIME_AT + d[:, None])
        b_1 = tl.load(own + BASE + H * COLUMNS + h)
        b_2 = tl.load(own + BASE + H * COLUMNS + H + H * H + h)
        b_3 = tl.load(own + BASE + H * COLUMNS + H + H * H + H + H * H + h)
        tl.store(to + h[None, :], (tl.dot(embedding, w, input_precision="ieee") + b_1[None, :]) * UNIT, mask=known)
        tl.store(to + H + h[None, :], t[:, None] * 0.0 + (b_2 * UNIT)[None, :], mask=known)
        tl.store(to + 2 * H + h[None, :], t[:, None] * 0.0 + (b_3 * UNIT)[None, :], mask=known)
    out = tl.arange(0, OUT)
    b_4 = tl.load(own + SIZE - ACTION_DIM + out, mask=out < ACTION_DIM, other=0.0)
    tl.store(to + 3 * H + out[None, :], t[:, None] * 0.0 + (b_4 / SCALE)[None, :], mask=known)
    if COUNTS:
        if copy == 1:
            tile = tl.arange(0, TILES_PADDED)
            sums = losses + 3 * agent * TILES + tile
            bc_loss = tl.sum(tl.load(sums + 2 * TILES, mask=tile < TILES, other=0.0), 0) / (B * ACTION_DIM)
            r = tl.arange(0, NORMS_PADDED)
            norm = tl.sqrt(tl.sum(tl.load(norms + agent * NORMS + r, mask=r < NORMS, other=0.0), 0))
            q_loss = bc_loss * 0.0
            mine = metrics + 6 * agent
            if CRITICS > 0:
                both = tl.load(sums, mask=tile < TILES, other=0.0) + tl.load(sums + TILES, mask=tile < TILES, other=0.0)
                tl.store(mine, tl.load(mine) + tl.sum(both, 0) / B)
                r = tl.arange(0, Q_NORMS_PADDED)
                q_norm = tl.sqrt(tl.sum(tl.load(q_norms + agent * Q_NORMS + r, mask=r < Q_NORMS, other=0.0), 0))
                tl.store(mine + 1, tl.load(mine + 1) + q_norm)
                of = values + 2 * agent * TILES + tile
                q_loss = -tl.sum(tl.load(of, mask=tile < TILES, other=0.0), 0)
                q_loss /= tl.sum(tl.load(of + TILES, mask=tile < TILES, other=0.0), 0)
                of_critics = adam_steps + tl.num_programs(1) + agent
                tl.store(of_critics, tl.load(of_critics) + 1.0)
            tl.store(mine + 2, tl.load(mine + 2) + bc_loss)
            tl.store(mine + 3, tl.load(mine + 3) + q_loss)
            tl.store(mine + 4, tl.load(mine + 4) + bc_loss + eta * q_loss)
            tl.store(mine + 5, tl.load(mine + 5) + norm)
            tl.store(adam_steps + agent, tl.load(adam_steps + agent) + 1.0)
            tl.store(steps + agent, tl.load(steps + agent) + 1)
