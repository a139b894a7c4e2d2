"""Diffusion-QL updates of one or several agents, fused: nine launches each, many in a CUDA graph.

    update = kernels.FusedUpdate(agent, transitions, batch_size=256)  # a dql.DiffusionQL
    losses = update.run(1000)                                         # ten replays of a graph

An agent that is handed over keeps its parameters, averages and Adam's moments, but from then on
they are views of the rows of matrices (trained.py): its own update, evaluation, checkpoints and
resuming see the live values.
"""

import warnings
import weakref
from dataclasses import asdict

import torch
from torch.autograd.graph import increment_version

from . import graphs, packing, training
from .launches import METRICS, GivenNoise, Launches, bytes_needed
from .network import Noise
from .packing import architecture, interpreting, on, require, require_tensor
from .tiles import ProductTile, Tile

MAX_BATCH = 4096
PER_REPLAY = 100  # updates that a graph holds
COLUMNS = "state", "action", "next_state", "reward", "not_done"


class FusedUpdate:
    """FusedUpdate(agent, transitions, batch_size).run(n): n updates of a DiffusionQL.

    agents: a DiffusionQL, or a list of them, which learn side by side and may differ in weights and
    seed alone; each gets the numbers that it would get alone, bit for bit. transitions: a
    dql.Transitions on the agents' device, or another object with its `columns`; None if batches
    will be given to step(). precision: of matrix products, fp16, tf32, fp16x3 or fp32; sums,
    losses, Adam and averages are float32. Random numbers are Philox's, from an agent's seed and
    step. Raises UnsupportedError, in one line that says what is supported, for agents, sizes,
    optimizers or devices that the kernels cannot take, or when there is too little memory.
    """

    METRICS = METRICS

    def __init__(
        self, agents, transitions, batch_size: int, precision: str = "fp16", *,
        tile: Tile | None = None, product_tile: ProductTile | None = None,
    ):  # fmt: skip
        self.single = not isinstance(agents, (list, tuple))
        self.agents = agents = [agents] if self.single else list(agents)
        require(len(agents) > 0, "no agents were given")
        within = f"batch_size {batch_size} is not within 1 to {MAX_BATCH}"
        require(1 <= batch_size <= MAX_BATCH, within)
        _require_alike(agents)
        self.agent, self.batch_size = agents[0], batch_size
        self.device = next(agents[0].policy.parameters()).device  # with its index
        arch = architecture(self.device)
        no_gpu = "kernels need a CUDA GPU, or TRITON_INTERPRET=1 for the interpreter"
        require(self.device.type == "cuda" or interpreting(), no_gpu)
        self.columns = None
        if transitions is not None:
            self.columns = training.Columns(*transitions.columns)
            self._require_columns(self.columns, len(self.columns.state))
            for name in ("state", "next_state"):
                _require_resolution(name, getattr(self.columns, name), precision)
        wanted = bytes_needed(agents, batch_size, precision)
        try:
            self.launches = Launches(agents, batch_size, precision, arch, tile, product_tile)
        except torch.OutOfMemoryError as e:
            free = torch.cuda.mem_get_info(self.device)[0]
            raise packing.UnsupportedError(
                f"fused training of {len(agents)} agents needs {wanted >> 20} MiB of GPU memory, "
                f"and {free >> 20} MiB are free"
            ) from e
        self.policy, self.critic = self.launches.policy, self.launches.critic
        self.graph, self.replays = None, self.device.type == "cuda"
        self._take_numbers()
        self.refresh()

    def _require_columns(self, columns, n: int) -> None:
        policy = self.agent.policy
        widths = policy.state_dim, policy.action_dim, policy.state_dim, 1, 1
        for name, column, width in zip(COLUMNS, columns, widths):
            require_tensor(name, column, (n, width), self.device)

    def refresh(self) -> None:
        """Pack the present parameters again, where they were changed in a way that is not counted.

        run() and step() do so by themselves for other changes, see packing.stale().
        """
        with on(self.device):
            self.launches.refresh()

    def run(self, n: int):
        """n updates on minibatches drawn with replacement.

        -> the mean of each metric over them, {name: 0-d tensor}; with several agents a list of
        them. Nothing waits for the device; NaN in any update is NaN in the mean. On a GPU every
        PER_REPLAY updates are one replay of a CUDA graph, which capture() makes, or the first call
        that needs it.
        """
        self._require_transitions()
        self._prepare()
        with on(self.device):
            n_left = n
            if self.replays and n >= PER_REPLAY:
                self.capture()
                for _ in range(n // PER_REPLAY):
                    self.graph.replay()
                n_left = n % PER_REPLAY
            for _ in range(n_left):
                self._launch()
        self._count(n)
        return self._metrics(n)

    def capture(self) -> None:
        """Compile, and on a GPU capture the graph that run() replays; nothing is trained."""
        self._require_transitions()
        if self.replays and self.graph is None:
            # Else graph and update keep each other alive until the garbage collector comes.
            me = weakref.proxy(self)
            self.graph = graphs.Captured(
                lambda: [me._launch() for _ in range(PER_REPLAY)] and None,
                unchanged=self.launches.state(),
            )

    def _require_transitions(self) -> None:
        without = "this update was made without transitions: only step() can be called"
        require(self.columns is not None, without)

    def _launch(self) -> None:
        self.launches.update(self.columns)

    def step(self, batch, noise):
        """One update on a given Batch, (B,·) each, with a given UpdateNoise; with several agents on
        lists of them. -> the metrics, as run(). Raises UnsupportedError for other shapes."""
        batches, draws = ([batch], [noise]) if self.single else (batch, noise)
        many = f"{len(self.agents)} agents need as many batches and draws of noise"
        require(len(batches) == len(draws) == len(self.agents), many)
        batches = [[self._column(column) for column in given] for given in batches]
        for columns in batches:
            self._require_columns(columns, self.batch_size)
        data = training.Columns(*(torch.stack(column) for column in zip(*batches)))
        self._prepare()
        with on(self.device):
            self.launches.update(data, self._stacked(draws))
        self._count(1)
        return self._metrics(1)

    def _column(self, values) -> torch.Tensor:
        """Any array as dql.Batch.of takes it: (B,) as (B,1)."""
        column = torch.as_tensor(values, dtype=torch.float32, device=self.device).contiguous()
        return column[:, None] if column.dim() == 1 else column

    def _stacked(self, draws: list) -> GivenNoise:
        """The agents' UpdateNoises as the kernels take them."""
        t, bc_noise = ([getattr(d, name) for d in draws] for name in ("t", "bc_noise"))
        cloning = training.CloningNoise(torch.stack(t), torch.stack(bc_noise))
        if not self.launches.learns_q:
            return GivenNoise(None, cloning, None)
        x_T = torch.stack([torch.cat([d.target_x_T, d.actor_x_T]) for d in draws])
        both = [torch.cat([d.target_noises, d.actor_noises], dim=1) for d in draws]
        rows = (self.agent.n_target_samples + 1) * self.batch_size, self.agent.policy.action_dim
        wrong = f"target and actor noise have {tuple(x_T.shape[1:])} numbers; it must be {rows}"
        require(x_T.shape[1:] == rows, wrong)
        coin = torch.tensor([float(d.coin) for d in draws], device=self.device)
        return GivenNoise(Noise(x_T, torch.stack(both)), cloning, coin)

    def _prepare(self) -> None:
        """See what has happened to the agents since the last launch.

        Raises UnsupportedError if they are no longer those here.
        """
        taken = "another FusedUpdate has taken over this agent: make a new one, or go on with that"
        require(self.policy.is_mine() and self.critic.is_mine(), taken)
        if self.policy.packed.stale() or self.critic.packed.stale():
            self.refresh()
        self._take_numbers()
        self.launches.metrics.zero_()

    def _take_numbers(self) -> None:
        """Steps, seeds and rates live on the host: an agent may have been trained or restored."""
        own = self.launches
        own.steps.copy_(torch.tensor([a.step for a in self.agents]))
        own.seeds.copy_(torch.tensor([a.seed for a in self.agents]))
        for trained, adam_steps in zip((self.policy, self.critic), own.adam_steps):
            adam_steps.copy_(torch.tensor(trained.steps()))
            trained.read_rate()

    def _count(self, n: int) -> None:
        """n updates are made: count them, and let whoever packed these weights see a change."""
        for agent in self.agents:
            agent.step += n
            networks = agent.networks().values()
            increment_version([p for network in networks for p in network.parameters()])
        self.policy.count(n)
        if self.launches.learns_q:
            self.critic.count(n)
        self.policy.packed.remember(), self.critic.packed.remember()

    def _metrics(self, n: int):
        means = self.launches.metrics / max(n, 1)
        found = [dict(zip(METRICS, row)) for row in means]
        if not self.launches.learns_q:
            found = [{name: f[name] for name in ("bc_loss", "actor_grad_norm")} for f in found]
        return found[0] if self.single else found


def _require_alike(agents: list) -> None:
    """Raises UnsupportedError if agents differ in more than weights and seed."""
    together = "agents that learn together must"
    settings = [
        {"algo": a.algo, **asdict(a.config), "max_action": a.policy.max_action} for a in agents
    ]
    for name in settings[0]:
        values = {each[name] for each in settings}
        require(len(values) == 1, f"{together} share {name}; they have {sorted(values)}")
    networks = [[*a.policy.parameters(), *a.critic.parameters()] for a in agents]
    shapes = {tuple(p.shape for p in parameters) for parameters in networks}
    require(len(shapes) == 1, f"{together} have networks of the same sizes")


def _require_resolution(name: str, states: torch.Tensor, precision: str) -> None:
    """Raises UnsupportedError for states (N,S) that fp16 cannot hold.

    Warns of columns whose spread eleven bits cannot resolve.
    """
    low, high = states.amin(0), states.amax(0)
    largest, spread = torch.maximum(-low, high), high - low
    most = float(largest.amax())
    fits = not precision.startswith("fp16") or most <= packing.FP16_MOST
    beyond = f"{name} reaches {most:.3g}, which {precision} cannot hold"
    require(fits, f"{beyond}: normalise states, or take precision tf32 or fp32")
    if precision not in ("fp16", "tf32"):
        return
    step = (largest * 2.0**-11).clamp(min=2.0**-24 if precision == "fp16" else 0.0)
    for i in torch.nonzero((2 * step > spread) & (spread > 0)).flatten().tolist():
        column = f"column {i} of {name} varies by {float(spread[i]):.2g}"
        found = f"{column} and reaches {float(largest[i]):.3g}, so {precision} hardly sees it"
        warnings.warn(f"{found}: normalise states, or take precision fp16x3", stacklevel=3)
