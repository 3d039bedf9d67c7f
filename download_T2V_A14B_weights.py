#!/usr/bin/env python3
"""Fetch the weights of Wan2.2-T2V-A14B (126 GB) with nothing but huggingface_hub installed.

    python download_T2V_A14B_weights.py                        into ./T2V_A14B_weights; run again to go on
    python download_T2V_A14B_weights.py --check                hash all that is there

The same as `wan22 download`, for a clone that nothing was installed from yet.
"""

import argparse
import sys
from pathlib import Path

TARGET = "./T2V_A14B_weights"


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 (this file alone is run with whatever Python there is)
        print(f"error: Python 3.11 or newer is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        from wan22.config import WanError
        from wan22.download import SHORT_NAMES, SOURCES, check, download
    except ImportError as error:
        print(f"error: huggingface_hub is missing or too old: {error}", file=sys.stderr)
        print(f'hint: {sys.executable} -m pip install --upgrade "huggingface_hub>=2.4"', file=sys.stderr)
        return 2

    parser = argparse.ArgumentParser(description="Fetch and verify the weights of Wan2.2-T2V-A14B.")
    names = ", ".join(SHORT_NAMES)
    parser.add_argument("repo", nargs="?", default=next(iter(SHORT_NAMES)), help=f"{names}, or OWNER/NAME[@REVISION]")
    parser.add_argument("--ckpt_dir", "--ckpt-dir", default=TARGET, help="the folder to fill (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], help="a file, folder or pattern; may be repeated")
    parser.add_argument("--source", choices=SOURCES, default=SOURCES[0], help="where from (default: %(default)s)")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="say what would be fetched, and stop")
    parser.add_argument("--check", nargs="?", metavar="DIR", const="", help="hash what is in DIR (default: --ckpt_dir)")
    flags = parser.parse_args()
    try:
        if flags.check is not None:
            report = check(flags.check or flags.ckpt_dir, only=flags.only)
            print("\n".join(report.lines()))
            return 0 if report.whole else 1
        result = download(
            flags.repo, ckpt_dir=flags.ckpt_dir, only=flags.only, source=flags.source, dry_run=flags.dry_run
        )
    except WanError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: run the same command again and it goes on from here", file=sys.stderr)
        return 130
    if flags.dry_run:
        print("\n".join(result.lines()))
        return 0 if result.fits else 3
    print(result.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
