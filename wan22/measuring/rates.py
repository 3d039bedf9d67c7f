"""Seconds of a run on one GPU, from what was measured: on cards that are known here, or by `wan22 bench --json`.

Of a forward, self-attention grows with the square of the tokens and all else with them: at 480p it took 2.50 s on an
H100, where this makes 2.51 s of 720p. Standard library only.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from wan22.config import Precision, Request, RequestError, one_line

MOST_BYTES = 16 << 20  # of a file; a run's rows are 10,000
MOST = 16 << 20  # tokens, layers, seconds: beyond it no measurement is one
HOW = "wan22 bench --decode --text --json > FILE"


def key_of(weights: str, scope: str | None, attention: str) -> tuple[str, str | None, str]:
    """What forwards of one speed have in common: all exact attention is the fastest one that is there."""
    return weights, scope, attention if attention.startswith(("int8", "sage")) else "exact"


@dataclass(frozen=True)
class Rates:
    """attention, others: seconds of one forward of `tokens` tokens; decode: seconds a pixel of a frame, by the VAE's
    dtype; text: of two prompts, where it was measured."""

    card: str
    key: tuple[str, str | None, str]
    layers: int
    dim: int
    tokens: int
    attention: float
    others: float
    decode: dict[str, float] = field(default_factory=dict)
    text: float | None = None

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Self:
        """Of one run of `wan22 bench --json`. Raises KeyError, TypeError, ValueError for what is none."""
        kinds = {row["kind"]: row for row in rows if row["kind"] in ("work", "parts")}
        work, parts = kinds["work"], kinds["parts"]["seconds"]
        forward = next((row for row in rows if row["kind"] == "forward" and row["name"] == "wan22"), None)
        if not forward:
            raise ValueError
        attention = forward["seconds"] * parts["attention"] / sum(parts.values())
        pixels = work["width"] * work["height"] * work["frames"]
        decode = {row["form"]: row["seconds"] / pixels for row in rows
                  if row.get("name") == "decode" and row["form"] in ("float32", "bf16")}  # fmt: skip
        text = next((row["seconds"] for row in rows if row["kind"] == "phase" and row["name"] == "text"), None)
        made = cls(one_line(str(work["device"])), key_of(work["precision"]["weights"], work["precision"]["scope"],
                                          forward["attention"]), work["layers"], work["dim"], work["tokens"],
                   attention, forward["seconds"] - attention, decode, text)  # fmt: skip
        counts, times = (made.layers, made.dim, made.tokens), [attention, made.others, *decode.values(), text or 1]
        if not all(type(count) is int and 0 < count < MOST for count in counts):
            raise ValueError
        if not all(0 < seconds < MOST for seconds in times):
            raise ValueError
        return made

    def forward(self, tokens: int, layers: int) -> float:
        """Seconds of one, of one guidance branch."""
        longer = tokens / self.tokens
        return layers / self.layers * (self.attention * longer**2 + self.others * longer)

    def time(self, request: Request, tokens: int, layers: int, evaluations: int, precision: Precision) -> "Time":
        """Of what is known: forwards are, none of them spared by the step cache."""
        phases = {} if self.text is None else {"text": self.text}
        phases["denoise"] = evaluations * self.forward(tokens, layers)
        if precision.vae in self.decode:
            phases["decode"] = self.decode[precision.vae] * request.width * request.height * request.num_frames
        return Time(phases, evaluations, precision.step_cache > 0, self.card)


@dataclass(frozen=True)
class Time:
    """Seconds of a run's phases. spared: the step cache spares some of the evaluations, which are all counted."""

    phases: dict[str, float]
    evaluations: int
    spared: bool
    card: str

    def __str__(self) -> str:
        whole = round(sum(self.phases.values()))
        least = "at most " if self.spared else "about "
        said = [f"{self.evaluations} forwards of {self.phases['denoise'] / self.evaluations:.3g} s"]
        said += [f"{name} {seconds:.3g} s" for name, seconds in self.phases.items() if name != "denoise"]
        minutes = f"{whole // 60} min {whole % 60} s" if whole >= 100 else f"{sum(self.phases.values()):.3g} s"
        return f"{least}{minutes}: {', '.join(said)}"


# docs/speed.md has each with its command: 81 frames at 720p, torch 2.11, 2026-11-25.
_H100 = Rates("NVIDIA H100 80GB HBM3", ("bf16", None, "exact"), 40, 5120, 75600, attention=6.72, others=2.89,
              decode={"float32": 4.79 / (81 * 1280 * 720), "bf16": 2.24 / (81 * 1280 * 720)})  # fmt: skip
KNOWN = (
    _H100,
    replace(_H100, key=("fp8", "all", "exact"), attention=6.78, others=1.82),
    replace(_H100, key=("fp8", "all", "int8"), attention=5.42, others=1.74),
)


def choose(precision: Precision, dim: int, card: str | None, file: str | None = None) -> Rates | None:
    """Those that hold for a resolved precision and a model's width: of the file, or else of the card. Raises
    RequestError where a file has none, OSError."""
    rates: Iterable[Rates] = (one for one in KNOWN if one.card == card)
    if file is not None:
        rates = read(Path(file))
    key = key_of(precision.weights, precision.scope, precision.attention)
    found = next((one for one in rates if (one.key, one.dim) == (key, dim)), None)
    if file is not None and not found:
        said = ", ".join(str(part) for part in key if part)
        raise RequestError(f"--rates {file}: none of {said} attention and width {dim} in it",
                           hint=f"measure them: {HOW}")  # fmt: skip
    return found


def read(path: Path) -> list[Rates]:
    """Of each run in a file of what `wan22 bench --json` printed. Raises RequestError, OSError."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    try:
        if len(data) > MOST_BYTES:
            raise ValueError
        rows = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
        starts = [number for number, row in enumerate(rows) if row["kind"] == "work"]
        if not starts:
            raise ValueError
        return [Rates.of(rows[start:stop]) for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RequestError(f"--rates {path}: not what bench measured", hint=f"it is made by: {HOW}") from error
