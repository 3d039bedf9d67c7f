"""A checkpoint of random numbers, drawn where they are wanted: the published sizes without a file, for measurements.

The numbers depend on a tensor's name and place in it alone, so that a model is the same whatever its placement, and
another program's copy of it is too. The videos are noise; the work and the memory are the real model's.
"""

import json
import math
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan22.checkpoint import EXPERTS, TOKENIZER, Checkpoint, Expert
from wan22.config import configs_dir, data_dir
from wan22.files.part_shapes import text_encoder_shapes, vae_shapes
from wan22.model import TransformerConfig, WanTransformer

Shapes = Mapping[str, tuple[int, ...]]
DRAWN = 1 << 22  # numbers at a time: 16 MiB beside the target


@dataclass(frozen=True)
class RandomTensors:
    """A source of tensors (see tensor_files.TensorSource) that reads no file. device: where the numbers are drawn;
    zeros: none are, for where memory alone is looked at."""

    path: Path
    shapes: Shapes
    device: torch.device
    files: list[Path] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    zeros: bool = False

    @property
    def dtypes(self) -> dict[str, str]:
        return dict.fromkeys(self.shapes, "F32")

    @property
    def sizes(self) -> dict[str, int]:
        return {name: 4 * math.prod(shape) for name, shape in self.shapes.items()}

    def read(self, targets: Mapping[str, Tensor], begins: Mapping[str, int] | None = None) -> None:
        """Fill every target; done when it returns, as reading from files is."""
        for name, target in targets.items():
            if self.zeros:
                target.zero_()
            elif begins and name in begins:
                whole = torch.empty(self.shapes[name], dtype=target.dtype, device=target.device)
                self._draw(name, whole)
                target.copy_(whole.view(-1)[begins[name] :][: target.numel()].view_as(target))
            else:
                self._draw(name, target)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _draw(self, name: str, target: Tensor) -> None:
        """Activations keep their size through the layers: ones for norms, zero biases, 1/√fan-in for the rest."""
        if name.endswith("bias") and "pos_embedding" not in name:
            target.zero_()
        elif "norm" in name or name.endswith("gamma"):
            target.fill_(1)
        else:
            shape = self.shapes[name]
            fan_in = shape[-1] if name.endswith("modulation") else max(1, math.prod(shape[1:]))
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
            for piece in target.view(-1).split(DRAWN):
                drawn = torch.randn(len(piece), generator=generator, device=self.device).mul_(fan_in**-0.5)
                piece.copy_(drawn.to(target.dtype))

    def warm(self, stop: threading.Event) -> None:
        """There is no file to read ahead."""


def random_checkpoint(
    device: torch.device, layers: int | None = None, sizes: Mapping[str, int] | None = None,
    text: Mapping[str, int] | None = None, vae_width: int = 96, zeros: bool = False,
) -> Checkpoint:  # fmt: skip
    """Both experts, text encoder and VAE of the published sizes, in no memory yet; the tokenizer is the demo's.

    layers, sizes, text: other numbers than the published ones, by `TransformerConfig`'s and `text_encoder_shapes`'.
    zeros: all numbers are.
    """

    def source(name: str, shapes: Shapes) -> RandomTensors:
        return RandomTensors(Path(f"random {name}"), shapes, device, zeros=zeros)

    config = json.loads((configs_dir() / "Wan2.2-T2V-A14B" / EXPERTS[0] / "config.json").read_text(encoding="utf-8"))
    config |= {**(sizes or {}), **({"num_layers": layers} if layers else {})}
    known = {key: value for key, value in config.items() if key in TransformerConfig.__dataclass_fields__}
    known.pop("patch_size", None)
    with torch.device("meta"):
        model = WanTransformer(TransformerConfig(**known))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Checkpoint(
        Path("random"), "random", {name: Expert(name, source(name, shapes), known) for name in EXPERTS},
        source("text encoder", text_encoder_shapes(**(text or {}))), source("VAE", vae_shapes(vae_width)),
        data_dir("demo") / TOKENIZER,
    )  # fmt: skip
