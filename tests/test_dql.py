"""dql.py: the noise schedule, the transitions that are sampled, and the file copied alone.

The networks are tested in test_dql_policy.py, updates in test_dql_update.py, acting and saving in
test_dql_agent.py.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import dql
from dql import DiffusionPolicy, beta_schedule


@pytest.mark.parametrize("T", [5, 10])
@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
def test_schedule_is_the_released_one(oracle, schedule, T):
    expected = oracle.named(f"schedule/{schedule}/T{T}/")
    betas = beta_schedule(schedule, T)
    assert betas.dtype == torch.float64 and torch.equal(betas.float(), expected["betas"].float())
    policy = DiffusionPolicy(3, 2, n_timesteps=T, schedule=schedule)
    for ours, theirs in (
        (policy.x0_from_x, expected["sqrt_recip_alphas_cumprod"]),
        (policy.x0_from_eps, expected["sqrt_recipm1_alphas_cumprod"]),
        (policy.mean_from_x0, expected["posterior_mean_coef1"]),
        (policy.mean_from_x, expected["posterior_mean_coef2"]),
        (policy.sigma, (0.5 * expected["posterior_log_variance_clipped"]).exp()),
    ):
        ours = torch.tensor(ours, dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    alpha_bar = expected["alphas_cumprod"]
    assert torch.equal(policy.sqrt_alpha_bar, alpha_bar.sqrt().float())
    assert torch.equal(policy.sqrt_one_minus_alpha_bar, (1 - alpha_bar).sqrt().float())


@pytest.mark.parametrize("name, T", [("sqrt", 5), ("vp", 0), ("cosine", -1)])
def test_bad_schedules_are_refused_in_one_line(name, T):
    calls = (
        lambda: beta_schedule(name, T),
        lambda: DiffusionPolicy(3, 2, schedule=name, n_timesteps=T),
    )
    for call in calls:
        with pytest.raises(ValueError) as refusal:
            call()
        message = str(refusal.value)
        assert "\n" not in message and (repr(name) in message or str(T) in message)


def test_transitions_are_sampled_uniformly_in_whole_rows():
    """With replacement."""
    n = np.arange(10, dtype=np.float32)
    states, actions, next_states = (
        np.stack([n] * 3, 1),
        np.stack([n] * 2, 1),
        np.stack([n + 1] * 3, 1),
    )
    data = dql.Transitions(states, actions, next_states, 2 * n, n == 4)
    batch = data.sample(20_000, torch.Generator().manual_seed(0))
    row = batch.state[:, 0]
    assert len(data) == 10 and [tuple(x.shape[1:]) for x in batch] == [(3,), (2,), (3,), (1,), (1,)]
    assert all(x.dtype == torch.float32 for x in batch)
    assert torch.equal(batch.action[:, 1], row) and torch.equal(batch.next_state[:, 2], row + 1)
    assert torch.equal(batch.reward[:, 0], 2 * row)
    assert torch.equal(batch.not_done[:, 0], (row != 4).float())
    counts = np.bincount(row.long().numpy(), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


# Everything else of the project and of its requirements is hidden from the import system.
COPIED_ALONE = """
import sys
from pathlib import Path
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import numpy as np, torch
from dql import DiffusionQL
agent = DiffusionQL(3, 2, hidden_dim=16)
batch = [torch.randn(8, d) for d in (3, 2, 3, 1)] + [torch.ones(8, 1)]
agent.update(batch)
try:
    import tqdm
except ModuleNotFoundError:
    print("hidden")
print(agent.act(np.zeros(3, dtype=np.float32)).shape)
"""
HIDDEN = (
    "tasks trainer kernels bench mujoco gymnasium h5py tqdm matplotlib imageio tyro safetensors"
)
HIDDEN += " tensorboard wandb einops"


def test_copied_alone_the_file_trains_and_acts(tmp_path):
    """On torch and numpy."""
    (tmp_path / "dql.py").write_bytes((ROOT / "dql.py").read_bytes())
    script = COPIED_ALONE.format(hidden=set(HIDDEN.split()))
    command = [sys.executable, "-E", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hidden", "(2,)"]
