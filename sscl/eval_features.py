"""kNN, linear probe and few-shot on the frozen backbone: python -m sscl.eval_features --pretrained RUN

knn       weighted 20-NN (tau 0.07), and the share of the 5 nearest training images with the image's own label
linear    logistic regression on the features of all labelled training images (not augmented)
fewshot   (a) 1, 2, 5, 10 labelled images of each class: logistic regression and nearest class mean, 5 draws
episodes  (b) 5-way 1- and 5-shot on the classes below --novel_dir, 600 episodes, nearest centroid
"""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from shared_utils import UserError, distributed
from shared_utils.augment import plain
from shared_utils.data import ImageList, image_folder
from shared_utils.evaluation import add_data_flags, check_cache, freeze, stored_flags, write_result
from shared_utils.flags import Parser, add_machine_flags, natural, not_negative, positive
from shared_utils.layout import place
from shared_utils.neighbours import features, knn_accuracy, neighbours, purity
from shared_utils.run import cli, set_threads
from sscl.data import open_evaluation
from sscl.fewshot import episodes, k_shot, logistic
from sscl.weights import add_network_flags, load_encoder

PROTOCOLS = ("knn", "linear", "fewshot", "episodes")


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="sscl.eval_features", description=(__doc__ or "").splitlines()[0])
    add_network_flags(p.add_argument)
    add_data_flags(p)
    a = p.add_argument
    a("--protocols", default="knn,linear,fewshot", help=f"of {', '.join(PROTOCOLS)}, with commas")
    a("--copy", choices=["query", "momentum"], default="query", help="whose backbone")
    a("--novel_dir", type=Path, help="CLASS/* of classes that training has not seen, for episodes")
    a("--shots", default="1,2,5,10", help="labelled images of a class in fewshot")
    a("--draws", type=positive, default=5, help="random subsets of fewshot")
    a("--episodes", type=positive, default=600)
    a("--l2", type=not_negative, default=1e-4, help="weight decay of the linear probe's logistic regression")
    a("--batch_size", type=positive, default=256)
    add_machine_flags(p, amp="none", output_dir="sscl/features")
    a("--seed", type=natural, default=0, help="of the episodes")
    return p


def linear_accuracy(train: Tensor, labels: Tensor, val: Tensor, truth: Tensor, l2: float) -> float:
    """Top-1 in per cent of a logistic regression on standardised features [N, F]."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    weight, bias = logistic((train - mean) / std, labels, int(labels.max()) + 1, l2)
    return 100 * float((((val - mean) / std @ weight.T + bias).argmax(1) == truth).double().mean())


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    chosen = args.protocols.split(",")
    if unknown := [name for name in chosen if name not in PROTOCOLS]:
        raise UserError(f"--protocols {unknown[0]}: unknown; choose from {', '.join(PROTOCOLS)}")
    try:
        shots = [int(text) for text in args.shots.split(",")]
    except ValueError:
        raise UserError(f"--shots {args.shots}: must be whole numbers such as 1,5") from None
    if min(shots) < 1:
        raise UserError(f"--shots {args.shots}: must be at least 1")
    if "episodes" in chosen and not args.novel_dir:
        raise UserError("--protocols episodes needs --novel_dir, a folder of classes that training has not seen")
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    encoder, report = load_encoder(args, None, args.copy)
    freeze(encoder)
    backbone = place(encoder.backbone, device)
    train, val = open_evaluation(args, stored_flags(args.pretrained))
    if distributed.rank() == 0:
        print(f"sscl/features: {report}; {len(train)} train / {len(val)} val images", flush=True)

    def embed(images: ImageList) -> Tensor:
        images.transform = plain(args.img_size)
        return features(backbone, images, device, args.batch_size, args.workers, args.amp == "bf16")

    result: dict[str, Any] = {}
    if {"knn", "linear", "fewshot"} & set(chosen):
        check_cache({"take fewer images (--per_class)": (len(train) + len(val), encoder.backbone.num_features)})
        bank, queries, labels, truth = embed(train), embed(val), train.labels, val.labels
        if "knn" in chosen:
            result["knn"] = knn_accuracy(bank, labels, queries, truth, 20, 0.07, device)
            result["purity"] = purity(neighbours(bank, min(5, len(bank) - 1), device), labels)
        if "linear" in chosen:
            on_device = [part.to(device) for part in (bank, labels, queries, truth)]
            result["linear"] = linear_accuracy(on_device[0], on_device[1], on_device[2], on_device[3], args.l2)
        for k in shots if "fewshot" in chosen else []:
            for name, (mean, std) in k_shot(bank, labels, queries, truth, k, args.draws).items():
                result |= {f"{k}shot_{name}": mean, f"{k}shot_{name}_std": std}
    if "episodes" in chosen:
        novel = image_folder(args.novel_dir)
        feats = embed(novel)
        for k in (1, 5):
            mean, half = episodes(feats, novel.labels, 5, k, count=args.episodes, seed=args.seed)
            result |= {f"5way_{k}shot": mean, f"5way_{k}shot_ci": half}
    result |= {"copy": args.copy, "pretrained": args.pretrained, "backbone_sha256": args.backbone_sha256}
    write_result(args, result | {"data_dir": str(args.data_dir)})
    return 0


if __name__ == "__main__":
    cli(main)
