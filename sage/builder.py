"""SaGe: BYOL, and a decoder whose images a frozen evaluator compares with the encoder's own input.

Source: release models/SaGe.py, with the two decoder calls that its upload lacks.

state_dict keys: `online_net.0.*` (backbone), `online_net.1.*` (projector), `target_net.*`, `head.predictor.*`,
`decoder.*`, `r_function.*` (evaluator).
"""

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sage.arch import Backbone, Decoder, Neck
from sage.data import as_input
from sage.losses import LEVELS, TERMS, distance, latent_loss
from sage.weights import DROP
from shared_utils import UserError, checkpoint


class Evaluator(nn.ModuleList):
    """h_G: a pretrained backbone and its projector, never trained. `norm`: what its training saw as input.

    Args:
        projector: None where no term compares projections (--w_f1 0): public backbones come without.
        norm: `half` for images in -1..1, as everything here, `imagenet` for ImageNet's mean and standard deviation.
    """

    def __init__(self, backbone: Backbone, projector: Neck | None, norm: str = "half"):
        super().__init__([backbone] if projector is None else [backbone, projector])
        self.norm = norm
        self.requires_grad_(False)

    def forward(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """Images [B, 3, S, S] in -1..1 -> one tensor a level: maps of the stages 2, 3, 4 ([B, 512, 28, 28],
        [B, 1024, 14, 14], [B, 2048, 7, 7] at 224), level 5 the projection [B, 256], not normalised.

        Differentiable in x.
        """
        maps = self[0](as_input(x, self.norm), min(4, max(levels)))
        return [self[1](maps[3]) if level == 5 else maps[level - 1] for level in levels]


class SaGe(nn.Module):
    """Online network, its momentum copy, predictor; decoder and evaluator where terms of the loss need them."""

    def __init__(
        self,
        backbone: Backbone,
        hid_channels: int = 4096,
        out_channels: int = 256,
    ):
        super().__init__()
        self.online_net = nn.ModuleList([backbone, Neck(backbone.num_features, hid_channels, out_channels)])
        self.target_net = copy.deepcopy(self.online_net).requires_grad_(False)
        self.head = nn.ModuleDict({"predictor": Neck(out_channels, hid_channels, out_channels, std=0.01)})
        self.terms: dict[str, float] = {}
        self.levels: list[int] = []
        self.evaluator_bn = "frozen"
        self.decoder: Decoder | None = None
        self.r_function: Evaluator | None = None

    def add_generation(
        self,
        decoder: Decoder | None,
        evaluator: Evaluator | None,
        weights: Mapping[str, float],
        evaluator_bn: str = "frozen",
    ) -> "SaGe":
        """What makes SaGe of BYOL; last, so that the networks above start from the same numbers with and without it.

        Args:
            weights: flag of a term (`losses.WEIGHTS`) -> its weight; absent or 0: the term is left out.
            evaluator_bn: `frozen`, the evaluator stays in eval mode; `batch`, it follows `train()`, as in the release.
        """
        self.terms = {term: float(weights[flag]) for term, flag in TERMS.items() if weights.get(flag)}
        self.levels = [LEVELS[term] for term in LEVELS if term in self.terms]
        self.evaluator_bn = evaluator_bn
        if self.terms and decoder is None or self.levels and evaluator is None:
            raise ValueError("a loss with generation terms needs a decoder, one with evaluator terms an evaluator")
        self.decoder = decoder if self.terms else None
        self.r_function = evaluator if self.levels else None
        return self.train(self.training)

    def train(self, mode: bool = True) -> "SaGe":
        """As in nn.Module, but a frozen evaluator stays in eval mode."""
        super().train(mode)
        if self.r_function is not None and self.evaluator_bn == "frozen":
            self.r_function.eval()
        return self

    def forward(
        self, x1: Tensor, x2: Tensor, targets: Sequence[Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms of the loss under the release's names: `loss1` (L_D), `loss_mse`, `loss_f*`; and z_1
        [B, D] without gradient, to watch for collapse.

        Args:
            x1, x2: views [B, 3, S, S] in -1..1. targets: what to recover for each view (default: the view itself).
        """
        views = (x1, x2)
        # One forward pass for each view: batch statistics are a view's own.
        maps = [self.online_net[0](x) for x in views]
        z = [self.online_net[1](m[-1]) for m in maps]  # [B, D]
        with torch.no_grad():
            t = [self.target_net[1](self.target_net[0](x)[-1]) for x in views]
        q = [self.predictor(v) for v in z]
        losses = {"loss1": latent_loss(q[0], t[1]) + latent_loss(q[1], t[0])}
        if self.decoder is not None:
            recovered = [self.decoder(m[-1]) for m in maps]  # not detached: the encoder learns from the images
            wanted = views if targets is None else targets
            losses |= self.generation(list(wanted), recovered)
        return losses, z[0].detach()

    @property
    def predictor(self) -> nn.Module:
        return self.head["predictor"]

    def generation(self, x: list[Tensor], recovered: list[Tensor]) -> dict[str, Tensor]:
        """L_G: the weighted terms, from images and recovered images, a list over views each."""
        out = {}
        if "loss_mse" in self.terms:
            out["loss_mse"] = self.terms["loss_mse"] * distance(x, recovered)
        if self.r_function is not None:
            with torch.no_grad():  # no graph for real views
                real = self.features(x)
            made = self.features(recovered)  # with a graph: this is the semantic signal
            for term in LEVELS:
                if term in self.terms:
                    level = self.levels.index(LEVELS[term])
                    out[term] = self.terms[term] * distance([f[level] for f in real], [f[level] for f in made])
        return out

    def features(self, images: list[Tensor]) -> list[list[Tensor]]:
        """The evaluator's levels for each view; all views in one pass where batch statistics play no part."""
        assert self.r_function is not None
        if self.r_function.training:
            return [self.r_function(x, self.levels) for x in images]
        parts = self.r_function(torch.cat(images), self.levels)
        return [list(view) for view in zip(*(part.chunk(len(images)) for part in parts))]

    @torch.no_grad()
    def momentum_update(self, m: float) -> None:
        """theta' <- m theta' + (1 - m) theta, parameters only: the target's batch-norm buffers are its own."""
        target: list[Tensor] = list(self.target_net.parameters())
        torch._foreach_mul_(target, m)
        torch._foreach_add_(target, list(self.online_net.parameters()), alpha=1 - m)


def evaluator_weights(path: str) -> dict[str, Tensor]:
    """Weights under the names of `Evaluator`: `0.*` the backbone, `1.*` the projector where the file has BYOL's.

    With projector, two ways of naming, as in the release: MoCo's (`[module.]encoder_q.*`, its head `fc.fc1`, `fc.bn1`,
    `fc.fc2`) and OpenSelfSup's (`online_net.*`, our own runs too). Every other file of `checkpoint.read_weights` (MoCo,
    DINO, SwAV, torchvision, timm, extracted backbones) gives the backbone. UserError: no weights in it.
    """
    loaded = checkpoint.load(path)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
    names = {str(key).removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("online_net.") for key in names):
        return {k.removeprefix("online_net."): v for k, v in names.items() if k.startswith("online_net.")}
    head = {"encoder_q.fc.fc1.": "1.fc0.", "encoder_q.fc.bn1.": "1.bn0.", "encoder_q.fc.fc2.": "1.fc1."}
    if not any(key.startswith("encoder_q.fc.fc1.") for key in names):
        found = checkpoint.read_weights(path)
        return {f"0.{k}": v for k, v in found.items() if not any(fnmatchcase(k, pattern) for pattern in DROP)}
    out = {}
    for key, value in names.items():
        if key.startswith("encoder_q.") and not key.startswith("encoder_q.predictor"):
            new = next((head[p] + key.removeprefix(p) for p in head if key.startswith(p)), None)
            out[new or f"0.{key.removeprefix('encoder_q.')}"] = value
    return out


def has_projector(weights: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("1.") for key in weights)


def load_evaluator(evaluator: Evaluator, path: str, weights: Mapping[str, Tensor] | None = None) -> str:
    """Every tensor of the evaluator from the file, or a UserError that lists what does not fit; returns a report.

    Args:
        weights: those of `evaluator_weights(path)`, where they have been read.
    """
    try:
        weights = evaluator_weights(path) if weights is None else weights
        if len(evaluator) == 2 and not has_projector(weights):
            raise UserError(
                "holds no projector of BYOL's form, and the term of --w_f1 compares projections; give --w_f1 0, or the "
                "file of a BYOL network"
            )
        return checkpoint.load_strict(evaluator, weights, missing_ok=("*.num_batches_tracked",))
    except UserError as error:
        raise UserError(f"--evaluator {path}: {error}") from None


@torch.no_grad()
def calibrate(evaluator: Evaluator, batches: Iterable[Tensor]) -> None:
    """Batch-norm statistics of a random evaluator from images [B, 3, S, S] in -1..1, so that eval mode is usable."""
    norms = [m for m in evaluator.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with contextlib.ExitStack() as stack:
        for norm in norms:
            stack.callback(setattr, norm, "momentum", norm.momentum)
            norm.momentum = None  # the mean over all batches
            norm.reset_running_stats()
        evaluator.train()
        for x in batches:
            evaluator(x, [5 if len(evaluator) == 2 else 4])
    evaluator.eval()
