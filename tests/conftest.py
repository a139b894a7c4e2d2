"""What the tests share: the repository's root on the path, and the oracle's numbers."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when a kernel is defined, and triton defines some when imported
    )

import torch._dynamo  # noqa: E402, F401  brings triton where it is installed: its LLVM crashes if Mesa's OpenGL came first

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

torch.set_num_threads(
    1
)  # the nets here are small: on a busy machine a second thread is waited for, not helped by


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


if torch.cuda.is_available():

    @pytest.fixture(autouse=True)
    def wait_for_the_gpu(request):
        """A kernel's error shows when somebody waits for it, and all that the process does later fails with it: it ends here."""
        yield
        try:
            torch.cuda.synchronize()
        except RuntimeError as e:
            if "PYTEST_XDIST_WORKER" not in os.environ:
                pytest.exit(
                    f"after {request.node.nodeid} the GPU is lost to this process: {e}",
                    returncode=1,
                )
            os._exit(1)  # xdist reports the test and replaces this worker


@pytest.fixture
def cuda_graphs(monkeypatch):
    """CUDA graphs can be captured: on a GPU those of torch, elsewhere an imitation that records and repeats."""
    if not torch.cuda.is_available():
        import recorded

        recorded.install(monkeypatch)


# The cut travels with the repository; the whole file, where somebody has it, lies beside the repository.
ORACLES = {
    "cut": ROOT / "tests/data/oracle.npz",
    "full": ROOT.parent / "shared/oracle/released.npz",
}


class Oracle:
    """Inputs, parameters and expected outputs of the authors' released code, the outputs in float64 arithmetic.

    state 29, action 8, batch 64, hidden 256. Large gradients and updated weights are every 16th row in the cut.
    """

    def __init__(self, path):
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file.files}

    def __getitem__(self, name) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def named(self, prefix) -> dict[str, torch.Tensor]:
        """Everything below prefix, by the rest of its name."""
        return {name[len(prefix) :]: self[name] for name in self.arrays if name.startswith(prefix)}


@pytest.fixture(scope="session", params=list(ORACLES))
def oracle(request):
    if request.param == "full" and not ORACLES["full"].exists():
        pytest.skip("the whole oracle is not beside the repository; the cut is tested")
    return Oracle(ORACLES[request.param])


# ---- runs in miniature, see tiny_runs.py ---------------------------------------------------------


@pytest.fixture
def short_episodes(monkeypatch):
    import tiny_runs

    tiny_runs.shorten_episodes(monkeypatch.setitem)


@pytest.fixture
def no_pictures(monkeypatch):
    import tiny_runs

    tiny_runs.draw_nothing(monkeypatch.setattr)


@pytest.fixture
def data(tmp_path):
    """An HDF5 file of random transitions in D4RL's layout."""
    import tiny_runs

    return str(tiny_runs.write_hdf5(tmp_path / "tiny.hdf5"))


@pytest.fixture
def few_programs(monkeypatch):
    """Triton's interpreter pays by the program."""
    pytest.importorskip("triton", reason="triton has no package for this platform")
    from reference import UPDATE_TILES

    import kernels

    if torch.cuda.is_available():
        pytest.skip("a test of the interpreter's")
    whole = kernels.FusedUpdate
    monkeypatch.setattr(kernels, "FusedUpdate", lambda *args: whole(*args, **UPDATE_TILES))
    return kernels


@pytest.fixture
def d4rl_command(tmp_path, monkeypatch):
    """The command experiments.d4rl with a program that trains nothing, see d4rl_runs.py."""
    from d4rl_runs import D4RL

    return D4RL(tmp_path, monkeypatch)
