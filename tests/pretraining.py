"""The ten pretrainings made short, and where a job that is run by hand writes its table: for crash.py and agents.py."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "tests" / "README.md"
IMAGES = "--per_class 32"


class Short(NamedTuple):
    """A pretraining of one folder: its script's mini tier with flags that leave about 15 steps."""

    script: str
    flags: str
    first: tuple[str, ...] = ()  # scripts and flags of what it needs before
    one: str = ""  # flags with which one process does what two do together
    two: str = ""
    note: str = ""  # what those flags switch off, because processes cannot agree on it


PRETRAININGS = {
    "uvos_dino": Short(
        "run_train.sh", "--num_train_steps 15 --probe_every 5 --log-every 1", ("run_dino.sh --epochs 1",),
        "--batch_size 4 --drop 0 --attn_drop_t 0", "--batch_size 2 --drop 0 --attn_drop_t 0", "no dropout",
    ),
    "mra": Short("run_pretrain.sh", "--batch_size 500 --epochs 2", (), "", "--batch_size 250"),
    "sage": Short(
        "run_pretrain.sh", f"{IMAGES} --total_epochs 3", (f"run_evaluator.sh {IMAGES} --total_epochs 1",),
        "--stem_bn sync", "--stem_bn sync --imgs_per_gpu 32", "--stem_bn sync",
    ),
    "fame": Short("run_pretrain.sh", "--epochs 3", (), "", "--bn_splits 1"),
    "bingo": Short(
        "run_pretrain.sh", f"{IMAGES} --moco_k 128 --end_epoch 3 --warmup_epochs 1",
        (f"run_teacher.sh {IMAGES} --moco_k 128 --end_epoch 1", f"run_knn.sh {IMAGES}"), "--bn_splits 2",
    ),
    "mdp": Short("run_pretrain.sh", "--epochs 1 --batch-size 64", (), "--mix none", "--mix none", "--mix none"),
    "sscl": Short(
        "run_train.sh", f"{IMAGES} --epochs 3 --pl_start 1 --proto_every 1", (), "", "--bn_splits 1",
    ),
    "hsa": Short(
        "run_pretrain.sh", f"{IMAGES} --moco_k 128 --end_epoch 3 --cluster_freq 1 --warmup_epochs 1", (), "",
        "--bn_splits 1",
    ),
    "kscl": Short("run_pretrain.sh", f"{IMAGES} --moco_k 128 --end_epoch 3", (), "", "--bn_splits 1"),
    "flat": Short("run_train.sh", "--per_class 12 --stop_epoch 3 --val_freq 1 --save_freq 1"),
}  # fmt: skip
COMMON = "--device cpu --threads 1 --log-every 1 --save-every 2"


def environment(runs: Path, **extra: str) -> dict[str, str]:
    """Of a run: this Python as it is, outputs below `runs`, one thread, none of torchrun's variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "GPUS", "DATA_ROOT"))}
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "SKIP_ENV": "1"}
    return {**kept, **one, "PYTHON": sys.executable, "RUNS": str(runs), **extra}


def script(folder: str, words: str, out: Path | None = None) -> list[str]:
    """bash FOLDER/SCRIPT mini FLAGS."""
    name, *flags = words.split()
    where = [] if out is None else ["--output-dir", str(out)]
    return ["bash", str(ROOT / folder / name), "mini", *flags, *COMMON.split(), *where]


def command(folder: str, out: Path, runs: Path, flags: str = "") -> list[str]:
    """The Python command that the folder's script starts, asked of the script: signals then reach Python itself."""
    short = PRETRAININGS[folder]
    with tempfile.TemporaryDirectory() as work:
        stub, said = Path(work) / "python", Path(work) / "arguments"
        stub.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$SAID"\n')
        stub.chmod(0o755)
        asked = {**environment(runs), "PYTHON": str(stub), "SAID": str(said)}
        start = script(folder, f"{short.script} {short.flags} {flags}", out)
        subprocess.run(start, cwd=ROOT, env=asked, check=True, capture_output=True)
        return [sys.executable, *said.read_text().split("\0")[:-1]]


def prepare(folder: str, runs: Path) -> None:
    """What the pretraining needs: a teacher and its bags, an evaluator, an encoder."""
    for words in PRETRAININGS[folder].first:
        start = script(folder, words)
        if "run_knn" in words:
            start = start[: -len(COMMON.split())]
        done = subprocess.run(start, cwd=ROOT, env=environment(runs), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(start)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def log(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of every whole line of a run's log so far."""
    rows = []
    if (out / "log.jsonl").is_file():
        for line in (out / "log.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                rows.append((row["step"], row["loss"]))
    return rows


# --- the table in README.md ------------------------------------------------------------------------------------------


def flags(description: str | None, names: Sequence[str], example: str) -> argparse.ArgumentParser:
    """--only, --record, --work and --seed of the jobs that are run by hand."""
    p = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    p.add_argument("--only", choices=names, action="append", metavar=example, help="of: " + ", ".join(names))
    p.add_argument("--record", action="store_true", help="write the rows into tests/README.md")
    p.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where runs and data are made")
    p.add_argument("--seed", type=int, default=0, help="of the moments and places that are drawn")
    return p


def stamp() -> str:
    """Commit and date of a row."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown commit"
    return f"{commit}, {time.strftime('%Y-%m-%d')}"


def record(job: str, header: Sequence[str], rows: dict[str, Sequence[str]]) -> None:
    """Put rows into the job's table in tests/README.md; rows of other first cells stay as they are."""
    text = README.read_text(encoding="utf-8")
    begin, end = f"<!-- {job}:begin -->\n", f"<!-- {job}:end -->"
    before, rest = text.split(begin)
    old, after = rest.split(end)
    kept = {row.split("|")[1].strip(): row for row in re.findall(r"^\| .*\|$", old, re.M)[1:] if "---" not in row}
    clean = {
        name: "| " + " | ".join(cell.replace("|", "/") for cell in (name, *row)) + " |" for name, row in rows.items()
    }
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|", *{**kept, **clean}.values()]
    README.write_text(before + begin + "\n".join(lines) + "\n" + end + after, encoding="utf-8")


def table(header: Sequence[str], rows: dict[str, Sequence[str]]) -> str:
    """For the terminal."""
    return "\n".join(" | ".join(line) for line in (header, *((name, *row) for name, row in rows.items())))
