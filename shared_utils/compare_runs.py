"""Compare runs: python -m shared_utils.compare_runs runs [--csv runs.csv]

A table for each job, a row for each run below the folder: how it ended, mean loss of its last epoch, minutes, commit,
the flags that differ between the runs of the job, and the numbers of all evaluations found beside it (RUN/eval/*, and
RUN-* as run_arms.sh writes them).
"""

import argparse
import csv
import errno
import fcntl
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser
from shared_utils.provenance import RUNTIME_FLAGS
from shared_utils.run import cli

FIXED = ("state", "loss", "minutes", "commit")
UNKNOWN_END = "end not noted"


@dataclass
class Found:
    """A run: its folder and name, its job, how it ended, what it logged, its flags, and {evaluation/metric: number}."""

    folder: Path
    name: str
    job: str
    facts: dict[str, Any]
    flags: dict[str, Any]
    results: dict[str, float] = field(default_factory=dict)


def read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none to read."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def alive(folder: Path) -> bool:
    """Whether a process of this machine (or of one that shares the file system's locks) writes a run there."""
    try:
        handle = open(folder / ".lock", "r+")
    except OSError:
        return False
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def last_row(log: Path) -> dict[str, Any]:
    """The last whole line of a log.jsonl."""
    if not log.is_file():
        return {}
    for line in reversed(log.read_text().splitlines()):
        try:
            return json.loads(line)
        except ValueError:  # half a line of a run that was killed
            continue
    return {}


def facts(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """State, loss, minutes and commit of the run in `folder`; the loss of one that did not end is its last line's."""
    end, row = read(folder / "end.json"), last_row(folder / "log.jsonl")
    if alive(folder):
        state = f"running, step {row.get('step', 0)}"
    elif end:
        at = f" at step {end['step']}" + (f" of {end['steps']}" if end["steps"] > 0 else "")
        state = end["state"] if end["state"] == "done" else end["state"] + at
    elif "job" in config:
        state = f"crashed or killed after step {row.get('step', 0)}"
    else:
        state = UNKNOWN_END
    loss = end.get("loss")
    loss = row.get("loss") if loss is None else loss
    more = {k: v for k, v in row.items() if re.match(r"loss[_/]", k)} | end.get("tests", {})
    commit = f"{config.get('git_commit') or '?'}{'+changes' if config.get('git_dirty') else ''}"
    return {"state": state, "loss": loss, "minutes": end.get("minutes"), "commit": commit, **more}


def numbers(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a result and of the objects directly in it, (name, number)."""
    for key, value in result.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value
        elif isinstance(value, dict) and prefix.count("/") < 1:
            yield from numbers(value, f"{prefix}{key}/")


def results_in(folder: Path, name: str) -> dict[str, float]:
    """{NAME/metric: number} of result.json, result-N.json and eval.json in `folder`."""
    out: dict[str, float] = {}
    for file in sorted([*folder.glob("result*.json"), *folder.glob("eval*.json")], key=lambda f: (len(f.name), f.name)):
        found = read(file)
        found = found["results"] if isinstance(found.get("results"), dict) else found
        own = name + file.stem.removeprefix("result").removeprefix("eval")
        out |= {f"{own}/{key}" if own else key: value for key, value in numbers(found)}
    return out


def weights_of(flags: Mapping[str, Any], run: Path) -> bool:
    """Whether flags name a file in a folder that is called as the run's, as weights to evaluate."""
    return any(Path(str(flags.get(k))).parent.name == run.name for k in ("pretrained", "checkpoint", "features"))


def beside(folder: Path, run: Path) -> bool:
    """Whether `folder` is RUN-NAME with an evaluation of the run in it, and not a run of its own."""
    if not folder.name.startswith(f"{run.name}-"):
        return False
    return not (folder / "log.jsonl").is_file() or weights_of(read(folder / "config.json").get("flags", {}), run)


def results_of(run: Path) -> dict[str, float]:
    """The numbers of all evaluations beside a run: its own result, those below RUN/eval, and those of RUN-NAME."""
    out = results_in(run, "")
    for folder in sorted(run.glob("eval/**/")):
        out |= results_in(folder, folder.relative_to(run / "eval").as_posix())
    for folder in sorted(path for path in run.parent.iterdir() if path.is_dir()):
        if beside(folder, run):
            out |= results_in(folder, folder.name.removeprefix(f"{run.name}-"))
    return out


def collect(root: Path) -> list[Found]:
    """All runs below `root`, by job and name. UserError where there is none."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the one that holds the runs")
    configs = {file.parent: read(file) for file in sorted(root.rglob("config.json"))}
    configs = {folder: c for folder, c in configs.items() if "flags" in c and (folder / "log.jsonl").is_file()}
    found = []
    for folder, config in configs.items():
        within = any(parent.name == "eval" and parent.parent in configs for parent in folder.parents)
        if within or any(beside(folder, run) for run in configs if run.parent == folder.parent):
            continue  # an evaluation, whose numbers stand beside its run
        name = folder.relative_to(root).as_posix() if folder != root else root.name
        job = config.get("job") or guessed_job(config.get("command", ""))
        found.append(Found(folder, name, job, facts(folder, config), config["flags"], results_of(folder)))
    if not found:
        raise UserError(f"{root}: no run below this folder (config.json and log.jsonl)")
    return sorted(found, key=lambda run: (run.job, run.name))


def merged(roots: Sequence[Path]) -> list[Found]:
    """The runs of several folders, each once; of more than one folder the names begin with it."""
    if len(roots) == 1:
        return collect(roots[0])
    found = {run.folder.resolve(): run for root in roots for run in collect(root)}
    for run in found.values():
        run.name = run.folder.as_posix()
    return sorted(found.values(), key=lambda run: (run.job, run.name))


def guessed_job(command: str) -> str:
    """Of a run from before jobs were noted: the module that its command names."""
    module = re.search(r" -m (?!torch)(\S+)", command)
    return module[1] if module else "?"


def table(runs: Sequence[Found]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of runs: name, facts, flags of which there are several values, results."""
    names = sorted({k for run in runs for k in run.flags} - RUNTIME_FLAGS)
    names = [k for k in names if len({json.dumps(run.flags.get(k), sort_keys=True) for run in runs}) > 1]
    parts = list(dict.fromkeys(k for run in runs for k in run.facts if k not in FIXED))
    metrics = list(dict.fromkeys(k for run in runs for k in run.results if k not in FIXED))
    header = ["run", *FIXED, *(f"--{k}" for k in names), *parts, *metrics]
    rows = [
        [run.name, *(run.facts.get(k) for k in FIXED), *(run.flags.get(k) for k in names),
         *(run.facts.get(k) for k in parts), *(run.results.get(k) for k in metrics)]
        for run in runs
    ]  # fmt: skip
    return header, rows


def cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def printed(header: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> str:
    """The table in lines of at most `width` characters where its columns allow it: what is too much comes below."""
    columns = [[name, *(cell(row[i]) for row in rows)] for i, name in enumerate(header)]
    columns = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    blocks, used = [[columns[0]]], len(columns[0][0])
    for column in columns[1:]:
        if used + 2 + len(column[0]) > width and len(blocks[-1]) > 1:
            blocks.append([columns[0]])
            used = len(columns[0][0])
        blocks[-1].append(column)
        used += 2 + len(column[0])
    return "\n\n".join("\n".join("  ".join(line).rstrip() for line in zip(*block)) for block in blocks)


def write_csv(path: Path, runs: Sequence[Found]) -> None:
    """All runs in one table, with a column `job`."""
    header, rows = table(runs)
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["job", *header])
    out.writerows([run.job, *("" if v is None else v for v in row)] for run, row in zip(runs, rows, strict=True))
    checkpoint.write_text(path, text.getvalue())


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="shared_utils.compare_runs", description=(__doc__ or "").splitlines()[0])
    p.add_argument("runs", type=Path, nargs="+", help="folders with runs below them, or runs")
    p.add_argument("--csv", type=Path, help="write all rows there too")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    found = merged(args.runs)
    width = shutil.get_terminal_size((120, 40)).columns
    for job in dict.fromkeys(run.job for run in found):
        of = [run for run in found if run.job == job]
        print(f"{job}: {len(of)} {'run' if len(of) == 1 else 'runs'}\n{printed(*table(of), width)}\n")
    if args.csv:
        write_csv(args.csv, found)
        print(f"{len(found)} runs -> {args.csv}")
    return 0


if __name__ == "__main__":
    cli(main)
