"""mdp inside mmsegmentation: equal networks, complete exports, configs, IoU, fine-tuning and evaluation end to end."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mdp import eval_seg, export_mmseg, finetune
from mdp.models import ASPPHead, Encoder, ResNet, SepASPPHead
from shared_utils import UserError, checkpoint
from tests.test_mdp_models import NARROW, pretraining, randomise_norms

CONFIGS = sorted(p.stem for p in finetune.CONFIGS.glob("[a-z]*.py"))


@pytest.fixture(scope="module")
def engine() -> Any:
    imported = finetune.import_engine()
    from mmseg.utils import register_all_modules

    register_all_modules()  # mmsegmentation's names without a Runner
    return imported


def build(cfg: Any) -> Any:
    from mmseg.registry import MODELS

    return MODELS.build(cfg)


@pytest.mark.parametrize("head", ["ASPPHead", "DepthwiseSeparableASPPHead"])
@pytest.mark.parametrize("depth", [18, 50])
def test_networks_are_mmsegmentations(engine: Any, depth: int, head: str) -> None:
    torch.manual_seed(0)
    ours = ResNet(depth, 8)
    strides = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "contract_dilation": True}
    theirs = build({"type": "ResNet", "depth": depth, "base_channels": 8, "stem_channels": 8, **strides})
    common = {"in_channels": ours.out_channels, "channels": 16, "dilations": (1, 2, 4)}
    decoder = {"c1_in_channels": ours.channels[0], "c1_channels": 6} if head != "ASPPHead" else {}
    our_head = (SepASPPHead if decoder else ASPPHead)(**common, **decoder)
    norm = {"type": "BN"}
    their_head = build({"type": head, "in_index": 3, "num_classes": 5, "norm_cfg": norm, **common, **decoder})
    for module in (ours, our_head):
        randomise_norms(module)
    checkpoint.load_strict(theirs, ours.state_dict())
    checkpoint.load_strict(their_head, our_head.state_dict(), missing_ok=("conv_seg.*",))
    their_head.dropout, their_head.conv_seg = None, torch.nn.Identity()
    x = torch.randn(2, 3, 65, 97)
    for training in (True, False):
        for module in (ours, our_head, theirs, their_head):
            module.train(training)
        mine, other = ours(x), theirs(x)
        for a, b in zip(mine, other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        a, b = our_head(mine), their_head(other)
        scale = b.detach().abs().max()
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-6)


def test_export_fills_deeplabv3_r50_d8(engine: Any) -> None:
    """Every backbone and ASPP key of the full-width model is consumed; conv_seg alone is new."""
    from mmengine.config import Config

    model = build(Config.fromfile(str(finetune.find_config("voc12aug"))).model)
    encoder = Encoder()  # ResNet-50, ASPP, 512 channels: the paper's
    state = {f"encoder_{b}.{k}": v for b in "qk" for k, v in encoder.state_dict().items()}
    exported = export_mmseg.export(state)
    assert set(model.state_dict()) - set(exported) == {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    assert set(exported) <= set(model.state_dict())
    report = checkpoint.load_strict(model, exported, missing_ok=finetune.NEW)
    assert report == f"loaded {len(exported)} tensors, dropped 0, left new 2"
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in exported.items())
    with pytest.raises(UserError, match="missing"):
        checkpoint.load_strict(model, {k: v for k, v in exported.items() if "aspp" not in k}, missing_ok=finetune.NEW)


def test_iou_is_mmsegmentations(engine: Any) -> None:
    from mmseg.evaluation import IoUMetric

    rng, matrix, areas = np.random.default_rng(0), torch.zeros(7, 7, dtype=torch.int64), []
    for size in ((12, 9), (30, 7), (5, 5)):
        pred, label = (torch.from_numpy(rng.integers(0, 6, size)) for _ in range(2))  # class 6 never occurs
        label[torch.from_numpy(rng.random(size) < 0.2)] = 255
        matrix += eval_seg.confusion(pred, label, 7)
        areas.append(IoUMetric.intersect_and_union(pred, label, 7, 255))
    metric = engine.ClassIoU(iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": [f"c{i}" for i in range(7)]}
    theirs = metric.compute_metrics(areas)
    ours = eval_seg.scores(matrix, metric.dataset_meta["classes"])
    for key in ("mIoU", "aAcc", "mAcc"):
        assert ours[key] == pytest.approx(theirs[key], abs=0.011)
    assert ours["per_class"]["c6"] is None and np.isnan(metric.per_class["c6"])
    assert ours["per_class"]["c0"] == pytest.approx(metric.per_class["c0"], abs=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_build(engine: Any, name: str) -> None:
    """Each config parses, its datasets exist in the registry with the right number of classes, and its model runs."""
    from mmseg.registry import DATASETS, TRANSFORMS

    narrow = ["--base-channels", "4", "--head-channels", "8"]
    cfg = finetune.resolve(finetune.get_parser().parse_args(["--config", name, *narrow]), {})
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        meta = DATASETS.get(loader.dataset.type).METAINFO
        assert len(meta["classes"]) == len(meta["palette"]) == cfg.model.decode_head.num_classes
        for step in loader.dataset.pipeline:
            TRANSFORMS.build(step)
    assert "auxiliary_head" not in cfg.model and cfg.model.backbone.type == "ResNet"
    assert cfg.optim_wrapper.optimizer == {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    model = build(cfg.model).eval()
    assert model(torch.randn(1, 3, 64, 64), mode="tensor").shape == (1, cfg.model.decode_head.num_classes, 8, 8)


@pytest.mark.parametrize(
    ("name", "iters", "early", "batch", "crop"),
    [
        ("voc12aug", 40000, 4000, 16, (512, 512)),
        ("ade20k", 80000, 8000, 16, (512, 512)),
        ("cityscapes", 80000, 8000, 8, (512, 1024)),
        ("coco_stuff164k", 80000, 8000, 16, (512, 512)),
    ],
)
def test_paper_schedules(name: str, iters: int, early: int, batch: int, crop: tuple[int, int]) -> None:
    cfg = finetune.resolve(finetune.get_parser().parse_args(["--config", name]), {})
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval, cfg.due[0], cfg.due[-1]) == (
        iters,
        early,
        early,
        iters,
    )
    assert len(cfg.due) == 10 and cfg.param_scheduler[0] == {
        "type": "PolyLR", "eta_min": 1e-4, "power": 0.9, "begin": 0, "end": iters, "by_epoch": False,
    }  # fmt: skip
    assert cfg.train_dataloader.batch_size == batch and tuple(cfg.model.data_preprocessor.size) == crop
    assert (cfg.model.backbone.depth, cfg.model.decode_head.channels) == (50, 512)
    head = cfg.model.decode_head
    assert head.dropout_ratio == 0.1 and head.loss_decode.type == "CrossEntropyLoss" and not head.align_corners


def test_registered_sets_ignore_their_void(engine: Any, tmp_path: Path) -> None:
    """CamVid's void id 11 becomes 255; VOC falls back to SBD's map where VOC has none."""
    from mmseg.registry import DATASETS

    for folder, name in (("images", "a.jpg"), ("labels", "a.png")):
        (tmp_path / folder).mkdir()
        grey = np.array([[0, 10, 11, 3]] * 4, np.uint8)
        Image.fromarray(grey if folder == "labels" else np.stack([grey] * 3, 2)).save(tmp_path / folder / name)
    load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
    prefix = {"img_path": "images", "seg_map_path": "labels"}
    camvid = DATASETS.build(
        {"type": "CamVidDataset", "data_root": str(tmp_path), "data_prefix": prefix, "pipeline": load}
    )
    assert camvid[0]["gt_seg_map"][0].tolist() == [0, 10, 255, 3]

    voc = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (voc / folder).mkdir(parents=True)
    for stem, folder, value in (("one", "SegmentationClass", 1), ("two", "SegmentationClassAug", 2)):
        Image.new("RGB", (4, 4)).save(voc / "JPEGImages" / f"{stem}.jpg")
        Image.new("L", (4, 4), value).save(voc / folder / f"{stem}.png")
    (voc / "list.txt").write_text("one\ntwo\n")
    prefix = {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"}
    both = DATASETS.build(
        {"type": "PascalVOCAugDataset", "data_root": str(voc), "data_prefix": prefix, "ann_file": "list.txt",
         "pipeline": load}
    )  # fmt: skip
    assert [int(both[i]["gt_seg_map"].max()) for i in range(2)] == [1, 2]


# End to end --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tree in Cityscapes layout: the class is the colour of the half."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for kind in ("leftImg8bit", "gtFine"):
            (folder / "cityscapes" / kind / split / "x").mkdir(parents=True)
        for i in range(count):
            label = np.zeros((40, 64), np.uint8)
            label[:, int(rng.integers(20, 44)) :] = 1
            image = np.where(label[..., None] == 0, [200, 40, 40], [40, 40, 200]) + rng.integers(-30, 30, (40, 64, 3))
            label[:2] = 255
            stem = f"x_{i:06d}_000019"
            Image.fromarray(image.astype(np.uint8)).save(
                folder / "cityscapes/leftImg8bit" / split / "x" / f"{stem}_leftImg8bit.png"
            )
            Image.fromarray(label).save(folder / "cityscapes/gtFine" / split / "x" / f"{stem}_gtFine_labelTrainIds.png")
    return folder


def flags(root: Path, out: Path, *more: str, iters: int = 12) -> list[str]:
    size = ["--short-side", "40", "--crop-size", "32", "--batch-size", "4", "--iters", str(iters)]
    narrow = [] if "--checkpoint" in more else ["--base-channels", "4", "--head-channels", "8", "--dilations", "1", "2"]
    common = [
        "--config",
        "mini",
        "--data-root",
        str(root),
        "--output-dir",
        str(out),
        "--workers",
        "0",
        "--threads",
        "1",
    ]
    return [*common, *size, *narrow, *more]


def weights(out: Path) -> dict[str, Tensor]:
    return checkpoint.load(out / "model.pth")["state_dict"]


def test_finetune_compare_and_evaluate(
    engine: Any, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretraining(tmp_path / "pre.pth")
    out = tmp_path / "ft"
    argv = flags(root, out, "--checkpoint", str(tmp_path / "pre.pth"), "--compare", "scratch", "--lr", "0.02")
    assert finetune.main(argv) == 0
    said = capsys.readouterr().out
    assert "left new 2" in said and "difference" in said
    result = json.loads((out / "result.json").read_text())
    scratch = json.loads((tmp_path / "ft-scratch" / "result.json").read_text())
    assert (result["early"]["iter"], result["final"]["iter"]) == (1, 12)
    assert (
        set(result["final"]) == {"iter", "mIoU", "aAcc", "mAcc", "per_class"} and "road" in result["final"]["per_class"]
    )
    assert result["final"] != scratch["final"]
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["checkpoint"].endswith("pre.pth") and "git_commit" in config
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 10, 12] and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["lr"] == 0.02

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out))
    events.Reload()
    tags = events.Tags()
    assert {"loss/total", "train/lr", "val/mIoU", "val/aAcc", "val/mAcc"} <= set(tags["scalars"]) and len(
        tags["images"]
    ) == 3
    assert "val/IoU/text_summary" in tags["tensors"]
    assert events.Scalars("val/mIoU")[-1].value == pytest.approx(result["final"]["mIoU"], abs=1e-4)

    assert finetune.main(argv) == 0
    assert capsys.readouterr().out.count("complete already") == 2
    with pytest.raises(UserError, match="lr was 0.02"):
        finetune.main([*argv, "--lr", "0.03"])

    where = ["--data-root", str(root), "--workers", "0", "--output-dir", str(tmp_path / "eval")]
    assert eval_seg.main(["--run", str(out), *where]) == 0
    again = json.loads((tmp_path / "eval" / "eval.json").read_text())["results"]["cityscapes val"]
    assert again == {k: v for k, v in result["final"].items() if k != "iter"}


def test_finetune_stops_on_sigterm_and_ends_the_same(
    engine: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune.main(flags(root, tmp_path / "one", "--validate", "ends")) == 0

    class Stop(engine.Recorder):  # type: ignore[name-defined, misc]
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            super().before_train_iter(runner, batch_idx, data_batch)
            if batch_idx == 6:
                signal.raise_signal(signal.SIGTERM)

    argv = flags(root, tmp_path / "two", "--validate", "ends")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Recorder", Stop)
        with pytest.raises(SystemExit) as stopped:
            finetune.main(argv)
    assert stopped.value.code == 128 + signal.SIGTERM and not (tmp_path / "two" / "model.pth").exists()
    assert finetune.main(argv) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[key], two[key]) for key in one)
    steps = [json.loads(line)["step"] for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 10, 12]  # it went on, it did not begin anew
    first, second = (json.loads((tmp_path / n / "validations.json").read_text()) for n in ("one", "two"))
    assert first == second and [r["iter"] for r in first] == [1, 12]
    # Another seed draws other crops and another start: the comparison above can fail.
    assert finetune.main(flags(root, tmp_path / "three", "--validate", "ends", "--seed", "1")) == 0
    assert not torch.equal(one["backbone.conv1.weight"], weights(tmp_path / "three")["backbone.conv1.weight"])


def test_finetune_in_bf16(engine: Any, root: Path, tmp_path: Path) -> None:
    assert finetune.main(flags(root, tmp_path / "run", "--amp", "bf16", iters=2)) == 0
    assert all(v.dtype != torch.bfloat16 for v in weights(tmp_path / "run").values())


def test_a_diverging_run_stops(engine: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss is nan at iteration|loss is inf at iteration"):
        finetune.main(flags(root, tmp_path / "run", "--lr", "1e12"))
    assert not (tmp_path / "run" / "model.pth").exists()


def test_narrow_head_matches_pretraining_flags() -> None:
    assert Encoder(**NARROW).decode_head.out_channels == NARROW["head_channels"]


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run .*--overwrite leaves it alone"):
        finetune.claim(tmp_path, {"lr": 1}, overwrite=True)
    for name in ("config.json", "result.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "mmengine").mkdir()
    finetune.claim(tmp_path, {"lr": 1}, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "thesis.txt"]
    assert json.loads((tmp_path / "config.json").read_text())["flags"] == {"lr": 1}
