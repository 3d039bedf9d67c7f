"""Tiny checkpoints in every layout, written by diffusers, transformers, gguf, safetensors and torch; nothing of ours.

The experts are random, of width 256: two heads of 128, as where nothing tells, two blocks. Text encoder, VAE and
tokenizer are the golden ones.
"""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from conftest import TINY
from safetensors.torch import save_file

DIM, FFN, LAYERS, TEXT = 256, 512, 2, 64
EXPERTS = ("high_noise_model", "low_noise_model")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
CONFIG = {"_class_name": "WanModel", "dim": DIM, "eps": 1e-6, "ffn_dim": FFN, "freq_dim": 256, "in_dim": 16,
          "model_type": "t2v", "num_heads": 2, "num_layers": LAYERS, "out_dim": 16, "text_len": 512}  # fmt: skip
MODULES = [*(f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"), "ffn.0", "ffn.2"]
LINEARS = [f"blocks.{i}.{module}" for i in range(LAYERS) for module in MODULES]


def expert(seed: int, channels: int = 16, dim: int = DIM) -> dict[str, torch.Tensor]:
    """Random weights under published names, float32, scaled to keep activations' size."""
    shapes = {
        "patch_embedding.weight": (dim, channels, 1, 2, 2), "text_embedding.0.weight": (dim, TEXT),
        "text_embedding.2.weight": (dim, dim), "time_embedding.0.weight": (dim, 256),
        "time_embedding.2.weight": (dim, dim), "time_projection.1.weight": (6 * dim, dim),
        "head.head.weight": (64, dim), "head.modulation": (1, 2, dim),
    }  # fmt: skip
    for i in range(LAYERS):
        for kind in ("self_attn", "cross_attn"):
            shapes |= {f"blocks.{i}.{kind}.{x}.weight": (dim, dim) for x in "qkvo"}
            shapes |= {f"blocks.{i}.{kind}.norm_{x}.weight": (dim,) for x in "qk"}
        shapes |= {f"blocks.{i}.norm3.weight": (dim,), f"blocks.{i}.ffn.0.weight": (FFN, dim)}
        shapes |= {f"blocks.{i}.ffn.2.weight": (dim, FFN), f"blocks.{i}.modulation": (1, 6, dim)}
    for name, shape in list(shapes.items()):
        if name.endswith("weight") and "norm_" not in name:
            shapes[name.replace("weight", "bias")] = shape[:1]
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        fan_in = shape[-1] if name.endswith("modulation") else max(1, int(np.prod(shape[1:])))
        table[name] = 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else noise * (
            0.1 if len(shape) == 1 else fan_in**-0.5)  # fmt: skip
    return table


def text_encoder() -> dict[str, torch.Tensor]:
    return torch.load(TINY / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)


def vae() -> dict[str, torch.Tensor]:
    return torch.load(TINY / "Wan2.1_VAE.pth", weights_only=True)


def published(folder: Path, experts: dict[str, dict[str, torch.Tensor]], shards: int = 3) -> Path:
    """The published layout; the experts in shards of which one holds the odd tensors."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns(*EXPERTS))
    for name, table in experts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        weight_map = {}
        for number in range(shards):
            file = f"diffusion_pytorch_model-{number + 1:05}-of-{shards:05}.safetensors"
            shard = {key: table[key] for key in list(table)[number::shards]}
            save_file(shard, folder / name / file)
            weight_map |= dict.fromkeys(shard, file)
        (folder / name / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def diffusers_expert(table: dict[str, torch.Tensor]):
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = WanTransformer3DModel(
        num_attention_heads=CONFIG["num_heads"], attention_head_dim=DIM // CONFIG["num_heads"], text_dim=TEXT,
        freq_dim=CONFIG["freq_dim"], ffn_dim=FFN, num_layers=LAYERS,
    )  # fmt: skip
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(table)), strict=True)
    return model


def transformers_text_encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    from wan22.files.tensor_names import text_encoder_name

    table = text_encoder()
    vocab, width = table["token_embedding.weight"].shape
    config = UMT5Config(vocab_size=vocab, d_model=width, d_kv=16, d_ff=96, num_layers=3, num_heads=4,
                        tie_word_embeddings=True)  # fmt: skip
    model = UMT5EncoderModel(config).to(torch.bfloat16)
    names = {text_encoder_name(name): tensor for name, tensor in table.items()}
    missing = model.load_state_dict(names, strict=False)
    assert missing.missing_keys == ["encoder.embed_tokens.weight"]
    assert not missing.unexpected_keys
    model.tie_weights()
    assert model.encoder.embed_tokens.weight is model.shared.weight
    return model


def diffusers_vae():
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    model = AutoencoderKLWan(base_dim=8, z_dim=16)
    model.load_state_dict(convert_wan_vae_to_diffusers(vae()), strict=True)
    return model


def diffusers(folder: Path, experts: dict[str, dict[str, torch.Tensor]], **settings) -> Path:
    """A Diffusers folder, written by its own pipeline; the scheduler's shift is not the published one."""
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from transformers import AutoTokenizer

    high, low = (diffusers_expert(table) for table in experts.values())
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TINY / "google/umt5-xxl"), text_encoder=transformers_text_encoder(),
        vae=diffusers_vae(), scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0),
        transformer=high, transformer_2=low, **{"boundary_ratio": 0.875, **settings},
    )  # fmt: skip
    pipeline.save_pretrained(folder, max_shard_size="400KB")
    return folder


def scaled_fp8(
    table: dict[str, torch.Tensor], scheme: str, dtype: torch.dtype = torch.float8_e4m3fn, rows: bool = False,
    prefix: str = "", layers: list[str] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, torch.Tensor]]:  # fmt: skip
    """ComfyUI's scaled fp8 as its loader defines it: what to write, the file's metadata, and what the numbers are.

    scheme: `old` (sentinel, `scale_weight`, `scale_input`), `new` (`weight_scale`, `comfy_quant`), `metadata`.
    """
    stored, meant, metadata = {}, {}, {}
    layers = LINEARS if layers is None else layers
    for name, tensor in table.items():
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or layer not in layers:
            stored[prefix + name], meant[name] = tensor, tensor
            continue
        tensor = tensor.float()
        largest = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()
        scale = largest / torch.finfo(dtype).max
        stored[prefix + name] = (tensor / scale).to(dtype)
        meant[name] = stored[prefix + name].float() * scale
        if scheme == "old":
            stored[f"{prefix}{layer}.scale_weight"] = scale
            stored[f"{prefix}{layer}.scale_input"] = torch.tensor(1.0)
        else:
            stored[f"{prefix}{layer}.weight_scale"] = scale
        if scheme == "new":
            told = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{prefix}{layer}.comfy_quant"] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
            stored[f"{prefix}{layer}.input_scale"] = torch.tensor(0.5)
    if scheme == "old":
        stored[f"{prefix}scaled_fp8"] = torch.empty(2, dtype=dtype)
    if scheme == "metadata":
        told = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
        metadata = {"_quantization_metadata": json.dumps(told)}
    return stored, metadata, meant


def gguf_file(
    path: Path, table: dict[str, torch.Tensor], kind: str, arch: str = "wan", fold: bool = False, **keys
) -> dict[str, torch.Tensor]:
    """A GGUF as ComfyUI-GGUF's converter writes it: matrices of type `kind` where their rows are whole blocks, the
    rest float32. → what the numbers are, by the package's own arithmetic.

    fold: the patch embedding with its kernel folded away and its shape beside it, modulations without their first
    axis. K-quants, which the package can read and not make, are random blocks.
    """
    writer = gguf.GGUFWriter(path, arch)
    wanted, meant = gguf.GGMLQuantizationType[kind], {}
    elements = gguf.GGML_QUANT_SIZES[wanted][0]
    random = np.random.default_rng(0)
    for name, value in keys.items():
        writer.add_string(name.replace("__", "."), value)
    for name, tensor in table.items():
        data, qtype = tensor.float().numpy(), gguf.GGMLQuantizationType.F32
        if data.ndim == 2 and data.shape[1] % elements == 0 and "embedding." not in name:
            qtype = wanted
            try:
                data = gguf.quants.quantize(data, qtype)
            except NotImplementedError:
                data = random_blocks(random, qtype, data.shape, data.std())
        if fold and data.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in data.shape])
            data = data.reshape(-1, 256)
        if fold and data.ndim == 3:  # as GGML's own tools leave them
            data = data[0]
        writer.add_tensor(name, data, raw_dtype=qtype)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(data, qtype).copy()).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def random_blocks(random, qtype, shape, deviation):
    """Random bytes with half-precision scales of a sane size, wherever a type keeps them."""
    elements, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = random.integers(0, 256, (shape[0] * shape[1] // elements, size), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[qtype.name]
    for place in places:
        scale = random.uniform(0.2, 1, len(blocks)).astype(np.float16) * np.float16(deviation / 300)
        blocks[:, place : place + 2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def llama_cpp_name(published: str) -> str:
    """As llama.cpp's converter names a T5 encoder's tensors (from transformers' names, by the package's own map)."""
    from wan22.files.tensor_names import text_encoder_name

    blocks = gguf.TensorNameMap(gguf.MODEL_ARCH.T5ENCODER, 24)
    name = blocks.get_name(text_encoder_name(published), try_suffixes=(".weight",))
    assert name, published
    return name
