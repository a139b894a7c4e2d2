"""What dql.py takes from a user's own arrays, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest
import torch
from small_agents import random_batch

from dql import Batch, DiffusionBC, DiffusionQL, Transitions, Updates
from kernels import eager

N, S, A = 40, 3, 2


def arrays(**changed):
    rng = np.random.default_rng(0)
    found = {
        "state": rng.standard_normal((N, S)),
        "action": rng.uniform(-1, 1, (N, A)),
        "next_state": rng.standard_normal((N, S)),
        "reward": rng.standard_normal(N),
        "terminal": rng.random(N) < 0.3,
    }
    return found | changed


def small_agent():
    return DiffusionQL(S, A, hidden_dim=16)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"reward": x["reward"][:, None], "terminal": x["terminal"][:, None]},
        lambda x: {"terminal": x["terminal"].astype(int)},
        lambda x: {name: torch.tensor(value) for name, value in x.items()},
        lambda x: {name: value.tolist() for name, value in x.items()},
        lambda x: {"state": np.asfortranarray(x["state"])},
    ],
    ids=["columns", "integers", "torch", "lists", "other strides"],
)
def test_arrays_of_any_kind_make_the_same_transitions(change):
    expected = Transitions(**arrays())
    found = Transitions(**arrays(**change(arrays())))
    assert [c.shape[1] for c in found.columns] == [S, A, S, 1, 1]
    assert all(map(torch.equal, found.columns, expected.columns))
    assert torch.equal(found.columns[4][:, 0] == 0, torch.tensor(arrays()["terminal"]))


REFUSED = {
    **{f"{name} is shorter": {name: arrays()[name][:-1]} for name in arrays()},
    "two rewards a row": {"reward": np.zeros((N, 2))},
    "two terminals a row": {"terminal": np.zeros((N, 2))},
    "rewards in a row": {"reward": np.zeros((1, N))},
    "states of one number": {"state": np.zeros(N), "next_state": np.zeros(N)},
    "next states of another width": {"next_state": np.zeros((N, S + 1))},
    "nothing": {name: value[:0] for name, value in arrays().items()},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_columns_that_do_not_fit_are_refused_with_shapes(change):
    """Nothing is broadcast or misaligned: one line names the shapes of all."""
    given = arrays(**change)
    with pytest.raises(ValueError) as refusal:
        Transitions(**given)
    message = str(refusal.value)
    assert "\n" not in message
    assert all(str(np.shape(value)) in message for value in change.values() if np.ndim(value) > 1)


@pytest.mark.parametrize("name", ["state", "action", "next_state", "reward", "terminal"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_data_that_are_not_finite_are_refused(name, value):
    column = np.array(arrays()[name], float)
    column[7] = value
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        Transitions(**arrays(**{name: column}))


def batch(**changed):
    found = arrays(**changed)
    return [*list(found.values())[:4], 1 - np.asarray(found["terminal"], np.float32)]


AGENTS = {"ql": DiffusionQL, "bc": DiffusionBC}


@pytest.mark.parametrize("algo", AGENTS)
@pytest.mark.parametrize(
    "kind", [np.asarray, torch.tensor, np.ndarray.tolist, lambda x: torch.tensor(x).double()]
)
def test_a_batch_of_any_kind_makes_the_same_update(algo, kind):
    """float64 or integers, rewards (B,) or (B,1)."""
    one, other = (AGENTS[algo](S, A, hidden_dim=16) for _ in range(2))
    columns = [torch.tensor(x, dtype=torch.float32) for x in batch()]
    columns[3:] = [x[:, None] for x in columns[3:]]
    assert one.update(Batch(*columns)) == other.update([kind(x) for x in batch()])
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("algo", AGENTS)
@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_batch_that_does_not_fit_changes_nothing(algo, change):
    agent = AGENTS[algo](S, A, hidden_dim=16)
    before = agent.state_dict()
    with pytest.raises((ValueError, TypeError)) as refusal:
        agent.update(batch(**change))
    assert "\n" not in str(refusal.value)
    assert all(map(torch.equal, agent.state_dict().values(), before.values()))


def test_data_of_another_task_are_refused_with_both_widths():
    wide = Transitions(**arrays(state=np.zeros((N, 7)), next_state=np.zeros((N, 7))))
    with pytest.raises(ValueError, match=r"\(B,3\).*\(8, 7\)"):
        Updates([small_agent()], wide, batch_size=8).run(1)


def test_actions_that_no_policy_could_take_are_refused():
    data = Transitions(**arrays(action=np.full((N, A), -2.0)))
    with pytest.raises(ValueError, match="reach ±2, the policy's ±1.0: scale"):
        Updates([small_agent()], data, batch_size=8)
    Updates([DiffusionQL(S, A, hidden_dim=16, max_action=2.0)], data, batch_size=8).run(1)


# ---- Acting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("algo", AGENTS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (2, 4), (0, 4)])
def test_acting_keeps_the_shape_of_the_states(algo, quick, shape):
    """None of them is one shape more."""
    agent = AGENTS[algo](S, A, hidden_dim=16)
    if quick:
        eager.speed_up(agent)
    for states in (np.zeros((*shape, S)), torch.zeros(*shape, S, dtype=torch.int64)):
        action = agent.act(states, 4)
        assert action.shape == (*shape, A) and type(action) is type(states)
    if 0 not in shape:  # an empty list has no width
        assert agent.act(np.zeros((*shape, S)).tolist(), 4).shape == (*shape, A)


@pytest.mark.parametrize("shape", [(S + 1,), (5, 2 * S), (S - 1,), ()])
def test_states_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match="states have 3 numbers each"):
        small_agent().act(np.zeros(shape))


UNFIT = {
    "states and actions of unequal number": ((4, S), (3, A)),
    "one number an action": ((4, S), (4,)),
    "wide states": ((4, S + 1), (4, A)),
    "wide actions": ((4, S), (4, A + 1)),
    "a state alone": ((S,), (4, A)),
}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("state, action", UNFIT.values(), ids=UNFIT)
def test_networks_do_not_stretch_what_does_not_fit(state, action, quick):
    agent = small_agent()
    if quick:
        eager.speed_up(agent)
    state, action = torch.zeros(state), torch.zeros(action)
    for call in (agent.policy.bc_loss, agent.critic, lambda s, a: agent.policy.sample(s, x_T=a)):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as refusal:
            call(state, action)
        assert "\n" not in str(refusal.value)


# ---- Copies --------------------------------------------------------------------------------------


def pickled(agent):
    return pickle.loads(pickle.dumps(agent))


def sent_to_a_task(agent):
    """As Ray sends an argument."""
    cloudpickle = pytest.importorskip("cloudpickle", reason="it comes with ray")
    return pickle.loads(cloudpickle.dumps(agent))


def trained_by_kernels(agent, data):
    """An agent whose weights are views of the fused update's rows."""
    pytest.importorskip("triton", reason="triton has no package for this platform")
    from reference import UPDATE_TILES

    import kernels

    kernels.FusedUpdate([agent], data, 8, "fp32", **UPDATE_TILES)


MAKERS = {
    "plain": lambda agent, data: None,
    "quick": lambda agent, data: eager.speed_up(agent),
    "trained by kernels": trained_by_kernels,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, sent_to_a_task])
def test_a_copied_agent_learns_as_the_original_would(make, copied):
    """And on its own: the original stays as it is."""
    agent, data = DiffusionQL(29, 8, hidden_dim=128, n_timesteps=2), random_batch(8, 29, 8)
    columns = (*data[:3], data.reward, 1 - data.not_done)
    make(agent, Transitions(*columns))
    agent.update(data)
    other, before = copied(agent), agent.state_dict()
    assert all(map(torch.equal, other.state_dict().values(), before.values()))
    weights = other.policy.final_layer.weight.detach().clone()
    metrics = other.update(data)
    assert not torch.equal(other.policy.final_layer.weight, weights)
    assert all(map(torch.equal, agent.state_dict().values(), before.values()))
    assert agent.update(data) == metrics
    assert all(map(torch.equal, agent.state_dict().values(), other.state_dict().values()))
    states = np.zeros((2, 29), np.float32)
    assert np.array_equal(agent.act(states), other.act(states))


def test_a_copied_quick_agent_is_packed_anew_when_it_learns():
    """Its fused Adam still counts what it writes, so that no kernel acts by stale weights."""
    agent = small_agent()
    eager.speed_up(agent)
    other = pickled(agent)
    version = other.policy.final_layer.weight._version
    other.update(batch())
    assert other.policy.final_layer.weight._version > version


def test_a_compiled_agent_is_not_copied():
    agent = small_agent()
    eager.compile_update(agent)
    with pytest.raises(Exception):
        pickle.dumps(agent)


def test_a_state_dict_is_a_snapshot_that_training_leaves():
    agent, data = small_agent(), Transitions(**arrays())
    train = Updates([agent], data, batch_size=8)
    train.run(2)
    snapshot = agent.state_dict()
    expected = {name: value.clone() for name, value in snapshot.items()}
    first = train.run(3)
    agent.load_state_dict(snapshot)
    assert all(torch.equal(value, expected[name]) for name, value in agent.state_dict().items())
    assert train.run(3) == first  # the same updates again, to the bit


def test_a_seed_may_be_numpy_s():
    one, other = DiffusionQL(S, A, seed=np.int64(3)), DiffusionQL(S, A, seed=3)
    assert one.flip_coin() == other.flip_coin()
    assert torch.equal(one.policy.final_layer.weight, other.policy.final_layer.weight)
