"""Few-shot evaluation on cached features: python -m flat.test --features RUN/features.pt

Episodes are drawn by their number, so that every network is tested on the same ones; with --compare, the difference
to another network episode by episode. Accuracies in per cent, 95 % intervals 1.96 std / sqrt(episodes).
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flat.episodes import EpisodeDrawer
from flat.methods.baselinefinetune import HEADS, predict
from shared_utils import UserError, checkpoint, distributed
from shared_utils.evaluation import write_result
from shared_utils.flags import Parser, add_machine_flags, add_output_flag, at_least, natural, positive
from shared_utils.provenance import result_folder
from shared_utils.run import cli, set_threads

# CloserLookFewShot: what a training method is tested with; prototypes are always printed too
DEFAULT_HEAD = {"baseline": "finetune", "baseline++": "finetune_cosine", "cosine": "finetune_cosine"}
BUDGET = 64 << 20  # float32 values of support and queries at a time: 256 MiB


def accuracies(
    feats: Tensor,
    drawer: EpisodeDrawer,
    head: str,
    episodes: int,
    device: torch.device,
    budget: int = BUDGET,
    augmented: Tensor | None = None,
) -> Tensor:
    """Accuracy of each episode [E], float64 in 0..1; chunks of episodes at once, as many as `budget` values hold.

    Args:
        feats: [N, D], the images in the drawer's order.
        augmented: [N, A, D], of A augmented copies of each image: they support a classifier, A for each shot (rfs).
    """
    feats = feats.to(device)
    copies = feats[:, None] if augmented is None else augmented.to(device)  # [N, A, D]
    shots = drawer.n_shot * copies.shape[1]
    per_episode = drawer.n_way * (shots + drawer.n_query) * feats.shape[1]
    if head == "lr":
        per_episode += 4 * (drawer.n_way * (drawer.n_way * shots + 1)) ** 2
    truth = torch.arange(drawer.n_way, device=device).repeat_interleave(drawer.n_query)  # [W * Q]
    out = []
    for numbers, episode in drawer.chunks(episodes, max(1, budget // per_episode)):
        support = copies[episode.support.to(device)].flatten(2, 3)  # [E, W, S A, D]
        query = feats[episode.query.to(device)]  # [E, W, Q, D]
        predicted = predict(head, support, query, numbers, drawer.seed)  # [E, W * Q]
        out.append((predicted == truth).double().mean(1).cpu())
    return torch.cat(out)


def default_head(method: str, recipe: str | None) -> str:
    """The head that a network is tested with, by its training method."""
    return "lr" if recipe == "rfs" else DEFAULT_HEAD.get(method, "proto")


def interval(values: Tensor) -> tuple[float, float]:
    """Mean and half of the 95 % interval, 1.96 std / sqrt(n) with the population's std."""
    return float(values.mean()), 1.96 * float(values.std(correction=0)) / math.sqrt(len(values))


def compare(mine: Mapping[str, Any], other: Mapping[str, Any], name: str) -> dict[str, float]:
    """Mean paired difference of every common entry and its half interval, per cent. UserError: other episodes."""
    out = {}
    for key in mine["accuracies"]:
        if key not in other["accuracies"]:
            continue
        shots = key.split("-")[0]
        if mine["digests"][shots] != other["digests"][shots]:
            raise UserError(f"{name}: its episodes are others (--seed, --episodes, --n_shot, or other images)")
        difference = 100 * (mine["accuracies"][key] - other["accuracies"][key])
        out[f"{key}_difference"], out[f"{key}_difference_ci"] = interval(difference)
    if not out:
        raise UserError(f"{name}: no head and number of shots in common")
    return out


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="flat.test", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    a("--features", type=Path, required=True, help="file of flat.save_features")
    a("--test_n_way", type=positive, default=5)
    a("--n_shot", default="1,5", help="support images of a class; several numbers with commas")
    a("--n_query", type=positive, default=15, help="queries of a class")
    a("--episodes", type=positive, default=600)
    a("--eval_head", help=f"of {', '.join(HEADS)}, with commas; default: by the training method, and proto")
    a("--aug_support", type=at_least(-1), default=-1, help="augmented copies in place of each support image; -1: all "
      "that the file holds, 0: the images themselves")  # fmt: skip
    a("--seed", type=natural, default=0, help="of the episodes; keep it for everything that is compared")
    a("--compare", type=Path, help="episodes.pt of another network: paired differences, this one minus that one")
    add_output_flag(p, "flat/episodes", "features", names=["--output-dir"])
    add_machine_flags(p, workers=None)
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if "output_dir" not in args.given and not (args.features.parent / "log.jsonl").is_file():  # of no run of ours
        args.output_dir, args.given = args.features.parent, args.given | {"output_dir"}
    device = distributed.init(args.device)
    set_threads(args.threads, 0, device)
    saved = checkpoint.load(args.features)
    if not isinstance(saved, Mapping) or not {"features", "labels", "classes", "method"} <= set(saved):
        raise UserError(f"{args.features}: not a file of flat.save_features")
    try:
        shots = [int(x) for x in args.n_shot.split(",")]
    except ValueError:
        raise UserError(f"--n_shot {args.n_shot}: must be whole numbers such as 1,5") from None
    chosen = args.eval_head or f"{default_head(saved['method'], saved.get('recipe'))},proto"
    heads = list(dict.fromkeys(chosen.split(",")))
    if unknown := [head for head in heads if head not in HEADS]:
        raise UserError(f"--eval_head {unknown[0]}: unknown; choose from {', '.join(HEADS)}")
    other = checkpoint.load(args.compare) if args.compare else None
    if other is not None and not (isinstance(other, Mapping) and {"accuracies", "digests"} <= set(other)):
        raise UserError(f"{args.compare}: not a file of flat.test (episodes.pt)")

    held = saved["augmented"].shape[1] if "augmented" in saved else 0
    if args.aug_support > held:
        raise UserError(
            f"--aug_support {args.aug_support}: {args.features} holds {held} augmented copies of an image; take its "
            f"features with flat.save_features --aug_support {args.aug_support}"
        )
    copies = held if args.aug_support < 0 else args.aug_support
    augmented = saved["augmented"][:, :copies] if copies else None

    record: dict[str, Any] = {"accuracies": {}, "digests": {}}
    result: dict[str, Any] = {}
    for n_shot in shots:
        drawer = EpisodeDrawer(
            saved["labels"], args.test_n_way, n_shot, args.n_query, args.seed, saved["classes"]
        )  # fmt: skip
        record["digests"][f"{n_shot}shot"] = drawer.digest(args.episodes)
        for head in heads:
            each = accuracies(saved["features"], drawer, head, args.episodes, device, augmented=augmented)
            key = f"{n_shot}shot-{head}"
            record["accuracies"][key] = each
            result[key], result[f"{key}_ci"] = interval(100 * each)
            print(
                f"{args.episodes} Test Acc = {result[key]:.2f}% +- {result[f'{key}_ci']:.2f}% "
                f"({args.test_n_way}-way {n_shot}-shot, {head})",
                flush=True,
            )
    if other is not None:
        result |= compare(record, other, str(args.compare))
    out = result_folder(args)
    result |= {k: float(v) for k, v in saved.get("scores", {}).items()}
    if copies:
        result["aug_support"] = copies
    result |= {"episodes": args.episodes, "features": str(args.features), "weights": saved["weights"]}
    checkpoint.save(out / "episodes.pt", record)
    write_result(out, result)
    return 0


if __name__ == "__main__":
    cli(main)
