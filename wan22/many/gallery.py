"""A folder of videos to look at: one static page, and one picture.

`index.html` needs nothing but the folder it lies in: relative links, no network, no script. Prompts come from files,
and files from anywhere, so that all text is escaped.
"""

import contextlib
import html
import os
import secrets
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wan22.config import Request, RequestError
from wan22.many import journal
from wan22.output.names import not_written, staging_prefix
from wan22.output.record import read_record
from wan22.video import check_folder, check_writable, read_frames

PAGE = "index.html"
SHOWN = {".mp4": "video", ".gif": "img", ".png": "img"}

STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 110rem; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
article { border: 1px solid #8886; border-radius: .5rem; overflow: hidden; min-width: 0; }
video, img { display: block; width: 100%; height: auto; background: #8883; }
article > :not(video, img) { margin: .5rem .75rem; overflow-wrap: anywhere; }
.facts, footer { color: #888; font-size: .85rem; }
.failed { border-color: #c33; }
.failed strong { color: #c33; }
summary { cursor: pointer; font-size: .85rem; }
pre { white-space: pre-wrap; background: #8882; padding: .5rem; border-radius: .25rem; font-size: .8rem; }
"""


@dataclass(frozen=True)
class Card:
    """One video, or one that failed. size: bytes; made: seconds since 1970; took: seconds."""

    name: str
    request: dict[str, Any]
    command: str
    made: float = 0.0
    took: float | None = None
    error: str | None = None


def write_gallery(folder: Path) -> Path:
    """The page over a folder's videos, and over what a batch there could not make. Raises RequestError, RunError."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    page = folder / PAGE
    check_folder(page)
    text = _page(folder.resolve().name, list(_cards(folder)))
    with _replacing(page) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return page


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A hidden file to write, which then takes the place of `path`. Raises RunError where either fails."""
    partial = path.with_name(f"{staging_prefix(path)}{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise not_written(path, error) from None


def _cards(folder: Path) -> Iterator[Card]:
    """The newest first, failures before all."""
    found = journal.status(folder)
    for item in found["failed"]:
        request = item.get("request") or {}
        yield Card(item["name"], request, again(request), error=str(item.get("error")))
    for line in found["bad"]:
        yield Card(line["where"], {}, "", error=line["error"])
    took = {item["name"]: item.get("seconds") for item in found["done"]}
    made = []
    for path in folder.iterdir():
        if path.suffix.lower() in SHOWN and path.is_file() and not path.name.startswith("."):
            try:
                record = read_record(path)
            except RequestError:
                continue
            request = record.get("request")
            command = shlex.join(["wan22", "generate", "--from", path.name, "--output", f"again-{path.name}"])
            command += " --model demo" if record.get("model") == "demo" else ""
            made.append(Card(path.name, request if isinstance(request, dict) else {}, command,
                             path.stat().st_mtime, took.get(path.name)))  # fmt: skip
    yield from sorted(made, key=lambda card: (-card.made, card.name))


def again(request: dict[str, Any]) -> str:
    """The command that makes a request, given its settings that are not the defaults."""
    flags = {
        "prompt": "--prompt", "negative_prompt": "--negative-prompt", "num_frames": "--frames", "fps": "--fps",
        "num_steps": "--steps", "shift": "--shift", "solver": "--solver", "guidance_high": "--guidance",
        "guidance_low": "--guidance-low", "seed": "--seed", "noise_device": "--noise-device",
        "lead_steps": "--lead-steps", "guidance_lead": "--guidance-lead",
        "guidance_start": "--guidance-start", "guidance_stop": "--guidance-stop",
    }  # fmt: skip
    plain = Request("x")
    size = f"{request.get('width', plain.width)}x{request.get('height', plain.height)}"
    words = ["wan22", "generate", "--size", size]
    asked = dict(request)
    if "guidance_high" in asked:  # which alone is both experts'
        asked.setdefault("guidance_low", plain.guidance_low)
    for name, flag in flags.items():
        if name in asked:
            words += [flag, str(asked[name])] if not str(asked[name]).startswith("-") else [f"{flag}={asked[name]}"]
    for lora in asked.get("loras", ()):
        flag = {"high": "--lora-high", "low": "--lora-low"}.get(lora["expert"], "--lora")
        lead = "" if lora.get("lead_strength") is None else f":{lora['lead_strength']}"
        words += [flag, f"{lora['file']}:{lora['strength']}{lead}"]
    return shlex.join(words)


def _page(title: str, cards: list[Card]) -> str:
    failed = sum(card.error is not None for card in cards)
    counts = f"{len(cards) - failed} videos" + (f", {failed} failed" if failed else "")
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing from elsewhere and no script, whatever a prompt says.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; media-src 'self' file:; "
        "img-src 'self' file:; style-src 'unsafe-inline'\">",
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<header><h1>{_text(title)}</h1><p>{counts}</p></header>\n<main>",
        *map(_article, cards),
        "</main>\n<footer><p>Commands are for this folder; where weights lie elsewhere, add --ckpt_dir.</p></footer>",
        "</body>\n</html>\n",
    ])  # fmt: skip


def _article(card: Card) -> str:
    request, link = card.request, quote(card.name)
    prompt = str(request.get("prompt", card.name))
    parts = [f'<article class="{"failed" if card.error else "made"}">']
    if card.error is not None:
        parts.append(f"<p><strong>failed</strong> {_text(card.name)}: {_text(card.error)}</p>")
    elif SHOWN[Path(card.name).suffix.lower()] == "video":
        size = "".join(f' {side}="{request[side]}"' for side in ("width", "height") if type(request.get(side)) is int)
        parts.append(f'<video src="./{link}" controls loop muted playsinline preload="metadata"{size}></video>')
    else:
        parts.append(f'<img src="./{link}" alt="{_text(prompt)}" loading="lazy">')
    if card.error is None or "prompt" in request:
        parts.append(f"<p>{_text(prompt)}</p>")
    facts = [f"seed {request['seed']}"] if "seed" in request else []
    if card.error is None:
        facts += [f"{request[name]} {word}" for name, word in (("num_frames", "frames"), ("num_steps", "steps"))
                  if name in request]  # fmt: skip
        facts.append(time.strftime("%Y-%m-%d %H:%M", time.localtime(card.made)))
        facts += [f"took {journal.duration(float(card.took))}"] if card.took else []
        facts.append(card.name)
    parts.append(f'<p class="facts">{_text(" · ".join(facts))}</p>' if facts else "")
    if card.command:
        parts.append(f"<details><summary>make it again</summary><pre>{_text(card.command)}</pre></details>")
    return "\n".join(filter(None, parts)) + "\n</article>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def write_sheet(files: list[Path], output: Path, overwrite: bool = False) -> Path:
    """One picture of several videos, each with its prompt and seed. Raises RequestError, RunError."""
    from wan22.output.sheet import contact_sheet

    if output.suffix.lower() != ".png":
        raise RequestError(f"{output}: a sheet is a .png")
    check_writable(output, if_exists="replace" if overwrite else "error")
    cards = []
    for file in files:
        frames, _ = read_frames(file)
        try:
            request = read_record(file)["request"]
            caption = f"{request.get('prompt', file.name)}\nseed {request.get('seed')} · {file.name}"
        except (RequestError, KeyError, AttributeError):  # a record that somebody edited
            caption = file.name
        cards.append((frames, caption))
    with _replacing(output) as partial:
        output.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(cards).save(partial, format="png")
    return output
