"""A trained backbone for other programs: torchvision's names, detectron2's, safetensors with a card, or a hub folder.

`torchvision` and `detectron2` write .pth files of tensors alone (detectron2's checkpointer reads them as it does its
.pkl files). `safetensors` writes the plain names, which timm and torchvision share, and beside the file a model card
of the same name that ends in .md: the paper, how to load, the flags of the training, what this workspace measured.
`hub` writes a folder that timm reads (`local-dir:FOLDER`, and `hf-hub:NAME` once it is uploaded): model.safetensors,
config.json, and a README.md with the results of this very run and no paths of this machine.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from shared_utils import UserError, checkpoint
from shared_utils.compare_runs import UNKNOWN_END, facts, read, results_of
from shared_utils.evaluation import stored_flags
from shared_utils.lab import results
from shared_utils.provenance import DATA_FLAGS, RUNTIME_FLAGS
from shared_utils.timm_nets import PREFIX

DETECTRON2 = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
INPUT = "input in ImageNet's mean and standard deviation"
SUFFIXES = {"safetensors": ".safetensors"}


class Made(NamedTuple):
    """How a network is built elsewhere: lines of Python, and what timm's config.json says where timm has it."""

    lines: list[str]
    timm: dict[str, Any] | None = None


class Input(NamedTuple):
    """What a network's input is: pixels of a side, mean and standard deviation of each channel; whether no other size
    will do."""

    size: int = 224
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    fixed: bool = False


def add_export_flags(p: argparse.ArgumentParser, formats: Sequence[str], default: str) -> None:
    p.add_argument("--format", choices=formats, default=default, help="hub: a folder that timm reads")
    text = "file to write: .safetensors for that format, else .pth; hub: a folder"
    p.add_argument("--out", type=Path, required=True, help=text)


def check(pretrained: str, out: Path, kind: str) -> None:
    """UserError unless there are weights to export and the name of the file fits the format."""
    if pretrained == "none":
        raise UserError("--pretrained none: there is nothing to export; give a checkpoint")
    if kind == "hub":
        if out.suffix in (".pth", ".safetensors", ".pkl") or (out.exists() and not out.is_dir()):
            raise UserError(f"{out}: --format hub writes a folder; give the name of one")
        if out.is_dir() and any(out.iterdir()) and "architecture" not in read(out / "config.json"):
            raise UserError(f"{out}: holds something else than a hub folder; give the name of a new one")
        return
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


def by_timm(architecture: str, classes: int = 0, **args: Any) -> Made:
    """A network that timm.create_model makes."""
    words = "".join(f", {name}={value}" for name, value in args.items())
    lines = [f'model = timm.create_model("{architecture}", num_classes={classes}{words})', LOADED]
    return Made(lines, {"architecture": architecture, "num_classes": classes, "model_args": args})


def known(architecture: str) -> Any:
    """What timm tells of a network of its own: its first convolution, its classifier, whether it takes one size."""
    import timm

    return timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg()


LOADED = "model.load_state_dict(load_file(FILE))"


def resnet(arch: str, width: int, stem: str, build: str) -> Made:
    """How a network is loaded: by timm where it has it, else by the folder's `build` (`hsa.arch.build`)."""
    if arch.startswith(PREFIX):
        return by_timm(arch.removeprefix(PREFIX).partition(".")[0])  # the name alone, without that of timm's weights
    if arch in DETECTRON2 and stem == "imagenet" and width == 64:
        return by_timm(arch)
    module, name = build.rsplit(".", 1)
    return Made([f"model = {module}.{name}({arch!r}, {width}, {stem!r})", LOADED])


# timm's ViTs for 224 pixels: patch, width, depth, heads
VITS = {
    "vit_tiny_patch16_224": (16, 192, 12, 3), "vit_small_patch16_224": (16, 384, 12, 6),
    "vit_small_patch8_224": (8, 384, 12, 6), "vit_base_patch16_224": (16, 768, 12, 12),
    "vit_base_patch8_224": (8, 768, 12, 12), "vit_large_patch16_224": (16, 1024, 24, 16),
    "vit_huge_patch14_224": (14, 1280, 32, 16),
}  # fmt: skip


def vit(img_size: int, patch: int, dim: int, depth: int, heads: int) -> Made:
    """How a ViT is loaded by timm: under a name where it has that network, else by its sizes."""
    name = next((k for k, v in VITS.items() if (img_size, v) == (224, (patch, dim, depth, heads))), None)
    if name:
        return by_timm(name)
    sizes = {"img_size": img_size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
    words = ", ".join(f"{key}={value}" for key, value in sizes.items())
    lines = [f"model = timm.models.VisionTransformer({words}, num_classes=0)", LOADED]
    return Made(lines, {"architecture": "vit_base_patch16_224", "num_classes": 0, "model_args": sizes})


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
        *(
            [f"`--{k.replace('_', '-')} {v}`" + "  " for k, v in public_flags(flags).items()]
            or ["No flags in the file."]
        ),
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


def public_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that tell nothing of a machine: neither where things lie nor how fast they went."""

    def path(value: Any) -> bool:
        return bool(re.search(r"[/\\~]", str(value)))

    hidden = RUNTIME_FLAGS | DATA_FLAGS
    return {k: v for k, v in sorted(flags.items()) if k not in hidden and not path(v) and v not in (None, "")}


def own_results(run: Path) -> list[tuple[str, str, str]]:
    """(evaluation, metric, number) of all results beside a run; names of folders without the flags in them."""
    rows = []
    for key, value in results_of(run).items():
        where, _, metric = key.rpartition("/")
        found = re.match(r"([^=]*?)(-[^-=/]+=.*)?$", where)
        rows.append((found[1] if found else "", metric, f"{value:.4g}"))
    return rows


def hub_card(paper: str, network: str, pretrained: str, made: Made, x: Input) -> str:
    """README.md of a hub folder: the paper, how to load, the results of this run, its flags without paths."""
    about = results.paper(Path(__file__).resolve().parents[2] / paper)
    run = Path(pretrained).parent
    config = read(run / "config.json")
    told = facts(run, config)
    commit = f"commit {told['commit']}" if config.get("git_commit") else "a commit that was not noted"
    unfinished = (
        [] if told["state"] in ("done", UNKNOWN_END) else [f"**Not a finished training: {told['state']}.**", ""]
    )
    text = [
        "---", "library_name: timm", "tags: [image-feature-extraction, timm]", "---", f"# {about.title}: {network}", "",
        f"Trained by `{paper}` ({commit}), which reproduces the paper (arXiv {about.arxiv}; the authors' own release: "
        f"{about.release}). The weights carry whatever terms the data have that they were trained on.", "",
        *unfinished,
        "```python", "import timm", "", 'model = timm.create_model("local-dir:FOLDER", pretrained=True)', "```", "",
        f"Input: {x.size} x {x.size} pixels{', no other size' if x.fixed else ''}; mean "
        f"{', '.join(f'{v:.4g}' for v in x.mean)}, standard deviation {', '.join(f'{v:.4g}' for v in x.std)}.", "",
        "## Results of this run", "",
    ]  # fmt: skip
    rows = own_results(run) if config else []
    if rows:
        text += ["| evaluation | metric | value |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    else:
        text += ["None was found beside the checkpoint."]
    flags = public_flags(stored_flags(pretrained))
    text += ["", "## Training", "", *([f"`--{k} {v}`" + "  " for k, v in flags.items()] or ["No flags in the file."])]
    return "\n".join(text) + "\n"


def write_hub(
    state: Mapping[str, Tensor], out: Path, paper: str, network: str, made: Made, x: Input, pretrained: str
) -> str:
    """The folder that timm reads; returns what was written. UserError: timm does not have the network."""
    from safetensors.torch import save

    if made.timm is None:
        raise UserError(f"--format hub: timm has no such network ({network}); --format safetensors takes any")
    its = known(made.timm["architecture"])
    config = made.timm | {
        "num_features": made.timm["model_args"].get("embed_dim"),
        "pretrained_cfg": {
            "input_size": [3, x.size, x.size], "fixed_input_size": x.fixed, "interpolation": "bilinear",
            "crop_pct": 0.875, "crop_mode": "center", "mean": list(x.mean), "std": list(x.std),
            "num_classes": made.timm["num_classes"],
            "first_conv": its.first_conv, "classifier": its.classifier,
        },
    }  # fmt: skip
    config = {k: v for k, v in config.items() if v is not None}
    blob = save({k: v.contiguous() for k, v in state.items()}, metadata={"format": "pt"})
    files = {"model.safetensors": blob, "config.json": json.dumps(config, indent=1).encode() + b"\n"}
    files["README.md"] = hub_card(paper, network, pretrained, made, x).encode()

    def put(name: str, content: bytes) -> None:
        checkpoint.write(out / name, lambda handle: handle.write(content))

    for name, content in files.items():
        put(name, content)
    return f'{len(state)} tensors -> {out}: timm.create_model("local-dir:{out}", pretrained=True)'


def write_backbone(
    args: argparse.Namespace, state: Mapping[str, Tensor], paper: str, network: str, made: Made, x: Input | None = None
) -> str:
    """As --format says: a hub folder, safetensors and a card, or the same names in a .pth file; says what was written.

    `x`: the input, where it is not ImageNet's at the size that the checkpoint was trained with.
    """
    if args.format == "hub":
        size = stored_flags(str(args.pretrained)).get("img_size") or 224
        x = x or Input(size, fixed=made.timm is not None and known(made.timm["architecture"]).fixed_input_size)
        return write_hub(state, args.out, paper, network, made, x, str(args.pretrained))
    if args.format == "safetensors":
        return write_safetensors(state, args.out, paper, network, made.lines, str(args.pretrained))
    checkpoint.save(args.out, {key: value.contiguous() for key, value in state.items()})
    return f"{len(state)} tensors -> {args.out}"
