"""Diffusion-QL as one transcribes the paper, nothing hoisted and nothing shared: the baseline of bench/.

Every step of the chain embeds its timestep, concatenates its inputs, gathers its coefficients per row and draws its
noise; the actor's loss runs backward into both critics; Adam, clipping and the averages go parameter by parameter.
This is how the equations read and how most code is written; it is not slowed down anywhere. Given the same UpdateNoise
it equals dql.py to rounding (tests/test_bench.py).
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class TimeEmbedding(nn.Module):
    """Sines, then cosines, of t at 8 frequencies. (B,) -> (B, 16)"""

    def forward(self, t):
        frequency = torch.exp(torch.arange(8, device=t.device) * -(math.log(10000) / 7))
        angle = t[:, None].float() * frequency[None, :]
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class NoiseNet(nn.Module):
    """ε_θ(a_t, t, s), named as in dql.DiffusionPolicy so that weights can be copied."""

    def __init__(self, state_dim, action_dim, hidden_dim=256):
        super().__init__()
        self.time_mlp = nn.Sequential(TimeEmbedding(), nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        self.mid_layer = nn.Sequential(
            nn.Linear(action_dim + 16 + state_dim, hidden_dim),
            nn.Mish(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.Mish(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.Mish(),
        )
        self.final_layer = nn.Linear(hidden_dim, action_dim)

    def forward(self, x, t, state):
        return self.final_layer(self.mid_layer(torch.cat([x, self.time_mlp(t), state], dim=1)))


def vp_schedule(T):
    t = torch.arange(1, T + 1, dtype=torch.float64)
    return 1 - torch.exp(-0.1 / T - 0.5 * (10.0 - 0.1) * (2 * t - 1) / T**2)


def extract(coefficients, t):
    """The coefficient of each row's timestep. (T,), (B,) -> (B, 1)"""
    return coefficients.gather(0, t)[:, None]


class Diffusion(nn.Module):
    def __init__(self, state_dim, action_dim, hidden_dim=256, n_timesteps=5, max_action=1.0):
        super().__init__()
        self.action_dim, self.n_timesteps, self.max_action = action_dim, n_timesteps, max_action
        self.model = NoiseNet(state_dim, action_dim, hidden_dim)
        beta = vp_schedule(n_timesteps)
        alpha = 1 - beta
        alpha_bar = torch.cumprod(alpha, 0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        for name, coefficients in {
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "sqrt_recip_alpha_bar": (1 / alpha_bar).sqrt(),
            "sqrt_recipm1_alpha_bar": (1 / alpha_bar - 1).sqrt(),
            "mean_coef_x0": beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            "mean_coef_x": (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar),
            "log_variance": variance.clamp(min=1e-20).log(),
        }.items():
            self.register_buffer(name, coefficients.float(), persistent=False)

    def denoise(self, x, t, state, z):
        """a_{t-1} ~ q(a_{t-1} | a_t, x̂_0), z the standard normal noise."""
        epsilon = self.model(x, t, state)
        x0 = extract(self.sqrt_recip_alpha_bar, t) * x - extract(self.sqrt_recipm1_alpha_bar, t) * epsilon
        x0 = x0.clamp(-self.max_action, self.max_action)
        mean = extract(self.mean_coef_x0, t) * x0 + extract(self.mean_coef_x, t) * x
        noise_here = (t > 0).float()[:, None]
        return mean + noise_here * (0.5 * extract(self.log_variance, t)).exp() * z

    def sample(self, state, x_T=None, noises=None):
        """state (B,S) -> actions (B,A). Noise as in dql.DiffusionPolicy.sample, drawn step by step where not given."""
        x = torch.randn(len(state), self.action_dim, device=state.device) if x_T is None else x_T
        for k, step in enumerate(reversed(range(self.n_timesteps))):
            t = torch.full((len(state),), step, dtype=torch.int64, device=state.device)
            x = self.denoise(x, t, state, torch.randn_like(x) if noises is None else noises[k])
        return x.clamp(-self.max_action, self.max_action)

    def loss(self, state, action, t=None, noise=None):
        if t is None:
            t = torch.randint(self.n_timesteps, (len(action),), device=action.device)
        if noise is None:
            noise = torch.randn_like(action)
        x_t = extract(self.sqrt_alpha_bar, t) * action + extract(self.sqrt_one_minus_alpha_bar, t) * noise
        return F.mse_loss(self.model(x_t, t, state), noise)


class Critic(nn.Module):
    def __init__(self, state_dim, action_dim, hidden_dim=256):
        super().__init__()

        def q_model():
            layers = [nn.Linear(state_dim + action_dim, hidden_dim), nn.Mish()]
            layers += [nn.Linear(hidden_dim, hidden_dim), nn.Mish(), nn.Linear(hidden_dim, hidden_dim), nn.Mish()]
            return nn.Sequential(*layers, nn.Linear(hidden_dim, 1))

        self.q1_model, self.q2_model = q_model(), q_model()

    def forward(self, state, action):
        x = torch.cat([state, action], dim=1)
        return self.q1_model(x), self.q2_model(x)


class StraightforwardDQL:
    """Diffusion-QL on the weights and hyperparameters of a dql.DiffusionQL (vp schedule, fixed rates, algo "ql")."""

    def __init__(self, agent):
        policy, critic = agent.policy, agent.critic
        hidden = policy.final_layer.in_features
        self.policy = Diffusion(policy.state_dim, policy.action_dim, hidden, policy.n_timesteps, policy.max_action)
        self.policy.model.load_state_dict(policy.state_dict())
        self.critic = Critic(critic.state_dim, critic.action_dim, hidden)
        self.critic.load_state_dict(critic.state_dict())
        self.policy.to(agent.device), self.critic.to(agent.device)
        self.policy_ema, self.critic_target = copy.deepcopy(self.policy), copy.deepcopy(self.critic)
        self.policy_ema.model.load_state_dict(agent.policy_ema.state_dict())
        self.critic_target.load_state_dict(agent.critic_target.state_dict())
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=agent.lr)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=agent.critic_lr)
        self.discount, self.tau, self.eta, self.grad_norm = agent.discount, agent.tau, agent.eta, agent.grad_norm
        self.ema_decay, self.ema_start, self.ema_every = agent.ema_decay, agent.ema_start, agent.ema_every
        self.n_target_samples, self.step = agent.n_target_samples, 0

    def update(self, batch, noise=None):
        """One update on (state, action, next_state, reward, not_done) with a dql.UpdateNoise or noise of its own."""
        state, action, next_state, reward, not_done = batch

        with torch.no_grad():
            n = self.n_target_samples
            repeated = next_state.repeat_interleave(n, dim=0)
            given = (noise.target_x_T, noise.target_noises) if noise else (None, None)
            q1, q2 = self.critic_target(repeated, self.policy_ema.sample(repeated, *given))
            q = torch.min(q1.view(-1, n).max(dim=1, keepdim=True)[0], q2.view(-1, n).max(dim=1, keepdim=True)[0])
            target = reward + self.discount * not_done * q
        q1, q2 = self.critic(state, action)
        critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        if self.grad_norm > 0:
            nn.utils.clip_grad_norm_(self.critic.parameters(), self.grad_norm)
        self.critic_optimizer.step()

        bc_loss = self.policy.loss(state, action, *((noise.t, noise.bc_noise) if noise else ()))
        new_action = self.policy.sample(state, *((noise.actor_x_T, noise.actor_noises) if noise else ()))
        q1, q2 = self.critic(state, new_action)
        if (noise.coin if noise else torch.rand(())) > 0.5:
            q_loss = -q1.mean() / q2.abs().mean().detach()
        else:
            q_loss = -q2.mean() / q1.abs().mean().detach()
        actor_loss = bc_loss + self.eta * q_loss
        self.policy_optimizer.zero_grad()
        actor_loss.backward()
        if self.grad_norm > 0:
            nn.utils.clip_grad_norm_(self.policy.parameters(), self.grad_norm)
        self.policy_optimizer.step()

        if self.step >= self.ema_start and self.step % self.ema_every == 0:
            for average, p in zip(self.policy_ema.parameters(), self.policy.parameters()):
                average.data = self.ema_decay * average.data + (1 - self.ema_decay) * p.data
        for average, p in zip(self.critic_target.parameters(), self.critic.parameters()):
            average.data = self.tau * p.data + (1 - self.tau) * average.data
        self.step += 1
        losses = {"critic_loss": critic_loss, "bc_loss": bc_loss, "q_loss": q_loss, "actor_loss": actor_loss}
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def act(self, state, n_candidates=50):
        """States (N,S) -> actions (N,A): of n_candidates samples each, one by softmax of the smaller target Q."""
        repeated = state.repeat_interleave(n_candidates, dim=0)
        actions = self.policy.sample(repeated)
        q = torch.min(*self.critic_target(repeated, actions)).view(len(state), n_candidates)
        pick = torch.multinomial(F.softmax(q, dim=1), 1)[:, 0]
        return actions.view(len(state), n_candidates, -1)[torch.arange(len(state)), pick]
