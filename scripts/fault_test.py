"""Kill small runs at random moments, and see that the same command goes on: `python scripts/fault_test.py --points 25`.

Every point is a run in an empty folder, killed (SIGKILL) at a random moment after a random step (or before the first,
or while it decodes and writes), and then run again until it finishes. A point holds where the file is bit-identical to
the undisturbed one's, nothing else is left in the folder, and no more than one save interval was computed again. Every
third point names neither seed nor output. `--batches N` kills whole batches so, workers and all. Prints a table.

Runs are forked from this process, which has imported the libraries once. Needs a POSIX system.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PROMPT = "a red ball rolls over a table"
SLACK = 1.0  # seconds that a saving may take on a busy machine


@dataclass
class Run:
    """How a run went: exit status, events with the seconds at which they came, and how long it took."""

    status: int = 0
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0

    def steps(self) -> list[tuple[float, int]]:
        return [(at, event["step"]) for at, event in self.events if event["event"] == "step"]

    def resumed(self) -> int:
        return next((event["resumed"] for _, event in self.events if "resumed" in event), 0)


def run(command: list[str], folder: Path, kill_after: float | None = None, step: int = 0) -> Run:
    """Run a command line in a folder, in a forked process; kill it, and all its group, some seconds after a step."""
    reading, writing = os.pipe()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        _be_the_command(command, folder, writing)
    os.close(writing)
    result, deadline, killed = Run(), None if kill_after is None or step else began + kill_after, False
    import select

    buffer = b""
    while True:
        if deadline and not killed and time.perf_counter() >= deadline:
            os.killpg(child, signal.SIGKILL)
            killed = True
        wait = None if deadline is None or killed else max(0.0, deadline - time.perf_counter())
        if not select.select([reading], [], [], wait)[0]:
            continue
        if not (data := os.read(reading, 65536)):
            break
        *lines, buffer = (buffer + data).split(b"\n")
        now = time.perf_counter() - began
        result.events += [(now, json.loads(line)) for line in lines]
        if kill_after is not None and deadline is None and step in {number for _, number in result.steps()}:
            deadline = began + now + kill_after
    os.close(reading)
    _, status = os.waitpid(child, 0)
    result.status, result.seconds = os.waitstatus_to_exitcode(status), time.perf_counter() - began
    return result


def _be_the_command(command: list[str], folder: Path, writing: int) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        os.dup2(writing, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.chdir(folder)
        from wan22 import cli

        code = cli.main(command)
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def check(first: Run, last: Run, interval: float) -> str | None:
    """What is wrong with how a killed run went on; None where nothing is."""
    if last.status:
        return f"exit code {last.status}"
    resumed = last.resumed()
    if [step for _, step in last.steps()] != list(range(resumed + 1, resumed + 1 + len(last.steps()))):
        return "steps are missing"
    # What is computed again was all done in the last interval, but for the time that a saving takes.
    if (lost := lost_seconds(first, last)) > interval + SLACK:
        return f"the first step that is made again was done {lost:.1f} s before the kill"
    return None


def lost_seconds(first: Run, last: Run) -> float:
    """How long before the kill the first step was done that was made again."""
    return max((first.seconds - at for at, step in first.steps() if step > last.resumed()), default=0.0)


def pick(whole: Run) -> tuple[int, float]:
    """A step after which to kill (0: before the first), and how many seconds later, by an undisturbed run's clock."""
    times = [0.0, *(at for at, _ in whole.steps()), whole.seconds]
    step = random.randrange(len(times) - 1)
    return step, random.uniform(0, times[step + 1] - times[step])


def test_point(number: int, options: argparse.Namespace, whole: Run, reference: bytes, again: Callable) -> list[str]:
    """One point: a row of the table, the last cell `ok` or what is wrong."""
    named = number % 3 != 2
    command = [*options.command, *(["--output", "v.mp4", "--seed", "7"] if named else [])]
    with tempfile.TemporaryDirectory() as name:
        folder, (step, later) = Path(name), pick(whole)
        first = run(command, folder, later, step)
        left = sorted(path.name for path in folder.iterdir())
        if len(left) == 1 and left[0].endswith(".mp4"):
            # Killed between the video's being whole and the process's end: the command would refuse to write over it.
            verdict = "other bits" if named and (folder / left[0]).read_bytes() != reference else "ok"
            return [str(number), f"{step} + {later:.2f} s", "finished", "", "", "", verdict]
        last = run(command, folder)
        wrong = check(first, last, options.save_every)
        videos = sorted(path.name for path in folder.iterdir())
        if wrong is None and (len(videos) != 1 or not videos[0].endswith(".mp4")):
            wrong = f"left behind: {videos}"
        if wrong is None:
            seed = next(e["seed"] for _, e in last.events if "seed" in e) if last.events[:-1] else 7
            expected = reference if named else again(seed)
            wrong = None if (folder / videos[0]).read_bytes() == expected else "other bits"
        done = max((step for _, step in first.steps()), default=0)
        again_made = max(0, done - last.resumed())
        when, lost = f"{step} + {later:.2f} s", f"{lost_seconds(first, last):.2f}"
        return [str(number), when, str(done), str(last.resumed()), str(again_made), lost, wrong or "ok"]


def test_batch(number: int, options: argparse.Namespace, items: int) -> list[str]:
    """One batch, its whole process group killed again and again, against the same one undisturbed."""
    lines = "\n".join(f"{PROMPT} number {index}" for index in range(items))
    command = ["batch", "prompts.txt", "--output", "out", *options.common, "--workers", "2"]
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other:
        for folder in (Path(name), Path(other)):
            (folder / "prompts.txt").write_text(lines)
        whole = run(command, Path(other))
        kills = 0
        while kills < 3 and run(command, Path(name), random.uniform(0.3, 0.9) * whole.seconds).status:
            kills += 1
        last = run(command, Path(name))
        made = {path.name: path.read_bytes() for path in (Path(name) / "out").glob("*.mp4")}
        expected = {path.name: path.read_bytes() for path in (Path(other) / "out").glob("*.mp4")}
        left = [path.name for path in (Path(name) / "out").iterdir() if path.name not in made]
        wrong = (f"exit codes {whole.status}, {last.status}" if whole.status or last.status else
                 "other bits" if made != expected or len(made) != items else
                 f"left behind: {left}" if sorted(left) != ["batch.jsonl", "index.html"] else "ok")  # fmt: skip
        return [f"batch {number}", f"{kills} kills", f"{items} items", "", "", "", wrong]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--batches", type=int, default=0)
    tiny = str(ROOT / "tests" / "golden" / "tiny-T2V-A14B")
    parser.add_argument("--model", "--ckpt_dir", default=tiny, help="a folder, or a name that --model takes")
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--frames", default="9")
    parser.add_argument("--steps", default="24")
    parser.add_argument("--save_every", type=float, default=0.2, help="seconds")
    parser.add_argument("--random", type=int, default=None, help="a seed for the moments")
    options = parser.parse_args(argv)
    random.seed(options.random)
    model = os.path.abspath(options.model) if os.path.isdir(options.model) else options.model
    options.common = ["--model", model, "--size", options.size,
                      "--frames", options.frames, "--steps", options.steps,
                      "--save-every", str(options.save_every), "--json"]  # fmt: skip
    options.command = ["generate", "--prompt", PROMPT, *options.common]

    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler  # noqa: F401
    from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401

    import wan22.pipeline  # noqa: F401

    torch.set_num_threads(1)  # a fork has no threads but its own

    def undisturbed(seed: int) -> tuple[bytes, Run]:
        with tempfile.TemporaryDirectory() as folder:
            result = run([*options.command, "--output", "v.mp4", "--seed", str(seed)], Path(folder))
            assert result.status == 0, result
            return (Path(folder) / "v.mp4").read_bytes(), result

    reference, whole = undisturbed(7)
    print(f"undisturbed: {whole.seconds:.1f} s")
    row = "{:>8}  {:>12}  {:>8}  {:>12}  {:>11}  {:>10}  {}"
    print(row.format("point", "killed after", "at step", "went on from", "steps again", "seconds", ""))
    rows = []
    for number in range(options.points):
        rows.append(test_point(number, options, whole, reference, lambda seed: undisturbed(seed)[0]))
        print(row.format(*rows[-1]), flush=True)
    for number in range(options.batches):
        rows.append(test_batch(number, options, items=6))
        print(row.format(*rows[-1]), flush=True)
    good = sum(cells[-1] == "ok" for cells in rows)
    longest = max((float(cells[-2]) for cells in rows if cells[-2]), default=0.0)
    print(f"{good} of {len(rows)} held; at most {longest:.2f} s made again, saved every {options.save_every:g} s")
    return good != len(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
