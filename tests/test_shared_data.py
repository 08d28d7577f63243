"""Folders, lists, keyed randomness and the resumable sampler."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from shared_utils import UserError
from shared_utils.data import (
    EpochSampler,
    Keyed,
    flat_folder,
    image_folder,
    list_file,
    list_images,
    load_image,
    need_folder,
    per_class,
    read_mat,
    read_text,
    sample_rng,
)


def write(path, colour=(255, 0, 0), size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_image_folder_numbers_classes_alphabetically(tmp_path):
    for name in ("b/2.png", "a/1.jpg", "a/sub/3.png"):
        write(tmp_path / name)
    data = image_folder(tmp_path, transform=lambda image: image.size)
    assert data.classes == ["a", "b"] and [y for _, y in data.samples] == [0, 0, 1]
    assert data[2] == ((5, 4), 1, 2)
    assert [y for _, y in flat_folder(tmp_path).samples] == [-1] * 3


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no class folder; expected"):
        image_folder(tmp_path)
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(UserError, match="empty_class: no image"):
        image_folder(tmp_path)
    write(tmp_path / "hidden" / ".hidden.png")
    with pytest.raises(UserError, match="hidden: no image"):
        list_images(tmp_path / "hidden")
    with pytest.raises(UserError, match="empty_class: nothing where folders of images are"):
        list_images(tmp_path)
    (tmp_path / "empty_class").rmdir()
    (tmp_path / "class.tar").write_bytes(b"x")
    with pytest.raises(UserError, match="class.tar: a file where folders of images are; unpack it"):
        list_images(tmp_path)


def test_list_files_in_both_forms(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        write(tmp_path / name)
    subset = tmp_path / "1percent.txt"
    subset.write_text("b/2.png\n")
    assert list_file(subset, tmp_path).samples == [(tmp_path / "b/2.png", 1)]
    subset.write_text("a/1.png 7\nb/2.png 3\n")
    assert [y for _, y in list_file(subset, tmp_path).samples] == [7, 3]
    subset.write_text("a/1.png\na/9.png\n")
    with pytest.raises(UserError, match=r"1percent.txt, line 2: .*a/9.png does not exist"):
        list_file(subset, tmp_path)
    subset.write_text("a/1.png x\n")
    with pytest.raises(UserError, match="line 1: expected"):
        list_file(subset, tmp_path)
    subset.write_text("\n")
    with pytest.raises(UserError, match="the list is empty"):
        list_file(subset, tmp_path)


def test_unreadable_images_are_named(tmp_path):
    write(tmp_path / "ok.png", size=(60, 60))
    whole = (tmp_path / "ok.png").read_bytes()
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    assert load_image(tmp_path / "ok.png").size == (60, 60) and len(whole) > 0
    for name in ("zero.png", "text.jpg", "cut.jpg"):
        with pytest.raises(UserError, match=f"{name}: not a readable image") as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="none.png: no such file"):
        load_image(tmp_path / "none.png")


def test_16_bits_are_scaled_and_floats_refused(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "8.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "16.png")
    eight, sixteen = (np.asarray(load_image(tmp_path / name)) for name in ("8.png", "16.png"))
    assert sixteen.shape == (16, 16, 3) and (eight == sixteen).all()
    assert np.asarray(load_image(tmp_path / "16.png", None)).max() == 65535  # a label map is left as it is
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match="f.tif: not a readable image .*mode F, whose range is unknown"):
        load_image(tmp_path / "f.tif")


def test_what_is_no_folder_is_told_apart(tmp_path):
    (tmp_path / "set.zip").write_text("")
    with pytest.raises(UserError, match=r"set/train: no such folder; unpack .*set\.zip; expected X"):
        need_folder(tmp_path / "set/train", "expected X")
    with pytest.raises(UserError, match=r"train: no such folder; .*set\.zip is a file, unpack it if"):
        need_folder(tmp_path / "set.zip/train", "expected X")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link is a link that leads nowhere; expected X"):
        need_folder(tmp_path / "link", "expected X")


@pytest.mark.parametrize("odd", ["c.tar", "c.jpg", "c", "link"])
def test_what_lies_between_class_folders_is_not_skipped(odd, tmp_path):
    write(tmp_path / "a/1.png")
    (tmp_path / "notes.txt").write_text("")
    assert image_folder(tmp_path).classes == ["a"]
    (tmp_path / odd).symlink_to("nowhere") if odd == "link" else (tmp_path / odd).write_text("")
    with pytest.raises(UserError, match=f"{odd}: a .* where class folders are; unpack it, move or remove it"):
        image_folder(tmp_path)


def test_links_are_followed_and_loops_named(tmp_path):
    write(tmp_path / "elsewhere/2.png")
    write(tmp_path / "set/a/1.png")
    (tmp_path / "set/a/more").symlink_to(tmp_path / "elsewhere")
    assert [path.name for path in list_images(tmp_path / "set/a")] == ["1.png", "2.png"]
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set")
    with pytest.raises(UserError, match="more/back: a link that leads nowhere or to a folder it is in"):
        list_images(tmp_path / "set/a")


def test_lists_that_are_no_text(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbfa/1.png\n")  # a spreadsheet's mark of UTF-8
    assert read_text(file) == "a/1.png\n"
    file.write_bytes(b"a/1\xff.png")
    with pytest.raises(UserError, match=r"list.txt: not UTF-8 text \(byte 3\); expected a list"):
        list_file(file, tmp_path)
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        read_text(tmp_path)
    with pytest.raises(UserError, match="list.txt: not a readable .mat file .*; expected X"):
        read_mat(file, "X")


def test_lists_number_classes_as_folders_do(tmp_path):
    for name in ("a/1.png", "b/2.png", ".cache/3.png"):
        write(tmp_path / name)
    (tmp_path / "list.txt").write_text("b/2.png\n")
    assert list_file(tmp_path / "list.txt", tmp_path).samples[0][1] == 1 == image_folder(tmp_path).samples[-1][1]


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(1).item()


def test_randomness_depends_on_seed_epoch_and_index_alone():
    def draw(workers, seed=3, epoch=1):
        sampler = EpochSampler(12, 4, 0, shuffle=False).at(epoch)
        loader = torch.utils.data.DataLoader(Keyed(Noise(), seed), batch_sampler=sampler, num_workers=workers)
        return torch.cat([torch.stack([torch.as_tensor(x).double() for x in batch], 1) for batch in loader])

    assert torch.equal(draw(0), draw(2))
    for other in (draw(0, seed=4), draw(0, epoch=2)):
        assert (draw(0)[:, 1:] != other[:, 1:]).all()
    assert len(draw(0)[:, 1:].unique()) == 36  # three generators, twelve samples, no two alike


def test_sample_rng_restores_the_global_generators():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with sample_rng(1, 2, 3):
        inside = random.random(), np.random.rand(), torch.rand(1).item()
    after = random.random(), np.random.rand(), torch.rand(1).item()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    assert after == (random.random(), np.random.rand(), torch.rand(1).item()) and inside != after


def flatten(sampler):
    return [key for batch in sampler for key in batch]


def test_an_epoch_visits_everything_once_and_starts_anywhere():
    sampler = EpochSampler(103, 10, seed=5)
    first = flatten(sampler.at(0))
    assert len(first) == 100 == len({i for _, i in first}) and all(epoch == 0 for epoch, _ in first)
    assert flatten(sampler.at(0, 7)) == first[70:] and len(sampler) == 3 and sampler.steps_per_epoch == 10
    assert [i for _, i in flatten(sampler.at(1))] != [i for _, i in first]
    assert flatten(EpochSampler(103, 10, seed=6)) != first


def test_processes_share_the_global_batch():
    one = list(EpochSampler(64, 8, seed=1).at(2))
    parts = [list(EpochSampler(64, 4, seed=1, rank=r, world=2).at(2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == one


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="a global batch of 16 needs as many samples, the data has 10"):
        EpochSampler(10, 8, 0, world=2)


@pytest.mark.parametrize(("size", "least", "kept"), [(23, None, 0), (23, 0, 7), (23, 3, 7), (23, 4, 0), (24, 0, 8)])
def test_the_last_batch_is_kept_where_it_is_large_enough(size, least, kept):
    """Of 8 a process's share: 16 a step with two processes."""
    flat = lambda s: [i for batch in s for _, i in batch]  # noqa: E731
    parts = [EpochSampler(size, 8, 1, rank=r, world=2, least=least) for r in (0, 1)]
    steps = size // 16 + (kept > 0)
    assert [len(s) for s in parts] == [s.steps_per_epoch for s in parts] == [steps, steps]
    seen = flat(parts[0]) + flat(parts[1])
    assert len(set(seen)) == len(seen) == size // 16 * 16 + kept
    weights = [[s.weight(step) for step in range(steps)] for s in parts]
    assert all(a + b == pytest.approx(2) for a, b in zip(*weights))
    assert weights[0][: size // 16] == weights[1][: size // 16] == [1.0] * (size // 16)
    one = list(EpochSampler(size, 16, 1, least=least and 2 * least).at(0))
    both = [a + b for a, b in zip(parts[0].at(0), parts[1].at(0))]
    assert one == both  # the order too
    assert list(parts[0].at(0, steps - 1)) == list(parts[0].at(0))[-1:]


def test_cache_refuses_what_would_not_fit(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "a" / "x.png")
    assert image_folder(tmp_path).image(0).size == (64, 64)
    kept = per_class(image_folder(tmp_path), 0, cache=True)
    (tmp_path / "a" / "x.png").unlink()
    assert kept.image(0).size == (64, 64)  # decoded already
    Image.new("RGB", (64, 64)).save(tmp_path / "a" / "x.png")
    monkeypatch.setattr("os.sysconf", lambda name: 100)  # a machine of 10,000 bytes; the image takes 12,288
    with pytest.raises(UserError, match="--cache: 1 decoded images take about 0 GiB.*leave --cache away"):
        per_class(image_folder(tmp_path), 0, cache=True)


def test_first_images_of_each_class(tmp_path):
    for name in ("a/1", "a/2", "a/3", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.png")
    two = per_class(image_folder(tmp_path), 2)
    assert [(path.parent.name, path.stem, y) for path, y in two.samples] == [
        ("a", "1", 0),
        ("a", "2", 0),
        ("b", "1", 1),
    ]
    assert two.labels.tolist() == [0, 0, 1] and len(per_class(image_folder(tmp_path), 0)) == 4
