"""Seconds and peak host memory of reading one expert, above what the imports take.

    python scripts/random_checkpoint.py /tmp/blocks-4 --layers 4 --only-experts --link
    python scripts/measure_load.py /tmp/blocks-4/high_noise_model --dtype bf16
"""

import argparse
import json
import time
from pathlib import Path

import torch

from wan22.checkpoint import INDEX, Expert
from wan22.load import DTYPES, load_expert
from wan22.report import Reporter
from wan22.tensor_files import Safetensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    expert = Expert(args.folder.name, Safetensors(args.folder / INDEX), config)
    reporter = Reporter()
    with reporter.phase("imports"):
        time.sleep(0.1)
    with reporter.phase("load"):
        model = load_expert(expert, DTYPES[args.dtype], torch.device("cpu"))
    imports, load = (phase.host_bytes or 0 for phase in reporter.phases)
    result = sum(parameter.nbytes for parameter in model.parameters())
    files = sum(path.stat().st_size for path in expert.tensors.files)
    seconds = reporter.phases[1].seconds
    print(f"files {files / 2**30:.2f} GiB, result {result / 2**30:.2f} GiB as {args.dtype}, {seconds:.1f} s")
    print(f"peak host memory above the imports: {(load - imports) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
