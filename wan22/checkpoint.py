"""A checkpoint: where it is, whether it is whole, and its parts by their published names.

A folder in the published layout or Diffusers', or parts named one by one, each in any layout (`layouts.py`). Opening
reads headers and configs only.

| part               | published                                               | Diffusers        |
|--------------------|---------------------------------------------------------|------------------|
| high-noise expert  | `high_noise_model/`                                     | `transformer/`   |
| low-noise expert   | `low_noise_model/`                                      | `transformer_2/` |
| text encoder       | `models_t5_umt5-xxl-enc-bf16` (.pth, or .safetensors,   | `text_encoder/`  |
| VAE                | `Wan2.1_VAE`                   in shards with an index) | `vae/`           |
| tokenizer          | `google/umt5-xxl/`                                      | `tokenizer/`     |
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan22.config import DEFAULT_TASK, EXPERT_SIDES, MODEL_SPECS, RequestError, data_dir
from wan22.files.expert_files import (
    check_side,
    read_config,
    refuse_single_transformer,
    same_content,
    same_files,
    sizes_of,
)
from wan22.files.layouts import EXPERT, TEXT_ENCODER, VAE, Published, find_tensors, publish
from wan22.files.tensor_files import FileTensors, MissingFiles, TensorSource, open_checked, sample_bytes

if TYPE_CHECKING:
    from wan22.model import TransformerConfig

REPOSITORY = "Wan-AI/Wan2.2-T2V-A14B"
DEFAULT_FOLDERS = ("Wan2.2-T2V-A14B", "T2V_A14B_weights")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
TEXT_ENCODER_STEM = "models_t5_umt5-xxl-enc-bf16"
VAE_STEM = "Wan2.1_VAE"
TOKENIZER = "google/umt5-xxl"
SUFFIXES = (".safetensors", ".safetensors.index.json", ".pth")  # what a stem may end in; the first that is there counts
DIFFUSERS_INDEX = "model_index.json"
DOWNLOAD_HINT = "get it: wan22 download --ckpt_dir ./T2V_A14B_weights   (126 GB)"


# --- where it is -----------------------------------------------------------------------------------------------------
def hub_cache() -> Path:
    """The Hugging Face cache, there or not."""
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def hub_snapshot(repository: str) -> Path | None:
    """The newest snapshot of `owner/name` in the Hugging Face cache, if it is there."""
    folder = hub_cache() / f"models--{repository.replace('/', '--')}"
    main = folder / "refs" / "main"
    if main.is_file() and (snapshot := folder / "snapshots" / main.read_text().strip()).is_dir():
        return snapshot
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def find_checkpoint(model: str | None = None, ckpt_dir: str | None = None, flag: str = "--model ") -> Path:
    """The checkpoint folder: `ckpt_dir` or `model` where given, else the usual places in order. Raises RequestError.

    model: `demo` (a folder of that name is `./demo`), a folder, the published name, or `owner/name` in the Hugging Face
    cache; flag: what came before it, for what is said of it.
    """
    if model and ckpt_dir:
        raise RequestError("--model and --ckpt_dir both name a checkpoint", hint="give one of them")
    if model == "demo":
        return data_dir("demo")
    if ckpt_dir or (model and Path(model).is_dir()):
        folder = Path(ckpt_dir or str(model))
        if not folder.is_dir():
            raise RequestError(f"--ckpt_dir {folder}: no such folder", hint=DOWNLOAD_HINT)
        return folder
    if model and model not in (*DEFAULT_FOLDERS, REPOSITORY):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and (snapshot := hub_snapshot(model)):
            return snapshot
        raise RequestError(f"{flag}{model}: neither a folder nor in the Hugging Face cache", hint="known name: demo")
    looked = []
    if from_environment := os.environ.get("WAN22_CKPT_DIR"):
        if not Path(from_environment).is_dir():
            raise RequestError(f"$WAN22_CKPT_DIR: {from_environment}: no such folder", hint=DOWNLOAD_HINT)
        return Path(from_environment)
    for name in DEFAULT_FOLDERS:
        if Path(name).is_dir():
            return Path(name)
        looked.append(f"./{name}")
    if snapshot := hub_snapshot(REPOSITORY):
        return snapshot
    raise RequestError(
        f"no weights found: looked at --ckpt_dir, $WAN22_CKPT_DIR, {', '.join(looked)} and the Hugging Face cache "
        f"({REPOSITORY})",
        hint=DOWNLOAD_HINT,
    )


# --- what is in it ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Parts:
    """Parts named one by one, each a file or folder in any layout; what is None is the base checkpoint's."""

    high_noise: str | None = None
    low_noise: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    tokenizer: str | None = None

    def named(self) -> "dict[str, Path]":
        """Those that are named, by role."""
        return {role: Path(path) for role, path in zip(ROLES, vars(self).values(), strict=True) if path}

    @property
    def need_no_base(self) -> bool:
        return len(self.named()) == len(ROLES)


EXPERTS = MODEL_SPECS[DEFAULT_TASK].experts
ROLES = (*EXPERTS, "text_encoder", "vae", "tokenizer")  # in the order of Parts
FLAGS = dict(zip(ROLES, ("--high-noise", "--low-noise", "--text-encoder", "--vae", "--tokenizer"), strict=True))
PUBLISHED_PLACES = dict(zip(ROLES, (*EXPERTS, TEXT_ENCODER_STEM, VAE_STEM, TOKENIZER), strict=True))
DIFFUSERS_PLACES = dict(zip(ROLES, ("transformer", "transformer_2", "text_encoder", "vae", "tokenizer"), strict=True))


@dataclass(frozen=True)
class Expert:
    """One expert: its tensors under published names, and its sizes in published keys."""

    name: str
    tensors: TensorSource
    config: dict[str, Any]

    @property
    def label(self) -> Path:
        """What messages call it: its file, or the folder of its shards."""
        path = self.tensors.path
        return path.parent if path.name.endswith(".json") else path

    def transformer_config(self) -> "TransformerConfig":
        from wan22.model import TransformerConfig

        known = TransformerConfig.__dataclass_fields__
        return TransformerConfig(**{key: value for key, value in self.config.items() if key in known})


Piece = Expert | TensorSource | Path  # of an expert, of text encoder and VAE, of the tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    folder: the base; where every part was named, the high-noise expert's; experts: in the order of
    `ModelSpec.experts`; boundary: a Diffusers folder's own, as a fraction of 1000; warnings: what is allowed and odd.
    """

    folder: Path
    name: str  # for records: it says nothing of where things lie
    experts: dict[str, Expert]
    text_encoder: TensorSource
    vae: TensorSource
    tokenizer: Path
    boundary: float | None = None
    warnings: list[str] = field(default_factory=list)

    def identity(self) -> str:
        """A digest (hex) of what the checkpoint is, from headers, sizes and sampled bytes: seconds, not hours.

        It depends neither on where the files lie nor on their names. Two files that differ only between the samples
        look alike: to prove files whole, verify their SHA-256 (`wan22 download --check`).
        """
        state = hashlib.sha256()
        for expert in self.experts.values():
            told = {key: value for key, value in expert.config.items() if not key.startswith("_")}
            state.update(json.dumps(told, sort_keys=True).encode() + _digest(expert.tensors))
        state.update(_digest(self.text_encoder) + _digest(self.vae))
        _add_tokenizer(state, self.tokenizer)
        return state.hexdigest()

    def text_identity(self) -> str:
        """The same of what prompts are encoded by alone: text encoder and tokenizer."""
        state = hashlib.sha256(_digest(self.text_encoder))
        _add_tokenizer(state, self.tokenizer)
        return state.hexdigest()

    def vae_identity(self) -> str:
        """A digest (hex) of what the VAE alone is."""
        return _digest(self.vae).hex()


def _add_tokenizer(state: Any, folder: Path) -> None:
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        state.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())


def _digest(tensors: TensorSource) -> bytes:
    """What a part's files hold; an index only says where."""
    source = tensors.source if isinstance(tensors, Published) else tensors
    headers = source.headers if isinstance(source, FileTensors) else dict.fromkeys(source.files, b"")
    files = [
        hashlib.sha256(f"{path.stat().st_size}\0".encode() + header + sample_bytes(path)).digest()
        for path, header in headers.items()
    ]
    return hashlib.sha256(b"".join(sorted(files))).digest()


def is_diffusers(folder: Path) -> bool:
    return (folder / DIFFUSERS_INDEX).is_file() or (
        (folder / "transformer").is_dir() and not any((folder / name).is_dir() for name in EXPERTS)
    )


def place_in(folder: Path, role: str) -> Path:
    """Where a part lies in a checkpoint folder, or should."""
    if is_diffusers(folder):
        return folder / DIFFUSERS_PLACES[role]
    place = folder / PUBLISHED_PLACES[role]
    if role in ("text_encoder", "vae"):
        there = [path for suffix in SUFFIXES if (path := place.with_name(place.name + suffix)).exists()]
        return there[0] if there else place.with_name(f"{place.name}.pth")
    return place


def open_piece(role: str, path: Path, in_base: bool) -> Piece:
    """Open one part's headers and config. in_base: in a checkpoint folder, where an expert has a config.json; a part
    that was named may do without, and may be a whole checkpoint folder that has the part. Raises RequestError."""
    if not in_base and path.is_dir() and (inside := place_in(path, role)).exists():
        return open_piece(role, inside, in_base=True)
    if not path.exists():
        raise MissingFiles([path])
    if role == "tokenizer":
        open_checked(path / "tokenizer.json")
        return path
    if role not in EXPERTS:
        return publish(find_tensors(path), TEXT_ENCODER if role == "text_encoder" else VAE)
    missing: MissingFiles | None = None
    told: dict[str, Any] = {}
    config = path / "config.json"
    try:
        told = read_config(config) if path.is_dir() and (in_base or config.exists()) else {}
    except MissingFiles as error:
        missing = error
    try:
        tensors = publish(find_tensors(path), EXPERT)
    except MissingFiles as error:
        raise MissingFiles([*(missing.paths if missing else ()), *error.paths]) from None
    if missing:
        raise missing
    return Expert(role, tensors, sizes_of(tensors, told))


def open_pieces(folder: Path | None, parts: Parts) -> dict[str, Piece | RequestError]:
    """Every part, or why it cannot be opened."""
    pieces: dict[str, Piece | RequestError] = {}
    places = {role: place_in(folder, role) for role in ROLES} if folder else {}
    named = parts.named()
    for role, path in {**places, **named}.items():
        try:
            pieces[role] = open_piece(role, path, role not in named)
        except RequestError as error:
            pieces[role] = error
    return pieces


def open_checkpoint(folder: Path | None, task: str = DEFAULT_TASK, parts: Parts = Parts()) -> Checkpoint:
    """Read every header and config, check that nothing is missing and that the parts belong together.

    folder: the base; None where `parts` names everything. Raises RequestError naming the file at fault, or everything
    that is missing.
    """
    named = parts.named()
    if folder and not named.keys() & set(EXPERTS):
        check_is_checkpoint(folder)
    pieces = open_pieces(folder, parts)
    errors = [piece for piece in pieces.values() if isinstance(piece, RequestError)]
    missing = [path for error in errors if isinstance(error, MissingFiles) for path in error.paths]
    if broken := next((error for error in errors if not isinstance(error, MissingFiles)), None):
        raise broken
    if missing:
        raise MissingFiles(missing)
    opened: dict[str, Any] = dict(pieces)
    experts = {name: opened.pop(name) for name in MODEL_SPECS[task].experts}
    warnings = check_pair(experts, named)
    return Checkpoint(
        folder or next(iter(experts.values())).label.parent,
        folder.resolve().name if folder else "parts",
        experts,
        **opened,
        boundary=read_boundary(folder) if folder and not named.keys() & experts.keys() else None,
        warnings=warnings,
    )


def check_is_checkpoint(folder: Path) -> None:
    """Some expert must be in a base folder; what else it may be is said. Raises RequestError."""
    refuse_single_transformer(folder)
    if any(place_in(folder, name).exists() for name in EXPERTS):
        return
    loose = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    said = f"{folder}: not a checkpoint: no {EXPERTS[0]}/ and {EXPERTS[1]}/ in it"
    if loose:
        flags = " FILE ".join(FLAGS.values())
        raise RequestError(f"{said}, but {loose[0]}", hint=f"say which file is what: {flags} FOLDER")
    raise RequestError(said, hint=DOWNLOAD_HINT)


def check_pair(experts: dict[str, Expert], named: dict[str, Path]) -> list[str]:
    """The experts must be of one size, each in its place, and not the same one twice. Warnings; raises RequestError."""
    warnings = []
    for (name, expert), side in zip(experts.items(), EXPERT_SIDES, strict=True):
        if said := check_side(named.get(name, expert.label), side, expert.tensors, expert.config):
            warnings.append(said)
    first, second = experts.values()
    for key in sorted((first.config.keys() & second.config.keys()) - {"_diffusers_version", "_name_or_path"}):
        if first.config[key] != second.config[key]:
            raise RequestError(
                f"{first.label.parent}: the experts differ: {key} is {first.config[key]} in {first.label.name}, "
                f"{second.config[key]} in {second.label.name}"
            )
    if same_content(first.tensors, second.tensors):
        said = f"{first.label} and {second.label} are the same expert: both are the same file content"
        # Links within one folder were made on purpose, to save the disk in tests of memory and speed.
        if named.keys() & experts.keys() or not same_files(first.tensors, second.tensors):
            raise RequestError(said, hint="name one high-noise and one low-noise expert")
        warnings.append(f"{said}: the videos will be noise")
    return warnings


def read_boundary(folder: Path) -> float | None:
    """A Diffusers folder's `boundary_ratio`, where it says one. Its scheduler's shift and its guidance are not taken
    over: the published recipe stays the default. Raises RequestError."""
    path = folder / DIFFUSERS_INDEX
    if not path.is_file():
        return None
    open_checked(path)
    try:
        boundary = json.loads(path.read_text(encoding="utf-8")).get("boundary_ratio")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path}: not a Diffusers index: {error}") from None
    if boundary is not None and (not isinstance(boundary, int | float) or not 0 <= boundary <= 1):
        raise RequestError(f"{path}: boundary_ratio is {boundary!r}, not a fraction")
    return None if boundary is None else float(boundary)
