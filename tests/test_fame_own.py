"""A user's own videos in fame: one folder of whatever there is, --init, arms, evaluations without a list."""

import importlib
import json
import shlex
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fame import augment, main_probe, main_retrieve
from fame import eval as fame_eval
from fame.backbone import build
from fame.data import DATASETS, Layout
from fame.network import start_from
from fame.video import inspect, read
from shared_utils import UserError, checkpoint
from tests.test_readme import recorded_calls

NET = "-a tiny --width 2 -cs 32 -fpc 4 --stride 1".split()
SMALL = (
    "--moco_dim 8 --moco_k 16 -b 8 --bn_splits 2 --lr 0.05 --epochs 1 --bins 5 --workers 0 --threads 1 --log-every 1 "
    "--cache --cache_side 32"
).split()


def video(path: Path, frames: int, size: tuple[int, int], colour: int, seed: int) -> None:
    """Noise of a colour, a block that moves; a folder of frames where the path has no ending."""
    rng, (width, height) = np.random.default_rng(seed), size
    still = rng.integers(0, 90, (height, width, 3)) + 120 * np.eye(3, dtype=np.int64)[colour]
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.repeat(still[None], frames, 0)
    for t in range(frames):
        images[t, 8:20, 2 * t : 2 * t + 10] = rng.integers(0, 255, 3)
    images = images.clip(0, 255).astype(np.uint8)
    if not path.suffix:
        path.mkdir()
        for t, image in enumerate(images):
            Image.fromarray(image).save(path / f"shot {t + 1}.png")
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=25, options={"g": "6"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 1_000_000
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos of 12 frames in two class folders, blanks in names, portrait and landscape, mixed endings, one deeper,
    one a folder of frames; one clip of two frames; two files that are no videos.
    """
    root = tmp_path_factory.mktemp("data") / "my videos"
    names = ("a 1.mp4", "b.avi", "c.webm", "2020/d.MOV", "e e")
    for c, folder in enumerate(("man falls", "walk")):
        for i, name in enumerate(names):
            video(root / folder / name, 12, ((48, 64), (64, 40))[i % 2], c, 10 * c + i)
    video(root / "walk/too short.mkv", 2, (48, 64), 1, 99)
    (root / "walk/IMG_1.heic").touch()
    (root / "man falls/notes.txt").touch()
    return root


def run(module: str, *words: str) -> None:
    assert importlib.import_module(module).main(list(words)) == 0


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_a_folder_of_own_videos(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pretrained on; its next commands run as they are printed."""
    out = tmp_path / "a run"
    common = [*NET, *SMALL, "--dataset", "folder", "--output-dir", str(out)]
    with pytest.raises(
        UserError, match="too short.mkv: 2 frames, a clip spans 4; a lower --stride .*--bad_videos skip"
    ):
        run("fame.train", str(own), *common)
    run("fame.train", str(own), *common, "--bad_videos", "skip")
    said = capsys.readouterr().out
    assert "(folder): 10 videos, 12 to 12 frames" in said and "of 2 classes" not in said and "classes" not in said
    assert "1 of 11 videos cannot be used" in said and "not read: 1 .heic, 1 .txt between the videos" in said
    assert "caution" not in said
    hints = [line.split(": python -m ")[1] for line in said.splitlines() if ": python -m " in line]
    assert len(hints) == 2 and all(f"'{own}' --dataset folder" in hint for hint in hints)
    for hint in hints:
        module, *words = shlex.split(hint)
        retrieve = ["--clip_per_video", "2", "--workers", "0", "--output-dir", str(tmp_path / "found")]
        run(module, *words, *(retrieve if module == "fame.main_retrieve" else []))
    said = capsys.readouterr().out
    assert "10 videos of 2 classes, each a query among the others" in said and "% of the activation lies" in said
    found = json.loads((tmp_path / "found/result.json").read_text())
    assert found["r1"] == 100 and found["r50"] == 100  # colours are easy
    with pytest.raises(UserError, match="no training and test part, .* for --dataset k400"):
        fame_eval.main(
            [str(own), *NET, "--dataset", "folder", "--finetune", "--pretrained", str(out / "checkpoint.pth")]
        )
    with pytest.raises(UserError, match="no class folders, and this needs classes"):
        flags = ["--dataset", "folder", "--bad_videos", "skip", "--pretrained", str(out / "checkpoint.pth")]
        main_retrieve.main([str(own / "walk"), *flags])
    lone = tmp_path / "lone"
    lone.mkdir()
    for name in ("man falls", "walk"):
        (lone / name).mkdir()
        (lone / name / "x.avi").symlink_to(own / name / "b.avi")
    with pytest.raises(UserError, match="class man falls has fewer than 2 videos"):
        main_retrieve.main([str(lone), *flags])


def test_leaving_one_out() -> None:
    """Each among the others: a pair of twins finds itself otherwise."""
    x = torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.2], [-1.0, -0.3], [0.0, 1.0], [0.1, -1.0]])
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    own = main_retrieve.recall(x, labels, x, labels, leave_out=True)
    centred = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    near = (centred @ centred.T).fill_diagonal_(-9).argmax(1)
    assert own[1] == pytest.approx(100 * float((labels[near] == labels).double().mean())) and own[1] < 100
    assert own[50] == 100 and main_retrieve.recall(x, labels, x, labels)[1] == 100


@pytest.mark.parametrize("classes", [True, False])
def test_arms_of_own_videos(
    classes: bool, own: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What run_arms.sh starts is run here: pretraining, probe and table of two arms."""
    name = own.name if classes else f"{own.name}/walk"
    command = f"export DATA_ROOT={shlex.quote(str(own.parent))} SET={shlex.quote(name)} ARMS='moco fame' SEEDS=0"
    small = "-b 4 --moco_k 8 --epochs 1 --width 2 -fpc 4 --stride 1"
    calls = recorded_calls(f"{command}; bash fame/run_arms.sh small {small}", tmp_path)
    assert [call[0] for call in calls] == ["fame.train", "fame.main_probe"] * 2 + ["fame.lab.arms"]
    for module, *words in calls:
        run(module, *words)
    said = capsys.readouterr().out
    table = [line for line in said.splitlines() if line.startswith("| MoCo")]
    assert len(table) == 2 and "activation inside FAME's mask" in said and "videos of" not in said
    result = json.loads((runs / "fame/arms/small" / name / "fame/seed0-linear/result.json").read_text())
    assert 0 < result["inside"] < 100
    if classes:
        assert 0 <= result["linear/class/1"] <= 100 and 0 <= result["r1/class/1"] <= 100
        assert result["chance/class/1"] == 50 and result["videos"] == 10 and table[0].count("|  |") < 4
    else:
        assert set(result) == {"inside", "videos", "pretrained", "minutes"} and "no class folders" in said
        with pytest.raises(UserError, match="--probe class/2: --dataset folder has class folders alone"):
            weights = ["--pretrained", str(runs / "fame/arms/small" / name / "fame/seed0/checkpoint.pth")]
            main_probe.main([str(own / "walk"), "--dataset", "folder", "--probe", "class/2", *weights])


def test_the_linear_probe_never_sees_what_it_is_tested_on(own: Path, tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple[int, int]] = []

    def spied(x, y, test, test_labels, strength):  # type: ignore[no-untyped-def]
        seen.append((len(x), len(test)))
        assert not any((x == row).all(1).any() for row in test) and y.bincount().tolist() == [4, 4]
        return 100.0 if len(seen) == 1 else 0.0

    monkeypatch.setattr(main_probe, "linear_accuracy", spied)
    flags = [
        *NET,
        "--dataset",
        "folder",
        "--bad_videos",
        "skip",
        "--clip_per_video",
        "2",
        "--output-dir",
        str(tmp_path),
    ]
    run("fame.main_probe", str(own), *flags)
    assert seen == [(8, 2)] * 5
    assert json.loads((tmp_path / "result.json").read_text())["linear/class/1"] == pytest.approx(20)


def test_small_sets_are_told_what_to_give(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(own), *NET, *SMALL, "--dataset", "folder", "--bad_videos", "skip"]
    with pytest.raises(
        UserError, match="--batch_size 32: the data has 10 videos; give --batch_size 10 and --moco_k 20$"
    ):
        run("fame.train", *words, "--output-dir", str(tmp_path / "a"), "-b", "32", "--moco_k", "64")
    run("fame.train", *words, "--output-dir", str(tmp_path / "c"), "-b", "10", "--moco_k", "20", "--epochs", "0")
    assert "caution, queue" not in capsys.readouterr().out
    run("fame.train", *words, "--output-dir", str(tmp_path / "b"), "--moco_k", "64", "--epochs", "0")
    said = capsys.readouterr().out
    assert "caution, queue: --moco_k 64 holds more than the 20 keys of an epoch of 10 videos" in said
    assert "give --moco_k 16" in said


def test_a_run_starts_from_other_weights(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(own), *NET, *SMALL, "--dataset", "folder", "--bad_videos", "skip"]
    run("fame.train", *words, "--output-dir", str(tmp_path / "a"))
    run("fame.train", *words, "--output-dir", str(tmp_path / "b"), "--epochs", "0", "--init", str(tmp_path / "a"))
    assert f"start: {tmp_path / 'a'}: loaded" in capsys.readouterr().out
    first, second = (checkpoint.load(tmp_path / n / "checkpoint.pth")["state_dict"] for n in "ab")
    for key, value in second.items():
        name = key.removeprefix("module.encoder_k.").removeprefix("module.encoder_q.")
        if name != key:  # the key encoder starts as a copy
            assert torch.equal(value, first[f"module.encoder_q.{name}"]), key
    with pytest.raises(UserError, match="--init .*: the weights do not fit"):
        run("fame.train", *words, "--output-dir", str(tmp_path / "c"), "--init", str(tmp_path / "a"), "--width", "3")
    with pytest.raises(UserError, match="to train longer, start a new run from its weights: --init"):
        run("fame.train", *words, "--output-dir", str(tmp_path / "a"), "--epochs", "3")

    made = torchvision.models.get_model
    for arch in ("r3d_18", "r2plus1d_18", "s3d"):
        torch.manual_seed(1)
        public = made(arch, weights=None)
        monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights, public=public: public)
        network = build(arch, 8)
        head = network.fc[2].weight.clone()  # type: ignore[index]
        assert "dropped 2" in start_from(network, f"torchvision:{arch}")
        state = public.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items() if not k.startswith("fc."))
        assert torch.equal(head, network.fc[2].weight)  # type: ignore[index]
    with pytest.raises(UserError, match="--init torchvision:s3d: the weights do not fit .*; --arch must name"):
        start_from(build("tiny", 8), "torchvision:s3d")
    monkeypatch.undo()
    with pytest.raises(UserError, match="--init torchvision:nosuch: torchvision cannot give it .*r2plus1d_18"):
        start_from(build("tiny", 8), "torchvision:nosuch")


def test_a_cached_video_is_shrunk_frame_by_frame(own: Path) -> None:
    """So that a long one never lies in memory at its full size; the pictures are those of shrinking them together."""
    for name in ("a 1.mp4", "e e"):
        found = inspect(own / "walk" / name)
        sizes: list[tuple[int, ...]] = []

        def small(frame: np.ndarray, sizes: list[tuple[int, ...]] = sizes) -> np.ndarray:
            sizes.append(frame.shape)
            return augment.shrink(frame[None], 24)[0]

        whole = read(found, range(found.count))
        assert np.array_equal(read(found, range(found.count), small), augment.shrink(whole, 24))
        assert sizes == [whole.shape[1:]] * found.count


def test_a_new_dataset_is_one_entry_of_the_table(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A function that lists its videos, and a line: every script then takes it."""

    def list_mine(root: Path, train: bool, fold: int, unread: Counter[str]) -> tuple[list, list[str]]:
        files = sorted(file for file in root.glob("*/*") if file.suffix in (".mp4", ".avi", ".webm"))
        return [(file, file.parent.name, file.name) for file in files], ["man falls", "walk"]

    monkeypatch.setitem(DATASETS, "mine", Layout("walk/* and man falls/*", list_mine, queue=8))
    words = [str(own), "--dataset", "mine", "--bad_videos", "skip"]
    flags = [flag for flag in SMALL if flag not in ("--moco_k", "16")]
    run("fame.train", *words, *NET, *flags, "-b", "4", "--output-dir", str(tmp_path / "a"))
    said = capsys.readouterr().out
    assert "(mine): 6 videos of 2 classes" in said and "queue: 8 =" in said
    common = [*words, "--pretrained", str(tmp_path / "a/checkpoint.pth"), "--clip_per_video", "1", "--workers", "0"]
    run("fame.main_retrieve", *common, "--output-dir", str(tmp_path / "r"))
    run("fame.main_probe", *common, "--output-dir", str(tmp_path / "p"))
    tune = "--finetune -b 2 --epochs 1 --threads 1".split()
    run("fame.eval", *common, *tune, "--output-dir", str(tmp_path / "e"))
    assert json.loads((tmp_path / "p/result.json").read_text())["linear/class/1"] >= 0
