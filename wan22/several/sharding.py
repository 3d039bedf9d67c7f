"""Weights of which each rank keeps a part: PyTorch's `fully_shard`, a block at a time, read by parts from the files.

A block's weights are gathered for its turn, the next block's while it computes, and let go after it. They are frozen,
and each stays in the dtype it has: nothing is cast, and a shard's rows are read from the files and nothing else is.
Adapters are the exception: what they change is read whole, summed as ever, and cut.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023).
"""

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from wan22.checkpoint import Expert
from wan22.load import assemble, empty_expert, read_state, room_for
from wan22.lora import Merge
from wan22.model import WanTransformer
from wan22.pack import PACKED
from wan22.parallel import all_gather
from wan22.residency.memory import Memory

_PACKED = re.compile(rf"(.*\.)({'|'.join(PACKED.values())})\.(weight|bias)")
Fill = Callable[[Callable[[], bool]], None]


@functools.cache
def whole_world(device_type: str, world: int) -> DeviceMesh:
    """All ranks in a line."""
    return init_device_mesh(device_type, (world,))


def sharded_expert(
    expert: Expert, dtype: torch.dtype, attention: str, merges: Sequence[Merge], memory: Memory, world: int
) -> tuple[WanTransformer, Fill]:
    """An expert of which this rank has its part, not filled yet, and what fills it: from the files, without a message
    to others, giving up where it is told to stop. Raises RequestError, torch.OutOfMemoryError."""
    model = empty_expert(expert, dtype)
    targets, begins = shard_expert(model, attention, memory, world)
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, target in targets.items():
        number = name.split(".")[1] if name.startswith("blocks.") else ""
        blocks.setdefault(number, {})[name] = target

    def fill(stopped: Callable[[], bool]) -> None:
        for table in blocks.values():
            if stopped():
                return
            read_state(expert, table, merges, {name: begins[name] for name in table})

    return model, fill


def shard_expert(model: WanTransformer, attention: str, memory: Memory, world: int) -> "Parts":
    """A model on `meta` → sharded, its attention by the named backend; this rank's parts, to be filled."""
    mesh = whole_world(memory.device.type, world)
    assemble(model, room_for(model, torch.device("meta")), attention)
    # What is outside the blocks and large: 1.9 GB, gathered for their own moment as well.
    units: list[nn.Module] = [*model.blocks, model.text_embedding, model.time_embedding, model.time_projection]
    for unit in [*units, model]:
        fully_shard(unit, mesh=mesh)
    register_fsdp_forward_method(model, "embed_context")
    for block in cast(Any, model.blocks):
        attention_ = block.cross_attn
        # Weak, or the module would hold itself and its weights till the garbage collector comes.
        whole = functools.partial(_with_weights, weakref.ref(block), weakref.ref(attention_))
        setattr(attention_, "keys_values", whole)  # noqa: B010
    return _own_parts(model, mesh, memory)


class Copies:
    """A whole copy on every rank, of which each reads a part and has the rest from the others: every byte comes from
    the files once. Whole rows, which may have scales and packed blocks of their own; what does not divide all read."""

    def __init__(self, expert: Expert, state: Mapping[str, Tensor], rank: int, world: int) -> None:
        self._expert, self._state = expert, state
        self._own, self._begins = dict(state), {}
        for name, tensor in state.items():
            if len(tensor) % world == 0:
                self._own[name] = tensor.chunk(world)[rank]
                self._begins[name] = rank * self._own[name].numel()

    def read(self) -> None:
        """This rank's part; in any thread."""
        read_state(self._expert, self._own, (), self._begins)

    def join(self) -> None:
        """The others' parts; every rank calls it at once, with the same tensors."""
        for name in self._begins:
            whole, part = (state[name].flatten().view(torch.uint8) for state in (self._state, self._own))
            all_gather(whole, part if part.is_cuda else part.clone())  # in place, where that is allowed


def shard_text_encoder(model: nn.Module, layers: Sequence[nn.Module], memory: Memory, world: int) -> "Parts":
    """A transformers encoder on `meta` → sharded layer by layer; this rank's parts, to be filled."""
    mesh = whole_world(memory.device.type, world)
    for unit in [*layers, model]:
        fully_shard(unit, mesh=mesh)
    return _own_parts(model, mesh, memory)


Parts = tuple[dict[str, Tensor], dict[str, int]]


def _own_parts(model: nn.Module, mesh: DeviceMesh, memory: Memory) -> Parts:
    """Memory for this rank's part of every parameter, put in its place; by published name the rows to fill, and the
    number in the whole tensor with which they begin."""
    targets: dict[str, Tensor] = {}
    begins: dict[str, int] = {}
    made: dict[int, nn.Parameter] = {}  # parameters under several names
    for module_name, module in model.named_modules():
        for short, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in made:
                module.register_parameter(short, made[id(parameter)])
                continue
            sharded = cast(DTensor, parameter)
            local, rows = sharded.to_local(), -(-len(sharded) // mesh.size())  # FSDP's parts: as torch.chunk's
            first = min(len(sharded), mesh.get_local_rank() * rows)
            flat = memory.empty(local.numel() * local.element_size())
            own = flat.view(local.dtype).view(local.shape)
            placed = DTensor.from_local(own, mesh, sharded.placements, run_check=False, shape=sharded.shape,
                                        stride=sharded.stride())  # fmt: skip
            made[id(parameter)] = nn.Parameter(placed, requires_grad=False)
            module.register_parameter(short, made[id(parameter)])
            name = f"{module_name}.{short}" if module_name else short
            for published, start, stop in _published(name, len(sharded)):
                low, high = max(first, start), min(first + len(own), stop)
                if low < high:
                    targets[published] = own[low - first : high - first]
                    begins[published] = (low - start) * (sharded[0].numel() if sharded.ndim > 1 else 1)
    return targets, begins


def _published(name: str, rows: int) -> Iterator[tuple[str, int, int]]:
    """The published tensors that a parameter holds, and which rows of it they are."""
    if match := _PACKED.fullmatch(name):
        prefix, letters, kind = match.groups()
        each = rows // len(letters)
        for place, letter in enumerate(letters):
            yield f"{prefix}{letter}.{kind}", place * each, (place + 1) * each
    else:
        yield name, 0, rows


def _with_weights(block: Any, attention: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    """A block's cross-attention keys and values, for which only `forward` would have its weights gathered."""
    with gathered(block()):
        return type(attention()).keys_values(attention(), context)


@contextlib.contextmanager
def gathered(module: FSDPModule) -> Iterator[None]:
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
