"""What bingo's run scripts ask of Python, by a stand-in that records it."""

import os
import subprocess
from pathlib import Path

import pytest

from bingo import main_moco, main_teacher
from bingo.arch import build

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


@pytest.mark.parametrize("tier", ["mini", "small", "paper"])
def test_arms_that_are_compared_differ_in_the_method_alone(tier, script):
    """Head, images of a batch norm and epochs of the student alone are BINGO's; equal compute changes epochs alone."""
    names = "alone bingo_narrow alone_wide bingo_wide alone_eq alone_wide_eq"
    calls = script("bingo/run_arms.sh", tier, DATA_ROOT="/data", ARMS=names)[1]
    found = {}
    for call in calls:
        for module in (main_teacher, main_moco):
            words = call.split(f"-m {module.__name__} ")
            if len(words) == 2:
                args = module.get_parser().parse_args(words[1].split())
                arch, width = (getattr(args, n, None) or getattr(args, f"s_{n}") for n in ("arch", "width"))
                features = build(arch, width).num_features
                found[args.output_dir.parent.name] = {
                    "arch": (arch, width), "hidden": args.hidden or features, "epochs": args.end_epoch,
                    "share": args.batch_size // args.bn_splits, "lr": args.init_lr, "seed": args.seed,
                }  # fmt: skip
    assert set(found) == set(names.split())
    for one, other in (("alone", "bingo_narrow"), ("alone_wide", "bingo_wide")):
        assert found[one] == found[other]
        assert found[f"{one}_eq"].pop("epochs") > 3 * found[one].pop("epochs")
        assert found[f"{one}_eq"] == found[one]
    assert found["alone_wide"]["hidden"] == 2048 > found["alone"]["hidden"]


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


@pytest.mark.parametrize("flags", [["--data_dir", "/my photos"], ["--output-dir=/mine"]])
def test_no_next_line_sends_to_other_data_or_folders_than_the_flags_named(flags, script):
    for name in ("bingo/run_pretrain.sh", "hsa/run_pretrain.sh", "sage/run_evaluator.sh", "kscl/run_pretrain.sh"):
        said, calls = script(name, "paper", *flags)
        assert "next:" not in said and flags[0] in " ".join(calls)
