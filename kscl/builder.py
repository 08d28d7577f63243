"""Query encoder, momentum key encoder, and the queue of subspaces (MoCo v2 with K key views an image)."""

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kscl.arch import Encoder, mlp_head
from kscl.subspace import RankRule, Subspaces, configure
from shared_utils import UserError, checkpoint, distributed
from shared_utils.layout import follow
from shared_utils.ring import Pointer

Deals = Sequence[torch.Generator]


class KSCL(nn.Module):
    """encoder_q (trained), encoder_k (its momentum copy, never a gradient), and the bases of M past images.

    With one shot and room for rank 1 this is MoCo v2; `queue` is then MoCo's queue with a leading axis of 1.
    """

    queue: Tensor
    queue_rank: Tensor
    queue_ptr: Tensor

    def __init__(
        self, encoder: Encoder, rule: RankRule, dim: int = 128, k: int = 65536, m: float = 0.999, center: bool = False
    ):
        """Args: dim, D, length of an embedding; k, M, subspaces in the queue; m, momentum; center, see `subspaces`."""
        super().__init__()
        self.k, self.m, self.rule, self.center = k, m, rule, center
        encoder.fc = mlp_head(encoder.num_features, dim)
        first = F.normalize(torch.randn(dim, k), dim=0)  # [D, M], MoCo's start
        self.register_buffer("queue", F.pad(first[None], (0, 0, 0, 0, 0, rule.max_rank - 1)))  # [P, D, M]
        self.register_buffer("queue_rank", torch.ones(k, dtype=torch.int32))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._place = Pointer()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, im_q: Tensor, im_k: Tensor | None = None, deals: Deals = ()) -> tuple[Tensor, Tensor | None]:
        """Unit queries [N, D]; with `im_k` also the keys [N, D, K] of the query encoder, with gradient.

        Args:
            im_q: [N, 3, H, W]; im_k: [N, K, 3, H, W]; deals: see `embed_keys`.
        """
        q = F.normalize(self.encoder_q(im_q).float(), dim=1)
        return q, None if im_k is None else self._embed(self.encoder_q, im_k, deals)

    @torch.no_grad()
    def embed_keys(self, im_k: Tensor, deals: Deals) -> Tensor:
        """Unit keys [N, D, K] of the key encoder: a forward pass for each shot, dealt anew over all processes.

        K views of an image in one batch norm would tell the encoder which images belong together.

        Args:
            im_k: [N, K, 3, H, W]; deals: K generators, each in the same state on every process.
        """
        return self._embed(self.encoder_k, im_k, deals)

    def _embed(self, encoder: nn.Module, im_k: Tensor, deals: Deals) -> Tensor:
        keys = []
        for x, deal in zip(im_k.unbind(1), deals, strict=True):
            x, order = distributed.shuffle(follow(x, encoder), deal)
            everyone = distributed.gather_with_grad(F.normalize(encoder(x).float(), dim=1))  # [world * N, D]
            keys.append(everyone[torch.argsort(order).view(distributed.world(), -1)[distributed.rank()]])
        return torch.stack(keys, 2)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, once a step whatever K is; parameters only.

        Batch-norm statistics of the key encoder come from its own passes.
        """
        own: list[Tensor] = list(self.encoder_k.parameters())
        query: list[Tensor] = list(self.encoder_q.parameters())
        torch._foreach_mul_(own, self.m)
        torch._foreach_add_(own, query, alpha=1 - self.m)

    def subspaces(self, Z: Tensor) -> tuple[Subspaces, Tensor]:
        """Those of keys [N, D, K], and the keys that they are made of: Z, or Z - its mean over K where `center` is set.

        The mean direction carries most of what tells images apart, so centring is there for comparison only.
        """
        Z = Z - Z.mean(2, keepdim=True) if self.center else Z
        return configure(Z, self.rule), Z

    @torch.no_grad()
    def enqueue(self, own: Subspaces) -> None:
        """Replace the oldest subspaces by this step's, of all processes in rank order. Call after the backward pass."""
        U, rank = distributed.gather(own.U), distributed.gather(own.rank)  # [world * N, D, P]
        start = self._place.read(self.queue_ptr)
        self.queue[:, :, start : start + len(U)] = U.permute(2, 1, 0)
        self.queue_rank[start : start + len(U)] = rank.to(self.queue_rank.dtype)
        self._place.write(self.queue_ptr, (start + len(U)) % self.k)

    def check_batch(self, global_batch: int) -> None:
        """UserError unless the queue takes a whole number of batches."""
        if self.k % global_batch:
            better = max(1, self.k // global_batch) * global_batch
            raise UserError(
                f"--moco_k {self.k} does not divide by the global batch of {global_batch}; take --moco_k {better}"
            )


class ReleaseKeys(checkpoint.ReleaseKeys):
    """The checkpoint's `state_dict` under MoCo's names: `module.encoder_q.*`, ..., `module.queue_ptr`."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Also of a MoCo v2 checkpoint: its queue [D, M] holds subspaces of rank 1."""
        queue = state.get("module.queue", state.get("queue"))
        if queue is not None and queue.ndim == 2:
            bases = F.pad(queue[None], (0, 0, 0, 0, 0, self.model.state_dict()["queue"].shape[0] - 1))  # [P, D, M]
            rank = torch.ones_like(bases[0, 0], dtype=torch.int32)
            state = {key.removeprefix("module."): value for key, value in state.items()}
            state = {**state, "queue": bases, "queue_rank": rank}
        super().load_state_dict(state)
