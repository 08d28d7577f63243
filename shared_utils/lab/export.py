"""A trained backbone for other programs: torchvision's names, detectron2's, or safetensors with a model card.

`torchvision` and `detectron2` write .pth files of tensors alone (detectron2's checkpointer reads them as it does its
.pkl files). `safetensors` writes the plain names, which timm and torchvision share, and beside the file a model card
of the same name that ends in .md: the paper, how to load, the flags of the training, what this workspace measured.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from shared_utils import UserError, checkpoint
from shared_utils.evaluation import stored_flags
from shared_utils.lab import results

DETECTRON2 = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
INPUT = "input in ImageNet's mean and standard deviation"
SUFFIXES = {"safetensors": ".safetensors"}


def add_export_flags(p: argparse.ArgumentParser, formats: Sequence[str], default: str) -> None:
    p.add_argument("--format", choices=formats, default=default)
    p.add_argument("--out", type=Path, required=True, help="file to write: .safetensors for that format, else .pth")


def check(pretrained: str, out: Path, kind: str) -> None:
    """UserError unless there are weights to export and the name of the file fits the format."""
    if pretrained == "none":
        raise UserError("--pretrained none: there is nothing to export; give a checkpoint")
    suffix = SUFFIXES.get(kind, ".pth")
    if out.suffix != suffix:
        why = " (detectron2 unpickles a .pkl file by other code)" if out.suffix == ".pkl" else ""
        raise UserError(f"{out}: with --format {kind} the name must end in {suffix}{why}")


def detectron2_name(key: str) -> str:
    """layerK -> res(K+1), what is in no layer -> stem, bnK -> convK.norm, downsample.0/1 -> shortcut(.norm)."""
    if not key.startswith("layer"):
        key = f"stem.{key}"
    for k in (1, 2, 3, 4):
        key = key.replace(f"layer{k}.", f"res{k + 1}.").replace(f"bn{k}.", f"conv{k}.norm.")
    return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def write_detectron2(
    state: Mapping[str, Tensor], out: Path, arch: str, width: int, stem: str, author: str = "MOCO"
) -> str:
    """A ResNet under detectron2's names; returns the line that its config needs, but for the input's mean and std.

    UserError: a network that detectron2 does not have.
    """
    if arch not in DETECTRON2 or stem != "imagenet" or width != 64:
        raise UserError(
            f"detectron2 has no {arch} of width {width} with stem {stem}: {', '.join(DETECTRON2)} at full width only; "
            "--format torchvision writes any network"
        )
    renamed = {detectron2_name(key): value.contiguous() for key, value in state.items()}
    checkpoint.save(out, {"model": renamed, "__author__": author, "matching_heuristics": True})
    line = f"config: MODEL.WEIGHTS {out} MODEL.RESNETS.DEPTH {DETECTRON2[arch]} MODEL.RESNETS.STRIDE_IN_1X1 False "
    return line + "INPUT.FORMAT RGB" + (" MODEL.RESNETS.RES2_OUT_CHANNELS 64" if DETECTRON2[arch] < 50 else "")


def resnet_lines(arch: str, width: int, stem: str, build: str) -> list[str]:
    """How a ResNet is loaded: by timm where it has the network, else by the folder's `build` (`hsa.arch.build`)."""
    if arch in DETECTRON2 and stem == "imagenet" and width == 64:
        return [f'model = timm.create_model("{arch}", num_classes=0)', "model.load_state_dict(load_file(FILE))"]
    module, name = build.rsplit(".", 1)
    return [f"model = {module}.{name}({arch!r}, {width}, {stem!r})", "model.load_state_dict(load_file(FILE))"]


# timm's ViTs for 224 pixels: patch, width, depth, heads
VITS = {
    "vit_tiny_patch16_224": (16, 192, 12, 3), "vit_small_patch16_224": (16, 384, 12, 6),
    "vit_small_patch8_224": (8, 384, 12, 6), "vit_base_patch16_224": (16, 768, 12, 12),
    "vit_base_patch8_224": (8, 768, 12, 12), "vit_large_patch16_224": (16, 1024, 24, 16),
    "vit_huge_patch14_224": (14, 1280, 32, 16),
}  # fmt: skip


def vit_lines(img_size: int, patch: int, dim: int, depth: int, heads: int) -> list[str]:
    """How a ViT is loaded by timm: under a name where it has that network, else by its sizes."""
    name = next((k for k, v in VITS.items() if (img_size, v) == (224, (patch, dim, depth, heads))), None)
    sizes = f"img_size={img_size}, patch_size={patch}, embed_dim={dim}, depth={depth}, num_heads={heads}"
    made = f'timm.create_model("{name}", num_classes=0)'
    made = made if name else f"timm.models.VisionTransformer({sizes}, num_classes=0)"
    return [f"model = {made}", "model.load_state_dict(load_file(FILE))"]


def model_card(paper: str, network: str, out: Path, lines: Sequence[str], flags: Mapping[str, object]) -> str:
    """Markdown: paper, network, loading, training flags, and what the folder measured of its claim (results.csv)."""
    folder = Path(__file__).resolve().parents[2] / paper
    about = results.paper(folder)
    measured = [row for row in results.claim_rows(results.read(folder)[0], about) if row["ours_mean"]]
    imports = sorted(set(re.findall(r"\b((?:\w+\.)*\w+)\.\w+\(", "\n".join(lines))) - {"model"})
    text = [
        f"# {about.title}: {network}",
        "",
        f"Weights of a backbone, `{out.name}`, written by `{paper}` of this workspace, which reproduces the paper"
        f" (arXiv {about.arxiv}; the authors' own release: {about.release}).",
        "Code: Apache-2.0. The weights carry whatever terms the data have that they were trained on.",
        "",
        "```python",
        *(f"import {name}" for name in imports),
        "from safetensors.torch import load_file",
        "",
        *(line.replace("FILE", f'"{out.name}"') for line in lines),
        "```",
        "",
        "## Training",
        "",
        *([f"`--{k.replace('_', '-')} {v}`" + "  " for k, v in sorted(flags.items())] or ["No flags in the file."]),
        "",
        "## Measured",
        "",
        f"Its claim as `{paper}` measured it at small scale, not of this file; all rows are in `{paper}/RESULTS.md`."
        if measured
        else "Nothing yet.",
        "",
    ]
    if measured:
        text += ["| experiment | data set | metric | here | baseline | seeds | status |", "|---" * 7 + "|"]
    for row in measured:
        here, base = (f"{row[f'{x}_mean']} ± {row[f'{x}_std']}".removesuffix(" ± ") for x in ("ours", "baseline"))
        parts = (row["experiment"], row["dataset"], row["metric"], here, base, row["n_seeds"], row["status"])
        text.append("| " + " | ".join(map(results.cell, parts)) + " |")
    return "\n".join(text) + "\n"


def write_safetensors(
    state: Mapping[str, Tensor], out: Path, paper: str, network: str, lines: Sequence[str], pretrained: str
) -> str:
    """The file and its card; returns what was written. The flags are those that `pretrained` has stored."""
    from safetensors.torch import save

    plain = {key: value.contiguous() for key, value in state.items()}
    blob = save(plain, metadata={"format": "pt", "paper": paper, "network": network})
    card = out.with_suffix(".md")
    checkpoint.write(out, lambda handle: handle.write(blob))
    text = model_card(paper, network, out, lines, stored_flags(pretrained))
    checkpoint.write(card, lambda handle: handle.write(text.encode()))
    return f"{len(plain)} tensors -> {out}; model card -> {card}"


def write_backbone(
    args: argparse.Namespace, state: Mapping[str, Tensor], paper: str, network: str, lines: Sequence[str]
) -> str:
    """As --format says: safetensors and a card, or the same names in a .pth file; returns what was written."""
    if args.format == "safetensors":
        return write_safetensors(state, args.out, paper, network, lines, str(args.pretrained))
    checkpoint.save(args.out, {key: value.contiguous() for key, value in state.items()})
    return f"{len(state)} tensors -> {args.out}"
