"""Pictures for tensorboard, without torchvision's import, picture files, and the palettes of label maps."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from shared_utils import UserError, checkpoint


def save_picture(image: Image.Image, path: str | os.PathLike, **options: Any) -> None:
    """Write a picture in the format of its ending, atomically; `options` are those of PIL.

    UserError: no such format, or it cannot be written; an older file is then unharmed.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"{path}: not the ending of a picture; give NAME.png or NAME.jpg")
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    checkpoint.write(path, lambda handle: handle.write(encoded.getvalue()), sync=False)


def make_grid(images: Tensor, nrow: int = 8, padding: int = 2) -> Tensor:
    """[N, C, H, W] beside and below each other, `nrow` a row, black between: [C, rows, columns] as torchvision's."""
    count, channels, height, width = images.shape
    columns = min(nrow, count)
    rows = -(-count // columns)
    height, width = height + padding, width + padding
    grid = images.new_zeros(channels, rows * height + padding, columns * width + padding)
    for i, image in enumerate(images):
        top, left = (i // columns) * height + padding, (i % columns) * width + padding
        grid[:, top : top + height - padding, left : left + width - padding] = image
    return grid


def voc_palette() -> list[int]:
    """PASCAL VOC's 256 colours, flat: the bits of the index spread over the channels, highest bit first."""
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((np.arange(256) >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours.ravel().tolist()


def davis_palette() -> list[int]:
    """DAVIS 2017's 256 colours, flat: VOC's first 22 with 191 for 192, then greys."""
    return [min(level, 191) for level in voc_palette()[: 22 * 3]] + [grey for grey in range(22, 256) for _ in range(3)]
