"""Which images are labelled, the two streams of sscl, and that the labels of unlabelled images stay hidden."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared_utils import UserError, augment, feed, strong
from shared_utils.data import EpochSampler, ImageList, Keyed, sample_rng
from sscl import data as sscl_data
from sscl import main
from sscl.data import (
    POOL,
    STRONG,
    FixMatchAugment,
    HiddenLabels,
    Labelled,
    LabelledStream,
    Mixed,
    Pairs,
    Unlabelled,
    augmentations,
    check_frozen,
    label_split,
    labelled_images,
    split_hash,
    training_images,
)
from sscl.prototypes import class_means, refresh
from tests.sscl_images import write_images


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


# --- label splits ----------------------------------------------------------------------------------------------------


def test_splits_are_those_of_the_tree() -> None:
    frozen = json.loads(sscl_data.SPLITS.read_text())
    assert set(frozen) == {"10x400", "10x800", "10x2000", "10x5000"}
    seen = set()
    for key, counts in frozen.items():
        labels = torch.arange(10).repeat_interleave(int(key.split("x")[1]))
        assert {"4", "25", "400"} <= set(counts) and all(len(splits) == 5 for splits in counts.values())
        for count, splits in counts.items():
            if key in ("10x400", "10x800"):  # the rest takes seconds, and is one function
                for split, value in splits.items():
                    assert split_hash(label_split(labels, int(count), int(split))) == value
        seen |= set(counts["4"].values())
    assert len(seen) == 20


def test_splits_are_balanced_nested_and_do_not_depend_on_the_order_of_classes() -> None:
    labels = torch.arange(3).repeat(20)  # classes alternate
    few, more = label_split(labels, 2, 1), label_split(labels, 7, 1)
    assert set(few) < set(more) and few != label_split(labels, 2, 2)
    assert Counter(labels[more].tolist()) == {0: 7, 1: 7, 2: 7} and more == sorted(more)
    sorted_labels = labels.sort(stable=True).values
    assert [i * 3 for i in range(20) if i in label_split(sorted_labels, 7, 1)] == [i for i in more if labels[i] == 0]
    with pytest.raises(UserError, match="--labels_per_class 21: class number 0 has 20 images"):
        label_split(labels, 21, 0)


def test_a_split_that_is_not_the_frozen_one_is_refused(tmp_path, monkeypatch) -> None:
    labels = torch.arange(3).repeat_interleave(20)
    chosen = label_split(labels, 2, 0)
    assert not check_frozen([20] * 3, 2, 0, chosen)
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"3x20": {"2": {"0": split_hash(chosen)}}}))
    monkeypatch.setattr(sscl_data, "SPLITS", file)
    assert check_frozen([20] * 3, 2, 0, chosen)
    with pytest.raises(UserError, match="split 0 of 2 labels a class has the hash"):
        check_frozen([20] * 3, 2, 0, chosen[1:] + [59])


@pytest.mark.parametrize(
    "form", ["{name}", "{name} ", "{name}\r", "{folder}/{name}", "{folder}/{name} {label}", "\ufeff{name}\n"]
)
def test_forms_of_a_list_of_labelled_images(form, root, tmp_path) -> None:
    """SimCLR's names, paths, paths with labels; blanks and line ends of other systems; the order is of no account."""
    places = [40, 3, 20, 3]  # one is named twice
    named = [(f"{i // 16 * 18 + i % 16:02d}.png", f"class{i // 16}", i // 16) for i in places]
    lines = [form.format(name=name, folder=folder, label=label) for name, folder, label in named]
    mark = "\ufeff" if "\ufeff" in form else ""
    (tmp_path / "list.txt").write_text(mark + "\n".join(lines).replace("\ufeff", "") + "\n\n")
    args = main.get_parser().parse_args(["--data", str(root), "--split_file", str(tmp_path / "list.txt")])
    assert labelled_images(args, training_images(root)) == [3, 20, 40]
    assert args.split_sha256 == split_hash([3, 20, 40])


def test_lists_of_labelled_images_that_are_refused(root, tmp_path) -> None:
    """A class without any, an image that is not there or beyond --per_class, and no list at all: never all images."""
    file = tmp_path / "list.txt"
    argv = ["--data", str(root), "--split_file", str(file)]

    def refused(*lines: str, count: int = 0) -> str:
        file.write_text("\n".join(lines))
        with pytest.raises(UserError) as raised:
            labelled_images(main.get_parser().parse_args(argv), training_images(root, count))
        return str(raised.value)

    assert "class class2 has no labelled image" in refused("00.png", "18.png")
    assert "line 2" in refused("00.png", "nowhere.png") and str(file) in refused("nowhere.png")
    assert "line 3" in refused("00.png", "18.png", "39.png", count=2)
    file.unlink()
    with pytest.raises(UserError, match="no such list file"):
        labelled_images(main.get_parser().parse_args(argv), training_images(root))


def test_imbalanced_images(root) -> None:
    images = training_images(root, 8, imbalance=4)
    assert Counter(images.labels.tolist()) == {0: 8, 1: 4, 2: 2}
    assert len(training_images(root, 8)) == 24
    with pytest.raises(UserError, match="nowhere/train: no such folder"):
        training_images(root / "nowhere")


# --- views -----------------------------------------------------------------------------------------------------------


def test_unlabelled_images_raise_when_asked_for_labels(root) -> None:
    images = training_images(root, cache=True)
    hidden = Unlabelled(images, augmentations(16, "shift", "moco"), ("weak", "strong"))
    with pytest.raises(HiddenLabels):
        print(hidden.targets)
    with pytest.raises(HiddenLabels):
        print(hidden.labels)
    assert set(hidden.images.labels.tolist()) == {-1}
    item = hidden[5]
    assert set(item) == {"weak", "strong", "index"} and item["index"] == 5


def test_views(root) -> None:
    images = training_images(root)
    recipes = augmentations(16, "shift", "moco")
    every = Keyed(Unlabelled(images, recipes, ("weak", "strong", "key")), 0)
    one, again, later = every[(0, 3)], every[(0, 3)], every[(1, 3)]
    assert all(one[name].shape == (3, 16, 16) for name in ("weak", "strong", "key"))
    assert all(torch.equal(one[name], again[name]) for name in one if name != "index")
    assert not torch.equal(one["strong"], one["key"]) and not torch.equal(one["strong"], later["strong"])
    shared = Keyed(Unlabelled(images, recipes, ("weak", "strong", "key"), "weak"), 0)[(0, 3)]
    assert "key" not in shared and torch.equal(shared["weak"], one["weak"])  # one tensor serves both
    alone = Keyed(Unlabelled(images, recipes, ("strong", "key"), "weak"), 0)[(0, 3)]
    assert alone["key"].shape == (3, 16, 16)
    idle = Unlabelled(images, recipes, ())
    idle.images = ImageList([(root / "nowhere.png", -1)] * 48, [])  # nothing is decoded for nothing
    assert idle[3] == {"index": 3}
    for weak in ("rrc", "shift"):
        for kind in STRONG:
            for recipe in augmentations(16, weak, kind).values():
                assert recipe(images.image(0)).shape == (3, 16, 16)


@pytest.mark.parametrize("key_view", ["weak", "strong"])
def test_views_of_batches(root, key_view) -> None:
    """The views of a batch are keyed by (epoch, index): not by the batch that an image is in, nor by its decoding."""
    recipes = augmentations(16, "shift", "fixmatch")
    every = ("weak", "strong", "key")
    made = {
        cache: feed.keyed(Unlabelled(training_images(root, cache=cache), recipes, every, key_view), 0, "batch")
        for cache in (True, False)
    }
    whole = made[True].__getitems__([(1, i) for i in (3, 40, 7, 11)])
    assert whole["index"].tolist() == [3, 40, 7, 11] and ("key" in whole) == (key_view == "strong")
    for part in (made[True].__getitems__([(1, 7)]), made[False].__getitems__([(1, 7)])):
        assert all(torch.equal(part[name][0], whole[name][2]) for name in whole)
    later = made[True].__getitems__([(2, 7)])
    assert not any(torch.equal(later[name][0], whole[name][2]) for name in whole if name != "index")
    assert key_view == "weak" or not torch.equal(whole["strong"], whole["key"])
    idle = feed.keyed(Unlabelled(training_images(root), recipes, ()), 0, "batch")
    assert idle.__getitems__([(0, 5), (0, 2)])["index"].tolist() == [5, 2]
    labelled = feed.keyed(Labelled(training_images(root), [3, 20, 40], recipes["weak"]), 5, "batch")
    x, y, index = labelled.__getitems__([(0, 2), (0, 0)])
    assert x.shape == (2, 3, 16, 16) and index.tolist() == [40, 3] and y.tolist() == [2, 0]


def test_a_batch_s_strong_views_are_pil_s_of_the_same_draws(monkeypatch) -> None:
    """Crop, RandAugment and Cutout by PIL with the numbers that the batch was made with: to the bit."""
    made: Any = augmentations(20, "shift", "fixmatch")["strong"]
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, 256, (200, 3, 20, 20)).astype(np.uint8))
    u = rng.random((200, 10))
    got, draws = made.batch(x, u), strong.keyed(u[:, :8])
    for i in range(200):
        image = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        for turn in range(2):
            if draws.apply[i, turn]:
                name = strong.NAMES[int(draws.operation[i, turn])]
                image = POOL[name](image, int(draws.level[i, turn]) / 10, int(draws.sign[i, turn]))
        places = iter(u[i, :7:-1])  # PIL asks for the column first
        monkeypatch.setattr(random, "uniform", lambda low, high, places=places: low + (high - low) * next(places))
        image = FixMatchAugment.cutout(image)
        levels = (255 * augment.denormalise(got[i])).round().byte()
        assert np.array_equal(levels.permute(1, 2, 0).numpy(), np.asarray(image)), i
    assert abs(float(draws.apply.double().mean()) - 0.5) < 0.1 and set(draws.sign.flatten().tolist()) == {-1, 1}
    assert set(draws.level.flatten().tolist()) == set(range(1, 10))
    assert set(draws.operation.flatten().tolist()) == set(range(14)) and strong.NAMES == tuple(POOL)


def test_without_flips_nothing_is_mirrored(root) -> None:
    image = training_images(root).image(0).resize((16, 16))
    plain = augment.plain(16)(image)
    flips = []
    for flip in (True, False):
        weak = Keyed(_Views(augmentations(16, "shift", "moco", flip)["weak"], image), 0)
        # the columns of a translated image keep their order: compare the mean slope over many draws
        ramp = torch.arange(16.0) - 7.5
        slopes = [
            float((weak[(0, i)].mean((0, 1)) * ramp).sum() * (plain.mean((0, 1)) * ramp).sum()) for i in range(40)
        ]
        flips.append(sum(slope < 0 for slope in slopes))
    assert flips[0] > 10 and flips[1] < flips[0] - 8
    for kind in STRONG:
        for flip in (True, False):
            made = augmentations(16, "rrc", kind, flip)
            steps = [str(getattr(recipe, "transforms", getattr(recipe, "pil", None))) for recipe in made.values()]
            assert ["Flip" in text for text in steps] == [flip, flip], (kind, steps)


class _Views(torch.utils.data.Dataset):
    def __init__(self, recipe, image):
        self.recipe, self.image = recipe, image

    def __getitem__(self, index):
        return self.recipe(self.image)


def test_labelled_items(root) -> None:
    images = training_images(root)
    labelled = Labelled(images, [3, 20, 40], augmentations(16, "shift", "moco")["weak"])
    x, y, number = labelled[1]
    assert x.shape == (3, 16, 16) and (y, number) == (1, 20) and labelled.labels.tolist() == [0, 1, 2]


# --- FixMatch's strong view ------------------------------------------------------------------------------------------


def photo(size: int = 32) -> Image.Image:
    """Smooth colours with some texture, no pixel of Cutout's grey."""
    y, x = np.mgrid[:size, :size]
    pixels = np.stack([30 + 3 * x, 200 - 4 * y, 90 + 2 * ((x * y) % 13)], 2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_the_pool_is_that_of_fixmatch() -> None:
    """Each operation at the levels 0.1 and 0.9 by PIL's own definition; Rotate up to 30, posterize 4 to 8 bits, ..."""
    image = photo()
    pixels = np.asarray(image).astype(int)
    assert len(POOL) == 14
    got = {name: [np.asarray(POOL[name](image, level, 1)).astype(int) for level in (0.1, 0.9)] for name in POOL}
    for level, at in ((0.1, 0), (0.9, 1)):
        factor = 0.05 + 0.9 * level
        assert np.abs(got["brightness"][at] - factor * pixels).max() <= 1
        grey = pixels @ [0.299, 0.587, 0.114]
        assert np.abs(got["color"][at] - (grey[..., None] + factor * (pixels - grey[..., None]))).max() <= 2
        mean = round(float(np.asarray(image.convert("L")).mean()))
        assert np.abs(got["contrast"][at] - (mean + factor * (pixels - mean))).max() <= 2
        bits = {0.1: 4, 0.9: 7}[level]
        np.testing.assert_array_equal(got["posterize"][at], pixels >> (8 - bits) << (8 - bits))
        border = 256 - int(256 * level)
        np.testing.assert_array_equal(got["solarize"][at], np.where(pixels < border, pixels, 255 - pixels))
        shift = int(0.3 * level * 32)
        np.testing.assert_array_equal(got["translate_x"][at][:, : 32 - shift], pixels[:, shift:])
        np.testing.assert_array_equal(got["translate_y"][at][: 32 - shift], pixels[shift:])
        np.testing.assert_array_equal(got["rotate"][at], np.asarray(image.rotate(int(30 * level))))
    for name in ("shear_x", "shear_y"):
        line = got[name][1] if name == "shear_x" else got[name][1].transpose(1, 0, 2)
        whole = pixels if name == "shear_x" else pixels.transpose(1, 0, 2)
        np.testing.assert_array_equal(line[10, : 32 - 3], whole[10, 3:])  # row 10 by 0.27 * 10.5 = 2.8 pixels
    assert np.array_equal(got["identity"][0], pixels)
    assert np.asarray(got["autocontrast"][0]).min() == 0 and got["autocontrast"][0].max() == 255
    other = {name: np.asarray(POOL[name](image, 0.9, -1)) for name in POOL}
    signed = {name for name in POOL if not np.array_equal(other[name], got[name][1])}
    assert signed == {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def test_how_often_fixmatch_changes_an_image() -> None:
    """Each of two operations with probability 1/2 (identity and others leave some as they are); magnitudes 1 to 9."""
    image, seen, levels = photo(), Counter(), Counter()
    strong = FixMatchAugment()
    with pytest.MonkeyPatch.context() as patch, sample_rng(0):
        for name in POOL:

            def applied(x: Image.Image, level: float, sign: int, name: str = name) -> Image.Image:
                seen[name] += 1
                levels[level] += 1
                return x

            patch.setitem(POOL, name, applied)
        patch.setattr(FixMatchAugment, "cutout", staticmethod(lambda x: x))
        counts = []
        for _ in range(3000):
            before = seen.total()
            strong(image)
            counts.append(seen.total() - before)
    share = [counts.count(k) / 3000 for k in range(3)]
    assert share == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert set(seen) == set(POOL) and min(seen.values()) > 3000 / 14 * 0.75
    assert sorted(levels) == [i / 10 for i in range(1, 10)] and min(levels.values()) > 3000 / 9 * 0.75


def test_cutout_is_a_grey_box_of_half_the_side() -> None:
    image, places = photo(), []
    with sample_rng(1):
        for _ in range(300):
            grey = (np.asarray(FixMatchAugment.cutout(image)) == 127).all(2)
            rows, columns = (np.flatnonzero(grey.any(axis)) for axis in (1, 0))
            assert grey.sum() == len(rows) * len(columns)  # a box
            assert 8 <= len(rows) <= 16 and 8 <= len(columns) <= 16
            places.append((rows[0], columns[0], len(rows) == len(columns) == 16))
    assert not (np.asarray(image) == 127).all(2).any()
    odd = (np.asarray(FixMatchAugment.cutout(Image.new("RGB", (9, 40)))) == 127).all(2)
    assert odd.any(1).sum() <= 4 and odd.any(0).sum() <= 4  # half of the width, rounded down
    assert {0, 23} <= {row for row, _, _ in places} and sum(whole for _, _, whole in places) > 100


# --- the labelled stream ---------------------------------------------------------------------------------------------


def drawn(stream: LabelledStream, epochs: int) -> list[tuple[int, int]]:
    return [place for epoch in range(epochs) for batch in stream.at(epoch) for place in batch]


@pytest.mark.parametrize("batch", [3, 4, 7])
def test_the_stream_is_endless_and_balanced(batch: int) -> None:
    labels = torch.tensor([0] * 2 + [1] * 5 + [2] * 9)
    stream = LabelledStream(labels, batch, 11, seed=0)
    places = drawn(stream, 3)
    assert len(places) == 3 * 11 * batch and len(set(places)) == len(places)  # a view is never drawn twice
    for start in range(0, len(places), 11 * batch):
        counts = Counter(labels[[j for _, j in places[start : start + 11 * batch]]].tolist())
        assert max(counts.values()) - min(counts.values()) <= 1
    own = [j for _, j in places if labels[j] == 1]
    assert all(sorted(own[i : i + 5]) == [2, 3, 4, 5, 6] for i in range(0, len(own) - 5, 5))
    assert own[:5] != own[5:10]  # reshuffled


def test_the_stream_without_balance_is_a_permutation_after_the_other() -> None:
    labels = torch.tensor([0] * 2 + [1] * 8)
    places = drawn(LabelledStream(labels, 5, 4, seed=0, balanced=False), 1)
    for lap in range(2):
        assert sorted(j for at, j in places if at == lap) == list(range(10))
    assert [j for _, j in places[:10]] != [j for _, j in places[10:]]


def test_the_stream_resumes_and_is_shared_by_processes() -> None:
    labels = torch.arange(3).repeat(5)
    whole = drawn(LabelledStream(labels, 6, 4, seed=1), 2)
    stream = LabelledStream(labels, 6, 4, seed=1).at(1, 2)
    assert len(stream) == 2 and [place for batch in stream for place in batch] == whole[36:]
    parts = [list(LabelledStream(labels, 3, 4, 1, rank, 2).at(0)) for rank in (0, 1)]
    assert [place for two in zip(*parts) for share in two for place in share] == whole[:24]
    assert whole != drawn(LabelledStream(labels, 6, 4, seed=2), 2)


def test_pairs_go_together(root) -> None:
    images = training_images(root)
    recipes = augmentations(16, "shift", "moco")
    epochs = EpochSampler(48, 8, 0)
    labelled = Labelled(images, [0, 16, 32], recipes["weak"])
    stream = LabelledStream(labelled.labels, 3, epochs.steps_per_epoch, 0)
    loader = torch.utils.data.DataLoader(Keyed(Unlabelled(images, recipes, ("weak",)), 0), batch_sampler=epochs)
    own = torch.utils.data.DataLoader(Keyed(labelled, 1), batch_sampler=stream)
    pairs = Pairs(loader, epochs, own, stream)
    assert len(list(pairs.at(0))) == 6
    batches = list(pairs.at(1, 4))
    assert len(batches) == 2
    for (u, (x, y, number)), keys in zip(batches, list(epochs.at(1, 4))):
        assert u["index"].tolist() == [i for _, i in keys] and sorted(y.tolist()) == [0, 1, 2]
        assert torch.equal(number // 16, y) and x.shape == (3, 3, 16, 16)
    assert all(second is None for _, second in Pairs(loader, epochs, None, None).at(0, 4))


# --- prototypes on images --------------------------------------------------------------------------------------------


def colour(x: torch.Tensor) -> torch.Tensor:
    """Features that tell the classes: the mean of each channel."""
    return augment.denormalise(x).mean((2, 3))


@pytest.mark.parametrize("kind", ["labelled", "mixture"])
def test_refresh(kind, root) -> None:
    images = Unlabelled(training_images(root), {}, ()).images
    images.transform = augment.plain(16)
    labelled, labels = torch.tensor([1, 4, 18, 20, 33, 40]), torch.tensor([0, 0, 1, 1, 2, 2])
    old = torch.nn.functional.normalize(torch.ones(3, 3), dim=1)
    loading = {"device": torch.device("cpu"), "batch_size": 16}
    mu, least = refresh(
        colour, images, augment.plain(16), labelled, labels, old, kind, 3, 0.01, (0, 1), **loading
    )  # fmt: skip
    z = torch.nn.functional.normalize(torch.stack([colour(images[i][0][None])[0] for i in labelled.tolist()]), dim=1)
    alone = class_means(z, labels, old)
    assert least == (5 if kind == "mixture" else 2)
    if kind == "labelled":
        torch.testing.assert_close(mu, alone)
        return
    assert not torch.allclose(mu, alone)
    assert torch.equal((mu @ alone.T).argmax(1), torch.arange(3))
    again, _ = refresh(colour, images, augment.plain(16), labelled, labels, old, kind, 3, 0.01, (0, 1), **loading)
    other, _ = refresh(colour, images, augment.plain(16), labelled, labels, old, kind, 3, 0.01, (0, 2), **loading)
    assert torch.equal(mu, again) and not torch.equal(mu, other)


def test_mixtures_are_of_one_class_and_of_both_images(root) -> None:
    images = training_images(root)
    labelled, labels = torch.tensor([1, 4, 18, 33]), torch.tensor([0, 0, 1, 2])
    chosen = torch.tensor([[0, 2, 3], [16, 17, 19], [32, 34, 35]])
    mixed = Mixed(images, augment.plain(16), chosen, labelled, labels, 0, 5)
    assert len(mixed) == 9 and mixed.classes_of.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert len(set(mixed.lam)) == 9 and all(0 < lam < 1 for lam in mixed.lam)
    plain = augment.plain(16)
    for j in range(9):
        x, label, number = mixed[j]
        partner = int(mixed.labelled[j])
        assert labels[labelled == partner] == mixed.classes_of[j] and (label, number) == (-1, j)
        expected = mixed.lam[j] * plain(images.image(partner)) + (1 - mixed.lam[j]) * plain(
            images.image(int(chosen.flatten()[j]))
        )
        torch.testing.assert_close(x, expected.float())
