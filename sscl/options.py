"""The flags of sscl.main: what they mean, what follows from others, which contradict each other."""

import argparse
from pathlib import Path
from shlex import quote

from shared_utils import UserError
from shared_utils.flags import Parser, add_aug_flag, add_run_flags, natural, not_negative, positive
from sscl import arch, calibration, data, losses, prototypes
from sscl.weights import default_width


def get_parser(doc: str) -> argparse.ArgumentParser:
    p = Parser(prog="sscl.main", description=doc.splitlines()[0])
    a = p.add_argument
    a("--data", "--data_dir", type=Path, default=Path("data/imagenet"), help="holds train/CLASS/*.jpg, or CLASS/*.jpg, "
      "of which a part is taken as labelled; with --no_labels any folder of images")  # fmt: skip
    a("--labelled", type=Path, help="in place of --data: CLASS/*.jpg of the images with labels, all of them")
    a("--unlabelled", type=Path, help="and the folder of those without, at any depth")
    a("--img_size", type=positive, default=224, help="pixels of a crop")
    a("--per_class", type=natural, default=0, help="first so many training images of each class; 0: all")
    a("--imbalance", type=float, default=1.0, help="the last class keeps so many times fewer images than the first")
    a("--cache", action="store_true", help="decode all images once and keep them in memory")
    g = p.add_argument_group("which images are labelled").add_argument
    g("--split_file", type=Path, help="list of the labelled images, as SimCLR's 1percent.txt")
    g(
        "--labels_per_class",
        type=natural,
        default=0,
        help="so many of each class, drawn by --split (frozen in splits.json)",
    )
    g("--split", type=natural, default=0, help="which draw of --labels_per_class or --fraction")
    g("--fraction", type=float, default=0.01, help="this share of each class, where neither of the above is given")
    g("--no_labels", action="store_true", help="none: MoCo v2 (needs --lambda_u 0)")
    g("--balanced", choices=["on", "off"], default="on", help="labelled batches hold each class equally often")
    g = p.add_argument_group("network").add_argument
    g("--arch", choices=arch.ARCHS, default="resnet50", help="timm:NAME: any of timm's, of pooled features alone")
    g("--width", type=positive, help="channels of the first stage (default: 64; wrn28: 32, that is WRN-28-2)")
    g("--stem", choices=arch.STEMS, default="imagenet")
    g("--dim", type=positive, default=128, help="D, length of an embedding")
    g("--init", default="scratch", metavar="FILE|RUN|timm:NAME", help="start both encoders from these weights: a "
      "checkpoint (of this workspace, MoCo, torchvision, timm, DINO, SwAV), the folder of a run, or timm:NAME, which "
      "timm downloads; the class head starts new")  # fmt: skip
    g("--bn_splits", type=positive, default=1, help="batch norm over so many shares of a process's batch, as if each "
      "were a process; on one GPU take 8 for the paper's setting")  # fmt: skip
    g("--bn_momentum", type=float, default=0.1, help="of the running statistics; the momentum copy of an arm without "
      "key passes takes those of the query: FixMatch's releases have 0.001 for a copy with --moco_m 0.999")  # fmt: skip
    g("--joint_views", action="store_true", help="weak views go through the network together with labelled and strong "
      "ones, and share their batch-norm statistics (FixMatch)")  # fmt: skip
    g = p.add_argument_group("views").add_argument
    g("--weak", choices=["rrc", "shift"], default="rrc", help="random resized crop, or translation (small images)")
    g("--strong", choices=data.STRONG, default="moco", help="s(u): MoCo v2's; RandAugment(2, 10) of torchvision; "
      "FixMatch's RandAugment and Cutout")  # fmt: skip
    add_aug_flag(p)
    g("--key_view", choices=["strong", "weak"], default="strong", help="k(u), what the momentum copy sees")
    g("--no_flip", action="store_true", help="no mirror images (digits)")
    g("--min_scale", type=float, default=0.2, help="least area of a random resized crop")
    g = p.add_argument_group("class branch").add_argument
    g("--lambda_u", type=not_negative, default=10.0, help="weight of L_u (CIFAR: 1)")
    g("--calib", choices=calibration.CALIBRATIONS, default="product", help="how q corrects p; none: that exchange off")
    g("--calib_weight", type=float, default=0.5, help="a, weight of q in average and geomean")
    g("--tau_s", type=float, default=0.1, help="temperature of q")
    g("--sharpen_t", type=float, help="T of Sharpen (default: .5; 1, that is none, for --calib none)")
    g("--theta", type=not_negative, default=0.7, help="confidence from which a pseudo-label counts (CIFAR: .95)")
    g("--theta_on", choices=["sharp", "raw"], default="sharp", help="the threshold is of p after or before Sharpen")
    g("--theta_ramp", action="store_true", help="the threshold rises from .5 to theta during training")
    g("--soft_targets", action="store_true", help="L_u against the distribution in place of its argmax")
    g("--da", choices=calibration.ALIGNMENTS, default="ema", help="distribution alignment of p")
    g("--da_m", type=float, default=0.999, help="momentum of --da ema and of the prior")
    g("--pl_start", type=natural, help="epochs without pseudo-labels (default: 5; 0 with --init)")
    g = p.add_argument_group("contrastive branch").add_argument
    g("--lambda_c", type=not_negative, default=1.0, help="weight of L_c")
    g("--neighbours", choices=["on", "off"], default="on", help="positives and negatives by pseudo-label; off: that "
      "exchange off, the own key against the whole queue")  # fmt: skip
    g("--num_pos", type=natural, default=5, help="K, neighbours of an anchor")
    g("--sim", choices=["prob", "embed"], default="prob", help="neighbours ranked by <p, p'>, or by cosine (the queue "
      "then keeps no probabilities)")  # fmt: skip
    g("--ctr", choices=losses.FORMS, default="unified", help="eq. 8a or 8b")
    g("--labelled_anchors", action="store_true", help="labelled images are anchors too, not only keys; with neighbours "
      "from --pl_start on")  # fmt: skip
    g("--tau", type=float, default=0.2, help="temperature of L_c")
    g("--moco_k", type=positive, default=65536, help="places of the queue")
    g("--moco_m", type=float, default=0.999, help="m, momentum of the key encoder")
    g("--ctr_start", type=natural, default=0, help="epochs without L_c")
    g = p.add_argument_group("prototypes").add_argument
    g("--proto", choices=prototypes.KINDS, default="mixture", help="mu_c of labelled images, with mixtures, or EMA")
    g("--proto_every", type=positive, default=5, help="E_p, epochs between refreshes")
    g("--num_nn", type=positive, default=20, help="K_nn, unlabelled images of a class that are mixed")
    g("--proto_m", type=float, default=0.99, help="momentum of --proto ema")
    g = p.add_argument_group("optimisation").add_argument
    g("--batch_labelled", type=positive, default=64, help="B, labelled images a step, all processes together")
    g("--mu", type=positive, default=5, help="unlabelled images a step: mu B")
    g("--epochs", type=positive, default=200, help="of the unlabelled images")
    g("--lr", type=float, default=0.03, help="learning rate for --lr_batch unlabelled images a step")
    g("--lr_batch", type=natural, default=256, help="0: --lr is taken as it is")
    g("--schedule", choices=["cos", "cos7_16"], default="cos", help="cosine to 0, or cos(7 pi k / 16 K)")
    g("--warmup_epochs", type=not_negative, default=5.0, help="linear warm-up of the learning rate")
    g("--momentum", type=not_negative, default=0.9, help="Nesterov")
    g("--wd", "--weight_decay", type=not_negative, default=1e-4)
    a("--diagnostics", choices=["on", "off"], default="on", help="use the true labels of unlabelled images to log the "
      "accuracy of pseudo-labels and the purity of neighbours; nothing else sees them")  # fmt: skip
    a("--image_every", type=positive, default=500, help="steps between pictures in tensorboard")
    add_run_flags(p, "sscl/train/default")
    p.set_defaults(split_sha256="")
    return p


def resolve(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags."""
    args.width = args.width or default_width(args.arch)
    if args.sharpen_t is None:
        args.sharpen_t = 1.0 if args.calib == "none" else 0.5
    if args.pl_start is None:
        args.pl_start = 5 if args.init == "scratch" else 0


def check_flags(args: argparse.Namespace, world: int) -> None:
    """UserError for flags that contradict each other, before anything is loaded."""
    if min(args.tau, args.tau_s, args.sharpen_t, args.lr) <= 0:
        raise UserError("--tau, --tau_s, --sharpen_t and --lr must be above 0")
    if args.imbalance < 1:
        raise UserError(f"--imbalance {args.imbalance}: must be at least 1")
    if not all(0 <= getattr(args, name) <= 1 for name in ("moco_m", "da_m", "proto_m", "calib_weight")):
        raise UserError("--moco_m, --da_m, --proto_m and --calib_weight must lie in 0..1")
    if not 0 < args.bn_momentum <= 1:
        raise UserError(f"--bn_momentum {args.bn_momentum}: must lie above 0 and up to 1")
    if args.joint_views and (
        args.no_labels or (args.lambda_u == 0 and (args.lambda_c == 0 or args.neighbours == "off"))
    ):
        raise UserError("--joint_views: this arm makes no predictions of weak views; leave it out")
    if args.strong == "randaug" and args.aug_backend != "pil":
        raise UserError("--strong randaug is torchvision's, of PIL images: add --aug_backend pil")
    if not 0 < args.min_scale <= 1:
        raise UserError(f"--min_scale {args.min_scale}: must lie above 0 and up to 1")
    if args.batch_labelled % (world * args.bn_splits):
        raise UserError(
            f"--batch_labelled {args.batch_labelled} does not divide over {world} processes x {args.bn_splits} "
            "--bn_splits"
        )
    if args.batch_labelled // (world * args.bn_splits) < 2:
        raise UserError("batch norm needs at least 2 images a share; raise --batch_labelled or lower --bn_splits")
    if args.no_labels and (args.lambda_u or args.lambda_c == 0):
        raise UserError("--no_labels is contrastive pretraining alone: give --lambda_u 0 and a --lambda_c above 0")
    if args.no_labels and (args.calib != "none" or args.labelled_anchors):
        raise UserError("--no_labels: there are no prototypes to calibrate with and no anchors; give --calib none")
    if args.labelled_anchors and args.lambda_c == 0:
        raise UserError("--labelled_anchors needs --lambda_c above 0")
    if (args.labelled is None) != (args.unlabelled is None):
        raise UserError("--labelled and --unlabelled go together: class folders, and a folder of the other images")
    others = ("data", "split_file", "labels_per_class", "split", "fraction", "per_class", "imbalance", "no_labels")
    for name in others if args.labelled else ():
        if name in args.given:
            raise UserError(f"--labelled names the labelled images, all of them: leave --{name} out")


def check_sizes(args: argparse.Namespace, images: int, labelled: bool) -> None:
    """UserError where a step takes more images than there are, or the queue does not hold what a step enqueues."""
    step = args.mu * args.batch_labelled
    if step > images:
        raise UserError(
            f"--batch_labelled {args.batch_labelled} x --mu {args.mu}: a step takes {step} unlabelled images, there "
            f"are {images}; lower one of the two"
        )
    if (keys := step + labelled * args.batch_labelled) > args.moco_k:
        raise UserError(f"--moco_k {args.moco_k}: a step enqueues {keys} keys; take at least so many")


def next_command(args: argparse.Namespace, run: Path) -> str:
    """What to do with a finished run: evaluate it where there are test images, else predict the unlabelled ones."""
    checkpoint = quote(str(run / "checkpoint.pth"))
    tested = not args.labelled and any((args.data / name).is_dir() for name in ("val", "test"))
    if tested and (args.data / "train").is_dir():
        which = f" --per_class {args.per_class}" if args.per_class else ""
        job = "eval_features" if args.no_labels else "eval_cls"
        return f"python -m sscl.{job} --pretrained {checkpoint} --data_dir {quote(str(args.data))}{which}"
    if args.no_labels:
        return f"python -m sscl.lab.export --pretrained {checkpoint} --out {quote(str(run / 'backbone.safetensors'))}"
    out = quote(str(run / "predictions.csv"))
    return f"python -m sscl.predict --pretrained {checkpoint} {quote(str(args.unlabelled or args.data))} --out {out}"
