"""What an expert's files tell: its sizes, whether it is another model, which of the two experts it is."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan22.config import RequestError
from wan22.files.layouts import Published
from wan22.files.tensor_files import FileTensors, TensorSource, open_checked
from wan22.files.tensor_names import published_config

HEAD_DIM = 128  # of every published model: how many heads there are, where nothing tells
PATCH = (1, 2, 2)
REQUIRED_SIZES = ("dim", "ffn_dim", "num_heads", "num_layers")
THIS_TOOL = "this tool makes videos from text (t2v) with Wan2.2-T2V-A14B"


# --- sizes -----------------------------------------------------------------------------------------------------------
def read_config(path: Path) -> dict[str, Any]:
    """An expert's config.json, published or Diffusers', in published keys. Raises RequestError."""
    open_checked(path)
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        config = published_config(config) if "num_attention_heads" in config else config
        sizes = {name: config[name] for name in REQUIRED_SIZES}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{path}: not an expert's config: {error}") from None
    except KeyError as error:
        raise RequestError(f"{path}: not an expert's config: misses {error}") from None
    for name, value in sizes.items():
        if not isinstance(value, int) or not 0 < value < 1 << 20:
            raise RequestError(f"{path}: {name} is {value!r}")
    _check_heads(path, sizes["dim"], sizes["num_heads"])
    if said := other_model(config.get("model_type"), config.get("in_dim"), config["dim"]):
        raise RequestError(f"{path}: {said}; {THIS_TOOL}")
    if tuple(config.pop("patch_size", PATCH)) != PATCH:
        raise RequestError(f"{path}: patches other than {PATCH}; {THIS_TOOL}")
    return config


def sizes_of(tensors: TensorSource, config: Mapping[str, Any]) -> dict[str, Any]:
    """An expert's whole config in published keys: what `config` says, what the shapes say of the rest. Raises
    RequestError where the tensors are another model's."""
    path, shapes = tensors.path, tensors.shapes
    try:
        dim, channels = shapes["patch_embedding.weight"][:2]
        sizes = {
            "dim": dim,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "num_heads": _told_heads(tensors.metadata) or max(1, dim // HEAD_DIM),
            "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if re.match(r"blocks\.\d+\.", name)),
            "in_dim": channels,
            "out_dim": shapes["head.head.weight"][0] // math.prod(PATCH),
            "freq_dim": shapes["time_embedding.0.weight"][1],
        }
    except (KeyError, ValueError, IndexError) as error:
        raise RequestError(f"{path}: not a Wan transformer: misses {error}") from None
    embeds_images = any(name.startswith("img_emb.") for name in shapes)
    if said := other_model(None, channels, dim, embeds_images):
        raise RequestError(f"{path}: {said}; {THIS_TOOL}")
    sizes |= config
    _check_heads(path, sizes["dim"], sizes["num_heads"])
    return sizes


def _check_heads(path: Path, dim: int, heads: int) -> None:
    if dim % heads:
        raise RequestError(f"{path}: {heads} heads do not divide a width of {dim}")


def _told_heads(metadata: Mapping[str, Any]) -> int | None:
    """The number of heads in a file's own metadata: GGUF's key, or a JSON config under `config`."""
    heads = metadata.get("wan.attention.head_count")
    try:
        config = json.loads(metadata.get("config", "{}"))
        config = config.get("transformer", config)
        heads = heads or config.get("num_heads") or config.get("num_attention_heads")
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass  # somebody else's metadata
    return heads if isinstance(heads, int) and heads > 0 else None


# --- which model -----------------------------------------------------------------------------------------------------
def other_model(model_type: str | None, channels: int | None, dim: int, embeds_images: bool = False) -> str | None:
    """Which other model of the family it is, in words; None for text-to-video of 16 channels. Wan2.1-T2V-14B has the
    very shapes of this one's experts: it cannot be told."""
    if channels == 48:
        return f"the 5B model of Wan2.2 (TI2V-5B: 48 channels, width {dim})"
    if channels == 36 or embeds_images:
        version = " of Wan2.1, with image embeddings" if embeds_images else ""
        return f"an image-to-video model (i2v){version}: {channels} input channels"
    if model_type not in (None, "t2v"):
        return f"a {model_type!r} model"
    if channels not in (None, 16):
        return f"a model of {channels} input channels, where text-to-video has 16"
    if dim == 1536:
        return "the 1.3B model of Wan2.1 (width 1536)"
    return None


def refuse_single_transformer(folder: Path) -> None:
    """A checkpoint folder of one transformer where there should be two: say which model it is. Raises RequestError."""
    config = folder / "config.json"  # published
    if (index := folder / "model_index.json").is_file():
        config = folder / "transformer" / "config.json"
        # A pair of nulls says that there is no such part; a part that is told and not there is missing.
        if any(_json_table(index).get("transformer_2", ())):
            return
    if config.is_file() and "Wan" in str(_json_table(config).get("_class_name")):
        read_config(config)  # says itself what is another model by its sizes
        raise RequestError(f"{folder}: one transformer where Wan2.2-T2V-A14B has two: Wan2.1-T2V-14B, by its sizes")


def _json_table(path: Path) -> dict[str, Any]:
    open_checked(path)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{path}: not a table in JSON: {error}") from None


# --- which expert ----------------------------------------------------------------------------------------------------
NOISE = re.compile(r"(high|low)[-_ .]?noise", re.IGNORECASE)


def _side_in(text: Any) -> str | None:
    sides = {match[1].lower() for match in NOISE.finditer(str(text))}
    return sides.pop() if len(sides) == 1 else None


def told_side(path: Path, tensors: TensorSource, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """`high` or `low` where it is told, and by what: metadata, the config's origin, a folder's name. path: as given."""
    for key in ("general.name", "general.basename", "name", "modelspec.title"):
        if side := _side_in(tensors.metadata.get(key, "")):
            return side, f"its metadata, {key}"
    origin = str(config.get("_name_or_path", ""))
    if side := _side_in(origin) or _diffusers_side(Path(origin).name if "/" in origin else ""):
        return side, f"its config, which says {origin}"
    folder = (path if path.is_dir() else path.parent).absolute()
    if side := _side_in(folder.name):
        return side, f"its folder, {folder.name}"
    if (side := _diffusers_side(folder.name)) and (folder.parent / "model_index.json").exists():
        return side, f"its folder, {folder.name}, as Diffusers names them"
    return None


def _diffusers_side(folder: str) -> str | None:
    return {"transformer": "high", "transformer_2": "low"}.get(folder)


def check_side(path: Path, side: str, tensors: TensorSource, config: Mapping[str, Any]) -> str | None:
    """Refuse an expert that is told to be the other one; a warning where only its file's name says so. Raises
    RequestError."""
    if (told := told_side(path, tensors, config)) and told[0] != side:
        raise RequestError(f"{path}: the {told[0]}-noise expert by {told[1]}, given as the {side}-noise one",
                           hint="the two are swapped: --high-noise takes the high-noise one")  # fmt: skip
    named = None if told else _side_in(path.name)
    return f"{path.name} is given as the {side}-noise expert; its name says {named} noise" if named not in (
        None, side) else None  # fmt: skip


def same_content(first: TensorSource, second: TensorSource, samples: int = 8, length: int = 4096) -> bool:
    """Whether two experts hold the same numbers, by pieces of some of their tensors, large and small, in whatever
    files; other dtypes are other numbers."""
    one, two = (_entries(tensors) for tensors in (first, second))
    names = sorted(one, key=lambda name: (-one[name].nbytes, name))[:: max(1, len(one) // samples)]
    for name in names:
        if name not in two or (one[name].dtype, one[name].nbytes) != (two[name].dtype, two[name].nbytes):
            return False
        pieces = []
        for entry in (one[name], two[name]):
            with open(entry.path, "rb") as file:
                file.seek(entry.offset + max(0, entry.nbytes - length) // 2)
                pieces.append(file.read(min(length, entry.nbytes)))
        if pieces[0] != pieces[1]:
            return False
    return bool(names)


def same_files(first: TensorSource, second: TensorSource) -> bool:
    """Whether two experts are links to the same files: made on purpose, for tests of speed and memory."""
    files = [[path.stat() for path in tensors.files if path.suffix != ".json"] for tensors in (first, second)]
    inodes = [{(state.st_dev, state.st_ino) for state in states} for states in files]
    return inodes[0] == inodes[1]


def _entries(tensors: TensorSource) -> Mapping[str, Any]:
    return tensors.entries if isinstance(tensors, FileTensors | Published) else {}
