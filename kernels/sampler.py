"""The whole reverse-diffusion chain of a DiffusionPolicy in one launch.

What is fused: all T steps with the four-layer network ε_θ inside (network.py). Activations never leave the SM: a program
carries its rows through every step, and what it reads again at each step are the weights, 0.3 MB in fp16, from L2.
"""

import torch
import triton
import triton.language as tl

from .network import load_states, reverse_chain
from .ops import clamp, features, rows
from .packing import PackedPolicy, architecture, on, require, require_tensor
from .tiles import Tile, choose_tile


@triton.jit(do_not_specialize=["seed", "n_rows"])
def _sampler(
    state, x_T, noises, seed, counter, out, n_rows, per_state, zero, coefficients, bias, max_action,
    weights, weights_low,
    STATE_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, T: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows pid·ROWS .. +ROWS of out (n_rows, ACTION_DIM). GIVEN: noise is read from x_T and noises, else drawn."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < n_rows
    st = load_states(state, row // per_state, valid, STATE_DIM, S, PRECISION, TURNED)
    draw = 0
    if not GIVEN:
        draw = tl.load(counter)
    x = reverse_chain(
        st, x_T, noises, seed, draw, row, valid, n_rows, zero, coefficients, bias, max_action, weights, weights_low,
        ACTION_DIM, T, GIVEN, ROWS, S, A, H, CHUNK, SCALE, PRECISION, TURNED, STAGES,
    )  # fmt: skip
    a = tl.arange(0, A)
    x = clamp(x, max_action)
    where = rows(row.to(tl.int64), TURNED) * ACTION_DIM + features(a, TURNED)
    tl.store(out + where, x, mask=features(a < ACTION_DIM, TURNED) & rows(valid, TURNED))
    if not GIVEN:
        # The last program to finish counts the call, so that the next one, or the next replay of a graph, draws afresh.
        if tl.atomic_add(counter + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(counter + 1, 0)
            tl.store(counter, draw + 1)


class FusedSampler:
    """Samples of a DiffusionPolicy, all T steps in one launch: FusedSampler(policy)(state) -> actions.

    precision: fp16 (fp16 products, float32 sums), tf32, fp16x3 (fp32's accuracy on tensor cores) or fp32. Raises
    UnsupportedError, in one line that says what is supported, for a policy or a device that the kernel cannot take.
    """

    def __init__(self, policy, precision: str = "fp16", *, seed: int = 0):
        self.packed = PackedPolicy([policy], precision)
        self.networks = [self.packed]
        self.arch = architecture(self.packed.device)
        self.seed = seed
        # How many calls have drawn noise, and how many programs of the present one are done: on the device, so that each
        # replay of a captured graph draws afresh.
        self.counter = torch.zeros(2, dtype=torch.int32, device=self.packed.device)

    def refresh(self) -> None:
        """Pack the policy's present parameters. Graphs captured before stay valid."""
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
        require_tensor("state", state, (len(state), p.state_dim), p.device)
        require((x_T is None) == (noises is None), "x_T and noises are given together or not at all")
        if x_T is not None:
            require(n_rows % len(state) == 0, f"x_T has {n_rows} rows, not a multiple of the {len(state)} states")
            require_tensor("x_T", x_T, (n_rows, p.action_dim), p.device)
            require_tensor("noises", noises, (p.n_timesteps, n_rows, p.action_dim), p.device)
        if out is None:
            out = torch.empty(n_rows, p.action_dim, device=p.device)
        require_tensor("out", out, (n_rows, p.action_dim), p.device)
        p.freshen()
        tile = tile or choose_tile(n_rows, p.precision, self.arch, p.hidden_dim)
        counter = self.counter if seed is None else torch.zeros_like(self.counter)
        with on(p.device):
            _sampler[(triton.cdiv(n_rows, tile.rows),)](
                state, out if x_T is None else x_T, out if x_T is None else noises, self.seed if seed is None else seed, counter,
                out, n_rows, n_rows // len(state), 0, p.coefficients, p.bias, p.max_action, p.weights, p.low,
                STATE_DIM=p.state_dim, ACTION_DIM=p.action_dim, T=p.n_timesteps, GIVEN=x_T is not None,
                ROWS=tile.rows, S=p.S, A=p.A, H=p.hidden_dim, CHUNK=tile.chunk, SCALE=p.scale, PRECISION=p.precision,
                TURNED=tile.turned, STAGES=tile.stages, num_warps=tile.warps,
            )  # fmt: skip
        return out
