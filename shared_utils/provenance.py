"""What a claim has to name: flags, command, commit, versions, hardware, date."""

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from shared_utils import UserError, checkpoint
from shared_utils.flags import plain

# Flags that say where and how fast a run goes, not what it computes: they may change on a resume.
RUNTIME_FLAGS = {"output_dir", "data_root", "device", "workers", "threads", "log_every", "save_every", "resume"}
RUNTIME_FLAGS |= {
    "overwrite",
    "cache",
    "index_cache",
    "feature_dir",
    "image_every",
    "compile",
    "save_path",
    "knn_every",
}
RUNTIME_FLAGS |= {"synthetic"}  # of older runs: mini data that the script made itself

# Flags that say where data lies: what counts is what is there, which a run compares by `fingerprint` (for the bags of
# bingo by a flag of their own). Without anything to compare they are method flags.
DATA_FLAGS = {"data", "data_dir", "data_path", "data_root", "basepath", "val_dir", "val_basepath", "corr_npy"}
DATA_FLAGS |= {"list_file", "train_list", "val_list", "split_file", "labels", "labelled", "unlabelled"}

RESULTS = ("result.json", "eval.json", "episodes.pt")  # files of an evaluation


def provenance() -> dict[str, Any]:
    """Command, git commit and dirty flag, library versions, hardware and date: what a claim has to name."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]

    def ask(*words: str) -> str | None:
        try:
            return subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    status = ask("status", "--porcelain", "--untracked-files=no")
    versions = {}
    for name in ("torch", "torchvision", "timm", "numpy", "pillow", "mmsegmentation", "onedl-mmsegmentation"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    hardware = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {hardware}"
    return {
        "command": shlex.join(getattr(sys, "orig_argv", sys.argv)),
        "git_commit": ask("rev-parse", "--short=12", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware,
        "date": time.strftime("%Y-%m-%d"),
    }


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """What config.json holds: the job, the flags as resolved and as asked for, and `provenance`."""
    return {"job": getattr(args, "job", ""), "flags": plain(args), "asked": getattr(args, "asked", {}), **provenance()}


def other_flags(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `args` whose value is another one in `folder`/config.json; a flag that it lacks had its default."""
    try:
        theirs = json.loads((folder / "config.json").read_text())["flags"]
    except (OSError, ValueError, KeyError):
        return {}
    defaults = plain(argparse.Namespace(**getattr(args, "defaults", {})))
    mine = json.loads(json.dumps(plain(args)))  # tuples as lists
    was = {k: theirs.get(k, defaults.get(k)) for k in mine if k not in RUNTIME_FLAGS - DATA_FLAGS}
    path = os.path.abspath  # the same file, from another folder
    return {k: mine[k] for k, v in was.items() if mine[k] != v and path(str(mine[k])) != path(str(v))}


def keep_results(folder: Path, args: argparse.Namespace) -> None:
    """Results of other flags that lie in `folder` become result-1.json and so on, with their config-1.json."""
    there = [name for name in RESULTS if (folder / name).is_file()]
    if not there or ((folder / "config.json").is_file() and not other_flags(folder, args)):
        return
    stems = [(name.rpartition(".")[0], Path(name).suffix) for name in ("config.json", *RESULTS)]
    number = next(n for n in itertools.count(1) if not any((folder / f"{s}-{n}{end}").exists() for s, end in stems))
    for stem, end in stems:
        with contextlib.suppress(FileNotFoundError):
            (folder / f"{stem}{end}").rename(folder / f"{stem}-{number}{end}")
    print(f"  {folder}: {there[0]} is of other flags, kept as {Path(there[0]).stem}-{number}.json", flush=True)


def result_folder(args: argparse.Namespace, dest: str = "output_dir") -> Path:
    """The folder for the results of an evaluation, with its config.json; nothing that lies there is lost.

    A folder that was given keeps older results beside the new one (`keep_results`). Of the folder beside the weights
    (`Flags`) a neighbour is taken where it holds a result of other flags: its name has the flags that differ.
    Call it on rank 0, once the flags are resolved.

    UserError: it cannot be written.
    """
    folder: Path = getattr(args, dest)
    if (folder / "log.jsonl").is_file():  # a run's own folder, whose config.json is another
        folder = folder / "eval" / getattr(args, "job", "result").rpartition(".")[2]
    try:
        if dest in getattr(args, "given", {dest}):
            keep_results(folder, args)
        elif changed := other_flags(folder, args):
            words = "-".join(f"{k}={str(v).rstrip('/').rpartition('/')[2]}" for k, v in changed.items())
            name = f"{folder.name}-" + re.sub(r"[^=.,+\w-]+", "_", words)[:80]
            names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
            folder = next(new for n in names if not other_flags(new := folder.with_name(n), args))
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(folder / "config.json", config_of(args))
    except OSError as error:
        flag = "--" + dest.replace("output_dir", "output-dir")
        raise UserError(f"{folder}: cannot write here ({error.strerror}); give another {flag}") from None
    return folder


def card(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Markdown of a run for tensorboard's text page: the command, what the preflight says, versions, flags."""
    rows = {
        **facts,
        **{key: value for key, value in config.items() if key not in ("command", "flags", "asked", "versions")},
    }
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    rows |= {f"`--{key}`": value for key, value in config["flags"].items() if value is not None}
    table = "".join(f"| {key} | {str(value).replace('|', chr(92) + '|')} |\n" for key, value in rows.items())
    return f"    {config['command']}\n\n| | |\n|---|---|\n{table}"
