"""Random weights in the published layout: for memory and speed tests, and to see a whole run without 126 GB of files.

    python scripts/random_checkpoint.py random-T2V-A14B --dtype bf16 --link      # published size, 40 GB
    python scripts/random_checkpoint.py blocks-4 --layers 4 --only-experts       # 6 GB of float32 shards an expert

The videos are noise, the work is the real model's. Sizes default to configs/Wan2.2-T2V-A14B; `--link` makes the
low-noise expert hard links to the high-noise one's shards. The tokenizer is the demo's.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from wan22.checkpoint import INDEX, TEXT_ENCODER_STEM, TOKENIZER, VAE_STEM
from wan22.config import configs_dir, data_dir
from wan22.files.part_shapes import text_encoder_shapes, vae_shapes
from wan22.model import TransformerConfig, WanTransformer

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # safetensors' words
DRAWN = 1 << 24  # numbers at a time
Shapes = Mapping[str, tuple[int, ...]]


def random_pieces(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[torch.Tensor]:
    """A tensor's numbers, flat and in order; scaled so that activations keep their size through the layers: ones for
    norms, zero biases, 1/√fan-in else."""
    fan_in = shape[-1] if name.endswith("modulation") else max(1, torch.Size(shape[1:]).numel())
    left = torch.Size(shape).numel()
    while left:
        count = min(left, DRAWN)
        if name.endswith("bias") and "pos_embedding" not in name:
            yield torch.zeros(count, dtype=dtype)
        elif "norm" in name or name.endswith("gamma"):
            yield torch.ones(count, dtype=dtype)
        else:
            yield torch.empty(count, dtype=dtype, device=device).normal_(std=fan_in**-0.5).cpu()
        left -= count


def write_file(path: Path, shapes: Shapes, dtype: torch.dtype, device: str) -> None:
    """A safetensors file, written piece by piece: the text encoder at once would be 11 GB of the host's memory."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in random_pieces(name, shape, dtype, device):
                file.write(memoryview(piece.view(torch.uint8).numpy()))  # type: ignore[arg-type]


def shards(shapes: Shapes, dtype: torch.dtype, limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Consecutive tensors, each group of at most `limit` bytes (or one tensor)."""
    group: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if group and size + nbytes > limit:
            yield group
            group, size = {}, 0
        group[name], size = shape, size + nbytes
    yield group


def write_expert(folder: Path, config: dict, shapes: Shapes, dtype: torch.dtype, device: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    groups = list(shards(shapes, dtype, 5 << 30))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(groups):05}.safetensors"
        write_file(folder / file, group, dtype, device)
        weight_map |= dict.fromkeys(group, file)
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def expert_shapes(layers: int | None) -> tuple[dict, Shapes]:
    """The published config and an expert's shapes, with another number of layers where one is given."""
    config = json.loads((configs_dir() / "Wan2.2-T2V-A14B/high_noise_model/config.json").read_text())
    config["num_layers"] = layers or config["num_layers"]
    sizes = {key: value for key, value in config.items() if key in TransformerConfig.__dataclass_fields__}
    with torch.device("meta"):
        state = WanTransformer(TransformerConfig(**sizes)).state_dict()
    return config, {name: tuple(tensor.shape) for name, tensor in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the experts")
    parser.add_argument("--layers", type=int, help="instead of the published 40")
    parser.add_argument("--link", action="store_true", help="low-noise expert: links to the high-noise one's files")
    parser.add_argument("--only-experts", action="store_true", help="neither text encoder nor VAE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="draws the numbers")
    args = parser.parse_args()
    torch.manual_seed(0)
    config, shapes = expert_shapes(args.layers)
    high, low = args.folder / "high_noise_model", args.folder / "low_noise_model"
    write_expert(high, config, shapes, DTYPES[args.dtype], args.device)
    if args.link:
        low.mkdir()
        for file in high.iterdir():
            (low / file.name).hardlink_to(file)
    else:
        write_expert(low, config, shapes, DTYPES[args.dtype], args.device)
    if not args.only_experts:
        for file, table, dtype in (
            (TEXT_ENCODER_STEM, text_encoder_shapes(), torch.bfloat16),
            (VAE_STEM, vae_shapes(), torch.float32),
        ):
            write_file(args.folder / f"{file}.safetensors", table, dtype, args.device)
        shutil.copytree(data_dir("demo") / TOKENIZER, args.folder / TOKENIZER)
    print(args.folder)


if __name__ == "__main__":
    main()
