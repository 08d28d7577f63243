"""Fine-tune a segmentation network with mmsegmentation, from MDP weights, ImageNet weights or from scratch.

    python -m mdp.finetune --config camvid --checkpoint runs/mdp/pretrain/small/checkpoint.pth --data-root $DATA_ROOT
    python -m mdp.finetune --config mini --checkpoint PATH --compare scratch --data-root data/mini/segmentation
    python -m mdp.finetune --datasets mine=FOLDER --checkpoint PATH    (an own set: images/, labels/, classes.txt)

Both the early validation (a tenth of the schedule) and the last one are kept in ``result.json``: the early one
separates pretrainings far better (46.70 against 60.02 mIoU after 4k iterations on VOC, 70.03 against 70.56 after 40k;
authors' rebuttal draft, not in the paper). The same command goes on where a stopped run ended.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import time
import warnings
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from mdp.models import ARCHS, HEADS
from mdp.own import Taxonomy, add_datasets_flags, describe_named, open_named, own_folders, splits
from mdp.transfer import load_pretrained
from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import tell
from shared_utils.flags import Parser, natural, positive, runs_root
from shared_utils.run import RUNTIME_FLAGS, cli, plain, provenance, set_threads

CONFIGS = Path(__file__).parent / "mmseg_configs"
MODEL_FLAGS = ("arch", "head", "base_channels", "head_channels", "dilations")
# mmsegmentation's readers and ours.
OWN_READERS = {"LoadImageFromFile": "LoadPhoto", "LoadAnnotations": "LoadLabels"}
# What a run leaves in its folder.
RUN_FILES = (
    "config.json",
    "end.json",
    "result.json",
    "validations.json",
    "log.jsonl",
    "model.pth",
    "mmengine",
    "events.*",
)
# New in fine-tuning, whatever the weights: the classifier.
NEW = ("decode_head.conv_seg.*",)


def get_parser() -> Parser:
    names = ", ".join(sorted(p.stem for p in CONFIGS.glob("[a-z]*.py")))
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", help=f"{names}, or a path; own: what --datasets takes if none is given")
    add_datasets_flags(p, None, "an own set, a folder of images/, labels/ and classes.txt, instead of the config's")
    p.add_argument(
        "--checkpoint", default="none", help="MDP checkpoint or export; none; imagenet:PATH; imagenet:torchvision"
    )
    p.add_argument("--branch", choices=["q", "k"], default="q", help="encoder taken from an MDP checkpoint")
    p.add_argument(
        "--compare", choices=["none", "scratch"], default="none", help="afterwards repeat without the checkpoint"
    )
    p.add_argument("--data-root", "--data_dir", type=Path, default=Path(os.environ.get("DATA_ROOT", "data")))
    p.add_argument("--output-dir", type=Path, help="default $RUNS/mdp/finetune/CONFIG/TAG")
    p.add_argument("--tag", help="name of the run; default: the checkpoint's folder (or scratch, imagenet) and seed")
    p.add_argument("--seed", type=natural, default=0)
    p.add_argument("--iters", type=positive, help="length of the schedule; the early validation is at a tenth of it")
    p.add_argument("--batch-size", type=positive, help="over all processes")
    p.add_argument("--lr", type=float)
    p.add_argument("--crop-size", type=positive, nargs="+", help="one number, or height and width")
    p.add_argument("--short-side", type=positive, help="images are resized to this short side before cropping")
    p.add_argument("--validate", choices=["tenths", "ends"], help="ten validations, or only the early and last one")
    p.add_argument("--arch", choices=ARCHS, help="default: the checkpoint's, else the config's; so for the next four")
    p.add_argument("--head", choices=HEADS[:2])
    p.add_argument("--base-channels", type=positive)
    p.add_argument("--head-channels", type=positive)
    p.add_argument("--dilations", type=numbers, nargs="+", help="of the ASPP branches: 1,12,24 or 1 12 24")
    p.add_argument("--amp", choices=["none", "bf16"], default="none")
    p.add_argument("--workers", type=natural, default=2)
    p.add_argument("--threads", type=natural, default=0, help="threads of this process; 0: cores - workers on a CPU")
    p.add_argument("--log-every", type=positive, default=10)
    p.add_argument("--overwrite", action="store_true", help="start anew where the output folder holds a run")
    return p


# ----------------------------------------------------------------------------------------------------- before the run
def find_config(name: str) -> Path:
    """Path of a config given by name or path."""
    for path in (CONFIGS / f"{name}.py", Path(name)):
        if path.is_file() and path.suffix == ".py":
            return path
    names = ", ".join(sorted(p.stem for p in CONFIGS.glob("[a-z]*.py")))
    raise UserError(f"config '{name}' not found; choose one of {names}, or give the path of a .py file")


def read_checkpoint(spec: str, branch: str) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Weights in mmsegmentation's names (None: scratch), and the model flags that they imply."""
    if spec == "none":
        return None, {}
    if spec == "imagenet:torchvision":
        return None, {}  # fetched when the architecture is known
    if spec.startswith("imagenet:"):
        state = checkpoint.read_weights(spec.removeprefix("imagenet:"))
        return {f"backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}, {}
    if not Path(spec).is_file():
        raise UserError(f"{spec}: no such checkpoint; run bash mdp/run_pretrain.sh first, or give --checkpoint none")
    state, flags = load_pretrained(spec, branch)
    if flags.get("head") == "none":
        flags.pop("head")  # fine-tuning needs one; it starts new
    return state, {k: flags[k] for k in MODEL_FLAGS if flags.get(k) is not None}


def numbers(text: str) -> str:
    """For `argparse`: whole numbers with commas between them, as mdp.main_pretrain takes them."""
    return ",".join(str(positive(word)) for word in text.split(","))


def int_list(value: Any) -> list[int]:
    words = value if isinstance(value, str) else ",".join(map(str, value))
    return [int(v) for v in words.split(",")]


def resolve(args: argparse.Namespace, implied: dict[str, Any]) -> Any:
    """The mmengine Config with all flags applied. UserError where a flag contradicts the checkpoint."""
    from mmengine.config import Config, ConfigDict

    path = find_config(args.config)
    cfg = Config.fromfile(str(path))
    if "data" not in cfg or "crop_size" not in cfg:
        raise UserError(f"{path}: not a config of mdp/mmseg_configs (no `data`, no `crop_size`); copy one of those")
    places = own_folders(args.data)
    if args.datasets:
        if args.datasets not in places:
            raise UserError(f"--datasets {args.datasets}: one own set, NAME=FOLDER; known sets have a --config each")
        cfg.data = ConfigDict(name=args.datasets, train="train", val="val")
        if "test" in splits(places[args.datasets]):
            cfg.data.test = "test"
        cfg.model.decode_head.num_classes = len(describe_named(args.datasets, places).classes)
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            cfg[name].dataset.indices = None  # of the config's own set
    elif not cfg.data.name:
        raise UserError(f"--config {args.config}: give the data as --datasets NAME=FOLDER")
    wanted: dict[str, Any] = {}
    for key in MODEL_FLAGS:
        flag, stored = getattr(args, key), implied.get(key)
        if key == "dilations":
            flag, stored = (None if v is None else int_list(v) for v in (flag, stored))
        if flag is not None and stored is not None and flag != stored:
            raise UserError(f"--{key.replace('_', '-')} {flag}, but {args.checkpoint} was trained with {stored}")
        wanted[key] = stored if flag is None else flag
    apply_model(cfg.model, wanted)
    iters = args.iters or cfg.train_cfg.max_iters
    early = max(1, iters // 10)
    every = (args.validate or cfg.get("validate", "tenths")) == "tenths"
    cfg.train_cfg.update(max_iters=iters, val_interval=early)
    if not every:  # after the early validation the interval is the whole schedule
        cfg.train_cfg.dynamic_intervals = [(early + 2, iters)]
    cfg.due = sorted({early, iters} | (set(range(early, iters + 1, early)) if every else set()))
    cfg.param_scheduler[0].end = iters
    cfg.default_hooks.checkpoint.interval = early
    if args.lr is not None:
        cfg.optim_wrapper.optimizer.lr = args.lr
    if args.batch_size is not None:
        cfg.train_dataloader.batch_size = args.batch_size
    if cfg.train_dataloader.batch_size < 2:
        raise UserError("--batch-size must be at least 2: the image pooling of the head normalises over the batch")
    if args.crop_size is not None:
        crop = tuple(args.crop_size) * (3 - len(args.crop_size)) if len(args.crop_size) < 3 else ()
        if len(crop) != 2 or min(crop) < 16:
            raise UserError(f"--crop-size {args.crop_size}: give one number or height and width, 16 or more")
        cfg.crop_size = cfg.model.data_preprocessor.size = crop
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        data, role = cfg[name].dataset, name.removesuffix("_dataloader")
        # Copies of older configs name mmsegmentation's readers, which turn a photo by its tag and leave its label map.
        split = cfg.data.get(role, cfg.data.val)
        shared = {"name": cfg.data.name, "split": split, "data_root": str(args.data_root)}
        if cfg.data.name in places:
            shared["data"] = args.data
        data = cfg[name].dataset = ConfigDict(
            type="MDPDataset", **shared, pipeline=data.pipeline, indices=data.get("indices")
        )
        for step in data.pipeline:
            if step.type in OWN_READERS:
                own = OWN_READERS[step.type]
                step.clear()
                step.type = own
            if step.type == "RandomCrop":
                step.crop_size = cfg.crop_size
            if step.type in ("Resize", "RandomResize") and args.short_side:
                step.scale = (max(step.scale) * 4, args.short_side)
    if args.amp == "bf16":
        cfg.optim_wrapper.type = "Bf16OptimWrapper"
    return cfg


def apply_model(model: Any, wanted: dict[str, Any]) -> None:
    """Set depth, widths and head of a config's model; None leaves the config's value."""
    backbone, head = model.backbone, model.decode_head
    if wanted["arch"]:
        backbone.depth = int(wanted["arch"].removeprefix("resnet"))
    if wanted["base_channels"]:
        backbone.base_channels = backbone.stem_channels = wanted["base_channels"]
    expansion = 4 if backbone.depth >= 50 else 1
    head.in_channels = backbone.base_channels * 8 * expansion
    if wanted["head_channels"]:
        head.channels = wanted["head_channels"]
    if wanted["dilations"]:
        head.dilations = tuple(wanted["dilations"])
    if wanted["head"] == "sep_aspp":  # as mdp.models.Encoder
        head.type = "DepthwiseSeparableASPPHead"
        head.c1_in_channels = backbone.base_channels * expansion
        head.c1_channels = max(1, 48 * head.channels // 512)


def check_data(cfg: Any, args: argparse.Namespace) -> tuple[dict[str, int], list[str], dict[str, Any]]:
    """Open both splits as pretraining does (trees, pairs, first files; of an own set all).

    Returns the number of images of each, what there is to say of them, and of an own set what tells it from others.
    """
    counts, notes, own = {}, [], own_folders(args.data)
    files: dict[str, Any] = {}
    for role in ("train", "val"):
        found = open_named(cfg.data.name, own, args.data_root, cfg.data[role])
        notes += [note for note in found.notes if note not in notes]
        if found.unread:
            notes.append(f"not read: {tell(found.unread)} between the {role} images")
        if cfg.data.name in own:
            files.setdefault("files", []).append(list(found.fingerprint()))
        if cfg.data.name == "coco" and not found.pairs[0][1].name.endswith("_labelTrainIds.png"):
            raise UserError(
                f"coco: {found.pairs[0][1]} is a raw map; mmsegmentation needs *_labelTrainIds.png beside it"
            )
        counts[role] = len(found)
    limit = cfg.train_dataloader.dataset.get("indices")
    counts["train"] = min(counts["train"], limit or counts["train"])
    return counts, notes, files


def torchvision_weights(depth: int, base_channels: int) -> dict[str, Tensor]:
    """ImageNet weights (V1) from torchvision, downloaded once; the paper's supervised baseline starts from these."""
    import torchvision

    if base_channels != 64:
        raise UserError("imagenet:torchvision has full width only; add --base-channels 64")
    try:
        weights = torchvision.models.get_model_weights(f"resnet{depth}")["IMAGENET1K_V1"]
        state = weights.get_state_dict(progress=True)
    except OSError as error:
        raise UserError(
            f"imagenet:torchvision cannot be fetched ({error}); download it and give imagenet:PATH"
        ) from None
    return {f"backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}


# ------------------------------------------------------------------------------------------------------------ the run
def default_tag(spec: str, seed: int) -> str:
    if spec == "none":
        name = "scratch"
    elif spec.startswith("imagenet:"):
        name = "imagenet"
    else:
        name = Path(spec).resolve().parent.name if Path(spec).stem == "checkpoint" else Path(spec).stem
    return f"{name}-seed{seed}"


def run(args: argparse.Namespace, implied: dict[str, Any], state: dict[str, Tensor] | None) -> dict[str, Any]:
    """One fine-tuning, new, resumed or already complete. Returns what ``result.json`` holds."""
    cfg = resolve(args, implied)
    tag = args.tag or default_tag(args.checkpoint, args.seed)
    out = args.output_dir or runs_root() / "mdp" / "finetune" / (args.datasets or Path(args.config).stem) / tag
    counts, notes, files = check_data(cfg, args)
    main_process = distributed.rank() == 0
    flags = {**plain(args), "model": json.loads(json.dumps(cfg.model)), "world": distributed.world(), **files}
    if main_process:
        claim(out, flags, args.overwrite)
    distributed.barrier()  # nobody looks before the folder is claimed
    resume = (out / "mmengine" / "last_checkpoint").is_file()
    if (out / "result.json").is_file():
        if main_process:
            print(f"{out}: complete already; --overwrite does it again")
        return json.loads((out / "result.json").read_text())
    backbone, head, early = cfg.model.backbone, cfg.model.decode_head, cfg.train_cfg.val_interval
    if main_process:
        print(f"mdp/finetune -> {out}")
        where = own_folders(args.data).get(cfg.data.name, args.data_root)
        print(f"  data: {cfg.data.name} at {where}, {counts['train']} train / {counts['val']} val images")
        for note in notes:
            print(f"  {note}")
        print(
            f"  model: ResNet-{backbone.depth} x {backbone.base_channels}, {head.type} {head.channels} {head.dilations}"
        )
        classes = head.num_classes
        print(f"  weights: {args.checkpoint}; expected initial loss log({classes}) = {math.log(classes):.2f}")
        iters, batch = cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size
        print(f"  {iters} iterations x {batch} crops of {tuple(cfg.crop_size)}, lr {cfg.optim_wrapper.optimizer.lr}")
        print(f"  validations after {', '.join(map(str, cfg.due))}; loading mmsegmentation ...", flush=True)
    engine = import_engine()
    started = time.time()
    set_threads(args.threads, args.workers, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    runner = engine.build_runner(engine.prepare(cfg, out, args.seed, args.workers))
    if args.checkpoint == "imagenet:torchvision":
        state = torchvision_weights(backbone.depth, backbone.base_channels)
    if state is not None:
        headless = not any(k.startswith("decode_head.") for k in state)
        report = checkpoint.load_strict(
            engine.network(runner), state, missing_ok=("decode_head.*",) if headless else NEW
        )
        if main_process:
            print(f"  {report}" + (" (the whole decode head is new)" if headless else ""))
    recorder = engine.Recorder(out, args.seed, set(cfg.due), args.log_every)
    engine.train(runner, recorder, resume)
    spent = time.time() - started
    result: dict[str, Any] = {}
    if main_process:
        result = {"early": recorder.records[0], "final": recorder.records[-1], "seconds": round(spent, 1)}
        weights = {k: v.cpu().contiguous() for k, v in engine.network(runner).state_dict().items()}
        classes = Taxonomy.of(describe_named(cfg.data.name, own_folders(args.data))).stored()
        scale = list(test_scale(cfg))
        checkpoint.save(out / "model.pth", {"state_dict": weights, "args": flags, "sets": [classes], "scale": scale})
        checkpoint.write_json(out / "result.json", result)
        done = {"state": "done", "step": cfg.train_cfg.max_iters, "steps": cfg.train_cfg.max_iters}
        checkpoint.write_json(out / "end.json", done | {"minutes": round(spent / 60, 3)})
        print(f"  early mIoU {result['early']['mIoU']:.2f} (iteration {early}), final {result['final']['mIoU']:.2f}")
        print(f"  next: python -m mdp.predict PHOTO_OR_FOLDER --pretrained {quote(str(out))} --out maps")
        print(f"  next: python -m mdp.eval_seg --run {quote(str(out))} --data-root {quote(str(args.data_root))}")
    return result


def test_scale(cfg: Any) -> tuple[int, int]:
    """Long and short side to which images are resized, keeping the aspect, before they are segmented."""
    steps = [step for step in cfg.val_dataloader.dataset.pipeline if step.type == "Resize"]
    long, short = sorted(steps[0].scale, reverse=True)
    return int(long), int(short)


def import_engine() -> Any:
    """``mdp.mmseg_engine``; mmsegmentation's remarks on optional parts that are not installed stay unsaid."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        from mdp import mmseg_engine
    return mmseg_engine


def claim(out: Path, flags: dict[str, Any], overwrite: bool) -> None:
    """Write ``config.json``. UserError when the folder holds a run with other flags."""
    path = out / "config.json"
    if overwrite and out.is_dir():
        if any(out.iterdir()) and not path.is_file():
            raise UserError(
                f"{out}: not a run (no config.json), so --overwrite leaves it alone; give another --output-dir"
            )
        for name in RUN_FILES:  # nothing else in the folder is ours to delete
            for old in out.glob(name):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    if path.is_file():
        stored = json.loads(path.read_text())["flags"]
        skip = RUNTIME_FLAGS | {"tag", "compare", "data"}  # of own sets the files are compared, wherever they lie
        changed = sorted(k for k in flags if k not in skip and flags[k] != stored.get(k))
        if changed:
            names = ", ".join(f"{k} was {stored.get(k)}" for k in changed if k != "model") or "the model differs"
            raise UserError(f"{out}: holds a run with other flags ({names}); --overwrite, --tag or --output-dir")
        return
    checkpoint.write_json(path, {"flags": flags, **provenance()})


def compare(args: argparse.Namespace, implied: dict[str, Any], pretrained: dict[str, Any]) -> None:
    """Repeat from scratch with the same network, seed and schedule, and print both."""
    twin = argparse.Namespace(**vars(args))
    twin.checkpoint, twin.compare = "none", "none"
    for key, value in implied.items():
        setattr(twin, key, int_list(value) if key == "dilations" else value)
    twin.tag = f"{args.tag or default_tag(args.checkpoint, args.seed)}-scratch"
    twin.output_dir = args.output_dir.with_name(args.output_dir.name + "-scratch") if args.output_dir else None
    scratch = run(twin, {}, None)
    if pretrained and scratch:
        print(f"{'mIoU':24}{'early':>9}{'final':>9}")
        for name, row in ((args.checkpoint[-23:], pretrained), ("scratch", scratch)):
            print(f"{name:24}{row['early']['mIoU']:9.2f}{row['final']['mIoU']:9.2f}")
        gain = [pretrained[k]["mIoU"] - scratch[k]["mIoU"] for k in ("early", "final")]
        print(f"{'difference':24}{gain[0]:+9.2f}{gain[1]:+9.2f}")


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.config is None:
        if args.datasets is None:
            raise UserError("give --config, or an own set as --datasets NAME=FOLDER; --help lists the configs")
        args.config = "own"
    find_config(args.config)
    distributed.init()
    state, implied = read_checkpoint(args.checkpoint, args.branch)
    result = run(args, implied, state)
    if args.compare == "scratch" and args.checkpoint != "none":
        compare(args, implied, result)
    return 0


if __name__ == "__main__":
    cli(main)
