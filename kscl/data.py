"""What the method sees of an image: a query view and K key views, all drawn alike and independently."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared_utils import feed
from shared_utils.data import ImageList, training_folder

training_images = training_folder


class Views(Dataset):
    """Item i: the query view [3, H, W] and the key views [K, 3, H, W] of image i.

    The query is drawn first, so that it and the first keys are the same whatever K is; it is never among the keys: a
    query that spans its own subspace would match it perfectly. All draws come from the global generators (see
    `shared_utils.data.Keyed`).
    """

    def __init__(self, images: ImageList, augmentation: Callable, shots: int):
        self.images, self.augmentation, self.shots = images, augmentation, shots

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images.image(index)
        query = self.augmentation(image)
        return query, torch.stack([self.augmentation(image) for _ in range(self.shots)])

    def batch(self, batch: feed.Batch) -> tuple[Tensor, Tensor]:
        """The same of a whole batch, [B, 3, H, W] and [B, K, 3, H, W], draws keyed (see `shared_utils.feed`)."""
        (views,) = batch.render(feed.Ask(batch.indices, self.augmentation, range(1 + self.shots)))
        return views[0], views[1:].transpose(0, 1)
