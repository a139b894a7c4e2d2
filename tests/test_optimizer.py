"""kernels/optimizer.py: Adam, the averages and the packed copies that an update ends with."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
import hopper  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from reference import (  # noqa: E402
    DEVICE,
    SMALL,
    flat,
    fused,
    make_agent,
    make_batch,
    make_transitions,
    needs_interpreter,
    scale_rates,
)

from kernels import optimizer  # noqa: E402
from kernels.packing import PRECISIONS  # noqa: E402


@triton.jit
def corrections(n, out, LOG_BETA: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out + i, optimizer._one_minus_power(LOG_BETA, tl.load(n + i)))


@pytest.mark.parametrize("arithmetic", ["exact", pytest.param("hopper", marks=needs_interpreter)])
@pytest.mark.parametrize("beta", [0.9, 0.999])
def test_bias_corrections_are_exact_at_every_step(beta, arithmetic, monkeypatch):
    """From the first step to the millionth."""
    if arithmetic == "hopper":
        hopper.install(monkeypatch, ulps=2.0)
    for n in (1, 2, 4, 5, 10, 99, 101, 499, 501, 1000, 1_000_000):
        out = torch.empty(256, device=DEVICE)
        corrections[(1,)](torch.full((256,), float(n), device=DEVICE), out, LOG_BETA=math.log(beta))
        assert out.tolist() == pytest.approx([1 - beta**n] * 256, rel=1e-6)


def test_a_learning_rate_of_zero_changes_nothing():
    agent = make_agent()
    before, update = flat(agent.policy), fused(agent, 8)
    scale_rates([agent], 0.0)
    update.step(make_batch(agent, 8), agent.draw_noise(8))
    assert torch.equal(flat(agent.policy), before)


@pytest.mark.parametrize(
    "start, every, due", [(0, 1, True), (0, 5, True), (1, 1, False), (0, 4, True), (5, 5, False)]
)
def test_the_average_follows_its_schedule(start, every, due):
    agent = make_agent(ema_start=start, ema_every=every, ema_decay=0.9, lr=1e-2)
    before, update = flat(agent.policy_ema), fused(agent, 8)
    update.step(make_batch(agent, 8), agent.draw_noise(8))
    expected = torch.lerp(before, flat(agent.policy), 0.1) if due else before
    torch.testing.assert_close(flat(agent.policy_ema), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adam_packs_what_packing_packs(precision):
    """So that a resumed run reads the same bits."""
    agent = make_agent(5, 2, **SMALL)
    update = fused(agent, 6, precision, make_transitions(agent))
    update.run(1)
    both = update.policy.packed, update.critic.packed
    packed = [x for each in both for x in (each.weights, each.low, each.bias)]
    before = [x.clone() for x in packed]
    update.refresh()
    assert all(map(torch.equal, packed, before))
