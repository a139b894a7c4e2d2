"""What the kernels are compared with: networks and agents, eager, rounded or in float64."""

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
    """The tile to test: on a GPU a shipped one, which is known to fit.

    The interpreter takes a time for each chunk, so it runs the same code in few chunks.
    """
    if DEVICE == "cuda":
        return choose(TILES[size], precision, architecture(torch.device(DEVICE)), hidden_dim)
    if size == "small":
        return Tile(transposed=True, rows=16, chunk=64, warps=4, stages=2)
    return Tile(transposed=False, rows=32, chunk=32, warps=8, stages=2)


def actor_tile(
    size: str, n_candidates: int, precision: str = "fp16", hidden_dim: int = 128
) -> Tile:
    def choose(n_states, *which):
        return choose_actor_tile(n_states, n_candidates, *which)

    return tile(size, precision, hidden_dim, choose)


def make_policy(state_dim=11, action_dim=3, *, gain=1.0, seed=0, **how):
    """gain: what all parameters are multiplied by."""
    torch.manual_seed(seed)
    how = {"hidden_dim": 128} | how
    policy = DiffusionPolicy(state_dim, action_dim, **how).requires_grad_(False)
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
    """n states, x_T (n, A) and the noises (T, n, A) of their chains, all standard normal."""
    g = torch.Generator().manual_seed(seed)
    S, A, T = policy.state_dim, policy.action_dim, policy.n_timesteps
    return [torch.randn(*shape, generator=g).to(DEVICE) for shape in ((n, S), (n, A), (T, n, A))]


# ---- Networks, rounded or exact ------------------------------------------------------------------

ROUND = rounding.ROUND | {"fp16x3": lambda x: x, "fp32": lambda x: x}


def rounded_linear(layer, x, precision):
    return F.linear(ROUND[precision](x), ROUND[precision](layer.weight), layer.bias)


def critic_at(critic, precision, state, action):
    """min(Q1, Q2) (n,), float32, with the operands of all matrix products rounded."""
    values = []
    for model in (critic.q1_model, critic.q2_model):
        h = torch.cat([state, action], dim=1)
        for layer in model[:-1:2]:
            h = F.mish(rounded_linear(layer, h, precision))
        values.append(rounded_linear(model[-1], h, precision)[:, 0])
    return torch.minimum(*values)


def reverse_step(policy, t, x, x_0, noise):
    """x_{t-1} of x_t and the predicted x_0."""
    mean = policy.mean_from_x0[t] * x_0 + policy.mean_from_x[t] * x
    return mean + policy.sigma[t] * noise if t else mean


def eager_at(policy, precision, state, x_T, noises):
    """The eager chain, float32, with the operands of all matrix products rounded."""
    x, m = x_T, policy.max_action
    for k, t in enumerate(reversed(range(policy.n_timesteps))):
        time = policy.time_mlp(torch.full((len(x),), t, device=x.device))
        h = torch.cat([x, time, state], dim=1)
        for layer in policy.mid_layer[::2]:
            h = F.mish(rounded_linear(layer, h, precision))
        epsilon = rounded_linear(policy.final_layer, h, precision)
        x_0 = (policy.x0_from_x[t] * x - policy.x0_from_eps[t] * epsilon).clamp(-m, m)
        x = reverse_step(policy, t, x, x_0, noises[k])
    return x.clamp(-m, m)


def exact(policy, state, x_T, noises):
    policy = copy.deepcopy(policy).double()
    return policy.sample(state.double(), x_T=x_T.double(), noises=noises.double())


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# ---- Agents --------------------------------------------------------------------------------------

# As for tile(): the interpreter gets few large programs of the same code.
UPDATE_TILES = {}
if DEVICE == "cpu":
    UPDATE_TILES = {
        "tile": Tile(True, 64, 128, 4, 2),
        "product_tile": ProductTile(128, 128, 128, 4, 2),
    }
SMALL = {"n_timesteps": 2, "ema_every": 2, "lr": 1e-3}  # for an agent whose updates are cheap


def make_agent(state_dim=11, action_dim=3, *, seed=0, algo="ql", **how):
    make = {"ql": DiffusionQL, "bc": DiffusionBC}[algo]
    how = {"hidden_dim": 128, "ema_start": 0} | how
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


def tensors(agent):
    """A copy of an agent's state, but for torch's generator, which fused updates do not use."""
    state = agent.state_dict()
    return {name: value.clone() for name, value in state.items() if name != "generator"}


def assert_same(agent, expected):
    found = tensors(agent)
    for name in expected:
        # Adam counts its steps on the host until a graph takes it over.
        assert torch.equal(found[name].cpu(), expected[name].cpu()), name


def scale_rates(agents, share):
    """Set learning rates as a schedule does: this share of the first ones."""
    for agent in agents:
        agent.policy_optimizer.param_groups[0]["lr"] = share * agent.config.lr
        agent.critic_optimizer.param_groups[0]["lr"] = share * agent.config.critic_lr


def steepen(agent, steepness):
    """Scale the last three layers of each critic alike until the largest dQ/dz₁ is steepness."""
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


# ---- Updates, and what they are given ------------------------------------------------------------


def tensors_in(group) -> list:
    """All tensors of nested NamedTuples."""
    if not isinstance(group, tuple):
        return [group]
    return [x for member in group for x in tensors_in(member)]


def fused(agents, batch_size, precision="fp32", transitions=None, **how):
    """A FusedUpdate; what later launches read is NaN until an earlier one has written it."""
    from kernels import FusedUpdate

    update = FusedUpdate(agents, transitions, batch_size, precision, **UPDATE_TILES | how)
    own = update.launches
    gradients = [trained.vectors.gradient for trained in (update.policy, update.critic)]
    for x in (*tensors_in(own.memory), own.table, *own.norms, *gradients):
        if x is not own.memory.critic.dy:  # a constant
            x.fill_(float("nan"))
    return update


def imitate(monkeypatch, precision):
    """Let eager networks round their operands as the kernels do at this precision."""
    if precision not in rounding.ROUND:
        return
    replaced = (
        (dql.DiffusionPolicy, "predict_noise"),
        (dql.TwinCritic, "forward"),
        (eager, "speed_up_networks"),
    )
    for owner, name in replaced:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # monkeypatch restores it later
    rounding.imitate(precision)


def make_batch(agent, n, seed=1):
    g = torch.Generator().manual_seed(seed)
    policy = agent.policy
    state, next_state = torch.randn(2, n, policy.state_dim, generator=g)
    action = (torch.rand(n, policy.action_dim, generator=g) * 2 - 1) * policy.max_action
    reward = torch.randn(n, 1, generator=g)
    not_done = (torch.rand(n, 1, generator=g) > 0.2).float()
    return Batch(*(x.to(DEVICE) for x in (state, action, next_state, reward, not_done)))


def make_transitions(agent, n=100, seed=5):
    return transitions_of(make_batch(agent, n, seed))


def transitions_of(batch):
    """The rows of a batch as the transitions to draw from."""
    state, action, next_state, reward, not_done = (x.cpu().numpy() for x in batch)
    return Transitions(state, action, next_state, reward[:, 0], 1 - not_done[:, 0], device=DEVICE)


def doubled(batch, noise):
    """A batch and its noise in float64."""

    def in_float64(x):
        return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

    fields = {name: in_float64(value) for name, value in vars(noise).items()}
    return Batch(*map(in_float64, batch)), UpdateNoise(**fields)


def distance_from_clamps(policy, state, x_T, noises):
    """(n,): how near each row's chain comes to a bound of a clamp, where a gradient jumps.

    In float64. The last clamp, of the action itself, adds no bound: at t = 0 the mean is the
    clamped x_0.
    """
    policy = copy.deepcopy(policy).double()
    state, x, noises = state.double(), x_T.double(), noises.double()
    m = policy.max_action
    nearest = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
    for k, t in enumerate(reversed(range(policy.n_timesteps))):
        epsilon = policy.predict_noise(x, torch.full((len(x),), t, device=x.device), state)
        x_0 = policy.x0_from_x[t] * x - policy.x0_from_eps[t] * epsilon
        nearest = torch.minimum(nearest, (x_0.abs() - m).abs().amin(dim=1))
        x = reverse_step(policy, t, x, x_0.clamp(-m, m), noises[k])
    return nearest


def away_from_clamps(agent, n, seed=1, margin=2e-3, among=6):
    """n rows of a batch and noise whose chains stay away from the bounds of clamps.

    There gradients jump. The rows are chosen from among times as many.
    """
    batch, noise = make_batch(agent, among * n, seed), agent.draw_noise(among * n)
    near = distance_from_clamps(agent.policy, batch.state, noise.actor_x_T, noise.actor_noises)
    rows = torch.nonzero(near > margin)[:n, 0]
    assert len(rows) == n, f"only {len(rows)} rows of {among * n} stay away from the clamps"
    k = agent.n_target_samples
    targets = (rows[:, None] * k + torch.arange(k, device=rows.device)).flatten()
    chosen = UpdateNoise(
        target_x_T=noise.target_x_T[targets],
        target_noises=noise.target_noises[:, targets],
        t=noise.t[rows],
        bc_noise=noise.bc_noise[rows],
        actor_x_T=noise.actor_x_T[rows],
        actor_noises=noise.actor_noises[:, rows],
        coin=noise.coin,
    )
    return Batch(*(x[rows] for x in batch)), chosen
