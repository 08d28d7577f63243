"""The model: a frozen DINO encoder and a spatio-temporal block over the keys of all frames of a clip."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uvos_dino.attention import Block
from uvos_dino.vision_transformer import VisionTransformer


class Out(NamedTuple):
    """T frames of N = h w patches."""

    z: Tensor  # [B, T, N, C] tokens after the block
    A: Tensor  # [B, T N, T N] attention, mean of the heads after dropout, without the class tokens


class AttEncoder(nn.Module):
    """Encoder and block under the release's names (`encoder.*`, `temporal_transformer.0.*`).

    Args:
        encoder: frozen here: no gradient, always in eval mode.
        num_t: blocks one after another. Training looks at the last one's attention, inference at the first one's, as
            released.
        num_heads, drop, attn_drop: of the blocks.
    """

    def __init__(
        self, encoder: VisionTransformer, num_t: int = 1, num_heads: int = 8, drop: float = 0.1, attn_drop: float = 0.4
    ):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        dim = encoder.embed_dim
        self.temporal_transformer = nn.ModuleList(Block(dim, num_heads, drop, attn_drop) for _ in range(num_t))
        self.train()

    def train(self, mode: bool = True) -> "AttEncoder":
        """The encoder stays in eval mode: its stochastic depth never acts."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, clip: Tensor) -> Tensor:
        """Normalised frames [B, T, 3, H, W] -> a clip's tokens [B, T, 1 + N, C]: class token after the last block, then
        the last block's keys. The two live in different spaces; the release joins them all the same.
        """
        k, cls = self.encoder.keys_and_cls(clip.flatten(0, 1))  # [B T, C, h, w], [B T, C]
        tokens = torch.cat([cls[:, None], k.flatten(2).transpose(1, 2)], 1)
        return tokens.unflatten(0, clip.shape[:2])

    def attend(self, tokens: Tensor) -> Out:
        """Tokens [B, T, 1 + N, C] of all frames attend to each other."""
        B, T, M, _ = tokens.shape
        x = tokens.flatten(1, 2)  # [B, T (1 + N), C]
        for block in self.temporal_transformer:
            x, a = block(x)  # a: [B, heads, T (1 + N), T (1 + N)]
        A = a.float().mean(1).view(B, T, M, T, M)[:, :, 1:, :, 1:].reshape(B, T * (M - 1), T * (M - 1))
        return Out(x.view(B, T, M, -1)[:, :, 1:].float(), A)

    def forward(self, clip: Tensor) -> Out:
        """Normalised frames [B, T, 3, H, W] -> Out."""
        return self.attend(self.encode(clip))

    def inference_heads(self, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """Keys of the encoder [T, N, C] -> queries and keys of the first block [T, heads, N, C / heads] and the scale.

        At inference the release has neither class tokens nor values, projection and MLP.
        """
        block: Any = self.temporal_transformer[0]
        q, key, _ = block.attn.heads(block.norm1(k))
        return q, key, block.attn.scale
