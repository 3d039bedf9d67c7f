"""What to make, what may be approximated, where it runs: three kinds of settings, never mixed. Standard library only.

| dataclass   | answers                  | may change the picture?                                     |
|-------------|--------------------------|-------------------------------------------------------------|
| `Request`   | what to make             | it is the picture                                           |
| `Precision` | what may be approximated | yes, by a stated and measured error; the default is exact   |
| `Placement` | where it runs            | never, beyond float rounding                                |

Every default has its one home here; `ModelSpec` holds the published constants of a task.
"""

import dataclasses
import hashlib
import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

LONGEST = 4000  # characters of a message


def one_line(text: str) -> str:
    """A message as one line of a bearable length, cut in its middle. What files call their tensors may be anything,
    also commands to a terminal: unprintable characters are escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]}…{line[-LONGEST // 2 + 1 :]}"


class WanError(Exception):
    """An error that a user can act on: one line, an optional hint, and the exit code it ends a command with."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(one_line(message))
        self.hint = hint


class RunError(WanError):
    """The run failed while running."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device's memory. Known by the name, for those who ask before torch is there."""
    return type(error).__name__ == "OutOfMemoryError"


class DiskFull(RunError):
    """There is no room to write in; there may be later."""


class RequestError(WanError, ValueError):
    """The request was wrong: a flag, a size, a missing or broken file. Nothing was loaded."""

    exit_code = 2


class DoesNotFit(WanError):
    """Disk, host memory or GPU memory does not hold it. Nothing was loaded."""

    exit_code = 3


@dataclass(frozen=True)
class ModelSpec:
    """The published constants of a task. Widths, depths and heads come from the checkpoint instead.

    Source: the published `wan/configs/wan_t2v_A14B.py` and `shared_config.py`.
    """

    task: str
    experts: tuple[str, str] = ("high_noise_model", "low_noise_model")  # in the order they work
    width: int = 1280
    height: int = 720
    num_frames: int = 81
    fps: int = 16
    num_steps: int = 40
    shift: float = 12.0
    solver: str = "unipc"
    guidance_high: float = 4.0
    guidance_low: float = 3.0
    boundary: float = 0.875  # of the 1000 training timesteps
    num_train_timesteps: int = 1000
    latent_channels: int = 16
    temporal_stride: int = 4
    spatial_stride: int = 8
    trained_frames: int = 81
    text_len: int = 512
    negative_prompt: str = (
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
        "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
        "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
    )


MODEL_SPECS = {spec.task: spec for spec in (ModelSpec("t2v-A14B"),)}
DEFAULT_TASK = "t2v-A14B"
_SPEC = MODEL_SPECS[DEFAULT_TASK]

SOLVERS = ("unipc", "dpm++", "euler")
EXPERT_SIDES = ("high", "low")  # noise; in the order of ModelSpec.experts
SIZES = {"720p": (1280, 720), "480p": (832, 480)}
SIDE_MULTIPLE = 16  # the VAE's 8 times the transformer's patch of 2
MAX_SIDE = 1024 * SIDE_MULTIPLE  # the rotary table's 1024 positions an axis
MAX_FRAMES = 1024 * _SPEC.temporal_stride - 3


def parse_size(text: str) -> tuple[int, int]:
    """`1280*720`, `1280x720`, `720p` or `480p` → (width, height) in pixels. Raises RequestError."""
    if text.lower() in SIZES:
        return SIZES[text.lower()]
    match = re.fullmatch(r"\s*(\d{1,6})\s*[*xX×]\s*(\d{1,6})\s*", text)
    if not match:
        raise RequestError(f"--size {text}: not a size", hint=f"say WIDTHxHEIGHT, or one of {', '.join(SIZES)}")
    return int(match[1]), int(match[2])


def _nearest(value: int, step: int, offset: int, largest: int) -> str:
    """The two nearest allowed values around `value` on the grid offset + n · step, in words."""
    below = (value - offset) // step * step + offset
    near = [candidate for candidate in (below, below + step) if max(offset, 1) <= candidate <= largest]
    return " and ".join(map(str, near or [max(offset, step)]))


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{name}: {value!r} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair in JSON, or bytes of a command line that are not UTF-8
        raise RequestError(f"{name}: character {error.start + 1}, {value[error.start]!r}, is none of Unicode's",
                           hint="write it in UTF-8") from None  # fmt: skip


def _check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    finite = not isinstance(value, float) or math.isfinite(value)
    if not numeric or not finite or (kind is int and not isinstance(value, int)):
        raise RequestError(f"{name}: {value!r} is not {'a whole number' if kind is int else 'a number'}")
    if not low <= value <= high:
        raise RequestError(f"{name}: {value} is outside {low:g} to {high:g}")


class _Settings:
    """Reading the dataclasses below from tables that people and files wrote."""

    @classmethod
    def from_dict(cls, table: dict[str, Any], where: str = "") -> Self:
        """A table of exactly this dataclass's names; an unknown or missing one is an error that names it. where: the
        file that it comes from, or what else an error is to name first. Raises RequestError."""
        if not isinstance(table, dict):
            raise RequestError(f"{where or cls.__name__}: {table!r} is not a table")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in table:
            if name not in fields:
                known = ", ".join(sorted(fields))
                raise RequestError(f"{where or cls.__name__}: unknown key {name!r}", hint=f"known: {known}")
        for name, field in fields.items():
            if field.default is dataclasses.MISSING and name not in table:
                raise RequestError(f"{where or cls.__name__}: misses {name!r}")
        try:
            return cls(**table)
        except RequestError as error:
            raise RequestError(f"{where}: {error}" if where else str(error), error.hint) from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Lora(_Settings):
    """An adapter to merge into the experts' weights.

    file: as asked for, a path or a name to look for, of a file or of a folder with a pair; in a request that a
    pipeline resolved, and so in a record, the file's bare name, with its `sha256` (hex). expert: `both`, `high` or
    `low`. lead_strength: its strength during the lead steps; None: the same.
    """

    file: str
    strength: float = 1.0
    expert: str = "both"
    lead_strength: float | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not self.file.strip():
            raise RequestError("--lora: no file is named", hint="say FILE, or FILE:STRENGTH")
        _check_text("--lora", self.file)
        if self.expert not in ("both", *EXPERT_SIDES):
            raise RequestError(f"--lora {self.file}: expert {self.expert!r} is none of both, high, low")
        for strength in (self.strength, self.lead_strength):
            if strength is not None:
                _check_number(f"--lora {self.file}: strength", strength, float, -100, 100)
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(self.sha256)):
            raise RequestError(f"--lora {self.file}: {self.sha256!r} is not a SHA-256")

    @classmethod
    def parse(cls, text: str, expert: str = "both") -> Self:
        """`FILE`, `FILE:STRENGTH` or `FILE:STRENGTH:LEAD_STRENGTH`; colons elsewhere (`C:\\x.safetensors`) are the
        file's. Raises RequestError."""
        number = r"[-+]?(?:\d+\.?\d*|\.\d+)"
        match = re.fullmatch(rf"(.*?)(?::({number}))?(?::({number}))?", text, re.DOTALL)
        assert match  # anything is a file
        file, strength, lead = match.groups()
        if wrong := re.search(r"\.safetensors:(.*)", file, re.IGNORECASE):
            raise RequestError(f"--lora {text}: {wrong[1]!r} is not a strength", hint="say FILE:STRENGTH")
        return cls(file, float(strength or 1), expert, None if lead is None else float(lead))

    def __str__(self) -> str:
        lead = "" if self.lead_strength is None else f", {self.lead_strength:g} in the lead steps"
        noise = "both experts" if self.expert == "both" else f"{self.expert} noise"
        return f"{self.file}, {noise}, strength {self.strength:g}{lead}"


@dataclass(frozen=True)
class Request(_Settings):
    """What to make. Sizes in pixels, `num_frames` pixel frames at `fps` a second, `boundary` as a fraction of 1000.

    lead_steps: that many of the `num_steps`, the first ones, run with `guidance_lead` and the adapters' own
    `lead_strength`. They share the first step of the schedule that the rest follows, so the rest keeps the timesteps
    of a run of `num_steps − lead_steps + 1` steps: those that a step-distilled adapter was trained on.

    guidance_start, guidance_stop: fractions of the steps between which there is guidance; the others take one
    evaluation instead of two. Part of what is asked for, as the guidance itself: 1 is its value there.
    """

    prompt: str
    negative_prompt: str = _SPEC.negative_prompt
    task: str = DEFAULT_TASK
    width: int = _SPEC.width
    height: int = _SPEC.height
    num_frames: int = _SPEC.num_frames
    fps: int = _SPEC.fps
    num_steps: int = _SPEC.num_steps
    shift: float = _SPEC.shift
    solver: str = _SPEC.solver
    guidance_high: float = _SPEC.guidance_high
    guidance_low: float = _SPEC.guidance_low
    boundary: float | None = None  # None: the checkpoint's own, where it has one, else the task's
    seed: int | None = None  # None: one is drawn, told and recorded
    noise_device: str = "cpu"
    loras: tuple[Lora, ...] = ()  # merged in this order
    lead_steps: int = 0
    guidance_lead: float = _SPEC.guidance_high
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    original_prompt: str | None = None  # what was asked for, where `prompt` is an extension of it

    def __post_init__(self) -> None:
        _check_text("--task", self.task)
        if self.task not in MODEL_SPECS:
            raise RequestError(f"--task {self.task}: unknown task", hint=f"known: {', '.join(MODEL_SPECS)}")
        _check_text("--prompt", self.prompt)
        _check_text("--negative-prompt", self.negative_prompt)
        if self.original_prompt is not None:
            _check_text("original_prompt", self.original_prompt)
        if not self.prompt.strip():
            raise RequestError("--prompt: the prompt is empty", hint='say what to show: --prompt "a red ball rolls"')
        for name in ("width", "height"):
            value = getattr(self, name)
            _check_number(name, value, int, 1, MAX_SIDE)
            if value % SIDE_MULTIPLE:
                near = _nearest(value, SIDE_MULTIPLE, 0, MAX_SIDE)
                said = f"--size: {name} {value} is not a multiple of {SIDE_MULTIPLE}"
                raise RequestError(said, hint=f"nearest: {near}")
        _check_number("--frames", self.num_frames, int, 1, MAX_FRAMES)
        stride = self.spec.temporal_stride
        if self.num_frames % stride != 1:
            near = _nearest(self.num_frames, stride, 1, MAX_FRAMES)
            raise RequestError(f"--frames: {self.num_frames} is not of the form {stride}n + 1", hint=f"nearest: {near}")
        _check_number("--fps", self.fps, int, 1, 240)
        _check_number("--steps", self.num_steps, int, 1, self.spec.num_train_timesteps)
        _check_number("--shift", self.shift, float, 0.01, 100)
        if self.solver not in SOLVERS:
            raise RequestError(f"--solver {self.solver}: unknown solver", hint=f"known: {', '.join(SOLVERS)}")
        _check_number("--guidance", self.guidance_high, float, 0, 100)
        _check_number("--guidance-low", self.guidance_low, float, 0, 100)
        if self.boundary is not None:
            _check_number("boundary", self.boundary, float, 0, 1)
        if self.seed is not None:
            _check_number("--seed", self.seed, int, 0, 2**63 - 1)
        if self.noise_device not in ("cpu", "cuda"):
            raise RequestError(f"--noise-device {self.noise_device}: neither cpu nor cuda")
        if not isinstance(self.loras, tuple) or not all(isinstance(lora, Lora) for lora in self.loras):
            raise RequestError(f"loras: {self.loras!r} is not a tuple of Lora")
        _check_number("--lead-steps", self.lead_steps, int, 0, self.num_steps)
        _check_number("--guidance-lead", self.guidance_lead, float, 0, 100)
        _check_number("--guidance-start", self.guidance_start, float, 0, 1)
        _check_number("--guidance-stop", self.guidance_stop, float, 0, 1)
        if self.guidance_start >= self.guidance_stop:
            said = f"--guidance-start {self.guidance_start:g} is not before --guidance-stop {self.guidance_stop:g}"
            raise RequestError(said, hint="no guidance at all: --guidance 1")
        for lora in self.loras:
            if lora.lead_strength is not None and not self.lead_steps:
                raise RequestError(f"--lora {lora.file}: a lead strength without lead steps", hint="add --lead-steps N")

    @classmethod
    def from_dict(cls, table: dict[str, Any], where: str = "") -> Self:
        """As for every settings class; `loras` may be tables, as JSON and TOML have them."""
        if not isinstance(table, dict):
            return super().from_dict(table, where)  # which says so
        loras, named = table.get("loras", ()), where or cls.__name__
        if not isinstance(loras, list | tuple) or not all(isinstance(lora, dict | Lora) for lora in loras):
            raise RequestError(f"{named}: loras: {loras!r} is not a list of tables")
        read = (lora if isinstance(lora, Lora) else Lora.from_dict(lora, f"{named}: loras") for lora in loras)
        return super().from_dict({**table, "loras": tuple(read)}, where)

    @property
    def spec(self) -> ModelSpec:
        return MODEL_SPECS[self.task]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[C, T, H, W] of the latents."""
        spec = self.spec
        frames = (self.num_frames - 1) // spec.temporal_stride + 1
        return spec.latent_channels, frames, self.height // spec.spatial_stride, self.width // spec.spatial_stride

    def with_boundary(self, own: float | None = None) -> Self:
        """Its boundary made definite: the one asked for, else a checkpoint's `own`, else the task's."""
        known = (boundary for boundary in (self.boundary, own, self.spec.boundary) if boundary is not None)
        return dataclasses.replace(self, boundary=next(known))

    @property
    def guided(self) -> bool:
        """Whether some step may have guidance, and with it two branches."""
        lead = {self.guidance_lead} if self.lead_steps else set()
        return {self.guidance_high, self.guidance_low} | lead != {1}

    def warnings(self) -> list[str]:
        """What is allowed and known to disappoint."""
        if self.num_frames > self.spec.trained_frames:
            return [
                f"{self.num_frames} frames: the model was trained on {self.spec.trained_frames}; longer videos tend to "
                "have burnt first frames"
            ]
        return []


ATTENTIONS = ("auto", "torch", "cudnn", "flash", "efficient", "math", "fa3", "fa4", "sage", "int8", "int8-bf16")
EIGHT_BIT = ("fp8", "int8")
WEIGHTS = ("auto", "float32", "bf16", *EIGHT_BIT)
SCOPES = ("ffn", "all")


@dataclass(frozen=True)
class Precision(_Settings):
    """What may be approximated; the default is the `exact` recipe.

    weights: `float32`, `bf16`, or `auto`: bf16 on a GPU, float32 on a CPU. The text encoder has the same dtype (as
    published). What `exact` keeps in float32 beside bf16 weights stands in model.py. `fp8` and
    `int8` approximate: 8-bit products of the blocks, beside bf16 (quantize.py).
    scope: of 8-bit products: `ffn`, the feed-forward's alone, or `all`; None with other weights.
    attention: a backend of attention.py; `auto`: the fastest exact one that is right on this machine. Each rounds in
    its own way, so the one a video was made with is recorded. `sage` and `int8` approximate; all others are exact.
    step_cache: how much the first block's contribution may change, relative to its size, for the other blocks' to be
    taken from an earlier step (step_cache.py); 0: never.
    vae: `float32`, as published, or `bf16`: faster, at 50 dB PSNR to it and more.
    """

    weights: str = "auto"
    attention: str = "auto"
    scope: str | None = None
    step_cache: float = 0.0
    vae: str = "float32"

    def __post_init__(self) -> None:
        if self.vae not in ("float32", "bf16"):
            raise RequestError(f"--vae-dtype {self.vae}: unknown dtype", hint="known: float32, bf16")
        if self.weights not in WEIGHTS:
            raise RequestError(f"--dtype {self.weights}: unknown dtype", hint=f"known: {', '.join(WEIGHTS)}")
        if self.attention not in ATTENTIONS:
            raise RequestError(f"--attention {self.attention}: unknown", hint=f"known: {', '.join(ATTENTIONS)}")
        if self.scope not in (None, *SCOPES):
            raise RequestError(f"--scope {self.scope}: unknown", hint=f"known: {', '.join(SCOPES)}")
        if self.scope and self.weights not in EIGHT_BIT:
            raise RequestError(f"--scope {self.scope}: of 8-bit products, and the weights are {self.weights}",
                               hint="add --dtype fp8, or --dtype int8")  # fmt: skip
        _check_number("--step-cache", self.step_cache, float, 0, 10)

    def resolve(self, device: str) -> "Precision":
        """`auto` made definite for a device type (`cpu`, `cuda`), as far as it can be without measuring there."""
        weights = ("float32" if device == "cpu" else "bf16") if self.weights == "auto" else self.weights
        attention = "torch" if self.attention == "auto" and device == "cpu" else self.attention
        scope = self.scope or ("all" if weights in EIGHT_BIT else None)
        return dataclasses.replace(self, weights=weights, attention=attention, scope=scope)


OFFLOADS = ("none", "expert", "block", "disk")  # from most to least memory
GPU_RESERVE = 5 << 28  # bytes: the CUDA context, libraries' workspaces; 1.2 GiB measured on an H100 (docs/memory.md)
CHUNK_TOKENS = 8192  # of the feed-forward; a matrix product of this height fills any GPU


@dataclass(frozen=True)
class Residency:
    """What of the experts is where: one of OFFLOADS, made definite (experts.py says what each keeps).

    resident_blocks: of `block` and `disk`, those that stay on the device; host_experts: how many experts may lie in
    pinned host memory.
    """

    kind: str
    resident_blocks: int = 0
    host_experts: int = 0


_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(flag: str, text: str) -> int:
    """`24GiB`, `24GB`, `24G` (as GiB: what cards are sold by), `25000MiB`, plain bytes → bytes. Raises RequestError."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt])(i?b)?|b)?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise RequestError(f"{flag} {text}: not an amount of memory", hint="say 24GiB, 24GB or 25000MiB")
    base = 1000 if (match[3] or "").lower() == "b" else 1024
    return int(float(match[1]) * base ** _POWERS[(match[2] or "").lower()])


@dataclass(frozen=True)
class Placement(_Settings):
    """Where it runs. Never changes the picture, beyond float rounding.

    device: `auto`, `cpu`, `cuda`, `cuda:N`; offload: `none` keeps both experts on the device, `expert` only the one
    at work, `block` streams its blocks from the host's memory and `disk` from the files, `auto` decides by free memory
    (plan.py); gpu_memory_limit: bytes of GPU memory to make do with; text_encoder: `auto` (the device) or `cpu`;
    lora_dir: a folder in which adapters are looked for by name before the usual places; save_every: seconds between
    two savings of a run's state.

    gpus: processes to start, each with a device of its own; None: the one this is, or as many as torchrun or SLURM
    started. ulysses_size, ring_size: ranks along these axes of mesh.py, None for what that chooses; dit_fsdp, t5_fsdp:
    each rank keeps a part of the experts' weights, of the text encoder's (sharding.py).
    """

    device: str = "auto"
    offload: str = "auto"
    text_encoder: str = "auto"
    lora_dir: str | None = None
    gpu_memory_limit: int | None = None
    save_every: float = 30.0
    gpus: int | None = None
    ulysses_size: int | None = None
    ring_size: int | None = None
    dit_fsdp: bool = False
    t5_fsdp: bool = False
    prompt_cache: bool = True

    def __post_init__(self) -> None:
        _check_text("--device", self.device)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise RequestError(f"--device {self.device}: not a device", hint="known: auto, cpu, cuda, cuda:N")
        if self.offload not in ("auto", *OFFLOADS):
            raise RequestError(f"--offload {self.offload}: unknown", hint=f"known: auto, {', '.join(OFFLOADS)}")
        if self.gpu_memory_limit is not None:
            _check_number("--gpu-memory-limit", self.gpu_memory_limit, int, 1, 2**60)
        if self.text_encoder not in ("auto", "cpu"):
            raise RequestError(f"text_encoder {self.text_encoder}: unknown", hint="known: auto, cpu")
        if self.lora_dir is not None:
            _check_text("--lora-dir", self.lora_dir)
            if not Path(self.lora_dir).is_dir():
                raise RequestError(f"--lora-dir {self.lora_dir}: no such folder")
        for name in ("dit_fsdp", "t5_fsdp", "prompt_cache"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}: {getattr(self, name)!r} is neither true nor false")
        _check_number("--save-every", self.save_every, float, 0, 1e6)
        for name in ("gpus", "ulysses_size", "ring_size"):
            if (asked := getattr(self, name)) is not None:
                _check_number(f"--{name}", asked, int, 1, 4096)
        if self.t5_fsdp and self.text_encoder == "cpu":
            raise RequestError("--t5_fsdp and --t5_cpu contradict each other", hint="give one of them")


CODECS = ("libx264", "libx265")
MAX_CRF = 51


@dataclass(frozen=True)
class Encoding(_Settings):
    """How an mp4 is packed; the default is the published code's imageio `quality=8`: int((1 - 0.8) * 51) for libx264.

    Beside the three and not of them: it comes after the picture, so it is no part of a `Request`, of a name's digest
    or of what a resumed run must meet again; and it decides a file's bytes, so it is no `Placement` either, which the
    record leaves out. The record inside an mp4 has it, for `--from` to make the same file.

    crf: the constant rate factor, from 0 (lossless but for the 4:2:0 chroma) to 51; codec: of ffmpeg.
    """

    crf: int = 10
    codec: str = CODECS[0]

    def __post_init__(self) -> None:
        _check_number("--crf", self.crf, int, 0, MAX_CRF)
        if self.codec not in CODECS:
            raise RequestError(f"--codec {self.codec}: unknown codec", hint=f"known: {', '.join(CODECS)}")


@dataclass(frozen=True)
class Preset:
    """A named set of settings from configs/NAME.toml: a description and the keys it sets of each dataclass."""

    name: str
    description: str
    model: str | None
    request: dict[str, Any]
    precision: dict[str, Any]
    placement: dict[str, Any]


def data_dir(name: str) -> Path:
    """`configs` or `demo`: inside the package where it is installed, beside it in a clone (configs only)."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def configs_dir() -> Path:
    return data_dir("configs")


def preset_names() -> list[str]:
    return sorted(path.stem for path in configs_dir().glob("*.toml"))


def load_preset(name: str) -> Preset:
    """A preset by name, or from a .toml file by its path. Raises RequestError, for an unknown key too."""
    path = Path(name) if name.endswith(".toml") else configs_dir() / f"{name}.toml"
    if not path.is_file() or path.name != Path(name if name.endswith(".toml") else f"{name}.toml").name:
        raise RequestError(f"--preset {name}: no such preset", hint=f"known: {', '.join(preset_names())}, or FILE.toml")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(f"{path}: not a preset: {error}") from None
    known = {"description": str, "model": str, "request": dict, "precision": dict, "placement": dict}
    for key, value in table.items():
        if key not in known:
            raise RequestError(f"{path}: unknown key {key!r}", hint=f"known: {', '.join(known)}")
        if not isinstance(value, known[key]):
            raise RequestError(f"{path}: {key} is not a {'table' if known[key] is dict else 'text'}")
    sections: dict[str, dict[str, Any]] = {}
    for section, kind in (("request", Request), ("precision", Precision), ("placement", Placement)):
        sections[section] = table.get(section, {})
        # A request is whole only with a prompt; anything else in it must stand on its own.
        kind.from_dict({"prompt": "x", **sections[section]} if kind is Request else sections[section], str(path))
    return Preset(path.stem, table.get("description", ""), table.get("model"), **sections)


def digest(*tables: dict[str, Any]) -> str:
    """SHA-256 (hex) over tables of plain values, the same on every machine: names and pins what they say."""
    text = json.dumps(tables, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
