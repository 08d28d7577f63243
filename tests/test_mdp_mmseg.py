"""mdp inside mmsegmentation: equal networks, complete exports, configs, IoU, fine-tuning and evaluation end to end."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from mdp import eval_seg, finetune
from mdp.datasets import NAMES, open_set
from mdp.lab import export_mmseg
from mdp.models import ASPPHead, Encoder, ResNet, SepASPPHead
from shared_utils import UserError, checkpoint
from tests.test_mdp_data import write_tree
from tests.test_mdp_models import NARROW, pretraining, randomise_norms

OWN = ["LoadPhoto", "LoadLabels"]
CONFIGS = sorted(p.stem for p in finetune.CONFIGS.glob("[a-z]*.py") if p.stem != "own")  # it has no set of its own


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
        meta = DATASETS.build({**loader.dataset, "pipeline": [], "lazy_init": True}).metainfo
        assert len(meta["classes"]) == len(meta["palette"]) == cfg.model.decode_head.num_classes
        assert [step.type for step in loader.dataset.pipeline if step.type.startswith("Load")] == OWN
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


# One rule for all readers -------------------------------------------------------------------------------------------


def inside(name: str, root: Path, split: str) -> Any:
    """A split as a fine-tuning run loads it."""
    from mmseg.registry import DATASETS

    pipeline = [{"type": name} for name in OWN]
    return DATASETS.build(
        {"type": "MDPDataset", "name": name, "split": split, "data_root": str(root), "pipeline": pipeline}
    )


@pytest.mark.parametrize("name", NAMES)
def test_mmsegmentation_reads_what_pretraining_reads(engine: Any, name: str, tmp_path: Path) -> None:
    """Files, order, photos, local ids (void, SBD's maps where VOC has none, ADE's shift) are equal for every set."""
    write_tree(name, tmp_path)
    ours, theirs = open_set(name, tmp_path), inside(name, tmp_path, "train")
    assert len(ours) == len(theirs) and list(theirs.metainfo["classes"]) == list(ours.classes)
    for i in range(len(ours)):
        photo, label = ours.load(i)
        assert (theirs[i]["img_path"], theirs[i]["seg_map_path"]) == tuple(map(str, ours.pairs[i]))
        np.testing.assert_array_equal(theirs[i]["img"][..., ::-1], np.asarray(photo))
        np.testing.assert_array_equal(theirs[i]["gt_seg_map"], label)


COLOURS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]])


def turned_scene(root: Path, tag: int, ending: str = "jpg", size: tuple[int, int] = (48, 32)) -> np.ndarray:
    """A CamVid split of one photo in the colours of its classes, with an orientation tag; returns its ids [H, W]."""
    ids = np.zeros(size[::-1], np.uint8)
    ids[: size[1] // 4] = 1
    ids[:, size[0] // 2 + 8 :] = 2
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    for kind in ("images", "labels"):
        (root / "camvid11" / kind / "val").mkdir(parents=True, exist_ok=True)
    photo = Image.fromarray(COLOURS[ids].astype(np.uint8))
    photo.save(root / f"camvid11/images/val/a.{ending}", exif=exif, quality=100, subsampling=0)
    assert Image.open(root / f"camvid11/images/val/a.{ending}").getexif()[ExifTags.Base.Orientation] == tag
    Image.fromarray(ids).save(root / "camvid11/labels/val/a.png")
    return ids


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("tag", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("size", [(48, 32), (40, 40)])
def test_a_photo_stays_with_its_label_map(
    engine: Any, tag: int, ending: str, size: tuple[int, int], tmp_path: Path
) -> None:
    """By both readers the pixels are equal, as stored, and who names every pixel by its colour has an mIoU of 100."""
    ids = turned_scene(tmp_path, tag, ending, size)
    photo, label = open_set("camvid", tmp_path, "val").load(0)
    sample = inside("camvid", tmp_path, "val")[0]
    np.testing.assert_array_equal(sample["img"][..., ::-1], np.asarray(photo))
    np.testing.assert_array_equal(label, ids)
    np.testing.assert_array_equal(sample["gt_seg_map"], ids)
    metric = engine.ClassIoU(iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": [str(i) for i in range(3)]}
    for image, truth in ((np.asarray(photo), label), (sample["img"][..., ::-1], sample["gt_seg_map"])):
        guess = np.abs(image[:, :, None].astype(int) - COLOURS).sum(-1).argmin(-1)  # [H, W]
        pred, gold = torch.from_numpy(guess), torch.from_numpy(truth).long()
        assert eval_seg.mean_iou(eval_seg.confusion(pred, gold, 3)) == 100
        assert metric.compute_metrics([metric.intersect_and_union(pred, gold, 3, 255)])["mIoU"] == 100
    if tag in (3, 6) and size == (40, 40):  # what mmsegmentation's own reader does to the same file
        theirs = build_transform({"type": "LoadImageFromFile"})({"img_path": sample["img_path"]})["img"]
        assert not np.array_equal(theirs, sample["img"])


def build_transform(cfg: dict) -> Any:
    from mmseg.registry import TRANSFORMS

    return TRANSFORMS.build(cfg)


def test_the_preprocessing_of_a_run_keeps_them_together(engine: Any, tmp_path: Path) -> None:
    """The test pipeline of a config: the photo of a turned file has its stored shape, and so has its label map."""
    from mmseg.registry import DATASETS

    turned_scene(tmp_path, 6)
    argv = ["--config", "camvid", "--data-root", str(tmp_path), "--short-side", "32"]
    cfg = finetune.resolve(finetune.get_parser().parse_args(argv), {})
    sample = DATASETS.build(cfg.val_dataloader.dataset)[0]
    assert sample["inputs"].shape == (3, 32, 48)
    assert sample["data_samples"].ori_shape == (32, 48) == tuple(sample["data_samples"].gt_sem_seg.shape)


def test_camvid_photos_may_be_png(engine: Any, tmp_path: Path) -> None:
    """.png, .JPG and .jpeg beside one another, in both readers."""
    turned_scene(tmp_path, 1, "png")
    folder = tmp_path / "camvid11"
    for stem, ending in (("b", "JPG"), ("c", "jpeg")):
        with Image.open(folder / "images/val/a.png") as photo:
            photo.save(folder / f"images/val/{stem}.{ending}", format="JPEG")
        (folder / f"labels/val/{stem}.png").write_bytes((folder / "labels/val/a.png").read_bytes())
    loaded = inside("camvid", tmp_path, "val")
    assert [Path(loaded[i]["img_path"]).name for i in range(len(loaded))] == ["a.png", "b.JPG", "c.jpeg"]
    assert all(loaded[i]["img"].shape == (32, 48, 3) for i in range(3))


def test_copies_of_older_configs_get_the_same_readers(engine: Any, tmp_path: Path) -> None:
    text = (
        finetune.find_config("camvid").read_text().replace("./_deeplabv3.py", str(finetune.CONFIGS / "_deeplabv3.py"))
    )
    text = text.replace('type="LoadPhoto"', 'type="LoadImageFromFile"').replace("LoadLabels", "LoadAnnotations")
    old = 'dict(type="CamVidDataset", data_root="data/camvid11", '
    old += 'data_prefix=dict(img_path="images/val", seg_map_path="labels/val"), '
    text = re.sub(r'dict\(type="MDPDataset", name="camvid", split="\w+", data_root="data", ', old, text)
    assert text.count("CamVidDataset") == 3
    (tmp_path / "mine.py").write_text(text)
    pair = [
        finetune.resolve(finetune.get_parser().parse_args(["--config", config]), {})
        for config in ("camvid", str(tmp_path / "mine.py"))
    ]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        assert pair[0][loader].dataset == pair[1][loader].dataset


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
