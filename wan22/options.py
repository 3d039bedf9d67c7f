"""Flags → the three kinds of settings: one reading for every command that makes videos.

`flags` are the values of the command line by parameter name, None where nothing was said. Nothing here needs torch.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from wan22.capability import Capability, capability_of, preset
from wan22.checkpoint import Checkpoint, Parts, find_checkpoint, open_checkpoint
from wan22.config import (
    EIGHT_BIT,
    Encoding,
    Lora,
    Placement,
    Precision,
    Preset,
    Request,
    RequestError,
    load_preset,
    parse_bytes,
    parse_size,
)

Flags = Mapping[str, Any]


class Command(TyperCommand):
    """Refuses a word that is empty, as that of a shell's variable which is not set; a prompt may be."""

    def invoke(self, ctx: Any) -> Any:
        """Raises RequestError."""
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            words = value if isinstance(value, list | tuple) else [value]
            if "" in words and "prompt" not in str(parameter.name):
                shown: Any = parameter
                said = shown.opts[0] if shown.param_type_name == "option" else shown.name.upper()
                raise RequestError(f"{said}: its value is empty")
        return super().invoke(ctx)


@dataclass(frozen=True)
class Base:
    """What the flags are laid over: a preset's settings, or those of an earlier file."""

    request: dict[str, Any]
    precision: dict[str, Any]
    placement: dict[str, Any]
    model: str | None = None
    checkpoint: str | None = None  # identity that must be met again
    from_file: str | None = None
    encoding: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_preset(cls, name: str | None, model: str | None) -> "Base":
        """The preset asked for; the demo brings its own where none is. Raises RequestError."""
        name = name or ("demo" if model == "demo" else None)
        if not name:
            return cls({}, {}, {})
        preset: Preset = load_preset(name)
        return cls(preset.request, preset.precision, preset.placement, model or preset.model)

    @classmethod
    def of_file(cls, file: str) -> "Base":
        """An earlier file's settings, to make it again. Raises RequestError."""
        record = read_any_record(file)
        try:
            request, precision = dict(record["request"]), dict(record["precision"])
            model, checkpoint = str(record["model"]), str(record["checkpoint"])
            encoding = dict(record.get("encoding", {}))
        except (KeyError, TypeError, ValueError):
            raise RequestError(f"--from {file}: its record is not one of this program's") from None
        Request.from_dict(request, f"--from {file}")
        Precision.from_dict(precision, f"--from {file}")
        Encoding.from_dict(encoding, f"--from {file}")
        return cls(request, precision, {}, "demo" if model == "demo" else None, checkpoint, file, encoding)


def read_base(flags: Flags) -> Base:
    """What `--preset` or `--from` bring. Raises RequestError."""
    from_file = flags.get("from_file")
    if from_file and flags["preset"]:
        raise RequestError("--from and --preset both bring settings", hint="give one of them")
    return Base.of_file(from_file) if from_file else Base.of_preset(flags["preset"], flags["model"])


def read_request(flags: Flags, base: Base) -> dict[str, Any]:
    """A request's settings: the flags over the base. A prompt may be missing. Raises RequestError."""
    width, height = parse_size(flags["size"]) if flags["size"] is not None else (None, None)
    guidance_low = flags["guidance"] if flags["guidance_low"] is None else flags["guidance_low"]
    asked = {
        "width": width, "height": height, "num_frames": flags["frames"], "num_steps": flags["steps"],
        "guidance_high": flags["guidance"], "guidance_low": guidance_low,
        **{name: flags[name] for name in ("prompt", "negative_prompt", "task", "fps", "shift", "solver", "noise_device",
                                          "lead_steps", "guidance_lead", "guidance_start", "guidance_stop")},
    }  # fmt: skip
    settings = {**base.request, **given(**asked)}
    if flags["prompt"] is not None:
        settings.pop("original_prompt", None)  # the one of an earlier file, which this prompt is no extension of
    if flags["guidance_lead"] is not None and not settings.get("lead_steps"):
        raise RequestError("--guidance-lead without lead steps", hint="add --lead-steps N")
    sides = (("both", "lora"), ("high", "lora_high"), ("low", "lora_low"))
    if loras := [Lora.parse(text, side) for side, name in sides for text in flags[name] or ()]:
        # On top of a preset's, which could not be named otherwise; instead of those of a file made again.
        settings["loras"] = loras if base.from_file else [*base.request.get("loras", ()), *loras]
    if (seed := flags["seed"]) is not None:
        settings["seed"] = None if seed == -1 else seed  # -1 is the published way to ask for any
    return settings


def read_precision(flags: Flags, base: Base, imagined: Capability | None = None) -> Precision:
    """A preset over the base, and flags over that. imagined: the card to plan for where there is none. Raises
    RequestError."""
    table, name = dict(base.precision), flags["precision"]
    if name:
        device = flags["device"] or base.placement.get("device", "auto")
        table |= preset(name, capability_of(device) or imagined)
    weights = flags["dtype"]
    if flags["convert_model_dtype"]:  # bf16 is what 8-bit products are beside, so these stay
        if weights == "float32":
            raise RequestError("--convert_model_dtype and --dtype float32 contradict each other")
        if not weights and table.get("weights") not in EIGHT_BIT:
            weights = "bf16"
    if weights and weights not in EIGHT_BIT:
        table.pop("scope", None)  # of the preset's or file's 8-bit products, which are not wanted
    asked = given(weights=weights, attention=flags["attention"], scope=flags["scope"], step_cache=flags["step_cache"],
                  vae=flags["vae_dtype"])  # fmt: skip
    return Precision.from_dict({**table, **asked})


def read_placement(flags: Flags, base: Base) -> Placement:
    """Raises RequestError."""
    offload, published = flags["offload"], flags["offload_model"]
    limit = flags["gpu_memory_limit"] and parse_bytes("--gpu-memory-limit", flags["gpu_memory_limit"])
    if published is not None:
        wanted = "expert" if parse_bool("--offload_model", published) else "none"
        if offload not in (None, wanted):
            raise RequestError(f"--offload_model {published} and --offload {offload} contradict each other")
        offload = wanted
    asked = given(device=flags["device"], offload=offload, text_encoder="cpu" if flags["t5_cpu"] else None,
                  lora_dir=flags["lora_dir"], gpu_memory_limit=limit, save_every=flags["save_every"],
                  prompt_cache=False if flags["no_prompt_cache"] else None)  # fmt: skip
    for name in ("gpus", "ulysses_size", "ring_size", "dit_fsdp", "t5_fsdp"):  # of which a batch has not the first
        if (value := flags.get(name)) is not None and value is not False:
            asked[name] = value
    return Placement.from_dict({**base.placement, **asked})


def read_encoding(flags: Flags, base: Base) -> Encoding:
    """Raises RequestError, also where they are asked for and the output is none that they are for."""
    asked = given(crf=flags["crf"], codec=flags["codec"])
    encoding = Encoding.from_dict({**base.encoding, **asked})
    if asked and flags.get("output"):  # a batch has a folder of .mp4s instead
        from wan22.video import is_mp4

        if not is_mp4(flags["output"]):
            raise RequestError(f"--{next(iter(asked))} is for an .mp4, which {flags['output']} is not")
    return encoding


def read_checkpoint(flags: Flags, base: Base, task: str) -> Checkpoint:
    """The checkpoint that the flags name, opened; no weight is read. Raises RequestError."""
    parts = Parts(*(flags[name] for name in ("high_noise", "low_noise", "text_encoder", "vae", "tokenizer")))
    ckpt_dir = flags["ckpt_dir"]
    model = flags["model"] or (None if ckpt_dir else base.model)
    where = find_checkpoint(model, ckpt_dir) if model or ckpt_dir or not parts.need_no_base else None
    return open_checkpoint(where, task, parts)


def make_request(settings: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> Request:
    """A whole request of settings; a checkpoint's own boundary counts where none was asked for. Raises RequestError."""
    if "prompt" not in settings:
        raise RequestError("--prompt is missing", hint='say what to show: --prompt "a red ball rolls over a table"')
    request = Request.from_dict(dict(settings))
    return request.with_boundary(checkpoint.boundary) if checkpoint else request


def read_any_record(file: str) -> dict[str, Any]:
    """The record inside a video, sheet, folder of frames, latents, state or .json. Raises RequestError."""
    if file.endswith(".safetensors"):
        from wan22.state import read_latents_record

        return read_latents_record(Path(file))
    from wan22.output.record import read_record

    return read_record(file)


def parse_bool(flag: str, text: str) -> bool:
    """`True`, `false`, `yes`, `0` … as the published flags take them. Raises RequestError."""
    known = {"true": True, "yes": True, "y": True, "t": True, "1": True,
             "false": False, "no": False, "n": False, "f": False, "0": False}  # fmt: skip
    if text.lower() not in known:
        raise RequestError(f"{flag} {text}: neither True nor False")
    return known[text.lower()]


def normalize(argv: list[str]) -> tuple[list[str], bool]:
    """`--frame_num` → `--frame-num`, in names and not in values; `--debug` is taken from wherever it stands."""
    words: list[str] = []
    debug = False
    for place, word in enumerate(argv):
        if word == "--":
            return words + argv[place:], debug
        if word == "--debug":
            debug = True
        elif re.match(r"--[A-Za-z]", word):
            name, equals, value = word.partition("=")
            words.append(name.replace("_", "-") + equals + value)
        else:
            words.append(word)
    return words, debug


def given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def with_options_of(
    command: Callable[..., Any], without: Collection[str] = (), only: Collection[str] | None = None
) -> Callable[[Callable], Callable]:
    """A decorator that gives a command another one's options too, but for those named; they come as keywords.

    The command's own parameters come first, and one of the same name takes the other's place. only: these alone; the
    others come as None, which is not asked for.
    """

    def decorate(function: Callable) -> Callable:
        own = [
            parameter for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]  # fmt: skip
        taken = {*without, *(parameter.name for parameter in own)}
        others = [
            parameter for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name not in taken
        ]  # fmt: skip
        unasked: dict[str, Any] = {}
        if only is not None:
            unasked = {parameter.name: None for parameter in others if parameter.name not in only}
            others = [parameter for parameter in others if parameter.name in only]

        @functools.wraps(function)
        def wrapper(**flags: Any) -> Any:
            return function(**unasked, **flags)

        wrapper.__signature__ = inspect.Signature([*own, *others])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *others)}
        del wrapper.__wrapped__  # type: ignore[attr-defined]
        return wrapper

    return decorate
