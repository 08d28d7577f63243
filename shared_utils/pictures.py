"""Pictures for tensorboard, without torchvision's import."""

from torch import Tensor


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
