"""Flags: types that refuse numbers out of range in one line, both spellings of a name, and the flags of every script.

p = Parser(prog="mdp.main_pretrain", description=...)
p.add_argument("--batch-size", type=positive, default=64)
add_run_flags(p, "mdp/pretrain/mini")           # a training script; add_machine_flags: any other
"""

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable
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


class Flags(argparse.Namespace):
    """Parsed flags that know their defaults, which `vars` does not hold, so that neither logs nor checkpoints do.

    defaults: the value of each flag where it is not given. given: the flags whose value was another after parsing.
    job: the parser's program, as `bingo.main_moco`. older: what a run did before there was the flag, where that is not
    its default (see `Parser.older`).
    """

    __slots__ = ("defaults", "given", "job", "older")

    def __init__(self, **values: Any):
        super().__init__(**values)
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
        flags, rest = super().parse_known_args(args, Flags() if namespace is None else namespace)
        if isinstance(flags, Flags):
            flags.defaults, flags.job = defaults(self), self.prog
            flags.older = {k: v for k, v in getattr(self, "_older", {}).items() if hasattr(flags, k)}
            flags.given = frozenset(k for k, v in vars(flags).items() if v != flags.defaults.get(k))
        return flags, rest

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


def add_machine_flags(parser: Any, workers: int | None = 2, amp: str | None = None, output_dir: str = "") -> None:
    """Where and how a script computes: --device, --threads, and what is not left out of the others.

    Args:
        parser: of argparse, or a group.
        workers: default of --workers; None: the script loads no data in processes of its own.
        amp: default of --amp; None: the script has none.
        output_dir: of a script that writes a result.json, relative to $RUNS.
    """
    a = parser.add_argument
    if output_dir:
        a("--output-dir", "--log_dir", type=Path, default=runs_root() / output_dir, help="folder of result.json")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    if amp:
        kinds = ["auto", "none", "bf16"] if amp == "auto" else ["none", "bf16"]
        a("--amp", choices=kinds, default=amp, help="autocast; auto: bf16 on GPUs, else none")
    if workers is not None:
        a("-j", "--workers", "--num_workers", type=natural, default=workers, help="data loading processes per process")
    left = "all cores" if workers is None else "cores - workers"
    a("--threads", type=natural, default=0, help=f"threads of a process; 0: {left} on a CPU")


def add_run_flags(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Flags that every training script has; `output_dir` is relative to $RUNS."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output-dir",
        "--log_dir",
        type=Path,
        default=runs_root() / output_dir,
        help="folder of log and checkpoint",
    )
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
