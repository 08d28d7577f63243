"""Video files as other tools write them: a frame's number is its place in what the decoder gives.

Every picture carries its number as twelve blocks: six bits, and the six bits' complement. PyAV's wheel has encoders
for all kinds but two: packed B-frames and VP8's hidden frames are made from plain streams, packet by packet.
"""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from fame import video
from fame.video import BadVideo, inspect, read
from shared_utils import UserError

COUNT, GOP = 40, 12
ON, OFF = np.array([230, 200, 60]), np.array([20, 40, 120])
BITEXACT = 0x800000  # no name of the encoder in the stream


def picture(number: int, scale: int = 1) -> np.ndarray:
    bits = np.array([(number >> k) & 1 for k in range(6)])
    grid = np.concatenate([bits, 1 - bits]).reshape(3, 4, 1)
    return np.where(grid, ON, OFF).astype(np.uint8).repeat(16 * scale, 0).repeat(16 * scale, 1)


def numbers(images: np.ndarray) -> list[int]:
    """What the pictures say; -1 where bits and complement do not fit."""
    grey = images.astype(float).mean(-1)
    blocks = grey.reshape(len(images), 3, 16, 4, 16)[:, :, 4:12, :, 4:12].mean((2, 4)).reshape(-1, 12) > 110
    fits = (blocks[:, :6] != blocks[:, 6:]).all(1)
    return np.where(fits, blocks[:, :6] @ (1 << np.arange(6)), -1).tolist()


def encode(path: Path, codec: str, pix: str = "yuv420p", flags: int = 0, **options: Any) -> Path:
    """`form`, `muxer` and `times` are for the container, the rest are the encoder's own."""
    muxer, times = options.pop("muxer", {}), options.pop("times", range(COUNT))
    with av.open(str(path), "w", format=options.pop("form", None), options=muxer) as container:
        stream = container.add_stream(codec, rate=25, options={"g": str(GOP), **options})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, pix, 4_000_000
        stream.codec_context.flags |= flags
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def packets_of(path: Path) -> list[tuple[bytes, bool, int | None, int | None]]:
    with av.open(str(path)) as container:
        return [(bytes(p), p.is_keyframe, p.pts, p.dts) for p in container.demux(video=0) if p.size]


def copied(source: Path, path: Path, first: int, last: int | None = None) -> Path:
    """Packets `first` to `last` of a file, as cutting by copying leaves them."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [p for p in old.demux(video=0) if p.size][first:last]:
            packet.stream = stream
            new.mux(packet)
    return path


def packed(path: Path) -> Path:
    """DivX 5's way: a P- and the B-picture before it in one packet, then a packet that says nothing; every time stamp
    is the packet's place.
    """
    plain = packets_of(encode(path.with_name("plain.avi"), "mpeg4", flags=BITEXACT, bf="1"))

    def kind(data: bytes) -> int:
        return data[data.find(b"\0\0\1\xb6") + 4] >> 6  # 0 I, 1 P, 2 B

    out: list[tuple[bytes, bool]] = []
    for data, *_ in plain:
        if kind(data) == 2:
            out[-1] = out[-1][0] + data, out[-1][1]
            out.append((b"\0\0\1\xb6\x50\0\x7f", False))  # a P-picture that is not coded
        elif kind(data) == 0:
            at = data.find(b"\0\0\1\xb6")
            out.append((data[:at] + b"\0\0\1\xb2DivX503b1393p" + data[at:], True))  # p: packed
        else:
            out.append((data, False))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.codec_tag = "XVID"
        for place, (data, key) in enumerate(out):
            packet = av.Packet(data)
            packet.pts, packet.dts, packet.time_base = place, place, Fraction(1, 25)
            packet.stream, packet.is_keyframe = stream, key
            container.mux(packet)
    return path


def hidden(path: Path) -> Path:
    """VP8 with frames that are decoded and not shown, as alt-ref frames are: each key frame a second time, hidden."""
    with av.open(str(encode(path.with_name("plain.webm"), "libvpx"))) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [p for p in old.demux(video=0) if p.size]:
            data, time, base, key = bytes(packet), packet.pts, packet.time_base, packet.is_keyframe
            packet.stream = stream
            new.mux(packet)
            if key:
                twin = av.Packet(bytes([data[0] & ~0x10]) + data[1:])  # the bit show_frame
                twin.pts = twin.dts = time + 1
                twin.time_base, twin.stream, twin.is_keyframe = base, stream, False
                new.mux(twin)
    return path


X265: dict[str, Any] = {"x265-params": f"keyint={GOP}:min-keyint={GOP}:bframes=3:log-level=none"}
OPEN: dict[str, Any] = {"x264-params": f"open-gop=1:keyint={GOP}:min-keyint={GOP}:bframes=3:b-adapt=0"}
REFRESH: dict[str, Any] = {"x264-params": f"intra-refresh=1:keyint={GOP}:bframes=0"}
VP9: dict[str, Any] = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}
ALL = list(range(COUNT))
Maker = Callable[[Path], Path]
KINDS: dict[str, Maker] = {
    # time stamps that do not rise in display order, or are missing
    "packed.avi": packed,
    "bframes.avi": lambda p: encode(p, "mpeg4", bf="2"),
    "h264.avi": lambda p: encode(p, "libx264", bf="2"),
    "mpeg1.mpg": lambda p: encode(p, "mpeg1video", bf="2"),
    "forward.mpg": lambda p: encode(p, "mpeg1video"),
    "h264.flv": lambda p: encode(p, "libx264", bf="2"),
    "stream.h264": lambda p: encode(p, "libx264", bf="2"),
    # packets that are no pictures, places without one
    "hidden.webm": hidden,
    "skipped.avi": lambda p: encode(p, "mpeg4", times=[n + n // 4 for n in range(COUNT)]),
    "uneven.mp4": lambda p: encode(p, "libx264", bf="2", times=[n + n // 4 for n in range(COUNT)]),
    # entered by seeking
    "mpeg2.mpg": lambda p: encode(p, "mpeg2video", form="vob", bf="2"),
    "mpeg2.ts": lambda p: encode(p, "mpeg2video", bf="2"),
    "mpeg2.mkv": lambda p: encode(p, "mpeg2video", bf="2"),
    "open.mp4": lambda p: encode(p, "libx264", **OPEN),
    "open.ts": lambda p: encode(p, "libx264", **OPEN),
    "fragments.mp4": lambda p: encode(p, "libx264", bf="2", muxer={"movflags": "frag_keyframe+empty_moov"}),
    "x265.mp4": lambda p: encode(p, "libx265", **X265),
    "x265.mkv": lambda p: encode(p, "libx265", **X265),
    "deep.mp4": lambda p: encode(p, "libx265", "yuv420p10le", **X265),
    "refresh.mp4": lambda p: encode(p, "libx264", **REFRESH),
    "vp9.webm": lambda p: encode(p, "libvpx-vp9", **VP9),
    "every.avi": lambda p: encode(p, "mjpeg", "yuvj420p"),
    # other endings
    "plain.mp4": lambda p: encode(p, "libx264", bf="2"),
    "a.wmv": lambda p: encode(p, "wmv2"),
    "a.flv": lambda p: encode(p, "flv"),
    "a.rm": lambda p: encode(p, "rv10"),
    "a.ogv": lambda p: encode(p, "ffv1", form="nut"),  # an ending that tells nothing
}
WITHOUT_KEYS = {"stream.h264"}  # no time stamps at all: always from the start


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Path]:
    folder, done = tmp_path_factory.mktemp("kinds"), {}

    def make(name: str) -> Path:
        if name not in done:
            path = folder / name.replace(".", "_") / name
            path.parent.mkdir()
            done[name] = KINDS[name](path)
        return done[name]

    return make


class Watched:
    """How often files were entered and how many pictures were decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.entries: list[tuple[int, int] | None] = []
        self.pictures = 0
        pictures, decode = video._pictures, video._decode

        def entered(*args):
            self.entries.append(args[2])
            return pictures(*args)

        def decoded(*args):
            out = decode(*args)
            self.pictures += len(out or [])
            return out

        monkeypatch.setattr(video, "_pictures", entered)
        monkeypatch.setattr(video, "_decode", decoded)


def by_the_decoder(path: Path) -> np.ndarray:
    """All pictures in the order in which a fresh decoder gives them."""
    out = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                out += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
            except av.error.InvalidDataError:
                assert not out  # before the first key frame alone
    return np.stack(out)


def check(path: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch, keys: bool = True) -> video.Video:
    """Whole reads, single frames and clips have the right numbers, and are found without a second try."""
    found = inspect(path)
    assert found.count == len(expected)
    whole = read(found, range(found.count))
    assert numbers(whole) == expected
    watched = Watched(monkeypatch)
    at = [0] if found.keys is None else [0, *found.keys[:, 1].tolist()]
    assert (len(at) > 1) == keys
    rng = np.random.default_rng(0)
    last = found.count - 1
    for first in [*rng.choice(found.count, 8, replace=False).tolist(), last, *at[1:]]:
        assert np.array_equal(read(found, [first])[0], whole[first])
    for first in [*rng.choice(found.count - 10, 5, replace=False).tolist(), 0, last - 6]:
        clip = list(range(first, first + 7, 2))
        watched.entries.clear()
        assert np.array_equal(read(found, clip), whole[clip])
        nearest = max(k for k in at if k <= first)
        assert [entry[1] if entry else 0 for entry in watched.entries] == [nearest]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_numbers_are_places_in_the_decoders_order(name, made, monkeypatch):
    path = made(name)
    found = check(path, ALL, monkeypatch, name not in WITHOUT_KEYS)
    if name != "deep.mp4":
        assert np.array_equal(read(found, ALL), by_the_decoder(path))


@pytest.mark.parametrize(
    "name",
    ["packed.avi", "h264.avi", "hidden.webm", "mpeg2.ts", "mpeg2.mkv", "open.mp4", "open.ts", "fragments.mp4"]
    + ["x265.mp4", "x265.mkv", "plain.mp4", "h264.flv", "a.flv", "skipped.avi"],
)
def test_a_clip_costs_the_pictures_since_its_key_frame(name, made, monkeypatch):
    found = inspect(made(name))
    watched = Watched(monkeypatch)
    spent = []
    for first in range(GOP, COUNT - 4):
        watched.pictures = 0
        read(found, range(first, first + 4))
        key = max(k for k in found.keys[:, 1].tolist() + [0] if k <= first)
        spent.append(watched.pictures - (first + 4 - key))
    assert max(spent) <= 4  # pictures before the key frame in order, and what comes with the last packet


def test_the_kinds_are_what_they_are_called(made):
    """Otherwise the tests above would pass for the wrong reason."""

    def times(name: str) -> list[int | None]:
        with av.open(str(made(name))) as container:
            return [frame.pts for frame in container.decode(video=0)]

    for name in ("packed.avi", "h264.avi"):
        assert times(name) != sorted(times(name))  # type: ignore[type-var]
    assert set(times("stream.h264")) == {None}
    assert len(packets_of(made("hidden.webm"))) == COUNT + 4
    with av.open(str(made("skipped.avi"))) as container:
        assert container.streams.video[0].frames == COUNT + 9 and len(times("skipped.avi")) == COUNT
    with av.open(str(made("packed.avi"))) as container:
        assert max(p.size for p in container.demux(video=0)) > 100
    assert b"DivX503b1393p" in made("packed.avi").read_bytes()
    with av.open(str(made("open.mp4"))) as container:
        order = [(p.is_keyframe, p.pts) for p in container.demux(video=0) if p.size]
        assert any(key and later[1] < time for (key, time), later in zip(order[1:], order[2:]))  # leading pictures


@pytest.mark.parametrize(
    ("name", "source", "first"),
    [("c.mp4", "plain.mp4", 5), ("c.mkv", "plain.mp4", 5), ("c.ts", "plain.mp4", 7), ("c.mpg", "mpeg2.ts", 5)]
    + [("c.webm", "hidden.webm", 5), ("open.mp4", "open.mp4", GOP), ("hevc.mp4", "x265.mp4", 4)],
)
def test_files_that_begin_inside_a_group_of_pictures(name, source, first, made, tmp_path, monkeypatch):
    path = copied(made(source), tmp_path / name, first)
    expected = numbers(by_the_decoder(path))
    assert expected == list(range(expected[0], COUNT)) and 4 < expected[0] < 2 * GOP  # the decoder begins later
    check(path, expected, monkeypatch)


def test_pictures_without_their_reference_count_where_the_decoder_gives_them(made, tmp_path):
    """MPEG-4 is decoded before its first key frame too, if badly: these pictures have a number, and the others keep
    theirs.
    """
    path = copied(made("bframes.avi"), tmp_path / "c.avi", 5)
    whole = by_the_decoder(path)
    found = inspect(path)
    assert found.count == len(whole) and numbers(whole)[-20:] == list(range(COUNT - 20, COUNT))
    assert np.array_equal(read(found, range(found.count)), whole)
    for first in range(0, found.count - 4, 3):
        assert np.array_equal(read(found, range(first, first + 4)), whole[first : first + 4])


def test_pictures_that_are_alike_keep_their_numbers(tmp_path, made):
    """Still scenes: the pictures say nothing of their place, the checksums repeat."""
    path = tmp_path / "still.avi"
    shown = [n // 15 for n in range(60)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "6", "bf": "2", "x264-params": "scenecut=0"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for number in shown:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(stream.encode())
    found = inspect(path)
    assert found.count == 60 and numbers(read(found, range(60))) == shown
    for first in range(55):
        assert numbers(read(found, range(first, first + 5))) == shown[first : first + 5]


def test_deep_pictures_have_their_colours(made):
    """Against BT.601 in floating point, away from the blocks' edges; PyAV's default is 2.2 levels off here, in single
    pixels 3.8.
    """
    found = inspect(made("deep.mp4"))
    images = read(found, ALL).astype(float)
    with av.open(str(made("deep.mp4"))) as container:
        for image, frame in zip(images, container.decode(video=0)):
            assert frame.format.name == "yuv420p10le"
            y, u, v = (np.frombuffer(p, np.uint16).reshape(p.height, -1)[:, : p.width] / 4 for p in frame.planes)
            u, v = (c.repeat(2, 0).repeat(2, 1) for c in (u, v))
            y, u, v = (y - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224
            exact = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], -1).clip(0, 255)
            inside = (image - exact).reshape(3, 16, 4, 16, 3)[:, 6:12, :, 6:12]
            assert np.abs(inside.mean((1, 3))).max() < 0.75 and np.abs(inside).max() < 2


def test_damage_inside_a_file_is_one_line(made, tmp_path):
    path = tmp_path / "damaged.webm"
    with av.open(str(made("hidden.webm"))) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for place, packet in enumerate([p for p in old.demux(video=0) if p.size]):
            broken = av.Packet(b"\x01") if place == 20 else packet
            broken.pts, broken.dts, broken.time_base = packet.pts, packet.dts, packet.time_base
            broken.stream = stream
            new.mux(broken)
    with pytest.raises(
        BadVideo, match=r"damaged.webm: damaged \(pictures in the middle cannot be decoded\); copy"
    ) as error:
        inspect(path)
    assert "\n" not in str(error.value)


def test_pictures_of_several_sizes_are_named(tmp_path, made):
    """Recordings that were joined."""
    big = tmp_path / "big.ts"
    with av.open(str(big), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, 2), format="rgb24")))
        container.mux(stream.encode())
    joined = tmp_path / "joined.ts"
    joined.write_bytes(made("mpeg2.ts").read_bytes() + big.read_bytes())
    with pytest.raises(UserError, match="joined.ts: its pictures differ in size .64x48, 128x96.; encode it anew"):
        inspect(joined)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadVideo, match="sound.mp4: holds no video stream"):
        inspect(path)
