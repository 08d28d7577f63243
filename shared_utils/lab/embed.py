"""Features of photographs: python -m shared_utils.lab.embed FOLDER|timm:NAME IMAGES --out E

FOLDER is a hub folder (an exporter's --format hub writes one), or any that timm's `local-dir:` reads. Every image
anywhere below IMAGES is read, with the size and normalisation that the network was trained with. E.npy holds the pooled
features [N, D] (float32, as the network gives them), E.csv the name of the image of each row, below IMAGES.
"""

import csv
import io
import os
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_utils import UserError, checkpoint, distributed
from shared_utils.compare_runs import read
from shared_utils.data import flat_folder
from shared_utils.evaluation import stream
from shared_utils.flags import Parser, add_machine_flags, positive
from shared_utils.run import cli, set_threads


def get_parser() -> Parser:
    p = Parser(prog="shared_utils.lab.embed", description=(__doc__ or "").splitlines()[0])
    p.add_argument(
        "network", metavar="FOLDER|timm:NAME", help="a hub folder, or one of timm's names, which it downloads"
    )
    p.add_argument("images", type=Path, metavar="IMAGES", help="folder with images anywhere below it")
    p.add_argument("--out", type=Path, required=True, metavar="E", help="writes E.npy and E.csv")
    p.add_argument("--batch_size", type=positive, default=64)
    add_machine_flags(p)
    return p


def exporting(spec: str, config: dict[str, Any]) -> str:
    """What to do about a folder that is no hub folder: of a run the command that makes one."""
    folder = Path(__file__).resolve().parents[2] / config.get("job", "").partition(".")[0] / "lab"
    scripts = sorted(folder.glob("export*.py")) if config.get("job") else []
    script = next((path for path in scripts if '"hub"' in path.read_text()), None)
    if script is None:
        return "export a run by its folder's lab/export*.py --format hub, or give timm:NAME"
    command = f"python -m {folder.parent.name}.lab.{script.stem} --pretrained {quote(spec)} --format hub"
    return f"it is a run: {command} --out FOLDER, then give FOLDER"


def load(spec: str) -> tuple[torch.nn.Module, Any]:
    """timm's network without its classifier, in eval mode, and its transform of PIL images. UserError: none there."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    if not spec.startswith("timm:") and "architecture" not in (config := read(Path(spec) / "config.json")):
        raise UserError(f"{spec}: no hub folder (config.json, model.safetensors); {exporting(spec, config)}")
    name = spec[5:] if spec.startswith("timm:") else f"local-dir:{spec}"
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever hub, network or file raise
        raise UserError(f"{spec}: timm cannot load it ({' '.join(str(error).split())[:120]})") from None
    config = resolve_model_data_config(network)
    return network.eval().requires_grad_(False), create_transform(**config, is_training=False)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    images = flat_folder(args.images)
    network, images.transform = load(args.network)
    network.to(device)
    count, done, rows = len(images), 0, None
    print(f"embed: {args.network}, {count} images below {args.images}", flush=True)

    def embed(x: Tensor) -> list[Tensor]:
        return [network(x)]

    table = Path(f"{args.out}.npy")
    half = table.with_name(f".{table.name}.tmp")  # renamed when it is whole
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        for (features,), _ in stream(embed, images, device, args.batch_size, args.workers):
            if rows is None:
                rows = np.lib.format.open_memmap(half, "w+", np.float32, (count, features.shape[1]))
            rows[done : done + len(features)] = features.cpu().numpy()
            done += len(features)
        assert rows is not None
        rows.flush()
        half.replace(table)
    except OSError as error:
        raise UserError(f"{table}: cannot be written ({error.strerror}); give another --out") from None
    finally:
        half.unlink(missing_ok=True)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", "file"])
    lines.writerows([i, os.path.relpath(path, args.images)] for i, path in enumerate(images.paths()))
    names = Path(f"{args.out}.csv")
    checkpoint.write_text(names, text.getvalue())
    print(f"  [{count}, {rows.shape[1]}] -> {table}, their files -> {names}", flush=True)
    return 0


if __name__ == "__main__":
    cli(main)
