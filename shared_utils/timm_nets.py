"""--arch timm:NAME: a backbone of timm's, for methods that need an image's pooled features and nothing from inside."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared_utils import UserError

PREFIX = "timm:"


class Archs(tuple[str, ...]):
    """Choices of --arch: a folder's own names, and timm:NAME for any network of timm's."""

    def __new__(cls, names: Iterable[str]) -> "Archs":
        return super().__new__(cls, (*names, f"{PREFIX}NAME"))

    def __contains__(self, name: object) -> bool:
        return str(name).startswith(PREFIX) or super().__contains__(name)


class Pooled(nn.Module):
    """What a network of timm's becomes: `fc` is the head, `num_features` the width of the pooled vector before it.

    Names of parameters are timm's own, and those of `fc`. There are no blocks to choose from: 0 is the pooled vector.
    """

    fc: nn.Module
    num_features: int
    last_id = 0

    def forward(self, x: Tensor, pre_out: bool = False) -> Tensor:
        """Images [B, 3, H, W] -> pooled features [B, num_features] if `pre_out`, else the output of `fc`."""
        network: Any = self
        h = network.forward_head(network.forward_features(x), pre_logits=True)
        return h if pre_out else self.fc(h)

    def maps(self, x: Tensor, ids: Sequence[int]) -> dict[int, Tensor]:
        """{0: pooled features [B, num_features, 1, 1]}. UserError: other blocks."""
        if set(ids) != {0}:
            raise UserError("--selected_feat_id: of a network of timm's only `last` is there")
        return {0: self(x, pre_out=True)[:, :, None, None]}


def build(arch: str, width: int = 64, stem: str = "imagenet", kind: type[Pooled] = Pooled) -> Any:
    """The network `arch` (timm:NAME) with new weights, without a head, as a `kind`.

    UserError: timm does not know the name, or cannot give pooled features; a width or stem other than the defaults.
    """
    if width != 64 or stem != "imagenet":
        raise UserError(f"--arch {arch}: has one width and one stem; leave --width and --stem away")
    import timm

    try:
        network: Any = timm.create_model(arch.removeprefix(PREFIX), num_classes=0)
    except Exception as error:  # whatever timm and the network raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--arch {arch}: timm cannot give it ({reason}); timm.list_models lists names") from None
    if not isinstance(getattr(network, "fc", nn.Identity()), nn.Identity) or not hasattr(network, "forward_head"):
        raise UserError(f"--arch {arch}: gives no pooled features without its classifier; choose another")
    # The class changes, not the object: a module around it would put a prefix before timm's names.
    network.__class__ = type(type(network).__name__, (kind, type(network)), {})
    network.num_features = getattr(network, "head_hidden_size", network.num_features)
    network.fc = nn.Identity()
    return network


@torch.no_grad()
def check_size(network: nn.Module, arch: str, *sizes: int) -> None:
    """UserError unless images of these `sizes` (pixels of a side) pass `network`; to be asked before it is trained."""
    for size in sizes if isinstance(network, Pooled) else ():
        training, weight = network.training, next(network.parameters())
        try:
            out = network.eval()(torch.zeros(2, 3, size, size, device=weight.device), pre_out=True)
        except Exception as error:  # whatever the network raises
            wanted = getattr(network, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"--arch {arch}: takes no images of {size} pixels ({reason}); timm has it for {wanted}, or choose "
                "another network"
            ) from None
        finally:
            network.train(training)
        if out.shape != (2, network.num_features):
            raise UserError(f"--arch {arch}: gives {list(out.shape[1:])} for an image, no vector of features")
