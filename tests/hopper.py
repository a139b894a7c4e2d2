"""Triton's interpreter with a Hopper GPU's arithmetic, as far as that is published.

A GPU is less exact than numpy's float32. Imitated are:

- Tensor cores: products are exact. Those of a block and the sum so far are cut to multiples of 2⁻²⁵
  of the largest of them and added, and the result is cut to a float32. A block is 16 products in
  fp16, 8 in tf32. Of tf32's operands ten bits of fraction are read, the rest is cut off. See
  Khattak and Mikaitis, arXiv 2512.07004, and Xie et al., arXiv 2511.10909. They align by the sum of
  two operands' exponents; here it is the product's own exponent, which cuts off one bit more where
  a product is 2 to 4.
- Products in float32: fused multiply-adds, one after the other.
- Exponentials: up to an ulp off.
- Reciprocals: in fp16 and tf32 activations the four elements that a thread holds in the layout of a
  matrix product, rows r and r + 8 of columns c and c + 1, share one, which is half an ulp off.

How far the last two really are off is not published; their errors are drawn at random.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import kernels.gradients
import kernels.network
import kernels.ops

FRACTION_BITS = 25
BLOCK = {"fp16": 16, "tf32": 8}


def towards_zero(x):
    """float64 -> the nearest float32 that is no larger in absolute value."""
    rounded = x.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(x), np.nextafter(rounded, np.float32(0)), rounded)


def tensor_core(a, b, total, block):
    """total + a·b as matrix units add it up. total (m,n), a (m,k), b (k,n)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[1], block):
        products = a[:, k : k + block, None] * b[None, k : k + block]
        terms = np.concatenate([products, total[:, None].astype(np.float64)], axis=1)
        exponent = np.frexp(np.abs(terms).max(axis=1))[1] - 1
        unit = np.ldexp(1.0, exponent - FRACTION_BITS)
        total = towards_zero(np.trunc(terms / unit[:, None]).sum(axis=1) * unit)
    return total


def cut_to_tf32(x):
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def multiply_add(a, b, total):
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[1]):
        total = (a[:, k, None] * b[k] + total).astype(np.float32)
    return total


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    x, y, total = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data), d.data
    with np.errstate(all="ignore"):
        if a.dtype.scalar == tl.float16:
            total = tensor_core(x, y, total, BLOCK["fp16"])
        elif "TF32" in str(input_precision):
            total = tensor_core(cut_to_tf32(x), cut_to_tf32(y), total, BLOCK["tf32"])
        else:
            total = multiply_add(x, y, total)
    return TensorHandle(total, d.dtype.scalar)


class Approximations:
    """Exponential and reciprocal with errors drawn at random; ulps: the exponential's largest."""

    def __init__(self, ulps: float):
        self.rng, self.ulps = np.random.default_rng(0), ulps

    def off(self, x, ulps: float):
        return (x * (1.0 + self.rng.uniform(-ulps, ulps, x.shape) * 2.0**-23)).astype(np.float32)

    def exp2(self, x):
        return self.off(np.exp2(x.astype(np.float64)), self.ulps)

    def exp(self, x):
        return self.off(np.exp(x.astype(np.float64)), self.ulps)

    def shared_reciprocals(self, a):
        """-1/a, (m, n). Rows r and r + 8 of columns c and c + 1 share one division."""
        grouped = a.reshape(len(a) // 16, 2, 8, -1, 2).transpose(1, 4, 0, 2, 3)
        (a_0, a_1), (a_2, a_3) = grouped
        p, q = a_0 * a_1, a_2 * a_3
        r = -self.off(1.0 / (p * q).astype(np.float64), 0.5)
        p, q = p * r, q * r
        inverse = np.stack([np.stack([a_1 * q, a_0 * q]), np.stack([a_3 * p, a_2 * p])])
        assert inverse.shape == grouped.shape
        return inverse.transpose(2, 0, 3, 4, 1).reshape(a.shape)

    def mish(self, u):
        # fmin of NaN and 15 is 15: a NaN must not reach the rows that share its reciprocal.
        e = self.exp2(np.fmin(u, np.float32(15)))
        a = e * (e * np.float32(0.5) + np.float32(1)) + np.float32(1)
        return (u.astype(np.float64) * self.shared_reciprocals(a) + u).astype(np.float32)


def install(monkeypatch, ulps: float = 1.0) -> None:
    """Interpret kernels with this arithmetic until monkeypatch undoes it.

    ulps: how far an exponential may be off.
    """
    units = Approximations(ulps)
    plain = kernels.ops.mish

    def mish(u, PRECISION):
        if PRECISION not in ("fp16", "tf32"):
            return plain(u, PRECISION)
        with np.errstate(all="ignore"):
            return tl.core.tensor(TensorHandle(units.mish(u.handle.data), u.handle.dtype), u.type)

    def create_exp(self, x):
        return self.unary_op(x, units.exp)

    def create_exp2(self, x):
        return self.unary_op(x, units.exp2)

    for create in (create_dot, create_exp, create_exp2):
        monkeypatch.setattr(InterpreterBuilder, create.__name__, create)
    for module in (kernels.network, kernels.gradients):
        monkeypatch.setattr(module, "mish", mish)
