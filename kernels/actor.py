"""Acting with a Diffusion-QL agent in one launch: sample candidates, value them with both critics, pick one.

What is fused: for each state, n candidates by the whole reverse chain, min(Q₁, Q₂) of each, and the choice, one of them with
probability softmax(Q) as in the released code (Gumbel-max: argmax(Q + Gumbel noise) is a draw from softmax(Q)), or the best.

A state's candidates are spread over several programs, so that one state alone still keeps several SMs busy; the last of them
to finish chooses. Candidates and their values pass through L2, (A + 1)·4 bytes each; all else stays on the SM.
"""

import torch
import triton
import triton.language as tl

from .network import load_states, network, reverse_chain
from .ops import clamp, features, gumbels, rows
from .packing import PackedCritic, PackedPolicy, architecture, on, require, require_tensor
from .tiles import Tile, choose_actor_tile


@triton.jit(do_not_specialize=["seed", "n_rows"])
def _actor(
    state, x_T, noises, gumbel, seed, counter, done, candidates, values, out, n_rows, zero, coefficients, bias,
    max_action, weights, weights_low, q_bias, q_weights, q_weights_low,
    N: tl.constexpr, N_PADDED: tl.constexpr, PARTS: tl.constexpr, GREEDY: tl.constexpr, Q_H: tl.constexpr,
    STATE_DIM: tl.constexpr, ACTION_DIM: tl.constexpr, T: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, part): candidates part·ROWS .. +ROWS of the N of state i; the last part to be done writes out[i]."""
    i = tl.program_id(0)
    member = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, valid = i * N + member, member < N
    st = load_states(state, i + member * 0, valid, STATE_DIM, S, PRECISION, TURNED)
    draw = 0
    if not GIVEN:
        draw = tl.load(counter)
    x = reverse_chain(
        st, x_T, noises, seed, draw, row, valid, n_rows, zero, coefficients, bias, max_action, weights, weights_low,
        ACTION_DIM, T, GIVEN, ROWS, S, A, H, CHUNK, SCALE, PRECISION, TURNED, STAGES,
    )  # fmt: skip
    x = clamp(x, max_action)
    Q_BLOCK: tl.constexpr = Q_H * (S + A + 2 * Q_H + 16)
    q = tl.full([ROWS], float("inf"), tl.float32)
    for k in tl.range(0, 2):
        y = network(
            st, x, q_bias + k * (3 * Q_H + 16), q_weights + k * Q_BLOCK, q_weights_low + k * Q_BLOCK, k * zero,
            ROWS, S, A, Q_H, 16, CHUNK, SCALE, PRECISION, TURNED, STAGES,
        )  # fmt: skip
        # The other 15 outputs are padding: 0.
        q = tl.minimum(q, tl.sum(y, 0 if TURNED else 1), propagate_nan=tl.PropagateNan.ALL)
    a = tl.arange(0, A)
    where = rows(row.to(tl.int64), TURNED) * ACTION_DIM + features(a, TURNED)
    tl.store(candidates + where, x, mask=features(a < ACTION_DIM, TURNED) & rows(valid, TURNED))
    tl.store(values + row, q, mask=valid)
    tl.debug_barrier()  # every thread's stores, before one thread says that they are made
    if tl.atomic_add(done + i, 1, sem="acq_rel") == PARTS - 1:
        each = tl.arange(0, N_PADDED)
        at, known = i * N + each, each < N
        # From L2: what other programs wrote is not in this SM's L1.
        value = tl.load(values + at, mask=known, other=float("-inf"), cache_modifier=".cg")
        broken = tl.max((value != value).to(tl.int32), 0)
        if not GREEDY:
            if GIVEN:
                value += tl.load(gumbel + at, mask=known, other=0.0)
            else:
                value += gumbels(seed, draw, T + 1, at)
        best = tl.argmax(tl.where(known, value, float("-inf")), 0)
        chosen = tl.load(candidates + (i.to(tl.int64) * N + best) * ACTION_DIM + a, mask=a < ACTION_DIM, cache_modifier=".cg")
        tl.store(out + i * ACTION_DIM + a, tl.where(broken > 0, float("nan"), chosen), mask=a < ACTION_DIM)
        tl.store(done + i, 0)
        if not GIVEN:
            # The last state to be decided counts the call: the next one, or the next replay of a graph, draws afresh.
            if tl.atomic_add(counter + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
                tl.store(counter + 1, 0)
                tl.store(counter, draw + 1)


class FusedActor:
    """A Diffusion-QL agent's actions in one launch: FusedActor(policy, critic)(states) -> one action for each state.

    policy: a DiffusionPolicy; critic: a TwinCritic, the target one for acting as the paper does. n_candidates are sampled for
    each state and one is picked by softmax of min(Q1, Q2), or with greedy the best. precision as for FusedSampler. Raises
    UnsupportedError, in one line that says what is supported, for networks or a device that the kernel cannot take.
    """

    def __init__(
        self, policy, critic, n_candidates: int = 50, precision: str = "fp16", *, greedy: bool = False, seed: int = 0
    ):
        require(1 <= n_candidates <= 4096, f"n_candidates {n_candidates} is not within 1 to 4096")
        dims, expected = ((m.state_dim, m.action_dim) for m in (critic, policy))
        require(dims == expected, f"the critic takes states and actions of {dims} numbers, the policy {expected}")
        devices = [next(m.parameters()).device for m in (policy, critic)]
        require(devices[0] == devices[1], f"the policy is on {devices[0]}, the critic on {devices[1]}")
        self.policy, self.critic = PackedPolicy([policy], precision), PackedCritic([critic], precision)
        self.networks = [self.policy, self.critic]
        self.device, self.arch = self.policy.device, architecture(self.policy.device)
        self.n_candidates, self.greedy, self.seed = n_candidates, greedy, seed
        self.counter = torch.zeros(2, dtype=torch.int32, device=self.device)  # as FusedSampler's, of states
        self._memory = []
        self._reserve(1)

    def _reserve(self, n_states: int) -> None:
        """Memory for n_states. What there was before is not freed: a captured graph may write to it."""
        n = n_states * self.n_candidates
        self.done = torch.zeros(n_states, dtype=torch.int32, device=self.device)  # programs that are done with a state
        self.candidates = torch.empty(n, self.policy.action_dim, device=self.device)
        self.values = torch.empty(n, device=self.device)
        self._memory.append((self.done, self.candidates, self.values))

    def refresh(self) -> None:
        """Pack both networks' present parameters. Graphs captured before stay valid."""
        self.policy.refresh(), self.critic.refresh()

    def __call__(self, state, x_T=None, noises=None, gumbel=None, seed=None, *, out=None, tile: Tile | None = None):
        """state (B,S) -> actions (B,A) within ±max_action; all tensors float32 and contiguous.

        Without noise given it is drawn by Philox, from `seed`, always the same, or from the actor's own seed and the number of
        calls before. Given are x_T (n·B, A), row b·n+j belonging to state b, noises (T, n·B, A), whose last is ignored, and,
        unless greedy, gumbel (B, n). out (B,A) is written to where given. `candidates` (n·B, A) and `values` (n·B,), the smaller
        Q of each, are those of the last call, at its head where a call before had more states. A state with a Q that is NaN
        gets an action of NaN. Networks that were changed since are packed again first. Raises UnsupportedError on what does
        not fit.
        """
        p, q, n, B = self.policy, self.critic, self.n_candidates, len(state)
        require_tensor("state", state, (B, p.state_dim), self.device)
        given = x_T is not None
        require(given == (noises is not None), "x_T and noises are given together or not at all")
        wanted = given and not self.greedy
        require(wanted == (gumbel is not None), "gumbel is given where x_T and noises are, unless the actor is greedy")
        if given:
            require_tensor("x_T", x_T, (n * B, p.action_dim), self.device)
            require_tensor("noises", noises, (p.n_timesteps, n * B, p.action_dim), self.device)
        if wanted:
            require_tensor("gumbel", gumbel, (B, n), self.device)
        if out is None:
            out = torch.empty(B, p.action_dim, device=self.device)
        require_tensor("out", out, (B, p.action_dim), self.device)
        if len(self.done) < B:
            self._reserve(B)
        p.freshen(), q.freshen()
        tile = tile or choose_actor_tile(B, n, p.precision, self.arch, max(p.hidden_dim, q.hidden_dim))
        parts = triton.cdiv(n, tile.rows)
        nothing = self.values
        with on(self.device):
            _actor[(B, parts)](
                state, x_T if given else nothing, noises if given else nothing, gumbel if wanted else nothing,
                self.seed if seed is None else seed, self.counter if seed is None else torch.zeros_like(self.counter),
                self.done, self.candidates, self.values, out, n * B, 0, p.coefficients, p.bias,
                p.max_action, p.weights, p.low, q.bias, q.weights, q.low,
                N=n, N_PADDED=triton.next_power_of_2(n), PARTS=parts, GREEDY=self.greedy, Q_H=q.hidden_dim,
                STATE_DIM=p.state_dim, ACTION_DIM=p.action_dim, T=p.n_timesteps, GIVEN=given,
                ROWS=tile.rows, S=p.S, A=p.A, H=p.hidden_dim, CHUNK=tile.chunk, SCALE=p.scale, PRECISION=p.precision,
                TURNED=tile.turned, STAGES=tile.stages, num_warps=tile.warps,
            )  # fmt: skip
        return out
