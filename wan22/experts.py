"""The two experts of a run: who is on the device, who waits in the host's memory, and who comes next.

| residency | on the device                     | the rest of it           | the next expert                |
|-----------|-----------------------------------|--------------------------|--------------------------------|
| none      | both experts                      |                          | is read meanwhile              |
| expert    | the one at work                   |                          | comes to pinned memory or then |
| block     | some blocks, buffers for two more | comes from pinned memory | comes to pinned memory or then |
| disk      | some blocks, buffers for two more | is read every time       | then                           |
"""

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan22.checkpoint import Checkpoint
from wan22.config import EXPERT_SIDES, Lora, Residency
from wan22.load import assemble, empty_expert
from wan22.lora import Adapters, Merge
from wan22.model import WanTransformer
from wan22.parallel import Ranks
from wan22.quantize import EightBit
from wan22.residency.memory import OUT_OF_MEMORY, Memory, memory_of
from wan22.residency.streaming import BlockStream, Files, HostCopy, Piece, Source, evenly, pieces_of

if TYPE_CHECKING:
    from wan22.several.sharding import Copies

ROOM_FOR_WORK = 0.25  # of the host's free memory, left alone when files are read ahead


@dataclass(eq=False)
class _Placed:
    """An expert on the device, and the stream of its blocks where it has one."""

    key: "Key"
    model: WanTransformer
    stream: BlockStream | None = None
    join: Callable[[], None] | None = None  # what is to be done by all ranks at once before it is used


@dataclass(frozen=True)
class Key:
    """An expert with what is merged into it: with other adapters it is another one, and is read again, since what was
    merged and rounded cannot be taken out exactly."""

    name: str
    merges: tuple[Merge, ...] = ()


class Experts:
    """Hands out experts by name, each ready on the device.

    An expert goes from its files or from pinned memory to the device and, when the other's turn comes, is dropped
    rather than moved back: the files are its copy.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, adapters: Adapters,
        ladder: Sequence[Residency] = (Residency("expert"),), memory: Memory | None = None,
        eight_bit: EightBit | None = None,
    ) -> None:  # fmt: skip
        """ladder: the residency, and what follows it where memory runs out; eight_bit: which products are. Names and
        shapes are checked here; no weight is read. Raises RequestError."""
        self.checkpoint, self.dtype, self.device, self.adapters = checkpoint, dtype, device, adapters
        self.eight_bit = eight_bit
        self._empty = {name: empty_expert(expert, dtype, eight_bit) for name, expert in checkpoint.experts.items()}
        self.bytes = sum(tensor.nbytes for model in self._empty.values() for tensor in model.state_dict().values())
        self.attention = "torch"  # the backend's name; set before an expert is asked for
        self.ranks: Ranks | None = None  # those that work together, where there are several
        self.ladder = list(ladder)
        self._given_memory = memory
        self.stall = 0.0  # seconds that steps waited for an expert, but for the first
        self.first_ready: float | None = None  # when one was ready for the first time, as time.time() has it
        self._placed: list[_Placed] = []
        self._copies: list[tuple[Key, HostCopy]] = []
        self._coming: _Coming | None = None
        self._stop_warming = threading.Event()

    @cached_property
    def memory(self) -> Memory:
        return self._given_memory or memory_of(self.device)

    @property
    def residency(self) -> Residency:
        return self.ladder[0]

    @property
    def keep_both(self) -> bool:
        return self.residency.kind == "none"

    def use(self, ladder: Sequence[Residency]) -> None:
        """Another residency, and what follows it where memory runs out."""
        if self.ladder != list(ladder)[-len(self.ladder) :]:  # what memory did not allow is not tried again
            self.release()
            self.ladder = list(ladder)

    def shrink(self) -> Residency | None:
        """Give everything back and go on with the next smaller residency; None where there is none."""
        self.release()
        if len(self.ladder) == 1:
            return None
        self.ladder.pop(0)
        return self.residency

    # The reader's threads cannot fill tensors that were made in a run's inference mode.
    @torch.inference_mode(False)
    def get(self, name: str, loras: Sequence[Lora] = ()) -> WanTransformer:
        """The expert with these adapters (resolved ones) merged, on its device. The caller lets go of any expert that
        it holds first, or two are held. Raises torch.OutOfMemoryError, MemoryError."""
        start, first = time.perf_counter(), not self._placed
        key = self._key(name, loras)
        self._await(key)
        placed = next((placed for placed in self._placed if placed.key == key), None)
        if placed is None:
            self._drop([at for at in self._placed if at.key.name == name or not self.keep_both])
            placed = self._place(key)
            self._placed.append(placed)
        if not first:
            self.stall += time.perf_counter() - start
        self.first_ready = self.first_ready or time.time()
        return placed.model

    @torch.inference_mode(False)
    def begin(self, name: str, loras: Sequence[Lora] = ()) -> None:
        """This expert will be the first: read it while other things are done. There is room for it beside them."""
        key = self._key(name, loras)
        if self._coming or self._placed or self._copy_of(key):
            return
        if self.residency.kind not in ("none", "expert"):
            self._warm(name)
            return
        with contextlib.suppress(*OUT_OF_MEMORY):  # then at its turn, when there may be room
            self._coming = _Coming(key, *self._begin_placing(key))

    @torch.inference_mode(False)
    def expect(self, name: str, loras: Sequence[Lora] = ()) -> None:
        """This expert is wanted next: bring it as near as the residency allows, while the present one works."""
        key = self._key(name, loras)
        if self._coming or any(at.key == key for at in self._placed) or self._copy_of(key):
            return
        if self.keep_both and not any(at.key.name == name for at in self._placed):
            try:
                self._coming = _Coming(key, *self._begin_placing(key))
            except OUT_OF_MEMORY:
                if self.ranks:
                    raise  # the others go on to bring it
                return  # it is asked for again at its turn, and whoever asks has an answer to that
        elif self.residency.host_experts > (self.residency.kind == "block") and self.memory.has_host:
            self._forget_copies(self.residency.host_experts - 1, at_work=self._placed)
            self._coming = _Coming(key, None, lambda stopped: self._bring_copy(key, stopped))
        else:
            self._warm(name)

    def release(self, host: bool = True) -> None:
        """Give the device's memory back, and the host's; the latter may be left, for the next video."""
        self._stop_warming.set()
        if self._coming:
            self._coming.cancel()
            self._coming = None
        self._drop(list(self._placed))
        if host:
            self._copies = []

    def give_up(self) -> bool:
        """Give the device's memory back for another part's sake; whether there was any."""
        held = bool(self._placed or (self._coming and self._coming.placed))
        self.release(host=False)
        return held

    # --- coming to the device ------------------------------------------------------------------------------------
    def _key(self, name: str, loras: Sequence[Lora]) -> Key:
        sides = dict(zip(self.checkpoint.experts, EXPERT_SIDES, strict=True))
        return Key(name, tuple(self.adapters.merges(sides[name], loras)))

    def _pieces(self, name: str) -> dict[int, Piece]:
        return pieces_of(self._empty[name])

    def _files(self, key: Key) -> Files:
        return Files(self.checkpoint.experts[key.name], self._pieces(key.name), key.merges, self.memory)

    def _place(self, key: Key) -> _Placed:
        if self.ranks and self.ranks.shard_experts:
            placed, fill = self._shard(key)
            fill(lambda: False)
            return placed
        kind, pieces = self.residency.kind, self._pieces(key.name)
        streamed = self._streamed(len(pieces) - 1)
        copy = self._copy_of(key)
        if kind == "block" and not copy:
            # Where only one expert fits the host, its resident blocks need not be there.
            wanted = list(pieces) if self.residency.host_experts > 1 else streamed
            self._forget_copies(self.residency.host_experts - 1)
            copy = self._copy(key, wanted)
            self._copies.append((key, copy))
        largest = max((pieces[number].nbytes for number in streamed), default=0)
        buffers = [self.memory.empty(largest) for _ in range(2 if streamed else 0)]
        flats = {number: self.memory.empty(piece.nbytes) for number, piece in pieces.items() if number not in streamed}
        self._fill(key, flats, copy)
        source: Source | None = copy if kind == "block" else self._files(key)
        if kind == "expert" and self.residency.host_experts < 2:
            self._forget_copies(0)  # its room is the next one's
        return self._assemble(key, flats, streamed, buffers, source)

    def _streamed(self, blocks: int) -> list[int]:
        """The blocks that are not resident; of even count (see BlockStream)."""
        if self.residency.kind not in ("block", "disk"):
            return []
        count = max(blocks - self.residency.resident_blocks, min(blocks, 2))
        return evenly(min(count + count % 2, blocks - blocks % 2), blocks)

    def _fill(self, key: Key, flats: dict[int, Tensor], copy: HostCopy | None) -> None:
        """Resident pieces, from the host's copy where it has them, else from the files."""
        for number in flats.keys() & (copy.pieces.keys() if copy else set()):
            assert copy
            self.memory.move(flats[number], copy.pieces[number])
        wanted = {number: flat for number, flat in flats.items() if not copy or number not in copy.pieces}
        if self.ranks and not key.merges:
            for copies in self._copies_of(key, wanted):
                copies.read()
                copies.join()
            return
        self._files(key).read(wanted)

    def _copies_of(self, key: Key, flats: dict[int, Tensor]) -> "list[Copies]":
        """What several ranks read for one another, piece by piece; adapters, which change whole tensors, each does."""
        from wan22.several.sharding import Copies

        assert self.ranks
        expert, rank, world = self.checkpoint.experts[key.name], self.ranks.team.rank, self.ranks.mesh.world
        pieces = self._pieces(key.name)
        return [Copies(expert, pieces[number].views(flat), rank, world) for number, flat in flats.items()]

    def _shard(self, key: Key) -> tuple[_Placed, Callable[[Callable[[], bool]], None]]:
        """This rank's part of an expert with its memory taken, and the work that fills it."""
        from wan22.several.sharding import sharded_expert

        assert self.ranks
        expert, world = self.checkpoint.experts[key.name], self.ranks.mesh.world
        model, fill = sharded_expert(expert, self.dtype, self.attention, key.merges, self.memory, world)
        self.ranks.split(model)
        return _Placed(key, model), fill

    def _begin_placing(self, key: Key) -> tuple[_Placed, Callable[[Callable[[], bool]], None]]:
        """A wholly resident expert with its memory taken, and the work that fills it."""
        if self.ranks and self.ranks.shard_experts:
            shard, fill = self._shard(key)
            taken = self.memory.mark()

            def work_on_shard(stopped: Callable[[], bool]) -> None:
                with self.memory.aside(taken):
                    fill(stopped)

            return shard, work_on_shard
        flats = {number: self.memory.empty(piece.nbytes) for number, piece in self._pieces(key.name).items()}
        placed, mark = self._assemble(key, flats, [], [], None), self.memory.mark()
        if self.ranks and not key.merges:
            everything = self._copies_of(key, flats)

            def join() -> None:
                for copies in everything:
                    copies.join()

            def work_on_part(stopped: Callable[[], bool]) -> None:
                with self.memory.aside(mark):
                    for copies in everything:
                        if stopped():
                            return
                        copies.read()

            placed.join = join
            return placed, work_on_part

        def work(stopped: Callable[[], bool]) -> None:
            with self.memory.aside(mark):
                for number, flat in flats.items():
                    if stopped():
                        return
                    self._files(key).read({number: flat})

        return placed, work

    def _assemble(
        self, key: Key, flats: dict[int, Tensor], streamed: Sequence[int], buffers: Sequence[Tensor],
        source: Source | None,
    ) -> _Placed:  # fmt: skip
        model = empty_expert(self.checkpoint.experts[key.name], self.dtype, self.eight_bit)
        pieces = self._pieces(key.name)
        flats = flats | {number: buffers[place % 2] for place, number in enumerate(streamed)}
        state: dict[str, Tensor] = {}
        for number, piece in pieces.items():
            state |= piece.views(flats[number])
        assemble(model, state, self.attention)
        if self.ranks:
            self.ranks.split(model)
        if not streamed:
            return _Placed(key, model)
        assert source
        return _Placed(key, model, BlockStream(model, streamed, buffers, source, self.memory))

    # --- waiting in the host's memory ----------------------------------------------------------------------------
    def _copy(self, key: Key, wanted: Sequence[int] | None, stopped: Callable[[], bool] = lambda: False) -> HostCopy:
        pieces, work = self._pieces(key.name), bool(key.merges or self.eight_bit)
        return HostCopy(self._files(key), pieces, wanted or list(pieces), self.memory, work, stopped)

    def _copy_of(self, key: Key) -> HostCopy | None:
        return next((copy for of, copy in self._copies if of == key), None)

    def _bring_copy(self, key: Key, stopped: Callable[[], bool]) -> None:
        copy = self._copy(key, None, stopped)
        if not stopped():
            self._copies.append((key, copy))

    def _forget_copies(self, leave: int, at_work: Sequence[_Placed] = ()) -> None:
        """At most `leave` copies stay, the newest; first of all those that blocks are streamed from."""
        self._copies.sort(key=lambda item: any(at.key == item[0] and at.stream for at in at_work))
        self._copies = self._copies[max(0, len(self._copies) - leave) :]

    # --- ahead of time -------------------------------------------------------------------------------------------
    def _await(self, key: Key) -> None:
        """Take in what was on its way; raises what stopped it, where it is the one that is wanted."""
        coming, self._coming = self._coming, None
        if coming is None:
            return
        if coming.key != key:
            coming.cancel()
            return
        try:
            coming.join()
        except OUT_OF_MEMORY:
            if coming.placed:
                raise
            return  # no room to wait in: it is read when it is placed
        if coming.placed:
            if coming.placed.join:
                coming.placed.join()
                coming.placed.join = None
            self._placed.append(coming.placed)

    def _warm(self, name: str) -> None:
        """Have the system read an expert's files, if its page cache has room for them."""
        tensors = self.checkpoint.experts[name].tensors
        if sum(tensors.sizes.values()) < (1 - ROOM_FOR_WORK) * free_host_memory() and self.residency.kind != "disk":
            self._stop_warming = threading.Event()
            threading.Thread(target=tensors.warm, args=(self._stop_warming,), daemon=True).start()

    def _drop(self, placed: list[_Placed]) -> None:
        if not placed:
            return
        for at in placed:
            if at.stream:
                at.stream.close()
            self._placed.remove(at)
        del at
        placed.clear()
        if self.ranks and self.ranks.shard_experts:
            gc.collect()  # PyTorch's sharding holds a module in cycles
        self.memory.trim()


class _Coming:
    """An expert that a thread brings, to the device (`placed`) or to the host."""

    def __init__(self, key: Key, placed: _Placed | None, work: Callable[[Callable[[], bool]], None]) -> None:
        self.key, self.placed = key, placed
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Callable[[], bool]], None]) -> None:
        try:
            work(self._stop.is_set)
        except BaseException as error:  # told to whoever waits for it
            self._error = error

    def join(self) -> None:
        self._thread.join()
        if self._error:
            raise self._error

    def cancel(self) -> None:
        self._stop.set()
        self._thread.join()


def free_host_memory() -> int:
    """Bytes of the host's memory that can still be taken."""
    from wan22.machine import host_memory

    return host_memory().free
