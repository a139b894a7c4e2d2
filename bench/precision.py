"""Does it learn as well with products in fp16 or tf32? Quick recipe on generated antmaze data, several seeds at each precision.

    python -m bench.precision                        # on a GPU: the fused update at every precision, against eager float32
    python -m bench.precision --epochs 7             # on a CPU: plain torch, operands rounded: an hour and a half of a core

On a CPU the kernels' arithmetic is imitated (bench/rounding.py). fp16x3 needs no study, since its gradients are as far from
float64's as eager float32's are (tests/test_update.py). Runs are kept in runs/precision: what is there is not made
again, and what was interrupted is resumed. Writes bench/results/precision_DEVICE.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

import dql
from bench.learning_curves import make_run
from bench.machine import describe
from bench.rounding import ROUND, imitate
from bench.timing import RESULTS, device_slug, has_compiler
from run_folder import save_json

ROOT = Path(__file__).resolve().parents[1]
ENV = "antmaze-umaze-v0"
IMITATE = "--imitate"


def make(precision: str, seed: int, options, on_gpu: bool) -> Path:
    """The folder of one run, made as bench.learning_curves makes its own, unless it is there."""
    how = {"env": ENV, "data": "generated", "algo": "ql", "seed": seed, "quick": True, "matmul_precision": "highest"}
    how |= {"epochs": options.epochs, "eval_every": options.epochs}
    program = ["dql.py"]
    if on_gpu:
        how |= {"backend": "eager"} if precision == "eager" else {"backend": "fused", "precision": precision}
    else:
        how |= {"backend": "compile"} if has_compiler() else {}
        program = ["-m", "bench.precision", IMITATE, precision] if precision in ROUND else program
    return make_run(how, options.runs / precision, options.threads, program)


def figures_of(run: Path) -> dict:
    """The last score, the last epoch's means, and how the losses went."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    epochs = [r for r in records if r["kind"] == "epoch"]
    last = {k: epochs[-1][k] for k in ("bc_loss", "q_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm")}
    score = [r["score"] for r in records if r["kind"] == "evaluation"][-1]
    return {"score": score, **last, "curve": {k: [r[k] for r in epochs] for k in ("bc_loss", "critic_loss")}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=None, help="default: fp32 fp16 on a CPU; on a GPU all four, and eager")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15, help="of the quick recipe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "precision")
    options = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    known = ["eager", "fp32", "fp16x3", "tf32", "fp16"] if on_gpu else ["fp32", "fp16", "tf32"]
    precisions = options.precisions or (known if on_gpu else known[:2])
    if not set(precisions) <= set(known):
        raise SystemExit(f"--precisions here are {', '.join(known)}")
    figures = [
        {"precision": precision, "seed": seed, **figures_of(make(precision, seed, options, on_gpu))}
        for precision in precisions
        for seed in options.seeds
    ]
    print(f"{'':8s}{'scores':>22s}{'mean':>8s}{'std':>6s}{'BC loss':>10s}{'critic loss':>13s}")
    for precision in precisions:
        mine = [f for f in figures if f["precision"] == precision]
        scores = [f["score"] for f in mine]
        spread = np.std(scores, ddof=1) if len(scores) > 1 else float("nan")
        losses = [np.mean([f[k] for f in mine]) for k in ("bc_loss", "critic_loss")]
        print(f"{precision:8s}{str(scores):>22s}{np.mean(scores):8.1f}{spread:6.1f}{losses[0]:10.4f}{losses[1]:13.3f}")
    where = describe()
    how = "fused kernels" if on_gpu else "imitated on a CPU: operands rounded, sums float32"
    updates = options.epochs * dql.Config.updates_per_epoch
    path = options.out / f"precision_{device_slug(where)}.json"
    save_json(path, {**where, "env": ENV, "how": how, "updates": updates, "figures": figures})


if __name__ == "__main__":
    if sys.argv[1:2] == [IMITATE]:  # dql.py's own command line, in a process that rounds
        imitate(sys.argv[2])
        sys.exit(dql.main(sys.argv[3:]))
    sys.exit(main())
