"""The data of mra: the generated set, few labels, long tails, readers of public layouts, masks, few-shot splits."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mra import data, main_fixmatch, main_supervised, transforms
from mra.lab import textures
from shared_utils import UserError, strong
from shared_utils.data import sample_rng


def image(path: Path, value: int = 100, size: tuple[int, int] = (20, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def parse(*words: str):
    return main_supervised.get_parser().parse_args(["--input_size", "16", *words])


def test_textures_tell_the_class_in_training_alone() -> None:
    shares = {}
    for split, count in textures.COUNTS.items():
        own = []
        for index in range(0, 8 * count, 5):
            picture, mask, family = textures.draw(split, index)
            own.append(family == textures.FAMILIES[index // count])
            assert picture.shape == (48, 48, 3) and set(np.unique(mask)) == {0, 255} and 0.01 < mask.mean() / 255 < 0.36
        shares[split] = sum(own) / len(own)
    assert 0.74 < shares["train"] < 0.86 and 0.7 < shares["test_a"] < 0.9 and shares["test_b"] < 0.22
    again = textures.draw("train", 7)
    assert all(np.array_equal(a, b) for a, b in zip(again[:2], textures.draw("train", 7)[:2]))
    assert not np.array_equal(again[0], textures.draw("test_a", 7)[0])


def test_the_object_is_where_the_mask_says() -> None:
    """One colour inside, up to noise and edges; so it is not outside."""
    for shape in range(8):
        picture, mask, _ = textures.draw("train", shape * 500 + 3)
        inside = mask > 0
        core = inside & np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1)
        assert picture[core].std(0).max() < 8


def test_the_set_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textures, "COUNTS", {"train": 2, "test_a": 1, "test_b": 1})
    root = textures.ensure(tmp_path / "set")
    assert len(list((root / "train").rglob("*.png"))) == 16 == len(list((root / "masks/train").rglob("*.png")))
    monkeypatch.setattr(textures, "write", lambda _: pytest.fail("written again"))
    assert textures.ensure(root) == root
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="is not a generated set"):
        textures.ensure(tmp_path / "other")
    images = data.image_folder(root / "test_b")
    masks = data.foreground(images, 48)
    assert masks is not None and masks.shape == (8, 48, 48) and masks.any((1, 2)).all()


def test_few_labels_and_long_tails() -> None:
    labels = torch.arange(3).repeat_interleave(100)
    few = data.few_labels(labels, ["a", "b", "c"], 5, 0)
    assert torch.bincount(labels[few]).tolist() == [5, 5, 5] and few == sorted(few)
    assert few == data.few_labels(labels, ["a", "b", "c"], 5, 0) != data.few_labels(labels, ["a", "b", "c"], 5, 1)
    tail = data.long_tail(labels, 3, 100, 0)
    assert torch.bincount(labels[tail]).tolist() == [100, 10, 1]
    with pytest.raises(UserError, match="class a has 100 images"):
        data.few_labels(labels, ["a"], 101, 0)


def test_cub_and_its_boxes(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    names = ["001.A/x.jpg", "001.A/y.jpg", "002.B/z.jpg"]
    for name in names:
        image(root / "images" / name, size=(16, 16))
    (root / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    (root / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n")
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n")
    (root / "classes.txt").write_text("1 001.A\n2 002.B\n")
    (root / "bounding_boxes.txt").write_text("1 0.0 0.0 4.0 8.0\n2 4.0 2.0 3.0 5.0\n3 0.0 0.0 1.0 1.0\n")
    train, tests = data.open_sets(parse("--dataset", "cub", "--data_path", str(tmp_path)))
    assert train.labels.tolist() == [0, 1] and [p.name for p in tests["test"].paths()] == ["y.jpg"]
    masks = data.foreground(tests["test"], 16)
    assert masks is not None and masks.sum() == 15 and masks[0, 2:7, 4:7].all()
    (root / "classes.txt").write_text("2 002.B\n1 001.A\n")  # the numbers say which is which
    train, _ = data.open_sets(parse("--dataset", "cub", "--data_path", str(tmp_path)))
    assert train.classes == ["001.A", "002.B"] and train.labels.tolist() == [0, 1]
    whole = {file: (root / f"{file}.txt").read_text() for file in ("images", "image_class_labels", "classes")}
    for file, text, message in (
        (
            "images",
            "".join(whole["images"].splitlines(True)[:2]),
            "and image_class_labels.txt do not both name image 3",
        ),
        ("images", whole["images"] + "3 002.B/z.jpg\n", "images.txt: '3 002.B/z.jpg' is there twice"),
        ("image_class_labels", "1 1\n2 1\n3 2\n3 1\n", "image_class_labels.txt: number 3 is there twice"),
        ("images", f"1 {names[0]}\n2 {names[0]}\n3 {names[2]}\n", "its lists name x.jpg twice"),
        ("classes", "1 001.A\n3 002.B\n", "classes.txt: does not number its classes from 1 to 2"),
    ):
        (root / f"{file}.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            data.open_sets(parse("--dataset", "cub", "--data_path", str(tmp_path)))
        (root / f"{file}.txt").write_text(whole[file])


def test_aircraft_and_cars(tmp_path: Path) -> None:
    from scipy.io import savemat

    root = tmp_path / "fgvc-aircraft-2013b/data"
    for key in ("1", "2"):
        image(root / "images" / f"{key}.jpg")
    (root / "variants.txt").write_text("707-320\nA 300 B4\n")
    (root / "images_variant_trainval.txt").write_text("1 A 300 B4\n")
    (root / "images_variant_test.txt").write_text("2 707-320\n")
    train, tests = data.open_sets(parse("--dataset", "aircraft", "--data_path", str(tmp_path)))
    assert train.label(0) == 1 and tests["test"].label(0) == 0
    (root / "variants.txt").write_text("707-320\nA 300 B4\n707-320\n")
    with pytest.raises(UserError, match="variants.txt: '707-320' is there twice; restore"):
        data.open_sets(parse("--dataset", "aircraft", "--data_path", str(tmp_path)))
    cars = tmp_path / "stanford_cars"
    for folder, annos in (("cars_train", "cars_train_annos"), ("cars_test", "cars_test_annos_withlabels")):
        kind = np.dtype([("fname", object), ("class", object)])
        rows = np.array([("1.jpg", 2), ("2.jpg", 1)], dtype=kind)
        for name in ("1.jpg", "2.jpg"):
            image(cars / folder / name)
        (cars / "devkit").mkdir(exist_ok=True)
        savemat(cars / "devkit" / f"{annos}.mat", {"annotations": rows})
    savemat(cars / "devkit/cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})
    train, tests = data.open_sets(parse("--dataset", "cars", "--data_path", str(tmp_path)))
    assert train.classes == ["Audi", "BMW"] and train.labels.tolist() == [1, 0] and len(tests["test"]) == 2


def test_lists_of_a_long_tail(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg"):
        image(tmp_path / name)
    (tmp_path / "train.txt").write_text("train/a/1.jpg 0\ntrain/b/2.jpg 1\n")
    (tmp_path / "val.txt").write_text("val/a/3.jpg 0\n")
    lists = ["--train_list", str(tmp_path / "train.txt"), "--val_list", str(tmp_path / "val.txt")]
    train, tests = data.open_sets(parse("--data_path", str(tmp_path), *lists))
    assert train.labels.tolist() == [0, 1] and tests["val"].classes == train.classes == ["0", "1"]


def test_damaged_lists_are_one_line(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    image(root / "images/001.A/x.jpg")
    image(root / "images/001.A/y.jpg")
    (root / "images.txt").write_text("1 001.A/x.jpg\n2 001.A/y.jpg\n")
    (root / "classes.txt").write_text("1 001.A\n")
    for labels, splits, message in (
        ("1 1\n", "1 1\n2 0\n", "images.txt and image_class_labels.txt do not both name image 2"),
        ("1 1\n2 1\n", "1 1\n2 2\n", "CUB_200_2011: its lists of images and labels are damaged"),
        ("1 1\n2 x\n", "1 1\n2 0\n", "damaged or not as published .ValueError"),
        ("1 1\n2 7\n", "1 1\n2 0\n", "y.jpg has label 7 of 1 classes"),
        ("1 1\n2 1\n", "1 1\n2 1\n", "name no test image"),
    ):
        (root / "image_class_labels.txt").write_text(labels)
        (root / "train_test_split.txt").write_text(splits)
        with pytest.raises(UserError, match=message) as error:
            data.open_sets(parse("--dataset", "cub", "--data_path", str(tmp_path)))
        assert "\n" not in str(error.value)
    (tmp_path / "l.txt").write_text("CUB_200_2011/images/001.A/x.jpg\n")
    lists = ["--train_list", str(tmp_path / "l.txt"), "--val_list", str(tmp_path / "l.txt")]
    with pytest.raises(UserError, match="l.txt: no labels; expected"):
        data.open_sets(parse("--data_path", str(tmp_path), *lists))


def test_other_classes_in_a_test_are_refused(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "val/a/1.png"):
        image(tmp_path / name)
    with pytest.raises(UserError, match=r"val: its classes are not those of .*train \(first: b\)"):
        data.open_sets(parse("--data_path", str(tmp_path)))


def test_few_shot_splits(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        (tmp_path / f"{split}.csv").write_text(f"filename,label\n{name}2.jpg,{name}\n{name}1.jpg,{name}\n")
        for i in (1, 2):
            image(tmp_path / "images" / f"{name}{i}.jpg")
    splits = data.read_fewshot(tmp_path)
    assert [p.name for p in splits["test"].paths()] == ["c1.jpg", "c2.jpg"] and splits["val"].classes == ["b"]
    (tmp_path / "test.csv").write_bytes(b"filename,label\r\nc2.jpg,c \r\n c1.jpg,c\r\n")
    again = data.read_fewshot(tmp_path)["test"]
    assert again.paths() == splits["test"].paths() and again.classes == ["c"]
    (tmp_path / "test.csv").write_text("filename,label\nc1.jpg,c\nc1.jpg,d\n")
    with pytest.raises(UserError, match="test.csv: c1.jpg is listed in test.csv already; restore the lists"):
        data.read_fewshot(tmp_path)
    (tmp_path / "test.csv").write_text("filename,label\nc1.jpg,c\na1.jpg,d\n")
    with pytest.raises(UserError, match="test.csv: a1.jpg is listed in train.csv already; restore the lists"):
        data.read_fewshot(tmp_path)
    (tmp_path / "test.csv").write_text("filename,label\nc1.jpg,c\nc2.jpg,cXc1.jpg,c\n")  # a line's end is lost
    with pytest.raises(UserError, match="test.csv: expected the columns filename,label"):
        data.read_fewshot(tmp_path)
    (tmp_path / "test.csv").write_text("filename,label\nc1.jpg,a\n")
    with pytest.raises(UserError, match="class a is in train and in test"):
        data.read_fewshot(tmp_path)
    for text, message in (
        ("name,class\nd1.jpg,d\n", "expected the columns filename,label"),
        ("filename,label\n", "no"),
    ):
        (tmp_path / "test.csv").write_text(text)
        with pytest.raises(UserError, match=rf"test.csv: .*{message}"):
            data.read_fewshot(tmp_path)
    (tmp_path / "test.csv").write_text("filename,label\nd1.jpg,d\n")
    with pytest.raises(UserError, match=r"d1.jpg: no such file"):
        data.read_fewshot(tmp_path)


def test_unlabelled_images_are_training_images(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "val/a/1.png"):
        image(tmp_path / name)
    found = data.open_unlabelled(parse("--data_path", str(tmp_path)))
    assert len(found) == 2 and found.labels.tolist() == [-1, -1] and all("train" in str(p) for p in found.paths())
    (tmp_path / "train").rename(tmp_path / "training")  # no list and no folder names the training images
    for tests in ("", "training"):
        with pytest.raises(UserError, match=f"{tests or 'val'}/ is here and no train/, so test images would be"):
            data.open_unlabelled(parse("--data_path", str(tmp_path), "--tests", tests))
    assert len(data.open_unlabelled(parse("--data_path", str(tmp_path / "training")))) == 2


# --- the strong branch and the colours of CutMix's recipe -------------------------------------------------------------


def board(side: int = 16) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(20, 200, (side, side, 3)).astype(np.uint8))


def test_fixmatch_s_randaugment_draws_levels_and_applies_half(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[tuple[str, int]] = []

    def spy(name: str) -> Callable[[Image.Image, int], Image.Image]:
        def noted(picture: Image.Image, level: int) -> Image.Image:
            applied.append((name, level))
            return picture

        return noted

    for name in transforms.FIXMATCH_OPS:
        monkeypatch.setitem(transforms.FIXMATCH_OPS, name, spy(name))
    augment, picture, count, per_image = transforms.FixMatchAugment(), board(), 6000, []
    with sample_rng(0):
        for _ in range(count):
            before = len(applied)
            augment(picture)
            per_image.append(len(applied) - before)
    share = np.bincount(per_image, minlength=3) / count  # two operations, each with probability 0.5
    assert np.abs(share - [0.25, 0.5, 0.25]).max() < 0.02
    names = np.array([sum(name == n for n, _ in applied) for name in transforms.FIXMATCH_OPS]) / len(applied)
    assert len(names) == 14 and np.abs(names - 1 / 14).max() < 0.015
    levels = np.bincount([v for _, v in applied], minlength=11) / len(applied)
    assert levels[0] == levels[10] == 0 and np.abs(levels[1:10] - 1 / 9).max() < 0.02


def test_images_that_stay_as_they_are() -> None:
    """(0.5 + 0.5 / 14)^2 = 28.7 % at least; with torchvision's RandAugment (1 / 14)^2."""
    picture = board()

    def unchanged(policy: str) -> float:
        made = transforms.POLICIES[policy]
        assert made is not None
        augment = made()
        with sample_rng(1):
            return float(
                np.mean([np.array_equal(np.asarray(augment(picture)), np.asarray(picture)) for _ in range(800)])
            )

    assert 0.24 < unchanged("fixmatch") < 0.34 and unchanged("randaugment") < 0.02


def test_fixmatch_s_operations_by_hand() -> None:
    picture = board(20)
    x = np.asarray(picture).astype(int)

    def made(name: str, level: int) -> np.ndarray:
        with sample_rng(0):
            return np.asarray(transforms.FIXMATCH_OPS[name](picture, level)).astype(int)

    for level in (1, 5, 9):
        factor = 0.05 + 0.9 * level / 10
        assert np.abs(made("brightness", level) - np.floor(x * factor)).max() <= 1
        bits = 4 + int(4 * level / 10)
        assert np.array_equal(made("posterize", level), x - x % 2 ** (8 - bits))
        threshold = 256 - int(256 * level / 10)
        assert np.array_equal(made("solarize", level), np.where(x < threshold, x, 255 - x))
        shift = int(0.3 * level / 10 * 20)
        for name, axis in (("translate_x", 1), ("translate_y", 0)):
            moved = made(name, level)
            kept = [np.roll(x, s, axis) for s in (shift, -shift)]
            inside = (slice(6, -6), slice(6, -6))
            assert any(np.array_equal(moved[inside], k[inside]) for k in kept)
            assert (moved == 0).all(2).sum() == shift * 20  # black comes in from outside
    assert np.array_equal(made("identity", 5), x)
    for name in ("shear_x", "shear_y", "rotate"):
        ways = set()
        for seed in range(8):
            with sample_rng(seed):
                ways.add(np.asarray(transforms.FIXMATCH_OPS[name](picture, 9)).tobytes())
        assert len(ways) == 2  # either way, by the same amount


def test_operations_on_batches_are_pil_s_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation, level and direction, on noise, on few colours, on one colour and on blocks; also oblong ones."""
    rng = np.random.default_rng(0)
    for height, width in ((32, 32), (21, 34)):
        blocks = np.kron(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)), np.ones((4, 4, 1)))
        noise, few = rng.integers(0, 256, (height, width, 3)), rng.integers(90, 140, (height, width, 3))
        pictures = np.stack([noise, few, np.full_like(few, 77), blocks[:height, :width]]).astype(np.uint8)
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
        for name, level, sign in itertools.product(strong.OPERATIONS, range(1, 10), (-1, 1)):
            monkeypatch.setattr(transforms, "_sign", lambda sign=sign: sign)
            wanted = [np.asarray(transforms.FIXMATCH_OPS[name](Image.fromarray(p), level)) for p in pictures]
            got = strong.OPERATIONS[name](x, torch.full((4,), level), torch.full((4,), sign))
            assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), np.stack(wanted)), (name, level, sign)
    assert strong.NAMES == tuple(transforms.FIXMATCH_OPS)


def test_strong_views_made_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn as image by image; each image has its own two operations in their order; two processes share the draws."""
    draws = strong.draw(20_000, torch.Generator().manual_seed(0))
    assert np.abs(torch.bincount(draws.operation.flatten()).numpy() / 40_000 - 1 / 14).max() < 0.005
    assert np.abs(torch.bincount(draws.level.flatten(), minlength=11)[1:10].numpy() / 40_000 - 1 / 9).max() < 0.008
    assert draws.level.min() == 1 and draws.level.max() == 9 and set(draws.sign.unique().tolist()) == {-1, 1}
    assert abs(float(draws.apply.float().mean()) - 0.5) < 0.01 and abs(float(draws.sign.float().mean())) < 0.02
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.integers(0, 256, (64, 3, 24, 24)).astype(np.uint8))
    draws, before = strong.Draws(*(part[:64] for part in draws)), x.clone()
    got = strong.augmented(x, draws)
    assert torch.equal(x, before)
    for i in range(64):
        picture = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        for turn in range(2):
            monkeypatch.setattr(transforms, "_sign", lambda i=i, turn=turn: int(draws.sign[i, turn]))
            if draws.apply[i, turn]:
                operation = transforms.FIXMATCH_OPS[strong.NAMES[int(draws.operation[i, turn])]]
                picture = operation(picture, int(draws.level[i, turn]))
        assert np.array_equal(got[i].permute(1, 2, 0).numpy(), np.asarray(picture)), i
    args = main_fixmatch.get_parser().parse_args([])

    def views(part: torch.Tensor, **place: int) -> torch.Tensor:
        run: Any = SimpleNamespace(args=args, step=3, **place)
        return main_fixmatch.strengthened(run, part)

    whole = views(x, rank=0, world=1)
    halves = [views(x[32 * rank : 32 * rank + 32], rank=rank, world=2) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), whole) and not torch.equal(whole, data_of(x))
    args.seed = 1
    assert not torch.equal(views(x, rank=0, world=1), whole)
    monkeypatch.setattr(main_fixmatch, "augmented", lambda x, _: x)
    assert torch.equal(views(x, rank=0, world=1), data_of(x))  # normalised as the loader does


def data_of(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([transforms.tensor()(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in x])


def test_jitter_and_lighting_by_loop() -> None:
    """As in CutMix's release: blends with black, the mean grey and the grey picture; noise along three colours."""
    x = torch.rand(3, 4, 5)
    with sample_rng(3):
        order = random.sample(("brightness", "contrast", "saturation"), 3)
        shares = [random.uniform(-0.4, 0.4) for _ in range(3)]
    expected = x.clone()
    for kind, share in zip(order, shares):
        grey = 0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]
        other = {"brightness": 0 * grey, "contrast": grey.mean() + 0 * grey, "saturation": grey}[kind]
        expected = torch.stack([(1 - share) * c + share * other for c in expected])
    with sample_rng(3):
        torch.testing.assert_close(transforms.Jitter(0.4)(x), expected)
    with sample_rng(4):
        factors = [float(transforms.Jitter(0.4)(torch.ones(3, 1, 1))[0]) for _ in range(500)]
    assert 0.6 <= min(factors) < 0.63 and 1.37 < max(factors) <= 1.4  # brighter than 1: not cut
    with sample_rng(5):
        alpha, light = 0.1 * torch.randn(3), transforms.Lighting
    shift = [sum(float(light.VECTORS[c, i] * light.VALUES[i] * alpha[i]) for i in range(3)) for c in range(3)]
    with sample_rng(5):
        out = transforms.Lighting(0.1)(x)
    torch.testing.assert_close(out, x + torch.tensor(shift).view(3, 1, 1))
