"""Weights for other programs: python -m uvos_dino.lab.export --pretrained CHECKPOINT --out vit.safetensors

The encoder as timm's ViT, and from a run of train_RGB_cluster (or the released file) the spatio-temporal block beside
it, vit-block.safetensors, under its own names; from a run of main_dino or a DINO file the encoder alone.
"""

import argparse

from shared_utils import checkpoint
from shared_utils.flags import Parser
from shared_utils.lab.export import (
    INPUT,
    LOADED,
    Input,
    add_export_flags,
    check,
    vit,
    write_backbone,
    write_safetensors,
)
from shared_utils.run import cli
from uvos_dino.inference import load_model
from uvos_dino.vision_transformer import for_weights


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.lab.export", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--pretrained", required=True, help="checkpoint of a run, the released one, or a DINO file")
    add_export_flags(p, ["safetensors", "hub"], "safetensors")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    check(args.pretrained, args.out, args.format)
    saved, blocks = checkpoint.load(args.pretrained), None
    if isinstance(saved, dict) and "model_state_dict" in saved:
        model, report, _ = load_model(args.pretrained)
        encoder, blocks = model.encoder, model.temporal_transformer
    else:
        state = checkpoint.read_weights(args.pretrained)
        encoder = for_weights(state, args.pretrained)
        report = f"{args.pretrained}: {checkpoint.load_strict(encoder, state, drop=('head.*',))}"
    print(report)
    side = encoder.patch_size * int((encoder.pos_embed.shape[1] - 1) ** 0.5)
    made = vit(side, encoder.patch_size, encoder.embed_dim, encoder.depth, encoder.num_heads)
    name = f"encoder, patch {encoder.patch_size}, width {encoder.embed_dim}, depth {encoder.depth}, {INPUT}"
    print(write_backbone(args, encoder.state_dict(), "uvos_dino", name, made, Input(side, fixed=True)))
    if blocks is not None:
        heads = blocks[0].attn.num_heads  # type: ignore[union-attr]
        blocks_made = f"uvos_dino.attention.Block({encoder.embed_dim}, {heads}) for _ in range({len(blocks)})"
        lines = [f"model = torch.nn.ModuleList({blocks_made})", LOADED]
        out = args.out.with_stem(f"{args.out.stem}-block")
        out = args.out / "block.safetensors" if args.format == "hub" else out
        name = f"spatio-temporal block, width {encoder.embed_dim}, {heads} heads"
        print(write_safetensors(blocks.state_dict(), out, "uvos_dino", name, lines, args.pretrained))
    return 0


if __name__ == "__main__":
    cli(main)
