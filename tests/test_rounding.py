"""bench/rounding.py: plain torch that imitates the kernels' rounding rounds as they do."""

import shutil

import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
import hopper  # noqa: E402
from reference import (  # noqa: E402
    away_from_clamps,
    doubled,
    error,
    fused,
    gradient,
    imitate,
    make_agent,
    needs_interpreter,
    steepen,
    to_float64,
)

from bench import rounding  # noqa: E402
from kernels import packing  # noqa: E402


def test_operands_keep_eleven_bits():
    x = torch.randn(100_000) * torch.exp(4 * torch.randn(100_000) - 4)
    x = x[x.abs() < 6e4]
    for name, round_ in rounding.ROUND.items():
        assert ((round_(x) - x).abs() <= x.abs() * 2.0**-11 + 2.0**-25).all(), name
    assert torch.equal(rounding.to_fp16(x), x.half().float())
    assert torch.equal(rounding.to_tf32(x), packing.to_tf32(x))
    assert rounding.to_fp16(torch.tensor([1e6])).isinf()  # as in the kernels
    # Halfway: away from zero, as cvt.rna.
    tie = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11])
    assert rounding.to_tf32(tie).tolist() == [1 + 2.0**-10, -1 - 2.0**-10, 1 + 2 * 2.0**-10]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", rounding.ROUND)
def test_a_compiler_keeps_the_rounding(name):
    x = torch.randn(1000) * 10.0 ** torch.linspace(-9, 5, 1000)
    compiled = torch.compile(lambda x: rounding.ROUND[name](x) * 1.0)
    assert torch.equal(compiled(x), rounding.ROUND[name](x))
    assert not torch.equal(compiled(x), x)


@pytest.mark.parametrize("arithmetic", ["exact", pytest.param("hopper", marks=needs_interpreter)])
@pytest.mark.parametrize("steepness", [None, 400.0])
@pytest.mark.parametrize("precision", rounding.ROUND)
def test_an_imitated_update_is_the_kernels(precision, steepness, arithmetic, monkeypatch):
    """They differ from each other by at most a quarter of what they differ from float64."""
    if arithmetic == "hopper":
        hopper.install(monkeypatch)
    # 32 rows of 4 numbers: a mean divides by a power of two. Kernels divide by it, and by mean|Q|,
    # after rounding, plain torch before.
    n, how = 32, dict(critic_lr=0.0, grad_norm=0.0, eta=0.0)
    exact, imitated, ours = (make_agent(11, 4, **how) for _ in range(3))
    if steepness:
        for agent in (exact, imitated, ours):
            steepen(agent, steepness)
    batch, noise = away_from_clamps(ours, n)
    to_float64(exact).update(*doubled(batch, noise))
    update = fused(ours, n, precision)
    update.step(batch, noise)
    imitate(monkeypatch, precision)
    imitated.update(batch, noise)
    for name, trained in (("policy", update.policy), ("critic", update.critic)):
        target, kernels = gradient(getattr(imitated, name)), trained.vectors.gradient[0]
        rounded = error(kernels, gradient(getattr(exact, name)))
        assert 1e-5 < rounded and error(kernels, target) < 0.25 * rounded, name
