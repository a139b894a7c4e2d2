"""Stands in for dql.py under experiments.d4rl: the same options and files in a run's folder.

It trains nothing. Reads program.json in its own folder: "configs" (task -> seed -> config),
"seconds" to take, and "broken": task -> what to print before it exits with 1, or a number, the
signal to die of, or from 128 on the exit status of what was interrupted. Appends to calls.jsonl
there what it was called with, and makes stopped-PID when it hears of a Ctrl-C.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(sys.argv[0]).parent


def put(path, write):
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    os.replace(temporary, path)


def put_json(path, content):
    put(path, lambda temporary: temporary.write_text(json.dumps(content)))


def begin(folder: Path, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{config['env']}-ql-d4rl-seed{config['seed']}-"
    # Not by the time: two runs may begin in one second.
    run = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    data = {"label": f"D4RL {config['env']}", "source": "d4rl", "crc32": 1}
    about = {"config": {**config, "out": str(folder)}, "data": data, "versions": {"torch": "0"}}
    put_json(run / "config.json", about)
    put(run / "resume.safetensors", lambda temporary: save_file({"step": np.array(7)}, temporary))
    return run


def finish(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())["config"]
    last = {"step": config["epochs"] * config["updates_per_epoch"], "score": 10.0 + config["seed"]}
    (run / "log.jsonl").write_text(json.dumps({"kind": "evaluation", **last}) + "\n")
    rules = ("last", "best", "offline", "offline_released")
    put_json(run / "selection.json", dict.fromkeys(rules, last))


def values(option: str) -> list[str]:
    """What follows an option on the command line."""
    if option not in sys.argv:
        return []
    rest = sys.argv[sys.argv.index(option) + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]


def main() -> int:
    asked = json.loads((HERE / "program.json").read_text())
    resumed = [Path(path) for path in values("--resume")]
    task = resumed[0].parent.name if resumed else values("--env")[0]
    call = {"task": task, "arguments": sys.argv[1:], "pid": os.getpid(), "began": time.time()}
    call["raylet"] = os.environ.get("RAY_RAYLET_PID")  # which node this is
    with (HERE / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\n")
    broken = asked["broken"].get(task)
    if isinstance(broken, int) and broken < 128:
        os.kill(os.getpid(), broken)
    if isinstance(broken, str):
        print(broken, file=sys.stderr)
        return 1
    runs = resumed
    if not resumed:
        configs, folder = asked["configs"][task], Path(values("--out")[0])
        runs = [begin(folder, configs[seed]) for seed in values("--seeds")]
    if broken:
        return broken
    try:
        time.sleep(asked["seconds"])
    except KeyboardInterrupt:
        (HERE / f"stopped-{os.getpid()}").touch()
        return 130
    for run in runs:
        finish(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
