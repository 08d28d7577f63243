"""Label maps and overlays of your own photos, by a pretrained or a fine-tuned run.

    python -m mdp.predict PHOTO_OR_FOLDER --pretrained runs/mdp/finetune/mine/checkpoint-seed0 --out maps
    python -m mdp.predict photos --pretrained runs/mdp/pretrain/mini --datasets voc --out maps

A fine-tuned run names its own classes. After pretraining a pixel takes the class of its nearest prototype, in each set
of the run, or those of --datasets. Written are DIR/labels/NAME.png (the set's numbers with a palette, at the photo's
size, upright where a tag turns the photo), DIR/overlays/NAME.jpg and DIR/shares.csv, the share of each class; of
several sets below DIR/SET.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mdp import finetune
from mdp.datasets import described
from mdp.eval_seg import load_encoder, run_flags, similarities
from mdp.models import Encoder
from mdp.own import Taxonomy, describe_named, own_folders, read_classes
from mdp.visualize import MEAN, STD
from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import EXTENSIONS, list_images, load_image, tell
from shared_utils.flags import Parser, add_machine_flags, natural
from shared_utils.pictures import save_picture, voc_palette
from shared_utils.run import cli, set_threads

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


# The run -----------------------------------------------------------------------------------------------------------


class Prototypes(nn.Module):
    """Scores of a pixel are its similarities with the prototypes: [B, 3, H, W] -> [B, C, h, w]."""

    def __init__(self, encoder: nn.Module, proto: Tensor, valid: Tensor):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("proto", proto)
        self.register_buffer("valid", valid)

    def forward(self, x: Tensor) -> Tensor:
        return similarities(self.encoder(x), self.proto, self.valid)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Labeller:
    """A network that scores the classes of `sets`, side by side, and how photos are resized for it.

    Attributes:
        scale: long and short side that a photo may have; None: as it is.
        tuned: of a fine-tuning, whose resizing is mmsegmentation's.
    """

    network: nn.Module
    sets: list[Taxonomy]
    scale: tuple[int, int] | None
    tuned: bool

    def input(self, photo: Image.Image) -> Tensor:
        """RGB photo -> [1, 3, h, w], resized and normalised."""
        pixels = np.asarray(photo)
        if self.scale is not None:
            long, short = max(photo.size), min(photo.size)
            factor = min(self.scale[0] / long, self.scale[1] / short)
            size = max(1, int(photo.width * factor + 0.5)), max(1, int(photo.height * factor + 0.5))
            if self.tuned:
                import cv2

                pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
            else:
                pixels = np.asarray(photo.resize(size, Image.Resampling.BILINEAR))
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return ((torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]

    @torch.no_grad()
    def __call__(self, photo: Image.Image, device: torch.device) -> list[np.ndarray]:
        """For each set the class of every pixel, uint8 [H, W]."""
        x = self.input(photo).to(device)
        scores = self.network(x).float()  # [1, C, h, w]
        if self.tuned:  # mmsegmentation's logits have the size of its input first
            scores = F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)
        parts = scores[0].split([len(found.classes) for found in self.sets])
        return [largest(part, (photo.height, photo.width)).cpu().numpy() for part in parts]


def largest(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """argmax over C of scores [C, h, w] resized to (H, W), bilinear: uint8 [H, W].

    Class by class: all of them at the size of a photo would take gigabytes, and longer.
    """

    def resized(c: int) -> Tensor:
        return F.interpolate(scores[None, c : c + 1], size=size, mode="bilinear", align_corners=False)[0, 0]

    best, ids = resized(0), torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for c in range(1, len(scores)):
        mine = resized(c)
        ids.masked_fill_(mine > best, c)
        torch.maximum(best, mine, out=best)
    return ids


def numbered(count: int) -> Taxonomy:
    """Classes of which nothing but the number is known."""
    colours = np.array(voc_palette()).reshape(-1, 3)[:count]
    names = tuple(map(str, range(count)))
    return Taxonomy("classes", names, tuple(range(count)), tuple(map(tuple, colours.tolist())))


def open_tuned(file: Path, saved: Mapping[str, Any]) -> Labeller:
    """The network of a fine-tuning. Runs that did not keep names and size yet have them from their config."""
    model, stored = saved["args"]["model"], saved["args"]
    head, backbone = model["decode_head"], model["backbone"]
    encoder = Encoder(
        f"resnet{backbone['depth']}", "aspp" if head["type"] == "ASPPHead" else "sep_aspp", 1,
        backbone["base_channels"], head["channels"], tuple(head["dilations"]), head["num_classes"],
    )  # fmt: skip
    state = {key.replace("decode_head.conv_seg.", "classifier.1."): v for key, v in saved["state_dict"].items()}
    try:
        checkpoint.load_strict(encoder, state)
    except UserError as error:
        raise UserError(f"{file}: {error}; it is no network of mdp/mmseg_configs") from None
    if "sets" in saved:
        long, short = saved["scale"]
        return Labeller(encoder, [Taxonomy.read(found) for found in saved["sets"]], (long, short), True)
    try:
        cfg = finetune.resolve(run_flags(stored), {})
    except UserError:  # a config of the user's that is gone
        return Labeller(encoder, [numbered(head["num_classes"])], None, True)
    known = Taxonomy.of(describe_named(cfg.data.name, own_folders(stored.get("data"))))
    return Labeller(encoder, [known], finetune.test_scale(cfg), True)


def open_pretrained(file: Path, saved: Mapping[str, Any], branch: str) -> Labeller:
    """Nearest prototypes of a pretraining, or the classifier of a control arm."""
    flags = saved["args"]
    background = flags.get("voc_background", "class")
    names = flags["datasets"].split(",")
    sets = [Taxonomy.read(found) for found in saved["bank"].get("sets", [])]
    sets = sets or [Taxonomy.of(described(name, voc_background=background)) for name in names]  # older runs
    scale = 2**31, int(flags["crop_size"])
    if flags.get("objective", "contrast") == "contrast":
        encoder, _, proto, valid = load_encoder(file, branch)
        for found, part in zip(sets, valid.split([len(found.classes) for found in sets])):
            if not part.any():
                raise UserError(f"{file}: no class of {found.name} has a prototype yet; train longer")
        return Labeller(Prototypes(encoder, proto, valid), sets, scale, False)
    classifier = Encoder(
        flags["arch"], flags["head"], flags["dim"], flags["base_channels"], flags["head_channels"],
        tuple(flags["dilations"]), sum(len(found.classes) for found in sets),
    )  # fmt: skip
    prefix = f"encoder_{branch}."
    state = {k.removeprefix(prefix): v for k, v in saved["state_dict"].items() if k.startswith(prefix)}
    checkpoint.load_strict(classifier, state)
    return Labeller(classifier, sets, scale, False)


def open_run(path: Path, branch: str = "k") -> Labeller:
    """The network of a run, given by its folder or file.

    UserError: neither a pretraining nor a finished fine-tuning.
    """
    files = [path / "model.pth", path / "checkpoint.pth"] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{path}: no run with a model.pth or checkpoint.pth; give the folder that a training printed")
    saved = checkpoint.load(file)
    whole = isinstance(saved, Mapping) and {"state_dict", "args"} <= set(saved)
    if whole and "model" in saved["args"]:
        return open_tuned(file, saved)
    if whole and "bank" in saved and "crop_size" in saved["args"]:
        return open_pretrained(file, saved, branch)
    raise UserError(f"{file}: not a run of mdp.main_pretrain or mdp.finetune; an export has no classes, give the run")


# Photos ------------------------------------------------------------------------------------------------------------


def upright(path: Path) -> Image.Image:
    """The photo, RGB, turned as its orientation tag says: it has no label map that would have to be turned, too."""
    photo = load_image(path)
    with Image.open(path) as image:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return photo if turn is None else photo.transpose(turn)


def find_photos(inputs: Sequence[Path], out: Path) -> tuple[dict[Path, Path], Counter[str]]:
    """{photo: name of its label map, relative}, and what is not read of the folders, by ending.

    UserError: no such photo, a header that is none, two photos for one name, an output folder between the photos.
    """
    unread, found = Counter[str](), dict[Path, Path]()
    for path in inputs:
        if path.is_dir():
            if out.resolve().is_relative_to(path.resolve()):
                raise UserError(f"--out {out}: lies in {path}, whose images would be read again; give another folder")
            found |= {photo: photo.relative_to(path) for photo in list_images(path, unread)}
        elif not path.exists():
            raise UserError(f"{path}: no such photo or folder")
        elif path.suffix.lower() not in EXTENSIONS:
            raise UserError(f"{path}: no photo by its ending; known are {', '.join(sorted(EXTENSIONS))}")
        else:
            found[path] = Path(path.name)
    stems = Counter(name.with_suffix("") for name in found.values())
    for photo, name in found.items():
        try:
            with Image.open(photo):
                pass
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            load_image(photo)  # its UserError
            raise
        alone = stems[name.with_suffix("")] == 1
        found[photo] = name.with_suffix(".png") if alone else name.with_name(f"{name.name}.png")
    names: dict[Path, Path] = {}
    for photo, name in found.items():
        if (other := names.setdefault(name, photo)) != photo:
            raise UserError(f"{photo}: {other} has the same name, and so its label map; give them one after the other")
    return found, unread


def write_maps(ids: np.ndarray, photo: Image.Image, found: Taxonomy, folder: Path, name: Path) -> np.ndarray:
    """Label map and overlay of a photo; the share of each class [C]."""
    palette = np.zeros((256, 3), np.uint8)
    palette[list(found.ids)] = found.palette
    label = Image.fromarray(np.array(found.ids, np.uint8)[ids])
    label.putpalette(palette.ravel().tolist())
    over = Image.blend(photo, label.convert("RGB"), 0.6)
    save_picture(label, folder / "labels" / name)
    save_picture(over, folder / "overlays" / name.with_suffix(".jpg"), quality=90)
    return np.bincount(ids.ravel(), minlength=len(found.classes)) / ids.size


def write_shares(file: Path, names: Sequence[Path], classes: Sequence[str], shares: np.ndarray) -> str:
    """A line a photo: its name and the share of each class, 0 to 1. Returns the largest mean shares, in words."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", *classes])
    rows.writerows([str(name), *(f"{share:.4f}" for share in row)] for name, row in zip(names, shares))
    checkpoint.write_text(file, text.getvalue())
    mean = shares.mean(0)
    return ", ".join(f"{classes[i]} {100 * mean[i]:.1f} %" for i in np.argsort(-mean)[:5] if mean[i])


# Entry -------------------------------------------------------------------------------------------------------------


def get_parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    p = Parser(prog="mdp.predict", description=__doc__, formatter_class=form)
    p.add_argument("photos", type=Path, nargs="+", metavar="PHOTO_OR_FOLDER", help="folders with all below them")
    p.add_argument("--pretrained", type=Path, required=True, metavar="RUN", help="a run's folder, or its checkpoint")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the maps")
    p.add_argument("--datasets", help="of a pretraining: only the classes of these sets, comma-separated")
    p.add_argument("--classes", type=Path, metavar="FILE", help="other names for the classes of one set, one a line")
    p.add_argument("--short-side", type=natural, help="short side of the photo in the network; 0: its own; default: "
                   "of training, the crop size or the config's")  # fmt: skip
    p.add_argument("--branch", choices=["q", "k"], default="k", help="of a pretraining: k, which filled the bank")
    add_machine_flags(p, workers=None)
    return p


def choose(labeller: Labeller, args: argparse.Namespace) -> tuple[list[Taxonomy | None], tuple[int, int] | None]:
    """For each set of the run its names, or None where it is left out; and the size of photos in the network."""
    known = [found.name for found in labeller.sets]
    chosen = args.datasets.split(",") if args.datasets else known
    if other := [name for name in chosen if name not in known]:
        raise UserError(f"--datasets {other[0]}: the run has {', '.join(known)}")
    sets = [found if found.name in chosen else None for found in labeller.sets]
    if args.classes is not None:
        if len(chosen) != 1:
            raise UserError(f"--classes: names of one set; choose it with --datasets {' or '.join(known)}")
        names = read_classes(args.classes)[0]
        at = known.index(chosen[0])
        old = labeller.sets[at]
        if len(names) != len(old.classes):
            raise UserError(f"{args.classes}: {len(names)} names, the run has {len(old.classes)} classes of {old.name}")
        sets[at] = Taxonomy(old.name, tuple(names), old.ids, old.palette)
    scale = labeller.scale
    if args.short_side is not None:
        scale = (2**31, args.short_side) if args.short_side else None
    elif scale is None:
        raise UserError("--short-side: the config of this older run is gone, so give the size that it names")
    return sets, scale


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    photos, unread = find_photos(args.photos, args.out)
    labeller = open_run(args.pretrained, args.branch)
    sets, scale = choose(labeller, args)
    device = distributed.init(args.device)
    set_threads(args.threads, 0, device)
    labeller = Labeller(labeller.network.to(device).eval(), labeller.sets, scale, labeller.tuned)
    used = [found for found in sets if found is not None]
    folders = {found.name: args.out / found.name if len(used) > 1 else args.out for found in used}
    print(f"mdp/predict -> {args.out}")
    more = f", not read: {tell(unread)}" if unread else ""
    print(f"  {len(photos)} photos{more}; short side {scale[1] if scale else 'as stored'}, {device}", flush=True)
    shares: dict[str, list[np.ndarray]] = {found.name: [] for found in used}
    started = time.time()
    try:
        for path, name in tqdm(photos.items(), disable=None):
            photo = upright(path)
            for found, ids in zip(sets, labeller(photo, device)):
                if found is not None:
                    shares[found.name].append(write_maps(ids, photo, found, folders[found.name], name))
        for found in used:
            file = folders[found.name] / "shares.csv"
            said = write_shares(file, list(photos), found.classes, np.stack(shares[found.name]))
            print(f"  {found.name}: {said}; {file}, labels/ and overlays/ beside it")
    except OSError as error:
        raise UserError(f"{error.filename or args.out}: cannot be written ({error.strerror or error})") from None
    print(f"  done: {len(photos)} photos in {time.time() - started:.1f} s")
    return 0


if __name__ == "__main__":
    cli(main)
