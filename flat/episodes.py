"""Episodes: which classes and which images, drawn for many episodes at once by a hash of (seed, episode, image)."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from shared_utils import UserError
from shared_utils.data import mix_key

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def hashed(seed: int, *parts: np.ndarray) -> np.ndarray:
    """uint64 of the broadcast shape of `parts`: SplitMix64's finaliser over the seed and one index after another.

    So an episode depends on its number alone: not on how many are drawn, nor together with which.
    """
    with np.errstate(over="ignore"):
        state = np.asarray(mix_key(seed), np.uint64)
        for part in parts:
            state = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


class Episodes(NamedTuple):
    """Indices into the images: support [E, way, shot] and query [E, way, n_query]; class numbers [E, way]."""

    support: Tensor
    query: Tensor
    classes: Tensor


class EpisodeDrawer:
    """Draws episodes of the images with these labels.

    Raises:
        UserError: fewer classes than `n_way`, or a class with fewer images than shots + queries.
    """

    def __init__(self, labels: Tensor, n_way: int, n_shot: int, n_query: int, seed: int, classes: list[str]):
        counts = torch.bincount(labels, minlength=len(classes))
        if min(n_way, n_shot, n_query) < 1:
            raise UserError(f"{n_way} ways, {n_shot} shots, {n_query} queries: each must be at least 1")
        if len(classes) < n_way:
            raise UserError(f"{n_way}-way episodes need as many classes, the split has {len(classes)}")
        few = int(counts.argmin())
        if counts[few] < n_shot + n_query:
            raise UserError(
                f"class {classes[few]} has {int(counts[few])} images, an episode takes {n_shot} shots + {n_query} "
                "queries of each class"
            )
        self.n_way, self.n_shot, self.n_query, self.seed = n_way, n_shot, n_query, seed
        self.counts = counts.numpy()
        self.members = np.full((len(classes), int(counts.max())), -1, np.int64)  # [C, most images]
        order = torch.argsort(labels, stable=True).numpy()
        starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        for c, (start, count) in enumerate(zip(starts, self.counts)):
            self.members[c, :count] = order[start : start + count]

    def draw(self, numbers: np.ndarray) -> Episodes:
        """The episodes with these numbers [E]."""
        e = np.asarray(numbers, np.int64)
        ranks = hashed(self.seed, e[:, None], np.arange(len(self.counts)))  # [E, C]
        classes = np.argsort(ranks, 1, kind="stable")[:, : self.n_way]  # [E, way]
        most = self.members.shape[1]
        # 2^32 apart: no image shares a number with a class above
        keys = hashed(self.seed, e[:, None, None], (1 << 32) + classes[:, :, None] * most + np.arange(most))
        keys = np.where(np.arange(most) < self.counts[classes][:, :, None], keys, _MASK)  # [E, way, most]
        take = self.n_shot + self.n_query
        first = np.argpartition(keys, take - 1, 2)[:, :, :take] if take < most else np.argsort(keys, 2)[:, :, :take]
        within = np.take_along_axis(first, np.argsort(np.take_along_axis(keys, first, 2), 2), 2)
        images = torch.from_numpy(self.members[classes[:, :, None], within])  # [E, way, shot + query]
        return Episodes(images[:, :, : self.n_shot], images[:, :, self.n_shot :], torch.from_numpy(classes))

    def chunks(self, episodes: int, size: int) -> Iterator[tuple[np.ndarray, Episodes]]:
        """Numbers and episodes 0..episodes-1, `size` at a time."""
        for start in range(0, episodes, size):
            numbers = np.arange(start, min(start + size, episodes))
            yield numbers, self.draw(numbers)

    def digest(self, episodes: int) -> str:
        """Names this set of episodes: equal where the images and labels, the seed and the sizes are."""
        sizes = f"{self.seed} {self.n_way} {self.n_shot} {self.n_query} {episodes}"
        return hashlib.sha256(sizes.encode() + self.members.tobytes()).hexdigest()[:16]


class EpisodeSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, image), an episode each: class by class, support before queries. As `EpochSampler`."""

    def __init__(self, drawer: EpisodeDrawer, steps_per_epoch: int):
        self.drawer, self.steps_per_epoch = drawer, steps_per_epoch
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.steps_per_epoch - self.start

    def at(self, epoch: int, step: int = 0) -> "EpisodeSampler":
        self.epoch, self.start = epoch, step
        return self

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps_per_epoch):
            episode = self.drawer.draw(np.array([self.epoch * self.steps_per_epoch + step]))
            images = torch.cat([episode.support, episode.query], 2)[0].flatten()
            yield [(self.epoch, int(i)) for i in images]
