"""The published command line, word for word: `python generate.py --task t2v-A14B …` is `wan22 generate …`."""

import sys

from wan22.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
