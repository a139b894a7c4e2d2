"""Small agents and the oracle's, plain or made quick by kernels/eager.py, and batches for them.

Bounds against the oracle are twice the released float32 code's own error against the same float64
numbers.
"""

import torch

from dql import Batch, DiffusionBC, DiffusionPolicy, DiffusionQL
from kernels import eager

QUICK = False  # set by the fixture plain_and_quick: what is made here is made quick

NOISE_ERROR, CHAIN_ERROR, LOSS_ERROR, UPDATE_ERROR = 2 * 1.7e-6, 2 * 9e-6, 2 * 1.4e-6, 2 * 1e-4
NORM_ERROR = 2e-6  # relative
CHAINS = {"vp": ("chain_vp_T5_a1.0", 5), "cosine": ("chain_cosine_T10_a1.0", 10)}
ORACLE_NETWORKS = {  # the agent's name -> the oracle's
    "policy": "actor",
    "policy_ema": "ema",
    "critic": "critic",
    "critic_target": "target",
}


def error(ours, expected) -> float:
    """The largest absolute difference."""
    assert ours.shape == expected.shape
    return (ours.detach().double() - expected).abs().max().item()


def vector(module):
    """A copy of all parameters in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def made(network):
    """A policy or a critic as it is tested."""
    if QUICK:
        is_policy = isinstance(network, DiffusionPolicy)
        eager.speed_up_networks([network] if is_policy else [], [] if is_policy else [network])
    return network


def made_agent(agent):
    if QUICK:
        eager.speed_up(agent)
    return agent


def loaded(module, parameters):
    module.load_state_dict(parameters)
    return made(module)


def oracle_policy(oracle, **kwargs):
    return loaded(DiffusionPolicy(29, 8, **kwargs), oracle.named("params/actor/"))


def oracle_agent(oracle, **kwargs):
    agent = made_agent(DiffusionQL(29, 8, **kwargs))
    for name, theirs in ORACLE_NETWORKS.items():
        getattr(agent, name).load_state_dict(oracle.named(f"params/{theirs}/"))
    return agent


def oracle_batch(oracle):
    return Batch(*(oracle[f"in/{name}"] for name in Batch._fields))


def rows_of(ours, expected):
    """Those rows of a tensor that the oracle has: the cut has every 16th of the large ones."""
    return ours[:: len(ours) // len(expected)] if ours.ndim else ours


def small_agent(algo="ql", **kwargs):
    """An agent whose averaged and target networks differ from the ones that they follow."""
    make = {"ql": DiffusionQL, "bc": DiffusionBC}[algo]
    agent = made_agent(make(3, 2, **{"hidden_dim": 16, "grad_norm": 0.0, **kwargs}))
    torch.manual_seed(5)
    for module in (agent.policy_ema, agent.critic_target):
        for p in module.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return agent


def random_batch(n=32, state_dim=3, action_dim=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = (state_dim, action_dim, state_dim, 1)
    state, action, next_state, reward = (torch.randn(n, d, generator=g) for d in sizes)
    not_done = (torch.rand(n, 1, generator=g) > 0.2).float()
    return Batch(state, action.clamp(-1, 1), next_state, reward, not_done)
