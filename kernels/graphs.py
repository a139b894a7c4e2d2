"""CUDA graphs: a function of tensors recorded once, then replayed as a single launch.

    act = Captured(actor, states)  # or policy.sample, or another function that never waits
    actions = act(other_states)    # copied to the graph's input; each call overwrites the output
    updates = GraphUpdates(agents, transitions, 256)  # has run(n), as dql.Updates

This is the one place that knows of capture, warm-up and static buffers. A graph replays the same
launches on the same memory: shapes are fixed, and random numbers are fresh only if their state
lives on the device, as that of torch's generators and of the fused kernels does.
"""

import gc
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch.autograd.graph import increment_version

from .eager import fuse_adam
from .packing import on, require

WARM_UP = 3  # calls before the capture, which compile kernels and initialise libraries


def _graph(generators) -> torch.cuda.CUDAGraph:
    """A graph whose capture may draw from the generators."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    return graph


class Captured:
    """function(*inputs) -> tensor or tensors, captured for inputs of these shapes on a CUDA device.

    Each call copies its inputs in, replays, and returns the graph's output, which the next call
    overwrites. Making the graph calls the function a few times.

    fused: the FusedSamplers and FusedActors that the function calls; it need not be named if it is
    one itself. Networks that they have packed are packed again before a replay if they have
    changed. unchanged: tensors, and generators: torch generators that the function draws from;
    after the capture they are what they were before, even if it fails. device: where the function
    works, by default where the first of inputs and unchanged is.

    Raises UnsupportedError without a GPU, for inputs of another shape, dtype or device and for
    fused calls that were not named; and what the function raises.
    """

    def __init__(
        self, function, *inputs: torch.Tensor, fused=(), unchanged=(), generators=(), device=None
    ):
        require(torch.cuda.is_available(), "CUDA graphs need a CUDA GPU, and none was found")
        self.function = function  # keeps alive what the graph reads
        fused = [*fused, function] if hasattr(function, "networks") else fused
        self.packed = [packed for f in fused for packed in f.networks]
        for packed in self.packed:
            packed.captured = True
        self.inputs = [x.clone() for x in inputs]
        first = next((x.device for x in (*inputs, *unchanged)), "cuda")
        self.device = torch.device(device or first)
        before = [x.detach().clone() for x in unchanged], [g.get_state() for g in generators]
        try:
            with on(self.device):  # a capture sees the launches of the current device alone
                self._warm_up()
                self._capture(generators)
        finally:
            with torch.no_grad():
                for x, value in zip(unchanged, before[0]):
                    x.copy_(value)
            for generator, state in zip(generators, before[1]):
                generator.set_state(state)

    def _warm_up(self) -> None:
        """On a stream of its own, as torch asks for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self, generators) -> None:
        self.graph = _graph(generators)
        # A graph that the garbage collector destroys during a capture breaks it, and since 2.9
        # torch no longer collects before one.
        gc.collect()
        collects, failure = gc.isenabled(), None
        before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        gc.disable()
        try:
            # A stream of this device: torch's own choice is a stream of the device that was
            # current at the process's first capture.
            with torch.cuda.graph(self.graph, pool=pool, stream=torch.cuda.Stream()):
                try:
                    self.output = self.function(*self.inputs)
                except Exception as e:
                    failure = e
                    raise
        except Exception as e:
            # torch stays on the captured stream, goes on allocating for the graph, and its own
            # message is only that there was an earlier error.
            torch.cuda.set_stream(before)
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            with suppress(RuntimeError):
                self._release(generators)
            raise failure or e
        finally:
            if collects:
                gc.enable()

    def _release(self, generators) -> None:
        """In torch 2.11 (not 2.13) generators refuse to draw from a failed capture to the next good
        one: make one."""
        x = torch.zeros((), device=self.device)
        with torch.cuda.graph(_graph(generators), stream=torch.cuda.Stream()):
            x.zero_()

    def __call__(self, *inputs: torch.Tensor):
        count = f"{len(inputs)} inputs given to a graph of {len(self.inputs)}"
        require(len(inputs) == len(self.inputs), count)
        for own, given in zip(self.inputs, inputs):
            have, want = ((tuple(x.shape), x.dtype, x.device) for x in (given, own))
            other = f"the graph was captured for an input {want}, not {have}: capture it again"
            require(have == want, other)
            own.copy_(given)
        return self.replay()

    def replay(self):
        """Once more on the inputs of the last call, with new random numbers."""
        for packed in self.packed:
            packed.freshen()
        self.graph.replay()
        return self.output


class GraphUpdates:
    """dql.Updates with every update one replay of a CUDA graph, from minibatch to averages.

    Updates are not all alike: a coin says which critic is climbed, and the averaged policy moves in
    some. Each kind has a graph of its own. Raises UnsupportedError without a GPU, and what a
    capture raises.
    """

    def __init__(self, agents, transitions, batch_size):
        self.agents, self.sums = agents, [{} for _ in agents]
        given = [[o.param_groups[0]["lr"] for o in _optimizers(agent)] for agent in agents]
        self.rates = [[_capturable(o) for o in _optimizers(agent)] for agent in agents]
        self.graphs = []
        try:
            for agent, sums in zip(agents, self.sums):
                graphs = {}
                for moves, step in _steps(agent).items():
                    for coin in (0.0, 1.0):
                        graph = self._capture(agent, transitions, batch_size, sums, step, coin)
                        graphs[moves, coin > 0.5] = graph
                self.graphs.append(graphs)
        finally:
            for agent, rates in zip(agents, given):
                for optimizer, rate in zip(_optimizers(agent), rates):
                    optimizer.param_groups[0]["lr"] = rate  # a number again, for whoever sets it

    def _capture(self, agent, transitions, batch_size, sums, step, coin):
        """An update of the kind that it is at this step with this coin."""

        def update():
            agent.step = step
            batch = transitions.sample(batch_size, agent.generator)
            metrics = agent.update(batch, replace(agent.draw_noise(batch_size), coin=coin))
            for name, value in metrics.items():
                sums[name] = sums[name].add_(value) if name in sums else value.clone()

        before, changed = agent.step, _parameters(agent)
        for optimizer in _optimizers(agent):
            changed += [x for state in optimizer.state.values() for x in state.values()]
        try:
            return Captured(update, unchanged=changed, generators=[agent.generator])
        finally:
            agent.step = before

    def run(self, n: int) -> list[dict]:
        """n updates of each agent -> for each the mean of every metric over them, 0-d tensors.

        Nothing waits for the device.
        """
        for agent, sums, rates in zip(self.agents, self.sums, self.rates):
            for total in sums.values():
                total.zero_()
            for optimizer, rate in zip(_optimizers(agent), rates):
                rate.fill_(optimizer.param_groups[0]["lr"])
        for _ in range(n):
            for agent, graphs in zip(self.agents, self.graphs):
                graphs[agent.policy_average_is_due(), agent.flip_coin() > 0.5].replay()
                agent.step += 1
        for agent in self.agents:  # torch does not count what a replay writes
            increment_version(_parameters(agent))
        return [{name: total / n for name, total in sums.items()} for sums in self.sums]


def _optimizers(agent) -> list:
    return [getattr(agent, name) for name in agent.OPTIMIZERS]


def _parameters(agent) -> list:
    return [p for network in agent.networks().values() for p in network.parameters()]


def _capturable(optimizer) -> torch.Tensor:
    """Let an Adam be captured -> its learning rate, which a captured step reads from the device."""
    fuse_adam(optimizer)
    group = optimizer.param_groups[0]
    device = group["params"][0].device
    rate = torch.tensor(float(group["lr"]), device=device)
    if device.type == "cuda":
        group["capturable"], group["lr"] = True, rate
    return rate


def _steps(agent) -> dict:
    """Whether the averaged policy moves -> a step at which it does, or does not."""
    before, first, found = agent.step, agent.config.ema_start, {}
    for agent.step in range(max(0, first - 1), first + agent.config.ema_every + 1):
        found[agent.policy_average_is_due()] = agent.step
    agent.step = before
    return found


class NumpyActor:
    """numpy observations -> numpy actions by one graph replay: copy in, act, copy out.

    For control loops. actor: a FusedActor, or any function of states (n_states, S) on the device
    that can be captured. Raises UnsupportedError without a GPU, and for observations of another
    shape.
    """

    def __init__(self, actor, state_dim: int, n_states: int = 1, device="cuda"):
        no_gpu = "NumpyActor replays a CUDA graph, and no CUDA GPU was found"
        require(torch.cuda.is_available(), no_gpu)
        state = torch.zeros(n_states, state_dim, device=device)
        action = torch.empty_like(actor(state), device="cpu", pin_memory=True)
        host_state = torch.zeros(n_states, state_dim, pin_memory=True)

        def from_host_to_host():
            state.copy_(host_state, non_blocking=True)
            return action.copy_(actor(state), non_blocking=True)

        fused = [actor] if hasattr(actor, "networks") else []
        self.captured = Captured(from_host_to_host, fused=fused, device=state.device)
        self.state, self.action = host_state.numpy(), action.numpy()

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """(n_states, S) -> (n_states, A), a copy; (S,) -> (A,) where n_states is 1."""
        shape, whole = np.shape(state), self.state.shape
        fits = shape == whole or (whole[0] == 1 and shape == whole[1:])
        # numpy would repeat a smaller one.
        require(fits, f"the observation is {shape}; this graph was captured for {whole}")
        self.state[:] = state
        self.captured.replay()
        torch.cuda.current_stream(self.captured.device).synchronize()
        return self.action[0].copy() if np.ndim(state) == 1 else self.action.copy()
