"""mdp: both views of a batch by shared_utils.augment: labels go with them; PIL gives the same for the same draws."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mdp.batches import BatchedUnion, nearest
from mdp.datasets import UnionDataset
from mdp.main_pretrain import main
from mdp.own import open_own
from mdp.transforms import MoCoView, TwoViews
from shared_utils import UserError
from shared_utils.augment import denormalise, mix_keys
from shared_utils.data import Keyed, sample_rng
from tests.checkpoints import differing
from tests.test_mdp_own import SMALL, write_set
from tests.test_mdp_pretrain import stop_at
from tests.test_mdp_transforms import ramp

SIZES = [(200, 160), (90, 240), (250, 60), (20, 30)]


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> UnionDataset:
    """Two sets; a photo's channels hold x, y, x, and its label map x (set a) or y (set b)."""
    root, sets = tmp_path_factory.mktemp("ramps"), []
    for axis, name in enumerate("ab"):
        for kind in ("images", "labels"):
            (root / name / kind / "train").mkdir(parents=True)
        for i, size in enumerate(SIZES):
            across, down = (np.asarray(ramp(way, size)[1]) for way in (0, 1))
            Image.fromarray(np.stack([across, down, across], -1)).save(root / name / f"images/train/{i}.png")
            Image.fromarray((across, down)[axis]).save(root / name / f"labels/train/{i}.png")
        (root / name / "classes.txt").write_text("".join(f"{i}\n" for i in range(254)))
        sets.append(open_own(name, root / name, check=False))
    return UnionDataset(sets, TwoViews("moco", 32))


def plain(union: UnionDataset, size: int) -> BatchedUnion:
    """Crops and flips alone."""
    made = BatchedUnion(union, size, 3)
    made.recipe = replace(made.recipe, jitter_p=0.0, grey_p=0.0, blur_p=0.0)
    return made


@pytest.mark.parametrize("size", [32, 96])
def test_labels_and_pixels_go_together_and_pil_agrees(size: int, ramps: UnionDataset) -> None:
    """For the same boxes and flips: labels equal to PIL's nearest, levels within 1 of PIL's resize."""
    made = plain(ramps, size)
    keys = [(epoch, index) for epoch in range(6) for index in range(len(ramps))]
    batch = made.__getitems__(keys)
    assert batch["q"].shape == (48, 3, size, size) and batch["q"].dtype == torch.float32
    assert not torch.equal(batch["q"], batch["k"]), "the two views are drawn independently"
    epochs, indices = np.array(keys).T
    flips, worst, other = 0, 0.0, 0.0
    for view, name in enumerate("qk"):
        sizes = np.array([SIZES[i % 4] for i in indices])
        draws = made.recipe.draw(mix_keys(3, epochs, indices, view), sizes[:, 1], sizes[:, 0])
        flips += int(draws.flip.sum())
        for i, index in enumerate(indices.tolist()):
            image, label = ramps.read(index)
            top, left, height, width = draws.box[i].tolist()
            box = (left, top, left + width, top + height)
            shown, ids = image.crop(box).resize((size, size), 2), label.resize((size, size), 0, box=box)
            if draws.flip[i]:
                shown, ids = (picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in (shown, ids))
            expected = torch.from_numpy(np.array(ids)).long() + ramps.offsets[index // 4]
            mine = batch[f"{name}_label"][i]
            # PIL adds the steps up in floating point: a middle that lies on an edge may fall to either side.
            other = max(other, (mine != expected).float().mean().item())
            assert (mine - expected).abs().max() <= 1
            levels = denormalise(batch[name][i]) * 255
            worst = max(worst, (levels - torch.from_numpy(np.array(shown)).movedim(2, 0)).abs().max().item())
            seen = levels[index // 4].round().long() + ramps.offsets[index // 4]
            assert (seen - mine).abs().max() <= 5  # a nearest pixel of the largest crop is 4 away from its neighbour
    assert worst <= 1.01 and other < 0.04 and 20 <= flips <= 76
    assert (
        batch["dataset"].tolist() == [index // 4 for index in indices] and batch["index"].tolist() == indices.tolist()
    )


def test_nearest_is_pils() -> None:
    ids = np.random.default_rng(0).integers(0, 250, (50, 70)).astype(np.uint8)
    for box, size in (([3, 5, 31, 44], 16), ([0, 0, 50, 70], 64), ([10, 20, 7, 9], 24)):
        top, left, height, width = box
        theirs = Image.fromarray(ids).resize((size, size), 0, box=(left, top, left + width, top + height))
        mine = nearest(ids, box, size, False)
        assert (mine == np.asarray(theirs)).mean() > 0.9
        np.testing.assert_array_equal(nearest(ids, box, size, True), mine[:, ::-1])


def test_draws_have_the_distribution_of_the_other_backend(ramps: UnionDataset) -> None:
    """Areas of the crops, flips, and how much of grey and colour a view has: means within 4 standard errors."""
    made, view, count = BatchedUnion(ramps, 16, 0), MoCoView(16), 400
    draws = made.recipe.draw(mix_keys(0, 0, np.arange(count), 0), np.full(count, 160), np.full(count, 200))
    areas = draws.box[:, 2] * draws.box[:, 3] / (160 * 200)
    image, label = ramp(0)
    theirs, colours = [], []
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8))
    with sample_rng(1):
        for _ in range(count):
            ids = np.asarray(view.geometry(image, label)[1]).astype(int)
            theirs.append([np.abs(ids[0, -1] - ids[0, 0]) / 15 * 16 / 200, ids[0, -1] < ids[0, 0]])
            out = np.asarray(view.colour(photo)).astype(int)
            colours.append((out == out[..., :1]).all())
    widths = np.array(theirs)[:, 0]
    for mine, other in (
        (draws.box[:, 3] / 200, widths),
        (draws.flip.astype(float), np.array(theirs)[:, 1]),
        (draws.grey.astype(float), np.array(colours, float)),
    ):
        error = np.hypot(mine.std(), other.std()) / count**0.5
        assert abs(mine.mean() - other.mean()) < 4 * error
    assert 0.19 < areas.min() and areas.max() <= 1


@pytest.mark.parametrize("cache", [0, 40])
def test_a_sample_depends_on_seed_epoch_and_index_alone(cache: int, ramps: UnionDataset) -> None:
    union = UnionDataset(ramps.sets, TwoViews("moco", 16), cache)
    made = BatchedUnion(union, 16, 5)
    keys = [(epoch, index) for epoch in (0, 1) for index in range(8)]
    whole = made.__getitems__(keys)
    loader = DataLoader(made, batch_sampler=[keys[12:], keys[:12]], num_workers=2, collate_fn=made.collate_fn)
    last, first = list(loader)
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([first[key], last[key]]))
    assert not torch.equal(whole["q"][:8], whole["q"][8:]), "another epoch, other views"
    assert Keyed(union, 5)[keys[0]]["q"].shape == whole["q"][0].shape and whole["q_label"].dtype == torch.int64


def test_large_photos_are_decoded_at_a_part_of_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG 40 times the crop: its views are those of the photo decoded whole within a few levels."""
    ids = np.kron(np.random.default_rng(0).integers(0, 4, (6, 8)), np.ones((100, 100))).astype(np.uint8)
    grey = Image.fromarray(np.stack([60 + 40 * ids] * 3, -1))
    for kind, picture in (("images", grey), ("labels", Image.fromarray(ids))):
        (tmp_path / kind / "train").mkdir(parents=True)
        picture.save(tmp_path / kind / "train" / ("a.jpg" if kind == "images" else "a.png"))
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    made = plain(UnionDataset([open_own("x", tmp_path)], TwoViews("moco", 16)), 16)
    keys = [(epoch, 0) for epoch in range(8)]
    parts = made.__getitems__(keys)
    monkeypatch.setattr("mdp.batches.GAP", 1000)
    whole = made.__getitems__(keys)
    levels = 255 * (denormalise(parts["q"]) - denormalise(whole["q"])).abs()
    assert 0 < levels.max() < 16 and levels.mean() < 1
    assert torch.equal(parts["q_label"], whole["q_label"])


def test_resume_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_set(tmp_path / "my set", "a\nb\nc\n", [[0, 1], [1, 2]], "train", 12)
    flags = [*SMALL, "--datasets", f"x={root}", "--aug_backend", "batch", "--save-every", "1", "--output-dir"]
    assert main([*flags, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        stop_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            main([*flags, str(tmp_path / "cut")])
    assert main([*flags, str(tmp_path / "cut"), "--workers", "2"]) == 0
    assert differing(tmp_path / "whole", tmp_path / "cut") == []
    assert main([*flags[:-5], "--output-dir", str(tmp_path / "pil")]) == 0
    assert differing(tmp_path / "whole", tmp_path / "pil") != []
    broken = sorted((root / "labels").rglob("*.png"))[3]
    with Image.open(broken) as image:
        image.resize((9, 9)).save(broken)
    union = UnionDataset([open_own("x", root, check=False)], TwoViews("moco", 16))
    with pytest.raises(UserError, match="label is 9x9, but its image"):
        BatchedUnion(union, 16, 0).__getitems__([(0, i) for i in range(12)])
    with pytest.raises(UserError, match="--aug mmseg needs --aug_backend pil"):
        main([*flags, str(tmp_path / "m"), "--aug", "mmseg"])
