"""uvos_dino's method: golden losses and clusterings, the block, the encoder, properties of the attention."""

import math
import re
import sys
from collections.abc import Callable

import pytest
import timm.models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared_utils import UserError, checkpoint
from uvos_dino import clustering, losses, vision_transformer, weights
from uvos_dino.model_cluster import AttEncoder
from uvos_dino.vision_transformer import VisionTransformer, build, for_weights

CPU = torch.device("cpu")


def golden() -> tuple[Tensor, Tensor, Tensor]:
    """z [1, 3, 240, 16], A [1, 720, 720] and P of the reference numbers."""
    n = torch.arange(720, dtype=torch.float64)[:, None]
    m, c = n.T, torch.arange(16, dtype=torch.float64)[None]
    logits = 3 * torch.sin(0.11 * n + 0.07 * m) + 2 * torch.cos(0.013 * n - 0.029 * m) + 0.5 * torch.sin(0.001 * n * m)
    z = torch.sin(0.3 * n + 0.17 * c * (n + 1).sqrt()).view(1, 3, 240, 16)
    return z, logits.softmax(-1)[None], torch.arange(0, 240, 30)


def test_golden_losses_and_gradients() -> None:  # numbers that the release's code gives
    z, A, P = golden()
    z.requires_grad_(), A.requires_grad_()
    sem, mot = losses.semantic(z, A, P), losses.motion(A, P, 3)
    assert sem.item() == pytest.approx(0.9590417675, abs=1e-10) and mot.item() == pytest.approx(2.3566440637, abs=1e-10)
    (sem + mot).backward()
    assert z.grad.norm().item() == pytest.approx(0.0115688, abs=1e-7)
    assert A.grad.norm().item() == pytest.approx(2010.12, abs=1e-2)
    assert int((A.grad[0].abs().sum(1) > 0).sum()) == 590
    weights = losses.entropy_weights(A.detach().view(1, 3, 240, 720)[0, 0, P])
    expected = [0.12238, 0.12953, 0.14091, 0.11648, 0.12606, 0.13941, 0.11672, 0.10851]
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64), atol=5e-6)
    assert losses.motion(A.float(), P, 3).item() == pytest.approx(2.35664, abs=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda z, A, P: losses.semantic(z, A, P, pos=29),
        lambda z, A, P: losses.semantic(z, A, P, far=0.2),
        lambda z, A, P: losses.semantic(z, A, P + 1),
    ],
)
def test_wrong_variants_miss_the_golden_number(wrong: Callable[..., Tensor]) -> None:
    assert abs(wrong(*golden()).item() - 0.9590417675) > 1e-4


def slow_motion(A: Tensor, P: Tensor, T: int, pos: int, neg: int, uniform: bool) -> float:
    """An independent loop over frames, points and pairs."""
    N, total = A.shape[1] // T, []
    for t in range(T):
        rows = [A[0, t * N + int(i)] for i in P]
        q = [row / row.sum() for row in rows]
        sure = torch.tensor([float((x * (x + 1e-10).log()).sum()) for x in q], dtype=A.dtype)
        w = torch.full_like(sure, 1 / len(P)) if uniform else sure.exp() / sure.exp().sum()
        for p, row in enumerate(rows):
            order = row[t * N : (t + 1) * N].argsort(descending=True).tolist()
            score = []
            for j in order[:pos] + order[-neg:]:
                a = A[0, t * N + j]
                score.append(float((q[p] * (a / a.sum() + 1e-10).log()).sum()))
            pairs = [max(0.0, n - y + 1) for y in score[:pos] for n in score[pos:]]
            total.append(float(w[p]) * sum(pairs) / len(pairs))
    return sum(total) / T


@pytest.mark.parametrize("weights", ["entropy", "uniform"])
def test_motion_against_a_loop(weights: str) -> None:
    A = (3 * torch.randn(1, 60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).softmax(-1)
    P = torch.tensor([1, 7, 12])
    slow = slow_motion(A, P, 3, 2, 5, weights == "uniform")
    assert losses.motion(A, P, 3, 2, 5, weights=weights).item() == pytest.approx(slow, abs=1e-12)


def test_entropy_weights() -> None:
    rows = torch.stack([torch.full((12,), 1 / 12), torch.eye(12)[3], torch.arange(1.0, 13) / 78])
    w = losses.entropy_weights(rows)
    assert w.argmin() == 0 and w.argmax() == 1 and w.sum().item() == pytest.approx(1)
    assert torch.allclose(losses.entropy_weights(rows[2].expand(8, 12)), torch.full((8,), 1 / 8))


def test_losses_vanish_where_they_should() -> None:
    T, N = 2, 12
    group = torch.arange(N).repeat(T) // 6  # two groups of patches, the same in both frames
    same = (group[:, None] == group).double()
    A = (same + 1e-6 * torch.rand(T * N, T * N, dtype=torch.float64)) / 12
    z = torch.eye(2, dtype=torch.float64)[group].view(1, T, N, 2)
    P = torch.tensor([0, 7])
    assert losses.semantic(z, A[None], P, 6, 6).item() == 0
    assert losses.motion(A[None], P, T, 6, 6).item() == 0
    assert losses.motion(A[None], P, T, 6, 7).item() > 0  # one negative of the query's own group


def test_counts_follow_the_grid() -> None:
    assert losses.Counts().scaled(24 * 48) == (30, 200, 10, 50) and losses.Counts().scaled(96) == (2, 17, 1, 4)
    points = losses.sample_points(50, 50, torch.Generator().manual_seed(0))
    assert sorted(points.tolist()) == list(range(50)) != points.tolist()


# --- model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> AttEncoder:
    torch.manual_seed(0)
    return AttEncoder(VisionTransformer(8, 64, 2, 32), num_heads=4)


def test_block_is_equivariant_to_the_order_of_frames(model: AttEncoder) -> None:
    clip = torch.randn(1, 3, 3, 16, 32)
    order = torch.tensor([2, 0, 1])
    model.eval()
    with torch.no_grad():
        one, other = model(clip), model(clip[:, order])
    assert torch.allclose(one.z[:, order], other.z, atol=1e-5)
    A = one.A.view(3, 8, 3, 8)[order][:, :, order].reshape(1, 24, 24)
    assert torch.allclose(A, other.A, atol=1e-6) and one.A.shape == (1, 24, 24)
    assert float(one.A.sum(-1).max()) < 1 and float(one.A.sum(-1).min()) > 0.7  # what the class tokens get is missing
    alone = model.encoder(clip[0])
    assert torch.allclose(model.encode(clip)[0, :, 0], alone.cls, atol=1e-5)
    assert torch.allclose(model.encode(clip)[0, :, 1:], alone.k.flatten(2).transpose(1, 2), atol=1e-5)
    assert torch.allclose(model.encoder.keys(clip[0]), alone.k, atol=1e-6)


def test_only_the_block_is_trained(model: AttEncoder) -> None:
    model.train()
    assert not model.encoder.training and model.temporal_transformer.training
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    out = model(torch.randn(1, 2, 3, 16, 32))
    (out.z.square().mean() + out.A.square().sum()).backward()
    optimizer.step()
    assert all(p.grad is None for p in model.encoder.parameters())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.startswith("temporal_transformer.0.")}


def test_sizes_of_the_release() -> None:
    with torch.device("meta"):
        model = AttEncoder(VisionTransformer())
    encoder, block = model.encoder, model.temporal_transformer
    assert sum(p.numel() for p in encoder.parameters()) == 21670272
    assert sum(p.numel() for p in block.parameters()) == 1773312
    assert {k.split(".", 2)[2] for k in model.state_dict() if k.startswith("temporal")} == {
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "norm2.weight",
        "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    }  # fmt: skip


def test_position_table_is_dinos() -> None:
    vit = VisionTransformer(8, 64, 1, 32)
    assert vit.positions(4, 4) is vit.pos_embed and vit.positions(3, 6).shape == (1, 19, 64)
    table = vit.pos_embed[:, 1:].view(1, 4, 4, 64).permute(0, 3, 1, 2)
    exact = torch.nn.functional.interpolate(table, size=(3, 6), mode="bicubic").flatten(2).transpose(1, 2)
    assert 1e-4 < float((vit.positions(3, 6)[:, 1:] - exact).abs().max().detach()) < 0.05  # the .1 patch


@pytest.mark.parametrize("kind", ["backbone", "full", "ddp"])
def test_dino_files_load_to_the_last_tensor(kind: str, tmp_path) -> None:
    torch.manual_seed(1)
    state = build("vit_mini", 8, 32).state_dict()
    wrapped = {
        "backbone": state,
        "full": {"student": {}, "teacher": {f"backbone.{k}": v for k, v in state.items()} | {"head.x": torch.ones(1)}},
        "ddp": {"student": {}, "teacher": {f"module.backbone.{k}": v for k, v in state.items()}},
    }[kind]
    checkpoint.save(tmp_path / "dino.pth", wrapped)
    vit, said = vision_transformer.load(str(tmp_path / "dino.pth"), "vit_small", 16)
    assert all(torch.equal(v, state[k]) for k, v in vit.state_dict().items()) and "left new 0" in said
    assert (vit.embed_dim, vit.depth, vit.patch_size) == (128, 4, 8)


def layer_scaled(depth: int = 3) -> timm.models.VisionTransformer:
    """timm's network of DINOv2's kind, small, with a gamma of its own in each branch."""
    torch.manual_seed(2)
    net = timm.models.VisionTransformer(
        img_size=56, patch_size=14, embed_dim=128, depth=depth, num_heads=2, init_values=1.0, num_classes=0
    )
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.uniform_(-1, 1) if "gamma" in name else value.normal_(std=0.1)
    return net.eval()


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's weights as transformers' Dinov2Model calls them, below `backbone.`, beside a decoder."""
    out = {"decoder.final_conv.weight": torch.ones(1), "backbone.embeddings.mask_token": torch.ones(1, 128)}
    fixed = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    for key, value in state.items():
        key = fixed.get(key, key).replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        key = re.sub(r"^norm\.", "layernorm.", re.sub(r"^blocks", "encoder.layer", key))
        key = re.sub(r"ls(\d)\.gamma", r"layer_scale\1.lambda1", key).replace("attn.proj", "attention.output.dense")
        if "attn.qkv" in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                out["backbone." + key.replace("attn.qkv", f"attention.attention.{name}")] = part
        else:
            out[f"backbone.{key}"] = value
    return out


def as_onnx(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[str, str, list[str]]]]:
    """Tensors and nodes as torch's exporter writes them: matrices and the position table without their names."""
    tensors, nodes = {}, []
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        number = len(nodes)
        if kind == "weight" and value.dim() == 2:
            tensors[f"onnx::MatMul_{number}"] = value.T.contiguous()
            nodes.append(("MatMul", f"/{module.replace('.', '/').replace('/layer/', '/layer.')}/MatMul",
                          [f"x{number}", f"onnx::MatMul_{number}"]))  # fmt: skip
        elif kind == "position_embeddings":
            tensors |= {"onnx::Concat_1": value[:, :1], "onnx::Reshape_2": value[:, 1:]}
            nodes += [("Reshape", "/backbone/embeddings/Reshape_1", ["onnx::Reshape_2", "shape"]),
                      ("Concat", "/backbone/embeddings/Concat_2", ["onnx::Concat_1", "x"])]  # fmt: skip
        elif kind != "mask_token":
            tensors[key] = value
    return tensors, nodes


@pytest.mark.parametrize("kind", ["timm", "dinov2 in chunks", "gamma_1", "transformers", "onnx"])
def test_layer_scale_is_folded_exactly(kind: str, tmp_path) -> None:
    net = layer_scaled()
    state = dict(net.state_dict())
    if kind == "dinov2 in chunks":
        state = {re.sub(r"^blocks\.(\d)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): v for k, v in state.items()}
        state["mask_token"] = torch.ones(1, 128)
    elif kind == "gamma_1":
        state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", k): v for k, v in state.items()}
    elif kind in ("transformers", "onnx"):
        state = transformers_names(state)
    if kind == "onnx":
        state = weights.named(*as_onnx(state))
    checkpoint.save(tmp_path / "v2.pth", state)
    vit, said = vision_transformer.load(str(tmp_path / "v2.pth"), "vit_small", 8)
    vit.eval()
    assert (vit.patch_size, vit.depth, vit.embed_dim) == (14, 3, 128) and "left new 0" in said
    assert ("1 tensors of another part left out (decoder.final_conv.weight" in said) == (
        kind in ("transformers", "onnx")
    )
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        exact = net.forward_features(images)
        x, h, w = vit.tokens(images)
        assert (h, w) == (4, 4) and torch.allclose(vit.norm(vit.blocks[-1](x)), exact, atol=2e-5)
        assert torch.allclose(vit(images).cls, vit.keys_and_cls(images)[1], atol=1e-5)
        assert vit.keys(torch.randn(1, 3, 28, 84)).shape == (1, 128, 2, 6)
        unfolded = for_weights(state, "x") if kind == "timm" else None
    if unfolded is not None:  # the gammas matter
        checkpoint.load_strict(unfolded, state, drop=("*gamma",))
        with torch.no_grad():
            assert not torch.allclose(unfolded.norm(unfolded.blocks[-1](unfolded.tokens(images)[0])), exact, atol=0.1)


def test_layer_scale_that_is_not_whole_is_refused(tmp_path) -> None:
    def refused(state: dict[str, Tensor], said: str) -> None:
        checkpoint.save(tmp_path / "v2.pth", state)
        with pytest.raises(UserError, match=rf"--dino_path .*v2.pth: {said}"):
            vision_transformer.load(str(tmp_path / "v2.pth"), "vit_small", 8)

    state = dict(layer_scaled().state_dict())
    refused({k: v for k, v in state.items() if k != "blocks.1.ls2.gamma"}, "blocks.1.ls2.gamma is missing")
    refused({k: v for k, v in state.items() if k != "blocks.2.attn.proj.bias"}, "blocks.2.attn.proj.bias is missing")
    refused(state | {"blocks.0.ls1.gamma": torch.ones(64)}, r"blocks.0.ls1.gamma has the shape \(64,\)")
    refused(state | {"register_tokens": torch.ones(1, 4, 128)}, "register_tokens: an encoder with register tokens")
    names = transformers_names(state)
    lost = "backbone.encoder.layer.1.attention.attention.key.bias"
    refused({k: v for k, v in names.items() if k != lost}, "blocks.1.attention.attention.key.bias is missing")
    tensors, nodes = as_onnx(names)
    refused(weights.named(tensors, nodes[1:]), r"not a DINO ViT \(pos_embed is missing\)")
    refused(weights.named(tensors, nodes[:-1]), "blocks.2.mlp.fc2.weight is missing")  # no node tells its name


def test_onnx_needs_its_package_and_a_whole_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "vit.onnx"
    file.write_bytes(b"not a graph")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="--dino_path .*vit.onnx: the package onnx, .*pip install onnx"):
        vision_transformer.load(str(file), "vit_small", 8)


def test_other_files_are_refused(tmp_path) -> None:
    state = build("vit_mini", 8, 32).state_dict()
    checkpoint.save(tmp_path / "short.pth", {k: v for k, v in state.items() if k != "blocks.2.mlp.fc1.bias"})
    with pytest.raises(UserError, match=r"short.pth.*1 missing \(blocks.2.mlp.fc1.bias\)"):
        vision_transformer.load(str(tmp_path / "short.pth"), "vit_small", 8)
    with pytest.raises(UserError, match="not a DINO ViT"):
        for_weights({"conv1.weight": torch.ones(1)}, "resnet.pth")
    with pytest.raises(UserError, match="no such file"):
        vision_transformer.load("nowhere.pth", "vit_small", 8)
    with pytest.raises(UserError, match="must be multiples of the encoder's patch, 8, such as 32 64"):
        build("vit_mini", 8).grid(30, 64)
    assert "RANDOM" in vision_transformer.load("none", "vit_mini", 16)[1]


# --- clustering ------------------------------------------------------------------------------------------------------


def scene() -> tuple[Tensor, Tensor]:
    """Labels [7 * 192] and rows [7, 192, 384] of the reference numbers."""
    maps = torch.zeros(7, 12, 16, dtype=torch.long)
    for t in range(7):
        maps[t, 3:8, 1 + t : 6 + t] = 1
        maps[t, 6:11, 10:14] = 2
    label, key = maps.flatten(), maps[[0, 3]].flatten()
    i, j = torch.arange(1344, dtype=torch.float64)[:, None], torch.arange(384, dtype=torch.float64)[None]
    logits = 2.0 * (label[:, None] == key) + 0.3 * torch.sin(1.7 * i + 0.9 * j + 0.013 * i * j)
    return label, logits.softmax(-1).float().view(7, 192, 384)


@pytest.mark.parametrize(("tau", "number"), [(0.05, 143), (0.2, 3), (0.5, 3), (1.0, 3), (2.0, 1), (5.0, 1)])
def test_golden_clusterings(tau: float, number: int) -> None:  # numbers that the release's code gives
    label, rows = scene()
    found = clustering.cluster(clustering.Given(rows), 7, tau)
    assert found.number == number
    if number == 3:
        assert torch.equal(found.labels.flatten(), label) and torch.bincount(label).tolist() == [1035, 169, 140]


def leaders(p: Tensor, tau: float) -> list[Tensor]:
    """A greedy pass row by row: [n, D] -> centroids."""
    d, free, out = clustering.jeffreys(p, p), torch.ones(len(p), dtype=torch.bool), []
    for i in range(len(p)):
        if free[i]:
            member = (d[i] <= tau) & free
            member[i] = True
            out.append(p[member].mean(0))
            free &= ~member
    return out


def slow_labels(rows: Tensor, tau: float) -> Tensor:
    """The three stages row by row, float64: [T, N, D] -> [T N]."""
    centroids: list[Tensor] = []
    for part in rows.double().split(3):
        p = part.flatten(0, 1)
        smooth = (clustering.jeffreys(p, p).fill_diagonal_(0) <= tau).double() @ p
        centroids += leaders(smooth / smooth.sum(1, keepdim=True), tau)
    while len(fewer := leaders(torch.stack(centroids), tau)) != len(centroids):
        centroids = fewer
    return clustering.jeffreys(torch.stack(fewer), rows.double().flatten(0, 1)).argmin(0)


@pytest.mark.parametrize("seed", range(5))
def test_fast_clustering_equals_the_slow_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 4, (7, 30), generator=generator)
    q = torch.randn(4, 2, 8, generator=generator)[group].transpose(1, 2)
    q = q + (0.1 + 0.15 * seed) * torch.randn(q.shape, generator=generator)
    rows = clustering.attention(q, q[::3], 1.0).view(7, 30, -1)
    expected = slow_labels(rows, 0.7)
    for memory in (0.0, 1e9):  # computed twice, or kept
        found = clustering.cluster(clustering.Rows(q, q[::3], 1.0, memory, CPU), 7, 0.7)
        assert torch.equal(found.labels.flatten(), expected) and 1 < found.number < 210
    assert torch.equal(clustering.cluster(clustering.Given(rows), 7, 0.7).labels.flatten(), expected)


@pytest.mark.parametrize("tau", [0.1, 0.15, 0.25])
def test_many_centroids_are_merged_as_in_the_slow_way(tau: float) -> None:
    """Several passes, of which the later ones compare new centroids alone; `moved` may not change what comes out."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(400, 12, dtype=torch.float64, generator=generator).mul(0.5).softmax(-1)
    passes = [list(p)]
    while len(passes) < 2 or len(passes[-1]) != len(passes[-2]):
        passes.append(leaders(torch.stack(passes[-1]), tau))
    assert len(passes) > 3 and 10 < len(passes[-1]) < 350
    assert torch.allclose(clustering.merge(p, tau), torch.stack(passes[-1]), atol=1e-12)
    first, moved = clustering.greedy(p, tau)
    assert 0 < moved.sum() < len(moved) and torch.allclose(first, torch.stack(passes[1]), atol=1e-12)
    again = clustering.greedy(first, tau, moved=moved)[0]
    assert torch.allclose(again, clustering.greedy(first, tau)[0], atol=1e-12)


def test_attention_is_the_mean_of_the_heads() -> None:
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    slow = torch.einsum("qhnc,khmc->qnhkm", q, k).flatten(3).mul(0.5).softmax(-1).mean(2).flatten(0, 1)
    assert torch.allclose(clustering.attention(q, k, 0.5, chunk=30), slow, atol=1e-6)
    sharp = clustering.attention(200 * q, k, 1.0)
    assert float(sharp.min()) > 0 and torch.isfinite(clustering.jeffreys(sharp, sharp)).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_jeffreys(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(4, 9, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
    d = clustering.jeffreys(p, q)
    kl = (p[:, None] * (p[:, None] / q).log()).sum(-1) + (q * (q / p[:, None]).log()).sum(-1)
    assert torch.allclose(d, kl, atol=1e-12) and torch.allclose(d, clustering.jeffreys(q, p).T, atol=1e-12)
    assert clustering.jeffreys(p, p).diagonal().abs().max() < 1e-12
    order = torch.randperm(9, generator=generator)
    assert torch.allclose(d, clustering.jeffreys(p[:, order], q[:, order]), atol=1e-12)


def test_clusters_come_from_the_windows_that_are_named() -> None:
    """Window 1's frames alone give the centroids; the others' positions are assigned to them."""
    rows = torch.rand(3 * clustering.WINDOW, 6, 20, generator=torch.Generator().manual_seed(3)) ** 6 + 1e-4
    own = rows[clustering.WINDOW : 2 * clustering.WINDOW]
    alone = clustering.cluster(clustering.Given(own), clustering.WINDOW, 0.7)
    found = clustering.cluster(clustering.Given(rows), 3 * clustering.WINDOW, 0.7, only={1})
    torch.testing.assert_close(found.centroids, alone.centroids)
    assert torch.equal(found.labels[clustering.WINDOW : 2 * clustering.WINDOW], alone.labels)
    assert clustering.cluster(clustering.Given(rows), 3 * clustering.WINDOW, 0.7).number != alone.number


def test_thresholds_at_their_ends_and_equal_frames() -> None:
    rows = torch.rand(5, 12, 20, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    assert clustering.cluster(clustering.Given(rows), 5, math.inf).number == 1
    assert clustering.cluster(clustering.Given(rows), 5, 0.0).number == 60
    same = clustering.cluster(clustering.Given(rows[:1].expand(5, 12, 20)), 5, 0.8)
    assert (same.labels == same.labels[0]).all() and 1 < same.number < 12
    with pytest.raises(UserError, match="not finite"):
        clustering.cluster(clustering.Given(torch.full((1, 2, 3), math.nan)), 1, 1.0)
    assert clustering.key_frames(25, 10).tolist() == [0, 10] and clustering.key_frames(4, 10).tolist() == [0]


@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize("columns", [3, 64])
def test_no_pair_is_lost_to_the_coarse_sums(noise, columns, monkeypatch):
    """Blocks and sums of columns change which products are formed, not who is near whom."""
    monkeypatch.setattr(clustering, "BLOCK", 16)
    monkeypatch.setattr(clustering, "COARSE", columns)
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(4, 130, generator=generator)
    which = torch.randint(4, (75,), generator=generator)
    p = (centres[which] + noise * torch.randn(75, 130, generator=generator)).softmax(1)
    d = clustering.jeffreys(p.double(), p.double())
    tau = float(d[which[:, None] == which].quantile(0.99))  # nearly all of a group
    products, matmul = [], torch.Tensor.__matmul__

    def counted(a: Tensor, b: Tensor) -> Tensor:
        products.append(len(a) * b.shape[1] * (a.shape[1] == 130))
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    W = clustering.neighbourhoods(p, tau)
    assert torch.equal(W, W.T) and bool(W.diagonal().all())
    clear = (d - tau).abs() > 1e-4
    assert bool((W == (d <= tau).fill_diagonal_(True))[clear].all()) and 0.1 < float(W.float().mean()) < 0.4
    if noise == 0.1:  # four groups well apart: a block meets the groups of its own rows
        assert sum(products) < 0.6 * 75 * 75


def test_tiny_probabilities_survive_the_smoothing() -> None:
    """Sums over neighbourhoods never subtract: an entry of 1e-28 beside one of 1 keeps its logarithm."""
    p = torch.full((6, 4), 1e-28)
    p[[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]] = 1.0
    rows, count = clustering.smoothed(torch.block_diag(*[torch.ones(2, 2)] * 3).bool(), p)
    assert count.tolist() == [2, 2, 2] and torch.allclose(rows.log(), p[::2].log(), atol=1e-3)


# --- the toy of the paper's claim ------------------------------------------------------------------------------------


def toy_clip(B: int, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, 1 + 96, 32] and labels [B, T, 8, 12]: a background and two moving rectangles, a random prototype
    each, unit noise; the class token is the mean.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    maps = torch.zeros(B, T, 8, 12, dtype=torch.long)
    for b in range(B):
        for o in (1, 2):
            h, w, y, x, dy, dx = draw(3, 5), draw(3, 5), draw(0, 4), draw(0, 8), draw(-1, 2), draw(-1, 2)
            for t in range(T):
                top, left = min(max(y + dy * t, 0), 8 - h), min(max(x + dx * t, 0), 12 - w)
                maps[b, t, top : top + h, left : left + w] = o
    prototypes = torch.randn(B, 3, 32, generator=generator)
    tokens = torch.stack([prototypes[b][maps[b]] for b in range(B)]).flatten(2, 3)
    tokens = tokens + torch.randn(tokens.shape, generator=generator)
    return torch.cat([tokens.mean(2, keepdim=True), tokens], 2), maps


def toy(steps: int, semantic: float, motion: float) -> tuple[float, float]:
    """Mean J (matched by frame) and clusters on four unseen videos of six frames."""
    from uvos_dino import metrics
    from uvos_dino.attention import Block

    torch.manual_seed(0)
    model = AttEncoder.__new__(AttEncoder)
    torch.nn.Module.__init__(model)
    model.temporal_transformer = torch.nn.ModuleList([Block(32, 4)])
    optimizer = torch.optim.AdamW(model.temporal_transformer.parameters(), 3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        z, A = model.attend(toy_clip(4, 3, generator)[0])
        P = losses.sample_points(96, 8, generator)
        loss = semantic * losses.semantic(z, A, P, 4, 24) + motion * losses.motion(A, P, 3, 3, 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.temporal_transformer.eval()
    scores, numbers = [], []
    tokens, maps = toy_clip(4, 6, torch.Generator().manual_seed(2))
    for token, truth in zip(tokens, maps):
        q, k, scale = model.inference_heads(token[:, 1:])
        found = clustering.cluster(clustering.Rows(q.detach(), k[[0, 3]].detach(), scale, 1e9, CPU), 6, 1.0)
        numbers.append(found.number)
        for labels, mask in zip(found.labels.view(6, 8, 12).numpy(), truth.numpy()):
            scores.append(metrics.best_mean(metrics.frame_ious(labels, mask, found.number, 2)))
    return sum(scores) / len(scores), sum(numbers) / len(numbers)


def test_training_makes_objects_out_of_a_diffuse_attention() -> None:
    start, one = toy(0, 1, 1)
    end, several = toy(100, 1, 1)
    assert one == 1 and 2 <= several <= 10 and end > start + 0.3
