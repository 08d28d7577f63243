"""Query encoder with two heads, its momentum copy, the queue with pseudo-labels, and the class prototypes (2.2)."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import distributed
from sscl.arch import Encoder
from sscl.calibration import Alignment
from sscl.losses import UNKNOWN, Chosen, Memory, choose


def interleave(parts: Sequence[Tensor], splits: int) -> Tensor:
    """[n_1, ...], [n_2, ...], ... -> [n_1 + n_2 + ..., ...] as `splits` shares that each hold their part of every one.

    With split batch norm each share then has the statistics that a process of its own would have (FixMatch's
    interleaving, for several processes in one).
    """
    shares = zip(*(part.chunk(splits) for part in parts))
    return torch.cat([piece for share in shares for piece in share])


def deinterleave(x: Tensor, sizes: Sequence[int], splits: int) -> list[Tensor]:
    """Undo `interleave` on outputs [n_1 + n_2 + ..., ...]."""
    pieces = x.split([size // splits for _ in range(splits) for size in sizes])
    return [torch.cat(pieces[i :: len(sizes)]) for i in range(len(sizes))]


class SsCL(nn.Module):
    """encoder_q (trained), encoder_k (its momentum copy, never a gradient), queue, prototypes, alignment.

    The queue holds of each of its K entries the key, pseudo-label (-1: none), confidence, class probabilities (where
    kept), image number and whether the label is a true one.
    """

    queue: Tensor
    queue_label: Tensor
    queue_conf: Tensor
    queue_prob: Tensor
    queue_index: Tensor
    queue_labelled: Tensor
    queue_ptr: Tensor
    prototypes: Tensor
    proto_epoch: Tensor
    proto_least: Tensor

    def __init__(
        self, encoder: Encoder, alignment: Alignment, k: int = 65536, m: float = 0.999, keep_probs: bool = True,
        splits: int = 1,
    ):  # fmt: skip
        """Args: k, places of the queue; m, momentum; keep_probs, class probabilities in the queue; splits, shares of a
        batch with batch-norm statistics of their own."""
        super().__init__()
        dim, classes = encoder.dim, encoder.classes
        self.k, self.m, self.splits = k, m, splits
        self.register_buffer("queue", F.normalize(torch.randn(dim, k), dim=0))  # [D, K]
        self.register_buffer("queue_label", torch.full((k,), UNKNOWN))
        self.register_buffer("queue_conf", torch.zeros(k, dtype=torch.bool))
        self.register_buffer("queue_prob", torch.zeros(k, classes if keep_probs else 0))
        self.register_buffer("queue_index", torch.full((k,), -1))
        self.register_buffer("queue_labelled", torch.zeros(k, dtype=torch.bool))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("prototypes", F.normalize(torch.randn(classes, dim), dim=1))  # mu [C, D]
        self.register_buffer("proto_epoch", torch.full((1,), -1))  # of the last refresh
        self.register_buffer("proto_least", torch.zeros(1, dtype=torch.long))  # images of the smallest class's mean
        self.alignment = alignment
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, views: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """One pass of the query encoder over several batches of images [n, 3, H, W] that share batch-norm statistics.

        Returns: logits [n, C] and unit embeddings [n, D] of each.
        """
        sizes = [len(view) for view in views]
        both = self.encoder_q(interleave(views, self.splits))
        return list(zip(*(deinterleave(out, sizes, self.splits) for out in both)))

    @torch.no_grad()
    def predict(self, weak: Tensor) -> Tensor:
        """p = softmax(h(f(w(u)))), eq. (2), of weak views [n, 3, H, W], no gradient: [n, C] float32."""
        return F.softmax(self.encoder_q.logits(weak), dim=1)

    @torch.no_grad()
    def update_key_encoder(self, statistics: bool = False) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, parameters only: batch-norm statistics come from own passes.

        `statistics` copies those of the query encoder, for arms in which the key encoder makes no pass.
        """
        own: list[Tensor] = list(self.encoder_k.parameters())
        query: list[Tensor] = list(self.encoder_q.parameters())
        torch._foreach_mul_(own, self.m)
        torch._foreach_add_(own, query, alpha=1 - self.m)
        if statistics:
            for kept, new in zip(self.encoder_k.buffers(), self.encoder_q.buffers()):
                kept.copy_(new)

    @torch.no_grad()
    def embed_keys(self, views: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Unit keys [n, D] of each of the batches, from images dealt anew over all processes (shuffled batch norm).

        Args:
            generator: in the same state on every process.
        """
        sizes = [len(view) for view in views]
        x, order = distributed.shuffle(interleave(views, self.splits), generator)
        return deinterleave(distributed.unshuffle(self.encoder_k.embed(x), order), sizes, self.splits)

    @property
    def memory(self) -> Memory:
        return Memory(self.queue_label, self.queue_conf, self.queue_prob, self.queue_index)

    def nearest(self, who: Memory, key: Tensor, num_pos: int, sim: str) -> Chosen:
        """Positives and negatives by pseudo-label of the anchors `who` [N] with own keys [N, D], ranked by `sim`."""
        return choose(who, self.memory, num_pos, None if sim == "prob" else key @ self.queue)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, entries: Memory, labelled: bool) -> None:
        """Replace the oldest entries by n new ones of every process, in rank order; keys [n, D].

        Call after the losses have seen the queue as it was. Everything of an entry moves together.
        """
        keys = distributed.gather(keys)  # [world * n, D]
        places = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % self.k  # no wait for the device
        self.queue[:, places] = keys.T
        self.queue_label[places] = distributed.gather(entries.label)
        self.queue_conf[places] = distributed.gather(entries.conf)
        self.queue_prob[places] = distributed.gather(entries.prob[:, : self.queue_prob.shape[1]])
        self.queue_index[places] = distributed.gather(entries.image)
        self.queue_labelled[places] = labelled
        self.queue_ptr.add_(len(keys)).remainder_(self.k)

    @torch.no_grad()
    def share(self) -> None:
        """The mean over processes of the key encoder's batch-norm statistics, before features are taken; process 0's
        prototypes on every process."""
        if distributed.world() > 1:
            for buffer in self.encoder_k.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(distributed.all_sum(buffer) / distributed.world())
            torch.distributed.broadcast(self.prototypes, 0)
