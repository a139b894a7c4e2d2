"""The whole reverse-diffusion chain of a DiffusionPolicy in one launch.

What is fused: all T steps of a_{t-1} = c₂·clamp(c₀·a_t - c₁·ε_θ(a_t, t, s)) + c₃·a_t + c₄·z (paper, eq. 1 and its posterior),
with the four-layer network ε_θ inside. Activations never leave the SM: a program carries its rows through every step,
and what it reads again at each step are the weights, 0.3 MB in fp16, from L2.

Two loops over chunks of hidden units make up the network, so that no register tensor is ever sliced:

    z₂ = b₂ + Σ_j mish(b₁(t) + [s|a]·W₁ⱼᵀ)·W₂ⱼᵀ          h₂ = mish(z₂)
    ε  = b₄ + Σ_j mish(b₃ + h₂·W₃ⱼᵀ)·W₄ⱼᵀ

The timestep enters through b₁(t) alone, a (T, H) table made when packing: the first layer is linear in its embedding.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .ops import features, linear, mish, normals, rows
from .packing import PackedPolicy, interpreting, require


@triton.jit
def _epsilon(
    state, x, bias, bias_4, w_state, w_state_low, w_action, w_action_low, w_2, w_2_low, w_3, w_3_low, w_4, w_4_low,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """ε_θ for one tile; bias points at this step's (3, H), bias_4 at its (A,)."""
    s, a, h, j = tl.arange(0, S), tl.arange(0, A), tl.arange(0, H), tl.arange(0, CHUNK)
    none = rows(tl.zeros([ROWS], tl.float32), TURNED)
    # Biases initialise the accumulators.
    z = none + features(tl.load(bias + H + h), TURNED)
    for start in tl.range(0, H, CHUNK, num_stages=STAGES):
        c = start + j
        u = none + features(tl.load(bias + c), TURNED)
        u = linear(state, w_state, w_state_low, c, s, S, u, PRECISION, TURNED)
        u = linear(x, w_action, w_action_low, c, a, A, u, PRECISION, TURNED)
        z = linear(mish(u * SCALE, PTX), w_2, w_2_low, h, c, H, z, PRECISION, TURNED)
    hidden = mish(z * SCALE, PTX)
    if PRECISION == "fp16":
        hidden = hidden.to(tl.float16)  # once, not once per chunk
    epsilon = none + features(tl.load(bias_4 + a), TURNED)
    for start in tl.range(0, H, CHUNK, num_stages=STAGES):
        c = start + j
        u = none + features(tl.load(bias + 2 * H + c), TURNED)
        u = linear(hidden, w_3, w_3_low, c, h, H, u, PRECISION, TURNED)
        epsilon = linear(mish(u * SCALE, PTX), w_4, w_4_low, a, c, H, epsilon, PRECISION, TURNED)
    return epsilon * SCALE


@triton.jit
def _sampler(
    state, x_T, noises, seed, counter, out, n_rows, per_state, zero, coefficients, bias, bias_4, max_action,
    w_state, w_state_low, w_action, w_action_low, w_2, w_2_low, w_3, w_3_low, w_4, w_4_low,
    STATE_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, T: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Rows pid·ROWS .. +ROWS of out (n_rows, ACTION_DIM). GIVEN: noise is read from x_T and noises, else drawn."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s, a = tl.arange(0, S), tl.arange(0, A)
    within = features(a < ACTION_DIM, TURNED) & rows(row < n_rows, TURNED)
    # 64-bit: 2²² rows of 128 times 50 steps of noise are beyond 2³¹ elements.
    where = rows(row.to(tl.int64), TURNED) * ACTION_DIM + features(a, TURNED)
    from_state = rows(row.to(tl.int64) // per_state, TURNED) * STATE_DIM + features(s, TURNED)
    st = tl.load(state + from_state, mask=features(s < STATE_DIM, TURNED) & rows(row < n_rows, TURNED), other=0.0)
    if PRECISION == "fp16":
        st = st.to(tl.float16)
    step_size = tl.full([], ACTION_DIM, tl.int64) * n_rows
    if GIVEN:
        draw = 0
        x = tl.load(x_T + where, mask=within, other=0.0)
    else:
        draw = tl.load(counter)
        x = normals(seed, draw, 0, row, A)
        if TURNED:
            x = tl.trans(x)
        x = tl.where(within, x, 0.0)
    for k in tl.range(0, T):
        t = T - 1 - k
        # t·zero keeps LLVM from hoisting every weight's address, 150 registers of them, out of this loop.
        o = t * zero
        epsilon = _epsilon(
            st, x, bias + t * 3 * H, bias_4 + t * A, w_state + o, w_state_low + o, w_action + o, w_action_low + o,
            w_2 + o, w_2_low + o, w_3 + o, w_3_low + o, w_4 + o, w_4_low + o,
            ROWS, S, A, H, CHUNK, SCALE, PRECISION, TURNED, STAGES, PTX,
        )  # fmt: skip
        c = coefficients + t * 5
        x_0 = tl.load(c) * x - tl.load(c + 1) * epsilon
        x_0 = tl.minimum(tl.maximum(x_0, -max_action), max_action)
        x = tl.load(c + 2) * x_0 + tl.load(c + 3) * x
        if t > 0:
            if GIVEN:
                z = tl.load(noises + k * step_size + where, mask=within, other=0.0)
            else:
                z = normals(seed, draw, k + 1, row, A)
                if TURNED:
                    z = tl.trans(z)
            x = x + tl.load(c + 4) * z
        x = tl.where(within, x, 0.0)
    tl.store(out + where, tl.minimum(tl.maximum(x, -max_action), max_action), mask=within)


class Tile(NamedTuple):
    """How a batch is cut up. rows a program, hidden units a chunk, warps, software pipelining depth."""

    turned: bool  # features on M, so that 16 rows still fill the matrix units
    rows: int
    chunk: int
    warps: int
    stages: int


# Chosen by compiling (bench/offline.py), not yet by timing. Large tiles spill nothing, but for 7 words of fp16x3 on sm_90; the
# small one spills nothing on sm_90 in fp16, tf32 and fp16x3, hundreds of words in fp32, and some elsewhere.
SMALL = Tile(turned=True, rows=16, chunk=64, warps=4, stages=2)
LARGE = {
    "fp16": Tile(turned=False, rows=128, chunk=32, warps=8, stages=2),
    "tf32": Tile(turned=False, rows=64, chunk=32, warps=8, stages=1),
    "fp16x3": Tile(turned=False, rows=128, chunk=32, warps=8, stages=2),
    "fp32": Tile(turned=False, rows=64, chunk=32, warps=8, stages=2),
}
# Elsewhere than on sm_90: two-stage fp16 spills 50 words on sm_100; fp16x3 spills on sm_80, and on sm_100 Triton 3.6 to 3.8
# compile it to a trap unless the tile is too small for that chip's own matrix unit.
LARGE_ON = {
    (100, "fp16"): Tile(turned=False, rows=64, chunk=32, warps=8, stages=1),
    (100, "fp16x3"): Tile(turned=False, rows=32, chunk=16, warps=4, stages=2),
    (80, "fp16x3"): Tile(turned=False, rows=32, chunk=16, warps=4, stages=2),
}
SMALL_BATCH = 4096  # up to here tiles of 16 rows; beyond, 132 SMs have work with large tiles


def choose_tile(n_rows: int, precision: str, arch: int = 90) -> Tile:
    """The tile for a batch on sm_{arch}."""
    if n_rows <= SMALL_BATCH:
        return SMALL
    family = 100 if arch >= 100 else 90 if arch >= 90 else 80
    return LARGE_ON.get((family, precision), LARGE[precision])


class FusedSampler:
    """Samples of a DiffusionPolicy, all T steps in one launch: FusedSampler(policy)(state) -> actions.

    precision: fp16 (fp16 products, float32 sums), tf32, fp16x3 (fp32's accuracy on tensor cores) or fp32. Raises
    UnsupportedError, in one line that says what is supported, for a policy or a device that the kernel cannot take.
    """

    def __init__(self, policy, precision: str = "fp16", *, seed: int = 0):
        self.packed = PackedPolicy(policy, precision)
        self.seed = seed
        capability = torch.cuda.get_device_capability(self.packed.device) if self.packed.device.type == "cuda" else (9, 0)
        self.arch = capability[0] * 10 + capability[1]
        require(self.arch >= 80, f"this GPU is sm_{self.arch}; the kernels need sm_80 (A100) or newer")
        # How many calls have drawn noise: on the device, so that each replay of a captured graph draws afresh.
        self.counter = torch.zeros(1, dtype=torch.int32, device=self.packed.device)

    def refresh(self) -> None:
        """Pack the policy's present parameters; call it after training. Graphs captured before stay valid."""
        self.packed.refresh()

    def __call__(self, state, x_T=None, noises=None, seed=None, *, out=None, tile: Tile | None = None):
        """state (B,S) -> actions (n·B, A) within ±max_action, as DiffusionPolicy.sample; all tensors float32, contiguous.

        x_T (n·B, A), row b·n+j belonging to state b, and noises (T, n·B, A), whose last is ignored, make the result comparable
        with the eager chain's. Without them noise is drawn by Philox, independent of tile and batch size: from `seed`, always the
        same, or from the sampler's own seed and the number of calls before. out (n·B, A) is written to where given. A policy
        that was changed since is packed again first. Raises UnsupportedError on what does not fit.
        """
        p = self.packed
        n_rows = len(state) if x_T is None else len(x_T)
        self._check("state", state, (len(state), p.state_dim))
        require((x_T is None) == (noises is None), "x_T and noises are given together or not at all")
        if x_T is not None:
            require(n_rows % len(state) == 0, f"x_T has {n_rows} rows, not a multiple of the {len(state)} states")
            self._check("x_T", x_T, (n_rows, p.action_dim))
            self._check("noises", noises, (p.n_timesteps, n_rows, p.action_dim))
        if out is None:
            out = torch.empty(n_rows, p.action_dim, device=p.device)
        self._check("out", out, (n_rows, p.action_dim))
        if p.stale():
            p.refresh()
        tile = tile or choose_tile(n_rows, p.precision, self.arch)
        counter = self.counter if seed is None else torch.zeros_like(self.counter)
        _sampler[(triton.cdiv(n_rows, tile.rows),)](
            state, out if x_T is None else x_T, out if x_T is None else noises, self.seed if seed is None else seed, counter,
            out, n_rows, n_rows // len(state), 0, p.coefficients, p.bias, p.bias_4, p.max_action, **p.weights,
            STATE_DIM=p.state_dim, ACTION_DIM=p.action_dim, T=p.n_timesteps, GIVEN=x_T is not None,
            ROWS=tile.rows, S=p.S, A=p.A, H=p.hidden_dim, CHUNK=tile.chunk, SCALE=p.scale, PRECISION=p.precision,
            TURNED=tile.turned, STAGES=tile.stages, PTX=not interpreting(), num_warps=tile.warps,
        )  # fmt: skip
        if x_T is None and seed is None:
            self.counter += 1
        return out

    def _check(self, name, tensor, shape):
        have = f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        require(tensor.shape == shape and tensor.dtype == torch.float32, f"{have}; it must be {shape} float32")
        require(tensor.device == self.packed.device, f"{have}; the policy is on {self.packed.device}")
        require(tensor.is_contiguous(), f"{name} must be contiguous: pass {name}.contiguous()")
        require(tensor.numel() > 0, f"{name} has no rows")
        require(tensor.is_cuda or interpreting(), "kernels need CUDA tensors, or TRITON_INTERPRET=1 for the interpreter")
