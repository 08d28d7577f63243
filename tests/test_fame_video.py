"""Reading clips: frames by number from files and folders, what is decoded for them, damaged and short videos."""

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from fame import video
from fame.video import BadVideo, inspect, natural, read, scan
from shared_utils import UserError


def frames(count: int) -> np.ndarray:
    """Frame number n is of brightness 8 n."""
    return np.stack([np.full((48, 64, 3), 8 * n, np.uint8) for n in range(count)])


def write(path: Path, count: int, codec: str = "mpeg4", **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "6", **options})
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 48, 64, "yuv420p", 2_000_000
        for frame in frames(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(images: np.ndarray) -> list[int]:
    return [round(float(image.mean()) / 8) for image in images]


@pytest.fixture(scope="module")
def avi(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("avi") / "a.avi", 30)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    """H.264 with frames that are stored out of order."""
    return write(tmp_path_factory.mktemp("mp4") / "a.mp4", 30, "libx264", bf="2")


@pytest.mark.parametrize("name", ["avi", "mp4"])
@pytest.mark.parametrize("wanted", [[0, 1, 2], [20, 22, 24], [29], [25, 3, 3, 14]])
def test_frames_by_number(name, wanted, request, monkeypatch):
    found = inspect(request.getfixturevalue(name))
    assert found.count == 30 and found.marks is not None and found.keys is not None
    images = read(found, wanted)
    assert images.dtype == np.uint8 and images.shape == (len(wanted), 48, 64, 3) and numbers(images) == wanted
    assert numbers(read(video.Video(found.path, 30, None), wanted)) == wanted  # counted from the start


def test_files_that_are_scanned_at_once_do_not_take_each_others_numbers(tmp_path):
    """PyAV hands a picture what its packet carries by the object's id, which small integers share among threads."""
    alone = [inspect(write(tmp_path / f"{i}.avi", 28 + i, g="4")).keys for i in range(4)]
    assert all(keys is not None and len(keys) > 4 for keys in alone)
    paths = [tmp_path / f"{i % 4}.avi" for i in range(64)]
    for _ in range(4):
        for i, found in enumerate(scan(paths, threads=8)):
            keys = alone[i % 4]
            assert isinstance(found, video.Video) and found.keys is not None and keys is not None
            assert np.array_equal(found.keys, keys)


@pytest.mark.parametrize("name", ["avi", "mp4"])
def test_only_what_a_clip_needs_is_decoded(name, request, monkeypatch):
    found, counts = inspect(request.getfixturevalue(name)), []
    decoded = video._decode

    def counted(packet: Any) -> list[Any] | None:
        pictures = decoded(packet)
        counts.extend(pictures or [])
        return pictures

    monkeypatch.setattr(video, "_decode", counted)
    assert numbers(read(found, [21, 23])) == [21, 23]
    assert len(counts) <= 12  # a key frame every six, of thirty frames
    counts.clear()
    read(found, [0, 1])
    assert len(counts) <= 4


@pytest.mark.parametrize("name", ["avi", "mp4"])
def test_a_place_of_entry_that_leads_elsewhere_is_noticed(name, request):
    found = inspect(request.getfixturevalue(name))
    for keys in ([[10**9, 0]], [[0, 5]], found.keys[:-1] * [1, 0] + [0, 6], found.keys * [0, 1], found.keys * [1, -1]):
        wrong = video.Video(found.path, 30, found.marks, np.array(keys, np.int64))
        assert numbers(read(wrong, [7, 9, 28])) == [7, 9, 28]


def test_pictures_that_are_not_those_of_the_scan_are_counted_from_the_start(avi):
    found = inspect(avi)
    assert found.marks is not None
    assert numbers(read(video.Video(avi, 30, np.bitwise_xor(found.marks, 1), found.keys), [7, 29])) == [7, 29]


def test_frames_that_an_edit_list_cuts_off_do_not_count(mp4, tmp_path):
    """Videos that were cut without being encoded anew keep a few frames before the cut, which players leave out."""
    path = tmp_path / "cut.mp4"
    with av.open(str(mp4)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        cut = packets[0].pts + 3 * packets[0].duration
        for packet in packets:
            packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, stream
            target.mux(packet)
    found = inspect(path)
    assert found.count == 27
    for wanted in ([0, 1], [2, 5], [25, 26]):
        assert numbers(read(found, wanted)) == [n + 3 for n in wanted]


def test_folders_of_frames(tmp_path):
    for number in (1, 2, 10):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"img_{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    found = inspect(tmp_path)
    assert found.names == ["img_1.png", "img_2.png", "img_10.png"] and sorted(["b", "a1"], key=natural) == ["a1", "b"]
    assert read(found, [2, 0])[:, 0, 0, 0].tolist() == [10, 1]
    Image.new("RGB", (9, 8)).save(tmp_path / "img_11.png")
    with pytest.raises(BadVideo, match="differ in size"):
        read(inspect(tmp_path), [0, 3])


@pytest.mark.parametrize(
    ("files", "frames", "beside"),
    [
        ("flow_x_1 flow_y_1 img_1 img_2", "img_1 img_2", "flow_x_# flow_y_#"),
        ("2 10 1 cover", "1 2 10", "cover"),
        ("f9 f10 f11 f_thumb preview", "f9 f10 f11", "f_thumb preview"),
        ("v3_s1_2 v3_s1_10 v3_s2_1 title", "v3_s1_2 v3_s1_10 v3_s2_1", "title"),
        ("IMG_2 img_1 img_3 ._img_1 .img_4", "img_1 IMG_2 img_3", ""),
        ("b a thumb", "a b", "thumb"),
        ("thumb_1 thumb_2", "thumb_1 thumb_2", ""),  # nothing else: the frames have this name
        ("left_1 right_1 left_2", "kinds of numbered pictures, left_# .2., right_# .1.; leave the frames alone", None),
        ("flow_x_1 flow_y_1", "2 kinds of numbered pictures", None),
        ("f_1 f_01 f_2", "f_01.png and f_1.png have the same number; remove one", None),
    ],
)
def test_which_pictures_of_a_folder_are_frames(files, frames, beside, tmp_path):
    for name in files.split():
        (tmp_path / f"{name}.png").touch()
    if beside is None:
        with pytest.raises(BadVideo, match=frames):
            inspect(tmp_path)
    else:
        found = inspect(tmp_path)
        assert found.names == [f"{name}.png" for name in frames.split()]
        assert sorted(found.beside) == beside.split()


def test_bad_videos_are_named(tmp_path, avi):
    (tmp_path / "text.avi").write_text("no video at all")
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(avi.read_bytes()[:200])
    for path, what in (("text.avi", "not a readable video"), ("empty", "a folder without images")):
        with pytest.raises(BadVideo, match=what):
            inspect(tmp_path / path)
    found = scan([avi, tmp_path / "text.avi", cut, tmp_path / "nowhere.avi"])
    assert isinstance(found[0], video.Video) and all(isinstance(f, BadVideo) for f in found[1:])
    assert "no such video" in str(found[3])
    for wanted in ([30], [-1], []):
        with pytest.raises(BadVideo, match="it has 30"):
            read(inspect(avi), wanted)
    with pytest.raises(BadVideo, match="frame 31 of 40 cannot be decoded"):
        read(video.Video(avi, 40, None), [2, 31])


def test_a_scan_is_kept_and_renewed_where_a_file_changes(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "a.avi", 12), tmp_path / "index.pth"
    (first,) = scan([path], cache)
    calls: list[Path] = []
    looked = video.inspect

    def counted(path: Path) -> video.Video:
        calls.append(path)
        return looked(path)

    monkeypatch.setattr(video, "inspect", counted)
    (second,) = scan([path], cache)
    assert isinstance(first, video.Video) and isinstance(second, video.Video) and not calls
    assert (
        second.count == 12
        and first.marks.tolist() == second.marks.tolist()
        and first.keys.tolist() == second.keys.tolist()
    )
    assert numbers(read(second, [7])) == [7]
    (other,) = scan([write(tmp_path / "b.avi", 9)], cache, keep=False)  # reads the file and leaves it as it is
    assert isinstance(other, video.Video) and len(calls) == 1 and len(video.checkpoint.load(cache)["stamps"]) == 1
    calls.clear()
    write(path, 20)
    (third,) = scan([path], cache)
    assert isinstance(third, video.Video) and third.count == 20 and calls == [path]
    calls.clear()
    for what, value in (("INDEX_VERSION", 3), ("_decoder", lambda: "another version")):
        with monkeypatch.context() as other_index:
            other_index.setattr(video, what, value)
            scan([path], cache, keep=False)
    assert calls == [path, path]
    video.checkpoint.save(cache, {str(path): {"stamp": [3, 0, 0], "count": 12, "times": None}})  # the index before
    assert scan([path], cache)[0].count == 20 and len(calls) == 3
    assert scan([path], cache)[0].count == 20 and len(calls) == 3


def test_a_folder_that_may_not_be_read_is_a_bad_video(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(video.os, "scandir", refuse)
    (found,) = scan([tmp_path])
    assert isinstance(found, BadVideo) and "cannot be read (Permission denied)" in str(found)


def test_without_pyav_the_cure_is_named(avi, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install av, or give folders of frames"):
        scan([avi])


def test_a_file_that_was_cut_is_named(tmp_path, avi):
    cut = tmp_path / "cut.avi"
    cut.write_bytes(avi.read_bytes()[: avi.stat().st_size * 3 // 4])
    with pytest.raises(video.BadVideo, match=r"cut.avi: ends after \d+ of the 30 frames that its header names; copy"):
        inspect(cut)
    whole = inspect(avi)
    cut.write_bytes(avi.read_bytes()[: avi.read_bytes().rindex(b"00dc", 0, avi.read_bytes().rindex(b"idx1")) + 20])
    found = inspect(cut)  # a little is missing: the last picture
    assert found.count == 29 and numbers(read(found, range(29))) == list(range(29))
    assert np.array_equal(read(found, [20, 28]), read(whole, [20, 28]))


@pytest.mark.parametrize(("tag", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_a_rotation_tag_turns_the_pictures(tag, turns, tmp_path):
    """Phones store a portrait lying on its side, and say so in the track's matrix."""
    path = tmp_path / "phone.mp4"
    scene = np.zeros((48, 64, 3), np.uint8)
    scene[:24, :32] = 255  # one bright corner
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "6"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in tag)
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    for wanted in ([0], [9]):  # from the start, and after a seek
        (image,) = read(inspect(path), wanted)
        assert np.abs(image.astype(int) - np.rot90(scene, turns)).mean() < 8
