"""Device functions the kernels share: mish in base 2, random numbers, matrix products at four precisions, and layouts.

A kernel holds its activations either with rows on the first axis, (rows, features), or turned, (features, rows): TURNED is
a compile-time constant of every function that has to know.
"""

import triton
import triton.language as tl


@triton.jit
def mish(u, PTX: tl.constexpr):
    """log2(e)·mish(x) of u = log2(e)·x. With e = exp(x) = 2^u, mish(x) = x - x/(1 + e + e²/2).

    Packing scales what enters the first activation by log2(e) and what leaves the last one by its inverse; in between the
    factor passes through. PTX: four elements share one reciprocal, 1.25 special-function operations each instead of 2.
    Beyond u = 15 the quotient is less than rounding, so e may be clamped where the product of four must not overflow.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 e, a, b, c, d, p, q, r;
            min.f32 e, $4, 0f41700000; ex2.approx.ftz.f32 e, e;
            fma.rn.f32 a, e, 0f3F000000, 0f3F800000; fma.rn.f32 a, e, a, 0f3F800000;
            min.f32 e, $5, 0f41700000; ex2.approx.ftz.f32 e, e;
            fma.rn.f32 b, e, 0f3F000000, 0f3F800000; fma.rn.f32 b, e, b, 0f3F800000;
            min.f32 e, $6, 0f41700000; ex2.approx.ftz.f32 e, e;
            fma.rn.f32 c, e, 0f3F000000, 0f3F800000; fma.rn.f32 c, e, c, 0f3F800000;
            min.f32 e, $7, 0f41700000; ex2.approx.ftz.f32 e, e;
            fma.rn.f32 d, e, 0f3F000000, 0f3F800000; fma.rn.f32 d, e, d, 0f3F800000;
            mul.f32 p, a, b; mul.f32 q, c, d; mul.f32 r, p, q; rcp.approx.ftz.f32 r, r; neg.f32 r, r;
            mul.f32 q, q, r; mul.f32 p, p, r;
            mul.f32 b, b, q; mul.f32 a, a, q; mul.f32 d, d, p; mul.f32 c, c, p;
            fma.rn.f32 $0, $4, b, $4; fma.rn.f32 $1, $5, a, $5; fma.rn.f32 $2, $6, d, $6; fma.rn.f32 $3, $7, c, $7; }""",
            "=f,=f,=f,=f,f,f,f,f",
            [u],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    e = tl.exp2(tl.minimum(u, 60.0))
    return u - u / (e * (e * 0.5 + 1.0) + 1.0)


@triton.jit
def mish_slope(u):
    """mish'(x) at u = log2(e)·x, which also is the derivative of mish(u) above. With k = e + e²/2 and r = 1/(k + 1) it is
    r·(k + x·e·(1 + e)·r); beyond u = 30 it is 1."""
    e = tl.exp2(tl.minimum(u, 30.0))
    k = e + 0.5 * e * e
    r = 1.0 / (k + 1.0)
    return r * (k + (u * 0.6931471805599453) * e * (1.0 + e) * r)


@triton.jit
def power_of_two(x, PRECISION: tl.constexpr):
    """(up, down), powers of two with up·down = 1: up·x has its largest element within 2⁸ to 2⁹. Both 1 for float32 operands.

    fp16 has no numbers below 2⁻²⁴ and few below 2⁻¹⁴, and gradients are that small. NaN and infinity stay what they are.
    """
    if PRECISION == "fp16" or PRECISION == "fp16x3":
        largest = tl.max(tl.max(tl.abs(x), 1), 0)
        exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 27)
        up = ((262 - exponent) << 23).to(tl.float32, bitcast=True)
        down = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    else:
        up = 1.0
        down = 1.0
    return up, down


@triton.jit
def _uniform(a):
    """uint32 -> U(0, 1), never 0 nor 1: the odd multiples of 2⁻²⁴."""
    return ((a >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³


@triton.jit
def _box_muller(a, b):
    """Two uniform uint32 -> two independent standard normals, within ±5.8: the smallest uniform is 2⁻²⁴.

    Sine and cosine are polynomials on an eighth of a turn, to which the angle is reduced exactly: libdevice's cosine would
    bring a slow path and a stack frame.
    """
    turn = (b >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2⁻²⁴
    radius = tl.sqrt(-2.0 * tl.log(_uniform(a)))
    nearest = tl.floor(turn * 4.0 + 0.5)
    w = (turn - nearest * 0.25) * 6.283185307179586
    quarter = nearest.to(tl.int32)
    w2 = w * w
    s = w * (1.0 + w2 * (-1.6666666e-1 + w2 * (8.3333310e-3 + w2 * -1.9840874e-4)))
    c = 1.0 + w2 * (-0.5 + w2 * (4.1666640e-2 + w2 * (-1.3888397e-3 + w2 * 2.4760495e-5)))
    odd = (quarter & 1) == 1
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)
    sine = tl.where((quarter & 2) == 2, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, draw, step, row, COLUMNS: tl.constexpr):
    """N(0,1), (rows, COLUMNS): a function of seed, draw, step, row (rows,) int32 and column alone, whatever the tile.

    Philox-4x32-10's counter is (row, column // 4, step, draw); its four words give four normals side by side.
    """
    group = tl.arange(0, COLUMNS // 4)
    zero = row[:, None] * 0 + group[None, :] * 0
    a, b, c, d = tl.philox(seed, row[:, None] + zero, group[None, :] + zero, zero + step, zero + draw)
    n0, n1 = _box_muller(a, b)
    n2, n3 = _box_muller(c, d)
    pairs = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(pairs, [row.shape[0], COLUMNS])


@triton.jit
def gumbels(seed, draw, step, row):
    """Standard Gumbel noise, like row (n,) int32: the argmax of q + noise is a draw from softmax(q)."""
    zero = row * 0
    a, _, _, _ = tl.philox(seed, row, zero, zero + step, zero + draw)
    return -tl.log(-tl.log(_uniform(a)))


@triton.jit
def clamp(x, bound):
    """x within ±bound; NaN stays NaN, as with torch.clamp, so that a diverged network is seen."""
    above = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def features(v, TURNED: tl.constexpr):
    """A vector along the axis of features."""
    return v[:, None] if TURNED else v[None, :]


@triton.jit
def rows(v, TURNED: tl.constexpr):
    """A vector along the axis of rows."""
    return v[None, :] if TURNED else v[:, None]


@triton.jit
def load_features(memory, row, feature, stride, keep, TURNED: tl.constexpr):
    """Features of the rows row of (n, stride), those that keep says, 0 elsewhere."""
    where = rows(row, TURNED) * stride + features(feature, TURNED)
    return tl.load(memory + where, mask=rows(keep, TURNED), other=0.0)


@triton.jit
def store_features(memory, row, feature, stride, value, keep, TURNED: tl.constexpr):
    """The counterpart of load_features()."""
    where = rows(row, TURNED) * stride + features(feature, TURNED)
    tl.store(memory + where, value, mask=rows(keep, TURNED))


@triton.jit
def store_inputs(
    inputs, row, keep, state, x, t,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, T: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Rows [state | x | one-hot t] of inputs (n, S + A + T padded), what the first layer's weight gradients are made of; T 0: no t."""
    TIMES: tl.constexpr = (T + 15) // 16 * 16
    WIDTH: tl.constexpr = S + A + TIMES
    store_features(inputs, row, tl.arange(0, S), WIDTH, state.to(tl.float32), keep, TURNED)
    store_features(inputs, row, S + tl.arange(0, A), WIDTH, x.to(tl.float32), keep, TURNED)
    for first in tl.static_range(0, TIMES, 16):
        step = first + tl.arange(0, 16)
        hot = tl.where(features(step, TURNED) == rows(t, TURNED), 1.0, 0.0)
        store_features(inputs, row, S + A + step, WIDTH, hot, keep, TURNED)


@triton.jit
def _dot(x, w, total, INPUTS: tl.constexpr, TURNED: tl.constexpr):
    if TURNED:
        total = tl.dot(w, x, total, input_precision=INPUTS)
    else:
        total = tl.dot(x, w, total, input_precision=INPUTS)
    return total


@triton.jit
def linear(
    x, weight, low, out_index, in_index, out_stride, in_stride, total, PRECISION: tl.constexpr, TURNED: tl.constexpr
):
    """total + x·Wᵀ, where W's element (o, i) lies at o·out_stride + i·in_stride, for o of out_index and i of in_index.

    With the strides exchanged it is a product with W, a step of a backward pass. fp16x3 splits x into two halves and meets
    weights that were split beforehand: three products, fp32's accuracy.
    """
    where = features(out_index, TURNED) * out_stride + rows(in_index, TURNED) * in_stride
    w = tl.load(weight + where)
    if PRECISION == "fp16x3":
        high = x.to(tl.float16)
        rest = (x - high.to(tl.float32)).to(tl.float16)
        w_low = tl.load(low + where)
        total = _dot(rest, w, total, "ieee", TURNED)
        total = _dot(high, w_low, total, "ieee", TURNED)
        total = _dot(high, w, total, "ieee", TURNED)
    elif PRECISION == "fp16":
        total = _dot(x.to(tl.float16), w, total, "ieee", TURNED)
    elif PRECISION == "tf32":
        total = _dot(x, w, total, "tf32", TURNED)
    else:
        total = _dot(x, w, total, "ieee", TURNED)
    return total
