"""What bingo's run scripts ask of Python, by a stand-in that records it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUB = '#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n'


@pytest.fixture
def script(tmp_path):
    """Run a script with these words; what it printed, and the calls."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(name: str, *words: str, **extra: str) -> tuple[str, list[str]]:
        calls.write_text("")
        clean = {k: v for k, v in os.environ.items() if k not in ("GPUS", "SET", "ARMS", "SEEDS", "TEACHER")}
        fake = {"PYTHON": str(stub), "SKIP_ENV": "1", "CALLS": str(calls), "RUNS": str(tmp_path / "runs")}
        done = subprocess.run(
            ["bash", str(ROOT / name), *words], env={**clean, **fake, **extra}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, calls.read_text().splitlines()

    return run


def test_arms_of_the_paper_tier_have_the_papers_protocol(script):
    calls = script("bingo/run_arms.sh", "paper", DATA_ROOT="/imagenet", GPUS="8", ARMS="bingo alone_eq")[1]
    called = {name: [c for c in calls if f"-m bingo.{name} " in c] for name in ("main_knn", "main_lincls", "main_moco")}
    assert [len(found) for found in called.values()] == [2, 2, 1]
    assert not any("--workers 0" in call or "--threads 1" in call or "--cached_train" in call for call in calls)
    for call in called["main_lincls"]:
        assert "--nproc-per-node 8" in call and "--init_lr 30" in call and "--end_epoch 120" in call
    small = script("bingo/run_arms.sh", "small", DATA_ROOT="/data", ARMS="bingo")[1]
    (probe,) = (call for call in small if "-m bingo.main_lincls " in call)
    assert "--cached_train" in probe and "--init_lr 0.3" in probe and "--workers 0 --threads 1" in probe


@pytest.mark.parametrize(
    ("name", "then"),
    [
        ("bingo/run_teacher.sh", "bingo/run_knn.sh"),
        ("bingo/run_knn.sh", "bingo/run_pretrain.sh"),
        ("bingo/run_pretrain.sh", "bingo/run_lincls.sh"),
    ],
)
def test_the_next_line_repeats_what_was_set(name, then, script):
    said = script(name, "small", RUNS="/my runs", DATA_ROOT="/data", SET="tiny_imagenet50", GPUS="2")[0]
    assert said == f"next: RUNS=/my\\ runs DATA_ROOT=/data SET=tiny_imagenet50 GPUS=2 bash {then} small\n"
    clean = {"RUNS": "", "DATA_ROOT": ""}
    assert script(name, "mini", **clean)[0] == f"next: bash {then} mini\n"
