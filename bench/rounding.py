"""The kernels' rounding in plain torch: networks, forward and backward, with rounded operands.

    imitate("fp16")  # from now on, in this process, dql.py's networks round as the fp16 kernels do

Sums are float32. What a tensor core does to them is imitated in tests/hopper.py, not here.
"""

import math

import torch
import torch.nn.functional as F

import dql
from kernels import eager

LOG2E = math.log2(math.e)
TILE = 16  # rows that share a power of two, as in kernels/tiles.py's small tiles


def to_tf32(x):
    """Finite x to 11 significant bits, halves away from 0, as kernels.ops.to_tf32."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def to_fp16(x):
    """As x.half().float(), which torch.compile would drop: 11 significant bits, halves to even;
    below 2⁻¹⁴ multiples of 2⁻²⁴; infinity beyond 65,504."""
    shifted = x * 8193.0  # 2¹³ + 1: halves to even
    rounded = torch.where(x.abs() < 2.0**-14, (x + 0.75) - 0.75, shifted - (shifted - x))
    return torch.where(x.abs() < 65520.0, rounded, x * math.inf)


ROUND = {"fp16": to_fp16, "tf32": to_tf32}


def allowed(precision: str, on_gpu: bool) -> float:
    """How many times the eager error at the same precision a kernel's error may be.

    Both are measured against float64. Two, as for FlashAttention. On a GPU four for fp16x3 and
    fp32: tensor cores cut sums off, and the exponential and the reciprocal are up to an ulp off,
    which they are not in eager float32 (tests/hopper.py finds up to 2.8 times).
    """
    return 4.0 if on_gpu and precision in ("fp16x3", "fp32") else 2.0


def error(actual, exact) -> float:
    """The relative error ‖actual - exact‖/‖exact‖; exact is float64."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def mish(u):
    """log2(e)·mish(x) of u = log2(e)·x, as in the assembly of kernels.ops.mish."""
    e = torch.exp2(u.clamp(max=60.0))
    return u - u / (e * (e * 0.5 + 1.0) + 1.0)


def mish_slope(u):
    """kernels.ops.mish_slope."""
    e = torch.exp2(u.clamp(max=30.0))
    k = e + 0.5 * e * e
    r = 1.0 / (k + 1.0)
    return r * (k + u / LOG2E * e * (1.0 + e) * r)


def power_of_two(x):
    """(n, ·) -> (n, 1): the factors that bring the largest number of each tile of rows to between 1
    and 2, as kernels.ops.power_of_two."""
    n = len(x)
    largest = F.pad(x.abs().amax(1), (0, -n % TILE)).view(-1, TILE).amax(1)
    exponent = torch.floor(torch.log2(largest.clamp(2.0**-100, 2.0**126)))
    return torch.exp2(-exponent).repeat_interleave(TILE)[:n, None]


class RoundedNetwork(torch.autograd.Function):
    """Four layers with mish between them: x (n,D) -> (n,OUT).

    first_bias is (H,) or (n,H); other weights and biases are as torch.nn.Linear's. Through a critic
    the kernels go back from 1, and multiply rows by the gradient of Q only then.
    """

    @staticmethod
    def forward(ctx, precision, critic, x, first_bias, w_1, w_2, b_2, w_3, b_3, w_4, b_4):
        r = ROUND[precision]
        w_1, w_2, w_3, w_4 = r(w_1 * LOG2E), r(w_2), r(w_3), r(w_4 / LOG2E)
        u_1 = r(x) @ w_1.t() + first_bias * LOG2E
        u_2 = r(mish(u_1)) @ w_2.t() + b_2 * LOG2E
        u_3 = r(mish(u_2)) @ w_3.t() + b_3 * LOG2E
        ctx.precision, ctx.critic, ctx.bias_shape = precision, critic, first_bias.shape
        ctx.save_for_backward(x, u_1, u_2, u_3, w_1, w_2, w_3, w_4)
        return r(mish(u_3)) @ w_4.t() + b_4

    @staticmethod
    def backward(ctx, g):
        r, (x, u_1, u_2, u_3, w_1, w_2, w_3, w_4) = ROUND[ctx.precision], ctx.saved_tensors
        g, factor = (torch.ones_like(g), g) if ctx.critic else (g, 1.0)
        up = power_of_two(g) if ctx.precision == "fp16" else 1.0
        d_3 = r(g * up) @ w_4 * mish_slope(u_3)
        d_2 = r(d_3) @ w_3 * mish_slope(u_2)
        up_2 = power_of_two(d_2) if ctx.precision == "fp16" else 1.0
        d_1 = r(d_2 * up_2) @ w_2 * mish_slope(u_1)
        dx = r(d_1) @ w_1 / (up * up_2) * factor
        d_1, d_2, d_3 = d_1 / (up * up_2) * factor, d_2 / up * factor, d_3 / up * factor
        g = g * factor
        # Products over rows are tf32's at either precision.
        dw_1, dw_2, dw_3, dw_4 = (
            to_tf32(d).t() @ to_tf32(v)
            for d, v in ((d_1, x), (d_2, mish(u_1)), (d_3, mish(u_2)), (g, mish(u_3)))
        )
        db_1 = (d_1 * LOG2E).sum_to_size(ctx.bias_shape)
        db_2, db_3 = d_2.sum(0) * LOG2E, d_3.sum(0) * LOG2E
        return None, None, dx, db_1, dw_1 * LOG2E, dw_2, db_2, dw_3, db_3, dw_4 / LOG2E, g.sum(0)


def imitate(precision: str) -> None:
    """From now on, in this process, dql.py's networks round as the kernels do: fp16 or tf32."""

    def predict_noise(self, x, t, state):
        first, times = self.mid_layer[0], torch.arange(self.n_timesteps, device=state.device)
        widths = [self.action_dim, self.TIME_DIM, self.state_dim]
        w_action, w_time, w_state = first.weight.split(widths, dim=1)
        w_1 = torch.cat([w_action, w_state], dim=1)
        of_times = F.linear(self.time_mlp(times), w_time, first.bias)
        layers = *self.mid_layer[2::2], self.final_layer
        later = [p for layer in layers for p in (layer.weight, layer.bias)]
        x = torch.cat([x, state], dim=1)
        return RoundedNetwork.apply(precision, False, x, of_times[t], w_1, *later)

    def forward(self, state, action):
        state = state.repeat_interleave(len(action) // len(state), 0)
        x, found = torch.cat([state, action], dim=1), []
        for model in (self.q1_model, self.q2_model):
            w_1, b_1, *later = model.parameters()
            found.append(RoundedNetwork.apply(precision, True, x, b_1, w_1, *later))
        return tuple(found)

    dql.DiffusionPolicy.predict_noise, dql.TwinCritic.forward = predict_noise, forward
    eager.speed_up_networks = lambda policies, critics: None  # it would bypass these
