"""Acting: the best of 50 candidates by softmax of Q, for one state and for many; eager, compiled, in a graph, and fused.

    python -m bench.acting              # on a CPU a minute and a half; not run on a GPU yet
    python -m bench.acting --quick      # one state and 100 states, under a minute

plain is dql.py's act as it is, eager what kernels/eager.py makes of it, compile that with its tensor part compiled. On a GPU also
the tensor part in a CUDA graph, the fused actor launched directly and in a graph, and, for one state, what a control loop waits
for: numpy observation in, numpy action out. Before timing, candidates and values are checked against float64
as in bench/sampling.py, and the choice against them; what is wrong is left out and named. Written to
bench/results/acting_DEVICE.json, a line per figure appended to bench/results/acting.csv.
"""

import copy
import gc
import math
import sys
from functools import lru_cache

import torch

from bench.rounding import allowed
from bench.sampling import (
    ACTION_DIM,
    STATE_DIM,
    arithmetic,
    flops_per_action,
    make_noise,
)
from bench.timing import Figures, ceiling, parse_options, peaks
from dql import DiffusionQL
from kernels import eager

CANDIDATES = 50
CHECKED_STATES = 8  # at least: rounding errors in the values of one state are alike
COLUMNS = [
    "states",
    "contestant",
    "precision",
    "p20",
    "p50",
    "p80",
    "ratio",
    "decisions_per_s",
    "tflops",
    "share",
    "error",
]


def flops_per_decision(agent) -> int:
    """Matrix products of 50 chains and of both critics on their ends."""
    H = agent.critic.q1_model[0].out_features
    critic = 2 * ((STATE_DIM + ACTION_DIM) * H + 2 * H * H + H)
    return CANDIDATES * (flops_per_action(agent.policy) + 2 * critic)


def error(actual, exact) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def check_fused(agent, actor, state) -> float:
    """The values' relative error, of CHECKED_STATES at least: the state's, and others where they are fewer. Raises SystemExit where
    it, or the candidates', is over what rounding.allowed() grants, and where an action is not the best candidate."""
    rows, policy, critic, precision = (
        CANDIDATES * len(state),
        agent.policy,
        agent.critic_target,
        actor.policy.precision,
    )
    policy_64, critic_64, rounds = (
        copy.deepcopy(policy).double(),
        copy.deepcopy(critic).double(),
        [],
    )
    for seed in range(1, 1 + math.ceil(CHECKED_STATES / len(state))):
        others, x_T, noises = make_noise(policy, rows, state.device, seed)
        s = state if seed == 1 else others[: len(state)]
        gumbel = -torch.empty(len(s), CANDIDATES, device=s.device).exponential_().log()
        action = actor(s, x_T, noises, gumbel)
        own, values, s = (
            actor.candidates[:rows].clone(),
            actor.values[:rows].clone(),
            s.repeat_interleave(CANDIDATES, 0),
        )
        exact = policy_64.sample(s.double(), x_T=x_T.double(), noises=noises.double())
        exact_q = torch.minimum(*critic_64(s.double(), own.double()))[:, 0]
        with torch.no_grad(), arithmetic(precision, s.device.type):
            eager = policy.sample(s, x_T=x_T, noises=noises)
            eager_q = torch.minimum(*critic(s, own))[:, 0]
        rounds.append((exact, eager, own, exact_q, eager_q, values))
        best = (values.view(len(state), -1) + gumbel).argmax(1)
        chosen = own.view(len(state), CANDIDATES, -1)[
            torch.arange(len(state), device=s.device), best
        ]
        if not torch.equal(action, chosen):
            raise SystemExit(
                f"fused {precision}, {len(state)} states: an action is not the best candidate"
            )
    exact, eager, own, exact_q, eager_q, values = (torch.cat(parts) for parts in zip(*rounds))
    found, plain = (
        (error(own, exact), error(values, exact_q)),
        (error(eager, exact), error(eager_q, exact_q)),
    )
    times = allowed(precision, state.is_cuda)
    if not (found[0] <= times * plain[0] and found[1] <= times * plain[1]):
        raise SystemExit(
            f"fused {precision}, {len(state)} states: errors {found}, eager ones {plain}"
        )
    return found[1]


def agent_at(device, quick: bool, compiled: bool = False) -> DiffusionQL:
    """dql.py as it is, or quick, as kernels/eager.py makes it; always with the same weights."""
    agent = DiffusionQL(STATE_DIM, ACTION_DIM, device=device, seed=0)
    if quick:
        eager.speed_up(agent)
    if compiled:
        agent.propose = torch.compile(agent.propose, dynamic=False)
    return agent


def cpu_calls(agent, state, compiled: bool) -> dict:
    """Name -> () -> (what to time, None)."""
    expected = agent.act(state, CANDIDATES, generator=torch.Generator().manual_seed(2))

    def checked(other):
        actions = other.act(state, CANDIDATES, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(actions, expected, rtol=0, atol=2e-5)
        return lambda: other.act(state, CANDIDATES), None

    calls = {"plain": lambda: (lambda: agent.act(state, CANDIDATES), None)}
    calls["eager"] = lambda: checked(agent_at("cpu", True))
    return calls | ({"compile": lambda: checked(agent_at("cpu", True, True))} if compiled else {})


def gpu_calls(agent, state, compiled: bool) -> dict:
    """Name -> () -> (what to time, the values' relative error where it is fused)."""
    from kernels import FusedActor
    from kernels.graphs import Captured, NumpyActor
    from kernels.packing import PRECISIONS

    def in_graph(agent):
        """agent.act without what waits for the host: the choice by multinomial asks whether Q is finite."""

        @torch.no_grad()
        def act(state):
            noise = torch.randn(
                agent.policy.n_timesteps + 1,
                CANDIDATES * len(state),
                ACTION_DIM,
                device=state.device,
            )
            actions, q = agent.propose(state, noise)
            pick = (q - torch.empty_like(q).exponential_().log()).argmax(1)
            return actions[torch.arange(len(state), device=state.device), pick]

        return Captured(act, state).replay

    def fused(precision, graph):
        actor = FusedActor(agent.policy, agent.critic_target, CANDIDATES, precision)
        found = check_fused(agent, actor, state)
        return Captured(actor, state).replay if graph else lambda: actor(state), found

    def on_host():
        act = NumpyActor(
            FusedActor(agent.policy, agent.critic_target, CANDIDATES),
            STATE_DIM,
            device=state.device,
        )
        return lambda: act(observation), None

    @lru_cache
    def quick(compiled=False):
        return agent_at(state.device, True, compiled)

    calls = {"plain": lambda: (lambda: agent.act(state, CANDIDATES), None)}
    calls["eager"] = lambda: (lambda: quick().act(state, CANDIDATES), None)
    calls["eager, graph"] = lambda: (in_graph(quick()), None)
    if compiled:
        calls["compile"] = lambda: (lambda: quick(True).act(state, CANDIDATES), None)
        calls["compile, graph"] = lambda: (in_graph(quick(True)), None)
    for precision in PRECISIONS:
        calls[f"fused {precision}"] = lambda p=precision: fused(p, False)
        if precision == "fp16":
            calls["fused fp16, graph"] = lambda: fused("fp16", True)
    if len(state) == 1:
        observation = state[0].cpu().numpy()
        calls["eager, numpy to numpy"] = lambda: (
            lambda: quick().act(observation, CANDIDATES),
            None,
        )
        calls["fused fp16, graph, numpy to numpy"] = on_host
    return calls


def tried(make):
    """What make() gives, called once: what it compiles is done or has failed."""
    call, error = make()
    call()
    return call, error


def main(argv: list[str] | None = None) -> int:
    options = parse_options(__doc__, "one state and 100 states, under a minute", argv)
    device = options.device
    on_gpu = device.type == "cuda"
    seconds = (0.5 if options.quick else 1.0) if on_gpu else (2.0 if options.quick else 10.0)
    sizes = (1, 100) if options.quick or not on_gpu else (1, 8, 64, 100, 1024, 4096)
    figures = Figures(
        "acting",
        COLUMNS,
        options.out,
        quick=options.quick,
        threads=options.threads,
        candidates=CANDIDATES,
    )
    found_peaks = peaks(device)
    print("ceilings:", found_peaks, flush=True)
    for n in sizes:
        agent = agent_at(device, False)
        state = make_noise(agent.policy, n, device)[0]
        compiled = eager.has_compiler() if not on_gpu else n in (1, 100) and not options.quick
        calls = {}
        makers = (
            figures.attempt(
                f"{n} states", lambda: (gpu_calls if on_gpu else cpu_calls)(agent, state, compiled)
            )
            or {}
        )
        for name, make in makers.items():
            if made := figures.attempt(f"{n} states, {name}", lambda: tried(make)):
                calls[name] = made
        times = figures.time(
            f"{n} states", {name: call for name, (call, _) in calls.items()}, seconds, device
        )
        for name, t in times.items():
            precision = (
                name.split(",")[0].removeprefix("fused ") if name.startswith("fused") else "fp32"
            )
            tflops, most = (
                flops_per_decision(agent) * n / t["p50"] / 1e9,
                ceiling(found_peaks, precision),
            )
            figure = {
                "states": n,
                "contestant": name,
                "precision": precision,
                **t,
                "decisions_per_s": round(n / t["p50"] * 1e3),
            }
            figure |= {
                "tflops": round(tflops, 4),
                "share": most and round(tflops / most, 4),
                "error": calls[name][1],
            }
            figures.add([figure], peaks=found_peaks)
            share = f"{figure['share']:7.1%}" if most else ""
            rate = f"{figure['decisions_per_s']:11,} decisions/s {t['ratio']:8.2f}x {tflops:8.2f} TFLOP/s {share}"
            print(f"{n:6d} states  {name:34s}{t['p50']:10.4f} ms {rate}", flush=True)
        gc.collect()  # graphs hold their memory until they are gone
    return figures.finish()


if __name__ == "__main__":
    sys.exit(main())
