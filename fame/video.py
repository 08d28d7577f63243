"""Video clips from files (PyAV) and from folders of frames, without decoding more than a clip needs.

A frame's number is its place in what the decoder gives: time stamps need not rise, packets need not be pictures.
`scan` decodes every video once, in threads, and keeps how many pictures each has, a checksum of each and the times at
which it can be entered; `read` gives chosen frames and compares them with their checksums where it did not begin at
the start. PyAV is imported where a file is opened and nowhere else: folders of frames need none.
"""

import importlib.metadata
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import EXTENSIONS, is_helper, load_image

SUFFIXES = {
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg",
    ".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm",
    ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
}  # fmt: skip
INDEX_VERSION = 4  # of what `scan` keeps; 3 counted packets and took their times for an order
GAP = 4  # pictures between two places of entry, at the least: where every picture is a key frame, not all are kept
CHUNK = 8192  # files between two writes of the index: a scan that is stopped goes on from there
# Pictures that other tools put beside the frames of a video, by their names without numbers.
BESIDE = re.compile(
    r"((optical[ _-]?)?flow|thumb(nail)?s?|cover|poster|preview|folder|contact[ _-]?sheet)([ _.-].*)?|"
    r".*[ _.-](flow|thumb(nail)?|preview|poster|copy)",
    re.IGNORECASE,
)


Frame = Callable[[np.ndarray], np.ndarray]


class BadVideo(UserError):
    """A video that cannot be read."""


@dataclass
class Video:
    """A video and how to find its frames.

    Attributes:
        path: a file, or a folder of frames.
        count: pictures that the decoder gives, or frames of the folder.
        marks: checksums of the pictures' first planes, int32 [count]; None: read from the start, unchecked.
        keys: places of entry, int64 [K, 2]: time to seek, in the stream's units, and number of the picture there.
        names: file names of a folder's frames, in order.
        beside: kinds of pictures in the folder that are no frames, and how many of each.
    """

    path: Path
    count: int
    marks: np.ndarray | None = None
    keys: np.ndarray | None = None
    names: list[str] = field(default_factory=list)
    beside: dict[str, int] = field(default_factory=dict)


def natural(name: str) -> list[Any]:
    """Sort key under which img_2 comes before img_10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


# ------------------------------------------------------------------------------------------------------- many videos
class Ragged:
    """Arrays [n_i, ...] of one type, one after another in a single one."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray):
        self.flat, self.ends = flat, ends

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], empty: np.ndarray) -> "Ragged":
        return cls(np.concatenate([empty, *rows]), np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.ends[index] : self.ends[index + 1]]


class Index(Sequence[Video]):
    """Videos in eight arrays: the loader's processes share them, where a list of objects would be copied into each.

    `state` and `load` turn it into tensors and back.
    """

    def __init__(self, videos: Sequence[Video]):
        def letters(texts: Iterator[str]) -> Ragged:
            return Ragged.of([np.frombuffer(os.fsencode(text), np.uint8) for text in texts], np.empty(0, np.uint8))

        no_marks, no_keys = np.empty(0, np.int32), np.empty((0, 2), np.int64)
        self.counts = np.array([v.count for v in videos], np.int64)
        self.paths = letters(str(v.path) for v in videos)
        self.names = letters("\0".join(v.names) for v in videos)
        self.marks = Ragged.of([no_marks if v.marks is None else v.marks for v in videos], no_marks)
        self.keys = Ragged.of([no_keys if v.keys is None else v.keys for v in videos], no_keys)

    def __len__(self) -> int:
        return len(self.counts)

    def path(self, index: int) -> str:
        return os.fsdecode(self.paths[index].tobytes())

    def __getitem__(self, index: Any) -> Any:
        """One video, its arrays being parts of this; or those of a slice, as a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        marks, keys, names = self.marks[index], self.keys[index], self.names[index]
        return Video(
            Path(self.path(index)),
            int(self.counts[index]),
            marks if len(marks) else None,
            keys if len(keys) else None,
            os.fsdecode(names.tobytes()).split("\0") if len(names) else [],
        )

    def state(self) -> dict[str, torch.Tensor]:
        out = {"counts": torch.from_numpy(self.counts)}
        for name in ("paths", "names", "marks", "keys"):
            part = getattr(self, name)
            out |= {name: torch.from_numpy(part.flat), f"{name}_ends": torch.from_numpy(part.ends)}
        return out

    @classmethod
    def load(cls, state: dict[str, torch.Tensor]) -> "Index":
        out = cls([])
        out.counts = state["counts"].numpy()
        for name in ("paths", "names", "marks", "keys"):
            setattr(out, name, Ragged(state[name].numpy(), state[f"{name}_ends"].numpy()))
        return out


def _decoder() -> str:
    """What the pictures' order and number may depend on besides the file; "" without PyAV."""
    try:
        return importlib.metadata.version("av")
    except importlib.metadata.PackageNotFoundError:
        return ""


def scan(
    paths: Sequence[Path], cache: Path | None = None, threads: int = 8, keep: bool = True
) -> list[Video | BadVideo]:
    """`inspect` for many videos, each result or its error in their order; files that have not changed since they were
    written to `cache` are not opened again. Several processes share the work, so all of them have to call this, and
    one alone should `keep` what was found.

    UserError: PyAV is missing.
    """
    index, stamps = Index([]), np.empty((0, 2), np.int64)
    if cache is not None and cache.is_file():
        stored = checkpoint.load(cache)
        if isinstance(stored, dict) and (stored.get("version"), stored.get("decoder")) == (INDEX_VERSION, _decoder()):
            index, stamps = Index.load(stored["index"]), stored["stamps"].numpy()
    rows = {index.path(i): i for i in range(len(index))}
    found: list[Video | BadVideo | None] = [None] * len(paths)
    new = []
    for i, path in enumerate(paths):
        row = rows.get(str(path))
        if row is not None and stamps[row].tolist() == _stamp(path):
            found[i] = index[row]
        else:
            new.append(i)
    bar = _bar(len(new), keep)
    for first in range(0, len(new), CHUNK):
        part = new[first : first + CHUNK]
        mine = part[distributed.rank() :: distributed.world()]
        with ThreadPoolExecutor(threads) as pool:
            results = []
            for result in pool.map(_look, [paths[i] for i in mine]):
                results.append(result)
                bar.update(distributed.world())
        for rank, shared in enumerate(_gather(results)):
            for i, result in zip(part[rank :: distributed.world()], shared):
                found[i] = result
        fresh = [v for v in (found[i] for i in part) if isinstance(v, Video) and not v.names]
        if cache is not None and keep and fresh:
            replaced = {str(v.path) for v in fresh}
            old = [i for i in range(len(index)) if index.path(i) not in replaced]
            stamps = np.concatenate([stamps[old], np.array([_stamp(v.path) for v in fresh]).reshape(-1, 2)])
            index = Index([*(index[i] for i in old), *fresh])
            state = {"index": index.state(), "stamps": torch.from_numpy(stamps)}
            checkpoint.save(cache, {"version": INDEX_VERSION, "decoder": _decoder(), **state})
    bar.close()
    return [v for v in found if v is not None]


def _stamp(path: Path) -> list[int]:
    """Time and size of a file; [-1, -1] where it cannot be seen."""
    try:
        facts = path.stat()
    except OSError:
        return [-1, -1]
    return [facts.st_mtime_ns, facts.st_size]


def _look(path: Path) -> Video | BadVideo:
    try:
        return inspect(path) if path.exists() else BadVideo(f"{path}: no such video")
    except BadVideo as error:
        return error
    except OSError as error:
        return BadVideo(f"{path}: cannot be read ({error.strerror})")


def _gather(mine: list[Any]) -> list[list[Any]]:
    """The lists of all processes, in rank order."""
    out: list[Any] = [mine]
    if distributed.world() > 1:
        out = [None] * distributed.world()
        dist.all_gather_object(out, mine)
    return out


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="first look at the videos", disable=not shown or not sys.stderr.isatty(), leave=False)


# -------------------------------------------------------------------------------------------------------- one video
def _open(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise UserError(
            f"{path}: video files are decoded with PyAV: pip install av, or give folders of frames"
        ) from None
    try:
        container = av.open(str(path))
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise BadVideo(f"{path}: not a readable video ({_said(error)})") from None
    streams = container.streams.video
    if not streams or streams[0].codec_context is None:
        container.close()
        raise BadVideo(f"{path}: holds no video stream" if not streams else f"{path}: PyAV has no decoder for it")
    streams[0].thread_count = 1  # the loader's processes are the parallel ones
    return container


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:80]


def _decode(packet: Any) -> list[Any] | None:
    """The pictures that a packet gives; None where the decoder refuses it."""
    import av

    try:
        return packet.decode()
    except av.error.InvalidDataError:
        return None


def _mark(frame: Any) -> int:
    """A checksum of a decoded picture's first plane, the luma as a rule, up to 31 bits."""
    plane = frame.planes[0]
    width = min(plane.line_size, plane.width * -(-frame.format.components[0].bits // 8))  # the rest is padding
    rows = np.frombuffer(plane, np.uint8)[: plane.height * plane.line_size].reshape(plane.height, plane.line_size)
    return zlib.crc32(np.ascontiguousarray(rows[:, :width]).data) & 0x7FFFFFFF


def inspect(path: Path) -> Video:
    """Decode one video and note its pictures. BadVideo: unreadable, damaged, without pictures, with pictures of
    several sizes, or shorter by a tenth than its header says, as an .avi is that was cut (a header may count a few
    frames too many). Packets that cannot be decoded are no damage before the first picture, where a file begins inside
    a group of pictures, and at its end, where it stops inside one. Of a folder the frames are listed (`frames_of`).
    """
    if path.is_dir():
        names, beside = frames_of(path)
        return Video(path, len(names), names=names, beside=beside)
    marks: list[int] = []
    sizes: dict[tuple[int, int], None] = {}
    places: dict[tuple[int, int | None], int] = {}  # packets by what is known of them after a seek
    times: list[tuple[int, list[int]]] = []  # key frames: packet and its times
    entered: list[tuple[int, int]] = []  # of `times` and of the picture there
    stored, slots = 0, 0.0
    refused, damaged = False, False  # a packet after the first picture; and one after it was not
    with _open(path) as container:
        import av  # it is there: `_open` says so where it is not

        stream = container.streams.video[0]
        stream.codec_context.copy_opaque = True  # a picture carries its packet's number
        said = stream.frames  # 0: it does not say
        tick = float(stream.time_base * stream.average_rate) if stream.time_base and stream.average_rate else 0.0
        try:
            for packet in container.demux(stream):
                if packet.size:
                    if packet.is_keyframe and not packet.is_discard:
                        at = [t for t in (packet.pts, packet.dts) if t is not None]
                        times.append((stored, list(dict.fromkeys(at))))
                    places.setdefault((packet.pos or -1, packet.pts), stored)
                    # A list of its own: PyAV keeps what is carried under its id, for all threads together. The number 3
                    # is one object for all files, and gone for all when the first of them has dropped it.
                    packet.opaque = [stored]
                    stored += 1
                    if packet.dts is not None:  # an .avi says nothing of pictures that are shown twice, but counts them
                        slots = max(slots, (packet.dts - (stream.start_time or 0)) * tick + 1)
                pictures = _decode(packet)
                damaged |= refused and pictures is not None and packet.size > 0
                refused |= pictures is None and bool(marks)
                for picture in pictures or []:
                    if picture.key_frame and picture.opaque:
                        here = [k for k, (number, _) in enumerate(times) if number <= picture.opaque[0]]
                        if here and (not entered or here[-1] != entered[-1][0]):
                            entered.append((here[-1], len(marks)))
                    sizes[picture.width, picture.height] = None
                    marks.append(_mark(picture))
        except (OSError, ValueError, av.error.FFmpegError) as error:
            raise BadVideo(f"{path}: damaged ({_said(error)}); copy it again, or encode it anew") from None
    if not marks:
        raise BadVideo(f"{path}: holds no frames")
    if max(stored, slots) < 0.9 * said:
        raise BadVideo(f"{path}: ends after {stored} of the {said} frames that its header names; copy it again")
    if damaged:
        raise BadVideo(f"{path}: damaged (pictures in the middle cannot be decoded); copy it again, or encode it anew")
    if len(sizes) > 1:
        different = ", ".join(f"{w}x{h}" for w, h in list(sizes)[:3])
        raise BadVideo(f"{path}: its pictures differ in size ({different}); encode it anew")
    keys = _entries(path, [(*times[k], number) for k, number in entered], places)
    return Video(path, len(marks), np.array(marks, np.int32), keys)


def _entries(
    path: Path, known: list[tuple[int, list[int], int]], places: dict[tuple[int, int | None], int]
) -> np.ndarray | None:
    """Places of entry [K, 2] from (packet, its times, picture) of the key frames: each is sought, by presentation and
    by decoding time, and the time is taken that leads nearest to it. Containers differ in what they seek by.
    """
    kept: list[tuple[int, int]] = []
    with _open(path) as container:
        import av

        stream = container.streams.video[0]
        for place, times, number in known:
            if number - (kept[-1][1] if kept else 0) < GAP:
                continue  # the first of all is the start, which needs no seek
            best: tuple[int, int] | None = None
            for time in times:
                try:
                    container.seek(time, stream=stream, backward=True, any_frame=False)
                    packet = next(p for p in container.demux(stream) if p.size)
                except (OSError, ValueError, StopIteration, av.error.FFmpegError):
                    continue
                landed = places.get((packet.pos or -1, packet.pts), -1)
                if landed <= place and (best is None or landed > best[0]):
                    best = landed, time
            if best is not None:
                kept.append((best[1], number))
    return np.array(kept, np.int64) if kept else None


def frames_of(folder: Path) -> tuple[list[str], dict[str, int]]:
    """Names of a folder's frames by number, and how many pictures of which kind lie beside them.

    Pictures are of one kind if their names differ in numbers alone. Hidden ones do not count; optical flow, thumbnails
    and the like, and pictures without a number beside numbered ones, are no frames. BadVideo: none; several kinds that
    could all be the frames; the same number twice.
    """
    kinds: dict[str, list[str]] = {}
    for entry in os.scandir(folder):
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() in EXTENSIONS and not is_helper(entry.name):
            kinds.setdefault(re.sub(r"\d+", "#", stem).lower(), []).append(entry.name)
    if not kinds:
        raise BadVideo(f"{folder}: a folder without images ({', '.join(sorted(EXTENSIONS))})")
    frames = {kind: names for kind, names in kinds.items() if not BESIDE.fullmatch(kind)} or kinds
    numbered = {kind: names for kind, names in frames.items() if "#" in kind}
    if len(numbered) > 1:
        some = ", ".join(f"{kind} ({len(names)})" for kind, names in sorted(numbered.items())[:4])
        raise BadVideo(f"{folder}: {len(numbered)} kinds of numbered pictures, {some}; leave the frames alone in it")
    frames = numbered or frames
    order = sorted((natural(os.path.splitext(name)[0].lower()), name) for found in frames.values() for name in found)
    names = [name for _, name in order]
    if twice := [k for k in range(1, len(order)) if numbered and order[k][0] == order[k - 1][0]]:
        raise BadVideo(f"{folder}: {names[twice[0] - 1]} and {names[twice[0]]} have the same number; remove one")
    return names, {kind: len(found) for kind, found in kinds.items() if kind not in frames}


# ---------------------------------------------------------------------------------------------------------- reading
def read(video: Video, indices: Sequence[int], each: Frame | None = None) -> np.ndarray:
    """The frames of these numbers, uint8 [n, H, W, 3] RGB, in the order asked for; repetitions are allowed.

    `each` changes a frame [H, W, 3] once it is decoded: of a long video only what it leaves is in memory.

    A file is entered at the key frame before the first of them and left after the last. What is not the picture that
    was counted there (a key frame that needs earlier ones) is read again from the key frame before, then from the
    start. BadVideo: a frame that is not there or cannot be decoded.
    """
    wanted = sorted(set(indices))
    if not wanted or wanted[0] < 0 or wanted[-1] >= video.count:
        raise BadVideo(f"{video.path}: frames {wanted[:1]} to {wanted[-1:]} asked for, it has {video.count}")
    if video.names:
        images = {i: np.asarray(load_image(video.path / video.names[i])) for i in wanted}
        if each and len({image.shape for image in images.values()}) == 1:
            images = {i: each(image) for i, image in images.items()}
        if len({image.shape for image in images.values()}) > 1:
            raise BadVideo(f"{video.path}: its frames differ in size")
    else:
        images = {}
        for entry in _nearest(video, wanted[0]):
            images = _pictures(video, wanted, entry, each)
            if len(images) == len(wanted):
                break
        if len(images) < len(wanted):
            missing = next(i for i in wanted if i not in images)
            raise BadVideo(f"{video.path}: frame {missing} of {video.count} cannot be decoded")
    return np.stack([images[i] for i in indices])


def _nearest(video: Video, first: int) -> Iterator[tuple[int, int] | None]:
    """Where to enter for frame `first`: the two key frames at or before it, then the start (None)."""
    if video.keys is not None and video.marks is not None:
        last = int(np.searchsorted(video.keys[:, 1], first, "right"))
        yield from video.keys[max(0, last - 2) : last][::-1].tolist()
    yield None


def _pictures(
    video: Video, wanted: list[int], entry: tuple[int, int] | None, each: Frame | None = None
) -> dict[int, np.ndarray]:
    """The pictures `wanted` (rising), counted from the start, or from a place of entry (time, number there).

    After a seek, or a packet that cannot be decoded, nothing at all is returned where one of them is not the picture
    that was counted; else those that are there.
    """
    left, images = set(wanted), {}
    number = 0 if entry is None else -1  # of the next picture; -1: not known yet
    with _open(video.path) as container:
        import av
        from av.video.reformatter import VideoReformatter

        convert = VideoReformatter()  # one for all: a frame's own is set up anew for each
        stream = container.streams.video[0]
        try:
            if entry is not None:
                container.seek(entry[0], stream=stream, backward=True, any_frame=False)
            seen, refused = 0, False
            for packet in container.demux(stream):
                pictures = _decode(packet)
                refused |= pictures is None
                for picture in pictures or []:
                    seen += 1
                    if number < 0:
                        assert entry is not None  # for the type checker
                        number = _place(video, picture, entry[1])
                        if number > wanted[0] or (number < 0 and seen > wanted[-1] - entry[1] + 64):
                            return {}
                        if number < 0:
                            continue
                    if number in left:
                        unsure = video.marks is not None and (entry is not None or refused)
                        if unsure and _mark(picture) != video.marks[number]:  # type: ignore[index]
                            return {}
                        image = _rgb(picture, convert)
                        images[number] = each(image) if each else image
                        left.remove(number)
                        if not left:
                            return images
                    number += 1
        except (OSError, ValueError, av.error.FFmpegError) as error:
            if entry is None:
                raise BadVideo(f"{video.path}: damaged ({_said(error)})") from None
            return {}
    return images if entry is None else {}


def _place(video: Video, picture: Any, expected: int) -> int:
    """Number of the first picture after a seek, by its checksum: the expected one, or the only one; -1: neither."""
    assert video.marks is not None  # for the type checker
    mark = _mark(picture)
    if video.marks[expected] == mark:
        return expected
    at = np.flatnonzero(video.marks == mark)
    return int(at[0]) if len(at) == 1 else -1


def _rgb(picture: Any, convert: Any) -> np.ndarray:
    """[H, W, 3] uint8, turned as the file's rotation tag says.

    Chroma of deeper pictures is interpolated at full resolution: swscale's quick way for them is wrong by up to 4
    levels. Pictures of 8 bits are converted as PyAV and torchvision do.
    """
    from av.video.reformatter import Interpolation

    deep = any(component.bits > 8 for component in picture.format.components)
    how = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT if deep else None
    stored = convert.reformat(picture, format="rgb24", interpolation=how, threads=1).to_ndarray()
    turns = round(picture.rotation / 90) % 4  # counterclockwise
    return np.ascontiguousarray(np.rot90(stored, turns)) if turns else stored
