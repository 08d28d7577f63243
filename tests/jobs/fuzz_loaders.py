"""Small sets in their publishers' layouts, and what reads them: the loaders of fuzz.py."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# --- small sets in their publishers' layouts --------------------------------------------------------------------------


def photo(path: Path, number: int = 0, size: int = 40) -> str:
    """An image of coloured noise; what it is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (size, size, 3), np.uint8)).save(path)
    return path.name


def mask(path: Path, value: int = 1, size: int = 40, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((size, size), np.uint8)
    array[10:30, 10:30] = value
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([(i * 37 + c * 91) % 256 for i in range(256) for c in range(3)])
    image.save(path)


def text(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def film(path: Path, number: int) -> None:
    """12 frames of an mp4 or avi."""
    from shared_utils.lab.mini import _avi

    _avi(path, np.random.default_rng(number).integers(0, 255, (12, 48, 48, 3), np.uint8))


def films(pattern: Path, count: int) -> None:
    """So many of them; `{}` in the name is their number."""
    for number in range(count):
        film(pattern.with_name(pattern.name.format(number)), number)


def classes(root: Path, *parts: str, each: int = 8, own: bool = False) -> list[str]:
    """PART/c0..c3/00.jpg...; with `own` no class is in two parts."""
    return [
        f"{part}/{name}/" + photo(root / part / name / f"{i:02d}.jpg", 31 * c + i)
        for p, part in enumerate(parts)
        for c, name in enumerate(f"{part[:2] if own else ''}c{c}" for c in range(4))
        for i in range(each)
    ]


def fine(kind: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        from sage.lab import finegrained_mini as finegrained
        from shared_utils.data import image_folder

        classes(root / "source", "train", "val", each=4)
        for path in (root / "source/val").rglob("*.jpg"):
            path.rename(path.with_name(f"v{path.parent.name}{path.name}"))
        for path in (root / "source/train").rglob("*.jpg"):
            path.rename(path.with_name(f"t{path.parent.name}{path.name}"))
        splits = {True: image_folder(root / "source/train"), False: image_folder(root / "source/val")}
        {"cub": finegrained._write_cub, "cars": finegrained._write_cars, "aircraft": finegrained._write_aircraft}[kind](
            splits, root
        )
        if kind == "cars":  # where mra looks for the test part
            shutil.copy(root / "stanford_cars/cars_test_annos_withlabels.mat", root / "stanford_cars/devkit")
        shutil.rmtree(root / "source")

    return make


def videos(layout: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        rows = [(c, f"v{c}_{i}") for c in range(2) for i in range(8)]
        for n, (c, name) in enumerate(rows):
            if layout == "fight":
                for t in range(12):
                    photo(root / f"c{c}" / name / f"{t:03d}.jpg", n + t, 48)
            elif layout == "diving48":
                film(root / "rgb" / f"{name}.mp4", n)
            else:
                film(root / ("train" if layout == "k400" else "data") / f"c{c}" / f"{name}.avi", n)
        if layout == "ucf101":
            text(root / "anno/trainlist01.txt", [f"c{c}/{name}.avi {c + 1}" for c, name in rows])
        elif layout == "hmdb51":
            for c in range(2):
                text(root / f"anno/c{c}_test_split1.txt", [f"{name}.avi 1" for k, name in rows if k == c])
        elif layout == "diving48":
            facts = [{"vid_name": name, "label": c} for c, name in rows]
            (root / "Diving48_V2_train.json").write_text(json.dumps(facts))
        elif layout == "fight":
            source = [f"{name},c{c},{1 + i % 2 + 3 * (i % 4 > 1)}" for i, (c, name) in enumerate(rows)]
            text(root / "clips.csv", ["clip,class,source_video", *source])

    return make


def segmentation(images: str, labels: str, names: str = "", mode: str = "L", value: int = 1) -> Callable[[Path], None]:
    """`{}` of images and labels is 00..15; `names` the list of them."""

    def make(root: Path) -> None:
        for i in range(16):
            photo(root / images.format(f"{i:02d}"), i)
            mask(root / labels.format(f"{i:02d}"), value, mode=mode)
        if names:
            text(root / names, [f"{i:02d}" for i in range(16)])

    return make


def sequences(frames: str, masks: str = "", names: str = "", pairs: bool = False) -> Callable[[Path], None]:
    """Two sequences s0, s1 of four frames; {0}: sequence, {1}: frame."""

    def make(root: Path) -> None:
        for s in ("s0", "s1"):
            for t in range(4):
                photo(root / frames.format(s, f"{t:05d}"), t, 48)
                if masks:
                    mask(root / masks.format(s, f"{t:05d}"), 1, 48, "P")
        if names:
            line = "/JPEGImages/480p/{0}/00000.jpg /Annotations/480p/{0}/00000.png" if pairs else "{0}"
            text(root / names, [line.format(s) for s in ("s0", "s1")])

    return make


# --- readers that are called rather than started ----------------------------------------------------------------------


def read_all(images: Any) -> str:
    """Decode every image; how many of each label."""
    for i in range(len(images)):
        images.image(i)
    return f"{len(images)} images, {len(images.classes)} classes, {sorted(Counter(images.labels.tolist()).items())}"


def read_mra(root: Path, *words: str) -> str:
    from mra import data, main_supervised

    sets = data.open_sets(main_supervised.get_parser().parse_args(["--data_path", str(root), *words]))
    return "; ".join(read_all(part) for part in (sets.train, *sets.tests.values()))


def read_parts(parts: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {read_all(part)}" for name, part in parts.items())


def read_flat(root: Path, name: str) -> str:
    from flat import data

    found = getattr(data, name)(root)
    data.check_splits(found, root)
    return read_parts({split: data.as_list(files) for split, files in found.items()})


def read_probe(root: Path) -> str:
    from shared_utils import evaluation
    from shared_utils.flags import Parser

    parser = Parser()
    evaluation.add_data_flags(parser)
    train, val = evaluation.open_splits(parser.parse_args(["--data_dir", str(root)]))
    return read_parts({"train": train, "val": val})


def read_fine(root: Path, kind: str) -> str:
    from sage.finegrained import READERS

    return "; ".join(read_all(part) for part in READERS[kind](root))


def read_benchmark(root: Path, dataset: str, split: str) -> str:
    from uvos_dino import data

    found = data.open_videos(dataset, root, split)
    for video in found:
        data.read_video(video.frames, (48, 48))
        for path in video.masks.values():
            data.read_mask(path, data.LAYOUTS[dataset].binary)
    return f"{[(video.name, len(video.frames), len(video.masks)) for video in found]}"


def read_fame(root: Path, dataset: str) -> str:
    from fame import data, train

    words = [
        str(root),
        "--dataset",
        dataset,
        "-fpc",
        "4",
        "--stride",
        "1",
        "--cache",
        "--index_cache",
        f"{root}/../i.pth",
    ]
    args = train.get_parser().parse_args(words)
    data.check_data_flags(args)
    found = data.open_videos(args, train=True)
    frames = sum(video.count for video in found.videos)
    return (
        f"{len(found)} videos, {frames} frames, {len(found.classes)} classes, {sorted(Counter(found.labels).items())}"
    )


def read_mdp(root: Path, name: str) -> str:
    from mdp.datasets import open_set

    found = open_set(name, root)
    for i in range(len(found)):
        found.load(i)
    return f"{len(found)} pairs"


def read_fewshot(root: Path) -> str:
    from mra.data import read_fewshot

    return read_parts(read_fewshot(root))


def read_list(root: Path) -> str:
    from sage.data import training_images

    return read_all(training_images(root, root / "list.txt"))


def read_attributes(root: Path) -> str:
    from sage.data import attribute_labels
    from shared_utils.data import image_folder

    images = image_folder(root / "train")
    return read_all(images) + f" {[(k, v[0].tolist()) for k, v in attribute_labels(root, images).items()]}"


def read_folder(root: Path) -> str:
    from shared_utils.data import flat_folder

    return read_all(flat_folder(root))


def read_own(root: Path) -> str:
    from mdp.own import open_own

    found = {split: open_own("mine", root, split) for split in ("train", "val")}
    for part in found.values():
        for i in range(len(part)):
            part.load(i)
    return f"{ {split: len(part) for split, part in found.items()} } pairs, {len(found['train'].classes)} classes"


def read_clips(root: Path) -> str:
    from uvos_dino.segment import find_clips, pictures

    return f"frames of the clips: {sorted(sum(1 for _ in pictures(clip)) for clip in find_clips([root]))}"


def read_support(root: Path) -> str:
    from flat.predict import read_query
    from shared_utils.data import image_folder

    support = image_folder(root / "few")
    return read_parts({"support": support, "query": read_query(root / "others", support)})


# --- the loaders ------------------------------------------------------------------------------------------------------


class Loader(NamedTuple):
    make: Callable[[Path], object]
    how: str | Callable[[Path], str]  # words of an entry point, or a reader of everything
    image: str  # one file of each kind, where the set has it
    folder: str = ""
    names: str = ""  # a list or table
    mask: str = ""


RUN = " --workers 0 --threads 1 --log-every 1 --device cpu --output-dir {out}"
NET = " --img_size 16 --arch resnet10 --width 4 --stem cifar_pool"
MOCO = NET + " --moco_dim 16 --moco_k 32 --batch_size 8 --bn_splits 2 --init_lr 0.05 --end_epoch 1"
FAME = (
    "fame.train {root} -a tiny --width 2 -cs 32 -fpc 4 --stride 1 --moco_dim 8 --moco_k 32 -b 8 --bn_splits 2 "
    "--lr 0.05 --epochs 1 --bins 5 --index_cache {out}/index.pth" + RUN + " --dataset "
)
MDP = (
    "mdp.main_pretrain --data-root {root} --arch resnet18 --base-channels 8 --head-channels 16 --dilations 1,2 "
    "--dim 16 --crop-size 32 --batch-size 8 --bank-size 64 --epochs 1 --lr 0.05" + RUN + " --datasets "
)
FLAT = (
    "flat.train --data_dir {root} --dataset folder --image_size 16 --model Conv4 --width 4 --method cosine "
    "--num_classes 4 --batch_size 8 --stop_epoch 1 --train_aug --crop padded --holdout 0" + RUN
)
DINO = (
    "uvos_dino.main_dino --data_dir {root}/JPEGImages/480p --image_size 48 48 --arch vit_mini --global_size 32 "
    "--local_size 16 --local_crops 1 --out_dim 32 --hidden_dim 32 --bottleneck_dim 16 --batch_size 4 --epochs 1 "
    "--amp none"
)
BLOCK = (
    "uvos_dino.train_RGB_cluster --basepath {root}/JPEGImages/480p --dino_path none --arch vit_mini --patch_size 8 "
    "--resolution 48 48 --num_heads 4 --num_points 3 --batch_size 2 --num_train_steps 2 --keep_every 0 "
    "--amp none --cache"
)
IMAGE = ("train/c1/03.jpg", "train/c1")
SPLITS = ("train", "val", "test")
FINE = {
    "cub": ("CUB_200_2011/images/002.c1/tc101.jpg", "CUB_200_2011/images/002.c1", "CUB_200_2011/images.txt"),
    "cars": (
        "stanford_cars/cars_train/tc101.jpg",
        "stanford_cars/cars_train",
        "stanford_cars/devkit/cars_train_annos.mat",
    ),
    "aircraft": (
        "fgvc-aircraft-2013b/data/images/tc101.jpg",
        "fgvc-aircraft-2013b/data/images",
        "fgvc-aircraft-2013b/data/images_variant_trainval.txt",
    ),
}
FRAMES, MASKS = "JPEGImages/480p/{0}/{1}.jpg", "Annotations/480p/{0}/{1}.png"


def listed(root: Path) -> None:
    names = classes(root, "train")
    text(root / "list.txt", [name.removeprefix("train/") for name in names])


def numbered(root: Path) -> None:
    for part in ("train", "val"):
        text(root / f"{part}.txt", [f"{name} {name.split('/')[1][1]}" for name in classes(root, part)])


def attributes(root: Path) -> None:
    text(root / "attributes.csv", ["path,hue", *(f"{name},{i % 2}" for i, name in enumerate(classes(root, "train")))])


def tables(root: Path) -> None:
    for p, part in enumerate(SPLITS):
        rows = [f"{part}{i:02d}.jpg,c{p}{i // 4}" for i in range(16)]
        text(root / f"{part}.csv", ["filename,label", *rows])
        for i in range(16):
            photo(root / f"images/{part}{i:02d}.jpg", i)


def cifarfs(root: Path) -> None:
    classes(root, "data")
    for part, names in zip(SPLITS, (["c0", "c1"], ["c2"], ["c3"])):
        text(root / f"splits/bertinetto/{part}.txt", names)


def photos(root: Path, count: int = 16) -> list[str]:
    """A user's own, with blanks in their names."""
    return [photo(root / f"my {i:02d}.jpg", 100 + i) for i in range(count)]


def own_set(root: Path) -> None:
    segmentation("images/a {}.jpg", "labels/a {}.png")(root)
    text(root / "classes.txt", ["ground", "house"])


SSCL = (
    " --dim 8 --moco_k 32 --batch_labelled 4 --mu 2 --bn_splits 2 --lr_batch 0 --num_nn 3 --num_pos 2 --epochs 1"
    + NET
    + RUN
)
KNOWN = "sscl.main --labelled {root}/known --unlabelled {root}/all" + SSCL
LOADERS: dict[str, Loader] = {
    "bingo images": Loader(lambda r: classes(r, "train"), "bingo.main_teacher --data_dir {root}" + MOCO + RUN, *IMAGE),
    "hsa images": Loader(
        lambda r: classes(r, "train"), "hsa.main_moco --data_dir {root} --clus_pos_num 3" + MOCO + RUN, *IMAGE
    ),
    "kscl images": Loader(
        lambda r: classes(r, "train"), "kscl.main_kscl --data_dir {root} --shots 3" + MOCO + RUN, *IMAGE
    ),
    "sage images": Loader(
        lambda r: classes(r, "train"),
        "sage.train --data_dir {root} --mode byol --hid_channels 16 --out_channels 8 --imgs_per_gpu 8 "
        "--update_interval 1 --total_epochs 1" + NET + RUN,
        *IMAGE,
    ),
    "sage list": Loader(listed, read_list, *IMAGE, "list.txt"),
    "sage attributes": Loader(attributes, read_attributes, *IMAGE, "attributes.csv"),
    "sscl images": Loader(
        lambda r: classes(r, "train"),
        "sscl.main --data {root} --dim 8 --moco_k 32 --batch_labelled 4 --mu 2 --bn_splits 2 --lr_batch 0 "
        "--labels_per_class 4 --num_nn 3 --num_pos 2 --epochs 1" + NET + RUN,
        *IMAGE,
    ),
    "probes (five folders)": Loader(lambda r: classes(r, "train", "val"), read_probe, *IMAGE),
    "mra unlabelled": Loader(
        lambda r: classes(r, "train"),
        "mra.main_pretrain --data_path {root} --input_size 16 --model mae_tiny_patch4 --enc_dim 16 --enc_depth 2 "
        "--enc_heads 2 --dec_dim 8 --dec_heads 2 --batch_size 8 --epochs 1 --warmup_epochs 1 --lr 0.003" + RUN,
        *IMAGE,
    ),
    "mra folder": Loader(lambda r: classes(r, "train", "val"), read_mra, *IMAGE),
    "mra lists": Loader(
        numbered,
        lambda r: read_mra(r, "--train_list", f"{r}/train.txt", "--val_list", f"{r}/val.txt"),
        *IMAGE,
        "train.txt",
    ),
    "mra few-shot folder": Loader(
        lambda r: classes(r, *SPLITS, own=True), read_fewshot, "train/trc1/03.jpg", "train/trc1"
    ),
    "mra few-shot tables": Loader(tables, read_fewshot, "images/train03.jpg", "images", "train.csv"),
    "flat folder": Loader(lambda r: classes(r, *SPLITS, own=True), FLAT, "train/trc1/03.jpg", "train/trc1"),
    "flat cifarfs": Loader(
        cifarfs, lambda r: read_flat(r, "_from_lists"), "data/c1/03.jpg", "data/c1", "splits/bertinetto/train.txt"
    ),
    "flat miniImagenet": Loader(
        tables, lambda r: read_flat(r, "_from_csv"), "images/train03.jpg", "images", "train.csv"
    ),
    "flat CUB": Loader(
        lambda r: classes(r, "images"), lambda r: read_flat(r, "_from_cub"), "images/c1/03.jpg", "images/c1"
    ),
    "fame ucf101": Loader(videos("ucf101"), FAME + "ucf101", "data/c1/v1_3.avi", "data/c1", "anno/trainlist01.txt"),
    "fame k400": Loader(videos("k400"), lambda r: read_fame(r, "k400"), "train/c1/v1_3.avi", "train/c1"),
    "fame hmdb51": Loader(
        videos("hmdb51"), lambda r: read_fame(r, "hmdb51"), "data/c1/v1_3.avi", "data/c1", "anno/c1_test_split1.txt"
    ),
    "fame diving48": Loader(
        videos("diving48"), lambda r: read_fame(r, "diving48"), "rgb/v1_3.mp4", "rgb", "Diving48_V2_train.json"
    ),
    "fame fight": Loader(videos("fight"), lambda r: read_fame(r, "fight"), "c1/v1_1/003.jpg", "c1/v1_1", "clips.csv"),
    "uvos_dino DINO frames": Loader(sequences(FRAMES), DINO + RUN, FRAMES.format("s1", "00002"), "JPEGImages/480p/s1"),
    "uvos_dino clips": Loader(sequences(FRAMES), BLOCK + RUN, FRAMES.format("s1", "00002"), "JPEGImages/480p/s1"),
}
LOADERS |= {
    "bingo photos": Loader(photos, "bingo.main_teacher --data_dir {root}" + MOCO + RUN, "my 03.jpg"),
    "hsa photos": Loader(photos, "hsa.main_moco --data_dir {root} --clus_pos_num 3" + MOCO + RUN, "my 03.jpg"),
    "sscl labelled": Loader(lambda r: (classes(r, "known"), photos(r / "all")), KNOWN, "known/c1/03.jpg", "known/c1"),
    "sscl unlabelled": Loader(lambda r: (classes(r, "known"), photos(r / "all")), KNOWN, "all/my 03.jpg", "all"),
    "mra predict": Loader(lambda r: photos(r / "a"), read_folder, "a/my 03.jpg", "a"),
    "mdp own": Loader(own_set, read_own, "images/a 03.jpg", "images", "classes.txt", "labels/a 03.png"),
    "fame folder": Loader(lambda r: films(r / "a/my {}.avi", 8), lambda r: read_fame(r, "folder"), "a/my 3.avi", "a"),
    "uvos_dino segment video": Loader(lambda r: films(r / "a/my {}.mp4", 3), read_clips, "a/my 1.mp4", "a"),
    "uvos_dino segment frames": Loader(sequences("{0}/my {1}.jpg"), read_clips, "s1/my 00002.jpg", "s1"),
    "flat support": Loader(
        lambda r: (classes(r, "few"), photos(r / "others")), read_support, "few/c1/03.jpg", "few/c1"
    ),
    "flat query": Loader(
        lambda r: (classes(r, "few"), photos(r / "others")), read_support, "others/my 03.jpg", "others"
    ),
}
for kind, parts in FINE.items():
    LOADERS[f"sage {kind}"] = Loader(fine(kind), lambda r, k=kind: read_fine(r, k), *parts)  # type: ignore[misc]
    LOADERS[f"mra {kind}"] = Loader(fine(kind), lambda r, k=kind: read_mra(r, "--dataset", k), *parts)  # type: ignore[misc]
VOC = "VOCdevkit/VOC2012"
CONTEXT = "VOCdevkit/VOC2010"
for name, images, masks, names, mode, value in (
    ("voc", f"{VOC}/JPEGImages/{{}}.jpg", f"{VOC}/SegmentationClassAug/{{}}.png",
     f"{VOC}/ImageSets/Segmentation/trainaug.txt", "P", 1),
    ("context", f"{CONTEXT}/JPEGImages/{{}}.jpg", f"{CONTEXT}/SegmentationClassContext/{{}}.png",
     f"{CONTEXT}/ImageSets/SegmentationContext/train.txt", "P", 1),
    ("ade", "ade/ADEChallengeData2016/images/training/{}.jpg", "ade/ADEChallengeData2016/annotations/training/{}.png",
     "", "L", 1),
    ("coco", "coco_stuff164k/images/train2017/{}.jpg", "coco_stuff164k/annotations/train2017/{}_labelTrainIds.png",
     "", "L", 1),
    ("cityscapes", "cityscapes/leftImg8bit/train/aachen/{}_leftImg8bit.png",
     "cityscapes/gtFine/train/aachen/{}_gtFine_labelTrainIds.png", "", "L", 1),
    ("camvid", "camvid11/images/train/{}.jpg", "camvid11/labels/train/{}.png", "", "L", 1),
    ("labelmefacade", "labelmefacade8/images/train/{}.jpg", "labelmefacade8/labels/train/{}.png", "", "L", 1),
    ("ccp", "ccp59/images/{}.jpg", "ccp59/labels/{}.png", "", "L", 1),
):  # fmt: skip
    LOADERS[f"mdp {name}"] = Loader(
        segmentation(images, masks, names, mode, value),
        MDP + name if name == "voc" else lambda r, n=name: read_mdp(r, n),  # type: ignore[misc]
        images.format("03"), str(Path(images).parent), names,
        masks.format("03"),
    )  # fmt: skip
for name, split, frames, masks, names in (
    ("DAVIS", "val", FRAMES, MASKS, "ImageSets/2016/val.txt"),
    ("DAVIS2017", "val", FRAMES, MASKS, "ImageSets/2017/val.txt"),
    ("FBMS", "all", "FBMS/{0}/{1}.jpg", "Annotations/{0}/{1}.png", ""),
    ("STv2", "test", "STv2_img/JPEGImages/{0}/{1}.png", "STv2_gt&pred/STv2_gt/GroundTruth/{0}/{1}.png", ""),
    ("YTVIS", "train", "train/JPEGImages/{0}/{1}.jpg", "train/Annotations/{0}/{1}.png", ""),
    ("MOVi", "val", "val/{0}/rgba_{1}.jpg", "val/{0}/segmentation_{1}.png", ""),
):
    LOADERS[f"uvos_dino {name}"] = Loader(
        sequences(frames, masks, names, name == "DAVIS"),
        lambda r, n=name, s=split: read_benchmark(r, n, s),  # type: ignore[misc]
        frames.format("s1", "00002"), str(Path(frames).parent).format("s1"), names, masks.format("s1", "00000"),
    )  # fmt: skip
