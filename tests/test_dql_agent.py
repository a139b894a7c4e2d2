"""dql.py's agents: how they begin, act, and are saved and restored.

Everything is tested twice: plain, and as kernels/eager.py makes it.
"""

import io

import numpy as np
import pytest
import torch
from small_agents import made_agent, random_batch, small_agent, vector

from dql import DiffusionQL

pytestmark = pytest.mark.usefixtures("plain_and_quick")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_averaged_networks_begin_as_copies():
    """The seed decides them, and torch's global generator is left alone."""
    a, b, other = (made_agent(DiffusionQL(3, 2, hidden_dim=16, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(vector(b.policy), vector(b.policy_ema))
    assert torch.equal(vector(b.critic), vector(b.critic_target))
    assert torch.equal(vector(a.policy), vector(b.policy))
    assert not torch.equal(vector(b.policy), vector(other.policy))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    agent = made_agent(DiffusionQL(3, 2, hidden_dim=16, seed=1))
    agent.update(random_batch())
    agent.act(np.zeros(3, dtype=np.float32))
    assert torch.equal(torch.randn(3), expected)


# ---- Acting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ql", "bc"])
def test_actions_have_the_kind_and_shape_of_the_state(algo):
    agent = small_agent(algo=algo)
    numpys = np.zeros(3), np.zeros((5, 3), dtype=np.float32)
    for state in (*numpys, torch.zeros(3), torch.zeros(5, 3, dtype=torch.float64)):
        action = agent.act(state, n_candidates=4)
        assert type(action) is type(state) and tuple(action.shape) == (*state.shape[:-1], 2)
        assert str(action.dtype).endswith("float32") and abs(action).max() <= 1


def test_candidates_are_picked_by_softmax_of_the_smaller_q(monkeypatch):
    """Of the target critics."""
    agent, n = small_agent(), 20_000
    x = torch.tensor([-0.6, -0.2, 0.2, 0.6])
    candidates = torch.stack([x, torch.zeros(4)], dim=1)
    sample = lambda state, x_T, noises: candidates.repeat(len(state), 1)  # noqa: E731
    critics = lambda state, action: (2 * action[:, :1], 1 - action[:, :1])  # noqa: E731
    monkeypatch.setattr(agent.policy, "sample", sample)
    monkeypatch.setattr(agent.critic_target, "forward", critics)
    actions = agent.act(np.zeros((n, 3), dtype=np.float32), n_candidates=4)
    counts = np.array([(actions[:, 0] == a).sum() for a in x.numpy()])
    q = torch.minimum(2 * x, 1 - x).double().numpy()
    expected = n * np.exp(q) / np.exp(q).sum()
    assert counts.sum() == n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001


def test_each_state_gets_one_of_its_own_candidates():
    """Of the current policy, not of the averaged one."""
    agent = small_agent()
    state = torch.randn(6, 3, generator=seeded(0))
    action = agent.act(state, 8, generator=seeded(1))
    noise = torch.randn(6, 48, 2, generator=seeded(1))
    own = agent.policy.sample(state, x_T=noise[0], noises=noise[1:]).detach().view(6, 8, 2)
    assert ((own - action[:, None]).abs().amax(dim=2).amin(dim=1) < 1e-5).all()


def test_a_generator_makes_acting_repeatable():
    """And leaves the agent's own alone."""
    agent, state = small_agent(), np.ones((5, 3), dtype=np.float32)
    before = agent.generator.get_state()
    first, second = (agent.act(state, generator=seeded(3)) for _ in range(2))
    assert np.array_equal(first, second) and torch.equal(agent.generator.get_state(), before)
    assert not np.array_equal(agent.act(state), agent.act(state))


# ---- Saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ql", "bc"])
def test_a_restored_agent_continues_bit_for_bit(algo):
    kwargs = dict(algo=algo, max_q_backup=algo == "ql", ema_start=2, ema_every=2)
    batch, through = random_batch(), small_agent(**kwargs)
    for _ in range(3):
        through.update(batch)
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    restored = small_agent(seed=9, **kwargs)
    restored.load_state_dict(torch.load(file))
    for _ in range(3):
        expected, metrics = through.update(batch), restored.update(batch)
    assert all(torch.equal(metrics[name], expected[name]) for name in expected)
    expected, state = through.state_dict(), restored.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    observation = np.zeros(3, dtype=np.float32)
    assert np.array_equal(through.act(observation), restored.act(observation))


def test_restoring_does_not_tie_two_agents_together():
    first = small_agent()
    first.update(random_batch())
    second = small_agent(seed=9)
    second.load_state_dict(first.state_dict())
    before = {name: v.clone() for name, v in first.state_dict().items()}
    second.update(random_batch())
    assert all(torch.equal(v, before[name]) for name, v in first.state_dict().items())


def test_weights_alone_are_enough_to_act():
    first = small_agent()
    first.update(random_batch())
    second = small_agent(seed=9)
    networks = ("policy.", "policy_ema.", "critic.", "critic_target.")
    weights = {name: v for name, v in first.state_dict().items() if name.startswith(networks)}
    second.load_state_dict(weights, weights_only=True)
    state = np.ones(3, dtype=np.float32)
    actions = [agent.act(state, generator=seeded(0)) for agent in (first, second)]
    assert np.array_equal(*actions)


def test_a_state_that_does_not_fit_is_refused():
    """Of another shape, or with a name missing."""
    state = small_agent().state_dict()
    with pytest.raises(RuntimeError):
        DiffusionQL(3, 2, hidden_dim=32).load_state_dict(state)
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        small_agent().load_state_dict(state | {"policy_optimizer.exp_avg": torch.zeros(1)})
    del state["critic.q1_model.0.bias"]
    with pytest.raises((KeyError, RuntimeError)):
        small_agent().load_state_dict(state)
