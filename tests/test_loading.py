"""bench/loading.py, and its bound: loading takes less than twice the memory of a file's arrays."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

import tasks
from bench import loading

HAS_PROC = Path("/proc/self/clear_refs").exists()
pytestmark = pytest.mark.skipif(not HAS_PROC, reason="memory is read from /proc")


@pytest.mark.parametrize("name", loading.TASKS)
def test_loading_peaks_below_twice_the_files_arrays(tmp_path, name):
    data = loading.make(tmp_path / "made.hdf5", tasks.get(name), 300_000)
    found = loading.measure(tmp_path / "made.hdf5", name)
    assert found["result"] < found["peak"] < 2 * data


def test_the_file_that_is_loaded_has_d4rls_layout(tmp_path):
    task = tasks.get("antmaze-umaze-v0")
    """In D4RL's layout, so that what is timed is what D4RL's files take."""
    size = loading.make(tmp_path / "made.hdf5", task, 2_100, "gzip")
    assert size == 2_100 * (4 * (29 + 8 + 1) + 2)
    with h5py.File(tmp_path / "made.hdf5") as file:
        observations, cut = file["observations"][:], file["timeouts"][:]
    assert np.flatnonzero(cut).tolist() == [699, 1399, 2099]
    data = tasks.load(task, tmp_path / "made.hdf5", log=lambda line: None)
    np.testing.assert_array_equal(data.observations, observations[:-1][~cut[:-1]])


def test_the_figures_are_saved_with_the_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "TASKS", ("antmaze-umaze-v0",))
    path = tmp_path / "new" / "loading.json"
    loading.main(["--rows", "3000", "--repeats", "1", "--out", str(path.parent)])
    assert capsys.readouterr().out.endswith(f"2 figures in {path}\n")
    saved = json.loads(path.read_text())
    measured = [(one["compression"], one["rows"]) for one in saved["figures"]]
    assert measured == [("none", 3000), ("gzip", 3000)]
    assert all(one["seconds"] > 0 and one["peak MiB"] > 0 for one in saved["figures"])
    assert {"cpu", "commit", "date"} <= saved.keys()


@pytest.mark.parametrize("arguments", [["--rows", "1"], ["--repeats", "0"]])
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        loading.main(arguments)
    assert "must be at least" in str(caught.value)
