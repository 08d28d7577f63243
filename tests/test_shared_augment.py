"""Augmentation in batches: its draws are torchvision's distributions, its steps are PIL's; decoding; feeding."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from shared_utils import UserError, augment, feed
from shared_utils.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, mix_keys, uniforms
from shared_utils.data import EpochSampler, ImageList, image_folder, load_image, mix_key, sample_rng
from shared_utils.decode import Encoded
from shared_utils.evaluation import ArrayImages
from shared_utils.run import plain_errors

ROOT = Path(__file__).resolve().parents[1]


def natural(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Structure at every scale, all colours: uint8 [height, width, 3]."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for k in (1, 2, 4, 8, 16, 32):
        coarse = rng.normal(size=(height // k + 2, width // k + 2, 3)).astype(np.float32)
        total = total + k**0.8 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 60 * total / total.std(), 0, 255).astype(np.uint8)


def still(count: int, size: int, **changed: np.ndarray) -> Draws:
    """Draws that change nothing of images of this size, but for what is given."""
    no, box = np.zeros(count, bool), np.tile([0, 0, size, size], (count, 1))
    values = {
        "box": box,
        "target": np.tile([size, size, 0, 0], (count, 1)),
        "jitter": no,
        "order": np.tile(np.arange(4), (count, 1)),
        "factors": np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)),
        "grey": no,
        "sigma": np.zeros(count),
        "solarise": no,
        "flip": no,
        "shift": np.zeros((count, 2), np.int64),
    }
    return Draws(**{**values, **changed})


def both(recipe: augment.Recipe, array: np.ndarray, draws: Draws) -> list[np.ndarray]:
    """Levels [N, S, S, 3] of the two ways to apply, on images [N, H, W, 3]."""
    own = augment.apply(recipe, list(array), draws).astype(float)
    made = augment.apply_tensor(recipe, torch.from_numpy(array), np.arange(len(array)), draws)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    levels = ((made * std + mean) * 255).permute(0, 2, 3, 1).double().numpy()
    assert np.abs(levels - levels.round()).max() < 1e-3  # whole ones
    return [own, levels.round()]


# --- draws -----------------------------------------------------------------------------------------------------------


def test_keys_are_those_of_single_samples_and_numbers_are_uniform():
    rng = np.random.default_rng(0)
    epochs, indices = rng.integers(0, 10**6, 50), rng.integers(-3, 2**40, 50)
    keys = mix_keys(7, epochs, indices, -1)
    assert keys.tolist() == [mix_key(7, e, i, -1) for e, i in zip(epochs.tolist(), indices.tolist())]
    assert (mix_keys(7, epochs[3:5], indices[3:5], -1) == keys[3:5]).all()
    u = uniforms(mix_keys(0, 0, np.arange(4000), 0), augment.SLOTS)
    assert (uniforms(mix_keys(0, 0, np.arange(4000), 0), 5) == u[:, :5]).all()
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    others = [uniforms(mix_keys(*key), 1)[:, 0] for key in ((1, 0, np.arange(4000), 0), (0, 1, np.arange(4000), 0))]
    others += [uniforms(mix_keys(0, 0, np.arange(4000), 1), 1)[:, 0], u[:, 1], np.roll(u[:, 0], 1)]
    for other in others:  # other seeds, epochs, views, numbers and images have nothing to do with it
        assert abs(np.corrcoef(u[:, 0], other)[0, 1]) < 0.06


@pytest.mark.parametrize("size", [(32, 32), (375, 500), (60, 300), (300, 60)])
@pytest.mark.parametrize("recipe", [augment.moco_v2(24), augment.linear_train(24), augment.swav(24, (0.05, 0.14))])
def test_crops_are_drawn_as_torchvision_draws_them(recipe, size):
    count = 1500
    box = recipe.draw(mix_keys(0, 0, np.arange(count), 0), np.full(count, size[0]), np.full(count, size[1])).box
    torch.manual_seed(0)
    image = Image.new("L", size[::-1])
    other = np.array([T.RandomResizedCrop.get_params(image, recipe.scale, recipe.ratio) for _ in range(count)])
    assert (box >= 0).all() and (box[:, 0] + box[:, 2] <= size[0]).all() and (box[:, 1] + box[:, 3] <= size[1]).all()
    for measure in (box.T, other.T):
        assert (measure[2:] > 0).all()
    pairs = [(box[:, i], other[:, i]) for i in range(4)]
    pairs += [(b[:, 2] * b[:, 3], o[:, 2] * o[:, 3]) for b, o in [(box, other)]]
    pairs += [(b[:, 3] / b[:, 2], o[:, 3] / o[:, 2]) for b, o in [(box, other)]]
    for mine, theirs in pairs:
        assert stats.ks_2samp(mine, theirs).pvalue > 1e-4


def test_an_image_that_no_crop_fits_gets_torchvisions_centre():
    for height, width in ((4, 400), (400, 4), (10, 23)):
        recipe = augment.Recipe(8, (1.0, 1.0), (3.0, 3.0) if width == 23 else (3 / 4, 4 / 3))
        box = recipe.draw(mix_keys(0, 0, 0, 0), np.array([height]), np.array([width])).box[0].tolist()
        image = Image.new("L", (width, height))
        assert box == list(T.RandomResizedCrop.get_params(image, recipe.scale, recipe.ratio))


def test_the_strength_of_simclr_is_that_of_all_four_colours():
    assert augment.simclr(16, strength=0.5).jitter == pytest.approx((0.4, 0.4, 0.4, 0.1))


def test_switches_orders_and_strengths_have_their_distributions():
    count = 24000
    recipe = augment.byol(16, 1)
    draws = recipe.draw(mix_keys(3, 1, np.arange(count), 1), np.full(count, 20), np.full(count, 20))
    for found, p in ((draws.jitter, 0.8), (draws.grey, 0.2), (draws.sigma > 0, 0.1), (draws.solarise, 0.2)):
        assert abs(found.mean() - p) < 4 * (p * (1 - p) / count) ** 0.5
    assert abs(draws.flip.mean() - 0.5) < 0.013
    orders = Counter(map(tuple, draws.order.tolist()))
    assert len(orders) == 24 and stats.chisquare(list(orders.values())).pvalue > 1e-4
    for which, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert stats.kstest(draws.factors[:, which], stats.uniform(low, high - low).cdf).pvalue > 1e-4
    assert stats.kstest(draws.sigma[draws.sigma > 0], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-4
    assert (augment.moco_v1(16).draw(mix_keys(0, 0, np.arange(99), 0), np.array(20), np.array(20)).jitter).all()


# --- steps, each against PIL with the same parameters -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [20, 32, 75])
def test_crop_and_resize_are_within_a_level_of_pil(side, kind):
    """Growing, shrinking, one of each by a non-square crop, and as it is."""
    count, size = 40, 32
    array = np.stack([natural(side, side, i) for i in range(count)])
    recipe = augment.Recipe(size, (0.05, 1.0), (1 / 3, 3.0), interpolation=kind)
    draws = recipe.draw(mix_keys(0, 0, np.arange(count), 0), np.array(side), np.array(side))
    draws.box[0] = [0, 0, side, side]
    ways = Image.Resampling[kind.upper()]
    theirs = []
    for image, (top, left, height, width) in zip(array, draws.box.tolist()):
        part = Image.fromarray(image).crop((left, top, left + width, top + height))
        theirs.append(np.asarray(part.resize((size, size), ways)))
    for own, most in zip(both(recipe, array, draws), (1 + (kind == "bicubic"), 2)):
        difference = np.abs(own - np.stack(theirs))
        assert difference.max() <= most and (difference > 1).mean() < 1e-4 and difference.mean() < 0.3
    if side == size:
        assert all((own[0] == array[0]).all() for own in both(recipe, array, draws))


@pytest.mark.parametrize("shape", [(375, 500), (40, 30), (24, 24), (33, 100)])
def test_plain_is_within_a_level_of_pil(shape):
    image = natural(*shape)
    recipe = augment.plain(24)
    draws = recipe.draw(mix_keys(0, 0, 0, 0), np.array([shape[0]]), np.array([shape[1]]))
    theirs = np.asarray(T.Compose(recipe.transforms[:2])(Image.fromarray(image)))
    on_cpu, on_device = (np.abs(own[0] - theirs) for own in both(recipe, image[None], draws))
    assert on_cpu.max() <= 1 and on_device.max() <= 2
    assert (on_cpu > 0).mean() < 0.05 and (on_device > 1).mean() < 1e-3  # evaluations see what they saw with PIL


COLOURS = {
    BRIGHTNESS: TF.adjust_brightness,
    CONTRAST: TF.adjust_contrast,
    SATURATION: TF.adjust_saturation,
    HUE: TF.adjust_hue,
}


@pytest.mark.parametrize("which", COLOURS)
def test_colours_are_those_of_pil(which):
    size, count = 48, 21
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    noise[:8] = 255 * (np.arange(24).reshape(8, 1, 3) % 2)  # pure colours, black, white
    array = np.stack([natural(size, size, i) for i in range(count - 1)] + [noise])
    values = np.linspace(-0.5, 0.5, count) if which == HUE else np.linspace(0.2, 1.8, count)
    theirs = [np.asarray(COLOURS[which](Image.fromarray(x), v)) for x, v in zip(array, values.tolist())]
    painter = augment.Painter(augment.Recipe(size, (1.0, 1.0)), still(count, size))
    own = array.copy()
    for x, value in zip(own, values.tolist()):
        painter._jitter(which, value, x, np.empty_like(x))
    other = augment._jittered(torch.from_numpy(array).permute(0, 3, 1, 2).float(), which, values)
    on_cpu, on_device = (np.abs(x.astype(float) - np.stack(theirs)) for x in (own, other.permute(0, 2, 3, 1).numpy()))
    assert on_cpu.max() <= (12 if which == HUE else 1) and on_cpu.mean() < (1 if which == HUE else 0.01)
    assert on_device.mean() < 5e-3 and (on_device.max() <= 1 or which == HUE)


def test_grey_solarisation_and_flip_are_those_of_pil():
    array, yes = np.stack([natural(32, 32, i) for i in range(3)]), np.ones(3, bool)
    steps = {"grey": lambda x: TF.rgb_to_grayscale(x, 3), "solarise": lambda x: TF.solarize(x, 100), "flip": TF.hflip}
    for name, function in steps.items():
        recipe = augment.Recipe(32, (1.0, 1.0), threshold=100)
        theirs = np.stack([np.asarray(function(Image.fromarray(x))) for x in array])
        for own in both(recipe, array, still(3, 32, **{name: yes})):
            assert np.abs(own - theirs).max() <= (name == "grey")
        assert np.abs(array - theirs.astype(float)).max() > 20


def test_shifts_are_those_of_a_padded_crop():
    """Every shift of up to 3 pixels, as torchvision cuts it out of the mirrored image; drawn uniformly."""
    shift = np.array([(down, right) for down in range(-3, 4) for right in range(-3, 4)])
    array = np.stack([natural(16, 16, seed) for seed in range(len(shift))])
    recipe = augment.Recipe(16, resize=16, pad=3)
    wanted = [
        np.asarray(TF.crop(TF.pad(Image.fromarray(x), 3, padding_mode="reflect"), 3 + down, 3 + right, 16, 16))
        for x, (down, right) in zip(array, shift.tolist())
    ]
    for made in both(recipe, array, still(len(shift), 16, shift=shift)):
        assert np.array_equal(made, np.stack(wanted))
    drawn = recipe.draw(mix_keys(0, 0, np.arange(4900), 0), np.full(4900, 16), np.full(4900, 16)).shift
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 49 and stats.chisquare(counts).pvalue > 1e-3
    assert (augment.plain(16).draw(mix_keys(0, 0, np.arange(9), 0), np.array(20), np.array(20)).shift == 0).all()
    steps = [str(step) for step in recipe.transforms]
    assert steps[2].startswith("RandomCrop(size=(16, 16), padding=3")


def test_blur_is_a_gaussian_and_near_pils():
    sigma = np.array([0.0, 0.1, 0.35, 0.8, 1.4, 2.0])
    array = np.stack([natural(40, 40, i) for i in range(len(sigma))])
    theirs = [
        np.asarray(TF.to_pil_image(x).filter(augment.ImageFilter.GaussianBlur(float(s)))) for x, s in zip(array, sigma)
    ]
    for own in both(augment.Recipe(40, (1.0, 1.0), blur_p=1.0), array, still(len(sigma), 40, sigma=sigma)):
        for x, made, s, boxes in zip(array, own, sigma, theirs):
            true = ndimage.gaussian_filter(x.astype(float), (s, s, 0), mode="nearest", truncate=8) if s else x
            assert np.abs(made - true).max() <= 1 and np.abs(made - boxes).max() <= 6


@pytest.mark.parametrize("recipe", [augment.moco_v2(32), augment.moco_v1(32), augment.byol(32, 1)])
def test_whole_recipes_follow_pil_step_after_step(recipe):
    """The order of the steps too: another order is far away."""
    count = 200
    array = np.stack([natural(48, 48, i) for i in range(count)])
    draws = recipe.draw(mix_keys(0, 0, np.arange(count), 0), np.array(48), np.array(48))
    theirs = []
    for i, image in enumerate(array):
        top, left, height, width = draws.box[i].tolist()
        x = Image.fromarray(image).crop((left, top, left + width, top + height))
        x = x.resize((32, 32), Image.Resampling[recipe.interpolation.upper()])
        for step in recipe.order:
            if step == "jitter" and draws.jitter[i]:
                for which in draws.order[i].tolist():
                    x = COLOURS[which](x, float(draws.factors[i, which]))
            elif step == "grey" and draws.grey[i]:
                x = TF.rgb_to_grayscale(x, 3)
            elif step == "blur" and draws.sigma[i]:
                x = x.filter(augment.ImageFilter.GaussianBlur(float(draws.sigma[i])))
            elif step == "solarise" and draws.solarise[i]:
                x = TF.solarize(x, 128)
            elif step == "flip" and draws.flip[i]:
                x = TF.hflip(x)
        theirs.append(np.asarray(x).astype(float))
    steps = {"grey", "jitter"} & set(recipe.order)
    for own in both(recipe, array, draws):
        far = np.abs(own - np.stack(theirs)).mean((1, 2, 3))
        assert len(steps) == 2 and np.quantile(far, 0.98) < 2.5 and far.mean() < 1
    other = augment.replace(recipe, order=tuple(reversed(recipe.order)))
    assert np.abs(augment.apply(other, list(array), draws) - np.stack(theirs)).mean() > 1


def test_backend_pil_is_the_releases_pipeline():
    image = Image.fromarray(natural(40, 60))
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    end = [T.ToTensor(), T.Normalize(augment.MEAN, augment.STD)]
    crop, flip = T.RandomResizedCrop(16, (0.2, 1.0)), T.RandomHorizontalFlip()
    blur = T.RandomApply([augment.GaussianBlur()], 0.5)
    pipelines = {
        augment.moco_v2(16): [crop, jitter, T.RandomGrayscale(0.2), blur, flip, *end],
        augment.moco_v1(16): [crop, T.RandomGrayscale(0.2), T.ColorJitter(0.4, 0.4, 0.4, 0.4), flip, *end],
        augment.plain(16): [T.Resize(18), T.CenterCrop(16), *end],
        augment.linear_train(16): [T.RandomResizedCrop(16), flip, *end],
    }
    for recipe, steps in pipelines.items():
        for seed in range(20):
            with sample_rng(seed):
                own = recipe(image)
            with sample_rng(seed):
                assert torch.equal(own, T.Compose(steps)(image))
    with pytest.raises(UserError, match="--aug_backend gpu"):
        augment.plain(16, "gpu")


# --- decoding --------------------------------------------------------------------------------------------------------


def odd_images(root: Path) -> dict[str, Path]:
    """Files of every kind that a decoder may take for another, one a name."""
    image, out = Image.fromarray(natural(37, 50)), {}
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    wide = np.asarray(image).astype(np.uint16) * 257
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.jpg": (image, {"quality": 90}),
        "fine.jpg": (image, {"quality": 95, "subsampling": 0, "progressive": True}),
        "turned.jpg": (image, {"exif": exif}),
        "grey.jpg": (image.convert("L"), {}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "rgb.png": (image, {}),
        "clear.png": (image.convert("RGBA"), {}),
        "palette.png": (image.quantize(16), {"transparency": 3}),
        "grey16.png": (Image.fromarray(wide[..., 0]), {}),
        "rgb.bmp": (image, {}),
        "rgb.webp": (image, {}),
        "named.png": (image, {"format": "JPEG"}),
    }
    for name, (picture, options) in made.items():
        picture.save(root / name, **options)
        out[name] = root / name
    (root / "trailing.jpg").write_bytes(out["rgb.jpg"].read_bytes() + b"more")
    return {**out, "trailing.jpg": root / "trailing.jpg"}


def test_every_kind_of_file_decodes_as_pillow_decodes_it(tmp_path):
    for name, path in odd_images(tmp_path).items():
        pixels = Encoded(path).pixels()
        assert pixels.dtype == np.uint8 and pixels.shape[:2] == ((50, 37) if name == "turned.jpg" else (37, 50)), name
        assert (pixels == np.asarray(load_image(path, turn=True))).all(), name
        assert Encoded(path).simple == (name in ("rgb.jpg", "fine.jpg", "turned.jpg", "grey.jpg", "named.png")), name


@pytest.mark.parametrize("workers", [0, 1])  # one batch: a second worker would start for nothing
def test_a_broken_image_is_named_in_a_batch(workers, tmp_path):
    for i in range(4):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(natural(60, 60, i)).save(tmp_path / f"a/{i}.jpg")
    images = image_folder(tmp_path)
    images.transform = augment.plain(16, "batch")
    whole = (tmp_path / "a/2.jpg").read_bytes()
    for broken in (whole[:700], whole[: len(whole) - 40], b"", b"text", None):
        (tmp_path / "a/2.jpg").unlink()
        if broken is not None:
            (tmp_path / "a/2.jpg").write_bytes(broken)
        with pytest.raises(UserError, match="a/2.jpg: (not a readable image|no such file)") as error:
            list(plain_errors(feed.in_order(images, 0, 4, 4, workers, torch.device("cpu"))))
        assert "\n" not in str(error.value)
        (tmp_path / "a/2.jpg").touch()


def test_large_jpegs_are_decoded_at_a_part_of_their_size(tmp_path, monkeypatch):
    path = tmp_path / "a/0.jpg"
    path.parent.mkdir()
    Image.fromarray(natural(700, 901)).save(path, quality=92)
    images, asked = image_folder(tmp_path), []
    pixels = Encoded.pixels

    def spied(self, by=1):
        asked.append(by)
        return pixels(self, by)

    monkeypatch.setattr(Encoded, "pixels", spied)
    made = {}
    for gap in (feed.GAP, 1e9):
        monkeypatch.setattr(feed, "GAP", gap)
        source, ask = feed.Source(images), feed.Ask(np.array([0]), augment.linear_train(32), [0])
        made[gap] = [feed.Batch(0, [(epoch, 0)], source).render(ask) for epoch in range(20)]
    assert set(asked[20:]) == {1} and {2, 4} <= set(asked[:20])
    for small, large in zip(*made.values()):
        assert (255 * 0.225 * (small[0] - large[0])).abs().mean() < 1.5  # levels


# --- feeding ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve images of several sizes, JPEG and PNG."""
    root = tmp_path_factory.mktemp("ragged")
    for i in range(12):
        path = root / f"class{i % 2}" / f"{i:02d}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(natural(40 + 3 * i, 60 - 2 * i, i)).save(path)
    return root


class Two(torch.utils.data.Dataset):
    """Two views of an image and one of the next."""

    def __init__(self, images: ImageList, size: int = 24):
        self.images, self.recipe = images, augment.moco_v2(size)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, batch: feed.Batch) -> dict[str, torch.Tensor]:
        own, other = batch.render(
            feed.Ask(batch.indices, self.recipe, (0, 1)),
            feed.Ask((batch.indices + 1) % len(self.images), augment.moco_v1(16), (2,)),
        )
        return {"a": own[0], "b": own[1], "next": other[0]}


@pytest.mark.parametrize("size", [24, 80])  # normalised together, and one by one
def test_views_depend_on_seed_epoch_index_and_view_alone(size, folder):
    data = Two(image_folder(folder), size)
    keys = [(e, i) for e in (0, 3) for i in range(12)]

    def made(keys, seed=0):
        return feed.keyed(data, seed, "batch").__getitems__(keys)

    whole = made(keys)
    assert whole["a"].shape == (24, 3, size, size) and whole["a"].is_contiguous(memory_format=torch.channels_last)
    assert whole["next"].shape == (24, 3, 16, 16) and whole["a"].dtype == torch.float32
    order = np.random.default_rng(0).permutation(24).tolist()
    parts = [made([keys[i] for i in order[k : k + 5]]) for k in range(0, 24, 5)]
    for name, view in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), view[order])
        assert not torch.equal(view[:12], view[12:])  # another epoch
    assert not torch.equal(whole["a"], whole["b"])
    assert not torch.equal(made(keys, 1)["a"], whole["a"])
    twice = made([keys[3], keys[3]])
    assert torch.equal(twice["a"][0], twice["a"][1])


def test_workers_processes_and_memory_change_nothing(folder, monkeypatch):
    images, opened = image_folder(folder), []
    cached = images.cached()
    whole = {}
    for workers, data in ((0, Two(images)), (2, Two(images)), (0, Two(cached))):
        loader = torch.utils.data.DataLoader(
            feed.keyed(data, 5, "batch"), batch_sampler=EpochSampler(12, 4, 5).at(2, 1), num_workers=workers,
            collate_fn=feed.Batched.collate_fn,
        )  # fmt: skip
        batches = list(loader)
        whole = whole or {0: batches}
        assert len(batches) == 2
        for a, b in zip(whole[0], batches):
            assert all(torch.equal(a[name], b[name]) for name in a)
    pixels = Encoded.pixels

    def spied(self, by=1):
        opened.append(self.path)
        return pixels(self, by)

    monkeypatch.setattr(Encoded, "pixels", spied)
    shares = [feed.keyed(Two(images), 5, "batch").__getitems__(next(iter(EpochSampler(12, 2, 5, rank, 2).at(2, 1))))
              for rank in (0, 1)]  # fmt: skip
    for name, view in whole[0][0].items():
        assert torch.equal(torch.cat([share[name] for share in shares]), view)
    opened.clear()
    feed.keyed(Two(images), 5, "batch").__getitems__([(0, i) for i in range(12)])
    assert sorted(opened) == sorted(map(str, images.paths()))  # each once for three views


@pytest.mark.parametrize("size", [24, 80])
@pytest.mark.parametrize("one_array", [False, True])
def test_bytes_are_the_views_before_normalisation(size, one_array, folder):
    images: ImageList = image_folder(folder)
    if one_array:
        images = ArrayImages(np.stack([natural(36, 36, i) for i in range(12)]), [0] * 12, ["a"])
    source = feed.Source(images, torch.device("cpu") if one_array else None)
    batch = feed.Batch(0, [(1, i) for i in (3, 0, 5)], source)
    recipe = augment.byol(size, 1)
    floats, levels = batch.render(*(
        feed.Ask(batch.indices, augment.replace(recipe, levels=levels), (0, 1)) for levels in (False, True)
    ))  # fmt: skip
    assert levels.dtype == torch.uint8 and levels.shape == floats.shape == (2, 3, 3, size, size)
    assert levels[0].is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    assert torch.allclose(levels / 255, floats * std + mean, atol=1e-5) and levels.float().std() > 30


def test_images_in_one_array_on_a_device_give_the_same_views(folder):
    array = np.stack([natural(36, 36, i) for i in range(8)])
    images = ArrayImages(array, [i % 2 for i in range(8)], ["a", "b"])
    own = feed.keyed(Two(images), 0, "batch")
    there = feed.keyed(Two(images), 0, "batch")
    there.source = feed.Source(images, torch.device("cpu"))  # as on a GPU
    assert there.source.on_device and not own.in_process
    keys = [(1, i) for i in (3, 0, 5, 7)]
    for name, view in own.__getitems__(keys).items():
        other = there.__getitems__(keys)[name]
        assert other.shape == view.shape and (255 * 0.225 * (view - other)).abs().mean() < 1


def test_features_of_evaluations_are_in_order_and_near_pils(folder):
    images = image_folder(folder)
    labels, made = {}, {}
    for backend in ("pil", "batch"):
        images.transform = augment.plain(24, backend)
        got = list(feed.in_order(images, 3, 12, 4, 0, torch.device("cpu")))
        assert torch.cat([rows for _, _, rows in got]).tolist() == list(range(3, 12))
        labels[backend], made[backend] = (torch.cat([batch[k] for batch in got]) for k in (1, 0))
    assert torch.equal(labels["pil"], images.labels[3:]) and torch.equal(labels["pil"], labels["batch"])
    assert (255 * 0.224 * (made["pil"] - made["batch"]).abs()).max() < 1.03  # a level
    array = ArrayImages(np.stack([natural(20, 20, i) for i in range(6)]), [0, 1] * 3, ["a", "b"])
    part = array.take(slice(1, None, 2))  # a subset keeps its own images
    part.transform = augment.plain(16, "batch")
    ((x, y, _),) = feed.in_order(part, 0, 3, 4, 0, torch.device("cpu"))
    one = augment.plain(16)(Image.fromarray(natural(20, 20, 3)))
    assert y.tolist() == [1, 1, 1] and (255 * 0.224 * (x[1] - one).abs()).max() < 1.03


def test_only_backend_pil_imports_torchvision():
    code = (
        "import sys, numpy as np; from shared_utils import augment, feed\n"
        "r = augment.moco_v2(8); k = augment.mix_keys(0, 0, 0, 0)\n"
        "augment.apply(r, [np.zeros((9, 9, 3), np.uint8)], r.draw(k, np.array(9), np.array(9)))\n"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_script_without_recipes_says_so(folder):
    images = image_folder(folder, transform=lambda image: image)
    with pytest.raises(UserError, match="--aug_backend batch: this script"):
        feed.keyed(images, 0, "batch")
