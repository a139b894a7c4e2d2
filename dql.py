"""Diffusion-QL (Wang, Hunt, Zhou, ICLR 2023, arXiv 2208.06193) in one file that reads like the paper.

A diffusion model is the policy; a learned Q pulls it uphill through the whole reverse chain:

    L(θ) = L_bc(θ) - η · E[Q(s, a⁰)],   a⁰ ~ π_θ(·|s) sampled in T denoising steps            (paper, eq. 2-4)

    python dql.py --env antmaze-umaze-v0                # the paper's recipe for the task
    python dql.py --env antmaze-umaze-v0 --quick        # a recipe for a laptop: 15k updates, higher, decaying rates
    python dql.py --env antmaze-umaze-v0 --seeds 0 1 2  # three agents side by side, a run each
    python dql.py --env pen-human-v1                    # any of the paper's twenty D4RL tasks; --env x lists the nearest
    python dql.py --eval runs/NAME --render ant.gif     # evaluate a finished run and film it
    python dql.py --export runs/NAME policy.pt2         # its policy, for use without this project

The algorithm (everything above "The run") needs torch and numpy alone: copy this file and call
`DiffusionQL(...).update(batch)` and `.act(state)`.

Where the paper and the authors' released code differ, the released code made the published scores and is followed.
Where this file differs from the released code, a comment says "Differs". In short: offline model selection uses the
rank the paper describes (the released index is reported beside it), learning-rate decay is per epoch when asked for,
and every evaluation episode draws its own maze goal. The arithmetic of an update is the same, to rounding.
"""

import argparse
import copy
import functools
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

# ---------------------------------------------------------------------------------------------------------------------
# Config: every field is also a command-line option; the recipe of the chosen task supplies the defaults
# ---------------------------------------------------------------------------------------------------------------------


class UserError(RuntimeError):
    """Bad input. The message is one line: what is wrong and what to do about it."""


@dataclass
class Config:
    env: str = "antmaze-umaze-v0"  # D4RL task name; an unknown one lists the nearest
    algo: str = "ql"  # ql: Diffusion-QL; bc: behaviour cloning with the same diffusion policy
    data: str = "auto"  # auto: D4RL's file, else download, else generate; or d4rl, generated, minari:NAME, or the path of an HDF5 file
    repair_data: bool = False  # antmaze: read D4RL's file without its known defects; published scores are of the file as it is
    n_generated: int = 1_000_000  # transitions to generate where D4RL's file is not used
    seed: int = 0  # of everything: initial weights, minibatches, noise, evaluation
    seeds: tuple[int, ...] = ()  # instead of seed: as many agents side by side on the same data, each as if alone, a run each
    quick: bool = False  # 15 epochs, rates 3e-3, 1e-3 decaying to 0, tau 0.02, 0.1·η, at most 50 episodes; mazes: max-Q, sparse
    out: str = "runs"  # folder that gets one folder per run
    device: str = "auto"  # auto: cuda when there is one; or cpu, cuda, cuda:1, ...
    threads: int = 0  # CPU threads for torch and MuJoCo; 0: all cores
    backend: str = "auto"  # eager; compile (torch.compile, on a GPU in a CUDA graph); graph; fused (kernels); auto: fused, graph, eager
    precision: str = "fp16"  # of the fused kernels' matrix products: fp16, tf32, fp16x3 (float32's accuracy) or fp32
    matmul_precision: str = "highest"  # of float32 products: highest, high (TF32) or medium (bfloat16, on CPUs that have it)

    epochs: int = 1000  # of updates_per_epoch updates each
    updates_per_epoch: int = 1000  # the paper calls 1000 gradient steps an epoch
    eval_every: int = 50  # epochs between evaluations
    eval_episodes: int = 100  # 100 for sparse rewards, 10 for locomotion, as the authors
    batch_size: int = 256  # transitions per update, uniform with replacement

    n_timesteps: int = 5  # T, denoising steps; 5 keeps what 50 gives (paper, appendix)
    schedule: str = "vp"  # noise schedule: vp, linear or cosine
    hidden_dim: int = 256  # width of the three hidden layers of policy and critics
    eta: float = 1.0  # η, weight of the Q term against behaviour cloning
    max_q_backup: bool = False  # target: the best of 10 sampled actions instead of one (CQL's max-Q backup)
    reward_tune: str = "none"  # none, cql, sparse, normalize, iql_antmaze, antmaze or iql_locomotion
    lr: float = 3e-4  # Adam's rate for the policy
    critic_lr: float = 3e-4  # Adam's rate for the critics
    lr_decay: str = "none"  # none; cosine: to 0 over the run, per epoch; released: the same cosine, stepped per evaluation
    grad_norm: float = 1.0  # global norm to which each gradient is clipped; 0: not clipped
    discount: float = 0.99  # γ
    tau: float = 0.005  # rate of the target critics
    ema_decay: float = 0.995  # of the policy used for targets
    ema_start: int = 1000  # updates before the averaging begins
    ema_every: int = 5  # updates between averaging steps

    n_candidates: int = 50  # actions sampled per state when acting; one is picked by softmax of Q
    top_k: int = 1  # offline selection takes the evaluation whose BC loss has this rank (0: the smallest)

    resume: tuple[str, ...] = ()  # folder of an interrupted run to continue, bit for bit; or of several that differ in their seeds
    eval: str = ""  # folder of a run to evaluate instead of training
    export: tuple[str, ...] = ()  # RUN FILE.pt2: instead of training, write a run's policy for use without this project
    which: str = "last"  # with --eval and --export: last, best, offline or offline_released
    episodes: int = 0  # with --eval: episodes to run; 0: eval_episodes
    render: str = ""  # with --eval: a .gif to film one episode into


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: the paper's table of hyperparameters (gn: gradient clip; top_k: rank for offline selection)
# ---------------------------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    eta: float
    max_q_backup: bool
    reward_tune: str
    epochs: int
    grad_norm: float
    top_k: int
    lr: float = 3e-4


RECIPES = {
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


def recipe_config(env: str, quick: bool = False) -> Config:
    """The paper's recipe for a task, or the quick one."""
    config = Config(env=env, quick=quick, **RECIPES[env]._asdict())
    if "v2" in env:
        config = replace(config, eval_episodes=10)
    if quick:
        # In 15k updates the paper's τ = 0.005 carries a reward 75 Bellman steps back; the maze is 160 steps long.
        config = replace(config, epochs=15, eval_every=5, lr=3e-3, critic_lr=1e-3, tau=0.02, lr_decay="cosine")
        config = replace(config, eval_episodes=min(config.eval_episodes, 50), matmul_precision="medium")
        # Q is wrong for much of so short a run, so it pulls the policy a tenth as hard, and mostly chooses among candidates.
        config = replace(config, eta=0.1 * config.eta)
        if config.reward_tune == "cql":
            # Q need not first fall to -200 everywhere, and chooses among ten actions for the target too.
            config = replace(config, reward_tune="sparse", max_q_backup=True)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Noise schedule
# ---------------------------------------------------------------------------------------------------------------------


def beta_schedule(name: str, n_timesteps: int) -> torch.Tensor:
    """β_1..β_T of the forward process, (T,) float32, computed in float64. name: "vp" (paper, sec. 3), "linear", "cosine".

    Raises ValueError for an unknown name or n_timesteps < 1.
    """
    return _betas(name, n_timesteps).float()


def _betas(name: str, n_timesteps: int) -> torch.Tensor:
    if n_timesteps < 1:
        raise ValueError(f"n_timesteps must be at least 1, not {n_timesteps}")
    T = n_timesteps
    if name == "vp":
        t, b_min, b_max = torch.arange(1, T + 1, dtype=torch.float64), 0.1, 10.0
        return 1 - torch.exp(-b_min / T - 0.5 * (b_max - b_min) * (2 * t - 1) / T**2)
    if name == "linear":
        return torch.linspace(1e-4, 2e-2, T, dtype=torch.float64)
    if name == "cosine":
        u, s = torch.linspace(0, T + 1, T + 1, dtype=torch.float64), 0.008
        alpha_bar = torch.cos((u / (T + 1) + s) / (1 + s) * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)
    raise ValueError(f"unknown noise schedule {name!r}; known: vp, linear, cosine")


# ---------------------------------------------------------------------------------------------------------------------
# The policy: a conditional denoising diffusion model over actions
# ---------------------------------------------------------------------------------------------------------------------


class _OneExpMish(torch.autograd.Function):
    """mish(x) = x·tanh(softplus(x)) = x·k/(k+1) with k = e + e²/2, e = exp(x): one exponential where ATen takes three.

    Two fifths of a CPU update was mish and its backward. Beyond x = 30 the quotient is 1 in float32. The derivative,
    k/(k+1) - x·(e - 2k)/(k+1)², is made on the way, so that one tensor is kept for the backward pass and not three. The result
    takes x's place: fresh memory costs more than the arithmetic.
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
    """On a CPU x is overwritten, as with nn.Mish(inplace=True)."""

    def forward(self, x):
        if x.device.type != "cpu":
            return F.mish(x)
        if torch.compiler.is_compiling():  # the compiler fuses the plain formula, and differentiates it
            e = x.clamp(max=30.0).exp()
            k = e + 0.5 * e * e
            return x * (k / (k + 1))
        if torch.is_grad_enabled() and x.requires_grad:
            return _OneExpMish.apply(x)
        e = x.clamp(max=30.0).exp_()
        k = e.addcmul_(e, e, value=0.5)
        return x.mul_(k.div_(k + 1))


class SinusoidalEmbedding(nn.Module):
    """t -> [sin(t·f_k), cos(t·f_k)], f_k = 10000^(-k/(dim/2-1)). (B,) -> (B, dim)"""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.register_buffer("freq", torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1))), persistent=False)

    def forward(self, t):
        angle = t[:, None] * self.freq
        return torch.cat([angle.sin(), angle.cos()], dim=1)


CPU_ROWS = 512  # rows whose activations stay in a core's cache


def in_pieces(f, state, x_T, noises):
    """f(state, x_T, noises) -> rows like x_T's, on a CPU computed CPU_ROWS rows at a time when no gradient is wanted.

    Twice as fast as all at once for thousands of rows. n = len(x_T)/len(state) rows belong to each state.
    """
    n = len(x_T) // len(state)
    size = max(1, CPU_ROWS // n)
    if len(state) <= size or state.device.type != "cpu" or torch.is_grad_enabled():
        return f(state, x_T, noises)
    pieces = ((slice(i, i + size), slice(i * n, (i + size) * n)) for i in range(0, len(state), size))
    return torch.cat([f(state[states], x_T[rows], noises[:, rows]) for states, rows in pieces])


class DiffusionPolicy(nn.Module):
    """π_θ(a|s): actions are the end of a reverse diffusion chain a_T -> ... -> a_0 conditioned on the state.

    Parameter names are those of the released checkpoints. Raises ValueError for an unknown schedule or n_timesteps < 1.
    """

    TIME_DIM = 16

    def __init__(self, state_dim, action_dim, *, hidden_dim=256, n_timesteps=5, schedule="vp", max_action=1.0):
        super().__init__()
        self.state_dim, self.action_dim, self.max_action = state_dim, action_dim, max_action
        self.n_timesteps, self.schedule = n_timesteps, schedule
        d, h = self.TIME_DIM, hidden_dim
        self.time_mlp = nn.Sequential(SinusoidalEmbedding(d), nn.Linear(d, 2 * d), Mish(), nn.Linear(2 * d, d))
        self.mid_layer = nn.Sequential(
            nn.Linear(action_dim + d + state_dim, h), Mish(), nn.Linear(h, h), Mish(), nn.Linear(h, h), Mish()
        )
        self.final_layer = nn.Linear(h, action_dim)

        beta = _betas(schedule, n_timesteps)
        alpha_bar = torch.cumprod(1 - beta, 0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        self.register_buffer("sqrt_alpha_bar", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("sqrt_one_minus_alpha_bar", (1 - alpha_bar).sqrt().float(), persistent=False)
        # The chain's coefficients are Python numbers: t is the same for a whole batch, so nothing has to be gathered.
        self.x0_from_x = (1 / alpha_bar).sqrt().tolist()  # x̂_0 = √(1/ᾱ)·a_t - √(1/ᾱ-1)·ε̂
        self.x0_from_eps = (1 / alpha_bar - 1).sqrt().tolist()
        self.mean_from_x0 = (beta * alpha_bar_prev.sqrt() / (1 - alpha_bar)).tolist()  # posterior q(a_{t-1}|a_t, x̂_0)
        self.mean_from_x = ((1 - alpha_bar_prev) * (1 - beta).sqrt() / (1 - alpha_bar)).tolist()
        self.sigma = variance.clamp(min=1e-20).sqrt().tolist()

    def _condition(self, state, n_rows):
        """What of the first layer does not change along the chain: the state's share (n_rows, H) and that of each t (T, H).

        The first layer is linear in [a, time, s], so both are computed once per chain instead of once per step.
        """
        first = self.mid_layer[0]
        w_action, w_time, w_state = first.weight.split([self.action_dim, self.TIME_DIM, self.state_dim], dim=1)
        time_share = F.linear(self.time_mlp(torch.arange(self.n_timesteps, device=state.device)), w_time, first.bias)
        state_share = F.linear(state, w_state)
        if n_rows != len(state):
            state_share = state_share.repeat_interleave(n_rows // len(state), 0)
        return w_action.t(), time_share, state_share

    def _noise(self, x, t, condition):
        w_action, time_share, state_share = condition
        h = torch.addmm(state_share, x, w_action).add_(time_share[t])
        for layer in self.mid_layer[1:]:
            h = layer(h)
        return self.final_layer(h)

    def predict_noise(self, x, t, state):
        """ε_θ(a_t, t, s): x (B,A), t (B,) int64 in 0..T-1, state (B,S) -> (B,A)."""
        return self._noise(x, t, self._condition(state, len(x)))

    def bc_loss(self, state, action, *, t=None, noise=None):
        """Behaviour cloning, eq. 1: E‖ε - ε_θ(√ᾱ_t·a + √(1-ᾱ_t)·ε, t, s)‖², mean over batch and action dimensions. -> ()

        state (B,S), action (B,A); t (B,) int64 ~ U{0..T-1} and noise (B,A) ~ N(0,1) are drawn where not given.
        """
        if t is None:
            t = torch.randint(self.n_timesteps, (len(action),), device=action.device)
        if noise is None:
            noise = torch.randn_like(action)
        x_t = self.sqrt_alpha_bar[t, None] * action + self.sqrt_one_minus_alpha_bar[t, None] * noise
        return F.mse_loss(self.predict_noise(x_t, t, state), noise)

    def sample(self, state, *, x_T=None, noises=None):
        """The reverse chain: state (B,S) -> actions (n·B, A) within ±max_action, differentiable through all T steps.

        x_T (n·B, A) is the starting noise, row b·n+j belonging to state b (n = 1 where it is drawn here); noises (T, n·B, A):
        noises[k] is used at iteration k, timestep T-1-k; the last is ignored, since the last step adds none.
        """
        if x_T is None:
            x_T = torch.randn(len(state), self.action_dim, device=state.device, dtype=state.dtype)
        if noises is None:
            noises = torch.randn(self.n_timesteps, *x_T.shape, device=state.device, dtype=state.dtype)
        return in_pieces(self._chain, state, x_T, noises)

    def _chain(self, state, x_T, noises):
        condition = self._condition(state, len(x_T))
        x, m = x_T, self.max_action
        for k, t in enumerate(reversed(range(self.n_timesteps))):
            epsilon = self._noise(x, t, condition)
            x0 = torch.sub(x * self.x0_from_x[t], epsilon, alpha=self.x0_from_eps[t]).clamp(-m, m)
            x = torch.add(x0 * self.mean_from_x0[t], x, alpha=self.mean_from_x[t])
            if t > 0:
                x = torch.add(x, noises[k], alpha=self.sigma[t])
        return x.clamp(-m, m)


# ---------------------------------------------------------------------------------------------------------------------
# The critic
# ---------------------------------------------------------------------------------------------------------------------


class TwinCritic(nn.Module):
    """Two independent Q(s, a), each three hidden layers of Mish. Parameter names are those of the released checkpoints."""

    def __init__(self, state_dim, action_dim, *, hidden_dim=256):
        super().__init__()
        self.state_dim, self.action_dim = state_dim, action_dim

        def q_model():
            d, h = state_dim + action_dim, hidden_dim
            hidden = [nn.Linear(d, h), Mish(), nn.Linear(h, h), Mish(), nn.Linear(h, h), Mish()]
            return nn.Sequential(*hidden, nn.Linear(h, 1))

        self.q1_model, self.q2_model = q_model(), q_model()

    def forward(self, state, action):
        """state (B,S), action (n·B, A), row b·n+j belonging to state b -> q1, q2, each (n·B, 1)."""
        if len(action) != len(state):
            state = state.repeat_interleave(len(action) // len(state), 0)
        x = torch.cat([state, action], dim=1)
        return self.q1_model(x), self.q2_model(x)

    def single(self, weights, state, action):
        """One critic, its weights a flat vector in the order of q1_model's parameters: (B,S), (B,A) -> (B,1)."""
        parameters = dict(self.q1_model.named_parameters())
        views = (w.view_as(p) for w, p in zip(weights.split([p.numel() for p in parameters.values()]), parameters.values()))
        return functional_call(self.q1_model, dict(zip(parameters, views)), torch.cat([state, action], dim=1))


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion-QL
# ---------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    state: torch.Tensor  # (B,S)
    action: torch.Tensor  # (B,A)
    next_state: torch.Tensor  # (B,S)
    reward: torch.Tensor  # (B,1)
    not_done: torch.Tensor  # (B,1), 0 where the episode ended


@dataclass
class UpdateNoise:
    """All the randomness of one update; with max-Q backup n = 10 target rows belong to each state, b·n+j to state b."""

    target_x_T: torch.Tensor | None  # (n·B, A)
    target_noises: torch.Tensor | None  # (T, n·B, A)
    t: torch.Tensor  # (B,) int64
    bc_noise: torch.Tensor  # (B, A)
    actor_x_T: torch.Tensor | None  # (B, A)
    actor_noises: torch.Tensor | None  # (T, B, A)
    coin: torch.Tensor | None  # (): above 0.5, Q1 is climbed and Q2 normalises; else the other way round


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Move a module's parameters into one vector, of which they become views: clipping, Adam and EMA then are one pass."""
    parameters = list(module.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for p, view in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.data = view.view_as(p)
    return nn.Parameter(flat, requires_grad=parameters[0].requires_grad)


class DiffusionQL:
    """The agent: a diffusion policy, its moving average, twin critics and their targets (paper, algorithm 1).

    algo "bc" trains and acts with the policy alone. lr_decay_every > 0 multiplies both rates by
    ½(1 + cos(π·(step // lr_decay_every) / lr_decay_steps)), stopping at 0. All random numbers come from `generator`, or from the
    caller. Nothing in an update waits for the device.
    """

    MAX_Q_SAMPLES = 10

    def __init__(
        self,
        state_dim,
        action_dim,
        *,
        max_action=1.0,
        device="cpu",
        algo="ql",
        discount=0.99,
        tau=0.005,
        eta=1.0,
        lr=3e-4,
        critic_lr=3e-4,
        lr_decay_every=0,
        lr_decay_steps=1,
        grad_norm=1.0,
        max_q_backup=False,
        n_timesteps=5,
        schedule="vp",
        ema_decay=0.995,
        ema_start=1000,
        ema_every=5,
        hidden_dim=256,
        seed=0,
    ):
        if algo not in ("ql", "bc"):
            raise ValueError(f"unknown algo {algo!r}; known: ql, bc")
        self.device, self.algo, self.seed = torch.device(device), algo, seed
        self.discount, self.tau, self.eta, self.grad_norm = discount, tau, eta, grad_norm
        self.lr, self.critic_lr, self.lr_decay_every, self.lr_decay_steps = lr, critic_lr, lr_decay_every, lr_decay_steps
        self.ema_decay, self.ema_start, self.ema_every = ema_decay, ema_start, ema_every
        self.n_target_samples = self.MAX_Q_SAMPLES if max_q_backup else 1

        with torch.random.fork_rng(devices=[]):  # the weights are drawn on the CPU, so they are the same on any device
            torch.manual_seed(seed)
            self.policy = DiffusionPolicy(
                state_dim, action_dim, hidden_dim=hidden_dim, n_timesteps=n_timesteps, schedule=schedule, max_action=max_action
            ).to(self.device)
            self.critic = TwinCritic(state_dim, action_dim, hidden_dim=hidden_dim).to(self.device)
        self.policy_ema = copy.deepcopy(self.policy).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

        self.policy_vector, self.policy_ema_vector = map(flatten_parameters, (self.policy, self.policy_ema))
        self.critic_vector, self.critic_target_vector = map(flatten_parameters, (self.critic, self.critic_target))
        self.policy_optimizer = self._adam(self.policy_vector, lr)
        self.critic_optimizer = self._adam(self.critic_vector, critic_lr)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._fused = None  # what acts instead of plain torch: a kernels.FusedActor, for "bc" a kernels.FusedSampler
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)

    def _adam(self, vector, lr):
        # On a GPU rate and step count live there, so that an update can be captured in a CUDA graph.
        on_gpu = self.device.type == "cuda"
        rate = torch.tensor(lr, device=self.device) if on_gpu else lr
        optimizer = torch.optim.Adam([vector], lr=rate, fused=True, capturable=on_gpu)
        # As its first step would make them: whoever trains or restores an agent writes into these.
        step = torch.zeros((), device=self.device)
        optimizer.state[vector] = {"step": step, "exp_avg": torch.zeros_like(vector), "exp_avg_sq": torch.zeros_like(vector)}
        return optimizer

    def compile(self):
        """torch.compile the target and the two losses."""
        self._target = torch.compile(self._target)
        self._critic_loss = torch.compile(self._critic_loss)
        self._actor_losses = torch.compile(self._actor_losses)

    def fuse(self, n_candidates=50, precision="fp16"):
        """From now on act(state, n_candidates) is one kernel launch at this precision; other numbers are not affected.

        The kernel is tried on one state first. Raises ImportError without triton, and ValueError for a size or a device that the
        kernels do not support, or where their actions are not those of plain torch.
        """
        import kernels

        noise = self._randn(
            self.policy.n_timesteps + 1, n_candidates, self.policy.action_dim, generator=torch.Generator(self.device).manual_seed(0)
        )
        inputs = torch.zeros(1, self.policy.state_dim, device=self.device), noise[0], noise[1:]
        if self.algo == "bc":
            fused = kernels.FusedSampler(self.policy, precision)
            tried = fused(*inputs)
        else:
            fused = kernels.FusedActor(self.policy, self.critic_target, n_candidates, precision)
            fused(*inputs, torch.zeros(1, n_candidates, device=self.device))
            tried = fused.candidates
        with torch.no_grad():
            apart = (tried - self.policy.sample(inputs[0], x_T=noise[0], noises=noise[1:])).abs().max()
        if not apart < 0.05 * self.policy.max_action:  # fp16's rounding is a thousandth
            raise ValueError(f"on this device the kernel's actions are up to {float(apart):.2g} away from plain torch's")
        self._fused = fused

    def draw_noise(self, batch_size: int) -> UpdateNoise:
        """The randomness of one update, the normals in a single call."""
        T, A, B, n = self.policy.n_timesteps, self.policy.action_dim, batch_size, self.n_target_samples
        t = torch.randint(T, (B,), generator=self.generator, device=self.device)
        if self.algo == "bc":
            return UpdateNoise(None, None, t, self._randn(B, A), None, None, None)
        coin = torch.rand((), generator=self.generator, device=self.device)
        bc, actor, target = self._randn(B + (T + 1) * (B + n * B), A).split([B, (T + 1) * B, (T + 1) * n * B])
        actor, target = actor.view(T + 1, B, A), target.view(T + 1, n * B, A)
        return UpdateNoise(target[0], target[1:], t, bc, actor[0], actor[1:], coin)

    def _randn(self, *shape, generator=None):
        return torch.randn(*shape, generator=generator or self.generator, device=self.device)

    def update(self, batch, noise: UpdateNoise | None = None) -> dict:
        """One update of everything on a batch (Batch, or its five tensors in that order). -> dict of 0-d tensors, no host sync.

        noise hands in all the randomness, so that two implementations can be compared to rounding.
        """
        batch = Batch(*batch)
        noise = self.draw_noise(len(batch.state)) if noise is None else noise
        self._decay_rates()
        metrics = {}
        if self.algo == "ql":
            # Critic: one step on the squared Bellman error against targets by the averaged policy.
            target = self._target(batch, noise)
            critic_loss = self._critic_loss(batch, target)
            metrics["critic_loss"] = critic_loss.detach()
            metrics["critic_grad_norm"] = self._descend(critic_loss, self.critic, self.critic_vector, self.critic_optimizer)
        # Policy: one step on behaviour cloning + η·(-Q), the Q being the one just updated.
        bc_loss, q_loss = self._actor_losses(batch, noise)
        actor_loss = bc_loss + self.eta * q_loss
        metrics["bc_loss"], metrics["q_loss"], metrics["actor_loss"] = bc_loss.detach(), q_loss.detach(), actor_loss.detach()
        metrics["actor_grad_norm"] = self._descend(actor_loss, self.policy, self.policy_vector, self.policy_optimizer)
        self._average()
        self.step += 1
        return metrics

    @torch.no_grad()
    def _target(self, batch, noise):
        """y = r + γ·(1-done)·min_i Q'_i(s', a'), a' from the averaged policy; with max-Q each Q'_i is its best over 10 a'."""
        _, q1, q2 = self._propose(self.policy_ema, batch.next_state, noise.target_x_T, noise.target_noises)
        q = torch.min(q1.amax(dim=1, keepdim=True), q2.amax(dim=1, keepdim=True))
        return batch.reward + self.discount * batch.not_done * q

    def _critic_loss(self, batch, target):
        q1, q2 = self.critic(batch.state, batch.action)
        return F.mse_loss(q1, target) + F.mse_loss(q2, target)

    def _actor_losses(self, batch, noise):
        bc_loss = self.policy.bc_loss(batch.state, batch.action, t=noise.t, noise=noise.bc_noise)
        if self.algo == "bc":
            return bc_loss, torch.zeros_like(bc_loss)
        action = self.policy.sample(batch.state, x_T=noise.actor_x_T, noises=noise.actor_noises)
        # L_q = -mean Q_i / mean|Q_j|: i and j exchange roles by a coin, so that neither critic is preferred. What it exchanges is
        # their weights: one critic alone is then differentiated, and nothing has to wait to see how the coin fell.
        heads, (one, two) = noise.coin > 0.5, self.critic_vector.detach().view(2, -1)
        climbed = self.critic.single(torch.where(heads, one, two), batch.state, action)
        scale = self.critic.single(torch.where(heads, two, one), batch.state, action.detach())
        return bc_loss, -climbed.mean() / scale.abs().mean()

    def _descend(self, loss, module, vector, optimizer):
        """One clipped Adam step on loss; returns the gradient's norm before clipping."""
        # Only this module's gradients are asked for: the critics get none from the actor's pass.
        vector.grad = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))])
        norm = vector.grad.square().sum().sqrt()  # vector_norm was two digits less accurate here
        if self.grad_norm > 0:
            vector.grad.mul_((self.grad_norm / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        self.count_write(module)
        return norm

    @torch.no_grad()
    def _average(self):
        """Target critics every update; the averaged policy every ema_every-th once ema_start is reached."""
        due = (self.step % self.ema_every == 0) & (self.step >= self.ema_start)
        self.policy_ema_vector.lerp_(self.policy_vector, (1 - self.ema_decay) * due)
        if self.algo == "ql":
            self.critic_target_vector.lerp_(self.critic_vector, self.tau)
        self.count_write(self.policy_ema, self.critic_target)

    def count_write(self, *modules):
        """Raise the version counters of these modules' parameters: a write to a flat vector, of which they are views, does not."""
        torch.autograd.graph.increment_version([p for module in modules for p in module.parameters()])

    def _decay_rates(self):
        if self.lr_decay_every == 0:
            return
        progress = (self.step // self.lr_decay_every / self.lr_decay_steps).clamp(max=1.0)
        share = 0.5 * (1 + torch.cos(math.pi * progress))
        for optimizer, lr in ((self.policy_optimizer, self.lr), (self.critic_optimizer, self.critic_lr)):
            group = optimizer.param_groups[0]
            if self.device.type == "cuda":
                group["lr"].copy_(lr * share)
            else:
                group["lr"] = lr * float(share)

    def _propose(self, policy, state, x_T, noises):
        """Sample n = len(x_T)/B actions per state and value them with both target critics. -> (B,n,A), (B,n), (B,n)"""

        def sample_and_value(state, x_T, noises):
            action = policy.sample(state, x_T=x_T, noises=noises)
            return torch.cat([action, *self.critic_target(state, action)], dim=1)

        rows = in_pieces(sample_and_value, state, x_T, noises).view(len(state), -1, policy.action_dim + 2)
        return rows[..., :-2], rows[..., -2], rows[..., -1]

    @torch.no_grad()
    def act(self, state, n_candidates=50, *, generator=None):
        """Actions for evaluation: n_candidates per state from the current policy, one picked by softmax of min(Q1', Q2').

        state (S,) or (N,S), numpy or torch -> (A,) or (N,A) of the same kind. With algo "bc" it is one plain sample.
        """
        states = torch.as_tensor(state, dtype=torch.float32, device=self.device)
        single, states = states.ndim == 1, states.view(-1, self.policy.state_dim)
        N, n = len(states), 1 if self.algo == "bc" else n_candidates
        noise = self._randn(self.policy.n_timesteps + 1, N * n, self.policy.action_dim, generator=generator)
        if self.algo == "bc" and self._fused:
            action = self._fused(states.contiguous(), noise[0], noise[1:])
        elif self._fused and n == self._fused.n_candidates:
            # torch.multinomial, below, divides by such exponential variates too, so both ways pick alike.
            gumbel = -torch.empty(N, n, device=self.device).exponential_(generator=generator or self.generator).log()
            action = self._fused(states.contiguous(), noise[0], noise[1:], gumbel)
        elif n == 1:
            action = self.policy.sample(states, x_T=noise[0], noises=noise[1:])
        else:
            actions, q1, q2 = self._propose(self.policy, states, noise[0], noise[1:])
            pick = torch.multinomial(torch.softmax(torch.min(q1, q2), dim=1), 1, generator=generator or self.generator)
            action = actions[torch.arange(N, device=self.device), pick[:, 0]]
        action = action[0] if single else action
        return action.to(state.device) if torch.is_tensor(state) else action.cpu().numpy()

    def __deepcopy__(self, memo):
        # The copy's parameters would no longer be views of its flat vectors, and training it would change nothing.
        raise TypeError("an agent cannot be deep-copied: make another DiffusionQL and load_state_dict(agent.state_dict())")

    def networks(self) -> dict:
        return {name: getattr(self, name) for name in ("policy", "policy_ema", "critic", "critic_target")}

    def state_dict(self) -> dict:
        """Name -> tensor, everything an exact resume needs: weights, Adam's moments, step count, generator."""
        state = {f"{m}.{k}": v for m, module in self.networks().items() for k, v in module.state_dict().items()}
        for name, optimizer in (("policy", self.policy_optimizer), ("critic", self.critic_optimizer)):
            for moment, v in optimizer.state[optimizer.param_groups[0]["params"][0]].items():
                state[f"{name}_optimizer.{moment}"] = v
        state["step"], state["generator"] = self.step, self.generator.get_state()
        return state

    def load_state_dict(self, state: dict, *, weights_only=False):
        """Restore what state_dict() gave; weights_only: just the networks, for acting. Raises KeyError or RuntimeError on a
        missing name or a wrong shape."""
        for m, module in self.networks().items():
            module.load_state_dict({k[len(m) + 1 :]: v for k, v in state.items() if k.startswith(m + ".")})
        if weights_only:
            return
        for name, optimizer in (("policy", self.policy_optimizer), ("critic", self.critic_optimizer)):
            # In place, as the weights: what was captured or fused goes on with them.
            for moment, v in optimizer.state[optimizer.param_groups[0]["params"][0]].items():
                saved = state[f"{name}_optimizer.{moment}"]
                if saved.shape != v.shape:  # which copy_ would repeat, if it could
                    raise RuntimeError(f"{name}_optimizer.{moment} is {tuple(saved.shape)}, not {tuple(v.shape)}")
                v.copy_(saved)
        self.step.copy_(state["step"])
        self.generator.set_state(state["generator"])


def load_released_checkpoint(directory, id=None, *, max_action=1.0, **how) -> DiffusionQL:
    """An agent with the networks that the authors' code saved as actor_{id}.pth and critic_{id}.pth (actor.pth, critic.pth without id).

    Sizes, T and the schedule are read off the files; max_action, device and hyperparameters, which they do not hold, are given as
    to DiffusionQL. The averages, which they do not hold either, start as the networks. Only tensors are unpickled, never code.
    Raises ValueError, in one line, for a file that is missing, broken, holds more than tensors, or is of another network.
    """
    files = {name: Path(directory) / (f"{name}.pth" if id is None else f"{name}_{id}.pth") for name in ("actor", "critic")}
    saved = {}
    for name, path in files.items():
        try:
            saved[name] = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ValueError(f"there is no {path}; the authors' code saves actor_ID.pth and critic_ID.pth") from None
        except Exception as e:  # of many kinds, as pickles break in many ways
            raise ValueError(f"{path} cannot be read as tensors alone ({type(e).__name__}); nothing in it was run") from e
        if not isinstance(saved[name], dict) or not all(map(torch.is_tensor, saved[name].values())):
            raise ValueError(f"{path} holds no state_dict of tensors")
    try:
        betas, first = saved["actor"]["betas"], saved["actor"]["model.mid_layer.0.weight"]
        action_dim, inputs = len(saved["actor"]["model.final_layer.bias"]), saved["critic"]["q1_model.0.weight"].shape[1]
    except KeyError as e:
        raise ValueError(f"{files['actor'].parent} holds no networks of the authors' code: {e} is missing") from None
    schedules = [s for s in ("vp", "linear", "cosine") if torch.allclose(beta_schedule(s, len(betas)), betas.float(), atol=1e-6)]
    if not schedules:
        raise ValueError(f"the betas in {files['actor']} are of none of the schedules vp, linear and cosine")
    agent = DiffusionQL(
        inputs - action_dim, action_dim, hidden_dim=len(first), n_timesteps=len(betas), schedule=schedules[0], max_action=max_action, **how
    )
    policy = {name.removeprefix("model."): value for name, value in saved["actor"].items() if name.startswith("model.")}
    for module, state, path in (
        (agent.policy, policy, files["actor"]), (agent.policy_ema, policy, files["actor"]),
        (agent.critic, saved["critic"], files["critic"]), (agent.critic_target, saved["critic"], files["critic"]),
    ):  # fmt: skip
        try:
            module.load_state_dict(state)
        except RuntimeError as e:
            raise ValueError(f"{path} is of another network: {str(e).splitlines()[-1].strip()}") from None
    return agent


# ---------------------------------------------------------------------------------------------------------------------
# Transitions
# ---------------------------------------------------------------------------------------------------------------------


def tune_rewards(rewards, how, *, terminals=None, observations=None, next_observations=None):
    """The paper's reward transformations (N,) -> (N,) float32. Raises ValueError for an unknown name."""
    if how == "none":
        return rewards
    if how == "cql":
        return (rewards - 0.5) * 4
    if how == "sparse":  # not the paper's: cql's differences between Q-values to 1 %, without the -2 a step
        return rewards * 200
    if how == "normalize":
        return (rewards - rewards.mean()) / rewards.std()
    if how == "iql_antmaze":
        return rewards - 1
    if how == "antmaze":
        return (rewards - 0.25) * 2
    if how == "iql_locomotion":
        # A trajectory ends where the next row does not continue it.
        ends = terminals.copy()
        ends[:-1] |= np.abs(observations[1:] - next_observations[:-1]).max(axis=1) > 1e-6
        starts = np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1])
        returns = np.add.reduceat(rewards.astype(np.float64), starts)
        return (rewards / (returns.max() - returns.min()) * 1000).astype(np.float32)
    raise ValueError(f"unknown reward_tune {how!r}; known: none, cql, sparse, normalize, iql_antmaze, antmaze, iql_locomotion")


class Transitions:
    """A data set on the device, sampled uniformly with replacement."""

    def __init__(self, state, action, next_state, reward, terminal, device="cpu"):
        """numpy arrays (N,S), (N,A), (N,S), (N,), (N,)"""
        columns = state, action, next_state, reward[:, None], 1.0 - terminal[:, None].astype(np.float32)
        self.columns = [torch.as_tensor(np.ascontiguousarray(c, dtype=np.float32), device=device) for c in columns]

    def __len__(self):
        return len(self.columns[0])

    def sample(self, batch_size, generator) -> Batch:
        index = torch.randint(len(self), (batch_size,), generator=generator, device=self.columns[0].device)
        return Batch(*(column.index_select(0, index) for column in self.columns))


# ---------------------------------------------------------------------------------------------------------------------
# Many updates
# ---------------------------------------------------------------------------------------------------------------------


class Updates:
    """Updates of one or several agents, a loop over them, each on minibatches of its own. kernels.FusedUpdate does the same, fused.

    graph: each agent's update, from the minibatch's indices to Adam and the averages, is captured once in a CUDA graph, and
    replayed. Raises ImportError without triton and kernels.UnsupportedError without a GPU.
    """

    def __init__(self, agents, transitions, batch_size, *, graph=False):
        self.agents, self.sums, self.graph = agents, [{} for _ in agents], graph

        def update(agent, sums):
            for name, value in agent.update(transitions.sample(batch_size, agent.generator)).items():
                sums[name] = sums[name].add_(value) if name in sums else value.clone()

        self.updates = [functools.partial(update, agent, sums) for agent, sums in zip(agents, self.sums)]
        if graph:
            from kernels.graphs import Captured

            for i, agent in enumerate(agents):
                changed = [v for name, v in agent.state_dict().items() if name != "generator"]
                self.updates[i] = Captured(self.updates[i], unchanged=changed, generators=[agent.generator]).replay

    def run(self, n):
        """n updates of each agent. -> for each the mean of every metric over them, a dict of 0-d tensors; nothing waits."""
        for sums in self.sums:
            for total in sums.values():
                total.zero_()
        for _ in range(n):
            for update in self.updates:
                update()
        if self.graph:  # a replay is seen by nobody
            for agent in self.agents:
                agent.count_write(*agent.networks().values())
        return [{name: total / n for name, total in sums.items()} for sums in self.sums]


def fuse_updates(agents, transitions, batch_size, precision):
    """A kernels.FusedUpdate of the agents, tried on one batch and captured. Raises ImportError without triton, and ValueError for
    what the kernels do not support, or where their gradients are not plain torch's."""
    import kernels

    agent, update = agents[0], kernels.FusedUpdate(agents, transitions, batch_size, precision)
    before = [{name: value.clone() for name, value in a.state_dict().items()} for a in agents]
    some = torch.arange(batch_size, device=agent.device) % len(transitions)
    batch = Batch(*(column[some] for column in transitions.columns))
    noise = agent.draw_noise(batch_size)
    try:
        metrics = agent.update(batch, noise)
        agent.load_state_dict(before[0])
        found = update.step([batch] * len(agents), [noise] * len(agents))[0]
    finally:  # what fails here is trained some other way
        for a, state in zip(agents, before):
            a.load_state_dict(state)
    for name, expected in metrics.items():
        apart = abs(float(found[name]) - float(expected))
        if not apart < 0.05 * max(abs(float(expected)), 0.1):  # fp16's rounding is a thousandth
            kernels_, plain = float(found[name]), float(expected)
            raise ValueError(f"on this device the kernels' {name} is {kernels_:.4g}, plain torch's {plain:.4g}")
    update.capture()  # what may fail fails here, where there is something to fall back to
    return update


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(agent, task, config, n_episodes, step):
    """n_episodes at once, one batched act() a step. -> (normalised score, tasks.Episodes)

    Its randomness is its own, a function of the run's seed and the step: evaluating or not does not change the training.
    """
    from tqdm import tqdm

    seed = 1_000_003 * config.seed + step
    generator = torch.Generator(agent.device).manual_seed(seed)
    with tqdm(total=task.episode_limit, desc="evaluating", unit="step", leave=False, dynamic_ncols=True) as bar:

        def on_step(t, n_alive):
            bar.update()
            bar.set_postfix(episodes_running=n_alive, refresh=False)

        def act(states):
            try:
                return agent.act(states, config.n_candidates, generator=generator)
            except (RuntimeError, ValueError) as e:
                if "cannot hold" in str(e):  # what the kernels say of weights
                    raise UserError(f"at update {step:,} {e}: take --precision tf32 or fp32") from e
                if "probability tensor" not in str(e) and "NaN" not in str(e):  # what torch.multinomial and the kernels say
                    raise
                raise UserError(f"Q(s, a) is not finite at update {step:,}: the run has diverged; lower --lr or --eta") from e

        episodes = task.evaluate(
            act,
            n_episodes,
            seed,
            n_threads=config.threads or None,
            on_step=on_step,
        )
    return float(np.mean(task.normalized_score(episodes.returns))), episodes


# ---------------------------------------------------------------------------------------------------------------------
# The run: train, evaluate, save, resume
# ---------------------------------------------------------------------------------------------------------------------

LOG_EVERY = 100  # updates between looks at the losses: the only times the host waits for the device
SAVE_SECONDS = 30  # a run killed at any moment loses at most this and one epoch


def make_agent(config: Config, task, device) -> DiffusionQL:
    decay_every = {"none": 0, "cosine": config.updates_per_epoch, "released": config.updates_per_epoch * config.eval_every}
    names = (
        "algo discount tau eta lr critic_lr grad_norm max_q_backup n_timesteps schedule ema_decay ema_start ema_every "
        "hidden_dim seed"
    )
    return DiffusionQL(
        task.state_dim,
        task.action_dim,
        max_action=task.max_action,
        device=device,
        # Differs: the released code steps its cosine once per evaluation, 20 to 40 times in all, so the rate hardly decays.
        lr_decay_every=decay_every[config.lr_decay],
        lr_decay_steps=config.epochs,
        **{name: getattr(config, name) for name in names.split()},
    )


def choose_acting(config: Config, agents: list) -> None:
    """Let the agents act with the fused kernels where config asks for them, or where they can run on their GPU."""
    if config.backend not in ("auto", "fused") or (config.backend == "auto" and agents[0].device.type != "cuda"):
        return
    try:
        import kernels

        reason = kernels.why_not()
        if not reason:
            for agent in agents:
                agent.fuse(config.n_candidates, config.precision)
    except Exception as e:  # whatever stands in the way, a compiler's failure included, plain torch can act
        reason = first_line(e)
    if reason and config.backend == "fused":
        raise UserError(f"--backend fused cannot be had: {reason}")
    if reason:
        print(f"acting with plain torch, not with the fused kernels: {reason}", flush=True)


def choose_updates(config: Config, agents: list, transitions):
    """What makes the updates: config.backend, or the fastest of fused, graph and eager that works here. -> has run(n), as Updates."""
    on_gpu = agents[0].device.type == "cuda"
    backends = [config.backend] if config.backend != "auto" else ["fused", "graph", "eager"] if on_gpu else ["eager"]
    for backend in backends:
        try:
            return make_updates(backend, config, agents, transitions)
        except Exception as e:  # whatever stands in the way, a compiler's failure included, the next slower one may work
            if config.backend != "auto" or backend == backends[-1]:
                raise UserError(f"--backend {backend} cannot be had: {first_line(e)}") from e
            print(f"updates will not be {backend}: {first_line(e)}", flush=True)


def make_updates(backend: str, config: Config, agents: list, transitions):
    """Raises ImportError, ValueError or whatever a compiler raises where this backend cannot work."""
    on_gpu = agents[0].device.type == "cuda"
    if backend == "fused":
        import kernels

        if reason := kernels.why_not():
            raise ValueError(reason)
        return fuse_updates(agents, transitions, config.batch_size, config.precision)
    if backend == "compile":
        if not on_gpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ValueError("it needs a C++ compiler, and there is none: install g++")
        for agent in agents:
            agent.compile()
    return Updates(agents, transitions, config.batch_size, graph=backend == "graph" or (backend == "compile" and on_gpu))


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def load_transitions(config: Config, task, dataset, device) -> Transitions:
    with np.errstate(divide="ignore", invalid="ignore"):  # looked at below
        rewards = tune_rewards(
            dataset.rewards,
            config.reward_tune,
            terminals=dataset.terminals,
            observations=dataset.observations,
            next_observations=dataset.next_observations,
        )
    if not np.isfinite(rewards).all():  # all rewards, or all trajectories' returns, are the same
        raise UserError(f"--reward-tune {config.reward_tune} divides by 0 on {dataset.label}; take another, or none")
    return Transitions(
        dataset.observations, dataset.actions, dataset.next_observations, rewards, dataset.terminals, device=device
    )


def train(config: Config) -> list:
    """Train as config says, or continue config.resume, and print the scores of every selection rule. -> a RunFolder a seed"""
    import tasks
    from run_folder import RunError, RunFolder, restore, save_tensors, versions

    device = choose_device(config)
    task = tasks.get(config.env)
    if not config.resume:
        RunFolder.require_writable(config.out)
    # Every seed of a run learns from the same data.
    log = lambda line: print(line, flush=True)  # noqa: E731
    dataset = tasks.load(task, config.data, seed=0, n_generated=config.n_generated, repair=config.repair_data, log=log)
    data = dataset.fingerprint()
    # Each is the run that it would be alone, and can be resumed and evaluated alone.
    configs = [replace(config, seed=seed, seeds=(), resume=()) for seed in config.seeds or (config.seed,)]
    agents = [make_agent(c, task, device) for c in configs]
    choose_acting(config, agents)
    updates = choose_updates(config, agents, load_transitions(config, task, dataset, device))
    if config.resume:
        runs = [RunFolder(path) for path in config.resume]
        for run, agent in zip(runs, agents):
            saved = run.config()["data"]
            if saved["crc32"] != data["crc32"]:
                raise RunError(f"{run.path} was trained on {saved['label']}, this is {data['label']}: not the same transitions")
            restore(agent, run.path / "resume.safetensors")
        steps = {int(agent.step) for agent in agents}
        if len(steps) > 1:
            raise RunError(f"these runs stand at different updates ({', '.join(map(str, sorted(steps)))}): resume them one by one")
        for run in runs:
            run.rewind_log(*steps)
        print(f"resumed at update {int(agents[0].step):,} of {config.epochs * config.updates_per_epoch:,}")
    else:
        when, runs = time.strftime("%Y%m%d-%H%M%S"), []
        for c, agent in zip(configs, agents):
            name = f"{c.env}-{c.algo}-{dataset.source}-seed{c.seed}-{when}"
            runs.append(RunFolder.create(config.out, name, {"config": asdict(c), "data": data, "versions": versions()}))
            save_tensors(runs[-1].path / "resume.safetensors", agent.state_dict())
    paths = [str(run.path) for run in runs]
    where = paths[0] if len(runs) == 1 else f"{Path(config.out)}, a folder for each of seeds {' '.join(str(c.seed) for c in configs)}"
    print(f"{config.algo} on {data['label']}, {len(dataset):,} transitions, {device}; everything goes to {where}", flush=True)
    try:
        run_epochs(configs, agents, updates, task, data["label"], runs)
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: python dql.py --resume {' '.join(paths)}")
        raise
    print(f"normalised scores, {data['label']}:")
    selections = [run.select(config.top_k) for run in runs]
    for rule in selections[0]:
        chosen = [selection[rule] for selection in selections]
        scores = [c["score"] for c in chosen]
        if len(runs) == 1:
            print(f"  {rule:<17}{scores[0]:6.1f}   (update {chosen[0]['step']:,})")
        else:
            print(f"  {rule:<17}{mean_and_spread(scores)}   ({', '.join(f'{score:.1f}' for score in scores)})")
    return runs


def mean_and_spread(scores) -> str:
    """Over seeds; the spread is their standard deviation."""
    return f"{np.mean(scores):6.1f} ± {np.std(scores, ddof=1):.1f}"


def run_epochs(configs, agents, updates, task, label, runs):
    """The training loop: epochs of updates, and evaluations after every eval_every of them and after the last."""
    from tqdm import tqdm

    from run_folder import save_tensors

    config = configs[0]
    step, total, saved_at = int(agents[0].step), config.epochs * config.updates_per_epoch, time.monotonic()
    with tqdm(total=total, initial=step, unit="update", desc=config.algo, dynamic_ncols=True, smoothing=0.05) as bar:
        while True:
            due = step > 0 and (step % (config.eval_every * config.updates_per_epoch) == 0 or step == total)
            for c, agent, run in zip(configs, agents, runs):
                # A run killed in the middle of an evaluation finds it missing here and makes it again.
                if due and all(e["step"] != step for e in run.evaluations()):
                    evaluate_and_record(c, agent, task, label, run, f"seed {c.seed}, " if len(runs) > 1 else "")
            latest = [run.evaluations()[-1]["score"] for run in runs if run.evaluations()]
            if due and len(runs) > 1:
                tqdm.write(f"update {step:,}: score {mean_and_spread(latest)} over {len(runs)} seeds ({label})")
            if step == total:
                return
            started = time.monotonic()
            losses = run_epoch(config, agents, updates, bar, f"{np.mean(latest):.1f} on {label}" if latest else "none yet")
            step = int(agents[0].step)
            rate = config.updates_per_epoch / (time.monotonic() - started)
            for run, means in zip(runs, losses):
                run.log("epoch", step, **means, updates_per_second=rate)
            evaluation_follows = step % (config.eval_every * config.updates_per_epoch) == 0 or step == total
            if evaluation_follows or time.monotonic() - saved_at > SAVE_SECONDS:
                for agent, run in zip(agents, runs):
                    save_tensors(run.path / "resume.safetensors", agent.state_dict())
                saved_at = time.monotonic()


def run_epoch(config, agents, updates, bar, score) -> list:
    """updates_per_epoch updates of each agent -> for each the mean of every metric. Raises UserError when one is not finite."""
    sums, n_updates = [{} for _ in agents], config.updates_per_epoch
    for i in range(0, n_updates, LOG_EVERY):
        n = min(LOG_EVERY, n_updates - i)
        chunk = n if agents[0].device.type == "cuda" else 1  # on a CPU the bar moves with every update
        windows = [{} for _ in agents]
        for _ in range(0, n, chunk):
            for window, means in zip(windows, updates.run(chunk)):
                window |= {k: window.get(k, 0.0) + v * chunk for k, v in means.items()}
            bar.update(chunk)
        for agent, window, total in zip(agents, windows, sums):
            window = {k: float(v) for k, v in window.items()}
            broken = [k for k, v in window.items() if not math.isfinite(v)]
            if broken:
                whose = f"seed {agent.seed}: " if len(agents) > 1 else ""
                raise UserError(
                    f"{whose}{broken[0]} became {window[broken[0]]} between updates {int(agent.step) - n:,} and "
                    f"{int(agent.step):,}; the last good checkpoint is kept: lower --lr or --eta, or raise --batch-size"
                )
            total |= {k: total.get(k, 0.0) + v for k, v in window.items()}
        shown = ("bc_loss", "q_loss", "critic_loss")
        means = {k: f"{np.mean([total[k] for total in sums]) / (i + n):.4g}" for k in shown if k in sums[0]}
        bar.set_postfix(**means, score=score, refresh=False)
    return [{k: v / n_updates for k, v in total.items()} for total in sums]


def evaluate_and_record(config, agent, task, label, run, whose):
    """Evaluate, log, keep the networks, select, draw."""
    from tqdm import tqdm

    from run_folder import save_tensors

    step, started = int(agent.step), time.monotonic()
    score, episodes = evaluate(agent, task, config, config.eval_episodes, step)
    seconds = time.monotonic() - started
    since = max([e["step"] for e in run.evaluations()], default=0)
    bc_loss = float(np.mean([r["bc_loss"] for r in run.records if r["kind"] == "epoch" and r["step"] > since]))
    weights = {k: v for k, v in agent.state_dict().items() if k.startswith(tuple(f"{m}." for m in agent.networks()))}
    save_tensors(run.checkpoint(step), weights, {"step": step, "score": score, "data": label})
    task.draw(episodes, run.path / f"episodes_{step:08d}.png", f"{config.env}, update {step:,}: score {score:.1f}\n{label}")
    mean_length = float(np.mean(episodes.lengths))
    run.log("evaluation", step, score=score, bc_loss=bc_loss, mean_length=mean_length, seconds=seconds, data=label)
    run.select(config.top_k)
    run.draw_curve(f"{config.env}, {config.algo}\n{label}")
    tqdm.write(f"{whose}update {step:,}: score {score:.1f} ({label}), {len(episodes.returns)} episodes in {seconds:.0f} s")


def evaluate_run(config: Config):
    """--eval: load a run's chosen checkpoint, evaluate it, draw the episodes, and film an episode if asked."""
    import tasks

    run, task, agent, chosen = load_run(config.eval, config)
    choose_acting(config, [agent])
    score, episodes = evaluate(agent, task, config, config.episodes or config.eval_episodes, chosen["step"] + 1)
    title = f"{config.env}, {config.which} (update {chosen['step']:,}): score {score:.1f}"
    picture = run.path / f"episodes_eval_{config.which}.png"
    task.draw(episodes, picture, f"{title}\n{chosen['data']}")
    spread = float(np.std(task.normalized_score(episodes.returns)) / math.sqrt(len(episodes.returns)))
    print(f"{title} ± {spread:.1f} (standard error of {len(episodes.returns)} episodes; {chosen['data']}); picture in {picture}")
    if config.render:
        generator = torch.Generator(agent.device).manual_seed(config.seed)
        act = lambda state: agent.act(state, config.n_candidates, generator=generator)  # noqa: E731
        print(f"filmed one episode with return {tasks.film(config.env, act, config.render, config.seed):.1f}: {config.render}")


def export_run(config: Config):
    """--export: load a run's chosen checkpoint and write its policy for use without this project."""
    from export import export_policy

    folder, file = config.export
    run, _, agent, chosen = load_run(folder, config)
    made = run.config()
    facts = {"run": run.path.resolve().name, "task": config.env, **chosen, "crc32": made["data"]["crc32"]}
    facts |= {"seed": config.seed, "quick": config.quick, "versions": made["versions"]}
    for path in export_policy(agent, file, n_candidates=config.n_candidates, facts=facts):
        print(f"wrote {path}, {path.stat().st_size:,} bytes")
    print(f"{config.env}, {config.which} (update {chosen['step']:,}): score {chosen['score']:.1f} ({chosen['data']})")


def load_run(folder: str, config: Config):
    """-> a run, its task, its agent with the weights that --which chooses, and that line of its selection"""
    import tasks
    from run_folder import RunFolder, load_json, restore

    run, task = RunFolder(folder), tasks.get(config.env)
    chosen = load_json(run.path / "selection.json")[config.which]
    agent = make_agent(config, task, choose_device(config))
    restore(agent, run.path / chosen["checkpoint"], weights_only=True)
    return run, task, agent, chosen


def choose_device(config: Config) -> torch.device:
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision(config.matmul_precision)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        return torch.Generator(torch.empty(0, device=name).device).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from e


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises UserError for values no run can have."""
    one_or_more = "epochs updates_per_epoch eval_every eval_episodes batch_size n_timesteps hidden_dim ema_every n_candidates"
    zero_or_more = "eta lr critic_lr grad_norm ema_start top_k episodes threads seed"
    at_least = {"n_generated": 2, **dict.fromkeys(one_or_more.split(), 1), **dict.fromkeys(zero_or_more.split(), 0)}
    for name, least in at_least.items():
        value = getattr(config, name)
        if not value >= least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if isinstance(value, int) and value >= 2**31:  # what torch can take
            raise UserError(f"--{name.replace('_', '-')} must be less than 2**31, not {value}")
    for name in ("discount", "tau", "ema_decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} must lie between 0 and 1, not {getattr(config, name)}")
    choices = dict(
        algo=("ql", "bc"),
        backend=("auto", "eager", "compile", "graph", "fused"),
        precision=("fp16", "tf32", "fp16x3", "fp32"),
        matmul_precision=("highest", "high", "medium"),
        schedule=("vp", "linear", "cosine"),
        lr_decay=("none", "cosine", "released"),
        reward_tune=("none", "cql", "sparse", "normalize", "iql_antmaze", "antmaze", "iql_locomotion"),
        which=("last", "best", "offline", "offline_released"),
    )
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise UserError(f"unknown --{name.replace('_', '-')} {getattr(config, name)!r}; known: {', '.join(known)}")
    for seed in config.seeds:
        if not 0 <= seed < 2**31:
            raise UserError(f"--seeds must be at least 0 and less than 2**31, not {seed}")
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"--seeds {' '.join(map(str, config.seeds))} names a seed twice: two agents would be the same")
    if bool(config.resume) + bool(config.eval) + bool(config.export) > 1:
        raise UserError("--resume, --eval and --export exclude each other")
    if config.export and len(config.export) != 2:
        raise UserError(f"--export takes a run and a file to write, as in --export runs/NAME policy.pt2, not {len(config.export)} names")
    if config.render and not config.eval:
        raise UserError("--render films a finished run: name it with --eval")


def parse_arguments(argv: list[str]) -> Config:
    """The command line over the recipe of its task, or over the config of the run to resume or evaluate."""
    import tyro

    import tasks

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--env", "--eval"):
        first.add_argument(option)
    for option in ("--resume", "--export"):
        first.add_argument(option, nargs="+", default=[])
    first.add_argument("--quick", action="store_true")
    chosen, _ = first.parse_known_args(argv)
    if "" in (*chosen.resume, chosen.eval, *chosen.export):  # what a script with an unset variable passes: not a new run
        raise UserError("--resume, --eval and --export take the folder of a run, for example runs/NAME; got an empty name")
    folders = chosen.resume or ([chosen.eval] if chosen.eval else chosen.export[:1])
    if folders:
        made = [saved_config(folder) for folder in folders]
        default = made[0]
        for folder, config in zip(folders[1:], made[1:]):
            odd = [k for k, v in asdict(config).items() if k not in ("seed", "out", "threads", "backend") and v != getattr(default, k)]
            if odd:
                raise UserError(f"{folder} was made with another --{odd[0]} than {folders[0]}: they cannot be resumed together")
        if len(made) > 1:
            default = replace(default, seeds=tuple(config.seed for config in made))
    else:
        env = tasks.get(chosen.env or Config.env).name  # an unknown task is refused before anything else is read
        default = recipe_config(env, chosen.quick)
    config = tyro.cli(Config, args=argv, default=default, description=__doc__.split("\n\nThe algorithm (")[0])
    check(config)
    if folders:
        free = "eval which episodes render device threads backend seed n_candidates"
        free = "resume threads backend" if config.resume else "export which device threads n_candidates" if config.export else free
        changed = [k for k, v in asdict(config).items() if k not in free.split() and v != getattr(default, k)]
        if changed:
            raise UserError(f"{folders[0]} was made with another --{changed[0].replace('_', '-')}, and keeps its own")
    if config.data not in ("auto", "d4rl", "generated") and not config.data.startswith("minari:"):
        config.data = str(Path(config.data).expanduser().absolute())  # so that the run can be resumed from any folder
    return config


def saved_config(folder: str) -> Config:
    """The Config that a run was made with. Raises UserError for one of another version."""
    from run_folder import RunFolder

    try:
        return Config(**{**RunFolder(folder).config()["config"], "seeds": (), "resume": (), "eval": "", "export": ()})
    except (KeyError, TypeError) as e:
        raise UserError(f"{folder}/config.json is not one that this version of dql.py wrote: {e}") from e


def main(argv: list[str] | None = None) -> int:
    from run_folder import RunError
    from tasks import TaskError

    try:
        config = parse_arguments(sys.argv[1:] if argv is None else argv)
        what = evaluate_run if config.eval else export_run if config.export else train
        what(config)
    except (UserError, TaskError, RunError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as e:
        # torch has no class of its own for a CPU's memory.
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(e):
            raise
        where = "the GPU's memory" if isinstance(e, torch.OutOfMemoryError) else "memory"
        print(f"error: {where} is full ({first_line(e)}); take fewer --seeds, --n-candidates or a smaller --batch-size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
