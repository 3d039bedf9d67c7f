"""A night in minutes: a batch of small items, some lines bad, its workers killed at random, the disk filling up once.

    python scripts/night_test.py                   200 items, 10 bad lines, two local workers
    python scripts/night_test.py --engine ray      the same on a Ray cluster of two nodes here, one of which is killed
    python scripts/night_test.py --workers 1 --gpus-per-worker 2    and one worker of two processes
    python scripts/night_test.py --again 20        and 20 random files made again with --from, bit for bit

It holds where every good item is done exactly once, every bad line is reported, nothing is left in the folder but the
videos, the journal and the page, and every file is whole. No item's workers are killed twice: that is what sets an item
aside. The disk is a small tmpfs that another file fills for a while, where this process may mount one (as root on
Linux); elsewhere it does not fill up, which the last line says. The model is the tests' tiny one, or `--model demo`, or
any other. Needs a POSIX system.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TINY = ROOT / "tests" / "golden" / "tiny-T2V-A14B"
ROOM = 64 << 20  # bytes of the small disk
BAD = ("a cat --size 65x48", "a cat --frames 6", "a cat --steps many", "a cat --guidance", "--seed 1", "a --prompt 'x",
       "a cat --nothing 3", "a cat --ckpt_dir elsewhere", "a cat --solver magic", "a cat --lora none")  # fmt: skip


def lines(items: int, bad: int) -> list[str]:
    """A batch file: good lines, all of them different, and bad ones among them."""
    made = [f"a red ball rolls over table number {number}" for number in range(items)]
    for number in range(bad):
        made.insert(random.randrange(len(made)), BAD[number % len(BAD)] + " " * number)
    return made


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own at `folder`, where one may be mounted."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path, seconds: float) -> None:
    """Leave no byte, for a while."""
    path = folder / ".filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    time.sleep(seconds)
    path.unlink()


class Trouble(threading.Thread):
    """Reads the journal; kills workers at random, fills the disk once, and takes a node away."""

    def __init__(self, folder: Path, options: argparse.Namespace, mounted: bool, cluster: Any) -> None:
        super().__init__(daemon=True)
        self.folder, self.options, self.mounted, self.cluster = folder, options, mounted, cluster
        self.killed, self.filled, self.nodes = 0, 0, 0
        self.over = threading.Event()

    def run(self) -> None:
        from wan22.many import journal

        every = max(1, self.options.items // (self.options.kills + 1))
        next_kill, half = every, self.options.items // 2
        while not self.over.wait(0.05):
            events = list(journal.read(self.folder))
            done = sum(event["event"] == "done" for event in events)
            if done >= next_kill and self.killed < self.options.kills:
                time.sleep(random.uniform(0, 1))
                self.kill_one(events)
                next_kill = done + random.randint(1, 2 * every - 1)
            if self.mounted and not self.filled and done >= half:
                self.filled += 1
                fill(self.folder, self.options.full)
            if self.cluster and not self.nodes and done >= self.options.items // 3:
                self.nodes += 1
                self.cluster.remove_node(self.cluster.second, allow_graceful=False)

    def kill_one(self, events: list[dict[str, Any]]) -> None:
        """Whoever began an item last, or the one before, if it is not one that was begun before."""
        started = [event for event in events if event["event"] == "start"]
        begun = Counter(event["name"] for event in started)
        if not (fresh := [event for event in started[-2:] if begun[event["name"]] == 1]):
            return
        who = random.choice(fresh)["worker"]
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(int(who if isinstance(who, int) else who.split()[1]))
            others = [one for one in first.children() if "spawn_main" in " ".join(one.cmdline())]
            random.choice([first, *others]).kill()
            self.killed += 1


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """Two nodes on this machine, with a CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster: Any = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        cluster.second = cluster.add_node(**small)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def night(options: argparse.Namespace, folder: Path, mounted: bool, cluster: Any) -> list[str]:
    """Run it; what is wrong with how it went."""
    source = folder.parent / "prompts.txt"
    source.write_text("\n".join(lines(options.items, options.bad)), encoding="utf-8")
    engine = ["--engine", "ray", "--ray-address", cluster.address] if cluster else ["--workers", str(options.workers)]
    if options.gpus_per_worker > 1:
        engine += ["--gpus-per-worker", str(options.gpus_per_worker), "--device", "cpu"]
    command = [sys.executable, "-m", "wan22", "batch", str(source), "--output", str(folder), *options.common, *engine]
    trouble = Trouble(folder, options, mounted, cluster)
    trouble.start()
    start = time.perf_counter()
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    trouble.over.set()
    trouble.join()
    events = [json.loads(line) for line in result.stdout.splitlines()]
    told = Counter(event["event"] for event in events)
    print(f"{seconds:.0f} s, exit code {result.returncode}; {told['done']} done, {told['there']} there after a kill, "
          f"{told['bad']} bad lines, {told['failed']} failed; {trouble.killed} workers killed, {told['died']} died; "
          f"disk filled {trouble.filled} time(s), noticed {told['waiting']} time(s); {trouble.nodes} nodes killed")
    return check(options, folder, result, events)


def check(options: argparse.Namespace, folder: Path, result: Any, events: list[dict[str, Any]]) -> list[str]:
    """What is wrong; nothing where it held."""
    from wan22.video import read_frames

    wrong = []
    if result.returncode != bool(options.bad):
        wrong.append(f"exit code {result.returncode}: {result.stderr[-2000:]}")
    ends = Counter(event["name"] for event in events if event["event"] in ("done", "there", "failed"))
    failed = [event for event in events if event["event"] == "failed"]
    if failed or len(ends) != options.items or set(ends.values()) != {1}:
        wrong.append(f"{len(ends)} items ended, {sum(ends.values())} times; failed: {failed[:3]}")
    if (bad := sum(event["event"] == "bad" for event in events)) != options.bad:
        wrong.append(f"{bad} bad lines reported, not {options.bad}")
    videos = sorted(folder.glob("*.mp4"))
    if len(videos) != options.items:
        wrong.append(f"{len(videos)} videos, not {options.items}")
    left = sorted(path.name for path in folder.iterdir() if path not in videos)
    if left != ["batch.jsonl", "index.html"]:
        wrong.append(f"left behind: {left}")
    for video in videos:
        if len(read_frames(video)[0]) != int(options.frames):
            wrong.append(f"{video.name} is not whole")
    return wrong


def again(options: argparse.Namespace, folder: Path) -> list[str]:
    """Make random files again from their own records; those that came out otherwise."""
    chosen = random.sample(sorted(folder.glob("*.mp4")), options.again)
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        for number, video in enumerate(chosen):
            made = Path(name) / f"{number}.mp4"
            words = [sys.executable, "-m", "wan22", "generate", "--from", str(video), "--output", str(made)]
            subprocess.run([*words, *options.weights], check=False, capture_output=True)
            if not made.exists() or made.read_bytes() != video.read_bytes():
                wrong.append(f"{video.name} came out otherwise")
    print(f"--from: {len(chosen) - len(wrong)} of {len(chosen)} random files are the same bit for bit")
    return wrong


def main(argv: list[str]) -> int:
    """The exit code: 0 where it held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--bad", type=int, default=10)
    parser.add_argument("--kills", type=int, default=10, help="of workers, at random")
    parser.add_argument("--full", type=float, default=4.0, help="seconds that the disk stays full")
    parser.add_argument("--again", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="of the engine local")
    parser.add_argument("--gpus-per-worker", type=int, default=1, help="on CPUs, processes: any of them is killed")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--model", default=str(TINY), help="a folder, or a name that --model takes")
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--frames", default="9")
    parser.add_argument("--steps", default="6")
    parser.add_argument("--random", type=int, default=None, help="a seed for the moments")
    options = parser.parse_args(argv)
    random.seed(options.random)
    folder = Path(options.model).absolute()
    options.weights = ["--model", str(folder) if folder.is_dir() else options.model]
    options.common = [*options.weights, "--size", options.size, "--frames", options.frames, "--steps", options.steps,
                      "--save-every", "0.2"]  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        output = Path(name) / "out"
        output.mkdir()
        mounted = stack.enter_context(small_disk(output))
        cluster = stack.enter_context(ray_cluster()) if options.engine == "ray" else None
        wrong = night(options, output, mounted, cluster)
        wrong += again(options, output) if options.again else []
        print("\n".join(wrong) or ("held" if mounted else "held, without a disk that fills up: none could be mounted"))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
