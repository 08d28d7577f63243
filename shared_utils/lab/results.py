"""Results tables: `<paper>/results.csv` is the claim, RESULTS.md and the tables in the READMEs follow from it.

    python -m shared_utils.lab.results            write RESULTS.md, the READMEs' tables, the forest plot
    python -m shared_utils.lab.results --check    write nothing; exit 1 and name what is stale or invalid

The tables need the standard library alone; the plots (matplotlib) are drawn by shared_utils/lab/plots.py.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shared_utils import UserError

COLUMNS = (
    "id,table,experiment,dataset,metric,paper_value,paper_source,tier,ours_mean,ours_std,n_seeds,baseline_mean,"
    "baseline_std,p,ci_low,ci_high,status,command,commit,hardware,minutes,date,log"
).split(",")
CLAIMED = ("effect shown at this scale", "no effect at this scale", "contradicted at this scale")
MEASURED = ("reproduced", "not reproduced", *CLAIMED, "as expected", "not as expected", "descriptive")
UNTESTABLE = re.compile(r"not testable at this size \(.+\)")
UNKNOWN = "paper value unknown"
NOT_RUN = re.compile(r"not run \(needs [^()]+\)")
NUMBERS = ("paper_value", "ours_mean", "ours_std", "baseline_mean", "baseline_std", "p", "ci_low", "ci_high", "minutes")
NEEDED = ("tier", "ours_mean", "n_seeds", "command", "commit", "hardware", "minutes", "date", "log")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
WORDS = {CLAIMED[0]: "shown", CLAIMED[1]: "no effect", CLAIMED[2]: "contradicted"}  # of a claim, on the front page
BUDGET = ("equal compute", "summed budget")  # in a baseline's title: it was given the method's compute
CELL = 60  # characters of a cell on the front page


@dataclass(frozen=True)
class Paper:
    """`<paper>/paper.json`: what the front page needs to know of a folder."""

    folder: str
    name: str  # of the method
    title: str
    venue: str
    arxiv: str
    idea: str  # one line
    release: str  # the authors' repository and its state, or "none"
    headline: str  # id of the row that holds the paper's headline number; empty where none could be read
    claims: tuple[str, ...]  # ids of the rows that are claims; empty: none yet


def paper(folder: Path) -> Paper:
    """Read `<paper>/paper.json`. UserError: unreadable, or not exactly its fields."""
    file, label = folder / "paper.json", f"{folder.name}/paper.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{label}: missing; it tells the front page what the folder is") from None
    except ValueError as error:
        raise UserError(f"{label}: not JSON ({error})") from None
    names = [field.name for field in fields(Paper) if field.name != "folder"]
    if not isinstance(told, dict) or sorted(told) != sorted(names):
        raise UserError(f"{label}: its fields must be exactly {', '.join(names)}")
    return Paper(folder.name, **{**told, "claims": tuple(told["claims"])})


def papers(root: Path) -> list[Paper]:
    """Of every folder below `root` that has a paper.json, by name."""
    return [paper(file.parent) for file in sorted(root.glob("*/paper.json"))]


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def row_problems(row: dict[str, str], folder: Path) -> list[str]:
    """What is wrong with one row of `<folder>/results.csv`, one line each."""
    status, wrong = row["status"], []
    measured = status in MEASURED or bool(UNTESTABLE.fullmatch(status)) or bool(row["ours_mean"])
    if status not in (*MEASURED, UNKNOWN) and not NOT_RUN.fullmatch(status) and not UNTESTABLE.fullmatch(status):
        known = (*MEASURED, "not testable at this size (why)", "not run (needs ...)", UNKNOWN)
        wrong.append(f"unknown status {status!r}: one of {', '.join(known)}")
    if status in CLAIMED and not (row["p"] and row["ci_low"] and row["ci_high"]):
        wrong.append("a claim needs p, ci_low and ci_high")
    wrong += [f"{name} is not a number: {row[name]!r}" for name in NUMBERS if row[name] and not _number(row[name])]
    wrong += [f"{name} is empty" for name in ("id", "table", "experiment", "metric") if not row[name]]
    if row["paper_value"] and (not row["paper_source"] or status == UNKNOWN):
        wrong.append(f"a paper_value needs a paper_source and a status other than {UNKNOWN!r}")
    if row["tier"] not in ("", "mini", "small", "medium", "paper"):
        wrong.append(f"unknown tier {row['tier']!r}: mini, small, medium or paper")
    wrong += [f"{name} holds an HTML comment" for name in COLUMNS if "<!--" in row[name]]
    if measured and NOT_RUN.fullmatch(status):
        wrong.append("a row that was not run has a value in ours_mean")
    if not measured:
        return wrong
    wrong += [f"a measured row needs {name}" for name in NEEDED if not row[name]]
    if row["n_seeds"]:
        if not row["n_seeds"].isdecimal() or int(row["n_seeds"]) < 1:
            wrong.append(f"n_seeds is not a positive whole number: {row['n_seeds']!r}")
        elif int(row["n_seeds"]) > 1 and not row["ours_std"]:
            wrong.append("several seeds need ours_std")
    if row["commit"] and not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", row["commit"]):
        wrong.append(f"commit is not a hash: {row['commit']!r}")
    if row["date"]:
        try:
            datetime.date.fromisoformat(row["date"])
        except ValueError:
            wrong.append(f"date is not YYYY-MM-DD: {row['date']!r}")
    for name in filter(None, (part.strip() for part in row["log"].split(";"))):
        if Path(name).is_absolute() or ".." in Path(name).parts or _log_link(name, folder) is None:
            wrong.append(f"log {name} does not exist in the tree")
    return wrong


def _log_link(name: str, folder: Path) -> str | None:
    """Where log `name` (relative to the folder or to the root) lies inside `folder`; None when it does not exist."""
    if (folder / name).exists():
        return name
    inside = name.removeprefix(folder.name + "/")
    return inside if inside != name and (folder / inside).exists() else None


def read(folder: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of `<folder>/results.csv` and what is wrong with them (each line names the file and the row)."""
    path = folder / "results.csv"
    with path.open(newline="", encoding="utf-8") as stream:
        table = list(csv.reader(stream))
    label = f"{folder.name}/results.csv"
    if not table or table[0] != COLUMNS:
        return [], [f"{label}: the columns must be exactly {', '.join(COLUMNS)}"]
    bad = [n for n, cells in enumerate(table[1:], 2) if len(cells) != len(COLUMNS)]
    if bad:
        return [], [f"{label}: row {n} has {len(table[n - 1])} cells instead of {len(COLUMNS)}" for n in bad]
    rows = [dict(zip(COLUMNS, (cell.strip() for cell in cells))) for cells in table[1:]]
    wrong = [
        f"{label}: row {n} ({row['id']}): {text}" for n, row in enumerate(rows, 2) for text in row_problems(row, folder)
    ]
    twice = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    return rows, wrong + [f"{label}: id {name} is not unique" for name in twice]


def cell(text: str) -> str:
    """Text that cannot break a Markdown table or the markers around it."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")


def _value(row: dict[str, str], name: str) -> str:
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    return f"{mean} ± {std}" if mean and std else mean


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _code(text: str) -> str:
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return fence + pad + " ".join(text.split()) + pad + fence


def _interval(row: dict[str, str]) -> str:
    return f"{row['ci_low']} to {row['ci_high']}" if row["ci_low"] else ""


def _p(row: dict[str, str]) -> str:
    return "below .001" if row["p"] and float(row["p"]) < 0.001 else row["p"]


def _made(row: dict[str, str], folder: Path) -> str:
    """What a row cost, where and when, with its logs."""
    seeds = f"{row['n_seeds']} seed{'s' * (row['n_seeds'] != '1')}" if row["n_seeds"] else ""
    spent = f"{row['minutes']} min a seed" if row["minutes"] else ""
    run = ", ".join(filter(None, (row["tier"], seeds, spent, row["hardware"], row["date"], row["commit"][:12])))
    links = [_log_link(part.strip(), folder) for part in row["log"].split(";") if part.strip()]
    return " ".join(filter(None, (cell(run), *(f"[log]({link})" for link in links if link))))


def _tables(rows: Sequence[dict[str, str]], folder: Path, measured: bool) -> list[str]:
    """A table for each value of `table`; of rows that were measured here, or of those that were only published."""
    lines: list[str] = []
    for name in dict.fromkeys(row["table"] for row in rows):
        body, commands = [], []
        for row in (row for row in rows if row["table"] == name):
            texts = [row["experiment"], row["dataset"], row["metric"]]
            if measured:
                numbers = (_value(row, "ours"), _value(row, "baseline"), _interval(row), _p(row), _published(row))
                body.append([*map(cell, (*texts, *numbers, row["status"])), _made(row, folder)])
            else:
                body.append([*map(cell, (*texts, _published(row), row["status"], row["tier"]))])
            if row["command"] and row["ours_mean"]:
                commands.append(f"- {cell(row['experiment'])}, {cell(row['dataset'])}: {_code(row['command'])}")
        head = ["experiment", "dataset", "metric"]
        head += ["ours", "baseline", "95 % interval", "p", "paper", "status", "run"] if measured else []
        lines += [f"### {cell(name)}", "", *_table(head if measured else [*head, "paper", "status", "tier"], body), ""]
        if commands:
            lines += ["Commands:", "", *dict.fromkeys(commands), ""]
    return lines


def render_results(rows: Sequence[dict[str, str]], about: Paper, folder: Path) -> str:
    """RESULTS.md of a folder: what was measured here, then what the paper and others published."""
    plots = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("curves*.png"))]
    measured = [row for row in rows if row["ours_mean"]]
    published = [row for row in rows if not row["ours_mean"]]
    lines = [
        f"# {about.name}: results", "",
        "Generated by `python -m shared_utils.lab.results` from `results.csv`. "
        "The 95 % interval and p are of ours - baseline, two-sided, by seed; p is before Holm's correction.", "",
    ]  # fmt: skip
    lines += [f"![{name.rsplit('/', 1)[-1].removesuffix('.png')}]({name})\n" for name in plots]
    lines += ["## Measured here", "", *(_tables(measured, folder, True) or ["Nothing yet.", ""])]
    lines += ["## Published, not measured here", "", *(_tables(published, folder, False) or ["Nothing else.", ""])]
    return "\n".join(lines).strip() + "\n"


def claim_rows(rows: Sequence[dict[str, str]], about: Paper) -> list[dict[str, str]]:
    return [row for name in about.claims for row in rows if row["id"] == name]


def render_claims(rows: Sequence[dict[str, str]], about: Paper) -> str:
    """The table of a folder's README: its claims alone."""
    body = []
    for row in claim_rows(rows, about):
        ours, _, base = row["experiment"].partition("; baseline: ")
        gap = f"{float(row['ours_mean']) - float(row['baseline_mean']):+.2f}" if row["baseline_mean"] else ""
        told = f"{gap} ({_interval(row)})" if row["ci_low"] else gap
        texts = (
            f"{ours} against {base or 'the baseline'}",
            f"{row['dataset']}, {row['metric']}",
            told,
            _p(row),
            row["n_seeds"],
        )
        body.append([*map(cell, texts), cell(row["status"])])
    if not body:
        return "No claim was measured yet."
    head = ("claim", "measured on", "difference (95 % interval)", "p", "seeds", "status")
    return "\n".join(_table(head, body))


def _published(row: dict[str, str]) -> str:
    """The paper's number and where it was read."""
    source = row["paper_source"] + (", unverified" if "recalled" in row["paper_source"].lower() else "")
    return f"{row['paper_value']} ({source})" if row["paper_value"] else ""


def word(rows: Sequence[dict[str, str]], about: Paper) -> str:
    """The verdicts on those of a folder's claims that could be tested, each once, in words."""
    found = {WORDS[row["status"]] for row in claim_rows(rows, about) if row["status"] in CLAIMED}
    return ", ".join(word for word in WORDS.values() if word in found) or "untested"


def short(text: str, limit: int = CELL) -> str:
    return text if len(text) <= limit else text[: limit - 1].rsplit(" ", 1)[0] + " ..."


def render_front(all_rows: dict[str, Sequence[dict[str, str]]], root: Path) -> str:
    """The table of the front page: ten papers, what each says and how it came out, no cell over 60 characters."""
    body = []
    for about in papers(root):
        rows = all_rows[about.folder]
        published = next((row for row in rows if row["id"] == about.headline), None)
        number = "not known" if published is None else f"{published['paper_value']} {published['metric']}"
        if published is not None and "recalled" in published["paper_source"].lower():
            number += ", unverified"
        picture = f'<img src="{about.folder}/lab/strip.png" width="120">'
        link = f"[{about.folder}]({about.folder}/README.md)"
        told = (f"{about.name}, {about.venue}", about.idea, about.release, number, word(rows, about))
        body.append([picture, link, *(cell(short(text)) for text in told)])
    head = ("", "folder", "method", "in a line", "release", "the paper's number", "here")
    return "\n".join(_table(head, body))


def claims(root: Path) -> list[dict[str, Any]]:
    """Each measured claim below `root`: method minus baseline with its interval, in pooled deviations of the seeds."""
    out = []
    for about in papers(root):
        for row in claim_rows(read(root / about.folder)[0], about):
            if not row["ci_low"]:
                continue
            low, high = float(row["ci_low"]), float(row["ci_high"])
            spread = math.sqrt((float(row["ours_std"]) ** 2 + float(row["baseline_std"]) ** 2) / 2) or 1.0
            gap = float(row["ours_mean"]) - float(row["baseline_mean"])
            base = row["experiment"].partition("; baseline: ")[2]
            where = f"{row['dataset'].split(' (')[0].split(',')[0]}, {row['metric'].split(' (')[0]}"
            against = base.split(" (")[0].split(",")[0]
            label = f"{about.folder}: {short(where, 40)}, against {against} (n = {row['n_seeds']})"
            out.append(
                {"label": label, "gap": round(gap / spread, 3), "low": round(low / spread, 3),
                 "high": round(high / spread, 3), "status": row["status"],
                 "compute": any(word in base for word in BUDGET)}
            )  # fmt: skip
    return out


def replaced(text: str, body: str, label: str) -> str:
    """`text` with what stands between the markers replaced by `body`; UserError naming `label` without both markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{label}: needs one line {BEGIN} and after it one line {END}")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{body}\n" + text[text.index(END) :]


def main(argv: list[str] | None = None) -> int:
    """Render (or with --check compare) every table under --root; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m shared_utils.lab.results", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 naming stale or invalid files")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="root of the tree")
    args = parser.parse_args(argv)
    root: Path = args.root
    bodies: dict[Path, str] = {}
    all_rows: dict[str, Sequence[dict[str, str]]] = {}
    wrong: list[str] = []
    for path in sorted(root.glob("*/results.csv")):
        folder = path.parent
        about = paper(folder)
        all_rows[folder.name], problems = read(folder)
        wrong += problems
        ids = {row["id"]: row for row in all_rows[folder.name]}
        if about.headline and not ids.get(about.headline, {}).get("paper_value"):
            wrong.append(f"{folder.name}/results.csv: no row {about.headline} with the paper's number (paper.json)")
        for name in sorted(set(about.claims) - set(ids)):
            wrong.append(f"{folder.name}/results.csv: no row {name}, which paper.json names as a claim")
    if wrong:
        print("\n".join(f"error: {line}" for line in wrong), file=sys.stderr)
        return 1 if args.check else 2
    for name, rows in all_rows.items():
        about = paper(root / name)
        bodies[root / name / "RESULTS.md"] = render_results(rows, about, root / name)
        bodies[root / name / "README.md"] = render_claims(rows, about)
    if (root / "README.md").is_file():  # absent where one folder was copied out
        bodies[root / "README.md"] = render_front(all_rows, root)
    stale = []
    for path, body in bodies.items():
        label = path.relative_to(root).as_posix()
        whole = path.name == "RESULTS.md"
        if not path.is_file() and not whole:
            raise UserError(f"{label}: missing, results.csv has no README.md to render into")
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        fresh = body if whole else replaced(text, body, label)
        if fresh != text:
            stale.append(label)
            if not args.check:
                path.write_text(fresh, encoding="utf-8")
    if (root / "README.md").is_file():
        from shared_utils.lab import plots

        file, data = root / "docs" / "claims.png", claims(root)
        if plots.stale(file, data):
            stale.append("docs/claims.png")
            if not args.check:
                plots.forest(file, data)
    verb = "stale (python -m shared_utils.lab.results renders them)" if args.check else "rendered"
    print(
        f"{len(all_rows)} results.csv, {sum(map(len, all_rows.values()))} rows; {verb}: {', '.join(stale) or 'nothing'}"
    )
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
