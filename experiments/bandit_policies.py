"""The eight policies of the paper's bandit, and the loop that trains them all.

Four clone the data, four also climb Q. Diffusion is dql.py's own agent. The six others follow the
released code, so that a baseline that loses does so as released: two hidden ReLU layers of 128,
Adam at 3e-4, gradients not clipped, and what the classes below say.

    method = METHODS["BEAR-MMD"](eta=2.5, n_timesteps=50, lr=3e-4, seed=0)
    train(method, transitions, updates=100_000)
    actions = method.sample(1000)  # (1000, 2)

All random numbers come from the method's own generator.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal

from dql import DiffusionBC, DiffusionQL, TwinCritic
from experiments.bandit_data import ACTION_DIM, STATE_DIM
from kernels import eager

HIDDEN, BATCH = 128, 100


def train(method, transitions, updates: int, decay=False, critic_first=0, watch=None) -> None:
    """Updates of a method, each on a minibatch of dql.Transitions.

    decay: learning rates fall to 0 by half a cosine. critic_first: before these updates, as many of
    its critics alone, if it has any. They learn the reward, whatever the policy does, and until
    they have, Q goes on rising beyond the best corner: a short run begins where a long one arrives.
    watch: called after each update with how many are done.
    """
    rates = [optimizer.param_groups[0]["lr"] for optimizer in method.optimizers]
    for _ in range(critic_first):
        method.critic_update(transitions.sample(BATCH, method.generator))
    for step in range(updates):
        share = 0.5 * (1 + math.cos(math.pi * step / updates)) if decay else 1.0
        for optimizer, rate in zip(method.optimizers, rates):
            optimizer.param_groups[0]["lr"] = share * rate
        method.update(transitions.sample(BATCH, method.generator))
        if watch:
            watch(step + 1)


# ---- Diffusion -----------------------------------------------------------------------------------


class Diffusion:
    """dql.py's agent where an episode is one action long.

    The time embedding has dql.py's 16 numbers, where the released bandit has 4.
    """

    def __init__(self, algorithm, eta, n_timesteps, lr, seed):
        how = dict(eta=eta, n_timesteps=n_timesteps, lr=lr, critic_lr=lr, hidden_dim=HIDDEN)
        self.agent = algorithm(STATE_DIM, ACTION_DIM, grad_norm=0.0, seed=seed, **how)
        eager.speed_up(self.agent)
        # Every transition is terminal, so no next action counts: do not sample a chain for it.
        self.agent.policy_ema.sample = lambda state, x_T, noises: x_T
        self.policy, self.generator = self.agent.policy, self.agent.generator
        self.optimizers = [self.agent.policy_optimizer, self.agent.critic_optimizer]

    def compile(self):
        """Compile the update: minutes first, then 1.7 times as fast (T = 50, one core)."""
        eager.compile_update(self.agent)

    def update(self, batch):
        self.agent.update(batch)

    def critic_update(self, batch):
        if self.agent.algo == "ql":
            q1, q2 = self.agent.critic(batch.state, batch.action)
            loss = F.mse_loss(q1, batch.reward) + F.mse_loss(q2, batch.reward)
            self.agent.gradient_step(self.agent.critic_optimizer, loss)

    @torch.no_grad()
    def sample(self, n):
        """Plain samples of the policy: none is picked by Q."""
        shape = self.policy.n_timesteps + 1, n, ACTION_DIM
        noise = torch.randn(shape, generator=self.generator)
        return self.policy.sample(torch.zeros(n, STATE_DIM), x_T=noise[0], noises=noise[1:])


# ---- What the others share -----------------------------------------------------------------------


def mlp(n_in, n_out):
    hidden = [nn.Linear(n_in, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, n_out))


class Critic(TwinCritic):
    """dql.py's twin critics, which here learn the reward itself."""

    def __init__(self):
        super().__init__(STATE_DIM, ACTION_DIM, hidden_dim=HIDDEN)

    def losses(self):
        """As Baseline.losses."""
        return {"critic": (self, self.loss, 1)}

    def loss(self, batch):
        return sum(F.mse_loss(q, batch.reward) for q in self(batch.state, batch.action))

    def q_loss(self, state, action, heads):
        """-mean Q_i / mean|Q_j|, as in DiffusionQL: heads lets Q1 be climbed and Q2 normalise."""
        q1, q2 = self(state, action)
        q, other = (q1, q2) if heads else (q2, q1)
        return -q.mean() / other.abs().mean().detach()


class Baseline:
    """Networks that each take a step on their own loss in every update, in the order of losses().

    n_timesteps is for diffusion alone.
    """

    def __init__(self, eta, n_timesteps, lr, seed):
        self.eta, self.generator = eta, torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.build()
        self.steps, self.optimizers = {}, []
        for name, (module, loss, rate) in self.losses().items():
            parameters = list(module.parameters())
            self.optimizers.append(torch.optim.Adam(parameters, lr=rate * lr, fused=True))
            how = parameters, loss, self.optimizers[-1]
            self.steps[name] = functools.partial(self.gradient_step, *how)

    def build(self):
        """Make the networks; their weights are drawn from torch's own generator, seeded."""
        raise NotImplementedError

    def losses(self):
        """-> {name: (the network that takes the step, its loss of a batch, its rate / lr)}"""
        raise NotImplementedError

    def propose(self, state):
        """(B,S) -> (B,A), as the policy acts."""
        raise NotImplementedError

    @staticmethod
    def gradient_step(parameters, loss, optimizer, batch):
        # Only these parameters get gradients: an actor's loss leaves critic and decoder alone.
        for p, gradient in zip(parameters, torch.autograd.grad(loss(batch), parameters)):
            p.grad = gradient
        optimizer.step()

    def update(self, batch):
        for step in self.steps.values():
            step(batch)

    def critic_update(self, batch):
        if "critic" in self.steps:
            self.steps["critic"](batch)

    @torch.no_grad()
    def sample(self, n):
        return self.propose(torch.zeros(n, STATE_DIM))

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def heads(self):
        return torch.rand((), generator=self.generator).item() > 0.5


# ---- A Gaussian, by maximum likelihood -----------------------------------------------------------


class MLE(Baseline):
    """BC-MLE: -log π(a|s), π a diagonal Gaussian with log-std within [-20, 2].

    Its samples are not clipped to the square.
    """

    def build(self):
        self.actor = mlp(STATE_DIM, 2 * ACTION_DIM)

    def losses(self):
        return {"actor": (self.actor, self.actor_loss, 1)}

    def distribution(self, state):
        mean, log_std = self.actor(state).chunk(2, dim=1)
        return Normal(mean, log_std.clamp(-20, 2).exp(), validate_args=False)

    def propose(self, state):
        normal = self.distribution(state)
        return normal.mean + normal.stddev * self.randn(*normal.mean.shape)

    def actor_loss(self, batch):
        return -self.distribution(batch.state).log_prob(batch.action).sum(dim=1).mean()


class TD3BC(MLE):
    """The paper's "TD3+BC": the same Gaussian, its loss + η·(-Q of its own sample, normalised)."""

    def build(self):
        super().build()
        self.critic = Critic()

    def losses(self):
        return self.critic.losses() | super().losses()

    def actor_loss(self, batch):
        q_loss = self.critic.q_loss(batch.state, self.propose(batch.state), self.heads())
        return super().actor_loss(batch) + self.eta * q_loss


# ---- A conditional variational auto-encoder ------------------------------------------------------


class CVAE(Baseline):
    """BC-CVAE: ‖a - â‖² + ½·KL, both a mean over all dimensions.

    There are twice as many latents as action dimensions. Actions are decoded from latents clipped
    to ±0.5, as BCQ's authors do: a trick that keeps to the middle of what was learned.
    """

    LATENT = 2 * ACTION_DIM

    def build(self):
        self.encoder = mlp(STATE_DIM + ACTION_DIM, 2 * self.LATENT)
        self.decoder = mlp(STATE_DIM + self.LATENT, ACTION_DIM)

    def losses(self):
        return {"cvae": (nn.ModuleList([self.encoder, self.decoder]), self.cvae_loss, 1)}

    def decode(self, state, z):
        """-> actions before their tanh"""
        return self.decoder(torch.cat([state, z], dim=-1))

    def propose(self, state):
        z = self.randn(len(state), self.LATENT).clamp(-0.5, 0.5)
        return torch.tanh(self.decode(state, z))

    def cvae_loss(self, batch):
        mean, log_std = self.encoder(torch.cat([batch.state, batch.action], dim=1)).chunk(2, dim=1)
        log_std = log_std.clamp(-4, 15)
        std = log_std.exp()
        decoded = torch.tanh(self.decode(batch.state, mean + std * self.randn(*std.shape)))
        kl = 0.5 * (mean.square() + std.square() - 2 * log_std - 1).mean()
        return F.mse_loss(decoded, batch.action) + 0.5 * kl


class BCQ(CVAE):
    """The auto-encoder's actions, moved by at most 0.05 a dimension by a network that climbs Q1.

    The released picture's "BCQ" shows the auto-encoder alone; here the moved actions are shown.
    """

    REACH = 0.05

    def build(self):
        super().build()
        self.critic, self.perturbation = Critic(), mlp(STATE_DIM + ACTION_DIM, ACTION_DIM)

    def losses(self):
        perturbation = (self.perturbation, self.perturbation_loss, 1)
        return self.critic.losses() | super().losses() | {"perturbation": perturbation}

    def propose(self, state):
        with torch.no_grad():
            action = super().propose(state)
        move = torch.tanh(self.perturbation(torch.cat([state, action], dim=1)))
        return (action + self.REACH * move).clamp(-1, 1)

    def perturbation_loss(self, batch):
        x = torch.cat([batch.state, self.propose(batch.state)], dim=1)
        return -self.critic.q1_model(x).mean()


# ---- A Gaussian behind a tanh, by maximum mean discrepancy to the auto-encoder -------------------


def laplacian_mmd(x, y, sigma=20.0):
    """√(mean k(x,x') + mean k(y,y') - 2·mean k(x,y) + 10⁻⁶), k = exp(-‖x-y‖₁/2σ)

    (B,n,A), (B,n,A) -> (B,)
    """

    def mean_k(x, y):
        distance = (x[:, :, None] - y[:, None]).abs().sum(dim=-1)
        return torch.exp(distance / (-2 * sigma)).mean(dim=(1, 2))

    return (mean_k(x, x) + mean_k(y, y) - 2 * mean_k(x, y) + 1e-6).sqrt()


class MMD(CVAE):
    """BC-MMD: the discrepancy between ten samples of the actor and ten of the auto-encoder.

    Both are taken before their tanh, and their noise is clipped to ±0.5 in the loss; the actor acts
    with all of it.
    """

    SAMPLES = 10

    def build(self):
        super().build()
        self.actor = mlp(STATE_DIM, 2 * ACTION_DIM)

    def losses(self):
        return super().losses() | {"actor": (self.actor, self.actor_loss, 1)}

    def propose(self, state):
        mean, log_std = self.actor(state).chunk(2, dim=1)
        return torch.tanh(mean + log_std.exp() * self.randn(*mean.shape))

    def discrepancy(self, state):
        rows, n = len(state), self.SAMPLES
        with torch.no_grad():
            z = self.randn(rows, n, self.LATENT).clamp(-0.5, 0.5)
            decoded = self.decode(state[:, None].expand(-1, n, -1), z)
        mean, log_std = self.actor(state)[:, None].chunk(2, dim=-1)
        noise = self.randn(rows, n, ACTION_DIM).clamp(-0.5, 0.5)
        return laplacian_mmd(decoded, mean + log_std.exp() * noise).mean()

    def actor_loss(self, batch):
        return self.discrepancy(batch.state)


class Multiplier(nn.Module):
    """λ = exp(log_lambda) of a Lagrangian, log_lambda drawn from N(0,1)."""

    def __init__(self):
        super().__init__()
        self.log_lambda = nn.Parameter(torch.randn(()))


class BEAR(MMD):
    """BEAR-MMD: λ·discrepancy + the Q term; λ rises while the discrepancy exceeds 0.05, else falls.

    The released picture's BEAR has η = 1 whatever its --eta, as here; λ makes up for either.
    """

    ALLOWED, LAMBDA_RATE = 0.05, 1e-3 / 3e-4

    def build(self):
        super().build()
        self.critic, self.multiplier = Critic(), Multiplier()

    def losses(self):
        multiplier = (self.multiplier, self.multiplier_loss, self.LAMBDA_RATE)
        return self.critic.losses() | super().losses() | {"multiplier": multiplier}

    def actor_loss(self, batch):
        discrepancy = self.discrepancy(batch.state)
        self.excess = discrepancy.item() - self.ALLOWED
        q_loss = self.critic.q_loss(batch.state, self.propose(batch.state), self.heads())
        return self.multiplier.log_lambda.detach().exp() * discrepancy + q_loss

    def multiplier_loss(self, batch):
        with torch.no_grad():
            self.multiplier.log_lambda.clamp_(-5, 10)
        return -self.multiplier.log_lambda.exp() * self.excess


# ---- All eight -----------------------------------------------------------------------------------

CLONING = {
    "BC-MLE": MLE,
    "BC-CVAE": CVAE,
    "BC-MMD": MMD,
    "BC-Diffusion": functools.partial(Diffusion, DiffusionBC),
}
CLIMBING = {
    "TD3+BC": TD3BC,
    "BCQ": BCQ,
    "BEAR-MMD": BEAR,
    "Diffusion-QL": functools.partial(Diffusion, DiffusionQL),
}
METHODS = CLONING | CLIMBING
DIFFUSION = ("BC-Diffusion", "Diffusion-QL")
WITH_ETA = ("TD3+BC", "Diffusion-QL")
