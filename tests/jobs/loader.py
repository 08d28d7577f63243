"""Views a second and core of the augmentation backends and of other libraries: python tests/bench.py loader

Two tables, MoCo v2's augmentation, two views an image, one thread: decoded images of 32 pixels, and JPEG files of
500 x 375 pixels decoded for views of 224. All rows take turns on the same images in one run; medians of the rounds, in
seconds of the processor, which other programs on the machine take least from.
Images are synthetic with the spectrum of photographs. A library that is not installed has a row that says so.
"""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time as clock
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared_utils import augment, feed
from shared_utils.data import ArrayImages, ImageList, load_image

Views = Callable[[int], Tensor]  # number of an image -> its two views [2, 3, S, S]
STRENGTHS = (0.4, 0.4, 0.4, 0.1)


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [height, width, 3], a spectrum that falls with the frequency."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for k in (1, 2, 4, 8, 16, 32, 64):
        coarse = rng.normal(size=(height // k + 2, width // k + 2, 3)).astype(np.float32)
        total += k**0.9 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 60 * total / total.std(), 0, 255).astype(np.uint8)


# --- other libraries: a transform of one array uint8 [H, W, 3] (or PIL image) -> [3, S, S] ----------------------------


def torchvision_v2(size: int) -> Callable[[np.ndarray], Tensor]:
    from torchvision.transforms import v2

    steps = v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(*STRENGTHS)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13 if size > 64 else 7, (0.1, 2.0))], 0.5),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(augment.MEAN, augment.STD),
        ]
    )
    return lambda pixels: steps(torch.from_numpy(pixels).permute(2, 0, 1))


def kornia(size: int) -> Callable[[np.ndarray], Tensor]:
    import kornia.augmentation as K

    steps = K.AugmentationSequential(
        K.RandomResizedCrop((size, size), (0.2, 1.0)),
        K.ColorJitter(*STRENGTHS, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((13, 13) if size > 64 else (7, 7), (0.1, 2.0), p=0.5),
        K.RandomHorizontalFlip(),
        K.Normalize(torch.tensor(augment.MEAN), torch.tensor(augment.STD)),
    )
    return lambda pixels: steps(torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255)[0]


def albumentationsx(size: int) -> Callable[[np.ndarray], Tensor]:
    import albumentations as A

    steps = A.Compose(
        [
            A.RandomResizedCrop((size, size), (0.2, 1.0)),
            A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur((0, 0), (0.1, 2.0), p=0.5),
            A.HorizontalFlip(p=0.5),
            A.Normalize(augment.MEAN, augment.STD),
        ]
    )
    return lambda pixels: torch.from_numpy(steps(image=pixels)["image"]).permute(2, 0, 1)


def lightly(size: int) -> Callable[[np.ndarray], Tensor]:
    from lightly.transforms.moco_transform import MoCoV2Transform

    steps = MoCoV2Transform(input_size=size).transforms[0]
    return lambda pixels: steps(Image.fromarray(pixels))


def solo_learn(size: int) -> Callable[[np.ndarray], Tensor]:
    from omegaconf import OmegaConf
    from solo.data.pretrain_dataloader import build_transform_pipeline

    jitter = {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    flags = {
        "rrc": {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 1.0},
        "color_jitter": jitter,
        "grayscale": {"prob": 0.2},
        "gaussian_blur": {"prob": 0.5},
        "solarization": {"prob": 0.0},
        "equalization": {"prob": 0.0},
        "horizontal_flip": {"prob": 0.5},
        "crop_size": size,
    }
    steps = build_transform_pipeline("imagenet", OmegaConf.create(flags))
    return lambda pixels: steps(Image.fromarray(pixels))


PEERS = {
    "torchvision v2, tensors": torchvision_v2,
    "kornia": kornia,
    "albumentationsx": albumentationsx,
    "lightly": lightly,
    "solo-learn": solo_learn,
}


# --- the tables ------------------------------------------------------------------------------------------------------


def rows(images: ImageList, size: int, per_image: bool) -> dict[str, Callable[[], Any] | str]:
    """Name -> a function that makes two views of all images; or why there is none."""
    recipe, count, source = augment.moco_v2(size), len(images), feed.Source(images)
    rounds = iter(range(10**9))

    def pil() -> Any:
        return torch.stack([recipe(image) for i in range(count) for image in [images.image(i)] for _ in range(2)])

    def batch() -> Any:
        made = feed.Batch(0, [(next(rounds), i) for i in range(count)], source)
        return made.render(feed.Ask(made.indices, recipe, (0, 1)))[0]

    def peer(make: Callable) -> Callable[[], Any] | str:
        try:
            step = make(size)
            step(source.open(0).pixels())
        except Exception as error:  # whatever the library raises on this machine
            return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
        return lambda: torch.stack(
            [step(pixels) for i in range(count) for pixels in [source.open(i).pixels()] for _ in range(2)]
        )

    there = feed.Source(images, torch.device("cpu"))

    def tensor() -> Any:
        made = feed.Batch(0, [(next(rounds), i) for i in range(count)], there)
        return made.render(feed.Ask(made.indices, recipe, (0, 1)))[0]

    own: dict[str, Callable[[], Any] | str] = {"pil (torchvision on PIL)": pil, "batch": batch}
    if not per_image:
        own["batch, the way of a GPU, here on a CPU"] = tensor
    return own | {name: peer(make) for name, make in PEERS.items()}


def decoders(files: list[Path]) -> dict[str, Callable[[], Any] | str]:
    """Name -> a function that decodes all files to arrays."""
    from torchvision.io import decode_jpeg

    data = [file.read_bytes() for file in files]
    tensors = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in data]
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION

    def draft() -> Any:
        for text in data:
            with Image.open(io.BytesIO(text)) as image:
                image.draft("RGB", (image.width // 2, image.height // 2))
                np.asarray(image)

    return {
        "Pillow": lambda: [np.asarray(load_image(io.BytesIO(text))) for text in data],  # type: ignore[arg-type]
        "ours (header, OpenCV)": lambda: [feed.Encoded(file).pixels() for file in files],
        "OpenCV": lambda: [cv2.imdecode(np.frombuffer(text, np.uint8), flags) for text in data],
        "torchvision.io": lambda: [decode_jpeg(tensor) for tensor in tensors],
        "Pillow, draft of half the sides": draft,
        "ours, half the sides": lambda: [feed.Encoded(file).pixels(2) for file in files],
    }


def measure(functions: dict[str, Callable[[], Any] | str], items: int, repeats: int, budget: float) -> None:
    """Print a table: the functions take turns, so that a busy machine slows all of them."""
    taken: dict[str, list[float]] = {name: [] for name, f in functions.items() if not isinstance(f, str)}
    for name in taken:
        functions[name]()  # type: ignore[operator]
    started = clock()
    for _ in range(repeats):
        for name, times in taken.items():
            start = clock()
            functions[name]()  # type: ignore[operator]
            times.append(clock() - start)
        if clock() - started > budget * len(taken):
            break
    first = next(iter(taken))
    print("| what | a second and core | x the first |\n| --- | --- | --- |")
    for name, function in functions.items():
        if isinstance(function, str):
            print(f"| {name} | not measured ({function}) | |")
            continue
        ratio = statistics.median(a / b for a, b in zip(taken[first], taken[name]))
        print(f"| {name} | {items / statistics.median(taken[name]):,.0f} | {ratio:.2f} |", flush=True)


def main(repeats: int, budget: float, only: str) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if only in "32 pixels":
        images = ArrayImages(np.stack([photograph(32, 32, i) for i in range(128)]), [0] * 128, ["a"])
        print(f"\nMoCo v2, decoded images, views of 32 pixels; numpy {np.__version__}, OpenCV {cv2.__version__}\n")
        measure(rows(images, 32, False), 256, repeats, budget)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jpg" for i in range(16)]
        for i, file in enumerate(files):
            Image.fromarray(photograph(375, 500, i)).save(file, quality=90)
        size = sum(file.stat().st_size for file in files) / len(files) / 1024
        if only in "224 pixels":
            print(f"\nMoCo v2, JPEG of 500 x 375 ({size:.0f} KiB) decoded, two views of 224 pixels\n")
            measure(rows(ImageList([(file, 0) for file in files], ["a"]), 224, True), 32, repeats, budget)
        if only in "decoding":
            print("\nDecoding of the same files\n")
            measure(decoders(files), 16, repeats, budget)
