"""Names of files: made from prompts, safe on every file system, and given to finished files without harm to others.

Standard library only.
"""

import errno
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from wan22.config import DiskFull, RunError

_LONGEST_NAME = 255  # bytes of UTF-8 (ext4, APFS, XFS); NTFS counts UTF-16 units, of which a name never has more
_PROMPT_LENGTH = 80  # bytes: leaves room for digest and suffixes, and on Windows (260 for a whole path) for the folder

# Windows gives these names to devices in every folder, in any case.
_RESERVED = re.compile(r"con|prn|aux|nul|conin|conout|clock|com[0-9¹²³]|lpt[0-9¹²³]", re.IGNORECASE)


DISK_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # what an OSError says of it


# What an OSError says of a file that was wrong to ask for, as against one that failed.
NOT_ALLOWED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG,
)  # fmt: skip


def reason(error: OSError) -> str:
    """Why a file could not be written, in words."""
    return "the disk is full" if error.errno in DISK_FULL else error.strerror or str(error)


def not_written(path: Path, error: OSError) -> RunError:
    """What to raise where a file could not be written."""
    return (DiskFull if error.errno in DISK_FULL else RunError)(f"could not write {path}: {reason(error)}")


# Choosing a name ---------------------------------------------------------------------------------------------------


def safe_name(text: str, *, max_length: int = _PROMPT_LENGTH) -> str:
    """A file name without suffix that says what `text` says, in at most `max_length` (≥ 5) bytes of UTF-8; never empty.

    Letters, marks and numbers of any script and `_` stay; a run of anything else becomes one `-`, never at an end. So
    there are no separators, wildcards, dots, spaces, quotes, control or direction characters, and nothing reads as an
    option. Composed (NFC), as macOS hands names out decomposed and others do not.
    """
    text = unicodedata.normalize("NFC", text)
    kept = "".join(c if c == "_" or unicodedata.category(c)[0] in "LMN" else "-" for c in text)
    whole = re.sub("-+", "-", kept).strip("-")
    name = _cut(whole, max_length)
    word_end = name.rfind("-")
    if name != whole and whole[len(name)] != "-" and word_end > len(name) // 2:
        name = name[:word_end]
    name = name.strip("-") or "video"
    return f"{_cut(name, max_length - 1)}_" if _RESERVED.fullmatch(name) else name


def default_output(folder: str | Path, prompt: str, digest: str) -> Path:
    """`folder/PROMPT-DIGEST.mp4`, with the first eight characters of the request's digest."""
    return Path(folder) / f"{safe_name(prompt)}-{digest[:8]}.mp4"


def next_free(path: str | Path) -> Path:
    """`path` if nothing has that name, else the first free one of `name-2.mp4`, `name-3.mp4` … Raises OSError."""
    return next(candidate for candidate in numbered(Path(path)) if not exists(candidate))


def numbered(path: Path) -> Iterator[Path]:
    """`name.mp4`, `name-2.mp4`, `name-3.mp4` … without end."""
    yield path
    for number in itertools.count(2):
        ending = f"-{number}{path.suffix}"
        yield path.with_name(_cut(path.stem, _LONGEST_NAME - len(ending.encode())) + ending)


STATE = ".state.safetensors"  # of a run that is not finished, beside its output
PREVIEW = ".preview.webp"  # of a run that is not finished
CLAIM = ".claim"  # of a process that makes an output, hidden beside it


def beside(path: Path, suffix: str, hidden: bool = False) -> Path:
    """The name of what belongs to an output and lies beside it: `NAME` of `NAME.mp4`, and a suffix."""
    start = "." if hidden else ""
    stem = path.stem if path.suffix else path.name
    cut = _cut(stem, _LONGEST_NAME - len((start + suffix).encode()))
    if cut != stem:  # two long names may differ in their ends only
        cut = f"{_cut(cut, len(cut.encode()) - 9)}-{_digest(stem)}"
    return path.with_name(start + cut + suffix)


def staging_prefix(path: Path) -> str:
    """What the hidden files and folders in which an output is made are called at their start: that output's alone."""
    name = path.name if len(path.name) <= 40 else f"{path.name[:40]}-{_digest(path.name)}"
    return f".{name}.partial-"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _cut(text: str, length: int) -> str:
    """The longest start of `text` that takes at most `length` bytes of UTF-8."""
    encoded = text.encode("utf-8", "surrogateescape")  # a name found on disk need not be UTF-8
    return text if len(encoded) <= length else encoded[:length].decode("utf-8", "ignore")


# Giving it to a finished file --------------------------------------------------------------------------------------


def exists(path: Path) -> bool:
    """Whether anything has that name. Unlike os.path.lexists, raises OSError for a name that nothing can have."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def move_to_free(staged: Path, target: Path) -> bool:
    """Rename a file or folder; False, with nothing changed, if something has the name already. Raises OSError.

    An empty folder counts as nothing where a folder moves. Whoever calls removes what is left at `staged`.
    """
    try:
        if staged.is_dir():
            if target.is_dir():
                target.rmdir()
            os.rename(staged, target)
        elif os.name == "nt":
            os.rename(staged, target)  # never overwrites there
        else:
            _link(staged, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    return True


def _link(staged: Path, target: Path) -> None:
    """On POSIX a rename overwrites and a link does not."""
    try:
        os.link(staged, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: FAT, some over a network
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(staged, target)
        except OSError:
            os.unlink(target)
            raise


def sync(path: Path) -> None:
    """A file, or a folder and the files in it, through to the disk. Raises OSError: some disks are full only now."""
    if path.is_dir():
        for child in path.iterdir():
            _sync_one(child)
    _sync_one(path)


def sync_entry(path: Path) -> None:
    """The name of `path` in its folder through to the disk, where that can be done."""
    try:
        _sync_one(path.absolute().parent)
    except OSError:
        return  # what it names is safe already, and not every network file system can sync a folder


def _sync_one(path: Path) -> None:
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # no such thing there
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
