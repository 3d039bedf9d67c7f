"""A checkpoint folder: where it is, whether it is whole, and its tensors by their published names.

The published layout: two experts as sharded safetensors with an index and a config each; the text encoder and the
VAE as .pth, or as .safetensors under the same names; a tokenizer folder. Opening reads headers and configs only.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan22.config import DEFAULT_TASK, MODEL_SPECS, RequestError, data_dir
from wan22.tensor_files import Pickle, Safetensors, open_checked, sample_bytes

if TYPE_CHECKING:
    from wan22.model import TransformerConfig

REPOSITORY = "Wan-AI/Wan2.2-T2V-A14B"
DEFAULT_FOLDERS = ("Wan2.2-T2V-A14B", "T2V_A14B_weights")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16"
VAE = "Wan2.1_VAE"
TOKENIZER = "google/umt5-xxl"
DOWNLOAD_HINT = "get it: wan22 download --ckpt_dir ./T2V_A14B_weights   (126 GB; or try: --model demo)"


# --- where it is -----------------------------------------------------------------------------------------------------
def hub_snapshot(repository: str) -> Path | None:
    """The newest snapshot of `owner/name` in the Hugging Face cache, if it is there."""
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    folder = cache / f"models--{repository.replace('/', '--')}"
    main = folder / "refs" / "main"
    if main.is_file() and (snapshot := folder / "snapshots" / main.read_text().strip()).is_dir():
        return snapshot
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def find_checkpoint(model: str | None = None, ckpt_dir: str | None = None) -> Path:
    """The checkpoint folder: `ckpt_dir` or `model` where given, else the usual places in order. Raises RequestError.

    model: `demo`, a folder, the published name, or `owner/name` in the Hugging Face cache.
    """
    if model and ckpt_dir:
        raise RequestError("--model and --ckpt_dir both name a checkpoint", hint="give one of them")
    if ckpt_dir or (model and Path(model).is_dir()):
        folder = Path(ckpt_dir or str(model))
        if not folder.is_dir():
            raise RequestError(f"--ckpt_dir {folder}: no such folder", hint=DOWNLOAD_HINT)
        return folder
    if model == "demo":
        return data_dir("demo")
    if model and model not in (*DEFAULT_FOLDERS, REPOSITORY):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and (snapshot := hub_snapshot(model)):
            return snapshot
        raise RequestError(f"--model {model}: neither a folder nor in the Hugging Face cache", hint="known name: demo")
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
class Expert:
    """One expert's folder: its tensors under published names, and the sizes its config tells."""

    name: str
    tensors: Safetensors
    config: dict[str, Any]

    def transformer_config(self) -> "TransformerConfig":
        from wan22.model import TransformerConfig

        known = TransformerConfig.__dataclass_fields__
        return TransformerConfig(**{key: value for key, value in self.config.items() if key in known})


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder. `experts` in the order of `ModelSpec.experts`."""

    folder: Path
    experts: dict[str, Expert]
    text_encoder: Safetensors | Pickle
    vae: Safetensors | Pickle
    tokenizer: Path

    def identity(self) -> str:
        """A digest (hex) of what the checkpoint is, from index, headers, sizes and sampled bytes: seconds, not hours.

        It does not depend on where the folder lies. Two files that differ only between the samples look alike: to
        prove files whole, verify their SHA-256 (`wan22 download --check`).
        """
        sources = [*(expert.tensors for expert in self.experts.values()), self.text_encoder, self.vae]
        files = {path for source in sources for path in source.files}
        files |= {self.folder / name / "config.json" for name in self.experts}
        files |= {path for path in self.tokenizer.iterdir() if path.is_file()}
        state = hashlib.sha256()
        for path in sorted(files, key=lambda path: path.relative_to(self.folder).as_posix()):
            header = next((s.headers[path] for s in sources if isinstance(s, Safetensors) and path in s.headers), b"")
            state.update(f"{path.relative_to(self.folder).as_posix()}\0{path.stat().st_size}\0".encode())
            state.update(hashlib.sha256(header + sample_bytes(path)).digest())
        return state.hexdigest()


REQUIRED_SIZES = ("dim", "ffn_dim", "num_heads", "num_layers")


def _read_config(path: Path) -> dict[str, Any]:
    open_checked(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: config[name] for name in REQUIRED_SIZES}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{path}: not an expert's config: {error}") from None
    except KeyError as error:
        raise RequestError(f"{path}: not an expert's config: misses {error}") from None
    for name, value in sizes.items():
        if not isinstance(value, int) or not 0 < value < 1 << 20:
            raise RequestError(f"{path}: {name} is {value!r}")
    if sizes["dim"] % sizes["num_heads"]:
        raise RequestError(f"{path}: {sizes['num_heads']} heads do not divide a width of {sizes['dim']}")
    if config.get("model_type", "t2v") != "t2v":
        raise RequestError(f"{path}: a {config['model_type']!r} model; this tool makes videos from text (t2v)")
    return config


def _either(folder: Path, stem: str) -> Safetensors | Pickle:
    safe, pickled = folder / f"{stem}.safetensors", folder / f"{stem}.pth"
    return Safetensors(safe) if safe.exists() else Pickle(pickled)


def open_checkpoint(folder: Path, task: str = DEFAULT_TASK) -> Checkpoint:
    """Read every header and config, check that the folder is whole. Raises RequestError naming the file at fault."""
    names = MODEL_SPECS[task].experts
    if not any((folder / name).is_dir() for name in names):
        raise RequestError(f"{folder}: not a checkpoint: no {names[0]}/ and {names[1]}/ in it", hint=DOWNLOAD_HINT)
    experts = {
        name: Expert(name, Safetensors(folder / name / INDEX), _read_config(folder / name / "config.json"))
        for name in names
    }
    first, second = (expert.config for expert in experts.values())
    for key in sorted({*first, *second} - {"_diffusers_version"}):
        if first.get(key) != second.get(key):
            raise RequestError(f"{folder}: the experts differ: {key} is {first.get(key)} in {names[0]}, "
                               f"{second.get(key)} in {names[1]}")  # fmt: skip
    tokenizer = folder / TOKENIZER
    open_checked(tokenizer / "tokenizer.json")
    return Checkpoint(folder, experts, _either(folder, TEXT_ENCODER), _either(folder, VAE), tokenizer)


# --- published names → the libraries' names --------------------------------------------------------------------------
def rename(name: str, rules: Mapping[str, str]) -> str:
    """The first rule that matches the whole name gives its new form; `{}`-free regular expressions."""
    for pattern, template in rules.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(template)
    raise KeyError(name)


TEXT_ENCODER_NAMES = {
    r"token_embedding\.weight": r"shared.weight",
    r"norm\.weight": r"encoder.final_layer_norm.weight",
    r"blocks\.(\d+)\.attn\.([qkvo])\.weight": r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
    r"blocks\.(\d+)\.pos_embedding\.embedding\.weight": (
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    r"blocks\.(\d+)\.norm1\.weight": r"encoder.block.\1.layer.0.layer_norm.weight",
    r"blocks\.(\d+)\.norm2\.weight": r"encoder.block.\1.layer.1.layer_norm.weight",
    r"blocks\.(\d+)\.ffn\.gate\.0\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight",
    r"blocks\.(\d+)\.ffn\.fc1\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight",
    r"blocks\.(\d+)\.ffn\.fc2\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wo.weight",
}


def text_encoder_name(published: str) -> str:
    """A published text-encoder tensor's name in transformers' `UMT5EncoderModel`."""
    return rename(published, TEXT_ENCODER_NAMES)


VAE_PARTS = (
    (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"^conv1\.", r"quant_conv."),
    (r"^conv2\.", r"post_quant_conv."),
    (r"\.middle\.([02])\.", lambda match: f".mid_block.resnets.{int(match[1]) // 2}."),
    (r"\.middle\.1\.", r".mid_block.attentions.0."),
    (r"\.head\.0\.", r".norm_out."),
    (r"\.head\.2\.", r".conv_out."),
    (r"\.downsamples\.", r".down_blocks."),
    # The published decoder counts its layers through; in each group of four, three are residual, one goes up.
    (r"\.upsamples\.(\d+)\.", lambda match: ".up_blocks.{}.{}.".format(
        int(match[1]) // 4, "upsamplers.0" if int(match[1]) % 4 == 3 else f"resnets.{int(match[1]) % 4}")),
    (r"\.residual\.0\.", r".norm1."),
    (r"\.residual\.2\.", r".conv1."),
    (r"\.residual\.3\.", r".norm2."),
    (r"\.residual\.6\.", r".conv2."),
    (r"\.shortcut\.", r".conv_shortcut."),
)  # fmt: skip


def vae_name(published: str) -> str:
    """A published VAE tensor's name in diffusers' `AutoencoderKLWan`."""
    for pattern, replacement in VAE_PARTS:
        published = re.sub(pattern, replacement, published)
    return published
