"""The nine launches of an update, and the memory that they work on.

The kernels are in training.py, which lists the launches, gradients.py and optimizer.py.
"""

import math
from typing import NamedTuple

import torch
import triton

from . import gradients, optimizer, training
from .network import Chain, Net, Noise, PolicyAndCritic, Saved, Sizes, input_columns
from .packing import (
    PackedCritic,
    PackedPolicy,
    interpreting,
    multiprocessors,
    padded,
    require,
)
from .tiles import FIT_STAGES, ProductTile, Tile, choose_product_tile, choose_update_tile
from .trained import Trained

ADAM_BLOCK = 1024  # parameters that a program takes
TABLE_CHUNK = 4096  # numbers of the table of timesteps that a program takes at a time
METRICS = (
    "critic_loss",
    "critic_grad_norm",
    "bc_loss",
    "q_loss",
    "actor_loss",
    "actor_grad_norm",
    "q_mean",
)  # in the order of optimizer.finish


class GivenNoise(NamedTuple):
    """The noise of an update of n agents where it is given and not drawn. Without critics chain and
    coin are None."""

    chain: Noise | None  # x_T (n, (N+1)·B, A), noises (n, T, (N+1)·B, A): the targets' rows first
    cloning: training.CloningNoise
    coin: torch.Tensor | None  # (n,)


def activation_shapes(agent, n: int, batch_size: int) -> dict:
    """Name -> shape of what one launch leaves for a later one, for n agents like this one."""
    policy, B = agent.policy, batch_size
    T, H = policy.n_timesteps, policy.mid_layer[0].out_features
    S, A = padded(policy.state_dim), padded(policy.action_dim)
    R, N = (T + 1) * B, agent.n_target_samples
    return {
        "inputs": (n, R, input_columns(S, A, T)),
        "u": (n, R, 3 * H),
        "h": (n, R, 3 * H),
        "du": (n, R, 3 * H),
        "dy": (n, R, A),
        "q_inputs": (n, B, input_columns(S, A)),
        "q_u": (n, 2, B, 3 * H),
        "q_h": (n, 2, B, 3 * H),
        "q_du": (n, 2, B, 3 * H),
        "q_dy": (n, 2, B, 16),
        "q": (n, 2, B),
        "reward": (n, B),
        "discount": (n, B),
        "epsilons": (n, R, A),
        "actions": (n, B, A),
        "target_values": (n, 2, N * B),
        "table": (n, T, H),
    }


def activation_type(name: str, precision: str) -> torch.dtype:
    """Of one of activation_shapes()."""
    return torch.float16 if name in ("h", "q_h") and precision == "fp16" else torch.float32


def bytes_needed(agents: list, batch_size: int, precision: str) -> int:
    """Of activations and gradients, and for each parameter a row of everything Adam knows."""
    networks = [m for a in agents for m in (a.policy, a.critic)]
    needed = 4 * 9 * sum(p.numel() for m in networks for p in m.parameters())
    for name, shape in activation_shapes(agents[0], len(agents), batch_size).items():
        needed += math.prod(shape) * activation_type(name, precision).itemsize
    return needed


class Launches:
    """One update of all agents at a time, in nine launches.

    policy, critic: Trained. steps (n,), seeds (n,), adam_steps (2, n): counters on the device.
    metrics (n, 7): sums over updates of METRICS. arch: the GPU's sm_XX. Raises UnsupportedError for
    networks that the kernels cannot take, torch.OutOfMemoryError.
    """

    def __init__(
        self, agents: list, batch_size: int, precision: str, arch: int,
        tile: Tile | None = None, product_tile: ProductTile | None = None,
    ):  # fmt: skip
        self.agent, self.n, self.batch_size = agents[0], len(agents), batch_size
        self.config, policy = self.agent.config, self.agent.policy
        self.learns_q = self.agent.algo == "ql"
        n, B = self.n, batch_size
        policies = PackedPolicy([m for a in agents for m in (a.policy_ema, a.policy)], precision)
        critics = PackedCritic([m for a in agents for m in (a.critic_target, a.critic)], precision)
        same = policies.hidden_dim == critics.hidden_dim
        require(same, "policy and critics must have the same hidden_dim")
        device = policies.device
        self.tile = tile or choose_update_tile(precision, arch, policies.hidden_dim)
        self.product_tile = product_tile or choose_product_tile(precision)
        self.n_tiles = triton.cdiv(B, self.tile.rows)

        D = self.time_dim = policy.time_mlp[1].in_features
        fits = D >= 16 and D == triton.next_power_of_2(D)
        require(fits, f"a time embedding of {D} numbers; it must be a power of two, at least 16")
        self.policy = Trained(agents, "policy", policies)
        self.critic = Trained(agents, "critic", critics)
        self.beside = torch.cuda.Stream(device) if device.type == "cuda" else None  # fit's
        self.steps = torch.zeros(n, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(n, dtype=torch.int64, device=device)
        self.adam_steps = torch.zeros(2, n, device=device)  # an optimizer counts its own
        self.adam_steps_of = dict(zip(("policy", "critic"), self.adam_steps))
        with torch.no_grad():
            t = torch.arange(policy.n_timesteps, device=device)
            self.sinusoids = policy.time_mlp[0](t).float().contiguous()

        shapes = activation_shapes(self.agent, n, B)
        x = {
            name: torch.empty(shape, device=device, dtype=activation_type(name, precision))
            for name, shape in shapes.items()
        }
        saved, q_saved = Saved(x["u"], x["h"]), Saved(x["q_u"], x["q_h"])
        x["q_dy"].zero_()[..., 0] = 1.0  # of the sum of Q
        self.memory = training.Memory(
            policy=training.Activations(x["inputs"], saved, x["du"], x["dy"]),
            critic=training.Activations(x["q_inputs"], q_saved, x["q_du"], x["q_dy"]),
            bellman=training.Bellman(x["q"], x["target_values"], x["reward"], x["discount"]),
            epsilons=x["epsilons"],
            actions=x["actions"],
            losses=torch.zeros(n, 3, self.n_tiles, device=device),
            q_sums=torch.zeros(n, 2, self.n_tiles, device=device),
        )
        self.table = x["table"]
        self.programs = PolicyAndCritic(*map(self._product_programs, (policies, critics)))
        # Sums of squares: a policy's time embedding has one of its own, the last.
        self.norms = PolicyAndCritic(
            torch.zeros(n, self.programs.policy + 1, device=device),
            torch.zeros(n, 2 * self.programs.critic, device=device),
        )
        self.metrics = torch.zeros(n, len(METRICS), device=device)
        self.nets = PolicyAndCritic(Net.of(policies), Net.of(critics))
        self.sizes = PolicyAndCritic(Sizes.of(policies), Sizes.of(critics))
        # Whether sample, with two sides, and fit find an SM for each program: then a short chain is
        # what counts.
        target_tiles = triton.cdiv(self.agent.n_target_samples * B, self.tile.rows)
        n_programs = n * (2 * target_tiles + 4 * self.n_tiles)
        self.at_once = n_programs <= multiprocessors(device)
        self.chain = Chain.of(policies)
        self.random = training.Random(self.seeds, self.steps)
        self.counts = training.Counts(
            targets=self.agent.n_target_samples,
            sides=2 if self.at_once else 1,
            critics=2 if self.learns_q else 0,
            tiles=self.n_tiles,
            norms=self.norms.policy.shape[1],
            critic_norms=self.norms.critic.shape[1],
        )
        self.time_sizes = gradients.TimeSizes(
            size=self.policy.size,
            columns=self.policy.columns,
            time_at=policies.time_at,
            H=policies.hidden_dim,
            T=policy.n_timesteps,
            T_padded=padded(policy.n_timesteps),
            D=D,
            chunk=min(policies.hidden_dim, TABLE_CHUNK // padded(policy.n_timesteps)),
        )

    def _product_programs(self, packed) -> int:
        """How many tiles the four weight gradients of a network have."""
        H, outputs, inputs = packed.hidden_dim, self.product_tile.outputs, self.product_tile.inputs
        first = H // outputs * triton.cdiv(Sizes.of(packed).inputs, inputs)
        hidden = (H // outputs) * (H // inputs)
        return first + 2 * hidden + H // inputs

    def state(self) -> list:
        """Every tensor that an update changes and a later one reads."""
        counters = [self.steps, self.adam_steps, self.metrics]
        return [*self.policy.tensors(), *self.critic.tensors(), *counters]

    def refresh(self) -> None:
        """Pack the present parameters."""
        for trained in (self.policy, self.critic):
            trained.packed.refresh()
        self._finish(None)  # the tables as an update makes them: resuming changes no bit

    def update(self, data: training.Columns, noise: GivenNoise | None = None) -> None:
        """One update of every agent.

        data: the transitions to draw from, (n_transitions, ·) each; or, with noise given, a batch
        for each agent, (n, B, ·).
        """
        B, n, c, tile = self.batch_size, self.n, self.config, self.tile
        n_transitions = len(data.state) if noise is None else B
        chain_noise, cloning, coin = (None,) * 3 if noise is None else noise
        if self.beside:
            self.beside.wait_stream(torch.cuda.current_stream())
        if self.learns_q:
            target_tiles = triton.cdiv(self.counts.targets * B, tile.rows)
            # Where programs queue for SMs, two on each at a time are better than a third stage: 88
            # instead of 120 µs for eight agents (H100, without fit beside it).
            sample_tile = tile if self.at_once else tile._replace(stages=min(tile.stages, 2))
            training.sample[(self.counts.sides * target_tiles + self.n_tiles, n)](
                data, n_transitions, chain_noise, self.random, self.chain, self.nets, self.memory,
                B, 0, self.counts, self.sizes, sample_tile, num_warps=tile.warps,
            )  # fmt: skip
        with torch.cuda.stream(self.beside):  # None: the current stream
            self._fit(data, n_transitions, cloning)
        if self.beside:
            torch.cuda.current_stream().wait_stream(self.beside)
        if self.learns_q:
            self._critic_gradients()
            self._adam(self.critic, self.norms.critic, optimizer.Averaging(c.tau, 0, 1))
            training.climb[(self.n_tiles, 2, n)](
                data, n_transitions, coin, self.random, self.chain, self.nets, self.memory,
                B, 0, self.counts, self.sizes, tile, num_warps=tile.warps,
            )  # fmt: skip
        self._policy_gradients()
        averaging = optimizer.Averaging(1 - c.ema_decay, c.ema_start, c.ema_every)
        self._adam(self.policy, self.norms.policy, averaging)
        self._finish(self.metrics)

    def _fit(self, data, n_transitions, cloning) -> None:
        policy, tile = self.agent.policy, self.tile
        forward = training.Forward(policy.sqrt_alpha_bar, policy.sqrt_one_minus_alpha_bar)
        fit_tile = tile._replace(stages=min(tile.stages, FIT_STAGES))
        training.fit[(self.n_tiles, self.counts.critics + 1, self.n)](
            data, n_transitions, cloning, self.random, forward, self.config.discount, self.nets,
            self.memory, self.batch_size, 0, self.counts, self.sizes, fit_tile,
            num_warps=tile.warps,
        )  # fmt: skip

    def _critic_gradients(self) -> None:
        self._weight_gradients(
            self.critic, self.memory.critic, self.memory.bellman, None, self.norms.critic, None,
            self.programs.critic, self.batch_size, 2 / self.batch_size,
        )  # fmt: skip

    def _policy_gradients(self) -> None:
        p, B = self.policy.packed, self.batch_size
        values = self.memory.q_sums if self.learns_q else None
        self._weight_gradients(
            self.policy, self.memory.policy, None, self.table, self.norms.policy, values,
            self.programs.policy, (p.n_timesteps + 1) * B, 1 / (B * p.action_dim),
        )  # fmt: skip
        v = self.policy.vectors
        gradients.time_gradient[(self.n,)](
            v.parameters, self.sinusoids, self.table, v.gradient, self.norms.policy,
            self.counts.norms, self.time_sizes,
        )  # fmt: skip

    def _weight_gradients(
        self, trained, activations, bellman, table, norms, values, programs, n_rows, cloned
    ) -> None:
        p, tile = trained.packed, self.product_tile
        layout = gradients.Layout(
            base=trained.size - p.NETWORKS * trained.network_size,
            size=trained.network_size,
            networks=p.NETWORKS,
            columns=trained.columns,
            state_at=p.state_at,
            action_at=p.action_at,
            outputs=p.n_out,
        )
        sums = gradients.Sums(
            self.batch_size, self.counts.targets, n_rows, self.n_tiles, norms.shape[1]
        )
        gradients.weight_gradients[(programs, p.NETWORKS, self.n)](
            activations, bellman, trained.vectors.gradient, table, norms, values, self.config.eta,
            cloned, sums, layout, Sizes.of(p), tile, num_warps=tile.warps,
        )  # fmt: skip

    def _adam(self, trained, norms, averaging) -> None:
        p, (beta_1, beta_2) = trained.packed, trained.betas
        copies, max_norm = 2 * self.n, self.config.grad_norm
        block = 1 << 16 if interpreting() else ADAM_BLOCK  # the interpreter pays by the program
        settings = optimizer.Adam(
            beta_1=beta_1,
            beta_2=beta_2,
            log_beta_1=math.log(beta_1),
            log_beta_2=math.log(beta_2),
            eps=trained.eps,
            size=trained.size,
            norms=norms.shape[1],
            weights=p.weights.numel() // copies,
            biases=p.bias.numel() // copies,
            precision=p.precision,
            block=block,
        )
        optimizer.adam[(triton.cdiv(trained.size, block), self.n)](
            trained.vectors, trained.destination, Net.of(p), norms if max_norm > 0 else None,
            max_norm, trained.rate, self.steps, self.adam_steps_of[trained.kind], averaging,
            settings,
        )  # fmt: skip

    def _finish(self, metrics) -> None:
        optimizer.finish[(2, self.n)](
            self.policy.vectors, self.sinusoids, self.nets.policy, self.memory, self.norms,
            self.config.eta, metrics, self.steps, self.adam_steps, self.batch_size,
            self.counts, self.time_sizes, self.sizes.policy,
        )  # fmt: skip
