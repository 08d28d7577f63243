"""Videos as folders of frames: the layouts of the benchmarks, clips for training, whole sequences for inference."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from shared_utils import UserError
from shared_utils.augment import MEAN, STD
from shared_utils.data import EXTENSIONS, load_image, mix_key, read_text, subfolders, walk
from shared_utils.evaluation import available_memory
from uvos_dino import video

NORMS = {
    "imagenet": (MEAN, STD),
    "release": ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)),  # Kinetics: the release's inference alone
}
JPEG = {".jpg", ".jpeg"}
LABEL_MAP = "label maps (.png)"  # as the preflight counts them
IMAGES, FILMS = (rf".*({'|'.join(map(re.escape, sorted(kinds)))})" for kinds in (EXTENSIONS, video.ENDINGS))
READ = f"{IMAGES}|{FILMS}"


class Layout(NamedTuple):
    """Where a benchmark keeps things, below its root; {split} is filled in."""

    frames: str
    masks: tuple[str, ...]  # the first that exists
    lists: tuple[str, ...]  # files of sequence names; the first that exists
    binary: bool  # one object; else the value is the object and 255 is void
    late: str  # objects that are not in the first annotated frame, see `LATE`
    whole: bool = False  # where there are no lists at all, the folder is the set (the split has a folder, or is none)
    frame: str = r".*\.(jpg|jpeg|png|bmp)"
    mask: str = r".*\.png"


# What an object that enters after the first annotated frame counts: `background` (davis2017-evaluation takes numbers
# up to the largest of the first annotation), `entered` (its frames from the first that has it), `frames` (all annotated
# frames, also those before it; the sets with one object).
LATE = ("background", "entered", "frames")
ALL = "all"  # the split of every folder of frames, whatever the lists say
LAYOUTS = {
    # The archive of 2016 has pairs of files in ImageSets/480p (and the same in 1080p), that of 2017 the names of its
    # 2016 sequences in ImageSets/2016.
    "DAVIS": Layout(
        "JPEGImages/480p", ("Annotations/480p",),
        ("ImageSets/2016/{split}.txt", "ImageSets/480p/{split}.txt", "ImageSets/1080p/{split}.txt"), True, "frames",
    ),
    # The test sets of the unsupervised task are lists of 2019.
    "DAVIS2017": Layout(
        "JPEGImages/480p", ("Annotations_unsupervised/480p", "Annotations/480p"),
        ("ImageSets/2019/{split}.txt", "ImageSets/2017/{split}.txt"), False, "background",
    ),
    "FBMS": Layout("FBMS", ("FBMS_annotation", "Annotations"), ("ImageSets/{split}.txt",), True, "frames"),
    "STv2": Layout(
        "STv2_img/JPEGImages", ("STv2_gt&pred/STv2_gt/GroundTruth",), ("ImageSets/{split}.txt",), True, "frames", True,
        mask=r".*\.(png|bmp|jpg|jpeg)",
    ),
    "YTVIS": Layout(
        "{split}/JPEGImages", ("{split}/Annotations",), ("ImageSets/{split}.txt",), False, "entered", True
    ),
    # Frames and annotations lie in one folder, with flow and depth: a name that is not UTF-8 tells none of them, and
    # counts as an annotation, which then belongs to no frame.
    "MOVi": Layout(
        "{split}", ("{split}",), ("ImageSets/{split}.txt",), False, "entered", True, r"rgba?_\d+\.(png|jpg)",
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


def read_names(file: Path) -> list[str]:
    """Sequences of a list, each once, in its order: a name a line, or files of the sequence (DAVIS-2016: a frame and
    its annotation), whose folder has its name.
    """
    names = []
    for line in read_text(file, "a sequence a line").splitlines():
        line = line.strip().replace("\\", "/")
        first = line.split()[0] if line else ""
        if "/" in first and Path(first).suffix:
            names.append(Path(first).parts[-2])
        elif line:
            names.append(Path(line).parts[-1])
    return list(dict.fromkeys(names))


def _names(root: Path, dataset: str, split: str) -> tuple[list[str], str]:
    """Sequences of a split, and where their names come from. UserError for a split that no list names."""
    layout = LAYOUTS[dataset]
    folder = root / layout.frames.format(split=split)
    files = [root / name.format(split=split) for name in layout.lists]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        return read_names(file), f"named by {file}"
    there = sorted({other.stem for file in files for other in file.parent.glob("*.txt") if other.name[0] != "."})
    if not folder.is_dir() or (layout.whole and not there) or split == ALL:
        return (subfolders(folder, "sequence") if folder.is_dir() else []), f"every folder of {folder}"
    what = f"choose from {', '.join(there)}" if there else f"expected {files[0]}, from the publisher's archive"
    raise UserError(f"--split {split}: {root} has no list of that name; {what}, or give {ALL}: every sequence")


def said(dataset: str, root: Path, split: str, videos: Sequence[Video]) -> str:
    """What was taken, in a line."""
    names, source = _names(root, dataset, split)
    annotated = sum(len(video.masks) for video in videos)
    return (
        f"{dataset} in {root}, split {split}: {len(videos)} of {len(names)} sequences ({source}), {annotated} "
        f"annotated frames of {sum(len(video.frames) for video in videos)}"
    )


def open_videos(dataset: str, root: Path, split: str, only: Sequence[str] = ()) -> list[Video]:
    """The sequences of a benchmark in the order of its list.

    Raises:
        UserError: no sequence, a split without its list, a sequence without frames or annotations, or a name of `only`
            that is not there.
    """
    layout = LAYOUTS[dataset]
    frames_in = root / layout.frames.format(split=split)
    candidates = [root / name.format(split=split) for name in layout.masks]
    masks_in = next((folder for folder in candidates if folder.is_dir()), candidates[0])
    names, source = _names(root, dataset, split)
    if not names:
        raise UserError(f"{root}: no {dataset} here; expected {frames_in}/SEQUENCE/*.jpg and {masks_in}/SEQUENCE/*.png")
    if unknown := sorted(set(only) - set(names)):
        raise UserError(f"--sequences {unknown[0]}: not in {dataset} {split}; there are {', '.join(names[:4])}, ...")
    videos = []
    for name in only or names:
        frames = files_of(frames_in / name, layout.frame)
        if not frames:
            raise UserError(f"{frames_in / name}: no frames; expected 00000.jpg, 00001.jpg, ... ({source})")
        masks, others = by_frame(files_of(masks_in / name, layout.mask), frames)
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

    A file belongs to the frame of its name (00003.png), else to the one whose name is a number in its own
    (00003_object1.png), else to that of the last number in its name (SegTrack-v2, MOVi), where a single frame has it.
    """
    names = {path.stem: i for i, path in enumerate(frames)}
    counts = Counter(_number(path) for path in frames)
    numbers = {number: i for i, path in enumerate(frames) if counts[number := _number(path)] == 1}
    numbers.pop(None, None)
    found: dict[int, Path] = {}
    others = []
    for path in files:
        parts = {names[part] for part in re.findall(r"\d+", path.stem) if part in names}
        whole = parts.pop() if len(parts) == 1 else numbers.get(_number(path))
        place = names.get(path.stem, whole)
        if place is None or place in found:
            others.append(path)
        else:
            found[place] = path
    return found, others


def natural_order(path: Path) -> tuple[Any, ...]:
    """Key that sorts names by the numbers in them: 2 before 10, with and without leading zeros."""
    parts = re.split(r"(\d+)", path.name)  # text, number, text, ...
    return [(part, 0) if i % 2 == 0 else ("", int(part)) for i, part in enumerate(parts)], path.name


def files_of(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder whose whole name matches, in natural order, hidden ones aside; none where it is missing."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(pattern, path.name, re.IGNORECASE)]
    return sorted((path for path in found if not path.name.startswith(".")), key=natural_order)


def training_videos(root: Path, unread: Counter[str] | None = None) -> list[list[Path]]:
    """Frames of every folder of images below `root` (YouTube-VOS's and -VIS's train/JPEGImages, DAVIS's 480p, one's
    own), and every video file, as a list of that file alone.

    Label maps are left out: palette or grey PNGs in a folder of their own, where other folders hold JPEGs, and PNGs
    under the name of a JPEG beside them. `unread` counts them, and other files by their endings.

    UserError when there is neither.
    """
    jpegs: list[list[Path]] = []  # folders with JPEGs in them
    others: list[list[Path]] = []
    films: list[list[Path]] = []
    left = Counter[str]()
    for folder, there in sorted(walk(root)) if root.is_dir() else []:
        files = files_of(folder, IMAGES)
        left.update(path.suffix.lower() for path in map(Path, there) if not re.fullmatch(READ, path.name, re.I))
        names = {path.stem for path in files if path.suffix.lower() in JPEG}
        frames = [path for path in files if path.suffix.lower() in JPEG or path.stem not in names]
        left.update({LABEL_MAP: len(files) - len(frames)})
        if frames:
            (jpegs if names else others).append(frames)
        films += [[path] for path in files_of(folder, FILMS)]
    maps = [frames for frames in others if jpegs and _is_map(frames[0])]
    left.update({LABEL_MAP: sum(map(len, maps))})
    if unread is not None:
        unread.update(+left)
    videos = jpegs + [frames for frames in others if frames not in maps] + films
    if not videos:
        raise UserError(
            f"{root}: no folder of frames and no video here; expected VIDEO/00000.jpg, ... or VIDEO.mp4 (--data_dir)"
        )
    return sorted(videos, key=source_of)


def _is_map(path: Path) -> bool:
    """Whether a PNG holds numbers or grey levels."""
    try:
        with Image.open(path) as image:
            return image.format == "PNG" and image.mode in ("1", "L", "P", "I", "I;16")
    except (OSError, ValueError, SyntaxError):  # for the reader to judge
        return False


def source_of(files: Sequence[Path]) -> Path:
    """The folder of a training video, or the file."""
    return files[0] if video.is_video(files[0]) else files[0].parent


def name_of(files: Sequence[Path]) -> str:
    """Of a training video, without a file's ending."""
    return files[0].stem if video.is_video(files[0]) else files[0].parent.name


def decoded(videos: Sequence[list[Path]], size: tuple[int, int], every: int = 1) -> list[Tensor]:
    """Every so many-th frame of the videos in memory, 8 bits [T, 3, H, W] each.

    UserError where they would take more than half of the memory that is available.
    """
    frame, room = 3 * size[0] * size[1], available_memory() / 2
    count = sum(len(files[::every]) for files in videos)

    def check() -> None:
        if count * frame > room:
            raise UserError(
                f"{count} images of {size[0]} x {size[1]} take {count * frame / 2**30:.3g} GiB or more, more than half "
                "of what is available; give a smaller size, fewer videos, or --every where there is such a flag"
            )

    check()
    out = []
    for files in videos:
        if video.is_video(files[0]):
            some = islice(video.pictures(files[0]), 0, None, every)
            out.append(torch.stack([(fit(rgb, size, 1, files[0]) * 255).round().byte() for rgb in some]))
            count += len(out[-1]) - 1
            check()
        else:
            out.append(torch.empty(len(files[::every]), 3, *size, dtype=torch.uint8))
            for x, path in zip(out[-1], files[::every]):
                x.copy_((read_frame(path, size) * 255).round())
    return out


def read_frame(path: Path, size: tuple[int, int], patch: int = 8) -> Tensor:
    """[3, H, W] in 0..1, see `fit`. UserError for a frame that is smaller than a patch."""
    return fit(np.asarray(load_image(path)), size, patch, path)


def fit(rgb: np.ndarray, size: tuple[int, int], patch: int, path: Path) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] in 0..1, stretched to `size`; (-1, -1): its own size, cut to multiples of `patch`
    by scaling. UserError naming `path` where it is smaller than a patch.
    """
    height, width = size if size[0] > 0 else (rgb.shape[0] // patch * patch, rgb.shape[1] // patch * patch)
    if not height or not width:
        raise UserError(f"{path}: {rgb.shape[0]} x {rgb.shape[1]} pixels are less than a patch of {patch}")
    x: Any = np.divide(rgb, 255, dtype=np.float32)
    if x.shape[:2] != (height, width):
        x = cv2.resize(x, (width, height), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)


def read_video(frames: Sequence[Path], size: tuple[int, int], patch: int = 8) -> Tensor:
    """[T, 3, H, W] in 0..1, see `read_frame`. UserError where frames keep their own size and one has another."""
    out = [read_frame(path, size, patch) for path in frames]
    odd = next((path for path, x in zip(frames, out) if x.shape != out[0].shape), None)
    if odd is not None:
        raise UserError(f"{odd}: another size than {frames[0].name}; give a --resolution")
    return torch.stack(out)


def normalise(x: Tensor, norm: str) -> Tensor:
    """[..., 3, H, W] in 0..1 by the statistics of `norm`."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in NORMS[norm])
    return (x - mean) / std


HALF = 128  # a mask in grey levels is cut here


def brightness(maps: Sequence[np.ndarray]) -> bool:
    """Whether 8-bit grey maps [H, W] of a video hold brightness, to be cut at half, rather than numbers of objects.

    Numbers fill areas. In-between levels of a scaled, antialiased or compressed black and white mask lie on edges, and
    a soft map has slopes, so few of their pixels have the level of all eight neighbours. Black and white alone is
    brightness; numbers up to 16 alone are numbers.
    """
    levels = np.flatnonzero(sum(np.bincount(x.ravel(), minlength=256) for x in maps))
    if levels.max(initial=0) <= 16:
        return False
    low = 16 if ((levels > 16) & (levels < 250)).any() else 0
    flat = between = 0
    for x in maps:
        inside = (x > low) & (x < 250)
        flat += int((inside & (cv2.erode(x, np.ones((3, 3))) == cv2.dilate(x, np.ones((3, 3))))).sum())
        between += int(inside.sum())
    return flat < between * (0.5 if len(levels) > 64 else 0.1) or not between


def read_stored(path: Path) -> tuple[np.ndarray, str]:
    """Stored numbers [H, W] uint8 of a picture (palette files: indices), and what they are.

    Returns: `numbers` (palette, or less than 8 bits), `grey` (8 bits: numbers or brightness, see `brightness`) or
    `light` (JPEG, or RGB in black and white: brightness).

    UserError for a picture in colours, which do not say which object is which.
    """
    image = load_image(path, None)
    pixels = np.asarray(image)
    lossy = image.format in ("JPEG", "MPO")
    if image.mode in ("LA", "PA"):
        pixels = pixels[..., 0]
    if image.mode == "L" and image.format == "PNG":  # PIL stretches 2 and 4 bits to 0..255
        with open(path, "rb") as handle:
            depth = handle.read(25)[24]
        if depth < 8:
            return pixels // (255 // (2**depth - 1)), "numbers"
    if pixels.ndim == 3 and (np.ptp(pixels[..., :3].astype(np.int16), -1) <= 16 * lossy).all():
        grey = pixels[..., 1]
        if lossy or brightness([grey]):
            return grey, "light"
    if pixels.ndim != 2 or pixels.max(initial=0) > 255:
        raise UserError(
            f"{path}: colours, or numbers above 255, where numbers of objects are expected; convert it to a palette or "
            "grey PNG (mode P or L) of these numbers, or of 0 and 255"
        )
    kind = "light" if lossy else "grey" if image.mode in ("L", "LA") else "numbers"
    return pixels.astype(np.uint8), kind


def read_mask(path: Path, binary: bool) -> np.ndarray:
    """Object numbers [H, W] uint8 of an annotation, 255: void; palette files give their indices.

    Binary sets: 1 where a grey mask is at least half white (see `brightness`), or where a number is above 0.

    UserError for a picture in colours, and for a soft or compressed one where objects have numbers.
    """
    pixels, kind = read_stored(path)
    soft = kind == "light" or (kind == "grey" and brightness([pixels]))
    if binary:
        return (pixels >= HALF if soft else pixels > 0).astype(np.uint8)
    levels = np.unique(pixels)
    if soft and (kind == "light" or len(levels) > 32) and not set(levels) <= {0, 255}:
        raise UserError(
            f"{path}: in-between grey values of a scaled, soft or JPEG mask, where numbers of objects are expected; "
            "write it anew from the numbers, without scaling them or with the nearest pixel"
        )
    return pixels


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

    Video files are decoded now, to 8 bits at `size`, and kept in memory; with `cache` all frames are.
    """

    def __init__(
        self, videos: list[list[Path]], items: int, frames: int, gap: int, size: tuple[int, int], augment: ClipAugment,
        cache: bool = False,
    ):  # fmt: skip
        self.videos, self.items, self.frames, self.gap, self.size = videos, items, frames, gap, size
        self.augment = augment
        numbers = [i for i, files in enumerate(videos) if cache or video.is_video(files[0])]
        self.stored = dict(zip(numbers, decoded([videos[i] for i in numbers], size)))  # number of the video: frames
        self.lengths = [len(self.stored.get(i, files)) for i, files in enumerate(videos)]

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> Tensor:
        number = random.randrange(len(self.videos))
        chosen = clip_indices(self.lengths[number], self.frames, self.gap)
        if number in self.stored:
            clip = self.stored[number][chosen].float() / 255
        else:
            clip = read_video([self.videos[number][i] for i in chosen], self.size)
        return self.augment(clip)
