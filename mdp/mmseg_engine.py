"""Fine-tuning and evaluation inside mmsegmentation: what our runs add to its Runner.

Importing mmsegmentation takes some ten seconds: the entry points import this module when their input is checked.
Networks, losses, data pipelines, optimiser, schedule, validation loop and IoU are mmsegmentation's own. Ours are:
samples and dropout whose randomness depends on (seed, position) alone, so that a resumed run draws the same; the
record of each validation; tensorboard; and a clean stop on a signal or a non-finite loss.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmseg.models  # noqa: F401  (registers the networks)
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import DATA_SAMPLERS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS, METRICS
from torch.utils.data import Dataset, Sampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import mdp.mmseg_datasets  # noqa: F401  (registers the folder's datasets)
from mdp.visualize import panels
from shared_utils import UserError, distributed
from shared_utils.data import Keyed, load_image
from shared_utils.layout import place
from shared_utils.run import Diverged, card

OVERLAYS = 4  # validation images that reach tensorboard


@DATASETS.register_module()
class KeyedDataset(Keyed):
    """A dataset of mmsegmentation whose augmentations depend on (seed, epoch, index) alone."""

    def __init__(self, dataset: dict, seed: int) -> None:
        super().__init__(DATASETS.build(dataset), seed)

    @property
    def metainfo(self) -> dict:
        return self.dataset.metainfo  # type: ignore[attr-defined]

    def full_init(self) -> None:
        self.dataset.full_init()  # type: ignore[attr-defined]


@DATA_SAMPLERS.register_module()
class KeyedSampler(Sampler):
    """An endless stream of (epoch, index); the permutation of an epoch depends on (seed, epoch) alone."""

    def __init__(self, dataset: Dataset, seed: int = 0) -> None:
        self.size, self.seed, self.first = len(dataset), seed, 0  # type: ignore[arg-type]
        self.rank, self.world = distributed.rank(), distributed.world()

    def skip(self, num_samples: int) -> None:
        """Start after the first ``num_samples`` of this process (mmengine calls it on a resume)."""
        self.first = num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.first * self.world + self.rank
        current, order = -1, torch.empty(0)
        while True:
            epoch, i = divmod(position, self.size)
            if epoch != current:
                generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + epoch)
                current, order = epoch, torch.randperm(self.size, generator=generator)
            yield epoch, int(order[i])
            position += self.world

    def __len__(self) -> int:
        return self.size


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """bf16 autocast without a loss scaler, on GPUs and CPUs (mmengine's AMP wrapper demands a GPU)."""

    def optim_context(self, model: torch.nn.Module) -> Any:
        return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


@METRICS.register_module()
class ClassIoU(IoUMetric):
    """mmsegmentation's IoUMetric that keeps the IoU of each class in percent (nan: in neither map)."""

    per_class: dict[str, float]

    def compute_metrics(self, results: list) -> dict[str, float]:
        intersect, union = (sum(areas).double() for areas in list(zip(*results))[:2])
        iou = (100 * intersect / union).tolist()
        self.per_class = dict(zip(self.dataset_meta["classes"], iou))
        return super().compute_metrics(results)


def table(per_class: dict[str, float]) -> str:
    """Markdown table of IoU per class, for tensorboard's text tab."""
    rows = [f"| {name} | {'-' if math.isnan(v) else f'{v:.2f}'} |" for name, v in per_class.items()]
    return "\n".join(["| class | IoU |", "|---|---|", *rows])


class Recorder(Hook):
    """Log, validations, pictures, reproducible dropout, stop on a signal or a non-finite loss."""

    priority = "LOWEST"  # after the scheduler and the checkpoint hook: a saved step is a finished step

    def __init__(self, out: Path, seed: int, due: set[int], log_every: int = 10) -> None:
        self.out, self.seed, self.due, self.log_every = out, seed, due, log_every
        self.records: list[dict[str, Any]] = []
        self.signal = 0
        self.pictures: list[tuple[str, np.ndarray]] = []
        self.main = distributed.rank() == 0
        self.writer = SummaryWriter(str(out)) if self.main else None
        self.bar: Any = None
        self.mark, self.wait, self.lr = time.time(), 0.0, 0.0

    # -- training
    def before_train(self, runner: Runner) -> None:
        path = self.out / "validations.json"
        if runner.iter > 0 and path.is_file():
            self.records = [r for r in json.loads(path.read_text()) if r["iter"] <= runner.iter]
        self.bar = tqdm(total=runner.max_iters, initial=runner.iter, disable=None if self.main else True, unit="it")
        # Killed between a checkpoint and the validation that follows it: that validation comes first.
        if runner.iter in self.due and all(r["iter"] != runner.iter for r in self.records):
            assert runner.val_loop is not None
            runner.val_loop.run()
        self.mark = time.time()
        config = self.out / "config.json"
        if self.writer is not None and config.is_file():
            self.writer.add_text("run/command_and_flags", card(json.loads(config.read_text()), {}), runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        torch.manual_seed((self.seed + 1) * 1_000_003 + batch_idx)  # dropout
        self.wait = time.time() - self.mark
        self.lr = runner.optim_wrapper.get_lr()["lr"][0]

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        assert outputs is not None
        loss, step = float(outputs["loss"].detach()), batch_idx + 1
        if not math.isfinite(loss):
            raise Diverged(f"loss is {loss} at iteration {step}; the last checkpoint stays, try a lower --lr")
        self.bar.update()
        if self.main and (step % self.log_every == 0 or step == runner.max_iters or step == 1):
            line = {"step": step, "epoch": 0, "loss": loss, "lr": self.lr, "data_wait": round(self.wait, 4)}
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
            for name, key in (("loss/total", "loss"), ("train/lr", "lr"), ("train/data_wait", "data_wait")):
                self.writer.add_scalar(name, line[key], step)  # type: ignore[union-attr]
            self.bar.set_postfix(loss=f"{loss:.3f}")
        if self.signal:
            name = f"iter_{step}.pth"
            runner.save_checkpoint(runner.work_dir, name, by_epoch=False)
            if self.main:
                (Path(runner.work_dir) / "last_checkpoint").write_text(str(Path(runner.work_dir) / name))
                print(f"stopped at iteration {step}; the same command goes on from there", flush=True)
            raise SystemExit(128 + self.signal)
        self.mark = time.time()

    # -- validation
    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.picture(outputs, runner.val_evaluator)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.picture(outputs, runner.test_evaluator)

    def picture(self, outputs: Any, evaluator: Any) -> None:
        """Keep photo, label and prediction of the first images of a validation."""
        for sample in outputs or []:
            if len(self.pictures) >= OVERLAYS or not self.main:
                return
            photo = np.asarray(load_image(sample.img_path))
            truth, guess = (m.data[0].cpu().numpy() for m in (sample.gt_sem_seg, sample.pred_sem_seg))
            palette = evaluator.metrics[0].dataset_meta["palette"]
            self.pictures.append((Path(sample.img_path).stem, panels(photo, truth, guess, palette)))

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.record(runner.val_evaluator.metrics[0], metrics or {}, runner.iter)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.record(runner.test_evaluator.metrics[0], metrics or {}, 0)

    def record(self, metric: ClassIoU, metrics: dict[str, float], step: int) -> None:
        """Keep one validation and show it in tensorboard."""
        if not self.main:
            return
        scores = {key: float(metrics[key]) for key in ("mIoU", "aAcc", "mAcc")}
        per_class = {k: None if math.isnan(v) else round(v, 2) for k, v in metric.per_class.items()}
        self.records.append({"iter": step, **scores, "per_class": per_class})
        temporary = self.out / "validations.json.tmp"
        temporary.write_text(json.dumps(self.records, indent=1))
        os.replace(temporary, self.out / "validations.json")
        assert self.writer is not None
        for key, value in scores.items():
            self.writer.add_scalar(f"val/{key}", value, step)
        self.writer.add_text("val/IoU", table(metric.per_class), step)
        for name, picture in self.pictures:
            self.writer.add_image(f"val/{name} (photo, label, prediction)", picture, step, dataformats="HWC")
        self.pictures = []
        self.writer.flush()
        tqdm.write(
            f"  iteration {step}: mIoU {scores['mIoU']:.2f}, aAcc {scores['aAcc']:.2f}, mAcc {scores['mAcc']:.2f}"
        )


def prepare(cfg: Config, out: Path, seed: int, workers: int) -> Config:
    """Settings of every run here, for training and evaluation: keyed data, own log, no network, no noise."""
    world = distributed.world()
    cfg.launcher = "pytorch" if world > 1 else "none"
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader = cfg[name]
        loader.num_workers, loader.persistent_workers = workers, workers > 0
        if not torch.cuda.is_available():
            loader.pin_memory = False
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type="KeyedDataset", dataset=inner, seed=seed)
    cfg.train_dataloader.sampler = dict(type="KeyedSampler")
    if cfg.train_dataloader.batch_size % world:
        raise UserError(f"--batch-size {cfg.train_dataloader.batch_size} is not a multiple of {world} processes")
    cfg.train_dataloader.batch_size //= world
    if world > 1 and torch.cuda.is_available():
        for part in (cfg.model.backbone, cfg.model.decode_head):
            part.norm_cfg = dict(type="SyncBN", requires_grad=True)
    if world > 1:
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", **distributed.buffers_apart())
        if not torch.cuda.is_available():  # mmengine's default names a GPU
            cfg.model_wrapper_cfg.device_ids = None
    cfg.val_evaluator.type = cfg.test_evaluator.type = "ClassIoU"
    cfg.default_hooks.logger = None  # the Recorder logs
    cfg.visualizer = dict(type="Visualizer", vis_backends=[])
    cfg.randomness = dict(seed=seed)
    cfg.work_dir = str(out / "mmengine")
    cfg.experiment_name = f"{out.name}-{time.time_ns()}"  # loggers are kept by name
    cfg.log_level = "ERROR"
    cfg.load_from, cfg.resume = None, False
    return cfg


def quiet() -> None:
    """mmengine announces every default it takes; errors still come through."""
    warnings.filterwarnings("ignore", module=r"(mmengine|mmcv|mmseg|torch\.utils\.data)(\..*)?")
    logging.getLogger("mmengine").setLevel(logging.ERROR)


def build_runner(cfg: Config) -> Runner:
    """The Runner with an initialised model; a scratch and a pretrained run draw the same random numbers."""
    quiet()
    runner = Runner.from_cfg(cfg)
    network(runner).init_weights()
    distributed.same_buffers(network(runner))
    if distributed.world() == 1:  # DDP has fixed the layout of its gradients already
        place(network(runner), next(network(runner).parameters()).device)
    return runner


def network(runner: Runner) -> Any:
    """The segmentor itself, without the wrapper of several processes."""
    return getattr(runner.model, "module", runner.model)


def train(runner: Runner, recorder: Recorder, resume: bool) -> None:
    """Run the schedule, from mmengine's last checkpoint if ``resume``; Ctrl-C and SIGTERM stop after a step."""
    runner.register_hook(recorder, priority=recorder.priority)
    runner._resume = resume

    def note(number: int, _: Any) -> None:
        recorder.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        runner.train()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if recorder.bar is not None:
            recorder.bar.close()
        if recorder.writer is not None:
            recorder.writer.close()
