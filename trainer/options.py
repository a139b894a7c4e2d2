"""The command line's options: what each means, its default for a task, and what is refused.

A default is the recipe's of the chosen task or, for a run that is resumed, evaluated or exported,
what that run was made with.
"""

import math
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import tyro

import dql
import tasks
from tasks.env import check_film
from trainer.folder import RunFolder


class UserError(RuntimeError):
    """Bad input. The message is one line: what is wrong and what to do about it."""


NOT_ASKED = "\0"  # no --eval; an empty one is a mistake
MOST_THREADS = 1024  # thousands more cannot be made, and torch crashes


# ---- What can be asked for: a class for each group of --help -------------------------------------


@dataclass(frozen=True)
class TaskOptions:
    # D4RL task name; an unknown one lists the nearest
    env: str = "antmaze-umaze-v0"
    # ql: Diffusion-QL; bc: behaviour cloning with the same diffusion policy
    algo: Literal["ql", "bc"] = "ql"
    # auto: D4RL's file, else download, else generate; or d4rl, generated, minari:NAME, or the path
    # of an HDF5 file
    data: str = "auto"
    # antmaze: read D4RL's file without its known defects; published scores are of the file as it is
    repair_data: bool = False
    # transitions to generate where D4RL's file is not used
    n_generated: int = 1_000_000
    # of everything: initial weights, minibatches, noise, evaluation
    seed: int = 0
    # instead of seed: as many agents side by side on the same data, each as if alone, a run each
    seeds: tuple[int, ...] = ()
    # 15 epochs, rates 3e-3, 1e-3 decaying to 0, tau 0.02, 0.1·η, at most 50 episodes; mazes: max-Q,
    # sparse
    quick: bool = False
    # folder that gets one folder per run
    out: str = "runs"


@dataclass(frozen=True)
class MachineOptions:
    # auto: cuda when there is one; or cpu, cuda, cuda:1, ...
    device: str = "auto"
    # CPU threads for torch and MuJoCo; 0: all cores, and for updates one where that is faster
    threads: int = 0
    # eager; compile (torch.compile, on a GPU in a CUDA graph); graph (CUDA graph); fused (kernels);
    # auto: on a GPU the first that works of fused, graph, eager; on a CPU compile for a run of
    # 20,000 updates or more if there is a C++ compiler, else eager
    backend: Literal["auto", "eager", "compile", "graph", "fused"] = "auto"
    # of the fused kernels' matrix products: fp16, tf32, fp16x3 (float32's accuracy) or fp32
    precision: Literal["fp16", "tf32", "fp16x3", "fp32"] = "fp16"
    # of float32 products: highest, high (TF32) or medium (bfloat16, on CPUs that have it)
    matmul_precision: Literal["highest", "high", "medium"] = "highest"


@dataclass(frozen=True)
class TrainingOptions:
    # of updates_per_epoch updates each
    epochs: int = 1000
    # the paper calls 1000 gradient steps an epoch
    updates_per_epoch: int = 1000
    # epochs between evaluations
    eval_every: int = 50
    # 100 for sparse rewards, 10 for locomotion, as the authors
    eval_episodes: int = 100
    # transitions per update, uniform with replacement
    batch_size: int = 256
    # what is done to rewards before training
    reward_tune: Literal[
        "none", "cql", "sparse", "normalize", "iql_antmaze", "antmaze", "iql_locomotion"
    ] = "none"
    # none; cosine: to 0 over the run, per epoch; released: the same cosine, stepped per evaluation
    lr_decay: Literal["none", "cosine", "released"] = "none"
    # epochs over which the rates decay; 0: all of them
    decay_epochs: int = 0
    # actions sampled per state when acting; one is picked by softmax of Q
    n_candidates: int = 50
    # offline selection takes the evaluation whose BC loss has this rank (0: the smallest)
    top_k: int = 1


@dataclass(frozen=True)
class FinishedRunOptions:
    # folder of an interrupted run to continue, bit for bit; or of several that differ in seeds; a
    # larger --epochs makes it longer, --data and --device say where its data and it are now
    resume: tuple[str, ...] = ()
    # folder of a run to evaluate instead of training
    eval: str = ""
    # RUN FILE.pt2: instead of training, write a run's policy for use without this project
    export: tuple[str, ...] = ()
    # with --eval and --export: the checkpoint that this selection rule takes
    which: Literal["last", "best", "offline", "offline_released"] = "last"
    # with --eval: episodes to run; 0: eval_episodes
    episodes: int = 0
    # with --eval: a .gif to film one episode into
    render: str = ""


@dataclass(frozen=True)
class AgentOptions(dql.Config):
    # noise schedule
    schedule: Literal["vp", "linear", "cosine"] = "vp"


GROUPS = {
    "task": TaskOptions,
    "training": TrainingOptions,
    "agent": AgentOptions,
    "machine": MachineOptions,
    "finished_run": FinishedRunOptions,
}


@dataclass(frozen=True)
class Options(*reversed(GROUPS.values())):
    """Everything that can be asked for, in one."""

    def hyperparameters(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(dql.Config)}


# ---- The command line ----------------------------------------------------------------------------


def recipe_options(env: str, quick: bool = False) -> Options:
    """The paper's recipe for a task, or the quick one."""
    options = Options(env=env, quick=quick, **dql.RECIPES[env]._asdict())
    if "v2" in env:
        options = replace(options, eval_episodes=10)
    if not quick:
        return options
    changes = dict(epochs=15, eval_every=5, lr=3e-3, critic_lr=1e-3, lr_decay="cosine")
    # In 15k updates the paper's τ = 0.005 carries a reward 75 Bellman steps back; the maze is 160
    # steps long.
    changes |= dict(tau=0.02, eval_episodes=min(options.eval_episodes, 50))
    # Q is wrong for much of so short a run, so it pulls the policy a tenth as hard, and mostly
    # chooses among candidates.
    changes |= dict(eta=0.1 * options.eta, matmul_precision="medium")
    if options.reward_tune == "cql":
        # Q need not first fall to -200 everywhere, and chooses among ten target actions as well.
        changes |= dict(reward_tune="sparse", max_q_backup=True)
    return replace(options, **changes)


def parse(argv: list[str], description: str) -> Options:
    """The command line. Raises UserError, TaskError or RunError for what cannot be."""
    refuse_unknown_choices(argv)
    # Twice by the same parser: first to know whose defaults count. Help waits for them.
    asked = [word for word in argv if word not in ("-h", "--help")]
    default = _defaults(_read(asked, Options(eval=NOT_ASKED), description))
    options = _read(argv, default, description)
    check(options)
    if folders := _runs(options):
        free = "eval which episodes render device threads backend seed n_candidates"
        if options.resume:
            free = "resume device threads backend data epochs decay_epochs"
            options = _longer(options, default)
        elif options.export:
            free = "export which device threads n_candidates"
        if odd := _differing(options, default, free):
            raise UserError(f"{folders[0]} was made with another {odd}, and keeps its own")
    if options.data in ("auto", "d4rl", "generated") or options.data.startswith("minari:"):
        return options
    try:  # so that the run can be resumed from any folder
        return replace(options, data=str(Path(options.data).expanduser().absolute()))
    except RuntimeError as e:  # whose home?
        raise UserError(f"--data {options.data}: {e}; give the whole path") from e


def _read(argv: list[str], default: Options, description: str) -> Options:
    """By tyro, in the groups that --help shows."""
    parts = {name: part(**_of(part, default)) for name, part in GROUPS.items()}
    groups = make_dataclass("Groups", [(name, part) for name, part in GROUPS.items()])
    asked = tyro.cli(
        groups,
        args=argv,
        default=groups(**parts),
        description=f"{description}\n\nTasks:\n\n{_known_tasks()}",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return Options(**{k: v for part in vars(asked).values() for k, v in vars(part).items()})


def _known_tasks() -> str:
    """A paragraph for each body: body-{kinds}-version."""
    kinds: dict[tuple, list] = {}
    for name in tasks.names():
        body, *kind, version = name.split("-")
        kinds.setdefault((body, version), []).append("-".join(kind))
    lines = (f"{body}-{{{','.join(k)}}}-{version}" for (body, version), k in kinds.items())
    return "\n\n".join(lines)


def _of(part, options: Options) -> dict:
    return {field.name: getattr(options, field.name) for field in fields(part)}


def _longer(options: Options, before: Options) -> Options:
    """A resumed run that may get more epochs; its rates decay as they did."""
    if options.decay_epochs != before.decay_epochs:
        raise UserError("--decay-epochs of a run that has begun cannot be changed")
    if options.epochs < before.epochs:
        raise UserError(f"--epochs of this run is {before.epochs}: it can only be made longer")
    if options.epochs == before.epochs or options.lr_decay == "none":
        return options
    period = before.decay_epochs or before.epochs
    what = f"its rates decay over {period} epochs as before"
    after = ", to 0: later epochs learn nothing, a new run would" * (options.lr_decay == "cosine")
    print(f"{what}{after}")
    return replace(options, decay_epochs=period)


def refuse_unknown_choices(argv: list[str]) -> None:
    """Raises UserError. In one line, as all that is refused here; tyro would draw a box."""
    for name, kind in get_type_hints(Options).items():
        known = get_args(kind) if getattr(kind, "__origin__", None) is Literal else ()
        for word, following in zip(argv, [*argv[1:], ""]) if known else ():
            option, equals, value = word.partition("=")
            value = value if equals else following
            if option.replace("_", "-") == _option(name) and value not in known:
                raise UserError(f"unknown {_option(name)} {value!r}; known: {', '.join(known)}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _runs(options: Options) -> tuple[str, ...]:
    """The folders of finished or interrupted runs that are named."""
    return options.resume or ((options.eval,) if options.eval else options.export[:1])


def _defaults(asked: Options) -> Options:
    if "" in (
        *asked.resume,
        asked.eval,
        *asked.export,
    ):  # what a script with an unset variable passes: not a new run
        names = "--resume, --eval and --export take the folder of a run, for example runs/NAME"
        raise UserError(f"{names}; got an empty name")
    if asked.eval == NOT_ASKED:
        asked = replace(asked, eval="")
    folders = _runs(asked)
    if not folders:
        return recipe_options(tasks.get(asked.env).name, asked.quick)
    first, *others = made = [saved_options(folder) for folder in folders]
    for folder, options in zip(folders[1:], others):
        if odd := _differing(options, first, "seed out threads backend"):
            what = f"{folder} was made with another {odd} than {folders[0]}"
            raise UserError(f"{what}: they cannot be resumed together")
    return replace(first, seeds=tuple(o.seed for o in made)) if others else first


def _differing(options: Options, default: Options, free: str) -> str:
    """The first option that differs, of those that are not free to."""
    before = asdict(default)
    odd = (k for k, v in asdict(options).items() if k not in free.split() and v != before[k])
    return next(map(_option, odd), "")


def saved_options(folder: str) -> Options:
    """The Options that a run was made with. Raises UserError for one of another version."""
    config = RunFolder(folder).config()
    saved = {**config["config"], "seeds": (), "resume": (), "eval": "", "export": (), "render": ""}
    what = f"{folder}/config.json is not one that this version of dql.py wrote"
    kinds = get_type_hints(Options)
    for name, value in saved.items():
        if name in kinds and not _is_of(kinds[name], value):
            raise UserError(f"{what}: {name} is {value!r:.40}")
    try:
        options = Options(**saved)
        check(options)
    except (TypeError, UserError) as e:
        raise UserError(f"{what}: {e}") from e
    return options


def _is_of(kind, value) -> bool:
    """Whether a value read from JSON is of an option's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return value == ()
    return type(value) in ((int, float) if kind is float else (kind,))


def check(options: Options) -> None:
    """Raises UserError for values no run can have."""
    for name, value in asdict(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{_option(name)} must be a finite number, not {value}")
    one_or_more = "epochs updates_per_epoch eval_every eval_episodes batch_size n_timesteps"
    one_or_more += " hidden_dim ema_every n_candidates"
    zero_or_more = "eta lr critic_lr grad_norm ema_start top_k episodes threads seed decay_epochs"
    at_least = {"n_generated": 2, **dict.fromkeys(one_or_more.split(), 1)}
    for name, least in (at_least | dict.fromkeys(zero_or_more.split(), 0)).items():
        value = getattr(options, name)
        if not value >= least:
            raise UserError(f"{_option(name)} must be at least {least}, not {value}")
        if isinstance(value, int) and value >= 2**31:  # what torch can take
            raise UserError(f"{_option(name)} must be less than 2**31, not {value}")
    if options.threads > MOST_THREADS:
        raise UserError(f"--threads must be at most {MOST_THREADS}, not {options.threads}")
    for name in ("discount", "tau", "ema_decay"):
        value = getattr(options, name)
        if not 0 <= value <= 1:
            raise UserError(f"{_option(name)} must lie between 0 and 1, not {value}")
    for seed in options.seeds:
        if not 0 <= seed < 2**31:
            raise UserError(f"--seeds must be at least 0 and less than 2**31, not {seed}")
    if len(set(options.seeds)) < len(options.seeds):
        named = " ".join(map(str, options.seeds))
        raise UserError(f"--seeds {named} names a seed twice: two agents would be the same")
    if bool(options.resume) + bool(options.eval) + bool(options.export) > 1:
        raise UserError("--resume, --eval and --export exclude each other")
    if options.export and len(options.export) != 2:
        example = "--export takes a run and a file to write, as in --export runs/NAME policy.pt2"
        raise UserError(f"{example}, not {len(options.export)} names")
    if options.render:
        if not options.eval:
            raise UserError("--render films a finished run: name it with --eval")
        check_film(Path(options.render))  # before the episodes are run, which takes minutes
