"""A whole Diffusion-QL update of one or several agents in nine launches, and many updates in one CUDA graph.

    update = kernels.FusedUpdate(agent, transitions, batch_size=256)     # a dql.DiffusionQL, a dql.Transitions on its device
    losses = update.run(1000)                                            # a thousand updates: ten replays of a graph

The launches are training.py's; here is the memory they work on. An agent that is handed over keeps its parameters, averages and
Adam's moments, but from then on they are views of the rows of matrices: its own update, evaluation, checkpoints and resuming see
the live values.
"""

import itertools
import math
import warnings
import weakref
from dataclasses import asdict

import torch
import triton
from torch.autograd.graph import increment_version

from . import gradients, graphs, optimizer, packing, training
from .network import Chain, Net, Noise, PolicyAndCritic, Sizes, input_columns
from .packing import LOG2E, PackedCritic, PackedPolicy, architecture, interpreting, on, require, require_tensor
from .tiles import FIT_STAGES, ProductTile, Tile, choose_product_tile, choose_update_tile

MAX_BATCH = 4096
PER_REPLAY = 100  # updates that a graph holds
ADAM_BLOCK, TIME_CHUNK = 1024, 32  # parameters, hidden units a program takes at a time


def _padded(n: int) -> int:
    return triton.next_power_of_2(n)


class _Trained:
    """One kind of network of all agents with its average and its optimizer, as training.adam takes them: rows of (n, SIZE)."""

    def __init__(self, agents: list, name: str, packed, layers, first_columns: dict, adam_steps: torch.Tensor):
        self.packed, self.module = packed, getattr(agents[0], name)
        average = {"policy": "policy_ema", "critic": "critic_target"}[name]
        optimizers = [getattr(agent, f"{name}_optimizer") for agent in agents]
        group = optimizers[0].param_groups[0]
        for setting, wanted in (("weight_decay", 0), ("amsgrad", False), ("maximize", False)):
            have = group.get(setting, wanted)
            require(have == wanted, f"the {name}'s optimizer has {setting}={have}; the fused Adam knows only {wanted}")
        self.betas, self.eps = group["betas"], group["eps"]

        networks = [list(getattr(agent, name).parameters()) for agent in agents]
        averages = [list(getattr(agent, average).parameters()) for agent in agents]
        self.states = [[o.state[p] for p in parameters] for o, parameters in zip(optimizers, networks)]
        self.optimizers, self.views = optimizers, []
        self.parameters, self.average = self._adopt(networks), self._adopt(averages)
        self.momentum, self.variance = (
            self._adopt([[state[key] for state in states] for states in self.states]) for key in ("exp_avg", "exp_avg_sq")
        )
        self.gradient = torch.zeros_like(self.parameters)
        self.adam_steps = adam_steps
        self.size = self.parameters.shape[1]
        self.networks = [layers(self.module, i) for i in range(packed.NETWORKS)]
        self.columns = self.networks[0][0].in_features
        self.first_columns = first_columns
        self.place, self.factor = self._destinations()

    def _adopt(self, agents: list) -> torch.Tensor:
        """Each agent's tensors become views of a row of one matrix, which is returned: (n, SIZE)."""
        rows = torch.stack([torch.cat([x.detach().flatten() for x in tensors]) for tensors in agents])
        for row, tensors in zip(rows, agents):
            for x, view in zip(tensors, row.split([x.numel() for x in tensors])):
                x.data = view.view_as(x)
                self.views.append((x, view.data_ptr()))
        return rows

    def _destinations(self):
        """Where each parameter goes in the packed copies, and times what, as training.adam's place and factor."""
        packed, H = self.packed, self.packed.hidden_dim
        sizes = [p.numel() for p in self.module.parameters()]
        starts = dict(zip(self.module.parameters(), itertools.accumulate(sizes, initial=0)))
        place, factor = torch.full((self.size,), -1, dtype=torch.int32), torch.zeros(self.size)
        block, width = packed.weights.shape[1], packed.bias.shape[1]

        def put(p, where, times):
            here = slice(starts[p], starts[p] + p.numel())
            place[here], factor[here] = where.reshape(-1).int(), times / packed.scale

        for k, layers in enumerate(self.networks):
            state, action, second, third, last = packed.matrices(torch.arange(block) + k * block)
            first = torch.full(layers[0].weight.shape, -1)
            for columns, at, n in ((state, "STATE_AT", packed.state_dim), (action, "ACTION_AT", packed.action_dim)):
                first[:, self.first_columns[at] :][:, :n] = columns[:, :n]
            put(layers[0].weight, first, LOG2E)
            put(layers[1].weight, second, 1.0)
            put(layers[2].weight, third, 1.0)
            put(layers[3].weight, last[: packed.n_out], 1 / LOG2E)
            if packed.biases == 1:  # otherwise there is one for each timestep, which training.finish packs
                for i, layer in enumerate(layers):
                    where = k * width + i * H + torch.arange(len(layer.bias))
                    put(layer.bias, -2 - where, LOG2E if i < 3 else 1.0)
        return place.to(packed.device), factor.to(packed.device)

    def tensors(self) -> list:
        """Everything that an update changes."""
        p = self.packed
        return [self.parameters, self.average, self.momentum, self.variance, self.adam_steps, p.weights, p.low, p.bias]


def _require_resolution(name: str, states: torch.Tensor, precision: str) -> None:
    """Raises UnsupportedError for states (N,S) that fp16 cannot hold; warns of columns whose spread eleven bits cannot resolve."""
    low, high = states.amin(0), states.amax(0)
    largest, spread = torch.maximum(-low, high), high - low
    most = float(largest.amax())
    fits = not precision.startswith("fp16") or most <= packing.FP16_MOST
    require(fits, f"{name} reaches {most:.3g}, which {precision} cannot hold: normalise states, or take precision tf32 or fp32")
    if precision in ("fp16", "tf32"):
        step = (largest * 2.0**-11).clamp(min=2.0**-24 if precision == "fp16" else 0.0)
        for i in torch.nonzero((2 * step > spread) & (spread > 0)).flatten().tolist():
            found = f"column {i} of {name} varies by {float(spread[i]):.2g} and reaches {float(largest[i]):.3g}"
            advice = "normalise states, or take precision fp16x3"
            warnings.warn(f"{found}, so {precision} sees next to nothing of it: {advice}", stacklevel=3)


class FusedUpdate:
    """FusedUpdate(agent, transitions, batch_size).run(n): n updates of a DiffusionQL; several agents learn side by side.

    agents: a DiffusionQL, or a list of them that differ in nothing but weights and seed; each gets the numbers it would get
    alone, bit for bit. transitions: a dql.Transitions on the agents' device, or another object with its `columns`; None, if
    batches will be given to step(). precision: of matrix products, fp16, tf32, fp16x3 or fp32; sums, losses, Adam and averages
    are float32. Random numbers are Philox's, from the agent's seed and its step. Raises UnsupportedError, in one line that says
    what is supported, for agents, sizes, optimizers or devices that the kernels cannot take, or for want of memory.
    """

    METRICS = ("critic_loss", "critic_grad_norm", "bc_loss", "q_loss", "actor_loss", "actor_grad_norm")

    def __init__(
        self, agents, transitions, batch_size: int, precision: str = "fp16", *, tile: Tile | None = None,
        product_tile: ProductTile | None = None,
    ):  # fmt: skip
        self.single = not isinstance(agents, (list, tuple))
        self.agents = agents = [agents] if self.single else list(agents)
        require(len(agents) > 0, "no agents were given")
        require(1 <= batch_size <= MAX_BATCH, f"batch_size {batch_size} is not within 1 to {MAX_BATCH}")
        agent = agents[0]
        settings = [{"algo": a.algo, **asdict(a.config)} for a in agents]
        for name in settings[0]:
            values = {each[name] for each in settings}
            require(len(values) == 1, f"agents that learn together must share {name}; they have {sorted(values)}")
        shapes = {tuple((k, v.shape) for k, v in a.state_dict().items() if "." in k) for a in agents}
        require(len(shapes) == 1, "agents that learn together must have networks of the same sizes")
        bounds = {a.policy.max_action for a in agents}
        require(len(bounds) == 1, f"agents that learn together must share max_action; they have {sorted(bounds)}")
        self.agent, self.config, self.device, self.batch_size = agent, agent.config, agent.device, batch_size
        self.arch = architecture(self.device)
        require(self.device.type == "cuda" or interpreting(), "kernels need a CUDA GPU, or TRITON_INTERPRET=1 for the interpreter")
        self.learns_q = agent.algo == "ql"
        self.columns = None if transitions is None else list(transitions.columns)
        if self.columns is not None:
            policy, n = agent.policy, len(self.columns[0])
            widths = policy.state_dim, policy.action_dim, policy.state_dim, 1, 1
            for name, column, width in zip(("state", "action", "next_state", "reward", "not_done"), self.columns, widths):
                require_tensor(name, column, (n, width), self.device)
            for name, column in zip(("state", "next_state"), self.columns[::2]):
                _require_resolution(name, column, precision)
        wanted = self._bytes()
        try:
            self._allocate(precision, tile, product_tile)
        except torch.OutOfMemoryError as e:
            free = torch.cuda.mem_get_info(self.device)[0]
            raise packing.UnsupportedError(
                f"fused training of {len(agents)} agents needs {wanted >> 20} MiB of GPU memory, and {free >> 20} MiB are free"
            ) from e
        self.graph, self.replays = None, self.device.type == "cuda"
        self._take_numbers()
        self.refresh()

    def _sizes(self):
        policy, n, B = self.agent.policy, len(self.agents), self.batch_size
        T, H = policy.n_timesteps, policy.mid_layer[0].out_features
        S, A = packing.padded(policy.state_dim), packing.padded(policy.action_dim)
        R, N = (T + 1) * B, self.agent.n_target_samples
        return {
            "inputs": (n, R, input_columns(S, A, T)), "saved": (n, R, 3 * H), "du": (n, R, 3 * H), "dy": (n, R, A), "epsilons": (n, R, A),
            "actions": (n, B, A), "target_values": (n, 2, N * B), "q_inputs": (n, B, input_columns(S, A)), "q_saved": (n, 2, B, 3 * H),
            "q_du": (n, 2, B, 3 * H), "q_dy": (n, 2, B, 16), "table": (n, T, H),
        }  # fmt: skip

    def _bytes(self) -> int:
        """What has to be allocated: activations and gradients, and for each parameter a row of everything Adam knows."""
        activations = sum(math.prod(shape) for shape in self._sizes().values())
        parameters = sum(p.numel() for a in self.agents for m in (a.policy, a.critic) for p in m.parameters())
        return 4 * (activations + 9 * parameters)

    def _allocate(self, precision, tile, product_tile):
        agents, agent, device, n, B = self.agents, self.agent, self.device, len(self.agents), self.batch_size
        policy, T = agent.policy, agent.policy.n_timesteps
        policies = PackedPolicy([m for a in agents for m in (a.policy_ema, a.policy)], precision)
        critics = PackedCritic([m for a in agents for m in (a.critic_target, a.critic)], precision)
        require(policies.hidden_dim == critics.hidden_dim, "policy and critics must have the same hidden_dim")
        H = policies.hidden_dim
        self.precision = precision
        self.tile = tile = tile or choose_update_tile(precision, self.arch, H)
        self.product_tile = product_tile or choose_product_tile(precision)
        self.n_tiles = triton.cdiv(B, tile.rows)

        self.steps = torch.zeros(n, dtype=torch.int64, device=device)
        adam_steps = torch.zeros(2, n, device=device)  # separate from steps, as an optimizer's own count is
        S, A, D = policy.state_dim, policy.action_dim, policy.time_mlp[1].in_features
        self.time_dim = D
        require(D >= 16 and D == _padded(D), f"a time embedding of {D} numbers; it must be a power of two, at least 16")
        self.policy = _Trained(
            agents, "policy", policies, lambda m, k: [*m.mid_layer[::2], m.final_layer], {"STATE_AT": A + D, "ACTION_AT": 0},
            adam_steps[0],
        )  # fmt: skip
        self.critic = _Trained(
            agents, "critic", critics, lambda m, k: list((m.q1_model, m.q2_model)[k][::2]), {"STATE_AT": 0, "ACTION_AT": S},
            adam_steps[1],
        )  # fmt: skip
        self.adam_steps = adam_steps
        self.seeds = torch.zeros(n, dtype=torch.int64, device=device)
        with torch.no_grad():
            self.sinusoids = policy.time_mlp[0](torch.arange(T, device=device)).float().contiguous()
        self.rates = {name: torch.zeros(1, device=device) for name in ("policy", "critic")}
        for name, shape in self._sizes().items():
            setattr(self, name, torch.empty(shape, device=device))
        self.losses = torch.zeros(n, 3, self.n_tiles, device=device)
        self.values = torch.zeros(n, 2, self.n_tiles, device=device)
        tiles, p = self._product_programs(policies), self._product_programs(critics)
        self.norms = torch.zeros(n, tiles + 1, device=device)  # the last one is the time embedding's
        self.q_norms = torch.zeros(n, 2 * p, device=device)
        self.metrics = torch.zeros(n, len(self.METRICS), device=device)

    def _product_programs(self, packed) -> int:
        """How many tiles the four weight gradients of a network have."""
        H, out_tile, in_tile = packed.hidden_dim, self.product_tile.outputs, self.product_tile.inputs
        width = Sizes.of(packed).inputs
        first, hidden = H // out_tile * triton.cdiv(width, in_tile), (H // out_tile) * (H // in_tile)
        return first + 2 * hidden + H // in_tile

    def refresh(self) -> None:
        """Pack the present parameters again. run() and step() do so by themselves where they have changed elsewhere."""
        for trained in (self.policy, self.critic):
            trained.packed.refresh()
        with on(self.device):
            self._finish(counts=False)  # the tables as an update makes them: resuming changes no bit

    def state(self) -> list:
        """Every tensor that an update changes and a later one reads."""
        return [*self.policy.tensors(), *self.critic.tensors(), self.steps, self.adam_steps, self.metrics]

    # ---- launches ----------------------------------------------------------------------------------------------------

    def _launch(self, batch=None, noise=None):
        """One update of every agent, on drawn batches and noise or given ones, stacked over agents."""
        agent, p, q, tile = self.agent, self.policy.packed, self.critic.packed, self.tile
        B, n, tiles = self.batch_size, len(self.agents), self.n_tiles
        data = training.Columns(*(self.columns if batch is None else batch))
        n_transitions = len(self.columns[0]) if batch is None else B
        x_T, noises, t, bc_noise, coin = (None,) * 5 if noise is None else noise
        chain_noise = None if x_T is None else Noise(x_T, noises)
        cloning = None if t is None else training.CloningNoise(t, bc_noise)
        random = training.Random(self.seeds, self.steps)
        nets = PolicyAndCritic(Net.of(p), Net.of(q))
        memory, counts = self._memory(), self._counts()
        sizes = PolicyAndCritic(Sizes.of(p), Sizes.of(q))
        if self.learns_q:
            target_tiles = triton.cdiv(agent.n_target_samples * B, tile.rows)
            training.sample[(target_tiles + tiles, n)](
                data, n_transitions, chain_noise, random, Chain.of(p), nets, memory, B, 0,
                counts, sizes, tile, num_warps=tile.warps,
            )  # fmt: skip
        policy = agent.policy
        forward = training.Forward(policy.sqrt_alpha_bar, policy.sqrt_one_minus_alpha_bar)
        fit_tile = tile._replace(stages=min(tile.stages, FIT_STAGES))
        training.fit[(tiles, counts.critics + 1, n)](
            data, n_transitions, cloning, random, forward, self.config.discount, nets, memory, B, 0,
            counts, sizes, fit_tile, num_warps=tile.warps,
        )  # fmt: skip
        if self.learns_q:
            self._weight_gradients(self.critic, memory.critic, self.q_norms, B, 1 / B)
            averaging = optimizer.Averaging(self.config.tau, 0, 1)
            self._adam(self.critic, self.q_norms, self.rates["critic"], averaging)
            training.climb[(tiles, 2, n)](
                data, n_transitions, coin, random, Chain.of(p), nets, memory, B, 0,
                counts, sizes, tile, num_warps=tile.warps,
            )  # fmt: skip
        n_rows, mean = (p.n_timesteps + 1) * B, 1 / (B * p.action_dim)
        self._weight_gradients(self.policy, memory.policy, self.norms, n_rows, mean)
        gradients.time_gradient[(n,)](
            self.policy.parameters, self.sinusoids, self.table, self.policy.gradient, self.norms,
            counts.norms, self._time_sizes(),
        )  # fmt: skip
        averaging = optimizer.Averaging(1 - self.config.ema_decay, self.config.ema_start, self.config.ema_every)
        self._adam(self.policy, self.norms, self.rates["policy"], averaging)
        self._finish(counts=True)

    def _memory(self) -> training.Memory:
        return training.Memory(
            policy=training.Activations(self.inputs, self.saved, self.du, self.dy),
            critic=training.Activations(self.q_inputs, self.q_saved, self.q_du, self.q_dy),
            epsilons=self.epsilons,
            actions=self.actions,
            target_values=self.target_values,
            losses=self.losses,
            q_sums=self.values,
        )

    def _counts(self) -> training.Counts:
        return training.Counts(
            targets=self.agent.n_target_samples,
            critics=2 if self.learns_q else 0,
            tiles=self.n_tiles,
            norms=self.norms.shape[1],
            critic_norms=self.q_norms.shape[1],
        )

    def _weight_gradients(self, trained, activations, norms, n_rows, cloned):
        p, is_policy, tile = trained.packed, trained is self.policy, self.product_tile
        of_network = sum(x.numel() for layer in trained.networks[0] for x in layer.parameters())
        layout = gradients.Layout(
            base=trained.size - p.NETWORKS * of_network,
            size=of_network,
            networks=p.NETWORKS,
            columns=trained.columns,
            state_at=trained.first_columns["STATE_AT"],
            action_at=trained.first_columns["ACTION_AT"],
            outputs=p.n_out,
        )
        sums = gradients.Sums(self.batch_size, n_rows, self.n_tiles, norms.shape[1])
        gradients.weight_gradients[(self._product_programs(p), p.NETWORKS, len(self.agents))](
            activations, trained.gradient, self.table if is_policy else None, norms,
            self.values if is_policy and self.learns_q else None, self.config.eta, cloned,
            sums, layout, Sizes.of(p), tile, num_warps=tile.warps,
        )  # fmt: skip

    def _adam(self, trained, norms, rates, averaging):
        p, (beta_1, beta_2) = trained.packed, trained.betas
        copies = 2 * len(self.agents)
        block = 1 << 16 if interpreting() else ADAM_BLOCK  # the interpreter pays by the program
        settings = optimizer.Adam(
            beta_1=beta_1,
            beta_2=beta_2,
            log_beta_1=math.log(beta_1),
            log_beta_2=math.log(beta_2),
            eps=trained.eps,
            periods=len(rates) - 1,
            size=trained.size,
            norms=norms.shape[1],
            weights=p.weights.numel() // copies,
            biases=p.bias.numel() // copies,
            precision=self.precision,
            block=block,
        )
        optimizer.adam[(triton.cdiv(trained.size, block), len(self.agents))](
            self._vectors(trained), optimizer.Destination(trained.place, trained.factor), Net.of(p),
            norms if self.config.grad_norm > 0 else None, self.config.grad_norm, self.steps, trained.adam_steps,
            optimizer.Rates(rates, 1), averaging, settings,
        )  # fmt: skip

    def _vectors(self, trained) -> optimizer.Vectors:
        return optimizer.Vectors(
            trained.parameters,
            trained.gradient,
            trained.momentum,
            trained.variance,
            trained.average,
        )

    def _time_sizes(self) -> gradients.TimeSizes:
        p, T = self.policy, self.policy.packed.n_timesteps
        return gradients.TimeSizes(
            size=p.size,
            columns=p.columns,
            time_at=p.packed.action_dim,
            H=p.packed.hidden_dim,
            T=T,
            T_padded=max(16, _padded(T)),
            D=self.time_dim,
            chunk=p.packed.hidden_dim if interpreting() else TIME_CHUNK,
        )

    def _finish(self, counts: bool):
        p, norms = self.policy.packed, PolicyAndCritic(self.norms, self.q_norms)
        metrics = self.metrics if counts else None
        optimizer.finish[(2, len(self.agents))](
            self._vectors(self.policy), self.sinusoids, Net.of(p), self._memory(), norms,
            self.config.eta, metrics, self.steps, self.adam_steps, self.batch_size,
            self._counts(), self._time_sizes(), Sizes.of(p),
        )  # fmt: skip

    # ---- what is called ----------------------------------------------------------------------------------------------

    def run(self, n: int):
        """n updates on minibatches drawn with replacement. -> the mean of each metric over them, a dict of 0-d tensors; with
        several agents a list of them. Nothing waits for the device; NaN in any update is NaN in the mean.

        On a GPU every PER_REPLAY updates are one replay of a CUDA graph, which capture() makes, or the first call that needs it.
        """
        require(self.columns is not None, "this update was made without transitions: only step() can be called")
        self._prepare()
        with on(self.device):
            if self.replays and n >= PER_REPLAY:
                self.capture()
                for _ in range(n // PER_REPLAY):
                    self.graph.replay()
                n_left = n % PER_REPLAY
            else:
                n_left = n
            for _ in range(n_left):
                self._launch()
        self._count(n)
        return self._metrics(n)

    def capture(self) -> None:
        """Compile, and on a GPU capture the graph that run() replays, unless that is done; nothing is trained."""
        require(self.columns is not None, "this update was made without transitions: only step() can be called")
        if self.replays and self.graph is None:
            me = weakref.proxy(self)  # or graph and update would keep each other alive until the garbage collector comes
            self.graph = graphs.Captured(lambda: [me._launch() for _ in range(PER_REPLAY)] and None, unchanged=self.state())

    def step(self, batch, noise):
        """One update on a given batch (state, action, next_state, reward, not_done) with a given UpdateNoise; with several agents
        on lists of them. -> the metrics, as run()."""
        batches, draws = ([batch], [noise]) if self.single else (batch, noise)
        require(len(batches) == len(draws) == len(self.agents), f"{len(self.agents)} agents need as many batches and draws of noise")
        p, B, N = self.policy.packed, self.batch_size, self.agent.n_target_samples
        widths = p.state_dim, p.action_dim, p.state_dim, 1, 1
        for given in batches:
            for name, tensor, width in zip(("state", "action", "next_state", "reward", "not_done"), given, widths):
                require_tensor(name, tensor.contiguous(), (B, width), self.device)
        stacked = [torch.stack(column).contiguous() for column in zip(*batches)]
        x_T = noises = coin = None  # not read without critics
        if self.learns_q:
            x_T = torch.stack([torch.cat([d.target_x_T, d.actor_x_T]) for d in draws])
            noises = torch.stack([torch.cat([d.target_noises, d.actor_noises], dim=1) for d in draws])
            coin = torch.tensor([float(d.coin) for d in draws], device=self.device)
            rows = len(draws), (N + 1) * B, p.action_dim
            require(x_T.shape == rows, f"target and actor noise have {tuple(x_T.shape[1:])} numbers; it must be {rows[1:]}")
        t, bc_noise = torch.stack([d.t for d in draws]), torch.stack([d.bc_noise for d in draws])
        self._prepare()
        with on(self.device):
            self._launch(stacked, (x_T, noises, t, bc_noise, coin))
        self._count(1)
        return self._metrics(1)

    def _prepare(self) -> None:
        """See what has happened to the agents since the last launch. Raises UnsupportedError where they are no longer those here."""
        for trained in (self.policy, self.critic):
            mine = all(x.data_ptr() == at for x, at in trained.views)
            require(mine, "another FusedUpdate has taken over this agent: make a new one, or go on with that")
        if self.policy.packed.stale() or self.critic.packed.stale():
            self.refresh()
        self._take_numbers()
        self.metrics.zero_()

    def _take_numbers(self) -> None:
        """Steps, seeds and learning rates, which the host keeps: agents may have been trained or restored, a schedule may go on."""
        self.steps.copy_(torch.tensor([a.step for a in self.agents]))
        self.seeds.copy_(torch.tensor([a.seed for a in self.agents]))
        for trained, adam_steps, rate in zip((self.policy, self.critic), self.adam_steps, self.rates.values()):
            adam_steps.copy_(torch.tensor([float(states[0]["step"]) for states in trained.states]))
            rates = {float(optimizer.param_groups[0]["lr"]) for optimizer in trained.optimizers}
            require(len(rates) == 1, f"agents that learn together must share learning rates; they have {sorted(rates)}")
            rate.fill_(*rates)

    def _count(self, n: int) -> None:
        """n updates are made: the agents' own counts go on, and everybody who packed their weights sees that they have changed."""
        for agent in self.agents:
            agent.step += n
            increment_version([p for network in agent.networks().values() for p in network.parameters()])
        for trained in (self.policy, self.critic) if self.learns_q else (self.policy,):
            trained.packed.remember()
            for states in trained.states:
                for state in states:
                    state["step"] += n
        self.critic.packed.remember()

    def _metrics(self, n: int):
        means = self.metrics / max(n, 1)
        found = [dict(zip(self.METRICS, row)) for row in means]
        if not self.learns_q:
            found = [{name: f[name] for name in ("bc_loss", "actor_grad_norm")} for f in found]
        return found[0] if self.single else found
