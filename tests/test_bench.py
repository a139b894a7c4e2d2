"""bench/: what is timed is checked first, and the figures are written."""

import csv
import dataclasses
import json

import pytest
import torch

import kernels
from bench import acting, evaluation, first, sampling, tiles, timing, training
from dql import DiffusionQL
from kernels.tiles import HOPPER, SMALL, choose_product_tile
from trainer import loop


def made(makers: dict) -> dict:
    return {name: make() for name, make in makers.items()}


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_three_updates_agree_with_dql(max_q_backup):
    training.check_updates(made(training.variants_to_check(max_q_backup, compiled=False)))


def test_an_update_that_differs_is_noticed():
    agents = made(training.variants_to_check(False, compiled=False))
    plain = agents[training.BASELINE]
    plain.config = dataclasses.replace(plain.config, tau=0.1)
    with pytest.raises(AssertionError):
        training.check_updates(agents)


def test_sampling_is_checked_before_it_is_timed():
    policy = sampling.make_policy(5, "cpu")
    inputs = sampling.make_noise(policy, 33, "cpu")
    variants = made(sampling.cpu_variants(policy, inputs[0], compiled=False))
    assert all(sampling.check(policy, each, 33) < 1e-5 for each in variants.values())
    shifted = lambda s, x, z: policy.sample(s, x_T=x, noises=z) * 1.001  # noqa: E731
    wrong = variants["eager"]._replace(given=shifted)
    with pytest.raises(SystemExit, match="error 1.00e-03, the eager chain's"):
        sampling.check(policy, wrong, 33)
    unwritten = variants["eager"]._replace(draw=lambda: torch.full((33, 8), torch.nan))
    with pytest.raises(SystemExit, match="not finite"):
        sampling.check(policy, unwritten, 33)


def test_tf32_is_judged_by_tf32():
    """Even where torch would not use it: on a CPU, and perhaps in cuBLAS for a row."""
    reference = pytest.importorskip("reference", reason="triton has no package for this platform")
    policy = sampling.make_policy(5, "cpu")
    state, x_T, noises = sampling.make_noise(policy, 33, "cpu")
    exact = reference.exact(policy, state, x_T, noises)
    with sampling.arithmetic("tf32", "cpu"):
        found = acting.error(policy.sample(state, x_T=x_T, noises=noises), exact)
    plain, expected = (
        acting.error(reference.eager_at(policy, precision, state, x_T, noises), exact)
        for precision in ("fp32", "tf32")
    )
    assert plain < expected / 30 and 0.8 < found / expected < 1.25


@pytest.mark.parametrize("n", [1, 5])
def test_acting_agrees_with_the_baseline(n):
    agent = acting.agent_at("cpu", False)
    state = sampling.make_noise(agent.policy, n, "cpu")[0]
    made(acting.cpu_calls(agent, state, compiled=False))  # asserts that it does


def test_a_fused_actor_is_checked_before_it_is_timed(monkeypatch):
    kernels = pytest.importorskip("kernels")
    monkeypatch.setattr(acting, "CANDIDATES", 10)
    monkeypatch.setattr(acting, "CHECKED_STATES", 2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    agent = DiffusionQL(29, 8, hidden_dim=128, n_timesteps=2, device=device)
    state = sampling.make_noise(agent.policy, 1, agent.device)[0]
    actor = kernels.FusedActor(agent.policy, agent.critic_target, acting.CANDIDATES, "fp32")
    assert acting.check_fused(agent, actor, state) < 1e-5
    actor.critic.bias[:, -16:] += 0.01  # what is packed is wrong
    with pytest.raises(SystemExit, match="fused fp32, 1 states"):
        acting.check_fused(agent, actor, state)


def test_shares_of_the_ceiling_count_every_product_once():
    policy = sampling.make_policy(5, "cpu")
    layers = (policy.mid_layer[2], policy.mid_layer[4], policy.final_layer)
    multiplications = sum(layer.weight.numel() for layer in layers) + 256 * (29 + 8)
    assert sampling.flops_per_action(policy) == 2 * 5 * multiplications
    peaks = {"fp16 TFLOP/s": 600.0, "fp32 TFLOP/s": 60.0}
    found = [timing.ceiling(peaks, precision) for precision in ("fp16", "fp16x3", "fp32", "tf32")]
    assert found == [600.0, 200.0, 60.0, None]


def measured(calls, *_):
    """In place of timing.measure: the first call takes 2 ms, the second 3."""
    return {
        name: dict(p20=1.0 + i, p50=2.0 + i, p80=3.0 + i, rounds=7, ratio=2.0 / (2.0 + i))
        for i, name in enumerate(calls)
    }


@pytest.mark.parametrize("bench", [training, sampling, acting])
def test_figures_are_written_whole_and_appended(tmp_path, monkeypatch, capsys, bench):
    file = bench.__name__.split(".")[1]
    monkeypatch.setattr(timing, "measure", measured)
    monkeypatch.setattr(training, "BATCH", 8)
    for module in (sampling, acting):
        monkeypatch.setattr(module.eager, "has_compiler", lambda: False)
        monkeypatch.setattr(module, "peaks", lambda device: {"fp32 TFLOP/s": 0.1})
    for _ in range(2):
        assert bench.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    path = tmp_path / f"{file}_cpu.json"
    written = json.loads(path.read_text())
    assert capsys.readouterr().out.endswith(f"4 figures in {path}\n")
    assert {"cpu", "torch", "numpy", "python", "commit", "date", "figures"} <= written.keys()
    assert written["finished"] and written["failures"] == []
    assert [round(f["ratio"], 2) for f in written["figures"]] == [1.0, 0.67] * 2
    with (tmp_path / f"{file}.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 2 * 4 and set(rows[0]) == {*timing.ORIGIN, *bench.COLUMNS}
    assert all(row["p50"] and row["variant"] and row["device"] for row in rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{file}.csv", f"{file}_cpu.json"]


def test_what_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("it does not compile\nand here is why at length")

    whole = sampling.cpu_variants
    with_broken = lambda *args, **how: {"broken": broken} | whole(*args, **how)  # noqa: E731
    monkeypatch.setattr(sampling, "cpu_variants", with_broken)
    monkeypatch.setattr(sampling, "cases", lambda device, quick: [(5, 3, {"compiled": False})])
    monkeypatch.setattr(sampling, "peaks", lambda device: {})
    monkeypatch.setattr(timing, "measure", measured)
    assert sampling.main(["--threads", "1", "--out", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "sampling_cpu.json").read_text())
    assert [f["variant"] for f in written["figures"]] == ["plain", "eager"]
    assert written["failures"] == [{"what": "T=5, 3 rows, broken", "why": "it does not compile"}]
    said = "FAILED: T=5, 3 rows, broken: it does not compile"
    assert capsys.readouterr().out.count(said) == 2  # at once, and in the end


def test_figures_are_on_disk_as_soon_as_they_are_known(tmp_path):
    figures = timing.Figures("some", ["name"], tmp_path, quick=True)
    figures.add([{"name": "first"}], peaks={})
    written = json.loads((tmp_path / "some_cpu.json").read_text())
    assert written["figures"] == [{"name": "first"}]
    assert not written["finished"] and written["quick"]
    assert "first" in (tmp_path / "some.csv").read_text()


# ---- What only a GPU is asked: here on a CPU, with recorded graphs -------------------------------


@pytest.fixture
def small(monkeypatch, few_programs, cuda_graphs):
    """Small agents on the CPU, wherever they are asked for, in Triton's interpreter.

    few_programs comes before cuda_graphs: it skips where there is a GPU.
    """
    size = dict(hidden_dim=128, n_timesteps=2)

    def make_agents(n, max_q, device):
        return [DiffusionQL(29, 8, **size, **training.SETTINGS, seed=i) for i in range(n)]

    def make_policy(*_):
        return DiffusionQL(29, 8, **size).policy.requires_grad_(False)

    monkeypatch.setattr(training, "make_agents", make_agents)
    monkeypatch.setattr(training, "BATCH", 8)
    for module in (first, acting, tiles):
        monkeypatch.setattr(module, "agent_at", lambda *_: DiffusionQL(29, 8, **size))
        monkeypatch.setattr(module, "CANDIDATES", 3)
    monkeypatch.setattr(acting, "CHECKED_STATES", 3)
    for module in (first, sampling, tiles):
        monkeypatch.setattr(module, "make_policy", make_policy)


def test_variants_of_a_gpu_can_be_made_and_are_right(small):
    policy = sampling.make_policy(5, "cpu")
    inputs = sampling.make_noise(policy, 3, "cpu")
    how = dict(compiled=False, autotuned=False, precisions=("fp16",))
    variants = sampling.gpu_variants(policy, inputs[0], **how)
    names = ["plain", "eager", "eager, graph", "fused fp16", "fused fp16, graph"]
    assert list(variants) == names
    assert all(sampling.check(policy, each, 3) < 2e-3 for each in made(variants).values())
    calls = acting.gpu_calls(acting.agent_at(), inputs[0][:1].contiguous(), compiled=False)
    for name in ("eager, graph", "fused fp16, graph", "fused fp16, graph, numpy to numpy"):
        call, _ = acting.tried(calls[name])
        assert call().shape in ((1, 8), (8,))
    where, transitions = torch.device("cuda"), training.random_transitions(20, "cpu")
    updates = training.variants_to_check(False, False, where)
    checked = (training.BASELINE, "eager", "fused fp16")
    training.check_updates({name: updates[name]() for name in checked})
    for name, make in training.variants_to_time(1, False, False, transitions, where).items():
        if not name.startswith("fused") or name == "fused fp16":
            training.tried(make, 1)


def test_the_first_findings_on_a_gpu_are_found(small, monkeypatch, capsys):
    monkeypatch.setattr(first, "REPEATS", 1)
    monkeypatch.setattr("kernels.update.PER_REPLAY", 2)
    first.sampler("fp16", "cpu", sizes=(3,))
    first.actor("fp16", "cpu", sizes=(2,))
    first.update("fp16", "cpu", n=2)
    first.graph("eager", "cpu", n=2)
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(findings) == 2 + 3 + 4 + 1 and all(finding["ok"] for finding in findings), findings


def test_a_candidate_for_a_tile_is_checked_with_that_tile(small, monkeypatch):
    seen, kernel = [], kernels.sampler._sampler

    class Seen:
        def __getitem__(self, grid):
            return lambda *args, **how: (seen.append(args[-1]), kernel[grid](*args, **how))

    monkeypatch.setattr(kernels.sampler, "_sampler", Seen())
    monkeypatch.setattr(tiles, "CHECKED", 3)
    with tiles.chosen("sampler", [1, 32, 64, 4, 2]):
        tiles.check_one("sampler", "fp16", "cpu")
    assert {tile.rows for tile in seen} == {32}


def test_the_shipped_tiles_are_among_those_that_are_timed():
    candidates = tiles.candidates()
    assert len(candidates) == len(set(candidates))
    for precision, by_rows in HOPPER.items():
        for tile in [tile for _, tile in by_rows] + [SMALL[precision]]:
            fields = " ".join(str(int(field)) for field in tile)
            assert f"sampler {precision} {fields}" in candidates
    product = " ".join(map(str, choose_product_tile("fp16")))
    assert f"product fp16 {product}" in candidates


def test_a_part_that_breaks_or_hangs_is_a_finding(monkeypatch):
    """And the others go on. Without a GPU each breaks at once, or is ended before it can."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    findings = []
    first.run_parts([("update", "fp16"), ("graph", "eager")], 60, findings.extend)
    first.run_parts([("timings", "fp16")], 0.2, findings.extend)
    whys = {finding["what"]: finding["why"] for finding in findings}
    assert whys == {
        "update fp16": "it ended with 1",
        "graph eager": "it ended with 1",
        "timings fp16": "it ended with -9",
    }


def test_a_full_run_records_how_long_it_took(tmp_path, monkeypatch, capsys):
    class Run:
        records = [
            {"kind": "epoch", "step": step, "updates_per_second": 500.0}
            for step in (1000, 2000, 3000)
        ]

        def evaluations(self):
            found = {"step": 3000, "score": 41.0, "bc_loss": 0.1, "seconds": 4.0}
            return [found | {"data": "generated"}]

        def select(self, top_k):
            return {"last": {"score": 41.0, "top_k": top_k}}

    asked = []
    monkeypatch.setattr(loop, "train", lambda config: asked.append(config) or [Run()])
    where = ["--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    training.main(["--full-run", "--precision", "tf32", *where])
    (path,) = tmp_path.glob("full_run_*.json")
    written = json.loads(path.read_text())
    times = {"updating_s": 6.0, "evaluating_s": 4.0, "updates": 3000}
    assert times.items() <= written.items()
    assert (asked[0].precision, asked[0].data, asked[0].epochs) == ("tf32", "generated", 1000)
    assert f"last score 41.0, in {path}" in capsys.readouterr().out


@pytest.mark.gpu
def test_the_profiler_counts_no_more_launches_than_there_are():
    import kernels

    device = torch.device("cuda")
    agents = training.make_agents(2, True, device)
    transitions = training.random_transitions(10_000, device)
    update = kernels.FusedUpdate(agents, transitions, training.BATCH)
    found = training.profile(update.run, 100)
    assert 9 <= found["launches"] <= 10 and sum(found["kernels"].values()) > 0.9


def test_timing_takes_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("first", "second")}
    times = timing.measure(calls, 0.0)
    assert order[4:] == ["first", "second"] * 5 and times["second"]["rounds"] == 5
    assert times["second"]["p20"] <= times["second"]["p50"] <= times["second"]["p80"]
    assert times["first"]["ratio"] == 1.0


def test_results_are_named_after_the_device():
    names = {
        None: "cpu",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-40GB": "a100",
        "Tesla": "gpu",
    }
    for gpu, expected in names.items():
        assert timing.device_slug({"gpu": gpu, "cpu": "a CPU"}) == expected


# ---- Evaluation ----------------------------------------------------------------------------------


def test_stepping_is_measured_for_each_way_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "LIMIT", 2)
    monkeypatch.setattr(evaluation, "FEW", 2)
    little = ["--tasks", "hopper-medium-v2", "--threads", "1", "--rounds", "1"]
    path = tmp_path / "new" / "evaluation.json"
    evaluation.main([*little, "--out", str(path.parent)])
    found = json.loads(path.read_text())
    rates = found["steps_per_second"]["hopper-medium-v2"]
    assert list(rates) == ["10 episodes", "2 episodes", "SyncVectorEnv, 2", "AsyncVectorEnv, 2"]
    assert min(rates.values()) > 0 and found["threads"] == 1
    printed = capsys.readouterr().out
    assert "hopper-medium-v2" in printed and f"figures of 1 tasks in {path}" in printed


@pytest.mark.parametrize("bad", [["--tasks", "hopper-v2"], ["--rounds", "0"], ["--threads", "-1"]])
def test_stepping_refuses_bad_options_in_one_line(bad):
    with pytest.raises(SystemExit) as end:
        evaluation.main(bad)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
