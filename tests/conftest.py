"""What the tests share: the repository on the path, the oracle's numbers, and small runs."""

import os
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path

# One thread for torch, for numpy (Triton's interpreter multiplies with it) and for runs that tests
# start: the networks are small, and on a busy machine threads wait for each other. Read on import.
for library in ("OMP", "OPENBLAS"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Read when a kernel is defined; triton defines some when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

# Imports triton where it is installed: its LLVM crashes if Mesa's OpenGL is loaded first.
import torch._dynamo  # noqa: E402, F401

if not torch.cuda.is_available():
    with suppress(ImportError):  # triton has no package for every platform
        import interpreter

        interpreter.install()

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


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
        """End the process after a kernel's error: everything it does later would fail too."""
        yield
        try:
            torch.cuda.synchronize()
        except RuntimeError as e:
            if "PYTEST_XDIST_WORKER" not in os.environ:
                message = f"after {request.node.nodeid} the GPU is lost to this process: {e}"
                pytest.exit(message, returncode=1)
            os._exit(1)  # xdist reports the test and replaces this worker


@pytest.fixture
def cuda_graphs(monkeypatch):
    """CUDA graphs can be captured: torch's own on a GPU, elsewhere an imitation, recorded.py."""
    if not torch.cuda.is_available():
        import recorded

        recorded.install(monkeypatch)


# The cut is part of the repository; the whole file may lie beside the repository.
ORACLES = {
    "cut": ROOT / "tests/data/oracle.npz",
    "full": ROOT.parent / "shared/oracle/released.npz",
}


class Oracle:
    """Inputs, parameters and expected outputs of the authors' released code, in float64.

    state 29, action 8, batch 64, hidden 256. In the cut, large gradients and updated weights
    are every 16th row.
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


@pytest.fixture(params=[False, True], ids=["plain", "quick"])
def plain_and_quick(request, monkeypatch):
    """The test runs twice: on plain dql.py, and on what kernels/eager.py makes of it."""
    import small_agents

    monkeypatch.setattr(small_agents, "QUICK", request.param)


# ---- Small runs, see tiny_runs.py ----------------------------------------------------------------


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run that nothing interrupted, not to be changed; its data lie beside it."""
    import tiny_runs

    return tiny_runs.make_finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be broken."""
    return shutil.copytree(finished, tmp_path / "runs" / finished.name)


@pytest.fixture
def d4rl_folder(tmp_path, monkeypatch):
    """D4RL's folder, not made yet, and no address that answers."""
    from tasks import fetch

    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(fetch, "D4RL_URL", f"{closed}/offline_rl/")
    monkeypatch.setattr(fetch, "MIRROR_URL", f"{closed}/mirror/")
    monkeypatch.setattr(fetch, "TIMEOUT", 5)
    return tmp_path / "d4rl"


@pytest.fixture
def few_programs(monkeypatch):
    """kernels with few large programs: Triton's interpreter takes a time for each."""
    pytest.importorskip("triton", reason="triton has no package for this platform")
    from reference import UPDATE_TILES

    import kernels

    if torch.cuda.is_available():
        pytest.skip("this test is for the interpreter")
    whole = kernels.FusedUpdate
    monkeypatch.setattr(kernels, "FusedUpdate", lambda *args: whole(*args, **UPDATE_TILES))
    return kernels


@pytest.fixture
def d4rl_command(tmp_path, monkeypatch):
    """The command experiments.d4rl with a program that trains nothing, see d4rl_runs.py."""
    from d4rl_runs import D4RL

    return D4RL(tmp_path, monkeypatch)
