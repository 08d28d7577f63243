"""Episodic training of prototypical networks."""

import torch
from torch import Tensor

from flat.aet import Decoder
from flat.backbone import Encoder
from flat.methods.pair import PairModel


class ProtoNet(PairModel):
    """Logits: minus the squared Euclidean distance of queries to the class means of the support."""

    def __init__(self, encoder: Encoder, decoder: Decoder | None, bn: str, pool: str, n_way: int, n_shot: int):
        super().__init__(encoder, decoder, bn, pool)
        self.n_way, self.n_shot = n_way, n_shot

    def forward(self, x: Tensor, x_t: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """An episode [n_way * (n_shot + n_query), 3, s, s], class by class, support first in each -> logits
        [n_way * n_query, n_way]; the decoder reads every image of it.
        """
        f, _, read, read_t = self.encode(x, x_t)
        z = f.float().view(self.n_way, -1, f.shape[1])  # [n_way, n_shot + n_query, D]
        means, queries = z[:, : self.n_shot].mean(1), z[:, self.n_shot :].flatten(0, 1)
        logits = -(queries[:, None] - means).square().sum(2)  # [n_way * n_query, n_way]
        if self.decoder is None or read_t is None:
            return logits, None, None
        return logits, *self.decode(read, read_t)

    def targets(self, images: int) -> Tensor:
        """Labels [n_way * n_query] within the episode."""
        return torch.arange(self.n_way).repeat_interleave(images // self.n_way - self.n_shot)
