"""The pictures of the benchmarks."""

import json

import pytest
from matplotlib.image import imread

from bench import plot


def write_figures(folder, device):
    where = dict(gpu=None if device == "cpu" else device, cpu="a CPU", torch="2.13.0", date="2026-01-01", commit="abcdef0")
    sampled = [
        dict(T=5, batch=n, contestant=c, precision="fp16", p50=0.1 * n**0.5, actions_per_s=1e4 * n**0.5, share=0.1)
        for n in (1, 64, 4096)
        for c in ("eager", "eager, graph", "compile", "fused fp16", "fused fp16, graph")
    ]
    acted = [dict(states=n, contestant=c, p50=0.2) for n in (1, 100) for c in ("eager", "fused fp16", "eager, numpy to numpy")]
    (folder / f"sampling_{device}.json").write_text(json.dumps({**where, "figures": sampled}))
    (folder / f"acting_{device}.json").write_text(json.dumps({**where, "candidates": 50, "figures": acted}))


def test_every_measured_device_gets_a_picture(tmp_path, capsys):
    for device in ("cpu", "h100"):
        write_figures(tmp_path, device)
    (tmp_path / "acting_h100.json").unlink()
    plot.main(["--results", str(tmp_path)])
    wide, narrow = (imread(tmp_path / f"sampling_{device}.png") for device in ("cpu", "h100"))
    assert wide.shape[1] > narrow.shape[1] > 900 and wide.std() > 0.05
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not list(tmp_path.glob(".*"))


def test_the_training_ladder_is_drawn_with_one_agent_and_with_several(tmp_path, capsys):
    for device in ("cpu", "h100"):
        write_figures(tmp_path, device)
        names = ["straightforward", "eager"] + (["graph", "fused fp16"] if device == "h100" else [])
        figures = [
            dict(threads=1, workload=w, contestant=c, seeds=n, updates_per_s=10.0 * 3**i * n)
            for w in ("update", "update, max-Q")
            for i, c in enumerate(names)
            for n in ((1, 8) if c.startswith("fused") else (1,))
        ]
        where = json.loads((tmp_path / f"sampling_{device}.json").read_text())
        (tmp_path / f"training_{device}.json").write_text(json.dumps(where | {"figures": figures}))
    plot.main(["--results", str(tmp_path)])
    one, several = (imread(tmp_path / f"training_{device}.png") for device in ("cpu", "h100"))
    assert several.shape[1] > one.shape[1] and one.std() > 0.05
    assert "training_h100.png" in capsys.readouterr().out


def test_a_device_that_was_not_measured_is_refused_with_those_that_were(tmp_path):
    with pytest.raises(SystemExit, match="run python -m bench.sampling first"):
        plot.main(["--results", str(tmp_path)])
    write_figures(tmp_path, "cpu")
    with pytest.raises(SystemExit, match="no figures of h100.*there are: cpu"):
        plot.main(["h100", "--results", str(tmp_path)])


def test_a_contestant_and_its_graph_share_a_colour_and_others_do_not():
    names = ["eager", "eager, graph", "compile", "fused fp16", "fused fp16, graph", "fused tf32"]
    colour = plot.colours(names)
    assert colour["eager"] == colour["eager, graph"] and colour["fused fp16"] == colour["fused fp16, graph"]
    assert len(set(colour.values())) == 4
