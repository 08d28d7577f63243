"""One run: flags, seed, preflight, folder, log, progress, checkpoints with exact resume, signals, non-finite stop.

A training script reads top to bottom:

    run = Run(args, "mdp", "pretrain")              # device, processes, seed, output folder
    ...                                             # data, model, optimizer
    run.track(model=model, optimizer=optimizer)     # what the checkpoint holds
    run.reads(images)                               # what a resume has to find again
    run.preflight({...})                            # what is about to happen, and resume
    for epoch, batch in run.batches(loader, sampler, args.epochs):
        ...                                         # the step
        run.log(loss=loss, lr=lr)
    run.finish("the next command")
"""

import argparse
import contextlib
import errno
import fcntl
import json
import math
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import EpochSampler, fingerprint, mix_key, tell
from shared_utils.entry import Diverged, open_runs
from shared_utils.entry import cli as cli  # for the scripts' one line of imports
from shared_utils.flags import plain as plain
from shared_utils.provenance import DATA_FLAGS, RUNTIME_FLAGS, card, config_of, keep_results
from shared_utils.provenance import provenance as provenance

# Of `feat/std`, 1 where the features are spread over the sphere and 0 where they are one point: below it a run says at
# its end that it has collapsed. The runs in results.csv that learnt ended above 0.28, the one that collapsed at 0.002.
COLLAPSED = 0.05


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def statistics(state: Any) -> dict[str, Tensor]:
    """The running statistics of batch norms in a state_dict, which are each process's own, on the CPU."""
    last = ("running_mean", "running_var", "num_batches_tracked")
    if not isinstance(state, Mapping):  # a release's plain number
        return {}
    return {key: value.cpu() for key, value in state.items() if str(key).rsplit(".", 1)[-1] in last}


def set_threads(threads: int, workers: int, device: torch.device) -> None:
    """Threads of this process; 0 on a CPU means the cores that the data workers leave.

    Threads that compete with the workers cost far more than they add (ten times the step on two busy cores).
    """
    if threads or device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(threads or max(1, cores // local - workers))


def worker_init(_: int) -> None:
    torch.set_num_threads(1)
    # A signal may reach the whole group: the main process decides, and has half a minute to save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def numbers(values: Sequence[Tensor | float]) -> list[float]:
    """The values as Python numbers, those of a device all at once: a reading waits for what a GPU still has to do."""
    found = [float(value) if not isinstance(value, Tensor) else math.nan for value in values]
    by_device: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(place)
    for places in by_device.values():
        read = torch.stack([values[place].detach().reshape(()).double() for place in places]).tolist()  # type: ignore[union-attr]
        for place, number in zip(places, read):
            found[place] = number
    return found


def plain_errors(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader; a worker's UserError arrives wrapped in a traceback and leaves as its one line.

    Raises: RuntimeError, "DataLoader worker ...", as torch has it: a worker was killed, also where its connection broke
    while it handed over a batch, which torch does not tell as such.
    """
    batches: Iterator[Any] | None = None
    try:
        batches = iter(loader)
        yield from batches
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from None
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        for worker in getattr(batches, "_workers", ()):
            worker.join(1)  # one that is alive takes the second
            if worker.exitcode:
                how = f"exit code {worker.exitcode}" if worker.exitcode > 0 else f"signal {-worker.exitcode}"
                raise RuntimeError(f"DataLoader worker (pid {worker.pid}) ended by {how}: {error}") from error
        raise


def lock(folder: Path) -> IO[str]:
    """Hold `folder`/.lock for this process, until the file is closed or the process ends, however it ends.

    A record lock, which data workers do not inherit: a killed run's folder is free at once. Where the file system has
    no locks, nothing is held.

    Raises: UserError, another process that is alive holds it.
    """
    handle = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return handle
        handle.seek(0)
        owner = handle.read().strip()
        handle.close()
        raise UserError(
            f"{folder}: another run writes here ({owner}); wait for it or stop it, or give another --output-dir"
        ) from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    return handle


def stop_between() -> None:
    """Ends a run that was told to stop, between the batches of a pass over all images, which may take minutes.

    Only where the run's checkpoint holds all of its steps; otherwise the pass goes on and the run stops after its step.
    """
    for run in list(open_runs):
        if run.signalled and run.saved_step == run.step:
            run.leave(run.signalled)


class Run:
    """See the module's head. Attributes: `device`, `rank`, `world`, `dir`, `step`, `epoch`, `step_in_epoch`."""

    def __init__(self, args: argparse.Namespace, paper: str, job: str):
        self.args, self.name = args, f"{paper}/{job}"
        self.device = distributed.init(args.device)
        self.rank, self.world = distributed.rank(), distributed.world()
        if args.amp == "auto":
            args.amp = "bf16" if self.device.type == "cuda" else "none"
        set_threads(args.threads, args.workers, self.device)
        torch.backends.cudnn.benchmark = True  # inputs have one size
        seed_everything(args.seed)
        self.dir = Path(args.output_dir)
        self.step = self.epoch = self.step_in_epoch = 0
        self.data_wait = 0.0
        self._tracked: dict[str, Any] = {}
        self._data: list[list[Any]] = []  # number of files and hash of each list
        self._unread: Counter[str] = Counter()
        self.signalled = self.saved_step = 0
        self._compiled = False  # whether the script has said what --compile compiles
        self._total = -1  # steps of the whole run
        self._unseen: list[tuple[int, Tensor | float]] = []  # step and loss since the last look at them
        self._sum, self._count = 0.0, 0  # of the epoch's losses
        self._mean = math.nan  # loss of the last whole epoch
        self._row: dict[str, Any] = {}  # the last line of the log
        self.after_epoch: tuple[int, Callable[[], dict[str, float]]] | None = None  # every so many epochs, a test
        self._tested: dict[str, float] = {}  # what it found last
        self._began = 0  # the step at which this process took over
        self._lock: IO[str] | None = None
        self._handlers: dict[int, Any] = {}  # what the signals did before
        self._writer: Any = None
        self._started = time.time()
        self._seconds_before = 0.0
        self._bar: Any = None

    # -- before the first step ---------------------------------------------------------------------------------------
    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")

    def track(self, **stateful: Any) -> None:
        """Objects with state_dict / load_state_dict that the checkpoint holds beside the RNG and the position."""
        self._tracked.update(stateful)

    def compile(self, *networks: nn.Module, method: str = "forward") -> None:
        """With --compile, compile a method of each network (its backward pass too); keys of checkpoints stay.

        Call after `preflight`, which times a step of the network as it is. Each size of input is compiled by itself.
        """
        self._compiled = True
        if self.args.compile:
            for network in networks:
                setattr(network, method, torch.compile(getattr(network, method), dynamic=False))

    def loader(self, dataset: Dataset, sampler: EpochSampler) -> DataLoader:
        """Workers are persistent and pinned memory is used on GPUs; iterating leaves the global RNG untouched."""
        in_process = getattr(dataset, "in_process", False)  # it uses the device, which a worker cannot
        workers = 0 if in_process else self.args.workers
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=self.device.type == "cuda" and not in_process,
            persistent_workers=workers > 0,
            collate_fn=getattr(dataset, "collate_fn", None),
            worker_init_fn=worker_init,
            generator=torch.Generator(),
        )

    def reads(self, *data: Any) -> None:
        """What the run reads, as `ImageList`s or lists of paths: a resume demands the same, wherever it lies then.

        Without this line the flags of `DATA_FLAGS` have to be the same.
        """
        self._data = [list(x.fingerprint() if hasattr(x, "fingerprint") else fingerprint(x)) for x in data]
        for x in data:
            self._unread.update(getattr(x, "unread", {}))

    def preflight(self, facts: Mapping[str, Any]) -> None:
        """Print the facts and flags, resume if there is something to resume, open the logs, take over signals."""
        own = self.dir / "checkpoint.pth"
        there = distributed.agreed(
            own.is_file(),
            f"{own} is there for some processes and not for others; give an --output-dir that all nodes share",
        )
        resume_from = self.args.resume or (own if there and not self.args.overwrite else None)
        if self.args.overwrite and self.args.resume:
            raise UserError("--overwrite and --resume exclude each other")
        self.say(f"{self.name} -> {self.dir}")
        facts = {"device": f"{self.device} x {self.world}, amp {self.args.amp}", **facts}
        if self._unread:
            facts["not read"] = f"{tell(self._unread)} between the images"
        for key, value in facts.items():
            self.say(f"  {key}: {value}")
        self.say(
            "  flags: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in plain(self.args).items() if v is not None)
        )
        if self.world > 1:  # equal weights so far; dropout from here on differs between the processes
            torch.manual_seed(mix_key(self.args.seed, self.rank))
        if resume_from:
            self._resume(resume_from)
        distributed.barrier()  # nobody writes before everybody has read
        if self.rank == 0:
            self._open_logs(facts)
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _resume(self, path: Path) -> None:
        try:
            saved = checkpoint.load(path)
        except UserError as error:
            raise UserError(f"{error}, or start anew with --overwrite" if path.parent == self.dir else error) from None
        if not isinstance(saved, Mapping) or "progress" not in saved or "args" not in saved:
            raise UserError(
                f"{path}: not a checkpoint of this workspace's runs; move it away or give another --output-dir"
            )
        mine = {**plain(self.args), "world": self.world}
        theirs = {**saved["args"], "world": saved["progress"]["world"]}
        free = RUNTIME_FLAGS | (DATA_FLAGS if self._data else set())
        given, defaults = getattr(self.args, "given", set(mine)), getattr(self.args, "defaults", {})
        theirs = {**getattr(self.args, "older", {}), **theirs}  # what runs did before there was the flag
        changed = []
        for k in sorted(set(mine) | set(theirs)):
            newer = k not in theirs  # than the file: it had the default
            if k in free or (newer and k not in given) or mine.get(k) == theirs.get(k):
                continue
            name = "processes" if k == "world" else "--" + k.replace("_", "-")
            was = f"not there yet, {defaults.get(k)} by default" if newer else theirs.get(k)
            changed.append(f"{name} was {was}, is {mine.get(k)}")
        if changed:
            longer = f"; to train longer, start a new run from its weights: --init {quote(str(path))}"
            raise UserError(
                f"{path}: saved with other flags ({'; '.join(changed)}); repeat them, or give --overwrite, or another "
                f"--output-dir{longer if hasattr(self.args, 'init') and 'epoch' in ' '.join(changed) else ''}"
            )
        was, now = (bool(flags.get("compile")) for flags in (theirs, mine))
        if was != now:
            self.say(f"  --compile was {was}, is {now}: from here on the same up to rounding, not to the bit")
        other = [k for k in sorted(DATA_FLAGS & set(theirs)) if mine.get(k) != theirs[k]]
        moved = [f"--{k.replace('_', '-')} {theirs[k]}" for k in other]
        if "data" not in saved:
            if moved and self._data:
                self.say(f"  data: was {', '.join(moved)}; this older checkpoint does not tell whether it is the same")
        elif self._data and saved["data"] != self._data:
            before, found = (" and ".join(str(count) for count, _ in x) for x in (saved["data"], self._data))
            what = (
                f"{before} files then, {found} now"
                if before != found
                else "as many files, of other names, sizes or order"
            )
            raise UserError(
                f"{path}: saved on other data ({what}{'; it was ' if moved else ''}{', '.join(moved)}); give the data "
                "of that run, or --overwrite, or another --output-dir"
            )
        absent = [name for name in self._tracked if name not in saved]
        if absent:
            raise UserError(f"{path}: lacks {', '.join(absent)}; it belongs to another job")
        own = saved["local"][self.rank] if self.world > 1 and "local" in saved else {}
        for name, thing in self._tracked.items():
            thing.load_state_dict({**saved[name], **own[name]} if own.get(name) else saved[name])
        progress = saved["progress"]
        self.step, self.epoch, self.step_in_epoch = progress["step"], progress["epoch"], progress["step_in_epoch"]
        self._seconds_before, self.saved_step = progress["seconds"], self.step
        self._began = self.step
        self._sum, self._count = progress.get("losses", (0.0, 0))
        checkpoint.set_rng_state(saved["rng"][self.rank])
        self.say(f"  resumed: {path} at step {self.step} (epoch {self.epoch}, step {self.step_in_epoch} inside it)")

    def _open_logs(self, facts: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.dir)
            for half in self.dir.glob(".*.tmp"):  # what a killed run was writing
                half.unlink()
            log = self.dir / "log.jsonl"
            kept: list[str] = []
            if self.step and log.is_file():  # lines after the checkpoint will be written again
                for line in log.read_text().splitlines():
                    with contextlib.suppress(ValueError):
                        kept += [line + "\n"] if json.loads(line)["step"] <= self.step else []
            elif (self.dir / "config.json").is_file():  # a run of ours that starts anew
                for old in self.dir.glob("events.*"):
                    old.unlink()
            checkpoint.write(log, lambda handle: handle.write("".join(kept).encode()))  # killed here, it is still whole
            config = config_of(self.args)
            if not self.step:
                keep_results(self.dir, self.args)
            checkpoint.write_json(self.dir / "config.json", config)
        except OSError as error:
            raise UserError(f"{self.dir}: cannot write here ({error.strerror}); give another --output-dir") from None
        open_runs.append(self)
        self._writer = SummaryWriter(str(self.dir), purge_step=self.step + 1)
        self._writer.add_text("run/command_and_flags", card(config, facts), self.step)

    # -- while it runs -----------------------------------------------------------------------------------------------
    def batches(self, loader: DataLoader, sampler: EpochSampler, epochs: int) -> Iterator[tuple[int, Any]]:
        """Yield (epoch, batch) from the current position to the end; between batches: signals, saving, progress."""
        from tqdm import tqdm

        if self.args.compile and not self._compiled:
            raise UserError("--compile: this script has nothing to compile yet; leave it away")
        total = self._total = epochs * sampler.steps_per_epoch
        if self.epoch >= epochs > 0:
            self.say(f"  complete: {self.step} steps were done before; --overwrite starts anew")
        elif self.rank == 0:
            (self.dir / "end.json").unlink(missing_ok=True)
            self._bar = tqdm(total=total, initial=self.step, disable=not sys.stderr.isatty(), dynamic_ncols=True)
        if not epochs:  # the network as it was initialised
            self.save()
        while self.epoch < epochs:
            sampler.at(self.epoch, self.step_in_epoch)
            waiting = time.perf_counter()
            for batch in plain_errors(loader):
                self.data_wait = time.perf_counter() - waiting
                yield self.epoch, batch
                self.step += 1
                self.step_in_epoch += 1
                if self._bar is not None:
                    self._bar.update()
                self._stop_if_asked()
                if self.args.save_every and self.step % self.args.save_every == 0:
                    self.save()
                waiting = time.perf_counter()
            self.look()
            mean = self._mean = self._sum / self._count if self._count else math.nan
            if self._writer is not None and self._count:
                self._writer.add_scalar("loss/epoch", mean, self.step)
            self._sum, self._count = 0.0, 0
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
            self.save()
            if not sys.stderr.isatty() and (self.epoch == epochs or self.epoch % max(1, epochs // 20) == 0):
                done = f"epoch {self.epoch}/{epochs}, step {self.step}, {self.minutes():.1f} min"
                self.say(f"  {done}: mean loss {mean:.6g}; last line: {self._last}")
            self._test(epochs)

    _last = ""

    def _test(self, epochs: int) -> None:
        """What `after_epoch` asks for, where it is due; after saving, so that nothing is lost by a stop meanwhile."""
        if self.after_epoch is None or (self.epoch % self.after_epoch[0] and self.epoch != epochs):
            return
        self._tested = self.after_epoch[1]()
        self.say(f"  epoch {self.epoch}: " + ", ".join(f"{name} {value:.2f}" for name, value in self._tested.items()))
        if self._writer is not None:
            for name, value in self._tested.items():
                self._writer.add_scalar(name, value, self.step)

    def look(self, *values: Tensor | float) -> list[float]:
        """Read the losses that are still on the device, and `values` with them: one wait.

        Raises: Diverged, a loss is not finite.
        """
        read = numbers([*(loss for _, loss in self._unseen), *values])
        for (step, _), loss in zip(self._unseen, read):
            if not math.isfinite(loss):
                raise Diverged(
                    f"step {step}: the loss is {loss}; try a lower learning rate, --amp none, or another --seed "
                    f"(the last good checkpoint in {self.dir} is unharmed)"
                )
            self._sum, self._count = self._sum + loss, self._count + 1
        seen, self._unseen = len(self._unseen), []
        return read[seen:]

    def log(self, loss: Tensor | float, *, evaluated: Any = None, **values: Tensor | float) -> None:
        """Call once a step, after the update; writes every --log-every steps, the first and the last.

        Losses are read from the device when a line is due and before anything is saved; one that is not finite stops
        the run there and names its step.

        `evaluated`: {name: number} of what is not of every step (a test after an epoch); a step that has some is
        written in any case. Names with a slash go to tensorboard as they are; the others below `train/`.
        """
        self._unseen.append((self.step, loss.detach() if isinstance(loss, Tensor) else loss))
        if not (self.log_due() or evaluated):
            return
        values |= evaluated or {}
        number, *read = self.look(loss, *values.values())
        if self.rank != 0:
            return
        row: dict[str, Any] = {"step": self.step + 1, "epoch": self.epoch, "loss": round(number, 6)}
        row |= {k: float(f"{v:.6g}") for k, v in zip(values, read)} | {"data_wait": round(self.data_wait, 5)}
        self._row = row
        with open(self.dir / "log.jsonl", "a") as handle:
            handle.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key not in ("step", "loss") and math.isfinite(value):
                self._writer.add_scalar(key if "/" in key else f"train/{key}", value, self.step + 1)
        self._writer.add_scalar("loss/total", number, self.step + 1)
        self._last = " ".join(
            f"{k} {v}" for k, v in row.items() if k not in ("step", "epoch", "data_wait") and "/" not in k
        )
        if self._bar is not None:
            self._bar.set_postfix_str(self._last)

    def log_due(self) -> bool:
        """Whether this step is written to the log (the first, every --log-every, the last): telemetry is due."""
        return self.step == 0 or (self.step + 1) % self.args.log_every == 0 or self.step + 1 == self._total

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps (pictures) is due now, on rank 0."""
        return self.rank == 0 and self.step % every == 0

    def image(self, name: str, picture: Tensor) -> None:
        """Picture [3, H, W] in 0..1 to tensorboard."""
        self._writer.add_image(name, picture, self.step + 1)

    def text(self, name: str, markdown: str) -> None:
        self._writer.add_text(name, markdown, self.step + 1)

    def minutes(self) -> float:
        return (self._seconds_before + time.time() - self._started) / 60

    def _on_signal(self, number: int, _: Any) -> None:
        if self.signalled:  # the second time: at once
            os._exit(128 + number)
        self.signalled = number

    def _stop_if_asked(self) -> None:
        number = self.signalled
        if self.world > 1:  # every process stops after the same step
            asked = torch.tensor(number, device=self.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            number = int(asked)
        if number:
            self.save()
            self.leave(number)

    def leave(self, number: int) -> NoReturn:
        """End the process by a signal's number."""
        self.note(f"stopped by {signal.Signals(number).name}")
        self.say(f"  stopped by {signal.Signals(number).name} at step {self.step}; the same command goes on from here")
        self.close()
        if self.world > 1:
            os._exit(128 + number)
        raise SystemExit(128 + number)

    def save(self) -> None:
        """Everything that the run needs to go on exactly, to checkpoint.pth, atomically.

        Raises: Diverged, a loss since the last look is not finite; the older file stays.
        """
        self.look()
        rng: list[Any] = [checkpoint.rng_state()]
        local: list[Any] = []
        if self.world > 1:
            rng, local = [None] * self.world, [None] * self.world
            torch.distributed.all_gather_object(rng, checkpoint.rng_state())
            own = {name: statistics(thing.state_dict()) for name, thing in self._tracked.items()}
            torch.distributed.all_gather_object(local, own)
        if self.rank == 0:
            progress = {
                "step": self.step, "epoch": self.epoch, "step_in_epoch": self.step_in_epoch,
                "world": self.world, "seconds": self._seconds_before + time.time() - self._started,
                "losses": [self._sum, self._count],
            }  # fmt: skip
            state = {name: thing.state_dict() for name, thing in self._tracked.items()}
            meta: dict[str, Any] = {"epoch": self.epoch, "args": plain(self.args), "progress": progress, "rng": rng}
            if self._data:
                meta["data"] = self._data
            if job := getattr(self.args, "job", ""):
                meta["job"] = job
            if self.world > 1:
                meta["local"] = local
            checkpoint.save(self.dir / "checkpoint.pth", {**state, **meta})
        self.saved_step = self.step
        distributed.barrier()

    def close(self) -> None:
        """End the progress bar, write out what tensorboard has not written yet, give the signals back."""
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.close()
        if self in open_runs:  # last: what fails above is of this run
            open_runs.remove(self)

    def note(self, state: str) -> None:
        """How the run ended, to end.json: done, stopped by a signal, or the error. Without it a run has been killed."""
        if self.rank == 0 and self._writer is not None:
            end: dict[str, Any] = {"state": state, "step": self.step, "steps": self._total, "epoch": self.epoch}
            end |= {"minutes": round(self.minutes(), 3), "loss": self._mean if math.isfinite(self._mean) else None}
            end |= {"tests": self._tested} if self._tested else {}
            with contextlib.suppress(OSError, UserError):  # a full disk
                checkpoint.write(self.dir / "end.json", lambda handle: handle.write(json.dumps(end).encode() + b"\n"))

    def _hparams(self) -> None:
        """Flags, and the numbers of result.json, for tensorboard's HPARAMS page, which shows the run's scalars too.

        Without an `Experiment`, which would name the columns of all runs, tensorboard takes those that it finds.
        """
        from torch.utils.tensorboard.summary import hparams

        with contextlib.suppress(OSError, ValueError):
            for name, value in json.loads((self.dir / "result.json").read_text()).items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._writer.add_scalar(f"result/{name}", value, self.step)
        flags = {k: v for k, v in plain(self.args).items() if v is not None and k not in RUNTIME_FLAGS}
        flags = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in flags.items()}
        for summary in hparams({**flags, "job": getattr(self.args, "job", "")}, {})[1:]:
            self._writer.file_writer.add_summary(summary)

    def finish(self, *lines: str) -> None:
        """Note the end, close the logs and print where things are and what to do next."""
        if self._writer is not None and (self.step > self._began or not (self.dir / "end.json").is_file()):
            self._hparams()
            self.note("done")
        self.close()
        self.say(f"  done: {self.step} steps in {self.minutes():.1f} min; {self.dir}/checkpoint.pth")
        if (spread := self._row.get("feat/std", 1.0)) < COLLAPSED:
            self.say(
                f"  collapsed: feat/std is {spread:.2g} (1: spread, 0: all features alike), so these weights tell "
                "images apart no longer; try a lower learning rate, a larger batch or queue, or another --seed"
            )
        self.say(f"  look: tensorboard --logdir {self.dir}")
        for line in lines:
            self.say(f"  {line}")
