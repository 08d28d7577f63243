"""What a claim has to name: flags, command, commit, versions, hardware, date."""

import argparse
import contextlib
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved flags as JSON-able values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items())}


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


def card(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Markdown of a run for tensorboard's text page: the command, what the preflight says, versions, flags."""
    rows = {**facts, **{key: value for key, value in config.items() if key not in ("command", "flags", "versions")}}
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    rows |= {f"`--{key}`": value for key, value in config["flags"].items() if value is not None}
    table = "".join(f"| {key} | {str(value).replace('|', chr(92) + '|')} |\n" for key, value in rows.items())
    return f"    {config['command']}\n\n| | |\n|---|---|\n{table}"
