"""The blocks' matrix products in 8 bits: weights with a scale an output channel, activations with a scale a token.

Weights are quantized while they are read, a few at a time, from float32 and after adapters were merged: an expert in 8
bits never takes more memory than that. Activations are quantized by the operation that makes them: each of a block's
parts says by its `dtype` what its first product takes, and the kernels before it write just that. What is small or
delicate stays as it is: text and patch embedding, time, head, and cross-attention's keys and values.

Scope: `ffn`, the feed-forward alone (two fifths of the products' weights are elsewhere), or `all` products of a block.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wan22.kernels import Rows, quantize_rows
from wan22.kernels.product_8bit import product_8bit
from wan22.kernels.quantize_rows import Quantized, quantize_rows_plain
from wan22.model import Attention, WanTransformer

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
SCALE = ".weight_scale"  # the name that files of scaled fp8 give it too
ROOM_BYTES = 1 << 29  # float32 weights that wait to be quantized: the attention's of a block, or one of its largest


@dataclass(frozen=True)
class EightBit:
    """Which products, and in what: `fp8` or `int8`, of the `ffn` or of `all`."""

    kind: str
    scope: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]


class EightBitLinear(nn.Module):
    """An `nn.Linear` with weight [O, C] in 8 bits and weight_scale [O, 1] float32; the result has the bias's dtype.

    Takes numbers, or rows that the operation before has quantized already.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """With the layer's numbers, quantized; or, of a layer on `meta`, with none."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows_plain(linear.weight.detach(), dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias.requires_grad_(False)

    def forward(self, x: Rows) -> Tensor:
        """x [..., C] → [..., O]."""
        rows = x if isinstance(x, Quantized) else quantize_rows(x, self.weight.dtype)
        return product_8bit(rows, self.weight, self.weight_scale, self.bias)


def quantize(model: WanTransformer, eight_bit: EightBit) -> None:
    """Replace the linear layers in scope, in place, packed ones too, and have the blocks' parts ask for 8-bit rows."""
    dtype = eight_bit.dtype
    block: Any
    for block in model.blocks:
        for place in (0, 2):
            block.ffn[place] = EightBitLinear(block.ffn[place], dtype)
        block.ffn.dtype = block.ffn.hidden_dtype = dtype
        if eight_bit.scope == "all":
            for attention, names in ((block.self_attn, ("q", "k", "v", "qkv", "o")), (block.cross_attn, ("q", "o"))):
                _quantize_attention(attention, names, dtype)


def _quantize_attention(attention: Attention, names: tuple[str, ...], dtype: torch.dtype) -> None:
    for name in names:
        if isinstance(layer := attention._modules.get(name), nn.Linear):
            setattr(attention, name, EightBitLinear(layer, dtype))
    attention.dtype = dtype


def read_quantized(state: Mapping[str, Tensor], read: Callable[[dict[str, Tensor]], None]) -> None:
    """Fill tensors by published name, those with a scale beside them in 8 bits, others as they are.

    read: fills any of them in the dtype of what it is given.
    """
    scaled = [name.removesuffix(SCALE) + ".weight" for name in state if name.endswith(SCALE)]
    names = {*scaled, *(name for name in state if name.endswith(SCALE))}
    if plain := {name: target for name, target in state.items() if name not in names}:
        read(plain)
    for group in _groups(scaled, state):
        # In float32 whatever torch's default is just then: this may run beside a library that changes it for a moment.
        room = torch.empty(sum(state[name].numel() for name in group), dtype=torch.float32,
                           device=state[group[0]].device)  # fmt: skip
        parts = room.split([state[name].numel() for name in group])
        whole = {name: part.view_as(state[name]) for name, part in zip(group, parts, strict=True)}
        read(whole)
        for name, weight in whole.items():
            rows = quantize_rows_plain(weight, state[name].dtype)
            state[name].copy_(rows.values)
            state[name.removesuffix(".weight") + SCALE].copy_(rows.scale)


def _groups(names: list[str], state: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """As many at once as the room holds, and at least one."""
    group: list[str] = []
    for name in names:
        if group and 4 * sum(state[other].numel() for other in (*group, name)) > ROOM_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group

