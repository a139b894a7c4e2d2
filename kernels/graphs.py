"""CUDA graphs: a function of tensors recorded once, then replayed as a single launch.

    act = Captured(actor, states)          # or policy.sample, or a torch.compile'd function: whatever waits for nothing
    actions = act(other_states)            # copied into the graph's own input; the output is overwritten by each call

This is the one place that knows of capture, warm-up and static buffers. A graph replays the same launches on the same memory:
shapes are fixed, and random numbers are fresh only if their state lives on the device, as that of torch's generators and of the
fused kernels does.
"""

import gc
from contextlib import suppress

import numpy as np
import torch

from . import packing
from .packing import on, require

WARM_UP = 3  # calls before the capture: kernels are compiled and libraries initialised, which must not be recorded


def _graph(generators) -> torch.cuda.CUDAGraph:
    """A graph whose capture may draw from the generators."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    return graph


class Captured:
    """function(*inputs) -> tensor or tensors, captured for inputs of these shapes on a CUDA device.

    Each call copies its inputs in, replays, and returns the graph's output, which the next call overwrites. Networks that
    fused kernels in it have packed are packed again first where they have changed. Making the graph calls the function; the
    tensors `unchanged` and the torch generators `generators`, from which it may draw, are afterwards what they were, also where
    it fails. device is where function works, by default where the first of inputs and unchanged is. Raises UnsupportedError
    without a GPU and for inputs of another shape, dtype or device, and what function raises.
    """

    def __init__(self, function, *inputs: torch.Tensor, unchanged=(), generators=(), device=None):
        require(torch.cuda.is_available(), "CUDA graphs need a CUDA GPU, and none was found")
        self.function = function  # keeps alive what the graph reads
        self.inputs = [x.clone() for x in inputs]
        self.device = torch.device(device or next((x.device for x in (*inputs, *unchanged)), "cuda"))
        before = [x.clone() for x in unchanged], [g.get_state() for g in generators]
        try:
            with on(self.device):  # a capture sees the launches of the current device alone
                self._warm_up()
                self._capture(generators)
        finally:
            for x, value in zip(unchanged, before[0]):
                x.copy_(value)
            for generator, state in zip(generators, before[1]):
                generator.set_state(state)

    def _warm_up(self) -> None:
        """On a stream of its own, as torch asks for; kernels are compiled and libraries initialised."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self, generators) -> None:
        self.graph = _graph(generators)
        # A graph that the garbage collector destroys during a capture breaks it, and torch 2.9 no longer collects before one.
        gc.collect()
        collects, before, pool, failure = gc.isenabled(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle(), None
        gc.disable()
        packing.captured = []
        try:
            # A stream of this device: torch's own choice is of the one that was current at the process's first capture.
            with torch.cuda.graph(self.graph, pool=pool, stream=torch.cuda.Stream()):
                try:
                    self.output = self.function(*self.inputs)
                except Exception as e:
                    failure = e
                    raise
            self.packed = packing.captured
        except Exception as e:
            # torch stays on the captured stream, goes on taking memory for the graph, and says only that there was an earlier error.
            torch.cuda.set_stream(before)
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            with suppress(RuntimeError):
                self._release(generators)
            raise failure or e
        finally:
            packing.captured = None
            if collects:
                gc.enable()

    def _release(self, generators) -> None:
        """In torch 2.11 a capture that fails leaves its generators refusing to draw, until one succeeds; 2.13 does not."""
        x = torch.zeros((), device=self.device)
        with torch.cuda.graph(_graph(generators), stream=torch.cuda.Stream()):
            x.zero_()

    def __call__(self, *inputs: torch.Tensor):
        require(len(inputs) == len(self.inputs), f"{len(inputs)} inputs given to a graph of {len(self.inputs)}")
        for own, given in zip(self.inputs, inputs):
            have, want = ((tuple(x.shape), x.dtype, x.device) for x in (given, own))
            require(have == want, f"the graph was captured for an input {want}, not {have}: capture it again")
            own.copy_(given)
        return self.replay()

    def replay(self):
        """Once more on the inputs of the last call, with new random numbers."""
        for packed in self.packed:
            packed.freshen()
        self.graph.replay()
        return self.output


class NumpyActor:
    """numpy observations -> numpy actions by one graph replay: copy in, act, copy out. For control loops.

    actor: a FusedActor, or any function of states (n_states, S) on the device that can be captured. Raises UnsupportedError
    without a GPU, and for observations of another shape.
    """

    def __init__(self, actor, state_dim: int, n_states: int = 1, device="cuda"):
        require(torch.cuda.is_available(), "NumpyActor replays a CUDA graph, and no CUDA GPU was found")
        state = torch.zeros(n_states, state_dim, device=device)
        action = torch.empty_like(actor(state), device="cpu", pin_memory=True)
        host_state = torch.zeros(n_states, state_dim, pin_memory=True)

        def from_host_to_host():
            state.copy_(host_state, non_blocking=True)
            return action.copy_(actor(state), non_blocking=True)

        self.captured = Captured(from_host_to_host, device=state.device)
        self.state, self.action = host_state.numpy(), action.numpy()

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """(n_states, S) -> (n_states, A), a copy; (S,) -> (A,) where n_states is 1."""
        shape, whole = np.shape(state), self.state.shape
        fits = shape == whole or (whole[0] == 1 and shape == whole[1:])
        require(fits, f"the observation is {shape}; this graph was captured for {whole}")  # numpy would repeat a smaller one
        self.state[:] = state
        self.captured.replay()
        torch.cuda.current_stream(self.captured.device).synchronize()
        return self.action[0].copy() if np.ndim(state) == 1 else self.action.copy()
