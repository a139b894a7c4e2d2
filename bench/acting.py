"""Acting: the best of 50 candidates by softmax of Q; eager, compiled, in a graph, and fused.

    python -m bench.acting          # on an idle CPU 1.5 minutes; on a GPU one with --quick
    python -m bench.acting --quick  # one state and 100 states

Variants: plain is dql.py's act as it is, eager what kernels/eager.py makes of it, compile that with
its tensor part compiled. On a GPU also the tensor part in a CUDA graph; the fused actor at every
precision, launched directly, and for fp16 in a graph; and, for one state, what a control loop waits
for: from a numpy observation to a numpy action.

Before a variant is timed on a CPU, its actions are compared with plain's. A fused actor's
candidates and values are compared with float64 as in bench/sampling.py, and its choice with them. A
variant that fails is left out and reported.

Figures: milliseconds per call (20th, 50th and 80th percentile), decisions/s, the ratio of the first
variant's median to this one's, TFLOP/s, their share of the ceiling that a large matrix product of
that precision sets in the same run, and the relative error of fused values. Written to
runs/bench/acting_DEVICE.json; a line for each is appended to acting.csv.
"""

import copy
import gc
import math
import sys
from functools import lru_cache, partial

import torch

from bench.rounding import allowed, error
from bench.sampling import ACTION_DIM, STATE_DIM, arithmetic, flops_per_action, make_noise
from bench.timing import Figures, parse_options, peaks, precision_of, speed, speed_text
from dql import DiffusionQL
from kernels import eager
from trainer.terminal import steady_output

CANDIDATES = 50
CHECKED_STATES = 8  # at least: rounding errors in the values of one state are alike
COLUMNS = "states variant precision p20 p50 p80 ratio decisions_per_s tflops share error".split()


def flops_per_decision(agent) -> int:
    """Multiplications and additions of 50 chains' matrix products, and of both critics' on them."""
    H = agent.critic.q1_model[0].out_features
    critic = 2 * ((STATE_DIM + ACTION_DIM) * H + 2 * H * H + H)
    return CANDIDATES * (flops_per_action(agent.policy) + 2 * critic)


def check_fused(agent, actor, state) -> float:
    """The relative error of a fused actor's values.

    At least CHECKED_STATES states are checked: the given ones, and others if they are fewer. Raises
    SystemExit if this error, or the candidates', is over what rounding.allowed() grants, or if an
    action is not the best candidate.
    """
    policy, critic, precision = agent.policy, agent.critic_target, actor.policy.precision
    exact_policy, exact_critic = copy.deepcopy(policy).double(), copy.deepcopy(critic).double()
    n, parts = len(state), []
    rows, what = CANDIDATES * n, f"fused {precision}, {n} states"
    for seed in range(1, 1 + math.ceil(CHECKED_STATES / n)):
        others, x_T, noises = make_noise(policy, rows, state.device, seed)
        s = state if seed == 1 else others[:n]
        gumbel = -torch.empty(n, CANDIDATES, device=s.device).exponential_().log()
        action = actor(s, x_T, noises, gumbel)
        own, values = actor.candidates[:rows].clone(), actor.values[:rows].clone()
        best = (values.view(n, -1) + gumbel).argmax(1)
        chosen = own.view(n, CANDIDATES, -1)[torch.arange(n, device=s.device), best]
        if not torch.equal(action, chosen):
            raise SystemExit(f"{what}: an action is not the best candidate")
        s = s.repeat_interleave(CANDIDATES, 0)
        exact = exact_policy.sample(s.double(), x_T=x_T.double(), noises=noises.double())
        exact_q = torch.minimum(*exact_critic(s.double(), own.double()))[:, 0]
        with torch.no_grad(), arithmetic(precision, s.device.type):
            plain = policy.sample(s, x_T=x_T, noises=noises)
            plain_q = torch.minimum(*critic(s, own))[:, 0]
        parts.append((exact, plain, own, exact_q, plain_q, values))
    exact, plain, own, exact_q, plain_q, values = (torch.cat(each) for each in zip(*parts))
    found = error(own, exact), error(values, exact_q)
    eager_ones = error(plain, exact), error(plain_q, exact_q)
    times = allowed(precision, state.is_cuda)
    if not (found[0] <= times * eager_ones[0] and found[1] <= times * eager_ones[1]):
        raise SystemExit(f"{what}: errors {found}, eager ones {eager_ones}")
    return found[1]


def agent_at(device, quick: bool, compiled: bool = False) -> DiffusionQL:
    """As dql.py has it, or quick: as kernels/eager.py makes it. Always with the same weights."""
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
    """Name -> () -> (what to time, the values' relative error if it is fused)."""
    from kernels import FusedActor
    from kernels.graphs import Captured, NumpyActor
    from kernels.packing import PRECISIONS

    n, device = len(state), state.device

    def in_graph(agent):
        """agent.act without waiting for the host: its multinomial checks that Q is finite."""

        @torch.no_grad()
        def act(state):
            shape = agent.policy.n_timesteps + 1, CANDIDATES * n, ACTION_DIM
            actions, q = agent.propose(state, torch.randn(*shape, device=device))
            pick = (q - torch.empty_like(q).exponential_().log()).argmax(1)
            return actions[torch.arange(n, device=device), pick]

        return Captured(act, state).replay

    def fused(precision, graph=False):
        actor = FusedActor(agent.policy, agent.critic_target, CANDIDATES, precision)
        found = check_fused(agent, actor, state)
        return Captured(actor, state).replay if graph else lambda: actor(state), found

    def numpy_to_numpy():
        actor = FusedActor(agent.policy, agent.critic_target, CANDIDATES)
        act, observation = NumpyActor(actor, STATE_DIM, device=device), state[0].cpu().numpy()
        return lambda: act(observation), None

    @lru_cache
    def quick(compiled=False):
        return agent_at(device, True, compiled)

    def acts(agent, state):
        return lambda: agent.act(state, CANDIDATES), None

    calls = {
        "plain": lambda: acts(agent, state),
        "eager": lambda: acts(quick(), state),
        "eager, graph": lambda: (in_graph(quick()), None),
    }
    if compiled:
        calls["compile"] = lambda: acts(quick(True), state)
        calls["compile, graph"] = lambda: (in_graph(quick(True)), None)
    for precision in PRECISIONS:
        calls[f"fused {precision}"] = partial(fused, precision)
        if precision == "fp16":
            calls["fused fp16, graph"] = partial(fused, precision, graph=True)
    if n == 1:
        calls["eager, numpy to numpy"] = lambda: acts(quick(), state[0].cpu().numpy())
        calls["fused fp16, graph, numpy to numpy"] = numpy_to_numpy
    return calls


def tried(make):
    """make() after one call: what it compiles is done or has failed."""
    call, apart = make()
    call()
    return call, apart


def measure_case(figures: Figures, n: int, quick: bool, device) -> None:
    """Check variants for n states, time them in turns; save and print their figures."""
    on_gpu = device.type == "cuda"
    agent = agent_at(device, False)
    state = make_noise(agent.policy, n, device)[0]
    make_calls = gpu_calls if on_gpu else cpu_calls
    compiled = n in (1, 100) and not quick if on_gpu else eager.has_compiler()
    what = f"{n} states"
    makers = figures.attempt(what, lambda: make_calls(agent, state, compiled)) or {}
    tries = {name: partial(tried, make) for name, make in makers.items()}
    made = figures.attempt_each(what, tries)
    calls = {name: call for name, (call, _) in made.items()}
    seconds = (0.5 if quick else 1.0) if on_gpu else (2.0 if quick else 10.0)
    for name, t in figures.time(what, calls, seconds, device).items():
        precision, flops = precision_of(name), n * flops_per_decision(agent)
        figure = {"states": n, "variant": name, "precision": precision, **t}
        figure["decisions_per_s"] = round(n / t["p50"] * 1e3)
        figure |= speed(flops, t["p50"], precision, figures.more["peaks"])
        figure["error"] = made[name][1]
        figures.add([figure])
        print(f"{n:6d} states  {name:34s}{speed_text(figure, 'decisions_per_s')}", flush=True)


@steady_output()
def main(argv: list[str] | None = None) -> int:
    options = parse_options(__doc__, "one state and 100 states, for less time", argv)
    device, quick = options.device, options.quick
    how = {"quick": quick, "threads": options.threads, "candidates": CANDIDATES}
    how["peaks"] = peaks(device)
    print("ceilings:", how["peaks"], flush=True)
    figures = Figures("acting", COLUMNS, options.out, **how)
    sizes = (1, 8, 64, 100, 1024, 4096)
    if quick or device.type != "cuda":
        sizes = (1, 100)
    for n in sizes:
        measure_case(figures, n, quick, device)
        gc.collect()  # graphs keep their memory until they are collected
    return figures.finish()


if __name__ == "__main__":
    sys.exit(main())
