"""L = L_D + sum over the terms of weight x distance between a view and its recovered image (spec of the release)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

# Term -> the weight's flag, as a name, and the paper's level: side of the evaluator's map at 224 pixels, 1 its vector.
TERMS = {"loss_mse": "w_pix", "loss_f1": "w_f1", "loss_f7": "w_f7", "loss_f14": "w_f14", "loss_f28": "w_f28"}
LEVELS = {"loss_f28": 2, "loss_f14": 3, "loss_f7": 4, "loss_f1": 5}  # stage of the evaluator; 5: its projection
WEIGHTS = {"w_pix": 1 / 10, "w_f1": 1 / 10, "w_f7": 1 / 30, "w_f14": 1 / 30, "w_f28": 1 / 30}


def latent_loss(q: Tensor, z: Tensor) -> Tensor:
    """l(z, z') = 2 - 2 cos(q(z), z'), mean over the batch, in 0..4; predictions and targets [B, D]. Float32."""
    return 2 - 2 * F.cosine_similarity(q.float(), z.float(), dim=1).mean()


def distance(u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """sum over the views of M(u_v, v_v), the mean squared error over all elements and the batch. Float32.

    A square of a 28 x 28 x 512 map can overflow in half precision.
    """
    total = F.mse_loss(u[0].float(), v[0].float())
    for a, b in zip(u[1:], v[1:], strict=True):
        total = total + F.mse_loss(a.float(), b.float())
    return total
