"""A plain agent made quick without kernels of our own, mostly for CPUs. Equal to rounding.

    eager.speed_up(agent)        # a dql.DiffusionQL: the same calls, 1.3 to 1.5 times as fast
    eager.compile_update(agent)  # torch.compile on top: 1.6 to 1.8 times, after a minute

Two things make the difference. Mish takes one exponential instead of three: two fifths of a CPU's
update are Mish and its backward pass. And the first layer of ε_θ, which is linear in [a, time, s],
multiplies s once per chain and each t once per batch instead of both at every step. Adam also is
one operation, and on a CPU many rows without a gradient go through in pieces that fit a cache.
"""

import functools
import os
import shutil

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import increment_version

_NOT_COMPILED = ("draw_noise", "gradient_step", "move_averages")
CPU_ROWS = 512  # rows whose activations stay in a core's cache: twice as fast as thousands at once


def speed_up(agent) -> None:
    """Replace what is slow in a plain DiffusionQL agent. Its weights are untouched."""
    speed_up_networks([agent.policy, agent.policy_ema], [agent.critic, agent.critic_target])
    for optimizer in (agent.policy_optimizer, agent.critic_optimizer):
        fuse_adam(optimizer)


def speed_up_networks(policies, critics) -> None:
    """The same for DiffusionPolicies and TwinCritics without an agent."""
    for network in (*policies, *critics):
        for module in network.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.Mish):
                    setattr(module, name, Mish())
    for policy in policies:
        policy.predict_noise = functools.partial(predict_noise, policy)
        policy.sample = functools.partial(sample, policy)
    for critic in critics:
        critic.forward = functools.partial(values, critic)


def compile_update(agent) -> None:
    """torch.compile an agent's update, for whatever device it is on. The first calls take a minute.

    What is random, steps an optimizer or moves averages stays as it is: two graphs are left, the
    target with the critics' loss, and the policy's loss.
    """
    for name in _NOT_COMPILED:
        setattr(agent, name, torch.compiler.disable(getattr(agent, name)))
    agent.update = torch.compile(agent.update)


def has_compiler() -> bool:
    """Whether torch.compile can work on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


def undo_compile(agent) -> None:
    for name in (*_NOT_COMPILED, "update"):
        agent.__dict__.pop(name, None)


class CountingAdam(torch.optim.Adam):
    """torch's fused Adam writes without raising version counters, by which packed copies of the
    weights see that they are stale (kernels/packing.py)."""

    def step(self, closure=None):
        result = super().step(closure)
        increment_version(self.param_groups[0]["params"])
        return result


def fuse_adam(optimizer) -> None:
    """Let torch's Adam step in one operation, its step count where its parameters are."""
    group = optimizer.param_groups[0]
    if group["fused"]:
        return
    group["fused"] = True
    for p in group["params"]:
        optimizer.state[p]["step"] = optimizer.state[p]["step"].to(p.device)
    optimizer.__class__ = CountingAdam  # a copied optimizer keeps its class, but no hooks


class _OneExpMish(torch.autograd.Function):
    """mish(x) = x·tanh(softplus(x)) = x·k/(k+1) with k = e + e²/2 and e = exp(x).

    Beyond x = 30 the quotient is 1 in float32. The derivative, k/(k+1) - x·(e - 2k)/(k+1)², is made
    on the way, so that one tensor is kept for the backward pass and not three. The result takes x's
    place: fresh memory costs more than the arithmetic.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        e = x.clamp(max=30.0).exp_()
        k = torch.addcmul(e, e, e, value=0.5)
        r = (k + 1).reciprocal_()
        slope = e.sub_(k, alpha=2).mul_(r).mul_(r).mul_(x)
        k.mul_(r)
        ctx.save_for_backward(torch.sub(k, slope, out=slope))
        return x.mul_(k)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad


class Mish(nn.Module):
    """nn.Mish with one exponential. On a CPU x is overwritten, as with nn.Mish(inplace=True)."""

    def forward(self, x):
        if x.device.type != "cpu":
            return F.mish(x)
        if torch.compiler.is_compiling():  # the compiler fuses the formula, and differentiates it
            e = x.clamp(max=30.0).exp()
            k = e + 0.5 * e * e
            return x * (k / (k + 1))
        if torch.is_grad_enabled() and x.requires_grad:
            return _OneExpMish.apply(x)
        e = x.clamp(max=30.0).exp_()
        k = e.addcmul_(e, e, value=0.5)
        return x.mul_(k.div_(k + 1))


def _first_layer(policy, state):
    """Shares of ε_θ's first layer: W_aᵀ (A,H), that of every t with the bias (T,H), of s (B,H)."""
    first, times = policy.mid_layer[0], torch.arange(policy.n_timesteps, device=state.device)
    widths = [policy.action_dim, policy.TIME_DIM, policy.state_dim]
    w_action, w_time, w_state = first.weight.split(widths, dim=1)
    of_times = F.linear(policy.time_mlp(times), w_time, first.bias)
    return w_action.t(), of_times, state.mm(w_state.t())


def _later_layers(policy, x, w_action, of_time, of_state):
    h = torch.addmm(of_state, x, w_action).add_(of_time)
    for layer in policy.mid_layer[1:]:
        h = layer(h)
    return policy.final_layer(h)


def predict_noise(policy, x, t, state):
    """DiffusionPolicy.predict_noise"""
    w_action, of_times, of_state = _first_layer(policy, state)
    # Not of_times[t]: threads sum that one's gradient in any order.
    chosen = (t[:, None] == torch.arange(policy.n_timesteps, device=t.device)).to(x.dtype)
    return _later_layers(policy, x, w_action, chosen @ of_times, of_state)


def sample(policy, state, *, x_T=None, noises=None):
    """DiffusionPolicy.sample"""
    if x_T is None:
        shape = len(state), policy.action_dim
        x_T = torch.randn(*shape, device=state.device, dtype=state.dtype)
    if noises is None:
        shape = policy.n_timesteps, *x_T.shape
        noises = torch.randn(*shape, device=state.device, dtype=state.dtype)
    if pieces := _pieces(policy, state, x_T):
        chains = (_chain(policy, state[s], x_T[rows], noises[:, rows]) for s, rows in pieces)
        return torch.cat(list(chains))
    return _chain(policy, state, x_T, noises)


def _chain(policy, state, x_T, noises):
    w_action, of_times, of_state = _first_layer(policy, state)
    if len(x_T) != len(state):
        of_state = of_state.repeat_interleave(len(x_T) // len(state), dim=0)
    x, m = x_T, policy.max_action
    for k, t in enumerate(reversed(range(policy.n_timesteps))):
        epsilon = _later_layers(policy, x, w_action, of_times[t], of_state)
        x0 = torch.sub(x * policy.x0_from_x[t], epsilon, alpha=policy.x0_from_eps[t]).clamp(-m, m)
        x = torch.add(x0 * policy.mean_from_x0[t], x, alpha=policy.mean_from_x[t])
        if t > 0:
            x = torch.add(x, noises[k], alpha=policy.sigma[t])
    return x.clamp(-m, m)


def values(critic, state, action):
    """TwinCritic.forward"""
    plain = functools.partial(type(critic).forward, critic)
    if pieces := _pieces(critic, state, action):
        parts = [plain(state[s], action[rows]) for s, rows in pieces]
        return tuple(torch.cat(q) for q in zip(*parts))
    return plain(state, action)


def _pieces(module, state, x) -> list:
    """Slices of the states (B,·) and of their rows in x (n·B,·), CPU_ROWS rows each at most; none
    where all go at once: few rows, another device, or a gradient, which keeps them all anyway."""
    if torch.compiler.is_exporting() or not len(state):  # exported: for any number of rows
        return []
    n = len(x) // len(state)
    if n * len(state) != len(x):  # for plain torch to refuse
        return []
    size = max(1, CPU_ROWS // n)
    if len(state) <= size or state.device.type != "cpu":
        return []
    learns = x.requires_grad or next(module.parameters()).requires_grad
    if learns and torch.is_grad_enabled():
        return []
    firsts = range(0, len(state), size)
    return [(slice(i, i + size), slice(i * n, (i + size) * n)) for i in firsts]
