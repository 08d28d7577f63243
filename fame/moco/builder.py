"""Query encoder, momentum key encoder and the queue of keys; both clips of a video are query in turn (release
moco/builder.py).
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError, distributed
from shared_utils.checkpoint import ReleaseKeys as ReleaseKeys
from shared_utils.ring import Pointer

QUEUE_ORDERS = ("release", "clean")


class MoCo(nn.Module):
    """encoder_q (trained), encoder_k (its momentum copy, never a gradient) and a queue of K keys of D numbers."""

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, encoder: nn.Module, dim: int = 128, k: int = 65536, m: float = 0.999, t: float = 0.1):
        """Args: encoder, clips -> [B, D]; dim, D; k, columns of the queue; m, momentum; t, temperature T."""
        super().__init__()
        self.k, self.m, self.t = k, m, t
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, k), dim=0))  # [D, K]
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._place = Pointer()

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """One forward pass of the query encoder for each view [B, 3, T, H, W] -> unit embeddings [B, D], float32."""
        return [F.normalize(self.encoder_q(view).float(), dim=1) for view in views]

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, parameters only, once a step: batch norm's buffers come from own
        passes in train mode.
        """
        own: list[Tensor] = list(self.encoder_k.parameters())
        query: list[Tensor] = list(self.encoder_q.parameters())
        torch._foreach_mul_(own, self.m)
        torch._foreach_add_(own, query, alpha=1 - self.m)

    @torch.no_grad()
    def embed_keys(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Unit keys [B, D], float32, of clips dealt anew over all processes (shuffled batch norm) and put back.

        Args:
            x: [B, 3, T, H, W]; generator: in the same state on every process.
        """
        x, order = distributed.shuffle(x, generator)
        return distributed.unshuffle(F.normalize(self.encoder_k(x).float(), dim=1), order)

    def check_batch(self, global_batch: int) -> None:
        """UserError unless the queue takes a whole number of batches, and the two of a step at once."""
        if self.k % global_batch or self.k < 2 * global_batch:
            better = max(2, self.k // global_batch) * global_batch
            raise UserError(
                f"--moco_k {self.k} must be a multiple of the global batch of {global_batch}, twice at least, because "
                f"each step enqueues two batches of keys; take --moco_k {better}"
            )

    def columns(self, count: int, batch: int = 0) -> Tensor:
        """Indices of the columns that batch number `batch` of this step's keys, `count` of them, is going to fill."""
        first = self._place.read(self.queue_ptr) + batch * count
        return torch.arange(first, first + count, device=self.queue.device) % self.k

    @torch.no_grad()
    def enqueue(self, batches: list[Tensor]) -> None:
        """Replace the oldest columns by keys [B, D] of all processes, one batch after the other. After backward."""
        for keys in batches:
            everything = distributed.gather(keys)
            at = self.columns(len(everything))
            self.queue[:, at] = everything.T.to(self.queue.dtype)
            self._place.write(self.queue_ptr, (self._place.read(self.queue_ptr) + len(everything)) % self.k)


def negative_logits(q: Tensor, model: MoCo, fresh: Tensor | None = None) -> Tensor:
    """q . Queue / T [B, K], with the keys `fresh` [global B, D] already in the place of the oldest columns."""
    logits = q @ model.queue
    if fresh is not None:
        logits = logits.index_copy(1, model.columns(len(fresh)), q @ fresh.T)
    return logits / model.t


def passes(
    model: MoCo, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, queue_order: str = "release"
) -> list[tuple[Tensor, Tensor]]:
    """(positive [B], negatives [B, K]) logits of pass 1 (q0 against k1) and of pass 2 (q1 against k0).

    `release`: pass 2 sees a queue that holds pass 1's keys, so a clip's own key k1 is among the negatives of q1.
    `clean`: both see the queue as it was before the step. Embeddings are unit rows [B, D].
    """
    fresh = distributed.gather(k1) if queue_order == "release" else None
    return [
        ((q0 * k1).sum(1) / model.t, negative_logits(q0, model)),
        ((q1 * k0).sum(1) / model.t, negative_logits(q1, model, fresh)),
    ]


def info_nce(positive: Tensor, negatives: Tensor) -> Tensor:
    """-log softmax of the positive [B] among itself and the negatives [B, K]; mean over the batch.

    The softmax runs over the K + 1 logits without a copy of them.
    """
    return (torch.logaddexp(positive, negatives.logsumexp(1)) - positive).mean()


@torch.no_grad()
def contrast_rank(logits: list[tuple[Tensor, Tensor]]) -> Tensor:
    """How many negatives beat the positive, [B], by the average of both passes' logits, as the release logs it."""
    positive = torch.stack([p for p, _ in logits]).mean(0)
    negatives = torch.stack([n for _, n in logits]).mean(0)
    return (negatives > positive[:, None]).sum(1)
