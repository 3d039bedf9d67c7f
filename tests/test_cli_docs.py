"""docs/cli.md is what the commands' own help would make of it now, whatever terminal asks."""

import os
import subprocess
import sys

import cli_docs
from conftest import ROOT


def test_the_page_is_up_to_date():
    made = cli_docs.page()
    stale = not cli_docs.PAGE.exists() or cli_docs.PAGE.read_text(encoding="utf-8") != made
    assert not stale, f"docs/cli.md is stale, make it again: {cli_docs.COMMAND}"


def test_every_command_and_option_is_on_it():
    made = cli_docs.page()
    for words in ("## wan22 generate\n", "## wan22 compare\n", "--frames, --frame-num N\n", "--install-completion"):
        assert words in made
    blocks = (block.split("```")[0] for block in made.split("```text\n")[1:])
    assert all(len(line) <= cli_docs.WIDTH for block in blocks for line in block.splitlines())


def test_the_terminal_does_not_matter():
    narrow = {**os.environ, "PYTHONPATH": "scripts", "COLUMNS": "37", "FORCE_COLOR": "1", "LANG": "C"}
    script = "import sys, cli_docs; sys.stdout.buffer.write(cli_docs.page().encode())"
    words = [sys.executable, "-c", script]
    made = subprocess.run(words, cwd=ROOT, env=narrow, capture_output=True, check=True).stdout
    assert made.decode() == cli_docs.page()
