"""The method of hsa: losses, CutMix, the two encoders and their queues, levels."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsa import arch, losses
from hsa.builder import CsMl, ReleaseKeys
from hsa.cutmix import draw_box, mix_shares, paste
from shared_utils import UserError, distributed


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit vectors along the last axis."""
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    ).to(dtype)


def scene(batch: int = 6, dim: int = 8, k: int = 40, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Queries q, p, x with gradient, keys k_q, k_p and a queue [D, K]."""
    q, p, x, k_q, k_p = unit(5, batch, dim, dtype=dtype)
    for z in (q, p, x):
        z.requires_grad_()
    return {"q": q, "p": p, "x": x, "k_q": k_q, "k_p": k_p, "queue": unit(k, dim, seed=1, dtype=dtype).T.contiguous()}


def slow(z: Tensor, key: Tensor, queue: Tensor, tau: float) -> Tensor:
    """Mean of l(z, key) as the release computes it: cross entropy of [positive, negatives] / tau, target 0."""
    logits = torch.cat([(z * key).sum(1, keepdim=True), z @ queue], 1) / tau
    return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long))


def slow_release(s: dict[str, Any], tau: float, lam: tuple[float, float], mu: float) -> Tensor:
    """The release's three groups, one cross entropy each."""
    (a, b), total = lam, torch.zeros(())
    for z, weights in ((s["q"], (a, b)), (s["p"], (b, a)), (s["x"], (mu, 1 - mu))):
        for key, weight in zip((s["k_q"], s["k_p"]), weights):
            total = total + weight * slow(z, key, s["queue"], tau)
    return total / 3


def release(s: dict[str, Any], tau: float = 0.2, **kwargs) -> Tensor:
    return losses.release_loss(s["q"], s["p"], s["x"], s["k_q"], s["k_p"], s["queue"], tau, **kwargs)


def gradients(loss: Tensor, s: dict[str, Any]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [s["q"], s["p"], s["x"]], allow_unused=True))


# --- losses ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 5), dim=st.integers(2, 9), k=st.integers(1, 50), chunk=st.integers(1, 60),
    tau=st.sampled_from([0.05, 0.2, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_streamed_negatives_equal_the_log_sum_exp_and_its_gradient(batch, dim, k, chunk, tau, seed):
    z, queue = unit(batch, dim, seed=seed).requires_grad_(), unit(k, dim, seed=seed + 100).T
    ours, theirs = losses.negatives_lse(z, queue, tau, chunk), torch.logsumexp(z @ queue / tau, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    weight = torch.arange(1.0, batch + 1, dtype=torch.float64)
    (a,), (b,) = (torch.autograd.grad((y * weight).sum(), z) for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_extreme_logits_stay_finite():
    z = torch.tensor([[1.0, 0.0]], requires_grad=True)
    queue = torch.tensor([[-1.0, 1.0, 0.5], [0.0, 0.0, 0.5]])
    for chunk in (1, 2, 3):  # the largest logit comes first, in the middle or last in its chunk
        out = losses.negatives_lse(z, queue, 1e-3, chunk)
        out.sum().backward()
        assert out.item() == pytest.approx(1000, rel=1e-6) and bool(z.grad.isfinite().all())
        torch.testing.assert_close(z.grad, torch.tensor([[1000.0, 0.0]]))
        z.grad = None


def test_each_positive_is_a_cross_entropy_of_its_own():
    s = scene()
    each = losses.info_nce(s["q"], torch.stack([s["k_q"], s["k_p"]], 1), s["queue"], 0.2)
    assert each.shape == (6, 2)
    for i, key in enumerate((s["k_q"], s["k_p"])):
        torch.testing.assert_close(each[:, i].mean(), slow(s["q"], key, s["queue"], 0.2), rtol=0, atol=1e-14)
    joint = (
        torch.cat([(s["q"] * s["k_q"]).sum(1, True), (s["q"] * s["k_p"]).sum(1, True), s["q"] @ s["queue"]], 1) / 0.2
    )
    together = -F.log_softmax(joint, 1)[:, :2].mean(0)  # what it must not be: both positives in one softmax
    assert ((together - each.mean(0)).abs() > 1e-3).all()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("lam", [(1.0, 0.0), (0.5, 0.5), (0.6, 0.4)])
def test_the_three_groups_equal_the_release(dtype, atol, lam):
    s = scene(dtype=dtype)
    ours, theirs = release(s, lam=lam, mu=0.7), slow_release(s, 0.2, lam, 0.7)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    for a, b in zip(gradients(ours, s), gradients(theirs, s)):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * atol)


def test_one_positive_is_moco_v2():
    s = scene()
    moco = slow(s["q"], s["k_q"], s["queue"], 0.2)
    alone = losses.multi_positive(s["q"][None], s["k_q"][:, None], torch.ones(1, 1, 1), s["queue"], 0.2)
    torch.testing.assert_close(alone, moco[None], rtol=0, atol=1e-14)
    twin = {**s, "p": s["q"], "k_p": s["k_q"], "x": None}
    torch.testing.assert_close(release(twin, lam=(0.5, 0.5)), moco, rtol=0, atol=1e-14)
    torch.testing.assert_close(release(twin, lam=(1.0, 0.0)), moco, rtol=0, atol=1e-14)


def test_swapping_anchor_and_neighbour_changes_nothing():
    s = scene()
    swapped = {**s, "q": s["p"], "p": s["q"], "k_q": s["k_p"], "k_p": s["k_q"]}
    for lam in ((0.6, 0.4), (1.0, 0.0)):
        a, b = release({**s, "x": None}, lam=lam), release({**swapped, "x": None}, lam=lam)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
        # the third group too, under the complementary mask (mu becomes 1 - mu)
        torch.testing.assert_close(release(s, lam=lam, mu=0.3), release(swapped, lam=lam, mu=0.7), rtol=0, atol=1e-14)
        assert abs(release(s, lam=lam, mu=0.3) - release(s, lam=lam, mu=0.7)) > 1e-3


def test_cross_terms_have_no_part_in_the_warm_up():
    s = scene()
    moved = {**s, "k_p": unit(6, 8, seed=7)}
    for lam, silent in (((1.0, 0.0), True), ((0.5, 0.5), False)):
        a, b = (gradients(release(t, lam=lam, mu=1.0), t)[0] for t in (s, moved))
        assert torch.equal(a, b) == silent
    assert s["k_p"].grad is None and not s["k_p"].requires_grad


def test_equal_positives_that_share_a_weight_are_one():
    s = scene()
    for m in (2, 5):
        keys = s["k_q"][:, None].expand(-1, m, -1)
        shared = losses.multi_positive(
            s["q"][None], keys, torch.full((m,), 1 / m, dtype=torch.float64), s["queue"], 0.2
        )
        torch.testing.assert_close(shared[0], slow(s["q"], s["k_q"], s["queue"], 0.2), rtol=0, atol=1e-14)


def test_a_ratio_for_each_image_and_small_crops():
    s = scene()
    mu = torch.tensor([0.9, 0.9, 0.9, 0.4, 0.4, 0.4], dtype=torch.float64)
    halves = []
    for part, share in ((slice(3), 0.9), (slice(3, 6), 0.4)):
        halves.append(release({k: v if k == "queue" else v[part] for k, v in s.items()}, mu=share))
    torch.testing.assert_close(release(s, mu=mu), torch.stack(halves).mean(), rtol=0, atol=1e-14)
    weights = losses.group_weights((0.6, 0.4), 0.8, 6, small=2)
    assert weights.shape == (5, 6, 2) and torch.equal(weights[3], weights[0]) and torch.equal(weights[4], weights[0])
    torch.testing.assert_close(weights.sum(2), torch.ones(5, 6, dtype=torch.float64))


def test_gradients_reach_queries_only():
    s = scene()
    keys, queue = s["k_q"].clone().requires_grad_(), s["queue"].clone().requires_grad_()
    losses.info_nce(s["q"], keys[:, None], queue, 0.2).sum().backward()
    assert keys.grad is None and queue.grad is None and s["q"].grad.abs().sum() > 0


def test_autocast_does_not_reach_the_log_sum_exp():
    s = scene(dtype=torch.float32)
    exact = release(s)
    with torch.autocast("cpu", torch.bfloat16):
        inside = release(s)
    assert inside.dtype == torch.float32 and torch.equal(exact, inside)
    assert losses.negatives_lse(s["q"].bfloat16(), s["queue"], 0.2).dtype == torch.float32


def test_rank_of_the_positive():
    s = scene()
    expected = [sum((s["q"][i] @ s["queue"][:, j]) > (s["q"][i] @ s["k_q"][i]) for j in range(40)) for i in range(6)]
    for chunk in (7, 40, 100):
        assert losses.positive_rank(s["q"], s["k_q"], s["queue"], chunk).tolist() == [int(e) for e in expected]
    one = torch.eye(3)[:1]
    assert losses.positive_rank(one, one, torch.eye(3)).tolist() == [0]  # as close is not closer


# --- CutMix ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    alpha=st.sampled_from([0.2, 1.0, 2.0]),
    seed=st.integers(0, 999),
)
def test_the_ratio_is_the_exact_share_of_pixels(height, width, alpha, seed):
    x1, y1, x2, y2, mu = draw_box(height, width, alpha, np.random.default_rng(seed))
    assert 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height
    query, other = torch.zeros(2, 3, height, width), torch.ones(2, 3, height, width)
    mix = paste(query, other, (x1, y1, x2, y2, mu))
    assert mix.double().mean().item() == pytest.approx(1 - mu, abs=1e-12) and not query.any()
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[y1:y2, x1:x2] = True
    assert torch.equal(torch.where(inside, other, query), mix)


def test_an_empty_box_leaves_the_query():
    query, other = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    assert torch.equal(paste(query, other, (3, 3, 3, 3, 1.0)), query)


def test_the_mean_ratio_is_that_of_clipped_boxes():
    rng = np.random.default_rng(0)
    mus = np.array([draw_box(224, 224, 2.0, rng)[4] for _ in range(20000)])
    assert mus.mean() == pytest.approx(0.675, abs=0.01)
    assert np.percentile(mus, [1, 50, 99]) == pytest.approx([0.262, 0.692, 0.955], abs=0.02)


def test_every_share_has_a_box_of_its_own():
    query, other = torch.zeros(6, 3, 16, 16), torch.ones(6, 3, 16, 16)
    boxes = [draw_box(16, 16, 1.0, np.random.default_rng(seed)) for seed in (1, 2, 3)]
    mix, mu = mix_shares(query, other, boxes)
    torch.testing.assert_close(1 - mix.double().mean((1, 2, 3)), mu)
    assert len(set(boxes)) == 3 and mu.tolist() == [box[4] for box in boxes for _ in range(2)]
    for i, box in enumerate(boxes):
        assert torch.equal(mix[2 * i : 2 * i + 2], paste(query[:2], other[:2], box))


# --- encoders and queues ---------------------------------------------------------------------------------------------


def small_model(inter_head: str | None = None, m: float = 0.9, k: int = 24, seed: int = 0) -> CsMl:
    torch.manual_seed(seed)
    return CsMl(arch.build("resnet10", 4, "cifar_pool"), 8, k, m, inter_head)


def test_momentum_update_takes_parameters_only():
    model = small_model()
    model.encoder_q.train()
    for a, b in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(a, b) and not b.requires_grad
    before_k = [p.clone() for p in model.encoder_k.parameters()]
    for p in model.encoder_q.parameters():
        p.data.add_(torch.randn_like(p))
    model([torch.randn(4, 3, 16, 16)])
    model.update_key_encoder()
    for old, q, k in zip(before_k, model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        torch.testing.assert_close(k, 0.9 * old + 0.1 * q, rtol=1e-5, atol=1e-6)
    state = model.state_dict()
    assert not torch.equal(state["encoder_q.bn1.running_mean"], state["encoder_k.bn1.running_mean"])
    assert int(state["encoder_k.bn1.num_batches_tracked"]) == 0


def test_a_forward_pass_for_each_view():
    model, views = small_model().train(), [torch.randn(4, 3, 16, 16) * s for s in (1, 2, 3)]
    alone = copy.deepcopy(model)
    (z,) = model(views)
    assert z.shape == (3, 4, 8)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(3, 4))
    for got, view in zip(z, views):
        assert torch.equal(got, F.normalize(alone.encoder_q(view), dim=1))
    assert int(model.state_dict()["encoder_q.bn1.num_batches_tracked"]) == 3
    together = F.normalize(alone.encoder_q(torch.cat(views)), dim=1).view(3, 4, 8)
    assert (together - z).abs().max() > 1e-3  # one concatenated pass is another method


def test_the_queue_holds_the_newest_keys_in_order():
    model = small_model(k=12)
    start = model.queue.clone()
    torch.testing.assert_close(start.norm(dim=0), torch.ones(12))
    keys = [unit(4, 8, seed=s, dtype=torch.float32) for s in range(4)]
    for key in keys[:2]:
        model.enqueue([key])
    assert torch.equal(model.queue[:, :8], torch.cat(keys[:2]).T) and torch.equal(model.queue[:, 8:], start[:, 8:])
    assert model.queue_ptr.tolist() == [8]
    for key in keys[2:]:
        model.enqueue([key])
    assert torch.equal(model.queue, torch.cat([keys[3], keys[1], keys[2]]).T) and model.queue_ptr.tolist() == [4]
    with pytest.raises(UserError, match="--moco_k 12 does not divide by the global batch of 5; take --moco_k 10"):
        model.check_batch(5)


def test_keys_are_shuffled_over_the_shares_and_come_back_in_order():
    model, x = small_model().train(), torch.randn(8, 3, 16, 16)
    distributed.convert_norm(model, "split", 2)
    plain = small_model().train()
    (keys,) = model.embed_keys(x, torch.Generator().manual_seed(3))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    expected = torch.empty(8, 8)
    with torch.no_grad():
        for part in order.view(2, 4):  # two processes of four images each
            expected[part] = F.normalize(plain.encoder_k(x[part]), dim=1)
    torch.testing.assert_close(keys, expected, rtol=0, atol=1e-5)
    (other,) = model.embed_keys(x, torch.Generator().manual_seed(4))
    assert (other - keys).abs().max() > 1e-4  # dealt otherwise, other batch statistics
    assert not keys.requires_grad


@pytest.mark.parametrize("head", ["mlp", "stage"])
def test_level_3_shapes_the_trunk_and_leaves_level_4_alone(head):
    one, two = small_model().train(), small_model(head).train()
    shared = {k: v for k, v in two.state_dict().items() if k in one.state_dict()}
    assert all(torch.equal(v, shared[k]) for k, v in one.state_dict().items())  # the same start
    assert {"encoder_q.fc3.0.weight", "encoder_k.fc3.2.bias", "queue_l3"} <= set(two.state_dict())
    views, keys = [torch.randn(4, 3, 32, 32) for _ in range(2)], unit(4, 2, 8, seed=5, dtype=torch.float32)

    def grads(model: CsMl, weight: float) -> dict[str, Tensor]:
        model = copy.deepcopy(model)
        levels = zip(model(views), (1.0, weight), model.queues)
        per_level = [w * losses.multi_positive(z, keys, torch.tensor([0.5, 0.5]), n, 0.2).mean() for z, w, n in levels]
        torch.stack(per_level).sum().backward()
        return {name: p.grad for name, p in model.encoder_q.named_parameters() if p.grad is not None}

    single, nothing, both = grads(one, 0.0), grads(two, 0.0), grads(two, 1.0)
    assert all(torch.equal(single[name], nothing[name]) for name in single)
    for name, grad in single.items():
        if name.startswith(("layer4", "fc.")):
            assert torch.equal(grad, both[name]), name
        else:
            assert not torch.equal(grad, both[name]), name
    assert both["fc3.0.weight"].abs().sum() > 0
    assert ("stage3.0.conv1.weight" in both) == (head == "stage")


def test_both_queues_and_the_momentum_cover_level_3():
    model = small_model("mlp", k=8)
    a, b = unit(2, 4, 8, dtype=torch.float32)
    model.enqueue([a, b])
    assert torch.equal(model.queue[:, :4], a.T) and torch.equal(model.queue_l3[:, :4], b.T)
    model.encoder_q.fc3[0].weight.data.add_(1)
    before = model.encoder_k.fc3[0].weight.clone()
    model.update_key_encoder()
    torch.testing.assert_close(model.encoder_k.fc3[0].weight, before + 0.1)
    keys = model.embed_keys(torch.randn(4, 3, 32, 32), torch.Generator())
    assert [k.shape for k in keys] == [(4, 8)] * 2


def test_checkpoints_have_the_names_of_the_release():
    model = small_model("mlp")
    state = ReleaseKeys(model).state_dict()
    for key in ("queue", "queue_ptr", "encoder_q.conv1.weight", "encoder_k.layer4.0.downsample.1.running_var"):
        assert f"module.{key}" in state
    assert {k.split(".fc.")[1] for k in state if ".fc." in k} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    other = small_model("mlp", seed=1)
    ReleaseKeys(other).load_state_dict(state)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    with pytest.raises(UserError, match="missing"):
        ReleaseKeys(other).load_state_dict({k: v for k, v in state.items() if "queue_l3" not in k})


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_compute_what_torchvision_computes(name):
    import torchvision

    theirs = torchvision.models.get_model(name, weights=None).eval()
    ours = arch.build(name).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    theirs.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, pre_out=True), theirs(x), rtol=1e-5, atol=1e-5)
        last = {"resnet18": 9, "resnet50": 17}[name]
        maps = ours.maps(x, [0, 1, last])
        torch.testing.assert_close(maps[last].mean((2, 3)), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(maps[0], ours.conv1(x))  # the ReLU works in place, and not on this one
        assert (maps[1] >= 0).all() and maps[1].shape == (1, 64, 32, 32)
    with pytest.raises(UserError, match=rf"blocks 0\.\.{last}"):
        ours.maps(x, [last + 1])


def test_block_ids_of_resnet50_are_the_release_s():
    maps = arch.build("resnet50", 8).eval().maps(torch.randn(1, 3, 64, 64), range(18))
    channels = [m.shape[1] for m in maps.values()]
    assert channels == [8] * 2 + [32] * 3 + [64] * 4 + [128] * 6 + [256] * 3
    assert [maps[i].shape[-1] for i in (1, 4, 8, 14, 17)] == [32, 16, 8, 4, 2]


def test_initialisation_and_stems():
    torch.manual_seed(0)
    net = arch.build("resnet18")
    weight = net.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert (net.layer1[0].bn2.weight == 1).all() and (net.layer1[0].bn2.bias == 0).all()
    sizes = [arch.build("resnet10", 4, stem).maps(torch.randn(1, 3, 32, 32), [2])[2].shape[-1] for stem in arch.STEMS]
    assert sizes == [8, 32, 16]
    assert arch.build("resnet10", 4).num_features == 32 and arch.build("resnet50", 64).num_features == 2048
    with pytest.raises(UserError, match="unknown --arch resnet9"):
        arch.build("resnet9")


def _norms(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = CsMl(arch.build("resnet10", 4, "cifar_pool"), dim=8, k=16)
    model.encoder_k(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(rank)))
    before = [buffer.clone() for buffer in model.encoder_k.buffers()]
    model.share_norms()
    torch.save([before, list(model.encoder_k.buffers())], Path(folder, str(rank)))
    torch.distributed.destroy_process_group()


def test_features_are_taken_with_the_statistics_of_the_first_process(python, tmp_path):
    code = "import sys; from tests.test_hsa_method import _norms; _norms(int(sys.argv[1]), sys.argv[2])"
    root = Path(__file__).resolve().parents[1]
    ranks = [subprocess.Popen([python, "-c", code, str(rank), str(tmp_path)], cwd=root) for rank in (0, 1)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    (first, own), (other, shared) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert not torch.equal(first[0], other[0])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, own, shared, strict=True))
