"""Pictures for tensorboard: query views as the network sees them, labels, nearest prototypes, predictions."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdp.datasets import UnionDataset
from mdp.prototypes import PrototypeBank

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def union_palette(union: UnionDataset) -> Tensor:
    """Colours of all classes of all datasets, [C + 1, 3] in 0..1; the last row, black, is for -1."""
    rows = [colour for s in union.sets for colour in s.palette] + [(0, 0, 0)]
    return torch.tensor(rows, dtype=torch.float32) / 255


@torch.no_grad()
def batch_picture(
    x: Tensor, y: Tensor, v: Tensor, bank: PrototypeBank, union: UnionDataset, columns: int = 8
) -> Tensor:
    """Three rows (view, labels, nearest prototype) of up to `columns` images -> [3, 3*H, columns*W] in 0..1.

    Args:
        x: [B, 3, H, W] normalised; y: [B, H, W] union labels; v: [B, D, h, w] embeddings (logits give no third row).
    """
    x, y, v = x[:columns].float().cpu(), y[:columns].cpu(), v[:columns].float().cpu()
    palette = union_palette(union)
    view = (x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(0, 1)
    rows = [view, palette[y].permute(0, 3, 1, 2)]
    if v.shape[1] == bank.proto.shape[1]:
        s = torch.einsum("bdhw,cd->bchw", v, bank.proto.cpu()).masked_fill(~bank.proto_valid.cpu()[:, None, None], -2)
        nearest = F.interpolate(s.argmax(1)[:, None].float(), size=x.shape[-2:], mode="nearest").long()[:, 0]
        rows.append(palette[nearest].permute(0, 3, 1, 2))
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def overlay(image: np.ndarray, label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] photo half covered by the colours [C, 3] of its ids [H, W]; ids outside stay bare."""
    known = label < len(palette)
    mixed = (0.4 * image + 0.6 * palette[np.where(known, label, 0)]).astype(np.uint8)
    return np.where(known[..., None], mixed, image)


def panels(photo: np.ndarray, label: np.ndarray, guess: np.ndarray, palette: Any) -> np.ndarray:
    """Photo, label and prediction side by side, uint8 [H, 3 W, 3]."""
    colours = np.asarray(palette, dtype=np.uint8)
    return np.concatenate([photo, overlay(photo, label, colours), overlay(photo, guess, colours)], axis=1)
