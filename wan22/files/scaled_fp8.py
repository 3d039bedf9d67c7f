"""Scaled fp8: which tensors of a file are weights, which are their scales, and whether any is missing.

weight = fp8 number × scale, of the whole tensor or of each row. Older files mark themselves with a tensor `scaled_fp8`
and keep `LAYER.scale_weight`; newer ones have `LAYER.weight_scale` and say so in `LAYER.comfy_quant` (bytes of JSON) or
in the file's metadata. Files that were only cast to fp8 say nothing. Sources: ComfyUI's `QUANTIZATION.md` and
`convert_old_quants`.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan22.config import RequestError
from wan22.files.tensor_files import FileTensors, Pickle
from wan22.files.tensor_names import unprefixed

SENTINEL = "scaled_fp8"
SCALES = {".scale_weight": "scaled fp8 (old keys)", ".weight_scale": "scaled fp8"}
INPUT_SCALES = (".scale_input", ".input_scale")  # of activations, for 8-bit products; weights do not need them
UNSUPPORTED = (".weight_scale_2", ".pre_quant_scale", ".weight_scalar", ".weight_zero_point")
QUANT, QUANT_METADATA = ".comfy_quant", "_quantization_metadata"
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
OTHER_FORM = "take its fp16, bf16, scaled fp8 (a scale a tensor or row) or GGUF form"


class Quantized:
    """A file's tensors told apart: plain ones, and what scales them.

    plain: stored names; scales: stored weight → stored scale; scheme: in words, empty where nothing is scaled.
    """

    def __init__(self, source: FileTensors | Pickle) -> None:
        """Raises RequestError for a scheme that cannot be read, and where a scale that the file promises is missing."""
        self.plain: list[str] = []
        self.scales: dict[str, str] = {}
        self.scheme = ""
        path, promised, whole = source.path, {unprefixed(layer) for layer in _layers_in_metadata(source)}, False
        for name in source.shapes:
            if suffix := next((suffix for suffix in SCALES if name.endswith(suffix)), None):
                self.scales[name.removesuffix(suffix) + ".weight"], self.scheme = name, SCALES[suffix]
            elif name.endswith(UNSUPPORTED):
                raise RequestError(f"{path}: {name}: a quantization that cannot be read here", hint=OTHER_FORM)
            elif name.endswith(QUANT):
                promised.add(unprefixed(name.removesuffix(QUANT)))
                _check_format(path, name, _json_in(source, name))
            elif unprefixed(name) == SENTINEL:
                whole = True
            elif not name.endswith(INPUT_SCALES):
                self.plain.append(name)
        for weight, scale in self.scales.items():
            if weight not in source.shapes:
                raise RequestError(f"{path}: {scale} scales {weight}, which is not there")
            shape, whose = source.shapes[scale], source.shapes[weight]
            if math.prod(shape) != 1 and shape not in ((whose[0],), (whose[0], 1)):
                said = f"{path}: {scale} {list(shape)} is neither one number nor one a row of {list(whose)}"
                raise RequestError(said, hint=OTHER_FORM)
        for name in self.plain:
            scaled = whole or unprefixed(name.removesuffix(".weight")) in promised
            if scaled and name not in self.scales and source.dtypes[name].startswith("F8_"):
                raise RequestError(f"{path}: says that its fp8 weights are scaled, and lacks the scale of {name}")


def _json_in(source: FileTensors | Pickle, name: str) -> Any:
    """A small tensor of bytes that holds JSON. Raises RequestError."""
    if isinstance(source, Pickle):
        raise RequestError(f"{source.path}: {name}: quantized weights are not read from a pickle", hint=OTHER_FORM)
    try:
        return json.loads(source.bytes_of(name))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{source.path}: {name} is not JSON: {error}") from None


def _check_format(path: Path, name: str, told: Any) -> None:
    kind = told.get("format") if isinstance(told, dict) else told
    if not str(kind).startswith(FP8_FORMATS):
        raise RequestError(f"{path}: {name}: quantized as {kind!r}, which cannot be read here", hint=OTHER_FORM)


def _layers_in_metadata(source: FileTensors | Pickle) -> Iterator[str]:
    """The layers that the metadata of a file, or of any of its shards, calls quantized. Raises RequestError."""
    for metadata in source.each_metadata:
        if QUANT_METADATA not in metadata:
            continue
        try:
            layers = dict(json.loads(metadata[QUANT_METADATA])["layers"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RequestError(f"{source.path}: broken {QUANT_METADATA}: {error!r}") from None
        for layer, told in layers.items():
            _check_format(source.path, layer, told)
            yield layer
