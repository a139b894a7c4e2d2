"""Several agents' parameters, and what Adam keeps of them, as matrices of one row per agent."""

import itertools

import torch

from .optimizer import Destination, Vectors
from .packing import LOG2E, require

AVERAGES = {"policy": "policy_ema", "critic": "critic_target"}
KNOWN_SETTINGS = {"weight_decay": 0, "amsgrad": False, "maximize": False}


class Trained:
    """One kind of network of all agents, its average and its optimizer: rows of (n, size).

    kind: policy or critic. packed: PackedPolicy or PackedCritic of [average, network] of each
    agent. The agents' own tensors become views of the rows, so that they see what the kernels
    write. Raises UnsupportedError for an optimizer's setting that the fused Adam does not know.
    """

    def __init__(self, agents: list, kind: str, packed):
        self.packed, self.kind = packed, kind
        self.optimizers = [getattr(agent, f"{kind}_optimizer") for agent in agents]
        group = self.optimizers[0].param_groups[0]
        for setting, known in KNOWN_SETTINGS.items():
            have = group.get(setting, known)
            only = f"the {kind}'s optimizer has {setting}={have}; the fused Adam knows only {known}"
            require(have == known, only)
        self.betas, self.eps = group["betas"], group["eps"]

        networks = [list(getattr(agent, kind).parameters()) for agent in agents]
        averages = [list(getattr(agent, AVERAGES[kind]).parameters()) for agent in agents]
        self.states = [[o.state[p] for p in own] for o, own in zip(self.optimizers, networks)]
        moments = {
            key: [[state[key] for state in states] for states in self.states]
            for key in ("exp_avg", "exp_avg_sq")
        }
        self._views = []
        parameters = self._adopt(networks)
        self.vectors = Vectors(
            parameters=parameters,
            gradient=torch.zeros_like(parameters),
            momentum=self._adopt(moments["exp_avg"]),
            variance=self._adopt(moments["exp_avg_sq"]),
            average=self._adopt(averages),
        )
        self.size = parameters.shape[1]
        module = getattr(agents[0], kind)
        self.networks = packed.layers(module)
        self.network_size = sum(p.numel() for layer in self.networks[0] for p in layer.parameters())
        self.columns = self.networks[0][0].in_features
        self.destination = self._destination(module)
        self.rate = torch.zeros(1, device=packed.device)

    def _adopt(self, agents: list) -> torch.Tensor:
        """Make each agent's tensors views of a row of one new matrix, (n, size), and return it."""
        flat = [torch.cat([x.detach().flatten() for x in tensors]) for tensors in agents]
        rows = torch.stack(flat)
        for row, tensors in zip(rows, agents):
            for x, view in zip(tensors, row.split([x.numel() for x in tensors])):
                x.data = view.view_as(x)
                self._views.append((x, view.data_ptr()))
        return rows

    def is_mine(self) -> bool:
        """Whether the agents' tensors still are views of these rows."""
        return all(x.data_ptr() == at for x, at in self._views)

    def _destination(self, module) -> Destination:
        """Where each parameter goes in the packed copies, and what it is multiplied by."""
        packed, H = self.packed, self.packed.hidden_dim
        sizes = [p.numel() for p in module.parameters()]
        starts = dict(zip(module.parameters(), itertools.accumulate(sizes, initial=0)))
        place = torch.full((self.size,), -1, dtype=torch.int32)
        factor = torch.zeros(self.size)
        block, width = packed.weights.shape[1], packed.bias.shape[1]

        def put(p, where, times):
            here = slice(starts[p], starts[p] + p.numel())
            place[here] = where.reshape(-1).int()
            factor[here] = times / packed.scale

        for k, layers in enumerate(self.networks):
            matrices = packed.matrices(torch.arange(block) + k * block)
            state, action, second, third, last = matrices
            first = torch.full(layers[0].weight.shape, -1)
            first[:, packed.state_at :][:, : packed.state_dim] = state[:, : packed.state_dim]
            first[:, packed.action_at :][:, : packed.action_dim] = action[:, : packed.action_dim]
            put(layers[0].weight, first, LOG2E)
            put(layers[1].weight, second, 1.0)
            put(layers[2].weight, third, 1.0)
            put(layers[3].weight, last[: packed.n_out], 1 / LOG2E)
            if packed.biases == 1:  # one for each timestep are packed by optimizer.finish
                for i, layer in enumerate(layers):
                    where = k * width + i * H + torch.arange(len(layer.bias))
                    put(layer.bias, -2 - where, LOG2E if i < 3 else 1.0)
        return Destination(place.to(packed.device), factor.to(packed.device))

    def read_rate(self) -> None:
        """Copy the learning rate to the device. Raises UnsupportedError if the agents' differ."""
        rates = {float(optimizer.param_groups[0]["lr"]) for optimizer in self.optimizers}
        together = "agents that learn together must share learning rates"
        require(len(rates) == 1, f"{together}; they have {sorted(rates)}")
        self.rate.fill_(*rates)

    def steps(self) -> list:
        """How many steps Adam has made of each agent."""
        return [float(states[0]["step"]) for states in self.states]

    def count(self, n: int) -> None:
        """n steps of Adam were made."""
        for states in self.states:
            for state in states:
                state["step"] += n

    def tensors(self) -> list:
        """Everything that an update changes."""
        p, v = self.packed, self.vectors
        return [v.parameters, v.average, v.momentum, v.variance, p.weights, p.low, p.bias]
