"""kernels/gradients.py and training.py: an update's gradients are as exact as eager ones.

Fused and eager gradients are compared with float64, at sizes that fill no tile.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
import hopper  # noqa: E402
from reference import (  # noqa: E402
    DEVICE,
    away_from_clamps,
    doubled,
    error,
    fused,
    gradient,
    imitate,
    make_agent,
    make_batch,
    needs_interpreter,
    steepen,
    to_float64,
)

from bench.rounding import allowed  # noqa: E402
from kernels.packing import PRECISIONS  # noqa: E402
from kernels.tiles import Tile  # noqa: E402

# state, action, hidden, T, max_action, max-Q, rows, coin
SIZES = [
    (11, 3, 128, 5, 1.0, False, 37, 0.2),
    (29, 8, 256, 5, 1.0, False, 50, 0.8),
    (17, 24, 128, 3, 0.7, True, 5, 0.2),
    (1, 1, 128, 1, 2.0, False, 33, 0.8),
    (60, 9, 128, 17, 1.0, False, 9, 0.2),
]
FLOAT32 = 4e-7  # a few roundings: sums in another order may differ by that


def assert_gradients_are_right(monkeypatch, size, precision, limit, prepare=lambda agent: None):
    """One update's gradients err at most limit times as much as eager ones at the same precision.

    -> (the fused update's metrics, the eager one's). prepare: called with each agent first.
    """
    state_dim, action_dim, hidden_dim, T, max_action, max_q, n, coin = size
    how = dict(
        hidden_dim=hidden_dim,
        n_timesteps=T,
        max_action=max_action,
        max_q_backup=max_q,
        critic_lr=0.0,  # both actors climb the same critic
        grad_norm=0.0,  # the vectors hold gradients that were not clipped
        eta=2.0,
    )
    agents = [make_agent(state_dim, action_dim, **how) for _ in range(3)]
    for agent in agents:
        prepare(agent)
    batch, noise = away_from_clamps(agents[0], n)
    noise.coin = coin
    exact, plain, ours = to_float64(agents[0]), agents[1], agents[2]
    exact.update(*doubled(batch, noise))
    update = fused(ours, n, precision)
    metrics = update.step(batch, noise)
    imitate(monkeypatch, precision)
    expected = plain.update(batch, noise)
    for name, trained in (("policy", update.policy), ("critic", update.critic)):
        target = gradient(getattr(exact, name))
        most = limit * error(gradient(getattr(plain, name)), target)
        found = error(trained.vectors.gradient[0], target)
        assert found <= max(most, FLOAT32), f"{name}: fused {found:.2e}, allowed {most:.2e}"
    return metrics, expected


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_about_as_exact_as_eager_ones(size, precision, monkeypatch):
    limit = allowed(precision, DEVICE == "cuda")
    metrics, expected = assert_gradients_are_right(monkeypatch, size, precision, limit)
    rounds = precision in ("fp16", "tf32")
    tolerance = dict(rtol=0.02, atol=5e-3) if rounds else dict(rtol=1e-5, atol=1e-6)
    for name in expected:
        torch.testing.assert_close(metrics[name], expected[name], **tolerance)


@needs_interpreter
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES[:2])
def test_gradients_are_right_in_hoppers_arithmetic(size, precision, monkeypatch):
    hopper.install(monkeypatch)
    assert_gradients_are_right(monkeypatch, size, precision, allowed(precision, on_gpu=True))


@pytest.mark.parametrize("steepness", [400.0, 100_000.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_steep_critics_gradients_do_not_overflow_or_vanish(precision, steepness, monkeypatch):
    """400: what a critic learns in 3,000 updates of a fall that costs 800 of 1,000."""
    limit = allowed(precision, DEVICE == "cuda")
    assert_gradients_are_right(
        monkeypatch, SIZES[0], precision, limit, lambda agent: steepen(agent, steepness)
    )


@needs_interpreter  # on a GPU the tiles are those that are shipped
@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_of_each_parameter_of_each_layer_are_right(transposed):
    agents = [make_agent(grad_norm=0.0, critic_lr=0.0) for _ in range(2)]
    batch, noise = away_from_clamps(agents[0], 20)
    exact = to_float64(agents[0])
    exact.update(*doubled(batch, noise))
    update = fused(agents[1], 20, tile=Tile(transposed, 32, 64, 4, 2))
    update.step(batch, noise)
    for name, trained in (("policy", update.policy), ("critic", update.critic)):
        module = getattr(exact, name)
        parts = trained.vectors.gradient[0].split([p.numel() for p in module.parameters()])
        for (key, p), ours in zip(module.named_parameters(), parts):
            assert error(ours, p.grad.flatten()) < 2e-5, f"{name}.{key}"


def test_no_gradient_passes_where_a_clamp_is_active():
    """In so small a box every step is clamped, so the policy's gradient is from cloning alone."""
    agents = [make_agent(grad_norm=0.0, eta=eta, max_action=1e-5) for eta in (0.0, 50.0)]
    batch, noise = make_batch(agents[0], 16), agents[0].draw_noise(16)
    gradients = []
    for agent in agents:
        update = fused(agent, 16)
        update.step(batch, noise)
        gradients.append(update.policy.vectors.gradient[0].clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("size", [1e6, 1e-6])
def test_fp16_gradients_of_errors_beyond_its_range_are_right(size):
    """A million does not overflow, and a millionth does not vanish: fp16 has neither."""
    agents = [make_agent(grad_norm=0.0, discount=0.0) for _ in range(2)]
    batch, noise = make_batch(agents[0], 16), agents[0].draw_noise(16)
    with torch.no_grad():
        for critic in (agent.critic for agent in agents):
            for model in (critic.q1_model, critic.q2_model):
                model[-1].weight.mul_(1e-3 * min(size, 1))
                model[-1].bias.zero_()
    batch = batch._replace(reward=batch.reward * size)
    agents[0].update(batch, noise)
    update = fused(agents[1], 16, "fp16")
    update.step(batch, noise)
    assert error(update.critic.vectors.gradient[0], gradient(agents[0].critic).double()) < 2e-3
