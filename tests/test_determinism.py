"""The same seed twice gives the same bits: on two threads, and beside a busy process."""

import subprocess
import sys

import pytest
from conftest import ROOT
from test_terminal import python

from kernels import eager

# Two agents of one seed; batches large enough for torch to share an operation between threads.
UPDATES = """
import sys, torch
from dql import DiffusionBC, DiffusionQL, Transitions, Updates
from kernels import eager
torch.set_num_threads(2)
n, how = 2000, sys.argv[1]
draw = lambda *shape: torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
data = Transitions(draw(29), draw(8).tanh(), draw(29), draw(), draw() > 1)
states = []
for _ in range(2):
    make = DiffusionBC if how == "compile" else DiffusionQL
    agent = make(29, 8, seed=0, n_timesteps=2, max_q_backup=how == "max-Q")
    if how != "plain":
        eager.speed_up(agent)
    if how == "compile":
        eager.compile_update(agent)
    Updates([agent], data, 256).run(5)
    states.append(agent.state_dict())
print(*(name for name, value in states[0].items() if not value.equal(states[1][name])))
"""


@pytest.fixture
def busy():
    """A process that takes what it gets of the cores."""
    words = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(words) as other:
        yield
        other.kill()


def differing(how) -> str:
    """The tensors that differ."""
    environment = {"OMP_NUM_THREADS": "2"}
    done = python("-c", UPDATES, how, cwd=ROOT, capture_output=True, environment=environment)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.mark.parametrize("how", ["plain", "eager", "max-Q"])
def test_two_threads_make_the_same_bits_twice(busy, how):
    assert not differing(how)


@pytest.mark.skipif(not eager.has_compiler(), reason="there is no C++ compiler")
def test_compiled_cloning_makes_the_same_bits_twice():
    """Long runs are compiled on a CPU. The critics' code would take a minute to compile."""
    assert not differing("compile")
