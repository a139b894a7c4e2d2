"""kernels/ops.py: the functions that all kernels share, and the assembly that only a GPU runs."""

import math
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from reference import DEVICE  # noqa: E402

from kernels import ops  # noqa: E402
from kernels.ops import mish_slope, power_of_two, to_tf32  # noqa: E402


def exact_mish(u):
    """log2(e)·mish(x) of u = log2(e)·x, in float64."""
    x = torch.as_tensor(u, dtype=torch.float64) * math.log(2)
    return torch.nn.functional.mish(x) / math.log(2)


@triton.jit
def activations(u, out, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    where = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + where, ops.mish(tl.load(u + where), PRECISION))


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_mish_is_torchs_over_the_whole_range(precision):
    u = torch.linspace(-60, 60, 4096)
    out = torch.empty_like(u, device=DEVICE)
    activations[(1,)](u.to(DEVICE), out, PRECISION=precision, ROWS=64, COLUMNS=64)
    found, expected = out.cpu().double(), exact_mish(u)
    if DEVICE == "cuda" and precision == "fp16":
        # Below 0 the difference cancels, but the error is far below the rounding that follows.
        allowed = 1e-6 * u.abs().clamp(min=1)
    else:
        allowed = 1e-6 * expected.abs() + 1e-12
    assert ((found - expected).abs() <= allowed).all()


def evaluate(assembly: str, u: list) -> list:
    """Run the PTX of ops._mish_assembly, one instruction after the other, in float32.

    No result shares a register with an operand, since the constraints are =&f.
    """
    n, registers = len(u), {f"${len(u) + i}": np.float32(x) for i, x in enumerate(u)}

    def value(name):
        if name.startswith("0f"):
            return np.array(int(name[2:], 16), np.uint32).view(np.float32)[()]
        return registers[name]

    operations = {
        "min.f32": np.fmin,  # of NaN and a number: the number
        "mul.f32": lambda a, b: a * b,
        "neg.f32": lambda a: -a,
        "ex2.approx.ftz.f32": lambda a: np.exp2(a),
        "rcp.approx.ftz.f32": lambda a: np.float32(1) / a,
        "fma.rn.f32": lambda a, b, c: np.float32(float(a) * float(b) + float(c)),
    }
    body = re.fullmatch(r"\{ \.reg \.f32 [^;]*; (.*) \}", assembly).group(1)
    for instruction in body.rstrip(";").split(";"):
        name, *operands = instruction.replace(",", " ").split()
        registers[operands[0]] = np.float32(operations[name](*map(value, operands[1:])))
    return [registers[f"${i}"] for i in range(n)]


@pytest.mark.parametrize("n", [2, 4])
def test_the_assembly_computes_mish_of_each_of_its_elements(n):
    rng = np.random.default_rng(0)
    extremes = [60.0] * n, [-60.0] * n, [60.0, -60.0] * (n // 2)
    for u in (*rng.normal(scale=4, size=(50, n)), *extremes):
        u = np.float32(u)
        found = np.array(evaluate(ops._mish_assembly(n), u), np.float64)
        assert (np.abs(found - exact_mish(u).numpy()) <= 5e-7 * np.maximum(np.abs(u), 1)).all(), u


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_element_spares_those_sharing_its_reciprocal(broken):
    with np.errstate(invalid="ignore"):
        found = evaluate(ops._mish_assembly(4), np.float32([0.5, broken, -2.0, 3.0]))
    assert found[0] == pytest.approx(float(exact_mish(0.5)))
    assert found[3] == pytest.approx(float(exact_mish(3.0)))
    assert not np.isfinite(found[1])


def test_the_assemblys_results_share_no_register_with_operands():
    for n, constraints in ((2, ops._REGISTERS_2), (4, ops._REGISTERS_4)):
        assert constraints.value.split(",") == ["=&f"] * n + ["f"] * n


@triton.jit
def slopes(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, mish_slope(tl.load(x + i)))


def test_the_slope_of_mish_is_torchs_over_the_whole_range():
    x = torch.linspace(-100, 100, 4096, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.nn.functional.mish(x).sum(), x)
    u = (x.detach() * math.log2(math.e)).float().to(DEVICE)
    out = torch.empty_like(u)
    slopes[(1,)](u, out, N=4096)
    assert (out.cpu() - expected).abs().max() < 1e-6


@triton.jit
def scales(x, out, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)
    up, down = power_of_two(tl.load(x + i[:, None] * 16 + i[None, :]), PRECISION)
    tl.store(out, up)
    tl.store(out + 1, down)


@pytest.mark.parametrize("largest", [1.0, 0.7, 3e-20, 6e30, 3e38, 0.0, math.nan, math.inf])
def test_gradients_are_scaled_to_where_fp16_has_all_its_bits(largest):
    """By a power of two, and back by its inverse. fp16x3 takes 16 times as much, fp32 nothing."""
    x, out = torch.zeros(16, 16, device=DEVICE), torch.empty(2, device=DEVICE)
    x[3, 4] = -largest
    scales[(1,)](x, out, PRECISION="fp16")
    up, down = out.tolist()
    assert up * down == 1.0 and math.frexp(up)[0] == 0.5
    if math.isfinite(largest) and largest > 0:
        assert 1 <= up * largest < 4
    scales[(1,)](x, out, PRECISION="fp16x3")
    assert out[0] == 16 * up and out[0] * out[1] == 1
    scales[(1,)](x, out, PRECISION="fp32")
    assert out.tolist() == [1.0, 1.0]


@triton.jit
def rounded(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, to_tf32(tl.load(x + i)))


def test_operands_of_tf32_are_rounded_not_cut_and_nan_stays():
    half, inf = 2.0**-11, math.inf
    # NaN as GPUs and CPUs make it: the addition that rounds could make numbers of these. (Of NaN
    # whose upper ten bits of fraction are 0 a GPU makes infinity.)
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    numbers = torch.tensor([1 + half, -1 - half, 1 + 0.99 * half, inf, -inf, 0.0, 1e-30, 3e38])
    x = torch.cat([numbers, bits, torch.zeros(5)])
    out = torch.empty(16, device=DEVICE)
    rounded[(1,)](x.to(DEVICE), out, N=16)
    out = out.cpu()
    small = pytest.approx(1e-30, rel=half)
    assert out[:7].tolist() == [1 + 2 * half, -1 - 2 * half, 1.0, inf, -inf, 0.0, small]
    assert out[8:11].isnan().all() and (out[out.isfinite()].view(torch.int32) & 0x1FFF == 0).all()
