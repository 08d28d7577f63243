"""Flags: types that refuse numbers out of range in one line, both spellings of a name, and the flags of every script.

p = Parser(prog="mdp.main_pretrain", description=...)
p.add_argument("--batch-size", type=positive, default=64)
add_run_flags(p, "mdp/pretrain/mini")           # a training script; add_machine_flags: any other
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shared_utils import UserError


def runs_root() -> Path:
    """Where runs are written: $RUNS, by default `runs` in the current folder."""
    return Path(os.environ.get("RUNS", "runs"))


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """Type of a flag that is a number of `kind`, `least` or more; a whole number may be written as 6e4.

    Neither nan nor infinity; whole numbers fit into 64 bits, as the generators' seeds must.
    """

    def number(text: str) -> Any:
        value: float = math.nan
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(float(text)) if re.fullmatch(r"\d+e\d+", text) else kind(text)
        if kind is int and abs(value) >= 2**63:
            raise argparse.ArgumentTypeError(f"{text}: must be below 2^63")
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: must be a {'whole ' * (kind is int)}number")
        if value < least:
            must = f"must be at least {least}" if least else "must not be negative"
            raise argparse.ArgumentTypeError(f"{text}: {must}")
        return value

    return number


def several(kind: type) -> Callable[[str], list[Any]]:
    """Type of a flag that is numbers of `kind` with commas between."""

    number = at_least(-math.inf, kind)

    def numbers(text: str) -> list[Any]:
        try:
            return [number(part) for part in text.split(",")]
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"{text}: must be {'whole ' * (kind is int)}numbers with commas") from None

    return numbers


def boolean(text: str) -> bool:
    """Type of a flag that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: must be true or false")
    return text.lower() == "true"


AUG_BACKENDS, AUG_BACKEND = ("pil", "batch"), "batch"  # what --aug_backend offers, and its default

positive, natural, not_negative = at_least(1), at_least(0), at_least(0, float)
finite = at_least(-math.inf, float)
ints, floats = several(int), several(float)


def spellings(names: Iterable[str]) -> list[str]:
    """The names of a flag, and each long one with dashes for underscores and the other way round."""
    both = [[name, name.replace("_", "-"), "--" + name[2:].replace("-", "_")] for name in names if name[:2] == "--"]
    return list(dict.fromkeys([*names, *(name for three in both for name in three)]))


def with_default(text: str | None, default: Any) -> str | None:
    """The help of a flag, with its default where it has one that the text does not tell."""
    if default is None or default is False or default in ("", argparse.SUPPRESS) or "default" in (text or ""):
        return text
    return f"{text} (default: %(default)s)" if text else "default: %(default)s"


def _add(add: Callable[..., argparse.Action], names: Iterable[str], more: dict[str, Any]) -> argparse.Action:
    more |= {"type": finite} if more.get("type") is float else {}
    return add(*spellings(names), **{**more, "help": with_default(more.get("help"), more.get("default"))})


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as JSON-able values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items())}


def evaluation_folder(weights: str | os.PathLike, home: Path) -> Path:
    """Where the evaluation `home.name` of `weights` goes: RUN/eval/NAME where they are a run's, else HOME/FILE."""
    path = Path(weights)
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file() and (folder / "log.jsonl").is_file() and os.access(folder, os.W_OK):
        return folder / "eval" / home.name
    return home / (path.stem or "default")


class Flags(argparse.Namespace):
    """Parsed flags that know their defaults, which `vars` does not hold, so that neither logs nor checkpoints do.

    defaults: the value of each flag where it is not given. given: the flags whose value was another after parsing.
    asked: the flags as they were parsed, before the script resolves them: what --config starts from.
    job: the parser's program, as `bingo.main_moco`. older: what a run did before there was the flag, where that is not
    its default (see `Parser.older`).
    """

    __slots__ = ("asked", "defaults", "given", "job", "older")

    def __init__(self, **values: Any):
        super().__init__(**values)
        self.asked: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.given: frozenset[str] = frozenset()
        self.job = ""
        self.older: dict[str, Any] = {}


def defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The value of each flag that the command line does not name, text converted as argparse does."""
    found = {
        action.dest: parser._get_value(action, action.default) if isinstance(action.default, str) else action.default
        for action in parser._actions
    }
    return {k: v for k, v in {**parser._defaults, **found}.items() if v is not argparse.SUPPRESS}


# Flags that name weights: the folder of a run stands for the checkpoint in it.
WEIGHTS = {"pretrained", "checkpoint", "ckpt_name", "pretrain_path", "resume_path", "evaluator", "dino_path", "resume"}

NOT_TAKEN = {"output_dir", "resume", "overwrite", "config", "save_path"}  # by --config: they are of the run itself


class Parser(argparse.ArgumentParser):
    """Flags are understood with underscores, as the original releases have them, and with dashes; --help tells their
    defaults; a mistake is a UserError, one line without the usage. A float is neither nan, which no comparison finds,
    nor infinity.
    """

    def older(self, **values: Any) -> None:
        """What the job did before it had these flags: a checkpoint without them is not resumed with another value."""
        self._older = {**getattr(self, "_older", {}), **values}

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:  # type: ignore[override]
        return _add(super().add_argument, names, kwargs)

    def add_argument_group(self, *args: Any, **kwargs: Any) -> Any:
        group = super().add_argument_group(*args, **kwargs)
        add = group.add_argument
        group.add_argument = lambda *names, **more: _add(add, names, more)  # type: ignore[method-assign]
        return group

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = defaults(self)
        if hasattr(self, "_output") and "--config" not in self._option_string_actions:
            text = "config.json of a run of this script (or its folder): its flags, where the command line has no other"
            self.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=text)
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.add_argument("--config")
            first.error = self.error  # type: ignore[method-assign]
            args = sys.argv[1:] if args is None else args
            if (file := first.parse_known_args(args)[0].config) and not {"-h", "--help"} & set(args):
                self._start_from(Path(file))
        flags, rest = super().parse_known_args(args, Flags() if namespace is None else namespace)
        if isinstance(flags, Flags):
            vars(flags).pop("config", None) if "config" not in known else None
            for name in WEIGHTS & set(vars(flags)):
                value = getattr(flags, name)
                if value and (file := Path(value) / "checkpoint.pth").is_file():
                    setattr(flags, name, type(value)(file))
            flags.defaults, flags.job = known, self.prog
            flags.older = {k: v for k, v in getattr(self, "_older", {}).items() if hasattr(flags, k)}
            flags.given = frozenset(k for k, v in vars(flags).items() if v != flags.defaults.get(k))
            named = {action.dest for action in self._actions}
            flags.asked = {k: v for k, v in plain(flags).items() if k in named}
            output, home, beside = getattr(self, "_output", ("", Path(), ""))
            if beside and getattr(flags, output) is None and getattr(flags, beside) is not None:
                setattr(flags, output, evaluation_folder(getattr(flags, beside), home))
        return flags, rest

    def _start_from(self, path: Path) -> None:
        """The flags of a run's config.json become the defaults.

        UserError: no such file, or flags in it that the script does not have or does not take.
        """
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text())
            flags = config.get("asked") or config["flags"]
            job = config.get("job") or self.prog
        except (OSError, ValueError, KeyError, AttributeError):
            raise UserError(f"--config {path}: not the config.json of a run") from None
        if job != self.prog:
            raise UserError(f"--config {path}: of {job}, not of {self.prog}; give a run of this script")
        actions = {action.dest: action for action in self._actions if action.default is not argparse.SUPPRESS}
        unknown = [k for k in sorted(flags) if k not in actions and k not in self._defaults and k not in NOT_TAKEN]
        if unknown:
            names = ", ".join("--" + k for k in unknown)
            raise UserError(f"--config {path}: {names} {'is no flag' if len(unknown) == 1 else 'are no flags'} of "
                            f"{self.prog} (any more); give a copy of the file without")  # fmt: skip
        for name in sorted(set(flags) & set(actions) - NOT_TAKEN):
            try:
                self._take(actions[name], flags[name])
            except argparse.ArgumentError as error:
                raise UserError(f"--config {path}: {str(error).removeprefix('argument ')}") from None

    def _take(self, action: argparse.Action, value: Any) -> None:
        """`value` of a config.json as the default of a flag, checked as argparse checks what is typed."""
        if isinstance(value, list) and (action.nargs or not value):
            value = [self._get_value(action, str(part)) for part in value]
        elif value is not None and not isinstance(value, bool):
            value = self._get_value(action, ",".join(map(str, value)) if isinstance(value, list) else str(value))
        for part in value if isinstance(value, list) and action.nargs else [value]:
            if part is not None:
                self._check_value(action, part)
        action.default = value
        if value is not None:
            action.required = False
            action.nargs = action.nargs if action.option_strings else "?" if action.nargs is None else "*"

    def error(self, message: str) -> NoReturn:
        if found := re.fullmatch(r"argument (\S+): (.*)", message, re.S):
            names = found[1].split("/")
            name = next((name for name in names if name.startswith("--")), names[0])
            raise UserError(f"{name}{' ' if ': must ' in found[2] else ': '}{found[2]}")
        raise UserError(f"{message}; --help lists the flags")


def add_aug_flag(parser: Any) -> None:
    """--aug_backend, of scripts whose images go through `shared_utils.feed`."""
    text = (
        "how images are augmented: pil, view by view as in the original releases; batch, decoded once and in batches, "
        "several times as fast: other draws of the same distribution"
    )
    parser.add_argument("--aug_backend", choices=AUG_BACKENDS, default=AUG_BACKEND, help=text)
    parser.older(aug_backend="pil")


def add_output_flag(
    parser: Any, output_dir: str, beside: str = "", of: Any = None, names: Sequence[str] = ("--output-dir", "--log_dir")
) -> None:
    """The flag of the folder that a script writes to; `output_dir` is its default, relative to $RUNS.

    Args:
        parser: a `Parser`, or a group of the parser `of`.
        beside: name of the flag of the weights that the script evaluates: the default is then RUN/eval/NAME beside
            them, where they are a run's, and $RUNS/FOLDER/NAME/FILE otherwise; `output_dir` is FOLDER/NAME.
    """
    home = runs_root() / output_dir
    where = f"RUN/eval/{home.name} of the run whose weights these are; of other files {home}/NAME"
    text = f"folder of the results; default: {where}" if beside else "folder of log and checkpoint"
    action = parser.add_argument(*names, type=Path, default=None if beside else home, help=text)
    (of or parser)._output = (action.dest, home, beside)


def add_machine_flags(parser: Any, workers: int | None = 2, amp: str | None = None, output_dir: str = "") -> None:
    """Where and how a script computes: --device, --threads, and what is not left out of the others.

    Args:
        parser: of argparse, or a group.
        workers: default of --workers; None: the script loads no data in processes of its own.
        amp: default of --amp; None: the script has none.
        output_dir: of a script that evaluates --pretrained, as `add_output_flag` takes it.
    """
    a = parser.add_argument
    if output_dir:
        add_output_flag(parser, output_dir, "pretrained")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    if amp:
        kinds = ["auto", "none", "bf16"] if amp == "auto" else ["none", "bf16"]
        a("--amp", choices=kinds, default=amp, help="autocast; auto: bf16 on GPUs, else none")
    if workers is not None:
        a("-j", "--workers", "--num_workers", type=natural, default=workers, help="data loading processes per process")
    left = "all cores" if workers is None else "cores - workers"
    a("--threads", type=natural, default=0, help=f"threads of a process; 0: {left} on a CPU")


def add_run_flags(parser: argparse.ArgumentParser, output_dir: str, beside: str = "") -> None:
    """Flags that every training script has; `output_dir` and `beside` as in `add_output_flag`."""
    group = parser.add_argument_group("run")
    add_output_flag(group, output_dir, beside, parser)
    group.add_argument("--seed", type=natural, default=0, help="of all that is drawn: weights, order, augmentation")
    add_machine_flags(group, amp="auto")
    group.add_argument(
        "-p",
        "--log-every",
        "--report_freq",
        "--print_freq",
        type=positive,
        default=10,
        help="steps between lines of log.jsonl and tensorboard",
    )
    group.add_argument(
        "--save-every", type=natural, default=0, help="steps between checkpoints beside the one of each epoch"
    )
    group.add_argument(
        "--resume", type=Path, help="checkpoint to go on from (default: the one in --output-dir, if any)"
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile of the networks, where the script has some to compile: "
        "minutes at the start, then faster steps on a GPU; equal up to rounding"
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="start anew where --output-dir holds a run")
