"""Teachers from the files in which they are published, or from a run of `bingo.main_teacher`.

Every tensor of the network must come from the file: the release loads with missing keys allowed, and so trains against
a random teacher, without a word, when it is given a full MoCo checkpoint (its `encoder_k.*` keys are deleted after
`encoder_q.*` were renamed to them) or a file of another kind.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor, nn

from bingo.arch import Encoder, build, mlp_head
from shared_utils import UserError, checkpoint

ALGS = ("moco", "swav", "torchvision")
FAMILY = {"moco": "moco", "swav": "swav", "torchvision": "plain"}


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, int]:
    """Outputs and inputs of a linear layer of the head."""
    tensor = state.get(key)
    if tensor is None or tensor.ndim != 2:
        raise UserError(f"no head layer {key}, so there is no embedding to distil")
    return tensor.shape[0], tensor.shape[1]


def head_of(state: dict[str, Tensor], alg: str, features: int) -> tuple[nn.Module, int]:
    """An empty head of the widths that the tensors `fc.*` have, and the length of its output."""
    if "fc.weight" in state:  # MoCo v1; SwAV with one layer
        dim, _ = _shape(state, "fc.weight")
        return nn.Linear(features, dim), dim
    hidden, _ = _shape(state, "fc.0.weight")
    dim, _ = _shape(state, "fc.3.weight" if alg == "swav" else "fc.2.weight")
    return mlp_head(features, dim, hidden, norm=alg == "swav"), dim


def load_teacher(name: str, path: str | Path, alg: str, width: int = 64, stem: str = "imagenet") -> tuple[Encoder, int]:
    """The frozen network of a file in eval mode, with its head as `fc`, and the length of its embedding.

    Args:
        name: architecture (`bingo.arch.ARCHS`).
        alg: `moco`: `encoder_q` of a MoCo checkpoint, published (q alone) or of a whole run (q, k, queue); its head has
            the widths of the file. `swav`: projection head with batch norm as `fc`, prototypes dropped; 128-d output
            before them. `torchvision`: a classifier's backbone without a head, the embedding is the pooled vector.
        width, stem: as in `bingo.arch.build`; other than the defaults for small networks of our own.

    Raises:
        UserError: unreadable, of another algorithm or architecture, or incomplete.
    """
    if alg not in ALGS:
        raise UserError(f"pretrain_alg {alg!r} is unknown; choose from {', '.join(ALGS)}")
    encoder = build(name, width, stem)
    state = checkpoint.read_weights(path, FAMILY[alg])
    if alg == "swav":
        state = {key.replace("projection_head.", "fc."): value for key, value in state.items()}
        drop: tuple[str, ...] = ("prototypes.*",)
    else:
        drop = ("fc.*", "classifier.3.*") if alg == "torchvision" else ()
    try:
        dim = encoder.num_features
        if alg != "torchvision":
            encoder.fc, dim = head_of(state, alg, encoder.num_features)
        # The count of batches is not used by batch norm with a momentum; files of old PyTorch versions lack it.
        encoder.report = checkpoint.load_strict(encoder, state, drop, missing_ok=("*.num_batches_tracked",))
    except UserError as error:
        raise UserError(f"{path}, taken as {alg} {name} (width {width}, stem {stem}): {error}") from None
    return encoder.requires_grad_(False).eval(), dim


def fingerprint(teacher: nn.Module) -> str:
    """Of the tensors that bags depend on, those below the head; 16 digits."""
    digest = hashlib.sha256()
    for key, value in sorted(teacher.state_dict().items()):
        if not key.startswith("fc."):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
