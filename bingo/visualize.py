"""Pictures for tensorboard."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shared_utils.augment import denormalise
from shared_utils.pictures import make_grid


def views_picture(views: Mapping[str, Tensor], count: int = 8) -> Tensor:
    """The first `count` images of each kind of view [N, 3, H, W], a row for each kind, in 0..1."""
    rows = [x[:count].cpu() for x in views.values()]
    return make_grid(denormalise(torch.cat(rows)), nrow=len(rows[0]), padding=2)
