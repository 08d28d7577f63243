"""What people look at: the strips of the folders, the tiles they are made of, and the text page of tensorboard."""

from __future__ import annotations

import importlib
import resource
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared_utils import UserError, checkpoint, evaluation
from shared_utils.flags import Parser, add_run_flags
from shared_utils.lab import tiles
from shared_utils.lab.results import papers
from shared_utils.pictures import save_picture
from shared_utils.run import Run, card

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [paper.folder for paper in papers(ROOT)]


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_strip_refuses_in_one_line_what_is_no_checkpoint_of_its_job(folder: str, tmp_path: Path) -> None:
    strip = importlib.import_module(f"{folder}.lab.strip")
    absent = tmp_path / "absent.pth"
    with pytest.raises(UserError, match=rf"absent.pth: no such checkpoint file; make it with: bash {folder}/run_"):
        strip.main(["--pretrained", str(absent)])
    other = tmp_path / "other.pth"
    checkpoint.save(other, {"state_dict": {"fc.weight": torch.zeros(1)}, "args": {"lr": 1.0}})
    with pytest.raises(UserError, match=rf"other.pth: not a checkpoint of {folder}\.") as caught:
        strip.main(["--pretrained", str(other), "--out", str(tmp_path / "x.png")])
    assert "\n" not in str(caught.value) and not (tmp_path / "x.png").exists()
    with pytest.raises(SystemExit) as stop:
        strip.main(["--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_strip_in_the_tree_is_small_and_shown(folder: str) -> None:
    file = ROOT / folder / "lab" / "strip.png"
    with Image.open(file) as image:
        assert image.format == "PNG" and 400 <= image.width <= tiles.WIDTH and image.height <= 450
    assert file.stat().st_size <= 60 * 1024
    assert "](lab/strip.png)" in (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert f'"{folder}/lab/strip.png"' in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_checkpoint_gives_its_flags_with_paths_as_paths(tmp_path: Path) -> None:
    p = Parser(prog="job")
    p.add_argument("--data", type=Path, default=None)
    p.add_argument("--n", type=int, default=1)
    checkpoint.save(tmp_path / "a.pth", {"model": {}, "args": {"data": "here", "n": 3, "more": 1}})
    saved, flags = tiles.open_run(tmp_path / "a.pth", p, "bash make", ["model"])
    assert flags == Namespace(data=Path("here"), n=3, more=1) and saved["model"] == {}
    with pytest.raises(UserError, match="not a checkpoint of job; make one with: bash make"):
        tiles.open_run(tmp_path / "a.pth", p, "bash make", ["bank"])
    for name in ("margin", "depth"):  # newer than the file
        p.add_argument(f"--{name}", type=int, default=7)
    old = {"data": "here", "n": 3}
    checkpoint.save(tmp_path / "a.pth", {"args": old})
    assert tiles.open_run(tmp_path / "a.pth", p, "bash make")[1] == Namespace(data=Path("here"), n=3, margin=7, depth=7)
    for entries in ({"args": old, "job": "other"}, {"args": {"n": 3}}, {"args": {**old, "margin": 1, "alien": 1}}):
        checkpoint.save(tmp_path / "a.pth", entries)
        with pytest.raises(UserError, match="not a checkpoint of job"):
            tiles.open_run(tmp_path / "a.pth", p, "bash make")


def test_pictures_are_not_smoothed_at_multiples_and_frames_surround_them() -> None:
    x = torch.zeros(3, 2, 2)
    x[0, 0, 0] = 1
    grown = tiles.picture(x, 8)
    assert grown.size == (8, 8) and colours(grown) == {(255, 0, 0), (0, 0, 0)}
    framed = tiles.tile(x, 8, frame=tiles.GREEN)
    assert framed.size == (14, 14) and framed.getpixel((0, 0)) == tiles.GREEN and framed.getpixel((3, 3)) == (255, 0, 0)
    assert tiles.tile(x, 8, "a caption that is wider than the picture").width > 100


def test_words_are_broken_at_the_width() -> None:
    text = "several words that do not fit beside each other"
    whole, broken = tiles.words(text), tiles.words(text, width=90)
    assert broken.width == 90 and broken.height >= 3 * whole.height and whole.width > 200
    assert tiles.words("one\ntwo").height == 2 * whole.height


def test_a_grid_keeps_columns_and_rows() -> None:
    red, blue = (Image.new("RGB", size, c) for size, c in (((10, 4), (255, 0, 0)), ((2, 8), (0, 0, 255))))
    out = tiles.grid([[red, blue], [blue, red]], gap=1)
    assert out.size == (21, 17)
    assert out.getpixel((5, 4)) == (255, 0, 0) and out.getpixel((15, 4)) == (0, 0, 255)
    assert out.getpixel((5, 12)) == (0, 0, 255) and out.getpixel((15, 12)) == (255, 0, 0)


def test_bars_and_heat_show_values() -> None:
    image = np.asarray(tiles.bars([1.0, 0.5, 0.0], (30, 41), [tiles.RED] * 3))
    high = [(image[:, x] == tiles.RED).all(1).sum() for x in (4, 14, 24)]
    assert high[0] == 40 and high[1] == 20 and high[2] == 0  # the lowest line is the axis
    shown = tiles.heat(torch.tensor([[0.0, 0.5, 1.0]])).sum(0)[0]
    assert shown[0] < shown[1] < shown[2]


def test_save_keeps_the_width_and_reports_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    said = tiles.save(Image.new("RGB", (1000, 20), "white"), tmp_path / "a.png")
    assert said.startswith(f"{tmp_path}/a.png: {tiles.WIDTH} x 20 pixels")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="b.png: cannot be written"):
        tiles.save(Image.new("RGB", (10, 10)), tmp_path / "file" / "b.png")


def test_a_full_disk_harms_no_older_picture_and_no_older_result(tmp_path: Path) -> None:
    picture, result = tmp_path / "a.png", tmp_path / "result.json"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)

    def write(image: np.ndarray, number: float) -> None:
        save_picture(Image.fromarray(image), picture)
        evaluation.write_result(tmp_path, {"top1": number, "more": "x" * 5000})

    write(noise[::-1], 1.0)
    before = picture.read_bytes(), result.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(UserError, match="a.png: cannot be written .*File too large.*unharmed"):
            save_picture(Image.fromarray(noise), picture)
        with pytest.raises(UserError, match="result.json: cannot be written .*File too large.*unharmed"):
            evaluation.write_result(tmp_path, {"top1": 2.0, "more": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (picture.read_bytes(), result.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "result.json"]
    with pytest.raises(UserError, match="not the ending of a picture"):
        save_picture(Image.fromarray(noise), tmp_path / "a.txt")


def test_the_text_page_has_command_facts_and_flags(tmp_path: Path) -> None:
    config = {
        "command": "python -m x --a 1",
        "versions": {"torch": "2"},
        "git_commit": "abc",
        "flags": {"a": 1, "b": None},
    }
    text = card(config, {"data": "3 images | 2 classes"})
    assert text.startswith("    python -m x --a 1\n\n| | |\n|---|---|\n| data | 3 images \\| 2 classes |\n")
    assert "| git_commit | abc |" in text and "| `--a` | 1 |" in text and "--b" not in text

    parser = Parser()
    add_run_flags(parser, "x")
    args = parser.parse_args(["--output-dir", str(tmp_path / "run"), "--workers", "0", "--threads", "1"])
    run = Run(args, "x", "y")
    run.preflight({"data": "3 images"})
    run.close()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (tag,) = events.Tags()["tensors"]
    assert tag == "run/command_and_flags/text_summary"
    assert b"| data | 3 images |" in events.Tensors(tag)[0].tensor_proto.string_val[0]
