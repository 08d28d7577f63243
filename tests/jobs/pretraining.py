"""The ten pretrainings made short, and where a job that is run by hand writes its table: for crash.py and agents.py."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "robustness.md"
IMAGES = "--per_class 12"
MOCO = f"{IMAGES} --batch_size 16 --moco_k 64 --end_epoch"


class Short(NamedTuple):
    """A pretraining of one folder: its script's mini tier with flags that leave about 12 steps."""

    script: str
    flags: str
    first: tuple[str, ...] = ()  # scripts and flags of what it needs before
    one: str = ""  # flags with which one process does what two do together
    two: str = ""
    note: str = ""  # what those flags switch off, because processes cannot agree on it


PRETRAININGS = {
    "uvos_dino": Short(
        "run_train.sh", "--num_train_steps 12 --probe_every 4 --log-every 1", ("run_dino.sh --epochs 1",),
        "--batch_size 4 --drop 0 --attn_drop_t 0", "--batch_size 2 --drop 0 --attn_drop_t 0", "no dropout",
    ),
    "mra": Short("run_pretrain.sh", "--batch_size 320 --epochs 1 --warmup_epochs 0", (), "", "--batch_size 160"),
    "sage": Short(
        "run_pretrain.sh", f"{IMAGES} --imgs_per_gpu 16 --total_epochs 2",
        (f"run_evaluator.sh {IMAGES} --imgs_per_gpu 16 --total_epochs 1",),
        "--stem_bn sync", "--stem_bn sync --imgs_per_gpu 8", "--stem_bn sync",
    ),
    "fame": Short("run_pretrain.sh", "--per_class 6 -b 12 --moco_k 96 --epochs 5", (), "", "--bn_splits 1"),
    "bingo": Short(
        "run_pretrain.sh", f"{MOCO} 2 --warmup_epochs 1", (f"run_teacher.sh {MOCO} 1", f"run_knn.sh {IMAGES}"),
        "--bn_splits 2",
    ),
    "mdp": Short(
        "run_pretrain.sh", "--datasets voc,cityscapes --epochs 1", (), "--mix none", "--mix none", "--mix none"
    ),
    "sscl": Short(
        "run_train.sh", f"{IMAGES} --batch_labelled 4 --moco_k 64 --epochs 2 --pl_start 1 --proto_every 1", (), "",
        "--bn_splits 1",
    ),
    "hsa": Short("run_pretrain.sh", f"{MOCO} 2 --cluster_freq 1 --warmup_epochs 1", (), "", "--bn_splits 1"),
    "kscl": Short("run_pretrain.sh", f"{MOCO} 2", (), "", "--bn_splits 1"),
    "flat": Short("run_train.sh", "--per_class 9 --batch_size 16 --stop_epoch 4 --val_freq 2 --save_freq 2"),
}  # fmt: skip
COMMON = "--device cpu --threads 1 --log-every 1 --save-every 2"


def environment(runs: Path) -> dict[str, str]:
    """Of a run: this Python as it is, outputs below `runs`, one thread."""
    return {
        "PYTHON": sys.executable,
        "SKIP_ENV": "1",
        "RUNS": str(runs),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def script(folder: str, words: str, out: Path | None = None) -> list[str]:
    """bash FOLDER/SCRIPT mini FLAGS."""
    name, *more = words.split()
    common = [] if name == "run_knn.sh" else COMMON.split()  # it trains nothing
    where = [] if out is None else ["--output-dir", str(out)]
    return ["bash", str(ROOT / folder / name), "mini", *more, *common, *where]


def command(folder: str, words: str, runs: Path, out: Path | None = None) -> list[str]:
    """MODULE FLAGS, which the folder's script would start, asked of the script, which makes its mini data."""
    with tempfile.TemporaryDirectory() as work:
        stub, said = Path(work) / "python", Path(work) / "arguments"
        stub.write_text(
            "#!/usr/bin/env bash\n"
            f'case "$2" in *.lab.*) exec {shlex.quote(sys.executable)} "$@" ;; esac\n'
            'printf "%s\\0" "$@" >"$SAID"\n'
        )
        stub.chmod(0o755)
        asked = {**os.environ, **environment(runs), "PYTHON": str(stub), "SAID": str(said)}
        subprocess.run(script(folder, words, out), cwd=ROOT, env=asked, check=True, capture_output=True)
        return said.read_text().split("\0")[1:-1]


class Forked:
    """`python -m MODULE FLAGS` in a forked process, so that libraries are imported once; stdout and stderr go to files.

    `before` runs in that process first. Python's own start aside it is what the command does, its exit code too.
    """

    def __init__(
        self,
        words: Sequence[str] | Callable[[], NoReturn],
        said: Path,
        before: Callable[[], object] = lambda: None,
        variables: Mapping[str, str] | None = None,
    ):
        self.files = [said.with_suffix(".stdout"), said.with_suffix(".stderr")]
        self.code: int | None = None
        if not callable(words):
            for name in ("torch.utils.tensorboard", "torchvision", "tqdm", words[0]):
                importlib.import_module(name)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            for number, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            os.environ.update(variables or {})
            before()
            if callable(words):
                words()
            sys.modules.pop(words[0], None)
            sys.argv = list(words)
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def kill(self, number: int) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; killed when it takes longer."""
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        out, err = (file.read_text(errors="replace") for file in self.files)
        return int(self.code or 0), out, err


def prepare(folder: str, runs: Path) -> None:
    """What the pretraining needs: a teacher and its bags, an evaluator, an encoder."""
    for words in PRETRAININGS[folder].first:
        code, _, error = Forked(command(folder, words, runs), runs / "first", variables=environment(runs)).wait(1800)
        if code:
            raise SystemExit(f"{folder}/{words}: exit code {code}\n{error[-2000:]}")


def log(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of every whole line of a run's log so far."""
    rows = []
    if (out / "log.jsonl").is_file():
        for line in (out / "log.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                rows.append((row["step"], row["loss"]))
    return rows


# --- the table in docs/robustness.md ----------------------------------------------------------------------------------


def made(text: str) -> Path:
    """A folder, made if it is not there."""
    path = Path(text)
    path.mkdir(parents=True, exist_ok=True)
    return path


def flags(description: str | None, names: Sequence[str], example: str) -> argparse.ArgumentParser:
    """--only, --record, --work and --seed of the jobs that are run by hand."""
    p = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    p.add_argument("--only", choices=names or None, action="append", metavar=example, help=", ".join(names) or None)
    p.add_argument("--record", action="store_true", help="write the rows into docs/robustness.md")
    p.add_argument("--work", type=made, default=Path(tempfile.gettempdir()), help="where runs and data are made")
    p.add_argument("--seed", type=int, default=0, help="of the moments and places that are drawn")
    return p


def stamp() -> str:
    """Commit and date of a row; a + where the tree holds changes besides the table itself."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return f"{git('rev-parse', '--short=7', 'HEAD')}{'+' * bool(changed)}, {time.strftime('%Y-%m-%d')}"


def record(job: str, header: Sequence[str], rows: Mapping[str, Sequence[str]], page: Path = PAGE) -> None:
    """Put rows into the job's table in docs/robustness.md or another; rows of other first cells stay as they are."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {job}:begin -->\n", f"<!-- {job}:end -->"
    before, rest = text.split(begin)
    old, after = rest.split(end)
    kept = {row.split("|")[1].strip(): row for row in re.findall(r"^\| .*\|$", old, re.M)[1:] if "---" not in row}
    clean = {
        name: "| " + " | ".join(cell.replace("|", "/") for cell in (name, *row)) + " |" for name, row in rows.items()
    }
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|", *{**kept, **clean}.values()]
    page.write_text(before + begin + "\n".join(lines) + "\n" + end + after, encoding="utf-8")
