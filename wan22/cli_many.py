"""The commands over many videos: batch, status, sheet, gallery. `cli.py` adds them to its own.

Thin as those are: flags → one call, and torch only inside a command.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan22.config import DEFAULT_TASK, RequestError
from wan22.options import (
    normalize,
    read_base,
    read_checkpoint,
    read_encoding,
    read_placement,
    read_precision,
    with_options_of,
)
from wan22.several.launch import Team, refuse_lonely, refuse_torchrun
from wan22.video import check_writable

if TYPE_CHECKING:
    from wan22.batch import Engine
    from wan22.many.worker import Work

TOGETHER = "--gpus-per-worker N"  # several GPUs on one video
# For the whole batch, or for one video alone.
NOT_IN_BATCH = (
    "prompt", "output", "overwrite", "from_file", "json_lines", "dry_run", "sidecar", "use_prompt_extend",
    "prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang", "prompt_extend_url",
    "prompt_extend_fallback", "gpus",
)  # fmt: skip
OF_A_LINE = (
    "prompt", "negative_prompt", "size", "frames", "fps", "steps", "shift", "solver", "guidance", "guidance_low",
    "lora", "lora_high", "lora_low", "lead_steps", "guidance_lead", "guidance_start", "guidance_stop", "seed",
    "noise_device", "task",
)  # fmt: skip


def add_to(app: typer.Typer, generate: Callable[..., None]) -> None:
    """The four commands, of which batch takes generate's options too."""

    @app.command("batch")
    @with_options_of(generate, without=NOT_IN_BATCH)
    @functools.wraps(batch)
    def checked(**flags: Any) -> None:
        refuse_torchrun(os.environ, "a batch starts its processes itself, and is not for torchrun or srun",
                        "--workers N; on several hosts --engine ray, or a job array")  # fmt: skip
        batch(**flags)

    for command in (status, sheet, gallery):
        app.command()(command)


def batch(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="Prompts (.txt), a table (.jsonl, .csv), or a folder of videos.")],
    output: Annotated[str | None, typer.Option("--output", help="The folder; default: FILE-videos.")] = None,
    seeds: Annotated[str | None, typer.Option(help="1..8, or 1,2,5: each item with each of them.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Each item so often, with another seed each time.")] = 1,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only this part; default: a SLURM array's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a GPU, one on a CPU.")] = None,
    engine: Annotated[str, typer.Option(help="local: processes here; ray: actors of a Ray cluster.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of a cluster; default: one that Ray finds, or starts.")
    ] = None,
    gpus_per_worker: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="GPUs that make each video together, and so fewer workers; default: 1."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(hidden=True)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and stop.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Events, one JSON object a line on stdout.")] = False,
    **flags: Any,
) -> None:
    """Make many videos; run again, or elsewhere too, to go on. Flags of generate count for items that do not say."""
    flags["prompt"] = flags["from_file"] = None
    if gpus is not None:
        raise RequestError("--gpus is for one video; a batch has workers", hint=TOGETHER)
    if seeds and (repeat > 1 or flags["seed"] is not None):
        raise RequestError("--seeds goes with neither --seed nor --repeat", hint="give one of them")
    from wan22 import batch as library
    from wan22.many.gallery import write_gallery
    from wan22.many.items import parse_seeds, read_items, recorded_base
    from wan22.many.worker import Work

    source, base = Path(file), read_base(flags)
    part, parts = library.parse_shard(shard)
    if source.is_dir() and not flags["preset"]:
        base = recorded_base(source, base)
    checkpoint = read_checkpoint(flags, base, DEFAULT_TASK)
    parse = functools.partial(parse_line, context.find_root().command)
    items, bad = read_items(source, flags, base, checkpoint, parse,
                            seeds=parse_seeds(seeds) if seeds else [], repeat=repeat)  # fmt: skip
    items, bad = items[part::parts], bad if part == 0 else []
    folder = Path(output or f"{source.resolve().stem}-videos")
    check_writable(folder / "video.mp4", if_exists="number", encoding=read_encoding(flags, base))
    work = Work(dict(flags), base, folder, identity=checkpoint.identity(), gpus=gpus_per_worker or 1)
    data = sys.stdout
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # where Ray prints what it has to say
        started = start_engine(engine, ray_address, gpus_per_worker, workers, work)
        stack.callback(started.close)
        there, work = None if engine == "local" else started.devices[0].partition(":")[0], started.work
        jobs, bad = library.plan_jobs(items, bad, work.flags, work.base, there, work.gpus)
        tell = functools.partial(library.json_lines, data) if json_lines else library.console(len(jobs))
        if dry_run and json_lines:
            for job in jobs:
                tell("plan", name=job.name, where=job.item.where, request=library.changes(job.item.request))
            for one in bad:
                tell("bad", where=one.where, error=one.error)
        elif dry_run:
            print("".join(f"{folder / job.name}\n" for job in jobs), end="", file=data)
            wrong = [library.Outcome(one.where, "bad", one.error) for one in bad]
            print(f"{len(jobs)} to make{', ' * bool(bad)}{library.table(wrong)}", file=sys.stderr)
        if dry_run:
            raise typer.Exit(bool(bad))
        outcomes = library.Batch(jobs, folder, started, tell).run(bad)
    page = write_gallery(folder)
    if json_lines:
        tell("finished", gallery=str(page), outcomes=[vars(outcome) for outcome in outcomes])
    else:
        print(library.table(outcomes), f"gallery: {page}", sep="\n", file=sys.stderr)
        print("\n".join(str(folder / one.name) for one in outcomes if one.what in ("done", "there")))
    raise typer.Exit(any(one.what in ("failed", "bad") for one in outcomes))


def start_engine(engine: str, address: str | None, gpus: int | None, workers: int | None, work: "Work") -> "Engine":
    """What makes the videos. Raises RequestError."""
    placement = read_placement(work.flags, work.base)
    if placement.gpus is not None:  # which only a preset can bring
        raise RequestError("--preset: gpus is for one video; a batch has workers", hint=TOGETHER)
    precision = read_precision({**work.flags, "precision": None}, work.base)
    refuse_lonely(replace(placement, gpus=work.gpus), precision, Team(), TOGETHER)
    if engine == "ray":
        from wan22.many.ray_cluster import RayEngine

        return RayEngine(address, workers, gpus, placement, work)
    if engine != "local":
        raise RequestError(f"--engine {engine}: unknown", hint="known: local, ray")
    if address is not None:
        raise RequestError("--ray-address is for --engine ray")
    from wan22.many.local import LocalEngine, count_workers

    return LocalEngine(count_workers(workers, placement, work.gpus), work)


def parse_line(app: Any, words: list[str]) -> dict[str, Any]:
    """The flags that an item of a batch gives, read as generate reads its own. Raises RequestError, UsageError."""
    command = app.commands["generate"]
    context = command.make_context("generate", normalize(words)[0], help_option_names=[])
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    if wrong := sorted(given - set(OF_A_LINE)):
        how = f": {TOGETHER}" if wrong[0] == "gpus" else ""
        raise RequestError(f"--{wrong[0].replace('_', '-')} is for the whole batch{how}")
    return {name: context.params[name] for name in given}


def status(
    folder: Annotated[str, typer.Argument(help="The folder of a batch.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what of a batch is done, running, failed and waiting, and the time left."""
    from wan22.many import journal

    if not (Path(folder) / journal.NAME).is_file():
        raise RequestError(f"{folder}: there was no batch here", hint="name the folder that a batch writes to")
    found = journal.status(Path(folder))
    print(json.dumps(found, ensure_ascii=False) if as_json else journal.as_text(found))


def sheet(
    files: Annotated[list[str], typer.Argument(help="Videos, GIFs or folders of frames.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The picture to write.")] = "sheet.png",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a picture that exists.")] = False,
) -> None:
    """Make one picture of many videos, with their prompts and seeds."""
    from wan22.many.gallery import write_sheet

    print(write_sheet([Path(file) for file in files], Path(output), overwrite))


def gallery(folder: Annotated[str, typer.Argument(help="A folder of videos.")]) -> None:
    """Write index.html over a folder: players, prompts, seeds, and the command that makes each again."""
    from wan22.many.gallery import write_gallery

    print(write_gallery(Path(folder)))
