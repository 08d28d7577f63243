"""Student, teacher and queue of BINGO (paper 2107.01691, release moco/builder.py), and MoCo v2 for teachers of our own.

State-dict keys are the release's: `encoder_q.*`, `encoder_k.*`, `queue` [dim, K], `queue_ptr` [1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError, distributed
from shared_utils.checkpoint import ReleaseKeys as ReleaseKeys
from shared_utils.ring import Pointer


class Queue(nn.Module):
    """The FIFO queue of negatives and the two encoders around it; `encoder_k` never has gradients."""

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, encoder_q: nn.Module, encoder_k: nn.Module, dim: int, size: int):
        super().__init__()
        self.encoder_q, self.encoder_k = encoder_q, encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._place = Pointer()

    def check_batch(self, batch_size: int) -> None:
        """UserError unless whole batches fill the queue."""
        if self.queue.shape[1] % batch_size:
            raise UserError(
                f"--moco_k {self.queue.shape[1]} is no multiple of --batch_size {batch_size}; "
                f"try --moco_k {-(-self.queue.shape[1] // batch_size) * batch_size}"
            )

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest columns by the keys [N, dim] of all processes, in rank order.

        To be called after the backward pass: until then the queue belongs to the graph.
        """
        keys = distributed.gather(keys)
        start = self._place.read(self.queue_ptr)
        self.queue[:, start : start + len(keys)] = keys.T.to(self.queue.dtype)
        self._place.write(self.queue_ptr, (start + len(keys)) % self.queue.shape[1])

    @torch.no_grad()
    def embed_keys(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised keys [N, dim] of images [N, 3, H, W].

        With a generator (in the same state on all processes) the images are dealt anew over processes and batch-norm
        splits first and the keys put back (shuffle-BN); it only matters while `encoder_k` uses batch statistics.
        """
        if generator is None:
            return F.normalize(self.encoder_k(images).float(), dim=1)
        images, order = distributed.shuffle(images, generator)
        return distributed.unshuffle(F.normalize(self.encoder_k(images).float(), dim=1), order)


class BINGO(Queue):
    """A student `encoder_q` beside a frozen teacher `encoder_k`.

    Args:
        teacher_bn: `eval` (running statistics) or `train` (batch statistics of the shuffled batch, as in the release).
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, dim: int, size: int = 65536, teacher_bn: str = "eval"):
        super().__init__(student, teacher, dim, size)
        self.teacher_bn = teacher_bn

    def train(self, mode: bool = True) -> "BINGO":
        super().train(mode)
        self.encoder_k.train(mode and self.teacher_bn == "train")
        return self


class MoCo(Queue):
    """MoCo v2: `encoder_k` starts as a copy of `encoder_q` and follows it with momentum m."""

    def __init__(self, encoder_q: nn.Module, encoder_k: nn.Module, dim: int, size: int = 65536, m: float = 0.999):
        super().__init__(encoder_q, encoder_k, dim, size)
        self.m = m
        encoder_k.load_state_dict(encoder_q.state_dict())

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """theta_k = m theta_k + (1 - m) theta_q; parameters only, batch-norm statistics are each encoder's own."""
        params_k: list[Tensor] = list(self.encoder_k.parameters())
        params_q: list[Tensor] = list(self.encoder_q.parameters())
        torch._foreach_lerp_(params_k, params_q, 1 - self.m)
