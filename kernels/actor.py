"""Acting with a Diffusion-QL agent in one launch: sample candidates, value them, pick one.

For each state the kernel samples n candidates by the whole reverse chain, takes min(Q₁, Q₂) of
each, and chooses: one of them with probability softmax(Q), as the released code does (Gumbel-max:
argmax(Q + Gumbel noise) is a draw from softmax(Q)), or the best.

A state's candidates are spread over several programs, so that a single state still keeps several
SMs busy; the last of them to finish chooses. Candidates and their values pass through L2, (A + 1)·4
bytes each; all else stays on the SM.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .network import (
    Chain,
    Net,
    Noise,
    PolicyAndCritic,
    Sizes,
    Stream,
    load_states,
    network,
    nth_network,
    reverse_chain,
    shift_weights,
)
from .ops import clamp, features, gumbels, rows
from .packing import PackedCritic, PackedPolicy, architecture, on, require, require_tensor
from .tiles import Tile, choose_actor_tile


class Work(NamedTuple):
    """What the programs of a call tell each other, about n candidates for each of B states."""

    done: torch.Tensor  # (B,): how many programs have finished with a state; 0 between calls
    candidates: torch.Tensor  # (B·n, action_dim)
    q: torch.Tensor  # (B·n,): the smaller Q of each


class Choice(NamedTuple):
    """How an action is chosen."""

    n_candidates: int
    greedy: bool


@triton.jit(do_not_specialize=["seed", "n_rows"])
def _actor(
    state, out, noise, gumbel, seed, counter, work, chain, nets, n_rows, zero,
    choice: tl.constexpr, sizes: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Program (i, part): candidates part·ROWS .. +ROWS of state i; the last one writes out[i].

    noise: a Noise of B·n rows, with gumbel (B, n) unless the actor is greedy; or None to draw both
    from the seed and counter[0], which counts the calls. nets and sizes: of policy and critic.
    n_rows: B·n.
    """
    N: tl.constexpr = choice.n_candidates
    ROWS: tl.constexpr = tile.rows
    POLICY: tl.constexpr = sizes.policy
    CRITIC: tl.constexpr = sizes.critic
    ACTION_DIM: tl.constexpr = POLICY.action_dim
    TRANSPOSED: tl.constexpr = tile.transposed
    i = tl.program_id(0)
    member = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, valid = i * N + member, member < N
    s = load_states(state, i + member * 0, valid, POLICY, tile)
    draw = 0
    if noise is None:
        draw = tl.load(counter)
    stream = Stream(seed, draw, 0)
    x = reverse_chain(s, noise, stream, row, valid, n_rows, chain, nets.policy, zero, POLICY, tile)
    x = clamp(x, chain.max_action)
    q = tl.full([ROWS], float("inf"), tl.float32)
    for k in tl.range(0, 2):
        net = shift_weights(nth_network(nets.critic, k, CRITIC), k * zero)
        y = network(s, x, net, CRITIC, tile)
        # The other outputs are padding: 0.
        value = tl.sum(y, 0 if TRANSPOSED else 1)
        q = tl.minimum(q, value, propagate_nan=tl.PropagateNan.ALL)
    a = tl.arange(0, POLICY.A)
    where = rows(row.to(tl.int64), TRANSPOSED) * ACTION_DIM + features(a, TRANSPOSED)
    within = features(a < ACTION_DIM, TRANSPOSED) & rows(valid, TRANSPOSED)
    tl.store(work.candidates + where, x, mask=within)
    tl.store(work.q + row, q, mask=valid)
    tl.debug_barrier()  # every thread's stores, before one thread says that they are made
    PARTS: tl.constexpr = triton.cdiv(N, ROWS)
    if tl.atomic_add(work.done + i, 1, sem="acq_rel") == PARTS - 1:
        each = tl.arange(0, triton.next_power_of_2(N))
        at, known = i * N + each, each < N
        # From L2: what other programs wrote is not in this SM's L1.
        value = tl.load(work.q + at, mask=known, other=float("-inf"), cache_modifier=".cg")
        broken = tl.max((value != value).to(tl.int32), 0)
        if not choice.greedy:
            if noise is None:
                value += gumbels(seed, draw, POLICY.T + 1, at)
            else:
                value += tl.load(gumbel + at, mask=known, other=0.0)
        best = tl.argmax(tl.where(known, value, float("-inf")), 0)
        best_at = work.candidates + (i.to(tl.int64) * N + best) * ACTION_DIM
        chosen = tl.load(best_at + a, mask=a < ACTION_DIM, cache_modifier=".cg")
        action = tl.where(broken > 0, float("nan"), chosen)
        tl.store(out + i * ACTION_DIM + a, action, mask=a < ACTION_DIM)
        tl.store(work.done + i, 0)
        if noise is None:
            # The last state to be decided counts the call, so that the next one, or the next replay
            # of a graph, draws afresh.
            if tl.atomic_add(counter + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
                tl.store(counter + 1, 0)
                tl.store(counter, draw + 1)


class FusedActor:
    """A Diffusion-QL agent's actions in one launch: FusedActor(policy, critic)(states) -> actions.

    policy: a DiffusionPolicy; critic: a TwinCritic, the target one for acting as the paper does.
    n_candidates are sampled for each state and one is picked by softmax of min(Q1, Q2), or with
    greedy the best. precision as for FusedSampler. Raises UnsupportedError, in one line that says
    what is supported, for networks or a device that the kernel cannot take.
    """

    def __init__(
        self, policy, critic, n_candidates: int = 50, precision: str = "fp16", *,
        greedy: bool = False, seed: int = 0,
    ):  # fmt: skip
        known = f"n_candidates {n_candidates} is not within 1 to 4096"
        require(1 <= n_candidates <= 4096, known)
        dims, expected = ((m.state_dim, m.action_dim) for m in (critic, policy))
        differ = f"the critic takes states and actions of {dims} numbers, the policy {expected}"
        require(dims == expected, differ)
        devices = [next(m.parameters()).device for m in (policy, critic)]
        apart = f"the policy is on {devices[0]}, the critic on {devices[1]}"
        require(devices[0] == devices[1], apart)
        self.policy = PackedPolicy([policy], precision)
        self.critic = PackedCritic([critic], precision)
        self.networks = [self.policy, self.critic]
        self.device, self.arch = self.policy.device, architecture(self.policy.device)
        self.n_candidates, self.greedy, self.seed = n_candidates, greedy, seed
        # As FusedSampler's: calls that have drawn noise, states of the present one that are
        # decided.
        self.counter = torch.zeros(2, dtype=torch.int32, device=self.device)
        self._memory = []
        self._reserve(1)

    def _reserve(self, n_states: int) -> None:
        """Memory for n_states. What there was is kept: a captured graph may write to it."""
        n = n_states * self.n_candidates
        self.done = torch.zeros(n_states, dtype=torch.int32, device=self.device)
        self.candidates = torch.empty(n, self.policy.action_dim, device=self.device)
        self.values = torch.empty(n, device=self.device)
        self._memory.append((self.done, self.candidates, self.values))

    def refresh(self) -> None:
        """Pack both networks' present parameters. Graphs captured before stay valid."""
        self.policy.refresh(), self.critic.refresh()

    def __call__(
        self, state, x_T=None, noises=None, gumbel=None, seed=None, *,
        out=None, tile: Tile | None = None,
    ):  # fmt: skip
        """state (B,S) -> actions (B,A) within ±max_action; all tensors float32 and contiguous.

        Without noise given it is drawn by Philox, from `seed`, always the same, or from the actor's
        own seed and the number of calls before. Given are x_T (n·B, A), row b·n+j belonging to
        state b, noises (T, n·B, A), whose last is ignored, and, unless greedy, gumbel (B, n). out
        (B,A) is written to where given. `candidates` (n·B, A) and `values` (n·B,), the smaller Q of
        each, are those of the last call, at its head where a call before had more states. A state
        with a Q that is NaN gets an action of NaN. Networks that were changed since are packed
        again first. Raises UnsupportedError on what does not fit.
        """
        p, q, n, B = self.policy, self.critic, self.n_candidates, len(state)
        require_tensor("state", state, (B, p.state_dim), self.device)
        given = x_T is not None
        require(given == (noises is not None), "x_T and noises are given together or not at all")
        wanted = given and not self.greedy
        rule = "gumbel is given where x_T and noises are, unless the actor is greedy"
        require(wanted == (gumbel is not None), rule)
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
        hidden_dim = max(p.hidden_dim, q.hidden_dim)
        tile = tile or choose_actor_tile(B, n, p.precision, self.arch, hidden_dim)
        noise = Noise(x_T, noises) if given else None
        counter = self.counter if seed is None else torch.zeros_like(self.counter)
        seed = self.seed if seed is None else seed
        work = Work(self.done, self.candidates, self.values)
        nets = PolicyAndCritic(Net.of(p), Net.of(q))
        sizes = PolicyAndCritic(Sizes.of(p), Sizes.of(q))
        with on(self.device):
            _actor[(B, triton.cdiv(n, tile.rows))](
                state, out, noise, gumbel, seed, counter, work, Chain.of(p), nets, n * B, 0,
                Choice(n, self.greedy), sizes, tile, num_warps=tile.warps,
            )  # fmt: skip
        return out
