"""What sscl reads of its arms: two evaluations and the log of a run; and the rows of its pseudo-labels."""

import csv
import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from shared_utils import checkpoint
from shared_utils.lab import results
from sscl import main, options
from sscl.lab import arms

ROOT = Path(__file__).resolve().parents[1]
SCORES = {f"{name}@{share}": 10.0 for name in ("raw", "aligned", "calib") for share in (20, 50, 100)}


def finish(folder: Path, seed: float, calibrated: bool = True, kept: bool = True) -> None:
    """A finished run as the scripts leave it; calibrated pseudo-labels are better early and no better at the end."""
    folder.mkdir(parents=True)
    rows: list[dict] = []
    for step in range(10, 100, 10):
        row = {"step": step, "loss": 1.0}
        if calibrated:
            for name, value in (("raw", 0.2), ("aligned", 0.25), ("calib", 0.3 if step <= 30 else 0.9)):
                row |= {f"pl/acc_{name}": value + seed / 100, f"pl/acc_{name}_half": value + seed / 50}
        if step > 30:
            row |= {"neighbours/purity": step / 100, "pl/coverage": 0.5}
        rows.append(row)
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    heads = {**SCORES, "top1": 40 + seed, "ema_top1": 41.0, "minutes": 2.5}
    for job, result in (
        ("cls", heads),
        ("linear", {"knn": 30.0, "linear": 35.0, "5shot_lr": 25.0, "5shot_lr_std": 1.0}),
    ):
        folder.with_name(f"{folder.name}-{job}").mkdir()
        (folder.with_name(f"{folder.name}-{job}") / "result.json").write_text(json.dumps(result))
    facts = {"git_commit": "0123456789ab", "git_dirty": False, "hardware": "a GPU", "date": "2026-11-27"}
    (folder / "config.json").write_text(json.dumps(facts))
    if kept:
        checkpoint.save(folder / "checkpoint.pth", {"progress": {"seconds": 60.0}})


def test_a_run_counts_when_both_evaluations_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "full" / "seed0"
    finish(folder, 0)
    metrics = arms.read(folder) or {}
    assert set(arms.ARMS.metrics) | set(arms.ARMS.shown) <= set(metrics)
    assert metrics["few_shot"] == 25 and metrics["top1"] == 40 and metrics["coverage"] == 50
    assert metrics["early_all_calib"] == pytest.approx(30) and metrics["early_all_aligned"] == pytest.approx(25)
    assert metrics["neighbours"] == pytest.approx((70 + 80 + 90) / 3) and metrics["end50_calib"] == 10
    (folder.with_name("seed0-linear") / "result.json").unlink()
    assert arms.read(folder) is None


def test_an_arm_without_embeddings_claims_nothing_about_calibration(tmp_path: Path) -> None:
    finish(tmp_path / "pseudo" / "seed0", 0, calibrated=False)
    metrics = arms.read(tmp_path / "pseudo" / "seed0") or {}
    assert metrics["top1"] == 40 and not [name for name in metrics if name.endswith("_calib")]


def test_rows_from_the_collected_files_alone(tmp_path: Path, monkeypatch) -> None:
    """No checkpoint comes back from where the runs were made."""
    home, root = tmp_path / "sscl", tmp_path / "small" / "cifar10-4"
    home.mkdir()
    (home / "results.csv").write_text(",".join(results.COLUMNS) + "\n")
    monkeypatch.setattr(arms, "ARMS", dataclasses.replace(arms.ARMS, home=home))
    for seed in range(3):
        finish(root / "full" / f"seed{seed}", seed + 2 + seed / 10, kept=False)
        finish(root / "joint" / f"seed{seed}", seed, kept=False)
    assert arms.main([str(root), "--record"]) == 0 == arms.main([str(root), "--record"])
    rows, problems = results.read(home)
    assert problems == []
    claim = next(row for row in rows if row["id"] == "small-cifar10-4-full-vs-joint-top1")
    assert (claim["ours_mean"], claim["baseline_mean"], claim["n_seeds"]) == ("43.10", "41.00", "3")
    assert claim["status"].startswith("not testable at this size (3 seeds, 5 needed") and claim["minutes"] == "2.5"
    pseudo = {row["id"]: row for row in rows if row["id"].startswith("pseudo-")}
    left_out = {
        row["id"].split("-")[3] for row in rows if row["status"].startswith("not run") and "cifar10-4-" in row["id"]
    }
    assert left_out == set(arms.ARMS.arms) - {"full", "joint"}
    assert len(pseudo) == 10 and len(rows) == 10 + 6 + len(left_out) + 2 * len(arms.ARMS.arms)
    early = pseudo["pseudo-cifar10-4-joint-early_all"]
    assert (early["ours_mean"], early["baseline_mean"]) == ("31.00", "26.00")
    assert early["status"] == "descriptive" and early["p"] and float(early["ci_low"]) <= 5 <= float(early["ci_high"])
    table = arms.calibration_table(arms.ARMS.measured(root))
    assert "| SsCL, both exchanges | accuracy of pseudo-labels, half coverage, finished network | 3 |" in table


def test_an_arm_below_its_supervised_floor_is_no_baseline(tmp_path: Path, capsys) -> None:
    """Of the recorded arms that is training on pseudo-labels with 400 labels a class; the printed table says so."""
    lines = {name: arms.below_floor(arms.ARMS.logs(name)) for name in arms.ARMS.sets}
    assert [len(lines[name]) for name in ("cifar10-25", "cifar10-400")] == [0, 1]
    assert lines["cifar10-400"][0].startswith(
        "pseudo-labels on MoCo's views: 30.32 ± 2.43, below training on the labels"
    )
    for arm, low in (("supervised", 5), ("joint", 0), ("full", 9)):
        for seed in range(3):
            finish(tmp_path / "small" / arm / f"seed{seed}", low + seed / 10)
    assert arms.main([str(tmp_path / "small")]) == 0
    said = capsys.readouterr().out
    assert "joint, without exchange: 40.10 ± 0.10, below training on the labels alone (45.10 ± 0.10)" in said
    assert said.count("no baseline here") == 1
    assert arms.below_floor({"joint": {}}) == []


def flags_of(tier: str, arm: str, tmp_path: Path) -> list[str]:
    """What run_arms.sh passes on to the training of an arm."""
    seen = tmp_path / "seen"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >>{seen}\n')
    fake.chmod(0o755)
    env = {
        **os.environ,
        "PYTHON": str(fake),
        "ARMS": arm,
        "SEEDS": "1",
        "RUNS": str(tmp_path / tier),
        "GPUS": "1",
        "SKIP_ENV": "1",
    }
    subprocess.run(["bash", str(ROOT / "sscl/run_arms.sh"), tier], env=env, check=True, capture_output=True)
    return next(line for line in seen.read_text().splitlines() if "sscl.main" in line).split()


@pytest.mark.parametrize("tier", ["mini", "small", "paper"])
def test_the_arm_of_fixmatch_is_as_published(tier: str, tmp_path: Path) -> None:
    """Threshold 0.95, RandAugment and Cutout, no alignment, no warm-up, an EMA and a batch-norm momentum that go
    together; on ImageNet those of the releases."""
    argv = flags_of(tier, "fixmatch", tmp_path)
    args = main.get_parser().parse_args(argv[argv.index("sscl.main") + 1 :])
    assert (args.theta, args.strong, args.da, args.calib, args.pl_start) == (0.95, "fixmatch", "off", "none", 0)
    assert args.joint_views and args.lambda_c == 0 and not args.soft_targets
    assert args.bn_momentum == pytest.approx(1 - args.moco_m)
    assert tier != "paper" or args.bn_momentum == 0.001
    other = main.get_parser().parse_args(argv[argv.index("sscl.main") + 1 : argv.index("--lambda_c")])
    assert not other.joint_views and other.bn_momentum == 0.1  # what the tier gives to every arm


def test_arms_on_own_folders(tmp_path: Path) -> None:
    """SET=mine: folders of labelled, unlabelled and test images, no flag of a benchmark; what is missing is named."""
    calls, fake = tmp_path / "calls", tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" >>{calls}\n")
    fake.chmod(0o755)
    own = tmp_path / "own data"
    env = {**os.environ, "PYTHON": str(fake), "ARMS": "full", "RUNS": str(tmp_path / "runs"), "SKIP_ENV": "1"}
    env |= {"DATA_ROOT": str(own), "SET": "mine", "SEEDS": "1"}
    command = ["bash", str(ROOT / "sscl/run_arms.sh"), "small"]
    for part in ("labelled", "unlabelled"):
        (own / "mine" / part).mkdir(parents=True)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and f"{own}/mine/test: no such folder" in done.stderr and not calls.exists()
    (own / "mine/test").mkdir()
    subprocess.run(command, env=env, check=True, capture_output=True)
    train, heads, feats, table = calls.read_text().splitlines()
    words = train.replace(str(own), "own_data").split()
    args = main.get_parser().parse_args(words[words.index("sscl.main") + 1 :])
    assert (str(args.labelled), str(args.unlabelled)) == ("own_data/mine/labelled", "own_data/mine/unlabelled")
    options.resolve(args)
    options.check_flags(args, 1)  # neither --split nor --labels_per_class
    assert f"--val_dir {own}/mine/test" in heads and "--pseudo" not in heads
    assert f"--val_dir {own}/mine/test" in feats and "--protocols knn,linear" in feats
    assert table.endswith("runs/sscl/arms/small/mine")
    finish(tmp_path / "full/seed1", 1, calibrated=False)
    (tmp_path / "full/seed1-linear/result.json").write_text(json.dumps({"knn": 30.0, "linear": 35.0}))
    told = arms.ARMS.table(arms.ARMS.measured(tmp_path))
    assert "| 1 | 41.00 | 41.00 |  | 30.00 | 35.00 |" in told  # no 5-shot accuracy, which nobody measured


def test_pseudo_rows_of_the_tree_are_what_its_logs_say() -> None:
    with open(ROOT / "sscl" / "results.csv", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["id"].startswith("pseudo-")]
    empty = dict.fromkeys(results.COLUMNS, "")
    expected = {name: [empty | row for row in arms.calibration_rows(name)] for name in arms.ARMS.sets}
    for name, of_set in expected.items():  # sets stand in the order in which they were recorded last
        assert [row for row in rows if row["id"].startswith(f"pseudo-{name}-")] == of_set
    assert len(rows) == sum(map(len, expected.values())) > 0
