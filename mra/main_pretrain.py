"""Pretraining of the masked autoencoder: python -m mra.main_pretrain --data_path IMAGENET --model mae_mini_patch16

Flags and defaults of facebookresearch/mae's main_pretrain; also torchrun --nproc-per-node 8 -m mra.main_pretrain ...
"""

import math
import time
from collections.abc import Mapping
from shlex import quote
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms as T

from mra import data, transforms
from mra.models_mae import FLAGS, MAE, SIZES, len_keep, resolve, start, unpatchify
from mra.mra import pixel_mask
from shared_utils import UserError, augment, checkpoint, distributed
from shared_utils.data import EpochSampler, Keyed, mix_key
from shared_utils.evaluation import write_result
from shared_utils.flags import Parser, add_run_flags, natural, not_negative, positive
from shared_utils.init import add_init_flag
from shared_utils.pictures import make_grid
from shared_utils.run import Run, cli, plain


def get_parser() -> Parser:
    p = Parser(prog="mra.main_pretrain", description=(__doc__ or "").splitlines()[0])
    a = p.add_argument
    data.add_data_flags(p, 224)
    data.add_holdout_flag(p)
    add_init_flag(p)
    a("--model", choices=list(SIZES), default="mae_mini_patch16", help="sizes of encoder and decoder")
    for flag, what in zip(FLAGS, ("p, side of a patch", "De", "encoder blocks", "", "Dd", "decoder blocks", "")):
        a(f"--{flag}", type=positive, help=f"{what or 'heads'}; default: --model's")
    a("--mask_ratio", type=float, default=0.75, help="r, share of erased patches")
    a("--norm_pix_loss", action="store_true", help="normalised patches as targets: of no use for MRA")
    a("--batch_size", type=positive, default=64, help="images of a process and a pass")
    a("--accum_iter", type=positive, default=1, help="passes whose gradients make one step")
    a("--epochs", type=positive, default=400)
    a("--warmup_epochs", type=natural, default=40)
    a("--lr", type=float, help="absolute; default: --blr * effective batch / 256")
    a("--blr", type=float, default=1e-3)
    a("--min_lr", type=not_negative, default=0.0)
    a(
        "--weight_decay",
        "--wd",
        type=not_negative,
        default=0.05,
        help="of everything but biases and other 1-d parameters",
    )
    a("--min_scale", type=float, default=0.2, help="least area of a crop")
    a("--resident", action="store_true", help="images in the device's memory, crops made there a batch at a time: for "
      "small images; not the paper's PIL pipeline")  # fmt: skip
    a("--ckpt_freq", type=natural, default=20, help="epochs between checkpoint-EPOCH.pth, weights alone; 0: none")
    a("--image_every", type=positive, default=500, help="steps between pictures in tensorboard")
    add_run_flags(p, "mra/pretrain/default")
    return p


def check_flags(args: Any) -> None:
    """UserError for flags out of range, before anything is loaded."""
    if not 0 < args.mask_ratio < 1 or not 0 < args.min_scale <= 1:
        raise UserError("--mask_ratio must lie between 0 and 1, and --min_scale above 0 and up to 1")
    if not args.blr > 0 or (args.lr is not None and not args.lr > 0):
        raise UserError("--blr and --lr must be above 0")


def learning_rate(args: Any, epoch: float) -> float:
    """Of a fraction of an epoch: linear warm-up, then half a cosine to --min_lr."""
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    through = (epoch - args.warmup_epochs) / max(1e-9, args.epochs - args.warmup_epochs)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * through)) / 2


def groups(mae: MAE, weight_decay: float) -> list[dict[str, Any]]:
    """No decay of biases and 1-d parameters; the class and mask tokens are 3-d and do get it."""
    trained = [q for q in mae.parameters() if q.requires_grad]
    return [
        {"params": [q for q in trained if q.ndim <= 1], "weight_decay": 0.0},
        {"params": [q for q in trained if q.ndim > 1], "weight_decay": weight_decay},
    ]


class Last:
    """Loss of the last step, kept in the checkpoint for the result of a run that is complete."""

    loss: Tensor | float = float("nan")

    def state_dict(self) -> dict[str, float]:
        return {"loss": float(self.loss)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.loss = state["loss"]


def noise_of(run: Run, count: int, patches: int) -> Tensor:
    """U(0, 1) [count, L] for this process's images of this step, drawn for all processes together."""
    generator = torch.Generator().manual_seed(mix_key(run.args.seed, run.step, 7) >> 1)
    return torch.rand(count * run.world, patches, generator=generator)[run.rank * count : (run.rank + 1) * count]


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    run = Run(args, "mra", "pretrain")
    check_flags(args)
    local = args.batch_size * args.accum_iter  # images of a process and a step
    effective = local * run.world
    args.lr = args.blr * effective / 256 if args.lr is None else args.lr

    # Data: training images alone, labels unread.
    images = data.open_unlabelled(args)
    data.needs(
        images, effective, f"--batch_size {args.batch_size} x --accum_iter {args.accum_iter} x {run.world} processes"
    )
    images.transform = T.Compose(
        [transforms.geometry(args.input_size, "resized", args.min_scale, True), transforms.tensor()]
    )
    sampler = EpochSampler(len(images), local, args.seed, run.rank, run.world)
    loader: Any
    if args.resident:
        loader = data.Resident(images, args.input_size, sampler, args.seed, run.device, args.min_scale)
    else:
        loader = run.loader(Keyed(images, args.seed), sampler)

    # Model
    mae = MAE(args.input_size, resolve(args.model, vars(args)), args.norm_pix_loss)
    started = start(mae, args.init) if args.init else "random weights"
    mae.to(run.device).train()
    if not 0 < len_keep(mae.patches, args.mask_ratio) < mae.patches:
        raise UserError(f"--mask_ratio {args.mask_ratio} keeps all or none of {mae.patches} patches")
    net = distributed.wrap(mae)
    cuda = run.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups(mae, args.weight_decay), args.lr, betas=(0.9, 0.95), fused=cuda)
    last = Last()
    run.track(model=mae, optimizer=optimizer, last=last)
    steps = sampler.steps_per_epoch
    run.reads(images)
    run.preflight(facts(run, mae, len(images), effective, steps) | {"start": started})

    for epoch, batch in run.batches(loader, sampler, args.epochs):
        lr = learning_rate(args, epoch + run.step_in_epoch / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x_all = batch[0].to(run.device, non_blocking=True)  # [accum_iter * B, 3, H, H]
        noise_all = noise_of(run, local, mae.patches).to(run.device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=run.device)
        for x, noise in zip(x_all.chunk(args.accum_iter), noise_all.chunk(args.accum_iter)):
            with run.autocast():
                loss, pred, mask = net(x, noise, args.mask_ratio)
            (loss / args.accum_iter).backward()
            total += loss.detach() / args.accum_iter
        optimizer.step()
        last.loss = distributed.all_sum(total) / run.world
        run.log(last.loss, lr=lr)
        if run.due(args.image_every):
            run.image("views/input_masked_reconstruction", picture(mae, x, pred.detach().float(), mask))
        if args.ckpt_freq and run.step_in_epoch == steps - 1 and run.rank == 0:
            if (epoch + 1) % args.ckpt_freq == 0 or epoch + 1 == args.epochs:
                weights = {"model": mae.state_dict(), "epoch": epoch, "args": plain(args)}
                checkpoint.save(run.dir / f"checkpoint-{epoch}.pth", weights)

    result = {"loss": float(last.loss), "minutes": run.minutes(), "epochs": args.epochs}
    write_result(run.dir, result)
    run.finish(*hints(run, len(images)))
    return 0


def hints(run: Run, count: int) -> list[str]:
    """What to do with the autoencoder of this run, whose checkpoint tells the size of its images."""
    args = run.args
    mae = f"--mae_ckpt {quote(f'{run.dir}/checkpoint.pth')}"
    where = f"--data_path {quote(str(args.data_path))}" + f" --dataset {args.dataset}" * (args.dataset != "folder")
    lines = [f"look at it: python -m mra.visualize {mae} {where}"]
    if args.dataset == "folder" and not data.in_classes(args.data_path):
        return [*lines, f"next: python -m mra.augment {quote(str(args.data_path))} {mae} --out augmented"]
    more = f" --holdout {args.holdout}" * bool(args.holdout) + " --batch_size 32 --lr 0.0125" * (count < 1024)
    return [*lines, f"next: python -m mra.main_supervised {mae} {where}{more}"]


def picture(mae: MAE, x: Tensor, pred: Tensor, mask: Tensor, count: int = 8) -> Tensor:
    """Rows: input, what is visible, the reconstruction pasted into it."""
    x, hole = x[:count].float(), pixel_mask(mask[:count], mae.p)
    filled = x * (1 - hole) + (unpatchify(pred[:count], mae.p) if not mae.norm_pix_loss else 0 * x) * hole
    rows = [augment.denormalise(v).cpu() for v in (x, x * (1 - hole), filled)]
    return make_grid(torch.cat(rows), nrow=len(x), padding=2)


def facts(run: Run, mae: MAE, count: int, effective: int, steps: int) -> dict[str, str]:
    """What the preflight prints."""
    args = run.args
    trained = sum(q.numel() for q in mae.parameters() if q.requires_grad) / 1e6
    return {
        "data": f"{args.data_path}: {count} images, labels unread{', cropped on the device' * args.resident}",
        "batch": f"{effective} = {run.world} processes x {args.batch_size} x {args.accum_iter}, {steps} steps an "
        f"epoch, {args.epochs} epochs",
        "learning rate": f"{args.lr:.3g} (= blr x {effective} / 256 with blr {args.lr * 256 / effective:.3g})",
        "parameters": f"{trained:.2f} M; {len_keep(mae.patches, args.mask_ratio)} of {mae.patches} patches visible",
        "expected initial loss": "about 1 to 2, the variance of normalised pixels plus that of the first predictions",
        "estimated time": estimate(run, mae, steps),
    }  # fmt: skip


@torch.no_grad()
def estimate(run: Run, mae: MAE, steps: int) -> str:
    """Minutes of the whole run from a timed forward pass; a backward pass counts as two."""
    args = run.args
    x = torch.zeros(args.batch_size, 3, args.input_size, args.input_size, device=run.device)
    noise = torch.rand(args.batch_size, mae.patches, generator=torch.Generator().manual_seed(0)).to(run.device)
    for _ in range(2):
        started = time.perf_counter()
        with run.autocast():
            mae(x, noise, args.mask_ratio)[0].item()
        seconds = time.perf_counter() - started
    minutes = 3 * seconds * args.accum_iter * steps * args.epochs / 60
    return f"about {max(1, round(minutes))} min for {steps * args.epochs} steps if data loading keeps up"


if __name__ == "__main__":
    cli(main)
