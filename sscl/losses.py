"""Class branch -> contrastive branch: who is pulled together (2.7), two multi-positive losses; and the masked CE."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils import UserError

FORMS = ("unified", "per_positive")
UNKNOWN = -1  # the pseudo-label of an entry without one: never a class-mate, always a negative
_LOW = -1e30  # exp(_LOW - anything) is 0, and gradients through it stay finite, which they do not with -inf


class Memory(NamedTuple):
    """What the queue knows of its K entries: pseudo-label, confidence (bool), class probabilities, image number."""

    label: Tensor  # [K] int64
    conf: Tensor  # [K] bool
    prob: Tensor  # [K, C], or [K, 0] where probabilities are not kept
    image: Tensor  # [K] int64, -1 for an empty place


class Chosen(NamedTuple):
    """Positives: queue places [N, P] and which of them count [N, P] bool; negatives [N, K] bool."""

    place: Tensor
    valid: Tensor
    negative: Tensor


class Taught(NamedTuple):
    """What a step learns from, without gradient.

    entries: calibrated pseudo-labels of the unlabelled images; keys: of these [U, D] and of the labelled ones [B, D];
    p: predictions of weak views [U, C]; aligned: these after distribution alignment; log_q: similarities [U, C].
    """

    entries: Memory
    keys: list[Tensor]
    p: Tensor | None
    aligned: Tensor | None
    log_q: Tensor | None


@torch.no_grad()
def choose(anchor: Memory, queue: Memory, num_pos: int, similarity: Tensor | None = None) -> Chosen:
    """P_i without the own key, and N_i, of eq. (7).

    Positives are the `num_pos` confident entries of the anchor's class that are most similar to it, none for an
    anchor that is not confident; negatives are the entries of another class; class-mates that were not chosen are
    neither. Entries of the same image are neither.

    Args:
        anchor: the anchors [N], in the queue's own terms.
        similarity: [N, K] to rank by; None: <p_i, p_j> of the class probabilities.
    """
    known = (anchor.label[:, None] != UNKNOWN) & (queue.label != UNKNOWN)
    mates = known & (anchor.label[:, None] == queue.label)  # [N, K]
    other_image = (anchor.image[:, None] != queue.image) | (queue.image < 0)
    negative = ~mates & other_image
    candidate = mates & other_image & anchor.conf[:, None] & queue.conf
    if similarity is None:
        similarity = anchor.prob @ queue.prob.T  # [N, K]
    score = similarity.float().masked_fill(~candidate, -torch.inf)
    best = score.topk(min(num_pos, score.shape[1]), dim=1)
    return Chosen(best.indices, best.values > -torch.inf, negative)


@torch.no_grad()
def all_negatives(anchor: Memory, queue: Memory) -> Chosen:
    """Without the exchange: no neighbours, and the whole queue but the same image's entries as negatives."""
    none = torch.zeros(len(anchor.image), 0, dtype=torch.long, device=anchor.image.device)
    return Chosen(none, none.bool(), (anchor.image[:, None] != queue.image) | (queue.image < 0))


def contrast(v: Tensor, key: Tensor, queue: Tensor, chosen: Chosen, tau: float, form: str = "unified") -> Tensor:
    """L_c(i) of each anchor, eq. (8a) `unified` or (8b) `per_positive`; with the own key alone both are InfoNCE.

    (8a) log(1 + sum_n exp(v.n / tau) sum_p exp(-v.p / tau)), (8b) the mean over positives of
    -log(exp(v.p / tau) / (exp(v.p / tau) + sum_n exp(v.n / tau))).

    Args:
        v: unit queries [N, D] with gradient; key: own unit keys [N, D]; queue: [D, K].

    Returns: [N] float32; 0 where an anchor has no negatives. UserError for an unknown form.
    """
    with torch.autocast(v.device.type, enabled=False):
        v, key, queue = v.float(), key.float(), queue.float()
        s = v @ queue / tau  # [N, K]
        own = (v * key).sum(1, keepdim=True) / tau  # [N, 1]
        negatives = torch.logsumexp(s.masked_fill(~chosen.negative, _LOW), 1)  # [N]
        near = s.gather(1, chosen.place)  # [N, P]
        counts = torch.cat([torch.ones_like(own, dtype=torch.bool), chosen.valid], 1)  # [N, 1 + P]
        positives = torch.cat([own, near], 1)
        if form == "unified":
            pull = torch.logsumexp((-positives).masked_fill(~counts, _LOW), 1)
            return F.softplus(negatives + pull)
        if form == "per_positive":
            each = F.softplus(negatives[:, None] - positives) * counts
            return each.sum(1) / counts.sum(1)
    raise UserError(f"--ctr {form}: choose from {', '.join(FORMS)}")


def masked_ce(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L_u of eq. (6): mean over all rows, masked ones counting as 0.

    Args:
        logits: [N, C]; target: classes [N], or distributions [N, C] for soft targets; mask: [N] bool.
    """
    return (F.cross_entropy(logits, target, reduction="none") * mask).mean()
