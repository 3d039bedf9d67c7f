"""Seconds and peak host memory of reading one expert: wan22, diffusers, the published way, and a plain read.

    python scripts/bench_load.py                    # makes 4 blocks of the published width in a temporary folder
    python scripts/bench_load.py --folder /data/x   # there, and keeps them for the next time

Each way runs in a process of its own, in turns, `--rounds` times with the files out of the page cache (cold) and in it
(warm). The table has the best of them, since whatever else the machine does only adds, and the medians; processor
seconds are those of all threads, the kernel's work for them included. A plain read is every byte once, by as many
threads and in pieces as large as wan22's, into buffers and no further. Memory is above what the imports take:
`anonymous` is what the process owns, `resident` counts mapped pages of the files too, which the system may take back.
The dtype is bf16, the exact recipe's; the files are float32. Right before its turn each process takes as much memory
as the result and gives it back: a virtual machine's host may have to find it first, at a cost that has nothing to do
with reading.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WAYS = ("plain read", "wan22", "diffusers", "load_file, cast")
BUFFER, READERS = 4 << 20, 4  # as in wan22/files/reading.py
GIB = 1 << 30


# --- the files -------------------------------------------------------------------------------------------------------
def make_files(folder: Path, layers: int) -> None:
    """`published/` and `diffusers/`: the same random float32 shards of the published width, under each one's names."""
    import torch
    from random_checkpoint import expert_shapes, write_expert

    from wan22.checkpoint import INDEX

    published, diffusers = folder / "published", folder / "diffusers"
    if not (published / INDEX).exists():
        shutil.rmtree(published, ignore_errors=True)
        config, shapes = expert_shapes(layers)
        write_expert(published, config, shapes, torch.float32, "cpu")
    if not (diffusers / INDEX).exists():
        shutil.rmtree(diffusers, ignore_errors=True)
        diffusers.mkdir()
        write_diffusers(published, diffusers)


def write_diffusers(published: Path, folder: Path) -> None:
    """The same bytes under diffusers' names: only headers, index and config change."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from wan22.checkpoint import INDEX
    from wan22.files.tensor_files import read_header

    names: dict[str, str] = {}
    for shard in sorted(published.glob("*.safetensors")):
        raw = json.loads(read_header(shard)[1])
        metadata = {"__metadata__": {"format": "pt"}}
        raw.pop("__metadata__", None)
        new = {name: next(iter(convert_wan_transformer_to_diffusers({name: None}))) for name in raw}
        names |= new
        text = json.dumps(metadata | {new[name]: item for name, item in raw.items()}).encode()
        text += b" " * (-len(text) % 8)
        with open(shard, "rb") as source, open(folder / shard.name, "wb") as target:
            source.seek(8 + int.from_bytes(source.read(8), "little"))
            target.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(source, target, BUFFER)
    index = json.loads((published / INDEX).read_text())
    index["weight_map"] = {names[name]: file for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    config = json.loads((published / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({
        "_class_name": "WanTransformer3DModel", "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["dim"] // config["num_heads"], "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"], "freq_dim": config["freq_dim"], "text_dim": 4096, "cross_attn_norm": True,
    }))  # fmt: skip


def drop(files: list[Path]) -> None:
    """Out of the page cache, without being root."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- the ways, each in its own process -------------------------------------------------------------------------------
def plain_read(folder: Path, device: str) -> Callable[[], int]:
    """Every byte once, in order, into buffers."""
    local = threading.local()

    def read(piece: tuple[Path, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(BUFFER)
        with open(piece[0], "rb", buffering=0) as file:
            file.seek(piece[1])
            file.readinto(local.buffer)

    def run() -> int:
        paths = sorted(folder.glob("*.safetensors"))
        pieces = [(path, start) for path in paths for start in range(0, path.stat().st_size, BUFFER)]
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, pieces))
        return 0

    return run


def wan22(folder: Path, device: str) -> Callable[[], int]:
    """As a run reads an expert."""
    import torch

    from wan22.checkpoint import EXPERTS, open_piece
    from wan22.config import Residency
    from wan22.experts import Experts
    from wan22.lora import Adapters

    def run() -> int:
        pair: Any = SimpleNamespace(experts={name: open_piece(name, folder, in_base=True) for name in EXPERTS})
        adapters = Adapters({}, [], folder)
        experts = Experts(pair, torch.bfloat16, torch.device(device), adapters, [Residency("none")])
        return _bytes(experts.get(EXPERTS[0]))

    return run


def diffusers(folder: Path, device: str) -> Callable[[], int]:
    import accelerate  # noqa: F401  # without it, diffusers reads another, slower way
    import torch
    from diffusers import WanTransformer3DModel

    def run() -> int:
        return _bytes(WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device))

    return run


def load_file_and_cast(folder: Path, device: str) -> Callable[[], int]:
    """Every shard's tensors first, then the cast, then the model: how the published code ends up in bf16."""
    import torch
    from safetensors.torch import load_file

    def run() -> int:
        state: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            state |= load_file(path)
        state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
        return sum(tensor.to(device).nbytes for tensor in state.values())

    return run


def _bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


class Memory:
    """Peaks of this process's memory, sampled every 5 ms, in bytes above what it is at first."""

    def __init__(self) -> None:
        self.first, self.peak = self._now(), {"RssAnon": 0, "VmRSS": 0}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _now(self) -> dict[str, int]:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        return {words[0][:-1]: int(words[1]) << 10 for words in lines if words[0] in ("RssAnon:", "VmRSS:")}

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            now = self._now()
            self.peak = {key: max(peak, now[key] - self.first[key]) for key, peak in self.peak.items()}


def touch(nbytes: int) -> None:
    """Take memory, write to each page, give it back."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, nbytes, 4096):
            area[offset] = 1


def measure(way: str, folder: Path, device: str) -> dict[str, float]:
    """Import what the way needs, then time it once."""
    functions = dict(zip(WAYS, (plain_read, wan22, diffusers, load_file_and_cast), strict=True))
    run = functions[way](folder, device)
    touch(sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 6 // 10)
    if device != "cpu" and way != WAYS[0]:
        import torch

        torch.zeros(1, device=device)  # what the first touch of a GPU costs is no reading
    memory = Memory()
    start, worked = time.perf_counter(), time.process_time()
    result = run()
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    memory.done.set()
    memory.thread.join()
    return {"seconds": seconds, "processor": worked, "result": result, **memory.peak}


# --- the table -------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the files, kept; default: a temporary one")
    parser.add_argument("--layers", type=int, default=4, help="blocks; 4 are 6.6 GB of float32 shards, made twice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="where the expert goes: cpu, cuda")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.device)))
        return
    temporary = None if args.folder else tempfile.TemporaryDirectory(prefix="bench-load-")
    folder = args.folder or Path(temporary.name)  # type: ignore[union-attr]
    folder.mkdir(parents=True, exist_ok=True)
    make_files(folder, args.layers)
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(args.rounds):
        for way in WAYS:
            source = folder / ("diffusers" if way == "diffusers" else "published")
            files = sorted(source.glob("*.safetensors"))
            for state in ("cold", "warm"):
                # The cold run before it warmed the files, as far as the memory goes; a plain read makes sure.
                drop(files) if state == "cold" else plain_read(source, "cpu")()
                command = [sys.executable, __file__, "--measure", way, str(source), "--device", args.device]
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                result = json.loads(told.splitlines()[-1])
                results.setdefault((way, state), []).append(result)
                worked = f"{result['seconds']:.2f} s, processor {result['processor']:.2f} s"
                print(f"round {number + 1}, {way}, {state}: {worked}", file=sys.stderr)
    print_table(results, sum(path.stat().st_size for path in (folder / "published").glob("*.safetensors")), args.rounds)
    if temporary:
        temporary.cleanup()


def print_table(results: dict[tuple[str, str], list[dict[str, float]]], size: int, rounds: int) -> None:
    def told(way: str, state: str, key: str) -> list[float]:
        return [result[key] for result in results[way, state]]

    print(f"{size / 1e9:.2f} GB of float32 shards → bf16; best of {rounds} rounds, medians in brackets\n")
    print("| way | cold, s | speed of plain | warm, s | speed of plain | processor, cold, warm, s | result "
          "| peak anonymous | peak resident |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for way in WAYS:
        cells = [way]
        for state in ("cold", "warm"):
            seconds = told(way, state, "seconds")
            cells.append(f"{min(seconds):.1f} ({statistics.median(seconds):.1f})")
            cells.append(f"{min(told(WAYS[0], state, 'seconds')) / min(seconds):.0%}")
        cells.append(", ".join(f"{min(told(way, state, 'processor')):.1f}" for state in ("cold", "warm")))
        for key in ("result", "RssAnon", "VmRSS"):
            cells.append(f"{max(told(way, 'cold', key) + told(way, 'warm', key)) / GIB:.2f} GiB")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
