"""A run's folder on disk: log, checkpoints, model selection, learning curve.

    config.json              the options, the data set, versions
    log.jsonl                one JSON object a line: each epoch's mean losses, each evaluation
    events.out.tfevents.*    the same numbers for TensorBoard
    resume.safetensors       everything an exact resume needs, replaced at each save
    checkpoints/step_N.safetensors   the networks at each evaluation
    selection.json           which of them is last, best, offline, offline_released; their scores
    episodes_N.png, curve.png   the evaluated episodes, and scores and BC loss so far

Tensors are stored as safetensors, the rest as JSON; nothing is pickled. Every file is written under
a temporary name and moved when complete: a run that is killed leaves files that can be read.
"""

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from atomic import written_whole

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
            return tensors, json.loads((f.metadata() or {}).get("json", "{}"))
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise RunError(f"checkpoint {path} is broken ({e}); take another run or checkpoint") from e


def restore(agent, path: Path, **how) -> None:
    """agent.load_state_dict from a checkpoint.

    Raises RunError if the file is missing, broken or of another agent.
    """
    tensors, _ = load_tensors(path)
    try:
        agent.load_state_dict(tensors, **how)
    except (KeyError, RuntimeError) as e:
        why = str(e).splitlines()[-1].strip()
        raise RunError(f"checkpoint {path} does not fit this configuration: {why}") from e


def save_json(path: Path, content) -> None:
    with saved(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def load_json(path: Path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        found = f"{path.parent} is not a run's folder, or its run ended too early"
        raise RunError(f"{found}: it has no {path.name}") from None
    except (OSError, ValueError) as e:
        raise RunError(f"{path} cannot be read: {e}") from e


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

    def config(self) -> dict:
        return load_json(self.path / "config.json")

    def log(self, kind: str, step: int, **numbers) -> None:
        """Append a record to log.jsonl, and its numbers to TensorBoard under kind/name."""
        record = {"kind": kind, "step": step, **numbers}
        self.records.append(record)
        try:
            with open(self.path / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(self.path, purge_step=step)
            for name, value in numbers.items():
                if isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
            self._tensorboard.flush()
        except OSError as e:
            refused = f"cannot write the log in {self.path}: {e.strerror}"
            raise RunError(f"{refused}; checkpoints are untouched") from e

    def rewind_log(self, step: int) -> None:
        """Read log.jsonl back without what lies beyond step: those updates will be made again.

        Removes the half-written files that a killed run left behind.
        """
        for left in self.path.rglob(".*.part"):
            left.unlink()
        path = self.path / "log.jsonl"
        self.records = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                self.records.append(json.loads(line))
            except ValueError:
                break  # the line being written when the run was killed
        self.records = [r for r in self.records if r["step"] <= step]
        with saved(path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def evaluations(self) -> list[dict]:
        return [r for r in self.records if r["kind"] == "evaluation"]

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:08d}.safetensors"

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
        """curve.png: normalised score and BC loss against updates."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 5), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        evaluations, epochs = self.evaluations(), [r for r in self.records if r["kind"] == "epoch"]
        steps, scores = [e["step"] for e in evaluations], [e["score"] for e in evaluations]
        top.plot(steps, scores, "o-", color="tab:blue")
        top.set(ylabel="normalised score", title=title)
        bottom.plot([r["step"] for r in epochs], [r["bc_loss"] for r in epochs], color="tab:orange")
        bottom.set(ylabel="BC loss", xlabel="updates")
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
        with saved(self.path / "curve.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110)
