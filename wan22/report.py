"""What a run says while it works: nothing, lines and one bar for a person, or JSON objects for a program."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Phase:
    """One part of a run: wall seconds; peak bytes of host memory, and of GPU memory where there is one."""

    name: str
    seconds: float
    host_bytes: int | None
    gpu_bytes: int | None


class Reporter:
    """Hears of a run and says nothing; keeps the phases' figures."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.stall: float | None = None  # seconds that steps waited for an expert, but for the first
        self.to_first_step: float | None = None  # seconds from the program's start till the first step could begin

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time and peak memory of what runs inside."""
        _reset_peaks()
        start = time.perf_counter()
        yield
        self.phases.append(Phase(name, time.perf_counter() - start, _host_peak(), _gpu_peak()))

    def note(self, text: str, **data: Any) -> None:
        """Something worth knowing; `data` is its machine form."""

    def warn(self, text: str) -> None:
        """Allowed, and known to disappoint."""

    def begin_steps(self, count: int, done: int = 0) -> None:
        """So many steps there are, of which so many were done before."""

    def step(self, index: int, expert: str, timestep: float) -> None:
        """The step of this number (from 0) is done."""

    def end_steps(self) -> None: ...

    def finished(self, path: str) -> None:
        """The file at `path` exists and is whole."""


class ConsoleReporter(Reporter):
    """For a person: everything on stderr, and the finished path alone on stdout."""

    def note(self, text: str, **data: Any) -> None:
        print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def begin_steps(self, count: int, done: int = 0) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=count, initial=done, unit="step", dynamic_ncols=True, file=sys.stderr,
            desc="reading weights", bar_format="{desc} {n}/{total} |{bar}| {elapsed}, {remaining} left{postfix}",
        )  # fmt: skip
        self.last = time.perf_counter()

    def step(self, index: int, expert: str, timestep: float) -> None:
        now = time.perf_counter()
        self.bar.set_description_str(expert.removesuffix("_model").replace("_", " "), refresh=False)
        self.bar.set_postfix_str(f"{now - self.last:.2f} s/step", refresh=False)
        self.bar.update()
        self.last = now

    def end_steps(self) -> None:
        self.bar.close()

    def finished(self, path: str) -> None:
        for phase in self.phases:
            memory = f"{phase.host_bytes / 2**30:6.2f} GiB host" if phase.host_bytes else ""
            memory += f"{phase.gpu_bytes / 2**30:7.2f} GiB GPU" if phase.gpu_bytes else ""
            print(f"  {phase.name:<16}{phase.seconds:8.1f} s  {memory}".rstrip(), file=sys.stderr)
        if self.stall is not None:
            print(f"  {'expert switch':<16}{self.stall:8.1f} s  waited, in denoise", file=sys.stderr)
        if self.to_first_step is not None:
            print(f"  {'to first step':<16}{self.to_first_step:8.1f} s  from the program's start", file=sys.stderr)
        print(f"  {'all':<16}{sum(phase.seconds for phase in self.phases):8.1f} s", file=sys.stderr)
        print(path, flush=True)


class JsonReporter(Reporter):
    """For a program: one JSON object a line on stdout."""

    def note(self, text: str, **data: Any) -> None:
        self._emit("note", text=text, **data)

    def warn(self, text: str) -> None:
        self._emit("warning", text=text)

    def step(self, index: int, expert: str, timestep: float) -> None:
        self._emit("step", step=index + 1, timestep=timestep, expert=expert)

    def finished(self, path: str) -> None:
        self._emit("finished", path=path, phases=[vars(phase) for phase in self.phases],
                   stall=self.stall, to_first_step=self.to_first_step)  # fmt: skip

    def _emit(self, event: str, **data: Any) -> None:
        print(json.dumps({"event": event, **data}, ensure_ascii=False), flush=True)


def _reset_peaks() -> None:
    # Writing 5 there resets the peak that /proc/self/status tells (Linux, proc(5)); elsewhere no host peak is told.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _host_peak() -> int | None:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def _gpu_peak() -> int | None:
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else None
