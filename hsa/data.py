"""What the method sees of an image: two views of it and two of a neighbour; and who the neighbours are."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared_utils import UserError, augment, feed, neighbours
from shared_utils.data import ImageList, mix_key, training_folder

training_images = training_folder


def order_hash(images: ImageList) -> str:
    """Changes with the files and their order: neighbour indices mean nothing for another list."""
    if not images.classes:
        return images.fingerprint()[1]
    names = "\n".join("/".join(path.parts[-2:]) for path in images.paths())
    return hashlib.sha256(os.fsencode(names)).hexdigest()[:16]


class Neighbours:
    """The K neighbours of every image, in shared memory: persistent data workers see a refresh at once.

    A checkpoint holds them with the epoch that they are of, so that a resume inside an epoch does not refresh again.
    """

    def __init__(self, images: ImageList, k: int, seed: int):
        if len(images) <= k:
            raise UserError(f"--clus_pos_num {k} needs more than {k} images, the data has {len(images)}")
        self.labels = images.labels if images.has_labels else None
        self.seed, self.order = seed, order_hash(images)
        self.index = torch.full((len(images), k), -1, dtype=torch.long).share_memory_()
        self.epoch = -1  # of the last refresh
        self.purity: float | None = None  # per cent of the neighbours with their image's label; for people to watch

    def set(self, index: Tensor, epoch: int) -> None:
        """Take over indices [N, K], equal on every process, where the data workers see them."""
        self.index.copy_(index)
        self.epoch = epoch
        if self.labels is not None:
            self.purity = neighbours.purity(self.index, self.labels)

    def nearest(self, feats: Tensor, device: torch.device) -> Tensor:
        """Exact nearest neighbours [N, K] among normalised features [N, D], never the image itself (by index).

        The processes share the rows among them, and all get the whole.
        """
        return neighbours.neighbours(feats, self.index.shape[1], device)

    def random(self, epoch: int) -> Tensor:
        """The control: other images, drawn uniformly with replacement for each refresh."""
        n, k = self.index.shape
        draws = np.random.Generator(np.random.PCG64(mix_key(self.seed, epoch, -1))).integers(n - 1, size=(n, k))
        return torch.from_numpy(draws + (draws >= np.arange(n)[:, None]))  # skip the image itself

    def same_label(self, epoch: int) -> Tensor:
        """The upper bound: other images of the same class (this arm alone looks at labels)."""
        if self.labels is None:
            raise UserError("--neighbours label needs class folders, two of them at the least")
        rng = np.random.Generator(np.random.PCG64(mix_key(self.seed, epoch, -2)))
        out = np.empty(tuple(self.index.shape), np.int64)
        for label in self.labels.unique().tolist():
            members = np.flatnonzero(self.labels.numpy() == label)
            if len(members) < 2:
                raise UserError(f"--neighbours label needs two images a class, class number {label} has one")
            draws = rng.integers(len(members) - 1, size=(len(members), out.shape[1]))
            out[members] = members[draws + (draws >= np.arange(len(members))[:, None])]
        return torch.from_numpy(out)

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index.clone(), "epoch": self.epoch, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["order"] != self.order or state["index"].shape != self.index.shape:
            raise UserError(
                "the checkpoint's neighbours are of other images, or of another order of them; "
                "give the --data_dir of that run, or --overwrite"
            )
        self.set(state["index"], state["epoch"])


def small_crop(size: int) -> augment.Recipe:
    """MoCo v2's augmentation on 5 to 14 per cent of the image (multi-crop as in SwAV) [inferred]."""
    return replace(augment.moco_v2(size), scale=(0.05, 0.14))


class Views(Dataset):
    """Item i: {"query", "key"} of image i, {"add_posq", "add_posk"} of a neighbour drawn at each access, and
    {"small": [S, 3, s, s]} of image i. All draws come from the global generators (see `shared_utils.data.Keyed`).

    Source of the order of the draws: release moco/folder.py.
    """

    def __init__(
        self,
        images: ImageList,
        augmentation: Callable,
        nearby: Neighbours | None = None,
        small: int = 0,
        small_augmentation: Callable | None = None,
    ):
        self.images, self.augmentation, self.nearby = images, augmentation, nearby
        self.small, self.small_augmentation = small, small_augmentation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        anchor, views = self.images.image(index), {}
        if self.nearby is not None:
            row = self.nearby.index[index]
            member = int(row[torch.randint(len(row), ())])
            if member < 0:
                raise RuntimeError("views are drawn before the neighbours were searched for the first time")
            other = self.images.image(member)
            views["add_posq"], views["add_posk"] = self.augmentation(other), self.augmentation(other)
        views["key"], views["query"] = self.augmentation(anchor), self.augmentation(anchor)
        if self.small_augmentation is not None:
            views["small"] = torch.stack([self.small_augmentation(anchor) for _ in range(self.small)])
        return views

    def batch(self, batch: feed.Batch) -> dict[str, Tensor]:
        """The same of a whole batch, [B, 3, H, W] each and [B, S, 3, s, s], draws keyed (see `shared_utils.feed`)."""
        asks = [feed.Ask(batch.indices, self.augmentation, (0, 1))]
        if self.nearby is not None:
            rows = self.nearby.index.numpy()[batch.indices]
            members = rows[np.arange(len(rows)), (batch.uniform(1)[:, 0] * rows.shape[1]).astype(np.int64)]
            if members.min() < 0:
                raise RuntimeError("views are drawn before the neighbours were searched for the first time")
            asks.append(feed.Ask(members, self.augmentation, (2, 3)))
        if self.small_augmentation is not None:
            asks.append(feed.Ask(batch.indices, self.small_augmentation, range(4, 4 + self.small)))
        made = batch.render(*asks)
        views = dict(zip(("query", "key"), made[0]))
        if self.nearby is not None:
            views |= dict(zip(("add_posq", "add_posk"), made[1]))
        if self.small_augmentation is not None:
            views["small"] = made[-1].transpose(0, 1)
        return views
