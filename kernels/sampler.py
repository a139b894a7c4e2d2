"""The whole reverse-diffusion chain of a DiffusionPolicy in one launch.

All T steps are fused, with the four-layer network ε_θ inside (network.py). Activations never leave
the SM: a program carries its rows through every step, and what it reads again at each step are the
weights, 0.3 MB in fp16, from L2.
"""

import torch
import triton
import triton.language as tl

from .network import Chain, Net, Noise, Sizes, Stream, load_states, reverse_chain
from .ops import clamp, features, rows
from .packing import PackedPolicy, architecture, on, require, require_tensor
from .tiles import Tile, choose_tile


@triton.jit(do_not_specialize=["seed", "n_rows"])
def _sampler(
    state, out, noise, seed, counter, chain, net, n_rows, per_state, zero,
    sizes: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Rows pid·ROWS .. +ROWS of out (n_rows, action_dim), per_state of them for each row of state.

    noise: a Noise, or None to draw it from the seed and counter[0], which counts the calls.
    """
    row = tl.program_id(0) * tile.rows + tl.arange(0, tile.rows)
    valid = row < n_rows
    s = load_states(state, row // per_state, valid, sizes, tile)
    draw = 0
    if noise is None:
        draw = tl.load(counter)
    stream = Stream(seed, draw, 0)
    x = reverse_chain(s, noise, stream, row, valid, n_rows, chain, net, zero, sizes, tile)
    x = clamp(x, chain.max_action)
    a = tl.arange(0, sizes.A)
    column = features(a, tile.transposed)
    where = rows(row.to(tl.int64), tile.transposed) * sizes.action_dim + column
    within = features(a < sizes.action_dim, tile.transposed) & rows(valid, tile.transposed)
    tl.store(out + where, x, mask=within)
    if noise is None:
        # The last program to finish counts the call, so that the next one, or the next replay of a
        # graph, draws afresh.
        if tl.atomic_add(counter + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(counter + 1, 0)
            tl.store(counter, draw + 1)


class FusedSampler:
    """Samples of a DiffusionPolicy in one launch: FusedSampler(policy)(state) -> actions.

    precision: fp16 (fp16 products, float32 sums), tf32, fp16x3 (fp32's accuracy on tensor cores) or
    fp32. Raises UnsupportedError, in one line that says what is supported, for a policy or a device
    that the kernel cannot take.
    """

    def __init__(self, policy, precision: str = "fp16", *, seed: int = 0):
        self.packed = PackedPolicy([policy], precision)
        self.networks = [self.packed]
        self.arch = architecture(self.packed.device)
        self.seed = seed
        # How many calls have drawn noise, and how many programs of the present one are done: on the
        # device, so that each replay of a captured graph draws afresh.
        self.counter = torch.zeros(2, dtype=torch.int32, device=self.packed.device)

    def refresh(self) -> None:
        """Pack the policy's present parameters. Graphs captured before stay valid."""
        self.packed.refresh()

    def __call__(
        self, state, x_T=None, noises=None, seed=None, *, out=None, tile: Tile | None = None
    ):
        """state (B,S) -> actions (n·B, A) within ±max_action, as DiffusionPolicy.sample.

        All tensors are float32 and contiguous. x_T (n·B, A), row b·n+j belonging to state b, and
        noises (T, n·B, A), whose last is ignored, make the result comparable with the eager
        chain's. Without them noise is drawn by Philox, independent of tile and batch size: from
        `seed`, always the same, or from the sampler's own seed and the number of calls before. out
        (n·B, A) is written to where given. A policy that was changed since is packed again first.
        Raises UnsupportedError on what does not fit.
        """
        p = self.packed
        n_rows = len(state) if x_T is None else len(x_T)
        require_tensor("state", state, (len(state), p.state_dim), p.device)
        given = x_T is not None
        require(given == (noises is not None), "x_T and noises are given together or not at all")
        if given:
            whole = f"x_T has {n_rows} rows, not a multiple of the {len(state)} states"
            require(n_rows % len(state) == 0, whole)
            require_tensor("x_T", x_T, (n_rows, p.action_dim), p.device)
            require_tensor("noises", noises, (p.n_timesteps, n_rows, p.action_dim), p.device)
        if out is None:
            out = torch.empty(n_rows, p.action_dim, device=p.device)
        require_tensor("out", out, (n_rows, p.action_dim), p.device)
        p.freshen()
        tile = tile or choose_tile(n_rows, p.precision, self.arch, p.hidden_dim)
        noise = Noise(x_T, noises) if given else None
        counter = self.counter if seed is None else torch.zeros_like(self.counter)
        seed = self.seed if seed is None else seed
        per_state = n_rows // len(state)
        with on(p.device):
            _sampler[(triton.cdiv(n_rows, tile.rows),)](
                state, out, noise, seed, counter, Chain.of(p), Net.of(p), n_rows, per_state, 0,
                Sizes.of(p), tile, num_warps=tile.warps,
            )  # fmt: skip
        return out
