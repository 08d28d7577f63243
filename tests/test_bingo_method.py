"""BINGO's losses, CutMix, queue, bags: the properties that need no data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bingo import losses
from bingo.builder import BINGO, MoCo, ReleaseKeys
from bingo.cutmix import box_at, draw_box, mix_shares, paste
from bingo.data import Bags, Views, load_bags, order_hash, save_bags
from shared_utils import UserError
from shared_utils.data import ImageList, image_folder, sample_rng

TAU = 0.2


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def cross_entropy(z: Tensor, k: Tensor, queue: Tensor, tau: float = TAU) -> Tensor:
    """The definition: a (1 + K)-way problem whose label is 0, per row."""
    logits = torch.cat([(z * k).sum(1, keepdim=True), z @ queue], 1) / tau
    return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long), reduction="none")


def slow_release(q, p, x, k_q, k_p, queue, lam, mu):
    """Six cross entropies, one by one."""
    terms = [lam[0] * cross_entropy(q, k_q, queue) + lam[1] * cross_entropy(q, k_p, queue)]
    terms += [lam[1] * cross_entropy(p, k_q, queue) + lam[0] * cross_entropy(p, k_p, queue)]
    if x is not None:
        terms += [mu * cross_entropy(x, k_q, queue) + (1 - mu) * cross_entropy(x, k_p, queue)]
    return torch.stack([t.mean() for t in terms]).mean()


def leaves(n: int = 6, dim: int = 8) -> list[Tensor]:
    return [unit(n, dim, seed=s).requires_grad_() for s in (1, 2, 3)]


KEYS = unit(6, 8, seed=4), unit(6, 8, seed=5)
QUEUE = unit(32, 8, seed=6).T.contiguous()


@pytest.mark.parametrize("chunk", [5, 32, 8192])
@pytest.mark.parametrize("tau", [0.02, 0.2])
def test_loss_is_infonce_with_its_gradient(chunk, tau, monkeypatch):
    monkeypatch.setattr(losses.negatives_lse, "__defaults__", (chunk,))
    z, ours = leaves()[0], leaves()[0]
    expected = torch.stack([cross_entropy(z, k, QUEUE, tau) for k in KEYS], 1)
    got = losses.info_nce(ours, torch.stack(KEYS, 1), QUEUE, tau)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    weight = torch.rand(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    torch.testing.assert_close(ours.grad, z.grad, rtol=1e-12, atol=1e-13)


def test_gradient_of_the_streamed_sum_and_no_overflow():
    z = leaves(3)[0]
    assert torch.autograd.gradcheck(lambda v: losses.negatives_lse(v, QUEUE, TAU), (z,))
    (slope,) = torch.autograd.grad(losses.negatives_lse(z, QUEUE, TAU).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a wrong second derivative
        slope.sum().backward()
    huge = losses.negatives_lse(z * 1e4, QUEUE, TAU)
    torch.testing.assert_close(huge, torch.logsumexp(z * 1e4 @ QUEUE / TAU, 1), rtol=1e-12, atol=0)


def test_float32_even_under_autocast():
    z, keys, queue = (t.float() for t in (leaves()[0].detach(), torch.stack(KEYS, 1), QUEUE))
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses.info_nce(z, keys, queue, TAU)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, losses.info_nce(z, keys, queue, TAU))


@given(a=st.floats(0, 1), b=st.floats(0, 1), mu=st.floats(0, 1), mixed=st.booleans())
@settings(max_examples=25, deadline=None)
def test_release_loss_is_the_sum_of_its_cross_entropies(a, b, mu, mixed):
    mine, theirs = leaves(), leaves()
    ours = losses.release_loss(mine[0], mine[1], mine[2] if mixed else None, *KEYS, QUEUE, TAU, (a, b), mu)
    slow = slow_release(theirs[0], theirs[1], theirs[2] if mixed else None, *KEYS, QUEUE, (a, b), mu)
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-14)
    ours.backward(), slow.backward()
    for x, y in zip(mine[: 2 + mixed], theirs):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-14)


def test_without_cross_terms_two_independent_infonce():
    q, p, _ = leaves()
    loss = losses.release_loss(q, p, None, *KEYS, QUEUE, TAU, (1.0, 0.0), 1.0)
    expected = (cross_entropy(q, KEYS[0], QUEUE).mean() + cross_entropy(p, KEYS[1], QUEUE).mean()) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_symmetry_of_anchor_and_member():
    q, p, x = leaves()
    half = losses.release_groups(q, p, x, *KEYS, QUEUE, TAU, (0.5, 0.5), 0.7)
    swapped = losses.release_groups(p, q, x, KEYS[1], KEYS[0], QUEUE, TAU, (0.5, 0.5), 1 - 0.7)
    torch.testing.assert_close(half[:2].sum(), swapped[:2].sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(half[2], swapped[2], rtol=1e-12, atol=0)  # the complementary mask
    wrong = losses.release_groups(p, q, x, KEYS[1], KEYS[0], QUEUE, TAU, (0.5, 0.5), 0.7)
    assert abs(float((wrong[2] - half[2]).detach())) > 1e-3


def test_an_unmixed_third_group_is_that_of_the_anchor():
    """mu = 1, where the mix is the query: l(s_a, T_a), whatever the other weights; mu = 0: l(s_m, T_p)."""
    q, p, x = leaves()
    for lam in ((1.0, 0.0), (0.5, 0.5)):
        groups = losses.release_groups(q, p, q, *KEYS, QUEUE, TAU, lam, 1.0)
        torch.testing.assert_close(groups[2], cross_entropy(q, KEYS[0], QUEUE).mean(), rtol=1e-12, atol=0)
    groups = losses.release_groups(q, p, x, *KEYS, QUEUE, TAU, (0.5, 0.5), 0.0)
    torch.testing.assert_close(groups[2], cross_entropy(x, KEYS[1], QUEUE).mean(), rtol=1e-12, atol=0)


def test_paper_loss_uses_the_anchors_key_alone():
    q, p, _ = leaves()
    loss = losses.paper_loss(q, p, KEYS[0], QUEUE, TAU)
    expected = cross_entropy(q, KEYS[0], QUEUE).mean() + cross_entropy(p, KEYS[0], QUEUE).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_wrong_losses_are_told_apart():
    """One target for both, or both positives in one denominator, is not this loss."""
    q, p, x = leaves()
    right = losses.release_loss(q, p, x, *KEYS, QUEUE, TAU, (0.5, 0.5), 0.7)
    one_target = losses.release_loss(q, p, x, KEYS[0], KEYS[0], QUEUE, TAU, (0.5, 0.5), 0.7)
    logits = torch.cat([torch.stack([(q * k).sum(1) for k in KEYS], 1), q @ QUEUE], 1) / TAU
    together = -logits.log_softmax(1)[:, :2].mean()
    apart = losses.info_nce(q, torch.stack(KEYS, 1), QUEUE, TAU).mean()
    assert not torch.isclose(right, one_target, rtol=1e-4) and not torch.isclose(apart, together, rtol=1e-4)


def test_warmup_is_eleven_epochs_by_default():
    lam = (0.5, 0.5)
    assert [losses.loss_weights(e, 11, lam) for e in (0, 10, 11)] == [(1, 0), (1, 0), lam]
    q, p, _ = leaves()
    k_p = KEYS[1].clone().requires_grad_()
    for epoch, reaches in ((10, False), (11, True)):
        group = losses.release_groups(q, p, None, KEYS[0], k_p, QUEUE, TAU, losses.loss_weights(epoch, 11, lam), 1.0)
        (grad,) = torch.autograd.grad(group[0], k_p)
        assert bool(grad.any()) is reaches


def test_contrast_rank_counts_nearer_negatives():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    queue = torch.tensor([[0.9, 0.5, -1.0], [0.1, 0.5, 0.0]])
    assert losses.contrast_rank(z, torch.tensor([[0.7, 0.0], [0.0, 0.6]]), queue).tolist() == [1, 0]
    assert losses.contrast_rank(z, z, z).tolist() == [0, 0]  # as near is not nearer


# --- CutMix ----------------------------------------------------------------------------------------------------------


@given(h=st.integers(4, 40), w=st.integers(4, 40), lam=st.floats(0, 1), cy=st.floats(0, 0.999), cx=st.floats(0, 0.999))
@settings(max_examples=100, deadline=None)
def test_mu_is_the_share_of_kept_pixels(h, w, lam, cy, cx):
    box = box_at(h, w, lam, int(cy * h), int(cx * w))
    a, b = torch.zeros(2, 3, h, w), torch.ones(2, 3, h, w)
    mix = paste(a, b, box)
    assert not a.any() and bool(b.all())  # the views stay as they are
    for image in mix:
        assert float(image[0].sum()) == pytest.approx((1 - box[-1]) * h * w, abs=1e-6)


def test_shares_have_boxes_and_weights_of_their_own():
    a, b = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)
    boxes = [box_at(8, 8, 0.5, 2, 2), box_at(8, 8, 0.2, 6, 5)]
    mix, mu = mix_shares(a, b, boxes)
    assert torch.equal(mix, torch.cat([paste(a[:2], b[:2], boxes[0]), paste(a[2:], b[2:], boxes[1])]))
    assert mu.tolist() == [boxes[0][-1]] * 2 + [boxes[1][-1]] * 2
    q, p, x = (unit(4, 8, seed=s) for s in (1, 2, 3))
    k_q, k_p = (k[:4] for k in KEYS)
    whole = losses.release_groups(q, p, x, k_q, k_p, QUEUE, TAU, (0.5, 0.5), mu)
    halves = [
        losses.release_groups(q[i], p[i], x[i], k_q[i], k_p[i], QUEUE, TAU, (0.5, 0.5), box[-1])
        for i, box in zip((slice(0, 2), slice(2, 4)), boxes)
    ]
    torch.testing.assert_close(whole, torch.stack(halves).mean(0), rtol=1e-12, atol=0)


def test_empty_and_full_box():
    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    empty, full = box_at(16, 16, 1.0, 5, 5), box_at(16, 16, 0.0, 8, 8)
    assert empty[-1] == 1 and torch.equal(paste(a, b, empty), a)
    assert full[-1] == 0 and torch.equal(paste(a, b, full), b)


def test_mean_mu_of_the_release():
    rng = np.random.Generator(np.random.PCG64(0))
    mu = np.array([draw_box(224, 224, 2.0, rng)[-1] for _ in range(100_000)])
    assert 0.665 < mu.mean() < 0.685
    assert np.percentile(mu, [1, 50, 99]) == pytest.approx([0.262, 0.692, 0.955], abs=0.01)


# --- encoders and queue ----------------------------------------------------------------------------------------------


def tiny(dim: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(6, dim))  # fmt: skip


def step(model: BINGO, optimizer: torch.optim.Optimizer, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(4, 4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    z = [F.normalize(model.encoder_q(v), dim=1) for v in (x[0], x[1], x[0])]
    k, k_p = model.embed_keys(x[2]), model.embed_keys(x[3])
    optimizer.zero_grad()
    losses.release_loss(z[0], z[1], z[2], k, k_p, model.queue, TAU, (0.5, 0.5), 0.7).backward()
    optimizer.step()
    model.enqueue(k)
    return k, k_p


@pytest.mark.parametrize("teacher_bn", ["eval", "train"])
def test_teacher_is_frozen_and_the_queue_holds_the_anchors_keys(teacher_bn):
    torch.manual_seed(0)
    model = BINGO(tiny(), tiny(), 4, 12, teacher_bn).train()
    before = {k: v.clone() for k, v in model.encoder_k.state_dict().items()}
    first = model.queue.clone()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)
    student = [p.clone() for p in model.encoder_q.parameters()]
    keys = [step(model, optimizer, s) for s in range(4)]  # wraps: 12 / 4 = 3
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.encoder_k.named_parameters())
    same_buffers = all(torch.equal(before[k], v) for k, v in model.encoder_k.named_buffers())
    assert same_buffers is (teacher_bn == "eval")
    assert any(not torch.equal(a, b) for a, b in zip(student, model.encoder_q.parameters()))
    assert int(model.queue_ptr) == 4
    assert torch.equal(model.queue, torch.cat([keys[3][0], keys[1][0], keys[2][0]]).T)
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(12))
    torch.testing.assert_close(first.norm(dim=0), torch.ones(12))
    for _, k_p in keys:
        assert not any(torch.allclose(row, column) for row in k_p for column in model.queue.T)


def test_teacher_stays_in_eval_mode_when_the_model_trains():
    model = BINGO(tiny(), tiny(), 4, 8).train()
    assert model.encoder_q.training and not model.encoder_k.training
    assert BINGO(tiny(), tiny(), 4, 8, "train").train().encoder_k.training


def test_shuffling_changes_nothing_in_eval_mode():
    torch.manual_seed(0)
    model, x = BINGO(tiny(), tiny(), 4, 8).train(), torch.rand(6, 3, 8, 8)
    torch.testing.assert_close(model.embed_keys(x, torch.Generator().manual_seed(3)), model.embed_keys(x))


def test_batch_must_fill_the_queue():
    with pytest.raises(UserError, match="--moco_k 10 is no multiple of --batch_size 4; try --moco_k 12"):
        BINGO(tiny(), tiny(), 4, 10).check_batch(4)


def test_moco_momentum_uses_the_weights_before_the_step_and_leaves_buffers():
    torch.manual_seed(0)
    model = MoCo(tiny(), tiny(), 4, 8, m=0.9)
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(1.0)
    q0, k0 = ([p.clone() for p in e.parameters()] for e in (model.encoder_q, model.encoder_k))
    model.encoder_q(torch.rand(4, 3, 8, 8))  # moves q's batch-norm statistics
    model.update_key_encoder()
    for got, a, b in zip(model.encoder_k.parameters(), k0, q0):
        torch.testing.assert_close(got, 0.9 * a + 0.1 * b)
    assert int(model.encoder_k.state_dict()["1.num_batches_tracked"]) == 0


def test_release_keys():
    model = BINGO(tiny(), tiny(), 4, 8)
    keys = ReleaseKeys(model)
    state = {k: v.clone() for k, v in keys.state_dict().items()}
    assert {"module.queue", "module.queue_ptr", "module.encoder_q.0.weight", "module.encoder_k.5.bias"} <= set(state)
    other = BINGO(tiny(), tiny(), 4, 8)
    ReleaseKeys(other).load_state_dict(state)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    before = {k: v.clone() for k, v in other.state_dict().items()}
    absent = {k: v + 1 for k, v in state.items() if k != "module.queue_ptr"}
    for wrong, said in (
        (absent, "1 missing .queue_ptr."),
        (state | {"module.encoder_q.9.weight": torch.ones(1)}, "1 unexpected .encoder_q.9.weight."),
        (state | {"module.queue": torch.ones(4, 9)}, r"1 mis-shaped .queue \(4, 9\) in the file, \(4, 8\) here."),
    ):
        with pytest.raises(UserError, match=f"the weights do not fit BINGO: {said}"):
            ReleaseKeys(other).load_state_dict(wrong)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


# --- bags and views --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageList:
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for index in range(6):
        folder = root / ("ab"[index // 3])
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (index * 40, 0, 0)).save(folder / f"{index}.png")
    return image_folder(root)


def draws(bags: Bags, index: int, count: int = 60) -> set[int]:
    np.random.seed(0)
    return {bags.draw(index) for _ in range(count)}


def test_members_are_drawn_from_the_bag_without_the_anchor():
    assert draws(Bags(np.array([[1, 2], [0, 2], [0, 1]])), 1) == {0, 2}
    groups = Bags(np.array([7, 3, 7, 7, 3, 1]))
    assert [draws(groups, i) for i in range(6)] == [{2, 3}, {4}, {0, 3}, {0, 2}, {1}, {5}]


def red(x) -> Tensor:
    """The image's red value beside a fresh random number."""
    return torch.tensor([float(np.asarray(x)[0, 0, 0]), float(torch.rand(()))])


def test_views_come_in_the_releases_order_and_from_one_member(images):
    views = Views(images, red, Bags(np.array([[5, 5, 4]] * 6)))
    with sample_rng(1, 2, 3):
        query, key, posq, posk = views[2]
    with sample_rng(1, 2, 3):
        member = views.bags.draw(2)
        order = [float(torch.rand(())) for _ in range(4)]
    assert [float(v[0]) for v in (query, key, posq, posk)] == [80, 80, member * 40, member * 40]
    assert [float(v[1]) for v in (posq, posk, key, query)] == order
    assert len(Views(images, red)[0]) == 2


def test_a_bag_of_oneself_reduces_to_intra(images):
    views = Views(images, red, Bags(np.arange(6)[:, None]))
    assert {float(v[0]) for v in views[3]} == {120.0}
    q, k = leaves()[0], KEYS[0]
    two = losses.paper_loss(q, q, k, QUEUE, TAU)
    torch.testing.assert_close(two, 2 * losses.info_nce(q, k[:, None], QUEUE, TAU).mean())


def test_correlation_file_round_trip_and_what_it_refuses(images, tmp_path):
    path = tmp_path / "corr.npy"
    array = np.array([[1, 2, 3]] * 6)
    save_bags(path, array, images, "knn")
    assert np.load(path).dtype == np.int64
    bags, line = load_bags(path, images, 2)
    assert np.array_equal(bags.array, array[:, :2]) and "knn" in line and "order of the images checked" in line
    other = images.take(range(len(images))[::-1])
    assert order_hash(other) != order_hash(images)
    for theirs, wanted, text in [
        (other, 2, "another order"),
        (images, 4, "3 neighbours an image, --clus_pos_num asks for 4"),
        (images.take(slice(4)), 2, r"expected integers \[4, K\]"),
    ]:
        with pytest.raises(UserError, match=text):
            load_bags(path, theirs, wanted)
    path.with_suffix(".json").unlink()  # the release's own file has none
    assert "not checked" in load_bags(path, images, 3)[1]
    np.save(path, array + 5)
    with pytest.raises(UserError, match="indices 6..8 for 6 images"):
        load_bags(path, images, 3)
    header = bytearray(path.read_bytes())
    header[header.index(b")")] ^= 8  # the shape's bracket: numpy raises what its tokeniser raises
    for damaged in (b"nothing", bytes(header)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable .npy"):
            load_bags(path, images, 3)
    with pytest.raises(UserError, match="no such correlation file"):
        load_bags(tmp_path / "none.npy", images, 3)


def test_a_bag_file_and_its_json_belong_together(images, tmp_path):
    path, array = tmp_path / "corr.npy", np.array([[1, 2, 3]] * 6)
    save_bags(path, array, images, "knn", {"sha256": "abc", "name": "a network"})
    assert load_bags(path, images, 2)[0].teacher == {"sha256": "abc", "name": "a network"}
    np.save(path, array[:, ::-1].copy())  # regenerated by hand, or put there by a write that was cut off
    with pytest.raises(UserError, match="corr.npy: not the array that corr.json describes; remove the .json"):
        load_bags(path, images, 2)
    sidecar = path.with_suffix(".json")
    facts = json.loads(sidecar.read_text())
    for text in ("{", "[]", "{}", json.dumps(facts | {"teacher": {"sha256": "abc"}}), "\xff"):
        sidecar.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="corr.json: not readable as what compute_knn writes") as error:
            load_bags(path, images, 2)
        assert "\n" not in str(error.value)
    old = {k: facts[k] for k in ("kind", "images", "order_sha256")}  # what earlier versions wrote
    sidecar.write_text(json.dumps(old))
    assert load_bags(path, images, 2)[0].teacher is None


def test_an_interrupted_write_leaves_the_old_bags(images, tmp_path, monkeypatch):
    path, array = tmp_path / "corr.npy", np.array([[1, 2, 3]] * 6)
    save_bags(path, array, images, "knn")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"corr.npy", "corr.json"}

    def full(handle, written):
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="corr.npy: cannot be written .No space left"):
        save_bags(path, array + 1, images, "random")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_bare_name_is_looked_for_where_the_release_looks(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_bags(Path("imgs_corr/toy.npy"), np.array([[1]] * 6), images, "knn")
    assert "imgs_corr/toy.npy" in load_bags(Path("toy.npy"), images, 1)[1]


def test_expected_initial_loss():
    z, k = unit(64, 128, seed=1), unit(64, 128, seed=2)
    queue = unit(4096, 128, seed=3).T
    assert float(losses.info_nce(z, k[:, None], queue, TAU).mean()) == pytest.approx(math.log1p(4096), abs=0.3)
