"""The masked autoencoder (MAE, arXiv 2111.06377), written anew; its parameters have the names of public MAE files.

Shapes: images [B, 3, H, H]; p: side of a patch; g = H / p; L = g * g patches; De, Dd: width of encoder and decoder.
"""

import argparse
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError, checkpoint
from shared_utils.init import HEADS


class Size(NamedTuple):
    """Side of a patch; (width, depth, heads) of encoder and decoder."""

    patch: int
    enc: tuple[int, int, int]
    dec: tuple[int, int, int]


SIZES = {
    "mae_mini_patch16": Size(16, (192, 12, 3), (192, 1, 3)),  # the augmentor's; widths are our choice
    "mae_small_patch16": Size(16, (384, 12, 6), (256, 2, 8)),
    "mae_base_patch16": Size(16, (768, 12, 12), (512, 8, 16)),  # base, large, huge: the public files
    "mae_large_patch16": Size(16, (1024, 24, 16), (512, 8, 16)),
    "mae_huge_patch14": Size(14, (1280, 32, 16), (512, 8, 16)),
    "mae_tiny_patch8": Size(8, (96, 4, 3), (96, 1, 3)),  # small and mini tier: 48 pixels
    "mae_tiny_patch4": Size(4, (96, 4, 3), (96, 1, 3)),  # 32 pixels
}
LICENCE = "public MAE weights are CC BY-NC 4.0 (facebookresearch/mae): no commercial use"


# --------------------------------------------------------------------------------------------------- patches and masks
def patchify(x: Tensor, p: int) -> Tensor:
    """[B, 3, H, H] -> [B, L, p * p * 3]; inside a token the channel is the fastest axis."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)  # [B, g, g, p_row, p_col, 3]
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(t: Tensor, p: int) -> Tensor:
    """The inverse of `patchify`: [B, L, p * p * 3] -> [B, 3, g * p, g * p], channels last in memory too."""
    b, n, d = t.shape
    g = math.isqrt(n)
    t = t.reshape(b, g, g, p, p, d // (p * p)).transpose(2, 3)  # [B, g, p_row, g, p_col, 3]
    return t.reshape(b, g * p, g * p, d // (p * p)).permute(0, 3, 1, 2)


def wide(t: Tensor) -> Tensor:
    """At least float32: what autocast narrowed is wide again, float64 stays."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def len_keep(patches: int, ratio: float) -> int:
    """Visible patches, MAE's own rule: int(L * (1 - r)) in binary floating point (L = 100, r = .9 leaves 9)."""
    return int(patches * (1 - ratio))


def mask_from_scores(x: Tensor, scores: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the int(L * (1 - r)) patches with the largest scores.

    Args:
        x: tokens [B, L, D], positions already added.
        scores: [B, L]: attention; or -U(0, 1) noise, which is MAE's random masking. Equal scores: the first one wins.

    Returns:
        visible tokens [B, k, D]; mask [B, L], 1 erased and 0 kept; ids_restore [B, L] back to the image's order.
    """
    b, n, d = x.shape
    keep = len_keep(n, ratio)
    ids_shuffle = torch.argsort(scores, dim=1, descending=True, stable=True)
    places = torch.arange(n, device=x.device).expand(b, n)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, places)  # the inverse permutation
    visible = torch.gather(x, 1, ids_shuffle[:, :keep, None].expand(-1, -1, d))
    mask = (ids_restore >= keep).to(torch.float32)
    return visible, mask, ids_restore


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Fixed positions [g * g + 1, D]: first half of the channels by column, second half by row; row 0 (class) is 0."""
    if dim % 4:
        raise UserError(f"width {dim}: 2-D sin-cos positions need a multiple of 4")
    omega = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    row, column = np.divmod(np.arange(grid * grid, dtype=np.float64), grid)
    angles = [np.outer(q, omega) for q in (column, row)]  # [L, D / 4] each
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), table])).float()


# ------------------------------------------------------------------------------------------------------- the network
class PatchEmbed(nn.Module):
    def __init__(self, p: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, p, p)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, D, g, g] -> [B, L, D]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> q, k, v as [3, B, heads, T, D / heads]."""
        b, t, d = x.shape
        return self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def class_weights(self, x: Tensor) -> Tensor:
        """Attention of the class token to the patches [B, T - 1]: mean over the heads, sums to 1 over the patches."""
        q, k, _ = self.split(x).float()
        with torch.autocast(x.device.type, enabled=False):  # ranks, so not in bfloat16: see attention_scores
            logits = (q[:, :, :1] @ k.transpose(2, 3)).squeeze(2) * q.shape[-1] ** -0.5  # [B, heads, T]
        weights = logits.softmax(-1).mean(1)[:, 1:]
        return weights / weights.sum(1, keepdim=True)


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MAE(nn.Module):
    """Encoder E, decoder D and the loss on the erased patches.

    Raises:
        UserError: widths that the heads do not divide, an image that the patch does not divide.
    """

    def __init__(self, img_size: int, size: Size, norm_pix_loss: bool = False):
        super().__init__()
        p, (de, depth, heads), (dd, dec_depth, dec_heads) = size
        for width, h in ((de, heads), (dd, dec_heads)):
            if width < 1 or h < 1 or width % h:
                raise UserError(f"a width of {width} does not divide over {h} heads")
        if img_size % p or img_size < p:
            raise UserError(f"images of {img_size} pixels do not divide into patches of {p}")
        self.size, self.img_size = size, img_size
        self.norm_pix_loss: bool | None = norm_pix_loss  # None: a file that does not tell it, see `told_targets`
        self.p, self.grid = p, img_size // p
        self.patches = self.grid**2

        def table(dim: int) -> nn.Parameter:
            return nn.Parameter(sincos_positions(dim, self.grid)[None], requires_grad=False)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, de))
        self.pos_embed = table(de)
        self.patch_embed = PatchEmbed(p, de)
        self.blocks = nn.ModuleList(Block(de, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(de, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dd))
        self.decoder_embed = nn.Linear(de, dd)
        self.decoder_pos_embed = table(dd)
        self.decoder_blocks = nn.ModuleList(Block(dd, dec_heads) for _ in range(dec_depth))
        self.decoder_norm = nn.LayerNorm(dd, eps=1e-6)
        self.decoder_pred = nn.Linear(dd, p * p * 3)
        self.initialise()

    def initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(len(weight), -1))  # as the linear layer that it is; its bias stays
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens t_i [B, L, De] with their positions: added here, before anything is gathered."""
        return self.patch_embed(x) + self.pos_embed[:, 1:]

    def with_class(self, tokens: Tensor) -> Tensor:
        """[B, T, De] -> [B, 1 + T, De]: class token and its position first."""
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([first.to(tokens.dtype), tokens], 1)

    def encode(self, tokens: Tensor) -> Tensor:
        """E: any number of tokens [B, T, De] -> [B, 1 + T, De]."""
        x = self.with_class(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """D: latents [B, 1 + k, De] of the visible patches -> pixels y_hat [B, L, p * p * 3] of all of them."""
        x = self.decoder_embed(latent)  # [B, 1 + k, Dd]
        b, n = ids_restore.shape
        missing = self.mask_token.to(x.dtype).expand(b, n + 1 - x.shape[1], -1)
        full = torch.cat([x[:, 1:], missing], 1)  # [B, L, Dd], without the class token
        full = torch.gather(full, 1, ids_restore[:, :, None].expand(-1, -1, full.shape[2]))
        x = torch.cat([x[:, :1], full], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def target(self, x: Tensor) -> Tensor:
        """[B, L, p * p * 3]: pixels, each patch normalised by its own statistics with norm_pix_loss."""
        t = patchify(x, self.p)
        if self.norm_pix_loss:
            t = (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 1e-6).sqrt()
        return t

    def loss(self, x: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean over the erased patches of the squared error, a number."""
        error = (wide(pred) - self.target(wide(x))).square().mean(2)  # [B, L]
        return (error * mask).sum() / mask.sum()

    def forward(self, x: Tensor, noise: Tensor, ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, prediction [B, L, p * p * 3] and mask [B, L] of images x; noise U(0, 1) [B, L] chooses the patches."""
        visible, mask, ids_restore = mask_from_scores(self.embed(x), -noise, ratio)
        pred = self.decode(self.encode(visible), ids_restore)
        return self.loss(x, pred, mask), pred, mask


# ------------------------------------------------------------------------------------------------------ building, files
FLAGS = ("patch_size", "enc_dim", "enc_depth", "enc_heads", "dec_dim", "dec_depth", "dec_heads")


def resolve(name: str, own: Mapping[str, Any]) -> Size:
    """The size of the registry with the flags of `FLAGS` that are not None in its place. UserError: unknown name."""
    if name not in SIZES:
        raise UserError(f"--model {name}: unknown; choose from {', '.join(SIZES)}")
    p, enc, dec = SIZES[name]
    values = [default if own.get(flag) is None else int(own[flag]) for flag, default in zip(FLAGS, (p, *enc, *dec))]
    if min(values) < 1:
        raise UserError(f"{', '.join('--' + flag for flag in FLAGS)}: each must be at least 1")
    return Size(values[0], (values[1], values[2], values[3]), (values[4], values[5], values[6]))


def size_of(state: Mapping[str, Tensor], flags: Mapping[str, Any], heads: Sequence[int]) -> Size:
    """Size of the network that wrote `state`. Shapes tell all but the heads: `heads`, the flags, the registry do.

    UserError: an encoder-only file, and heads that nothing tells.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "mask_token", "decoder_embed.weight",
              "decoder_pos_embed", "decoder_norm.weight", "decoder_pred.weight")  # fmt: skip
    absent = [key for key in needed if key not in state]
    if absent:
        take = "take mae_visualize_vit_*.pth or a run of mra.main_pretrain"
        if "patch_embed.proj.weight" in absent and "pos_embed" in absent:
            raise UserError(f"weights of another network, no masked autoencoder: {take}")
        only = f" (an encoder-only file, of no use here: {take})"
        raise UserError(f"no {absent[0]}" + (only if any("decoder" in key for key in absent) else ""))
    p = state["patch_embed.proj.weight"].shape[-1]
    de, dd = state["cls_token"].shape[2], state["mask_token"].shape[2]
    depth, dec_depth = (
        1 + max((int(key.split(".")[1]) for key in state if key.startswith(prefix)), default=-1)
        for prefix in ("blocks.", "decoder_blocks.")
    )
    known = next((s for s in SIZES.values() if (s.enc[:2], s.dec[:2]) == ((de, depth), (dd, dec_depth))), None)
    known = SIZES.get(str(flags.get("model")), known)  # a run of ours: what its flags leave out is its --model's
    told: tuple[Any, ...] = (flags.get("enc_heads"), flags.get("dec_heads"))
    if any(heads):
        told = (heads[0], heads[1])
    elif known is not None:  # each apart: a run may have set one of them alone
        told = tuple(own or size for own, size in zip(told, (known.enc[2], known.dec[2])))
    if None in told or not all(told):
        raise UserError(f"width {de} / {dd}, depth {depth} / {dec_depth} is not in the registry: give --mae_heads")
    return Size(p, (de, depth, int(told[0])), (dd, dec_depth, int(told[1])))


def soft_images(count: int, size: int) -> Tensor:
    """Colours that change slowly over each image [count, 3, size, size], in the range of normalised photos."""
    generator = torch.Generator().manual_seed(0)
    k = torch.arange(3.0)[:, None]  # half periods along a side
    waves = torch.cos(math.pi * k * (torch.arange(size) + 0.5) / size)  # [3, size]
    shared, own = (torch.randn(count, c, 3, 3, generator=generator) / (1 + k + k.T) for c in (1, 3))
    return torch.einsum("nckl,ky,lx->ncyx", shared + own, waves, waves).clamp(-2, 2)


@torch.no_grad()
def told_targets(mae: MAE) -> bool | None:
    """Whether the network paints normalised patches (True) or pixels (False), by what it makes of soft images.

    Pixels of an erased patch follow from its neighbours', so a network of either kind explains its own targets and not
    the other's; and normalised patches have mean 0, whatever the colour. None: it explains neither (not trained).
    """
    x = soft_images(4, mae.img_size)
    noise = torch.rand(len(x), mae.patches, generator=torch.Generator().manual_seed(0))
    _, pred, mask = mae(x, noise, 0.75)
    pixels, pred = patchify(x, mae.p)[mask > 0], pred[mask > 0]  # [E, p * p * 3]
    mean = pixels.mean(1)
    normed = (pixels - mean[:, None]) / (pixels.var(1, keepdim=True) + 1e-6).sqrt()
    pixel_share, normed_share = (float(1 - (pred - t).square().sum() / t.square().sum()) for t in (pixels, normed))
    slope = float((pred.mean(1) @ mean) / (mean @ mean))
    if pixel_share > 0.5 and slope > 0.5:
        return False
    return True if normed_share > 0.15 and abs(slope) < 0.1 else None


def same_table(table: Tensor, fixed: Tensor) -> bool:
    """Whether `table` is the fixed one, as it is or as half precision rounded it (bfloat16: by up to 2^-9)."""
    return table.shape == fixed.shape and torch.allclose(table.float(), fixed, rtol=0, atol=2**-9 + 1e-4)


def _on_grid(mae: MAE, grid: int) -> MAE:
    """A copy of the network for images of `grid` x `grid` patches."""
    with torch.random.fork_rng(devices=[]):
        other = MAE(grid * mae.p, mae.size)
    tables = {key: getattr(other, key).detach() for key in ("pos_embed", "decoder_pos_embed")}
    checkpoint.load_strict(other, mae.state_dict() | tables)
    return other.requires_grad_(False).eval()


class Loaded(NamedTuple):
    mae: MAE
    report: str  # one line for the preflight
    md5: str  # of the file
    norm_pix: bool | None  # None: not known


def run_file(path: str | Path) -> Path:
    """The checkpoint that `path` names, a file or the folder of a run."""
    return Path(path) / "checkpoint.pth" if Path(path).is_dir() else Path(path)


def fixed_positions(state: dict[str, Tensor], mae: MAE) -> int:
    """Put the positions of `mae` in the place of those of `state`; returns the side of the grid that it was trained on.

    UserError: positions that are not the fixed table, so another network's.
    """
    own = math.isqrt(state["pos_embed"].shape[1] - 1)
    for key in ("pos_embed", "decoder_pos_embed"):
        if key in state:
            if not same_table(state[key], sincos_positions(state[key].shape[2], own)[None]):
                raise UserError(f"{key} is not the fixed sin-cos table of {own} x {own} patches")
            state[key] = getattr(mae, key).detach()
    return own


def start(mae: MAE, spec: str) -> str:
    """Weights of --init for pretraining, of any grid: encoder and decoder, or the encoder alone with a new decoder.

    Args:
        spec: an MAE file (of its release, or timm's), the folder of a run, or timm:NAME.

    Returns: a line for the preflight.

    Raises:
        UserError: no such file or name, learned positions (DINO, DeiT), weights of another --model; nothing is loaded.
    """
    path = run_file(spec)
    if spec.startswith("timm:"):
        import timm

        try:
            state = timm.create_model(spec[5:], pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # whatever hub or network raise
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"--init {spec}: timm cannot give it ({reason}); vit_base_patch16_224.mae is one") from None
    else:
        state = checkpoint.read_weights(path)
    saved = {} if spec.startswith("timm:") else checkpoint.load(path)
    try:
        if "pos_embed" not in state:
            raise UserError("no pos_embed, so no vision transformer")
        fixed_positions(state, mae)
        decoder = ("mask_token", "decoder_*")
        new = () if "mask_token" in state else decoder
        report = checkpoint.load_strict(mae, state, (*HEADS, "fc_norm.*"), new)
    except UserError as error:
        raise UserError(f"--init {spec}: {error}; --model and its like must name the network of the file") from None
    ours = isinstance(saved, Mapping) and "progress" in saved
    return f"{spec}: {report}" + (", the decoder" if new else "") + ("" if ours else f"; {LICENCE}")


def load(path: Path, img_size: int | None, heads: Sequence[int] = (0, 0), norm_pix: str = "auto") -> Loaded:
    """A frozen MAE with decoder, from a run of main_pretrain (its folder too) or a public file.

    Positions are fixed: for another grid than the file's they are computed anew, never cut or interpolated.

    Args:
        img_size: pixels of its images; None: as many as it was trained on.
        heads: of encoder and decoder, where neither the file nor the registry tells; 0, 0: they do.
        norm_pix: whether its targets were normalised patches: yes, no, or auto (the run's flag, else `told_targets`).

    Raises:
        UserError: no file, not MAE weights, a decoder key missing, shapes that fit nothing.
    """
    path = run_file(path)
    saved = checkpoint.load(path)
    state = checkpoint.read_weights(path, "auto")
    stored = saved.get("args") if isinstance(saved, Mapping) else None
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    flags: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
    try:
        size = size_of(state, flags, heads)
        native = math.isqrt(state["pos_embed"].shape[1] - 1) * size.patch
        with torch.random.fork_rng(devices=[]):  # a classifier starts from the same weights with and without MRA
            mae = MAE(img_size or native, size)
        own = fixed_positions(state, mae)
        checkpoint.load_strict(mae, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    mae.requires_grad_(False).eval()
    normalised: bool | None = norm_pix == "yes"
    if norm_pix == "auto":
        normalised = flags.get("norm_pix_loss")
        if normalised is None:  # asked on the grid that it was trained on
            normalised = told_targets(mae if own == mae.grid else _on_grid(mae, own))
    mae.norm_pix_loss = normalised
    md5 = hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest()
    ours = flags.get("model") in SIZES or (isinstance(saved, Mapping) and "progress" in saved)
    millions = sum(q.numel() for q in mae.parameters()) / 1e6
    report = (
        f"{path}: {size.enc} / {size.dec}, patch {size.patch}, {millions:.2f} M, md5 {md5[:12]}, trained on "
        f"{flags.get('data_path', 'unknown images')}"
        + (f", {flags['holdout']} of each class held out" if flags.get("holdout") else "")
        + ("" if ours else f"; {LICENCE}")
    )
    return Loaded(mae, report, md5, normalised)
