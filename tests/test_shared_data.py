"""Folders, lists, keyed randomness and the resumable sampler."""

import contextlib
import gc
import os
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from shared_utils import UserError, decode
from shared_utils.data import (
    ArrayImages,
    EpochSampler,
    ImageList,
    Keyed,
    fingerprint,
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
    tell,
    training_folder,
)
from shared_utils.evaluation import labelled_indices
from tests.bench import own_memory


def write(path, colour=(255, 0, 0), size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_image_folder_numbers_classes_alphabetically(tmp_path):
    for name in ("b/2.png", "a/1.jpg", "a/sub/3.png"):
        write(tmp_path / name)
    data = image_folder(tmp_path, transform=lambda image: image.size)
    assert data.classes == ["a", "b"] and data.labels.tolist() == [0, 0, 1]
    assert data[2] == ((5, 4), 1, 2)
    assert flat_folder(tmp_path).labels.tolist() == [-1] * 3


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no class folder; expected"):
        image_folder(tmp_path)
    with pytest.raises(UserError, match="nowhere/train: no such folder; expected .*or images of your own in .*nowhere"):
        training_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no image .*; add some"):
        training_folder(tmp_path)
    (tmp_path / "1.heic").touch()
    with pytest.raises(UserError, match="no image .*; 1 .heic is there; convert them"):
        training_folder(tmp_path, count=2)
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
    listed = list_file(subset, tmp_path)
    assert listed.paths() == [tmp_path / "b/2.png"] and listed.labels.tolist() == [1]
    subset.write_text("a/1.png 7\nb/2.png 3\n")
    assert list_file(subset, tmp_path).labels.tolist() == [7, 3]
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
    assert list_file(tmp_path / "list.txt", tmp_path).label(0) == 1 == image_folder(tmp_path).label(-1)


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
    with pytest.raises(UserError, match="a global batch of 16 needs"):
        EpochSampler(10, 8, 0, world=2, least=6)
    parts = [list(EpochSampler(10, 8, 0, rank=r, world=2, least=0)) for r in (0, 1)]  # the last is the first
    assert [len(part) for part in parts] == [1, 1] and sorted(i for part in parts for _, i in part[0]) == [*range(10)]


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
    assert [(path.parent.name, path.stem, y) for path, y in zip(two.paths(), two.labels.tolist())] == [
        ("a", "1", 0),
        ("a", "2", 0),
        ("b", "1", 1),
    ]
    assert two.labels.tolist() == [0, 0, 1] and len(per_class(image_folder(tmp_path), 0)) == 4


# --- other people's files -------------------------------------------------------------------------------------------


def test_hidden_and_helper_files_are_no_data_and_no_fault(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/deep/2.png"):
        write(tmp_path / name)
    wanted = image_folder(tmp_path).paths()
    for helper in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails", "#recycle", "$RECYCLE.BIN", "lost+found"):
        for above in ("", "a", "b/deep"):
            write(tmp_path / above / helper / "1.png")
            write(tmp_path / above / helper / "c.tar" / "1.png")
            (tmp_path / above / helper / "more").mkdir()  # empty
            (tmp_path / above / f"{helper}_").mkdir(exist_ok=True) if helper == ".thumbnails" else None  # hidden, empty
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._1.png", "._x.jpg", "Icon\r", "a/._1.png", "b/.picasa.ini"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "b/.link").symlink_to("nowhere")
    found = image_folder(tmp_path)
    assert found.paths() == wanted and found.classes == ["a", "b"] and found.labels.tolist() == [0, 1, 1]
    assert not found.unread and len(flat_folder(tmp_path)) == 3
    (tmp_path / "a/1.png").unlink()  # a class of helpers alone has no image
    with pytest.raises(UserError, match="a: no image"):
        image_folder(tmp_path)


def test_what_is_not_read_is_counted_by_ending(tmp_path):
    for name in ("a/1.jfif", "a/2.JPE", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with open(tmp_path / name, "wb") as handle:
            Image.new("RGB", (4, 4), (0, 255, 0)).save(handle, "PNG" if name.endswith("png") else "JPEG")
    for name in ("a/3.heic", "a/4.HEIC", "b/2.avif", "b/notes.txt", "b/.hidden.heic"):
        (tmp_path / name).write_bytes(b"x")
    found = image_folder(tmp_path)
    assert len(found) == 3 and found.pixels(0)[0, 0].argmax() == 1
    assert found.unread == {".heic": 2, ".avif": 1, ".txt": 1} == flat_folder(tmp_path).unread
    assert tell(found.unread) == "2 .heic, 1 .avif, 1 .txt"
    assert per_class(found, 1).unread == found.unread  # for the preflight of a run
    for name in ("1.jfif", "2.JPE"):
        (tmp_path / "a" / name).unlink()
    with pytest.raises(UserError, match="a: no image .*; 2 .heic are there; convert them"):
        image_folder(tmp_path)


def grey_png(path, array, bits):
    """A grey PNG of 1, 2 or 4 bits, which PIL does not write."""
    height, width = array.shape
    shifted = np.unpackbits(array.astype(np.uint8)[:, :, None], axis=2)[:, :, -bits:].reshape(height, -1)
    rows = np.packbits(shifted, axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_label_maps_of_few_bits_keep_their_numbers(bits, tmp_path):
    array = np.arange(35).reshape(5, 7) % 2**bits
    grey_png(tmp_path / "x.png", array, bits)
    assert (np.asarray(load_image(tmp_path / "x.png", None)).astype(int) == array).all()
    scaled = np.asarray(load_image(tmp_path / "x.png", "L"))  # a photo: 0 to white
    assert (scaled == array * (255 // (2**bits - 1))).all()
    tiff = Image.fromarray((array * 17).astype(np.uint8))  # 8 bits are what they are
    tiff.save(tmp_path / "8.tif")
    assert (np.asarray(load_image(tmp_path / "8.tif", None)) == array * 17).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_flipped_bit_of_a_png_is_never_another_number(mode, tmp_path):
    """Pillow's decoder skips the checksums of the pixels, and alone it gives other numbers for some of these files."""
    rng = random.Random(0)
    array = np.random.default_rng(0).integers(0, 12, (12, 16)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    Image.fromarray(array).convert(mode).save(tmp_path / "x.png")
    whole, wanted = (tmp_path / "x.png").read_bytes(), np.asarray(load_image(tmp_path / "x.png", None))
    refused = unseen = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "x.png").write_bytes(data)
        try:
            assert np.array_equal(np.asarray(load_image(tmp_path / "x.png", None)), wanted)
        except UserError as error:
            assert "x.png: not a readable image" in str(error)
            refused += 1
            with contextlib.suppress(Exception), Image.open(tmp_path / "x.png") as image:
                unseen += not np.array_equal(np.asarray(image), wanted)
    assert refused > 250 and (mode != "L" or unseen)


def two_classes(root):
    for name in ("a/1.png", "a/my cat 2.png", "b/1.png", "b/2.png"):
        write(root / name)
    return image_folder(root)


@pytest.mark.parametrize(
    "line",
    ["b/2.png", "b/2.png  ", "\tb/2.png\t", "./b/2.png", "train/b/2.png", "set/train/b/2.png", "{root}/b/2.png",
     "a/../b/2.png", "b//2.png", "b\\2.png", "b/2.png 1", "b/2.png\t1", "b/2.png,1", '"b/2.png" 1', "{root}/b/2.png 1 ",
     "./train/b/2.png 1"],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_as_other_programs_write_them(line, end, tmp_path):
    root = tmp_path / "set/train"
    train = two_classes(root)
    file = tmp_path / "list.txt"
    file.write_bytes((end + line.format(root=root) + end + end).encode())
    listed = list_file(file, root)
    assert listed.paths() == [root / "b/2.png"] and listed.labels.tolist() == [1]
    assert labelled_indices(train, file, 0, root, 0) == [3]


def test_names_with_blanks_and_a_linked_root(tmp_path):
    root = tmp_path / "set/train"
    train = two_classes(root)
    file = tmp_path / "list.txt"
    for text, expected in (
        ("a/my cat 2.png\n", [1]),
        ("a/my cat 2.png 0\n", [1]),
        ('"a/my cat 2.png" 0\n', [1]),
        ("my cat 2.png\n2.png \n", [1, 3]),
    ):
        file.write_text(text)
        assert labelled_indices(train, file, 0, root, 0) == expected, text
    (tmp_path / "link").symlink_to(root)  # the list was written with the folder's own name
    file.write_text(f"{root}/b/2.png\n")
    assert list_file(file, tmp_path / "link").paths() == [tmp_path / "link/b/2.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n1.png\n", r"line 2: 2 training images are named 1.png \(.*a/1.png, .*b/1.png\); write `CLASS/image.jpg`"),
        ("2.png\n9.png\n", "line 2: no training image is named 9.png"),
        ("b/2.png\n\nb/9.png\n", "line 3: .*b/9.png does not exist"),
        ("/elsewhere/b/2.png\n", "line 1: /elsewhere/b/2.png does not exist"),
        ("{tmp}/out.png\nb/2.png\n", "line 1: .*out.png is in no class folder of"),
        ("../../out.png\n", "line 1: .*out.png is in no class folder of"),
        ("b/2.png 1\nb/1.png\n", "line 2: no label, other than line 1"),
        ("b/1.png\nb/2.png 1\n", "line 2: a label, other than line 1"),
        ("b/2.png 0\n", "line 1: label 0, but its folder is class 1"),
        ("b/2.png dog\n", "line 1: expected .*, found 'b/2.png dog'"),
        ("b/2.png 1 2\n", "line 1: expected .*, found"),
    ],
)
def test_lists_that_do_not_fit_are_one_clear_line(text, message, tmp_path):
    root = tmp_path / "set/train"
    train = two_classes(root)
    write(tmp_path / "out.png")
    file = tmp_path / "list.txt"
    file.write_text(text.format(tmp=tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        labelled_indices(train, file, 0, root, 0)
    assert "\n" not in str(caught.value)


def test_an_image_that_a_list_names_twice(tmp_path):
    """It would count twice in a list of images; a list of what has labels says the same twice."""
    root = tmp_path / "set/train"
    train, file = two_classes(root), tmp_path / "list.txt"
    file.write_text("b/2.png\na/1.png\n./b/2.png\n")
    with pytest.raises(UserError, match=r"line 3: ./b/2.png stands in line 1 already; remove one"):
        list_file(file, root)
    names = [train.path(i).relative_to(root).as_posix() for i in labelled_indices(train, file, 0, root, 0)]
    assert names == ["a/1.png", "b/2.png"]


# --- memory ---------------------------------------------------------------------------------------------------------


def growth(visit):
    """Bytes that a forked process gets for itself while `visit` goes through the numbers 0 to 9,999."""
    gc.collect()
    gc.freeze()  # a collection would write into objects that have nothing to do with it
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        for _ in range(2000):
            visit(0)
        before = own_memory(os.getpid())
        for i in range(10_000):
            visit(7919 * i % 10_000)
        os.write(sender, b"%d" % (own_memory(os.getpid()) - before))
        os._exit(0)
    gc.unfreeze()
    os.waitpid(child, 0)
    return int(os.read(receiver, 20))


def test_a_process_that_reads_a_list_gets_no_copy_of_it():
    objects = [(Path(f"/data/set/train/n{i % 100:08d}/image_{i:08d}.JPEG"), 10**6 + i) for i in range(10_000)]
    images = ImageList(objects, [])
    some = images.take(range(0, 10_000, 2), range(5_000))
    assert growth(lambda i: (str(objects[i][0]), objects[i][1])) > 1_500_000  # its references are counted
    read = [growth(lambda i: (images.file(i), images.label(i), some.file(i // 2), some.label(i // 2))) for _ in "123"]
    assert min(read) < 300_000, read  # one in some hundred had megabytes that a second one has not
    assert images.path(9999) == objects[9999][0] and some.path(2) == objects[4][0] and some.label(2) == 2


def test_names_need_not_be_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/gr\xfcn"
    os.mkdir(folder)
    with open(folder + b"/\xff 1.png", "wb") as handle:
        Image.new("RGB", (2, 2), (9, 8, 7)).save(handle, "PNG")
    images = image_folder(tmp_path)
    assert images.pixels(0)[0, 0].tolist() == [9, 8, 7] and os.fsencode(images.path(0)).endswith(b"gr\xfcn/\xff 1.png")
    with pytest.raises(IndexError):
        images.path(1)


@pytest.mark.parametrize("sizes", [[(5, 4)] * 4, [(5, 4), (3, 7), (1, 1), (8, 2)]])
def test_decoded_images_are_one_array(sizes, tmp_path):
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(
            tmp_path / f"{'ab'[i % 2]}/{i}.png"
        )
    plain, kept = image_folder(tmp_path), image_folder(tmp_path).cached()
    assert plain.array is None and not plain.decoded and kept.decoded
    if len({*sizes}) == 1:
        assert kept.array.shape == (4, 4, 5, 3) and kept.array.dtype == np.uint8
        assert np.shares_memory(kept.pixels(1), kept.array)  # no copy for each image
    else:
        assert kept.array is None
    some, relabelled = kept.take([3, 0]), kept.take(slice(None), [7] * 4)
    for i in range(4):
        assert kept.pixels(i).dtype == np.uint8 and (kept.pixels(i) == plain.pixels(i)).all()
        assert (np.asarray(kept.image(i)) == np.asarray(plain.image(i))).all() and kept.image(i).mode == "RGB"
        assert (relabelled.pixels(i) == plain.pixels(i)).all() and relabelled[i][1] == 7
    for j, i in enumerate((3, 0)):
        assert (some.pixels(j) == plain.pixels(i)).all() and some.path(j) == plain.path(i)
        assert some.label(j) == plain.label(i)
    with pytest.raises(ValueError, match="2 labels for 4 images"):
        kept.take(slice(None), [1, 2])
    for thing in (plain, kept):  # also where processes are started anew and not forked
        again = pickle.loads(pickle.dumps(thing))
        assert (again.pixels(2) == plain.pixels(2)).all() and again.paths() == plain.paths()


def test_arrays_are_image_lists():
    array = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    images = ArrayImages(array, [0, 0, 1, 1, 1, 0], ["a", "b"])
    one = per_class(images, 1)
    assert one.labels.tolist() == [0, 1] and (one.array == array[[0, 2]]).all() and one.path(1).name == "2"
    assert (np.asarray(one.image(1)) == array[2]).all() and images.cached() is images
    assert images.fingerprint() == ArrayImages(array.copy(), [0, 0, 1, 1, 1, 0], ["a", "b"]).fingerprint()
    other = array.copy()
    other[3, 0, 0, 0] ^= 1
    assert images.fingerprint() != ArrayImages(other, [0, 0, 1, 1, 1, 0], ["a", "b"]).fingerprint()


def test_fingerprints_are_of_the_content_and_not_of_the_place(tmp_path):
    for place in ("one/set", "two"):
        two_classes(tmp_path / place)
    first, second = image_folder(tmp_path / "one/set"), image_folder(tmp_path / "two")
    assert first.fingerprint() == second.fingerprint() == first.cached().fingerprint() and first.fingerprint()[0] == 4
    assert fingerprint(first.paths()) == fingerprint(map(str, second.paths())) != first.fingerprint()  # without labels
    changed = [second.take([0, 1, 2]), second.take([1, 0, 2, 3]), second.take(slice(None), [0, 0, 1, 0])]
    (tmp_path / "two/b/2.png").rename(tmp_path / "two/b/3.png")
    changed.append(image_folder(tmp_path / "two"))
    (tmp_path / "two/b/3.png").rename(tmp_path / "two/b/2.png")
    assert second.fingerprint() == first.fingerprint()
    assert all(images.fingerprint() != first.fingerprint() for images in changed)
    write(tmp_path / "two/b/2.png", size=(90, 90))
    assert second.fingerprint() != first.fingerprint()
    (tmp_path / "frames").mkdir()
    empty = fingerprint([tmp_path / "frames"])
    write(tmp_path / "frames/1.png")
    assert fingerprint([tmp_path / "frames"]) != empty and fingerprint([])[0] == 0


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_photos_of_image_lists_are_turned_as_their_tag_says(tmp_path, ending, tag):
    """By both loaders, whole and at a part of the size; another program's view (ImageOps) is the truth."""
    pixels = np.zeros((48, 80, 3), np.uint8)
    pixels[:24, :40], pixels[24:, 40:], pixels[:24, 40:] = (200, 20, 20), (20, 200, 20), (20, 20, 200)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    file = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(file, exif=exif, quality=95)
    with Image.open(file) as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    images = flat_folder(tmp_path)
    assert np.array_equal(np.asarray(images.image(0)), shown)
    assert np.array_equal(images.pixels(0), shown)
    encoded = decode.Encoded(file)
    assert (encoded.height, encoded.width) == shown.shape[:2] and np.array_equal(encoded.pixels(), shown)
    if encoded.simple:
        small, (height, width) = encoded.pixels(2), shown.shape[:2]
        assert small.shape[:2] == (height // 2, width // 2)
        for y, x in ((1, 1), (1, 3), (3, 1), (3, 3)):  # the middles of the quarters
            pair = small[y * height // 8, x * width // 8], shown[y * height // 4, x * width // 4]
            assert abs(pair[0].astype(int) - pair[1]).max() < 12
    assert np.asarray(load_image(file)).shape == pixels.shape, "a reader of photos with label maps sees them as stored"
