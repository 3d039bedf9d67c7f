"""From a checkpoint's files to a model ready to run: every choice of a run, in order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wan22.attention import functions
from wan22.checkpoint import Expert
from wan22.config import Precision
from wan22.files.tensor_files import check_names
from wan22.lora import Merge, read_merged
from wan22.model import WanTransformer
from wan22.pack import pack, side_by_side
from wan22.quantize import EightBit, quantize, read_quantized
from wan22.residency.chunks import chunk_feed_forward

# Of what is neither 8-bit nor always float32.
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "int8": torch.bfloat16}


def eight_bit_of(precision: Precision) -> EightBit | None:
    """What of the blocks' products is in 8 bits, of a resolved precision."""
    return EightBit(precision.weights, precision.scope) if precision.scope else None


def empty_expert(expert: Expert, dtype: torch.dtype, eight_bit: EightBit | None = None) -> WanTransformer:
    """The model without memory behind it (on `meta`), its parameters in the dtypes it wants, names and shapes checked
    against the files'. In 8 bits it has a `weight_scale` beside a layer's `weight`. Raises RequestError.

    The text's width is in no published config: it is what the tensor says.
    """
    config = expert.transformer_config()
    if shape := expert.tensors.shapes.get("text_embedding.0.weight"):
        config = replace(config, text_dim=shape[-1])
    with torch.device("meta"):
        model = WanTransformer(config, dtype)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    check_names(str(expert.label), expert.tensors.shapes, wanted)
    if eight_bit:
        quantize(model, eight_bit)
    return model


# Asked for in the middle of a run, whose inference mode would make tensors that the reader's threads cannot fill.
@torch.inference_mode(False)
def load_expert(
    expert: Expert, dtype: torch.dtype, device: torch.device, merges: Sequence[Merge] = (),
    eight_bit: EightBit | None = None,
) -> WanTransformer:  # fmt: skip
    """Build, then read every tensor once, merge adapters, cast or quantize on the way to what the model declares."""
    model = empty_expert(expert, dtype, eight_bit)
    state = room_for(model, device)
    read_state(expert, state, merges)
    return assemble(model, state)


def room_for(model: WanTransformer, device: torch.device) -> dict[str, Tensor]:
    """Tensors for a model's own, by name, not filled; those that are packed lie side by side."""
    wanted = model.state_dict()
    state: dict[str, Tensor] = {}
    for names in side_by_side(wanted):
        parts = [wanted[name] for name in names]
        rows = [len(part) for part in parts]
        room = torch.empty(sum(rows), *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
        state.update(zip(names, room.split(rows), strict=True))
    return state


def read_state(
    expert: Expert, state: Mapping[str, Tensor], merges: Sequence[Merge] = (), begins: Mapping[str, int] | None = None
) -> None:
    """Fill a model's tensors by name, or some of them, or parts of them (see TensorSource), from the expert's files,
    adapters merged, then quantized."""

    def read(targets: dict[str, Tensor]) -> None:
        parts = [replace(merge, changes={name: merge.changes[name] for name in merge.changes.keys() & targets.keys()})
                 for merge in merges]  # fmt: skip
        in_part = {name: begin for name, begin in (begins or {}).items() if name in targets}
        read_merged(expert.tensors, targets, parts, in_part)

    read_quantized(state, read)


def assemble(model: WanTransformer, state: Mapping[str, Tensor], attention: str = "torch") -> WanTransformer:
    """The model with these tensors for its own, wherever they lie (those of pack.py side by side) and whether or not
    they are filled yet; its attention by the named backend."""
    model.load_state_dict(state, strict=True, assign=True)
    pack(model)
    for_self, for_cross = functions(attention)
    block: Any
    for block in model.blocks:
        block.self_attn.attend, block.cross_attn.attend = for_self, for_cross
    chunk_feed_forward(model)
    return model.requires_grad_(False).eval()
