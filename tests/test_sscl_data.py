"""Which images are labelled, the two streams of sscl, and that the labels of unlabelled images stay hidden."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from shared_utils import UserError, augment
from shared_utils.data import EpochSampler, ImageList, Keyed
from sscl import data as sscl_data
from sscl.data import (
    HiddenLabels,
    Labelled,
    LabelledStream,
    Pairs,
    Unlabelled,
    augmentations,
    check_frozen,
    label_split,
    split_hash,
    training_images,
)
from sscl.prototypes import Mixed, class_means, refresh
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


def test_imbalanced_images(root) -> None:
    images = training_images(root, 8, imbalance=4)
    assert Counter(images.labels.tolist()) == {0: 8, 1: 4, 2: 2}
    assert len(training_images(root, 8)) == 24
    with pytest.raises(UserError, match="nowhere/train: no such folder"):
        training_images(root / "nowhere")


# --- views -----------------------------------------------------------------------------------------------------------


def test_unlabelled_images_raise_when_asked_for_labels(root) -> None:  # property 14, trap 12
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
        for strong in ("moco", "randaug"):
            for recipe in augmentations(16, weak, strong).values():
                assert recipe(images.image(0)).shape == (3, 16, 16)


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
    recipes = {flip: str(augmentations(16, "rrc", "randaug", flip)) for flip in (True, False)}
    assert "Flip" in recipes[True] and "Flip" not in recipes[False]
    assert "Flip" not in str(augmentations(16, "rrc", "moco", False))


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


# --- the labelled stream ---------------------------------------------------------------------------------------------


def drawn(stream: LabelledStream, epochs: int) -> list[tuple[int, int]]:
    return [place for epoch in range(epochs) for batch in stream.at(epoch) for place in batch]


@pytest.mark.parametrize("batch", [3, 4, 7])
def test_the_stream_is_endless_and_balanced(batch: int) -> None:  # property 14, trap 10
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
