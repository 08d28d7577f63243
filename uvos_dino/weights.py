"""Encoder weights of other programs under DINO's names: DINOv2, timm, transformers, and ONNX files of torch's exporter.

LayerScale (a gamma on each residual branch) is folded into the projection before it, which is exact: the branch ends in
gamma (W x + b) = (gamma W) x + gamma b.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from shared_utils import UserError

PATCHES = "embeddings.patch_embeddings.projection.weight"  # of transformers' ViTs
# transformers' name below the prefix -> DINO's
RENAMED = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
SCALED = {"1": "attn.proj", "2": "mlp.fc2"}  # what each gamma of a block scales


def other_parts(state: Mapping[str, Tensor]) -> list[str]:
    """Names beside an encoder of transformers' (a decoder, a head), which `as_dino` leaves out."""
    prefix = next((key.removesuffix(PATCHES) for key in state if key.endswith(PATCHES)), "")
    return [key for key in state if not key.startswith(prefix)]


def as_dino(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights under DINO's names, LayerScale folded; what has another name stays, for a strict loader to refuse.

    UserError: register tokens, which this encoder has not, and a gamma that is missing or has no projection.
    """
    out = dict(state)
    if (prefix := next((key.removesuffix(PATCHES) for key in state if key.endswith(PATCHES)), None)) is not None:
        own = {key: value for key, value in state.items() if key.startswith(prefix)}
        out = _from_transformers({key.removeprefix(prefix): value for key, value in own.items()}, source)
    # DINOv2's training files keep blocks in chunks, blocks.CHUNK.NUMBER
    out = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key): value for key, value in out.items()}
    out.pop("mask_token", None)
    if registers := [key for key in out if key in ("register_tokens", "reg_token")]:
        raise UserError(
            f"{source}: {registers[0]}: an encoder with register tokens, which this one has not; take the one without "
            "(dinov2_vits14, timm:vit_small_patch14_dinov2)"
        )
    return _fold(out, source)


def _from_transformers(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        out[key] = value
    for key in [key for key in out if ".attention.attention.query." in key]:
        three = [key.replace(".query.", f".{name}.") for name in ("query", "key", "value")]
        if absent := [name for name in three if name not in out]:
            raise UserError(f"{source}: {absent[0]} is missing; the file is not whole")
        out[key.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat([out.pop(name) for name in three])
    return out


def _fold(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    out = dict(state)
    gammas = {}  # (block, branch): name
    for key in state:
        if found := re.fullmatch(r"(blocks\.\d+)\.(?:ls([12])\.gamma|gamma_([12]))", key):
            gammas[found[1], found[2] or found[3]] = key
    if not gammas:
        return out
    blocks = {".".join(key.split(".")[:2]) for key in state if key.startswith("blocks.")}
    for block in sorted(blocks):
        for branch, layer in SCALED.items():
            weight, bias = f"{block}.{layer}.weight", f"{block}.{layer}.bias"
            absent = [key for key in (weight, bias) if key not in state]
            if (block, branch) not in gammas or absent:
                lost = absent[0] if absent else f"{block}.ls{branch}.gamma"
                raise UserError(f"{source}: {lost} is missing, where blocks have a LayerScale; the file is not whole")
            gamma = out.pop(gammas[block, branch])
            if gamma.shape != state[bias].shape:
                raise UserError(f"{source}: {gammas[block, branch]} has the shape {tuple(gamma.shape)}, expected "
                                f"{tuple(state[bias].shape)}")  # fmt: skip
            exact = gamma.double()
            out[weight] = (state[weight].double() * exact[:, None]).to(state[weight].dtype)
            out[bias] = (state[bias].double() * exact).to(state[bias].dtype)
    return out


def named(tensors: Mapping[str, Tensor], nodes: Iterable[tuple[str, str, list[str]]]) -> dict[str, Tensor]:
    """State dict of an ONNX graph that torch's exporter wrote.

    The exporter keeps names but for what it changed: it transposes the matrices of linear layers and calls them
    onnx::MatMul_N, but the node that uses one has its module's path; and it splits the position table, of which the
    embedding's Concat takes the class token's row and its Reshape the patches'.

    Args:
        tensors: initialisers by name.
        nodes: (operator, name, inputs) in order.
    """
    out = {name: value for name, value in tensors.items() if "::" not in name}
    table: dict[str, Tensor] = {}
    for operator, name, inputs in nodes:
        parts = name.strip("/").split("/")[:-1]  # a Sequential's own path precedes its children's: blocks/blocks.0
        parts = [part for part, after in zip(parts, [*parts[1:], ""]) if not after.startswith(f"{part}.")]
        module = ".".join(parts)
        for value in (tensors[x] for x in inputs if "::" in x and x in tensors):
            if operator == "MatMul" and value.dim() == 2:
                out[f"{module}.weight"] = value.T.contiguous()
            elif operator in ("Concat", "Reshape") and value.dim() == 3 and module.endswith("embeddings"):
                table["class" if value.shape[1] == 1 else "patches"] = value
                table_name = f"{module}.position_embeddings"
    if len(table) == 2:
        out[table_name] = torch.cat([table["class"], table["patches"]], 1)
    return out


def read_onnx(path: str | Path) -> dict[str, Tensor]:
    """State dict of an ONNX file, see `named`. UserError: no package onnx, or not a readable file."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise UserError(f"{path}: the package onnx, which reads it, is not installed; pip install onnx") from None
    try:
        graph = onnx.load(str(path)).graph
        tensors = {x.name: torch.from_numpy(numpy_helper.to_array(x).copy()) for x in graph.initializer}
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a readable ONNX file ({reason}); download it again") from None
    return named(tensors, ((node.op_type, node.name, list(node.input)) for node in graph.node))
