"""Where downloaded files go: a folder or the Hub cache; the lock, the room there, and what the disk refuses."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock

from wan22.config import DoesNotFit, RequestError, RunError, WanError
from wan22.network.verify import KnownFile, human, state_dir
from wan22.output.names import DISK_FULL

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
GOING_ON = "what came is kept: run the same command again and it goes on from there"


@dataclass(frozen=True)
class Target:
    """A folder to fill.

    In the Hub cache, `blobs` holds the contents that the entries of the snapshot `folder` link to, and the file `ref`
    names the snapshot that a branch or tag stands for: huggingface_hub's documented layout, which its loaders read.
    """

    folder: Path
    blobs: Path | None = None
    ref: Path | None = None

    @classmethod
    def in_cache(cls, cache: Path, repo_id: str, revision: str, commit: str | None) -> "Target":
        storage = cache / repo_folder_name(repo_id=repo_id, repo_type="model")
        return cls(storage / "snapshots" / (commit or revision), storage / "blobs", storage / "refs" / revision)

    @property
    def state(self) -> Path:
        return state_dir(self.folder)

    def path(self, file: KnownFile) -> Path:
        """Where `file` is, or will be. In the cache, a content counts that has no link yet."""
        entry = self.folder / file.path
        return self.blobs / file.blob if self.blobs and file.blob and not entry.is_file() else entry

    def part(self, file: KnownFile) -> Path:
        """Its partial content. The digest in the name keeps another version of the file from being continued."""
        return self.state / "parts" / f"{file.path}.{file.digest[:12]}"

    def bytes_needed(self, files: Iterable[KnownFile]) -> int:
        parts = [(file.size, self.part(file)) for file in files]
        return sum(size - min(size, part.stat().st_size if part.exists() else 0) for size, part in parts)

    def bytes_free(self) -> int:
        return shutil.disk_usage(next(path for path in (self.state, *self.state.parents) if path.is_dir())).free

    def settle(self, file: KnownFile, part: Path) -> Path:
        """Move a proven content from its partial file to its place, over what was there."""
        place = self.blobs / file.blob if self.blobs else self.folder / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, place)
        if self.blobs:
            (self.folder / file.path).unlink(missing_ok=True)  # it may be a copy of the old content; see `link`
        return place

    def link(self, files: Iterable[KnownFile]) -> None:
        """In the Hub cache: make the snapshot's entries, and let the branch or tag mean it."""
        if not self.blobs:
            return
        for file in files:
            entry = self.folder / file.path
            if entry.is_file():
                continue
            entry.parent.mkdir(parents=True, exist_ok=True)
            entry.unlink(missing_ok=True)  # a link to nothing
            blob = self.blobs / file.blob
            try:
                entry.symlink_to(os.path.relpath(blob, entry.parent))
            except OSError:  # Windows without developer mode
                try:
                    os.link(blob, entry)
                except OSError:  # a file system without any links, such as exFAT
                    shutil.copy2(blob, entry)
        if self.ref and self.ref.name != self.folder.name:
            self.ref.parent.mkdir(parents=True, exist_ok=True)
            self.ref.write_text(self.folder.name, encoding="utf-8")

    @contextmanager
    def locked(self, say: Callable[[str], object]) -> Iterator[None]:
        """One download of a folder at a time; another waits here. The system frees the lock of a process that dies."""
        self.state.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(self.state / "lock", timeout=0.2))
            except filelock.Timeout:
                say(f"{self.folder}: another download is at work there; waiting until it is done")
                stack.enter_context(WeakFileLock(self.state / "lock"))
            yield

    def explain(self, error: OSError, files: Iterable[KnownFile]) -> WanError:
        """What the disk refused, as a user can act on it. files: those that were still to come."""
        what = error.strerror or str(error)
        if error.errno in DISK_FULL:
            rest, free = human(self.bytes_needed(files)), human(self.bytes_free())
            return DoesNotFit(
                f"{self.folder}: {what}: {rest} are still to come, {free} are free", f"free space; {GOING_ON}"
            )
        if error.errno in NOT_WRITABLE:
            return RequestError(f"{self.folder}: cannot write there: {what}", hint="choose another --ckpt_dir")
        return RunError(f"{error.filename or self.folder}: {what}", hint=GOING_ON)
