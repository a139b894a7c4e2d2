"""Diffusion-QL (Wang, Hunt, Zhou, ICLR 2023, arXiv 2208.06193): the paper in one file.

The policy is a diffusion model over actions (section 3.1): a reverse chain of T steps (the paper's
N), eq. 1, turns noise into an action a⁰, given the state s. Training (section 3.2, algorithm 1)
minimises

    L_d(θ) = E ‖ε - ε_θ(√ᾱ_t·a + √(1-ᾱ_t)·ε, s, t)‖²      behaviour cloning              (eq. 2)
    L(θ) = L_d(θ) - α · E[Q_φ(s, a⁰)], α = η / E|Q_φ|     the policy                     (eq. 3)
    L(φ) = E ‖r + γ·min_i Q'_i(s', a'⁰) - Q_i(s, a)‖²     twin critics, i = 1, 2         (eq. 4)

where the gradient of Q flows through the whole chain. Read DiffusionPolicy, TwinCritic, then
DiffusionQL.update. This file needs only torch and numpy: copy it anywhere, and train on arrays.

    agent = DiffusionQL(state_dim, action_dim, eta=1.0)
    data = Transitions(states, actions, next_states, rewards, terminals)
    [losses] = Updates([agent], data, batch_size=256).run(10_000)
    action = agent.act(state)

With the rest of the project beside it, `python dql.py --env antmaze-umaze-v0` trains and evaluates.
Where the paper and the authors' code differ, the code is followed: it made the published scores.
"""

import copy
import math
import random
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Config:
    """What an agent is made with: the paper's values, of which RECIPES changes some per task."""

    eta: float = 1.0  # η, weight of the Q term against behaviour cloning
    max_q_backup: bool = False  # target: the best of 10 sampled actions instead of one (from CQL)
    lr: float = 3e-4  # Adam's learning rate for the policy
    critic_lr: float = 3e-4  # Adam's learning rate for the critics
    grad_norm: float = 1.0  # each gradient is clipped to this global norm; 0: not clipped
    discount: float = 0.99  # γ
    tau: float = 0.005  # how fast the target critics follow
    ema_decay: float = 0.995  # of the averaged policy, which samples the targets' actions
    ema_start: int = 1000  # updates before averaging begins; until then it is the initial policy
    ema_every: int = 5  # updates between averaging steps
    n_timesteps: int = 5  # T, denoising steps
    schedule: str = "vp"  # noise schedule: vp, linear or cosine
    hidden_dim: int = 256  # width of the three hidden layers of policy and critics


class Recipe(NamedTuple):
    eta: float
    max_q_backup: bool
    reward_tune: str  # what is done to rewards: see trainer/data.py
    epochs: int  # of 1000 updates
    grad_norm: float
    top_k: int  # offline model selection takes the BC loss of this rank, 0 the lowest
    lr: float = 3e-4


RECIPES = {  # eta, max-Q backup, rewards, epochs, gradient norm, rank of the BC loss
    "halfcheetah-medium-v2": Recipe(1.0, False, "none", 2000, 9.0, 1),
    "hopper-medium-v2": Recipe(1.0, False, "none", 2000, 9.0, 2),
    "walker2d-medium-v2": Recipe(1.0, False, "none", 2000, 1.0, 1),
    "halfcheetah-medium-replay-v2": Recipe(1.0, False, "none", 2000, 2.0, 0),
    "hopper-medium-replay-v2": Recipe(1.0, False, "none", 2000, 4.0, 2),
    "walker2d-medium-replay-v2": Recipe(1.0, False, "none", 2000, 4.0, 1),
    "halfcheetah-medium-expert-v2": Recipe(1.0, False, "none", 2000, 7.0, 0),
    "hopper-medium-expert-v2": Recipe(1.0, False, "none", 2000, 5.0, 2),
    "walker2d-medium-expert-v2": Recipe(1.0, False, "none", 2000, 5.0, 1),
    "antmaze-umaze-v0": Recipe(0.5, False, "cql", 1000, 2.0, 2),
    "antmaze-umaze-diverse-v0": Recipe(2.0, True, "cql", 1000, 3.0, 2),
    "antmaze-medium-play-v0": Recipe(2.0, True, "cql", 1000, 2.0, 1, lr=1e-3),
    "antmaze-medium-diverse-v0": Recipe(3.0, True, "cql", 1000, 1.0, 1),
    "antmaze-large-play-v0": Recipe(4.5, True, "cql", 1000, 10.0, 2),
    "antmaze-large-diverse-v0": Recipe(3.5, True, "cql", 1000, 7.0, 1),
    "pen-human-v1": Recipe(0.15, False, "normalize", 1000, 7.0, 2, lr=3e-5),
    "pen-cloned-v1": Recipe(0.1, False, "normalize", 1000, 8.0, 2, lr=3e-5),
    "kitchen-complete-v0": Recipe(0.005, False, "none", 250, 9.0, 2),
    "kitchen-partial-v0": Recipe(0.005, False, "none", 1000, 10.0, 2),
    "kitchen-mixed-v0": Recipe(0.005, False, "none", 1000, 10.0, 0),
}

# ---- The networks: a diffusion model over actions given a state (section 3.1), and twin critics --


def beta_schedule(name: str, n_timesteps: int) -> torch.Tensor:
    """β_1..β_T of the forward process: (T,) float64. name: "vp" (the paper's), "linear", "cosine".

    Raises ValueError for an unknown name or n_timesteps < 1.
    """
    if (T := n_timesteps) < 1:
        raise ValueError(f"n_timesteps must be at least 1, not {n_timesteps}")
    if name == "vp":
        t, beta_min, beta_max = torch.arange(1, T + 1, dtype=torch.float64), 0.1, 10.0
        return 1 - torch.exp(-beta_min / T - 0.5 * (beta_max - beta_min) * (2 * t - 1) / T**2)
    if name == "linear":
        return torch.linspace(1e-4, 2e-2, T, dtype=torch.float64)
    if name == "cosine":
        u, s = torch.linspace(0, T + 1, T + 1, dtype=torch.float64), 0.008
        alpha_bar = torch.cos((u / (T + 1) + s) / (1 + s) * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)
    raise ValueError(f"unknown noise schedule {name!r}; known: vp, linear, cosine")


class TimeEmbedding(nn.Module):
    """t -> [sin(t·f_k), cos(t·f_k)], f_k = 10000^(-k/(dim/2-1)): (B,) -> (B, dim)"""

    def __init__(self, dim):
        super().__init__()
        freq = torch.exp(torch.arange(dim // 2) * -(math.log(10000) / (dim // 2 - 1)))
        self.register_buffer("freq", freq, persistent=False)

    def forward(self, t):
        angle = t[:, None] * self.freq
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def hidden_layers(n_inputs, width):
    layers = [nn.Linear(n_inputs, width), nn.Mish(), nn.Linear(width, width), nn.Mish()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.Mish())


class DiffusionPolicy(nn.Module):
    """π_θ(a|s): an action is the end of a reverse diffusion chain a_T -> ... -> a_0, given s.

    Parameter names are those of the released checkpoints. Raises ValueError as beta_schedule does.
    """

    TIME_DIM = 16

    def __init__(
        self, state_dim, action_dim, *, hidden_dim=256, n_timesteps=5, schedule="vp", max_action=1.0
    ):
        super().__init__()
        self.state_dim, self.action_dim, self.max_action = state_dim, action_dim, max_action
        self.n_timesteps, self.schedule = n_timesteps, schedule
        d, h = self.TIME_DIM, hidden_dim
        layers = TimeEmbedding(d), nn.Linear(d, 2 * d), nn.Mish(), nn.Linear(2 * d, d)
        self.time_mlp = nn.Sequential(*layers)
        self.mid_layer = hidden_layers(action_dim + d + state_dim, h)
        self.final_layer = nn.Linear(h, action_dim)

        beta = beta_schedule(schedule, n_timesteps)
        alpha_bar = torch.cumprod(1 - beta, 0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        # Forward process, each row its own t: a_t = √ᾱ_t·a + √(1-ᾱ_t)·ε.
        self.register_buffer("sqrt_alpha_bar", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("sqrt_one_minus_alpha_bar", (1 - alpha_bar).sqrt().float(), False)
        # Reverse process, where all rows have the same t: plain numbers.
        self.x0_from_x = (1 / alpha_bar).sqrt().tolist()  # x̂_0 = √(1/ᾱ)·a_t - √(1/ᾱ-1)·ε_θ
        self.x0_from_eps = (1 / alpha_bar - 1).sqrt().tolist()
        # The posterior q(a_{t-1} | a_t, x̂_0) has this mean and standard deviation.
        self.mean_from_x0 = (beta * alpha_bar_prev.sqrt() / (1 - alpha_bar)).tolist()
        self.mean_from_x = ((1 - alpha_bar_prev) * (1 - beta).sqrt() / (1 - alpha_bar)).tolist()
        self.sigma = variance.clamp(min=1e-20).sqrt().tolist()

    def predict_noise(self, x, t, state):
        """ε_θ(a_t, s, t): x (B,A), t (B,) int64, the paper's t - 1, state (B,S) -> (B,A)"""
        return self.final_layer(self.mid_layer(torch.cat([x, self.time_mlp(t), state], dim=1)))

    def bc_loss(self, state, action, *, t=None, noise=None):
        """Behaviour cloning, L_d (eq. 2), the mean over batch and action dimensions: -> ()

        state (B,S), action (B,A). Drawn where not given: t (B,) int64 ~ U{0..T-1} and
        noise (B,A) ~ N(0, 1).
        """
        if t is None:
            t = torch.randint(self.n_timesteps, (len(action),), device=action.device)
        noise = torch.randn_like(action) if noise is None else noise
        scale, spread = self.sqrt_alpha_bar[t, None], self.sqrt_one_minus_alpha_bar[t, None]
        return F.mse_loss(self.predict_noise(scale * action + spread * noise, t, state), noise)

    def sample(self, state, *, x_T=None, noises=None):
        """The reverse chain, differentiable through all T steps: state (B,S) -> (n·B, A).

        Eq. 1 as released: x̂_0 is clipped, and the noise has the posterior's deviation, not √β.
        Actions lie within ±max_action. x_T (n·B, A) is the starting noise, row b·n+j belonging to
        state b; noises (T, n·B, A) are added after each step, noises[0] first, the last one never.
        Both are drawn where not given, with n = 1.
        """
        x_T = state.new_empty(len(state), self.action_dim).normal_() if x_T is None else x_T
        noises = x_T.new_empty(self.n_timesteps, *x_T.shape).normal_() if noises is None else noises
        state = state.repeat_interleave(len(x_T) // max(len(state), 1), dim=0)
        x, m = x_T, self.max_action
        for k, t in enumerate(reversed(range(self.n_timesteps))):
            epsilon = self.predict_noise(x, torch.full((len(x),), t, device=x.device), state)
            x0 = (self.x0_from_x[t] * x - self.x0_from_eps[t] * epsilon).clamp(-m, m)
            x = self.mean_from_x0[t] * x0 + self.mean_from_x[t] * x
            if t > 0:
                x = x + self.sigma[t] * noises[k]
        return x.clamp(-m, m)


class TwinCritic(nn.Module):
    """Two independent Q(s, a). Parameter names are those of the released checkpoints."""

    def __init__(self, state_dim, action_dim, *, hidden_dim=256):
        super().__init__()
        self.state_dim, self.action_dim, h = state_dim, action_dim, hidden_dim
        self.q1_model = nn.Sequential(*hidden_layers(state_dim + action_dim, h), nn.Linear(h, 1))
        self.q2_model = nn.Sequential(*hidden_layers(state_dim + action_dim, h), nn.Linear(h, 1))

    def forward(self, state, action):
        """state (B,S), action (n·B, A), row b·n+j belonging to state b -> q1, q2, each (n·B, 1)"""
        state = state.repeat_interleave(len(action) // max(len(state), 1), dim=0)
        x = torch.cat([state, action], dim=1)
        return self.q1_model(x), self.q2_model(x)


# ---- Diffusion-QL (section 3.2, algorithm 1) -----------------------------------------------------


class Batch(NamedTuple):
    state: torch.Tensor  # (B,S)
    action: torch.Tensor  # (B,A)
    next_state: torch.Tensor  # (B,S)
    reward: torch.Tensor  # (B,1)
    not_done: torch.Tensor  # (B,1), 0 where s' is terminal; a time-out is not

    @classmethod
    def of(cls, columns, S, A, like) -> "Batch":
        """Arrays of any kind as tensors like `like`. Raises ValueError where shapes do not fit."""
        x = [torch.as_tensor(c, dtype=like.dtype, device=like.device).detach() for c in columns]
        x[3:] = (c[:, None] if c.dim() == 1 else c for c in x[3:])
        B, shapes = len(x[0]), [tuple(c.shape) for c in x]
        if shapes != [(B, S), (B, A), (B, S), (B, 1), (B, 1)] or not B:
            raise ValueError(f"not (B,{S}) (B,{A}) (B,{S}) (B,1) (B,1) with B > 0, but {shapes}")
        return cls(*x)


@dataclass
class UpdateNoise:
    """All randomness of an update. n is 10 with max-Q backup, else 1; row b·n+j is of state b."""

    target_x_T: torch.Tensor  # (n·B, A)
    target_noises: torch.Tensor  # (T, n·B, A)
    t: torch.Tensor  # (B,) int64
    bc_noise: torch.Tensor  # (B, A)
    actor_x_T: torch.Tensor  # (B, A)
    actor_noises: torch.Tensor  # (T, B, A)
    coin: float  # above 0.5, Q1 is climbed and Q2 normalises; else the other way round


class DiffusionQL:
    """The agent: a diffusion policy, its moving average, twin critics and their targets.

    config: fields of Config. seed: of the initial weights and of everything drawn later.
    """

    algo = "ql"
    MAX_Q_SAMPLES = 10
    NETWORKS = "policy", "policy_ema", "critic", "critic_target"
    OPTIMIZERS = "policy_optimizer", "critic_optimizer"

    def __init__(self, state_dim, action_dim, *, max_action=1.0, device="cpu", seed=0, **config):
        self.config = c = Config(**config)
        self.device, self.seed, self.step = torch.device(device), int(seed), 0
        self.n_target_samples = self.MAX_Q_SAMPLES if c.max_q_backup else 1
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        chain = dict(n_timesteps=c.n_timesteps, schedule=c.schedule, max_action=max_action)
        with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the same on every device
            torch.manual_seed(self.seed)
            policy = DiffusionPolicy(state_dim, action_dim, hidden_dim=c.hidden_dim, **chain)
            critic = TwinCritic(state_dim, action_dim, hidden_dim=c.hidden_dim)
        self.policy, self.critic = policy.to(self.device), critic.to(self.device)
        self.policy_ema = copy.deepcopy(self.policy).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.batch_kind = state_dim, action_dim, self.policy.final_layer.bias
        self.policy_optimizer = adam(self.policy, c.lr)
        self.critic_optimizer = adam(self.critic, c.critic_lr)

    def update(self, batch, noise: UpdateNoise | None = None) -> dict:
        """Algorithm 1: a step of critics, policy and averages on a batch (Batch, or its fields).

        Returns {name: 0-d tensor}, the losses, the mean Q that is climbed and the gradients' norms
        before clipping. Raises ValueError as Batch.of does.
        """
        s, a, s2, r, not_done = Batch.of(batch, *self.batch_kind)
        noise = self.draw_noise(len(s)) if noise is None else noise

        # Target: y = r + γ·min_i Q'_i(s', a'), a' sampled by the averaged policy. With max-Q backup
        # each Q'_i is its best over several a'.
        with torch.no_grad():
            a2 = self.policy_ema.sample(s2, x_T=noise.target_x_T, noises=noise.target_noises)
            target_q = self.critic_target(s2, a2)
            target_q = [q.view(len(s), -1).amax(dim=1, keepdim=True) for q in target_q]
            target = r + self.config.discount * not_done * torch.min(*target_q)

        # Critics: the squared Bellman error (eq. 4).
        q1, q2 = self.critic(s, a)
        critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        critic_grad_norm = self.gradient_step(self.critic_optimizer, critic_loss)

        # Policy: stay near the data (eq. 2), and climb the Q just updated through the whole chain
        # (eq. 3). A coin says which critic; the other's mean |Q| takes the rewards' scale out of η
        # (in the paper, at the data's actions). Only the actions get Q's gradient, no critic does.
        bc_loss = self.policy.bc_loss(s, a, t=noise.t, noise=noise.bc_noise)
        action = self.policy.sample(s, x_T=noise.actor_x_T, noises=noise.actor_noises)
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        q1, q2 = torch.func.functional_call(self.critic, frozen, (s, action))
        q, other = (q1, q2) if noise.coin > 0.5 else (q2, q1)
        q_loss = -q.mean() / other.abs().mean().detach()
        actor_loss = bc_loss + self.config.eta * q_loss
        actor_grad_norm = self.gradient_step(self.policy_optimizer, actor_loss)

        # Averages: the target critics follow every update, the averaged policy when it is due.
        self.move_averages()
        metrics = {"critic_loss": critic_loss, "critic_grad_norm": critic_grad_norm}
        metrics |= {"bc_loss": bc_loss, "q_loss": q_loss, "q_mean": q.mean()}
        metrics |= {"actor_loss": actor_loss, "actor_grad_norm": actor_grad_norm}
        return {name: value.detach() for name, value in metrics.items()}

    def gradient_step(self, optimizer, loss) -> torch.Tensor:
        """One step on loss, its gradient clipped -> the gradient's norm before clipping, ()"""
        optimizer.zero_grad()
        loss.backward()
        limit = self.config.grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit, foreach=True)
        optimizer.step()
        return norm

    @torch.no_grad()
    def move_averages(self):
        """End an update: average <- (1 - rate)·average + rate·current."""
        pairs = [] if self.algo == "bc" else [(self.critic_target, self.critic, self.config.tau)]
        if self.policy_average_is_due():
            pairs.append((self.policy_ema, self.policy, 1 - self.config.ema_decay))
        for average, current, rate in pairs:
            for a, p in zip(average.parameters(), current.parameters()):
                a.lerp_(p, rate)
        self.step += 1

    def policy_average_is_due(self) -> bool:
        """Whether the averaged policy moves in the update to come."""
        return self.step >= self.config.ema_start and self.step % self.config.ema_every == 0

    def draw_noise(self, batch_size: int) -> UpdateNoise:
        """The randomness of the update to come."""
        T, A = self.config.n_timesteps, self.policy.action_dim
        B, n = batch_size, self.n_target_samples
        t = torch.randint(T, (B,), generator=self.generator, device=self.device)
        rows = B + (T + 1) * (B + n * B)
        normals = torch.randn(rows, A, generator=self.generator, device=self.device)
        bc, actor, target = normals.split([B, (T + 1) * B, (T + 1) * n * B])
        actor, target = actor.view(T + 1, B, A), target.view(T + 1, n * B, A)
        return UpdateNoise(target[0], target[1:], t, bc, actor[0], actor[1:], self.flip_coin())

    def flip_coin(self) -> float:
        """1.0 or 0.0, a function of seed and step: one drawn by a GPU would be waited for."""
        return float(random.Random(self.seed << 32 | self.step).random() > 0.5)

    @torch.no_grad()
    def act(self, state, n_candidates=50, *, generator=None):
        """Of n_candidates samples for each state, one is drawn by the softmax of min Q'_i.

        state (S,) or (N,S), numpy or torch -> (A,) or (N,A) of the same kind. generator: else the
        agent's own, from which training draws too. Raises ValueError for another S.
        """
        states, S = torch.as_tensor(state, dtype=torch.float32), self.policy.state_dim
        if states.shape[-1:] != (S,):
            raise ValueError(f"states have {S} numbers each, not the shape {tuple(states.shape)}")
        flat, generator = states.to(self.device).view(-1, S), generator or self.generator
        shape = self.config.n_timesteps + 1, n_candidates * len(flat), self.policy.action_dim
        noise = torch.randn(*shape, generator=generator, device=self.device)
        actions, q = self.propose(flat, noise)
        pick = torch.multinomial(q.softmax(dim=1), 1, generator=generator)
        action = actions.take_along_dim(pick[:, :, None], dim=1).view(*states.shape[:-1], shape[2])
        return action.to(state.device) if torch.is_tensor(state) else action.cpu().numpy()

    def propose(self, state, noise):
        """n actions for each state (N,S) of noise (T+1, n·N, A), and their Q: (N,n,A), (N,n)"""
        actions = self.policy.sample(state, x_T=noise[0], noises=noise[1:])
        q = torch.min(*self.critic_target(state, actions))
        n = len(actions) // len(state) if len(state) else 1
        return actions.view(len(state), n, self.policy.action_dim), q.view(len(state), n)

    def networks(self) -> dict:
        return {name: getattr(self, name) for name in self.NETWORKS}

    def state_dict(self) -> dict:
        """{name: copy}, all that an exact resume needs: weights, Adam's moments, randomness."""
        state = {"step": torch.tensor(self.step), "seed": torch.tensor(self.seed)}
        state["generator"] = self.generator.get_state()
        for name, module in self.networks().items():
            state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for name in self.OPTIMIZERS:
            moments = list(getattr(self, name).state.values())
            state[f"{name}.step"] = moments[0]["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{key}"] = torch.cat([m[key].flatten() for m in moments])
        return {name: value.clone() for name, value in state.items()}

    def load_state_dict(self, state: dict, *, weights_only=False):
        """Restore, in place, the state_dict() of an agent of the same Config; weights_only: the
        networks alone, for acting. Raises KeyError or RuntimeError: a name or a shape is wrong."""
        for name, module in self.networks().items():
            own = {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
            module.load_state_dict(own)
        if weights_only:
            return
        for name in self.OPTIMIZERS:
            moments = list(getattr(self, name).state.values())
            for key in ("exp_avg", "exp_avg_sq"):
                saved = state[f"{name}.{key}"].split([m[key].numel() for m in moments])
                for m, value in zip(moments, saved):
                    m[key].copy_(value.view_as(m[key]))
            for m in moments:
                m["step"].copy_(state[f"{name}.step"])
        self.step, self.seed = int(state["step"]), int(state.get("seed", self.seed))
        self.generator.set_state(state["generator"])


class DiffusionBC(DiffusionQL):
    """Cloning alone, the paper's Diffusion-BC: the critics are neither trained nor asked."""

    algo = "bc"

    def update(self, batch, noise: UpdateNoise | None = None) -> dict:
        """One step on L_d (eq. 2); arguments and result as DiffusionQL.update's."""
        s, a, *_ = Batch.of(batch, *self.batch_kind)
        noise = self.draw_noise(len(s)) if noise is None else noise
        loss = self.policy.bc_loss(s, a, t=noise.t, noise=noise.bc_noise)
        grad_norm = self.gradient_step(self.policy_optimizer, loss)
        self.move_averages()
        return {"bc_loss": loss.detach(), "actor_grad_norm": grad_norm}

    def act(self, state, n_candidates=1, *, generator=None):
        """One sample for each state, whatever n_candidates; else as DiffusionQL.act."""
        return super().act(state, 1, generator=generator)

    def propose(self, state, noise):
        actions = self.policy.sample(state, x_T=noise[0], noises=noise[1:])
        return actions[:, None], torch.zeros_like(actions[:, :1])


def adam(module: nn.Module, lr: float) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    for p in module.parameters():  # create the state now: loading a checkpoint writes into it
        zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
    return optimizer


class Transitions:
    """A data set on the device, sampled uniformly with replacement."""

    def __init__(self, state, action, next_state, reward, terminal, device="cpu"):
        """Arrays, tensors or lists (N,S), (N,A) within ±max_action, (N,S), and (N,) or (N,1): the
        reward, and 1 where s' is terminal. Raises ValueError as Batch.of does."""
        S, A, like = np.shape(state)[-1], np.shape(action)[-1], torch.empty(0, device=device)
        x = Batch.of((state, action, next_state, reward, terminal), S, A, like)
        self.columns = [c.contiguous() for c in (*x[:4], 1 - x[4])]
        for name, c in zip(Batch._fields, self.columns):
            if not c.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity: leave those rows out")

    def __len__(self):
        return len(self.columns[0])

    def sample(self, batch_size, generator) -> Batch:
        device = self.columns[0].device
        index = torch.randint(len(self), (batch_size,), generator=generator, device=device)
        return Batch(*(column.index_select(0, index) for column in self.columns))


class Updates:
    """Updates of one or several agents, each on minibatches of its own."""

    def __init__(self, agents, transitions, batch_size):
        self.agents, self.transitions, self.batch_size = agents, transitions, batch_size
        limit, most = agents[0].policy.max_action, float(transitions.columns[1].abs().max())
        if most > 1.001 * limit:  # no policy could imitate those
            raise ValueError(f"actions reach ±{most:.4g}, the policy's ±{limit}: scale the data's")

    def run(self, n: int) -> list[dict]:
        """n updates of each agent -> for each the mean of every metric over them, 0-d tensors."""
        sums = [{} for _ in self.agents]
        for _ in range(n):
            for agent, total in zip(self.agents, sums):
                metrics = agent.update(self.transitions.sample(self.batch_size, agent.generator))
                total |= {name: total.get(name, 0.0) + v for name, v in metrics.items()}
        return [{name: v / n for name, v in total.items()} for total in sums]


def main(argv: list[str] | None = None) -> int:
    try:
        from trainer.command import main as run
    except ImportError as e:
        sys.exit(f"error: the command line needs the whole project and its requirements.txt: {e}")
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
