"""The video network for other programs: python -m fame.lab.export --pretrained CHECKPOINT --out r2plus1d_18.safetensors

r3d_18, r2plus1d_18 and s3d have torchvision's names; I3D (the release's names), c3d and tiny their own. Heads stay
behind.
"""

import argparse

from fame.backbone import build
from fame.network import add_weights_flags, from_checkpoint, load
from shared_utils.flags import Parser
from shared_utils.lab.export import Made, add_export_flags, check, write_backbone
from shared_utils.run import cli

# What torchvision's networks do after their last map. s3d's own pool needs 2 x 7 x 7 of it, ours takes any.
HEADS = {"r3d_18": ("fc",), "r2plus1d_18": ("fc",), "s3d": ("avgpool", "classifier")}


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="fame.lab.export", description=(__doc__ or "").splitlines()[0])
    add_weights_flags(p)
    add_export_flags(p, ["safetensors"], "safetensors")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check(args.pretrained, args.out, args.format)
    from_checkpoint(args)
    network = build(args.arch, width=args.width)
    print(load(args, network))
    made = f"fame.backbone.build({args.arch!r}, width={args.width})"
    if args.arch in HEADS:
        made = f"torchvision.models.video.{args.arch}()"
    lines = [f"model = {made}", *(f"model.{head} = torch.nn.Identity()" for head in HEADS.get(args.arch, ()))]
    lines.append("model.load_state_dict(load_file(FILE))")
    name = f"{args.arch}, clips of {args.frame_per_clip} x {args.crop_size} x {args.crop_size}, normalised by Kinetics"
    print(write_backbone(args, network.state_dict(), "fame", name, Made(lines)))
    return 0


if __name__ == "__main__":
    cli(main)
