"""Query encoder, momentum key encoder and the queues of one or two levels (release moco/builder.py)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsa.arch import Encoder, mlp_head
from shared_utils import UserError, distributed
from shared_utils.checkpoint import ReleaseKeys as ReleaseKeys
from shared_utils.ring import Pointer


class CsMl(nn.Module):
    """encoder_q (trained), encoder_k (its momentum copy, never a gradient) and a queue for each level.

    Level 4 is the release's embedding of the last pooled feature; level 3, of layer3, is added by `inter_head`.
    """

    queue: Tensor
    queue_ptr: Tensor
    queue_l3: Tensor

    def __init__(
        self, encoder: Encoder, dim: int = 128, k: int = 65536, m: float = 0.999, inter_head: str | None = None
    ):
        """Args: dim, length of an embedding; k, columns of a queue; m, momentum; inter_head, `mlp`, `stage`, None."""
        super().__init__()
        self.k, self.m = k, m
        encoder.fc = mlp_head(encoder.num_features, dim)
        self.register_buffer("queue", F.normalize(torch.randn(dim, k), dim=0))  # [D, K]
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._place = Pointer()
        if inter_head:  # last, so that everything above starts from the same numbers with and without it
            encoder.add_level3(inter_head, dim)
            self.register_buffer("queue_l3", F.normalize(torch.randn(dim, k), dim=0))
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)

    @property
    def queues(self) -> list[Tensor]:
        """[D, K] of each level, level 4 first."""
        return [self.queue, self.queue_l3] if hasattr(self, "queue_l3") else [self.queue]

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """One forward pass of the query encoder for each view, with batch statistics of its own.

        Args:
            views: images [B, 3, H, W] each; sizes may differ.

        Returns: for each level unit embeddings [G, B, D], float32.
        """
        passes = [self.encoder_q.levels(view) for view in views]
        return [torch.stack([F.normalize(z.float(), dim=1) for z in level]) for level in zip(*passes, strict=True)]

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, parameters only: batch-norm statistics come from own passes.

        The release does this between the query passes and the key passes, before the optimiser's step.
        """
        own: list[Tensor] = list(self.encoder_k.parameters())
        query: list[Tensor] = list(self.encoder_q.parameters())
        torch._foreach_mul_(own, self.m)
        torch._foreach_add_(own, query, alpha=1 - self.m)

    @torch.no_grad()
    def embed_keys(self, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Unit keys [B, D] of each level, float32, from images dealt anew over all processes (shuffled batch norm).

        Args:
            x: [B, 3, H, W]; generator: in the same state on every process.
        """
        x, order = distributed.shuffle(x, generator)
        return [distributed.unshuffle(F.normalize(z.float(), dim=1), order) for z in self.encoder_k.levels(x)]

    def check_batch(self, global_batch: int) -> None:
        """UserError unless the queue takes a whole number of batches."""
        if self.k % global_batch:
            better = max(1, self.k // global_batch) * global_batch
            raise UserError(
                f"--moco_k {self.k} does not divide by the global batch of {global_batch}; take --moco_k {better}"
            )

    @torch.no_grad()
    def enqueue(self, keys: list[Tensor]) -> None:
        """Replace the oldest columns by this step's keys [B, D] of each level, of all processes in rank order.

        Call after the backward pass. Only keys of the anchors (k_q) belong here.
        """
        start = self._place.read(self.queue_ptr)
        for queue, own in zip(self.queues, keys, strict=True):
            everyone = distributed.gather(own)  # [world * B, D]
            queue[:, start : start + len(everyone)] = everyone.T
        self._place.write(self.queue_ptr, (start + len(everyone)) % self.k)

    @torch.no_grad()
    def share_norms(self) -> None:
        """Give every process the key encoder's batch-norm buffers of the first, before features are taken of it."""
        if distributed.world() > 1:
            for buffer in self.encoder_k.buffers():
                torch.distributed.broadcast(buffer, 0)
