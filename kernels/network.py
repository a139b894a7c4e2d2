"""Device functions on a tile of rows: a four-layer network, and the reverse-diffusion chain that calls it T times.

Two loops over chunks of hidden units make up the network, so that no register tensor is ever sliced:

    z₂ = b₂ + Σ_j mish(b₁ + [s|a]·W₁ⱼᵀ)·W₂ⱼᵀ             h₂ = mish(z₂)
    y  = b₄ + Σ_j mish(b₃ + h₂·W₃ⱼᵀ)·W₄ⱼᵀ

As ε_θ the timestep enters through b₁(t) alone, a (T, H) table made when packing: the first layer is linear in its embedding.
"""

import triton
import triton.language as tl

from .ops import (
    clamp,
    features,
    linear,
    load_features,
    mish,
    mish_slope,
    normals,
    operand,
    power_of_two,
    rows,
    store_features,
    store_inputs,
)


@triton.jit
def network(
    state, x, bias, weights, weights_low, zero,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
    saved=None, at=None, keep=None, bias_row=None,
):  # fmt: skip
    """One network's outputs for a tile: (ROWS, OUT), or turned. bias points at its (3·H + OUT,) biases.

    weights, weights_low: this network's block of what packing makes. zero is 0, which the compiler must not know. For training:
    saved (n, 3·H) gets u₁, u₂, u₃ = log2(e)·z at its rows `at`, those that keep says. bias_row (ROWS,): which row of several
    biases each row takes for its first layer, whatever its timestep.
    """
    w_action, w_2, w_3, w_4 = H * S, H * (S + A), H * (S + A + H), H * (S + A + 2 * H)  # packing.py's order
    weights, weights_low = weights + zero, weights_low + zero
    s, a, h, j, out = tl.arange(0, S), tl.arange(0, A), tl.arange(0, H), tl.arange(0, CHUNK), tl.arange(0, OUT)
    none = rows(tl.zeros([ROWS], tl.float32), TURNED)
    x = operand(x, PRECISION)
    # Biases initialise the accumulators.
    z = none + features(tl.load(bias + H + h), TURNED)
    for start in tl.range(0, H, CHUNK, num_stages=STAGES):
        c = start + j
        if bias_row is None:
            u = none + features(tl.load(bias + c), TURNED)
        else:
            u = none + tl.load(bias + features(c, TURNED) + rows(bias_row * (3 * H + OUT), TURNED))
        u = linear(state, weights, weights_low, c, s, S, 1, u, PRECISION, TURNED)
        u = linear(x, weights + w_action, weights_low + w_action, c, a, A, 1, u, PRECISION, TURNED) * SCALE
        if saved is not None:
            store_features(saved, at, c, 3 * H, u, keep, TURNED)
        z = linear(operand(mish(u, PRECISION), PRECISION), weights + w_2, weights_low + w_2, h, c, H, 1, z, PRECISION, TURNED)
    z = z * SCALE
    if saved is not None:
        store_features(saved, at, H + h, 3 * H, z, keep, TURNED)
    hidden = operand(mish(z, PRECISION), PRECISION)
    y = none + features(tl.load(bias + 3 * H + out), TURNED)
    for start in tl.range(0, H, CHUNK, num_stages=STAGES):
        c = start + j
        u = none + features(tl.load(bias + 2 * H + c), TURNED)
        u = linear(hidden, weights + w_3, weights_low + w_3, c, h, H, 1, u, PRECISION, TURNED) * SCALE
        if saved is not None:
            store_features(saved, at, 2 * H + c, 3 * H, u, keep, TURNED)
        y = linear(operand(mish(u, PRECISION), PRECISION), weights + w_4, weights_low + w_4, out, c, H, 1, y, PRECISION, TURNED)
    return y * SCALE


@triton.jit
def network_gradient(
    dy, saved, du, at, keep, weights, weights_low, zero,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to x, (ROWS, A) or turned, from dy (ROWS, OUT), that with respect to network()'s outputs.

    saved: what network() saved at the rows `at`. du (n, 3·H), unless None, gets the gradients with respect to u₁, u₂, u₃: all
    that the weights' gradients need. Powers of two bring dy and, since a steep network's gradients grow from layer to layer, du₂
    to where fp16 can hold what follows.
    """
    w_action, w_2, w_3, w_4 = H * S, H * (S + A), H * (S + A + H), H * (S + A + 2 * H)
    weights, weights_low = weights + zero, weights_low + zero
    a, h, j, out = tl.arange(0, A), tl.arange(0, H), tl.arange(0, CHUNK), tl.arange(0, OUT)
    tl.debug_barrier()  # what other threads of this program have saved
    up, down = power_of_two(dy, PRECISION)
    dy = operand(dy * up, PRECISION)
    none = rows(tl.zeros([ROWS], tl.float32), TURNED)
    total = none + features(h * 0.0, TURNED)
    for start in tl.range(0, H, CHUNK, num_stages=STAGES):
        c = start + j
        d = none + features(c * 0.0, TURNED)
        d = linear(dy, weights + w_4, weights_low + w_4, c, out, 1, H, d, PRECISION, TURNED) * SCALE
        d = d * mish_slope(load_features(saved, at, 2 * H + c, 3 * H, keep, TURNED))
        if du is not None:
            store_features(du, at, 2 * H + c, 3 * H, d * down, keep, TURNED)
        total = linear(operand(d, PRECISION), weights + w_3, weights_low + w_3, h, c, 1, H, total, PRECISION, TURNED)
    d_2 = total * SCALE * mish_slope(load_features(saved, at, H + h, 3 * H, keep, TURNED))
    if du is not None:
        store_features(du, at, H + h, 3 * H, d_2 * down, keep, TURNED)
    up, down_2 = power_of_two(d_2, PRECISION)
    d_2 = operand(d_2 * up, PRECISION)
    down *= down_2
    dx = none + features(a * 0.0, TURNED)
    for start in tl.range(0, H, CHUNK, num_stages=STAGES):
        c = start + j
        d = none + features(c * 0.0, TURNED)
        d = linear(d_2, weights + w_2, weights_low + w_2, c, h, 1, H, d, PRECISION, TURNED) * SCALE
        d = d * mish_slope(load_features(saved, at, c, 3 * H, keep, TURNED))
        if du is not None:
            store_features(du, at, c, 3 * H, d * down, keep, TURNED)
        dx = linear(operand(d, PRECISION), weights + w_action, weights_low + w_action, a, c, 1, A, dx, PRECISION, TURNED)
    return dx * (SCALE * down)


@triton.jit
def load_states(
    state, row, valid, STATE_DIM: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr
):
    """The states row (ROWS,) of (n, STATE_DIM), padded to S columns, as the first matrix product takes them."""
    s = tl.arange(0, S)
    where = rows(row.to(tl.int64), TURNED) * STATE_DIM + features(s, TURNED)
    st = tl.load(state + where, mask=features(s < STATE_DIM, TURNED) & rows(valid, TURNED), other=0.0)
    return operand(st, PRECISION)


@triton.jit
def reverse_chain(
    state, x_T, noises, seed, draw, row, valid, n_rows, zero, coefficients, bias, max_action, weights, weights_low,
    ACTION_DIM: tl.constexpr, T: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
    STREAM: tl.constexpr = 0, saved=None, inputs=None, epsilons=None, at=None, at_step=None, keep=None,
):  # fmt: skip
    """All T steps for the rows row (ROWS,) int32, those that are valid, of n_rows: actions (ROWS, A), or turned; 0 elsewhere.
    They still have to be clamped to ±max_action.

    a_{t-1} = c₂·clamp(c₀·a_t - c₁·ε_θ(a_t, t, s)) + c₃·a_t + c₄·z (paper, eq. 1 and its posterior). GIVEN: noise is read from
    x_T (n_rows, ACTION_DIM) and noises (T, n_rows, ACTION_DIM), else drawn from seed and draw, as steps STREAM to STREAM + T.
    For training, iteration k leaves what its backward pass needs at the rows at + k·at_step that keep says: saved, as
    network() does, a_t in the action's columns of inputs, and ε_θ in epsilons (n, A).
    """
    a = tl.arange(0, A)
    within = features(a < ACTION_DIM, TURNED) & rows(valid, TURNED)
    # 64-bit: 2²² rows of 128 times 50 steps of noise are beyond 2³¹ elements.
    where = rows(row.to(tl.int64), TURNED) * ACTION_DIM + features(a, TURNED)
    step_size = tl.full([], ACTION_DIM, tl.int64) * n_rows
    if GIVEN:
        x = tl.load(x_T + where, mask=within, other=0.0)
    else:
        x = normals(seed, draw, STREAM, row, A)
        if TURNED:
            x = tl.trans(x)
        x = tl.where(within, x, 0.0)
    for k in tl.range(0, T):
        t = T - 1 - k
        # t·zero keeps LLVM from hoisting every weight's address, 150 registers of them, out of this loop.
        if saved is None:
            epsilon = network(
                state, x, bias + t * (3 * H + A), weights, weights_low, t * zero,
                ROWS, S, A, H, A, CHUNK, SCALE, PRECISION, TURNED, STAGES,
            )  # fmt: skip
        else:
            now = at + k * at_step
            store_inputs(inputs, now, keep, state, x, t + row * 0, ROWS, S, A, T, TURNED)
            epsilon = network(
                state, x, bias + t * (3 * H + A), weights, weights_low, t * zero,
                ROWS, S, A, H, A, CHUNK, SCALE, PRECISION, TURNED, STAGES, saved, now, keep,
            )  # fmt: skip
            store_features(epsilons, now, a, A, epsilon, keep, TURNED)
        c = coefficients + t * 5
        x_0 = clamp(tl.load(c) * x - tl.load(c + 1) * epsilon, max_action)
        x = tl.load(c + 2) * x_0 + tl.load(c + 3) * x
        if t > 0:
            if GIVEN:
                z = tl.load(noises + k * step_size + where, mask=within, other=0.0)
            else:
                z = normals(seed, draw, STREAM + k + 1, row, A)
                if TURNED:
                    z = tl.trans(z)
            x = x + tl.load(c + 4) * z
        x = tl.where(within, x, 0.0)
    return x


@triton.jit
def chain_gradient(
    g, saved, inputs, epsilons, du, dy, at, at_step, keep, zero, coefficients, max_action, weights, weights_low,
    ACTION_DIM: tl.constexpr, T: tl.constexpr, INPUTS: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """reverse_chain() backwards from g (ROWS, A), or turned, the gradient with respect to its (unclamped) actions.

    Leaves in du, as network_gradient() does, and in dy (n, A) the gradients of all T passes through the network.
    """
    a = tl.arange(0, A)
    within = features(a < ACTION_DIM, TURNED) & rows(keep, TURNED)
    for t in tl.range(0, T):
        now = at + (T - 1 - t) * at_step
        x = load_features(inputs, now, S + a, INPUTS, keep, TURNED)
        epsilon = load_features(epsilons, now, a, A, keep, TURNED)
        c = coefficients + t * 5
        x_0 = tl.load(c) * x - tl.load(c + 1) * epsilon
        g_0 = tl.where(tl.abs(x_0) <= max_action, g * tl.load(c + 2), 0.0)  # as torch.clamp, whose bounds pass gradients
        d = tl.where(within, -tl.load(c + 1) * g_0, 0.0)
        store_features(dy, now, a, A, d, keep, TURNED)
        dx = network_gradient(
            d, saved, du, now, keep, weights, weights_low, t * zero,
            ROWS, S, A, H, A, CHUNK, SCALE, PRECISION, TURNED, STAGES,
        )  # fmt: skip
        g = tl.where(within, tl.load(c + 3) * g + tl.load(c) * g_0 + dx, 0.0)
