"""Who is chosen, and the two losses of sscl, against loops over samples in float64."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils import UserError
from sscl import losses
from sscl.losses import UNKNOWN, Chosen, Memory, all_negatives, choose, contrast, masked_ce
from sscl.watch import Telemetry


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def draw(n: int, k: int, classes: int = 4, seed: int = 0) -> tuple[Memory, Memory]:
    """Anchors and a queue with all that may happen: unknown labels, unsure entries, equal images, empty places."""
    g = torch.Generator().manual_seed(seed)

    def memory(size: int, images: int) -> Memory:
        label = torch.randint(UNKNOWN, classes, (size,), generator=g)
        prob = torch.rand(size, classes, generator=g)
        index = torch.randint(images, (size,), generator=g)
        return Memory(label, (torch.rand(size, generator=g) < 0.6) & (label >= 0), prob / prob.sum(1, True), index)

    anchor, queue = memory(n, 30), memory(k, 30)
    queue.image[:3], queue.label[:3], queue.conf[:3] = -1, UNKNOWN, False
    return anchor, queue


def slow_choice(anchor: Memory, queue: Memory, num_pos: int, i: int) -> tuple[set[int], set[int]]:
    """(P_i without the own key, N_i) of eq. 7, entry by entry."""
    candidates, negatives = [], set()
    for j in range(len(queue.label)):
        mine, theirs = int(anchor.label[i]), int(queue.label[j])
        if int(queue.image[j]) == int(anchor.image[i]) and int(queue.image[j]) >= 0:
            continue
        if mine == UNKNOWN or theirs == UNKNOWN or mine != theirs:
            negatives.add(j)
        elif bool(anchor.conf[i]) and bool(queue.conf[j]):
            candidates.append((sum(float(a) * float(b) for a, b in zip(anchor.prob[i], queue.prob[j])), j))
    best = sorted(candidates, reverse=True)[:num_pos]
    return {j for _, j in best}, negatives


@pytest.mark.parametrize("num_pos", [0, 1, 3])
def test_choice_against_a_loop(num_pos: int) -> None:
    anchor, queue = draw(24, 60)
    chosen = choose(anchor, queue, num_pos)
    found = 0
    for i in range(24):
        places = chosen.place[i][chosen.valid[i]].tolist()
        positives, negatives = slow_choice(anchor, queue, num_pos, i)
        assert set(places) == positives and len(places) == len(positives)
        assert set(torch.nonzero(chosen.negative[i]).flatten().tolist()) == negatives
        assert not positives & negatives
        for j in positives:
            assert queue.label[j] == anchor.label[i] and queue.conf[j] and queue.image[j] != anchor.image[i]
        found += len(positives)
    assert (found > 10) == (num_pos > 0)


def test_labelled_keys_do_not_outrank_all_others() -> None:
    """A labelled key is ranked by what the network thinks of it; as a one-hot vector it would always come first."""
    anchor = Memory(torch.tensor([0]), torch.tensor([True]), torch.tensor([[0.8, 0.2]]), torch.tensor([9]))
    prob = torch.tensor([[0.6, 0.4], [0.9, 0.1]])  # the first is of a labelled image
    queue = Memory(torch.tensor([0, 0]), torch.tensor([True, True]), prob, torch.tensor([0, 1]))
    assert choose(anchor, queue, 1).place.tolist() == [[1]]
    one_hot = queue._replace(prob=torch.tensor([[1.0, 0.0], [0.9, 0.1]]))
    assert choose(anchor, one_hot, 1).place.tolist() == [[0]]


def test_similarity_may_be_the_embedding_s() -> None:
    anchor, queue = draw(24, 60)
    sim = unit(24, 60, seed=5)
    by_prob, by_sim = choose(anchor, queue, 1), choose(anchor, queue, 1, sim)
    rows = torch.nonzero(by_sim.valid[:, 0]).flatten()
    assert torch.equal(by_prob.valid, by_sim.valid) and len(rows) > 4
    assert not torch.equal(by_prob.place[rows], by_sim.place[rows])
    for i in rows.tolist():
        mates = [
            j for j in range(60)
            if queue.label[j] == anchor.label[i] and queue.conf[j] and queue.image[j] != anchor.image[i]
        ]  # fmt: skip
        assert int(by_sim.place[i, 0]) == max(mates, key=lambda j: float(sim[i, j]))


def test_without_exchange_all_but_the_own_image_are_negatives() -> None:
    anchor, queue = draw(24, 60)
    chosen = all_negatives(anchor, queue)
    assert chosen.place.shape == (24, 0)
    assert torch.equal(chosen.negative, anchor.image[:, None] != queue.image) and not bool(chosen.negative.all())


def slow_loss(v: Tensor, key: Tensor, queue: Tensor, chosen: Chosen, tau: float, form: str) -> list[float]:
    """Eq. 8a and 8b as they stand, in float64, anchor by anchor."""
    v, key, queue = v.double(), key.double(), queue.double()
    out = []
    for i in range(len(v)):
        pos = [float(v[i] @ key[i]) / tau]
        pos += [
            float(v[i] @ queue[:, j]) / tau for j, ok in zip(chosen.place[i].tolist(), chosen.valid[i].tolist()) if ok
        ]
        neg = [float(v[i] @ queue[:, j]) / tau for j in range(queue.shape[1]) if bool(chosen.negative[i, j])]
        if form == "unified":
            out.append(math.log(1 + sum(math.exp(s) for s in neg) * sum(math.exp(-s) for s in pos)))
        else:
            each = [-math.log(math.exp(s) / (math.exp(s) + sum(math.exp(n) for n in neg))) for s in pos]
            out.append(sum(each) / len(each))
    return out


@pytest.mark.parametrize("form", losses.FORMS)
def test_loss_against_a_loop(form: str) -> None:
    anchor, queue = draw(24, 40, seed=1)
    v, key, bank = unit(24, 16), unit(24, 16, seed=1), unit(40, 16, seed=2).T.contiguous()
    chosen = choose(anchor, queue, 3)
    assert set(chosen.valid.sum(1).tolist()) == {0, 1, 3}  # none, some and all
    got = contrast(v, key, bank, chosen, 0.2, form)
    slow = torch.tensor(slow_loss(v, key, bank, chosen, 0.2, form))
    torch.testing.assert_close(got, slow, atol=1e-5, rtol=1e-5)


def alone(n: int, k: int) -> Chosen:
    """Only the own key, everything else a negative."""
    return Chosen(torch.zeros(n, 0, dtype=torch.long), torch.zeros(n, 0, dtype=torch.bool), torch.ones(n, k).bool())


def test_one_positive_is_infonce_with_gradients() -> None:
    key, bank = unit(8, 16, seed=1), unit(32, 16, seed=2).T.contiguous()
    values, gradients = [], []
    for form in (*losses.FORMS, "infonce"):
        v = unit(8, 16).requires_grad_()
        if form == "infonce":
            logits = torch.cat([(v * key).sum(1, keepdim=True), v @ bank], 1) / 0.2
            each = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long), reduction="none")
        else:
            each = contrast(v, key, bank, alone(8, 32), 0.2, form)
        each.sum().backward()
        values.append(each.detach())
        gradients.append(v.grad)
    for value, gradient in zip(values, gradients):
        torch.testing.assert_close(value, values[-1], atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient, gradients[-1], atol=1e-5, rtol=0)


def test_equal_positives() -> None:
    """K copies of the key in the queue: (8a) is log(1 + K sum exp((s_n - s_p) / tau)), (8b) does not change."""
    v, key, others = unit(4, 16), unit(4, 16, seed=1), unit(10, 16, seed=2).T
    k = 5
    got = {}
    for i in range(4):
        bank = torch.cat([key[i][:, None].expand(16, k - 1), others], 1)
        negative = torch.tensor([[False] * (k - 1) + [True] * 10])
        place = torch.arange(k - 1)[None]
        chosen = Chosen(place, torch.ones_like(place, dtype=torch.bool), negative)
        s_p, s_n = float(v[i] @ key[i]), (v[i] @ others).double()
        expected = math.log(1 + k * float(((s_n - s_p) / 0.2).exp().sum()))
        got = {form: float(contrast(v[i : i + 1], key[i : i + 1], bank, chosen, 0.2, form)) for form in losses.FORMS}
        assert got["unified"] == pytest.approx(expected, rel=1e-5)
        one = contrast(v[i : i + 1], key[i : i + 1], others.contiguous(), alone(1, 10), 0.2, "per_positive")
        assert got["per_positive"] == pytest.approx(float(one), rel=1e-5)
        assert got["unified"] > got["per_positive"]


@pytest.mark.parametrize("form", losses.FORMS)
def test_no_negatives_and_large_logits(form: str) -> None:
    v = torch.eye(4).requires_grad_()
    none = Chosen(torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0).bool(), torch.zeros(4, 8).bool())
    zero = contrast(v, torch.eye(4), unit(4, 8), none, 0.2, form)
    zero.sum().backward()
    assert v.grad is not None and torch.equal(zero, torch.zeros(4)) and torch.equal(v.grad, torch.zeros(4, 4))
    bank = torch.cat([torch.eye(4), -torch.eye(4)], 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for key in (torch.eye(4), -torch.eye(4)):  # v.k = 1 and -1
            v = torch.eye(4, dtype=dtype).requires_grad_()
            low = torch.bfloat16 if dtype == torch.float32 else dtype
            with torch.autocast("cpu", low, enabled=dtype != torch.float32):
                loss = contrast(v, key.to(dtype), bank.to(dtype), alone(4, 8), 0.01, form)
            loss.sum().backward()
            assert loss.dtype == torch.float32 and bool(loss.isfinite().all()) and bool(v.grad.isfinite().all())
            # v.k = -1 against a negative at 1: 2 / tau, and log of one more term
            assert float(loss.detach().max()) == pytest.approx(200 if key[0, 0] < 0 else math.log(2), abs=0.01)


def test_masked_ce() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    label = torch.tensor([0, 1, 2, 3, 0, 1])
    none = masked_ce(logits, label, torch.zeros(6, dtype=torch.bool))
    none.backward()
    assert logits.grad is not None and float(none.detach()) == 0 and torch.equal(logits.grad, torch.zeros(6, 4))
    everyone = masked_ce(logits, label, torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(everyone, F.cross_entropy(logits, label))
    some = masked_ce(logits, label, torch.tensor([1, 0, 0, 1, 0, 0]).bool())
    by_hand = -sum(float(F.log_softmax(logits.detach()[i].double(), 0)[label[i]]) for i in (0, 3)) / 6
    assert float(some.detach()) == pytest.approx(by_hand, rel=1e-6)
    soft = masked_ce(logits, F.one_hot(label, 4).float(), torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(soft, everyone)


def test_diagnostics_of_neighbours_and_pseudo_labels() -> None:
    """Pseudo-labels that are the truth give purity 1; shifted truths give 0; without labels nothing is told."""
    truth = torch.arange(40) % 4
    one_hot = F.one_hot(truth, 4).float()
    who = Memory(truth, torch.ones(40, dtype=torch.bool), one_hot, torch.arange(40))
    chosen = choose(who, who, 3)
    args = argparse.Namespace(calib="product", calib_weight=0.5)
    right = Telemetry(args, truth)
    from_labels = truth == 3  # the neighbours of a quarter of the anchors
    assert {k: float(v) for k, v in right.neighbours(chosen, who.image, who.image, from_labels).items()} == {
        "neighbours/num_pos": 3.0, "neighbours/labelled": 0.25, "neighbours/purity": 1.0,
    }  # fmt: skip
    mixed = Telemetry(args, torch.arange(40))  # every image a class of its own
    assert float(mixed.neighbours(chosen, who.image, who.image, from_labels)["neighbours/purity"]) == 0
    blind = Telemetry(args, None)
    assert set(blind.neighbours(chosen, who.image, who.image, from_labels)) == {
        "neighbours/num_pos",
        "neighbours/labelled",
    }
    wrong = one_hot.roll(1, 1) * 0.5 + one_hot * 0.3 + 0.05  # the true class is second
    told = right.pseudo_labels(wrong, wrong, (one_hot * 0.9 + 0.025).log(), who.image)
    assert float(told["pl/acc_raw"]) == float(told["pl/acc_aligned_half"]) == 0
    assert float(told["pl/acc_calib"]) == float(told["pl/acc_calib_half"]) == 1
    assert blind.pseudo_labels(wrong, wrong, None, who.image) == {}


def test_diagnostics_of_each_calibration() -> None:
    """p is undecided, q says class 0, the prior class 1: the truth."""
    p, log_q, truth = torch.full((8, 2), 0.5), torch.tensor([[0.9, 0.1]]).expand(8, 2).log(), torch.ones(8).long()
    for how, expected in (("prior", 1), ("product", 0), ("average", 0), ("geomean", 0), ("none", 0)):
        watch = Telemetry(argparse.Namespace(calib=how, calib_weight=0.5), truth)
        told = watch.pseudo_labels(p, p, log_q, torch.arange(8), torch.tensor([0.2, 0.8]))
        assert float(told["pl/acc_calib"]) == expected, how


def test_diagnostics_leave_out_labelled_images() -> None:
    """Half of the rows are labelled images, on which everything is right; on the others everything is wrong."""
    truth = torch.arange(40) % 4
    labelled = [i for i in range(40) if i % 8 < 4]
    known = torch.zeros(40, dtype=torch.bool)
    known[labelled] = True
    guess = torch.where(known, truth, (truth + 1) % 4)
    p = F.one_hot(guess, 4) * 0.9 + 0.025
    who = Memory(guess, torch.ones(40, dtype=torch.bool), p, torch.arange(40))
    chosen = choose(who, who._replace(image=torch.arange(40)), 3)
    args = argparse.Namespace(calib="product", calib_weight=0.5)
    watch = Telemetry(args, torch.where(known, truth, 5 + torch.arange(40)), labelled)
    told = watch.pseudo_labels(p, p, p.log(), who.image)
    assert len(told) == 6 and not any(map(float, told.values()))
    assert float(watch.neighbours(chosen, who.image, who.image, known)["neighbours/purity"]) == 0
    everything = Telemetry(args, truth, range(40))
    assert everything.pseudo_labels(p, p, None, who.image) == {}
    assert "neighbours/purity" not in everything.neighbours(chosen, who.image, who.image, known)


def test_unknown_form() -> None:
    with pytest.raises(UserError, match="--ctr circle: choose from unified, per_positive"):
        contrast(unit(2, 4), unit(2, 4), unit(4, 3), alone(2, 3), 0.2, "circle")
