"""The eight policies of the paper's bandit, four that clone the data, four that also climb Q, and the loop that trains them all.

Diffusion is dql.py's own agent. The six others follow the released recipe, so that they lose, where they lose, as they are: two
hidden ReLU layers of 128, Adam at 3e-4, no clipping of gradients, and what the classes below say. A method is

    method = METHODS["BEAR-MMD"](eta=2.5, n_timesteps=50, lr=3e-4, decay_steps=0, seed=0)
    train(method, transitions, updates=100_000)
    actions = method.sample(1000)               # (1000, 2); there is but one state, the zero vector

decay_steps > 0: rates fall to 0 in so many updates, by half a cosine. All random numbers come from the method's own generator.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal

from dql import DiffusionQL, TwinCritic

STATE_DIM, ACTION_DIM, HIDDEN, BATCH = 2, 2, 128, 100


def train(method, transitions, updates: int, critic_first: int = 0, watch=lambda done: None) -> None:
    """updates updates of a method, each on a minibatch of dql.Transitions drawn uniformly with replacement.

    critic_first: before these, as many of its critics alone, where it has any. They learn the reward, whatever the policy does,
    and until they have, Q goes on rising beyond the best corner: a short run begins where a long one arrives.
    watch: called after each update with how many are done.
    """
    for _ in range(critic_first):
        method.critic_update(transitions.sample(BATCH, method.generator))
    for done in range(1, updates + 1):
        method.update(transitions.sample(BATCH, method.generator))
        watch(done)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion
# ---------------------------------------------------------------------------------------------------------------------


class Diffusion(DiffusionQL):
    """dql.py's agent where every episode is one action long. algo "bc": BC-Diffusion, "ql": Diffusion-QL.

    The time embedding has dql.py's 16 numbers, where the released bandit has 4.
    """

    def __init__(self, eta, n_timesteps, lr, decay_steps, seed, algo):
        how = dict(lr=lr, critic_lr=lr, lr_decay_every=min(decay_steps, 1), lr_decay_steps=decay_steps, grad_norm=0.0, seed=seed)
        super().__init__(STATE_DIM, ACTION_DIM, algo=algo, eta=eta, n_timesteps=n_timesteps, hidden_dim=HIDDEN, **how)

    def _target(self, batch, noise):
        return batch.reward  # nothing follows, so no chain is sampled for a next state

    def critic_update(self, batch):
        if self.algo == "ql":
            self._descend(self._critic_loss(batch, batch.reward), self.critic, self.critic_vector, self.critic_optimizer)

    @torch.no_grad()
    def sample(self, n):
        """Plain samples of the policy: none is picked by Q."""
        noise = self._randn(self.policy.n_timesteps + 1, n, ACTION_DIM)
        return self.policy.sample(torch.zeros(n, STATE_DIM), x_T=noise[0], noises=noise[1:])


# ---------------------------------------------------------------------------------------------------------------------
# What the others share
# ---------------------------------------------------------------------------------------------------------------------


def mlp(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, n_out))


class Critic(TwinCritic):
    """dql.py's twin critics, which here learn the reward itself."""

    def __init__(self):
        super().__init__(STATE_DIM, ACTION_DIM, hidden_dim=HIDDEN)

    def loss(self, batch):
        return sum(F.mse_loss(q, batch.reward) for q in self(batch.state, batch.action))

    def ascent(self, state, action, heads):
        """-mean Q_i / mean|Q_j|, as in DiffusionQL: heads lets Q1 be climbed and Q2 normalise, tails the other way round."""
        x = torch.cat([state, action], dim=1)
        climbed, scale = (self.q1_model, self.q2_model) if heads else (self.q2_model, self.q1_model)
        with torch.no_grad():
            size = scale(x).abs().mean()
        return -climbed(x).mean() / size


class Baseline:
    """Networks that in every update descend a loss each, in the order of descents(). n_timesteps is diffusion's alone."""

    def __init__(self, eta, n_timesteps, lr, decay_steps, seed):
        self.eta, self.generator = eta, torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.build()
        self.steps, self.decays = {}, []
        for name, (module, loss, rate) in self.descents().items():
            parameters = list(module.parameters())
            optimizer = torch.optim.Adam(parameters, lr=rate * lr, fused=True)
            self.steps[name] = functools.partial(self.descend, parameters, loss, optimizer)
            if decay_steps:
                self.decays.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, decay_steps))

    def build(self):
        """Make the networks; their weights are drawn from torch's own generator, seeded."""
        raise NotImplementedError

    def descents(self):
        """-> {name: (the network that takes the step, its loss of a batch, its rate as a multiple of that of all)}"""
        raise NotImplementedError

    def propose(self, state):
        """(B,S) -> (B,A), as the policy acts."""
        raise NotImplementedError

    @staticmethod
    def descend(parameters, loss, optimizer, batch):
        # Only these parameters get gradients: an actor's loss leaves the critic and the decoder as they are.
        for p, gradient in zip(parameters, torch.autograd.grad(loss(batch), parameters)):
            p.grad = gradient
        optimizer.step()

    def update(self, batch):
        for step in self.steps.values():
            step(batch)
        for decay in self.decays:
            decay.step()

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


# ---------------------------------------------------------------------------------------------------------------------
# A Gaussian, by maximum likelihood
# ---------------------------------------------------------------------------------------------------------------------


class MLE(Baseline):
    """BC-MLE: -log π(a|s), π a diagonal Gaussian with log-std within [-20, 2]. Its samples are not clipped to the square."""

    def build(self):
        self.actor = mlp(STATE_DIM, 2 * ACTION_DIM)

    def descents(self):
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
    """The paper's "TD3+BC": the same Gaussian, η·(-Q of its own sample, normalised) added to the loss."""

    def build(self):
        super().build()
        self.critic = Critic()

    def descents(self):
        return {"critic": (self.critic, self.critic.loss, 1)} | super().descents()

    def actor_loss(self, batch):
        q_loss = self.critic.ascent(batch.state, self.propose(batch.state), self.heads())
        return super().actor_loss(batch) + self.eta * q_loss


# ---------------------------------------------------------------------------------------------------------------------
# A conditional variational auto-encoder
# ---------------------------------------------------------------------------------------------------------------------


class CVAE(Baseline):
    """BC-CVAE: ‖a - â‖² + ½·KL, both a mean over all dimensions; twice as many latents as action dimensions.

    Actions are decoded from latents clipped to ±0.5, as BCQ's authors do: a trick that keeps to the middle of what was learned.
    """

    LATENT = 2 * ACTION_DIM

    def build(self):
        self.encoder, self.decoder = mlp(STATE_DIM + ACTION_DIM, 2 * self.LATENT), mlp(STATE_DIM + self.LATENT, ACTION_DIM)

    def descents(self):
        return {"cvae": (nn.ModuleList([self.encoder, self.decoder]), self.cvae_loss, 1)}

    def decode(self, state, z):
        """Before the tanh that makes an action of it."""
        return self.decoder(torch.cat([state, z], dim=-1))

    def propose(self, state):
        return torch.tanh(self.decode(state, self.randn(len(state), self.LATENT).clamp(-0.5, 0.5)))

    def cvae_loss(self, batch):
        mean, log_std = self.encoder(torch.cat([batch.state, batch.action], dim=1)).chunk(2, dim=1)
        log_std = log_std.clamp(-4, 15)
        std = log_std.exp()
        decoded = torch.tanh(self.decode(batch.state, mean + std * self.randn(*std.shape)))
        kl = 0.5 * (mean.square() + std.square() - 2 * log_std - 1).mean()
        return F.mse_loss(decoded, batch.action) + 0.5 * kl


class BCQ(CVAE):
    """The auto-encoder's actions, moved by at most 0.05 a dimension by a network that climbs Q1.

    The released picture's "BCQ" shows the auto-encoder alone; here the actions are those of the policy, moved.
    """

    REACH = 0.05

    def build(self):
        super().build()
        self.critic, self.perturbation = Critic(), mlp(STATE_DIM + ACTION_DIM, ACTION_DIM)

    def descents(self):
        perturbation = (self.perturbation, self.perturbation_loss, 1)
        return {"critic": (self.critic, self.critic.loss, 1)} | super().descents() | {"perturbation": perturbation}

    def propose(self, state):
        with torch.no_grad():
            action = super().propose(state)
        moved = action + self.REACH * torch.tanh(self.perturbation(torch.cat([state, action], dim=1)))
        return moved.clamp(-1, 1)

    def perturbation_loss(self, batch):
        return -self.critic.q1_model(torch.cat([batch.state, self.propose(batch.state)], dim=1)).mean()


# ---------------------------------------------------------------------------------------------------------------------
# A Gaussian behind a tanh, by maximum mean discrepancy to the auto-encoder
# ---------------------------------------------------------------------------------------------------------------------


def laplacian_mmd(x, y, sigma=20.0):
    """(B,n,A), (B,n,A) -> (B,): √(mean k(x,x') + mean k(y,y') - 2·mean k(x,y) + 10⁻⁶), k = exp(-‖x-y‖₁/2σ)."""

    def k(x, y):
        return torch.exp((x[:, :, None] - y[:, None]).abs().sum(dim=-1) / (-2 * sigma)).mean(dim=(1, 2))

    return (k(x, x) + k(y, y) - 2 * k(x, y) + 1e-6).sqrt()


class MMD(CVAE):
    """BC-MMD: the discrepancy between ten samples of the actor and ten of the auto-encoder, both before their tanh.

    Their noise is clipped to ±0.5 in the loss; the actor acts with all of it.
    """

    SAMPLES = 10

    def build(self):
        super().build()
        self.actor = mlp(STATE_DIM, 2 * ACTION_DIM)

    def descents(self):
        return super().descents() | {"actor": (self.actor, self.actor_loss, 1)}

    def propose(self, state):
        mean, log_std = self.actor(state).chunk(2, dim=1)
        return torch.tanh(mean + log_std.exp() * self.randn(*mean.shape))

    def discrepancy(self, state):
        rows, n = len(state), self.SAMPLES
        with torch.no_grad():
            z = self.randn(rows, n, self.LATENT).clamp(-0.5, 0.5)
            decoded = self.decode(state[:, None].expand(-1, n, -1), z)
        mean, log_std = self.actor(state)[:, None].chunk(2, dim=-1)
        return laplacian_mmd(decoded, mean + log_std.exp() * self.randn(rows, n, ACTION_DIM).clamp(-0.5, 0.5)).mean()

    def actor_loss(self, batch):
        return self.discrepancy(batch.state)


class Multiplier(nn.Module):
    """λ = exp(log_lambda) of a Lagrangian, log_lambda drawn from N(0,1)."""

    def __init__(self):
        super().__init__()
        self.log_lambda = nn.Parameter(torch.randn(()))


class BEAR(MMD):
    """BEAR-MMD: λ·discrepancy + the Q term, λ rising while the discrepancy exceeds 0.05 and falling below.

    The released picture's BEAR has η = 1 whatever its --eta, and so has this; λ makes up for either.
    """

    ALLOWED, LAMBDA_RATE = 0.05, 1e-3 / 3e-4

    def build(self):
        super().build()
        self.critic, self.multiplier = Critic(), Multiplier()

    def descents(self):
        multiplier = (self.multiplier, self.multiplier_loss, self.LAMBDA_RATE)
        return {"critic": (self.critic, self.critic.loss, 1)} | super().descents() | {"multiplier": multiplier}

    def actor_loss(self, batch):
        discrepancy = self.discrepancy(batch.state)
        self.excess = discrepancy.item() - self.ALLOWED
        q_loss = self.critic.ascent(batch.state, self.propose(batch.state), self.heads())
        return self.multiplier.log_lambda.detach().exp() * discrepancy + q_loss

    def multiplier_loss(self, batch):
        with torch.no_grad():
            self.multiplier.log_lambda.clamp_(-5, 10)
        return -self.multiplier.log_lambda.exp() * self.excess


# ---------------------------------------------------------------------------------------------------------------------
# All eight
# ---------------------------------------------------------------------------------------------------------------------

CLONING = {"BC-MLE": MLE, "BC-CVAE": CVAE, "BC-MMD": MMD, "BC-Diffusion": functools.partial(Diffusion, algo="bc")}
CLIMBING = {"TD3+BC": TD3BC, "BCQ": BCQ, "BEAR-MMD": BEAR, "Diffusion-QL": functools.partial(Diffusion, algo="ql")}
METHODS = CLONING | CLIMBING
