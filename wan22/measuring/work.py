"""The arithmetic of one forward, counted from shapes: matrix products and attention. Standard library only.

Legend: L video tokens, M text tokens, E model width, F feed-forward width, N heads, D head dim. A product of [L, K] and
[K, C] is 2 · L · K · C operations, attention of L queries on M keys 4 · L · M · N · D.
"""

from dataclasses import dataclass
from typing import Protocol


class Widths(Protocol):
    """What is asked of a model's config."""

    @property
    def dim(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def in_dim(self) -> int: ...
    @property
    def out_dim(self) -> int: ...
    @property
    def text_len(self) -> int: ...


@dataclass(frozen=True)
class Product:
    """A matrix product [rows, inner] · [inner, columns], made `times` times a forward; in float32, or in the weights'
    dtype."""

    name: str
    rows: int
    inner: int
    columns: int
    times: int
    float32: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Attention:
    """Attention of `queries` on `keys`, made `times` times a forward."""

    name: str
    queries: int
    keys: int
    heads: int
    head_dim: int
    times: int

    @property
    def flops(self) -> int:
        return 4 * self.queries * self.keys * self.heads * self.head_dim


def products(config: Widths, tokens: int, patch: int = 4) -> list[Product]:
    """Those of one forward whose rows are the video's tokens; those of a sample or a prompt are nothing beside them.
    patch: latents a token."""
    e, f, layers = config.dim, config.ffn_dim, config.num_layers
    return [
        Product("q k v", tokens, e, 3 * e, layers),
        Product("o; cross q, o", tokens, e, e, 3 * layers),
        Product("ffn in", tokens, e, f, layers),
        Product("ffn out", tokens, f, e, layers),
        Product("patch embedding", tokens, patch * config.in_dim, e, 1, float32=True),
        Product("head", tokens, e, patch * config.out_dim, 1, float32=True),
    ]


def attentions(config: Widths, tokens: int) -> list[Attention]:
    head_dim = config.dim // config.num_heads
    return [
        Attention("self", tokens, tokens, config.num_heads, head_dim, config.num_layers),
        Attention("cross", tokens, config.text_len, config.num_heads, head_dim, config.num_layers),
    ]


def forward_flops(config: Widths, tokens: int) -> tuple[int, int]:
    """Of the products and of attention, in one forward of one guidance branch."""
    return (sum(one.flops * one.times for one in products(config, tokens)),
            sum(one.flops * one.times for one in attentions(config, tokens)))  # fmt: skip


# Dense bf16 operations a second by the makers' data sheets, the longer names first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "RTX 5090": 209e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """What the maker says of a card of this name; None for one that is not known here."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
