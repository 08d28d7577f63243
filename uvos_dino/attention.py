"""The spatio-temporal transformer block (release file src/model/attention.py): pre-norm, no position embedding.

It also returns its attention after dropout: the losses look at exactly what mixed the values.
"""

from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Multi-head self-attention, qkv without bias; `attn_drop` acts on the softmax."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float, drop: float):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(drop)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, C] -> queries, keys, values [B, heads, n, C / heads]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.heads(x)
        a = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))  # [B, heads, n, n]
        mixed = (a.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # [B, n, C]
        return self.proj_drop(self.proj(mixed)), a


class Block(nn.Module):
    """x + attention, x + MLP of 4 times the width; LayerNorm eps 1e-5 and PyTorch's initialisation, as released."""

    def __init__(self, dim: int, num_heads: int = 8, drop: float = 0.1, attn_drop: float = 0.4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, attn_drop, drop)
        self.mlp = Mlp(dim, 4 * dim, drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n, C] -> tokens [B, n, C], attention after dropout [B, heads, n, n]."""
        mixed, a = self.attn(self.norm1(x))
        x = x + mixed
        return x + self.mlp(self.norm2(x)), a
