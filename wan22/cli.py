"""The command line: flags → the three dataclasses → one call. Thin, and torch is imported only inside a command.

Long options may be written with `-` or `_`. stdout carries data, stderr everything else. Exit codes: 0 done, 1 failed
while running, 2 wrong request, 3 does not fit, 130 and 143 interrupted. No traceback unless `--debug`.
"""

import json
import os
import re
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import wan22
from wan22.checkpoint import find_checkpoint, open_checkpoint
from wan22.config import (
    DEFAULT_TASK,
    SOLVERS,
    Placement,
    Precision,
    Preset,
    Request,
    RequestError,
    WanError,
    digest,
    load_preset,
    parse_size,
    preset_names,
)

if TYPE_CHECKING:
    from wan22.pipeline import Pipeline

app = typer.Typer(
    name="wan22",
    help="A prompt in, a video out, with Wan2.2-T2V-A14B.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(wan22.__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Generate videos from text with Wan2.2-T2V-A14B."""


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option(help="What to show.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from; default: the published.")] = None,
    model: Annotated[str | None, typer.Option(help="demo, a folder, or owner/name in the Hugging Face cache.")] = None,
    ckpt_dir: Annotated[str | None, typer.Option(help="The folder of weights.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"{', '.join(preset_names())}, or FILE.toml.")] = None,
    task: Annotated[str | None, typer.Option(help=f"{DEFAULT_TASK}, the one there is.")] = None,
    size: Annotated[str | None, typer.Option(help="1280*720, 1280x720, 720p, 480p; any multiples of 16.")] = None,
    frames: Annotated[int | None, typer.Option("--frames", "--frame-num", help="4n + 1; trained on 81.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second of the file.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--sample-steps", help="Solver steps.")] = None,
    shift: Annotated[float | None, typer.Option("--shift", "--sample-shift", help="Timestep shift.")] = None,
    solver: Annotated[str | None, typer.Option("--solver", "--sample-solver", help=", ".join(SOLVERS) + ".")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "--sample-guide-scale", help="Of both experts; 1 is off.")
    ] = None,
    guidance_low: Annotated[float | None, typer.Option(help="Of the low-noise expert alone.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", "--base-seed", help="Default: one is drawn and told.")] = None,
    noise_device: Annotated[str | None, typer.Option(help="cpu, or cuda to draw as the published code does.")] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "--save-file", help=".mp4, .gif, .png (a frame sheet), or a folder of frames."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
    keep_latents: Annotated[bool, typer.Option("--keep-latents", help="Leave NAME.latents.safetensors too.")] = False,
    from_file: Annotated[str | None, typer.Option("--from", help="Make the video of this file again.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Weights: auto, bf16, float32.")] = None,
    convert_model_dtype: Annotated[
        bool, typer.Option("--convert-model-dtype", help="Experts in bf16 (what a GPU does anyway).")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N.")] = None,
    offload: Annotated[str | None, typer.Option(help="auto, none (keep both experts), expert (one at a time).")] = None,
    offload_model: Annotated[str | None, typer.Option(metavar="BOOL", help="True: --offload expert.")] = None,
    t5_cpu: Annotated[bool, typer.Option("--t5-cpu", help="Text encoder on the CPU.")] = False,
    dit_fsdp: Annotated[bool, typer.Option("--dit-fsdp", help="Shard the experts (under torchrun).")] = False,
    t5_fsdp: Annotated[bool, typer.Option("--t5-fsdp", help="Shard the text encoder (under torchrun).")] = False,
    ulysses_size: Annotated[int, typer.Option(help="GPUs that share one sequence (under torchrun).")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and stop.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Make a video from a prompt."""
    refuse_unready_parallel(dit_fsdp, t5_fsdp, ulysses_size)
    base = read_record_settings(from_file) if from_file else Base.of_preset(preset, model)
    if from_file and preset:
        raise RequestError("--from and --preset both bring settings", hint="give one of them")
    width, height = parse_size(size) if size else (None, None)
    asked = {
        "prompt": prompt, "negative_prompt": negative_prompt, "task": task, "width": width, "height": height,
        "num_frames": frames, "fps": fps, "num_steps": steps, "shift": shift, "solver": solver,
        "guidance_high": guidance, "guidance_low": guidance if guidance_low is None else guidance_low,
        "noise_device": noise_device,
    }  # fmt: skip
    settings = {**base.request, **{name: value for name, value in asked.items() if value is not None}}
    if seed is not None:
        settings["seed"] = None if seed == -1 else seed  # -1 is the published way to ask for any
    if "prompt" not in settings:
        raise RequestError("--prompt is missing", hint='say what to show: --prompt "a red ball rolls over a table"')
    request = Request.from_dict(settings)
    precision = Precision.from_dict(
        {**base.precision, **_given(weights=dtype or ("bf16" if convert_model_dtype else None))}
    )
    if offload_model is not None:
        wanted = "expert" if parse_bool("--offload_model", offload_model) else "none"
        if offload not in (None, wanted):
            raise RequestError(f"--offload_model {offload_model} and --offload {offload} contradict each other")
        offload = wanted
    placement = Placement(
        **{**base.placement, **_given(device=device, offload=offload, text_encoder="cpu" if t5_cpu else None)}
    )

    if output:
        from wan22.video import check_writable

        check_writable(output, if_exists="replace" if overwrite else "error")
    checkpoint = open_checkpoint(find_checkpoint(None if ckpt_dir else base.model or model, ckpt_dir), request.task)
    from wan22.pipeline import Pipeline
    from wan22.report import ConsoleReporter, JsonReporter

    reporter = JsonReporter() if json_lines else ConsoleReporter()
    pipeline = Pipeline(checkpoint, precision, placement)
    if base.checkpoint and base.checkpoint != pipeline.identity:
        raise RequestError(
            f"--from {from_file}: was made with another checkpoint than {checkpoint.folder}",
            hint="name the one it was made with: --ckpt_dir FOLDER",
        )
    drawn = request.seed is None
    request = pipeline.resolve(request)
    target = _target(output, request, pipeline)
    for warning in request.warnings():
        reporter.warn(warning)
    if dry_run:
        describe(request, pipeline, target, json_lines)
        return
    reporter.note(f"seed {request.seed}" + (" (drawn)" if drawn else ""), seed=request.seed)
    policy = "replace" if overwrite and output else "error" if output else "number"
    path = pipeline.generate_file(request, target, policy, keep_latents, reporter)  # type: ignore[arg-type]
    reporter.finished(str(path))


@app.command()
def show(file: Annotated[str, typer.Argument(help="A video (or sheet, folder of frames, latents) that wan22 made.")]) -> None:
    """Print how a file was made, as JSON."""
    print(json.dumps(read_any_record(file), ensure_ascii=False, indent=2))


@dataclass(frozen=True)
class Base:
    """What the flags are laid over: a preset's settings, or those of an earlier file."""

    request: dict[str, Any]
    precision: dict[str, Any]
    placement: dict[str, Any]
    model: str | None = None
    checkpoint: str | None = None  # identity that must be met again

    @classmethod
    def of_preset(cls, name: str | None, model: str | None) -> "Base":
        """The preset asked for; the demo brings its own where none is. Raises RequestError."""
        name = name or ("demo" if model == "demo" else None)
        if not name:
            return cls({}, {}, {})
        preset: Preset = load_preset(name)
        if preset.requires:
            raise RequestError(f"--preset {preset.name}: {preset.requires}")
        return cls(preset.request, preset.precision, preset.placement, model or preset.model)


def read_any_record(file: str) -> dict[str, Any]:
    """The record inside a video, sheet, folder of frames or latents. Raises RequestError."""
    if file.endswith(".safetensors"):
        from wan22.state import read_latents_record

        return read_latents_record(Path(file))
    from wan22.video import read_record

    return read_record(file)


def read_record_settings(file: str) -> Base:
    """An earlier file's settings, to make it again. Raises RequestError."""
    record = read_any_record(file)
    try:
        request, precision = dict(record["request"]), dict(record["precision"])
        model, checkpoint = str(record["model"]), str(record["checkpoint"])
    except (KeyError, TypeError, ValueError):
        raise RequestError(f"--from {file}: its record is not one of this program's") from None
    Request.from_dict(request, f"--from {file}")
    Precision.from_dict(precision, f"--from {file}")
    return Base(request, precision, {}, "demo" if model == "demo" else None, checkpoint)


def parse_bool(flag: str, text: str) -> bool:
    """`True`, `false`, `yes`, `0` … as the published flags take them. Raises RequestError."""
    known = {"true": True, "yes": True, "y": True, "t": True, "1": True,
             "false": False, "no": False, "n": False, "f": False, "0": False}  # fmt: skip
    if text.lower() not in known:
        raise RequestError(f"{flag} {text}: neither True nor False")
    return known[text.lower()]


def refuse_unready_parallel(dit_fsdp: bool, t5_fsdp: bool, ulysses_size: int) -> None:
    """Several GPUs come with a later version; till then every way to ask for them is one line. Raises RequestError."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for flag, asked in (("--dit_fsdp", dit_fsdp), ("--t5_fsdp", t5_fsdp), ("--ulysses_size", ulysses_size != 1)):
        if asked and world == 1:
            raise RequestError(f"{flag} needs several processes", hint="start with: torchrun --nproc_per_node=N generate.py …")
    if world > 1:
        if os.environ.get("RANK", "0") != "0":
            raise typer.Exit(2)
        raise RequestError("several GPUs are not supported yet", hint="run without torchrun, on one")


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _target(output: str | None, request: Request, pipeline: "Pipeline") -> Path:
    """The asked-for path, or a name made of the prompt and a digest of all that decides the picture."""
    if output:
        return Path(output)
    from wan22.names import default_output
    from wan22.video import check_writable

    name = default_output(".", request.prompt, digest(request.to_dict(), pipeline.precision.to_dict(), {"": pipeline.identity}))
    check_writable(name, if_exists="number")
    return name


def describe(request: Request, pipeline: "Pipeline", target: Path, as_json: bool) -> None:
    """What `generate` would do, on stdout."""
    from wan22.sampling import describe_split, plan_steps

    steps = plan_steps(request)
    facts = {
        "prompt": request.prompt,
        "size": f"{request.width}x{request.height}, {request.num_frames} frames at {request.fps} a second",
        "steps": f"{request.num_steps} ({request.solver}, shift {request.shift:g}): "
        + describe_split(steps, request.spec.experts),
        "guidance": f"{request.guidance_high:g} high noise, {request.guidance_low:g} low noise",
        "seed": request.seed,
        "checkpoint": str(pipeline.checkpoint.folder),
        "weights": f"{pipeline.precision.weights}, {pipeline.experts.bytes / 2**30:.2f} GiB both experts, "
        + ("both kept" if pipeline.experts.keep_both else "one at a time"),
        "device": str(pipeline.device),
        "output": str(target),
    }
    if as_json:
        print(json.dumps({"event": "plan", **facts}, ensure_ascii=False))
    else:
        for name, value in facts.items():
            print(f"{name:<12}{value}")


def normalize(argv: list[str]) -> tuple[list[str], bool]:
    """`--frame_num` → `--frame-num`, in names and not in values; `--debug` is taken from wherever it stands."""
    words, debug = [], False
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


# Whichever click typer brings along, this is its error for wrong usage.
UsageError: type[Exception] = typer.BadParameter.mro()[2]


def main(argv: list[str]) -> int:
    """Run a command line; the exit code."""
    # What libraries have to say to developers is not for users.
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    words, debug = normalize(argv)
    if not debug:
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return app(args=words, prog_name="wan22", standalone_mode=False) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except typer.Abort:
        return 130
    except Exception as error:
        if debug:
            raise
        return explain(error)


def explain(error: Exception) -> int:
    """An error in one line on stderr, with its hint; the exit code."""
    hint: str | None
    if isinstance(error, WanError):
        message, hint, code = str(error), error.hint, error.exit_code
    elif isinstance(error, UsageError):
        message, hint, code = error.format_message(), "wan22 --help", 2  # type: ignore[attr-defined]
    elif type(error).__name__ == "OutOfMemoryError":
        message, hint, code = "out of GPU memory", "a smaller --size, fewer --frames, or --offload expert", 1
    else:
        message, hint, code = f"{type(error).__name__}: {error}", "the whole story: --debug", 1
    print("error: " + " ".join(message.split()), file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(143)


def entry() -> NoReturn:
    """The `wan22` command."""
    sys.exit(main(sys.argv[1:]))
