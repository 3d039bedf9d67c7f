"""What a checkpoint folder, or a file of weights, is: told from headers alone; only a pickle takes torch to open."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan22.checkpoint import ROLES, Expert, Parts, is_diffusers, open_checkpoint, open_pieces, place_in
from wan22.config import RequestError
from wan22.files.expert_files import read_config, sizes_of, told_side
from wan22.files.layouts import ADAPTER, EXPERT, WEIGHT_FILES, find_tensors, layout_of, publish, recognize
from wan22.files.tensor_files import MissingFiles, TensorSource, read_header
from wan22.network.verify import human

WIDTH = 80


def holds_weights(path: Path) -> bool:
    """Whether a path is a checkpoint's or a part's, rather than a video's or its latents'. Raises RequestError."""
    if path.is_dir():
        return any(place_in(path, role).exists() for role in ROLES) or any(
            file.suffix in WEIGHT_FILES for file in path.iterdir()
        )
    if path.suffix == ".safetensors" and path.is_file():
        return "latents" not in read_header(path)[0]
    return path.suffix in WEIGHT_FILES


def describe(path: Path) -> dict[str, Any]:
    """Plain facts of a checkpoint folder, or of one part's file or folder. Raises RequestError for neither.

    Of a checkpoint: `layout`, `parts` by role, `missing` and `broken` in words, `warnings`, `identity` where it is
    whole. Of a part: what it `is`, and as each of the parts.
    """
    if path.is_dir() and any(place_in(path, role).exists() for role in ROLES):
        return {"path": str(path), **_checkpoint(path)}
    return {"path": str(path), **_part(path)}


def _checkpoint(folder: Path) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    missing: list[str] = []
    broken: list[str] = []
    for role, piece in open_pieces(folder, Parts()).items():
        if isinstance(piece, MissingFiles):
            missing += [str(path.relative_to(folder)) for path in piece.paths]
        elif isinstance(piece, RequestError):
            broken.append(str(piece))
        elif not isinstance(piece, Path):
            try:
                parts[role] = _facts(piece.tensors if isinstance(piece, Expert) else piece)
            except RequestError as error:  # a pickle is opened only now
                broken.append(str(error))
    warnings, identity = [], None
    if not missing and not broken:
        try:
            checkpoint = open_checkpoint(folder)
            warnings, identity = checkpoint.warnings, checkpoint.identity()
        except RequestError as error:  # each part is good, and together they are not
            broken.append(str(error))
    return {"layout": "Diffusers" if is_diffusers(folder) else "published", "parts": parts, "missing": missing,
            "broken": broken, "warnings": warnings, "identity": identity}  # fmt: skip


def _part(path: Path) -> dict[str, Any]:
    source = find_tensors(path)
    if (form := recognize(source.shapes)) is None:
        first = next(iter(source.shapes), "none")
        raise RequestError(f"{path}: {len(source.shapes)} tensors of no model that is known here, the first: {first}")
    if form.kind == ADAPTER:
        return {"is": form.kind, **_facts(source), "layout": "adapter"}
    tensors = publish(source, form.kind)
    if form.kind != EXPERT:
        return {"is": form.kind, **_facts(tensors)}
    config = read_config(path / "config.json") if (path / "config.json").is_file() else {}
    side = told_side(path, tensors, config)
    return {"is": form.kind, "noise": side[0] if side else None, **_facts(tensors), "sizes": sizes_of(tensors, config)}


def _facts(tensors: TensorSource) -> dict[str, Any]:
    """Layout, parameters, bytes as stored, and parameters by stored dtype, of one part."""
    dtypes: Counter[str] = Counter()
    for name, shape in tensors.shapes.items():
        dtypes[tensors.dtypes[name]] += math.prod(shape)
    return {"layout": layout_of(tensors), "parameters": dtypes.total(), "bytes": sum(tensors.sizes.values()),
            "dtypes": dict(dtypes.most_common())}  # fmt: skip


# --- for people ------------------------------------------------------------------------------------------------------
def as_text(facts: Mapping[str, Any]) -> str:
    """Aligned lines of at most 80 columns."""
    return "\n".join([facts["path"], *(_checkpoint_lines(facts) if "parts" in facts else _part_lines(facts))])


def _checkpoint_lines(facts: Mapping[str, Any]) -> list[str]:
    whole = not facts["missing"] and not facts["broken"]
    lines = [f"{'layout':<12}{facts['layout']}{', whole' if whole else ', not whole'}", ""]
    lines.append(f"{'part':<18}{'parameters':>10}{'bytes':>11}  stored as")
    for role, part in facts["parts"].items():
        lines += _wrapped(f"{role:<18}{_count(part['parameters']):>10}{human(part['bytes']):>11}  ", _stored_as(part))
    lines.append("")
    for name in ("missing", "broken", "warnings"):
        for text in facts[name]:
            lines += _wrapped(f"{name.removesuffix('s'):<12}", text)
    return [*lines, f"{'identity':<12}{facts['identity']}"] if facts["identity"] else lines


def _part_lines(facts: Mapping[str, Any]) -> list[str]:
    rows = {"is": facts["is"] + (f", {facts['noise']} noise" if facts.get("noise") else "")}
    rows |= {"parameters": f"{facts['parameters']:,}", "bytes": f"{facts['bytes']:,}", "stored as": _stored_as(facts)}
    if "sizes" in facts:
        rows["sizes"] = ", ".join(f"{name} {value}" for name, value in facts["sizes"].items() if name[0] != "_")
    return [line for name, text in rows.items() for line in _wrapped(f"{name:<12}", text)]


def _count(number: int) -> str:
    """14.3 G, 764 k"""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return str(number)


def _stored_as(part: Mapping[str, Any]) -> str:
    shares = [f"{dtype} {count / part['parameters']:.0%}" for dtype, count in part["dtypes"].items()]
    return f"{part['layout']}; {', '.join(shares if len(shares) > 1 else part['dtypes'])}"


def _wrapped(start: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - len(start), break_long_words=False, break_on_hyphens=False) or [""]
    return [start + lines[0], *(" " * len(start) + line for line in lines[1:])]
