"""What a checkpoint's files should be, and whether they are: sizes, hashes, a record of what was proven. Stdlib only.

A file is *proven* once its whole content was hashed and matched; `.wan22/files.json` beside it remembers that with the
size and modification time it had then, so that going on after a kill does not read 126 GB again. `check` never trusts
that record's proofs, only its list of what belongs in the folder.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from wan22.config import RequestError, configs_dir

PUBLISHED = "Wan-AI/Wan2.2-T2V-A14B"
STATE_DIR = ".wan22"
BLOCK = 4 << 20  # bytes hashed at a time: large enough that hashlib and read() run without the GIL nearly always
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LEFTOVER_SUFFIXES = (".safetensors", ".index.json", ".pth", ".pt", ".bin", ".gguf", ".incomplete", ".part", ".aria2")

T = TypeVar("T")


def human(size: float) -> str:
    """Bytes as people read them: 126.2 GB (decimal, as disks and the Hub count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@dataclass(frozen=True)
class KnownFile:
    """A file as its publisher has it.

    path: POSIX, relative to the checkpoint's folder; size: bytes; digest: hex, of the kind named: `sha256`, or `git`,
    the SHA-1 of a git blob, all that the Hub knows of its small files; blob: its name in the Hub cache, where known.
    """

    path: str
    size: int
    digest: str
    kind: str = "sha256"
    blob: str = ""

    def new_hash(self) -> "hashlib._Hash":
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file. kind: missing, pointer, size, hash, index or unreadable."""

    path: str
    kind: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. `unexpected` files are told, not blamed: they may be yours, or an unfinished download's."""

    folder: Path
    verified: tuple[str, ...]
    problems: tuple[Problem, ...]
    unexpected: tuple[str, ...]
    bytes_read: int
    seconds: float

    @property
    def whole(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "whole": self.whole}

    def lines(self) -> list[str]:
        """The report for a person: what is wrong, what is unexpected, then the sum."""
        lines = []
        for problem in self.problems:
            lines += [str(problem)] + ([f"  hint: {problem.hint}"] if problem.hint else [])
        lines += [f"{path}: not part of the checkpoint" for path in self.unexpected]
        speed = f"{human(self.bytes_read)} read at {human(self.bytes_read / max(self.seconds, 1e-3))}/s"
        return [*lines, f"{self.folder}: {len(self.verified)} files whole, {len(self.problems)} not; {speed}"]


def published_files() -> list[KnownFile]:
    """The 22 files of the published repository that inference needs, from the manifest that is part of this package."""
    manifest = json.loads((configs_dir() / "Wan2.2-T2V-A14B" / "manifest.json").read_text(encoding="utf-8"))
    return [KnownFile(entry["path"], entry["size"], entry["sha256"]) for entry in manifest["files"]]


def safe_path(path: str, where: str) -> str:
    """`path` if it stays below the folder it is joined to, on any system. Raises RequestError naming `where`."""
    parts = path.split("/")
    windows = PureWindowsPath(path)
    if not path or "\0" in path or "\\" in path or {"", ".", ".."} & set(parts) or windows.drive or windows.root:
        raise RequestError(f"{where} names {path!r}, a path outside its folder: refused")
    return path


def select(files: Iterable[KnownFile], only: Sequence[str], where: str) -> list[KnownFile]:
    """The files that any of `only` names: a file, a folder, or a pattern such as `*Q4_K_M*`. Raises RequestError."""
    files = list(files)
    if not only:
        return files
    chosen: dict[str, KnownFile] = {}
    for name in only:
        plain = name.strip("/")
        found = [f for f in files if (f.path + "/").startswith(plain + "/") or fnmatch.fnmatchcase(f.path, plain)]
        if not found:
            tops = sorted({f.path.split("/")[0] for f in files})
            known = ", ".join(tops[:12]) + (", …" if len(tops) > 12 else "")
            raise RequestError(f"--only {name}: no such file or folder in {where}", hint=f"there are: {known}")
        chosen.update((f.path, f) for f in found)
    return [f for f in files if f.path in chosen]


def index_problem(path: Path, name: str) -> Problem | None:
    """What is wrong with a safetensors index: unreadable, or naming a file that is not directly beside it."""
    try:
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Problem(name, "index", f"not a readable index: {type(error).__name__}: {error}")
    for shard in sorted(map(str, shards)):
        if PurePosixPath(shard).name != shard or PureWindowsPath(shard).name != shard or shard in ("", ".", ".."):
            return Problem(name, "index", f"names {shard!r}, a path outside its folder: refused")
    return None


def digest_of(path: Path, file: KnownFile, on_bytes: Callable[[int], object] | None = None) -> str:
    """The hex digest, of the file's kind, of what lies at `path`. Raises OSError."""
    hasher = file.new_hash()
    block = bytearray(BLOCK)
    with path.open("rb", buffering=0) as handle:
        while count := handle.readinto(block):
            hasher.update(memoryview(block)[:count])
            if on_bytes:
                on_bytes(count)
    return hasher.hexdigest()


def examine(path: Path, file: KnownFile, on_bytes: Callable[[int], object] | None = None) -> Problem | None:
    """Read what lies at `path` and say what is wrong with it as `file`; None: it is that file, every byte."""
    try:
        size = path.stat().st_size
        if size != file.size:
            with path.open("rb") as handle:
                if handle.read(len(LFS_POINTER)) == LFS_POINTER:
                    hint = f"run `git lfs pull` in {path.parent}"
                    return Problem(file.path, "pointer", "a Git LFS pointer, not the file itself", hint)
            return Problem(file.path, "size", f"has {size} bytes, should have {file.size}")
        digest = digest_of(path, file, on_bytes)
    except FileNotFoundError:
        return Problem(file.path, "missing", f"missing ({human(file.size)})")
    except OSError as error:
        return Problem(file.path, "unreadable", f"cannot be read: {error.strerror or error}")
    if digest != file.digest:
        kind = "SHA-256" if file.kind == "sha256" else "git SHA-1"
        return Problem(file.path, "hash", f"damaged: {kind} is {digest[:12]}…, should be {file.digest[:12]}…")
    return index_problem(path, file.path) if file.path.endswith(".index.json") else None


def on_all_cores(work: Callable[[KnownFile], T], files: Iterable[KnownFile]) -> list[T]:
    """`work` over the files, largest first, on two threads a core: hashing releases the GIL, and one can wait for the
    disk while the other hashes."""
    ordered = sorted(files, key=lambda file: -file.size)
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        futures = [pool.submit(work, file) for file in ordered]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Record:
    """`files.json`: what was asked into a folder, and which of it was proven. Saved, atomically, at every change.

    A record that is missing or unreadable proves nothing: the files are hashed again, and it is written anew.
    """

    def __init__(self, state: Path) -> None:
        self._file = state / "files.json"
        self._lock = threading.Lock()
        self._table: dict[str, Any] = {"version": 1, "sources": {}, "files": {}}
        try:
            table = json.loads(self._file.read_text(encoding="utf-8"))
            if table["version"] == 1 and {type(table[key]) for key in ("sources", "files")} == {dict}:
                self._table = table
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def files(self, source: str | None = None) -> list[KnownFile]:
        """The files recorded for `source` (`owner/name@revision`), or for all. Raises RequestError for a bad path."""
        return [
            KnownFile(safe_path(path, str(self._file)), entry["size"], entry["digest"], entry["kind"], entry["blob"])
            for path, entry in self._table["files"].items()
            if source in (None, entry["source"])
        ]

    def knows(self, repo_id: str) -> bool:
        """Whether anything was ever asked for from this repository, at any revision."""
        return any(source.split("@")[0] == repo_id for source in self._table["sources"])

    def asked(self, source: str, only: Sequence[str]) -> bool:
        """Whether at least `only` was asked for from `source`."""
        asked = self._table["sources"].get(source, [])
        return [] in asked or list(only) in asked

    def ask(self, source: str, only: Sequence[str], files: Iterable[KnownFile]) -> None:
        """Remember that these files, what `only` chooses of `source`, belong in the folder."""
        with self._lock:
            asked = self._table["sources"].setdefault(source, [])
            if list(only) not in asked:
                asked.append(list(only))
            for file in files:
                old = self._table["files"].get(file.path, {})
                same = (old.get("size"), old.get("digest")) == (file.size, file.digest)
                self._table["files"][file.path] = {
                    **{key: value for key, value in asdict(file).items() if key != "path"},
                    "source": source,
                    "proven_mtime_ns": old.get("proven_mtime_ns") if same else None,
                }
            self._save()

    def proves(self, file: KnownFile, path: Path) -> bool:
        """Whether what lies at `path` was proven to be `file`, and has not been touched since."""
        entry = self._table["files"].get(file.path)
        if not entry or (entry["size"], entry["digest"]) != (file.size, file.digest):
            return False
        try:
            stat = path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (file.size, entry["proven_mtime_ns"])

    def prove(self, file: KnownFile, path: Path) -> None:
        """Remember that `path` was just hashed and is `file`. The file must have been asked for."""
        with self._lock:
            self._table["files"][file.path]["proven_mtime_ns"] = path.stat().st_mtime_ns
            self._save()

    def disprove(self, paths: Iterable[str]) -> None:
        """Forget that these were proven, so that the next download looks at them again. Raises OSError."""
        with self._lock:
            proven = [path for path in paths if self._table["files"].get(path, {}).get("proven_mtime_ns")]
            for path in proven:
                self._table["files"][path]["proven_mtime_ns"] = None
            if proven:
                self._save()

    def _save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(self._table, indent=1), encoding="utf-8")
        os.replace(fresh, self._file)


def state_dir(folder: Path) -> Path:
    """Where the record of a checkpoint folder lies: inside it; of a snapshot in the Hub cache, beside the snapshots."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent / STATE_DIR / folder.name
    return folder / STATE_DIR


def check(
    folder: str | Path, *, only: Sequence[str] = (), on_start: Callable[[int], Callable[[int], object]] | None = None
) -> CheckReport:
    """Hash every file that belongs in `folder` and compare: at the disk's speed, on all cores, changing no file.

    What belongs there is what `download` was asked to put there, and, in a folder of the published layout, what the
    manifest names. A file that fails loses its proof in the record, so that `download` will mend it. only: as for
    `select`. on_start(total bytes) → on_bytes(bytes just read), for a progress bar.
    Raises RequestError if the folder does not exist or nothing is known about it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise RequestError(f"--check {folder}: no such folder")
    started = time.monotonic()
    record = Record(state_dir(folder))
    belongs = {file.path: file for file in record.files()}
    published = {file.path: file for file in published_files()}
    present = {path: file for path, file in published.items() if (folder / path).exists()}
    if record.knows(PUBLISHED):  # a part may have been asked for, and another brought by hand
        belongs = present | belongs
    elif present and not published.keys() & belongs.keys():  # brought by hand: then all of it was meant
        belongs = published | belongs
    if not belongs:
        raise RequestError(
            f"--check {folder}: neither the published layout nor a folder that `wan22 download` filled",
            hint="`wan22 download OWNER/NAME --ckpt_dir DIR` verifies what is there against the Hub",
        )
    files = select(belongs.values(), only, str(folder))
    lock, read = threading.Lock(), 0
    on_bytes = on_start(sum(file.size for file in files)) if on_start else None

    def count(size: int) -> None:
        nonlocal read
        with lock:
            read += size
        if on_bytes:
            on_bytes(size)

    found = on_all_cores(lambda file: (file, examine(folder / file.path, file, count)), files)
    with contextlib.suppress(OSError):  # a folder that cannot be written to cannot be mended by a download either
        record.disprove(file.path for file, problem in found if problem)
    return CheckReport(
        folder,
        tuple(sorted(file.path for file, problem in found if not problem)),
        tuple(sorted((problem for _, problem in found if problem), key=lambda problem: problem.path)),
        tuple(_leftovers(folder, set(belongs))),
        read,
        round(time.monotonic() - started, 3),
    )


def _leftovers(folder: Path, belongs: set[str]) -> list[str]:
    """Weights, indexes and unfinished downloads in the folder that nothing asked for."""
    found = []
    for root, names, files in os.walk(folder):
        names[:] = [name for name in names if name != ".git"]
        for name in files:
            path = (Path(root) / name).relative_to(folder).as_posix()
            if path not in belongs and (name.endswith(LEFTOVER_SUFFIXES) or path.startswith(f"{STATE_DIR}/parts/")):
                found.append(path)
    return sorted(found)
