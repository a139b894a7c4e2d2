"""What makes the updates, and what acts: plain torch made quick, compiled, CUDA graphs, kernels.

Each is tried on one batch against plain torch before it is trusted.
"""

import time

import torch

from dql import Batch, Updates
from kernels import eager
from trainer.options import Options, UserError
from trainer.terminal import first_line, say

WORTH_COMPILING = 20_000  # updates: compiling takes a minute or two of a run of at least ten
TIMED_UPDATES = 8  # with each number of threads
HOPELESS = 3.0  # times slower: not looked at any longer
TOLERANCE = 0.05  # relative; fp16's rounding is a thousandth


def choose_threads(options: Options, agents: list, transitions, made_with: int = 0) -> None:
    """How many threads torch uses on a CPU: options.threads, or as many as a run was made with, or
    all or one, whichever updates faster now. The agents' state is unchanged.

    Threads that share an operation wait for each other's end. Beside other work one of them is
    always late, and an update takes many times as long as with one thread (bench/waiting.py).
    """
    most = torch.get_num_threads()
    if options.threads or most == 1 or agents[0].device.type != "cpu":
        return
    if 0 < made_with <= most:  # the same number gives the same bits
        torch.set_num_threads(made_with)
        return
    agent = agents[0]
    eager.speed_up(agent)
    before, seconds = agent.state_dict(), {1: 0.0, most: 0.0}
    batch, noise = _one_batch(options, agent, transitions)
    agent.update(batch, noise)  # the first one also makes what is made once
    for _ in range(TIMED_UPDATES):
        for n in seconds:
            torch.set_num_threads(n)
            started = time.perf_counter()
            agent.update(batch, noise)
            seconds[n] += time.perf_counter() - started
        if seconds[most] > HOPELESS * seconds[1]:
            break
    agent.load_state_dict(before)
    torch.set_num_threads(min(seconds, key=seconds.get))
    if torch.get_num_threads() == 1:
        slower = f"{seconds[most] / seconds[1]:.1f} times slower with {most}"
        say(f"other work keeps the cores busy: updates take one thread, they are {slower} now")


def _one_batch(options: Options, agent, transitions) -> tuple:
    rows = torch.arange(options.batch_size, device=agent.device) % len(transitions)
    batch = Batch(*(column[rows] for column in transitions.columns))
    return batch, agent.draw_noise(options.batch_size)


def choose_updates(options: Options, agents: list, transitions):
    """options.backend, or the fastest one that works here. -> has run(n), as dql.Updates"""
    backends = [options.backend] if options.backend != "auto" else _candidates(options, agents)
    for backend in backends:
        try:
            return make_updates(backend, options, agents, transitions)
        except Exception as e:  # any failure falls back to the next slower one
            if options.backend != "auto" or backend == backends[-1]:
                reason = f"--backend {backend} is not available: {first_line(e)}"
                raise UserError(reason) from e
            say(f"updates will not be {backend}: {first_line(e)}")


def _candidates(options: Options, agents: list) -> list[str]:
    if agents[0].device.type == "cuda":
        return ["fused", "graph", "eager"]
    worth_it = options.epochs * options.updates_per_epoch >= WORTH_COMPILING
    return ["compile", "eager"] if worth_it and eager.has_compiler() else ["eager"]


def make_updates(backend: str, options: Options, agents: list, transitions):
    """Raises ImportError, ValueError or whatever a compiler raises if this backend cannot work."""
    on_gpu = agents[0].device.type == "cuda"
    if backend == "fused":
        return _fused_updates(agents, transitions, options)
    for agent in agents:
        eager.speed_up(agent)
    if backend == "compile":
        _compile(agents, transitions, options)
    if backend == "graph" or (backend == "compile" and on_gpu):
        from kernels.graphs import GraphUpdates

        return GraphUpdates(agents, transitions, options.batch_size)
    return Updates(agents, transitions, options.batch_size)


def _compile(agents: list, transitions, options: Options) -> None:
    if agents[0].device.type != "cuda" and not eager.has_compiler():
        raise ValueError("it needs a C++ compiler, and there is none: install g++")
    say("compiling the update: a minute or two")
    for agent in agents:
        eager.compile_update(agent)
    try:
        for agent in agents:
            _try([agent], lambda batch, noise: agent.update(batch, noise), transitions, options)
    except Exception:
        for agent in agents:
            eager.undo_compile(agent)
        raise


def _fused_updates(agents: list, transitions, options: Options):
    import kernels

    if reason := kernels.why_not():
        raise ValueError(reason)
    update = kernels.FusedUpdate(agents, transitions, options.batch_size, options.precision)

    def step(batch, noise):
        return update.step([batch] * len(agents), [noise] * len(agents))[0]

    _try(agents, step, transitions, options)
    update.capture()  # what may fail fails here, where there is something to fall back to
    return update


def _try(agents: list, step, transitions, options: Options) -> None:
    """One update by step(batch, noise), and by the first agent in plain torch: the same metrics, or
    ValueError. Afterwards the agents are what they were, also where it fails."""
    agent = agents[0]
    before = [a.state_dict() for a in agents]
    batch, noise = _one_batch(options, agent, transitions)
    try:
        expected = type(agent).update(agent, batch, noise)
        agent.load_state_dict(before[0])
        found = step(batch, noise)
    finally:
        for a, state in zip(agents, before):
            a.load_state_dict(state)
    for name, value in expected.items():
        plain, quick = float(value), float(found[name])
        if not abs(quick - plain) < TOLERANCE * max(abs(plain), 0.1):
            raise ValueError(f"on this device its {name} is {quick:.4g}, plain torch's {plain:.4g}")


def choose_acting(options: Options, agents: list) -> list:
    """For each agent (states (N,S) numpy, torch.Generator) -> actions (N,A) numpy: by fused kernels
    where options ask for them or a GPU can run them, else by plain torch."""
    plain = [PlainActing(agent, options.n_candidates) for agent in agents]
    on_gpu = agents[0].device.type == "cuda"
    if options.backend not in ("auto", "fused") or (options.backend == "auto" and not on_gpu):
        return plain
    try:
        import kernels

        reason = kernels.why_not()
        if not reason:
            how = options.n_candidates, options.precision
            return [FusedActing(agent, *how) for agent in agents]
    except Exception as e:  # any failure falls back to plain torch
        reason = first_line(e)
    if options.backend == "fused":
        raise UserError(f"--backend fused is not available: {reason}")
    say(f"acting with plain torch, not with the fused kernels: {reason}")
    return plain


class PlainActing:
    def __init__(self, agent, n_candidates: int):
        self.agent, self.n_candidates = agent, n_candidates

    def __call__(self, states, generator):
        return self.agent.act(states, self.n_candidates, generator=generator)


class FusedActing:
    """DiffusionQL.act with one kernel launch for a call.

    It is tried on one state first. Raises ImportError without triton, and ValueError for a size or
    a device that the kernels do not support, or if their actions are not those of plain torch.
    """

    def __init__(self, agent, n_candidates: int, precision: str):
        import kernels

        self.agent, self.n_candidates = agent, 1 if agent.algo == "bc" else n_candidates
        policy = agent.policy
        if agent.algo == "bc":
            self.fused = kernels.FusedSampler(policy, precision)
        else:
            critic = agent.critic_target
            self.fused = kernels.FusedActor(policy, critic, n_candidates, precision)
        state = torch.zeros(1, policy.state_dim, device=agent.device)
        x_T, noises, *gumbel = self._noise(1, torch.Generator(agent.device).manual_seed(0))
        action = self.fused(state, x_T, noises, *gumbel)
        tried = action if agent.algo == "bc" else self.fused.candidates
        with torch.no_grad():
            apart = (tried - policy.sample(state, x_T=x_T, noises=noises)).abs().max()
        if not apart < TOLERANCE * policy.max_action:
            what = "on this device the kernel's actions are up to"
            raise ValueError(f"{what} {float(apart):.2g} away from plain torch's")

    def __call__(self, states, generator):
        states = torch.as_tensor(states, dtype=torch.float32, device=self.agent.device)
        flat = states.reshape(-1, self.agent.policy.state_dim)
        action = self.fused(flat, *self._noise(len(flat), generator))
        return action.view(*states.shape[:-1], -1).cpu().numpy()

    def _noise(self, n_states: int, generator) -> list:
        """What DiffusionQL.act draws: torch.multinomial divides by such exponential variates too,
        so both ways pick the same action."""
        policy, n, device = self.agent.policy, self.n_candidates, self.agent.device
        shape = policy.n_timesteps + 1, n_states * n, policy.action_dim
        noise = torch.randn(*shape, generator=generator, device=device)
        if self.agent.algo == "bc":
            return [noise[0], noise[1:]]
        variates = torch.empty(n_states, n, device=device).exponential_(generator=generator)
        return [noise[0], noise[1:], -variates.log()]
