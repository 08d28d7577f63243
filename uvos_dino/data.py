"""Videos as folders of frames: the layouts of the benchmarks, clips for training, whole sequences for inference."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from shared_utils import UserError
from shared_utils.augment import MEAN, STD
from shared_utils.data import load_image, mix_key, read_text, subfolders, walk

NORMS = {
    "imagenet": (MEAN, STD),
    "release": ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)),  # Kinetics: the release's inference alone
}


class Layout(NamedTuple):
    """Where a benchmark keeps things, below its root; {split} is filled in."""

    frames: str
    masks: tuple[str, ...]  # the first that exists
    lists: str  # file of sequence names; where it is absent, every folder of frames counts
    binary: bool  # one object, any value above 0; else the value is the object and 255 is void
    frame: str = r".*\.(jpg|jpeg|png|bmp)"
    mask: str = r".*\.png"


LAYOUTS = {
    "DAVIS": Layout("JPEGImages/480p", ("Annotations/480p",), "ImageSets/2016/{split}.txt", True),
    "DAVIS2017": Layout(
        "JPEGImages/480p", ("Annotations_unsupervised/480p", "Annotations/480p"), "ImageSets/2017/{split}.txt", False
    ),
    "FBMS": Layout("FBMS", ("FBMS_annotation", "Annotations"), "ImageSets/{split}.txt", True),
    "STv2": Layout(
        "STv2_img/JPEGImages", ("STv2_gt&pred/STv2_gt/GroundTruth",), "ImageSets/{split}.txt", True,
        mask=r".*\.(png|bmp|jpg)",
    ),
    "YTVIS": Layout("{split}/JPEGImages", ("{split}/Annotations",), "ImageSets/{split}.txt", False),
    # Frames and annotations lie in one folder, with flow and depth: a name that is not UTF-8 tells none of them, and
    # counts as an annotation, which then belongs to no frame.
    "MOVi": Layout(
        "{split}", ("{split}",), "ImageSets/{split}.txt", False, r"rgba?_\d+\.(png|jpg)",
        r"(seg\w*_\d+|.*[\udc80-\udcff].*)\.png",
    ),
}  # fmt: skip


class Video(NamedTuple):
    name: str
    frames: list[Path]
    masks: dict[int, Path]  # number of the frame: its annotation; FBMS and YouTube-VIS annotate some frames only


def _number(path: Path) -> int | None:
    found = re.findall(r"\d+", path.stem)
    return int(found[-1]) if found else None


def _names(root: Path, layout: Layout, split: str) -> list[str]:
    file = root / layout.lists.format(split=split)
    if file.is_file():  # DAVIS-2016 lists pairs of files, DAVIS-2017 names
        words = (line.split() for line in read_text(file, "a sequence a line").splitlines())
        names = [Path(first[0]).parts[-2] if "/" in first[0] else first[0] for first in words if first]
        return list(dict.fromkeys(names))
    folder = root / layout.frames.format(split=split)
    return subfolders(folder, "sequence") if folder.is_dir() else []


def open_videos(dataset: str, root: Path, split: str, only: Sequence[str] = ()) -> list[Video]:
    """The sequences of a benchmark in the order of its list.

    Raises:
        UserError: no sequence, one without frames or annotations, or a name of `only` that is not there.
    """
    layout = LAYOUTS[dataset]
    frames_in = root / layout.frames.format(split=split)
    candidates = [root / name.format(split=split) for name in layout.masks]
    masks_in = next((folder for folder in candidates if folder.is_dir()), candidates[0])
    names = _names(root, layout, split)
    if not names:
        raise UserError(f"{root}: no {dataset} here; expected {frames_in}/SEQUENCE/*.jpg and {masks_in}/SEQUENCE/*.png")
    if unknown := sorted(set(only) - set(names)):
        raise UserError(f"--sequences {unknown[0]}: not in {dataset} {split}; there are {', '.join(names[:4])}, ...")
    videos = []
    for name in only or names:
        frames = _files(frames_in / name, layout.frame)
        if not frames:
            raise UserError(f"{frames_in / name}: no frames; expected 00000.jpg, 00001.jpg, ...")
        masks, others = by_frame(_files(masks_in / name, layout.mask), frames)
        if others:
            raise UserError(
                f"{others[0]}: an annotation of no frame in {frames_in / name} (or a second one of its frame); restore "
                "the frame, or remove the annotation"
            )
        if not masks:
            raise UserError(
                f"{masks_in / name}: no annotation of a frame in {frames_in / name}; expected 00000.png, ..."
            )
        videos.append(Video(name, frames, dict(sorted(masks.items()))))
    return videos


def by_frame(files: Sequence[Path], frames: Sequence[Path]) -> tuple[dict[int, Path], list[Path]]:
    """{number of a frame: the file that belongs to it}, and the files that belong to none or come second.

    A file belongs to the frame of its name, else to that of the last number in its name (SegTrack-v2, MOVi).
    """
    names = {path.stem: i for i, path in enumerate(frames)}
    numbers = {_number(path): i for i, path in enumerate(frames)}
    numbers.pop(None, None)
    found: dict[int, Path] = {}
    others = []
    for path in files:
        place = names.get(path.stem, numbers.get(_number(path)))
        if place is None or place in found:
            others.append(path)
        else:
            found[place] = path
    return found, others


def _files(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(pattern, path.name, re.IGNORECASE)]
    return sorted(path for path in found if not path.name.startswith("."))


def training_videos(root: Path) -> list[list[Path]]:
    """Frames of every folder of JPEGs below `root` (YouTube-VOS's and -VIS's train/JPEGImages, DAVIS's 480p).

    UserError when there is none.
    """
    folders = sorted(folder for folder, _ in walk(root)) if root.is_dir() else []
    videos = [frames for folder in folders if (frames := _files(folder, r".*\.(jpg|jpeg)"))]
    if not videos:
        raise UserError(f"{root}: no folder of *.jpg frames here; expected VIDEO/00000.jpg, ... (--data_dir)")
    return videos


def read_frame(path: Path, size: tuple[int, int]) -> Tensor:
    """[3, H, W] in 0..1, stretched to (H, W); (-1, -1): its own size, cut to multiples of 8 by scaling."""
    rgb: Any = np.asarray(load_image(path), np.float32) / 255
    height, width = size if size[0] > 0 else (rgb.shape[0] // 8 * 8, rgb.shape[1] // 8 * 8)
    if rgb.shape[:2] != (height, width):
        rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)


def read_video(frames: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """[T, 3, H, W] in 0..1. UserError for a frame of another size where `size` keeps the frames' own."""
    out = [read_frame(path, size) for path in frames]
    odd = next((path for path, x in zip(frames, out) if x.shape != out[0].shape), None)
    if odd is not None:
        raise UserError(f"{odd}: another size than {frames[0].name}; give a --resolution")
    return torch.stack(out)


def normalise(x: Tensor, norm: str) -> Tensor:
    """[..., 3, H, W] in 0..1 by the statistics of `norm`."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in NORMS[norm])
    return (x - mean) / std


def read_mask(path: Path, binary: bool) -> np.ndarray:
    """Object numbers [H, W] uint8 of an annotation, 255: void; palette files give their indices.

    UserError for a picture in colours, which do not say which object is which; one in black and white alone is read.
    """
    mask = np.asarray(load_image(path, None))
    if mask.ndim == 3 and (mask[..., :1] == mask[..., :3]).all() and set(np.unique(mask[..., 0])) <= {0, 255}:
        mask = mask[..., 0]
    if mask.ndim != 2 or mask.max(initial=0) > 255:
        raise UserError(
            f"{path}: colours, or numbers above 255, where numbers of objects are expected; convert it to a palette or "
            "grey PNG (mode P or L) of these numbers, or of 0 and 255"
        )
    return (mask > 0).astype(np.uint8) if binary else mask.astype(np.uint8)


def clip_indices(length: int, frames: int, gap: int, rng: random.Random | None = None) -> list[int]:
    """Frames centre - gap, centre, centre + gap of a video; the gap shrinks until they fit, to 0 if need be."""
    half = frames // 2
    while gap > 0 and 2 * gap * half >= length - 1:
        gap -= 1
    centre = (rng or random).randint(gap * half, max(gap * half, length - gap * half - 1))  # type: ignore[union-attr]
    return [centre + gap * (i - half) for i in range(frames)]


class ClipAugment:
    """The release's augmentation, the same for all frames of a clip: grey, colour jitter, blur, normalisation.

    One blur sigma from U(.1, 2) for the whole run, as released. Randomness comes from the global generators.
    """

    def __init__(self, size: tuple[int, int], seed: int, on: bool = True):
        self.on = on
        self.kernel = [int(0.1 * side) // 2 * 2 + 1 for side in (size[1], size[0])]  # (x, y)
        self.sigma = random.Random(mix_key(seed, 7)).uniform(0.1, 2.0)
        self.jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)

    def __call__(self, clip: Tensor) -> Tensor:
        """[T, 3, H, W] in 0..1 -> normalised, same shape."""
        if self.on:
            if random.random() < 0.2:
                clip = TF.rgb_to_grayscale(clip, 3)
            if random.random() < 0.8:
                clip = self.jitter(clip)
            if random.random() < 0.5:
                clip = TF.gaussian_blur(clip, self.kernel, [self.sigma, self.sigma])
        return normalise(clip, "imagenet")


class Clips(Dataset):
    """`items` virtual clips [T, 3, H, W]: a random video, a random centre (see `clip_indices`).

    `cache` decodes and resizes every frame now, to 8 bits, and keeps them in memory.
    """

    def __init__(
        self, videos: list[list[Path]], items: int, frames: int, gap: int, size: tuple[int, int], augment: ClipAugment,
        cache: bool = False,
    ):  # fmt: skip
        self.videos, self.items, self.frames, self.gap, self.size = videos, items, frames, gap, size
        self.augment = augment
        self.stored = [self._decode(video) for video in videos] if cache else None

    def _decode(self, video: list[Path]) -> Tensor:
        return torch.stack([(read_frame(path, self.size) * 255).round().byte() for path in video])

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> Tensor:
        number = random.randrange(len(self.videos))
        chosen = clip_indices(len(self.videos[number]), self.frames, self.gap)
        if self.stored is not None:
            clip = self.stored[number][chosen].float() / 255
        else:
            clip = read_video([self.videos[number][i] for i in chosen], self.size)
        return self.augment(clip)
