"""Device functions on a tile of rows: a four-layer network, and the reverse-diffusion chain.

Two loops over chunks of hidden units make up the network, so that no register tensor is ever
sliced:

    z₂ = b₂ + Σ_j mish(b₁ + [s|a]·W₁ⱼᵀ)·W₂ⱼᵀ             h₂ = mish(z₂)
    y  = b₄ + Σ_j mish(b₃ + h₂·W₃ⱼᵀ)·W₄ⱼᵀ

As ε_θ the timestep enters through b₁(t) alone, a (T, H) table made when packing: the first layer is
linear in its embedding.

What belongs together travels as one NamedTuple: of tensors, which become pointers, or of numbers, a
compile-time constant. Functions here take `sizes: Sizes` and `tile: tiles.Tile` as such constants.

What Triton asks of such groups:
- In 3.6 what is read out of a constant is a bare Python value. To be passed on as a string or a
  group, or to be part of a shape, it first needs a name: `ROWS: tl.constexpr = tile.rows`.
- In 3.6 a group that is compared with None must not have a member that is None.
- No field of tensors may be called `values` or `type`: Triton's own tuples have such attributes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .ops import (
    Matrix,
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
)


class Net(NamedTuple):
    """A packed network, or several one after the other (see packing.py)."""

    bias: torch.Tensor  # (3·H + OUT,); of a policy one for each timestep
    weights: torch.Tensor  # five matrices: (H, S), (H, A), (H, H), (H, H), (OUT, H)
    low: torch.Tensor  # their lower halves in fp16x3; elsewhere the weights again, not read

    @classmethod
    def of(cls, packed):
        return cls(packed.bias, packed.weights, packed.low)


class Sizes(NamedTuple):
    """The sizes of a packed network and how it computes."""

    state_dim: int
    action_dim: int
    S: int  # padded columns for states
    A: int  # and for actions
    H: int  # hidden units
    OUT: int  # outputs, padded
    T: int  # timesteps that the network tells apart; 0 for a critic
    block: int  # numbers in a network's weights
    inputs: int  # columns of what store_inputs() writes
    scale: float  # of the stored weights: each product is multiplied by it
    precision: str

    @classmethod
    def of(cls, packed):
        T = packed.n_timesteps if packed.KIND == "policy" else 0
        S, A, H, OUT = packed.S, packed.A, packed.hidden_dim, packed.OUT
        block, inputs = packed.weights.shape[1], input_columns(S, A, T)
        dims = packed.state_dim, packed.action_dim
        return cls(*dims, S, A, H, OUT, T, block, inputs, packed.scale, packed.precision)


class PolicyAndCritic(NamedTuple):
    """One of a kind for each, for instance two Nets or two Sizes."""

    policy: object
    critic: object


class Chain(NamedTuple):
    """The reverse-diffusion chain apart from its network."""

    coefficients: torch.Tensor  # (T, 5): c₀ to c₄ of reverse_chain()
    max_action: float

    @classmethod
    def of(cls, packed):
        return cls(packed.coefficients, packed.max_action)


class Noise(NamedTuple):
    """The noise of a chain, where it is given and not drawn."""

    x_T: torch.Tensor  # (n_rows, action_dim)
    noises: torch.Tensor  # (T, n_rows, action_dim); the last is not read


class Stream(NamedTuple):
    """Where a chain's random numbers come from: steps first to first + T of Philox's counter."""

    seed: torch.Tensor
    draw: torch.Tensor
    first: int


class Saved(NamedTuple):
    """What a pass through a network leaves for gradients, of all three hidden layers."""

    u: torch.Tensor  # (n, 3·H): log2(e)·z, for the slopes
    h: torch.Tensor  # (n, 3·H): mish(u) as an operand(), for the weights' gradients


class Trace(NamedTuple):
    """What a chain leaves for its backward pass: iteration k at the rows at + k·step.

    at, mask (ROWS,): the rows of iteration 0 and which of them to write.
    """

    inputs: torch.Tensor  # (n, sizes.inputs), see store_inputs()
    saved: Saved
    epsilons: torch.Tensor  # (n, A): ε_θ
    at: torch.Tensor
    step: int
    mask: torch.Tensor


def input_columns(S: int, A: int, T: int = 0) -> int:
    """How wide store_inputs() makes a row: state, action, timestep one-hot, padded to 16."""
    return S + A + 16 * triton.cdiv(T, 16)


@triton.jit
def nth_network(net, n, sizes: tl.constexpr):
    """Network n of those that net holds one after the other."""
    BIASES: tl.constexpr = sizes.T if sizes.T > 0 else 1
    bias = net.bias + n * BIASES * (3 * sizes.H + sizes.OUT)
    return Net(bias, net.weights + n * sizes.block, net.low + n * sizes.block)


@triton.jit
def further(saved, by):
    """saved from `by` numbers on."""
    return Saved(saved.u + by, saved.h + by)


@triton.jit
def shift_weights(net, by):
    """net with its weights `by` numbers further on.

    In a loop `by` is the loop's index times a 0 that the compiler does not know to be 0. Otherwise
    LLVM computes every weight's address ahead of the loop and holds them all, in 150 registers.
    """
    return Net(net.bias, net.weights + by, net.low + by)


@triton.jit
def network(
    state, x, net, sizes: tl.constexpr, tile: tl.constexpr,
    saved=None, at=None, mask=None, bias_row=None,
):  # fmt: skip
    """One network's outputs (ROWS, OUT) for states (ROWS, S) and actions x (ROWS, A).

    For training: a Saved gets the three layers' u = log2(e)·z and mish(u) at its rows `at`, those
    in the mask; and bias_row (ROWS,) is the timestep of each row, where they differ.
    """
    S: tl.constexpr = sizes.S
    A: tl.constexpr = sizes.A
    H: tl.constexpr = sizes.H
    OUT: tl.constexpr = sizes.OUT
    SCALE: tl.constexpr = sizes.scale
    PRECISION: tl.constexpr = sizes.precision
    ROWS: tl.constexpr = tile.rows
    TRANSPOSED: tl.constexpr = tile.transposed
    # The matrices stand in packing.py's order.
    w_state = Matrix(net.weights, net.low, S, 1)
    w_action = Matrix(net.weights + H * S, net.low + H * S, A, 1)
    AT_2: tl.constexpr = H * (S + A)
    w_2 = Matrix(net.weights + AT_2, net.low + AT_2, H, 1)
    AT_3: tl.constexpr = AT_2 + H * H
    w_3 = Matrix(net.weights + AT_3, net.low + AT_3, H, 1)
    AT_4: tl.constexpr = AT_3 + H * H
    w_4 = Matrix(net.weights + AT_4, net.low + AT_4, H, 1)
    s, a, h = tl.arange(0, S), tl.arange(0, A), tl.arange(0, H)
    j, out = tl.arange(0, tile.chunk), tl.arange(0, OUT)
    zeros = rows(tl.zeros([ROWS], tl.float32), TRANSPOSED)
    x = operand(x, PRECISION)
    # Sums start from the biases.
    z = zeros + features(tl.load(net.bias + H + h), TRANSPOSED)
    for start in tl.range(0, H, tile.chunk, num_stages=tile.stages):
        c = start + j
        if bias_row is None:
            u = zeros + features(tl.load(net.bias + c), TRANSPOSED)
        else:
            own = rows(bias_row * (3 * H + OUT), TRANSPOSED)
            u = zeros + tl.load(net.bias + features(c, TRANSPOSED) + own)
        u = linear(state, w_state, c, s, u, PRECISION, TRANSPOSED)
        u = linear(x, w_action, c, a, u, PRECISION, TRANSPOSED) * SCALE
        hidden = operand(mish(u, PRECISION), PRECISION)
        if saved is not None:
            store_features(saved.u, at, c, 3 * H, u, mask, TRANSPOSED)
            store_features(saved.h, at, c, 3 * H, hidden, mask, TRANSPOSED)
        z = linear(hidden, w_2, h, c, z, PRECISION, TRANSPOSED)
    z = z * SCALE
    hidden_2 = operand(mish(z, PRECISION), PRECISION)
    if saved is not None:
        store_features(saved.u, at, H + h, 3 * H, z, mask, TRANSPOSED)
        store_features(saved.h, at, H + h, 3 * H, hidden_2, mask, TRANSPOSED)
    y = zeros + features(tl.load(net.bias + 3 * H + out), TRANSPOSED)
    for start in tl.range(0, H, tile.chunk, num_stages=tile.stages):
        c = start + j
        u = zeros + features(tl.load(net.bias + 2 * H + c), TRANSPOSED)
        u = linear(hidden_2, w_3, c, h, u, PRECISION, TRANSPOSED) * SCALE
        hidden = operand(mish(u, PRECISION), PRECISION)
        if saved is not None:
            store_features(saved.u, at, 2 * H + c, 3 * H, u, mask, TRANSPOSED)
            store_features(saved.h, at, 2 * H + c, 3 * H, hidden, mask, TRANSPOSED)
        y = linear(hidden, w_4, out, c, y, PRECISION, TRANSPOSED)
    return y * SCALE


@triton.jit
def network_gradient(dy, net, u, du, at, mask, sizes: tl.constexpr, tile: tl.constexpr):
    """The gradient (ROWS, A) with respect to actions, from dy (ROWS, OUT), that of the outputs.

    u (n, 3·H): what network() saved at the rows `at`. du (n, 3·H), unless None, gets the gradients
    with respect to u₁, u₂, u₃: with mish(u) all that the weights' gradients need. Powers of two
    bring dy to where fp16 can hold what follows, and du₂ as well: a steep network's gradients grow
    from layer to layer.
    """
    A: tl.constexpr = sizes.A
    H: tl.constexpr = sizes.H
    SCALE: tl.constexpr = sizes.scale
    PRECISION: tl.constexpr = sizes.precision
    ROWS: tl.constexpr = tile.rows
    TRANSPOSED: tl.constexpr = tile.transposed
    # Strides are exchanged, so that products are with the transposed matrices.
    AT_1: tl.constexpr = H * sizes.S
    w_action = Matrix(net.weights + AT_1, net.low + AT_1, 1, A)
    AT_2: tl.constexpr = AT_1 + H * A
    w_2 = Matrix(net.weights + AT_2, net.low + AT_2, 1, H)
    AT_3: tl.constexpr = AT_2 + H * H
    w_3 = Matrix(net.weights + AT_3, net.low + AT_3, 1, H)
    AT_4: tl.constexpr = AT_3 + H * H
    w_4 = Matrix(net.weights + AT_4, net.low + AT_4, 1, H)
    a, h = tl.arange(0, A), tl.arange(0, H)
    j, out = tl.arange(0, tile.chunk), tl.arange(0, sizes.OUT)
    tl.debug_barrier()  # other threads of this program have written to u
    up, down = power_of_two(dy, PRECISION)
    dy = operand(dy * up, PRECISION)
    zeros = rows(tl.zeros([ROWS], tl.float32), TRANSPOSED)
    total = zeros + features(h * 0.0, TRANSPOSED)
    for start in tl.range(0, H, tile.chunk, num_stages=tile.stages):
        c = start + j
        d = zeros + features(c * 0.0, TRANSPOSED)
        d = linear(dy, w_4, c, out, d, PRECISION, TRANSPOSED) * SCALE
        d = d * mish_slope(load_features(u, at, 2 * H + c, 3 * H, mask, TRANSPOSED))
        if du is not None:
            store_features(du, at, 2 * H + c, 3 * H, d * down, mask, TRANSPOSED)
        total = linear(operand(d, PRECISION), w_3, h, c, total, PRECISION, TRANSPOSED)
    u_2 = load_features(u, at, H + h, 3 * H, mask, TRANSPOSED)
    d_2 = total * SCALE * mish_slope(u_2)
    if du is not None:
        store_features(du, at, H + h, 3 * H, d_2 * down, mask, TRANSPOSED)
    up, down_2 = power_of_two(d_2, PRECISION)
    d_2 = operand(d_2 * up, PRECISION)
    down *= down_2
    dx = zeros + features(a * 0.0, TRANSPOSED)
    for start in tl.range(0, H, tile.chunk, num_stages=tile.stages):
        c = start + j
        d = zeros + features(c * 0.0, TRANSPOSED)
        d = linear(d_2, w_2, c, h, d, PRECISION, TRANSPOSED) * SCALE
        d = d * mish_slope(load_features(u, at, c, 3 * H, mask, TRANSPOSED))
        if du is not None:
            store_features(du, at, c, 3 * H, d * down, mask, TRANSPOSED)
        dx = linear(operand(d, PRECISION), w_action, a, c, dx, PRECISION, TRANSPOSED)
    return dx * (SCALE * down)


@triton.jit
def load_states(states, row, mask, sizes: tl.constexpr, tile: tl.constexpr):
    """Rows row (ROWS,) of states (n, state_dim), padded to S columns: an operand() of a product.

    Rows that the mask leaves out are 0.
    """
    PRECISION: tl.constexpr = sizes.precision
    s = tl.arange(0, sizes.S)
    column = features(s, tile.transposed)
    where = rows(row.to(tl.int64), tile.transposed) * sizes.state_dim + column
    within = features(s < sizes.state_dim, tile.transposed) & rows(mask, tile.transposed)
    return operand(tl.load(states + where, mask=within, other=0.0), PRECISION)


@triton.jit
def store_inputs(inputs, row, mask, state, x, t, sizes: tl.constexpr, tile: tl.constexpr):
    """Rows [state | x | one-hot t] of inputs (n, sizes.inputs), for the first layer's gradient.

    state (ROWS, S), x (ROWS, A), t (ROWS,); where sizes.T is 0 there is no t.
    """
    SA: tl.constexpr = sizes.S + sizes.A
    WIDTH: tl.constexpr = sizes.inputs
    TRANSPOSED: tl.constexpr = tile.transposed
    s, a = tl.arange(0, sizes.S), sizes.S + tl.arange(0, sizes.A)
    store_features(inputs, row, s, WIDTH, state.to(tl.float32), mask, TRANSPOSED)
    store_features(inputs, row, a, WIDTH, x.to(tl.float32), mask, TRANSPOSED)
    for first in tl.static_range(0, WIDTH - SA, 16):
        step = first + tl.arange(0, 16)
        hot = tl.where(features(step, TRANSPOSED) == rows(t, TRANSPOSED), 1.0, 0.0)
        store_features(inputs, row, SA + step, WIDTH, hot, mask, TRANSPOSED)


@triton.jit
def reverse_chain(
    state, noise, stream, row, valid, n_rows, chain, net, zero,
    sizes: tl.constexpr, tile: tl.constexpr, trace=None,
):  # fmt: skip
    """All T steps -> actions (ROWS, A), which still have to be clamped to ±max_action.

    a_{t-1} = c₂·clamp(c₀·a_t - c₁·ε_θ(a_t, t, s)) + c₃·a_t + c₄·z (paper, eq. 1 and its posterior).

    state (ROWS, S), see load_states(). row (ROWS,) int32: which of n_rows each row is, for its
    noise; rows that are not valid get 0. noise: a Noise, or None to draw from the stream. trace: a
    Trace, for training. zero: a 0 that the compiler does not know, see shift_weights().
    """
    A: tl.constexpr = sizes.A
    T: tl.constexpr = sizes.T
    TRANSPOSED: tl.constexpr = tile.transposed
    a = tl.arange(0, A)
    within = features(a < sizes.action_dim, TRANSPOSED) & rows(valid, TRANSPOSED)
    # 64-bit: 2²² rows of 128 times 50 steps of noise are beyond 2³¹ elements.
    where = rows(row.to(tl.int64), TRANSPOSED) * sizes.action_dim + features(a, TRANSPOSED)
    step_size = tl.full([], sizes.action_dim, tl.int64) * n_rows
    if noise is None:
        x = normals(stream.seed, stream.draw, stream.first, row, A)
        if TRANSPOSED:
            x = tl.trans(x)
        x = tl.where(within, x, 0.0)
    else:
        x = tl.load(noise.x_T + where, mask=within, other=0.0)
    for k in tl.range(0, T):
        t = T - 1 - k
        here = Net(net.bias + t * (3 * sizes.H + A), net.weights, net.low)
        here = shift_weights(here, t * zero)
        if trace is None:
            epsilon = network(state, x, here, sizes, tile)
        else:
            now = trace.at + k * trace.step
            store_inputs(trace.inputs, now, trace.mask, state, x, t + row * 0, sizes, tile)
            epsilon = network(state, x, here, sizes, tile, trace.saved, now, trace.mask)
            store_features(trace.epsilons, now, a, A, epsilon, trace.mask, TRANSPOSED)
        c = chain.coefficients + t * 5
        x_0 = clamp(tl.load(c) * x - tl.load(c + 1) * epsilon, chain.max_action)
        x = tl.load(c + 2) * x_0 + tl.load(c + 3) * x
        if t > 0:
            if noise is None:
                z = normals(stream.seed, stream.draw, stream.first + k + 1, row, A)
                if TRANSPOSED:
                    z = tl.trans(z)
            else:
                z = tl.load(noise.noises + k * step_size + where, mask=within, other=0.0)
            x = x + tl.load(c + 4) * z
        x = tl.where(within, x, 0.0)
    return x


@triton.jit
def chain_gradient(g, trace, du, dy, chain, net, zero, sizes: tl.constexpr, tile: tl.constexpr):
    """reverse_chain() backwards from g (ROWS, A), the gradient of its actions before the clamp.

    Leaves the gradients of all T passes through the network: in du (n, 3·H) what network_gradient()
    does, in dy (n, A) those of ε_θ, at the rows of the trace.
    """
    A: tl.constexpr = sizes.A
    TRANSPOSED: tl.constexpr = tile.transposed
    a, mask = tl.arange(0, A), trace.mask
    within = features(a < sizes.action_dim, TRANSPOSED) & rows(mask, TRANSPOSED)
    for t in tl.range(0, sizes.T):
        now = trace.at + (sizes.T - 1 - t) * trace.step
        x = load_features(trace.inputs, now, sizes.S + a, sizes.inputs, mask, TRANSPOSED)
        epsilon = load_features(trace.epsilons, now, a, A, mask, TRANSPOSED)
        c = chain.coefficients + t * 5
        x_0 = tl.load(c) * x - tl.load(c + 1) * epsilon
        # As torch.clamp, whose bounds pass gradients.
        g_0 = tl.where(tl.abs(x_0) <= chain.max_action, g * tl.load(c + 2), 0.0)
        d = tl.where(within, -tl.load(c + 1) * g_0, 0.0)
        store_features(dy, now, a, A, d, mask, TRANSPOSED)
        here = shift_weights(net, t * zero)
        dx = network_gradient(d, here, trace.saved.u, du, now, mask, sizes, tile)
        g = tl.where(within, tl.load(c + 3) * g + tl.load(c) * g_0 + dx, 0.0)
