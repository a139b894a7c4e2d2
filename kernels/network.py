"""Device functions on a tile of rows: a four-layer network, and the reverse-diffusion chain that calls it T times.

Two loops over chunks of hidden units make up the network, so that no register tensor is ever sliced:

    z₂ = b₂ + Σ_j mish(b₁ + [s|a]·W₁ⱼᵀ)·W₂ⱼᵀ             h₂ = mish(z₂)
    y  = b₄ + Σ_j mish(b₃ + h₂·W₃ⱼᵀ)·W₄ⱼᵀ

As ε_θ the timestep enters through b₁(t) alone, a (T, H) table made when packing: the first layer is linear in its embedding.
"""

import triton
import triton.language as tl

from .ops import clamp, features, linear, mish, normals, rows


@triton.jit
def network(
    state, x, bias, bias_out, weights, weights_low, zero,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One network's outputs for a tile: (ROWS, OUT), or turned. bias points at (3, H), bias_out at (OUT,).

    weights, weights_low: this network's block of what packing makes. zero is 0, which the compiler must not know.
    """
    w_action, w_2, w_3, w_4 = H * S, H * (S + A), H * (S + A + H), H * (S + A + 2 * H)  # packing.py's order
    weights, weights_low = weights + zero, weights_low + zero
    s, a, h, j, out = tl.arange(0, S), tl.arange(0, A), tl.arange(0, H), tl.arange(0, CHUNK), tl.arange(0, OUT)
    none = rows(tl.zeros([ROWS], tl.float32), TURNED)
    # Biases initialise the accumulators.
    z = none + features(tl.load(bias + H + h), TURNED)
    for start in tl.range(0, H, CHUNK, num_stages=STAGES):
        c = start + j
        u = none + features(tl.load(bias + c), TURNED)
        u = linear(state, weights, weights_low, c, s, S, 1, u, PRECISION, TURNED)
        u = linear(x, weights + w_action, weights_low + w_action, c, a, A, 1, u, PRECISION, TURNED)
        z = linear(mish(u * SCALE, PTX), weights + w_2, weights_low + w_2, h, c, H, 1, z, PRECISION, TURNED)
    hidden = mish(z * SCALE, PTX)
    if PRECISION == "fp16":
        hidden = hidden.to(tl.float16)  # once, not once per chunk
    y = none + features(tl.load(bias_out + out), TURNED)
    for start in tl.range(0, H, CHUNK, num_stages=STAGES):
        c = start + j
        u = none + features(tl.load(bias + 2 * H + c), TURNED)
        u = linear(hidden, weights + w_3, weights_low + w_3, c, h, H, 1, u, PRECISION, TURNED)
        y = linear(mish(u * SCALE, PTX), weights + w_4, weights_low + w_4, out, c, H, 1, y, PRECISION, TURNED)
    return y * SCALE


@triton.jit
def load_states(
    state, row, valid, STATE_DIM: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr
):
    """The states row (ROWS,) of (n, STATE_DIM), padded to S columns, as the first matrix product takes them."""
    s = tl.arange(0, S)
    where = rows(row.to(tl.int64), TURNED) * STATE_DIM + features(s, TURNED)
    st = tl.load(state + where, mask=features(s < STATE_DIM, TURNED) & rows(valid, TURNED), other=0.0)
    if PRECISION == "fp16":
        st = st.to(tl.float16)
    return st


@triton.jit
def reverse_chain(
    state, x_T, noises, seed, draw, row, valid, n_rows, zero, coefficients, bias, bias_out, max_action,
    weights, weights_low,
    ACTION_DIM: tl.constexpr, T: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """All T steps for the rows row (ROWS,) int32, those that are valid, of n_rows: actions (ROWS, A), or turned; 0 elsewhere.

    a_{t-1} = c₂·clamp(c₀·a_t - c₁·ε_θ(a_t, t, s)) + c₃·a_t + c₄·z (paper, eq. 1 and its posterior). GIVEN: noise is read from
    x_T (n_rows, ACTION_DIM) and noises (T, n_rows, ACTION_DIM), else drawn from seed and draw.
    """
    a = tl.arange(0, A)
    within = features(a < ACTION_DIM, TURNED) & rows(valid, TURNED)
    # 64-bit: 2²² rows of 128 times 50 steps of noise are beyond 2³¹ elements.
    where = rows(row.to(tl.int64), TURNED) * ACTION_DIM + features(a, TURNED)
    step_size = tl.full([], ACTION_DIM, tl.int64) * n_rows
    if GIVEN:
        x = tl.load(x_T + where, mask=within, other=0.0)
    else:
        x = normals(seed, draw, 0, row, A)
        if TURNED:
            x = tl.trans(x)
        x = tl.where(within, x, 0.0)
    for k in tl.range(0, T):
        t = T - 1 - k
        # t·zero keeps LLVM from hoisting every weight's address, 150 registers of them, out of this loop.
        epsilon = network(
            state, x, bias + t * 3 * H, bias_out + t * A, weights, weights_low, t * zero,
            ROWS, S, A, H, A, CHUNK, SCALE, PRECISION, TURNED, STAGES, PTX,
        )  # fmt: skip
        c = coefficients + t * 5
        x_0 = clamp(tl.load(c) * x - tl.load(c + 1) * epsilon, max_action)
        x = tl.load(c + 2) * x_0 + tl.load(c + 3) * x
        if t > 0:
            if GIVEN:
                z = tl.load(noises + k * step_size + where, mask=within, other=0.0)
            else:
                z = normals(seed, draw, k + 1, row, A)
                if TURNED:
                    z = tl.trans(z)
            x = x + tl.load(c + 4) * z
        x = tl.where(within, x, 0.0)
    return clamp(x, max_action)
