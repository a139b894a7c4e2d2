"""The first minutes on a GPU: are the kernels right there, and the most important timings.

    python -m bench.first               # two minutes with 16 cores
    python -m bench.first sampler fp16  # one of its parts, in this process: a JSON line per finding

Each kernel at each precision is checked in a process of its own, all at once, since most of the
time is a compiler's: one that hangs or breaks its CUDA context does not affect the others. Results
are compared with float64 as in bench.sampling, acting and training. Calls are repeated and must
give the same bits: a result that changes is a race. Then, alone, a few timings in microseconds
(20th, 50th and 80th percentile). Findings are written to runs/bench/first_DEVICE.json as soon as
they are known.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from bench import training
from bench.acting import CANDIDATES, agent_at, check_fused
from bench.folders import ROOT, add_results_option, make_folder
from bench.sampling import Variant, check, make_noise, make_policy
from bench.timing import QUANTILES, device_slug, measure, peaks
from dql import Updates
from trainer.folder import save_json
from trainer.provenance import describe
from trainer.terminal import steady_output

REPEATS = 200


def say(what: str, ok: bool = True, **found) -> None:
    print(json.dumps({"what": what, "ok": ok, **found}), flush=True)


def judge(what: str, find) -> None:
    """Say what error find() returns, or what it raises."""
    try:
        say(what, error=find())
    except (Exception, SystemExit) as e:
        say(what, ok=False, why=str(e).partition("\n")[0] or type(e).__name__)


def repeat(what: str, call) -> None:
    first = call().clone()
    moved = sum(not torch.equal(first, call()) for _ in range(REPEATS))
    say(f"{what}, {REPEATS} times", ok=moved == 0, moved=moved)


# ---- The checks ----------------------------------------------------------------------------------


def sampler(precision: str, device, sizes=(1, 50, 4096, 20_000)) -> None:
    from kernels import FusedSampler

    for n in sizes:
        what, policy = f"sampler {precision}, {n} rows", make_policy(5, device)
        inputs, fused = make_noise(policy, n, device), FusedSampler(policy, precision)
        variant = Variant(lambda: fused(inputs[0]), fused, precision)
        judge(what, lambda: check(policy, variant, n))
        repeat(what, lambda: fused(*inputs))


def actor(precision: str, device, sizes=(1, 9, 100)) -> None:
    from kernels import FusedActor

    for n in sizes:
        what, agent = f"actor {precision}, {n} states", agent_at(device, False)
        act = FusedActor(agent.policy, agent.critic_target, CANDIDATES, precision)
        state = make_noise(agent.policy, n, device)[0]
        judge(what, lambda: check_fused(agent, act, state))
        repeat(what, lambda: act(state, seed=3))
        say(f"{what}: its counters are back at 0", ok=not act.done.any().item())


def trained(device, run) -> torch.Tensor:
    """All weights of an agent after run(agent, transitions)."""
    agent = training.make_agents(1, False, device)[0]
    run(agent, training.random_transitions(10_000, device))
    return training.parameters(agent)


def update(precision: str, device, n: int = 200) -> None:
    from kernels import FusedUpdate

    def check_weights():
        makers = training.variants_to_check(False, False, device)
        agents = {name: makers[name]() for name in (training.BASELINE, "eager")}
        agent = training.make_agents(1, False, device)[0]
        agents[f"fused {precision}"] = FusedUpdate(agent, None, training.BATCH, precision)
        training.check_updates(agents, device=device)

    def in_pieces_of(k):
        def run(agent, transitions):
            fused = FusedUpdate(agent, transitions, training.BATCH, precision)
            for _ in range(n // k):
                fused.run(k)

        return trained(device, run)

    judge(f"update {precision}", check_weights)
    what, replayed = f"update {precision}, {n} times", in_pieces_of(n)
    say(f"{what}: the weights are finite", ok=bool(replayed.isfinite().all()))
    for pieces, k in (("once more", n), ("a launch at a time", 1)):
        same = torch.equal(replayed, in_pieces_of(k))
        say(f"{what}, {pieces}: the same bits", ok=same)


def graph(_, device, n: int = 200) -> None:
    from kernels.graphs import GraphUpdates

    def weights_after(updates):
        def run(agent, transitions):
            updates([agent], transitions, training.BATCH).run(n)

        return trained(device, run)

    apart = float((weights_after(Updates) - weights_after(GraphUpdates)).abs().max())
    # Not the same bits: cuBLAS may choose another product.
    say(f"eager updates, {n} times: captured as launched", ok=apart < 1e-3, apart=apart)


# ---- The timings ---------------------------------------------------------------------------------


def timings(_, device) -> None:
    from kernels import FusedActor, FusedSampler, FusedUpdate
    from kernels.graphs import Captured, NumpyActor

    transitions = training.random_transitions(1_000_000, device)
    agent, policy = agent_at(device, False), make_policy(5, device)

    def time_each(what, make, per=1):
        """Say how long each of make()'s calls takes, or why not."""
        try:
            for name, t in measure(make(), 1.0, device).items():
                times = {key: round(1e3 * t[key] / per, 2) for key in QUANTILES}
                say(f"{what}, {name}", **times, unit="us")
        except Exception as e:
            say(what, ok=False, why=str(e).partition("\n")[0])

    def updates(seeds):
        agents = training.make_agents(seeds, False, device)
        fused = FusedUpdate(agents, transitions, training.BATCH)
        fused.capture()
        return {"graph": lambda: fused.run(100)}

    def decisions(n):
        act = FusedActor(agent.policy, agent.critic_target, CANDIDATES)
        state = make_noise(agent.policy, n, device)[0]
        return {
            "graph": Captured(act, state).replay,
            "launch": lambda: act(state),
            "eager": lambda: agent.act(state),
        }

    def control():
        fused = FusedActor(agent.policy, agent.critic_target, CANDIDATES)
        act = NumpyActor(fused, training.STATE_DIM, device=device)
        observation = make_noise(agent.policy, 1, device)[0][0].cpu().numpy()
        return {"numpy to numpy": lambda: act(observation)}

    def samples(n):
        state = make_noise(policy, n, device)[0]
        calls = {p: Captured(FusedSampler(policy, p), state).replay for p in ("fp16", "fp16x3")}
        return calls | {"eager, graph": Captured(policy.sample, state).replay}

    for seeds in (1, 8):
        time_each(f"update fp16, {seeds} seeds", lambda: updates(seeds), per=100)
    for n in (1, 100):
        time_each(f"best of {CANDIDATES}, {n} states", lambda: decisions(n))
    time_each(f"best of {CANDIDATES}, 1 state", control)
    for n in (1, 256, 4096, 4097, 1 << 16, 1 << 20):
        time_each(f"sample {n} rows", lambda: samples(n))
    say("ceilings", **peaks(device))


# ---- All parts -----------------------------------------------------------------------------------

PARTS = {"sampler": sampler, "actor": actor, "update": update, "graph": graph, "timings": timings}
TOGETHER = [(part, p) for part in ("sampler", "actor", "update") for p in training.FUSED]
TOGETHER += [("graph", "eager")]


def findings_of(part: tuple[str, str], seconds: float) -> list[dict]:
    """What a part in a process of its own finds; it is ended after seconds."""
    words = [sys.executable, "-m", "bench.first", *part]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0]
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if process.returncode:
        why = f"it ended with {process.returncode}"
        found.append({"what": " ".join(part), "ok": False, "why": why})
    return found


def run_parts(parts: list, seconds: float, add) -> None:
    """Run all parts at once, each ended after seconds. Calls add(findings) as each ends."""
    with ThreadPoolExecutor(len(parts)) as pool:
        started = [pool.submit(findings_of, part, seconds) for part in parts]
        for done in as_completed(started):
            add(done.result())


@steady_output()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = "one part, in this process; default: all"
    parser.add_argument("part", nargs="?", choices=PARTS, help=what)
    parser.add_argument("precision", nargs="?", default="fp16", help="of that part")
    add_results_option(parser, "bench")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.first checks a CUDA GPU, and none was found")
    if options.part:
        return PARTS[options.part](options.precision, torch.device("cuda"))
    make_folder(options.out)
    where, findings, start = describe(), [], time.monotonic()
    path = options.out / f"first_{device_slug(where)}.json"

    def add(found):
        for finding in found:
            failed = "" if finding["ok"] else "FAILED: "
            took = time.monotonic() - start
            print(f"{took:4.0f} s {failed}{json.dumps(finding)}", flush=True)
        findings.extend(found)
        save_json(path, {**where, "findings": findings})

    run_parts(TOGETHER, 150, add)
    run_parts([("timings", "fp16")], 120, add)
    failed = [finding for finding in findings if not finding["ok"]]
    print(f"{len(findings)} findings in {path}, {len(failed)} of them failures")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
