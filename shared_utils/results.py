"""Results tables: `<paper>/results.csv` is the claim, the tables in the READMEs are rendered from it.

    python -m shared_utils.results            write the tables between the markers of each README
    python -m shared_utils.results --check    write nothing; exit 1 and name what is stale or invalid

Only the standard library is imported, so that this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_utils import UserError

COLUMNS = (
    "id,table,experiment,dataset,metric,paper_value,paper_source,tier,ours_mean,ours_std,n_seeds,baseline_mean,"
    "baseline_std,status,command,commit,hardware,minutes,date,log"
).split(",")
MEASURED = ("reproduced", "effect shown at small scale", "no effect at small scale", "contradicted")
UNKNOWN = "paper value unknown"
NOT_RUN = re.compile(r"not run \(needs [^()]+\)")
NUMBERS = ("paper_value", "ours_mean", "ours_std", "baseline_mean", "baseline_std", "minutes")
NEEDED = ("tier", "ours_mean", "n_seeds", "command", "commit", "hardware", "minutes", "date", "log")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


@dataclass(frozen=True)
class Paper:
    folder: str
    title: str
    arxiv: str
    idea: str  # about five words
    release: str  # the authors' repository and its state, or "none"
    published: str  # id of the row that holds the paper's headline number, or "-" where none could be read
    claims: str  # ids of the rows that the folder's acceptance rule is about, on one of its data sets; "-": none yet


_PAPERS = """
uvos_dino | Betrayed by Attention: A Simple yet Effective Approach for Self-supervised Video Object Segmentation
  | 2311.17893 | segment videos from DINO attention | shvdiwnkozbw/SSL-UVOS (training cannot start)
  | davis17-fork-jf | small-davis2016-both-vs-random-J
mra | Masked Autoencoders are Robust Data Augmentors
  | 2206.04846 | masked autoencoder reconstructions as augmentation | haohang96/MRA (holds no code) | in1k-mra
  | small-texture-mra-vs-base-top1
sage | Semantic-Aware Generation for Self-Supervised Visual Representation Learning
  | 2111.13163 | BYOL plus perceptual view generation | sunsmarterjie/SaGe (cannot run as uploaded) | cityscapes-miou
  | small-cifar10-sage-vs-byol-linear small-cifar10-sage-vs-byol_sum-linear
  small-mini_attributes-sage-vs-byol-linear_mean
fame | Motion-aware Contrastive Video Representation Learning via Foreground-background Merging
  | 2109.15130 | moving foreground, another video's background | Mark12Ding/FAME | v1-ucf101
  | small-motion-fame-vs-moco-linear
bingo | Bag of Instances Aggregation Boosts Self-supervised Distillation
  | 2107.01691 | distil bags of teacher neighbours | haohang96/bingo (no licence, no weights)
  | linear-bingo-r50w2-resnet18-top1 | small-cifar10-bingo-vs-alone-few_shot small-cifar10-bingo-vs-alone_eq-few_shot
mdp | Multi-dataset Pretraining: A Unified Model for Semantic Segmentation
  | 2106.04121 | pixel-to-prototype contrast across datasets | none | t1-all-200-voc12aug
  | small-camvid-multi-vs-scratch-early small-camvid-multi-vs-p2p-early
sscl | Semi-supervised Contrastive Learning with Similarity Co-calibration
  | 2105.07387 | contrast and pseudo-labels co-calibrate | none | abstract-sscl-1-top1
  | small-cifar10-4-full-vs-joint-top1
hsa | Seed the Views: Hierarchical Semantic Alignment for Contrastive Representation Learning
  | 2012.02733 | neighbours as positives, several levels | haohang96/CSML (one level only, no licence)
  | abstract-v1-linear | small-cifar10-full-vs-moco-few_shot small-cifar10-full-vs-moco_eq-few_shot
kscl | K-Shot Contrastive Learning of Visual Features with Multiple Instance Augmentations
  | 2007.13310 | augmentations span an instance subspace | none | -
  | small-cifar10-k5-vs-moco-few_shot small-cifar10-k5-vs-moco_eq5-few_shot
flat | FLAT: Few-Shot Learning via Autoencoding Transformation Regularizers
  | 1912.12674 | few-shot learning, predicting transformations | none | -
  | small-cifarfs5-flat-vs-base-one_shot small-cifarfs5-flat-vs-base-five_shot
"""
PAPERS = tuple(Paper(*map(str.strip, line.split("|"))) for line in _PAPERS.replace("\n  ", " ").strip().splitlines())


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def row_problems(row: dict[str, str], folder: Path) -> list[str]:
    """What is wrong with one row of `<folder>/results.csv`, one line each."""
    status, wrong = row["status"], []
    measured = status in MEASURED or bool(row["ours_mean"])
    if status not in (*MEASURED, UNKNOWN) and not NOT_RUN.fullmatch(status):
        wrong.append(f"unknown status {status!r}: one of {', '.join(MEASURED)}, not run (needs ...), {UNKNOWN}")
    wrong += [f"{name} is not a number: {row[name]!r}" for name in NUMBERS if row[name] and not _number(row[name])]
    wrong += [f"{name} is empty" for name in ("id", "table", "experiment", "metric") if not row[name]]
    if row["paper_value"] and (not row["paper_source"] or status == UNKNOWN):
        wrong.append(f"a paper_value needs a paper_source and a status other than {UNKNOWN!r}")
    if row["tier"] not in ("", "mini", "small", "paper"):
        wrong.append(f"unknown tier {row['tier']!r}: mini, small or paper")
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


def render_paper(rows: Sequence[dict[str, str]], folder: Path) -> str:
    """The tables of one folder's README, one a value of `table`, in the order of the file."""
    lines: list[str] = []
    for name in dict.fromkeys(row["table"] for row in rows):
        body, commands = [], []
        for row in (row for row in rows if row["table"] == name):
            source = row["paper_source"] + (", unverified" if "recalled" in row["paper_source"].lower() else "")
            paper = f"{row['paper_value']} ({source})" if row["paper_value"] else ""
            seeds = f"{row['n_seeds']} seed{'s' * (row['n_seeds'] != '1')}" if row["n_seeds"] else ""
            spent = f"{row['minutes']} min" if row["minutes"] else ""
            run = ", ".join(filter(None, (row["tier"], seeds, spent, row["hardware"], row["date"], row["commit"][:12])))
            links = [_log_link(part.strip(), folder) for part in row["log"].split(";") if part.strip()]
            logs = " ".join(f"[log]({link})" for link in links if link)
            plain = (row["experiment"], row["dataset"], row["metric"], paper, _value(row, "ours"))
            texts = (*plain, _value(row, "baseline"), row["status"], run)
            body.append([*map(cell, texts[:-1]), " ".join(filter(None, (cell(run), logs)))])
            if row["command"] and row["ours_mean"]:
                commands.append(f"- {cell(row['experiment'])}, {cell(row['dataset'])}: {_code(row['command'])}")
        head = ("experiment", "dataset", "metric", "paper", "ours", "baseline", "status", "run")
        lines += [f"### {cell(name)}", "", *_table(head, body), ""]
        if commands:
            lines += ["Commands:", "", *dict.fromkeys(commands), ""]
    return "\n".join(lines).strip()


def _published(row: dict[str, str]) -> str:
    """The paper's number and where it was read."""
    source = row["paper_source"] + (", unverified" if "recalled" in row["paper_source"].lower() else "")
    return f"{row['paper_value']} {row['metric']}, {row['dataset']}: {row['experiment']} ({source})"


def _measured(rows: Sequence[dict[str, str]]) -> str:
    """What was measured on one data set, each baseline beside it with the status that follows."""
    ours = rows[0]["experiment"].partition("; baseline: ")[0]
    against = []
    for row in rows:
        base = row["experiment"].partition("; baseline: ")[2] or "baseline"
        value = f"against {_value(row, 'baseline')} ({base}): " if row["baseline_mean"] else ""
        against.append(f"{value}**{row['status']}**")
    head = f"{rows[0]['dataset']}, {rows[0]['metric']}: {_value(rows[0], 'ours')} ({ours}), n = {rows[0]['n_seeds']}"
    return f"{head}, {'; '.join(against)}"


def claim_rows(rows: Sequence[dict[str, str]], claims: str) -> list[list[dict[str, str]]]:
    """The measured rows of `claims` (ids) and of the same comparisons on the folder's other data sets, so that a claim
    that fails on one of them is not hidden; those that measure the same thing against several baselines together."""
    named = [row for name in claims.split() for row in rows if row["id"] == name]
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for claim in named:
        for row in rows:
            if row["ours_mean"] and all(row[k] == claim[k] for k in ("experiment", "metric", "tier")):
                ours = row["experiment"].partition("; baseline: ")[0]
                key = (row["dataset"], row["metric"], ours, row["ours_mean"], row["n_seeds"])
                found.setdefault(key, []).append(row)
    return list(found.values())


def render_front(all_rows: dict[str, Sequence[dict[str, str]]]) -> str:
    """The table of the ten papers: what each reports, and what its acceptance rule is about as measured here."""
    body = []
    for paper in PAPERS:
        rows = all_rows.get(paper.folder)
        state, published, headline, made = "planned", "", "", ""
        if rows is not None:
            counts = Counter("not run" if NOT_RUN.fullmatch(row["status"]) else row["status"] for row in rows)
            state = ", ".join(f"{counts[name]} {name}" for name in (*MEASURED, UNKNOWN, "not run") if counts[name])
            published = "not known: its tables could not be read"
            if paper.published != "-":
                published = _published(next(row for row in rows if row["id"] == paper.published))
            groups = claim_rows(rows, paper.claims)
            headline = "<br>".join(cell(_measured(group)) for group in groups)
            if groups:
                first = groups[0][0]
                made = f"{first['commit'][:7]}, {first['minutes']} min a seed, {first['hardware']}"
        folder = f"[{paper.folder}]({paper.folder}/README.md)" if rows is not None else paper.folder
        title = f"{cell(paper.title)} (arXiv {paper.arxiv})"
        said = map(cell, (paper.idea, paper.release, published))
        body.append([folder, title, *said, headline, *map(cell, (state or "no rows", made))])
    head = (
        "folder",
        "paper",
        "idea",
        "original release",
        "the paper's number",
        "measured here",
        "rows",
        "commit, time",
    )
    return "\n".join(_table(head, body))


def replaced(text: str, body: str, label: str) -> str:
    """`text` with what stands between the markers replaced by `body`; UserError naming `label` without both markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{label}: needs one line {BEGIN} and after it one line {END}")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{body}\n" + text[text.index(END) :]


def main(argv: list[str] | None = None) -> int:
    """Render (or with --check compare) every table under --root; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shared_utils.results", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 naming stale or invalid files")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="root of the tree")
    args = parser.parse_args(argv)
    root: Path = args.root
    bodies: dict[Path, str] = {}
    all_rows: dict[str, Sequence[dict[str, str]]] = {}
    wrong: list[str] = []
    for path in sorted(root.glob("*/results.csv")):
        folder = path.parent
        if folder.name not in {paper.folder for paper in PAPERS}:
            wrong.append(
                f"{folder.name}/results.csv: {folder.name} is not in PAPERS of shared_utils/results.py; add it there"
            )
            continue
        all_rows[folder.name], problems = read(folder)
        wrong += problems
        paper = next(paper for paper in PAPERS if paper.folder == folder.name)
        with_number = {row["id"] for row in all_rows[folder.name] if row["paper_value"]}
        if paper.published not in {"-", *with_number}:
            wrong.append(
                f"{folder.name}/results.csv: no row {paper.published} with the paper's number (PAPERS names it)"
            )
        for name in sorted(set(paper.claims.split()) - {"-", *(row["id"] for row in all_rows[folder.name])}):
            wrong.append(f"{folder.name}/results.csv: no row {name}, which PAPERS names as the claim")
        bodies[folder / "README.md"] = render_paper(all_rows[folder.name], folder)
    if wrong:
        print("\n".join(f"error: {line}" for line in wrong), file=sys.stderr)
        return 1 if args.check else 2
    if (root / "README.md").is_file():  # absent where one folder was copied out
        bodies[root / "README.md"] = render_front(all_rows)
    stale = []
    for path, body in bodies.items():
        label = path.relative_to(root).as_posix()
        if not path.is_file():
            raise UserError(f"{label}: missing, results.csv has no README.md to render into")
        text = path.read_text(encoding="utf-8")
        fresh = replaced(text, body, label)
        if fresh != text:
            stale.append(label)
            if not args.check:
                path.write_text(fresh, encoding="utf-8")
    verb = "stale (python -m shared_utils.results renders them)" if args.check else "rendered"
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
