"""Write docs/cli.md: every command's `--help`, as a page.

    python scripts/cli_docs.py            write it
    python scripts/cli_docs.py --check    exit 1 if it is not what it would be now

The page is made of what the help is made of and laid out here, so that neither the terminal nor the version of the
library that prints the help changes it.
"""

import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cli.md"
COMMAND = "python scripts/cli_docs.py"
WIDTH = 79
INDENT = 8

HEAD = f"""\
<!-- Made by `{COMMAND}` from the commands' own --help. Do not edit. -->
# The command line

`wan22 COMMAND …` and `python -m wan22 COMMAND …` are one program; `python generate.py …` is `wan22 generate …`, with
the published names. Options are written with `-` or `_` alike. stdout carries data (the path of a finished file; with
`--json`, one JSON object a line), stderr everything else.

| exit code | means |
|---|---|
| 0 | done; the file named on stdout exists and is whole |
| 1 | the run failed while running; stderr says why in a line, with a `hint:` where there is one |
| 2 | the request was wrong; no weights were loaded |
| 3 | it does not fit (disk, host memory, GPU memory); no weights were loaded |
| 130, 143 | interrupted |

`wan22 --install-completion` makes the shell you are in (bash, zsh, fish, PowerShell) complete commands and options;
`wan22 --show-completion` prints what that would install.
"""


def page() -> str:
    """The whole page as it would be now."""
    os.environ.setdefault("TERM", "dumb")
    sys.path.insert(0, str(ROOT))
    import typer

    from wan22.cli import app

    root = typer.main.get_command(app)
    context = root.make_context("wan22", ["--help"], resilient_parsing=True)
    parts = [HEAD, *_section(root, context, "wan22")]
    for name in root.list_commands(context):  # type: ignore[attr-defined]
        command = root.get_command(context, name)  # type: ignore[attr-defined]
        if not command.hidden:
            inner = type(context)(command, info_name=name, parent=context)
            parts += _section(command, inner, f"wan22 {name}")
    return "\n".join(parts)


def _section(command: Any, context: Any, name: str) -> Iterator[str]:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    words = [f"[{_name(param)}]" if not param.required else _name(param) for param in arguments]
    commands = "COMMAND …" if hasattr(command, "list_commands") else ""
    yield f"## {name}\n"
    yield f"{_folded(command.help or '')}\n"
    yield "```text"
    yield from _wrapped(" ".join(filter(None, [name, *words, "[OPTIONS]", commands])), 0, INDENT)
    for param in [*arguments, *(param for param in command.get_params(context) if param not in arguments)]:
        if getattr(param, "hidden", False):
            continue
        yield ""
        yield from _wrapped(_name(param) if param in arguments else _option(param, context), 4, 12)
        yield from _wrapped(_help(param), INDENT, INDENT)
    yield "```\n"


def _name(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _option(param: Any, context: Any) -> str:
    if param.is_flag:
        return ", ".join([*param.opts, *param.secondary_opts])
    # The kind of value is the last word of its line of help: `<int>` of some versions of typer, `INTEGER` of others.
    kind = param.get_help_record(context)[0].split()[-1].strip("<>[]")
    kinds = {"str": "TEXT", "text": "TEXT", "int": "N", "integer": "N", "float": "NUMBER"}
    kind = param.metavar or kinds.get(kind.lower(), kind)
    return f"{', '.join(param.opts)} {kind}" + (" …" if param.multiple else "")


def _help(param: Any) -> str:
    """Its help and, where that does not tell it, its default."""
    text = _folded(param.help or "")
    default = param.default
    plain = isinstance(default, str | int | float) and not isinstance(default, bool) and default != ""
    if plain and not param.required and "default" not in text.lower():
        text = f"{text} [default: {default}]".lstrip()
    return text


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\b", " ")).strip()


def _wrapped(text: str, first: int, rest: int) -> list[str]:
    indents = {"initial_indent": " " * first, "subsequent_indent": " " * rest}
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False, **indents)  # type: ignore[arg-type]


def main() -> int:
    """The exit code."""
    made = page()
    if "--check" in sys.argv[1:]:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made
        if stale:
            print(f"{PAGE.relative_to(ROOT)} is stale: {COMMAND}", file=sys.stderr)
        return int(stale)
    PAGE.write_text(made, encoding="utf-8", newline="\n")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
