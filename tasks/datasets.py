"""From a task and a source to a `Dataset`: D4RL's file, your own file, Minari's or generated data.

    load(task)                          D4RL's file, else downloaded, else generated; says which
    load(task, "d4rl")                  D4RL's file or an error, never a substitute
    load(task, "generated", seed=3)     generated here and cached, for tasks with a generator
    load(task, "mine.hdf5")             any HDF5 file in D4RL's layout
    load(task, "minari:NAME")           a local Minari data set (tasks/minari.py)
    load(task, "d4rl", repair=True)     antmaze: without the known defects (tasks/repair.py)

Scores are quoted with the label of what is returned. It is "D4RL NAME" only for D4RL's own file.
"""

import os
from pathlib import Path
from typing import Callable

from . import fetch, minari
from .hdf5 import AccessError, opened, read_hdf5
from .repair import RepairError, check_repairable
from .task import Dataset, TaskError, expanded, one_line

MINARI = "minari:"  # prefix of a source that names a Minari data set
REPAIRED = {False: "", True: ", repaired"}  # appended to a label


def load(
    task,
    source: str | os.PathLike = "auto",
    *,
    seed: int = 0,
    n_generated: int = 1_000_000,
    repair: bool = False,
    log: Callable[[str], None] = print,
) -> Dataset:
    """The task's transitions from a source.

    source is "auto", "d4rl", "generated", "minari:NAME", or the path of an HDF5 file. seed and
    n_generated, a number of transitions, are for the generator. repair reads an antmaze file by
    the ant's path instead of its flags (tasks/repair.py); the label then says so. What was loaded
    and why goes to `log` and into Dataset.reason.

    A D4RL file that exists but is broken is an error, even for "auto": replacing it would quietly
    change what a score is quoted for. Raises TaskError.
    """
    name = str(source)
    if repair:
        not_a_file = name == "generated" or name.startswith(MINARI)
        check_repairable(task, name if not_a_file else "")
    if source == "generated":
        return _generated(task, seed, n_generated, "asked for by name", log)
    if name.startswith(MINARI):
        return _minari(task, name.removeprefix(MINARI), log)
    if source not in ("auto", "d4rl"):
        return _file(task, expanded(source, "give the file's whole path"), repair, log)
    try:
        path = fetch.d4rl_folder() / fetch.base_name(task)
        folder = one_line(path.parent)
        if os.path.lexists(path):
            return _d4rl(task, path, f"found in {folder}", repair, log)
        log(f"data: no D4RL file for {task.name} in {folder}, trying to download it")
        url = fetch.fetch(task)
    except fetch.DownloadError as error:
        if source == "d4rl":
            raise
        why = error.short
        if repair:
            todo = "give --data PATH, or leave out --repair-data"
            raise TaskError(f"{why}, and generated data need no repair: {todo}") from error
        if not task.can_generate:
            raise TaskError(f"{why}; {_by_hand(task)}") from error
        return _generated(task, seed, n_generated, f"{why}, so the data were generated here", log)
    return _d4rl(task, path, f"downloaded from {url} to {folder}", repair, log)


def _d4rl(task, path: Path, reason: str, repair: bool, log) -> Dataset:
    log(f"data: D4RL {task.name} ({reason})")
    try:
        arrays = read_hdf5(path, task, repair=repair, log=log)
    except (RepairError, AccessError):
        raise
    except TaskError as error:
        message = f"D4RL's cached file is unusable, delete it to have it downloaded again: {error}"
        raise TaskError(message) from error
    return Dataset(task.name, "d4rl", f"D4RL {task.name}{REPAIRED[repair]}", reason, **arrays)


def _file(task, path: Path, repair: bool, log) -> Dataset:
    from . import get, names  # not at the top: the package imports this module

    others = {fetch.base_name(get(name)): name for name in names() if name != task.name}
    if path.name in others:
        what = f"{one_line(path)} is D4RL's file of {others[path.name]}, not of {task.name}"
        raise TaskError(f"{what}; give another file or another task")
    reason = f"the file {one_line(path)}, asked for by its path"
    log(f"data: {reason}")
    arrays = read_hdf5(path, task, repair=repair, own=True, log=log)
    label = f"file {one_line(path.name)} (task {task.name}){REPAIRED[repair]}"
    return Dataset(task.name, "file", label, reason, **arrays)


def _minari(task, name: str, log) -> Dataset:
    shown = one_line(name)
    reason = f"the Minari data set {shown}, asked for by its name"
    log(f"data: {reason}")
    label = f"Minari {shown} (its scores are not D4RL's)"
    return Dataset(task.name, "minari", label, reason, **minari.read(name, task, log=log))


def _generated(task, seed: int, n_transitions: int, reason: str, log) -> Dataset:
    if not task.can_generate:
        raise TaskError(_by_hand(task))
    from .generate import cached  # only needed here: files are read without the generator

    what = f"GENERATED for {task.name}, NOT D4RL's"
    log(f"data: {what}: scores on it are not comparable with published ones")
    log(f"data: why: {reason}")
    path = cached(task, n_transitions=n_transitions, seed=seed, log=log)
    try:
        arrays = read_hdf5(path, task, log=log)
        with opened(path) as file:
            n_rows = len(file["rewards"])
    except AccessError:
        raise
    except TaskError as error:
        message = f"the cached generated file is unusable, delete it to have it made again: {error}"
        raise TaskError(message) from error
    label = f"GENERATED {task.name} (seed {seed}, {n_rows:,} transitions; not D4RL's data)"
    return Dataset(task.name, "generated", label, reason, **arrays)


def _by_hand(task) -> str:
    """For a task without a generator: which file to put where."""
    file, url = task.dataset_file, fetch.D4RL_URL + task.dataset_file
    return (
        f"there are no generated data for {task.name}: put D4RL's {file} ({url}) "
        f"into {one_line(fetch.d4rl_folder())} as {fetch.base_name(task)}, or give --data PATH"
    )
