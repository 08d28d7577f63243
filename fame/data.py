"""Video sets in their publishers' layouts, and the clips that training and testing take from them."""

import argparse
import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fame import augment
from fame.video import BESIDE, SUFFIXES, BadVideo, Index, Video, read, scan
from shared_utils import UserError, distributed
from shared_utils.data import EXTENSIONS, is_helper, need_folder, read_text, subfolders, walk
from shared_utils.flags import natural, positive, runs_root


def add_data_flags(p: argparse.ArgumentParser) -> None:
    a = p.add_argument
    a("data", nargs="?", type=Path, default=Path(os.environ.get("DATA_ROOT", "data")), help="folder of the set")
    a("--dataset", choices=list(DATASETS), default="ucf101", help="layout of DATA (NOTES.md); folder: every video "
      "below it, no labels needed")  # fmt: skip
    a("--fold", type=positive, default=1, help="train and test lists 1 to 3")
    a("--target", default="class", help="what is a video's label: class, or a column of the set's attributes.csv or "
      "clips.csv, such as background or source_video")  # fmt: skip
    a("--per_class", type=natural, default=0, help="first so many training videos of each class; 0: all")
    a("-cs", "--crop_size", type=positive, default=112, help="S, pixels of a clip")
    a("-fpc", "--frame_per_clip", type=positive, default=16, help="T, frames of a clip")
    a("-sbc", "--step_between_clips", type=positive, default=1, help="frames between the starts of two possible clips")
    a("--stride", type=positive, default=2, help="every so many frames are taken (release: 2)")
    a("--min_scale", type=float, default=0.2, help="least area of a training crop")
    a("--hflip", type=float, default=0.5, help="probability of a flip in training")
    a("--cache", action="store_true", help="decode every video once and keep it in memory (small sets)")
    a("--cache_side", type=natural, default=0, help="short side of cached frames, smaller than stored; 0: as stored")
    a("--bad_videos", choices=["error", "skip"], default="error", help="unreadable and too short videos: stop, or go "
      "on without them; both name and count them")  # fmt: skip
    a("--index_cache", type=Path, default=runs_root() / "fame/video_index.pth", help="where pictures' checksums and "
      "the key frames of video files are kept, so that each file is decoded once to find them")  # fmt: skip


def check_data_flags(args: argparse.Namespace, split: bool = False) -> None:
    """UserError for flags out of range, and for a set without a test part where a `split` is needed."""
    if args.crop_size < 30:
        raise UserError(f"--crop_size {args.crop_size}: at least 30, below it the mask's Gaussian has a single tap")
    if not 0 < args.min_scale <= 1 or not 0 <= args.hflip <= 1:
        raise UserError("--hflip must lie in 0..1, and --min_scale above 0 and up to 1")
    if not 1 <= args.fold <= 3:
        raise UserError(f"--fold {args.fold}: the lists are numbered 1 to 3")
    if not DATASETS[args.dataset].split:
        if split:
            known = ", ".join(name for name, layout in DATASETS.items() if layout.split)
            raise UserError(
                f"--dataset {args.dataset} has no training and test part, and this needs them; lay the videos out as "
                f"{DATASETS['k400'].expected} for --dataset k400, or give another of {known}"
            )
        if args.target != "class" or args.per_class:
            raise UserError(f"--dataset {args.dataset} takes every video: leave --target and --per_class away")
    need_folder(args.data, f"expected {DATASETS[args.dataset].expected} in it")


# -------------------------------------------------------------------------------------------------------------- layouts
Listed = list[tuple[Path, str, str]]  # path, class, key in the table of attributes


def _first(root: Path, names: tuple[str, ...], dataset: str) -> Path:
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(f"{root}: has no {' or '.join(names)}; {dataset} is expected as {DATASETS[dataset].expected}")


def _stored(path: Path) -> Path:
    """The file, or the folder of frames of the same name without its suffix."""
    return path.with_suffix("") if not path.exists() and path.with_suffix("").is_dir() else path


def videos_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """Videos of a class folder, sorted: files, and folders of frames; and what else lies there, hidden entries aside.

    A folder beside the video file of its name holds that video's frames or flow, and is not a second video.
    """
    entries = sorted(entry for entry in folder.iterdir() if not is_helper(entry.name))
    files = {entry.stem for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.is_dir()}
    videos: list[Path] = []
    others: list[Path] = []
    for entry in entries:
        if entry.is_dir():
            taken = entry.name not in files and not BESIDE.fullmatch(entry.name)
        else:
            taken = entry.suffix.lower() in SUFFIXES
        (videos if taken else others).append(entry)
    return videos, others


def _rows(file: Path, expected: str) -> Iterator[tuple[int, str, list[str]]]:
    """Number, name and what follows it of each line of a list: the last word is a label if it is a number.

    Names may hold blanks, and be written with a path before CLASS/NAME, absolute or not, or with backslashes.
    """
    for number, line in enumerate(read_text(file, expected).splitlines(), 1):
        words = line.strip().rsplit(None, 1)
        if words:
            label = words[1:] if words[-1].isdecimal() else []
            yield number, (words[0] if label else line.strip()).replace("\\", "/"), label


def list_k400(root: Path, train: bool, fold: int, unread: Counter[str]) -> tuple[Listed, list[str]]:
    folder = _first(root, ("train",) if train else ("val", "test"), "k400")
    present = classes = subfolders(folder)
    if not train and (root / "train").is_dir():  # labels are numbered by the training classes
        classes = subfolders(root / "train")
        if new := sorted(set(present) - set(classes)):
            raise UserError(f"{folder / new[0]}: {root / 'train'} has no such class")
    found: Listed = []
    for name in present:
        videos, others = videos_of(folder / name)
        unread.update("folders" if path.is_dir() else path.suffix.lower() or "without suffix" for path in others)
        if not videos:
            raise UserError(
                f"{folder / name}: a class without videos ({', '.join(sorted(SUFFIXES))}, or folders); add "
                "some, or remove it"
            )
        found += [(path, name, f"{name}/{path.name}") for path in videos]
    return found, classes


def list_ucf101(root: Path, train: bool, fold: int, unread: Counter[str]) -> tuple[Listed, list[str]]:
    folder = _first(root, ("data", "UCF-101"), "ucf101")
    lists = _first(root, ("anno", "ucfTrainTestlist"), "ucf101")
    file = lists / f"{'train' if train else 'test'}list{fold:02d}.txt"
    classes, found = subfolders(folder), []
    for number, path, _ in _rows(file, f"{DATASETS['ucf101'].expected}; give another --fold if there is no such list"):
        key = "/".join(PurePosixPath(path).parts[-2:])
        name = key.split("/")[0]
        if name not in classes or name == key:
            raise UserError(
                f"{file}, line {number}: {path} is of no class folder of {folder}; add it, or restore the list"
            )
        found.append((_stored(folder / key), name, key))
    return found, classes


def list_hmdb51(root: Path, train: bool, fold: int, unread: Counter[str]) -> tuple[Listed, list[str]]:
    folder = _first(root, ("data", "hmdb51_org"), "hmdb51")
    lists = _first(root, ("anno", "testTrainMulti_7030_splits"), "hmdb51")
    classes, found = subfolders(folder), []
    end = f"_test_split{fold}.txt"
    if lost := sorted(path for path in lists.glob(f"*{end}") if path.name.removesuffix(end) not in classes):
        raise UserError(f"{lost[0]}: {folder} has no folder of this class; restore it, or remove the list")
    for name in classes:
        file = lists / f"{name}{end}"
        for number, path, label in _rows(file, DATASETS["hmdb51"].expected):
            if label not in (["0"], ["1"], ["2"]):
                raise UserError(f"{file}, line {number}: expected a video and 0, 1 or 2, found {path!r}; restore it")
            if label == ["1" if train else "2"]:  # 0: in neither
                video = PurePosixPath(path).name
                found.append((_stored(folder / name / video), name, f"{name}/{video}"))
    return found, classes


def list_diving48(root: Path, train: bool, fold: int, unread: Counter[str]) -> tuple[Listed, list[str]]:
    folder = _first(root, ("rgb", "data"), "diving48")
    part = "train" if train else "test"
    file = _first(root, (f"Diving48_V2_{part}.json", f"Diving48_{part}.json"), "diving48")
    try:
        entries = [
            (str(row["vid_name"]), int(row["label"]))
            for row in json.loads(read_text(file, DATASETS["diving48"].expected))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a list of vid_name and label ({error}); restore it") from None
    for name, label in entries:
        if not 0 <= label < 48:
            raise UserError(f"{file}: {name} has the label {label}; diving48 numbers its classes 0 to 47")
    labels: dict[str, int] = {}
    for name, label in entries:
        if labels.setdefault(name, label) != label:
            raise UserError(f"{file}: {name} has the labels {labels[name]} and {label}; restore it")
    classes = [f"{label:02d}" for label in range(48)]
    return [(_stored(folder / f"{name}.mp4"), classes[label], name) for name, label in entries], classes


def list_fight(root: Path, train: bool, fold: int, unread: Counter[str]) -> tuple[Listed, list[str]]:
    """Split by source: every third source is tested, fold says which; clips of unknown source are in neither part."""
    rows = _attributes(root, "fight")
    for key, row in rows.items():
        if not row.get("class") or not (row.get("source_video") or "").removeprefix("-").isdecimal():
            raise UserError(f"{root / 'clips.csv'}: {key} needs a class and a source_video, a number (-1: unknown)")
    sources = sorted({int(row["source_video"]) for row in rows.values()} - {-1})
    tested = set(sources[fold - 1 :: 3])
    found = [
        (root / row["class"] / (row.get("path") or row["clip"]), row["class"], key)
        for key, row in rows.items()
        if int(row["source_video"]) >= 0 and (int(row["source_video"]) in tested) != train
    ]
    return found, sorted({row["class"] for row in rows.values()})


def list_folder(root: Path, train: bool, fold: int, unread: Counter[str]) -> tuple[Listed, list[str]]:
    """Every video below `root`: files, and folders that hold pictures and no video file.

    Its class is the folder right below `root`, where there are several and each video is in one; else there are none.
    Folders and pictures beside the videos (flow, thumbnails, posters), and the frames of a video file, are none.
    """
    paths: list[Path] = []
    taken: set[str] = set()  # video files without their suffix, whose frames may lie in a folder of that name
    for folder, files in sorted(walk(root)):
        if folder != root and (str(folder) in taken or BESIDE.fullmatch(folder.name)):
            continue
        kinds = {name: Path(name).suffix.lower() for name in files}
        videos = sorted(name for name in files if kinds[name] in SUFFIXES)
        pictures = [name for name in files if kinds[name] in EXTENSIONS]
        if pictures and not videos and not all(BESIDE.fullmatch(Path(name).stem) for name in pictures):
            paths.append(folder)
            continue
        paths += [folder / name for name in videos]
        taken |= {str((folder / name).with_suffix("")) for name in videos}
        unread.update(kinds[name] or "without suffix" for name in files if name not in videos)
    keys = [path.relative_to(root) for path in paths]
    classes = sorted({key.parts[0] for key in keys})
    if len(classes) < 2 or any(len(key.parts) < 2 for key in keys):
        classes = []
    return [(path, key.parts[0] if classes else "", key.as_posix()) for path, key in zip(paths, keys)], classes


@dataclass(frozen=True)
class Layout:
    """How a dataset lies on the disk, and what the release takes for it.

    Attributes:
        expected: the layout in words, for messages.
        read: (root, train, fold, counter of files that are no videos) -> the videos of that part, names of the classes.
        queue: K where --moco_k is not given.
        split: whether it has a training and a test part, with the same classes. Without, every video is in both,
            training tells nothing of classes, and evaluations leave each video out in turn.
    """

    expected: str
    read: Callable[[Path, bool, int, Counter[str]], tuple[Listed, list[str]]]
    queue: int = 2048
    split: bool = True


DATASETS = {
    "k400": Layout("train/CLASS/*.mp4 and val/CLASS/*.mp4", list_k400, queue=65536),
    "ucf101": Layout("data/CLASS/*.avi (or UCF-101/) and anno/trainlist01.txt (or ucfTrainTestlist/)", list_ucf101),
    "hmdb51": Layout("data/CLASS/*.avi and anno/CLASS_test_split1.txt (or testTrainMulti_7030_splits/)", list_hmdb51),
    "diving48": Layout("rgb/NAME.mp4 and Diving48_V2_train.json (or Diving48_train.json)", list_diving48),
    "fight": Layout("clips.csv and CLASS/CLIP/*.jpg", list_fight),
    "folder": Layout("videos, or folders of frames, anywhere below it", list_folder, split=False),
}


def _attributes(root: Path, dataset: str) -> dict[str, dict[str, str]]:
    """{path or clip: row} of the set's table."""
    file = _first(root, ("clips.csv", "attributes.csv"), dataset)
    reader = csv.DictReader(read_text(file, DATASETS[dataset].expected).splitlines())
    table = [{name: (cell or "").strip() for name, cell in row.items() if name is not None} for row in reader]
    keys = [row.get("path") or row.get("clip") or "" for row in table]
    if not keys or "" in keys:
        raise UserError(f"{file}: a table with a column `path` or `clip` is expected, and a row for each video")
    repeated = {key for key, count in Counter(keys).items() if count > 1}  # clips of one name in several classes
    keys = [f"{row.get('class', '')}/{key}" if key in repeated else key for row, key in zip(table, keys)]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise UserError(f"{file}: {twice[0]} has more than one row; remove all but one")
    return dict(zip(keys, table))


def listing(
    root: Path,
    dataset: str,
    train: bool,
    fold: int = 1,
    target: str = "class",
    unread: Counter[str] | None = None,
) -> tuple[Listed, list[str]]:
    """Videos (path, label's name, key) of one part of a set and the labels' names, sorted.

    `unread` counts what lies between the videos and is none, by suffix.

    With a `target` other than class the labels are that column of the set's table. A column whose values are tied to
    one part of the split (sources of the fight clips) is split inside each value instead: every third video tests.
    UserError names the file or folder that is not as expected, and a video that a list names twice.
    """
    read = DATASETS[dataset].read
    found, classes = read(root, train, fold, Counter() if unread is None else unread)
    if target != "class":
        table = _attributes(root, dataset)
        columns = next(iter(table.values())).keys()
        if target not in columns:
            raise UserError(f"--target {target}: no such column in the table of {root}; it has {', '.join(columns)}")
        other, _ = read(root, not train, fold, Counter())
        if absent := [key for _, _, key in found + other if not table.get(key, {}).get(target)]:
            raise UserError(f"--target {target}: the table of {root} says nothing of {absent[0]}")
        here, there = ({table[key][target] for _, _, key in part} for part in (found, other))
        if not here & there:
            everything = sorted(found + other, key=lambda row: row[2])
            counts = Counter(table[key][target] for _, _, key in everything)
            seen: Counter[str] = Counter()
            found = []
            for row in everything:
                value = table[row[2]][target]
                seen[value] += 1
                if counts[value] >= 3 and (seen[value] % 3 == 0) != train:
                    found.append(row)
            here = {table[key][target] for _, _, key in found}
            there = here
        found = [(path, table[key][target], key) for path, _, key in found]
        classes = sorted(here | there)
    times = Counter(path for path, *_ in found)
    if twice := [key for path, _, key in found if times[path] > 1]:
        raise UserError(
            f"{root}: the {'train' if train else 'test'} part of {dataset} has {twice[0]} twice; restore its list, "
            f"expected {DATASETS[dataset].expected}"
        )
    if not found:
        part, expected = "train" if train else "test", DATASETS[dataset].expected
        raise UserError(f"{root}: the {part} part of {dataset} is empty; expected {expected}")
    return found, classes


# ---------------------------------------------------------------------------------------------------------------- clips
@dataclass
class VideoSet:
    """Videos with integer labels, and where clips of `length` frames, `stride` apart, may start in them.

    Both are kept in arrays (`Index`; labels int64 [N], -1 without classes), which the loader's processes share.
    `unread` counts the files and folders between them that are no videos, by suffix.
    """

    videos: Sequence[Video]
    labels: Any
    classes: list[str]
    length: int
    stride: int
    step: int = 1
    frames: list[np.ndarray] = field(default_factory=list)  # decoded, if cached
    unread: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.videos, Index):
            self.videos = Index(self.videos)
        self.labels = np.asarray(self.labels, np.int64)

    def __len__(self) -> int:
        return len(self.videos)

    def subset(self, indices: list[int]) -> "VideoSet":
        """The videos of these numbers, decoded frames kept."""
        videos, labels = [self.videos[i] for i in indices], [self.labels[i] for i in indices]
        return replace(self, videos=videos, labels=labels, frames=[self.frames[i] for i in indices if self.frames])

    def count(self, index: int) -> int:
        """Frames of video `index`."""
        assert isinstance(self.videos, Index)  # for the type checker
        return int(self.videos.counts[index])

    def windows(self, index: int) -> int:
        """How many starts video `index` has."""
        return windows(self.count(index), self.length * self.stride, self.step)

    def clip(self, index: int, window: int) -> np.ndarray:
        """Frames [T, H, W, 3] uint8 of the clip that starts at `window` * step."""
        first = window * self.step
        at = range(first, first + self.length * self.stride, self.stride)
        return self.frames[index][list(at)] if self.frames else read(self.videos[index], at)


def windows(count: int, span: int, step: int) -> int:
    """Possible clips of `span` frames in a video of `count`, `step` frames between their starts."""
    return max(0, (count - span) // step + 1)


def open_videos(args: argparse.Namespace, train: bool, target: str | None = None, fold: int | None = None) -> VideoSet:
    """The train or test part that the flags name, scanned; bad and too short videos are named and counted.

    UserError: a layout that is not as expected, and with --bad_videos error the first bad video.
    """
    unread = Counter[str]()
    listed, classes = listing(Path(args.data), args.dataset, train, fold or args.fold, target or args.target, unread)
    if train and args.per_class:
        seen: Counter[str] = Counter()
        kept = []
        for row in listed:
            seen[row[1]] += 1
            kept += [row] if seen[row[1]] <= args.per_class else []
        listed = kept
    found = scan([path for path, _, _ in listed], args.index_cache, keep=distributed.rank() == 0)
    span = args.frame_per_clip * args.stride
    bad, videos, labels = [], [], []
    number = {name: y for y, name in enumerate(classes)}
    beside: Counter[str] = Counter()
    for (path, name, _), video in zip(listed, found):
        if isinstance(video, BadVideo):
            bad.append(str(video))
        elif not windows(video.count, span, 1):
            bad.append(f"{path}: {video.count} frames, a clip spans {span}")
        else:
            videos.append(video)
            labels.append(number[name] if classes else -1)
            beside.update(video.beside)
    if bad:
        what = f"{len(bad)} of {len(listed)} videos cannot be used; the first is {bad[0]}"
        what += "; a lower --stride or --frame_per_clip takes shorter ones" * ("a clip spans" in "".join(bad))
        if args.bad_videos == "error" or not videos:
            raise UserError(f"{what}; --bad_videos skip goes on without them")
        if distributed.rank() == 0:
            print("\n  skipped: ".join([f"  {what}", *bad]), flush=True)
    if beside and distributed.rank() == 0:
        some = ", ".join(f"{kind} ({n})" for kind, n in sorted(beside.items(), key=lambda row: (-row[1], row[0]))[:6])
        print(f"  {args.data}: pictures beside the frames are left out: {some}", flush=True)
    out = VideoSet(videos, labels, classes, args.frame_per_clip, args.stride, args.step_between_clips, unread=unread)
    if args.cache:
        side = args.cache_side
        small = (lambda frame: augment.shrink(frame[None], side)[0]) if side else None
        out.frames = [read(video, range(video.count), small) for video in videos]
    return out


def check_classes(videos: VideoSet, root: Path) -> None:
    """UserError unless there are classes of two videos and more: one is compared with the others."""
    if not videos.classes:
        raise UserError(f"{root}: no class folders, and this needs classes; put the videos of each into a folder of it")
    few = int(np.bincount(videos.labels, minlength=len(videos.classes)).argmin())
    if (videos.labels == few).sum() < 2:
        raise UserError(
            f"{root}: class {videos.classes[few]} has fewer than 2 videos that can be used; a video is compared with "
            "the others, so add some, or take the folder away"
        )


class TwoClips(Dataset):
    """Item i: two training clips of video i [2, 3, T, S, S] in [0, 1], and the colours' uniform numbers [2, 7].

    The clips' starts are drawn without replacement; a video with one start gives it twice. Draws come from the global
    generators (see `shared_utils.data.Keyed`).
    """

    def __init__(self, videos: VideoSet, size: int, min_scale: float = 0.2, flip: float = 0.5):
        self.videos, self.size, self.min_scale, self.flip = videos, size, min_scale, flip

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        starts = torch.randperm(self.videos.windows(index))[:2].tolist()
        clips = [
            augment.training_clip(self.videos.clip(index, start), self.size, self.min_scale, self.flip)
            for start in (starts * 2)[:2]
        ]
        return {"clips": torch.stack(clips), "colours": torch.rand(2, augment.DRAWS)}


class OneClip(Dataset):
    """Item i: a training clip of video i [3, T, S, S] in [0, 1], the colours' uniform numbers [7], its label."""

    def __init__(self, videos: VideoSet, size: int, min_scale: float = 0.2, flip: float = 0.5):
        self.videos, self.size, self.min_scale, self.flip = videos, size, min_scale, flip

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = int(torch.randint(self.videos.windows(index), ()))
        clip = augment.training_clip(self.videos.clip(index, start), self.size, self.min_scale, self.flip)
        return {"clip": clip, "colours": torch.rand(augment.DRAWS), "label": int(self.videos.labels[index])}


class TestClips(Dataset):
    """Item i: `clips` centre crops of video i at evenly spaced starts [clips, 3, T, S, S] in [0, 1], and its label."""

    __test__ = False  # not a test

    def __init__(self, videos: VideoSet, size: int, side: int, clips: int = 10):
        self.videos, self.size, self.side, self.clips = videos, size, side, clips

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        starts = torch.linspace(0, self.videos.windows(index) - 1, self.clips).floor().long().tolist()
        clips = [augment.testing_clip(self.videos.clip(index, start), self.size, self.side) for start in starts]
        return {"clips": torch.stack(clips), "label": int(self.videos.labels[index])}
