"""A batch on 启智 OpenI: the start file of a training task, whose parameters may be `batch=prompts.txt` and
`options=--size 480p`.

The task's models (预训练模型) hold Wan2.2-T2V-A14B; the videos come back with the task's results. To go on after a task
that was broken off, give its results to the next one as a dataset (数据集): they are copied to the output first.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from c2net.context import prepare, upload_output  # the platform's own package


def main() -> int:
    """The batch's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", default="prompts.txt", help="beside this repository's README, or in the dataset")
    parser.add_argument("--model", default="Wan2.2-T2V-A14B", help="a folder among the task's models")
    parser.add_argument("--options", default="", help="of wan22 batch")
    given, _ = parser.parse_known_args()  # the platform adds some of its own
    context = prepare()
    root = Path(__file__).resolve().parents[2]
    output = Path(context.output_path) / "videos"
    for earlier in Path(context.dataset_path).glob("**/videos"):
        shutil.copytree(earlier, output, dirs_exist_ok=True)
    places = [root / given.batch, *Path(context.dataset_path).glob(f"**/{given.batch}")]
    batch = next((place for place in places if place.is_file()), None)
    if batch is None:
        print(f"error: {given.batch}: neither in {root} nor in the dataset", file=sys.stderr)
        return 2
    model = Path(context.pretrain_model_path) / given.model
    command = [sys.executable, "-m", "wan22", "batch", str(batch), "--output", str(output), "--ckpt_dir", str(model)]
    command += shlex.split(given.options)
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    try:
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    finally:
        upload_output()


if __name__ == "__main__":
    sys.exit(main())
