"""What a network's features tell, without training it: python -m fame.main_probe DATA --pretrained FILE --probe class/1
class/2 background/2

For each LABEL/FOLD a linear classifier (logistic regression on standardised features, a cheap probe, not the paper's
protocol) and retrieval, from the training part of that list to its test part. Features are computed once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fame.data import add_data_flags, check_data_flags, open_videos
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


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    if distributed.world() > 1:
        raise UserError("fame.main_probe is one process; for large sets take fame.eval --freeze and fame.main_retrieve")
    seed_everything(0)
    set_threads(args.threads, args.workers, device)
    resolve(args)
    probes = parse(args.probe)
    check_data_flags(args, labels=True)
    model, report = trunk(args, device)
    print(f"fame/probe: {args.data} ({args.dataset}); {report}", flush=True)

    known: dict[Path, Tensor] = {}  # features of the videos seen so far
    result: dict[str, object] = {}
    for label, fold in probes:
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
