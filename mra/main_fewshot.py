"""Few-shot classification: python -m mra.main_fewshot --data_path miniImagenet --input_size 84 --mae_ckpt MAE.pth

A classifier is trained on the base classes, with MRA on its images; novel classes are told apart by the cosine to the
mean feature of their support images, in episodes. Also by torchrun.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mra import data, engine, nets, transforms
from mra.mra import MRA, add_mra_flags, build
from shared_utils import UserError, distributed
from shared_utils.data import EpochSampler, ImageList, Keyed
from shared_utils.evaluation import gather_rows, share, stream, write_result
from shared_utils.flags import Parser, add_run_flags, at_least, natural, not_negative, positive
from shared_utils.layout import place
from shared_utils.run import Run, cli


def get_parser() -> Parser:
    p = Parser(prog="mra.main_fewshot", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    default = Path(os.environ.get("DATA_ROOT", "data"))
    a("--data_path", "--data_dir", type=Path, default=default, help="holds train/, val/, test/ of disjoint classes, or "
      "train.csv, val.csv, test.csv and images/ (mini-ImageNet), val where there is one; or class folders of your own, "
      "which are dealt: 64 of 100 to train on, 20 for the test, --n_way at least")  # fmt: skip
    a("--class_seed", type=natural, default=0, help="which classes of your own are new ones")
    a("--input_size", "--img_size", type=positive, help="pixels; default: the autoencoder's, else 84")
    a("--cache", action="store_true", help="decode all training images once and keep them in memory")
    a("--mean_std", choices=list(transforms.STATS), default="imagenet")
    add_mra_flags(p)
    engine.add_training_flags(p)
    p.set_defaults(arch="resnet12")
    a("--epochs", type=positive, default=100)
    a("--batch_size", type=positive, default=128, help="images a step, all processes together")
    a("--lr", type=float, default=0.1)
    a("--decay", choices=["step", "cos"], default="step")
    a("--schedule", default="60,80", help="epochs of --decay step")
    a("--wd", "--weight_decay", type=not_negative, default=5e-4)
    a("--n_way", type=at_least(2), default=5)
    a("--n_query", type=positive, default=15, help="queries of a class")
    a("--episodes", type=at_least(2), default=2000, help="of the test; validation takes at most 600")
    a("--episode_seed", type=natural, default=0, help="keep it for everything that is compared")
    a("--mra_on_support", action="store_true", help="prototypes of support images and of what MRA makes of them")
    add_run_flags(p, "mra/fewshot/default")
    return p


def draw_episodes(labels: Tensor, way: int, each: int, episodes: int, seed: int) -> Tensor:
    """Indices [E, way, each] of images, without repetition: classes first, then images of each.

    Raises:
        UserError: fewer classes than `way`, a class with fewer images than `each`.
    """
    counts = torch.bincount(labels)
    if len(counts) < way or int(counts.min()) < each:
        raise UserError(
            f"{way}-way episodes of {each} images a class: the split has {len(counts)} classes of {int(counts.min())} "
            "images or more; lower --n_way or --n_query"
        )
    generator = torch.Generator().manual_seed(seed)
    table = torch.full((len(counts), int(counts.max())), -1)  # [C, most]
    order = torch.argsort(labels, stable=True)
    for c, rows in enumerate(order.split(counts.tolist())):
        table[c, : len(rows)] = rows
    classes = torch.rand(episodes, len(counts), generator=generator).argsort(1)[:, :way]  # [E, way]
    rows = table[classes]  # [E, way, most]
    rank = torch.rand(rows.shape, generator=generator).masked_fill(rows < 0, 2.0).argsort(2)[:, :, :each]
    return rows.gather(2, rank)


def episode_accuracy(feats: Tensor, support: Tensor, episodes: Tensor, shot: int) -> Tensor:
    """Accuracy of each episode [E], 0..1: nearest prototype by cosine.

    Args:
        feats: [N, D], of the queries; support: [V, N, D], of V views of the support images.
    """
    if len(episodes) > 200:  # a chunk at a time: memory
        return torch.cat([episode_accuracy(feats, support, part, shot) for part in episodes.split(200)])
    way = episodes.shape[1]
    query = F.normalize(feats, dim=1)[episodes[:, :, shot:]]  # [E, way, Q, D]
    views = F.normalize(support, dim=2)[:, episodes[:, :, :shot]]  # [V, E, way, shot, D]
    prototypes = F.normalize(views.mean((0, 3)), dim=2)  # [E, way, D]
    predicted = torch.einsum("ewqd,ekd->ewqk", query, prototypes).argmax(3)
    return (predicted == torch.arange(way)[:, None]).float().mean((1, 2))


def interval(values: Tensor) -> tuple[float, float]:
    """Mean and half of the 95 % interval in per cent."""
    return 100 * float(values.mean()), 100 * 1.96 * float(values.std()) / math.sqrt(len(values))


@torch.no_grad()
def extract(run: Run, network: Any, images: ImageList, operator: MRA | None) -> Tensor:
    """Features [V, N, D] on the CPU: of the images, and with `operator` of what it makes of them."""
    distributed.same_buffers(network)
    was = network.training
    network.eval()
    first, last = share(len(images))
    generator = torch.Generator().manual_seed(run.args.episode_seed)
    noise = operator.draw(len(images), generator)[0][first:last] if operator is not None else None
    done = 0

    def embed(x: Tensor) -> list[Tensor]:
        nonlocal done
        views = [x]
        if operator is not None and noise is not None:
            views.append(operator.parts(x, noise[done : done + len(x)]).out)
        done += len(x)
        with run.autocast():
            return [torch.stack([network.features(v) for v in views], 1)]  # [B, V, D]

    parts = [out[0].cpu() for out, _ in stream(embed, images, run.device, 256, run.args.workers)]
    network.train(was)
    empty = torch.empty(0, 1 if operator is None else 2, network.num_features)
    return gather_rows(torch.cat([empty, *parts]), len(images), run.device).transpose(0, 1)


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    args.init = args.init or args.pretrained
    run = Run(args, "mra", "fewshot")
    args.schedule = engine.epochs_of(args.schedule)
    engine.check_training_flags(args, run.world)
    if args.mra_on_support and args.mae_ckpt is None:
        raise UserError("--mra_on_support needs an autoencoder: give --mae_ckpt")

    # Frozen autoencoder; base, validation and novel classes; all episodes are drawn before training starts
    operator, about_mra = build(args, args.input_size, run.device, transforms.STATS[args.mean_std])
    engine.settle(args, operator, 84)
    splits = data.read_fewshot(args.data_path, args.n_way, args.class_seed)
    train = data.cached(splits["train"], args.cache)
    data.needs(train, args.batch_size, f"--batch_size {args.batch_size}")
    train.transform = engine.training_transform(args)
    episodes: dict[tuple[str, int], Tensor] = {}
    for split, shots, count in (("val", (1,), min(600, args.episodes)), ("test", (1, 5), args.episodes)):
        if split not in splits:
            continue
        splits[split].transform = transforms.test_transform(args.input_size, args.mean_std)
        for shot in shots:
            episodes[split, shot] = draw_episodes(
                splits[split].labels, args.n_way, shot + args.n_query, count, args.episode_seed
            )
    sampler = EpochSampler(len(train), args.batch_size // run.world, args.seed, run.rank, run.world)
    loader = run.loader(Keyed(train, args.seed), sampler)

    # Classifier
    network = nets.build(args.arch, len(train.classes), args.width, args.stem)
    started = nets.start(network, args.init)
    distributed.convert_norm(network, "sync" if args.sync_bn else "local")
    place(network, run.device)
    net = distributed.wrap(network)
    optimizer = engine.optimizer_of(args, network, args.nesterov)
    info = engine.Info(train.classes)
    run.track(state_dict=network, optimizer=optimizer, info=info)
    on_support = operator if args.mra_on_support else None
    run.reads(*splits.values())
    run.preflight(
        {
            "data": f"{args.data_path}: {engine.describe(train)}; "
            + "; ".join(f"{split} {len(splits[split].classes)} classes" for split in splits if split != "train"),
            "MRA": about_mra + ("; on support images too" if on_support else ""),
            "classifier": f"{args.arch}, {sum(q.numel() for q in network.parameters()) / 1e6:.2f} M, {started}",
            "batch": f"{args.batch_size} x {sampler.steps_per_epoch} steps an epoch, {args.epochs} epochs",
            "learning rate": f"{args.lr}, {args.decay}",
            "expected initial loss": f"about log {len(train.classes)} = {math.log(len(train.classes)):.2f}",
            "estimated time": engine.estimate(run, network, operator, sampler.steps_per_epoch * args.epochs),
        }
    )

    def test(split: str, shot: int, views: Tensor) -> tuple[float, float]:
        return interval(episode_accuracy(views[0], views, episodes[split, shot], shot))

    def evaluate() -> dict[str, float]:
        views = extract(run, network, splits["val"], on_support)
        return {"val_1shot": test("val", 1, views)[0]}

    engine.fit(run, network, net, loader, sampler, operator, optimizer, info, evaluate if "val" in splits else None)
    result: dict[str, Any] = info.result("val_1shot")
    views = extract(run, network, splits["test"], on_support)
    for shot in (1, 5):
        result[f"{shot}shot"], result[f"{shot}shot_ci"] = test("test", shot, views)
    result |= {"minutes": run.minutes(), "episodes": args.episodes, "mae_md5": args.mae_md5}
    write_result(run.dir, result)
    run.finish(*engine.hints(run, {}))
    return 0


if __name__ == "__main__":
    cli(main)
