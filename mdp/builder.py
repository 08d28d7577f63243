"""Query encoder, momentum key encoder and prototype bank in one module, as the group's MoCo forks arrange them."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdp.models import Encoder
from mdp.prototypes import PrototypeBank


def downsample_labels(y: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest by pixel centre, [B, H, W] -> [B, h, w]: bilinear would invent classes."""
    return F.interpolate(y[:, None].float(), size=tuple(size), mode="nearest-exact")[:, 0].long()


class MDP(nn.Module):
    """encoder_q (trained), encoder_k (its momentum copy, m = 0.999, never a gradient) and the bank."""

    def __init__(self, encoder: Encoder, bank: PrototypeBank, moco_m: float = 0.999, key_encoder: str = "momentum"):
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.bank = bank
        self.moco_m, self.key_encoder = moco_m, key_encoder

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q; batch-norm statistics of the key encoder come from its own passes."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.moco_m)

    @torch.no_grad()
    def embed_keys(self, x: Tensor) -> Tensor:
        """Key pixels [B, D, h, w], unit norm, float32, no gradient."""
        encoder = self.encoder_k if self.key_encoder == "momentum" else self.encoder_q
        return F.normalize(encoder(x).float(), dim=1)
