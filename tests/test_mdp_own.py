"""mdp on a user's own files: sets of images/, labels/ and classes.txt, fine-tuning, evaluation, predictions, --init."""

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.nn import functional as F

from mdp import eval_seg, finetune, predict
from mdp.datasets import SegSet, UnionDataset
from mdp.main_pretrain import get_parser, main
from mdp.own import check_maps, open_own, split_words
from mdp.transforms import TwoViews
from shared_utils import UserError, checkpoint
from shared_utils.pictures import voc_palette
from tests.test_mdp_data import grey_png

SMALL = (
    "--arch resnet18 --base-channels 8 --head-channels 16 --dilations 1,2 --dim 16 --crop-size 32 --batch-size 4 "
    "--bank-size 8 --workers 0 --threads 1 --lr 0.05 --log-every 1 --epochs 2"
).split()
ROOT = Path(__file__).resolve().parents[1]
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]])
# Portrait, landscape, square, and smaller than a crop.
SIZES = [(40, 64), (72, 48), (48, 48), (30, 24), (50, 34)]


def scene(rng: np.random.Generator, size: tuple[int, int], ids: list[int]) -> tuple[Image.Image, np.ndarray]:
    """A photo whose colour tells the id of a pixel, and the ids [H, W]: two halves."""
    label = np.full(size[::-1], ids[0], np.uint8)
    label[:, int(rng.integers(size[0] // 3, 2 * size[0] // 3)) :] = ids[1]
    noise = rng.integers(-20, 20, (*label.shape, 3))
    return Image.fromarray((COLOURS[label % 4] + noise).clip(0, 255).astype(np.uint8)), label


def write_set(root: Path, classes: str, pairs: list[list[int]], split: str = "", count: int = 12) -> Path:
    """An own set with spaces in its names, endings of several kinds, mixed sizes; label maps grey or with a palette."""
    rng = np.random.default_rng(len(classes) + len(split))
    for i in range(count):
        stem = Path("images", split, "day 1" if i % 3 else "", f"my photo {i:02}")
        photo, label = scene(rng, SIZES[i % len(SIZES)], pairs[i % len(pairs)])
        file = root / f"{stem}{['.jpg', '.JPEG', '.png', '.jfif'][i % 4]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo.save(file, format="PNG" if file.suffix == ".png" else "JPEG")
        target = root / "labels" / stem.relative_to("images").with_name(f"{stem.name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label).save(target)
    (root / "classes.txt").write_text(classes)
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two taxonomies: one with splits, one without whose id 1 is void."""
    root = tmp_path_factory.mktemp("own data")
    street = root / "my streets"
    for split, count in (("train", 10), ("val", 3)):
        write_set(street, "road\ncar\nsky\n", [[0, 1], [1, 2], [0, 255]], split, count)
    food = write_set(root / "food, 2024", "plate\nvoid\npasta dish\n", [[0, 2], [2, 1]])
    return {"street": street, "food": food}


def words(sets: dict[str, Path], *names: str) -> list[str]:
    return ["--datasets", *(f"{name}={sets[name]}" for name in names or sets)]


@pytest.fixture(scope="module")
def pretrained(sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "my run"
    assert main([*SMALL, *words(sets), "--output-dir", str(out), "--init", "none"]) == 0
    return out


# Sets --------------------------------------------------------------------------------------------------------------


def test_words_of_datasets() -> None:
    assert split_words(["voc,ade", "a=/x/b, c=d", "coco"]) == (["voc", "ade", "a", "coco"], {"a": "/x/b, c=d"})
    args = get_parser().parse_args(["--datasets", "voc", "mine=x y", "--own_data", "mine=z", "other=w"])
    assert (args.datasets, args.data) == ("voc,mine", ["mine=z", "other=w"])
    assert (get_parser().parse_args(["--datasets", "voc,ccp"]).datasets, args.defaults["datasets"]) == (
        "voc,ccp",
        "voc,ade",
    )
    for word, message in (
        ("voc=/x", "known set"),
        ("=/x", "NAME=FOLDER"),
        ("a b=/x", "NAME=FOLDER"),
        ("a=", "no folder"),
    ):
        with pytest.raises(UserError, match=message):
            split_words([word])
    with pytest.raises(UserError, match="give NAME=FOLDER"):
        get_parser().parse_args(["--own_data", "mine"])


def test_a_set_with_splits_and_one_without(sets: dict[str, Path]) -> None:
    train, val = (open_own("street", sets["street"], split) for split in ("pretrain", "val"))
    assert (len(train), len(val), train.classes) == (10, 3, ("road", "car", "sky"))
    assert {photo.suffix for photo, _ in train.pairs} == {".jpg", ".JPEG", ".png", ".jfif"} and not train.notes
    rest, held = (open_own("food", sets["food"], split) for split in ("train", "val"))
    assert (len(rest), len(held), rest.raw_ids) == (11, 1, [0, 2]) and "a tenth held out (1 photos)" in rest.notes[0]
    assert not set(rest.pairs) & set(held.pairs) and rest.classes == ("plate", "pasta dish")
    for i in range(len(rest)):
        photo, label = rest.load(i)
        with Image.open(rest.pairs[i][1]) as stored:
            raw = np.asarray(stored)
        np.testing.assert_array_equal(label, np.array([0, 255, 1])[raw])  # 1 is void
        assert photo.size == label.shape[::-1]
    union = UnionDataset([train, rest], TwoViews("moco", 16))
    assert union.num_classes == 5 and "food: 11 images, 2 classes, union ids 3..4; a tenth held out" in union.describe()


def test_maps_are_read_from_the_first_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are more than can be read, some in between; classes of the others are then not missed for sure."""
    found = open_own("x", write_set(tmp_path, "a\nb\n", [[0, 1]], count=7))
    read: list[int] = []
    label = SegSet.label

    def told(self: SegSet, i: int) -> np.ndarray:
        read.append(i)
        return label(self, i)

    monkeypatch.setattr(SegSet, "label", told)
    assert len(found) == 6  # a tenth is held out
    for most, expected in ((3, {0, 2, 5}), (2000, set(range(6)))):
        read.clear()
        monkeypatch.setattr("mdp.own.CHECKED", most)
        assert check_maps(found) == [] and set(read) == expected


def test_palettes_count_by_index(tmp_path: Path) -> None:
    """Also colours of VOC's at other places; but not one index for two colours."""
    root = write_set(tmp_path, "a\nb\n", [[0, 1]], count=4)
    before = [open_own("x", root).label(i) for i in range(3)]
    files = sorted((root / "labels").rglob("*.png"))

    def paint(file: Path, palette: list[int]) -> None:
        with Image.open(file) as image:
            ids = Image.fromarray(np.asarray(image))
        ids.putpalette(palette)
        ids.save(file)

    for file in files:
        paint(file, voc_palette()[3:6] + voc_palette()[:3])
    for i, label in enumerate(before):
        np.testing.assert_array_equal(open_own("x", root).label(i), label)
    paint(open_own("x", root).pairs[0][1], voc_palette()[:6])
    with pytest.raises(UserError, match="its palette has other colours than"):
        open_own("x", root)
    for file in files:
        grey_png(file, np.asarray(Image.open(file)), 2)
    for i, label in enumerate(before):
        np.testing.assert_array_equal(open_own("x", root).label(i), label)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nowhere", r"nowhere: no such folder"),
        ("classes.txt", r"classes.txt: no such file; expected one class a line, ids from 0"),
        ("labels", r"labels does not exist; .* must hold images/, labels/"),
        ("twice", r"classes.txt: 'a' stands there twice"),
        ("empty line", r"classes.txt: line 2 is empty"),
        ("too many", r"classes.txt: 300 classes in 300 lines; 1 to 254 are possible"),
        ("no map", r"image .*my photo 05.JPEG has no label; expected .*my photo 05.png"),
        ("no photo", r"label .*extra.png has no image beside it"),
        ("beyond", r"my photo 05.png: label id 7 out of range, x defines 2 classes; add the names to .*classes.txt"),
        ("size", r"my photo 05.png: label is 9x9, but its image .* is 40x64"),
        ("rgb", r"my photo 05.png: PNG mode 'RGB', but x maps hold grey ids or a palette"),
        ("jpeg map", r"my photo 05.jpg is no label map: JPEG changes the numbers"),
        ("broken photo", r"my photo 05.JPEG: not a readable image"),
        ("loose", r"my photo 00.jpg lies beside .*train; move it into one of train"),
        ("val only", r"images/train does not exist, only val; add it"),
        ("link", r"day 1: a link that leads nowhere|nowhere to be: a link that leads nowhere"),
    ],
)
def test_faults_are_one_line_before_anything_is_computed(fault: str, message: str, tmp_path: Path) -> None:
    """In the 6th of 12 pairs: all are read before the run, not the first few."""
    root = write_set(tmp_path / "set", "a\nb\n", [[0, 1]])
    photo, label = root / "images/day 1/my photo 05.JPEG", root / "labels/day 1/my photo 05.png"
    match fault:
        case "classes.txt":
            (root / fault).unlink()
        case "labels":
            shutil.rmtree(root / fault)
        case "twice":
            (root / "classes.txt").write_text("a\nb\na\n")
        case "empty line":
            (root / "classes.txt").write_text("a\n\nb\n")
        case "too many":
            (root / "classes.txt").write_text("".join(f"{i}\n" for i in range(300)))
        case "no map":
            label.unlink()
        case "no photo":
            shutil.copy(label, label.with_name("extra.png"))
        case "beyond":
            Image.fromarray(np.full((64, 40), 7, np.uint8)).save(label)
        case "size":
            Image.new("L", (9, 9)).save(label)
        case "rgb":
            Image.new("RGB", (40, 64)).save(label)
        case "jpeg map":
            label.rename(label.with_suffix(".jpg"))
        case "broken photo":
            photo.write_bytes(b"no photo")
        case "loose":
            (root / "images/train").mkdir()
        case "val only":
            (root / "images/val").mkdir()
        case "link":
            (root / "images/nowhere to be").symlink_to(tmp_path / "gone")
    folder = tmp_path / "nowhere" if fault == "nowhere" else root
    with pytest.raises(UserError, match=message) as error:
        main([*SMALL, "--datasets", f"x={folder}", "--output-dir", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_is_odd_but_no_fault_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class that nobody drew, photos of other formats, a bank larger than the data, embeddings that are one point."""
    root = write_set(tmp_path / "set", "a\nb\nkite\n", [[0, 1]])
    for name in ("a.heic", "b.HEIC"):
        (root / "images" / name).write_bytes(b"\0")
    flags = [*SMALL, "--datasets", f"x={root}", "--epochs", "1", "--output-dir"]
    assert main([*flags, str(tmp_path / "run"), "--bank-size", "40", "--lr", "1e-9", "--wd", "0"]) == 0
    said = capsys.readouterr().out
    assert "no label map of train holds kite" in said and "not read: 2 .heic between the images" in said
    assert "CAUTION: more than the data's 11, so embeddings are several epochs old: --bank-size 8" in said
    assert "COLLAPSED" not in said
    with pytest.raises(
        UserError, match=r"--batch-size 64: the data has 11 images; take --batch-size 11 --bank-size 11"
    ):
        main([*flags, str(tmp_path / "other"), "--batch-size", "64", "--bank-size", "64"])
    with pytest.raises(UserError, match=r"--bank-size 9 does not divide .* take --bank-size 8 or --batch-size 3"):
        main([*flags, str(tmp_path / "other"), "--bank-size", "9"])


def test_a_collapsed_run_says_so(sets: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    forward = "mdp.models.Encoder.forward"
    monkeypatch.setattr(
        forward, lambda self, x: self.projector[2].bias[None, :, None, None].expand(len(x), -1, 4, 4) + 1
    )
    main([*SMALL, *words(sets, "street"), "--epochs", "1", "--mix", "none", "--output-dir", str(tmp_path)])
    assert "COLLAPSED: all pixels have one embedding (feat/std 0.000)" in capsys.readouterr().out


# Pretraining -------------------------------------------------------------------------------------------------------


def test_pretraining_mixes_own_sets_with_known_ones(sets: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    from tests.test_mdp_data import write_image, write_label

    for i in range(4):
        write_image(tmp_path / f"camvid11/images/train/{i}.jpg", (40, 30))
        write_label(tmp_path / f"camvid11/labels/train/{i}.png", np.full((30, 40), i % 2, np.uint8))
    flags = [*SMALL, "--datasets", "camvid", *words(sets)[1:], "--data-root", str(tmp_path)]
    assert main([*flags, "--output-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "camvid: 4 images" in said and "street: 10 images, 3 classes" in said and "food: 11 images" in said
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(key in rows[-1] for key in ("loss/p2c_street", "acc/pixel_proto_food"))
    assert rows[-1]["proto/valid"] == 7 and all(row["loss"] > 0 for row in rows[1:])  # 2 + 3 + 2 classes


def test_a_moved_set_resumes_and_another_does_not(sets: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    moved = {name: tmp_path / f"moved {name}" for name in sets}
    for name, folder in sets.items():
        shutil.copytree(folder, moved[name])
    out = tmp_path / "run"
    shutil.copytree(pretrained, out)
    saved = checkpoint.load(out / "checkpoint.pth")
    del saved["bank"]["sets"]  # as older runs wrote it
    checkpoint.save(out / "checkpoint.pth", saved)
    flags = [*SMALL, *words(moved), "--output-dir", str(out)]
    assert main(flags) == 0
    (moved["food"] / "classes.txt").write_text("plate\nvoid\npizza\n")
    with pytest.raises(UserError, match="saved on other data"):
        main(flags)


def test_init_from_a_run_its_file_and_a_backbone(
    sets: dict[str, Path], pretrained: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = checkpoint.load(pretrained / "checkpoint.pth")["state_dict"]
    flags = [*SMALL, *words(sets, "street"), "--epochs", "1", "--lr", "1e-12", "--wd", "0", "--output-dir"]

    def started(init: str) -> dict[str, torch.Tensor]:
        assert main([*flags, str(tmp_path / re.sub(r"\W", "", init)[-40:]), "--init", init]) == 0
        return checkpoint.load(tmp_path / re.sub(r"\W", "", init)[-40:] / "checkpoint.pth")["state_dict"]

    def same(state: dict[str, torch.Tensor], part: str) -> bool:
        keys = [key for key in state if key.startswith(f"encoder_q.{part}") and key.endswith("weight")]
        return all(torch.allclose(state[key], trained[key], atol=1e-6) for key in keys) and bool(keys)

    new = started("none")
    assert not same(new, "backbone")
    of_run = started(str(pretrained))
    assert same(of_run, "backbone") and same(of_run, "decode_head") and same(of_run, "projector")
    assert f"{pretrained}: loaded" in capsys.readouterr().out
    backbone = {k.removeprefix("encoder_q.backbone."): v for k, v in trained.items() if "encoder_q.backbone" in k}
    checkpoint.save(tmp_path / "plain.pth", {**backbone, "fc.weight": torch.zeros(1)})
    of_file = started(str(tmp_path / "plain.pth"))
    assert same(of_file, "backbone") and not same(of_file, "decode_head")

    class Published:
        def state_dict(self) -> dict[str, torch.Tensor]:
            return backbone

    monkeypatch.setattr("timm.create_model", lambda name, **more: Published())
    assert same(started("timm:resnet18"), "backbone")
    with pytest.raises(UserError, match=r"--init .*my run: the weights do not fit Encoder: .*--arch and its like"):
        main([*flags, str(tmp_path / "wide"), "--init", str(pretrained), "--base-channels", "16"])
    with pytest.raises(UserError, match="to train longer, start a new run from its weights: --init '.*my run/check"):
        main([*SMALL, *words(sets), "--output-dir", str(pretrained), "--epochs", "3"])


# Hints, evaluation, predictions --------------------------------------------------------------------------------------


def test_hints_name_this_run_and_run(sets: dict[str, Path], pretrained: Path, tmp_path: Path, capsys: Any) -> None:
    """The lines that pretraining prints are commands: two of them are carried out as they stand."""
    import shlex

    assert main([*SMALL, *words(sets), "--output-dir", str(pretrained)]) == 0  # complete: it prints them again
    lines = [line.split("next: ")[1] for line in capsys.readouterr().out.splitlines() if "next: " in line]
    commands = {words[2]: words[3:] for words in map(shlex.split, lines)}
    assert commands.keys() == {"mdp.finetune", "mdp.eval_seg", "mdp.predict", "mdp.lab.export_mmseg"}
    assert commands["mdp.finetune"] == [
        "--datasets",
        f"street={sets['street']}",
        "--checkpoint",
        f"{pretrained}/checkpoint.pth",
    ]
    assert eval_seg.main([*commands["mdp.eval_seg"], "--output-dir", str(tmp_path / "eval"), "--threads", "1"]) == 0
    results = json.loads((tmp_path / "eval/eval.json").read_text())["results"]
    assert set(results) == {"street val", "food val"} and set(results["food val"]["per_class"]) == {
        "plate",
        "pasta dish",
    }
    photo = next((sets["street"] / "images/val").rglob("*.jpg"))
    call = [str(photo) if word == "PHOTO_OR_FOLDER" else word for word in commands["mdp.predict"]]
    call[call.index("maps")] = str(tmp_path / "maps")
    assert predict.main([*call, "--threads", "1"]) == 0
    assert (tmp_path / "maps/food/labels" / f"{photo.stem}.png").is_file()


def test_a_run_from_the_config_of_another(sets: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    assert main(["--config", str(pretrained), "--output-dir", str(tmp_path), "--epochs", "1"]) == 0
    flags = json.loads((tmp_path / "config.json").read_text())["flags"]
    assert flags["datasets"] == "street,food" and flags["data"] == [f"{name}={path}" for name, path in sets.items()]


def test_the_card_names_the_checkpoint_of_its_run(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "SKIP_ENV": "1"}
    for words, file in ((["--output-dir", "/a b"], "/a\\ b"), (["small", "--log_dir=/c"], "/c")):
        command = ["bash", "mdp/run_pretrain.sh", *words]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        tier = "small" if "small" in words else "mini"
        assert said.endswith(f"bash mdp/run_finetune.sh {tier} --checkpoint {file}/checkpoint.pth\n")


def test_predictions_of_a_pretraining(sets: dict[str, Path], pretrained: Path, tmp_path: Path, capsys: Any) -> None:
    """Maps under the photos' names, at their size and upright, in the set's own numbers; equal to the evaluation's."""
    photos = tmp_path / "holiday photos"
    shutil.copytree(sets["street"] / "images/val", photos)
    first = next(photos.rglob("*.jpg"))
    shutil.copy(first, first.with_name("same.jpg"))
    Image.open(first).save(first.with_name("same.png"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(first) as image:
        stored = image.size
        image.save(first.with_name("turned.jpg"), exif=exif)
    (photos / "notes.heic").write_bytes(b"\0")
    out = tmp_path / "maps of it"
    call = [str(photos), "--pretrained", str(pretrained), "--out", str(out), "--threads", "1"]
    assert predict.main([*call, "--datasets", "food"]) == 0
    assert "not read: 1 .heic" in capsys.readouterr().out
    where = first.parent.relative_to(photos)
    maps = {path.relative_to(out / "labels"): Image.open(path) for path in (out / "labels").rglob("*.png")}
    assert {where / "same.jpg.png", where / "same.png.png", where / "turned.png"} < set(maps) and len(maps) == 6
    assert maps[where / "turned.png"].size == stored[::-1] and maps[where / f"{first.stem}.png"].size == stored
    for name, image in maps.items():
        assert image.mode == "P" and set(np.unique(np.asarray(image))) <= {0, 2}  # 1 is void
        assert Image.open(out / "overlays" / name.with_suffix(".jpg")).size == image.size
        assert image.getpalette()[6:9] == voc_palette()[6:9]
    rows = list(csv.DictReader((out / "shares.csv").open()))
    assert len(rows) == 6 and set(rows[0]) == {"file", "plate", "pasta dish"}
    for row in rows:
        assert float(row["plate"]) + float(row["pasta dish"]) == pytest.approx(1, abs=2e-4)

    # The evaluation's way to the same map: the network, the similarities, and F.interpolate.
    encoder, flags, proto, valid = eval_seg.load_encoder(pretrained / "checkpoint.pth", "k")
    photo = Image.open(first).convert("RGB")
    factor = flags["crop_size"] / min(photo.size)
    width, height = (int(side * factor + 0.5) for side in photo.size)
    small = photo.resize((width, height), Image.Resampling.BILINEAR)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (eval_seg.MEAN, eval_seg.STD))
    x = (torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        guess = eval_seg.nearest_prototype(encoder(x[None]), proto[3:], valid[3:], photo.size[::-1])[0]
    mine = np.asarray(maps[where / f"{first.stem}.png"])
    assert (np.array([0, 2])[guess.numpy()] == mine).mean() > 0.999

    assert predict.main(call) == 0  # in both taxonomies
    assert {path.name for path in out.iterdir()} == {"labels", "overlays", "shares.csv", "street", "food"}
    (tmp_path / "names.txt").write_text("Teller\nvoid\nNudeln\n")
    assert predict.main([*call, "--datasets", "food", "--classes", str(tmp_path / "names.txt")]) == 0
    assert (out / "shares.csv").read_text().startswith("file,Teller,Nudeln\n")
    file = out / "labels" / where / f"{first.stem}.png"
    np.testing.assert_array_equal(np.asarray(Image.open(file)), mine)


def test_class_by_class_gives_the_argmax() -> None:
    for size in ((37, 91), (5, 3), (64, 64), (200, 41)):
        scores = torch.randn(7, 9, 12)
        whole = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        assert torch.equal(predict.largest(scores, size).long(), whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/no.jpg", "--out", "{tmp}/o"], "no.jpg: no such photo or folder"),
        (["{tmp}/a.txt", "--out", "{tmp}/o"], "a.txt: no photo by its ending"),
        (["{tmp}", "--out", "{tmp}/o"], "o: lies in .* give another folder"),
        (["{tmp}/bad.jpg", "--out", "{tmp}/o"], "bad.jpg: not a readable image"),
        (["{tmp}/p/x.png", "{tmp}/q/x.png", "--out", "{tmp}/o"], "has the same name, and so its label map"),
        (["{tmp}/p", "--out", "{tmp}/o", "--datasets", "ade"], "--datasets ade: the run has street, food"),
        (["{tmp}/p", "--out", "{tmp}/o", "--classes", "{tmp}/a.txt"], "names of one set; choose it with --datasets"),
        (["{tmp}/p", "--out", "{tmp}/o", "--classes", "{tmp}/a.txt", "--datasets", "street"], "1 names, the run has 3"),
        (["{tmp}/p", "--out", "{tmp}/o", "--pretrained", "{tmp}/q"], "q: no run with a model.pth or checkpoint.pth"),
        (["{tmp}/p", "--out", "{tmp}/o", "--pretrained", "{tmp}/export.pth"], "an export has no classes, give the run"),
        (["{tmp}/p", "--out", "{tmp}/a.txt/o"], "a.txt.*: cannot be written"),
    ],
)
def test_bad_predictions_are_one_line(words: list[str], message: str, pretrained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "bad.jpg").write_bytes(b"none")
    checkpoint.save(tmp_path / "export.pth", {"backbone.conv1.weight": torch.zeros(1)})
    for folder in ("p", "q"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (20, 12)).save(tmp_path / folder / "x.png")
    if words[0] == "{tmp}":
        (tmp_path / "bad.jpg").unlink()
    call = ["--pretrained", str(pretrained), *(word.format(tmp=tmp_path) for word in words), "--threads", "1"]
    with pytest.raises(UserError, match=message) as error:
        predict.main(call)
    assert "\n" not in str(error.value)


def test_old_checkpoints_and_control_arms(sets: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    """Older runs knew known sets only, whose classes have names; a control's classes are those of its classifier."""
    saved = checkpoint.load(pretrained / "checkpoint.pth")
    del saved["bank"]["sets"]
    saved["bank"]["proto"], saved["bank"]["proto_valid"] = torch.randn(19, 16), torch.ones(19, dtype=torch.bool)
    del saved["args"]["data"]
    saved["args"]["datasets"] = "cityscapes"
    checkpoint.save(tmp_path / "old.pth", saved)
    photo = str(next((sets["food"] / "images").rglob("*.png")))
    call = [photo, "--threads", "1", "--out", str(tmp_path / "maps"), "--pretrained"]
    assert predict.main([*call, str(tmp_path / "old.pth")]) == 0
    assert (tmp_path / "maps/shares.csv").read_text().startswith("file,road,sidewalk,")
    arm = ["--objective", "multihead-ce", "--mix", "none", "--csc", "none", "--epochs", "1"]
    assert main([*SMALL, *words(sets), *arm, "--output-dir", str(tmp_path / "ce")]) == 0
    assert predict.main([*call, str(tmp_path / "ce")]) == 0
    assert (tmp_path / "maps/street/shares.csv").read_text().startswith("file,road,car,sky\n")


# Fine-tuning and its evaluation, through mmsegmentation ------------------------------------------------------------


def test_finetune_evaluate_predict(sets: dict[str, Path], pretrained: Path, tmp_path: Path, capsys: Any) -> None:
    """An own set through mmsegmentation, on its own splits; the predicted maps are mmsegmentation's."""
    out = tmp_path / "tuned run"
    sizes = "--short-side 40 --crop-size 32 --batch-size 4 --iters 20 --lr 0.05 --workers 0 --threads 1".split()
    flags = [*sizes, "--checkpoint", str(pretrained / "checkpoint.pth"), "--output-dir", str(out)]
    assert finetune.main([*words(sets, "street"), *flags]) == 0
    said = capsys.readouterr().out
    assert "10 train / 3 val images" in said and f"mdp.predict PHOTO_OR_FOLDER --pretrained '{out}'" in said
    result = json.loads((out / "result.json").read_text())
    assert set(result["final"]["per_class"]) == {"road", "car", "sky"}
    where = ["--output-dir", str(tmp_path / "eval"), "--workers", "0", "--threads", "1"]
    assert eval_seg.main(["--run", str(out), *where]) == 0
    again = json.loads((tmp_path / "eval/eval.json").read_text())["results"]["street val"]
    assert again == {k: v for k, v in result["final"].items() if k != "iter"}

    moved = tmp_path / "street elsewhere"
    shutil.copytree(sets["street"], moved)
    assert (
        finetune.main(["--datasets", f"street={moved}", *flags]) == 0 and "complete already" in capsys.readouterr().out
    )
    assert eval_seg.main(["--run", str(out), *where, "--datasets", f"moved={moved}"]) == 0
    assert json.loads((tmp_path / "eval/eval.json").read_text())["results"]["moved val"] == again
    with pytest.raises(UserError, match="has 3 classes, food has 2; give its own set"):
        eval_seg.main(["--run", str(out), *where, *words(sets, "food")])

    photos = sets["street"] / "images/val"
    maps = tmp_path / "maps"
    call = [str(photos), "--out", str(maps), "--threads", "1", "--pretrained"]
    assert predict.main([*call, str(out)]) == 0
    found = open_own("street", sets["street"], "val")
    matrix = torch.zeros(3, 3, dtype=torch.int64)
    for i, (photo, _) in enumerate(found.pairs):
        ids = np.asarray(Image.open((maps / "labels" / photo.relative_to(photos)).with_suffix(".png")))
        matrix += eval_seg.confusion(torch.tensor(ids), torch.tensor(found.label(i)), 3)
    scores = eval_seg.scores(matrix, found.classes)
    assert scores["mIoU"] == pytest.approx(result["final"]["mIoU"], abs=0.05)
    first = sorted((maps / "labels").rglob("*.png"))[0].read_bytes()

    # A run of before: no names, no size. They come from its config; where that is gone, numbers and --short-side.
    saved = checkpoint.load(out / "model.pth")
    assert saved.pop("sets")[0]["classes"] == ["road", "car", "sky"] and saved.pop("scale") == [4096, 40]
    checkpoint.save(tmp_path / "old.pth", saved)
    assert predict.main([*call, str(tmp_path / "old.pth")]) == 0
    assert sorted((maps / "labels").rglob("*.png"))[0].read_bytes() == first
    saved["args"]["config"] = "/gone/mine.py"
    checkpoint.save(tmp_path / "old.pth", saved)
    with pytest.raises(UserError, match="--short-side: the config of this older run is gone"):
        predict.main([*call, str(tmp_path / "old.pth")])
    assert predict.main([*call, str(tmp_path / "old.pth"), "--short-side", "40"]) == 0
    assert (maps / "shares.csv").read_text().startswith("file,0,1,2\n")
    named = [*call, str(tmp_path / "old.pth"), "--short-side", "40", "--classes", str(sets["street"] / "classes.txt")]
    assert predict.main(named) == 0 and (maps / "shares.csv").read_text().startswith("file,road,car,sky\n")


def test_finetune_wants_a_config_or_one_own_set(sets: dict[str, Path], tmp_path: Path) -> None:
    for words_, message in (
        ([], "give --config, or an own set as --datasets NAME=FOLDER"),
        (["--config", "own"], "give the data as --datasets NAME=FOLDER"),
        (["--datasets", "camvid"], "one own set, NAME=FOLDER; known sets have a --config each"),
        (words(sets), "one own set"),
    ):
        with pytest.raises(UserError, match=message):
            finetune.main([*words_, "--output-dir", str(tmp_path / "out")])
    lone = write_set(tmp_path / "lone", "a\nb\n", [[0, 1]], "train", 4)
    with pytest.raises(UserError, match=r"images/val does not exist, only train"):
        finetune.main(["--datasets", f"lone={lone}", "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_dilations_as_pretraining_takes_them() -> None:
    parser = finetune.get_parser()
    for words in (["1,3,6"], ["1", "3", "6"]):
        assert finetune.int_list(parser.parse_args(["--dilations", *words]).dilations) == [1, 3, 6]
    with pytest.raises(UserError, match="--dilations x: must be a whole number"):
        parser.parse_args(["--dilations", "1,x"])
