"""Evaluate a segmentation network: mIoU, pixel accuracy, per-class table and pictures.

    python -m mdp.eval_seg --run runs/mdp/finetune/camvid/scratch-seed0 --split test --data-root $DATA_ROOT
    python -m mdp.eval_seg --protocol prototype --checkpoint runs/mdp/pretrain/mini/checkpoint.pth

Own sets are found where they lay in training; ``--own_data NAME=FOLDER`` says where they lie now.
``--protocol mmseg`` scores a fine-tuned run inside mmsegmentation, single scale, no flip. ``--protocol prototype``
needs no fine-tuning: each pixel of a validation image of a pretraining set takes the class of its nearest prototype
among that set's own classes ([inferred], a diagnostic of ours).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mdp import finetune
from mdp.models import Encoder
from mdp.own import add_datasets_flags, open_named, own_folders, val_split
from mdp.visualize import MEAN, STD, panels
from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser, evaluation_folder, natural, runs_root
from shared_utils.provenance import result_folder
from shared_utils.run import cli, plain, provenance, set_threads


# ------------------------------------------------------------------------------------------------------------ scores
def confusion(pred: Tensor, label: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Confusion counts, int64 [C, C], row = label, column = prediction; pixels with label ``ignore`` are left out.

    Args:
        pred, label: integer maps of one shape. Sum the results of all images before ``mean_iou``.
    Raises:
        UserError: an id outside 0..C-1 (other than ``ignore`` in the label).
    """
    keep = label != ignore
    pred, label = pred[keep].long(), label[keep].long()
    for name, ids in (("label", label), ("prediction", pred)):
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_classes):
            raise UserError(f"{name} id {int(ids.max())} is outside 0..{num_classes - 1}; check the label convention")
    return torch.bincount(label * num_classes + pred, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(matrix: Tensor) -> Tensor:
    """IoU in percent per class, float64 [C], from a confusion matrix; nan where a class is in neither map."""
    matrix = matrix.double()
    hit = matrix.diagonal()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


def mean_iou(matrix: Tensor) -> float:
    """Data-set level mIoU in percent: the mean over the classes that occur in label or prediction (mmsegmentation)."""
    return float(class_iou(matrix).nanmean())


def scores(matrix: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """mIoU, aAcc, mAcc in percent and the IoU of each class (None: in neither map)."""
    iou, counts = class_iou(matrix), matrix.double()
    accuracy = 100 * counts.diagonal() / counts.sum(1)
    return {
        "mIoU": round(float(iou.nanmean()), 2),
        "aAcc": round(float(100 * counts.diagonal().sum() / counts.sum()), 2),
        "mAcc": round(float(accuracy.nanmean()), 2),
        "per_class": {name: None if v != v else round(v, 2) for name, v in zip(classes, iou.tolist())},
    }


def show(title: str, result: Mapping[str, Any]) -> None:
    print(f"{title}: mIoU {result['mIoU']:.2f}, aAcc {result['aAcc']:.2f}, mAcc {result['mAcc']:.2f}")
    seen = {name: value for name, value in result["per_class"].items() if value is not None}
    for name, value in seen.items():
        print(f"  {name:24}{value:7.2f}")
    if len(seen) < len(result["per_class"]):
        print(f"  ({len(result['per_class']) - len(seen)} classes in neither label nor prediction)")


# ------------------------------------------------------------------------------------------- protocol: fine-tuned run
def run_flags(stored: Mapping[str, Any], config: str | None = None) -> argparse.Namespace:
    """The flags of a finished fine-tuning that `finetune.resolve` needs to find its config and data again."""
    flags = finetune.get_parser().parse_args(["--config", config or stored["config"]])
    for key in (*finetune.MODEL_FLAGS, "seed", "short_side", "datasets", "data"):
        setattr(flags, key, stored.get(key))
    return flags


def evaluate_run(args: argparse.Namespace) -> dict[str, Any]:
    """Score ``model.pth`` of a fine-tuning run on a split, inside mmsegmentation."""
    if args.run is None:
        raise UserError("--run: give the folder of a fine-tuning run (python -m mdp.finetune prints it)")
    saved = checkpoint.load(args.run / "model.pth" if args.run.is_dir() else args.run)
    if not isinstance(saved, Mapping) or not {"state_dict", "args"} <= set(saved) or "model" not in saved["args"]:
        raise UserError(f"{args.run}: not a fine-tuned model of python -m mdp.finetune (model.pth)")
    flags = run_flags(saved["args"], args.config)
    flags.data_root = args.data_root
    flags.datasets = args.datasets or flags.datasets
    places = {**own_folders(flags.data), **own_folders(args.data)}
    flags.data = [f"{name}={folder}" for name, folder in places.items()]
    cfg = finetune.resolve(flags, {})
    cfg.model = type(cfg)({"model": saved["args"]["model"]}).model
    own = cfg.data.val if args.split == "val" else cfg.data.get("test", cfg.data.val)
    found = open_named(cfg.data.name, places, args.data_root, own)
    known = saved["args"]["model"]["decode_head"]["num_classes"]
    if len(found.classes) != known:
        raise UserError(f"{args.run} has {known} classes, {cfg.data.name} has {len(found.classes)}; give its own set")
    if args.split == "val":
        cfg.test_dataloader = cfg.val_dataloader
    args.output_dir = args.output_dir or evaluation_folder(args.run, runs_root() / "mdp" / args.split)
    out = result_folder(args)
    print(f"mdp/eval -> {out}\n  {cfg.data.name} {own}: {len(found)} images; loading mmsegmentation ...", flush=True)
    engine = finetune.import_engine()
    runner = engine.build_runner(engine.prepare(cfg, out, flags.seed or 0, args.workers))
    print(f"  {checkpoint.load_strict(engine.network(runner), saved['state_dict'])}", flush=True)
    recorder = engine.Recorder(out, 0, set())
    runner.register_hook(recorder, priority=recorder.priority)
    runner.test()
    recorder.writer.close()
    result = {k: v for k, v in recorder.records[-1].items() if k != "iter"}
    return {"out": out, "results": {f"{cfg.data.name} {own}": result}}


# -------------------------------------------------------------------------------------- protocol: nearest prototype
def similarities(embeddings: Tensor, proto: Tensor, valid: Tensor) -> Tensor:
    """[B, D, h, w] embeddings -> cosines [B, C, h, w] with the C prototypes [C, D]; -2 for a class never seen."""
    similarity = torch.einsum("bdhw,cd->bchw", F.normalize(embeddings.float(), dim=1), proto.float())
    return similarity.masked_fill(~valid.bool()[None, :, None, None], -2.0)  # a cosine is at least -1


def nearest_prototype(embeddings: Tensor, proto: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, D, h, w] embeddings -> int64 [B, H, W] ids among the C prototypes [C, D]; classes never seen are not given.

    The similarities, not the ids, are resized to (H, W), as mmsegmentation resizes logits.
    """
    similarity = similarities(embeddings, proto, valid)  # [B, C, h, w]
    return F.interpolate(similarity, size=size, mode="bilinear", align_corners=False).argmax(1)


def load_encoder(path: Path, branch: str) -> tuple[nn.Module, dict[str, Any], Tensor, Tensor]:
    """Encoder, flags, prototypes [C, D] and their validity [C] of a pretraining checkpoint."""
    saved = checkpoint.load(path)
    if not isinstance(saved, Mapping) or not {"state_dict", "args", "bank"} <= set(saved):
        raise UserError(f"{path}: not an MDP pretraining checkpoint (needs state_dict, args and bank)")
    if "proto" not in (saved["bank"] or {}):
        raise UserError(f"{path}: holds no prototypes; this protocol needs an arm with the prototype bank")
    flags = SimpleNamespace(**saved["args"])
    dilations = flags.dilations.split(",") if isinstance(flags.dilations, str) else flags.dilations
    encoder = Encoder(
        flags.arch, flags.head, flags.dim, flags.base_channels, flags.head_channels, tuple(map(int, dilations))
    )
    prefix = f"encoder_{branch}."
    state = {k.removeprefix("module."): v for k, v in saved["state_dict"].items()}
    checkpoint.load_strict(encoder, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return encoder.eval(), saved["args"], saved["bank"]["proto"], saved["bank"]["proto_valid"]


@torch.no_grad()
def evaluate_prototypes(args: argparse.Namespace) -> dict[str, Any]:
    """Nearest-prototype segmentation of every pretraining set, restricted to the set's own classes."""
    if args.checkpoint is None:
        raise UserError("--checkpoint: give checkpoint.pth of python -m mdp.main_pretrain")
    encoder, flags, proto, valid = load_encoder(args.checkpoint, args.branch)
    names = flags["datasets"].split(",") if isinstance(flags["datasets"], str) else list(flags["datasets"])
    background = flags.get("voc_background", "class")
    places = {**own_folders(flags.get("data")), **own_folders(args.data)}
    chosen = args.datasets.split(",") if args.datasets else names
    if other := [name for name in chosen if name not in names]:
        raise UserError(f"--datasets {other[0]}: {args.checkpoint} has prototypes of {', '.join(names)}")
    opened = [(name, val_split(name, places)) for name in names]
    sets = [open_named(name, places, args.data_root, split, background) for name, split in opened]
    if sum(len(s.classes) for s in sets) != len(proto):
        raise UserError(f"{args.checkpoint}: {len(proto)} prototypes, but {','.join(names)} have other class counts")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, proto, valid = encoder.to(device), proto.to(device), valid.to(device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    args.output_dir = args.output_dir or evaluation_folder(args.checkpoint, runs_root() / "mdp/prototype")
    out = result_folder(args)
    print(f"mdp/eval -> {out}", flush=True)
    from torch.utils.tensorboard import SummaryWriter

    writer, results, offset = SummaryWriter(str(out)), {}, 0
    for (name, split), found in zip(opened, sets):
        own = slice(offset, offset + len(found.classes))
        offset = own.stop
        if name not in chosen:
            continue
        count = min(len(found), args.images or len(found))
        matrix = torch.zeros(len(found.classes), len(found.classes), dtype=torch.int64)
        for i in tqdm(range(count), desc=name, disable=None):
            photo, label = found.load(i)
            small = photo
            if args.short_side:
                ratio = args.short_side / min(photo.size)
                small = photo.resize(
                    (round(photo.width * ratio), round(photo.height * ratio)), Image.Resampling.BILINEAR
                )
            x = (torch.from_numpy(np.array(small)).to(device).permute(2, 0, 1).float() / 255 - mean) / std
            guess = nearest_prototype(encoder(x[None]), proto[own], valid[own], label.shape)[0].cpu()
            matrix += confusion(guess, torch.from_numpy(label), len(found.classes))
            if i < 4:
                picture = panels(np.asarray(photo), label, guess.numpy(), found.palette)
                writer.add_image(f"{name}/{i} (photo, label, prediction)", picture, 0, dataformats="HWC")
        result = scores(matrix, found.classes)
        results[f"{name} {split}" + (" (seen in pretraining)" if split == "train" else "")] = result
        writer.add_scalar(f"prototype/{name}/mIoU", result["mIoU"], 0)
        rows = "\n".join(f"| {k} | {'-' if v is None else v} |" for k, v in result["per_class"].items())
        writer.add_text(f"prototype/{name}/IoU", f"| class | IoU |\n|---|---|\n{rows}", 0)
    writer.close()
    return {"out": out, "results": results}


# ------------------------------------------------------------------------------------------------------------- entry
def get_parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--protocol", choices=["mmseg", "prototype"], default="mmseg")
    p.add_argument("--run", type=Path, help="mmseg: folder of a fine-tuning run, or its model.pth")
    p.add_argument("--config", help="mmseg: another config than the run's (name or path)")
    p.add_argument("--split", choices=["val", "test"], default="val", help="mmseg: split of the config's data set")
    p.add_argument("--checkpoint", type=Path, help="prototype: checkpoint of a pretraining run")
    p.add_argument("--branch", choices=["q", "k"], default="k", help="prototype: k, the encoder that filled the bank")
    p.add_argument("--images", type=natural, default=0, help="prototype: images of each set; 0: all")
    p.add_argument("--short-side", type=natural, default=0, help="prototype: resize images to it; 0: as stored")
    add_datasets_flags(p, None, "prototype: only these of the run's sets; mmseg: an own set of the run's classes")
    p.add_argument("--data-root", "--data_dir", type=Path, default=Path(os.environ.get("DATA_ROOT", "data")))
    p.add_argument("--output-dir", type=Path)
    p.add_argument("--workers", type=natural, default=2)
    p.add_argument("--threads", type=natural, default=0, help="threads of this process; 0: cores - workers on a CPU")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    set_threads(args.threads, args.workers, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    started = time.time()
    done = evaluate_run(args) if args.protocol == "mmseg" else evaluate_prototypes(args)
    for title, result in done["results"].items():
        show(title, result)
    record = {"results": done["results"], "seconds": round(time.time() - started, 1), "flags": plain(args)}
    checkpoint.write_json(done["out"] / "eval.json", {**record, **provenance()})
    print(f"written: {done['out'] / 'eval.json'}")
    return 0


if __name__ == "__main__":
    cli(main)
