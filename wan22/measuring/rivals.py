"""Other programs' transformers on the same work: the same weights, latents, prompt and attention function.

diffusers' `WanTransformer3DModel` as `from_pretrained(torch_dtype=bfloat16)` makes it; the published `WanModel` cast to
bf16 under autocast, as `--convert_model_dtype` runs it, out of the PyPI package `wan22` (it imports as `wan`).
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan22.attention import Attend
from wan22.checkpoint import Expert
from wan22.config import RequestError
from wan22.files.tensor_names import EXPERT_FROM_DIFFUSERS, rename

RIVALS = ("diffusers", "published")
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # latents [B, C, T, H, W], timestep [B], context → velocity


def check_rival(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises RequestError for one that is not known, not installed or not for here, before anything is measured."""
    if name not in RIVALS:
        raise RequestError(f"--against {name}: unknown", hint=f"known: {', '.join(RIVALS)}")
    if name == "published":
        if device.type == "cpu" and dtype != torch.float32:
            raise RequestError("--against published: in bf16 it runs on a GPU only", hint="--dtype float32")
        _published_class()


@contextmanager
def rival(
    name: str, expert: Expert, dtype: torch.dtype, device: torch.device, attend: Attend
) -> Iterator[tuple[nn.Module, Velocity]]:
    """The model on the device with the expert's weights, and its forward under one signature. Raises RequestError."""
    with (_diffusers if name == "diffusers" else _published)(expert, dtype, device, attend) as made:
        yield made


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _diffusers(expert: Expert, dtype: torch.dtype, device: torch.device, attend: Attend) -> Iterator[Any]:
    from diffusers.models.transformers import transformer_wan as library

    config = expert.transformer_config()
    with torch.inference_mode(False):
        with torch.device("meta"):
            model = library.WanTransformer3DModel(
                num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, in_channels=config.in_dim,
                out_channels=config.out_dim, text_dim=_text_dim(expert), freq_dim=config.freq_dim,
                ffn_dim=config.ffn_dim, num_layers=config.num_layers, eps=config.eps, cross_attn_norm=True,
            )  # fmt: skip
        kept = model._keep_in_fp32_modules or []
        state = {
            name: torch.empty(tensor.shape, device=device,
                              dtype=torch.float32 if any(part in name.split(".") for part in kept) else dtype)
            for name, tensor in model.state_dict().items()
        }  # fmt: skip
        expert.tensors.read({rename(name, EXPERT_FROM_DIFFUSERS): tensor for name, tensor in state.items()})
        model.requires_grad_(False).eval().load_state_dict(state, strict=True, assign=True)
        # Its tables are no part of the state, and were made on meta with the rest.
        model.rope = library.WanRotaryPosEmbed(config.head_dim, config.patch_size, 1024).to(device)

    def dispatch(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        return attend(query, key, value)

    def velocity(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        padded = F.pad(context, (0, 0, 0, config.text_len - context.shape[1]))
        return model(latents.to(dtype), timestep, padded.to(dtype), return_dict=False)[0].float()

    with _replaced(library, "dispatch_attention_fn", dispatch):
        yield model, velocity


def _published_class() -> Any:
    """`WanModel` of the package, and only that: `import wan` would bring in every task's own requirements."""
    hint = "pip install --no-deps wan22==2.2.11   (the published code as PyPI has it; it imports as `wan`)"
    if "wan.modules.model" not in sys.modules:
        found = importlib.util.find_spec("wan")  # looks, and runs nothing
        places = list(found.submodule_search_locations or []) if found else []
        if not places:
            raise RequestError("--against published: there is no package `wan` here", hint=hint)
        for name, folder in (("wan", places[0]), ("wan.modules", f"{places[0]}/modules")):
            package = types.ModuleType(name)
            package.__path__ = [folder]
            sys.modules[name] = package
    try:
        return importlib.import_module("wan.modules.model").WanModel
    except (ImportError, AttributeError) as error:
        for name in ("wan.modules", "wan"):
            sys.modules.pop(name, None)
        raise RequestError(f"--against published: its transformer does not load: {error}", hint=hint) from None


@contextmanager
def _published(expert: Expert, dtype: torch.dtype, device: torch.device, attend: Attend) -> Iterator[Any]:
    kind = _published_class()
    library = sys.modules[kind.__module__]
    config = expert.transformer_config()
    # Its constructor draws initial numbers on the CPU, 57 GB of them.
    with torch.inference_mode(False):
        with torch.device("meta"), _replaced(kind, "init_weights", lambda self: None):
            model = kind(
                model_type="t2v", text_len=config.text_len, in_dim=config.in_dim, dim=config.dim,
                ffn_dim=config.ffn_dim, freq_dim=config.freq_dim, text_dim=_text_dim(expert), out_dim=config.out_dim,
                num_heads=config.num_heads, num_layers=config.num_layers, eps=config.eps,
            )  # fmt: skip
        state = {name: torch.empty(t.shape, dtype=dtype, device=device) for name, t in model.state_dict().items()}
        expert.tensors.read(state)
        model.requires_grad_(False).eval().load_state_dict(state, strict=True, assign=True)
        d = config.head_dim
        parts = [library.rope_params(1024, size) for size in (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6))]
        model.freqs = torch.cat(parts, dim=1).to(device)

    def flash_attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Any = None, **rest: Any) -> Tensor:
        half = v.dtype if v.dtype != torch.float32 else dtype
        return attend(q.to(half), k.to(half), v.to(half)).type(q.dtype)

    def velocity(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        grid = [n // step for n, step in zip(latents.shape[2:], config.patch_size, strict=True)]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return torch.stack(model(list(latents), timestep, list(context), grid[0] * grid[1] * grid[2]))

    with _replaced(library, "flash_attention", flash_attention):
        yield model, velocity


def _text_dim(expert: Expert) -> int:
    return expert.tensors.shapes["text_embedding.0.weight"][-1]
