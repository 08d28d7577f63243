"""Pretraining of MDP (paper 2106.04121): python -m mdp.main_pretrain --datasets voc,ade --data-root DATA_ROOT

Your own sets: --datasets voc mine=FOLDER, where FOLDER has images/, labels/ and classes.txt (see mdp.own).
Also torchrun --nproc-per-node 8 -m mdp.main_pretrain ...; the arms of the paper's ablations are flags.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdp import advice, losses
from mdp.batches import BatchedUnion
from mdp.builder import MDP, downsample_labels
from mdp.datasets import NAMES, SegSet, UnionDataset
from mdp.mixing import apply_plan, draw_plan
from mdp.models import ARCHS, HEADS, Encoder
from mdp.own import Taxonomy, add_datasets_flags, open_named, own_folders
from mdp.prototypes import PrototypeBank, region_means
from mdp.transfer import start
from mdp.transforms import TwoViews
from mdp.visualize import batch_picture
from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import EpochSampler, Keyed, mix_key
from shared_utils.flags import AUG_BACKENDS, Parser, add_run_flags, ints, natural, not_negative, positive
from shared_utils.layout import follow, place
from shared_utils.preflight import about, seconds
from shared_utils.run import Run, cli


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="mdp.main_pretrain", description=__doc__.splitlines()[0])
    a = p.add_argument
    text = f"{' '.join(NAMES)}, comma-separated, and own sets, a folder of images/, labels/ and classes.txt each"
    add_datasets_flags(p, "voc,ade", text)
    a(
        "--data-root",
        "--data_dir",
        type=Path,
        default=os.environ.get("DATA_ROOT", "data"),
        help="folder of the official trees",
    )
    a("--voc-background", choices=["class", "ignore"], default="class", help="VOC's background: class 0 or ignored")
    a("--cache-size", type=natural, default=0, help="keep images decoded in memory, shorter side at most this; 0: off")
    a("--arch", choices=ARCHS, default="resnet50")
    a("--head", choices=HEADS, default="aspp", help="DeepLabV3 (aspp), DeepLabV3+ (sep_aspp) or no decode head")
    a("--dim", type=positive, default=128, help="D, length of an embedding")
    a("--base-channels", type=positive, default=64, help="width of the first stage (64 in the paper)")
    a("--head-channels", type=positive, default=512, help="width of the decode head")
    a("--dilations", type=ints, default="1,12,24,36", help="dilations of the ASPP branches")
    a("--norm", choices=["sync", "local", "shuffle"], default="sync", help="batch norm over all processes, "
      "each its own, or each its own with the key images shuffled over the processes")  # fmt: skip
    a("--init", default="none", metavar="FILE|RUN|timm:NAME", help="start from: none (random), imagenet (torchvision), "
      "timm:NAME, a checkpoint of a backbone, or a finished run of this job, with its decode head")  # fmt: skip
    a("--crop-size", type=positive, default=224)
    a("--aug", choices=["moco", "mmseg"], default="moco", help="augmentation of the two views")
    a("--aug_backend", choices=AUG_BACKENDS, default="pil", help="of --aug moco: pil, view by view, or batch, decoded "
      "once and in batches: other draws of the same distribution, faster")  # fmt: skip
    a("--batch-size", type=positive, default=64, help="images a step, all processes together; must divide --bank-size")
    a("--epochs", type=positive, default=100)
    a("--lr", type=float, default=0.03, help="peak learning rate, cosine to 0")
    a("--wd", "--weight_decay", type=not_negative, default=1e-4)
    a("--momentum", type=not_negative, default=0.9)
    a("--warmup-epochs", type=float, default=1, help="linear warm-up")
    a("--moco-m", type=float, default=0.999, help="m, momentum of the key encoder")
    a("--key-encoder", choices=["momentum", "self"], default="momentum")
    a("--objective", choices=["contrast", "multihead-ce", "union-ce"], default="contrast", help="the method, or a "
      "cross-entropy control: one head a dataset, or one softmax over all classes")  # fmt: skip
    a("--tau", type=float, default=0.07, help="temperature")
    a("--bank-type", choices=["class", "region", "none"], default="class", help="contrast against prototypes (the "
      "method), against single bank regions, or pixel to pixel")  # fmt: skip
    a("--bank-size", type=positive, default=4096, help="M, images in the memory bank")
    a("--regions", type=positive, default=32, help="R, regions kept of an image, the largest first")
    a("--proto-update", choices=["bank", "ema"], default="bank")
    a("--proto-m", type=float, default=0.99, help="m_p of --proto-update ema")
    a(
        "--anchors",
        type=natural,
        default=0,
        help="query pixels drawn of each image for --bank-type region / none; 0: all",
    )
    a("--mix", choices=["none", "region", "pixel", "both"], default="both", help="cross-dataset mixing of query views")
    a("--mix-prob", type=float, default=0.5)
    a("--mix-beta", type=float, default=1.0, help="lambda ~ Beta(b, b)")
    a("--mix-ignore", choices=["keep", "renorm"], default="keep", help="weight of a lone label of a mixed pixel")
    a("--csc", choices=["none", "nopush", "pull"], default="pull", help="pixel-to-class sparse coding")
    a("--csc-k", type=positive, default=5, help="K, size of T_i")
    a("--csc-weight", type=float, default=0.1, help="beta, weight of the sparse coding")
    a("--csc-scope", choices=["all", "cross"], default="all", help="candidates of T_i: all classes, or other datasets'")
    a("--image-every", type=positive, default=500, help="steps between pictures in tensorboard")
    add_run_flags(p, "mdp/pretrain/default")
    return p


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags that contradict each other, before anything is loaded."""
    if not args.tau > 0 or not args.lr > 0 or not args.mix_beta > 0:
        raise UserError("--tau, --lr and --mix-beta must be above 0")
    if not 0 <= args.moco_m <= 1 or not 0 <= args.mix_prob <= 1:
        raise UserError("--moco-m and --mix-prob must lie in 0..1")
    if args.aug_backend == "batch" and args.aug != "moco":
        raise UserError(f"--aug_backend batch: has --aug moco only; --aug {args.aug} needs --aug_backend pil")
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} does not divide over {world} processes")
    if args.batch_size // world < 2:
        raise UserError("batch norm of the image pooling needs at least 2 images a process; raise --batch-size")
    plain_method = args.objective == "contrast" and args.bank_type == "class"
    if not plain_method and args.mix != "none":
        raise UserError(f"--mix {args.mix} is defined for prototypes only; add --mix none to this arm")
    if not plain_method and args.csc != "none":
        raise UserError(f"--csc {args.csc} is defined for prototypes only; add --csc none to this arm")


def build_encoder(args: argparse.Namespace, num_classes: int) -> tuple[Encoder, str]:
    """The network that --init, --arch and their like name, and where its weights come from."""
    encoder = Encoder(
        args.arch, args.head, args.dim, args.base_channels, args.head_channels, tuple(args.dilations),
        num_classes if args.objective != "contrast" else 0,
    )  # fmt: skip
    return encoder, start(encoder, args.init, args.arch)


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then cosine to 0, by iteration."""
    warm, total = args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def pixels(x: Tensor) -> Tensor:
    """[B, D, h, w] -> [B*h*w, D]."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def objective(
    args: argparse.Namespace,
    v: Tensor,
    y_a: Tensor,
    y_b: Tensor,
    lam: Tensor,
    keys: tuple[Tensor, Tensor] | None,
    bank: PrototypeBank,
    groups: Tensor,
    dataset: Tensor,
    draws: torch.Generator,
) -> losses.PixelLoss:
    """The loss of every query pixel that --objective and --bank-type name.

    Args:
        v: unit embeddings [B, D, h, w], or logits [B, C, h, w] of a control; y_a, y_b: their labels [B, h, w];
           lam: weight of y_a [B].
        keys: key embeddings [B, D, h, w] and their labels [B, h, w]; None for a control.
        groups: dataset of each class [C]; dataset: of each image [B].
        draws: picks --anchors pixels of each image, the same of all.
    """
    if args.objective != "contrast":
        return losses.classifier_ce(v, y_a, groups, dataset, args.objective == "multihead-ce")
    count = y_a[0].numel()  # h w
    if args.bank_type == "class":
        scope = groups if args.csc_scope == "cross" else None
        each = lam[:, None].expand(-1, count).flatten()  # [B h w]
        labels = y_a.flatten(), y_b.flatten()
        return losses.pixel_to_prototype(
            pixels(v), *labels, each, bank, args.tau, args.csc, args.csc_k, scope, args.mix_ignore
        )
    pick = torch.arange(count, device=v.device)
    if args.anchors:
        pick = torch.randperm(count, generator=draws)[: args.anchors].to(v.device)
    anchors, y = v.flatten(2).transpose(1, 2)[:, pick], y_a.flatten(1)[:, pick]  # [B, P, D], [B, P]
    if args.bank_type == "region":
        return losses.pixel_to_region(anchors.flatten(0, 1), y.flatten(), bank, args.tau)
    assert keys is not None  # for the type checker
    return losses.pixel_to_pixel(anchors, y, *keys, len(bank.proto), args.tau)


@torch.no_grad()
def telemetry(
    loss: losses.PixelLoss, v: Tensor, y: Tensor, dataset: Tensor, bank: PrototypeBank, names: list[str]
) -> dict:
    """What to watch: accuracy of the nearest prototype, its parts by dataset, and signs of collapse."""
    per_image = len(y) // len(dataset)
    group = dataset.repeat_interleave(per_image)  # [N]
    out: dict[str, Tensor | float] = {}
    s = (v @ bank.proto.T).masked_fill(~bank.proto_valid, -torch.inf)
    hit = (s.argmax(1) == y).float()
    for name, which in [("", loss.counted), *((f"_{n}", loss.counted & (group == i)) for i, n in enumerate(names))]:
        count = which.sum().clamp(min=1)
        out[f"loss/p2c{name}"] = (loss.p2c * which).sum() / count
        out[f"acc/pixel_proto{name}"] = (hit * which).sum() / count
    positive = (v * bank.proto[y.clamp(min=0)]).sum(1)
    count = loss.counted.sum().clamp(min=1)
    valid = bank.proto_valid.sum()
    all_negatives = (v @ (bank.proto * bank.proto_valid[:, None]).sum(0) - positive) / (valid - 1).clamp(min=1)
    out["sim/positive"], out["sim/negative"] = ((x * loss.counted).sum() / count for x in (positive, all_negatives))
    out["loss/csc"] = loss.csc.sum() / count
    out["feat/std"] = v.std(0).mean() * v.shape[1] ** 0.5  # 1: spread over the sphere, 0: collapsed
    out["proto/valid"], out["proto/mean_offdiag_cos"] = valid, bank.mean_offdiag_cos()
    return out


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "mdp", "pretrain")
    check_flags(args, run.world)

    # Data: the datasets side by side, classes concatenated and never merged.
    names = args.datasets.split(",")
    own = own_folders(args.data)
    sets = [open_named(name, own, args.data_root, "pretrain", args.voc_background) for name in names]
    union = UnionDataset(sets, TwoViews(args.aug, args.crop_size), args.cache_size)
    advice.check_size(args, len(union), run.world)
    c = union.num_classes
    groups = union.dataset_of_class.to(run.device)
    sampler = EpochSampler(len(union), args.batch_size // run.world, args.seed, run.rank, run.world)
    batched = args.aug_backend == "batch"
    loader = run.loader(
        BatchedUnion(union, args.crop_size, args.seed) if batched else Keyed(union, args.seed), sampler
    )  # fmt: skip

    # Model
    bank = PrototypeBank(c, args.dim, args.bank_size, args.regions, args.proto_update, args.proto_m)
    if args.objective == "contrast":
        bank.check_batch(args.batch_size)
    encoder, origin = build_encoder(args, c)
    distributed.convert_norm(encoder, "sync" if args.norm == "sync" and run.world > 1 else "local")
    model = place(MDP(encoder, bank, args.moco_m, args.key_encoder), run.device)
    model.train()
    query = distributed.wrap(model.encoder_q)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), args.lr, args.momentum, weight_decay=args.wd, fused=run.device.type == "cuda"
    )
    run.track(state_dict=_Encoders(model), bank=_Bank(bank, sets), optimizer=optimizer)
    steps = sampler.steps_per_epoch
    run.reads(*sets)
    run.preflight(
        {
            "data": union.describe().replace("\n", "; "),
            "batch": f"{args.batch_size} = {args.batch_size // run.world} x {run.world}, {steps} steps an epoch",
            "learning rate": f"{args.lr} peak for this batch, {args.warmup_epochs} epochs of warm-up, cosine to 0",
            "parameters": f"{sum(x.numel() for x in model.encoder_q.parameters()) / 1e6:.2f} M trained, {origin}",
            "bank": f"{args.bank_type}, {args.bank_size} images = {args.bank_size / len(union):.2f} epochs"
            + advice.larger_bank(args, len(union)),
            "expected initial loss": f"log|V| -> at most log {c} = {math.log(c):.2f} once every class was seen",
            "estimated time": estimate(run, model.encoder_q, args, steps * args.epochs),
        }
    )

    last: dict[str, Tensor | float] = {}
    for _, batch in run.batches(loader, sampler, args.epochs):
        lr = learning_rate(args, run.step, steps)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        q, k = (follow(batch[x], model) for x in "qk")
        q_label, k_label, dataset = (
            batch[x].to(run.device, non_blocking=True) for x in ("q_label", "k_label", "dataset")
        )
        draws = torch.Generator().manual_seed(mix_key(args.seed, run.step, run.rank))

        # Key view -> key pixels and regions; a constant for the loss, and never a mixed image.
        keys = regions = None
        if args.objective == "contrast":
            model.update_key_encoder()
            if args.norm == "shuffle":
                k, order = distributed.shuffle(k, torch.Generator().manual_seed(mix_key(args.seed, run.step)))
            with run.autocast():
                k_feat = model.embed_keys(k)  # [B, D, h, w]
            if args.norm == "shuffle":
                k_feat = distributed.unshuffle(k_feat, order)
            keys = k_feat, downsample_labels(k_label, k_feat.shape[-2:])  # [B, D, h, w], [B, h, w]
            regions = region_means(*keys, c, args.regions)  # [B, R, D], [B, R]

        # Query view: mix at full resolution, then embed every pixel.
        mixed = apply_plan(q, q_label, draw_plan(dataset, args.mix, args.mix_prob, args.mix_beta, draws))
        ready = args.objective != "contrast" or args.bank_type == "none" or int(bank.proto_valid.sum()) >= 2
        loss, watched = torch.zeros((), device=run.device), {}
        if ready:
            with run.autocast():
                out = query(mixed.x)  # [B, D, h, w], or logits [B, C, h, w] of a control
            size = out.shape[-2:]  # h, w
            y_a, y_b = downsample_labels(mixed.y_a, size), downsample_labels(mixed.y_b, size)
            v = out.float() if args.objective != "contrast" else F.normalize(out.float(), dim=1)

            # Loss from the prototypes as they are: this batch is enqueued afterwards.
            per_pixel = objective(args, v, y_a, y_b, mixed.lam, keys, bank, groups, dataset, draws)
            total = distributed.all_sum(per_pixel.counted.sum())
            loss = losses.average(per_pixel, args.csc_weight, total, run.world, v)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if run.log_due() and args.objective == "contrast" and args.bank_type == "class":
                watched = last = telemetry(per_pixel, pixels(v).detach(), y_a.flatten(), dataset, bank, names)

        if regions is not None:
            bank.enqueue(distributed.gather(regions[0]), distributed.gather(regions[1]))
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=lr, **watched)
        if ready and run.due(args.image_every):
            run.image("views/query_label_nearest_prototype", batch_picture(mixed.x, mixed.y_a, v.detach(), bank, union))

    run.finish(*advice.collapse(last), *advice.hints(args, run.dir))
    return 0


class _Bank:
    """The checkpoint's `bank`: the bank's tensors, and `sets`, what the prototypes' classes are called."""

    def __init__(self, bank: PrototypeBank, sets: list[SegSet]):
        self.bank, self.sets = bank, [Taxonomy.of(found).stored() for found in sets]

    def state_dict(self) -> dict[str, Any]:
        return {**self.bank.state_dict(), "sets": self.sets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bank.load_state_dict({key: value for key, value in state.items() if key != "sets"})


class _Encoders:
    """The checkpoint's `state_dict`: `encoder_q.*` and `encoder_k.*`; the bank is an entry of its own."""

    def __init__(self, model: MDP):
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.model.state_dict().items() if not key.startswith("bank.")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        checkpoint.load_strict(self.model, state, missing_ok=("bank.*",))


@torch.no_grad()
def estimate(run: Run, encoder: nn.Module, args: argparse.Namespace, steps: int) -> str:
    """Minutes of the whole run from two timed forward passes; a step is one of the key and three of the query."""
    x = torch.randn(args.batch_size // run.world, 3, args.crop_size, args.crop_size, device=run.device)
    passed = seconds(run, encoder, lambda: encoder(follow(x, encoder)))
    factor = 4 if args.objective == "contrast" else 3
    return about(passed * factor * steps / 60, steps)


if __name__ == "__main__":
    cli(main)
