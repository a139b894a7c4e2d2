"""Device functions the kernels share: mish, random numbers, matrix products, layouts.

A kernel holds its activations either as (rows, features) or transposed, as (features, rows). Shapes
in docstrings are those of the first; TRANSPOSED says which, to every function that has to know.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

# Whether kernels become machine code: the interpreter knows no assembly.
PTX = tl.constexpr(not triton.knobs.runtime.interpret)


def _mish_assembly(n: int) -> str:
    """PTX for u - u/(1 + w) of two or four elements that share one reciprocal.

    That takes 1 + 1/n special-function operations per element, which are what limits it. Beyond
    u = 15 the quotient is less than rounding, so 2^u may be clamped there: the product of four must
    not overflow. Registers $0 to $(n-1) are the results, the next n are u.
    """
    a = [f"a{i}" for i in range(n)]
    code = [f".reg .f32 e, r, s, {', '.join(a)};"]
    for i in range(n):
        code += [f"min.f32 e, ${n + i}, 0f41700000; ex2.approx.ftz.f32 e, e;"]  # 15
        code += [f"fma.rn.f32 {a[i]}, e, 0f3F000000, 0f3F800000;"]
        code += [f"fma.rn.f32 {a[i]}, e, {a[i]}, 0f3F800000;"]  # 1 + e·(1 + e/2)
    if n == 4:
        code += ["mul.f32 e, a0, a1; mul.f32 s, a2, a3;"]
        code += ["mul.f32 r, e, s; rcp.approx.ftz.f32 r, r; neg.f32 r, r;"]
        code += ["mul.f32 s, s, r; mul.f32 e, e, r;"]  # -1/(a0·a1), -1/(a2·a3)
        code += ["mul.f32 a0, a0, s; mul.f32 a1, a1, s; mul.f32 a2, a2, e; mul.f32 a3, a3, e;"]
    else:
        code += ["mul.f32 r, a0, a1; rcp.approx.ftz.f32 r, r; neg.f32 r, r;"]
        code += ["mul.f32 a0, a0, r; mul.f32 a1, a1, r;"]
    for i in range(n):  # a[i ^ 1] holds -1/(1 + w) of element i
        code += [f"fma.rn.f32 ${i}, ${n + i}, {a[i ^ 1]}, ${n + i};"]
    return " ".join(["{", *code, "}"])


# Early clobber (&): the first result is written before the last u is read.
_MISH_2, _MISH_4 = tl.constexpr(_mish_assembly(2)), tl.constexpr(_mish_assembly(4))
_REGISTERS_2 = tl.constexpr("=&f,=&f,f,f")
_REGISTERS_4 = tl.constexpr("=&f,=&f,=&f,=&f,f,f,f,f")


@triton.jit
def mish(u, PRECISION: tl.constexpr):
    """log2(e)·mish(x) of u = log2(e)·x.

    With e = exp(x) = 2^u and w = e + e²/2, mish(x) = x·w/(1 + w) = x - x/(1 + w). Packing scales
    what enters the first activation by log2(e) and what leaves the last one by its inverse; in
    between the factor passes through. Where rounding to eleven bits follows, the elements that a
    thread holds share reciprocals: an action then depends, in the last bits of its own rounding, on
    the rows beside its own in a tile.
    """
    ROUNDED: tl.constexpr = PRECISION == "fp16" or PRECISION == "tf32"
    # How many elements a thread holds at least: the assembly must not be given empty registers.
    EACH: tl.constexpr = u.numel // num_threads() if PTX and ROUNDED else 0
    if EACH >= 4:
        y = tl.inline_asm_elementwise(_MISH_4, _REGISTERS_4, [u], tl.float32, is_pure=True, pack=4)
    elif EACH >= 2:
        y = tl.inline_asm_elementwise(_MISH_2, _REGISTERS_2, [u], tl.float32, is_pure=True, pack=2)
    else:
        e = tl.exp2(tl.minimum(u, 60.0))
        w = e * (e * 0.5 + 1.0)
        r = 1.0 / (w + 1.0)
        y = tl.where(u < 0.0, u * (w * r), u - u * r)  # the difference would cancel below 0
    return y


@triton.jit
def mish_slope(u):
    """mish'(x) at u = log2(e)·x, which also is the derivative of mish(u) above.

    With k = e + e²/2 and r = 1/(k + 1) it is r·(k + x·e·(1 + e)·r); beyond u = 30 it is 1.
    """
    e = tl.exp2(tl.minimum(u, 30.0))
    k = e + 0.5 * e * e
    r = 1.0 / (k + 1.0)
    return r * (k + (u * 0.6931471805599453) * e * (1.0 + e) * r)


@triton.jit
def to_tf32(x):
    """x rounded to the eleven bits that a tensor core reads of a float32: it cuts off the rest."""
    if PTX:
        bits = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], tl.int32, is_pure=True, pack=1
        )
        y = bits.to(tl.float32, bitcast=True)
    else:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        y = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return y


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """float32 x as a matrix product of this precision takes it; fp16x3 splits it only there."""
    if PRECISION == "fp16":
        x = x.to(tl.float16)
    elif PRECISION == "tf32":
        x = to_tf32(x)
    return x


@triton.jit
def power_of_two(x, PRECISION: tl.constexpr):
    """Two powers of two, up and down = 1/up, that bring x to where fp16 can hold it and back.

    The largest element of up·x is within 1 to 2; in fp16x3, whose lower halves need room below, it
    is within 16 to 32. Both are 1 where products are float32. Gradients may be of any size, while
    fp16 ends at 2¹⁶ and loses bits below 2⁻¹⁴: scaled so, they may grow 30,000 times in a layer,
    and 2,000 times in fp16x3. NaN and infinity stay what they are.
    """
    if PRECISION == "fp16" or PRECISION == "fp16x3":
        TO: tl.constexpr = 4 if PRECISION == "fp16x3" else 0
        largest = tl.max(tl.abs(x))
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(exponent, 27), 253)  # so that neither is 0 nor infinite
        up = ((254 + TO - exponent) << 23).to(tl.float32, bitcast=True)
        down = ((exponent - TO) << 23).to(tl.float32, bitcast=True)
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
    """Two uniform uint32 -> two independent standard normals, within ±5.8.

    The bound is that of the least uniform, 2⁻²⁴. Sine and cosine are polynomials on an eighth of a
    turn, to which the angle is reduced exactly: libdevice's cosine would bring a slow path and a
    stack frame.
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
    """N(0,1), (ROWS, COLUMNS): a function of seed, draw, step, row (ROWS,) int32 and column alone.

    So the tile changes nothing. Philox-4x32-10's counter is (row, column // 4, step, draw); its
    four words give four normals side by side.
    """
    group = tl.arange(0, COLUMNS // 4)
    zero = row[:, None] * 0 + group[None, :] * 0
    row_0, column_0 = row[:, None] + zero, group[None, :] + zero
    a, b, c, d = tl.philox(seed, row_0, column_0, zero + step, zero + draw)
    n0, n1 = _box_muller(a, b)
    n2, n3 = _box_muller(c, d)
    pairs = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(pairs, [row.shape[0], COLUMNS])


@triton.jit
def gumbels(seed, draw, step, row):
    """Standard Gumbel noise, like row (n,): the argmax of q + noise is a draw from softmax(q)."""
    zero = row * 0
    a, _, _, _ = tl.philox(seed, row, zero, zero + step, zero + draw)
    return -tl.log(-tl.log(_uniform(a)))


@triton.jit
def clamp(x, bound):
    """x within ±bound; NaN stays NaN, as with torch.clamp, so that a diverged network is seen."""
    above = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def features(v, TRANSPOSED: tl.constexpr):
    """v along the axis of features, one row: (1, F)."""
    return v[:, None] if TRANSPOSED else v[None, :]


@triton.jit
def rows(v, TRANSPOSED: tl.constexpr):
    """v along the axis of rows, one column: (ROWS, 1)."""
    return v[None, :] if TRANSPOSED else v[:, None]


@triton.jit
def load_features(memory, row, feature, width, mask, TRANSPOSED: tl.constexpr):
    """Features of some rows of memory (n, width): row, mask (ROWS,), feature (F,) -> (ROWS, F).

    Rows that the mask leaves out are 0.
    """
    where = rows(row, TRANSPOSED) * width + features(feature, TRANSPOSED)
    return tl.load(memory + where, mask=rows(mask, TRANSPOSED), other=0.0)


@triton.jit
def store_features(memory, row, feature, width, value, mask, TRANSPOSED: tl.constexpr):
    """Write value (ROWS, F) to where load_features() reads it."""
    where = rows(row, TRANSPOSED) * width + features(feature, TRANSPOSED)
    tl.store(memory + where, value, mask=rows(mask, TRANSPOSED))


@triton.jit
def _dot(x, w, total, INPUTS: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        total = tl.dot(w, x, total, input_precision=INPUTS)
    else:
        total = tl.dot(x, w, total, input_precision=INPUTS)
    return total


class Matrix(NamedTuple):
    """A weight matrix in memory: element (o, i) lies at o·out_stride + i·in_stride.

    low points at the lower halves, which only fp16x3 reads. With the strides exchanged a product
    with the matrix becomes one with its transpose, a step of a backward pass.
    """

    weights: torch.Tensor
    low: torch.Tensor
    out_stride: int
    in_stride: int


@triton.jit
def linear(x, matrix, o, i, total, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """total + x·Wᵀ, (ROWS, len(o)), with W = matrix[o, i] and x (ROWS, len(i)) an operand().

    fp16x3 splits x into two halves and multiplies by weights that were split beforehand: three
    products, which have fp32's accuracy. They are summed from zero and only then added to total,
    because a tensor core rounds each partial sum towards 0, at the size of what it adds to.
    """
    out, into = features(o, TRANSPOSED), rows(i, TRANSPOSED)
    where = out * matrix.out_stride + into * matrix.in_stride
    w = tl.load(matrix.weights + where)
    if PRECISION == "fp16x3":
        high = x.to(tl.float16)
        rest = (x - high.to(tl.float32)).to(tl.float16)
        part = _dot(rest, w, None, "ieee", TRANSPOSED)
        part = _dot(high, tl.load(matrix.low + where), part, "ieee", TRANSPOSED)
        total += _dot(high, w, part, "ieee", TRANSPOSED)
    elif PRECISION == "tf32":
        total = _dot(x, w, total, "tf32", TRANSPOSED)
    else:
        total = _dot(x, w, total, "ieee", TRANSPOSED)
    return total
