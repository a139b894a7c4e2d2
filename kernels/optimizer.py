"""The launches that end an update: clipping, Adam, averages, packed copies, metrics.

Shapes as in training.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gradients import LOG2E, embedding
from .ops import operand


class Vectors(NamedTuple):
    """Flat vectors (n, size) of one kind of network: an agent's parameters and what Adam keeps."""

    parameters: torch.Tensor
    gradient: torch.Tensor
    momentum: torch.Tensor
    variance: torch.Tensor
    average: torch.Tensor


class Destination(NamedTuple):
    """Where parameters go in the packed copies, the same for each agent.

    place: an index into an agent's packed weights; -1: nowhere; -2 - k: number k of its packed
    biases.
    """

    place: torch.Tensor  # (size,)
    factor: torch.Tensor  # (size,): what the parameter is multiplied by


class Averaging(NamedTuple):
    """average ← average + rate·(p - average) at every `every`-th step from start on."""

    rate: float
    start: int
    every: int


class Adam(NamedTuple):
    """Adam's constants, and the sizes of what it works on."""

    beta_1: float
    beta_2: float
    log_beta_1: float
    log_beta_2: float
    eps: float
    size: int  # parameters of an agent
    norms: int  # sums of squares that make the norm of an agent's gradient
    weights: int  # numbers in a packed copy of the weights
    biases: int  # and of the biases
    precision: str
    block: int  # parameters that a program takes


@triton.jit
def _one_minus_power(base_log, n):
    """1 - exp(base_log·n) for base_log < 0; by the exponential's series where it would cancel."""
    y = base_log * n
    small, series = tl.maximum(y, -0.5), 1.0
    for k in tl.static_range(0, 9):
        series = 1.0 + series * small / (10 - k)
    return tl.where(y > -0.5, -y * series, 1.0 - tl.exp(y))


@triton.jit
def _norm(squares, N: tl.constexpr):
    """The root of the sum of squares (N,)."""
    r = tl.arange(0, triton.next_power_of_2(N))
    return tl.sqrt(tl.sum(tl.load(squares + r, mask=r < N, other=0.0), 0))


@triton.jit
def adam(
    vectors, destination, net, norms, max_norm, rate, steps, adam_steps, averaging,
    settings: tl.constexpr,
):  # fmt: skip
    """Programs (block, agent): clip by the global norm, Adam, average, packed copies of both.

    norms (n, norms): sums of squares of the gradient, or None not to clip. rate (1,): the learning
    rate. steps, adam_steps (n,). net holds each agent's copies, the average's and the parameters'.
    """
    PRECISION: tl.constexpr = settings.precision
    agent = tl.program_id(1)
    i = tl.program_id(0) * settings.block + tl.arange(0, settings.block)
    there = i < settings.size
    at = agent.to(tl.int64) * settings.size + i
    g = tl.load(vectors.gradient + at, mask=there, other=0.0)
    if norms is not None:
        norm = _norm(norms + agent * settings.norms, settings.norms)
        clip = tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
        g = g * clip
    step, n = tl.load(steps + agent), tl.load(adam_steps + agent) + 1.0
    m = tl.load(vectors.momentum + at, mask=there, other=0.0)
    v = tl.load(vectors.variance + at, mask=there, other=0.0)
    m = m + (1.0 - settings.beta_1) * (g - m)
    v = settings.beta_2 * v + (1.0 - settings.beta_2) * g * g
    p = tl.load(vectors.parameters + at, mask=there, other=0.0)
    size = tl.load(rate) / _one_minus_power(settings.log_beta_1, n)
    root = tl.sqrt(v) / tl.sqrt(_one_minus_power(settings.log_beta_2, n))
    p = p - size * m / (root + settings.eps)
    e = tl.load(vectors.average + at, mask=there, other=0.0)
    due = (step % averaging.every == 0) & (step >= averaging.start)
    e = tl.where(due, e + averaging.rate * (p - e), e)
    tl.store(vectors.momentum + at, m, mask=there)
    tl.store(vectors.variance + at, v, mask=there)
    tl.store(vectors.parameters + at, p, mask=there)
    tl.store(vectors.average + at, e, mask=there)
    to = tl.load(destination.place + i, mask=there, other=-1)
    factor = tl.load(destination.factor + i, mask=there, other=0.0)
    for copy in tl.static_range(0, 2):
        value = (e if copy == 0 else p) * factor
        where = (2 * agent + copy) * settings.weights + to
        high = operand(value, PRECISION).to(net.weights.dtype.element_ty)
        tl.store(net.weights + where, high, mask=to >= 0)
        if PRECISION == "fp16x3":
            low = (value - high.to(tl.float32)).to(tl.float16)
            tl.store(net.low + where, low, mask=to >= 0)
        bias = net.bias + (2 * agent + copy) * settings.biases
        tl.store(bias - 2 - to, value, mask=to < -1)


@triton.jit
def _add(place, value):
    tl.store(place, tl.load(place) + value)


@triton.jit
def finish(
    vectors, sinusoids, net, memory, norms, eta, metrics, steps, adam_steps, B,
    counts: tl.constexpr, time: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """Programs (copy, agent): a policy's packed biases (T, 3·H + OUT), averaged and current.

    Those of the first layer hold the time embedding. Unless metrics is None the second program also
    adds the update's metrics to metrics (n, 7), FusedUpdate.METRICS, and counts the step: steps
    (n,), adam_steps (2, n). norms.policy, norms.critic: sums of squares of the gradients.
    """
    H: tl.constexpr = sizes.H
    D: tl.constexpr = time.D
    copy, agent = tl.program_id(0), tl.program_id(1)
    if copy == 0:
        own = vectors.average + agent * time.size
    else:
        own = vectors.parameters + agent * time.size
    BASE: tl.constexpr = 4 * D * D + 3 * D
    FIRST: tl.constexpr = H * time.columns
    HIDDEN: tl.constexpr = H + H * H
    UNIT: tl.constexpr = LOG2E / sizes.scale
    t, d = tl.arange(0, time.T_padded), tl.arange(0, D)
    known = (t < sizes.T)[:, None]
    _, _, embedded = embedding(own, sinusoids, t, time)
    to = net.bias + ((2 * agent + copy) * sizes.T + t[:, None]) * (3 * H + sizes.OUT)
    for start in tl.range(0, H, time.chunk):
        h = start + tl.arange(0, time.chunk)
        w = tl.load(own + BASE + h[None, :] * time.columns + time.time_at + d[:, None])
        b_1 = tl.load(own + BASE + FIRST + h)
        b_2 = tl.load(own + BASE + FIRST + HIDDEN + h)
        b_3 = tl.load(own + BASE + FIRST + HIDDEN + HIDDEN + h)
        timed = tl.dot(embedded, w, input_precision="ieee") + b_1[None, :]
        tl.store(to + h[None, :], timed * UNIT, mask=known)
        tl.store(to + H + h[None, :], t[:, None] * 0.0 + (b_2 * UNIT)[None, :], mask=known)
        tl.store(to + 2 * H + h[None, :], t[:, None] * 0.0 + (b_3 * UNIT)[None, :], mask=known)
    out = tl.arange(0, sizes.OUT)
    last = own + time.size - sizes.action_dim
    b_4 = tl.load(last + out, mask=out < sizes.action_dim, other=0.0)
    same = t[:, None] * 0.0 + (b_4 / sizes.scale)[None, :]
    tl.store(to + 3 * H + out[None, :], same, mask=known)
    if metrics is not None:
        if copy == 1:
            part = tl.arange(0, triton.next_power_of_2(counts.tiles))
            there = part < counts.tiles
            losses = memory.losses + 3 * agent * counts.tiles + part
            of_policy = tl.load(losses + 2 * counts.tiles, mask=there, other=0.0)
            bc_loss = tl.sum(of_policy, 0) / (B * sizes.action_dim)
            norm = _norm(norms.policy + agent * counts.norms, counts.norms)
            q_loss = bc_loss * 0.0
            mine = metrics + 7 * agent
            if counts.critics > 0:
                both = tl.load(losses, mask=there, other=0.0)
                both += tl.load(losses + counts.tiles, mask=there, other=0.0)
                _add(mine, tl.sum(both, 0) / B)
                squares = norms.critic + agent * counts.critic_norms
                _add(mine + 1, _norm(squares, counts.critic_norms))
                values = memory.q_sums + 2 * agent * counts.tiles + part
                q = tl.sum(tl.load(values, mask=there, other=0.0), 0)
                q_loss = -q / tl.sum(tl.load(values + counts.tiles, mask=there, other=0.0), 0)
                _add(mine + 6, q / B)
                _add(adam_steps + tl.num_programs(1) + agent, 1.0)
            _add(mine + 2, bc_loss)
            _add(mine + 3, q_loss)
            tl.store(mine + 4, tl.load(mine + 4) + bc_loss + eta * q_loss)
            _add(mine + 5, norm)
            _add(adam_steps + agent, 1.0)
            _add(steps + agent, 1)
