"""Any checkpoint → one folder in the published layout, all of it sharded safetensors, in bf16 or fp8.

bf16: what the exact recipe casts to bf16 is stored so, what it keeps in float32 stays as it was: a run from the
converted folder is bit-identical to one from the float32 shards. fp8: also the blocks' matrices of experts and text
encoder as float8_e4m3fn with a float32 scale a row (`NAME.weight_scale` [rows, 1], and `_quantization_metadata` in the
file's own: ComfyUI's scheme). The VAE stays as it is.

Every shard's header is known from the shapes, so a shard is written from its start to its end, a few tensors at a time,
under a temporary name. The folder is staged beside its target with a note of what it is made from; a killed run goes on
from there, and the target appears when it is whole.
"""

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import torch
from tqdm import tqdm

from wan22.checkpoint import INDEX, TEXT_ENCODER_STEM, TOKENIZER, VAE_STEM, Checkpoint, Expert
from wan22.config import DoesNotFit, RequestError, RunError
from wan22.files.expert_files import same_content
from wan22.files.layouts import Published
from wan22.files.reading import ITEM_BYTES, torch_dtypes
from wan22.files.tensor_files import TensorSource
from wan22.load import empty_expert
from wan22.network.target import NOT_WRITABLE
from wan22.output.names import DISK_FULL, sync
from wan22.text_encoder import check_text_encoder
from wan22.vae import check_vae
from wan22.video import check_folder

DTYPES = ("bf16", "fp8")
MAX_SHARD = 5_000_000_000  # bytes of tensors
BATCH = 256 << 20  # bytes of tensors read at a time, or one tensor
ALIGNMENT = 64
STATE = ".wan22-convert.json"
VERSION = 1  # of what a converted folder is made like; another one cannot be gone on with
FP8, FP8_FORMAT, FP8_LARGEST = "F8_E4M3", "float8_e4m3fn", 448.0
QUANTIZED = re.compile(  # the blocks' products, of experts and of the text encoder
    r"blocks\.\d+\.(?:(?:self_|cross_)?attn\.[qkvo]|ffn\.(?:0|2|gate\.0|fc1|fc2))\.weight"
)
KEPT = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Output:
    """One tensor to write; `scales` one a row to be written after it, under `NAME_scale`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scaled: bool = False

    @property
    def stored(self) -> "list[tuple[str, str, tuple[int, ...]]]":
        """Name, dtype and shape of what is in the file."""
        own = (self.name, self.dtype, self.shape)
        return [own, (f"{self.name}_scale", "F32", (self.shape[0], 1))] if self.scaled else [own]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in self.stored)


@dataclass(frozen=True)
class Shard:
    """One file to write: where, from which tensors, what."""

    path: str  # in the folder
    tensors: TensorSource
    outputs: list[Output]

    @property
    def header(self) -> bytes:
        """The file up to its first tensor. Source: the safetensors format, "Format" section."""
        scaled = [output.name.removesuffix(".weight") for output in self.outputs if output.scaled]
        layers = {layer: {"format": FP8_FORMAT} for layer in scaled}
        told = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
        table: dict[str, Any] = {"__metadata__": {"format": "pt", **told}}
        end = 0
        for name, dtype, shape in (stored for output in self.outputs for stored in output.stored):
            start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(output.nbytes for output in self.outputs)


@dataclass
class Plan:
    """The whole folder: shards to write, and small files with their bytes."""

    shards: list[Shard] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, stem: str, tensors: TensorSource, outputs: Iterable[Output], always_index: bool = False) -> None:
        """A part's shards under `stem`, with an index where there are several."""
        groups = list(_groups(sorted(outputs, key=lambda output: _in_order(output.name))))
        names = [f"{stem}-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
        if len(groups) == 1 and not always_index:
            names = [f"{stem}.safetensors"]
        else:
            weight_map = {stored[0]: Path(name).name for name, group in zip(names, groups, strict=True)
                          for output in group for stored in output.stored}  # fmt: skip
            total = sum(output.nbytes for group in groups for output in group)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.files[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=2).encode()
        self.shards += [Shard(name, tensors, group) for name, group in zip(names, groups, strict=True)]


def _in_order(name: str) -> list[Any]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _groups(outputs: Iterable[Output]) -> Iterator[list[Output]]:
    group: list[Output] = []
    for output in outputs:
        if group and sum(other.nbytes for other in group) + output.nbytes > MAX_SHARD:
            yield group
            group = []
        group.append(output)
    yield group


# --- what to write ---------------------------------------------------------------------------------------------------
def plan_conversion(checkpoint: Checkpoint, dtype: str) -> Plan:
    """Every file of the converted folder, from headers alone; names and shapes are checked. Raises RequestError."""
    check_text_encoder(checkpoint)
    check_vae(checkpoint)
    plan = Plan()
    for name, expert in checkpoint.experts.items():
        declared = {key: tensor.dtype for key, tensor in empty_expert(expert, torch.bfloat16).state_dict().items()}
        plan.add(f"{name}/{INDEX.removesuffix('.safetensors.index.json')}", expert.tensors,
                 _outputs(expert.tensors, dtype, declared), always_index=True)  # fmt: skip
        plan.files[f"{name}/config.json"] = _config(expert)
    plan.add(TEXT_ENCODER_STEM, checkpoint.text_encoder, _outputs(
        checkpoint.text_encoder, dtype, dict.fromkeys(checkpoint.text_encoder.shapes, torch.bfloat16)))  # fmt: skip
    plan.add(VAE_STEM, checkpoint.vae, _outputs(
        checkpoint.vae, "bf16", dict.fromkeys(checkpoint.vae.shapes, torch.float32)))  # fmt: skip
    if (model_hub := checkpoint.folder / "configuration.json").is_file():
        plan.files[model_hub.name] = model_hub.read_bytes()
    for path in sorted(path for path in checkpoint.tokenizer.iterdir() if path.is_file()):
        plan.files[f"{TOKENIZER}/{path.name}"] = path.read_bytes()
    return plan


def _outputs(tensors: TensorSource, dtype: str, declared: Mapping[str, torch.dtype]) -> Iterator[Output]:
    """declared: what a run with bf16 weights casts each tensor to."""
    for name, shape in tensors.shapes.items():
        if declared[name] == torch.bfloat16:
            quantized = dtype == "fp8" and QUANTIZED.fullmatch(name) is not None
            yield Output(name, FP8 if quantized else "BF16", shape, quantized)
        else:
            stored = tensors.dtypes[name]
            scaled = isinstance(tensors, Published) and name in tensors.scaled
            # Wider than it was would only take room; what has to be computed first, float32 holds as it comes.
            plain_fp8 = stored.startswith("F8_") and not scaled
            yield Output(name, "BF16" if plain_fp8 else stored if stored in KEPT and not scaled else "F32", shape)


def _config(expert: Expert) -> bytes:
    told = {key: value for key, value in expert.config.items() if key != "_name_or_path"}
    return json.dumps({"_class_name": "WanModel", "model_type": "t2v", **told}, indent=2, sort_keys=True).encode()


# --- writing it ------------------------------------------------------------------------------------------------------
def convert(checkpoint: Checkpoint, target: Path, dtype: str = "bf16", progress: bool = True) -> Path:
    """Write the folder `target`, or go on where a killed run stopped; progress: a bar on stderr.

    Raises RequestError where `target` is in the way or cannot be written, DoesNotFit where the disk lacks room or
    fills up, RunError where it fails otherwise.
    """
    if dtype not in DTYPES:
        raise RequestError(f"--dtype {dtype}: unknown dtype", hint=f"known: {', '.join(DTYPES)}")
    target = target.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise RequestError(f"{target}: exists already", hint="name a new folder; a converted one is never overwritten")
    high, low = (expert.tensors for expert in checkpoint.experts.values())
    if same_content(high, low):
        raise RequestError("the two experts are the same one: nothing to convert")
    plan = plan_conversion(checkpoint, dtype)
    staged = target.with_name(f".{target.name}.partial")
    check_folder(staged)
    note = json.dumps({"source": checkpoint.identity(), "dtype": dtype, "version": VERSION}).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target), _kept_if_worth(staged, plan.shards):
            _stage(staged, note)
            left = [shard for shard in plan.shards if not _is_finished(staged / shard.path, shard)]
            _check_room(target, sum(shard.nbytes for shard in left) + sum(map(len, plan.files.values())))
            with tqdm(total=sum(shard.nbytes for shard in left), desc="convert", unit="B", unit_scale=True,
                      disable=not progress, file=sys.stderr) as bar:  # fmt: skip
                for shard in left:
                    write_shard(shard, staged / shard.path, bar)
            for name, content in plan.files.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).write_bytes(content)
            for folder in (*(path for path in staged.rglob("*") if path.is_dir()), staged):
                sync(folder)
            if target.exists():
                target.rmdir()
            staged.rename(target)
            (target / STATE).unlink()
    except filelock.Timeout:
        raise RequestError(f"{target}: is being written by another conversion") from None
    except OSError as error:
        said = f"{error.filename or target}: cannot be written: {error.strerror or error}"
        if error.errno in NOT_WRITABLE:
            raise RequestError(said, hint="name another folder") from None
        kind = DoesNotFit if error.errno in DISK_FULL else RunError
        raise kind(said, hint="finished shards are kept: the same command goes on from there") from None
    return target


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """The one process that writes `target`. Raises filelock.Timeout for another."""
    lock = filelock.FileLock(target.with_name(f".{target.name}.lock"))
    with lock.acquire(timeout=0):
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)


@contextlib.contextmanager
def _kept_if_worth(staged: Path, shards: list[Shard]) -> Iterator[None]:
    """After an error in here, what is staged stays where some shard of it is finished, to go on from."""
    try:
        yield
    except BaseException:
        ours = (staged / STATE).is_file()
        if ours and not any(_is_finished(staged / shard.path, shard) for shard in shards):
            shutil.rmtree(staged, ignore_errors=True)
        raise


def _stage(staged: Path, note: bytes) -> None:
    """The folder to write in: as it is, where it was made from the same source with the same settings; else empty."""
    if staged.is_dir() and any(staged.iterdir()):
        if not (staged / STATE).is_file():
            raise RequestError(f"{staged}: is in the way, and no conversion's")
        if (staged / STATE).read_bytes() != note:
            shutil.rmtree(staged)
    staged.mkdir(exist_ok=True)
    (staged / STATE).write_bytes(note)
    for half in staged.rglob("*.half"):
        half.unlink()


def _is_finished(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.nbytes


def _check_room(target: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(target.parent).free):
        raise DoesNotFit(f"{target}: needs {needed:,} bytes of disk, {free:,} are free there",
                         hint="name a folder on another disk")  # fmt: skip


def write_shard(shard: Shard, path: Path, bar: Any) -> None:
    """Header, then the tensors in order; renamed when it is whole and on the disk. bar: has `update(bytes)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.half")
    with open(half, "wb") as file:
        file.write(shard.header)
        bar.update(len(shard.header))
        room = _Room()
        for batch in _batches(shard.outputs):
            room.clear(batch)
            for tensor in _made(shard.tensors, batch, room):
                file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
                bar.update(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())
    assert half.stat().st_size == shard.nbytes
    half.replace(path)


def _batches(outputs: Iterable[Output]) -> Iterator[list[Output]]:
    """Tensors to read at a time: one that needs arithmetic, or some that need none."""
    batch: list[Output] = []
    for output in outputs:
        if batch and (output.scaled or batch[-1].scaled or sum(o.nbytes for o in batch) + output.nbytes > BATCH):
            yield batch
            batch = []
        batch.append(output)
    if batch:
        yield batch


class _Room:
    """Memory for the tensors of a batch, used again for the next: taking it from the system anew took a third of a
    conversion's time."""

    def __init__(self) -> None:
        self.memory, self.taken = torch.empty(0, dtype=torch.uint8), 0

    def clear(self, batch: list[Output]) -> None:
        """Make room for a batch: its tensors, and in float32 those that are to be quantized, each on a boundary."""
        wanted = sum(output.nbytes + 4 * output.scaled * math.prod(output.shape) + 2 * ALIGNMENT for output in batch)
        if wanted > len(self.memory):
            self.memory = torch.empty(0)  # let go first
            self.memory = torch.empty(wanted, dtype=torch.uint8)
        self.taken = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor, good until `clear`."""
        start, size = self.taken, math.prod(shape) * dtype.itemsize
        self.taken += -(-size // ALIGNMENT) * ALIGNMENT
        return self.memory[start : start + size].view(dtype).view(shape)


def _made(tensors: TensorSource, batch: list[Output], room: _Room) -> list[torch.Tensor]:
    """The tensors of a batch as they are stored, a scaled one followed by its scales."""
    if batch[0].scaled:
        return list(_fp8(tensors, batch[0], room))
    targets = {output.name: room.take(output.shape, torch_dtypes()[output.dtype]) for output in batch}
    tensors.read(targets)
    return list(targets.values())


def _fp8(tensors: TensorSource, output: Output, room: _Room) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as float8_e4m3fn, and the scales of its rows [rows, 1] float32; the source's own, where it has that."""
    name, rows = output.name, output.shape[0]
    numbers = room.take(output.shape, torch.float8_e4m3fn)
    if tensors.dtypes[name] == FP8:
        scale = torch.ones(1)
        if isinstance(tensors, Published):
            tensors.read_stored(name, numbers)
            scale = tensors.scale(name) if name in tensors.scaled else scale
        else:
            tensors.read({name: numbers})
        return numbers, scale.view(-1, 1).expand(rows, 1).contiguous()
    matrix = room.take(output.shape, torch.float32)
    tensors.read({name: matrix})
    scale = torch.maximum(matrix.amax(1, keepdim=True), -matrix.amin(1, keepdim=True)) / FP8_LARGEST
    scale[scale == 0] = 1.0
    numbers.copy_(matrix.div_(scale).clamp_(-FP8_LARGEST, FP8_LARGEST))
    return numbers, scale
