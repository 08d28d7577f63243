"""Both views of a whole batch: a photo is decoded once, cropped and coloured by `shared_utils.augment`.

The recipe is MoCo v2's, as in `mdp.transforms.MoCoView`; a label map goes through the box and the flip of its view by
nearest neighbours. All draws are keyed by (seed, epoch, index, view).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mdp.datasets import UnionDataset, to_union
from shared_utils.augment import Painter, mix_keys, moco_v2, normalise
from shared_utils.decode import Encoded
from shared_utils.feed import GAP


def nearest(label: np.ndarray, box: Sequence[int], size: int, flip: bool) -> np.ndarray:
    """[H, W] -> [size, size]: the pixels of a box (top, left, height, width) that PIL's resize takes, mirrored."""
    top, left, height, width = box
    middles = 2 * np.arange(size) + 1  # in half pixels of the view
    rows, columns = top + middles * height // (2 * size), left + middles * width // (2 * size)
    return label[rows[:, None], columns[::-1] if flip else columns]


class Cached:
    """A photo and its label map that a `UnionDataset` keeps decoded, as `File`."""

    simple = False

    def __init__(self, image: Image.Image, label: Image.Image):
        self.image, self.map, self.height, self.width = image, label, image.height, image.width

    def pixels(self, reduced: int = 1) -> np.ndarray:
        return np.asarray(self.image)

    def label(self) -> np.ndarray:
        return np.asarray(self.map)


class File(Encoded):
    """A photo whose header is read, and its label map."""

    def __init__(self, union: UnionDataset, index: int):
        number, self.index = union.locate(index)
        self.set = union.sets[number]
        super().__init__(self.set.pairs.photos.file(self.index))

    def label(self) -> np.ndarray:
        """uint8 [H, W], local ids. UserError as `SegSet.load`, also where its size is not the photo's."""
        label = self.set.label(self.index)
        if label.shape != (self.height, self.width):
            self.set.load(self.index)
        return label


class BatchedUnion(Dataset):
    """A `UnionDataset` that a loader asks for whole batches; see `UnionDataset.__getitem__` for what is in them."""

    def __init__(self, union: UnionDataset, crop_size: int, seed: int):
        self.union, self.recipe, self.seed = union, moco_v2(crop_size), seed

    def __len__(self) -> int:
        return len(self.union)

    def open(self, index: int) -> Cached | File:
        return Cached(*self.union.read(index)) if self.union.cache_size else File(self.union, index)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The batch of these (epoch, index): q, k float32 [B, 3, s, s] in channels-last memory, labels [B, s, s]."""
        epochs, indices = np.array(keys, np.int64).reshape(-1, 2).T
        photos, size = [self.open(index) for index in indices.tolist()], self.recipe.size
        heights, widths = (np.array([getattr(photo, side) for photo in photos]) for side in ("height", "width"))
        draws = [self.recipe.draw(mix_keys(self.seed, epochs, indices, view), heights, widths) for view in (0, 1)]
        painters = [Painter(self.recipe, drawn) for drawn in draws]
        shrink = np.minimum(*(drawn.box[:, 2:].min(1) for drawn in draws)) / size
        views = torch.empty(2, len(keys), size, size, 3)
        ids = np.empty((2, len(keys), size, size), np.uint8)
        painted = np.empty((size, size, 3), np.uint8)
        for i, photo in enumerate(photos):
            # A JPEG is decoded at a part of its size where both crops still have to shrink.
            reduced = next((factor for factor in (8, 4, 2) if photo.simple and shrink[i] >= GAP * factor), 1)
            pixels, label = photo.pixels(reduced), photo.label()
            for view, (painter, drawn) in enumerate(zip(painters, draws)):
                painter.paint(pixels, i, painted, reduced)
                normalise(torch.from_numpy(painted), self.recipe, views[view, i])
                ids[view, i] = nearest(label, drawn.box[i].tolist(), size, bool(drawn.flip[i]))
        number = torch.tensor([self.union.locate(index)[0] for index in indices.tolist()])
        q_label, k_label = to_union(torch.from_numpy(ids), torch.tensor(self.union.offsets)[number, None, None])
        q, k = views.movedim(-1, -3)
        rows = {"dataset": number, "index": torch.from_numpy(indices.copy())}
        return {"q": q, "k": k, "q_label": q_label, "k_label": k_label, **rows}

    @staticmethod
    def collate_fn(batch: Any) -> Any:
        return batch
