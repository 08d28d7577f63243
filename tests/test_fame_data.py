"""Layouts of the video sets, their splits, and the clips that training and testing take."""

import csv
import gc
import json
import types
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fame import augment
from fame.data import (
    OneClip,
    TestClips,
    TwoClips,
    VideoSet,
    add_data_flags,
    check_data_flags,
    listing,
    open_videos,
    windows,
)
from fame.lab import motion
from fame.video import Video
from shared_utils import UserError
from shared_utils.data import Keyed
from shared_utils.flags import Parser
from shared_utils.lab import mini, mini_draw


def folder(path: Path, count: int = 3, size: tuple[int, int] = (40, 36)) -> Path:
    """A video of frames; frame n has the value 5 n."""
    path.mkdir(parents=True)
    for n in range(count):
        Image.new("RGB", size, (5 * n, 5 * n, 5 * n)).save(path / f"img_{n + 1:05d}.png")
    return path


def flags(root: Path, *extra: str) -> Namespace:
    p = Parser()
    add_data_flags(p)
    args = p.parse_args([str(root), "--crop_size", "32", "--frame_per_clip", "2", *extra])
    args.index_cache = root / "index.pth"
    check_data_flags(args)
    return args


def names(found: list) -> list[tuple[str, str]]:
    return [(path.name, label) for path, label, _ in found]


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_kinetics(tmp_path):
    for name in ("train/run/a", "train/jump/b", "val/run/c"):
        folder(tmp_path / name)
    (tmp_path / "train/jump/d.mp4").touch()
    (tmp_path / "train/jump/notes.txt").touch()
    found, classes = listing(tmp_path, "k400", True)
    assert classes == ["jump", "run"] and names(found) == [("b", "jump"), ("d.mp4", "jump"), ("a", "run")]
    assert names(listing(tmp_path, "k400", False)[0]) == [("c", "run")]
    (tmp_path / "train/sit").mkdir()
    with pytest.raises(UserError, match="sit: a class without videos"):
        listing(tmp_path, "k400", True)


def test_kinetics_numbers_test_videos_by_the_training_classes(tmp_path):
    for name in ("train/a/v", "train/b/v", "train/c/v", "val/a/v", "val/c/v"):
        folder(tmp_path / name, 4)
    videos = open_videos(flags(tmp_path, "--dataset", "k400"), False)
    assert videos.classes == ["a", "b", "c"] and videos.labels.tolist() == [0, 2]
    folder(tmp_path / "val/d/v")
    with pytest.raises(UserError, match="val/d: .*train has no such class"):
        listing(tmp_path, "k400", False)


def test_a_class_folder_as_other_tools_leave_it(tmp_path):
    """Every common ending is taken, what is not is named, and a video that lies there twice is one video."""
    run = tmp_path / "train/run"
    folder(run / "frames")
    for name in ("a.wmv", "b.FLV", "c.ts", "d.mts", "e.3gp", "f.ogv", "g.vob", "h.mp4"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    folder(run / "h")  # frames of h.mp4
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "thumbs", "flow"):
        folder(run / name)
    for name in ("notes.txt", "i.mp4.part", "j.zip", ".k.mp4", "._a.wmv", "Thumbs.db"):
        (run / name).touch()
    unread = Counter[str]()
    found, _ = listing(tmp_path, "k400", True, unread=unread)
    assert [path.name for path, _, _ in found] == "a.wmv b.FLV c.ts d.mts e.3gp f.ogv frames g.vob h.mp4".split()
    assert unread == {"folders": 3, ".part": 1, ".zip": 1, ".txt": 1}


def test_a_folder_of_videos_without_labels(tmp_path):
    """Files and folders of frames at any depth; frames of a file, flow, posters and helpers are no second video."""
    for name in ("my trip/a b", "deep/er/c", "clip", "flow", ".thumbs/x", "@eaDir/y"):
        folder(tmp_path / name, 4)
    (tmp_path / "deep/poster.jpg").touch()
    for name in ("clip.MP4", "my trip/d.mov", "my trip/e.heic", "notes.txt"):
        (tmp_path / name).touch()
    unread = Counter[str]()
    found, classes = listing(tmp_path, "folder", True, unread=unread)
    assert [key for _, _, key in found] == ["clip.MP4", "deep/er/c", "my trip/d.mov", "my trip/a b"] and classes == []
    assert unread == {".heic": 1, ".txt": 1, ".jpg": 1}
    assert listing(tmp_path, "folder", False)[0] == found  # no split
    for name in ("clip.MP4", "my trip/d.mov"):
        (tmp_path / name).unlink()
    videos = open_videos(flags(tmp_path, "--dataset", "folder"), True)
    assert len(videos) == 3 and videos.labels.tolist() == [-1] * 3 and videos.classes == []
    assert TwoClips(videos, 32)[0]["clips"].shape == (2, 3, 2, 32, 32)
    for extra in (["--target", "background"], ["--per_class", "2"]):
        with pytest.raises(UserError, match="folder takes every video: leave"):
            flags(tmp_path, "--dataset", "folder", *extra)
    with pytest.raises(UserError, match="folder has no training and test part, .*train/CLASS.* for --dataset k400"):
        check_data_flags(flags(tmp_path, "--dataset", "folder"), split=True)


def test_names_in_lists_as_other_tools_write_them(tmp_path):
    """Absolute, with a folder before it, with backslashes, blanks in names and at the end; one name in two classes."""
    for name in ("B b/v 1", "B b/v2", "A/v 1", "A/v2"):
        folder(tmp_path / "data" / name)
    (tmp_path / "anno").mkdir()
    lines = ["/else/UCF-101/A/v 1.avi 1", "UCF-101/B b/v 1.avi 2 ", ".\\A\\v2.avi\t1", "  B b/v2.avi  "]
    (tmp_path / "anno/trainlist01.txt").write_text("\r\n".join(lines) + " \r\n")
    found, _ = listing(tmp_path, "ucf101", True)
    rows = [("A", "A/v 1.avi"), ("B b", "B b/v 1.avi"), ("A", "A/v2.avi"), ("B b", "B b/v2.avi")]
    assert [(label, key) for _, label, key in found] == rows and all(path.is_dir() for path, _, _ in found)
    (tmp_path / "anno/testlist01.txt").write_text("v2.avi 1\n")
    with pytest.raises(UserError, match=r"testlist01.txt, line 1: v2.avi is of no class folder of"):
        listing(tmp_path, "ucf101", False)
    for name in ("A", "B b"):
        (tmp_path / f"anno/{name}_test_split1.txt").write_text("/else/v 1.avi 1 \nv2.avi 2\n")
    assert [key for _, _, key in listing(tmp_path, "hmdb51", True)[0]] == ["A/v 1.avi", "B b/v 1.avi"]
    (tmp_path / "anno/A_test_split1.txt").write_text("v2.avi 1\nv 1.avi 3\n")
    with pytest.raises(UserError, match="A_test_split1.txt, line 2: expected a video and 0, 1 or 2, found 'v 1.avi'"):
        listing(tmp_path, "hmdb51", True)


@pytest.mark.parametrize(("data", "lists"), [("data", "anno"), ("UCF-101", "ucfTrainTestlist")])
def test_ucf101(data, lists, tmp_path):
    for name in ("B/v1", "A/v2", "A/v3"):
        folder(tmp_path / data / name)
    (tmp_path / data / "A/v4.avi").touch()
    (tmp_path / lists).mkdir()
    (tmp_path / lists / "trainlist02.txt").write_text("B/v1.avi 2\nA/v4.avi 1\n\n")
    (tmp_path / lists / "testlist02.txt").write_text("A/v2.avi\nA/v9.avi\n")
    found, classes = listing(tmp_path, "ucf101", True, 2)
    assert classes == ["A", "B"] and names(found) == [("v1", "B"), ("v4.avi", "A")]  # folder of frames, file
    assert names(listing(tmp_path, "ucf101", False, 2)[0]) == [("v2", "A"), ("v9.avi", "A")]
    with pytest.raises(UserError, match="trainlist01.txt: no such file; .*give another --fold"):
        listing(tmp_path, "ucf101", True, 1)
    (tmp_path / lists / "trainlist03.txt").write_text("A/v2.avi 1\nC/v1.avi 3\n")
    with pytest.raises(UserError, match=r"trainlist03.txt, line 2: C/v1.avi is of no class folder"):
        listing(tmp_path, "ucf101", True, 3)
    (tmp_path / lists / "trainlist03.txt").write_text("A/v2.avi 1\nB/v1.avi 2\nx/A/v2.avi 1\n")
    with pytest.raises(UserError, match=r"the train part of ucf101 has A/v2.avi twice; restore its list"):
        listing(tmp_path, "ucf101", True, 3)


def test_hmdb51(tmp_path):
    for name in ("wave/a", "wave/b", "wave/c", "run/d"):
        folder(tmp_path / "data" / name)
    (tmp_path / "anno").mkdir()
    (tmp_path / "anno/wave_test_split1.txt").write_text("a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    (tmp_path / "anno/run_test_split1.txt").write_text("d.avi 1 \n")
    assert names(listing(tmp_path, "hmdb51", True)[0]) == [("d", "run"), ("a", "wave")]
    assert names(listing(tmp_path, "hmdb51", False)[0]) == [("b", "wave")]
    with pytest.raises(UserError, match="run_test_split2.txt: no such file"):
        listing(tmp_path, "hmdb51", True, 2)


def test_diving48(tmp_path):
    folder(tmp_path / "rgb/x_00001")
    for part, label in (("train", 3), ("test", 47)):
        rows = [{"vid_name": "x_00001", "label": label, "start_frame": 0, "end_frame": 9}]
        (tmp_path / f"Diving48_V2_{part}.json").write_text(json.dumps(rows))
    found, classes = listing(tmp_path, "diving48", True)
    assert len(classes) == 48 and names(found) == [("x_00001", "03")]
    assert names(listing(tmp_path, "diving48", False)[0]) == [("x_00001", "47")]
    for label in (-1, 48):
        (tmp_path / "Diving48_V2_test.json").write_text(json.dumps([{"vid_name": "x_00001", "label": label}]))
        with pytest.raises(UserError, match=f"x_00001 has the label {label}"):
            listing(tmp_path, "diving48", False)
    (tmp_path / "Diving48_V2_test.json").write_text(json.dumps([{"vid_name": "x", "label": n} for n in (1, 1, 2)]))
    with pytest.raises(UserError, match="Diving48_V2_test.json: x has the labels 1 and 2"):
        listing(tmp_path, "diving48", False)
    (tmp_path / "Diving48_V2_test.json").write_text("[]")
    with pytest.raises(UserError, match="the test part of diving48 is empty"):
        listing(tmp_path, "diving48", False)
    (tmp_path / "Diving48_V2_test.json").write_text("[1]")
    with pytest.raises(UserError, match="not a list of vid_name and label"):
        listing(tmp_path, "diving48", False)


def fight(root: Path) -> Path:
    with open(root / "clips.csv", "w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["clip", "class", "source_video"])
        for source in (-1, 0, 1, 2, 3, 4, 5):
            for n in range(6):
                table.writerow([f"c{source}_{n}", ("fight", "noFight")[n % 2], source])
    return root


def test_fight_clips_are_split_by_source(tmp_path):
    root, tested = fight(tmp_path), []
    for fold in (1, 2, 3):
        parts = [{key.split("_")[0] for _, _, key in listing(root, "fight", train, fold)[0]} for train in (True, False)]
        assert not parts[0] & parts[1] and len(parts[0]) == 4 and "c-1" not in parts[0] | parts[1]
        tested += sorted(parts[1])
    assert sorted(tested) == ["c0", "c1", "c2", "c3", "c4", "c5"]
    train, test = (listing(root, "fight", part, 1, "source_video") for part in (True, False))
    assert train[1] == test[1] == ["0", "1", "2", "3", "4", "5"]  # inside each source then
    assert len(train[0]) == 24 and len(test[0]) == 12
    assert not {key for _, _, key in train[0]} & {key for _, _, key in test[0]}
    with pytest.raises(UserError, match="--target colour: no such column .* it has clip, class, source_video"):
        listing(root, "fight", True, 1, "colour")


def test_clips_of_one_name_in_two_classes(tmp_path):
    rows = [f"c{n}, {name} ,{n} " for n in range(3) for name in ("fight", "noFight")]
    (tmp_path / "clips.csv").write_text("\n".join(["clip,class,source_video", *rows]))
    found, _ = listing(tmp_path, "fight", True)
    assert [str(path.relative_to(tmp_path)) for path, _, _ in found] == [
        "fight/c1",
        "noFight/c1",
        "fight/c2",
        "noFight/c2",
    ]
    assert [label for _, label, _ in found] == ["fight", "noFight"] * 2
    (tmp_path / "clips.csv").write_text("\n".join(["clip,class,source_video", *rows, rows[0]]))
    with pytest.raises(UserError, match="clips.csv: fight/c0 has more than one row"):
        listing(tmp_path, "fight", True)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("", "clips.csv: the list is empty"),
        ("name,class,source_video\na,fight,1\n", "a table with a column `path` or `clip` is expected"),
        ("clip,class\na,fight\n", "a needs a class and a source_video"),
        ("clip,class,source_video\na,fight,first\n", "a needs a class and a source_video"),
        ("clip,class,source_video\na,fight\n", "a needs a class and a source_video"),
    ],
)
def test_a_damaged_table_of_the_fight_clips(table, expected, tmp_path):
    (tmp_path / "clips.csv").write_text(table)
    with pytest.raises(UserError, match=expected):
        listing(tmp_path, "fight", True)


def test_a_table_that_lacks_a_video(tmp_path):
    for name in ("train/a/v", "val/a/w"):
        folder(tmp_path / name)
    (tmp_path / "attributes.csv").write_text("path,background\na/v,sea\n")
    with pytest.raises(UserError, match="--target background: the table of .* says nothing of a/w"):
        listing(tmp_path, "k400", True, 1, "background")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", "has no data or UCF-101; ucf101 is expected as"),
        ("--dataset k400", "has no train"),
        ("--fold 4", "--fold 4: the lists are numbered 1 to 3"),
        ("--crop_size 24", "--crop_size 24: at least 30"),
        ("--stride 0", "--stride 0: must be at least 1"),
        ("--hflip 2", "lie in 0..1"),
    ],
)
def test_bad_flags_and_layouts(extra, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        open_videos(flags(tmp_path, *extra.split()), True)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder; expected data/CLASS/\*\.avi"):
        flags(tmp_path / "nowhere")


@pytest.fixture
def kinetics(tmp_path) -> Path:
    folder(tmp_path / "train/run/long", 9)
    folder(tmp_path / "train/run/short", 3)
    folder(tmp_path / "train/jump/exact", 4)
    (tmp_path / "train/jump/broken.mp4").write_text("text")
    return tmp_path


def test_bad_and_short_videos_stop_or_are_skipped(kinetics, capsys):
    with pytest.raises(UserError, match=r"2 of 4 videos cannot be used; the first is .*broken.mp4.*--bad_videos skip"):
        open_videos(flags(kinetics, "--dataset", "k400"), True)
    videos = open_videos(flags(kinetics, "--dataset", "k400", "--bad_videos", "skip"), True)
    assert [v.path.name for v in videos.videos] == ["exact", "long"] and videos.labels.tolist() == [0, 1]
    said = capsys.readouterr().out
    assert "broken.mp4" in said and "short: 3 frames, a clip spans 4" in said
    (kinetics / "train/jump/broken.mp4").unlink()
    cached = open_videos(flags(kinetics, "--dataset", "k400", "--bad_videos", "skip", "--cache"), True)
    assert np.array_equal(cached.clip(1, 3), videos.clip(1, 3)) and cached.clip(1, 3)[:, 0, 0, 0].tolist() == [15, 25]
    small = open_videos(
        flags(kinetics, *"--dataset k400 --bad_videos skip --cache --cache_side 32 --per_class 1".split()), True
    )
    assert small.clip(1, 0).shape == (2, 32, 36, 3) and len(small) == 2


def test_optical_flow_beside_the_frames_is_left_out_and_counted(tmp_path, capsys):
    for name in ("a", "b"):
        video = folder(tmp_path / "train/run" / name, 5)
        for kind in ("flow_x", "flow_y"):
            for n in range(1, 5):
                Image.new("L", (40, 36)).save(video / f"{kind}_{n:05d}.jpg")
        Image.new("RGB", (9, 9)).save(video / "thumbnail.jpg")
        Image.new("RGB", (9, 9)).save(video / ".hidden_1.jpg")
        folder(video / ".ipynb_checkpoints")
    videos = open_videos(flags(tmp_path, "--dataset", "k400"), True)
    assert [videos.count(i) for i in (0, 1)] == [5, 5] and videos.clip(0, 1)[:, 0, 0, 0].tolist() == [5, 15]
    assert "beside the frames are left out: flow_x_# (8), flow_y_# (8), thumbnail (2)" in capsys.readouterr().out


def reachable(thing: object) -> int:
    """Python objects that hang on this one, without what modules and classes hold."""
    seen: dict[int, object] = {}
    todo = [thing]
    while todo:
        one = todo.pop()
        if id(one) not in seen and not isinstance(one, (type, types.ModuleType, types.FunctionType)):
            seen[id(one)] = one
            todo += gc.get_referents(one)
    return len(seen)


def test_a_set_of_videos_is_a_few_arrays():
    """A process that reads objects writes their counters, and so copies the page each of them lies on."""
    rng = np.random.default_rng(0)

    def many(count: int) -> VideoSet:
        some = [
            Video(Path(f"/data/class ä/{n}.mp4"), 5, rng.integers(0, 9, 5).astype(np.int32), np.array([[n, 4]]))
            for n in range(count)
        ]
        folders = [Video(Path(f"/data/{n}"), 3, names=[f"img_{k}.jpg" for k in range(3)]) for n in range(count)]
        return VideoSet([*some, *folders], [n % 3 for n in range(2 * count)], ["a", "b", "c"], 2, 1)

    small, large = many(2), many(400)
    assert reachable(large) == reachable(small) < 100
    video, frames = large.videos[399], large.videos[401]
    assert video.path == Path("/data/class ä/399.mp4") and video.count == 5 and video.marks.shape == (5,)
    assert video.keys.tolist() == [[399, 4]] and frames.names == ["img_0.jpg", "img_1.jpg", "img_2.jpg"]
    assert frames.marks is None and frames.keys is None and large.videos[-1].path == Path("/data/399")
    assert [v.path.name for v in large.subset([3, 400]).videos] == ["3.mp4", "0"]


# --- clips -----------------------------------------------------------------------------------------------------------


def numbered(*counts: int, step: int = 1) -> VideoSet:
    """Videos in memory whose frames are 48 x 60 and have the value of their number."""
    frames = [np.stack([np.full((48, 60, 3), n, np.uint8) for n in range(count)]) for count in counts]
    videos = [Video(Path(str(count)), count) for count in counts]
    return VideoSet(videos, list(range(len(counts))), [str(c) for c in counts], 4, 2, step, frames)


def first_frames(clips: torch.Tensor) -> list[int]:
    return (255 * clips[..., 0, 0, 0, 0]).round().int().flatten().tolist()


def test_windows():
    assert [windows(n, 8, 1) for n in (7, 8, 9, 20)] == [0, 1, 2, 13]
    assert [windows(n, 8, 5) for n in (3, 8, 12, 13, 18)] == [0, 1, 1, 2, 3]


def test_two_clips_start_at_different_frames():
    data = Keyed(TwoClips(numbered(8, 11), 32, 0.5, 0.5), 0)
    drawn = [first_frames(data[epoch, 1]["clips"]) for epoch in range(60)]
    assert all(a != b for a, b in drawn) and {a for a, _ in drawn} == {b for _, b in drawn} == {0, 1, 2, 3}
    item = data[0, 0]
    assert first_frames(item["clips"]) == [0, 0]  # the only start, twice
    assert item["clips"].shape == (2, 3, 4, 32, 32) and item["colours"].shape == (2, augment.DRAWS)
    frames = (255 * item["clips"][0, 0, :, 5, 5]).round().int().tolist()
    assert frames == [0, 2, 4, 6]  # every second one
    again = data[0, 0]
    assert torch.equal(item["colours"], again["colours"]) and not torch.equal(item["colours"], data[1, 0]["colours"])


def test_one_clip_and_evenly_spaced_test_clips():
    item = OneClip(numbered(8, 11), 32)[1]
    assert item["clip"].shape == (3, 4, 32, 32) and item["label"] == 1
    clips = TestClips(numbered(8, 21), 32, 0, 10)[1]["clips"]
    expected = torch.linspace(0, 13, 10).floor().int().tolist()  # torchvision's UniformClipSampler
    assert clips.shape == (10, 3, 4, 32, 32) and first_frames(clips) == expected
    assert first_frames(TestClips(numbered(8, 21, step=3), 32, 0, 3)[1]["clips"]) == [0, 6, 12]


def test_centre_crop_and_resize():
    frames = np.arange(48 * 60, dtype=np.float32).reshape(1, 48, 60, 1).repeat(3, 3) / (48 * 60) * 255
    frames = frames.astype(np.uint8)
    crop = augment.testing_clip(frames, 40, 0)  # as stored
    torch.testing.assert_close(crop, augment.as_tensor(frames)[:, :, 4:44, 10:50])
    assert augment.testing_clip(frames, 32, 36).shape == (3, 1, 32, 32)
    assert augment.testing_clip(frames, 64, 0).shape == (3, 1, 64, 64)  # smaller than the crop: it grows
    whole = augment.resize(augment.as_tensor(frames), (36, 45))
    torch.testing.assert_close(augment.testing_clip(frames, 36, 36), whole[..., 4:40])


def test_crops_are_one_for_all_frames():
    frames = np.random.default_rng(0).integers(0, 255, (1, 48, 60, 3), dtype=np.uint8).repeat(3, 0)
    clip = augment.training_clip(frames, 32)
    assert torch.equal(clip[:, 0], clip[:, 1]) and torch.equal(clip[:, 0], clip[:, 2])
    torch.manual_seed(0)
    one = augment.training_clip(frames, 32, flip=0.0)
    torch.manual_seed(0)
    assert torch.equal(augment.training_clip(frames, 32, flip=1.0), one.flip(-1))


# --- the generated set -----------------------------------------------------------------------------------------------


def test_generated_motions(tmp_path, monkeypatch):
    monkeypatch.setattr(motion, "PER_CLASS", {"train01": 2, "test01": 2, "train02": 4, "test02": 2})
    monkeypatch.setitem(mini_draw.CLIPS_PER_CLASS, "train01", 20)
    root = mini.ensure("motion", tmp_path)
    tied = listing(root, "ucf101", True, 1, "background")
    motions = {(key.split("/")[0], label) for _, label, key in tied[0]}
    assert len(motions) == 6 == len({label for _, label in motions})  # one background for each motion
    swapped = {(key.split("/")[0], label) for _, label, key in listing(root, "ucf101", False, 1, "background")[0]}
    assert not motions & swapped and len(swapped) == 6
    free = [(key.split("/")[0], label) for _, label, key in listing(root, "ucf101", True, 2, "background")[0]]
    assert len(set(free)) > 6
    args = flags(tmp_path, "--frame_per_clip", "8")
    args.data = root
    videos = open_videos(args, True)
    assert len(videos) == 12 and len(videos.classes) == 6 and videos.clip(0, 0).shape == (8, 64, 64, 3)
