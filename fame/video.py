"""Video clips from files (PyAV) and from folders of frames, without decoding more than a clip needs.

`scan` looks at every video once, in threads, and says how many frames each has; `read` gives chosen frames. PyAV is
imported where a file is opened and nowhere else: folders of frames need none.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared_utils import UserError, checkpoint
from shared_utils.data import EXTENSIONS, load_image

SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v"}
INDEX_VERSION = 3  # of what `scan` keeps; 1 counted frames that an edit list cuts off, 2 did not look for cut files


class BadVideo(UserError):
    """A video that cannot be read."""


@dataclass
class Video:
    """A video and how to find its frames.

    Attributes:
        path: a file, or a folder of frames.
        count: frames.
        times: presentation time of each frame in the stream's units, rising; None where the file does not say them.
        names: file names of a folder's frames, in order.
    """

    path: Path
    count: int
    times: np.ndarray | None = None
    names: list[str] = field(default_factory=list)


def natural(name: str) -> list[Any]:
    """Sort key under which img_2 comes before img_10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


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
        raise BadVideo(f"{path}: not a readable video ({' '.join(str(error).split())[:80]})") from None
    if not container.streams.video:
        container.close()
        raise BadVideo(f"{path}: holds no video stream")
    container.streams.video[0].thread_count = 1  # the loader's processes are the parallel ones
    return container


def inspect(path: Path) -> Video:
    """Count the frames of one video, from its packets alone: nothing is decoded. BadVideo: unreadable, empty, or
    shorter by a tenth than its header says, as an .avi is that was cut (a header may count a few frames too many).
    """
    if path.is_dir():
        names = [entry.name for entry in os.scandir(path) if Path(entry.name).suffix.lower() in EXTENSIONS]
        if not names:
            raise BadVideo(f"{path}: a folder without images ({', '.join(sorted(EXTENSIONS))})")
        return Video(path, len(names), names=sorted(names, key=natural))
    times: list[int | None] = []
    stored = 0
    with _open(path) as container:
        import av  # it is there: `_open` says so where it is not

        said = container.streams.video[0].frames  # 0: it does not say
        try:
            for packet in container.demux(video=0):
                stored += bool(packet.size)
                if packet.size and not packet.is_discard:  # an edit list may cut frames off that are stored
                    times.append(packet.pts if packet.pts is not None else packet.dts)
        except (OSError, ValueError, av.error.FFmpegError) as error:
            raise BadVideo(f"{path}: damaged ({' '.join(str(error).split())[:80]})") from None
    if not times:
        raise BadVideo(f"{path}: holds no frames")
    if stored < 0.9 * said:
        raise BadVideo(f"{path}: ends after {stored} of the {said} frames that its header names; copy it again")
    known = [t for t in times if t is not None]
    unique = len(set(known)) == len(times)
    return Video(path, len(times), np.sort(np.array(known, np.int64)) if unique else None)


def scan(
    paths: Sequence[Path], cache: Path | None = None, threads: int = 8, keep: bool = True
) -> list[Video | BadVideo]:
    """`inspect` for many videos, each result or its error in their order; files that have not changed since they were
    written to `cache` are not opened again. Of several processes one alone should `keep` what it found there.

    UserError: PyAV is missing.
    """
    known: dict[str, Any] = checkpoint.load(cache) if cache is not None and cache.is_file() else {}

    def stamp(path: Path) -> list[int]:
        facts = path.stat()
        return [INDEX_VERSION, facts.st_mtime_ns, facts.st_size]

    def look(path: Path) -> Video | BadVideo:
        try:
            if not path.exists():
                return BadVideo(f"{path}: no such video")
            entry = known.get(str(path))
            if entry is not None and entry["stamp"] == stamp(path):
                times = entry["times"]
                return Video(path, entry["count"], None if times is None else times.numpy())
            return inspect(path)
        except BadVideo as error:
            return error
        except OSError as error:
            return BadVideo(f"{path}: cannot be read ({error.strerror})")

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(look, paths))
    if cache is not None and keep:
        files = [v for v in found if isinstance(v, Video) and not v.names]
        new = {
            str(v.path): {
                "stamp": stamp(v.path), "count": v.count, "times": None if v.times is None else torch.tensor(v.times),
            }
            for v in files
        }  # fmt: skip
        if any(key not in known or known[key]["stamp"] != value["stamp"] for key, value in new.items()):
            checkpoint.save(cache, {**known, **new})
    return found


def read(video: Video, indices: Sequence[int]) -> np.ndarray:
    """The frames of these numbers, uint8 [n, H, W, 3] RGB, in the order asked for; repetitions are allowed.

    A file is entered at the key frame before the first of them and left after the last. BadVideo: a frame that is not
    there or cannot be decoded.
    """
    wanted = sorted(set(indices))
    if not wanted or wanted[0] < 0 or wanted[-1] >= video.count:
        raise BadVideo(f"{video.path}: frames {wanted[:1]} to {wanted[-1:]} asked for, it has {video.count}")
    if video.names:
        images = {i: np.asarray(load_image(video.path / video.names[i])) for i in wanted}
        if len({image.shape for image in images.values()}) > 1:
            raise BadVideo(f"{video.path}: its frames differ in size")
    else:
        images = _decode(video, wanted, video.times) or _decode(video, wanted, None)
        if len(images) < len(wanted):
            missing = next(i for i in wanted if i not in images)
            raise BadVideo(f"{video.path}: frame {missing} of {video.count} cannot be decoded")
    return np.stack([images[i] for i in indices])


def _decode(video: Video, wanted: list[int], times: np.ndarray | None) -> dict[int, np.ndarray]:
    """The frames `wanted` (rising) by their times, or without times counted from the start.

    With times, nothing at all where one of them is missed: the caller then counts.
    """
    left, images = set(wanted), {}
    container = _open(video.path)
    import av

    with container:
        stream = container.streams.video[0]
        try:
            if times is not None and wanted[0] > 0:
                container.seek(int(times[wanted[0]]), stream=stream, backward=True, any_frame=False)
            for number, frame in enumerate(container.decode(stream)):
                index = number
                if times is not None:
                    if frame.pts is None:
                        return {}
                    index = int(np.searchsorted(times, frame.pts))
                    if index == len(times) or times[index] != frame.pts:
                        continue
                if index in left:
                    images[index] = frame.to_ndarray(format="rgb24")
                    left.remove(index)
                if not left or index > wanted[-1]:
                    break
        except (OSError, ValueError, av.error.FFmpegError) as error:
            if times is None:
                raise BadVideo(f"{video.path}: damaged ({' '.join(str(error).split())[:80]})") from None
            return {}
    return images if times is None or not left else {}
