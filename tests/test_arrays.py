"""What dql.py takes from a user's own arrays, and what it refuses."""

import numpy as np
import pytest
import torch

from dql import DiffusionQL, Transitions, Updates

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


@pytest.mark.parametrize("name", arrays())
def test_arrays_of_unequal_lengths_are_refused(name):
    with pytest.raises(ValueError, match=r"unequal lengths: \[.*39.*\]"):
        Transitions(**arrays(**{name: arrays()[name][:-1]}))


@pytest.mark.parametrize("name", ["reward", "terminal"])
def test_two_rewards_or_terminals_a_row_are_refused(name):
    with pytest.raises(ValueError, match="cannot reshape"):
        Transitions(**arrays(**{name: np.zeros((N, 2))}))


@pytest.mark.parametrize("shape", [(S + 1,), (5, 2 * S), (S - 1,), ()])
def test_states_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match="states have 3 numbers each"):
        small_agent().act(np.zeros(shape))


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
