"""What a network's features tell, without training it: python -m fame.main_probe DATA --pretrained FILE --probe class/1
class/2 background/2

For each LABEL/FOLD a linear classifier (logistic regression on standardised features, a cheap probe, not the paper's
protocol) and retrieval, from the training part of that list to its test part. Features are computed once.

Your own videos (--dataset folder) have no list: where they lie in class folders, the classifier is tested on each fifth
of every class in turn and retrieval leaves each video out; with or without classes, how much of the activation lies
inside FAME's mask of what moves.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fame import augment
from fame.data import DATASETS, add_data_flags, check_classes, check_data_flags, open_videos
from fame.fame import make_mask
from fame.main_cam import activation, inside
from fame.main_retrieve import recall, video_feature
from fame.network import add_network_flags, outputs, resolve, trunk
from shared_utils import UserError, checkpoint, distributed
from shared_utils.evaluation import write_result
from shared_utils.flags import Parser, add_machine_flags
from shared_utils.run import cli, seed_everything, set_threads


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="fame.main_probe", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_data_flags(p)
    add_network_flags(p)
    a(
        "--probe",
        nargs="+",
        default=["class/1"],
        help="LABEL/FOLD, where a label is class or a column of the set's table",
    )
    a("--C", type=float, default=0.1, help="inverse strength of the classifier's L2 penalty")
    add_machine_flags(p, workers=0, output_dir="fame/probe")
    return p


def parse(words: Sequence[str]) -> list[tuple[str, int]]:
    """(label, fold) of each LABEL/FOLD."""
    out = []
    for word in words:
        label, _, fold = word.partition("/")
        if fold not in ("1", "2", "3"):
            raise UserError(f"--probe {word}: expected LABEL/FOLD, such as class/1")
        out.append((label, int(fold)))
    return out


def linear_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, strength: float) -> float:
    """Accuracy in per cent of a logistic regression on standardised features [N, C] -> [Q, C]."""
    from sklearn.linear_model import LogisticRegression

    mean, std = train.mean(0), train.std(0) + 1e-6
    x, y = ((part - mean) / std for part in (train, test))
    model = LogisticRegression(C=strength, max_iter=1000).fit(x.double().numpy(), labels.numpy())
    return 100 * float(np.mean(model.predict(y.double().numpy()) == test_labels.numpy()))


PARTS = 5  # of a set without a list, each tested in turn


def own_videos(model: torch.nn.Module, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """What is measured of videos without a list, in per cent; without class folders only where the activation lies."""
    videos = open_videos(args, train=False)
    if videos.classes:
        check_classes(videos, args.data)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1, 1) for v in (augment.MEAN, augment.STD))

    def embed(x: Tensor) -> Tensor:  # normalised clips [N, 3, T, S, S]
        share = inside(activation(model, x), make_mask(x * std + mean))
        return torch.cat([model(x), share[:, None]], 1)

    found = torch.cat([out.cpu() for out, _ in outputs(embed, videos, args, device)])  # [V, clips, C + 1]
    features, labels = found[:, :, :-1], torch.from_numpy(videos.labels)
    result: dict[str, object] = {"inside": 100 * float(found[:, :, -1].mean()), "videos": len(videos)}
    if not videos.classes:
        print(f"  {args.data}: no class folders, so no accuracy; only where the activation lies", flush=True)
        return result
    part = torch.zeros(len(videos), dtype=torch.int64)
    for y in range(len(videos.classes)):  # those of a class are dealt in turn
        part[labels == y] = torch.arange(int((labels == y).sum())) % PARTS
    x, right = features.mean(1), 0.0
    for test in (part == n for n in range(int(part.max()) + 1)):
        right += linear_accuracy(x[~test], labels[~test], x[test], labels[test], args.C) * int(test.sum())
    one = video_feature(features)
    at = recall(one, labels, one, labels, leave_out=True)
    result |= {"linear/class/1": right / len(videos)} | {f"r{k}/class/1": at[k] for k in (1, 5)}
    return result | {"chance/class/1": 100 * float(labels.bincount().max()) / len(labels)}


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    if distributed.world() > 1:
        raise UserError("fame.main_probe is one process; for large sets take fame.eval --freeze and fame.main_retrieve")
    seed_everything(0)
    set_threads(args.threads, args.workers, device)
    resolve(args)
    probes = parse(args.probe)
    check_data_flags(args)
    model, report = trunk(args, device)
    print(f"fame/probe: {args.data} ({args.dataset}); {report}", flush=True)

    known: dict[Path, Tensor] = {}  # features of the videos seen so far
    split = DATASETS[args.dataset].split
    if not split and probes != [("class", 1)]:
        raise UserError(f"--probe {' '.join(args.probe)}: --dataset {args.dataset} has class folders alone, class/1")
    result: dict[str, object] = {} if split else own_videos(model, args, device)
    for label, fold in probes if split else ():
        parts = []
        for train in (True, False):
            videos = open_videos(args, train, label, fold)
            new = [i for i, video in enumerate(videos.videos) if video.path not in known]
            if new:
                rows = [out for out, _ in outputs(model, videos.subset(new), args, device)]
                known |= {videos.videos[i].path: row.cpu() for i, row in zip(new, torch.cat(rows))}
            features = torch.stack([known[video.path] for video in videos.videos])  # [V, clips, C]
            parts += [features, torch.tensor(videos.labels)]
        gallery, labels, queries, query_labels = parts
        result[f"linear/{label}/{fold}"] = linear_accuracy(
            gallery.mean(1), labels, queries.mean(1), query_labels, args.C
        )
        found = recall(video_feature(gallery), labels, video_feature(queries), query_labels)
        result |= {f"r{k}/{label}/{fold}": found[k] for k in (1, 5)}
        result[f"chance/{label}/{fold}"] = 100 * float(query_labels.bincount().max()) / len(query_labels)
    if args.pretrained != "none":
        progress = checkpoint.load(args.pretrained).get("progress", {})
        result["minutes"] = round(progress.get("seconds", 0.0) / 60, 2)  # of the pretraining
    write_result(args, result | {"pretrained": args.pretrained})
    return 0


if __name__ == "__main__":
    cli(main)
