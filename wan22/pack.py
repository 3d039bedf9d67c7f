"""Published queries, keys and values as one product each, without copying a number.

Three products of the same input read it three times, and three narrow ones use a GPU less well than a wide one. The
packed layer is one of the same kind (an `nn.Linear`, or 8-bit) over the published tensors, which lie side by side in
memory (`side_by_side`); the model's `state_dict` still has the published names, as views, and `load_state_dict` takes
them.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wan22.model import Attention, WanTransformer

PACKED = {"self_attn": "qkv", "cross_attn": "kv"}  # an attention's layers, by their published one-letter names
KINDS = ("weight", "weight_scale", "bias")  # the second of 8-bit layers
_MEMBER = re.compile("|".join(rf"(.*\.{part})\.([{letters}])\.({'|'.join(KINDS)})" for part, letters in PACKED.items()))


def side_by_side(names: Iterable[str]) -> Iterator[list[str]]:
    """All these published names, those that are packed into one tensor together and in its order, others alone."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = _MEMBER.fullmatch(name)
        part, _, kind = filter(None, match.groups()) if match else (name, "", "")
        groups.setdefault((part, kind), []).append(name)
    for (_, kind), group in groups.items():
        # By the layer's letter, whatever the order given; `qkv` happens not to be the alphabet's.
        yield sorted(group, key=lambda name: "qkv".index(name.split(".")[-2])) if kind else group


def pack(model: WanTransformer) -> None:
    """Replace the layers of `PACKED` in every block. Their tensors lie side by side, and need not be filled yet."""
    for block in model.blocks:
        for part, names in PACKED.items():
            _pack(getattr(block, part), names)


def _pack(attention: Attention, names: str) -> None:
    layers = [attention.get_submodule(name) for name in names]
    first: Any = layers[0]
    joint = copy.copy(first)
    joint.out_features, joint._parameters = first.out_features * len(names), {}
    for kind in first._parameters:
        parts = [getattr(layer, kind) for layer in layers]
        whole = join([part.detach() for part in parts])
        assert whole is not None, f"{names}.{kind}: tensors apart"
        setattr(joint, kind, nn.Parameter(whole, parts[0].requires_grad))
    for name in names:
        delattr(attention, name)
    attention.add_module(names, joint.train(attention.training))
    attention.register_state_dict_post_hook(_to_published)
    attention.register_load_state_dict_pre_hook(_from_published)


def join(parts: list[Tensor]) -> Tensor | None:
    """Tensors as one along their first axis, a view; None where they do not lie side by side in one storage."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        alike = part.is_contiguous() and part.dtype == first.dtype and part.device == first.device
        same = part.untyped_storage()._cdata == first.untyped_storage()._cdata  # its address; on `meta` too
        if not (alike and same and part.storage_offset() == place):
            return None
        place += part.numel()
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _packed_names(module: nn.Module) -> str:
    return next(names for names in PACKED.values() if names in module._modules)


def _to_published(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    names = _packed_names(module)
    for kind in KINDS:
        if (joint := state.pop(f"{prefix}{names}.{kind}", None)) is not None:
            for name, part in zip(names, joint.chunk(len(names)), strict=True):
                state[f"{prefix}{name}.{kind}"] = part


def _from_published(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    names = _packed_names(module)
    for kind in KINDS:
        keys = [f"{prefix}{name}.{kind}" for name in names]
        if all(key in state for key in keys):  # else the strict check names what is missing
            parts = [state.pop(key) for key in keys]
            whole = join(parts)
            state[f"{prefix}{names}.{kind}"] = torch.cat(parts) if whole is None else whole
