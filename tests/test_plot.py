"""bench/plot.py: every device that was measured gets its pictures."""

import json
import shutil

import pytest
from conftest import ROOT
from legible import assert_legible

from bench import plot

WORDS = "$5^ of words$"  # where TeX would see an error


def write_figures(folder, device):
    """As bench.sampling, bench.acting and bench.training write them, fused on a GPU alone."""
    on_gpu = device != "cpu"
    where = dict(gpu=device if on_gpu else None, cpu=WORDS, torch="2.13.0", date="2026-01-01")
    where["commit"] = "abcdef0"
    names = ["eager", "compile"] + ["eager, graph", "fused fp16", "fused fp16, graph"] * on_gpu
    sampled = [
        dict(T=5, batch=n, variant=name, precision="fp16", p50=0.1, actions_per_s=n, share=0.1)
        for n in (1, 64, 4096)
        for name in names
    ]
    acted = [dict(states=n, variant=name, p50=0.2) for n in (1, 100) for name in names]
    trained = [
        dict(threads=1, workload=w, variant=name, seeds=n, updates_per_s=10.0 * 3**i * n)
        for w in ("update", "update, max-Q")
        for i, name in enumerate(names)
        for n in ((1, 8) if name.startswith("fused") else (1,))
    ]
    for what, figures in (("sampling", sampled), ("acting", acted), ("training", trained)):
        content = {**where, "candidates": 50, "figures": figures}
        (folder / f"{what}_{device}.json").write_text(json.dumps(content))


def test_every_measured_device_gets_its_pictures(tmp_path, capsys):
    for device in ("cpu", "h100"):
        write_figures(tmp_path, device)
    (tmp_path / "acting_h100.json").unlink()
    plot.main(["--results", str(tmp_path)])
    kinds = ("training", "sampling")
    names = [f"{what}_{device}.png" for device in ("cpu", "h100") for what in kinds]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert {path.name for path in tmp_path.glob("*.png")} == set(names)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("device", ["cpu", "h100"])
@pytest.mark.parametrize("what", ["training", "sampling"])
def test_pictures_can_be_read(what, device, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "bench/results", tmp_path, dirs_exist_ok=True)
    draw = getattr(plot, f"draw_{what}")
    names = ("sampling", "acting") if what == "sampling" else ("training",)
    measured = [json.loads((tmp_path / f"{name}_{device}.json").read_text()) for name in names]
    path = tmp_path / "drawn.png"
    assert_legible(lambda: draw(*measured, path), path, monkeypatch)


def test_a_device_that_was_not_measured_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="run python -m bench.sampling first"):
        plot.main(["--results", str(tmp_path)])
    write_figures(tmp_path, "cpu")
    with pytest.raises(SystemExit, match="no figures of h100.*there are: cpu"):
        plot.main(["h100", "--results", str(tmp_path)])
