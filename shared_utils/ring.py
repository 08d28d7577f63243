"""The place in a ring buffer as a Python number, while checkpoints keep the tensor of the releases (`queue_ptr`)."""

import torch
from torch import Tensor


class Pointer:
    """The number in a buffer [1], read from the device once: reading waits for all that a GPU still has to do.

    Whatever else writes the buffer (a checkpoint, a move to another device) is seen, and it is read again.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._version = self._number = 0

    def read(self, buffer: Tensor) -> int:
        if buffer is not self._buffer or buffer._version != self._version:
            self._keep(buffer, int(buffer))
        return self._number

    @torch.no_grad()
    def write(self, buffer: Tensor, number: int) -> None:
        buffer.fill_(number)
        self._keep(buffer, number)

    def _keep(self, buffer: Tensor, number: int) -> None:
        self._buffer, self._version, self._number = buffer, buffer._version, number
