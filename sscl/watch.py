"""What a run of sscl.main tells: the preflight, pictures, and the diagnostics of pseudo-labels and neighbours."""

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shared_utils import augment
from shared_utils.layout import follow
from shared_utils.pictures import make_grid
from shared_utils.preflight import about, seconds
from shared_utils.run import Run
from sscl import losses
from sscl.calibration import calibrate
from sscl.data import Training
from sscl.model import SsCL
from sscl.prototypes import spread


def entropy(p: Tensor) -> Tensor:
    """Mean entropy in nats of distributions [N, C]."""
    return -torch.xlogy(p, p).sum(1).mean()


def equal_coverage(p: Tensor, truth: Tensor, share: float) -> Tensor:
    """Accuracy of argmax p among the most confident `share` of the rows, [] in 0..1. p: [N, C]; truth: [N]."""
    conf, label = p.max(1)
    most = conf.topk(max(1, round(share * len(p)))).indices
    return (label[most] == truth[most]).float().mean()


class Telemetry:
    """What is watched at the steps that are logged. It alone holds the true labels of unlabelled images, if any.

    The unlabelled stream is of all images; accuracies and purity leave out the labelled ones among them, which the
    network knows by heart.
    """

    def __init__(self, args: argparse.Namespace, true_labels: Tensor | None, labelled: Sequence[int] = ()):
        """Args: true_labels, of all N images; labelled, numbers of those that training has the labels of."""
        self.args, self.true_labels = args, true_labels
        if true_labels is not None:
            self.hidden = torch.ones(len(true_labels), dtype=torch.bool, device=true_labels.device)
            self.hidden[torch.tensor(labelled, dtype=torch.long, device=true_labels.device)] = False  # [N]

    def step(
        self, model: SsCL, taught: losses.Taught, picked: losses.Chosen | None, index: Tensor
    ) -> dict[str, Tensor]:
        """Of pseudo-labels, neighbours and prototypes; before the keys of the step are enqueued."""
        args, entries = self.args, taught.entries
        out: dict[str, Tensor] = {}
        if taught.p is not None and taught.aligned is not None:
            out |= self.pseudo_labels(taught.p, taught.aligned, taught.log_q, index, model.alignment.qbar)
            out |= {"pl/coverage": entries.conf.float().mean(), "da/entropy": entropy(model.alignment.pbar[None])}
        if picked is not None and taught.p is not None:
            if args.neighbours == "off":  # those that the exchange would have chosen
                picked = model.nearest(entries, taught.keys[0], args.num_pos, args.sim)
            out |= self.neighbours(picked, model.queue_index, index, model.queue_labelled)
        if taught.log_q is not None:
            out["proto/mean_offdiag_cos"] = torch.as_tensor(spread(model.prototypes))
            out["proto/min_count"] = model.proto_least[0]
        return out

    @torch.no_grad()
    def pseudo_labels(
        self, p: Tensor, aligned: Tensor, log_q: Tensor | None, index: Tensor, prior: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Accuracy of argmax p, of the aligned p and of the calibrated one (the product where --calib is none), of all
        unlabelled rows and of the more confident half of each. p, aligned, log_q: [U, C]; index: [U] image numbers;
        prior: [C], of --calib prior."""
        if self.true_labels is None or not bool(self.hidden[index].any()):
            return {}
        rows = self.hidden[index]
        truth, aligned = self.true_labels[index][rows], aligned[rows]
        kinds = {"raw": p[rows], "aligned": aligned}
        if log_q is not None:
            log_q = log_q[rows]
            how = "product" if self.args.calib == "none" else self.args.calib
            kinds["calib"] = calibrate(aligned, log_q, how, prior, self.args.calib_weight)
        out = {f"pl/acc_{name}": equal_coverage(d, truth, 1.0) for name, d in kinds.items()}
        return out | {f"pl/acc_{name}_half": equal_coverage(d, truth, 0.5) for name, d in kinds.items()}

    @torch.no_grad()
    def neighbours(
        self, chosen: losses.Chosen, queue_index: Tensor, index: Tensor, queue_labelled: Tensor
    ) -> dict[str, Tensor]:
        """Number of neighbours an anchor has, and where there are any the shares of them that are keys of the labelled
        stream, and that have the true label of an anchor without one. queue_index, queue_labelled: [K]; index: [U]
        image numbers."""
        out = {"neighbours/num_pos": chosen.valid.sum(1).float().mean()}
        if bool(chosen.valid.any()):
            out["neighbours/labelled"] = queue_labelled[chosen.place][chosen.valid].float().mean()
        if self.true_labels is not None:
            valid = chosen.valid & self.hidden[index][:, None]  # [U, P]
            if bool(valid.any()):
                theirs = self.true_labels[queue_index[chosen.place]]  # [U, P]
                out["neighbours/purity"] = (theirs == self.true_labels[index][:, None])[valid].float().mean()
        return out


def picture(views: Sequence[Tensor], count: int = 8) -> Tensor:
    """Rows of images [n, 3, H, W], the first `count` of each, as one picture."""
    rows = [augment.denormalise(view[:count]).cpu() for view in views]
    return make_grid(torch.cat(rows), nrow=min(count, len(views[0])), padding=2)


def facts(
    run: Run, data: Training, model: SsCL, steps: int, peak: float, start: str, views: Sequence[str]
) -> dict[str, str]:
    """What the preflight prints."""
    args, chosen, classes = run.args, data.chosen, len(data.images.classes)
    unlabelled = args.mu * args.batch_labelled
    first = []
    if chosen:
        first.append(f"L_x about log {classes} = {math.log(classes):.2f}")
    if args.lambda_c:
        first.append(f"L_c below log(1 + K) = {math.log(1 + args.moco_k):.2f}, which it climbs to as the queue fills")
    out = {
        "data": data.where,
        "batch": f"{args.batch_labelled if chosen else 0} labelled + {unlabelled} unlabelled, {run.world} processes x "
        f"{args.bn_splits} splits, views {', '.join(views) or 'none'}; {steps} steps an epoch",
        "learning rate": f"{peak:.4g} at its peak ({args.lr} for {args.lr_batch or 'any number of'} unlabelled images)",
        "parameters": f"{sum(p.numel() for p in model.encoder_q.parameters() if p.requires_grad) / 1e6:.2f} M trained; "
        f"start: {start}",
        "exchange": f"class -> contrast {args.neighbours}, contrast -> class {args.calib}, from epoch {args.pl_start}",
        "expected initial loss": "; ".join(first) + f"; L_u is 0 until epoch {args.pl_start}",
        "estimated time": estimate(run, model, steps, views),
    }
    cautions = []
    if unlabelled // (run.world * args.bn_splits) == unlabelled and args.lambda_c:
        cautions.append(
            "one batch norm over query and key batches lets the contrast cheat: --bn_splits 8, or processes"
        )
    if args.moco_k > len(data.images) and args.lambda_c:
        cautions.append(f"--moco_k {args.moco_k} is more than the {len(data.images)} images: old keys of each are kept")
    return out | ({"caution": "; ".join(cautions)} if cautions else {})


def ending(args: argparse.Namespace, model: SsCL, guessing: bool) -> list[str]:
    """Cautions about a finished run, from its queue: collapsed embeddings, no pseudo-label that counted."""
    there, lines = model.queue_index >= 0, []
    if int(there.sum()) > 1:
        std = float(model.queue[:, there].std(1).mean()) * model.queue.shape[0] ** 0.5  # 1: spread over the sphere
        if std < 0.1:
            lines.append(f"caution: the embeddings have collapsed (standard deviation {std:.3f} of 1): a lower --lr")
    if guessing and bool(there.any()) and not bool(model.queue_conf[there & ~model.queue_labelled].any()):
        lines.append(
            f"caution: no pseudo-label passes --theta {args.theta:g}, so the unlabelled images have not helped the "
            f"class branch; lower it, or train longer (they count from epoch {args.pl_start})"
        )
    return lines


@torch.no_grad()
def estimate(run: Run, model: SsCL, steps: int, views: Sequence[str]) -> str:
    """Minutes of the whole run from two timed forward passes; a backward pass counts as two."""
    args, encoder = run.args, model.encoder_k
    size = args.batch_labelled // run.world
    x = torch.randn(size, 3, args.img_size, args.img_size, device=run.device)
    passed = seconds(run, encoder, lambda: encoder.embed(follow(x, encoder)))
    unlabelled = args.mu * (("weak" in views) + 3 * ("strong" in views) + ("key" in views))
    steps *= args.epochs
    return about(passed * steps * (3 + ("key" in views) + unlabelled) / 60, steps)
