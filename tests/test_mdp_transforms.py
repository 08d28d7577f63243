"""mdp: the two augmentations; label and image go through one geometry, the colours keep to their ranges."""

import numpy as np
import pytest
import torch
from PIL import Image

from mdp.transforms import MEAN, STD, MmsegView, MoCoView, TwoViews, label_tensor
from shared_utils.data import sample_rng


def ramp(axis: int, size: tuple[int, int] = (200, 160)) -> tuple[Image.Image, Image.Image]:
    """The image's channels and the label all hold the pixel's own coordinate along `axis` (0: x, 1: y)."""
    grid = np.mgrid[: size[1], : size[0]][1 - axis].astype(np.uint8)
    return Image.fromarray(np.stack([grid] * 3, -1)), Image.fromarray(grid)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("aug, crop", [("moco", 64), ("moco", 224), ("mmseg", 64), ("mmseg", 200), ("mmseg", 400)])
def test_label_follows_its_view(aug, crop, axis, monkeypatch):
    """Colour operations off, image and label show the same coordinate: half a pixel of shift would be seen."""
    views = TwoViews(aug, crop)
    monkeypatch.setattr(views.view, "colour", lambda image: image)
    image, label = ramp(axis)
    errors, flips, different = [], 0, 0
    with sample_rng(1, 2, crop):
        for _ in range(20):
            q, q_label, k, k_label = views(image, label)
            different += not torch.equal(q_label, k_label)
            for view, ids in ((q, q_label), (k, k_label)):
                assert view.shape == (3, crop, crop) and view.dtype == torch.float32
                assert ids.shape == (crop, crop) and ids.dtype == torch.uint8
                padded = ids == 255
                assert (view[:, padded] == 0).all()
                shown = (view * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])[0]
                difference = (shown - ids.float())[~padded]
                # a nearest pixel is at most half a pixel off; the level is rounded; at the border the kernel is cut
                assert difference.abs().max() <= 2.0
                errors.append(difference.mean())
                along = ids.float()[~padded.all(1)][:, ~padded.all(0)]
                flips += bool((along[0, -1] < along[0, 0]).item()) if axis == 0 else 0
    assert abs(torch.stack(errors).mean()) < 0.1
    assert different == 20, "the two views are drawn independently"
    assert axis == 1 or 8 <= flips <= 32, "both are mirrored in about half of the 40 views"


def test_views_hold_only_existing_ids():
    """Nearest neighbours: no id appears that the map does not hold (bilinear would make 3 from 1 and 5)."""
    ids = np.random.default_rng(0).choice(np.array([1, 5, 255], np.uint8), (50, 70))
    image, label = Image.new("RGB", (70, 50)), Image.fromarray(ids)
    for aug in ("moco", "mmseg"):
        for view in (TwoViews(aug, 32)(image, label) for _ in range(5)):
            assert set(view[1].unique().tolist()) <= {1, 5, 255}


def test_moco_crops_cover_their_scale():
    """Boxes have 0.2 to 1 of the area (read off the coordinates that a view spans)."""
    view, areas = MoCoView(200), list[float]()
    with sample_rng(3):
        for _ in range(60):
            spans = []
            for axis in (0, 1):
                with sample_rng(len(areas), 7):
                    ids = label_tensor(view.geometry(*ramp(axis))[1]).int()
                spans.append(int(ids.max() - ids.min()) + 1)
            areas.append(spans[0] * spans[1] / (200 * 160))
    assert min(areas) > 0.19 and min(areas) < 0.35 and max(areas) > 0.8


def test_mmseg_rejects_crops_of_one_class():
    """cat_max_ratio 0.75 makes crops that one class fills rare."""
    ids = np.zeros((128, 128), np.uint8)
    ids[:, 100:] = 1
    image, label = Image.new("RGB", (128, 128)), Image.fromarray(ids)

    def share_of_one_class(cat_max_ratio: float) -> float:
        view = MmsegView(64, ratio=(2.0, 2.0), cat_max_ratio=cat_max_ratio)
        with sample_rng(5):
            crops = [label_tensor(view.geometry(image, label)[1]) for _ in range(60)]
        return sum(max((c == 0).float().mean(), (c == 1).float().mean()).item() > 0.75 for c in crops) / 60

    assert share_of_one_class(0.75) < 0.1 < 0.5 < share_of_one_class(2.0)


def test_mmseg_photometric_ranges():
    """Brightness +-32 and contrast 0.5-1.5 reach their ends and no further; hue stays within +-36 degrees."""
    view, grey, red = MmsegView(8), Image.new("RGB", (1, 1), (128,) * 3), Image.new("RGB", (1, 1), (200, 20, 20))
    with sample_rng(6):
        levels = np.array([view.colour(grey).getpixel((0, 0)) for _ in range(600)])
        reds = np.array([view.colour(red).getpixel((0, 0)) for _ in range(300)])
    assert (levels == levels[:, :1]).all(), "grey stays grey"
    assert 96 * 0.5 - 1 <= levels.min() < 60 and 215 < levels.max() <= 160 * 1.5
    assert (levels == 128).any()
    assert (reds[:, 0] >= reds.max(1)).all() and len(np.unique(reds, axis=0)) > 100


def test_moco_colours_vary_and_sometimes_grey():
    view, image = MoCoView(16), Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    with sample_rng(7):
        out = [np.asarray(view.colour(image)).astype(int) for _ in range(200)]
    grey = sum((o == o[..., :1]).all() for o in out)
    sharp = np.asarray(image).astype(int)
    blurred = sum(np.abs(np.diff(o, axis=0)).mean() < 0.5 * np.abs(np.diff(sharp, axis=0)).mean() for o in out)
    assert 20 <= grey <= 65 and 50 <= blurred <= 150 and any((o == sharp).all() for o in out)


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="moco, mmseg"):
        TwoViews("simclr", 8)
