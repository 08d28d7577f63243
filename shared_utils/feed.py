"""From images to batches of views: an image is decoded once for all its views, a batch is augmented together.

A data set says what its batch is made of, by what it asks of a `Batch`:

    def batch(self, batch: feed.Batch):
        (views,) = batch.render(feed.Ask(batch.indices, recipe, (0, 1)))    # [2, B, 3, S, S]
        return views[0], views[1]

    loader = run.loader(feed.keyed(dataset, args.seed, args.aug_backend, run.device), sampler)

With backend `pil` that is `Keyed(dataset)`, which makes the items of the same data set one by one. With `batch` all
draws are keyed by (seed, epoch, index, view): the number of workers, the batch size, the number of processes and a
resume change nothing. Images that stand decoded in memory are not decoded again; where they have one size and the run
is on a GPU, they are put there once and augmented there by the main process.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from shared_utils import UserError
from shared_utils.augment import Painter, Recipe, apply_tensor, mix_keys, normalise, uniforms
from shared_utils.data import ImageList, Keyed
from shared_utils.decode import Encoded
from shared_utils.run import worker_init

SMALL = 64  # pixels of a view up to which a whole batch is normalised at once
GAP = 2  # a JPEG is decoded at a part of its size where its crops still have to shrink this much


class Ask(NamedTuple):
    """Views of images `rows` [B] by a `Recipe`; `views` are their numbers, which enter the keys of their draws."""

    rows: np.ndarray
    recipe: Any
    views: Sequence[int]


class Source:
    """The pixels of an `ImageList`: decoded in memory, on a device, or to be decoded at each access."""

    def __init__(self, images: ImageList, device: torch.device | None = None):
        self.images, self.device = images, device
        self.array = images.array  # [N, H, W, 3] where the images lie decoded in memory and have one size
        self._there: Tensor | None = None

    @property
    def on_device(self) -> bool:
        """Whether the images are augmented on the device, by the main process."""
        return self.device is not None and self.array is not None

    def there(self) -> Tensor:
        """All images on the device, uint8 [N, H, W, 3], put there once."""
        if self._there is None:
            self._there = torch.from_numpy(self.array).to(self.device)
        return self._there

    def open(self, row: int) -> "Encoded | Decoded":
        if self.images.decoded or type(self.images) is not ImageList:  # a folder's own list has its own reader
            return Decoded(self.images.pixels(row))
        return Encoded(self.images.file(row))


class Decoded:
    """Pixels in memory, as `Encoded`."""

    simple = False

    def __init__(self, array: np.ndarray):
        self.array, (self.height, self.width) = array, array.shape[:2]

    def pixels(self, reduced: int = 1) -> np.ndarray:
        return self.array


class Batch:
    """What a data set makes its batch of: `epochs` and `indices` [B] int64, draws keyed by them, and `render`."""

    def __init__(self, seed: int, keys: Sequence[tuple[int, int]], source: Source):
        self.epochs, self.indices = np.array(keys, np.int64).reshape(-1, 2).T
        self.seed, self.source = seed, source

    def __len__(self) -> int:
        return len(self.indices)

    def keys(self, view: int) -> np.ndarray:
        """The keys of the draws of a view, uint64 [B]; negative numbers are free for what is no view."""
        return mix_keys(self.seed, self.epochs, self.indices, view)

    def uniform(self, stream: int, count: int = 1) -> np.ndarray:
        """Numbers in 0..1, [B, count], that no view uses: `stream` counts from 1."""
        return uniforms(self.keys(-stream), count)

    def render(self, *asks: Ask) -> list[Tensor]:
        """For each ask its views [V, B, 3, S, S] in channels-last memory, float32 or bytes as the recipe says, every
        image decoded once."""
        keys = [np.concatenate([self.keys(view) for view in ask.views]) for ask in asks]
        if self.source.on_device:
            return [self._on_device(ask, key) for ask, key in zip(asks, keys)]
        wanted: dict[int, list[tuple[int, int]]] = {}  # the asks and places of each image
        for number, ask in enumerate(asks):
            for place, row in enumerate(ask.rows.tolist()):
                wanted.setdefault(row, []).append((number, place))
        opened = {row: self.source.open(row) for row in wanted}
        jobs = [_Job(ask, key, opened) for ask, key in zip(asks, keys)]
        for row, places in wanted.items():
            image = opened.pop(row)
            reduced = min(jobs[number].reduced(place) for number, place in places) if image.simple else 1
            pixels = image.pixels(reduced)
            for number, place in places:
                jobs[number].paint(pixels, place, reduced)
        return [job.finish() for job in jobs]

    def _on_device(self, ask: Ask, keys: np.ndarray) -> Tensor:
        array = self.source.there()
        rows = np.tile(ask.rows, len(ask.views))
        draws = ask.recipe.draw(keys, *array.shape[1:3])
        return apply_tensor(ask.recipe, array, rows, draws).unflatten(0, (len(ask.views), len(ask.rows)))


class _Job:
    """The views of an ask while they are being painted on a CPU."""

    def __init__(self, ask: Ask, keys: np.ndarray, opened: dict[int, Any]):
        self.recipe, self.count, self.views = ask.recipe, len(ask.rows), len(ask.views)
        images = [opened[row] for row in ask.rows.tolist()]
        heights, widths = ([getattr(image, side) for image in images] * self.views for side in ("height", "width"))
        draws = ask.recipe.draw(keys, np.array(heights), np.array(widths))
        self.shrink = (draws.box[:, 2:] / draws.target[:, :2]).min(1).reshape(self.views, -1).min(0).tolist()
        self.painter = Painter(ask.recipe, draws)
        side = ask.recipe.size
        total = self.views * self.count
        self.made = _empty(torch.uint8 if ask.recipe.levels else torch.float32, total, side, side, 3)
        # Small views are normalised together in the end, large ones while the cache still holds them.
        self.late = side <= SMALL and not ask.recipe.levels
        if ask.recipe.levels:
            self.bytes = self.made.numpy()
        else:
            self.bytes = np.empty((total if self.late else 1, side, side, 3), np.uint8)

    def reduced(self, place: int) -> int:
        """By how much the image may be reduced in decoding for the views of this place."""
        return next((factor for factor in (8, 4, 2) if self.shrink[place] >= GAP * factor), 1)

    def paint(self, pixels: np.ndarray, place: int, reduced: int) -> None:
        for i in range(place, self.views * self.count, self.count):
            out = self.bytes[i if len(self.bytes) > 1 else 0]
            self.painter.paint(pixels, i, out, reduced)
            if not self.late and not self.recipe.levels:
                normalise(torch.from_numpy(out), self.recipe, self.made[i])

    def finish(self) -> Tensor:
        if self.late:
            normalise(torch.from_numpy(self.bytes), self.recipe, self.made)
        return self.made.unflatten(0, (self.views, self.count)).movedim(-1, -3)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """In a loader's worker it is in shared memory from the start, as what it hands over has to be."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    memory = torch.UntypedStorage._new_shared(dtype.itemsize * math.prod(shape))
    return torch.empty(0, dtype=dtype).set_(memory, 0, shape)  # type: ignore[call-overload]


class Batched(Dataset):
    """A data set with a method `batch`, indexed by lists of (epoch, index): a loader's batch is made as a whole."""

    def __init__(self, dataset: Any, images: ImageList, seed: int, device: torch.device | None = None):
        self.dataset, self.seed = dataset, seed
        self.source = Source(images, device if device is not None and device.type != "cpu" else None)
        self.in_process = self.source.on_device

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Any:
        return self.dataset.batch(Batch(self.seed, keys, self.source))

    @staticmethod
    def collate_fn(batch: Any) -> Any:
        return batch


class Labelled(Dataset):
    """(views [B, 3, S, S], labels [B], indices [B]) of an `ImageList` by the recipe that is its transform."""

    def __init__(self, images: ImageList):
        self.images, self.labels = images, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        (views,) = batch.render(Ask(batch.indices, self.images.transform, (0,)))
        rows = torch.from_numpy(batch.indices.copy())
        return views[0], self.labels[rows], rows


def keyed(dataset: Any, seed: int, backend: str, device: torch.device | None = None) -> Any:
    """A data set for `Run.loader`, its draws keyed by (seed, epoch, index), by the backend `pil` or `batch`.

    `dataset` is an `ImageList` whose transform is a recipe, or a data set with `images` and a method `batch`.
    """
    if backend == "pil":
        return Keyed(dataset, seed)
    if isinstance(dataset, ImageList):
        if not isinstance(dataset.transform, Recipe):
            raise UserError("--aug_backend batch: this script's augmentation has only the backend pil")
        return Batched(Labelled(dataset), dataset, seed, device)
    return Batched(dataset, dataset.images, seed, device)


class InOrder(Dataset):
    """Rows `first` to `last` of an `ImageList` for a plain DataLoader, by the recipe that is its transform."""

    def __init__(self, images: ImageList, first: int, last: int):
        self.batched, self.first, self.last = Batched(Labelled(images), images, 0), first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitems__(self, rows: Sequence[int]) -> Any:
        return self.batched.__getitems__([(0, self.first + row) for row in rows])


def in_order(
    images: ImageList, first: int, last: int, batch_size: int, workers: int, device: torch.device
) -> DataLoader:
    """Loader of (x [B, 3, S, S], labels [B], indices [B]) of the images `first` to `last`, by their transform."""
    recipe = getattr(images, "transform", None)  # a set that makes its items itself has none
    batched = isinstance(recipe, Recipe) and recipe.backend == "batch"
    return DataLoader(
        InOrder(images, first, last) if batched else Subset(images, range(first, last)),
        batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init,
        generator=torch.Generator(),
        collate_fn=Batched.collate_fn if batched else None,
    )
