"""The published command line, word for word: `python generate.py --task t2v-A14B …` is `wan22 generate …`."""

from wan22.__main__ import entry

if __name__ == "__main__":
    entry("generate")
