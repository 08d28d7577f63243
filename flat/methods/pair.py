"""What every method shares: the encoder on images and on their transformed copies, and the decoder on both."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flat.aet import Decoder
from flat.backbone import Encoder

BN_MODES = ("concat", "two_pass", "split")


class OtherNorms(nn.Module):
    """A second set of running statistics for every batch norm of a network: what transformed images leave behind."""

    NAMES = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, network: nn.Module):
        super().__init__()
        for i, norm in enumerate(self._norms(network)):
            for name in self.NAMES:
                self.register_buffer(f"{name}_{i}", getattr(norm, name).clone())

    @staticmethod
    def _norms(network: nn.Module) -> list[nn.Module]:
        return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]

    @contextmanager
    def instead(self, network: nn.Module) -> Iterator[None]:
        """The network with these statistics for the block; forward passes in training mode update them."""
        own = [{name: getattr(norm, name) for name in self.NAMES} for norm in self._norms(network)]
        try:
            for i, norm in enumerate(self._norms(network)):
                for name in self.NAMES:
                    setattr(norm, name, getattr(self, f"{name}_{i}"))
            yield
        finally:
            for norm, mine in zip(self._norms(network), own):
                for name, value in mine.items():
                    setattr(norm, name, value)


class PairModel(nn.Module):
    """`feature` (the encoder) and, where there is a regulariser, `decoder`.

    bn: `concat` one pass over images and copies together, so that test-time statistics are those of training;
    `two_pass` one pass each, both updating the running statistics (AET); `split` two passes with statistics of their
    own, those of the plain images count at test time.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder | None = None, bn: str = "concat", pool: str = "flat"):
        super().__init__()
        self.feature, self.bn, self.pool = encoder, bn, pool
        self.decoder = decoder
        self.other = OtherNorms(encoder) if bn == "split" else None

    def _pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, s, s] -> features [B, D], and what the decoder reads: features, averaged or earlier maps."""
        maps = self.feature.penultimate(x)
        final, f = self.feature.finish(maps)
        if self.decoder is not None and self.decoder.kind == "block":
            return f, maps
        return f, final.mean((2, 3)) if self.pool == "gap" else f

    def encode(self, x: Tensor, x_t: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Features f [B, D] and f_t [B, D], and what the decoder reads of each; None without x_t."""
        if x_t is None:
            f, read = self._pass(x)
            return f, None, read, None
        if self.bn == "concat":
            f, read = self._pass(torch.cat([x, x_t]))  # 2B
            (f, f_t), (read, read_t) = f.chunk(2), read.chunk(2)
            return f, f_t, read, read_t
        f, read = self._pass(x)
        if self.other is None:
            f_t, read_t = self._pass(x_t)
        else:
            with self.other.instead(self.feature):
                f_t, read_t = self._pass(x_t)
        return f, f_t, read, read_t

    def decode(self, read: Tensor, read_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Estimated target [B, dim] and raw log-variance; in float32 whatever the encoder ran in."""
        assert self.decoder is not None
        if self.decoder.kind == "block":
            mu, raw = self.decoder(read, read_t)
            return mu.float(), None if raw is None else raw.float()
        with torch.autocast(read.device.type, enabled=False):
            return self.decoder(read.float(), read_t.float())
