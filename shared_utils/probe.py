"""A linear probe of a frozen backbone: blocks, their features, classifiers and scores. The loop is a folder's own."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError, distributed
from shared_utils.data import EpochSampler, ImageList
from shared_utils.evaluation import check_cache, collect, stream, topk
from shared_utils.run import Run

Batch = tuple[list[Tensor], Tensor]  # features of each block [B, D], labels [B]


def words(text: str) -> list[str]:
    """For `argparse`: what commas separate."""
    return [word.strip() for word in text.split(",")]


def check_batch(batch_size: int, world: int) -> None:
    """UserError for a batch that the processes cannot share."""
    if batch_size % world:
        raise UserError(f"--batch_size {batch_size} does not divide over {world} processes")


def stage_ends(encoder: Any) -> dict[str, int]:
    """Id of the last block of each stage; `last` is the map that is pooled. Block 0 is the stem, 1 its pooling."""
    ends, number = {}, 1
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        if hasattr(encoder, stage):
            number += len(getattr(encoder, stage))
            ends[stage] = number
    return ends | {"last": getattr(encoder, "last_id", number)}


def block_ids(chosen: Sequence[str], encoder: Any) -> list[int]:
    """Ids of --selected_feat_id: numbers, `layerN` (the last block of that stage), or `last`."""
    ends = stage_ends(encoder)
    for word in chosen:
        if word not in ends and not (word.isdecimal() and int(word) <= ends["last"]):
            raise UserError(
                f"--selected_feat_id {word}: no such block; choose from 0 to {ends['last']}, {', '.join(ends)}"
            )
    ids = [ends[word] if word in ends else int(word) for word in chosen]
    if len(set(ids)) < len(ids):
        raise UserError(f"--selected_feat_id {','.join(chosen)} names a block twice")
    return ids


def pooled_size(number: int, encoder: Any) -> int:
    """Side of the pooled map: 14 up to layer1, 7 above, 1 for the last block (BINGO's classifiers/cls_opt.py)."""
    ends = stage_ends(encoder)
    if number == ends["last"]:
        return 1
    return 14 if number <= ends.get("layer1", 1) else 7


class Features(nn.Module):
    """Images -> the pooled and flattened maps [B, C * s * s] of the chosen blocks, float32."""

    def __init__(self, encoder: Any, ids: list[int], pool_type: str):
        super().__init__()
        self.encoder, self.ids = encoder, ids
        self.pool = F.adaptive_avg_pool2d if pool_type == "avg" else F.adaptive_max_pool2d

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.encoder.maps(x, self.ids)
        out = []
        for number in self.ids:
            side = min(pooled_size(number, self.encoder), *maps[number].shape[2:])
            out.append(self.pool(maps[number].float(), side).flatten(1))
        return out


class Probes(nn.Module):
    """A linear classifier for each block, N(0, .01) and 0; names as in the releases of BINGO and HSA."""

    def __init__(self, sizes: list[int], classes: int):
        super().__init__()
        layers = []
        for size in sizes:  # one after the other: a block's start does not depend on the blocks after it
            layers.append(nn.Linear(size, classes))
            nn.init.normal_(layers[-1].weight, 0, 0.01)
            nn.init.zeros_(layers[-1].bias)
        self.classifiers = nn.ModuleList(
            nn.ModuleDict({"classifier": nn.ModuleDict({"LinearClassifier": layer})}) for layer in layers
        )

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        return [probe["classifier"]["LinearClassifier"](f) for probe, f in zip(self.classifiers, feats, strict=True)]  # type: ignore[index, operator]


class Scores:
    """Top-1 and top-5 in per cent of each block after each epoch: [epoch][block] (top-1, top-5)."""

    def __init__(self, ids: list[int]):
        self.ids = ids
        self.history: list[list[list[float]]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = [[list(pair) for pair in epoch] for epoch in state["history"]]

    def improved(self) -> bool:
        """Whether the latest epoch has the highest top-1 of any classifier."""
        tops = [max(pair[0] for pair in epoch) for epoch in self.history]
        return tops[-1] > max(tops[:-1], default=-1.0)

    def result(self) -> dict[str, Any]:
        """Best and last epoch of each block, and those of the deepest block under `linear*`."""
        blocks = {}
        for i, number in enumerate(self.ids):
            best = max(range(len(self.history)), key=lambda e: self.history[e][i][0])  # the first of equals
            top1, top5 = self.history[best][i]
            last1, last5 = self.history[-1][i]
            blocks[str(number)] = {
                "best": top1, "best_top5": top5, "best_epoch": best, "last": last1, "last_top5": last5,
            }  # fmt: skip
        deepest = blocks[str(max(self.ids))]
        return {
            "linear": deepest["best"],
            "linear_top5": deepest["best_top5"],
            "linear_last": deepest["last"],
            "linear_last_top5": deepest["last_top5"],
            "blocks": blocks,
        }


class FeatureBatches:
    """Batches of features that are in memory, in the order of a sampler."""

    def __init__(self, feats: list[Tensor], labels: Tensor, sampler: EpochSampler):
        self.feats, self.labels, self.sampler = feats, labels, sampler

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.sampler:
            rows = torch.tensor([index for _, index in keys])
            yield [f[rows] for f in self.feats], self.labels[rows]


class Validation:
    """Features and labels of this process's share of the validation images, in batches, as often as asked.

    The images are not augmented and the backbone is frozen, so their features are computed once, at the first pass,
    and kept. With `recompute` they go through the backbone at every pass and nothing is kept: the same numbers.
    """

    def __init__(
        self, embed: Callable[[Tensor], list[Tensor]], images: ImageList, run: Run, recompute: bool = False
    ) -> None:
        self.run, self.images, self.recompute = run, images, recompute
        self.source = (embed, images, run.device, run.args.batch_size, run.args.workers)
        self.kept: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.recompute:
            yield from stream(*self.source)
            return
        if self.kept is None:
            self.kept = collect(*self.source)
        feats, labels = self.kept
        size = self.run.args.batch_size
        for start in range(0, len(labels), size):
            yield [f[start : start + size] for f in feats], labels[start : start + size]


def check_memory(run: Run, train: ImageList, val: ImageList, values: int) -> None:
    """UserError if the features that --cached_train and the lack of --recompute_val keep do not fit into memory.

    `values`: of all chosen blocks of an image. The processes of a machine share its memory.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    wanted = {}
    if run.args.cached_train:  # all of them in each process
        wanted["leave --cached_train away"] = (len(train) * local, values)
    if not run.args.recompute_val:
        wanted["give --recompute_val, the numbers are the same"] = (-(-len(val) * local // run.world), values)
    check_cache(wanted)


def facts(run: Run, train: ImageList, val: ImageList, backbone: str, steps: int, epochs: int, heads: int = 1) -> dict:
    """What the preflight says of a probe of `heads` classifiers, with `steps` an epoch."""
    args = run.args
    return {
        "data": f"{args.data_dir}: {len(train)} train / {len(val)} val images, {len(train.classes)} classes",
        "backbone": backbone,
        "batch": f"{args.batch_size} x {steps} steps an epoch, {epochs} epochs",
        "protocol": "features of unaugmented images (cheap probe, not equal)" if args.cached_train else "augmented",
        "expected initial loss": f"about {heads * math.log(len(train.classes)):.2f}, log of the classes a classifier",
    }


@torch.no_grad()
def evaluate(
    probes: Callable[[list[Tensor]], list[Tensor]], batches: Iterable[Batch], heads: int, count: int,
    device: torch.device,
) -> list[list[float]]:  # fmt: skip
    """(top-1, top-5) in per cent of each of `heads` classifiers.

    Args:
        batches: features of each block and labels, of this process's share of `count` images.
    """
    hits = torch.zeros(heads, 2, dtype=torch.float64)
    for feats, labels in batches:
        hits += torch.stack([topk(logits, labels) for logits in probes([f.to(device) for f in feats])])
    return (100 * distributed.all_sum(hits.to(device)).cpu() / count).tolist()
