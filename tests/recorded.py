"""CUDA graphs on a CPU: a capture records the calls, and a replay makes them on the same tensors.

As on a GPU, numbers that Python hands to a launch stay what they were, tensors made in a capture
hold nothing before the first replay, and what would wait for the device raises. Kernels run in
Triton's interpreter; during a capture they are only recorded.
"""

import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
}
capturing: list = []  # the graph that is being captured
current_device: list = [0]  # the last one is current
current_stream: list = []  # likewise; if empty, each device's default stream
synchronized: list = []  # the devices that were waited for
pools: list = []  # the memory pools of captures that have begun and not ended
refusing: list = []  # the generators that refuse to draw after a capture that failed
launch = GridExecutor.__call__


def tensors(tree) -> list:
    return [x for x in tree_leaves(tree) if torch.is_tensor(x)]


def storages(tree) -> set:
    return {x.untyped_storage().data_ptr() for x in tensors(tree)}


class Graph:
    """torch.cuda.CUDAGraph.

    calls: what a replay calls. launches: names of kernels. operations: torch's, and made: the
    tensors that they allocated.
    """

    def __init__(self):
        self.calls, self.launches, self.operations = [], [], []
        self.made, self.generators = [], []
        self.device = current_device[-1]

    def register_generator_state(self, generator):
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self):
        for call in self.calls:
            call()


def repeat(func, args, kwargs, before):
    for old, new in zip(tensors(before), tensors(func(*args, **kwargs))):
        if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
            old.copy_(new)


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            why = "which is not permitted when a stream is capturing"
            raise RuntimeError(f"{func} waits for the device, {why}")
        graph, kwargs = capturing[-1], kwargs or {}
        known = storages((args, kwargs))
        out = func(*args, **kwargs)
        graph.operations.append(str(func))
        graph.made += [x for x in tensors(out) if x.untyped_storage().data_ptr() not in known]
        graph.calls.append(partial(repeat, func, args, kwargs, out))
        return out


def record_launch(executor, *args, **kwargs):
    if not capturing:
        return launch(executor, *args, **kwargs)
    capturing[-1].launches.append(executor.fn.__name__)
    capturing[-1].calls.append(partial(launch, executor, *args, **kwargs))


@contextmanager
def capture(graph, pool=None, stream=None):
    """As torch.cuda.graph of torch 2.11.

    After an error inside it raises another one, and leaves its stream and pool in use and its
    generators refusing.
    """
    assert not pools, "an earlier capture that failed has not been cleaned up"
    pools.append(pool)
    assert stream is not None, "torch would capture on the device of the process's first capture"
    assert stream.device == current_device[-1], "the capture is not on the current device"
    capturing.append(graph)
    current_stream.append(stream)
    broken = False
    try:
        with Recorder():
            yield
    except RuntimeError as e:
        broken = "waits for the device" in str(e)
        if broken:
            raise RuntimeError("operation failed due to a previous error during capture") from e
        raise
    finally:
        capturing.pop()
        if broken:
            refusing[:] = [*refusing, *graph.generators, "torch's own"]
        else:
            current_stream.pop(), pools.pop()
            refusing[:] = [g for g in refusing if g not in graph.generators and g != "torch's own"]
    with torch.no_grad():
        for x in graph.made:
            if x.is_floating_point():
                x.fill_(float("nan"))


@contextmanager
def on_device(device):
    current_device.append(torch.device(device).index or 0)
    try:
        yield
    finally:
        current_device.pop()


@contextmanager
def on_stream(stream):
    if stream is not None:
        here = stream.device == current_device[-1]
        assert here, "a stream of another device than the current one"
    yield


def make_stream(device=None):
    where = current_device[-1] if device is None else torch.device(device).index or 0
    synchronize = lambda: synchronized.append(where)  # noqa: E731
    return SimpleNamespace(device=where, wait_stream=lambda other: None, synchronize=synchronize)


def get_stream(device=None):
    return current_stream[-1] if current_stream else make_stream(device)


def set_stream(stream):
    current_stream[:] = [stream]


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def unpinned(make):
    """The host's memory cannot be pinned without a GPU."""
    return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)


def install(monkeypatch) -> None:
    """Until monkeypatch undoes it there seems to be a GPU that can capture.

    Tensors stay on the CPU.
    """
    for state in (capturing, current_stream, synchronized, pools, refusing):
        state.clear()
    end_pool = lambda device, pool: pools and pools.remove(pool)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_pool, raising=False)
    stubs = {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: bool(capturing),
        "synchronize": lambda *_: None,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": object,
        "device": on_device,
        "current_device": lambda: current_device[-1],
        "Stream": make_stream,
        "stream": on_stream,
        "current_stream": get_stream,
        "set_stream": set_stream,
        "Event": Event,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    for name in ("zeros", "empty_like"):
        monkeypatch.setattr(torch, name, unpinned(getattr(torch, name)))
    monkeypatch.setattr(GridExecutor, "__call__", record_launch)
