"""Scores the embedded demo: what it makes of prompts whose colour-shape-motion combination was never trained on.

    python scripts/demo_score.py                                     60 prompts, the demo's own settings
    python scripts/demo_score.py --prompts 12 --size 64x64 --frames 9
    python scripts/demo_score.py --expert high                       that expert alone, on both sides of the boundary
    python scripts/demo_score.py --precision '{"weights": "fp8"}'     with these fields of a Precision

It goes the whole way of `wan22 generate --model demo`, but for the file; tests/detector.py says what a video shows.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_data
import numpy as np
from demo_training import write_sheet  # puts wan22 and tests/ on the path
from detector import detect

from wan22 import Pipeline
from wan22.config import Precision, parse_size

ASPECTS = ("colour", "motion", "shape")
ONE_EXPERT = {"both": None, "high": 0.0, "low": 1.0}  # the boundary that leaves this expert every step


@dataclass
class Score:
    """How many of `total` videos show what was asked, by aspect; and what the others show instead."""

    right: dict[str, int]
    total: int
    misses: list[str]
    frames: list[np.ndarray]  # each [F, H, W, 3] uint8


def score(pipe: Pipeline, count: int, expert: str = "both", **settings: Any) -> Score:
    """`count` evaluation prompts, seeds 0, 1, …; settings: fields of a Request."""
    if ONE_EXPERT[expert] is not None:
        settings["boundary"] = ONE_EXPERT[expert]
    right, misses, frames = dict.fromkeys(ASPECTS, 0), [], []
    for seed, (prompt, scene) in enumerate(demo_data.evaluation_prompts(count)):
        frames.append(pipe.generate(pipe.request(prompt, seed=seed, **settings)).video)
        seen, actor = detect(frames[-1]), scene.actors[0]
        wrong = [name for name in ASPECTS if getattr(seen, name) != getattr(actor, name)]
        for name in ASPECTS:
            right[name] += name not in wrong
        if wrong:
            misses.append(f"{seed}: {prompt!r}: " + ", ".join(f"{name} {getattr(seen, name)}" for name in wrong))
    return Score(right, count, misses, frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--expert", choices=ONE_EXPERT, default="both")
    parser.add_argument("--size")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", type=json.loads, default={}, help="JSON; weights are float32 unless named")
    parser.add_argument("--sheet", type=Path, help="a PNG of the first 12 videos")
    args = parser.parse_args()
    settings: dict[str, Any] = {"num_frames": args.frames, "num_steps": args.steps}
    if args.size:
        settings["width"], settings["height"] = parse_size(args.size)
    settings = {name: value for name, value in settings.items() if value is not None}
    precision = Precision(**{"weights": "float32", **args.precision})
    pipe = Pipeline.from_pretrained("demo", device=args.device, precision=precision)
    start = time.monotonic()
    result = score(pipe, args.prompts, args.expert, **settings)
    for miss in result.misses:
        print(miss, file=sys.stderr)
    if args.sheet:
        write_sheet(np.stack(result.frames[:12]), args.sheet)
    shares = {name: round(100 * n / result.total, 1) for name, n in result.right.items()}
    facts = {"expert": args.expert, "prompts": result.total, "percent_right": shares, "settings": settings,
             "precision": pipe.precision.to_dict(), "device": str(pipe.device)}  # fmt: skip
    print(json.dumps(facts | {"seconds": round(time.monotonic() - start, 1)}))


if __name__ == "__main__":
    main()
