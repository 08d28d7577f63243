"""The frozen image encoder: a ViT with DINO's names and position table, and the keys and attention of its last block.

The transformer blocks are timm's. The size of the network is read off the weights: DINO's ViTs all have 64 numbers a
head, so width, depth, patch and position table tell everything.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from shared_utils import UserError, checkpoint
from uvos_dino import weights

HEAD_DIM = 64  # of DINO's ViT-T, S and B alike
NORM_EPS = 1e-6
# name -> (embed_dim, depth); the first three are DINO's, the last two are for small data
ARCHS = {
    "vit_tiny": (192, 12),
    "vit_small": (384, 12),
    "vit_base": (768, 12),
    "vit_mini": (128, 4),
    "vit_little": (192, 6),
}


class Features(NamedTuple):
    """What the encoder gives for images [B, 3, H, W], h = H / patch, w = W / patch, N = h w."""

    x: Tensor  # [B, C, h, w] patch tokens after the last block, without the final norm
    cls: Tensor  # [B, C] class token after the last block, without the final norm
    attn: Tensor  # [B, heads, 1 + N, 1 + N] attention of the last block
    k: Tensor  # [B, C, h, w] keys of the last block, heads side by side


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)


class VisionTransformer(nn.Module):
    """DINO's ViT (facebookresearch/dino; release file src/model/vision_transformer.py), with its state_dict keys.

    Args:
        patch_size, embed_dim, depth: the architecture; there are embed_dim / 64 heads.
        img_size: pixels of the square that the position table was learned on.
        drop_path: stochastic depth of the last block, rising linearly from 0; off in eval mode.
    """

    def __init__(
        self,
        patch_size: int = 8,
        embed_dim: int = 384,
        depth: int = 12,
        img_size: int = 224,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.patch_size, self.embed_dim, self.depth = patch_size, embed_dim, depth
        self.num_heads = embed_dim // HEAD_DIM
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        self.blocks = nn.ModuleList(
            Block(embed_dim, self.num_heads, 4.0, qkv_bias=True, drop_path=rate, norm_layer=norm)  # type: ignore[arg-type]
            for rate in rates
        )
        self.norm = norm(embed_dim)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.apply(_init)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (h, w) of an image; UserError when its sides are no multiples of the patch."""
        p = self.patch_size
        if height % p or width % p or not height or not width:
            near = " ".join(str(max(1, round(side / p)) * p) for side in (height, width))
            raise UserError(
                f"resolution {height} {width}: both must be multiples of the encoder's patch, {p}, such as {near}"
            )
        return height // p, width // p

    def positions(self, h: int, w: int) -> Tensor:
        """Position table [1, 1 + h w, C], bicubic from the learned square one.

        DINO passes scale factors that are .1 patch too large, against a rounding error; they also move the sampling
        points, so the trained weights expect them (facebookresearch/dino issue 8).
        """
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if h == w == side:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = ((h + 0.1) / side, (w + 0.1) / side)
        table = F.interpolate(table, scale_factor=factors, mode="bicubic")  # [1, C, h, w]
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], 1)

    def tokens(self, images: Tensor) -> tuple[Tensor, int, int]:
        """Images [B, 3, H, W] -> the last block's input [B, 1 + h w, C], h, w."""
        h, w = self.grid(*images.shape[-2:])
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)  # [B, h w, C]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions(h, w)
        for block in self.blocks[:-1]:
            x = block(x)
        return x, h, w

    def last_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, 1 + N, 64] of the last block for its input [B, 1 + N, C]."""
        last: Any = self.blocks[-1]
        qkv = last.attn.qkv(last.norm1(x)).unflatten(-1, (3, self.num_heads, HEAD_DIM))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the last block: its input [B, n, C] and the attended values [B, heads, n, 64] -> [B, n, C]."""
        last: Any = self.blocks[-1]
        x = x + last.drop_path1(last.attn.proj(mixed.transpose(1, 2).flatten(2)))
        return x + last.drop_path2(last.mlp(last.norm2(x)))

    def keys(self, images: Tensor) -> Tensor:
        """Keys of the last block [B, C, h, w] alone: its attention and MLP are not computed."""
        x, h, w = self.tokens(images)
        return self._map(self.last_qkv(x)[1], h, w)

    def keys_and_cls(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, C, h, w] and the class token after the last block [B, C]; the last block runs for that alone."""
        x, h, w = self.tokens(images)
        q, k, v = self.last_qkv(x)
        mixed = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        return self._map(k, h, w), self.finish(x[:, :1], mixed)[:, 0]

    def _map(self, k: Tensor, h: int, w: int) -> Tensor:
        k = k[:, :, 1:].transpose(1, 2).flatten(2)  # [B, N, C]: without the class token, heads side by side
        return k.transpose(1, 2).unflatten(2, (h, w))

    def forward(self, images: Tensor) -> Features:
        """Everything that the release's encoder returns, in its order."""
        x, h, w = self.tokens(images)
        q, k, v = self.last_qkv(x)
        attn = (q @ k.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(-1)  # [B, heads, 1 + N, 1 + N]
        x = self.finish(x, attn @ v)
        return Features(x[:, 1:].transpose(1, 2).unflatten(2, (h, w)), x[:, 0], attn, self._map(k, h, w))

    def embed(self, images: Tensor) -> Tensor:
        """Class token after the final norm [B, C]: what DINO's head sees."""
        x, _, _ = self.tokens(images)
        return self.norm(self.blocks[-1](x))[:, 0]


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build(arch: str, patch_size: int, img_size: int = 224, drop_path: float = 0.0) -> VisionTransformer:
    """A network of a known size with random weights."""
    embed_dim, depth = ARCHS[arch]
    return VisionTransformer(patch_size, embed_dim, depth, img_size, drop_path)


def for_weights(state: Mapping[str, Tensor], source: str) -> VisionTransformer:
    """The network that a DINO state_dict belongs to, not loaded yet. UserError naming `source` for other files."""
    need = ("cls_token", "pos_embed", "patch_embed.proj.weight")
    absent = [key for key in need if key not in state]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if absent or not depth:
        raise UserError(
            f"{source}: not a DINO ViT ({absent[0] if absent else 'blocks.0'} is missing); give its backbone-only "
            "file, its full checkpoint, or a run of uvos_dino.main_dino"
        )
    patch = state["patch_embed.proj.weight"].shape[-1]
    dim, table = state["cls_token"].shape[-1], state["pos_embed"].shape[1] - 1
    if dim % HEAD_DIM or math.isqrt(table) ** 2 != table:
        raise UserError(f"{source}: width {dim} and {table} positions; expected multiples of {HEAD_DIM} and a square")
    return VisionTransformer(patch, dim, depth, math.isqrt(table) * patch)


def load(source: str, arch: str, patch_size: int, flag: str = "--dino_path") -> tuple[VisionTransformer, str]:
    """The encoder of `--dino_path`, or of another flag, and a line that says what was loaded.

    Args:
        source: a file (DINO or DINOv2 backbone, DINO full checkpoint: its teacher, a run of main_dino, or its folder;
            FILE.onnx: an export of torch), `timm:NAME` for hub weights such as timm:vit_small_patch8_224.dino or
            timm:vit_small_patch14_dinov2.lvd142m, or `none`: random weights of `arch`.

    Raises:
        UserError: a file that is no DINO ViT or lacks a single tensor; nothing is left random in silence.
    """
    if source == "none":
        return build(arch, patch_size), f"{arch}, patch {patch_size}, RANDOM weights ({flag} none)"
    if source.startswith("timm:"):
        import timm

        try:
            state = dict(timm.create_model(source[5:], pretrained=True, num_classes=0).state_dict())
        except Exception as error:  # unknown name, or no network: timm and its hub raise many kinds
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{flag} {source}: timm cannot provide it ({reason}); give a local file") from None
    else:
        if (Path(source) / "checkpoint.pth").is_file():
            source = str(Path(source) / "checkpoint.pth")
        if not Path(source).is_file():
            raise UserError(
                f"{flag} {source}: no such file; give DINO's dino_deitsmall8_pretrain.pth or a run of "
                "uvos_dino/run_dino.sh, timm:vit_small_patch8_224.dino, or none for random weights"
            )
        try:
            state = weights.read_onnx(source) if source.endswith(".onnx") else checkpoint.read_weights(source)
        except UserError as error:
            raise UserError(f"{flag} {error}") from None
    others = weights.other_parts(state)
    try:
        state = weights.as_dino(state, source)
        encoder = for_weights(state, source)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    try:
        report = checkpoint.load_strict(encoder, state, drop=("head.*",))
    except UserError as error:
        raise UserError(f"{flag} {source}: {error}") from None
    what = f"width {encoder.embed_dim}, depth {encoder.depth}, patch {encoder.patch_size}"
    beside = f"; {len(others)} tensors of another part left out ({others[0]}, ...)" if others else ""
    return encoder, f"{source}: {what}; {report}{beside}"
