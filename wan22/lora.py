"""Adapters: files of small differences, merged in float32 into an expert's weights while these are read.

An adapter is opened by its header: every tensor in it must find its place among the published names, in the right
shape, before a weight is read. Modules may bear the published names or Diffusers', dotted or with underscores (kohya),
behind any of the usual prefixes. A merged tensor is, with each adapter's own strength,

    weight + Σ strength · (up · down · alpha / rank + diff)

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan22.config import EXPERT_SIDES, Lora, RequestError
from wan22.files.tensor_files import Safetensors, TensorSource, open_checked
from wan22.files.tensor_names import EXPERT_FROM_DIFFUSERS, rename

Shapes = Mapping[str, tuple[int, ...]]
Change = dict[str, str]  # what one tensor is changed by: `down`, `up`, `alpha`, `diff` → the key in the adapter's file

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
OTHER_KINDS = "LoRA pairs and plain differences for this model can be merged; LoHa, LoKr, DoRA and whole models cannot"


# --- names -----------------------------------------------------------------------------------------------------------
PREFIX = re.compile(
    r"(?:base_model|model|diffusion_model|unet|(?P<high>transformer_1|high_noise_model)"
    r"|(?P<low>transformer_2|low_noise_model)|transformer)\.|lora_unet_+"
)
KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?:(?P<down>down|A)|(?P<up>up|B))(?:\.[^.]+)?\.weight"
    r"|(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b)|(?P<diff_m>diff_m))"
)
IMAGE_KEY = re.compile(  # parts of image-to-video models, which text-to-video ones lack; published and Diffusers' names
    r"(?:^|[._])(?:k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_k|image_embedder)(?:[._]|$)"
)
ENDINGS = {"diff_b": (".bias",), "diff_m": (".modulation",)}  # else a weight, or a parameter of its own


def find(key: str, names: Mapping[str, str]) -> tuple[str | None, str, str | None]:
    """A key → the expert it is for, where its prefix says so; the kind of change; the tensor, None if unknown.

    names: an expert's published names, by themselves with `_` for `.`, so that dots and kohya's underscores are one.
    """
    side = None
    while match := PREFIX.match(key):
        side, key = match.lastgroup or side, key[match.end() :]
    if not (match := KEY.fullmatch(key)):
        return side, "", None
    kind = str(match.lastgroup)
    for ending in ENDINGS.get(kind, (".weight", "")):
        name = match["module"] + ending
        with contextlib.suppress(KeyError):
            name = name if name.replace(".", "_") in names else rename(name, EXPERT_FROM_DIFFUSERS)
        if published := names.get(name.replace(".", "_")):
            return side, kind.partition("_")[0], published
    return side, kind, None


NOISE = re.compile(r"(high|low)[-_ .]?noise", re.IGNORECASE)
BARE_SIDE = re.compile(r"(?<![A-Za-z])(high|low)(?![A-Za-z])", re.IGNORECASE)


def side_in(text: str) -> str | None:
    """`high` or `low`, where a file's name has either word."""
    match = NOISE.search(text) or BARE_SIDE.search(text)
    return match[1].lower() if match else None


def told_side(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """The one expert that a file's name or metadata says it is for."""
    for text in (path.stem, metadata.get("ss_output_name"), metadata.get("modelspec.title")):
        if match := NOISE.search(str(text)):
            return match[1].lower()
    # Trainers name the base model. An adapter trained on both experts names the low-noise one: that tells nothing.
    if (match := NOISE.search(str(metadata.get("ss_sd_model_name")))) and match[1].lower() == "high":
        return "high"
    for match in BARE_SIDE.finditer(path.stem):  # high quality, low polygons: only a twin makes it an expert's name
        other = {"high": "low", "HIGH": "LOW", "High": "Low", "low": "high", "LOW": "HIGH", "Low": "High"}[match[1]]
        if path.with_name(path.stem[: match.start()] + other + path.stem[match.end() :] + path.suffix).exists():
            return match[1].lower()
    return None


# --- one file --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Adapter:
    """An opened file. changes: by expert (`high`, `low`) and published name; side: the one expert it is for, where
    that can be told; alpha, root: its metadata's scale, alpha / rank or alpha / √rank, for pairs without `.alpha`."""

    path: Path
    sha256: str
    tensors: Safetensors
    changes: Mapping[str, Mapping[str, Change]]
    side: str | None
    alpha: float | None
    root: bool
    left_out: int  # tensors of an image model

    def add(self, weight: Tensor, change: Change, strength: float) -> None:
        """Add a change to a published tensor, which is whole and in float32, in place."""
        parts = {kind: weight.new_empty(self.tensors.shapes[key]) for kind, key in change.items()}
        self.tensors.read({change[kind]: part for kind, part in parts.items()})
        if "up" in parts:
            up, down = parts["up"].flatten(1), parts["down"].flatten(1)  # [out, rank], [rank, in]
            if "alpha" in parts:
                scale = parts["alpha"].item() / len(down)
            else:
                scale = 1.0 if self.alpha is None else self.alpha / (math.sqrt(len(down)) if self.root else len(down))
            weight.view(len(up), -1).addmm_(up, down, alpha=strength * scale)
        if "diff" in parts:
            weight.add_(parts["diff"].view_as(weight), alpha=strength)


def open_adapter(path: Path, shapes: Shapes) -> Adapter:
    """Check every name and shape in a file's header. shapes: an expert's, by published name. Raises RequestError."""
    if path.suffix.lower() in PICKLES:
        raise RequestError(f"{path}: a pickle; adapters are read from .safetensors alone", hint="convert it to that")
    tensors, names = Safetensors(path), {name.replace(".", "_"): name for name in shapes}
    found = {key: find(key, names) for key in tensors.shapes if not IMAGE_KEY.search(key)}
    unknown = [key for key, (_, _, name) in found.items() if name is None]
    if unknown or not found:
        matched = f"matched {len(found) - len(unknown)} of {len(tensors.shapes)} tensors"
        why = f"the first unknown: {unknown[0]}" if unknown else "the rest is an image-to-video model's"
        raise RequestError(f"{path}: {matched}; {why}" if tensors.shapes else f"{path}: no tensors", hint=OTHER_KINDS)
    sides = {side for side, _, _ in found.values()}
    unmarked = "high" if sides == {"low", None} else None  # `transformer.` beside `transformer_2.`
    changes: dict[str, dict[str, Change]] = {side: {} for side in EXPERT_SIDES}
    for key, (own, kind, name) in found.items():
        for side in EXPERT_SIDES:
            if (own or unmarked or side) == side:
                change = changes[side].setdefault(str(name), {})
                if kind in change:
                    raise RequestError(f"{path}: {change[kind]} and {key} say the same twice")
                change[kind] = key
    for side in EXPERT_SIDES:
        for name, change in changes[side].items():
            _check_change(tensors, name, change, shapes[name])
    peft = _peft_metadata(tensors)
    for unread in ("use_dora", "alpha_pattern"):
        if peft.get(unread):
            raise RequestError(f"{path}: its metadata asks for {unread}", hint=OTHER_KINDS)
    only = told_side(path, tensors.metadata) if sides == {None} else next(iter(sides)) if len(sides) == 1 else None
    return Adapter(
        path, _sha256(*_version(path)), tensors, changes, only,
        peft.get("lora_alpha"), bool(peft.get("use_rslora")), len(tensors.shapes) - len(found),
    )  # fmt: skip


def _version(path: Path) -> tuple[Path, int, int]:
    state = path.stat()
    return path.absolute(), state.st_size, state.st_mtime_ns


@functools.lru_cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_change(tensors: Safetensors, name: str, change: Change, wanted: tuple[int, ...]) -> None:
    """Whole pairs, of numbers, that make a tensor of the wanted shape. Raises RequestError."""
    path, shapes = tensors.path, {kind: tensors.shapes[key] for kind, key in change.items()}
    for kind, key in change.items():
        if kind != "alpha" and tensors.entries[key].dtype not in FLOATS:
            raise RequestError(f"{path}: {key} is of type {tensors.entries[key].dtype}")
    halves = {"up", "down"} & change.keys()
    if len(halves) == 1 or ("alpha" in change and not halves):
        missing = " and ".join(f"lora_{half}" for half in ("down", "up") if half not in change)
        raise RequestError(f"{path}: half of a pair: {next(iter(change.values()))} without its {missing}")
    if "diff" in change and [n for n in shapes["diff"] if n != 1] != [n for n in wanted if n != 1]:
        raise RequestError(_misfit(path, change["diff"], shapes["diff"], name, wanted))
    if halves:
        up, down = shapes["up"], shapes["down"]
        if math.prod(shapes.get("alpha", ())) != 1 or min(len(up), len(down)) < 2 or math.prod(up[1:]) != down[0]:
            raise RequestError(f"{path}: {change['up']} {list(up)} and {change['down']} {list(down)} are no pair")
        if (up[0], math.prod(down[1:])) != (wanted[0], math.prod(wanted[1:])):
            raise RequestError(_misfit(path, change["up"].partition(".lora_")[0], (up[0], *down[1:]), name, wanted))


def _misfit(path: Path, key: str, shape: tuple[int, ...], name: str, wanted: tuple[int, ...]) -> str:
    return f"{path}: an adapter for another model: {key} changes {list(shape)}, here {name} is {list(wanted)}"


def _peft_metadata(tensors: Safetensors) -> dict[str, Any]:
    """What Diffusers keeps in a file of the PEFT configuration (`lora_alpha` …). Raises RequestError."""
    try:
        peft = json.loads(tensors.metadata.get("lora_adapter_metadata", "{}"))
        peft = {str(key).rpartition(".")[2]: value for key, value in peft.items()}
        if not isinstance(peft.get("lora_alpha", 0), int | float):
            raise ValueError("lora_alpha is no number")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{tensors.path}: broken metadata: {error}") from None
    return peft


# --- those of a run --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Merge:
    """One adapter's part in one expert."""

    adapter: Adapter
    changes: Mapping[str, Change]
    strength: float


def read_merged(
    source: TensorSource, targets: Mapping[str, Tensor], merges: Sequence[Merge],
    begins: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """`source.read`, with adapters: what they change is read and summed in float32, one tensor at a time and whole,
    adapters in the order of `merges`, then rounded once to the target's dtype."""
    changed, begins = {name for merge in merges for name in merge.changes}, begins or {}
    plain = {name: target for name, target in targets.items() if name not in changed}
    source.read(plain, {name: begins[name] for name in begins.keys() & plain.keys()})
    roomy = [name for name in changed if targets[name].dtype != torch.float32 or name in begins]
    largest = max((math.prod(source.shapes[name]) for name in roomy), default=0)
    room = torch.empty(largest, dtype=torch.float32, device=next(iter(targets.values())).device)
    for name in (name for name in source.shapes if name in changed):
        target, shape = targets[name], source.shapes[name]
        weight = room[: math.prod(shape)].view(shape) if name in roomy else target
        source.read({name: weight})
        for merge in merges:
            if name in merge.changes:
                merge.adapter.add(weight, merge.changes[name], merge.strength)
        begin = begins.get(name, 0)
        target.copy_(weight.view(-1)[begin : begin + target.numel()].view_as(target))


class Adapters:
    """Finds the adapters that requests name, opens each file once, and knows them again by their SHA-256."""

    def __init__(self, shapes: Shapes, places: Sequence[Path], cache: Path) -> None:
        """shapes: an expert's, by published name; names are looked for in the places, in order, then the Hub cache."""
        self._shapes, self._places, self._cache = shapes, places, cache
        self._opened: dict[tuple[Path, int, int], Adapter] = {}  # by path, size and time of change

    def resolve(self, loras: Sequence[Lora]) -> tuple[Lora, ...]:
        """Files found, opened and checked: a `Lora` for each file, with its bare name, SHA-256 and expert. Raises
        RequestError."""
        resolved = []
        for lora in loras:
            for path, side in self._find(lora):
                adapter = self._open(path)
                given, told = side or lora.expert, adapter.side
                if told and given not in ("both", told):
                    raise RequestError(f"{path}: an adapter for the {told}-noise expert, given as {given} noise",
                                       hint=f"say: --lora-{told} FILE")  # fmt: skip
                expert = told or given if given == "both" else given
                resolved.append(replace(lora, file=path.name, expert=expert, sha256=adapter.sha256))
        return tuple(resolved)

    def merges(self, side: str, loras: Sequence[Lora]) -> list[Merge]:
        """What to merge into the `high` or `low` noise expert, of resolved adapters. Strength 0 touches nothing. Raises
        RequestError for a file that changed since."""
        opened = {adapter.sha256: (version, adapter) for version, adapter in self._opened.items()}
        merges = []
        for lora in loras:
            if lora.strength and lora.expert in ("both", side):
                version, adapter = opened[str(lora.sha256)]
                if not adapter.path.exists() or _version(adapter.path) != version:
                    raise RequestError(f"{adapter.path}: was replaced since it was checked")
                merges.append(Merge(adapter, adapter.changes[side], lora.strength))
        return merges

    def warnings(self, loras: Sequence[Lora]) -> list[str]:
        """What is left out of resolved adapters."""
        wanted = {lora.sha256 for lora in loras}
        return [
            f"{adapter.path.name}: {adapter.left_out} tensors belong to an image-to-video model and are left out"
            for adapter in self._opened.values()
            if adapter.left_out and adapter.sha256 in wanted
        ]

    def _open(self, path: Path) -> Adapter:
        version = _version(path)
        if version not in self._opened:
            self._opened[version] = open_adapter(path, self._shapes)
        return self._opened[version]

    def _folders(self) -> list[Path]:
        """Where a path or name may lead: as it is, then in the places, then in the Hub cache."""
        return [Path(), *self._places, *sorted(self._cache.glob("models--*/snapshots/*"))]

    def _find(self, lora: Lora) -> Iterator[tuple[Path, str | None]]:
        """The file, or a folder's pair with the expert of each: at the path itself, else by its name in the places."""
        if lora.sha256:
            yield self._find_again(lora), None
            return
        name = Path(os.path.expanduser(lora.file))
        path = next((folder / name for folder in self._folders() if os.path.exists(folder / name)), None)
        if path is None:
            places = ", ".join(map(str, self._places))
            raise RequestError(
                f"--lora {lora.file}: no such file or folder, nor in {places} or the Hugging Face cache",
                hint="name its path; the step-distilled pair: wan22 download lightning",
            )
        if path.is_dir():
            yield from _files_in(path, lora.expert)
        else:
            yield path, None

    def _find_again(self, lora: Lora) -> Path:
        """A recorded adapter, by its name in the places and their folders, proven by its SHA-256."""
        opened = [adapter.path for adapter in self._opened.values() if adapter.sha256 == lora.sha256]
        folders = dict.fromkeys(folder for place in self._folders() for folder in (place, *sorted(place.glob("*/"))))
        paths = [path for path in (*opened, *(folder / lora.file for folder in folders)) if os.path.isfile(path)]
        for path in paths:
            open_checked(path)
            if _sha256(*_version(path)) == lora.sha256:
                return path
        found = f"{', '.join(map(str, paths))}: has another" if paths else "no file of that name was found"
        raise RequestError(f"the adapter {lora.file} with SHA-256 {lora.sha256} is wanted; {found}",
                           hint="say where it is: --lora-dir FOLDER")  # fmt: skip


def _files_in(folder: Path, expert: str) -> list[tuple[Path, str | None]]:
    """A folder's only adapter, or its pair with the expert of each. Raises RequestError."""
    files = sorted(folder.glob("*.safetensors"))
    pair = {side_in(path.stem): path for path in files}
    if len(files) == 1:
        return [(files[0], None)]
    if len(files) == 2 and pair.keys() == set(EXPERT_SIDES):
        return [(pair[side], side) for side in EXPERT_SIDES if expert in ("both", side)]
    raise RequestError(
        f"--lora {folder}: neither one adapter nor a pair (…high_noise…, …low_noise…): {len(files)} .safetensors files",
        hint="name the files: --lora-high FILE --lora-low FILE",
    )
