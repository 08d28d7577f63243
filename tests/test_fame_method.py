"""Mask and merge of fame against the release's numbers and the properties of its spec; MoCo's two passes; networks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fame import augment, fame
from fame.backbone import build
from fame.fame import Fame, make_mask, merge
from fame.lab import compare_release
from fame.lab.compare_release import clips_of, contrast_inputs, moving_squares, our_contrast, packed, summary
from fame.moco.builder import MoCo, contrast_rank, info_nce, passes
from shared_utils import UserError, checkpoint

ROOT = Path(__file__).resolve().parents[1]
FROZEN = json.loads((ROOT / "tests/reference/fame.json").read_text())


# --- the release's numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FROZEN["masks"], ids=lambda c: f"{c['clips']}-{c['size']}-{c['beta']}")
def test_masks_and_merges_are_the_release_s(case):
    x = clips_of(case["size"])[case["clips"]]
    mask = make_mask(x, beta=case["beta"])
    assert packed(mask) == case["mask"]
    merged = merge(x, mask, torch.arange(len(x)).roll(1)) if case["beta"] == 0.5 else None
    if merged is not None:
        merged = merged.double()
        assert float(merged.sum()) == pytest.approx(case["merge_sum"], rel=1e-6)
        w = torch.cos(torch.arange(merged.numel(), dtype=torch.float64)).view_as(merged)
        assert float((merged * w).sum()) == pytest.approx(case["merge_cos"], rel=1e-6, abs=1e-6 * case["merge_sum"])


@pytest.mark.parametrize("wrong", [{"hue": "correct"}, {"laplace": 1e-9}, {"bins": 5}, {"kind": "seed"}])
def test_other_masks_miss_the_release_s(wrong):
    cases = [c for c in FROZEN["masks"] if c["size"] == 48]
    assert any(packed(make_mask(clips_of(48)[c["clips"]], beta=c["beta"], **wrong)) != c["mask"] for c in cases)


@pytest.mark.parametrize(
    ("size", "beta", "ones", "sums", "recall", "iou"),
    [
        (32, 0.3, 307, (163478, 143419), (0.568, 0.711), (0.278, 0.373)),
        (32, 0.5, 512, (275204, 255573), (0.779, 0.795), (0.267, 0.274)),
        (112, 0.3, 3763, (22268284, 17813588), (0.993, 0.987), (0.607, 0.610)),
        (112, 0.5, 6272, (37696648, 34393464), (1.000, 1.000), (0.368, 0.374)),
    ],
)
def test_golden_masks(size, beta, ones, sums, recall, iou):  # kornia 0.9.0 on another machine
    x = moving_squares(size)
    mask = make_mask(x, beta=beta)
    assert mask.flatten(1).sum(1).tolist() == [ones, ones]
    found = [int(m.flatten().nonzero().sum()) for m in mask]
    assert found == pytest.approx(sums, rel=0.005)
    colours = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.3, 0.9]]).view(2, 3, 1, 1, 1)
    square = (x == colours).all(1).any(1)  # wherever it has been
    assert square.flatten(1).sum(1).tolist() == ([190, 190] if size == 32 else [2310, 2345])
    both, either = ((m.flatten(1).sum(1)) for m in (mask & square, mask | square))
    assert (both / square.flatten(1).sum(1)).tolist() == pytest.approx(recall, abs=0.01)
    assert (both / either).tolist() == pytest.approx(iou, abs=0.01)


@pytest.mark.parametrize("name", FROZEN["contrast"])
def test_contrast_is_the_release_s(name):
    found, expected = summary(name, our_contrast(*contrast_inputs())[name]), FROZEN["contrast"][name]
    scale = max(map(abs, expected)) if name.startswith("l") else abs(expected[1])
    np.testing.assert_allclose(found, expected, atol=2e-6 * scale * (1 if name.startswith("l") else 10), rtol=2e-6)


def test_the_clean_order_misses_the_release_s_second_pass():
    found = our_contrast(*contrast_inputs(), order="clean")
    expected = FROZEN["contrast"]["logits 1"]
    atol = 2e-6 * max(map(abs, expected))  # entries near 0 carry the rounding of the large ones
    np.testing.assert_allclose(summary("logits 1", found["logits 1"]), expected, atol=atol, rtol=2e-6)
    assert not np.allclose(summary("logits 2", found["logits 2"]), FROZEN["contrast"]["logits 2"], rtol=1e-2)


def test_comparison_needs_a_checkout(tmp_path):
    with pytest.raises(UserError, match=r"moco/loader\.py is missing; git clone"):
        compare_release.main(["--release", str(tmp_path)])
    with pytest.raises(UserError, match="a multiple of 8"):
        compare_release.main(["--release", str(tmp_path), "--clips", "12"])


# --- mask and merge --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return torch.rand(3, 3, 5, 36, 36, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["full", "seed"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.501, 1.0])
def test_beta_counts_pixels(kind, beta, clips):
    order = torch.tensor([1, 2, 0])
    mask = make_mask(clips, kind, beta)
    assert mask.flatten(1).sum(1).tolist() == [int(beta * 36 * 36)] * 3
    merged = merge(clips, mask, order)
    inside = mask[:, None, None].expand_as(clips)
    assert torch.equal(merged[inside], clips[inside])  # to the bit
    assert torch.equal(merged[~inside], clips[order][~inside])
    assert torch.equal(merge(clips, mask, torch.arange(3)), clips)
    if beta in (0, 1):
        assert torch.equal(merged, clips if beta else clips[order])


def test_mask_follows_reversal_and_flips(clips):
    mask = make_mask(clips)
    assert torch.equal(make_mask(clips.flip(2)), mask)
    assert torch.equal(make_mask(clips.flip(-1)), mask.flip(-1))
    assert not torch.equal(make_mask(clips[:, :, [0, 2, 4, 1, 3]]), mask)


def test_a_static_clip_gives_a_mask():
    x = torch.full((2, 3, 4, 36, 36), 0.25)
    x[1] = torch.rand(3, 1, 36, 36).expand(3, 4, 36, 36)
    for kind in ("full", "seed", "grid"):
        mask = make_mask(x, kind)
        assert mask.flatten(1).sum(1).tolist() == [36 * 36 // 2] * 2
    soft = fame.soft_foreground(torch.zeros(2, 36, 36), fame.colour_ids(x.mean(2)))
    assert torch.isfinite(soft).all() and soft.min() >= 0 and soft.max() < 1


def test_motion_is_found_without_its_background():
    """A square moves over a still background: most of the seed mask lies where it has been."""
    x = moving_squares(64)
    moved = (x != x[:, :, :1]).any(2).any(1)
    seed = make_mask(x, "seed", float(moved.float().mean()))
    assert (seed & moved).sum() > 0.8 * moved.sum()


def test_motion_map_is_the_mean_of_differences(clips):
    motion, mean = fame.motion_and_colour(clips)
    expected = (clips[:, :, :-1] - clips[:, :, 1:]).abs().sum(1).mean(1)
    torch.testing.assert_close(motion, expected)
    torch.testing.assert_close(mean, clips.mean(2))


def test_blur_is_torchvision_s(clips):
    x = clips[:, 0, 0]
    torch.testing.assert_close(fame.blur(x, 5, 5 / 3), TF.gaussian_blur(x[:, None], [5, 5], [5 / 3, 5 / 3])[:, 0])
    assert [fame.kernel_size(s) for s in (32, 112, 224)] == [3, 11, 23]


def test_colours():
    pixels = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.2, 0.9, 0.4]]).T.view(1, 3, 2, 2)
    h, s, v = fame.rgb_to_hsv(pixels)[0].flatten(1)
    assert float(h[0]) == pytest.approx(4 * math.pi / 3) and float(h[1]) == 0 and float(s[2]) == 0
    assert float(s[0]) == pytest.approx(1, abs=1e-5) and float(v[0]) == 1
    torch.testing.assert_close(augment.hsv_to_rgb(fame.rgb_to_hsv(pixels)), pixels, atol=1e-5, rtol=0)
    for hue in ("release", "correct"):
        ids = fame.colour_ids(pixels, hue)
        assert 1 <= int(ids.min()) and int(ids.max()) <= 1000
        grey = fame.colour_ids(torch.linspace(0, 1, 11).expand(1, 3, 1, 11), hue)[0, 0]
        assert ((grey - 1) % 100).tolist() == [5 + 10 * 5] * 11  # cell (6, 6): 5.5 rounds to even
    assert not torch.equal(fame.colour_ids(pixels), fame.colour_ids(pixels, "correct"))


def test_soft_foreground_by_hand():
    """Two colours; F holds 6 of colour 1 and 2 of colour 2, G one of colour 2, and one more in each bin."""
    ids = torch.ones(1, 4, 4, dtype=torch.long)
    ids[0, 2:] = 2
    seed = torch.arange(16.0).flip(0).view(1, 4, 4)
    seed[0, 2, 0], seed[0, 0, 0] = 20.0, 8.4  # 8 largest: 7 of colour 1, one of colour 2
    bins = 3
    fore = torch.tensor([7 / 8, 1 / 8])
    back = torch.tensor([1.0, 1 + 1]) / (27 + 1)  # floor(1.6) = 1 pixel, the smallest, of colour 2
    expected = fore / (fore + back)
    found = fame.soft_foreground(seed, ids, bins, 1.0)
    torch.testing.assert_close(found[0, 0, 1], expected[0])
    torch.testing.assert_close(found[0, 3, 3], expected[1])


def test_grid_and_gauss(clips):
    mask = make_mask(clips, "grid")
    cells = mask.view(3, 4, 9, 4, 9).transpose(2, 3).flatten(3)
    assert bool((cells.all(-1) | ~cells.any(-1)).all()) and cells[..., 0].flatten(1).sum(1).tolist() == [8, 8, 8]
    seed = fame.seed_map(fame.motion_and_colour(clips)[0])
    sums = seed.view(3, 4, 9, 4, 9).sum((2, 4)).flatten(1)
    chosen = cells[..., 0].flatten(1)
    assert all(s[c].min() >= s[~c].max() for s, c in zip(sums, chosen))
    soft = make_mask(clips, "gauss")
    assert soft.shape == (3, 36, 36) and float(soft.max()) == 1 and torch.equal(soft, soft.flip(1)) and soft.min() > 0
    merged = merge(clips, soft, torch.tensor([1, 2, 0]))
    torch.testing.assert_close(merged[0], soft[0] * clips[0] + (1 - soft[0]) * clips[1])


def test_opacity_and_erasing(clips):
    mask, order = make_mask(clips), torch.tensor([2, 0, 1])
    m = mask[:, None, None].float()
    torch.testing.assert_close(merge(clips, mask, order, 0.4), 0.4 * (1 - m) * clips[order] + (0.6 + 0.4 * m) * clips)
    still = fame.erase(clips, torch.tensor([0, 4, 2]), torch.tensor([0.0, 0.3, 1.0]))
    assert torch.equal(still[0], clips[0])
    torch.testing.assert_close(still[1], 0.7 * clips[1] + 0.3 * clips[1, :, 4:5])
    torch.testing.assert_close(still[2], clips[2, :, 2:3].expand(3, 5, 36, 36))


@pytest.mark.parametrize("kind", fame.MASKS)
def test_shares_of_one_process_are_the_batches_of_several(kind):
    x = torch.rand(8, 3, 4, 30, 30)
    both, masks = Fame(kind, seed=3)(x, 7, [2, 3])
    parts = [Fame(kind, seed=3)(part, 7, [n]) for n, part in zip((2, 3), x.chunk(2))]
    assert torch.equal(both, torch.cat([p[0] for p in parts])) and torch.equal(masks, torch.cat([p[1] for p in parts]))
    again = Fame(kind, seed=3)(x, 8, [2, 3])[0]
    assert torch.equal(both, again) == (kind == "none")


def test_one_clip_a_share_is_refused():
    x = torch.rand(2, 3, 4, 30, 30)
    with pytest.raises(UserError, match="nothing would be merged; raise --batch_size"):
        Fame()(x, 0, [0, 1])
    assert torch.equal(Fame("none")(x, 0, [0, 1])[0], x)


# --- colours ---------------------------------------------------------------------------------------------------------


def test_jitter_is_torchvision_s():
    x = torch.rand(2, 3, 2, 8, 8)
    frames = x.transpose(1, 2)  # torchvision wants [..., 3, H, W]
    for which, adjust in enumerate((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)):
        amount = torch.tensor([0.7, 1.3]) - float(which == 3)
        found = augment._adjust(x, which, amount, "torchvision").transpose(1, 2)
        for i in range(2):
            expected = adjust(frames[i], float(amount[i]))
            torch.testing.assert_close(found[i], expected, atol=1e-4 if which < 3 else 1e-3, rtol=0)
    old = augment._adjust(x, 0, torch.tensor([1.2, 0.9]), "kornia_old")
    torch.testing.assert_close(old[0], (x[0] + 0.2).clamp(0, 1))


@pytest.mark.parametrize(("which", "low", "high"), [(0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.6, 1.4), (3, -0.1, 0.1)])
def test_jitter_is_drawn_evenly_on_both_sides(which, low, high):
    x = torch.rand(3, 3, 2, 8, 8)
    u = torch.full((3, augment.DRAWS), 0.9)
    u[:, 1] = 0.0  # jitter alone
    u[:, 2 + which] = torch.tensor([0.0, 0.5, 1.0])
    amount = torch.tensor([low, (low + high) / 2, high])
    expected = augment.normalise(augment._adjust(x.clone(), which, amount, "torchvision"))
    torch.testing.assert_close(augment.Colours(8, None)(x.clone(), u, [which]), expected)


def test_colours_are_one_for_all_frames_and_own_for_each_clip():
    x = torch.rand(1, 3, 1, 40, 40).expand(4, 3, 3, 40, 40)
    u = torch.rand(4, augment.DRAWS, generator=torch.Generator().manual_seed(1))
    u[:, 0], u[:, 1], u[:, 6] = torch.tensor([0.1, 0.9, 0.9, 0.9]), torch.tensor([0.9, 0.1, 0.1, 0.9]), 0.9
    u[3, 6] = 0.1
    colours = augment.Colours(40, 1.5)
    out = colours(x.clone(), u, [2, 0, 3, 1])
    assert all(torch.equal(out[:, :, t], out[:, :, 0]) for t in range(3))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (augment.MEAN, augment.STD))
    raw = out * std + mean
    assert float((raw[0, 0] - raw[0, 2]).abs().max()) < 1e-5 and not torch.allclose(raw[1], raw[2])
    plane = TF.gaussian_blur(x[3, :, 0], [5, 5], [1.5, 1.5])
    torch.testing.assert_close(raw[3, :, 0], plane, atol=1e-5, rtol=0)
    assert not torch.allclose(augment.Colours(40, None)(x.clone(), u, [0, 1, 2, 3])[3], out[3])
    assert 0.1 <= augment.draw_sigma(5) <= 2 and augment.draw_sigma(5) != augment.draw_sigma(6)


# --- contrast --------------------------------------------------------------------------------------------------------


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def tiny_moco(k: int = 24, dim: int = 16, m: float = 0.9) -> MoCo:
    torch.manual_seed(0)
    return MoCo(compare_release.Flat(dim, 3 * 2 * 4 * 4), dim, k, m, 0.1)


def test_momentum_queue_and_gradients():
    model = tiny_moco()
    v0, v1, _ = contrast_inputs()
    with torch.no_grad():
        for p in model.encoder_k.parameters():
            p.mul_(0.5)
    q, k = ([p.clone() for p in e.parameters()] for e in (model.encoder_q, model.encoder_k))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    z0, z1 = model([v0, v1])
    model.update_key_encoder()
    k1, k0 = (model.embed_keys(v, torch.Generator().manual_seed(1)) for v in (v1, v0))
    logits = passes(model, z0, z1, k0, k1)
    (info_nce(*logits[0]) + info_nce(*logits[1])).backward()
    optimizer.step()
    assert all(p.grad is None for p in model.encoder_k.parameters())
    assert not torch.equal(next(model.encoder_q.parameters()), q[0])
    for own, before, query in zip(model.encoder_k.parameters(), k, q):
        torch.testing.assert_close(own, 0.9 * before + 0.1 * query)
    for step in range(4):
        model.enqueue([k1, k0])
        assert int(model.queue_ptr) == 8 * (step + 1) % 24
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(24))
    assert torch.equal(model.queue[:, 0:4], k1.T) and torch.equal(model.queue[:, 4:8], k0.T)
    with pytest.raises(UserError, match="take --moco_k 20"):
        model.check_batch(10)
    with pytest.raises(UserError, match="twice at least"):
        model.check_batch(24)
    model.check_batch(12)


@pytest.mark.parametrize("order", ["release", "clean"])
def test_the_false_negative(order):
    model = tiny_moco()
    z = unit(4, 16)
    model.queue_ptr[0] = 20
    logits = passes(model, z, z, z, z, order)
    negatives = z @ model.queue / 0.1
    if order == "release":
        negatives[:, 20:24] = z @ z.T / 0.1
        assert torch.diagonal(logits[1][1][:, 20:24]).tolist() == pytest.approx([10.0] * 4)
    torch.testing.assert_close(logits[1][1], negatives)
    expected = (torch.cat([torch.full((4, 1), 10.0), negatives], 1).logsumexp(1) - 10).mean()
    torch.testing.assert_close(info_nce(*logits[1]), expected)
    torch.testing.assert_close(logits[0][1], z @ model.queue / 0.1)
    assert float(info_nce(*logits[0])) < 0.2
    assert contrast_rank(logits).tolist() == [0, 0, 0, 0]


def test_loss_of_independent_units():
    k, dim = 4096, 128
    loss = info_nce(
        (unit(512, dim) * unit(512, dim, seed=1)).sum(1) / 0.1, unit(512, dim) @ unit(k, dim, seed=2).T / 0.1
    )
    assert float(loss) == pytest.approx(math.log(k) + 1 / (2 * dim * 0.01), rel=0.03)


# --- networks --------------------------------------------------------------------------------------------------------


def parameters(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def test_networks():
    i3d = build("I3D", 128)
    assert parameters(i3d) == pytest.approx(13.468, abs=1e-3) and parameters(build("I3D")) == pytest.approx(
        12.287, abs=1e-3
    )
    assert len(i3d.state_dict()) == 346
    x = torch.rand(1, 3, 16, 64, 64)
    with torch.no_grad():
        assert i3d.eval().maps(x).shape == (1, 1024, 2, 2, 2)
        torch.testing.assert_close(i3d(x).norm(dim=1), torch.ones(1))
        log_probabilities = build("I3D", classes=7).eval()(x)
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(1))
    assert parameters(build("r2plus1d_18", classes=128)) == pytest.approx(31.366, abs=1e-3)
    head = build("r2plus1d_18", 128).fc
    assert float(head[2].weight.std()) == pytest.approx(0.01, rel=0.05) and head[0].weight.shape == (512, 512)
    for name in ("r3d_18", "s3d", "c3d", "tiny"):
        with torch.no_grad():
            assert build(name, 16, width=4).eval()(torch.rand(1, 3, 16, 48, 48)).shape == (1, 16)
    with pytest.raises(UserError, match="choose from"):
        build("resnet")


def test_released_files_load_strictly(tmp_path):
    """A file as the release writes it: module.encoder_q.*, and what a classifier lacks is named."""
    pretrained = build("I3D", 128)
    state = {f"module.encoder_q.{k}": v for k, v in pretrained.state_dict().items()}
    state |= {"module.queue": torch.zeros(128, 4)}
    torch.save({"epoch": 200, "arch": "I3D", "state_dict": state}, tmp_path / "a.pth.tar")
    weights = checkpoint.read_weights(tmp_path / "a.pth.tar")
    classifier = build("I3D", classes=5)
    own = set(classifier.state_dict())
    assert set(weights) - own == {f"id_head.{n}.{p}" for n in (2, 4) for p in ("weight", "bias")}
    assert own - set(weights) == {"fc.weight", "fc.bias"}
    with pytest.raises(UserError, match="2 missing .*4 unexpected"):
        checkpoint.load_strict(classifier, weights)
    report = checkpoint.load_strict(classifier, weights, ("id_head.*",), ("fc.*",))
    assert "left new 2" in report
    name = "mixed_5c.branch_1.1.conv3d.weight"
    assert torch.equal(classifier.state_dict()[name], pretrained.state_dict()[name])
