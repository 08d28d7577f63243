"""Video files by PyAV: pictures one after the other, upright, and an overlay written as mp4."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from shared_utils import UserError

ENDINGS = {
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".qt", ".ts",
    ".vob", ".webm", ".wmv",
}  # fmt: skip


def is_video(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def _reason(error: Exception) -> str:
    """What FFmpeg says, without numbers of errors and without the path."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:80]


def _open(path: Path) -> tuple[Any, Any]:
    """The container and its video, which is not a cover picture. UserError for a file that holds none."""
    try:
        import av
    except ImportError:
        raise UserError(f"{path}: video files are read with PyAV: pip install av, or give folders of frames") from None
    try:
        container = av.open(str(path))
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise UserError(f"{path}: not a readable video ({_reason(error)}); copy it again, or encode it anew") from None
    if container.format.name.endswith(("_pipe", "gif", "apng")):  # FFmpeg's names of pictures, moving ones among them
        container.close()
        raise UserError(f"{path}: a picture under a video's name; copy the video again, or remove the file")
    stream: Any = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        container.close()
        raise UserError(f"{path}: holds no video that PyAV can decode; encode it anew")
    stream.thread_type = "AUTO"
    return container, stream


def pictures(path: Path) -> Iterator[np.ndarray]:
    """Every picture [H, W, 3] uint8 RGB in the order of showing, turned as the file's rotation tag says.

    Packets that the decoder refuses (a file that was cut) give none. UserError: unreadable, no picture at all, or
    pictures of several sizes.
    """
    container, stream = _open(path)
    import av

    shape, found = None, 0
    with container:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                decoded = packet.decode() if packet is not None else None
            except av.error.InvalidDataError:
                continue
            except (OSError, ValueError, av.error.FFmpegError) as error:
                raise UserError(f"{path}: damaged after {found} pictures ({_reason(error)}); encode it anew") from None
            if decoded is None:
                break
            for picture in decoded:
                turns = round(picture.rotation / 90) % 4  # counterclockwise
                rgb = np.ascontiguousarray(np.rot90(picture.to_ndarray(format="rgb24"), turns))
                shape = shape or rgb.shape
                if rgb.shape != shape:
                    raise UserError(f"{path}: picture {found} has another size than the first; encode the video anew")
                found += 1
                yield rgb
    if not found:
        raise UserError(f"{path}: holds no pictures that can be decoded; copy it again, or encode it anew")


def said(path: Path) -> tuple[int, Fraction]:
    """Pictures that the header names (0: it does not say), and pictures a second."""
    container, stream = _open(path)
    with container:
        return stream.frames, Fraction(stream.average_rate or stream.base_rate or 25)


class Writer:
    """An mp4 of pictures [H, W, 3] uint8 RGB, at `path` once it is closed; odd sides repeat their last line.

    H.264 where PyAV has x264, as its own packages do, else MPEG-4.
    """

    def __init__(self, path: Path, rate: Fraction):
        import av

        self.path, self.temporary = path, path.with_name(f".{path.stem}.writing.mp4")
        self.codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self.container = av.open(str(self.temporary), "w")
        self.stream: Any = None
        self.rate = rate.limit_denominator(1 << 15)

    def add(self, picture: np.ndarray) -> None:
        from av import VideoFrame

        height, width = picture.shape[:2]
        if height % 2 or width % 2:
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        if self.stream is None:
            options = {"preset": "ultrafast", "crf": "23"} if self.codec == "libx264" else {"qmax": "6"}
            stream: Any = self.container.add_stream(self.codec, rate=self.rate, options=options)
            stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            self.stream = stream
        self.container.mux(self.stream.encode(VideoFrame.from_ndarray(picture, format="rgb24")))

    def close(self, whole: bool) -> None:
        """Move the file to its place, or away where it is not whole."""
        if whole and self.stream is not None:
            self.container.mux(self.stream.encode())
        self.container.close()
        if whole:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)
