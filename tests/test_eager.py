"""kernels/eager.py: Mish with one exponential, large batches in pieces, and a compiled update.

The comparison with the oracle is in test_dql_policy.py and test_dql_update.py.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_agents import error, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from dql import DiffusionBC, DiffusionQL
from kernels import eager
from kernels.eager import Mish


def make_agent(make=DiffusionQL, **how):
    agent = make(3, 2, **{"hidden_dim": 16, **how})
    eager.speed_up(agent)
    return agent


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 5e-14)])
def test_mish_and_its_gradient_over_the_whole_range(dtype, tolerance):
    x = torch.linspace(-100, 100, 20_001, dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = Mish()(x.clone()), F.mish(exact)  # a clone, since it is overwritten
    scale = expected.detach().abs().clamp(min=1)
    assert ((y.detach() - expected).abs() / scale).max() < tolerance
    # Weights, so that the incoming gradient matters.
    weight = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y * weight.to(dtype)).sum(), x)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), exact)
    assert error(gradient, expected_gradient) < 2 * tolerance
    with torch.no_grad():
        taken = x.clone()
        without_graph = Mish()(taken)
        assert without_graph.data_ptr() == taken.data_ptr()  # in place, as the class says
    assert ((without_graph - expected).abs() / scale).max() < tolerance


@pytest.mark.parametrize("kwargs", [{}, {"max_q_backup": True}])
def test_cutting_large_batches_for_the_cache_changes_nothing(monkeypatch, kwargs):
    batch, results = random_batch(), []
    state = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    for rows in (1, 30, 10**9):
        monkeypatch.setattr(eager, "CPU_ROWS", rows)
        agent = make_agent(**kwargs)
        action = agent.act(state, 7, generator=torch.Generator().manual_seed(0))
        results.append((action, agent.update(batch)["critic_loss"]))
    for action, loss in results[:-1]:
        np.testing.assert_allclose(action, results[-1][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, results[-1][1], rtol=1e-5, atol=1e-6)


WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kwargs", [{}, {"max_q_backup": True}, {"make": DiffusionBC}])
def test_an_update_never_asks_for_a_value(kwargs):
    """On a GPU each of these operations would wait for the device; the optimizers' included."""
    agent, batch = make_agent(grad_norm=1.0, **kwargs), random_batch()
    agent.update(batch)
    with Operations() as operations:
        agent.update(batch)
    assert "addmm" in operations.seen  # the mode does see what runs
    assert not operations.seen & WAITING


@pytest.mark.skipif(not eager.has_compiler(), reason="no C++ compiler")
def test_compiled_updates_equal_plain_ones():
    plain, quick = DiffusionQL(3, 2, hidden_dim=16, lr=1e-2), make_agent(lr=1e-2)
    eager.compile_update(quick)
    for _ in range(4):  # both sides of the coin are in it
        batch, noise = random_batch(), plain.draw_noise(32)
        expected, found = plain.update(batch, noise), quick.update(batch, noise)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    eager.undo_compile(quick)
    assert quick.update == quick.update and not {"update", "gradient_step"} & vars(quick).keys()
