"""kernels/sampler.py: actions as exact as the eager chain's, and the noise drawn for them.

Fused and eager actions are compared with float64, at sizes that fill no tile.
"""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

triton = pytest.importorskip("triton", reason="triton has no package for this platform")
import hopper  # noqa: E402
import triton.language as tl  # noqa: E402
from reference import (  # noqa: E402
    DEVICE,
    TILES,
    eager_at,
    error,
    exact,
    make_noise,
    make_policy,
    needs_interpreter,
    tile,
)

import kernels  # noqa: E402
from bench.rounding import allowed  # noqa: E402
from kernels import FusedSampler, UnsupportedError  # noqa: E402
from kernels.ops import normals  # noqa: E402
from kernels.packing import PRECISIONS, architecture  # noqa: E402
from kernels.tiles import LITTLE_MEMORY, SMALL, choose_tile  # noqa: E402

# state, action, hidden, T, schedule, max_action
SIZES = [
    (11, 3, 128, 5, "vp", 1.0),
    (17, 6, 256, 5, "linear", 1.0),
    (29, 8, 256, 10, "vp", 0.7),
    (45, 24, 128, 5, "cosine", 1.0),
    (60, 9, 512, 1, "vp", 2.0),
    (1, 1, 128, 3, "vp", 1.0),
    (128, 32, 128, 2, "vp", 1.0),
    (2, 2, 128, 50, "vp", 1.0),
]


def assert_actions_are_right(sizes, precision, gain, size, limit):
    """Actions err at most limit times as much as eager ones at the same precision."""
    state_dim, action_dim, hidden_dim, T, schedule, max_action = sizes
    how = dict(
        hidden_dim=hidden_dim, n_timesteps=T, schedule=schedule, max_action=max_action, gain=gain
    )
    policy = make_policy(state_dim, action_dim, **how)
    inputs = make_noise(policy, 50 if T < 10 else 17)
    expected = exact(policy, *inputs)
    eager = error(eager_at(policy, precision, *inputs), expected)
    sampler = FusedSampler(policy, precision)
    fused = error(sampler(*inputs, tile=tile(size, precision, hidden_dim)), expected)
    assert fused <= limit * eager, f"fused {fused:.2e}, eager {eager:.2e}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "sizes, gain, size",
    [
        *((sizes, 1.0, "small") for sizes in SIZES),
        *((sizes, *how) for sizes in SIZES[:4] for how in ((3.0, "small"), (1.0, "large"))),
    ],
)
def test_actions_are_about_as_exact_as_eager_ones(sizes, precision, gain, size):
    assert_actions_are_right(sizes, precision, gain, size, allowed(precision, DEVICE == "cuda"))


@needs_interpreter
@pytest.mark.parametrize("gain, size", [(1.0, "small"), (3.0, "small"), (1.0, "large")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_actions_are_right_in_hoppers_arithmetic(precision, gain, size, monkeypatch):
    hopper.install(monkeypatch)
    sizes = SIZES[1] if size == "small" else SIZES[0]
    assert_actions_are_right(sizes, precision, gain, size, allowed(precision, on_gpu=True))


def part_and_whole(n, size):
    """The first n of 129 rows, sampled alone and with the others; noise is given, then drawn."""
    policy = make_policy(29, 8, n_timesteps=2)
    sampler, (state, x_T, noises) = FusedSampler(policy), make_noise(policy, 129)
    how, some_noises = dict(tile=tile(size)), noises[:, :n].contiguous()
    whole = sampler(state, x_T, noises, **how)
    yield sampler(state[:n], x_T[:n], some_noises, **how), whole[:n]
    yield sampler(state[:n], seed=4, **how), sampler(state, seed=4, **how)[:n]


@needs_interpreter
@pytest.mark.parametrize("size", TILES)
@pytest.mark.parametrize("n", [1, 3, 17, 65])
def test_rows_do_not_depend_on_how_many_there_are(n, size):
    assert all(torch.equal(part, whole) for part, whole in part_and_whole(n, size))


@pytest.mark.parametrize("size", TILES)
@pytest.mark.parametrize("n", [1, 17])
def test_on_a_gpu_neighbours_change_a_row_by_rounding_alone(n, size, monkeypatch):
    """Rows side by side in a tile share reciprocals; fp16's own rounding is up to a thousandth."""
    if DEVICE == "cpu":
        hopper.install(monkeypatch)
    for part, whole in part_and_whole(n, size):
        torch.testing.assert_close(part, whole, rtol=0, atol=5e-4)


@pytest.mark.parametrize("size", TILES)
def test_every_element_is_written_and_nothing_past_the_end(size):
    policy = make_policy(17, 6)
    sampler, inputs = FusedSampler(policy), make_noise(policy, 50)
    memory = torch.full((80, 6), math.nan, device=DEVICE)
    sampler(*inputs, out=memory[10:60], tile=tile(size))
    assert memory[10:60].isfinite().all()
    assert memory[:10].isnan().all() and memory[60:].isnan().all()


def test_several_rows_of_noise_may_belong_to_a_state():
    policy = make_policy()
    state, x_T, noises = make_noise(policy, 30)
    sampler, repeated = FusedSampler(policy), state[:10].repeat_interleave(3, 0)
    assert torch.equal(sampler(state[:10], x_T, noises), sampler(repeated, x_T, noises))


def test_actions_stay_within_the_box_and_reach_it():
    policy = make_policy(max_action=0.5, gain=3.0)
    action = FusedSampler(policy)(make_noise(policy, 100)[0])
    assert action.abs().max() == 0.5


# ---- Noise drawn in the kernel -------------------------------------------------------------------


@triton.jit
def draw(out, seed, call, step, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    where = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + where, normals(seed, call, step, row, COLUMNS))


def drawn(n=4096, columns=16, seed=0, call=0, step=0, tile=256):
    out = torch.empty(n, columns, device=DEVICE)
    draw[(n // tile,)](out, seed, call, step, COLUMNS=columns, ROWS=tile)
    return out.double().cpu().numpy()


def test_drawn_normals_have_the_distribution_of_normals():
    x = drawn(1 << 15).ravel()  # 524,288 of them: bounds are five standard errors
    n = len(x)
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    cumulative = 0.5 * (1 + torch.erf(torch.from_numpy(np.sort(x)) / 2**0.5).numpy())
    ranks = np.arange(n + 1) / n
    distance = max((ranks[1:] - cumulative).max(), (cumulative - ranks[:-1]).max())
    assert distance * n**0.5 < 1.95  # Kolmogorov-Smirnov at 0.1 %


def test_drawn_normals_are_independent_of_each_other():
    """Of other rows, columns, steps, calls and seeds."""
    x = drawn()
    others = {
        "rows": (x[:-1], x[1:]),
        "columns": (x[:, :-1], x[:, 1:]),
        "columns of two draws": (x[:, :-4], x[:, 4:]),
        "steps": (x, drawn(step=1)),
        "calls": (x, drawn(call=1)),
        "seeds": (x, drawn(seed=1)),
        "high bits of seeds": (x, drawn(seed=1 << 32)),
    }
    for name, (a, b) in others.items():
        a, b = a.ravel(), b.ravel()
        for f in (lambda v: v, np.square):  # Box-Muller's pairs share a radius
            assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 5 / len(a) ** 0.5, name


def test_normals_do_not_depend_on_the_tile():
    assert np.array_equal(drawn(tile=16), drawn(tile=1024))
    assert np.array_equal(drawn(columns=32)[:, :16], drawn(columns=16))


def test_a_seed_repeats_its_actions_and_no_seed_gives_new_ones():
    """The tile makes no difference beyond rounding."""
    policy = make_policy(29, 8, n_timesteps=2)
    sampler, state = FusedSampler(policy, "fp32"), make_noise(policy, 50)[0]
    small, large = (sampler(state, seed=3, tile=tile(size, "fp32")) for size in TILES)
    torch.testing.assert_close(small, large, rtol=0, atol=2e-5)
    assert torch.equal(sampler(state, seed=3), sampler(state, seed=3))
    first, second = sampler(state), sampler(state)
    assert (first - second).abs().mean() > 0.1
    assert torch.equal(FusedSampler(policy, "fp32")(state), first)  # another of the same seed


def test_drawn_actions_are_distributed_as_the_eager_chains():
    policy = make_policy(4, 2, n_timesteps=2, seed=3)
    state = make_noise(policy, 1)[0].expand(1024, -1).contiguous()
    fused, eager = FusedSampler(policy)(state), policy.sample(state)
    for f in (lambda v: v, torch.square):
        a, b = f(fused), f(eager)
        standard_error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * standard_error).all()


# ---- A policy in training, and what is refused ---------------------------------------------------


def test_a_policy_changed_after_packing_is_packed_again():
    policy = make_policy()
    sampler, inputs = FusedSampler(policy, "fp32"), make_noise(policy, 17)
    before = sampler(*inputs)
    policy.final_layer.bias += 1.0
    after = sampler(*inputs)
    assert not torch.equal(before, after)
    assert error(after, exact(policy, *inputs)) < 1e-5


def test_refresh_packs_changes_that_no_version_counter_shows():
    policy = make_policy()
    sampler, inputs = FusedSampler(policy, "fp32"), make_noise(policy, 17)
    policy.final_layer.bias.data += 1.0
    sampler.refresh()
    assert error(sampler(*inputs), exact(policy, *inputs)) < 1e-5


def test_batches_that_leave_processors_idle_get_small_tiles():
    for precision in PRECISIONS:
        for arch in (80, 90, 100):
            sizes = [choose_tile(1 << k, precision, arch).rows for k in range(24)]
            assert sizes[0] == 16 and sizes == sorted(sizes)
        large = {arch: choose_tile(1 << 20, precision, arch) for arch in (80, 87, 100, 103)}
        assert large[87] == large[80] and large[103] == large[100]
        for arch in LITTLE_MEMORY:
            assert choose_tile(1 << 20, precision, arch) == SMALL[precision]._replace(stages=2)


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(precision="bf16"), "fp16, tf32, fp16x3, fp32"),
        (dict(hidden_dim=100), "hidden_dim 100"),
        (dict(state_dim=129), "state_dim 129"),
        (dict(action_dim=33), "action_dim 33"),
        (dict(n_timesteps=101), "n_timesteps 101"),
    ],
)
def test_an_unsupported_size_says_what_is_supported(how, message):
    precision = how.pop("precision", "fp16")
    with pytest.raises(UnsupportedError, match=message):
        FusedSampler(make_policy(**how), precision)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    policy = make_policy()
    policy.mid_layer[2].weight[3, 4] = bad
    with pytest.raises(UnsupportedError, match="NaN or infinity"):
        FusedSampler(policy)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, x, z: (s[:, :-1].contiguous(), x, z), r"state is \(12, 10\).*\(12, 11\)"),
        (lambda s, x, z: (s.double(), x, z), "float64"),
        (lambda s, x, z: (s.t().contiguous().t(), x, z), "contiguous"),
        (lambda s, x, z: (s[:0], None, None), "no rows"),
        (lambda s, x, z: (s, x, None), "together"),
        (lambda s, x, z: (s[:5], x, z), "multiple"),
        (lambda s, x, z: (s, x, z[:-1]), "noises is"),
        (lambda s, x, z: (s.to("meta"), x, z), "meta"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(change, message):
    policy = make_policy()
    with pytest.raises(UnsupportedError, match=message):
        FusedSampler(policy)(*change(*make_noise(policy, 12)))


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch):
    policy = make_policy().cpu()
    sampler = FusedSampler(policy)
    monkeypatch.setattr("kernels.packing.interpreting", lambda: False)
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET=1"):
        sampler(torch.zeros(3, 11))


def test_a_gpu_older_than_the_kernels_need_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UnsupportedError, match="sm_75.*sm_80"):
        architecture(torch.device("cuda"))


def test_why_not_says_why_the_kernels_cannot_run(monkeypatch):
    assert kernels.available() and kernels.why_not() == ""
    monkeypatch.setattr("kernels.interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not kernels.available() and "no CUDA GPU" in kernels.why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert "sm_75" in kernels.why_not()


def test_the_kernels_tests_need_no_more_than_the_kernels_do():
    """torch, triton, numpy, safetensors and pytest are enough to collect all of them."""
    script = """
import sys
from importlib.machinery import PathFinder
missing = "gymnasium gymnasium_robotics mujoco h5py minari tyro tqdm tensorboard".split()
missing += "scipy matplotlib imageio PIL ray xdist".split()
class Bare:  # finds what is installed, but for these
    def find_spec(name, *rest):
        return None if name.partition(".")[0] in missing else PathFinder.find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import pytest
from bench.all import TESTS as files
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist", *files]))
"""
    own = "PYTEST"  # what this pytest tells the processes that it starts
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_without_triton_the_package_says_what_to_install():
    """It can be imported all the same."""
    script = """
import sys
sys.modules["triton"] = None  # as if it were not there
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import kernels
assert not kernels.available()
print(kernels.why_not())
try:
    kernels.FusedSampler
except ImportError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second and "pip install" in first
