"""What evaluations of a pretrained network have in common: flags, data, weights, label subsets, top-k, the result file.

A script gives its folder's `build(arch, width, stem)`; nothing here knows a paper.
"""

import argparse
import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_utils import UserError, checkpoint, distributed, timm_nets
from shared_utils.data import (
    ArrayImages,
    ImageList,
    image_folder,
    list_file,
    list_rows,
    mix_key,
    need_folder,
    per_class,
    tell,
    training_folder,
)
from shared_utils.feed import in_order
from shared_utils.flags import natural, positive
from shared_utils.provenance import result_folder
from shared_utils.run import plain_errors

SETS = ("folder", "cifar10", "cifar100")


# ----------------------------------------------------------------------------------------------------------------- data
def add_data_flags(p: argparse.ArgumentParser, more: Sequence[str] = ()) -> None:
    """`more`: further --dataset names, which the folder opens itself."""
    a = p.add_argument
    a("--data_dir", type=Path, default=os.environ.get("DATA_ROOT", "data"), help="holds train/CLASS/* and val/CLASS/*; "
      "without train: CLASS/*")  # fmt: skip
    a("--val_dir", type=Path, help="default: val below --data_dir, or test where there is no val")
    a(
        "--dataset",
        choices=[*SETS, *more],
        default="folder",
        help="folder: as above; else torchvision's files below --data_dir",
    )
    a("--img_size", type=positive, help="pixels of a crop; default: what the checkpoint was trained with, else 224")
    a("--per_class", type=natural, default=0, help="first so many training images of each class; 0: all")
    a("--cache", action="store_true", help="decode the training images once and keep them in memory (small images)")


def _cifar(args: argparse.Namespace) -> tuple[ImageList, ImageList]:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[args.dataset]
    try:
        splits = [kind(args.data_dir, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        folder = Path(args.data_dir) / kind.base_folder
        raise UserError(
            f"{folder}: {args.dataset} not found or damaged ({' '.join(str(error).split())[:60]}); unpack its python "
            "version there, or give --data_dir"
        ) from None
    train, val = (ArrayImages(s.data, s.targets, s.classes) for s in splits)
    return per_class(train, args.per_class), val


def prepare_data(args: argparse.Namespace) -> None:
    """Resolve --img_size by what the checkpoint was trained with."""
    if args.img_size is None:
        args.img_size = stored_flags(getattr(args, "pretrained", "none")).get("img_size", 224)


def open_splits(args: argparse.Namespace, leave_one_out: bool = False) -> tuple[ImageList, ImageList]:
    """Training images (first `per_class` of each class) and validation images, without transforms.

    With `leave_one_out` both are the same object where neither --val_dir nor val nor test is there: every image is then
    to be classified by all the others.

    UserError: a folder that is missing, images without labels, or classes that differ from those of training.
    """
    prepare_data(args)
    if args.dataset != "folder":
        return _cifar(args)
    root = Path(args.data_dir)
    val_dir = args.val_dir or next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if val_dir and not args.val_dir:  # beside it there is train
        need_folder(root / "train", f"expected {root}/train/CLASS/*.jpg")
    train, below = training_folder(root), root / "train" if (root / "train").is_dir() else root
    if not train.classes:
        raise UserError(
            f"{below}: images in no class folders have no labels to be evaluated by; expected {below}/CLASS/*.jpg"
        )
    if val_dir is None and not leave_one_out:
        learns = "what learns from labels is tested on other images, nearest neighbours need none"
        val_dir = need_folder(root / "val", f"expected val/CLASS/*.jpg there, or test, or --val_dir: {learns}")
    if val_dir is None and not train.has_labels:
        raise UserError(f"{below}: one class folder, {train.classes[0]}; an evaluation needs two classes at the least")
    train = per_class(train, args.per_class, args.cache)
    if val_dir is None:
        return train, train
    val = image_folder(val_dir)
    if val.classes != train.classes:
        other = sorted(set(val.classes) ^ set(train.classes))[0]
        where = f"{val_dir}: its classes are not those of {below}"
        raise UserError(f"{where} (first difference: {other}); both need the same")
    return train, val


def own_rows(train: ImageList, val: ImageList) -> Tensor | None:
    """For `neighbours.knn_accuracy`: each image's own row [N] where one is left out at a time, else None."""
    return torch.arange(len(train)) if val is train else None


def protocol(train: ImageList, val: ImageList, most: int = 0) -> str:
    """What is classified by what, for people.

    Args:
        most: neighbours that are asked for; it is said where there are not so many.
    """
    there = len(train) - (val is train)
    few = f"; {there} neighbours in the place of {most}" if most > there else ""
    if unread := Counter(train.unread) + (Counter() if val is train else Counter(val.unread)):
        few += f"; not read: {tell(unread)}"
    if val is not train:
        return f"{len(train)} train / {len(val)} val images{few}"
    alone = int((train.labels.bincount() == 1).sum()) if train.has_labels else 0
    if alone:
        few += f"; {alone} class{'es' * (alone > 1)} of a single image, which no other can name"
    return f"leave-one-out, each of the {len(train)} images by all the others (neither val nor test is there){few}"


def subset(images: ImageList, indices: Sequence[int], labels: Sequence[int] | None = None) -> ImageList:
    """The images of these indices in this order, without a transform, decoded ones kept; `labels` replace their own."""
    new = images.take(indices, labels)
    new.transform = None
    return new


def labelled_indices(train: ImageList, file: Path | None, fraction: float, root: Path, seed: int) -> list[int]:
    """Indices of the labelled images, rising.

    Args:
        file: a list as SimCLR's (`n01440764_10026.JPEG` a line), or in a form of `shared_utils.data.list_file`.
        fraction: without a file, this share of each class (at least one image), drawn by `seed`.
        root: the training folder that the list refers to.

    Raises:
        UserError: an image that is not among `train`, or a label that contradicts its folder.
    """
    if file is None:
        if not 0 < fraction <= 1:
            raise UserError(f"--fraction {fraction}: must lie above 0 and up to 1, for example 0.01")
        labels, chosen = train.labels.numpy(), []
        for y in range(len(train.classes)):
            rows = np.flatnonzero(labels == y)
            rng = np.random.Generator(np.random.PCG64(mix_key(seed, y)))
            chosen += rng.permutation(rows)[: max(1, round(fraction * len(rows)))].tolist()
        return sorted(chosen)
    if not file.is_file():
        raise UserError(f"{file}: no such list file; give another path, or --fraction instead")
    listing = list_rows(file, "a list of images, `name.JPEG` or `CLASS/image.jpg` a line")
    if not any(label is not None or os.path.dirname(name.replace("\\", "/")) for _, name, label in listing):
        return _by_name(train, file, root, listing)
    listed = list_file(file, root, repeats=True)  # which images have labels, and no more
    by_path = {path: i for i, path in enumerate(train.paths())}
    chosen = []
    for (number, *_), path, label in zip(listing, listed.paths(), listed.labels.tolist(), strict=True):
        index = by_path.get(path)
        if index is None:
            raise UserError(f"{file}, line {number}: {path} is not among the training images (--per_class, {root})")
        if train.label(index) != label:
            raise UserError(f"{file}, line {number}: label {label}, but its folder is class {train.label(index)}")
        chosen.append(index)
    return sorted(set(chosen))


def _by_name(train: ImageList, file: Path, root: Path, rows: Sequence[tuple[int, str, int | None]]) -> list[int]:
    """Indices of images that a list gives by their names alone, which are unique in ImageNet.

    UserError: no image has the name, or several have it.
    """
    wanted: dict[str, list[int]] = {os.path.basename(name): [] for _, name, _ in rows}
    for i, path in enumerate(train.paths()):
        if path.name in wanted:
            wanted[path.name].append(i)
    for number, name, _ in rows:
        found = wanted[os.path.basename(name)]
        if not found:
            raise UserError(f"{file}, line {number}: no training image is named {name}; see {root}")
        if len(found) > 1:
            first, second = (train.path(i) for i in found[:2])
            raise UserError(
                f"{file}, line {number}: {len(found)} training images are named {name} ({first}, {second}); write "
                "`CLASS/image.jpg` a line"
            )
    return sorted({i for found in wanted.values() for i in found})


# -------------------------------------------------------------------------------------------------------------- network
def add_network_flags(p: argparse.ArgumentParser, archs: Sequence[str], stems: Sequence[str], default: str) -> None:
    """--pretrained, and what network it is: flags override what a run of ours has stored in its checkpoint."""
    a = p.add_argument
    a("--pretrained", required=True, help="checkpoint of a run, a published file (MoCo, SwAV, torchvision), or none: "
      "random weights")  # fmt: skip
    a("--arch", choices=archs, help=f"default: the checkpoint's, else {default}")
    a("--width", type=positive, help="channels of the first stage; default: the checkpoint's, else 64")
    a("--stem", choices=stems, help="default: the checkpoint's, else imagenet")
    p.set_defaults(backbone_sha256="")


def stored_flags(pretrained: str) -> Mapping[str, Any]:
    """The flags that a run of ours has stored in the checkpoint `pretrained`; none in other files and for `none`."""
    loaded = None if pretrained == "none" else checkpoint.load(pretrained)
    flags = loaded.get("args") if isinstance(loaded, Mapping) else None
    return flags if isinstance(flags, Mapping) else vars(flags) if isinstance(flags, argparse.Namespace) else {}


def load_backbone(
    build: Callable[[str, int, str], Any],
    args: argparse.Namespace,
    default: str,
    drop: Sequence[str] = ("fc.*", "projection_head.*", "prototypes.*", "classifier.3.*"),
    stored_as: Sequence[str] = ("{}",),
) -> tuple[Any, str]:
    """The network of --pretrained without its head, and a line about what was loaded; resolves --arch, --width, --stem.

    `default` is the architecture where neither the flags nor the file name one, `drop` what the network lacks,
    `stored_as` the names that a run's checkpoint has these flags under, the first that it holds counts.
    The hash of the weights enters the flags: a probe of weights that have since changed is not resumed.
    """
    stored = stored_flags(args.pretrained)
    for flag, fallback in (("arch", default), ("width", 64), ("stem", "imagenet")):
        if getattr(args, flag) is None:
            found = (stored.get(name.format(flag)) for name in stored_as)
            setattr(args, flag, next(filter(None, found), fallback))
    if (norm := stored.get("normalise", "imagenet")) != "imagenet" and not hasattr(args, "normalise"):
        raise UserError(
            f"{args.pretrained}: its network was trained on input normalised otherwise ({norm}) than this script "
            "does; take the scripts of the folder that trained it"
        )
    network = build(args.arch, args.width, args.stem)
    if size := getattr(args, "img_size", None):
        timm_nets.check_size(network, args.arch, size)
    what = f"{args.arch}, width {args.width}, stem {args.stem}"
    if args.pretrained == "none":
        return network, f"{what}, random weights"
    state = checkpoint.read_weights(args.pretrained)
    try:
        # The count of batches is not used by batch norm with a momentum; files of old PyTorch versions lack it.
        report = checkpoint.load_strict(network, state, drop, missing_ok=("*.num_batches_tracked",))
    except UserError as error:
        raise UserError(f"{args.pretrained}, taken as {what}: {error}") from None
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    args.backbone_sha256 = digest.hexdigest()[:16]
    return network, f"{what}, {args.pretrained}: {report}"


@torch.no_grad()
def stream(
    embed: Callable[[Tensor], Sequence[Tensor]],
    images: ImageList,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    everything: bool = False,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Outputs of `embed` (float32, on the device) and labels of a batch after the other, nothing kept.

    They are those of this process's contiguous share of the images (or of all), in their order. `embed` must be in eval
    mode and the transform deterministic.
    """
    first, last = (0, len(images)) if everything else share(len(images))
    loader = in_order(images, first, last, batch_size, workers, device)
    for x, y, _ in plain_errors(loader):
        # The network's first convolution brings them into its own format.
        out = embed(x.to(device, memory_format=torch.contiguous_format, non_blocking=True))
        yield [value.float() for value in out], y


@torch.no_grad()
def collect(
    embed: Callable[[Tensor], Sequence[Tensor]],
    images: ImageList,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    everything: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """What `stream` gives, in memory: [n, ...] each on the CPU; and the labels [n]."""
    first, last = (0, len(images)) if everything else share(len(images))
    columns: list[Tensor] = []
    done = 0
    for out, y in stream(embed, images, device, batch_size, workers, everything):
        columns = columns or [torch.empty(last - first, *value.shape[1:]) for value in out]
        for column, value in zip(columns, out, strict=True):
            column[done : done + len(y)] = value.cpu()
        done += len(y)
    return columns, images.labels[first:last]


def available_memory() -> int:
    """Bytes that programs can still have, caches of files included; the machine's memory where that is not told."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_cache(wanted: Mapping[str, tuple[int, int]]) -> None:
    """UserError if float32 features do not fit into half of the memory that is left.

    Args:
        wanted: what to do about it -> images and values of each that this machine's processes are going to keep.
    """
    limit, total = available_memory() / 2, 0
    for cure, (images, values) in wanted.items():
        total += 4 * images * values
        if total > limit:
            raise UserError(
                f"features of {images} images, {values} values each, in memory: {total / 1e9:.3g} GB together, more "
                f"than half of the {2 * limit / 1e9:.3g} GB that are available; {cure}"
            )


def share(count: int) -> tuple[int, int]:
    """First and last + 1 of this process's rows, shares of equal length but for the last ones."""
    each = -(-count // distributed.world())
    return min(distributed.rank() * each, count), min((distributed.rank() + 1) * each, count)


def gather_rows(rows: Tensor, count: int, device: torch.device) -> Tensor:
    """The `share` of each process [n, ...] -> all rows [count, ...] on every process (CPU)."""
    each = -(-count // distributed.world())
    padded = rows.new_zeros(each, *rows.shape[1:])
    padded[: len(rows)] = rows
    return distributed.gather(padded.to(device)).cpu()[:count]


def topk(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """How many of the rows [N, C] have their label among the k largest logits, for each k (float64, CPU).

    Of equal logits the first counts as the larger one, as in `argmax`, and what is no number as the largest of all:
    the count for k = 1 is that of right predictions.
    """
    labels = labels.to(logits.device)
    own = logits.gather(1, labels[:, None])
    ahead = ~(logits <= own)  # not `>`: nan is neither
    tied = (logits == own) & (torch.arange(logits.shape[1], device=logits.device) < labels[:, None])
    place = (ahead | tied).sum(1)
    return torch.stack([(place < k).sum() for k in ks]).double().cpu()


def write_result(where: Path | argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the numbers, and write them as result.json: into the folder of a run, or where `result_folder` says."""
    if distributed.rank() != 0:
        return
    folder = where if isinstance(where, Path) else result_folder(where)
    checkpoint.write_json(folder / "result.json", result)
    numbers = {k: v for k, v in result.items() if isinstance(v, float)}
    print("  " + " ".join(f"{k} {v:.2f}" for k, v in numbers.items()) + f" -> {folder}/result.json", flush=True)


def unchanged(network: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError if any tensor of a frozen network, batch-norm statistics included, is not what it was."""
    for key, value in network.state_dict().items():
        if not torch.equal(value.cpu(), before[key]):
            raise RuntimeError(f"{key} of the frozen backbone changed while a classifier was trained on it")


def freeze(network: nn.Module) -> dict[str, Tensor]:
    """Eval mode, no gradients; returns a copy of every tensor on the CPU for `unchanged`."""
    network.requires_grad_(False).eval()
    return {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
