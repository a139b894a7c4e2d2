"""Does it learn as well with products in fp16 or tf32? Quick recipe on generated antmaze data, several seeds at each precision.

    python -m bench.precision                        # on a GPU: the fused update at every precision, against eager float32
    python -m bench.precision --epochs 7             # on a CPU: eager, the operands of every product rounded, three hours of a core

On a CPU the kernels' arithmetic is imitated: forward and backward, both operands of a matrix product are rounded to fp16 or tf32,
gradients after a power of two has brought the largest near 2⁸, and sums are float32. fp16x3 needs no study, since its gradients
are as far from float64's as eager float32's are (tests/test_update.py). Runs are kept in runs/precision: what is there is not made
again. Writes bench/results/precision_DEVICE.json.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import dql
from bench.machine import describe
from bench.timing import RESULTS, device_slug, has_compiler
from run_folder import RunFolder, save_json

ROOT = Path(__file__).resolve().parents[1]
ENV = "antmaze-umaze-v0"


def to_tf32(x):
    """To 11 significant bits, as tensor cores read float32; by arithmetic alone, which torch.compile fuses."""
    shifted = x * 8193.0  # 2¹³ + 1
    return shifted - (shifted - x)


def to_fp16(x):
    """tf32's bits, and below 2⁻¹⁴ the multiples of 2⁻²⁴; for |x| < 65504."""
    return torch.where(x.abs() < 2.0**-14, (x + 0.75) - 0.75, to_tf32(x))


ROUND = {"fp16": to_fp16, "tf32": to_tf32}


class RoundedLinear(torch.autograd.Function):
    """x·Wᵀ with both operands of this product, and of the two of its backward pass, rounded."""

    @staticmethod
    def forward(ctx, x, weight, precision):
        ctx.precision = precision
        x, weight = ROUND[precision](x), ROUND[precision](weight)
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        up = torch.exp2(8.0 - torch.floor(torch.log2(g.abs().max().clamp(min=1e-30))))
        g = ROUND[ctx.precision]((g * up).contiguous()) / up
        return g @ weight, g.t() @ x, None


def imitate(precision: str) -> None:
    """From now on, in this process, every F.linear and the one product of dql.py that is none round as the kernels do."""

    def linear(x, weight, bias=None):
        y = RoundedLinear.apply(x, weight, precision)
        return y if bias is None else y + bias

    def noise(self, x, t, condition):
        w_action, time_share, state_share = condition
        h = state_share + linear(x, w_action.t()) + time_share[t]
        for layer in self.mid_layer[1:]:
            h = layer(h)
        return self.final_layer(h)

    F.linear, dql.DiffusionPolicy._noise = linear, noise


def find(out: Path, config: dql.Config) -> Path | None:
    wanted = json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in ("out", "threads")}))
    for path in sorted(out.glob("*/config.json")):
        if json.loads(path.read_text())["config"] == {**json.loads(path.read_text())["config"], **wanted}:
            if (path.parent / "selection.json").exists():
                return path.parent
    return None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=None, help="default: fp32 fp16 on a CPU; on a GPU all four, and eager")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15, help="of the quick recipe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "precision")
    options = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    precisions = options.precisions or (["eager", "fp32", "fp16x3", "tf32", "fp16"] if on_gpu else ["fp32", "fp16"])
    # One precision a process: imitating is for good.
    if not on_gpu and len(precisions) > 1:
        import subprocess

        for precision in precisions:
            command = [sys.executable, "-m", "bench.precision", "--precisions", precision, "--epochs", str(options.epochs)]
            command += ["--threads", str(options.threads), "--out", str(options.out), "--seeds", *map(str, options.seeds)]
            subprocess.run(command, cwd=ROOT, check=True)
    recipe = replace(
        dql.recipe_config(ENV, quick=True), data="generated", epochs=options.epochs, eval_every=options.epochs,
        matmul_precision="highest", threads=options.threads,
    )  # fmt: skip
    if not on_gpu and len(precisions) == 1 and precisions[0] in ROUND:
        imitate(precisions[0])
    figures = []
    for precision in precisions:
        for seed in options.seeds:
            out = options.out / precision
            config = replace(recipe, seed=seed, out=str(out))
            if on_gpu:
                config = replace(config, backend="eager" if precision == "eager" else "fused")
                config = config if precision == "eager" else replace(config, precision=precision)
            elif has_compiler():
                config = replace(config, backend="compile")
            run = find(out, config)
            if run is None:
                print(f"{time.strftime('%H:%M:%S')} {precision}, seed {seed}", flush=True)
                dql.train(config)
                run = find(out, config)
            folder = RunFolder(run)
            folder.records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            epochs = [r for r in folder.records if r["kind"] == "epoch"]
            last = {k: epochs[-1][k] for k in ("bc_loss", "q_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm")}
            figures.append({"precision": precision, "seed": seed, "score": folder.evaluations()[-1]["score"], **last})
            figures[-1]["curve"] = {k: [r[k] for r in epochs] for k in ("bc_loss", "critic_loss")}
    if not on_gpu and len(precisions) == 1:
        return
    print(f"\n{'':8s}{'scores':>22s}{'mean':>8s}{'std':>6s}{'BC loss':>10s}{'critic loss':>13s}")
    for precision in precisions:
        mine = [f for f in figures if f["precision"] == precision]
        scores = [f["score"] for f in mine]
        spread = np.std(scores, ddof=1) if len(scores) > 1 else float("nan")
        losses = [np.mean([f[k] for f in mine]) for k in ("bc_loss", "critic_loss")]
        print(f"{precision:8s}{str(scores):>22s}{np.mean(scores):8.1f}{spread:6.1f}{losses[0]:10.4f}{losses[1]:13.3f}")
    where = describe()
    how = "fused kernels" if on_gpu else "imitated on a CPU: operands rounded, sums float32"
    save_json(
        RESULTS / f"precision_{device_slug(where)}.json",
        {**where, "env": ENV, "how": how, "updates": options.epochs * recipe.updates_per_epoch, "figures": figures},
    )


if __name__ == "__main__":
    sys.exit(main())
