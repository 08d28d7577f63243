"""What hsa reads of its arms: the two evaluations of a run, and the neighbours that it trained with."""

import json
from pathlib import Path

import torch

from hsa.lab import arms
from hsa.main_knn import load_bags
from shared_utils import checkpoint


def test_a_run_counts_when_both_evaluations_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "full" / "seed0"
    for job, result in (
        ("knn", {"knn": 30.0, "few_shot": 20.0, "purity": 25.0, "knn10": 0.0, "bag_gap": 0.25}),
        ("linear", {"linear_last": 40.0, "blocks": {"5": {"last": 40.0}, "4": {"last": 35.0}}}),
    ):
        assert arms.read(folder) is None
        folder.with_name(f"seed0-{job}").mkdir(parents=True)
        (folder.with_name(f"seed0-{job}") / "result.json").write_text(json.dumps(result))
    metrics = {"few_shot": 20.0, "knn": 30.0, "purity": 25.0, "linear_last": 40.0, "linear3": 35.0}
    assert arms.read(folder) == metrics | {"bag_gap": 0.25}
    (folder.with_name("seed0-knn") / "result.json").write_text(json.dumps({"knn": 1.0, "few_shot": 2.0, "purity": 3.0}))
    assert "bag_gap" not in (arms.read(folder) or {})  # MoCo has no neighbours of its own


def test_neighbours_of_a_run_become_bags(tmp_path: Path) -> None:
    index = torch.tensor([[1, 2], [2, 0], [0, 1]])
    for name, parts in (("full", {"neighbours": {"index": index, "epoch": 5}}), ("moco", {})):
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name / "checkpoint.pth", {"progress": {"seconds": 1.0}, **parts})
        assert arms.main([str(tmp_path / name), "--bags", str(tmp_path / f"{name}.npy")]) == 0
    assert torch.equal(load_bags(tmp_path / "full.npy", 3, 2), index)
    assert not (tmp_path / "moco.npy").exists()
