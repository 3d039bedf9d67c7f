"""The command that measures: bench. `cli.py` adds it to its own. Thin: flags → one call, and torch only inside it."""

import json
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from wan22.config import RequestError, RunError
from wan22.options import (
    Base,
    make_request,
    read_checkpoint,
    read_placement,
    read_precision,
    read_request,
    with_options_of,
)
from wan22.several.launch import refuse_torchrun

# What of a command that makes videos counts for its measurement too, where generate has it.
IN_BENCH = (
    "size", "frames", "steps", "guidance", "guidance_low", "guidance_start", "guidance_stop", "precision", "dtype",
    "scope", "attention", "vae_dtype", "device", "offload", "gpu_memory_limit", "model", "ckpt_dir",
)  # fmt: skip


def add_to(app: typer.Typer, generate: Callable[..., None]) -> None:
    """The command, which takes some of generate's options too."""
    app.command("bench")(with_options_of(generate, only=IN_BENCH)(bench))


def bench(
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="diffusers, or published: their transformer on the same work. Repeatable."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=1000, help="So many blocks of random weights, instead of 40.")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Forwards timed; the median counts.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="One forward, its parts timed in it.")] = False,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Of diffusers the eager form alone.")] = False,
    decoding: Annotated[bool, typer.Option("--decode", help="Decoding too; --against diffusers: by both.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Encoding of two prompts too.")] = False,
    no_forward: Annotated[bool, typer.Option("--no-forward", help="Only --decode and --text.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Memory instead: predicted and measured.")] = False,
    rows: Annotated[
        str | None, typer.Option(metavar="SIZE:OFFLOAD[:LIMIT],…", help="Of --memory: 720p:block:16GiB,480p:none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    **flags: Any,
) -> None:
    """Measure one forward beside the floor that this device sets; random weights of the published size by default."""
    refuse_torchrun(os.environ, "bench measures one GPU, and is not for torchrun",
                    "several GPUs: torchrun … scripts/bench_parallel.py")  # fmt: skip
    if rows is not None and not memory:
        raise RequestError("--rows is for --memory")
    if memory and (other := [name for name, asked in {"--against": against, "--quick": quick, "--decode": decoding,
                                                      "--text": text, "--no-forward": no_forward}.items() if asked]):
        raise RequestError(f"{other[0]} goes with no --memory, which measures memory instead")
    base = Base.of_preset(None, flags["model"])
    request = make_request(read_request(flags | {"prompt": "x"}, base))
    # One expert at work, as in any run; both are for runs that cross the boundary.
    precision, placement = read_precision(flags, base), read_placement(flags, Base({}, {}, {"offload": "expert"}))
    from wan22 import bench as library

    if no_forward and not decoding and not text:
        raise RequestError("--no-forward leaves nothing to measure", hint="add --decode or --text")
    options = library.Options(against or (), not no_compile, repeats, quick, not no_forward, decoding, text)
    checkpoint = library.checkpoint_for(read_checkpoint(flags, base, request.task) if model_named(flags) else None,
                                        placement, layers, zeros=memory)  # fmt: skip
    measured = library.run(checkpoint, request, precision, placement, options)
    as_text = library.as_text
    if memory:
        from wan22.measuring import memory_rows as bench_memory

        asked = () if rows is None else rows.split(",")
        measured = bench_memory.run(checkpoint, request, precision, placement, asked)
        as_text = bench_memory.as_text
    finite = True
    for number, row in enumerate(measured):
        if memory and not number and not as_json:
            print(bench_memory.HEAD)
        print(json.dumps(row) if as_json else as_text(row), flush=True)
        finite = finite and row.get("finite", True)
    if not finite:
        raise RunError("the velocity is not finite numbers: what was measured counts for nothing")


def model_named(flags: dict[str, Any]) -> bool:
    return bool(flags["model"] or flags["ckpt_dir"])
