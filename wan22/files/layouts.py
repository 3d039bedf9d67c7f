"""A file's tensors under their published names, whatever layout the file is in: told by keys and metadata, never by
the file's name.

An expert, a text encoder or a VAE may bear the published names (with or without ComfyUI's prefix), those of diffusers
or transformers, or llama.cpp's in a GGUF file; its weights may be fp8 with scales beside them. `publish` makes one
`TensorSource` of all of these. Sources: ComfyUI's `QUANTIZATION.md` and `convert_old_quants`; ComfyUI-GGUF.
"""

import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wan22.config import RequestError
from wan22.files.gguf_files import MAGIC as GGUF_MAGIC
from wan22.files.gguf_files import Gguf
from wan22.files.reading import Entry
from wan22.files.scaled_fp8 import OTHER_FORM, Quantized
from wan22.files.tensor_files import FileTensors, MissingFiles, Pickle, Safetensors, TensorSource, open_checked
from wan22.files.tensor_names import (
    EXPERT_FROM_DIFFUSERS,
    TEXT_ENCODER_FROM_LLAMA_CPP,
    TEXT_ENCODER_FROM_TRANSFORMERS,
    TEXT_ENCODER_UNUSED,
    published_vae_name,
    rename,
    unprefixed,
)

if TYPE_CHECKING:
    import torch

EXPERT, TEXT_ENCODER, VAE, ADAPTER = "an expert", "a text encoder", "a VAE", "an adapter (LoRA)"  # as messages say it
NOT_ONE = {EXPERT: "not a Wan transformer", TEXT_ENCODER: "not a UMT5 encoder", VAE: "not a Wan VAE"}
GGUF_ARCHITECTURES = {EXPERT: ("wan",), TEXT_ENCODER: ("t5encoder", "t5")}
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
WEIGHT_FILES = (".safetensors", ".gguf", ".pth", ".pt", ".bin")


# --- the file --------------------------------------------------------------------------------------------------------
def find_tensors(path: Path) -> FileTensors | Pickle:
    """Open a file of weights, told by its first bytes, or a folder's only one or only index. Raises RequestError."""
    if path.is_dir():
        path = _weights_in(path)
    if path.name.endswith(".json"):
        return Safetensors(path)
    open_checked(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:4] == GGUF_MAGIC or path.suffix == ".gguf":
        return Gguf(path)
    if start[8:] == b"{":  # before the next: the length that a safetensors file begins with may look like them
        return Safetensors(path)
    if start[:2] == b"PK" or start[:1] == b"\x80" or path.suffix in (".pth", ".pt", ".bin"):
        return Pickle(path)  # a zip, or a pickle of protocol 2 and up
    return Safetensors(path)


def _weights_in(folder: Path) -> Path:
    indexes = sorted(folder.glob("*.index.json")) or sorted(folder.glob("*.index.*.json"))
    found = indexes or sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES)
    shards = [match for path in found if (match := re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", path.name))]
    if shards:
        raise MissingFiles([folder / f"{shards[0][1]}{shards[0][2]}.index.json"])
    if not found:
        raise RequestError(f"{folder}: no weights in it", hint="name a file, or a folder with one model in it")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise RequestError(f"{folder}: holds {len(found)} files of weights: {names}", hint="name the one that is meant")
    return found[0]


# --- its names -------------------------------------------------------------------------------------------------------
class Form(NamedTuple):
    """A way to name a kind of model's tensors: how it is recognized, and its names → the published (KeyError)."""

    kind: str
    layout: str
    sign: str  # a regular expression that some name matches from its start
    publish: Callable[[str], str]


def _same(name: str) -> str:
    return name


FORMS = (
    Form(ADAPTER, "", r".*(?:lora_|\.lokr_|\.hada_)", _same),
    Form(EXPERT, "published", r"blocks\.\d+\.(?:self|cross)_attn\.", _same),
    Form(EXPERT, "Diffusers", r"blocks\.\d+\.attn[12]\.", lambda name: rename(name, EXPERT_FROM_DIFFUSERS)),
    Form(TEXT_ENCODER, "published", r"token_embedding\.|blocks\.\d+\.pos_embedding\.", _same),
    Form(TEXT_ENCODER, "Hugging Face", r"encoder\.block\.\d+\.|shared\.weight",
         lambda name: rename(name, TEXT_ENCODER_FROM_TRANSFORMERS)),
    Form(TEXT_ENCODER, "llama.cpp", r"enc\.blk\.\d+\.", lambda name: rename(name, TEXT_ENCODER_FROM_LLAMA_CPP)),
    Form(VAE, "published", r"(?:en|de)coder\.(?:conv1|middle|downsamples|upsamples|head)\.", _same),
    Form(VAE, "Diffusers", r"(?:en|de)coder\.(?:conv_in|mid_block|down_blocks|up_blocks|conv_out)\.",
         published_vae_name),
)  # fmt: skip


def recognize(names: Iterable[str]) -> Form | None:
    """The form that a model's names have."""
    names = [unprefixed(name) for name in names]
    return next((form for form in FORMS if any(re.match(form.sign, name) for name in names)), None)


@dataclass
class _Map:
    """What a file's tensors are: names, published → stored; scales, published weight → stored scale."""

    layout: str
    names: dict[str, str] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)


class Published:
    """Another layout's tensors by their published names, with scales applied; a `TensorSource`.

    What it says of dtypes and sizes is what is stored. A pickle is opened with the first question, not before: that
    takes torch, and everything else can be wrong first.
    """

    def __init__(self, source: FileTensors | Pickle, kind: str) -> None:
        self.source, self.kind = source, kind

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def files(self) -> list[Path]:
        return self.source.files

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.source.metadata

    @property
    def layout(self) -> str:
        return self._map.layout

    @cached_property
    def _map(self) -> _Map:
        return _map(self.source, self.kind)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: self.source.shapes[stored] for name, stored in self._map.names.items()}
        return _unfolded(shapes) if isinstance(self.source, Gguf) else shapes

    @cached_property
    def dtypes(self) -> dict[str, str]:
        return {name: self.source.dtypes[stored] for name, stored in self._map.names.items()}

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {name: self.source.sizes[stored] for name, stored in self._map.names.items()}

    @property
    def entries(self) -> dict[str, Entry]:
        """Where the tensors lie; nowhere, for a pickle."""
        entries = getattr(self.source, "entries", {})
        return {name: entries[stored] for name, stored in self._map.names.items()} if entries else {}

    def read(self, targets: "Mapping[str, torch.Tensor]", begins: Mapping[str, int] | None = None) -> None:
        stored = {self._map.names[name]: target for name, target in targets.items()}
        begins = {self._map.names[name]: begin for name, begin in (begins or {}).items()}
        scaled = [name for name in targets if name in self._map.scales]
        if not scaled:
            self.source.read(stored, begins)
            return
        assert isinstance(self.source, FileTensors)
        scales = self._scales(scaled, targets[scaled[0]].device)
        self.source.read(stored, begins, {self._map.names[name]: scale for name, scale in scales.items()})

    @property
    def scaled(self) -> Set[str]:
        """The weights that are stored with scales."""
        return self._map.scales.keys()

    def scale(self, name: str) -> "torch.Tensor":
        """What a stored weight is multiplied by, float32: one number or one a row, flat."""
        return self._scales([name], None)[name]

    def _scales(self, names: Iterable[str], device: "torch.device | None") -> "dict[str, torch.Tensor]":
        import torch

        stored = {name: self._map.scales[name] for name in names}
        scales = {
            name: torch.empty(math.prod(self.source.shapes[scale]), dtype=torch.float32, device=device)
            for name, scale in stored.items()
        }
        self.source.read({scale: scales[name] for name, scale in stored.items()})
        return scales

    def read_stored(self, name: str, target: "torch.Tensor") -> None:
        """Fill the target with the stored numbers, without their scale."""
        self.source.read({self._map.names[name]: target})

    def warm(self, stop: threading.Event) -> None:
        self.source.warm(stop)


def publish(source: FileTensors | Pickle, kind: str) -> TensorSource:
    """The tensors of `kind` in a source under published names: the source itself, where it has them already.

    Raises RequestError for another kind of model, unknown names, or scales that do not fit; for a pickle later.
    """
    published = Published(source, kind)
    if isinstance(source, Pickle):
        return published
    names = published._map.names
    unchanged = isinstance(source, Safetensors) and names.keys() == source.entries.keys()
    return source if unchanged and all(name == stored for name, stored in names.items()) else published


def _unfolded(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """An expert's shapes as published: GGML knows four axes and forgets a slowest one of length 1, so its tools fold
    the patches' kernel (1, 2, 2) away and write modulations as [6, dim]."""
    weight, bias = (shapes.get(f"patch_embedding.{part}", ()) for part in ("weight", "bias"))
    if weight and bias and len(weight) != 5:
        shapes["patch_embedding.weight"] = (bias[0], math.prod(weight) // (4 * bias[0]), 1, 2, 2)
    return {name: (1, *shape) if name.endswith("modulation") and len(shape) == 2 else shape
            for name, shape in shapes.items()}  # fmt: skip


def layout_of(tensors: TensorSource) -> str:
    """The layout in a few words."""
    return tensors.layout if isinstance(tensors, Published) else "published"


def _map(source: FileTensors | Pickle, kind: str) -> _Map:
    path, form = source.path, recognize(source.shapes)
    if isinstance(source, Gguf) and source.architecture not in (known := GGUF_ARCHITECTURES.get(kind, ())):
        raise RequestError(f"{path}: a GGUF of architecture {source.architecture!r}, where {kind} is expected"
                           + (f" ({known[0]!r})" if known else ""))  # fmt: skip
    if form and form.kind != kind:
        raise RequestError(f"{path}: {form.kind}, where {kind} is expected",
                           hint="adapters: --lora FILE" if form.kind == ADAPTER else None)  # fmt: skip
    if form is None:
        first = next(iter(source.shapes), None)
        raise RequestError(f"{path}: {NOT_ONE[kind]}: " + (f"unknown tensor {first!r}" if first else "it is empty"))
    quantized = Quantized(source)
    result = _Map(_describe(source, form, quantized.scheme))
    unknown = []
    # `shared.weight` before its alias, which whole T5 checkpoints hold too.
    for stored in sorted(quantized.plain, key=lambda name: name.endswith("embed_tokens.weight")):
        bare = unprefixed(stored)
        if kind == TEXT_ENCODER and re.fullmatch(TEXT_ENCODER_UNUSED, bare):
            continue
        try:
            name = form.publish(bare)
        except KeyError:
            unknown.append(bare)
            continue
        if name in result.names and not bare.endswith("embed_tokens.weight"):
            raise RequestError(f"{path}: {result.names[name]} and {stored} are the same tensor")
        result.names.setdefault(name, stored)
    _refuse_other_models(path, kind, {name: source.shapes[stored] for name, stored in result.names.items()})
    if unknown:
        raise RequestError(f"{path}: {NOT_ONE[kind]}: unknown tensor {unknown[0]!r}")
    for name, stored in result.names.items():
        if source.dtypes[stored] in INTEGERS:
            raise RequestError(f"{path}: {name} is of whole numbers ({source.dtypes[stored]}): a quantization that "
                               "cannot be read here", hint=OTHER_FORM)  # fmt: skip
    result.scales = {name: quantized.scales[stored] for name, stored in result.names.items()
                     if stored in quantized.scales}  # fmt: skip
    return result


def _describe(source: FileTensors | Pickle, form: Form, scheme: str) -> str:
    if isinstance(source, Gguf):
        return "GGUF"
    prefixed = any(unprefixed(name) != name for name in source.shapes)
    return form.layout + (", prefixed" if prefixed else "") + (f", {scheme}" if scheme else "")


def _refuse_other_models(path: Path, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Relatives that share most names. An expert's channels are the expert's own matter (`expert_files.py`)."""
    if kind == VAE and shapes.get("conv2.weight", (16,))[0] == 48:
        raise RequestError(f"{path}: the VAE of Wan2.2's 5B model (48 latent channels); this model needs Wan2.1_VAE")
    biases = [name for name in shapes if name.endswith("pos_embedding.embedding.weight")]
    if kind == TEXT_ENCODER and len(biases) == 1 and "blocks.1.attn.q.weight" in shapes:
        raise RequestError(f"{path}: a T5 encoder; this model needs UMT5, which has position biases in every block")
