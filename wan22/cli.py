"""The command line: flags → the three dataclasses → one call. Thin, and torch is imported only inside a command.

Long options may be written with `-` or `_`. stdout carries data, stderr everything else. Exit codes: 0 done, 1 failed
while running, 2 wrong request, 3 does not fit, 130 and 143 interrupted. No traceback unless `--debug`.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import wan22
import wan22.plan as planning
import wan22.several.launch as launching
from wan22 import cli_bench, cli_many
from wan22.capability import ADA, PRESETS
from wan22.checkpoint import Parts, find_checkpoint, open_checkpoint
from wan22.config import (
    ATTENTIONS,
    CODECS,
    DEFAULT_TASK,
    SOLVERS,
    WEIGHTS,
    Encoding,
    Placement,
    Precision,
    Request,
    RequestError,
    WanError,
    is_out_of_memory,
    one_line,
    parse_bytes,
    preset_names,
)
from wan22.options import (
    Base,
    Command,
    Flags,
    given,
    make_request,
    normalize,
    read_any_record,
    read_base,
    read_checkpoint,
    read_encoding,
    read_placement,
    read_precision,
    read_request,
    with_options_of,
)
from wan22.output.names import NOT_ALLOWED, next_free, reason
from wan22.several.mesh import Mesh, Shares
from wan22.several.watch import Member, News, announce, of_another
from wan22.signals import STOPPED, UNREAD, never_swallowed, stop
from wan22.state import is_finished
from wan22.streams import open_streams
from wan22.video import IfExists, check_sidecar, check_writable, write_sidecar

if TYPE_CHECKING:
    from wan22.pipeline import Pipeline
    from wan22.prompt_extend import Extension
    from wan22.report import Reporter

app = typer.Typer(
    name="wan22",
    help="A prompt in, a video out, with Wan2.2-T2V-A14B.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


LORA = "FILE[:STRENGTH[:LEAD]]"
# Parts of a checkpoint, for every command that opens one.
HighNoise = Annotated[
    str | None, typer.Option(metavar="PATH", help="Another high-noise expert: a file or folder in any layout.")
]
LowNoise = Annotated[str | None, typer.Option(metavar="PATH", help="Another low-noise expert.")]
TextEncoderPath = Annotated[str | None, typer.Option("--text-encoder", metavar="PATH", help="Another text encoder.")]
VaePath = Annotated[str | None, typer.Option("--vae", metavar="PATH", help="Another VAE.")]
TokenizerPath = Annotated[str | None, typer.Option("--tokenizer", metavar="PATH", help="Another tokenizer's folder.")]


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
    use_prompt_extend: Annotated[
        bool, typer.Option("--use-prompt-extend", help="Have a language model write the prompt out first.")
    ] = False,
    prompt_extend_method: Annotated[
        str | None, typer.Option(help="local_qwen (default), or dashscope: any OpenAI-compatible endpoint.")
    ] = None,
    prompt_extend_model: Annotated[
        str | None, typer.Option(help="Default: Qwen2.5_14B of local_qwen, qwen-plus of dashscope.")
    ] = None,
    prompt_extend_target_lang: Annotated[str | None, typer.Option(help="zh (default), or en.")] = None,
    prompt_extend_url: Annotated[
        str | None,
        typer.Option(help="Of the endpoint. The key: DASH_API_KEY, DASHSCOPE_API_KEY or OPENAI_API_KEY, if set."),
    ] = None,
    prompt_extend_fallback: Annotated[
        bool, typer.Option("--prompt-extend-fallback", help="Where that fails, go on with the prompt as it is.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="demo, a folder, or owner/name in the Hugging Face cache.")] = None,
    ckpt_dir: Annotated[str | None, typer.Option(help="The folder of weights.")] = None,
    high_noise: HighNoise = None,
    low_noise: LowNoise = None,
    text_encoder: TextEncoderPath = None,
    vae: VaePath = None,
    tokenizer: TokenizerPath = None,
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
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar=LORA, help="An adapter for both experts, or a folder with a pair. Repeatable."),
    ] = None,
    lora_high: Annotated[list[str] | None, typer.Option(metavar=LORA, help="For the high-noise expert.")] = None,
    lora_low: Annotated[list[str] | None, typer.Option(metavar=LORA, help="For the low-noise expert.")] = None,
    lora_dir: Annotated[str | None, typer.Option(help="Where to look first for adapters named without a path.")] = None,
    lead_steps: Annotated[int | None, typer.Option(help="First steps with LEAD strengths and --guidance-lead.")] = None,
    guidance_lead: Annotated[float | None, typer.Option(help="Of the lead steps.")] = None,
    guidance_start: Annotated[
        float | None, typer.Option(metavar="X", help="No guidance before this fraction of the steps; default: 0.")
    ] = None,
    guidance_stop: Annotated[float | None, typer.Option(metavar="X", help="None from this one on; default: 1.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", "--base-seed", help="Default: one is drawn and told.")] = None,
    noise_device: Annotated[str | None, typer.Option(help="cpu, or cuda to draw as the published code does.")] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "--save-file", help=".mp4, .gif, .png (a frame sheet), or a folder of frames."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
    save_every: Annotated[float | None, typer.Option(metavar="SECONDS", help="Between savings of the state.")] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what it comes to in NAME.preview.webp, until the video is there.")
    ] = False,
    keep_latents: Annotated[bool, typer.Option("--keep-latents", help="Leave NAME.latents.safetensors too.")] = False,
    sidecar: Annotated[bool, typer.Option("--sidecar", help="Write the file's record to NAME.json too.")] = False,
    crf: Annotated[int | None, typer.Option(help=f"Of an .mp4: 0 (best) to 51; default: {Encoding.crf}.")] = None,
    codec: Annotated[str | None, typer.Option(help=f"Of an .mp4: {', '.join(CODECS)}.")] = None,
    from_file: Annotated[str | None, typer.Option("--from", help="Make the video of this file again.")] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"{', '.join(PRESETS)}: settings of the flags below, as this card can do them.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Weights: {', '.join(WEIGHTS)}; fp8 and int8 approximate.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="Of 8-bit products: ffn, or all (default).")] = None,
    attention: Annotated[str | None, typer.Option(help=", ".join(ATTENTIONS) + ".")] = None,
    vae_dtype: Annotated[str | None, typer.Option(help="float32 (default, exact), or bf16 (50 dB PSNR).")] = None,
    step_cache: Annotated[
        float | None, typer.Option(metavar="X", help="Skip blocks while the first one changes less than this: 0.2.")
    ] = None,
    convert_model_dtype: Annotated[
        bool, typer.Option("--convert-model-dtype", help="Experts in bf16 (what a GPU does anyway).")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N.")] = None,
    offload: Annotated[
        str | None, typer.Option(help="auto, none (keep both experts), expert (one), block (part of one), disk.")
    ] = None,
    gpu_memory_limit: Annotated[str | None, typer.Option(help="GPU memory to make do with: 16GiB.")] = None,
    offload_model: Annotated[str | None, typer.Option(metavar="BOOL", help="True: --offload expert.")] = None,
    t5_cpu: Annotated[bool, typer.Option("--t5-cpu", help="Text encoder on the CPU.")] = False,
    no_prompt_cache: Annotated[
        bool, typer.Option("--no-prompt-cache", help="Encode prompts that were encoded before, and keep none.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="Processes to start, a GPU each; or torchrun, or srun.")
    ] = None,
    dit_fsdp: Annotated[bool, typer.Option("--dit-fsdp", help="Each GPU keeps a part of the experts.")] = False,
    t5_fsdp: Annotated[bool, typer.Option("--t5-fsdp", help="Each GPU keeps a part of the text encoder.")] = False,
    ulysses_size: Annotated[int | None, typer.Option(help="GPUs that exchange tokens for heads.")] = None,
    ring_size: Annotated[int | None, typer.Option(help="GPUs that pass keys and values on, beside these.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and stop.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Make a video from a prompt."""
    flags = dict(locals())
    team = launching.team_of(os.environ)
    if team.world > 1:
        from wan22.parallel import meet

        _running.member = meet(team)
    base = read_base(flags)
    settings = read_request(flags, base)
    request = make_request(settings)
    precise, placement = read_precision(flags, base), read_placement(flags, base)
    encoding = read_encoding(flags, base)
    launching.refuse_lonely(placement, precise, team)
    extension = read_extension(flags)
    if output and team.rank == 0:
        check_output(output, overwrite, sidecar, encoding)
    checkpoint = read_checkpoint(flags, base, request.task)
    request = make_request(settings, checkpoint)
    sizes = planning.Sizes.of(checkpoint)
    mesh, shares = planning.spread(request, placement, sizes, team)
    planning.require_gpus(placement, team)
    needs = planning.require_here(request, precise, placement, sizes, shares)
    if team.rank == 0:
        planning.require_disk(needs, Path(output or "video.mp4"))
    if mesh.world > team.world and not dry_run:
        raise typer.Exit(launching.launch(_running.words, mesh.world))
    from wan22.pipeline import Pipeline
    from wan22.report import ConsoleReporter, JsonReporter, Reporter

    reporter = Reporter() if team.rank else JsonReporter() if json_lines else ConsoleReporter()
    ranks = None
    if team.world > 1:
        from wan22.parallel import Ranks

        ranks = Ranks.of(team, mesh, placement)
    pipeline = Pipeline(checkpoint, precise, placement, encoding, ranks)
    if base.checkpoint and base.checkpoint != pipeline.identity:
        raise RequestError(
            f"--from {from_file}: was made with another checkpoint than {checkpoint.folder}",
            hint="name the one it was made with: --ckpt_dir FOLDER",
        )
    for warning in pipeline.warnings(pipeline.resolve(request)):
        reporter.warn(warning)
    target = Path(output) if output else None
    if dry_run:
        if team.rank == 0:
            request = pipeline.resolve(request)
            name = target or next_free(pipeline.name(request, Path()))
            describe(request, pipeline, name, extension, json_lines, mesh, shares)
        if ranks:
            ranks.part()
        return
    if not output and team.rank == 0:
        check_writable("video.mp4", if_exists="number", encoding=encoding)
    if extension and team.rank == 0:
        request = extension(request, pipeline.device, reporter)
    make(pipeline, request, target, flags, reporter)
    if ranks:
        ranks.part()


@app.command()
def download(
    repo: Annotated[
        str, typer.Argument(help="The published repository, a short name such as lightning, or OWNER/NAME[@REVISION].")
    ] = "Wan2.2-T2V-A14B",
    ckpt_dir: Annotated[str | None, typer.Option(help="The folder to fill; default: the Hugging Face cache.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A file, folder or pattern; may be repeated.")] = None,
    source: Annotated[str, typer.Option(help="hub, or modelscope.")] = "hub",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched, and stop.")] = False,
    check: Annotated[str | None, typer.Option(metavar="DIR", help="Hash all that is in DIR, fetch nothing.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Fetch weights, every byte of them verified; run again to go on."""
    from wan22 import download as library

    if check is not None:
        report = library.check(check, only=only or ())
        print(json.dumps(report.to_dict()) if json_lines else "\n".join(report.lines()))
        raise typer.Exit(0 if report.whole else 1)
    result = library.download(repo, ckpt_dir=ckpt_dir, only=only or (), source=source, dry_run=dry_run)
    if json_lines:
        print(json.dumps(result.to_dict()))
    else:
        print("\n".join(result.lines()) if dry_run else result.folder)
    raise typer.Exit(3 if dry_run and not result.fits else 0)


@app.command()
def show(
    file: Annotated[
        str,
        typer.Argument(help="A video (or sheet, folder of frames, latents) that wan22 made; a checkpoint or a part."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Of a checkpoint too: one JSON object.")] = False,
) -> None:
    """Print how a video was made, as JSON; or what a checkpoint folder or a file of weights is."""
    from wan22.files.contents import as_text, describe, holds_weights

    if not holds_weights(Path(file)):
        print(json.dumps(read_any_record(file), ensure_ascii=False, indent=2))
    elif as_json:
        print(json.dumps(describe(Path(file)), ensure_ascii=False))
    else:
        print(as_text(describe(Path(file))))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A video (.mp4, .gif, folder of frames), or latents.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of the same size, measured against A.")],
    output: Annotated[str | None, typer.Option(metavar="FILE.png", help="Plot the measures frame by frame.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, every frame in it.")] = False,
) -> None:
    """Tell how far two videos are apart (PSNR, SSIM), or two files of latents (relative error)."""
    from wan22.compare import check_plot, save_plot
    from wan22.compare import compare as measure

    if output is not None:
        check_plot(output, overwrite)
    comparison = measure(a, b)
    print(json.dumps(comparison.to_dict(), ensure_ascii=False) if as_json else "\n".join(comparison.lines()))
    if output:
        save_plot(comparison, output, overwrite)
        print(f"plot: {output}", file=sys.stderr)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint folder in any layout, or a name, as --model takes it.")],
    target: Annotated[str, typer.Argument(metavar="DEST", help="The folder to make.")],
    dtype: Annotated[str, typer.Option(help="bf16, or fp8 (a scale a row).")] = "bf16",
    high_noise: HighNoise = None,
    low_noise: LowNoise = None,
    text_encoder: TextEncoderPath = None,
    vae: VaePath = None,
    tokenizer: TokenizerPath = None,
) -> None:
    """Make one folder of sharded safetensors, in bf16 or fp8, of a checkpoint in any layout."""
    checkpoint = open_checkpoint(
        find_source(source), parts=Parts(high_noise, low_noise, text_encoder, vae, tokenizer)
    )
    for warning in checkpoint.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    from wan22.convert import convert as run

    print(run(checkpoint, Path(target), dtype))


# What of a video's flags counts for its plan too.
IN_PLAN = (
    "size", "frames", "steps", "guidance", "precision", "dtype", "scope", "attention", "vae_dtype", "step_cache",
    "offload", "t5_cpu", "gpus", "dit_fsdp", "t5_fsdp", "ulysses_size", "ring_size", "model", "ckpt_dir",
)  # fmt: skip


@app.command()
@with_options_of(generate, only=IN_PLAN)
def plan(
    gpu_memory: Annotated[str | None, typer.Option(help="As if so much were free: 24GiB; 0 for no GPU.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="As if so much were free: 64GiB.")] = None,
    rates: Annotated[
        str | None, typer.Option(metavar="FILE", help="Seconds by what `bench --decode --text --json` printed.")
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Every term, in bytes, as one JSON object.")] = False,
    **flags: Any,
) -> None:
    """Say what a video needs of memory, disk and, on a card that was measured, time, and which placement it would
    take; exit 3 when nothing fits. Without --model or --ckpt-dir, of the published model's sizes."""
    flags |= {"prompt": "x", "device": "cpu" if gpu_memory == "0" else None}
    base = Base.of_preset(None, flags["model"])
    # A card that is only imagined can do all that there is.
    precise = read_precision(flags, base, ADA if gpu_memory not in (None, "0") else None)
    request, placement = make_request(read_request(flags, base)), read_placement(flags, base)
    sizes = planning.Sizes.published()
    if flags["model"] or flags["ckpt_dir"]:
        sizes = planning.Sizes.of(read_checkpoint(flags, base, request.task))
    gpu, host = planning.rooms(gpu_memory, host_memory)
    launching.refuse_lonely(placement, precise, launching.Team())
    mesh, shares = planning.spread(request, placement, sizes)
    made = planning.make_plan(request, precise, placement, sizes, gpu, host, shares=shares)
    evaluations = request.num_steps * (2 if request.guided else 1)
    time = planning.seconds(made, request, precise, sizes, mesh, evaluations, rates)
    if json_lines:
        print(json.dumps(planning.as_dict(made) | {"seconds": time and time.phases}))
    else:
        if mesh.world > 1:
            print(f"each of {mesh.world}: {mesh}" + (", experts sharded" if placement.dit_fsdp else ""))
        print(planning.as_text(made, request, sizes))
        if time:
            print(f"time: {time}\n  as measured on {time.card[:40]}; reading weights comes besides")
    raise typer.Exit(0 if made.chosen else 3)


@app.command()
def decode(
    latents: Annotated[str, typer.Argument(help="NAME.latents.safetensors, or a run's state whose steps are done.")],
    output: Annotated[str | None, typer.Option("--output", "--save-file", help="Default: NAME.mp4 beside it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
    model: Annotated[str | None, typer.Option(help="The one that the latents were made with.")] = None,
    ckpt_dir: Annotated[str | None, typer.Option(help="The folder of weights.")] = None,
    high_noise: HighNoise = None,
    low_noise: LowNoise = None,
    text_encoder: TextEncoderPath = None,
    vae: VaePath = None,
    tokenizer: TokenizerPath = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    gpu_memory_limit: Annotated[str | None, typer.Option(help="GPU memory to make do with: 16GiB.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Make the video of latents that a run has kept."""
    launching.refuse_torchrun(os.environ, "decode is for one process alone", "without torchrun or srun")
    flags = dict(locals())
    record = read_any_record(latents)
    if output is not None:
        check_writable(output, if_exists="replace" if overwrite else "error")
    if not model and not ckpt_dir and record.get("model") == "demo":
        flags["model"] = "demo"
    checkpoint = read_checkpoint(flags, Base({}, {}, {}), DEFAULT_TASK)
    from wan22.pipeline import Pipeline
    from wan22.report import ConsoleReporter, JsonReporter

    limit = parse_bytes("--gpu-memory-limit", gpu_memory_limit) if gpu_memory_limit else None
    made_with = record.get("precision")
    vae_dtype = made_with.get("vae") if isinstance(made_with, dict) else None
    pipeline = Pipeline(checkpoint, Precision(**given(vae=vae_dtype)), Placement(device, gpu_memory_limit=limit))
    reporter = JsonReporter() if json_lines else ConsoleReporter()
    path = pipeline.decode_file(Path(latents), Path(output) if output else None, overwrite, reporter)
    reporter.finished(str(path))


def find_source(source: str) -> Path:
    """The checkpoint to convert. Raises RequestError."""
    if Path(source).exists() and not Path(source).is_dir():
        raise RequestError(f"{source}: not a folder", hint="a single file is one part: --high-noise FILE and so on")
    return find_checkpoint(source, flag="")


def read_extension(flags: Flags) -> "Extension | None":
    """How the prompt is to be extended, and that it can be. Raises RequestError."""
    if not any(flags[name] for name in flags if "prompt_extend" in name):
        return None
    from wan22.prompt_extend import Extension

    if extension := Extension.read(flags):
        extension.check()
    return extension


def check_output(output: str, overwrite: bool, sidecar: bool, encoding: Encoding) -> None:
    """That the file asked for can be written. Raises RequestError."""
    # Whole, with its state beside it: a kill came just before the end. The same command tidies up.
    if_exists: IfExists = "replace" if overwrite or is_finished(Path(output)) else "error"
    check_writable(output, if_exists=if_exists, encoding=encoding)
    if sidecar:
        check_sidecar(output, if_exists=if_exists)


def make(pipeline: "Pipeline", request: Request, target: Path | None, flags: Flags, reporter: "Reporter") -> None:
    """One run from where it stands to its end, told of. Raises RequestError, RunError."""
    from wan22.preview import preview_path

    drawn = request.seed is None
    request, state = pipeline.begin(request, target, bool(flags["overwrite"]))
    with state:
        if _running.member and not _running.member.rank:
            _running.member.rescue = state.rescue
        if state.begun:
            reporter.note(
                f"going on from step {state.begun.done} of {state.steps}, seed {request.seed}",
                resumed=state.begun.done, steps=state.steps, seed=request.seed,
            )  # fmt: skip
        else:
            reporter.note(f"seed {request.seed}" + (" (drawn)" if drawn else ""), seed=request.seed)
        if flags["preview"]:
            reporter.note(f"preview: {preview_path(state.output)}", preview=str(preview_path(state.output)))
        for adapter in request.loras:
            reporter.note(f"adapter {adapter}", sha256=adapter.sha256)
        policy: IfExists = "number" if target is None else "replace" if flags["overwrite"] else "error"
        path = pipeline.generate_file(request, state, policy, flags["keep_latents"], reporter, flags["preview"])
        if flags["sidecar"] and not (_running.member and _running.member.rank):
            write_sidecar(path, policy)
    reporter.finished(str(path))


def describe(
    request: Request, pipeline: "Pipeline", target: Path, extension: "Extension | None", as_json: bool, mesh: Mesh,
    shares: Shares,
) -> None:  # fmt: skip
    """What `generate` would do, on stdout. A prompt that would be extended is still the one given."""
    from wan22.sampling import describe_split, evaluations, plan_steps

    steps, (start, stop) = plan_steps(request), (request.guidance_start, request.guidance_stop)
    scope = f" ({pipeline.precision.scope})" if pipeline.precision.scope else ""
    plan = planning.require_here(request, pipeline.precision, pipeline.placement, pipeline.sizes, shares)
    time = planning.seconds(plan, request, pipeline.precision, pipeline.sizes, mesh, evaluations(steps))
    facts = {
        "prompt": request.prompt,
        **({"extended by": str(extension)} if extension else {}),
        "size": f"{request.width}x{request.height}, {request.num_frames} frames at {request.fps} a second",
        "steps": f"{request.num_steps} ({request.solver}, shift {request.shift:g}): "
        + describe_split(steps, request.spec.experts),
        "guidance": (f"{request.guidance_lead:g} in {request.lead_steps} lead steps, " if request.lead_steps else "")
        + f"{request.guidance_high:g} high noise, {request.guidance_low:g} low noise"
        + (f", from {start:g} to {stop:g} of the steps" if (start, stop) != (0, 1) else ""),
        **({"adapters": "; ".join(map(str, request.loras))} if request.loras else {}),
        "seed": request.seed,
        "checkpoint": str(pipeline.checkpoint.folder),
        "weights": f"{pipeline.precision.weights}{scope}, {pipeline.experts.bytes / 2**30:.2f} GiB both experts, "
        + planning.describe(plan),
        "attention": pipeline.precision.attention,
        **({"step cache": pipeline.precision.step_cache} if pipeline.precision.step_cache else {}),
        **({"VAE": pipeline.precision.vae} if pipeline.precision.vae != Precision.vae else {}),
        "device": str(pipeline.device) if mesh.world == 1 else f"{mesh.world} of {pipeline.device.type}: {mesh}",
        **({"time": f"{time}, as measured on {time.card}"} if time else {}),
        "output": str(target),
    }
    if as_json:
        print(json.dumps({"event": "plan", **facts}, ensure_ascii=False))
    else:
        for name, value in facts.items():
            print(f"{name:<12}{value}")


cli_bench.add_to(app, generate)
cli_many.add_to(app, generate)
for command in app.registered_commands:
    command.cls = Command


# Whichever click typer brings along, this is its error for wrong usage.
UsageError: type[Exception] = typer.BadParameter.mro()[2]


class _Running:
    """The command line at work, and its process's part among several."""

    words: list[str] = []  # noqa: RUF012
    member: Member | None = None


_running = _Running()


def main(argv: list[str]) -> int:
    """Run a command line; the exit code."""
    # What libraries have to say to developers is not for users.
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    words, debug = normalize(argv)
    _running.words, _running.member = argv, None
    if not debug:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):  # not ignored, by a shell
        signal.signal(signal.SIGINT, stop)
    try:
        os.getcwd()  # a folder that is gone ends libraries at odd places, oneMKL the whole process
        with never_swallowed():
            code = app(args=words, prog_name="wan22", standalone_mode=False) or 0
            sys.stdout.flush()  # what is wrong with it shall be told, too
    except SystemExit as error:
        return _stopped(error)
    except Exception as error:
        if member := _running.member:
            if debug:
                traceback.print_exc()
            return tell_others(error, member)
        if debug:
            raise
        if launching.follows(os.environ):
            return explained(error)[2]  # of a command line that is wrong, which the first process says
        return explain(error)
    if _running.member:
        _running.member.leave()
    return code


def _stopped(end: SystemExit) -> int:
    """The end that a signal asked for, or a stdout that nobody reads, is told; others go on as they are."""
    if (member := _running.member) and (end.code in STOPPED or end.code == UNREAD):
        line = STOPPED.get(end.code, "nobody reads stdout any more")
        return member.fail(News("stopped", member.rank, line, (), int(end.code)))
    if end.code in STOPPED and launching.WATCH not in os.environ:  # else who started this one says it
        print("; ".join([STOPPED[end.code], *notes(end)]), file=sys.stderr)
    raise end


def tell_others(error: Exception, member: Member) -> int:
    """One of several processes failed: all end, and this is told once; the exit code."""
    message, hints, code = explained(error)
    is_own = not of_another(error)
    if is_own and member.rank and not isinstance(error, RequestError):
        message = f"rank {member.rank}: {message}"
    kept = notes(error)  # told by whoever keeps the state, whichever rank fails
    hints = [hint for hint in hints if hint not in kept]
    return member.fail(News("failed" if is_own else "cut off", member.rank, message, tuple(hints), code))


def explain(error: Exception) -> int:
    """An error in one line on stderr, with its hint; the exit code."""
    message, hints, code = explained(error)
    announce(News("failed", 0, message, tuple(hints), code))
    return code


def explained(error: Exception) -> tuple[str, list[str], int]:
    """An error in a line, what helps, and the exit code."""
    hint: str | None
    if isinstance(error, WanError):
        message, hint, code = str(error), error.hint, error.exit_code
    elif isinstance(error, UsageError):
        message, hint, code = error.format_message(), "wan22 --help", 2  # type: ignore[attr-defined]
    elif isinstance(error, OSError) and isinstance(error.filename, str):
        message, hint, code = f"{error.filename}: {reason(error)}", None, 2 if error.errno in NOT_ALLOWED else 1
    elif isinstance(error, FileNotFoundError) and error.errno:  # os.getcwd alone has no name to give
        message, hint, code = "the current folder does not exist any more", "cd to another one", 2
    elif is_out_of_memory(error):
        message, hint, code = "out of GPU memory", "a smaller --size, fewer --frames, or --offload block", 1
    else:
        message, hint, code = f"{type(error).__name__}: {error}", "the whole story: --debug", 1
    return one_line(message), [line for line in (hint, *notes(error)) if line], code


def notes(error: BaseException) -> list[str]:
    """What was said to an exception on its way here: what is kept of a run, and where."""
    return getattr(error, "__notes__", [])


def entry(*before: str) -> NoReturn:
    """The `wan22` command; `before` comes before the words of the command line."""
    open_streams()
    try:
        code = main([*before, *sys.argv[1:]])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is stop:  # nothing is left to keep, and libraries' last deeds swallow it
                signal.signal(number, signal.SIG_DFL)
    sys.exit(code)
