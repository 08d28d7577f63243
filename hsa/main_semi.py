"""Semi-supervised evaluation: fine-tuning with 1 % or 10 % of the labels, then self-training (paper 2012.02733).

    python -m hsa.main_semi --pretrained runs/hsa/pretrain/paper/checkpoint.pth --data_dir imagenet \
        --labels 1percent.txt

Reconstruction, the release has no such script. (i) Fine-tune on the labelled images; (ii) predict the unlabelled ones;
(iii) keep those whose entropy is at most --threshold bits, with the likeliest class as label; (iv) fine-tune the
pretrained network anew on labels and pseudo-labels [inferred]. Both numbers are reported, each of its last epoch. The
learning rates and epochs are inferred.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa.arch import ARCHS, DROP, STEMS, build
from shared_utils import UserError, checkpoint, distributed, feed
from shared_utils.augment import linear_train, plain
from shared_utils.data import EpochSampler, ImageList
from shared_utils.evaluation import (
    add_data_flags,
    add_network_flags,
    gather_rows,
    labelled_indices,
    load_backbone,
    open_splits,
    share,
    stream,
    subset,
    topk,
    write_result,
)
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, not_negative, positive
from shared_utils.layout import follow, place
from shared_utils.run import Run, cli

# [inferred] by share of labels: epochs, learning rate of the backbone, factor of the classifier's.
DEFAULTS = {"1%": (60, 0.02, 100.0), "10%": (30, 0.01, 20.0)}


def get_parser() -> Parser:
    p = Parser(prog="hsa.main_semi", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_network_flags(p, ARCHS, STEMS, "resnet50")
    add_data_flags(p)
    add_aug_flag(p)
    a(
        "--labels",
        type=Path,
        help="list of the labelled images, as SimCLR's 1percent.txt (default: drawn by --fraction)",
    )
    a("--fraction", type=float, default=0.01, help="share of each class that is labelled, drawn by --seed")
    a(
        "--init_lr",
        "--lr",
        type=float,
        help="of the backbone (default: .02 below 5 %% of the labels, else .01) [inferred]",
    )
    a("--head_lr_mult", type=float, help="the classifier's learning rate over it (default: 100, else 20) [inferred]")
    a("--end_epoch", "--epochs", type=positive, help="(default: 60, else 30) [inferred]")
    a("--momentum", type=not_negative, default=0.9)
    a("--wd", "--weight_decay", type=not_negative, default=0.0)
    a(
        "--batch_size",
        type=positive,
        default=256,
        help="images a step, all processes together; at most the labelled ones",
    )
    a("--self_training", choices=["true", "false"], default="true", help="(ii) to (iv) after the fine-tuning")
    a("--threshold", type=float, default=1.0, help="bits of entropy up to which a prediction becomes a pseudo-label")
    add_run_flags(p, "hsa/semi", "pretrained")
    p.set_defaults(pseudo_sha256="")
    return p


def resolve(args: argparse.Namespace, labelled: int, total: int, world: int) -> None:
    """Fill in what depends on the labelled images, a batch at most; UserError for flags out of range."""
    epochs, lr, mult = DEFAULTS["1%" if labelled < 0.05 * total else "10%"]
    args.end_epoch = epochs if args.end_epoch is None else args.end_epoch
    args.init_lr = lr if args.init_lr is None else args.init_lr
    args.head_lr_mult = mult if args.head_lr_mult is None else args.head_lr_mult
    if not args.init_lr > 0 or not args.head_lr_mult > 0:
        raise UserError("--init_lr and --head_lr_mult must be above 0")
    if args.batch_size % world or args.batch_size // world < 2:
        raise UserError(f"--batch_size {args.batch_size} does not give each of {world} processes the same 2 or more")
    if labelled // world < 2:
        raise UserError(
            f"{labelled} labelled images are fewer than two for each of {world} processes: raise --fraction, or give a "
            "longer list as --labels"
        )
    args.batch_size = min(args.batch_size, labelled // world * world)


def classifier(encoder: Any, classes: int) -> Any:
    """The network with a new linear layer as `fc`, N(0, .01) and 0."""
    encoder.fc = nn.Linear(encoder.num_features, classes)
    nn.init.normal_(encoder.fc.weight, 0, 0.01)
    nn.init.zeros_(encoder.fc.bias)
    return encoder


def finetune(run: Run, network: Any, images: ImageList, facts: dict[str, Any]) -> None:
    """Train all of `network` on labelled images, new or from where the run was stopped."""
    args = run.args
    images.transform = linear_train(args.img_size, args.aug_backend)
    sampler = EpochSampler(len(images), args.batch_size // run.world, args.seed, run.rank, run.world, least=2)
    loader = run.loader(feed.keyed(images, args.seed, args.aug_backend, run.device), sampler)
    head = list(network.fc.parameters())
    body = [p for name, p in network.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": body, "scale": 1.0}, {"params": head, "scale": args.head_lr_mult}]
    optimizer = torch.optim.SGD(groups, args.init_lr, args.momentum, weight_decay=args.wd)
    net = distributed.wrap(network)
    run.track(state_dict=network, optimizer=optimizer)
    steps = sampler.steps_per_epoch
    run.reads(images)
    run.preflight(
        {
            **facts,
            "batch": f"{args.batch_size} x {steps} steps an epoch, {args.end_epoch} epochs",
            "learning rate": f"{args.init_lr} backbone, {args.init_lr * args.head_lr_mult} classifier, cosine to 0",
            "expected initial loss": f"about log {len(images.classes)} = {math.log(len(images.classes)):.2f}",
        }
    )
    network.train()
    for _, batch in run.batches(loader, sampler, args.end_epoch):
        lr = args.init_lr * (1 + math.cos(math.pi * run.step / (steps * args.end_epoch))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        x = follow(batch[0], network)
        target = batch[1].to(run.device, non_blocking=True)
        with run.autocast():
            logits = net(x).float()
        loss = F.cross_entropy(logits, target) * sampler.weight(run.step_in_epoch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        watched = {}
        if run.log_due():  # the GPU is waited for
            watched["acc1"] = 100 * float(topk(logits.detach(), target, (1,))[0]) / len(target)
        run.log(distributed.all_sum(loss.detach()) / run.world, lr=lr, **watched)


def predict(run: Run, network: Any, images: ImageList) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B, classes] and labels of this process's share of the images, batch by batch.

    All processes predict with the network that the checkpoint holds, that of process 0.
    """
    images.transform = plain(run.args.img_size, run.args.aug_backend)
    distributed.same_buffers(network)
    network.eval()

    def logits(x: Tensor) -> list[Tensor]:
        with run.autocast():
            return [network(x)]

    for out, labels in stream(logits, images, run.device, run.args.batch_size, run.args.workers):
        yield out[0], labels


def accuracy(run: Run, network: Any, images: ImageList) -> list[float]:
    """Top-1 and top-5 in per cent."""
    hits = torch.zeros(2, dtype=torch.float64)
    for logits, labels in predict(run, network, images):
        hits += topk(logits, labels)
    return (100 * distributed.all_sum(hits.to(run.device)).cpu() / len(images)).tolist()


def entropy_bits(logits: Tensor) -> Tensor:
    """Entropy of the softmax of [N, C] in bits, [N]."""
    log_p = F.log_softmax(logits.double(), dim=1)
    return -(log_p.exp() * log_p).sum(1) / math.log(2)


@torch.no_grad()
def sureness(run: Run, network: Any, images: ImageList) -> Tensor:
    """Entropy in bits and likeliest class of all images, [N, 2] float64 on every process; no logits are kept."""
    first, last = share(len(images))
    mine = torch.zeros(last - first, 2, dtype=torch.float64)
    done = 0
    for logits, labels in predict(run, network, images):
        both = torch.stack([entropy_bits(logits), logits.argmax(1).double()], 1)
        mine[done : done + len(labels)] = both.cpu()
        done += len(labels)
    return gather_rows(mine, len(images), run.device)


def pseudo_labels(sure: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Rows [n] of `sureness` [N, 2] whose entropy is at most `threshold` bits, and their likeliest classes [n]."""
    rows = torch.nonzero(sure[:, 0] <= threshold).flatten()
    return rows, sure[rows, 1].long()


def label(run: Run, network: Any, train: ImageList, rest: list[int], file: Path) -> list[tuple[int, int]]:
    """Pseudo-labels, (index in `train`, class) each, of the images `rest`; `train`'s own labels are not looked at.

    Written to `file` (JSON), and read from it where it is of the same fine-tuned network: a run that is resumed goes on
    with the very labels it began with, also on GPUs, which may round otherwise the next time. Process 0 alone reads
    and decides: another one may look only when the new file is there.
    """
    distributed.same_buffers(network)
    digest = hashlib.sha256(repr((run.args.threshold, rest)).encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    source = digest.hexdigest()[:16]
    kept: list[Any] = [None]
    if run.rank == 0 and file.is_file() and not run.args.overwrite:
        try:
            stored = json.loads(file.read_text())
            if stored["source"] == source:
                kept = [[(int(i), int(y)) for i, y in stored["labels"]]]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{file}: not a readable file of pseudo-labels; remove it, they are predicted anew"
            ) from None
    if run.world > 1:
        torch.distributed.broadcast_object_list(kept, 0)
    if kept[0] is not None:
        return kept[0]
    found: list[tuple[int, int]] = []
    if rest:
        sure = sureness(run, network, subset(train, rest, [-1] * len(rest)))
        rows, labels = pseudo_labels(sure, run.args.threshold)
        found = [(rest[row], y) for row, y in zip(rows.tolist(), labels.tolist())]
    if run.rank == 0:
        text = json.dumps({"source": source, "threshold_bits": run.args.threshold, "labels": found})
        checkpoint.write_text(file, text)
    distributed.barrier()
    return found


def new_network(args: argparse.Namespace, classes: int, device: torch.device) -> tuple[Any, str]:
    """The pretrained backbone with a new classifier, the same at every call."""
    torch.manual_seed(args.seed)
    encoder, report = load_backbone(build, args, "resnet50", DROP, ("{}",))
    return place(classifier(encoder, classes), device), report


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    out, resume = args.output_dir, args.resume
    args.output_dir = out / "finetune"
    run = Run(args, "hsa", "semi")
    if resume:
        raise UserError("--resume: two trainings follow one another here; the same command goes on by itself")
    if args.threshold < 0:
        raise UserError(f"--threshold {args.threshold}: an entropy in bits, 0 or more")
    train, val = open_splits(args)
    chosen = labelled_indices(train, args.labels, args.fraction, Path(args.data_dir) / "train", args.seed)
    resolve(args, len(chosen), len(train), run.world)
    classes = len(train.classes)

    # (i) labels alone
    network, report = new_network(args, classes, run.device)
    data = f"{args.data_dir}: {len(chosen)} of {len(train)} images labelled, {len(val)} val images, {classes} classes"
    finetune(run, network, subset(train, chosen), {"data": data, "backbone": report})
    top1, top5 = accuracy(run, network, val)
    result: dict[str, Any] = {"semi": top1, "semi_top5": top5, "labelled": len(chosen), "of": len(train)}
    run.finish()

    if args.self_training == "true":
        # (ii), (iii) the unlabelled images
        known = set(chosen)
        rest = [i for i in range(len(train)) if i not in known]
        found = label(run, network, train, rest, out / "pseudo.json")
        right = sum(train.label(i) == y for i, y in found)
        result |= {"pseudo_labelled": len(found), "threshold_bits": args.threshold}
        if found:  # a report, of no influence
            result["pseudo_right"] = 100 * right / len(found)
        run.say(f"  {len(found)} of {len(rest)} unlabelled images below {args.threshold} bits")

        # (iv) the pretrained network again, on both
        args.output_dir = out / "selftrain"
        args.pseudo_sha256 = hashlib.sha256(str(found).encode()).hexdigest()[:16]  # a resume must have the same labels
        again = Run(args, "hsa", "semi-selftrain")
        network, _ = new_network(args, classes, run.device)
        indices = [*chosen, *(i for i, _ in found)]
        labels_of = [*(train.label(i) for i in chosen), *(y for _, y in found)]
        order = sorted(range(len(indices)), key=indices.__getitem__)
        both = subset(train, [indices[j] for j in order], [labels_of[j] for j in order])
        facts = {"data": f"{len(chosen)} labelled and {len(found)} pseudo-labelled images", "backbone": report}
        finetune(again, network, both, facts)
        result["semi_self"], result["semi_self_top5"] = accuracy(again, network, val)
        again.finish()
    args.output_dir = out
    write_result(args, result | {"pretrained": args.pretrained})
    return 0


if __name__ == "__main__":
    cli(main)
