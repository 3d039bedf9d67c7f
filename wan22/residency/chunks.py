"""The feed-forward in chunks of tokens: its hidden layer, 2.7 times the model's width, is never whole.

Every placement cuts at the same tokens, since a matrix product of another height may round otherwise.
"""

import functools
import weakref
from collections.abc import Iterable
from typing import cast

from torch import Tensor

from wan22.config import CHUNK_TOKENS
from wan22.kernels import Rows
from wan22.model import Block, FeedForward, WanTransformer


def chunk_feed_forward(model: WanTransformer, tokens: int = CHUNK_TOKENS) -> None:
    """Cut the feed-forward of every block, from outside."""
    for block in cast(Iterable[Block], model.blocks):
        # Weak, or the module would hold itself and its weights till the garbage collector comes.
        setattr(block.ffn, "forward", functools.partial(_in_chunks, weakref.ref(block.ffn), tokens))  # noqa: B010


def _in_chunks(held: "weakref.ref[FeedForward]", tokens: int, x: Rows) -> Tensor:
    """x [B, L, E] → [B, L, E]."""
    ffn = held()
    assert ffn is not None
    if x.shape[1] <= tokens:
        return FeedForward.forward(ffn, x)
    first, *rest = x.split(tokens, dim=1)
    done = FeedForward.forward(ffn, first)
    out = done.new_empty(x.shape)
    out[:, :tokens].copy_(done)
    for chunk, place in zip(rest, out[:, tokens:].split(tokens, dim=1), strict=True):
        place.copy_(FeedForward.forward(ffn, chunk))
    return out
