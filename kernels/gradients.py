"""The launches of an update that make the gradients of the weights, from what training.py leaves.

weight_gradients sums outer products over the rows, for all four layers of a network. time_gradient
goes on to the network that embeds the timestep. Shapes as in training.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .ops import mish, mish_slope, power_of_two, to_tf32
from .training import td_errors

LOG2E = tl.constexpr(1.4426950408889634)


class Layout(NamedTuple):
    """Where a network's gradients stand in its agent's flat vector.

    The order is that of module.parameters().
    """

    base: int  # numbers before the first network
    size: int  # numbers of a network
    networks: int  # of a module
    columns: int  # of the first layer's weights
    state_at: int  # the first of them that belongs to the state
    action_at: int  # and to the action
    outputs: int  # of the last layer, without padding


class Sums(NamedTuple):
    """How much weight_gradients() adds up."""

    batch: int  # rows that make the mean loss: the first ones
    targets: int  # samples that each critic's target is the largest of
    rows: int  # all rows: those after the batch belong to the chain
    tiles: int  # of a batch, which have each left values
    norms: int  # sums of squares that an agent's programs leave


class Factors(NamedTuple):
    """Two matrices whose product over their rows makes a gradient: du[r, o]·v[r, i]."""

    du: torch.Tensor  # (n, du_width), read from its first column on
    du_width: int
    v: torch.Tensor  # (n, v_width)
    v_width: int


class Layer(NamedTuple):
    """One layer for _layer()."""

    inputs: int
    outputs: int
    columns: int  # of its weights in the flat vector
    first: bool  # its inputs are in store_inputs()'s order, and no activation precedes it
    scale: float  # from products of packed numbers to the weights' gradient
    bias_scale: float
    out_tile: int  # outputs that a program takes


@triton.jit
def _product(
    factors, bellman, o, i, i_end, FIRST: tl.constexpr, LAST: tl.constexpr,
    sums: tl.constexpr, tile: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ du[r, o]·v[r, i] over rows FIRST to LAST, (len(o), len(i)), and Σ du[r, o].

    Of a critic du is multiplied by the rows' errors. Columns from i_end on count as 0.
    """
    total = o[:, None] * 0.0 + i[None, :] * 0.0
    bias = o * 0.0
    for start in tl.range(FIRST, LAST, tile.rows, num_stages=tile.stages):
        r = start + tl.arange(0, tile.rows)
        there = (r < LAST)[:, None] & (i < i_end)[None, :]
        d_at = factors.du + r[None, :] * factors.du_width + o[:, None]
        d = tl.load(d_at, mask=(r < LAST)[None, :], other=0.0)
        if bellman is not None:
            critic, agent = tl.program_id(1), tl.program_id(2)
            d *= td_errors(bellman, agent, critic, r, r < LAST, sums.batch, sums.targets)[None, :]
        x_at = factors.v + r[:, None] * factors.v_width + i[None, :]
        x = tl.load(x_at, mask=there, other=0.0).to(tl.float32)
        bias += tl.sum(d, 1)
        if PRECISION == "fp16x3":
            up, down = power_of_two(d, PRECISION)
            x_up, x_down = power_of_two(x, PRECISION)
            d, x = d * up, x * x_up
            d_high, x_high = d.to(tl.float16), x.to(tl.float16)
            d_rest = (d - d_high.to(tl.float32)).to(tl.float16)
            x_rest = (x - x_high.to(tl.float32)).to(tl.float16)
            part = tl.dot(d_rest, x_high)
            part = tl.dot(d_high, x_rest, part)
            part = tl.dot(d_high, x_high, part)
            total += (down * x_down) * part
        elif PRECISION == "fp16" or PRECISION == "tf32":
            # tf32 in both: fp16's eleven bits, and float32's range for whatever sizes rows have.
            total = tl.dot(to_tf32(d), to_tf32(x), total, input_precision="tf32")
        else:
            total = tl.dot(d, x, total, input_precision="ieee")
    return total, bias


@triton.jit
def _layer(
    factors, bellman, layer, index, cloned, climbed, gradient, table, norms,
    sums: tl.constexpr, layout: tl.constexpr, sizes: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Tile number `index` of one layer's gradient: of its weights, in column 0 also of its biases.

    gradient: (outputs, columns) and then (outputs,). Of the first layer's inputs those that are the
    timestep go to table (T, H). cloned and climbed multiply the batch's rows and those of the
    chain; climbed is None where there is nothing to climb. norms gets the tile's sum of squares.
    """
    S: tl.constexpr = sizes.S
    PRECISION: tl.constexpr = sizes.precision
    TILES_IN: tl.constexpr = triton.cdiv(layer.inputs, tile.inputs)
    column_tile = index % TILES_IN
    o = (index // TILES_IN) * layer.out_tile + tl.arange(0, layer.out_tile)
    i = column_tile * tile.inputs + tl.arange(0, tile.inputs)
    total, bias = _product(
        factors, bellman, o, i, layer.inputs, 0, sums.batch, sums, tile, PRECISION
    )
    total, bias = total * cloned, bias * cloned
    if climbed is not None:
        more, more_bias = _product(
            factors, bellman, o, i, layer.inputs, sums.batch, sums.rows, sums, tile, PRECISION
        )
        total, bias = total + more * climbed, bias + more_bias * climbed
    total, bias = total * layer.scale, bias * layer.bias_scale
    if layer.first:
        column = tl.where(i < S, layout.state_at + i, layout.action_at + i - S)
        there = tl.where(i < S, i < sizes.state_dim, i - S < sizes.action_dim)
        if sizes.T > 0:
            t = i - S - sizes.A
            timed = ((t >= 0) & (t < sizes.T))[None, :] & (o < layer.outputs)[:, None]
            tl.store(table + t[None, :] * sizes.H + o[:, None], total, mask=timed)
    else:
        column, there = i, i < layer.columns
    within = (o < layer.outputs)[:, None] & there[None, :]
    tl.store(gradient + o[:, None] * layer.columns + column[None, :], total, mask=within)
    norm = tl.sum(tl.sum(tl.where(within, total * total, 0.0), 1), 0)
    if column_tile == 0:
        own = o < layer.outputs
        tl.store(gradient + layer.outputs * layer.columns + o, bias, mask=own)
        norm += tl.sum(tl.where(own, bias * bias, 0.0), 0)
    tl.store(norms, norm)


@triton.jit
def weight_gradients(
    activations, bellman, gradient, table, norms, values, eta, cloned,
    sums: tl.constexpr, layout: tl.constexpr, sizes: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Programs (tile, network, agent): dW = Σ du ⊗ v over the rows, of all four layers.

    bellman: a Bellman, of critics; else None. gradient (n, base + networks·size). cloned makes a
    mean loss of the batch's rows; the chain's get -η/(B·mean|Q_j|) from values (n, 2, tiles), which
    is None where nothing is climbed. norms (n, norms) gets a program's sum of squares. table
    (n, T, H), of a policy: gradients of the first layer's pre-activations, summed for each
    timestep; else None.
    """
    H: tl.constexpr = sizes.H
    OUT: tl.constexpr = sizes.OUT
    INPUTS: tl.constexpr = sizes.inputs
    pid, network, agent = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wide = agent.to(tl.int64)
    own = (wide * layout.networks + network) * sums.rows
    inputs = activations.inputs + wide * sums.rows * INPUTS
    h, du = activations.saved.h + own * 3 * H, activations.du + own * 3 * H
    dy = activations.dy + own * OUT
    gradient += wide * (layout.base + layout.networks * layout.size)
    gradient += layout.base + network * layout.size
    if table is not None:
        table += agent * sizes.T * H
    norms += agent * sums.norms + network * tl.num_programs(0) + pid
    climbed = None
    if values is not None:
        k = tl.arange(0, triton.next_power_of_2(sums.tiles))
        of_other = values + (2 * agent + 1) * sums.tiles + k
        scale = tl.sum(tl.load(of_other, mask=k < sums.tiles, other=0.0), 0)
        climbed = -eta / scale  # mean Q_i / mean|Q_j| = sum Q_i / sum|Q_j|
    OUT_TILES: tl.constexpr = H // tile.outputs
    FIRST_TILES: tl.constexpr = OUT_TILES * triton.cdiv(INPUTS, tile.inputs)
    HIDDEN_TILES: tl.constexpr = OUT_TILES * (H // tile.inputs)
    SECOND: tl.constexpr = H * layout.columns + H
    HIDDEN: tl.constexpr = H * H + H
    if pid < FIRST_TILES:
        _layer(
            Factors(du, 3 * H, inputs, INPUTS), bellman,
            Layer(INPUTS, H, layout.columns, True, LOG2E, LOG2E, tile.outputs),
            pid, cloned, climbed, gradient, table, norms, sums, layout, sizes, tile,
        )  # fmt: skip
    elif pid < FIRST_TILES + 2 * HIDDEN_TILES:
        third = (pid - FIRST_TILES) // HIDDEN_TILES
        _layer(
            Factors(du + (1 + third) * H, 3 * H, h + third * H, 3 * H), bellman,
            Layer(H, H, H, False, 1.0, LOG2E, tile.outputs),
            (pid - FIRST_TILES) % HIDDEN_TILES, cloned, climbed,
            gradient + SECOND + third * HIDDEN, table, norms, sums, layout, sizes, tile,
        )  # fmt: skip
    else:
        _layer(
            Factors(dy, OUT, h + 2 * H, 3 * H), bellman,
            Layer(H, layout.outputs, H, False, 1.0 / LOG2E, 1.0, OUT),
            pid - FIRST_TILES - 2 * HIDDEN_TILES, cloned, climbed,
            gradient + SECOND + 2 * HIDDEN, table, norms, sums, layout, sizes, tile,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# The time embedding's network, in float32: sin/cos -> D -> 2·D -> D, D = 16
# -------------------------------------------------------------------------------------------------


class TimeSizes(NamedTuple):
    """The sizes of the network that embeds timesteps, and of the policy that it is part of."""

    size: int  # numbers of all parameters
    columns: int  # of the first layer's weights
    time_at: int  # the first of them that belongs to the embedding
    H: int
    T: int
    T_padded: int
    D: int
    chunk: int  # hidden units at a time


@triton.jit
def embedding(parameters, sinusoids, t, sizes: tl.constexpr):
    """-> sinusoids (len(t), D), log2(e)·pre-activations (len(t), 2·D), embedding (len(t), D)."""
    D: tl.constexpr = sizes.D
    d, wide = tl.arange(0, D), tl.arange(0, 2 * D)
    known = (t < sizes.T)[:, None]
    wave = tl.load(sinusoids + t[:, None] * D + d[None, :], mask=known, other=0.0)
    w_1 = tl.load(parameters + wide[None, :] * D + d[:, None])  # (D, 2·D): transposed
    bias_1 = tl.load(parameters + 2 * D * D + wide)[None, :]
    u = tl.dot(wave, w_1, input_precision="ieee") + bias_1
    u = u * LOG2E
    second = parameters + 2 * D * D + 2 * D
    w_2 = tl.load(second + d[None, :] * 2 * D + wide[:, None])  # (2·D, D): transposed
    embedded = tl.dot(mish(u, "fp32") * (1.0 / LOG2E), w_2, input_precision="ieee")
    return wave, u, embedded + tl.load(parameters + 4 * D * D + 2 * D + d)[None, :]


@triton.jit
def time_gradient(
    parameters, sinusoids, table, gradient, norms, NORMS: tl.constexpr, sizes: tl.constexpr
):
    """Programs (agent,): gradients of the first layer's time columns and of what embeds t.

    table (n, T, H) is weight_gradients()'s; parameters and gradient (n, size); sinusoids (T, D).
    The sum of squares goes to the last of the NORMS numbers of norms (n, NORMS).
    """
    H: tl.constexpr = sizes.H
    T: tl.constexpr = sizes.T
    D: tl.constexpr = sizes.D
    agent = tl.program_id(0)
    parameters, gradient = parameters + agent * sizes.size, gradient + agent * sizes.size
    BASE: tl.constexpr = 4 * D * D + 3 * D
    T_PADDED: tl.constexpr = sizes.T_padded
    t, d, wide = tl.arange(0, T_PADDED), tl.arange(0, D), tl.arange(0, 2 * D)
    wave, u, embedded = embedding(parameters, sinusoids, t, sizes)
    d_embedded = tl.zeros([T_PADDED, D], tl.float32)
    norm = 0.0
    for start in tl.range(0, H, sizes.chunk):
        h = start + tl.arange(0, sizes.chunk)
        g_at = table + (agent * T + t[:, None]) * H + h[None, :]
        g = tl.load(g_at, mask=(t < T)[:, None], other=0.0)
        where = BASE + h[:, None] * sizes.columns + sizes.time_at + d[None, :]
        w = tl.load(parameters + where)
        d_embedded = tl.dot(g, w, d_embedded, input_precision="ieee")
        dw = tl.dot(tl.trans(g), embedded, input_precision="ieee")
        tl.store(gradient + where, dw)
        norm += tl.sum(tl.sum(dw * dw, 1), 0)
    second = 2 * D * D + 2 * D + d[:, None] * 2 * D + wide[None, :]
    w_2 = tl.load(parameters + second)
    hidden = mish(u, "fp32") * (1.0 / LOG2E)
    dw_2 = tl.dot(tl.trans(d_embedded), hidden, input_precision="ieee")
    db_2 = tl.sum(d_embedded, 0)
    du = tl.dot(d_embedded, w_2, input_precision="ieee") * mish_slope(u)
    dw_1 = tl.dot(tl.trans(du), wave, input_precision="ieee")
    db_1 = tl.sum(du, 0)
    tl.store(gradient + wide[:, None] * D + d[None, :], dw_1)
    tl.store(gradient + 2 * D * D + wide, db_1)
    tl.store(gradient + second, dw_2)
    tl.store(gradient + 4 * D * D + 2 * D + d, db_2)
    norm += (
        tl.sum(tl.sum(dw_1 * dw_1, 1), 0)
        + tl.sum(db_1 * db_1, 0)
        + tl.sum(tl.sum(dw_2 * dw_2, 1), 0)
        + tl.sum(db_2 * db_2, 0)
    )
    tl.store(norms + agent * NORMS + NORMS - 1, norm)
