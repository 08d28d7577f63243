"""The training script of sscl: arms, what a step computes, hidden labels, exact resume, two processes, bad input."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils import UserError, checkpoint
from shared_utils.data import ImageList
from shared_utils.lab import mini
from shared_utils.run import Diverged, Run
from sscl import data as sscl_data
from sscl import eval_cls, losses, main, options
from sscl.arch import Encoder
from sscl.model import SsCL
from tests.checkpoints import differing
from tests.sscl_images import SMALL, rows, train, write_images

ROOT = Path(__file__).resolve().parents[1]
SUPERVISED = "--lambda_u 0 --lambda_c 0"
FIXMATCH = "--lambda_c 0 --calib none --da off"
PUBLISHED = f"{FIXMATCH} --strong fixmatch --joint_views --bn_momentum 0.1"
JOINT = "--calib none --neighbours off"
MOCO = "--no_labels --lambda_u 0 --calib none --num_pos 0"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "present", "absent"),
    [
        ("", "pl/acc_calib neighbours/num_pos proto/mean_offdiag_cos proto/min_count da/entropy", ""),
        (SUPERVISED, "", "pl/acc_raw neighbours/num_pos proto/mean_offdiag_cos"),
        (FIXMATCH, "pl/acc_raw pl/coverage", "pl/acc_calib neighbours/num_pos proto/mean_offdiag_cos"),
        (PUBLISHED, "pl/acc_raw pl/coverage", "pl/acc_calib neighbours/num_pos proto/mean_offdiag_cos"),
        (JOINT, "pl/acc_calib neighbours/num_pos", ""),
        ("--joint_views", "neighbours/num_pos pl/acc_calib", ""),
        ("--calib none --ctr per_positive --sim embed", "neighbours/num_pos", ""),
        (
            "--neighbours off --sim embed --proto ema --calib average --labelled_anchors",
            "neighbours/num_pos pl/acc_calib",
            "",
        ),
        ("--calib prior --proto labelled --theta_ramp --soft_targets --da ema", "pl/acc_calib", ""),
        (
            "--calib geomean --strong randaug --aug_backend pil --key_view strong --balanced off --schedule cos7_16",
            "pl/acc_calib",
            "",
        ),
        (MOCO, "", "pl/acc_raw neighbours/num_pos proto/mean_offdiag_cos"),
        ("--arch wrn28 --theta_on sharp --diagnostics off --ctr_start 1 --amp bf16", "pl/coverage", "pl/acc_raw"),
    ],
)
def test_every_arm_trains(arm, present, absent, data, tmp_path):
    log = train(data, tmp_path, *arm.split())
    assert len(log) == 12 and log[0].keys() >= {"loss", "lr", "loss/x", "loss/u", "loss/c", "data_wait"}
    assert set(present.split()) <= set(log[-1]) and not set(absent.split()) & set(log[-1])
    state = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    keys = "queue queue_label queue_conf queue_index queue_ptr prototypes encoder_q.fc.weight encoder_k.proj.2.bias"
    assert set(keys.split()) <= set(state)
    used = [bool(log[-1][f"loss/{name}"]) for name in "xuc"]
    assert used == [arm != MOCO, arm not in (SUPERVISED, MOCO), arm not in (SUPERVISED, FIXMATCH, PUBLISHED)]
    assert all(row["loss/u"] == 0 for row in log[:6])  # --pl_start 1
    assert bool((state["queue_index"] >= 0).any()) == (arm not in (SUPERVISED, FIXMATCH, PUBLISHED))


@pytest.mark.parametrize(("theta", "coverage"), [("1.01", 0), ("0", 1)])
def test_thresholds_at_both_ends(theta, coverage, data, tmp_path):
    log = train(data, tmp_path, "--theta", theta)
    assert all(row["pl/coverage"] == coverage for row in log[6:])
    assert all((row["loss/u"] > 0) == (coverage == 1) for row in log[6:])
    assert (log[-1]["neighbours/num_pos"] > 1) == (coverage == 1)


class Spy:
    """What a run computes, step by step."""

    def __init__(self, monkeypatch):
        self.steps: list[dict[str, Any]] = [{}]
        predict, forward, contrast, log = SsCL.predict, SsCL.forward, losses.contrast, Run.log

        def predicted(model, weak):
            self.steps[-1]["p"] = predict(model, weak)
            return self.steps[-1]["p"]

        def outputs(model, views):
            self.steps[-1]["out"] = forward(model, views)
            return self.steps[-1]["out"]

        def contrasted(v, key, queue, chosen, tau, form):
            self.steps[-1].setdefault("contrast", []).append((v.detach(), key, queue.clone(), chosen))
            return contrast(v, key, queue, chosen, tau, form)

        def logged(run, loss, **values):
            self.steps[-1]["loss"] = loss.clone()
            log(run, loss, **values)
            self.steps.append({})

        monkeypatch.setattr(SsCL, "predict", predicted)
        monkeypatch.setattr(SsCL, "forward", outputs)
        monkeypatch.setattr(losses, "contrast", contrasted)
        monkeypatch.setattr(Run, "log", logged)


def test_fixmatch_to_the_bit(data, tmp_path, monkeypatch):
    spy, labels = Spy(monkeypatch), []
    ce = F.cross_entropy

    def watched(logits, target, **more):
        labels.append(target)
        return ce(logits, target, **more)

    monkeypatch.setattr(F, "cross_entropy", watched)
    train(data, tmp_path, *FIXMATCH.split(), "--pl_start", "0", "--theta", "0.35", "--theta_on", "sharp")
    monkeypatch.undo()
    kept = 0
    for number, step in enumerate(spy.steps[:-1]):
        (x, _), (strong, _) = step["out"]
        confidence, guess = step["p"].max(1)
        mask = confidence >= 0.35
        kept += int(mask.sum())
        fixmatch = ce(x, labels[2 * number]) + (ce(strong, guess, reduction="none") * mask).mean()
        assert torch.equal(step["loss"], fixmatch.detach())
    assert 8 < kept < 12 * 8


def test_fixmatch_as_published_to_the_bit(data, tmp_path, monkeypatch):
    """Labelled, weak and strong views in one pass of one batch norm; the weak ones' argmax above 0.35 is the target."""
    batches: list[tuple[Tensor, Tensor]] = []
    losses_seen: list[Tensor] = []
    forward, log, ce, labels = Encoder.forward, Run.log, F.cross_entropy, []

    def passed(encoder, x):
        out = forward(encoder, x)
        batches.append((x.detach(), out[0]))
        return out

    def logged(run, loss, **values):
        losses_seen.append(loss.clone())
        log(run, loss, **values)

    def watched(logits, target, **more):
        labels.append(target)
        return ce(logits, target, **more)

    monkeypatch.setattr(Encoder, "forward", passed)
    monkeypatch.setattr(Run, "log", logged)
    monkeypatch.setattr(F, "cross_entropy", watched)
    flags = [*PUBLISHED.split(), "--pl_start", "0", "--theta", "0.35", "--bn_splits", "1"]
    train(data, tmp_path, *flags)
    monkeypatch.undo()
    assert len(batches) == len(losses_seen) == 12 and {len(x) for x, _ in batches} == {4 + 8 + 8}
    kept = 0
    for number, (_, logits) in enumerate(batches):
        own, weak, strong = logits.split([4, 8, 8])
        confidence, guess = weak.softmax(1).max(1)
        kept += int((confidence >= 0.35).sum())
        u = (ce(strong, guess, reduction="none") * (confidence >= 0.35)).mean()
        assert torch.equal(losses_seen[number], (ce(own, labels[2 * number]) + u).detach())
    assert 8 < kept < 12 * 8


@pytest.mark.parametrize("momentum", [0.1, 0.25])
def test_the_ema_is_tested_with_statistics_of_its_own_window(momentum, data, tmp_path, monkeypatch):
    """Without key passes the copy takes the query's running statistics, whose momentum is --bn_momentum: those of the
    steps before, since the copy follows at the start of a step."""
    means: list[Tensor] = []
    forward = Encoder.forward

    def passed(encoder, x):
        out = forward(encoder, x)
        first = F.conv2d(x.float(), encoder.backbone.conv1.weight, padding=1)
        means.append(first.mean((0, 2, 3)).detach())
        return out

    monkeypatch.setattr(Encoder, "forward", passed)
    train(data, tmp_path, *PUBLISHED.split(), "--bn_momentum", str(momentum), "--bn_splits", "1", "--pl_start", "0")
    expected = [torch.zeros_like(means[0])]
    for mean in means:
        expected.append(expected[-1].lerp(mean, momentum))
    state = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    for copy, at in (("encoder_q", -1), ("encoder_k", -2)):
        torch.testing.assert_close(state[f"{copy}.backbone.bn1.running_mean"], expected[at], rtol=1e-4, atol=1e-5)
    weights = [state[f"{copy}.backbone.conv1.weight"] for copy in ("encoder_q", "encoder_k")]
    assert not torch.equal(*weights)  # --moco_m 0.9: an average


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{SUPERVISED} --joint_views", "--joint_views: this arm makes no predictions of weak views"),
        (f"{MOCO} --joint_views", "--joint_views: this arm makes no predictions of weak views"),
        ("--bn_momentum 0", "--bn_momentum 0.0: must lie above 0"),
        ("--bn_momentum 1.5", "--bn_momentum 1.5: must lie above 0"),
    ],
)
def test_flags_of_fixmatch_that_contradict_an_arm(flags, message, data, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        train(data, tmp_path, *flags.split())


def test_without_labels_it_is_moco(data, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    train(data, tmp_path, *MOCO.split(), "--epochs", "1")
    assert len(spy.steps) == 7
    for step in spy.steps[:-1]:
        ((v, key, queue, _),) = step["contrast"]
        logits = torch.cat([(v * key).sum(1, keepdim=True), v @ queue], 1) / 0.2
        moco = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
        torch.testing.assert_close(step["loss"], moco)


def test_a_step_in_its_order(data, tmp_path, monkeypatch):
    """The loss sees the queue as it was; z is the momentum copy's key; alignment, product, threshold, Sharpen."""
    spy, queues, seen = Spy(monkeypatch), [], []
    enqueue, similarity = SsCL.enqueue, main.log_similarity

    def enqueued(model, keys, entries, labelled):
        queues.append((model.queue.clone(), keys, entries, labelled, model.alignment.pbar.clone()))
        enqueue(model, keys, entries, labelled)

    def similar(z, mu, tau_s):
        seen.append((z, mu.clone(), tau_s))
        return similarity(z, mu, tau_s)

    monkeypatch.setattr(SsCL, "enqueue", enqueued)
    monkeypatch.setattr(main, "log_similarity", similar)
    train(data, tmp_path)
    positives = 0
    for number, step in enumerate(spy.steps[:-1]):
        ((_, key, queue, chosen),) = step["contrast"]
        before, keys, entries, labelled, pbar = queues[2 * number]
        z, mu, tau_s = seen[number]
        assert torch.equal(queue, before) and torch.equal(key, keys) and torch.equal(z, keys) and tau_s == 0.1
        assert not labelled and queues[2 * number + 1][3]
        known = queues[2 * number + 1][2]
        assert set(known.label.tolist()) <= {0, 1, 2}  # true labels, with the network's own probabilities
        torch.testing.assert_close(known.prob, step["out"][0][0].detach().softmax(1))
        product = step["p"] / pbar / 3 * (z @ mu.T / 0.1).softmax(1)
        product = product / product.sum(1, keepdim=True)
        tilde = product**2 / (product**2).sum(1, keepdim=True)
        torch.testing.assert_close(entries.prob, tilde, atol=1e-5, rtol=1e-4)
        if number < 6:  # before --pl_start
            assert set(entries.label.tolist()) == {-1} and not bool(entries.conf.any())
        else:
            assert torch.equal(entries.label, tilde.argmax(1))
            assert torch.equal(entries.conf, product.max(1).values >= 0.34)  # --theta_on raw
            positives += int(chosen.valid.sum())
    assert positives > 10


def calibrated(how: str, p: Tensor, q: Tensor, a: float) -> Tensor:
    d = {"average": (1 - a) * p + a * q, "geomean": p ** (1 - a) * q**a, "product": p * q}[how]
    return d / d.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("flags", "how", "a"),
    [
        (
            "--lambda_u 0.5 --lambda_c 0.3 --ctr_start 1 --soft_targets --theta_on sharp --theta 0.6 --theta_ramp "
            "--calib average --calib_weight 0.3 --sim embed --key_view strong --proto ema --proto_m 0.5 --balanced off",
            "average",
            0.3,
        ),
        ("--lambda_u 2 --lambda_c 0.5 --theta_on sharp --theta 0.5 --calib geomean --calib_weight 0.8", "geomean", 0.8),
    ],
)
def test_every_flag_of_a_step(flags, how, a, data, tmp_path, monkeypatch, capsys):
    """The loss that is logged, the threshold, the ranking, the key view and the prototypes, from what went in."""
    spy, batches, embedded, ranked, entered, mus = Spy(monkeypatch), [], [], [], [], []
    original, embed, choose, enqueue, similarity = (
        Run.batches, SsCL.embed_keys, losses.choose, SsCL.enqueue, main.log_similarity,
    )  # fmt: skip
    contrast, each = losses.contrast, []

    def watch(self, *args):
        for epoch, batch in original(self, *args):
            batches.append((epoch, batch))
            yield epoch, batch

    def keys_of(model, views, generator):
        embedded.append(views[0])
        return embed(model, views, generator)

    def chosen(anchor, queue, num_pos, sim=None):
        ranked.append(sim)
        return choose(anchor, queue, num_pos, sim)

    def enqueued(model, keys, entries, labelled):
        entered.append((keys, entries, model.alignment.pbar.clone()))
        enqueue(model, keys, entries, labelled)

    def similar(z, mu, tau_s):
        mus.append(mu.clone())
        return similarity(z, mu, tau_s)

    def contrasted(*args):
        each.append(contrast(*args))
        return each[-1]

    monkeypatch.setattr(Run, "batches", watch)
    monkeypatch.setattr(SsCL, "embed_keys", keys_of)
    monkeypatch.setattr("sscl.model.choose", chosen)
    monkeypatch.setattr(SsCL, "enqueue", enqueued)
    monkeypatch.setattr(main, "log_similarity", similar)
    monkeypatch.setattr(losses, "contrast", contrasted)
    args = main.get_parser().parse_args([*SMALL, *flags.split()])
    train(data, tmp_path, *flags.split(), "--pl_start", "2", "--epochs", "4")
    assert len(batches) == len(each) == len(ranked) == 24
    sure, moved, labels = 0, 0, []
    for n, ((epoch, (views, _)), step) in enumerate(zip(batches, spy.steps)):
        (keys, entries, pbar), (_, known, _) = entered[2 * n], entered[2 * n + 1]
        assert torch.equal(embedded[n], views["key" if args.key_view == "strong" else "weak"])
        _, key, queue, _ = step["contrast"][0]
        assert ranked[n] is None if args.sim == "prob" else torch.equal(ranked[n], key @ queue)
        aligned = step["p"] / pbar
        q = (keys @ mus[n].T / 0.1).softmax(1)
        guess = calibrated(how, aligned / aligned.sum(1, keepdim=True), q, a)
        tilde = guess**2 / (guess**2).sum(1, keepdim=True)
        theta = 0.5 + 0.1 * n / 24 if args.theta_ramp else 0.5
        (x, _), (strong, _) = step["out"]
        target = tilde if args.soft_targets else tilde.argmax(1)
        loss_u = (F.cross_entropy(strong, target, reduction="none") * (tilde.max(1).values >= theta)).mean()
        loss = F.cross_entropy(x, known.label) + args.lambda_u * (epoch >= 2) * loss_u
        loss = loss + args.lambda_c * (epoch >= args.ctr_start) * each[n].mean()
        torch.testing.assert_close(step["loss"], loss.detach(), rtol=1e-4, atol=1e-5)
        sure += int(entries.conf.sum()) * (epoch >= 2)
        labels += known.label.tolist()
        if args.proto == "ema" and epoch >= 2 and n % 6 < 5:  # the next step's, in the same epoch
            want = mus[n].clone()
            for c in set(entries.label[entries.conf].tolist()):
                mine = keys[entries.conf & (entries.label == c)].mean(0)
                want[c] = F.normalize(0.5 * want[c] + 0.5 * mine, dim=0)
            torch.testing.assert_close(mus[n + 1], want, rtol=0, atol=1e-5)
            moved += not torch.equal(want, mus[n])
    assert 12 < sure < 12 * 8 and (moved > 4) == (args.proto == "ema")
    triples = [sorted(labels[i : i + 3]) == [0, 1, 2] for i in range(0, len(labels), 3)]
    assert all(triples) == (args.balanced == "on")
    out = capsys.readouterr().out
    renewed = re.findall(r"epoch (\d): prototypes \((\w+)\) renewed", out)
    if args.proto == "ema":  # set anew when it starts and when pseudo-labels do
        assert renewed == [("0", "labelled"), ("2", "ema")]
    else:  # mixtures need pseudo-labels
        assert renewed == [("0", "labelled"), ("1", "labelled"), ("2", "mixture"), ("3", "mixture")]


def test_labelled_anchors_take_neighbours_when_pseudo_labels_start(data, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    train(data, tmp_path, "--labelled_anchors")
    for number, step in enumerate(spy.steps[:-1]):
        (_, (v, _, queue, chosen)) = step["contrast"]
        assert v.shape == (4, 8) and bool(chosen.valid.any()) == (number >= 6)
        if number < 6:  # the own key against all other images, of whatever class
            assert int(chosen.negative.sum(1).min()) > queue.shape[1] - 8


@pytest.mark.parametrize(
    ("arm", "kept"), [("", 3), (SUPERVISED, 0), (FIXMATCH, 0), (JOINT, 3), (MOCO, 0), ("--sim embed", 0)]
)
def test_the_queue_keeps_probabilities_where_they_are_asked_for(arm, kept, data, tmp_path):
    train(data, tmp_path, *arm.split(), "--epochs", "1")
    assert checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]["queue_prob"].shape == (32, kept)


def test_what_is_not_trained_has_no_gradient(data, tmp_path, monkeypatch):
    """Targets, keys, queue and prototypes of the training step itself, although every network might have one."""
    seen: list[Tensor] = []
    masked, contrast, similarity = losses.masked_ce, losses.contrast, main.log_similarity

    def cross_entropy(logits, target, mask):
        seen.append(target)
        assert logits.requires_grad
        return masked(logits, target, mask)

    def contrasted(v, key, queue, chosen, tau, form):
        seen.extend([key, queue])
        assert v.requires_grad
        return contrast(v, key, queue, chosen, tau, form)

    def similar(z, mu, tau_s):
        seen.extend([z, mu, similarity(z, mu, tau_s)])
        return seen[-1]

    monkeypatch.setattr(losses, "masked_ce", cross_entropy)
    monkeypatch.setattr(losses, "contrast", contrasted)
    monkeypatch.setattr(main, "log_similarity", similar)
    train(data, tmp_path, "--soft_targets", "--theta", "0", "--labelled_anchors", "--proto", "ema")
    assert len(seen) == 6 + 12 * (2 * 2 + 3) and not any(tensor.requires_grad for tensor in seen)


# --- labels of unlabelled images -------------------------------------------------------------------------------------


class Guarded(ImageList):
    """Images of which only those in `allowed` tell their label; of the others a class that does not exist is kept."""

    def guard(self, allowed: set[int]) -> None:
        self.allowed = allowed
        kept = torch.full_like(self._labels, 10**6)
        rows = torch.tensor(sorted(allowed))
        kept[rows] = self._labels[rows]
        self._labels = kept

    @property
    def labels(self):
        assert (self._labels == -1).all(), "the labels of all images were asked for"  # nothing is told
        return self._labels

    def label(self, index):
        hidden = int(self._labels[index]) == -1  # nothing is told
        assert hidden or index in self.allowed, "the label of an unlabelled image was read"
        return super().label(index)


def test_a_guarded_label_raises(data):
    images: Any = sscl_data.training_images(data)
    images.__class__ = Guarded
    images.guard({2})
    assert images.label(2) == 0
    with pytest.raises(AssertionError, match="the label of an unlabelled image was read"):
        images.label(3)


def test_training_reads_no_label_of_an_unlabelled_image(data, tmp_path, monkeypatch):
    train(data, tmp_path / "plain", "--diagnostics", "on")
    chosen: list[int] = []
    choose = sscl_data.labelled_images

    def choosing(args, images):  # with all labels, as a list file would tell; from then on they are guarded
        chosen.extend(choose(args, images))
        images.__class__ = Guarded
        images.guard(set(chosen))
        return chosen

    monkeypatch.setattr(sscl_data, "labelled_images", choosing)
    train(data, tmp_path / "guarded", "--diagnostics", "off")
    assert len(chosen) == 12
    weights = differing(tmp_path / "plain", tmp_path / "guarded")
    assert weights == []  # the diagnostics have no influence either
    with pytest.raises(AssertionError, match="the labels of all images were asked for"):
        train(data, tmp_path / "asked", "--diagnostics", "on")


# --- resume ----------------------------------------------------------------------------------------------------------

FULL = ["--epochs", "3", "--save-every", "2"]


def stop_at(step: int, monkeypatch) -> None:
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", patched)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(data, out, *FULL)
    return out


@pytest.mark.parametrize("step", [5, 8])  # at the end of an epoch, and inside one whose prototypes were renewed
def test_terminated_and_resumed_is_bit_identical(step, data, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(SystemExit) as stopped:
            train(data, tmp_path, *FULL)
    assert stopped.value.code == 143
    capsys.readouterr()
    log = train(data, tmp_path, *FULL, "--workers", "1" if step == 8 else "0")
    assert len(re.findall("renewed in", capsys.readouterr().out)) == (1 if step == 8 else 2)
    assert differing(whole, tmp_path) == []
    keys = ("step", "loss", "lr", "loss/u", "loss/c", "pl/acc_calib")
    assert [[r[k] for k in keys] for r in log] == [[r[k] for k in keys] for r in rows(whole)]


def test_fixmatch_terminated_and_resumed_is_bit_identical(data, tmp_path, monkeypatch):
    """Also the operations drawn for the strong views, whatever the number of workers."""
    flags = [*PUBLISHED.split(), "--pl_start", "0"]
    train(data, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(8, patch)
        with pytest.raises(SystemExit):
            train(data, tmp_path / "cut", *flags)
    train(data, tmp_path / "cut", *flags, "--workers", "1")
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def test_a_crash_between_checkpoints_and_the_same_command_again_is_bit_identical(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        log = Run.log

        def crash(self, *args, **kwargs):
            log(self, *args, **kwargs)
            if self.step == 9:
                raise RuntimeError("power cut")

        patch.setattr(Run, "log", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(data, tmp_path, *FULL)
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 8
    again = train(data, tmp_path, *FULL)
    assert differing(whole, tmp_path) == [] and [r["step"] for r in again] == list(range(1, 19))


@pytest.mark.parametrize("part", ["queue_label", "prototypes", "alignment.recent", "optimizer", "labelled"])
def test_a_resume_without_a_part_would_not_be_identical(part, data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(8, patch)
        with pytest.raises(SystemExit):
            train(data, tmp_path, *FULL)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    if part == "optimizer":
        saved["optimizer"]["state"] = {k: {"momentum_buffer": None} for k in saved["optimizer"]["state"]}
    elif part == "labelled":  # the labelled images go on at another place
        at = sscl_data.LabelledStream.at
        monkeypatch.setattr(sscl_data.LabelledStream, "at", lambda self, epoch, step=0: at(self, epoch + 1, step))
    elif part == "alignment.recent":  # turned round it need not change a pseudo-label: every batch was of one class
        saved["state_dict"][part] = torch.eye(3)[0].expand_as(saved["state_dict"][part]).clone()
    else:
        saved["state_dict"][part] = saved["state_dict"][part].flip(-1)
    checkpoint.save(tmp_path / "checkpoint.pth", saved)
    train(data, tmp_path, *FULL)
    assert "/state_dict/encoder_q.backbone.conv1.weight" in differing(whole, tmp_path)


def test_resume_with_other_flags_or_labels_is_refused(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="--calib was product, is prior"):
        train(data, tmp_path / "run", *FULL, "--calib", "prior")
    with pytest.raises(UserError, match="--split was 0, is 1; --split-sha256 was"):
        train(data, tmp_path / "run", *FULL, "--split", "1")


def test_a_diverged_run_stops(data, tmp_path):
    with pytest.raises(Diverged, match="the loss is nan"):
        train(data, tmp_path, "--lr", "1e30")


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["--labelled_anchors", PUBLISHED])
def test_two_processes_equal_one_with_two_splits(arm, data, tmp_path, python):
    flags = ["--epochs", "2", "--log-every", "1", *arm.split()]
    log = train(data, tmp_path / "one", *flags)
    flags += ["--bn_splits", "1"]
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sscl.main", *SMALL, *flags, "--data", str(data), "--output-dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = rows(tmp_path / "two")
    for a, b in zip(log, two, strict=True):
        for name in ("loss", "loss/x", "loss/u", "loss/c"):  # of all processes
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), (name, a, b)
    x, y = (checkpoint.load(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("one", "two"))
    for key in ("queue_label", "queue_conf", "queue_index", "queue_labelled", "queue_ptr"):
        assert torch.equal(x[key], y[key]), key
    for key in ("queue", "prototypes", "alignment.pbar", "encoder_q.fc.weight", "encoder_q.backbone.conv1.weight"):
        assert torch.allclose(x[key], y[key], atol=2e-3, rtol=2e-3), key


# --- flags -----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_spec_s():
    args = main.get_parser().parse_args([])
    options.resolve(args)
    flags = "arch dim batch_labelled mu epochs lr wd moco_k moco_m tau tau_s sharpen_t theta calib da proto proto_every"
    flags += " num_nn num_pos ctr lambda_u lambda_c pl_start balanced strong init"
    expected = [
        "resnet50",
        128,
        64,
        5,
        200,
        0.03,
        1e-4,
        65536,
        0.999,
        0.2,
        0.1,
        0.5,
        0.7,
        "product",
        "ema",
        "mixture",
        5,
    ]
    expected += [20, 5, "unified", 10, 1, 5, "on", "moco", "scratch"]
    assert [getattr(args, flag) for flag in flags.split()] == expected
    args = main.get_parser().parse_args("--init a.pth --calib none --arch wrn28".split())
    options.resolve(args)
    assert (args.pl_start, args.sharpen_t, args.width) == (0, 1.0, 32)


def test_learning_rate():
    args = main.get_parser().parse_args("--epochs 10 --warmup_epochs 2 --batch_labelled 64 --mu 5".split())
    rates = [main.learning_rate(args, step, 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.0375 / 10) and rates[10] == pytest.approx(0.0375) == max(rates)
    assert rates[30] == pytest.approx(0.0375 / 2) and rates[-1] < 1e-3
    args.schedule, args.warmup_epochs, args.lr_batch = "cos7_16", 0, 0
    assert main.learning_rate(args, 50, 5) == pytest.approx(0.03 * 0.19509, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data {tmp}/nowhere", "nowhere/train: no such folder"),
        ("--mu 0", "--mu 0: must be at least 1"),
        ("--num_pos -1", "--num_pos -1: must not be negative"),
        ("--tau_s 0", "must be above 0"),
        ("--imbalance 0.5", "--imbalance 0.5: must be at least 1"),
        ("--moco_m 2", "must lie in 0..1"),
        ("--min_scale 0", "--min_scale 0.0: must lie above 0"),
        ("--batch_labelled 5", "--batch_labelled 5 does not divide over 1 processes x 2 --bn_splits"),
        ("--batch_labelled 2", "batch norm needs at least 2 images a share"),
        ("--no_labels", "--no_labels is contrastive pretraining alone"),
        ("--no_labels --lambda_u 0", "--no_labels: there are no prototypes to calibrate with"),
        ("--labelled_anchors --lambda_c 0", "--labelled_anchors needs --lambda_c above 0"),
        ("--moco_k 8", "--moco_k 8: a step enqueues 12 keys"),
        ("--batch_labelled 40", "--batch_labelled 40 x --mu 2: a step takes 80 unlabelled images, there are 48"),
        ("--labels_per_class 17", "--labels_per_class 17: class number 0 has 16 images"),
        ("--labels_per_class 0 --split_file {tmp}/nowhere.txt", "nowhere.txt: no such list file"),
        ("--split_file {tmp}/nowhere.txt", "--labels_per_class and --split_file exclude each other"),
        ("--theta -0.1", "--theta -0.1: must not be negative"),
        ("--wd -1", "--wd -1: must not be negative"),
        ("--momentum -0.9", "--momentum -0.9: must not be negative"),
        ("--init {tmp}/nowhere.pth", "nowhere.pth: no such checkpoint file"),
    ],
)
def test_bad_flags_are_one_line(flags, message, data, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(data, tmp_path / "out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_list_of_labelled_images(data, tmp_path):
    names = [f"class{c}/{c * 18 + i:02d}.png" for c in range(3) for i in (0, 5)]
    listed = ["--labels_per_class", "0", "--split_file", str(tmp_path / "list.txt")]
    (tmp_path / "list.txt").write_text("\n".join(path.split("/")[1] for path in names))  # names alone, as SimCLR's
    train(data, tmp_path / "out", *listed, "--epochs", "1")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["flags"]["split_sha256"] == sscl_data.split_hash([0, 5, 16, 21, 32, 37])
    (tmp_path / "list.txt").write_text("\n".join(path.split("/")[1] for path in names[:4]))
    with pytest.raises(UserError, match="class class2 has no labelled image"):
        train(data, tmp_path / "other", *listed)


def test_all_images_labelled(data, tmp_path):
    """Nothing to mix with and nothing to count, so the diagnostics are not there; --pseudo says why it cannot be."""
    log = train(data, tmp_path / "run", "--labels_per_class", "16")
    assert log[-1]["proto/min_count"] == 16 and not {"pl/acc_raw", "neighbours/purity"} & set(log[-1])
    words = ["--pretrained", str(tmp_path / "run/checkpoint.pth"), "--data_dir", str(data), "--workers", "0"]
    with pytest.raises(UserError, match="--pseudo: all 48 training images are labelled"):
        eval_cls.main([*words, "--pseudo", "--output-dir", str(tmp_path / "cls")])


def test_the_command_line_on_mini_data_and_without_data(tmp_path, python):
    command = [python, "-m", "sscl.main", *SMALL, "--output-dir", str(tmp_path / "out"), "--epochs", "1"]
    command += ["--data", str(mini.ensure("images")), "--per-class", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("60 images of 10 classes, 40 with labels", "expected initial loss", "estimated time"):
        assert line in done.stdout
    (again,) = re.findall("next: python -m (.*)", done.stdout)
    module, *flags = shlex.split(again)
    assert module == "sscl.eval_cls"
    assert eval_cls.main([*flags, "--output-dir", str(tmp_path / "cls"), "--workers", "0", "--threads", "1"]) == 0
    assert 0 <= json.loads((tmp_path / "cls/result.json").read_text())["top1"] <= 100
    command = [python, "-m", "sscl.main", "--data", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"error: {tmp_path}/nowhere/train: no such folder")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: arms in bf16 and their evaluation there")
@pytest.mark.parametrize("arm", ["", FIXMATCH, JOINT, "--proto ema --sim embed --labelled_anchors"])
def test_on_a_gpu(arm, data, tmp_path):
    """The same arms in bf16: finite, close to the CPU's first loss, and evaluated there."""
    flags = [*arm.split(), "--device", "cuda"]
    log = train(data, tmp_path / "gpu", *flags)
    cpu = train(data, tmp_path / "cpu", *arm.split(), "--epochs", "1")
    assert len(log) == 12 and log[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=0.05)
    words = [
        "--pretrained",
        str(tmp_path / "gpu/checkpoint.pth"),
        "--data_dir",
        str(data),
        "--pseudo",
        "--device",
        "cuda",
    ]
    assert eval_cls.main([*words, "--output-dir", str(tmp_path / "cls"), "--workers", "0"]) == 0
    assert "top1" in json.loads((tmp_path / "cls/result.json").read_text())
