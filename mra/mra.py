"""Mask-Reconstruct Augmentation: a frozen masked autoencoder erases the background and paints it anew.

The steps of the operator (section 2.3 of the reconstruction, see README.md): probe all patches, score them by the class
token, keep the top k, reconstruct the erased ones from the kept ones, paste the kept pixels back.
"""

import argparse
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mra import models_mae
from mra.models_mae import MAE, mask_from_scores, patchify, unpatchify, wide
from shared_utils import UserError
from shared_utils.augment import MEAN, STD
from shared_utils.flags import ints

STRATEGIES = ("attn", "attn_inverse", "random")
SOURCES = ("out_dot", "last_attn")
COMPOSE = ("paste", "full", "erase")
Stats = tuple[Sequence[float], Sequence[float]]  # mean and std of the channels


def attention_scores(mae: MAE, tokens: Tensor, source: str = "out_dot") -> Tensor:
    """Probe: a_i [B, L] of all patches (tokens [B, L, De] with positions, nothing masked), float32.

    out_dot: <z_cls, z_i> of the encoder's outputs; last_attn: attention of the class token in the last block.
    """
    if source == "last_attn":
        x = mae.with_class(tokens)
        for block in mae.blocks[:-1]:
            x = block(x)
        last: Any = mae.blocks[-1]
        return last.attn.class_weights(last.norm1(x))
    z = wide(mae.encode(tokens))  # [B, 1 + L, De]
    with torch.autocast(z.device.type, enabled=False):  # bfloat16's 8 bits make ties, and ties go by position
        return (z[:, 1:] @ z[:, 0, :, None]).squeeze(2)


def score_entropy(scores: Tensor, source: str, dim: int) -> Tensor:
    """Entropy [B] of the attention over log L: 1 says nothing about any patch, 0 one patch alone.

    That of softmax(a / sqrt(De)) for dot products; last_attn's scores are a distribution already.
    """
    p = F.softmax(scores.float() / dim**0.5, 1) if source == "out_dot" else scores.float()
    return -(p * p.clamp_min(1e-12).log()).sum(1) / math.log(p.shape[1])


def pixel_mask(mask: Tensor, p: int) -> Tensor:
    """[B, L] of patches -> [B, 1, H, H] of pixels, in any dtype."""
    g = math.isqrt(mask.shape[1])
    return mask.view(len(mask), 1, g, g).repeat_interleave(p, 2).repeat_interleave(p, 3)


class Parts(NamedTuple):
    """What the operator saw and made of images [B, 3, H, H]."""

    scores: Tensor  # [B, L], what the mask was made from
    mask: Tensor  # [B, L], 1 erased
    reconstruction: Tensor  # [B, 3, H, H], the decoder's pixels everywhere (erase: zeros, the mean colour)
    out: Tensor  # [B, 3, H, H], x_hat


class MRA:
    """x [B, 3, H, H] -> x_hat of the same shape and dtype, without gradient; labels and order stay.

    Not a module, so that its weights enter no optimiser, no wrapper and no checkpoint of the classifier. Randomness is
    drawn apart (`draw`) and handed in: with `attn` and prob 1 there is none. Under autocast all of the autoencoder, its
    residual stream too, is in autocast's dtype; scores and pixels are float32.

    Args:
        stats: mean and std that x was normalised with; the autoencoder was trained with ImageNet's.
        clamp: keep reconstructed pixels inside the range of images.
        true_stats: undo normalised targets with the erased patches' own mean and std. That leaks them.

    Raises:
        UserError: values out of range; an autoencoder with normalised targets and no `true_stats`, or unknown ones.
    """

    def __init__(
        self,
        mae: MAE,
        mask_ratio: float = 0.4,
        strategy: str = "attn",
        source: str = "out_dot",
        compose: str = "paste",
        prob: float = 1.0,
        clamp: bool = True,
        true_stats: bool = False,
        stats: Stats = (MEAN, STD),
    ):
        if not 0 <= mask_ratio <= 1 or not 0 <= prob <= 1:
            raise UserError(f"--mask_ratio {mask_ratio} and --mra_prob {prob} must lie in 0..1")
        for value, known in ((strategy, STRATEGIES), (source, SOURCES), (compose, COMPOSE)):
            if value not in known:
                raise UserError(f"{value}: unknown; choose from {', '.join(known)}")
        if mae.norm_pix_loss is None and compose != "erase":
            raise UserError(
                "what it paints of soft colours fits neither pixels nor normalised patches (untrained, or on other "
                "images): give --mae_norm_pix yes or no, as it was trained"
            )
        if mae.norm_pix_loss and not true_stats and compose != "erase":
            raise UserError(
                "the autoencoder predicts normalised patches, not pixels (grey blocks): take one trained without "
                "--norm_pix_loss, or give --denorm_with_true_stats, which leaks the erased patches' mean and contrast"
            )
        if true_stats and not mae.norm_pix_loss:
            raise UserError("--denorm_with_true_stats is for autoencoders with normalised targets; leave it away")
        self.mae = mae.requires_grad_(False).eval()
        self.narrow: dict[torch.dtype, MAE] = {}
        self.mask_ratio, self.strategy, self.source, self.compose = mask_ratio, strategy, source, compose
        self.prob, self.clamp, self.true_stats = prob, clamp, true_stats
        device = mae.pos_embed.device

        def channels(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)

        self.mean, self.std, mean, std = channels(stats[0]), channels(stats[1]), channels(MEAN), channels(STD)
        self.same_stats = (tuple(stats[0]), tuple(stats[1])) == (MEAN, STD)
        # between the statistics of x and those of the autoencoder: z = x * scale + shift
        self.scale, self.shift = self.std / std, (self.mean - mean) / std
        self.low, self.high = -self.mean / self.std, (1 - self.mean) / self.std

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For `count` images, on the CPU: noise U(0, 1) [count, L], and which images are augmented [count], bool."""
        noise = torch.rand(count, self.mae.patches, generator=generator)
        return noise, torch.rand(count, generator=generator) < self.prob

    def scores(self, mae: MAE, tokens: Tensor, noise: Tensor) -> Tensor:
        """[B, L]: the largest stay visible."""
        if self.strategy == "random":
            return -noise.to(tokens.device, non_blocking=True)
        a = attention_scores(mae, tokens, self.source)
        return -a if self.strategy == "attn_inverse" else a

    def network(self, kind: str) -> MAE:
        """The autoencoder for a kind of device; under autocast a copy in its dtype, made at the first call.

        Autocast keeps its casts of weights that are trained and casts frozen ones anew at every layer of every call.
        """
        if not torch.is_autocast_enabled(kind):
            return self.mae
        dtype = torch.get_autocast_dtype(kind)
        if dtype not in self.narrow:
            self.narrow[dtype] = copy.deepcopy(self.mae).to(dtype)
        return self.narrow[dtype]

    @torch.no_grad()
    def parts(self, x: Tensor, noise: Tensor) -> Parts:
        """All steps for every image of x [B, 3, H, H]; noise [B, L] is looked at by `random` alone."""
        mae = self.network(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            z = wide(x) if self.same_stats else wide(x) * self.scale + self.shift
            tokens = mae.embed(z.to(mae.pos_embed.dtype))  # [B, L, De]
            scores = self.scores(mae, tokens, noise)
            visible, mask, ids_restore = mask_from_scores(tokens, scores, self.mask_ratio)
            if self.compose == "erase":
                pixels = torch.zeros_like(z)
            else:
                pixels = self.pixels(mae.decode(mae.encode(visible), ids_restore), z)
            pixels = pixels.to(x.dtype)  # before the paste: kept pixels stay as they are, to the bit
            out = pixels if self.compose == "full" else torch.where(pixel_mask(mask > 0, mae.p), pixels, x)
        return Parts(scores, mask, pixels, out)

    def pixels(self, y: Tensor, z: Tensor) -> Tensor:
        """Predictions y [B, L, p * p * 3] as an image like x; z [B, 3, H, H]: what the autoencoder was shown."""
        if self.true_stats:
            t = patchify(z, self.mae.p)
            y = wide(y) * (t.var(2, keepdim=True) + 1e-6).sqrt() + t.mean(2, keepdim=True)
        pixels = wide(unpatchify(y, self.mae.p))
        if not self.same_stats:
            pixels = (pixels - self.shift) / self.scale
        return pixels.clamp(self.low, self.high) if self.clamp else pixels

    @torch.no_grad()
    def __call__(self, x: Tensor, noise: Tensor, use: Tensor) -> Tensor:
        """x_hat; images where `use` [B] (bool, CPU) is false pass unchanged and cost nothing."""
        if bool(use.all()):
            return self.parts(x, noise).out
        chosen = use.nonzero().flatten()
        if not len(chosen):
            return x
        out, rows = x.clone(), chosen.to(x.device, non_blocking=True)
        out[rows] = self.parts(x[rows], noise[chosen]).out
        return out


# ---------------------------------------------------------------------------------------------------------------- flags
def add_mae_flags(p: argparse.ArgumentParser) -> None:
    """Which autoencoder, for everything that loads one."""
    a = p.add_argument
    a("--mae_ckpt", type=Path, help="autoencoder with its decoder: a run of mra.main_pretrain (its "
      "folder or file), or a public MAE file")  # fmt: skip
    a("--mae_heads", type=_two, default="0,0", help="heads of encoder and decoder where the file does not tell; 0,0")
    a("--mae_norm_pix", choices=["auto", "yes", "no"], default="auto", help="whether its targets were normalised "
      "patches; auto: the flag of its run, else by what it makes of soft images")  # fmt: skip
    a("--denorm_with_true_stats", action="store_true", help="take such an autoencoder; leaks the erased patches' "
      "mean and contrast")  # fmt: skip
    a("--attn_source", choices=SOURCES, default="out_dot", help="a_i: <z_cls, z_i>, or the last block's attention")
    p.set_defaults(mae_md5="")


def add_mra_flags(p: argparse.ArgumentParser) -> None:
    """The operator's flags, for training scripts: without --mae_ckpt there is no MRA."""
    add_mae_flags(p)
    a = p.add_argument
    a("--mask_ratio", type=float, default=0.4, help="r, share of erased patches (paper: 0.4, recalled)")
    a("--mask_strategy", choices=STRATEGIES, default="attn", help="keep the most attended, the least, or any")
    a("--compose", choices=COMPOSE, default="paste", help="kept pixels pasted; the decoder's everywhere; or erased "
      "patches left at the mean colour, without reconstruction")  # fmt: skip
    a("--mra_prob", type=float, default=1.0, help="probability that an image is augmented")
    a("--clamp", action=argparse.BooleanOptionalAction, default=True, help="reconstructed pixels within 0..255")


def _two(text: str) -> list[int]:
    values = ints(text)
    if len(values) != 2 or min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be two numbers such as 3,3")
    return values


def load_mae(args: argparse.Namespace, img_size: int | None, device: torch.device) -> tuple[MAE, str]:
    """The autoencoder of --mae_ckpt on the device, and a line about it; its md5 enters the flags.

    `img_size` None: that of the images that it was trained on.
    """
    loaded = models_mae.load(args.mae_ckpt, img_size, args.mae_heads, args.mae_norm_pix)
    args.mae_md5 = loaded.md5
    return loaded.mae.to(device), loaded.report


def build(
    args: argparse.Namespace, img_size: int | None, device: torch.device, stats: Stats = (MEAN, STD)
) -> tuple[MRA | None, str]:
    """The operator that the flags describe, and a line about it for the preflight; None without --mae_ckpt.

    `img_size` None: that of the images that the autoencoder was trained on, `operator.mae.img_size`.
    """
    if args.mae_ckpt is None:
        return None, "none (no --mae_ckpt)"
    mae, report = load_mae(args, img_size, device)
    try:
        operator = MRA(
            mae, args.mask_ratio, args.mask_strategy, args.attn_source, args.compose, args.mra_prob, args.clamp,
            args.denorm_with_true_stats, stats,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{args.mae_ckpt}: {error}") from None
    kept = models_mae.len_keep(mae.patches, args.mask_ratio)
    return operator, (
        f"{args.mask_strategy} ({args.attn_source}), {kept} of {mae.patches} patches kept, {args.compose}, probability "
        f"{args.mra_prob}; {report}"
    )
