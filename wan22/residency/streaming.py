"""An expert's weights as flat pieces, one a block, and blocks that come to the device only for their turn.

Two buffers on the device take turns: while one block computes, the next one's weights come into the other, copied from
pinned host memory on a stream of its own or read from the files by a thread. A streamed block's parameters are views
of its buffer for good; hooks on the block see to it that the right numbers are there. The model knows nothing of it.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from wan22.checkpoint import Expert
from wan22.load import read_state
from wan22.lora import Merge
from wan22.model import Block, WanTransformer
from wan22.pack import side_by_side
from wan22.residency.memory import Memory

ALIGNMENT = 256  # bytes, of every tensor in a piece: what the device's own allocations have
REST = -1  # the piece of everything outside the blocks


@dataclass(frozen=True)
class Piece:
    """Some of a model's tensors laid into one flat buffer: name → offset in bytes, dtype, shape."""

    places: Mapping[str, tuple[int, torch.dtype, torch.Size]]
    nbytes: int

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The piece's tensors in a buffer of `nbytes` bytes or more."""
        return {
            name: flat[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (offset, dtype, shape) in self.places.items()
        }


def pieces_of(model: WanTransformer) -> dict[int, Piece]:
    """A model's blocks by number, and the rest."""
    tables: dict[int, dict[str, Tensor]] = {REST: {}}
    for name, tensor in model.state_dict().items():
        number = int(name.split(".")[1]) if name.startswith("blocks.") else REST
        tables.setdefault(number, {})[name] = tensor
    return {number: _piece(table) for number, table in tables.items()}


def _piece(tensors: Mapping[str, Tensor]) -> Piece:
    places, end = {}, 0
    for group in side_by_side(tensors):  # what pack.py makes one tensor of has no gaps
        for name in group:
            places[name] = end, tensors[name].dtype, tensors[name].shape
            end += tensors[name].nbytes
        end = -(-end // ALIGNMENT) * ALIGNMENT
    return Piece(places, end)


def evenly(count: int, of: int) -> list[int]:
    """`count` of the numbers below `of`, evenly spaced: each streamed block has resident ones' time to come."""
    return [place * of // count for place in range(count)]


class Source(Protocol):
    """Where a piece comes from when it is asked for."""

    def fill(self, number: int, target: Tensor, after: Any) -> Any:
        """Begin to bring a piece into a device buffer, once the mark `after` is reached; a token."""

    def ready(self, token: Any) -> None:
        """Work given to the device from now on finds the piece there."""

    def settle(self, token: Any) -> None:
        """Come back when nothing writes into that buffer any more."""


class Files:
    """Pieces read from the expert's files, adapters merged, each time they are asked for: little memory, much disk."""

    def __init__(self, expert: Expert, pieces: Mapping[int, Piece], merges: Sequence[Merge], memory: Memory) -> None:
        self._expert, self._pieces, self._merges, self._memory = expert, pieces, merges, memory
        self._reader = ThreadPoolExecutor(1, "blocks from disk")  # in the order asked; the reading itself has threads

    def fill(self, number: int, target: Tensor, after: Any) -> Future[None]:
        return self._reader.submit(self._read, number, target, after)

    def ready(self, token: Future[None]) -> None:
        token.result()

    def settle(self, token: Future[None]) -> None:
        token.exception()

    def read(self, targets: Mapping[int, Tensor]) -> None:
        """Fill these buffers now, in this thread; in file order."""
        pieces = (self._pieces[number].views(target) for number, target in targets.items())
        if views := {name: view for piece in pieces for name, view in piece.items()}:
            read_state(self._expert, views, self._merges)

    def _read(self, number: int, target: Tensor, after: Any) -> None:
        with self._memory.aside(after):
            self.read({number: target})


class HostCopy:
    """Pieces in pinned host memory, read from the files once."""

    def __init__(
        self, files: Files, pieces: Mapping[int, Piece], wanted: Sequence[int], memory: Memory, merging: bool,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """merging: adapters are merged, and weights quantized, on the device, piece by piece, since a GPU's sums round
        differently from a CPU's and a placement must not change a bit. stopped: asked between pieces; some are then
        missing. Raises MemoryError, RequestError."""
        self._memory = memory
        self.pieces: dict[int, Tensor] = {}
        largest = max(pieces[number].nbytes for number in wanted)
        room = memory.empty(largest) if merging and memory.has_host else None
        for number in wanted:
            if stopped():
                return
            flat = memory.host(pieces[number].nbytes)
            files.read({number: flat if room is None else room})
            if room is not None:
                memory.move(flat, room[: len(flat)])
            self.pieces[number] = flat

    def fill(self, number: int, target: Tensor, after: Any) -> Any:
        flat = self.pieces[number]
        return self._memory.copy(target[: len(flat)], flat, after)

    def ready(self, token: Any) -> None:
        self._memory.wait(token)

    def settle(self, token: Any) -> None:
        self._memory.finish(token)


class BlockStream:
    """The streamed blocks of one model, through two buffers."""

    def __init__(
        self, model: WanTransformer, blocks: Sequence[int], buffers: Sequence[Tensor], source: Source, memory: Memory
    ) -> None:
        """blocks: numbers, in order, of even count: with two buffers in turn, the first block of a pass then never
        waits for the last one's buffer."""
        assert len(blocks) % 2 == 0
        assert len(buffers) == 2
        self._blocks, self._buffers, self._source, self._memory = blocks, buffers, source, memory
        self._coming: list[tuple[int, Any] | None] = [None, None]  # place in `blocks` and token, of each buffer
        for place, number in enumerate(blocks):
            block = cast(Block, model.blocks[number])
            block.register_forward_pre_hook(lambda module, args, place=place: self._bring(place))
            block.register_forward_hook(lambda module, args, out, place=place: self._leave(place), always_call=True)
            attention = block.cross_attn
            # Weak, or the module would hold itself and its weights till the garbage collector comes.
            replacement = functools.partial(self._keys_values, place, weakref.ref(attention))
            setattr(attention, "keys_values", replacement)  # noqa: B010

    def _keys_values(self, place: int, attention: Any, context: Tensor) -> tuple[Tensor, Tensor]:
        with self._here(place):
            return type(attention()).keys_values(attention(), context)

    @contextlib.contextmanager
    def _here(self, place: int) -> Iterator[None]:
        self._bring(place)
        try:
            yield
        finally:
            self._leave(place)

    def _bring(self, place: int) -> None:
        """A block's weights are in its buffer for the work that follows."""
        coming = self._coming[place % 2]
        if coming is None or coming[0] != place:  # the first pass, or after one that was broken off
            if coming is not None:
                self._source.settle(coming[1])
            self._begin(place)
        if self._coming[(place + 1) % 2] is None:
            self._begin((place + 1) % len(self._blocks))
        token = self._coming[place % 2]
        assert token
        self._source.ready(token[1])

    def _leave(self, place: int) -> None:
        """The block is done with its buffer: the next one's weights may come."""
        self._begin((place + 2) % len(self._blocks))

    def _begin(self, place: int) -> None:
        buffer = self._buffers[place % 2]
        self._coming[place % 2] = place, self._source.fill(self._blocks[place], buffer, self._memory.mark())

    def close(self) -> None:
        """Wait for what is still coming; the buffers may go then."""
        for coming in self._coming:
            if coming is not None:
                self._source.settle(coming[1])
        self._coming = [None, None]
