"""Weights for other programs: python -m mra.lab.export --pretrained CHECKPOINT --out vit.safetensors

From a run of main_pretrain or a public MAE file the encoder, as timm's ViT; from one of main_supervised, main_fixmatch
or main_fewshot the classifier with its linear layer (its EMA where it has one), a ResNet under torchvision's names.
"""

import argparse

import torch

from mra import models_mae, nets, transforms
from shared_utils import checkpoint
from shared_utils.evaluation import stored_flags
from shared_utils.flags import Parser, positive
from shared_utils.lab.export import INPUT, LOADED, Input, Made, add_export_flags, by_timm, check, vit, write_backbone
from shared_utils.run import cli

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="mra.lab.export", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--pretrained", required=True, help="checkpoint of a run, or a public MAE file with its decoder")
    p.add_argument(
        "--input_size", "--img_size", type=positive, help="pixels, for an encoder; default: the checkpoint's, else 224"
    )
    add_export_flags(p, ["safetensors", "hub"], "safetensors")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check(args.pretrained, args.out, args.format)
    saved, flags = checkpoint.load(args.pretrained), stored_flags(args.pretrained)
    if isinstance(saved, dict) and "classes" in saved.get("info", {}):
        network, told = nets.load_run(args.pretrained, torch.device("cpu"))
        arch, classes, width, stem = told["arch"], len(told["classes"]), told["width"], told["stem"]
        made = Made([f"model = mra.nets.build({arch!r}, {classes}, {width}, {stem!r})", LOADED])
        if arch in nets.IMAGENET and stem == "imagenet":
            made = by_timm(arch, classes)
        x = Input(told["input_size"], *transforms.STATS[told["mean_std"]])
        name = f"{arch}, stem {stem}, {classes} classes, input of {told['input_size']} pixels"
        name += f", normalised by {told['mean_std']}"
        state = network.state_dict()
    else:
        size = args.input_size or flags.get("input_size", 224)
        mae, report, *_ = models_mae.load(args.pretrained, size, norm_pix="no")  # the encoder alone is taken
        print(report)
        state = {key: value for key, value in mae.state_dict().items() if key.startswith(ENCODER)}
        made, x = vit(size, mae.p, *mae.size.enc), Input(size, fixed=True)
        name = f"encoder, patch {mae.p}, width and depth {mae.size.enc[:2]}, input of {size} pixels, {INPUT}"
    print(write_backbone(args, state, "mra", name, made, x))
    return 0


if __name__ == "__main__":
    cli(main)
