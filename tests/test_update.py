"""kernels/update.py and launches.py: nine launches, their CUDA graph, and what is refused."""

import gc
import math
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="triton has no package for this platform")
from reference import (  # noqa: E402
    DEVICE,
    SMALL,
    assert_same,
    fused,
    make_agent,
    make_batch,
    make_transitions,
    needs_interpreter,
    tensors,
)

import dql  # noqa: E402
import kernels  # noqa: E402
from kernels import (  # noqa: E402
    FusedUpdate,
    UnsupportedError,
    gradients,
    launches,
    optimizer,
    training,
)
from kernels.packing import PRECISIONS  # noqa: E402
from kernels.tiles import choose_update_tile  # noqa: E402

# ---- Launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo, n_launches, n_agents", [("ql", 9, 1), ("ql", 9, 3), ("bc", 5, 1)])
def test_any_number_of_agents_share_the_same_few_launches(monkeypatch, algo, n_launches, n_agents):
    """Nine, or five where there are no critics to train."""
    agents, launched = [make_agent(algo=algo, seed=seed) for seed in range(n_agents)], []
    update = FusedUpdate(agents, make_transitions(agents[0]), 8)

    class Counted:
        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(grid)

    for module, names in (
        (training, ("sample", "fit", "climb")),
        (gradients, ("weight_gradients", "time_gradient")),
        (optimizer, ("adam", "finish")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted())
    update.run(1)
    assert len(launched) == n_launches and {grid[-1] for grid in launched} == {n_agents}


def test_the_tile_does_not_depend_on_how_many_agents_there_are():
    agents = [make_agent(seed=seed) for seed in range(3)]
    tiles = {FusedUpdate(group, None, 8).launches.tile for group in (agents[0], agents)}
    assert tiles == {choose_update_tile("fp16", hidden_dim=128)}


@needs_interpreter
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_interpreters_short_cuts_change_no_bit(precision, monkeypatch):
    import interpreter

    def trained():
        agent = make_agent(max_q_backup=True)
        fused(agent, 5, precision, make_transitions(agent)).run(1)
        return tensors(agent)

    quick = trained()
    whole = interpreter.TRITONS_CALL
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", whole)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.TRITONS_OPTIONS)
    as_triton_does = trained()
    assert all(torch.equal(quick[name], as_triton_does[name]) for name in quick)


def test_nan_in_one_update_is_nan_in_the_mean():
    agent = make_agent(5, 2, **SMALL)
    transitions = make_transitions(agent)
    update = fused(agent, 6, transitions=transitions)
    transitions.columns[3].fill_(math.nan)
    assert update.run(1)["critic_loss"].isnan()


# ---- In a CUDA graph -----------------------------------------------------------------------------


def replaying(agent, precision="fp16"):
    """A FusedUpdate whose run() replays a graph, also an imitated one."""
    update = fused(agent, 256 if DEVICE == "cuda" else 6, precision, make_transitions(agent))
    update.replays = True
    return update


@pytest.mark.parametrize("precision", PRECISIONS if DEVICE == "cuda" else ["fp16"])
def test_replays_of_the_graph_equal_single_launches(cuda_graphs, precision, monkeypatch):
    monkeypatch.setattr(kernels.update, "PER_REPLAY", 2)
    monkeypatch.setattr(kernels.graphs, "WARM_UP", 1)
    agents = [make_agent(5, 2, seed=1, **SMALL) for _ in range(2)]
    replayed, launched = (replaying(agent, precision) for agent in agents)
    metrics = replayed.run(3)
    assert replayed.graph is not None
    singles = [launched.run(1) for _ in range(3)]
    assert launched.graph is None
    assert_same(agents[0], tensors(agents[1]))
    for name, mean in metrics.items():
        torch.testing.assert_close(mean, torch.stack([m[name] for m in singles]).mean())


@needs_interpreter
def test_a_captured_update_is_launches_alone(cuda_graphs, monkeypatch):
    """An operation of torch would be one more launch, or memory that the graph has to keep."""
    monkeypatch.setattr(kernels.update, "PER_REPLAY", 2)
    monkeypatch.setattr(kernels.graphs, "WARM_UP", 1)
    agent = make_agent(5, 2, **SMALL)
    update = replaying(agent)
    before = tensors(agent)
    update.capture()
    names = "sample fit weight_gradients adam climb weight_gradients time_gradient adam finish"
    assert update.graph.graph.launches == 2 * names.split()
    assert update.graph.graph.operations == []
    assert_same(agent, before)


def test_an_update_and_its_graph_die_with_their_last_reference(cuda_graphs, monkeypatch):
    """The garbage collector could destroy a graph during another capture, and break that."""
    monkeypatch.setattr(kernels.update, "PER_REPLAY", 1)
    monkeypatch.setattr(kernels.graphs, "WARM_UP", 1)
    update = replaying(make_agent(5, 2, **SMALL))
    update.capture()
    gone = weakref.ref(update.graph)
    gc.disable()
    try:
        del update
        assert gone() is None
    finally:
        gc.enable()


# ---- What is refused -----------------------------------------------------------------------------


def test_states_that_fp16_cannot_hold_are_refused():
    agent = make_agent()
    transitions = make_transitions(agent)
    transitions.columns[2][3, 4] = 1e5
    for precision in ("fp16", "fp16x3"):
        beyond = f"next_state reaches 1e\\+05, which {precision} cannot hold: normalise states"
        with pytest.raises(UnsupportedError, match=beyond):
            FusedUpdate(agent, transitions, 8, precision)
    for precision in ("tf32", "fp32"):
        FusedUpdate(agent, transitions, 8, precision)


def test_states_that_eleven_bits_cannot_resolve_get_a_warning():
    agent = make_agent()
    transitions = make_transitions(agent)
    for states in transitions.columns[::2][:2]:
        states[:, 2] = 1000.0  # always the same: nothing is lost
        states[:, 7] = 1000.0 + 0.1 * torch.rand(len(states), device=DEVICE)
    for precision in ("fp16", "tf32"):
        column = r"column 7 of state varies by 0\.\d+ and reaches 1e\+03"
        with pytest.warns(UserWarning, match=f"{column}, so {precision} hardly sees it"):
            FusedUpdate(agent, transitions, 8, precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedUpdate(agent, transitions, 8, "fp16x3")
        FusedUpdate(agent, make_transitions(agent), 8, "fp16")


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(hidden_dim=100), "hidden_dim 100 is not one of"),
        (dict(n_timesteps=101), "n_timesteps 101"),
        (dict(state_dim=129), "state_dim 129"),
    ],
)
def test_networks_of_other_sizes_are_refused(how, message):
    with pytest.raises(UnsupportedError, match=message):
        FusedUpdate(make_agent(**how), None, 8)


def test_unknown_batch_sizes_precisions_optimizers_are_refused():
    agent = make_agent()
    for batch_size in (0, 4097):
        with pytest.raises(UnsupportedError, match="batch_size"):
            FusedUpdate(agent, None, batch_size)
    with pytest.raises(UnsupportedError, match="precision 'fp8'"):
        FusedUpdate(agent, None, 8, "fp8")
    agent.policy_optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(UnsupportedError, match="weight_decay=0.1"):
        FusedUpdate(agent, None, 8)


def test_agents_that_differ_in_more_than_seeds_are_refused():
    with pytest.raises(UnsupportedError, match="share eta"):
        FusedUpdate([make_agent(eta=1.0), make_agent(eta=2.0)], None, 8)
    with pytest.raises(UnsupportedError, match="same sizes"):
        FusedUpdate([make_agent(), make_agent(state_dim=12)], None, 8)
    with pytest.raises(UnsupportedError, match="schedule"):
        FusedUpdate([make_agent(), make_agent(schedule="linear")], None, 8)
    with pytest.raises(UnsupportedError, match="no agents"):
        FusedUpdate([], None, 8)


def test_a_device_may_be_named_without_its_index():
    """As cuda, though tensors are on cuda:0; without a GPU as cpu:0, though they are on cpu."""
    agent = dql.DiffusionQL(11, 3, hidden_dim=128, device={"cpu": "cpu:0"}.get(DEVICE, DEVICE))
    assert agent.device != next(agent.policy.parameters()).device
    assert FusedUpdate(agent, make_transitions(agent), 8).run(1)["bc_loss"].isfinite()


@pytest.mark.parametrize("precision", PRECISIONS if DEVICE == "cuda" else ["fp32"])
@pytest.mark.parametrize("max_q_backup", [False, True])
def test_target_critics_side_by_side_change_no_bit(max_q_backup, precision, monkeypatch):
    found = []
    for multiprocessors in (1, 1000):
        monkeypatch.setattr(launches, "multiprocessors", lambda _, n=multiprocessors: n)
        agent = make_agent(max_q_backup=max_q_backup)
        update = fused(agent, 5, precision, make_transitions(agent))
        assert update.launches.counts.sides == (1 if multiprocessors == 1 else 2)
        update.run(2)
        found.append(tensors(agent))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_fit_runs_beside_sample(monkeypatch):
    """On a stream of its own, after what came before, and before what needs its results."""
    order, current = [], ["main"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            order.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on_stream(stream):
        current.append(stream.name)
        yield
        current.pop()

    class Noted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: order.append(f"{self.name} on {current[-1]}")

    agent = make_agent()
    update = FusedUpdate(agent, make_transitions(agent), 8)
    update.launches.beside = Stream("beside")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    for module, name in (
        *((training, name) for name in ("sample", "fit", "climb")),
        *((gradients, name) for name in ("weight_gradients", "time_gradient")),
        *((optimizer, name) for name in ("adam", "finish")),
    ):
        monkeypatch.setattr(module, name, Noted(name))
    update.launches.update(update.columns)
    assert order[:5] == [
        "beside waits for main",
        "sample on main",
        "fit on beside",
        "main waits for beside",
        "weight_gradients on main",
    ]
    assert all(each.endswith("on main") for each in order[5:])


def test_batches_and_data_of_other_shapes_are_refused():
    agent = make_agent()
    with pytest.raises(UnsupportedError, match="action is"):
        FusedUpdate(agent, make_transitions(make_agent(action_dim=2)), 8)
    update = FusedUpdate(agent, None, 8)
    with pytest.raises(UnsupportedError, match="without transitions"):
        update.run(1)
    with pytest.raises(UnsupportedError, match=r"state is \(7, 11\)"):
        update.step(make_batch(agent, 7), agent.draw_noise(8))
    with pytest.raises(UnsupportedError, match="target and actor noise"):
        update.step(make_batch(agent, 8), agent.draw_noise(7))
    both = FusedUpdate([agent, make_agent(seed=1)], None, 8)
    with pytest.raises(UnsupportedError, match="2 agents need"):
        both.step([make_batch(agent, 8)], [agent.draw_noise(8)])


def test_too_little_memory_is_refused_with_how_much_is_needed(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (3 << 20, 8 << 20))
    monkeypatch.setattr(kernels.launches, "PackedPolicy", full)
    needs = r"of 1 agents needs 7\d MiB of GPU memory, and 3 MiB are free"
    with pytest.raises(UnsupportedError, match=needs):
        FusedUpdate(make_agent(29, 8, hidden_dim=256), None, 1024)


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("max_q_backup", [False, True])  # alone, the first has two sides in sample
def test_eight_agents_in_a_graph_get_what_each_gets_alone(max_q_backup):
    how = dict(hidden_dim=256, max_q_backup=max_q_backup)
    agents = [make_agent(29, 8, seed=seed, **how) for seed in range(8)]
    transitions = make_transitions(agents[0], 10_000)
    FusedUpdate(agents, transitions, 256).run(200)
    for seed in (0, 7):
        alone = make_agent(29, 8, seed=seed, **how)
        FusedUpdate(alone, transitions, 256).run(200)
        assert_same(alone, tensors(agents[seed]))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_learns_what_eager_training_learns(precision):
    """Cloning one action for each state: after 2,000 updates losses agree within a tenth."""

    def loss_of(kind, **how):
        agent = make_agent(29, 8, hidden_dim=256, lr=1e-3, algo="bc")
        updates = kind([agent], make_transitions(agent, 1000), 256, **how)
        updates.run(1900)
        return float(updates.run(100)[0]["bc_loss"])

    expected = pytest.approx(loss_of(dql.Updates), rel=0.1)
    assert loss_of(FusedUpdate, precision=precision) == expected


@pytest.mark.gpu
def test_a_million_transitions_take_less_than_two_gigabytes():
    """With an agent that trains on them."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    agent = make_agent(29, 8, hidden_dim=256, max_q_backup=True)
    transitions = make_transitions(agent, 1_000_000)
    FusedUpdate(agent, transitions, 256).run(100)
    assert torch.cuda.max_memory_allocated() - before < 2 << 30
