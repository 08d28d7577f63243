"""uvos_dino on files of one's own: segmentation of videos without annotations, training on plain folders."""

import csv
import itertools
import shlex
import struct
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from shared_utils import UserError, checkpoint
from shared_utils.pictures import davis_palette
from uvos_dino import clustering, data, eval_oneshot, main_dino, segment, video, vision_transformer
from uvos_dino import train_RGB_cluster as script
from uvos_dino.clustering import Clusters
from uvos_dino.inference import Heads, Numbers, load_model
from uvos_dino.model_cluster import AttEncoder
from uvos_dino.vision_transformer import VisionTransformer

GREY, RED, GREEN = (90, 90, 90), (200, 20, 20), (20, 190, 40)
FIT = "--resolution 48 80 --ratio 2 --tau 3 --threads 1".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block by hand: a patch attends to the patches of its colour."""
    torch.manual_seed(0)
    model = AttEncoder(VisionTransformer(8, 64, 1, 32), num_heads=1)
    with torch.no_grad():
        model.encoder.pos_embed.zero_()
        model.temporal_transformer[0].attn.qkv.weight.copy_(1.5 * torch.eye(64).repeat(3, 1))
    file = tmp_path_factory.mktemp("with spaces") / "checkpoint.pth"
    checkpoint.save(file, {"iteration": 7, "model_state_dict": model.state_dict(), "args": {"num_heads": 1}})
    return file


def scene(t: int, height: int = 51, width: int = 85) -> np.ndarray:
    """A red square that moves; a green one in the frames 5..9 and from 15 on. Patches of a 6 x 10 grid, odd sides."""
    image = np.full((6, 10, 3), GREY, np.uint8)
    image[1:3, t % 6 : t % 6 + 3] = RED
    if 5 <= t < 10 or t >= 15:
        image[4:6, 2:5] = GREEN
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST)


def write_video(path: Path, pictures: list[np.ndarray], degrees: int = 0) -> Path:
    """An mp4, with a rotation tag where `degrees` (counterclockwise, as shown) are given."""
    writer = video.Writer(path, Fraction(25))
    for picture in pictures:
        writer.add(picture)
    writer.close(True)
    if degrees:
        raw = bytearray(path.read_bytes())
        at = raw.index(b"tkhd") + 4 + 40  # version 0: the matrix a b u c d v x y w
        cos, sin = {90: (0, -1), 180: (-1, 0), 270: (0, 1)}[degrees]
        matrix = [65536 * cos, 65536 * sin, 0, -65536 * sin, 65536 * cos, 0, 0, 0, 1 << 30]
        raw[at : at + 36] = struct.pack(">9i", *matrix)
        path.write_bytes(raw)
    return path


def write_frames(folder: Path, pictures: list[np.ndarray], ending: str = "png", first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for t, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{first + t:05d}.{ending}")
    return folder


def run(weights: Path, out: Path, *words: object) -> None:
    assert segment.main([*FIT, "--resume_path", str(weights), "--save_path", str(out), *map(str, words)]) == 0


def masks(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("*.png"))
    assert files and all(Image.open(path).getpalette()[:9] == davis_palette()[:9] for path in files[:1])
    return np.stack([np.asarray(Image.open(path)) for path in files])


def test_one_window_gives_the_masks_of_the_evaluation(weights: Path, tmp_path: Path) -> None:
    """Frames, and the same pictures decoded from a video: PNGs equal to eval_oneshot's byte by byte."""
    film = write_video(tmp_path / "my clip.mp4", [scene(t) for t in range(8)])
    shown = list(video.pictures(film))
    root = tmp_path / "davis"
    frames = write_frames(root / "JPEGImages/480p/my clip", shown)
    write_frames(root / "Annotations/480p/my clip", [np.uint8(255 * (x[..., 0] > 150)) for x in shown])
    words = (
        f"--resume_path {shlex.quote(str(weights))} --basepath {root} --dataset DAVIS --split all --eval_norm imagenet"
    )
    more = ["--drop_last_frame", "false", "--save_path", str(tmp_path / "eval")]
    assert eval_oneshot.main([*shlex.split(words), *FIT, *more]) == 0
    for source, name in ((film, "film"), (frames, "frames"), (root / "JPEGImages", "below")):
        run(weights, tmp_path / name, source, "--window", "0", "--centroids", "all")
        folder = tmp_path / name / ("480p/my clip" if name == "below" else "my clip")
        assert [p.name for p in sorted(folder.iterdir())] == [f"{t:05d}.png" for t in range(8)]
        for path in (tmp_path / "eval/my clip").glob("*.png"):
            assert path.read_bytes() == (folder / path.name).read_bytes()
        assert len(list(video.pictures(folder.with_name("my clip.mp4")))) == 8
    found = masks(folder)
    assert found.shape[1:] == shown[0].shape[:2] == (52, 86)  # the writer made odd sides even
    assert 3 <= len(np.unique(found)) <= 5  # grey, red, green, and edges of the compressed pictures


def test_numbers_last_over_windows(weights: Path, tmp_path: Path) -> None:
    """A square keeps its number in every window, what enters has a new one, and has it again when it comes back."""
    pictures = [scene(t, 48, 80) for t in range(22)]
    frames = write_frames(tmp_path / "a b", pictures, first=100)
    run(weights, tmp_path / "whole", frames, "--window", "0", "--ratio", "1")
    run(weights, tmp_path / "out", frames, "--window", "4", "--ratio", "1")
    found, whole = masks(tmp_path / "out/a b"), masks(tmp_path / "whole/a b")
    true = np.stack([(x[..., 0] > 150) + 2 * (x[..., 1] > 150) for x in pictures])
    pairs = set(zip(true.ravel().tolist(), found.ravel().tolist()))
    assert pairs == {(0, 1), (1, 2), (2, 3)}, "a number of its own for grey, red and green, in all 22 frames"
    assert set(zip(whole.ravel().tolist(), found.ravel().tolist())) == {(1, 1), (2, 2), (3, 3)}
    with open(tmp_path / "out/a b.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["number"], row["first"], row["last"], row["frames"]) for row in rows] == [
        ("1", "00100", "00121", "22"), ("2", "00100", "00121", "22"), ("3", "00105", "00121", "12"),
    ]  # fmt: skip
    assert float(rows[1]["share"]) == pytest.approx(0.1)
    (shown,) = {x.shape for x in video.pictures(tmp_path / "out/a b.mp4")}
    assert shown == (48, 80, 3)


def test_portrait_and_rotated_videos(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upright = [np.rot90(scene(t), 1) for t in range(4)]
    run(weights, tmp_path / "out", write_video(tmp_path / "up.mp4", upright), "--resolution", "80", "48")
    expected = masks(tmp_path / "out/up")
    assert expected.shape[1:] == (86, 52) and len(np.unique(expected)) == 2
    for degrees in (90, 180, 270):  # stored lying, shown upright
        stored = [np.rot90(x, -degrees // 90) for x in upright]
        film = write_video(tmp_path / f"turned {degrees}.mp4", stored, degrees)
        capture = cv2.VideoCapture(str(film))  # another reader turns it too
        other = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        first = next(video.pictures(film))
        assert first.shape == other.shape and np.abs(first.astype(int) - other).mean() < 4
        run(weights, tmp_path / "out", film, "--resolution", "80", "48")
        turned = masks(tmp_path / f"out/turned {degrees}")
        inside = np.s_[:, 2:-2, 2:-2]  # a repeated line may lie on the other side
        assert np.mean(turned[inside] == expected[inside]) > 0.97
    # without --resolution: as many pixels as in the release's training, in the frames' proportions
    capsys.readouterr()
    argv = [str(tmp_path / "up.mp4"), "--resume_path", str(weights), "--save_path", str(tmp_path / "auto")]
    assert segment.main([*argv, "--threads", "1", "--ratio", "9"]) == 0
    assert "4 frames of 86 x 52, 44 x 26 patches" in capsys.readouterr().out
    saved = checkpoint.load(weights)
    saved["args"]["resolution"] = [32, 48]
    checkpoint.save(tmp_path / "own.pth", saved)
    assert segment.chosen_size(None, (86, 52), segment.trained_pixels(tmp_path / "own.pth"), 8) == (48, 32)


def test_windows_look_half_a_window_ahead_at_most() -> None:
    for length, count in itertools.product((1, 2, 5, 6), range(1, 25)):
        taken = 0

        def frames(count: int = count) -> Iterator[int]:
            nonlocal taken
            while taken < count:
                taken += 1
                yield taken

        given: list[int] = []
        for some in segment.windows(frames(), length):  # type: ignore[arg-type,type-var]
            assert len(some) <= 1.5 * length + 0.5 and taken - len(given) <= 1.5 * length + 0.5
            assert len(some) >= min(count, length / 2)
            given += some  # type: ignore[arg-type]
        assert given == list(range(1, count + 1))
    assert [len(x) for x in segment.windows(iter(range(9)), 0)] == [9]  # type: ignore[arg-type]


def heads_of(labels: list[int]) -> tuple[Clusters, Heads]:
    """One frame whose patches attend to those of their kind, and its exact clusters in order of appearance."""
    kinds = list(dict.fromkeys(labels))
    q = 3 * torch.eye(8)[labels][None, None]  # [1, 1, N, 8]
    rows = (q[0, 0] @ q[0, 0].T).softmax(-1)
    own = torch.tensor([kinds.index(x) for x in labels])
    centroids = torch.stack([rows[own == i].mean(0) for i in range(len(kinds))])
    return Clusters(own[None], centroids), Heads(q, q, 1.0)


def test_what_has_been_away_longest_loses_its_number() -> None:
    numbers = Numbers(tau=0.5, most=3)
    for labels, expected in (
        ([0, 0, 1, 2], [1, 1, 2, 3]),
        ([2, 1, 1, 1], [3, 2, 2, 2]),
        ([1, 4, 4, 4], [2, 1, 1, 1]),  # 0 was away longest
        ([0, 0, 2, 4], [2, 2, 3, 1]),  # 0 is new again; 2 still has its number, 1 had been seen last before
    ):
        assert numbers(*heads_of(labels))[0].tolist() == expected
    assert numbers.lost == 2 and len(numbers.queries) == 3
    with pytest.raises(UserError, match="4 clusters in one window, 3 numbers"):
        numbers(*heads_of([0, 1, 2, 3]))


def test_clusters_of_some_windows_take_in_the_rest() -> None:
    """Centroids of the chosen three-frame windows alone; every patch has the nearest of them."""
    torch.manual_seed(0)
    rows = (3 * torch.randn(9, 6, 5)).softmax(-1)  # [T, N, D]
    first = clustering.cluster(clustering.Given(rows[:3]), 3, 0.5)
    some = clustering.cluster(clustering.Given(rows), 9, 0.5, {0})
    assert torch.equal(some.centroids, first.centroids) and torch.equal(some.labels[:3], first.labels)
    nearest = clustering.jeffreys(rows.flatten(0, 1), first.centroids).argmin(1)
    assert torch.equal(some.labels.flatten(), nearest)
    both = clustering.cluster(clustering.Given(rows), 9, 0.5, {0, 2})
    assert both.number > some.number
    assert (
        clustering.cluster(clustering.Given(rows), 9, 0.5, {0, 1, 2}).number
        == clustering.cluster(clustering.Given(rows), 9, 0.5).number
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_picture_under_a_videos_name_is_no_video(kind: str, tmp_path: Path) -> None:
    more = [Image.fromarray(scene(t)) for t in (1, 2)]
    moving = {"save_all": True, "append_images": more} if kind == "GIF" else {}
    Image.fromarray(scene(0)).save(tmp_path / "x.mp4", kind, **moving)
    with pytest.raises(UserError, match="x.mp4: (a picture under a video's name|not a readable video)"):
        list(video.pictures(tmp_path / "x.mp4"))


def test_bad_input_is_one_line_before_anything_is_written(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    film = write_video(tmp_path / "films/x.mp4", [scene(0)] * 3)
    frames = write_frames(tmp_path / "frames", [scene(0), scene(1)])
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/x.mp4").write_bytes(film.read_bytes())
    Image.fromarray(scene(0)).save(tmp_path / "mixed/a.jpg")
    two = write_frames(tmp_path / "two", [scene(0)])
    Image.fromarray(scene(0)).save(two / "00000.jpg")
    sizes = write_frames(tmp_path / "sizes", [scene(0), scene(1, 40, 60)])
    (tmp_path / "empty").mkdir()
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for words, said in (
        (["nosuch.mp4"], "nosuch.mp4: no such video or folder"),
        ([text], r"text.mp4: not a readable video \(Invalid data found when processing input\); copy"),
        ([tmp_path / "empty"], "empty: no frames and no video below"),
        ([tmp_path / "mixed"], r"mixed: frames \(a.jpg\) and videos \(x.mp4\) in one folder"),
        ([two], "two frames have one name"),
        ([sizes], r"sizes, frame 00001: 40 x 60 pixels, the first has 51 x 85"),
        ([film, tmp_path / "mixed/x.mp4"], "the results of both would be x"),
        ([frames, "--resolution", "30", "48"], "multiples of the encoder's patch"),
        ([frames, "--tau", "0"], "--tau 0.0: must be above 0"),
        ([frames, "--fps", "0"], "--fps 0.0: must be above 0"),
        ([frames, "--window", "-1"], "--window -1: must not be negative"),
    ):
        argv = [*map(str, words), "--resume_path", str(weights), "--save_path", str(tmp_path / "out")]
        with pytest.raises(UserError, match=said):
            segment.main([*argv, "--resolution", "48", "80", "--threads", "1"] if "--resolution" not in words else argv)
        assert not list(tmp_path.rglob("*.mp4*.writing*")) and not (tmp_path / "out/frames").exists()
    for source, folder in ((film, film.parent), (frames, tmp_path)):
        with pytest.raises(UserError, match="the results would overwrite"):
            segment.main([str(source), "--resume_path", str(weights), "--save_path", str(folder)])


def test_a_cut_video_and_a_lone_cluster_are_said(weights: Path, tmp_path: Path, capsys) -> None:
    """The index lies first and names every frame: what was cut off behind it is not decoded in silence."""
    film = tmp_path / "cut.mp4"
    container = av.open(str(film), "w", options={"movflags": "faststart"})
    stream = container.add_stream("mpeg4", rate=25, width=80, height=48, pix_fmt="yuv420p")
    rng = np.random.default_rng(0)
    for _ in range(30):
        noise = rng.integers(0, 255, (48, 80, 3), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
    container.mux(stream.encode())
    container.close()
    whole = film.read_bytes()
    film.write_bytes(whole[: len(whole) * 2 // 3])
    run(weights, tmp_path / "out", film, "--tau", "1000")
    said = capsys.readouterr().out
    assert f"caution: {film}: its header names 30 frames, " in said
    assert f"caution: {film}: one cluster everywhere separates nothing; give a lower --tau than 1000" in said
    run(weights, tmp_path / "out", write_video(tmp_path / "x.mp4", [scene(t) for t in range(3)]))
    assert "caution" not in capsys.readouterr().out


# --- training --------------------------------------------------------------------------------------------------------

BLOCK = (
    "--dino_path none --arch vit_mini --patch_size 8 --resolution 32 48 --num_points 3 --batch_size 2 "
    "--num_train_steps 2 --lr 1e-3 --keep_every 0 --workers 0 --threads 1 --log-every 1 --amp none"
).split()
DINO = (
    "--image_size 32 48 --arch vit_mini --global_size 32 --local_size 16 --local_crops 1 --out_dim 32 --hidden_dim 32 "
    "--bottleneck_dim 16 --batch_size 4 --epochs 1 --workers 0 --threads 1 --log-every 1 --amp none"
).split()


def hint(said: str) -> list[str]:
    """The words of the printed next command, without `python -m`."""
    (line,) = (line for line in said.splitlines() if "python -m uvos_dino." in line and "next" in line)
    words = shlex.split(line.split("next", 1)[1].split(":", 1)[1])
    assert words[:2] == ["python", "-m"]
    return words[2:]


def test_the_block_trains_on_videos_and_frames_and_its_hint_runs(tmp_path: Path, capsys) -> None:
    """Videos, frames of several endings and their label maps in one folder whose name has spaces."""
    root = tmp_path / "my videos"
    write_frames(root / "b/frames", [scene(t) for t in range(6)], "png")
    write_frames(root / "c", [scene(t, 40, 30) for t in range(4)], "jpg")
    write_frames(root / "c maps", [scene(t, 40, 30)[..., 0] for t in range(4)])
    write_video(root / "a film.mp4", [scene(t) for t in range(7)])
    (root / "c/notes.heic").write_text("no image that is read")
    unread = Counter[str]()
    videos = data.training_videos(root, unread)
    assert [(data.name_of(v), len(v)) for v in videos] == [("a film", 1), ("frames", 6), ("c", 4)]
    assert unread == {"label maps (.png)": 4, ".heic": 1}
    out = tmp_path / "out dir"
    assert script.main([*BLOCK, "--basepath", str(root), "--output-dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 videos, 17 frames" in said and "not read: 4 label maps (.png), 1 .heic" in said
    module, *argv = hint(said)
    assert module == "uvos_dino.segment" and argv[0] == str(root / "a film.mp4")
    assert segment.main([*argv, "--save_path", str(tmp_path / "masks"), "--threads", "1"]) == 0
    assert len(list((tmp_path / "masks/a film").glob("*.png"))) == 7

    # A list names videos as it does folders; a film's clips are its frames, as --cache keeps those of folders.
    (tmp_path / "list.txt").write_text("a film\n")
    assert script.chosen_videos(root, tmp_path / "list.txt") == [[root / "a film.mp4"]]
    clips = script.Clips(videos, 9, 3, 1, (32, 48), script.ClipAugment((32, 48), 0, False))
    assert clips.lengths == [7, 6, 4] and list(clips.stored) == [0]
    pictures = [data.fit(x, (32, 48), 8, root) for x in video.pictures(root / "a film.mp4")]
    assert torch.equal(clips.stored[0], (torch.stack(pictures) * 255).round().byte())
    assert all(clips[i].shape == (3, 3, 32, 48) for i in range(9))


def test_dino_trains_on_photographs_and_starts_from_weights(tmp_path: Path, capsys) -> None:
    root, rng = tmp_path / "photo graphs", np.random.default_rng(0)
    for i, ending in enumerate(("jpg", "png", "webp", "JPEG", "bmp")):  # mixed sizes and endings, portrait, no labels
        folder = root / "train" / ("deep/er" if i % 2 else "x y")
        folder.mkdir(parents=True, exist_ok=True)
        size = (40 + 7 * i, 30, 3) if i % 2 else (30, 44 + i, 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"photo {i}.{ending}")
    write_video(root / "train/holiday.mov.mp4", [scene(t) for t in range(5)])
    Image.fromarray(scene(0)).save(root / "not in train.jpg")
    argv = [*DINO, "--data_dir", str(root), "--output-dir"]
    assert main_dino.main([*argv, str(tmp_path / "one run"), "--every", "2"]) == 0
    said = capsys.readouterr().out
    assert "train: 6 images at 32 x 48, from 3 folders or videos" in said  # 1 of 2, 2 of 3, 3 of 5
    module, *words = hint(said)
    given = script.get_parser().parse_args(words)
    assert module == "uvos_dino.train_RGB_cluster" and given.basepath == root
    encoder, _ = vision_transformer.load(given.dino_path, "vit_small", 16)
    assert torch.equal(encoder.pos_embed, checkpoint.load(given.dino_path)["teacher"]["backbone.pos_embed"])

    # --init: a run's folder; student and teacher start as its teacher, and the position table may be of another size
    args = main_dino.get_parser().parse_args([*argv, "x", "--init", str(tmp_path / "one run"), "--global_size", "48"])
    backbone, line = main_dino.start(args)
    assert "loaded" in line and all(torch.equal(v, encoder.state_dict()[k]) for k, v in backbone.state_dict().items())
    more = ["--init", str(tmp_path / "one run"), "--global_size", "48", "--lr", "1e-12", "--epochs", "2"]
    assert main_dino.main([*argv, str(tmp_path / "two"), *more]) == 0
    after = checkpoint.load(tmp_path / "two/checkpoint.pth")
    for side in ("student", "teacher"):
        for key, value in encoder.state_dict().items():
            assert torch.allclose(after[side][f"backbone.{key}"], value, atol=1e-5), (side, key)
    with pytest.raises(UserError, match="--init .*: give --arch vit_mini --patch_size 8"):
        main_dino.main([*argv, str(tmp_path / "bad"), *more, "--arch", "vit_little"])
    with pytest.raises(UserError, match="--init nosuch: no such file"):
        main_dino.main([*argv, str(tmp_path / "bad"), "--init", "nosuch"])
    with pytest.raises(UserError, match="to train longer, start a new run from its weights: --init"):
        main_dino.main([*argv, str(tmp_path / "two"), *more[:-1], "3"])


def test_a_probed_run_names_its_benchmark(tmp_path: Path, capsys) -> None:
    root = tmp_path / "my set"
    write_frames(root / "JPEGImages/480p/x", [scene(t) for t in range(5)], "jpg")
    write_frames(root / "Annotations/480p/x", [np.uint8(255 * (scene(t)[..., 0] > 150)) for t in range(5)])
    argv = ["--basepath", str(root), "--output-dir", str(tmp_path / "run"), "--ratio", "3", "--probe_every", "2"]
    assert script.main([*BLOCK, *argv, "--val_basepath", str(root), "--split", "all"]) == 0
    module, *words = hint(capsys.readouterr().out)
    assert module == "uvos_dino.eval_oneshot"
    assert eval_oneshot.main([*words, "--save_path", str(tmp_path / "eval"), "--threads", "1"]) == 0
    assert (tmp_path / "eval/result.json").is_file() and load_model(tmp_path / "run/checkpoint.pth")[2] is not None
