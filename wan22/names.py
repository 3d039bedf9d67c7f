"""File names from prompts, safe on every file system. Standard library only."""

import os
import re
import unicodedata
from pathlib import Path

LONGEST_NAME = 255  # bytes of UTF-8: ext4, APFS, XFS. NTFS counts UTF-16 units, never more than bytes
_PROMPT_LENGTH = 80  # bytes; leaves room for digests and suffixes, and on Windows for the folder's own path (260 in all)

# Windows gives these names to devices in every folder, whatever the case.
_RESERVED = re.compile(r"(con|prn|aux|nul|conin|conout|clock|com[0-9¹²³]|lpt[0-9¹²³])", re.IGNORECASE)


def safe_name(text: str, *, max_length: int = _PROMPT_LENGTH) -> str:
    """A file name (without suffix) that says what `text` says: at most `max_length` bytes of UTF-8, never empty.

    Letters, marks and numbers of any script stay, and `_`; every run of anything else becomes one `-`, inside only. So no
    separators, wildcards, dots, spaces, quotes, control or direction characters, and nothing that reads as an option.
    """
    text = unicodedata.normalize("NFC", text)
    kept = "".join(c if c == "_" or unicodedata.category(c)[0] in "LMN" else "-" for c in text)
    name = re.sub("-+", "-", kept).strip("-")
    cut = _cut(name, max_length)
    if cut != name and name[len(cut)] != "-" and cut.rfind("-") > len(cut) // 2:
        cut = cut[: cut.rfind("-")]  # at a word's end, where one is near
    name = cut.strip("-") or "video"
    return f"{_cut(name, max_length - 1)}_" if _RESERVED.fullmatch(name) else name


def default_output(folder: str | Path, prompt: str, digest: str) -> Path:
    """`folder/PROMPT-DIGEST.mp4`, with eight characters of the request's digest."""
    return Path(folder) / f"{safe_name(prompt)}-{digest[:8]}.mp4"


def next_free(path: str | Path) -> Path:
    """`path` itself where nothing has that name, else the first free one of `name-2.mp4`, `name-3.mp4` …"""
    path = Path(path)
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        ending = f"-{number}{path.suffix}"
        candidate = path.with_name(_cut(path.stem, LONGEST_NAME - len(ending.encode())) + ending)
    return candidate


def _cut(text: str, length: int) -> str:
    """The longest start of `text` that takes at most `length` bytes of UTF-8."""
    return text.encode("utf-8", "surrogatepass")[:length].decode("utf-8", "ignore")
