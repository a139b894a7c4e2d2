"""A run's folder on disk: log, checkpoints, model selection, learning curve.

    config.json              the options, the data set, versions
    log.jsonl                one JSON object a line: each epoch's mean losses, each evaluation
    events.out.tfevents.*    the same numbers and the pictures for TensorBoard
    resume.safetensors       everything an exact resume needs, replaced at each save
    checkpoints/step_N.safetensors   the networks at each evaluation
    selection.json           which of them is last, best, offline, offline_released; their scores
    episodes_N.png, curve.png   the evaluated episodes, and scores and BC loss so far

Tensors are stored as safetensors, the rest as JSON; nothing is pickled. Every file is written under
a temporary name and moved when complete: a run that is killed leaves files that can be read.
"""

import json
import math
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from atomic import lock, written_whole
from trainer.terminal import command, decoration, first_line

UNTOUCHED = "what was saved before is untouched"


class RunError(RuntimeError):
    """A run's folder cannot be read or written. The message is one line and says what to do."""


@contextmanager
def saved(path: Path):
    """atomic.written_whole, but an OSError becomes a RunError."""
    try:
        with written_whole(path) as temporary:
            yield temporary
    except OSError as e:
        raise RunError(f"cannot write {path}: {e.strerror or e}; {UNTOUCHED}") from e


def save_tensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    """Write name -> tensor as safetensors; metadata goes into the header as JSON."""
    with saved(path) as temporary:
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        try:
            save_file(tensors, temporary, {"json": json.dumps(metadata or {})})
        except SafetensorError as e:  # how the library reports a full disk
            raise RunError(f"cannot write {path}: {e}; {UNTOUCHED}") from e


def load_tensors(path: Path) -> tuple[dict, dict]:
    """-> (name -> tensor, metadata). Raises RunError for a missing or broken file."""
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}
            about = json.loads((f.metadata() or {}).get("json", "{}"))
            if type(about) is not dict:
                raise ValueError("its metadata is no object")
            return tensors, about
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        raise RunError(f"checkpoint {path} is broken ({e}); take another run or checkpoint") from e


def restore(agent, path: Path, **how) -> dict:
    """agent.load_state_dict from a checkpoint -> its metadata

    The state of another kind of device's generator is replaced: a line says so. Raises RunError if
    the file is missing, broken or of another agent.
    """
    tensors, about = load_tensors(path)
    own, saved = agent.generator.get_state(), tensors.get("generator")
    if saved is not None and saved.dtype == own.dtype and saved.shape != own.shape:
        seed = 1_000_003 * int(tensors["seed"]) + int(tensors["step"])
        tensors["generator"] = torch.Generator(agent.device).manual_seed(seed).get_state()
        print("its noise came from another kind of device: from here on it is drawn anew")
    try:
        agent.load_state_dict(tensors, **how)
    except (KeyError, TypeError, RuntimeError) as e:
        why = str(e).splitlines()[-1].strip()
        raise RunError(f"checkpoint {path} does not fit this configuration: {why}") from e
    return about


def save_json(path: Path, content) -> None:
    with saved(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def load_json(path: Path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path.parent} is not a run's folder: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise RunError(f"{path} cannot be read: {first_line(e)}") from e


def select_checkpoints(evaluations: list[dict], top_k: int) -> dict:
    """Model selection: {rule: the evaluation it takes}, of dicts with step, score and bc_loss.

    best ("online" in the paper) needs the environment; offline takes the BC loss of rank top_k in
    ascending order. offline_released is the released code's `argsort(bc_loss) == top_k`, which is
    the inverse permutation and so takes another evaluation; it is kept for comparison with the
    published column. With fewer than top_k + 1 evaluations the last rank is taken.
    """
    bc_loss = np.array([e["bc_loss"] for e in evaluations])
    rank = min(top_k, len(evaluations) - 1)
    order = np.argsort(bc_loss, kind="stable")
    return {
        "last": evaluations[-1],
        "best": evaluations[int(np.argmax([e["score"] for e in evaluations]))],
        "offline": evaluations[int(order[rank])],
        "offline_released": evaluations[int(np.flatnonzero(order == rank)[0])],
    }


class RunFolder:
    """One run's folder. `records` holds the log in memory."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.records: list[dict] = []
        self._tensorboard = None

    @staticmethod
    def require_writable(parent: str) -> None:
        """Raises RunError unless folders can be made in parent: called before the data are read."""
        path = Path(parent).absolute()
        try:
            tempfile.TemporaryFile(dir=next(p for p in (path, *path.parents) if p.exists())).close()
        except OSError as e:
            refused = f"cannot make a run's folder in {parent}: {e.strerror}"
            raise RunError(f"{refused}; choose another with --out") from e

    @classmethod
    def create(cls, parent: str, name: str, config: dict) -> "RunFolder":
        """Make a new folder below parent; a number is appended to the name if it is taken."""
        parent, n = Path(parent), 1
        while True:
            path = parent / (name if n == 1 else f"{name}-{n}")
            try:
                (path / "checkpoints").mkdir(parents=True)
                break
            except FileExistsError:
                n += 1
            except OSError as e:
                refused = f"cannot make the run's folder {path}: {e.strerror}"
                raise RunError(f"{refused}; choose another with --out") from e
        save_json(path / "config.json", config)
        return cls(path)

    @contextmanager
    def claimed(self) -> Iterator["RunFolder"]:
        """Be the only process that writes here. Raises RunError if another one does."""
        mine = lock(self.path / "run")
        try:
            mine.acquire(timeout=0)
        except filelock.Timeout:
            what = f"{self.path} is in the hands of another process, which trains it"
            raise RunError(f"{what}: wait for its end, or stop it") from None
        except NotImplementedError:
            pass  # some network's file systems have no locks
        except OSError as e:
            raise RunError(f"cannot write in {self.path}: {e.strerror or e}") from e
        try:
            yield self
        finally:
            mine.release()

    def config(self) -> dict:
        """config.json: {"config": options, "data": Dataset.fingerprint(), "versions": ...}

        Raises RunError if that is not what it holds.
        """
        made = load_json(self.path / "config.json")
        parts = [made.get(k) for k in ("config", "data", "versions")] if type(made) is dict else []
        if not (parts and all(type(part) is dict for part in parts)):
            missing = "it lacks the options, the data or the versions"
            raise RunError(f"{self.path / 'config.json'} is no run's: {missing}")
        if type(made["data"].get("crc32")) is not int:
            raise RunError(f"{self.path / 'config.json'} is no run's: its data have no crc32")
        return made

    def keep_options(self, options: dict) -> None:
        """Note in config.json what a resumed run may have been given anew."""
        made = self.config()
        new = {name: options[name] for name in ("data", "epochs", "decay_epochs")}
        if made["config"] != made["config"] | new:
            save_json(self.path / "config.json", made | {"config": made["config"] | new})

    def selection(self, rule: str) -> dict:
        """What selection.json says of a rule's checkpoint: checkpoint, step, score, data.

        The checkpoint's path is made of its step, so that it lies in this folder. Raises RunError.
        """
        path = self.path / "selection.json"
        if not path.exists():
            config = self.config()["config"]
            what = f"{self.path} has not been evaluated yet"
            first = config.get("eval_every", 1) * config.get("updates_per_epoch", 1)
            todo = f"it is after {first:,} updates; go on with: {command('--resume', self.path)}"
            raise RunError(f"{what}, {todo}")
        chosen = load_json(path)
        chosen = chosen.get(rule) if type(chosen) is dict else None
        kinds = {"step": int, "score": (int, float), "data": str}
        if type(chosen) is not dict or not all(
            isinstance(chosen.get(name), kind) for name, kind in kinds.items()
        ):
            raise RunError(f"{path} does not say which checkpoint is {rule!r}")
        return {**chosen, "checkpoint": f"checkpoints/{self.checkpoint(chosen['step']).name}"}

    def log(self, kind: str, step: int, **numbers) -> None:
        """Append a record to log.jsonl, and its numbers to TensorBoard under kind/name."""
        record = {"kind": kind, "step": step, **numbers}
        self.records.append(record)
        try:
            with open(self.path / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            refused = f"cannot write the log in {self.path}: {e.strerror}"
            raise RunError(f"{refused}; checkpoints are untouched") from e
        with decoration("TensorBoard's copy of the log"):
            self._show(record)
            self._tensorboard.flush()

    def _show(self, record: dict) -> None:
        """Give a record to TensorBoard. The first updates' losses begin the epochs' curves."""
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self.path, purge_step=0)
        kind, step = record["kind"], record["step"]
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                tag = f"{'epoch' if kind == 'first' else kind}/{name}"
                self._tensorboard.add_scalar(tag, value, step)
        if kind == "evaluation" and (picture := self.picture(step)).exists():
            import imageio.v3 as iio

            self._tensorboard.add_image("episodes", iio.imread(picture), step, dataformats="HWC")

    def rewind_log(self, step: int) -> None:
        """Read log.jsonl back without what lies beyond step: those updates will be made again.

        Removes the half-written files that a killed run left behind, and gives TensorBoard the log
        anew, so that both hold the same. Raises RunError if a record is not one of a run's.
        """
        path = self.path / "log.jsonl"
        self.records = []
        try:
            for left in [*self.path.rglob(".*.part"), *self.path.glob("events.out.tfevents.*")]:
                left.unlink()
            lines = path.read_text().splitlines() if path.exists() else []
        except (OSError, ValueError) as e:
            raise RunError(f"cannot tidy up {self.path}: {first_line(e)}") from e
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break  # the line being written when the run was killed
            if not _is_record(record):
                raise RunError(f"line {number} of {path} is not one that a run writes")
            self.records.append(record)
        self.records = [r for r in self.records if r["step"] <= step]
        with saved(path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        with decoration("TensorBoard's copy of the log"):
            for record in self.records:
                self._show(record)

    def evaluations(self) -> list[dict]:
        return [r for r in self.records if r["kind"] == "evaluation"]

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:08d}.safetensors"

    def picture(self, step: int) -> Path:
        """Of the episodes of an evaluation."""
        return self.path / f"episodes_{step:08d}.png"

    def select(self, top_k: int) -> dict:
        """Apply the selection rules to the evaluations so far and write selection.json."""
        chosen = select_checkpoints(self.evaluations(), top_k)
        selection = {}
        for rule, e in chosen.items():
            file = f"checkpoints/{self.checkpoint(e['step']).name}"
            selection[rule] = {"checkpoint": file} | {k: e[k] for k in ("step", "score", "data")}
        save_json(self.path / "selection.json", selection)
        return selection

    def draw_curve(self, title: str) -> None:
        """curve.png: normalised score, with its standard error, and BC loss against updates."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 5), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        evaluations, epochs = self.evaluations(), [r for r in self.records if r["kind"] == "epoch"]
        steps, scores = [e["step"] for e in evaluations], [e["score"] for e in evaluations]
        errors = [e.get("standard_error") or 0.0 for e in evaluations]
        top.errorbar(steps, scores, errors, fmt="o-", capsize=3, color="tab:blue")
        title = "\n".join(textwrap.fill(line, 95) for line in title.splitlines())
        top.set_title(title, fontsize=9, parse_math=False)  # a label is text, its $ too
        # From 0, so that the noise of one evaluation does not fill the picture.
        low, high = min([0.0, *scores]) - 5, max([10.0, *scores]) + 10
        top.set(ylabel="normalised score", ylim=(low, high))
        losses = [r["bc_loss"] for r in epochs]
        bottom.plot([r["step"] for r in epochs], losses, color="tab:orange")
        limits = {"xlim": (0, None), "ylim": (0, 1.1 * max(losses, default=1.0))}
        bottom.set(ylabel="BC loss", xlabel="updates", **limits)
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
        with saved(self.path / "curve.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def _is_record(record) -> bool:
    """Whether this is what RunFolder.log writes: kind and step, and numbers that are finite."""
    if type(record) is not dict or type(record.get("step")) is not int:
        return False
    wanted = ["bc_loss", "score", "data"] if record.get("kind") == "evaluation" else []
    numbers = [value for value in record.values() if isinstance(value, float)]
    return "kind" in record and record.keys() >= set(wanted) and all(map(math.isfinite, numbers))
