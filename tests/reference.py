"""What the kernels are compared with: policies, critics, agents and noise for tests, eager, rounded or in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

import dql
from bench import rounding
from dql import (
    Batch,
    DiffusionBC,
    DiffusionPolicy,
    DiffusionQL,
    Transitions,
    TwinCritic,
    UpdateNoise,
)
from kernels import eager
from kernels.packing import architecture
from kernels.tiles import ProductTile, Tile, choose_actor_tile, choose_tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_interpreter = pytest.mark.skipif(
    DEVICE == "cuda", reason="on a GPU kernels are compiled, not interpreted"
)
TILES = {"small": 1, "large": 1 << 20}  # rows of a batch that gets the tile


def tile(size: str, precision: str = "fp16", hidden_dim: int = 128, choose=choose_tile) -> Tile:
    """The tile to test: on a GPU a shipped one, which fits; for the interpreter, which pays by the chunk, the same code in few."""
    if DEVICE == "cuda":
        return choose(TILES[size], precision, architecture(torch.device(DEVICE)), hidden_dim)
    if size == "small":
        return Tile(transposed=True, rows=16, chunk=64, warps=4, stages=2)
    return Tile(transposed=False, rows=32, chunk=32, warps=8, stages=2)


def actor_tile(
    size: str, n_candidates: int, precision: str = "fp16", hidden_dim: int = 128
) -> Tile:
    return tile(
        size,
        precision,
        hidden_dim,
        lambda n_states, *which: choose_actor_tile(n_states, n_candidates, *which),
    )


def make_policy(state_dim=11, action_dim=3, *, gain=1.0, seed=0, **how):
    torch.manual_seed(seed)
    policy = DiffusionPolicy(state_dim, action_dim, **{"hidden_dim": 128} | how).requires_grad_(
        False
    )
    for p in policy.parameters():
        p *= gain
    return policy.to(DEVICE)


def make_critic(state_dim=11, action_dim=3, *, gain=1.0, seed=10, hidden_dim=128):
    torch.manual_seed(seed)
    critic = TwinCritic(state_dim, action_dim, hidden_dim=hidden_dim).requires_grad_(False)
    for p in critic.parameters():
        p *= gain
    return critic.to(DEVICE)


def make_noise(policy, n, seed=1):
    g = torch.Generator().manual_seed(seed)
    shapes = (
        (n, policy.state_dim),
        (n, policy.action_dim),
        (policy.n_timesteps, n, policy.action_dim),
    )
    return [torch.randn(*shape, generator=g).to(DEVICE) for shape in shapes]


ROUND = rounding.ROUND | {"fp16x3": lambda x: x, "fp32": lambda x: x}


def rounded_linear(layer, x, precision):
    return F.linear(ROUND[precision](x), ROUND[precision](layer.weight), layer.bias)


def critic_at(critic, precision, state, action):
    """min(Q1, Q2) (n,), float32, with every operand of a matrix product rounded to the precision."""
    values = []
    for model in (critic.q1_model, critic.q2_model):
        h = torch.cat([state, action], dim=1)
        for layer in model[:-1:2]:
            h = F.mish(rounded_linear(layer, h, precision))
        values.append(rounded_linear(model[-1], h, precision)[:, 0])
    return torch.minimum(*values)


def eager_at(policy, precision, state, x_T, noises):
    """The eager chain, float32, with every operand of a matrix product rounded to the precision."""
    x, m = x_T, policy.max_action
    for k, t in enumerate(reversed(range(policy.n_timesteps))):
        time = policy.time_mlp(torch.full((len(x),), t, device=x.device))
        h = torch.cat([x, time, state], dim=1)
        for layer in policy.mid_layer[::2]:
            h = F.mish(rounded_linear(layer, h, precision))
        x_0 = (
            policy.x0_from_x[t] * x
            - policy.x0_from_eps[t] * rounded_linear(policy.final_layer, h, precision)
        ).clamp(-m, m)
        x = (
            policy.mean_from_x0[t] * x_0
            + policy.mean_from_x[t] * x
            + (policy.sigma[t] * noises[k] if t else 0)
        )
    return x.clamp(-m, m)


def exact(policy, state, x_T, noises):
    policy = copy.deepcopy(policy).double()
    return policy.sample(state.double(), x_T=x_T.double(), noises=noises.double())


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Updates
# ---------------------------------------------------------------------------------------------------------------------

# As for TILES: the interpreter pays by the program, so it gets few large ones of the same code.
UPDATE_TILES = {}
if DEVICE == "cpu":
    UPDATE_TILES = dict(
        tile=Tile(True, 64, 128, 4, 2), product_tile=ProductTile(128, 128, 128, 4, 2)
    )


def make_agent(state_dim=11, action_dim=3, *, seed=0, algo="ql", **how):
    make, how = (
        {"ql": DiffusionQL, "bc": DiffusionBC}[algo],
        {"hidden_dim": 128, "ema_start": 0} | how,
    )
    return make(state_dim, action_dim, device=DEVICE, seed=seed, **how)


def to_float64(agent):
    """The agent, from now on in float64."""
    for module in agent.networks().values():
        module.double()
    for optimizer in (agent.policy_optimizer, agent.critic_optimizer):
        for state in optimizer.state.values():
            state |= {name: state[name].double() for name in ("exp_avg", "exp_avg_sq")}
    return agent


def flat(tensors):
    """Tensors, or a module's parameters, as one vector."""
    tensors = tensors.parameters() if isinstance(tensors, torch.nn.Module) else tensors
    return torch.cat([x.detach().flatten() for x in tensors])


def gradient(module):
    return flat(p.grad for p in module.parameters())


def first_moment(agent, name):
    return flat(state["exp_avg"] for state in getattr(agent, f"{name}_optimizer").state.values())


def fused(agents, batch_size, precision="fp32", transitions=None, **how):
    """A FusedUpdate whose memory holds nothing that could be taken for a result."""
    from kernels import FusedUpdate

    update = FusedUpdate(agents, transitions, batch_size, precision, **UPDATE_TILES | how)
    own = update.launches
    handed_on = [*own.memory.policy, *own.memory.critic, *own.memory[2:], own.table, *own.norms]
    for x in (*handed_on, update.policy.vectors.gradient, update.critic.vectors.gradient):
        x.fill_(float("nan"))
    return update


def make_batch(agent, n, seed=1):
    g = torch.Generator().manual_seed(seed)
    state, next_state = torch.randn(2, n, agent.policy.state_dim, generator=g)
    action = (torch.rand(n, agent.policy.action_dim, generator=g) * 2 - 1) * agent.policy.max_action
    reward, not_done = torch.randn(n, 1, generator=g), (torch.rand(n, 1, generator=g) > 0.2).float()
    return Batch(*(x.to(DEVICE) for x in (state, action, next_state, reward, not_done)))


def make_transitions(agent, n=100, seed=5):
    state, action, next_state, reward, not_done = make_batch(agent, n, seed)
    arrays = [
        x.cpu().numpy() for x in (state, action, next_state, reward[:, 0], 1 - not_done[:, 0])
    ]
    return Transitions(*arrays, device=DEVICE)


def doubled(batch, noise):
    """A batch and its noise in float64."""
    fields = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in vars(noise).items()
    }
    return Batch(*(x.double() for x in batch)), UpdateNoise(**fields)


def distance_from_clamps(policy, state, x_T, noises):
    """How near each row (n,) comes to a bound of a clamp of its chain, in float64: there a gradient jumps. The last clamp, of the
    action itself, is no bound of its own: at t = 0 the mean is the clamped x_0."""
    policy, state, x, noises = (
        copy.deepcopy(policy).double(),
        state.double(),
        x_T.double(),
        noises.double(),
    )
    m, nearest = (
        policy.max_action,
        torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device),
    )
    for k, t in enumerate(reversed(range(policy.n_timesteps))):
        epsilon = policy.predict_noise(x, torch.full((len(x),), t, device=x.device), state)
        x_0 = policy.x0_from_x[t] * x - policy.x0_from_eps[t] * epsilon
        nearest = torch.minimum(nearest, (x_0.abs() - m).abs().amin(dim=1))
        x = (
            policy.mean_from_x0[t] * x_0.clamp(-m, m)
            + policy.mean_from_x[t] * x
            + (policy.sigma[t] * noises[k] if t else 0)
        )
    return nearest


def imitate(monkeypatch, precision):
    """Eager networks round their operands as the kernels do at this precision."""
    if precision in rounding.ROUND:
        policy, critic = dql.DiffusionPolicy, dql.TwinCritic
        for owner, name in (
            (policy, "predict_noise"),
            (critic, "forward"),
            (eager, "speed_up_networks"),
        ):
            monkeypatch.setattr(owner, name, getattr(owner, name))  # so that they are put back
        rounding.imitate(precision)


def away_from_clamps(agent, n, seed=1, margin=2e-3, among=6):
    """A batch and noise whose chains stay away from the clamps' bounds, where a gradient jumps."""
    batch, noise, k = (
        make_batch(agent, among * n, seed),
        agent.draw_noise(among * n),
        agent.n_target_samples,
    )
    near = distance_from_clamps(agent.policy, batch.state, noise.actor_x_T, noise.actor_noises)
    rows = torch.nonzero(near > margin)[:n, 0]
    assert len(rows) == n, f"only {len(rows)} rows of {among * n} stay away from the clamps"
    targets = (rows[:, None] * k + torch.arange(k, device=rows.device)).flatten()
    chosen = UpdateNoise(
        noise.target_x_T[targets], noise.target_noises[:, targets], noise.t[rows], noise.bc_noise[rows], noise.actor_x_T[rows],
        noise.actor_noises[:, rows], noise.coin,
    )  # fmt: skip
    return Batch(*(x[rows] for x in batch)), chosen


def steepen(agent, steepness):
    """Let dQ/dz₁ of a critic reach steepness, its last three layers growing alike."""
    batch = make_batch(agent, 64)
    x = torch.cat([batch.state, batch.action], dim=1)
    for model in (agent.critic.q1_model, agent.critic.q2_model):
        for _ in range(5):
            z = model[0](x).detach().requires_grad_()
            (slope,) = torch.autograd.grad(model[1:](z.clone()).sum(), z)
            with torch.no_grad():
                for layer in model[2::2]:
                    layer.weight *= (steepness / slope.abs().max()) ** (1 / 3)
    agent.critic_target.load_state_dict(agent.critic.state_dict())
