"""What a batch costs beside a bare loop over `pipe.generate`, and what saving a run's state costs beside its steps.

    python scripts/bench_batch.py --model demo                   both, on a CPU or a GPU
    python scripts/bench_batch.py --items 0                      the state alone, at the published size

The batch's worker and the loop take turns, item by item, so that both meet the same machine: while one works the other
waits. An item of the batch counts from when the parent may hand it out until it hears of its end; the loop is timed
with its file written (`result.save`) and without. Of the state, what counts is the time that a run's own thread spends
on it (`keep`); the saving itself goes on beside the steps, and is told too. Medians, and the ratios of throughput; and
processor seconds (parent, worker and ffmpeg together), which on a busy machine say more.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TINY = ROOT / "tests" / "golden" / "tiny-T2V-A14B"
STEP = 20.0  # seconds of a step at the published size, about, on a card of today


def batch_beside_loop(options: argparse.Namespace) -> None:
    """Print a row for each, and the ratios."""
    from wan22 import batch, cli, cli_many
    from wan22.many.items import read_items
    from wan22.many.local import LocalEngine, count_workers
    from wan22.many.worker import Work
    from wan22.options import normalize, read_base, read_checkpoint, read_placement
    from wan22.pipeline import Pipeline
    from wan22.report import Reporter

    app: Any = cli.typer.main.get_command(cli.app)
    words = ["x.txt", "--model", options.model, "--device", options.device]
    for name in ("size", "frames", "steps"):
        words += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    given = app.commands["batch"].make_context("batch", normalize(words)[0]).params
    flags = {**given, "prompt": None, "from_file": None}
    base = read_base(flags)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "x.txt").write_text("\n".join(f"a red ball rolls over table {n}" for n in range(options.items + 1)))
        items, bad = read_items(folder / "x.txt", flags, base, read_checkpoint(flags, base, "t2v-A14B"),
                                lambda words: cli_many.parse_line(app, words), seeds=[], repeat=1)  # fmt: skip
        jobs, bad = batch.plan_jobs(items, bad, flags, base)
        assert not bad, bad
        devices = count_workers(1, read_placement(flags, base))
        pipe = Pipeline.from_pretrained(options.model, device=devices[0])
        pipe.encode([text for item in items for text in (item.request.prompt, item.request.negative_prompt)],
                    Reporter())  # fmt: skip
        times: dict[str, list[float]] = {"batch": [], "generate": [], "generate, save": []}
        cpu: dict[str, list[float]] = {name: [] for name in times}
        free, used = time.perf_counter(), 0.0

        def tell(event: str, **data: Any) -> None:
            nonlocal free, used
            if event != "done":
                return
            times["batch"].append(time.perf_counter() - free)
            cpu["batch"].append(processor_seconds() - used)
            start, used = time.perf_counter(), processor_seconds()
            result = pipe.generate(items[len(times["batch"]) - 1].request)
            times["generate"].append(time.perf_counter() - start)
            cpu["generate"].append(processor_seconds() - used)
            result.save(folder / f"loop-{len(times['batch'])}.mp4")
            times["generate, save"].append(time.perf_counter() - start)
            cpu["generate, save"].append(processor_seconds() - used)
            free, used = time.perf_counter(), processor_seconds()

        engine = LocalEngine(devices, Work(dict(flags), base, folder / "out"))
        batch.Batch(jobs, folder / "out", engine, tell).run([])
    print(f"{options.items} items on {devices[0]}; seconds an item, median (first item left out: it reads the weights)")
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    spent = {name: statistics.median(values[1:]) for name, values in cpu.items()}
    for name, value in median.items():
        print(f"  {name:<16}{value:8.3f}, of a processor {spent[name]:8.3f}")
    for name in ("generate", "generate, save"):
        print(f"batch throughput / the loop's with {name}: {median[name] / median['batch']:.3f}, "
              f"by processor seconds {spent[name] / spent['batch']:.3f}")  # fmt: skip


def processor_seconds() -> float:
    """Of this process, those that it has started, and those that have ended since."""
    import psutil

    me = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (me, *me.children(recursive=True)))


def saving(options: argparse.Namespace) -> None:
    """Print what a saving at the published size costs the run, and takes."""
    import torch

    from wan22.config import Request
    from wan22.many import claim
    from wan22.state import Progress, RunState

    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    latents = torch.randn(Request("x").latent_shape, device=device)
    solver = {"model_outputs": [torch.randn_like(latents), torch.randn_like(latents)],
              "last_sample": torch.randn_like(latents), "this_order": 2}  # fmt: skip
    kept, saved = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        output = Path(name) / "v.mp4"
        held = claim.take(output.with_name(".v.claim"))
        assert held
        with RunState(output, {"request": {}}, held, steps=40, save_every=0, automatic=False) as state:
            for step in range(12):
                start = time.perf_counter()
                state.keep(Progress(step + 1, latents, solver))
                kept.append(time.perf_counter() - start)
                assert state._writer
                state._writer.join()
                saved.append(time.perf_counter() - start)
            size = state.path.stat().st_size
            state.close()
    keep, save = statistics.median(kept), statistics.median(saved)
    print(f"state at the published size: {size / 2**20:.0f} MiB; a saving takes {1000 * keep:.2f} ms of the run's "
          f"thread ({keep / STEP:.4%} of a step of {STEP:.0f} s) and {1000 * save:.0f} ms beside it, once in 30 s")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="a folder, or a name that --model takes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--size", default="")
    parser.add_argument("--frames", default="")
    parser.add_argument("--steps", default="")
    parser.add_argument("--folder", default=None, help="where the state is saved; default: for temporary files")
    options = parser.parse_args(argv)
    if options.items:
        batch_beside_loop(options)
    saving(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
