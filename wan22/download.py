"""Fetch checkpoints and prove every byte of them: the library behind `wan22 download`.

Which files inference needs, the disk checked before the first byte, one progress bar, a lock, every file hashed as it
comes, a damaged one fetched again once and then named. A partial file stays in `.wan22/parts` under its path and
digest, and the next run asks for what is missing from it, byte for byte; what was proven once is not read again.

`hub.py` knows the network, `verify.py` the disk; this file brings them together. Everything that can go wrong ends as
one `WanError`: RequestError (exit 2) for what was asked, DoesNotFit (3) for the disk, RunError (1) for the rest.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants
from tqdm import tqdm

from wan22.config import DoesNotFit, RequestError, RunError
from wan22.network import verify
from wan22.network.hub import Hub, Patience, XetFailed
from wan22.network.target import GOING_ON, NOT_WRITABLE, Target
from wan22.network.verify import PUBLISHED, CheckReport, KnownFile, Record, human
from wan22.output.names import DISK_FULL


@dataclass(frozen=True)
class Repo:
    """A repository known by a short name. files: exactly these; None: those that inference needs."""

    repo_id: str
    files: tuple[str, ...] | None = None


def _lightning(folder: str) -> Repo:
    names = (f"{folder}/high_noise_model.safetensors", f"{folder}/low_noise_model.safetensors")
    return Repo("lightx2v/Wan2.2-Lightning", names)


# A pair is the high-noise expert's adapter, then the low-noise one's. The names are the publisher's, as its pages and
# the public code that loads them write them; sizes and hashes come from the Hub.
DEFAULT_REPO = "Wan2.2-T2V-A14B"
SHORT_NAMES = {
    DEFAULT_REPO: Repo(PUBLISHED),
    "Wan2.2-T2V-A14B-Diffusers": Repo("Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    "lightning": _lightning("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"),
    "lightning-250928": _lightning("Wan2.2-T2V-A14B-4steps-lora-250928"),
    "lightning-v2.0": _lightning("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V2.0"),
    "lightx2v-1217": Repo(
        "lightx2v/Wan2.2-Distill-Loras",
        (
            "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors",
            "wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors",
        ),
    ),
}
NEEDED_SUFFIXES = (".safetensors", ".gguf", ".pth", ".json", ".model", ".txt")  # weights, configs, indexes, tokenizers
SOURCES = ("hub", "modelscope")


@dataclass(frozen=True)
class Download:
    """What `download` did, or, with `dry_run`, would do. Sizes in bytes.

    folder: where the files are; files: all that was asked for; fetched: those of them that came, or would, from the
    network; bytes_needed: what they add to the disk, beyond what partial files hold already; bytes_free: on that disk
    before. commit: None where the Hub was not asked, the files being known.
    """

    folder: Path
    repo_id: str
    commit: str | None
    files: tuple[KnownFile, ...]
    fetched: tuple[KnownFile, ...]
    bytes_needed: int
    bytes_free: int

    @property
    def bytes_total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fits(self) -> bool:
        return self.bytes_needed <= self.bytes_free

    def to_dict(self) -> dict[str, Any]:
        numbers = ("repo_id", "commit", "bytes_total", "bytes_needed", "bytes_free", "fits")
        return {
            "folder": str(self.folder),
            **{name: getattr(self, name) for name in numbers},
            "files": [{"path": file.path, "size": file.size, "fetch": file in self.fetched} for file in self.files],
        }

    def lines(self) -> list[str]:
        """The plan for a person: a line a file, then the sums."""
        fetched = set(self.fetched)
        lines = [
            f"{'fetch' if file in fetched else 'there':<6}{human(file.size):>9}  {file.path}" for file in self.files
        ]
        verdict = "" if self.fits else ": it does not fit"
        lines.append(f"{len(self.files)} files, {human(self.bytes_total)}, into {self.folder}")
        lines.append(f"{human(self.bytes_needed)} to fetch, {human(self.bytes_free)} free{verdict}")
        return lines


class _Progress:
    """One bar over all bytes, on stderr. Threads share it, which tqdm alone does not allow for."""

    def __init__(self, show: bool, verb: str, total: int, done: int = 0) -> None:
        every = 0.3 if sys.stderr.isatty() else 30.0  # seconds; a log wants a line now and then, not an animation
        self._bar = tqdm(
            desc=verb, total=total, initial=done, disable=not show, unit="B", unit_scale=True, mininterval=every
        )
        self._lock = threading.Lock()

    def update(self, size: int) -> None:
        with self._lock:
            self._bar.update(size)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _say_nothing(line: str) -> None: ...


def download(
    repo: str = DEFAULT_REPO,
    *,
    ckpt_dir: str | Path | None = None,
    only: str | Sequence[str] = (),
    source: str = "hub",
    dry_run: bool = False,
    workers: int = 8,
    progress: bool = True,
    patience: Patience | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Download:
    """Have the files of a repository that inference needs, every one of them proven, or raise one WanError.

    repo: one of SHORT_NAMES, or `owner/name[@revision]`; ckpt_dir: the folder to fill (None: the Hub cache); only:
    files, folders or patterns of it; source: `hub`, or `modelscope` (the published repository, into ckpt_dir);
    dry_run: write nothing and say what would come, and whether it `fits`; workers: files fetched at a time; progress:
    a bar and lines on stderr; endpoint, cache_dir: instead of HF_ENDPOINT and HF_HUB_CACHE. HF_HUB_OFFLINE is honoured:
    what is there is proven, and what is missing is an error.
    """
    only = (only,) if isinstance(only, str) else tuple(only)
    wanted, revision = _parse(repo)
    folder = Path(ckpt_dir).expanduser().absolute() if ckpt_dir is not None else None
    published = verify.published_files() if (wanted.repo_id, revision) == (PUBLISHED, None) else []
    if source not in SOURCES:
        raise RequestError(f"--source {source}: unknown", hint=f"known: {', '.join(SOURCES)}")
    if source == "modelscope" and not (published and folder):
        raise RequestError(f"--source modelscope: only {PUBLISHED}, whose hashes are known here, and into --ckpt_dir")
    hub = Hub(wanted.repo_id, revision, endpoint, patience or Patience(), _say if progress else _say_nothing)

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    target, files = _locate(hub, wanted, folder, cache, only, source, published)

    proven = _proven(files, target)
    coming = [file for file in files if file.path not in proven and not _has_size(target.path(file), file.size)]
    needed, free = target.bytes_needed(coming), target.bytes_free()
    plan = Download(target.folder, hub.repo_id, hub.commit, tuple(files), tuple(coming), needed, free)
    if dry_run or (folder and len(proven) == len(files)):
        return plan
    _require_room(target, coming)
    record = Record(target.state)
    try:
        with target.locked(hub.say):
            record = Record(target.state)  # whoever had the lock before may have brought some
            record.ask(hub.source, only, files)
            coming = _prove_present(files, target, record, progress, hub.say)
            if coming:
                if constants.HF_HUB_OFFLINE:
                    raise RequestError(f"{target.folder}: {_names(coming)} not there whole, and HF_HUB_OFFLINE is set")
                needed = _require_room(target, coming)
                if source == "modelscope":
                    _fetch_from_modelscope(coming, target, record, hub.say)
                else:
                    _fetch(hub, coming, target, record, workers, progress)
            target.link(files)
    except OSError as error:
        raise target.explain(error, [file for file in coming if not record.proves(file, target.path(file))]) from error
    return replace(plan, fetched=tuple(coming), bytes_needed=needed)


def check(folder: str | Path, *, only: str | Sequence[str] = (), progress: bool = True) -> CheckReport:
    """`verify.check` with a progress bar: hash everything that belongs in a checkpoint folder, again."""
    with ExitStack() as stack:

        def start(total: int) -> Callable[[int], object]:
            return stack.enter_context(_Progress(progress, "checking", total)).update

        return verify.check(folder, only=(only,) if isinstance(only, str) else tuple(only), on_start=start)


def _parse(repo: str) -> tuple[Repo, str | None]:
    """A short name or `owner/name[@revision]` → the repository and the revision. Raises RequestError."""
    short = {name.lower(): known for name, known in SHORT_NAMES.items()}
    if repo.lower() in short:
        return short[repo.lower()], None
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", repo)
    if not match or ".." in repo:
        raise RequestError(
            f"{repo}: neither OWNER/NAME[@REVISION] nor a known name", hint=f"known: {', '.join(SHORT_NAMES)}"
        )
    return Repo(match[1]), match[2]


def _locate(
    hub: Hub,
    wanted: Repo,
    folder: Path | None,
    cache: Path,
    only: Sequence[str],
    source: str,
    published: list[KnownFile],
) -> tuple[Target, list[KnownFile]]:
    """Where the files belong and what they must be. Asks the Hub, unless all of that is known. Raises WanError."""
    if folder and published:
        target, files = Target(folder), verify.select(published, only, wanted.repo_id)
        if source != "hub" or len(_proven(files, target)) == len(files):
            return target, files
    if constants.HF_HUB_OFFLINE:
        return _locate_offline(hub, folder, cache, only, published)
    files = verify.select(_needed(wanted, hub.listing(), only, published), only, wanted.repo_id)
    return Target(folder) if folder else Target.in_cache(cache, hub.repo_id, hub.revision, hub.commit), files


def _needed(wanted: Repo, listing: list[KnownFile], only: Sequence[str], published: list[KnownFile]) -> list[KnownFile]:
    """Of all that the Hub lists, what inference needs (and what `only` names outright). Raises WanError."""
    there = {file.path: file for file in listing}
    names = [file.path for file in published] or wanted.files
    for name in names or ():
        if name not in there:
            raise RunError(f"{wanted.repo_id} no longer has {name}", hint="see --dry-run with OWNER/NAME@REVISION")
    if published:
        for file in published:
            same_kind = there[file.path].kind == file.kind
            if there[file.path].size != file.size or (same_kind and there[file.path].digest != file.digest):
                raise RunError(
                    f"{wanted.repo_id}: {file.path} on the Hub is not the published file that this version knows",
                    hint=f"{wanted.repo_id}@main takes the Hub's own hashes instead; a mirror may also be wrong",
                )
        return [replace(file, blob=there[file.path].blob) for file in published]
    if names:
        return [there[name] for name in names]
    needed = [
        file
        for file in listing
        if file.path in only
        or (file.path.endswith(NEEDED_SUFFIXES) and not file.path.startswith((".", "assets/", "examples/")))
    ]
    if not needed:
        raise RequestError(f"{wanted.repo_id} has no weights that inference could use")
    return needed


def _locate_offline(
    hub: Hub, folder: Path | None, cache: Path, only: Sequence[str], published: list[KnownFile]
) -> tuple[Target, list[KnownFile]]:
    """Where the files are and what they should be, as an earlier download or the manifest says. Raises RequestError."""
    target = Target(folder) if folder else Target.in_cache(cache, hub.repo_id, hub.revision, hub.commit)
    if target.ref and target.ref.is_file():
        hub.commit = target.ref.read_text(encoding="utf-8").strip()
        target = Target.in_cache(cache, hub.repo_id, hub.revision, hub.commit)
    record = Record(target.state)
    files = published or (record.files(hub.source) if record.asked(hub.source, only) else [])
    if not files or not target.folder.is_dir():
        raise RequestError(
            f"{target.folder}: nothing of {hub.source} is known there, and HF_HUB_OFFLINE forbids to ask",
            hint="unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) for the first download",
        )
    return target, verify.select(files, only, hub.repo_id)


def _require_room(target: Target, coming: list[KnownFile]) -> int:
    """The bytes that these files add to the disk, if it has them. Raises DoesNotFit."""
    needed, free = target.bytes_needed(coming), target.bytes_free()
    if needed > free:
        raise DoesNotFit(
            f"{target.folder}: needs {human(needed)} more ({needed} bytes), {human(free)} are free ({free} bytes)",
            hint="free space, choose another --ckpt_dir, or take a part with --only",
        )
    return needed


def _proven(files: list[KnownFile], target: Target) -> set[str]:
    record = Record(target.state)
    return {file.path for file in files if record.proves(file, target.path(file))}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _prove_present(
    files: list[KnownFile], target: Target, record: Record, progress: bool, say: Callable[[str], object]
) -> list[KnownFile]:
    """Hash what is there and was never proven; return what has to be fetched."""
    unproven = [file for file in files if not record.proves(file, target.path(file))]
    present = [file for file in unproven if target.path(file).is_file()]
    if not present:
        return unproven
    proven = set()
    with _Progress(progress, "checking what is there", sum(file.size for file in present)) as bar:

        def prove(file: KnownFile) -> None:
            problem = verify.examine(target.path(file), file, bar.update)
            if problem:
                say(f"{problem}; it is fetched again")
            else:
                record.prove(file, target.path(file))
                proven.add(file.path)

        verify.on_all_cores(prove, present)
    return [file for file in unproven if file.path not in proven]


class _Damaged(RunError):
    """One file came wrong twice. The others are fetched all the same."""


def _fetch(hub: Hub, files: list[KnownFile], target: Target, record: Record, workers: int, progress: bool) -> None:
    """Fetch and settle the files, several at a time. Raises WanError, and OSError of the disk."""
    total = sum(file.size for file in files)
    damaged: list[_Damaged] = []
    # A broken or hostile index ends it before the weights come; then the largest, which take longest.
    ordered = sorted(files, key=lambda file: (not file.path.endswith(".json"), -file.size))
    bar = _Progress(progress, "fetching", total, total - target.bytes_needed(files))
    with bar, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_fetch_one, hub, file, target, record, bar) for file in ordered]
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except _Damaged as error:
                    damaged.append(error)
        except BaseException:
            hub.halt()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if damaged:
        more = f" (and {len(damaged) - 1} more files)" if damaged[1:] else ""
        raise RunError(f"{damaged[0]}{more}", hint=damaged[0].hint)


def _fetch_one(hub: Hub, file: KnownFile, target: Target, record: Record, bar: _Progress) -> None:
    part = target.part(file)
    part.parent.mkdir(parents=True, exist_ok=True)
    for again in (True, False):
        if _complete(hub, file, part, bar) == file.digest:
            break
        bar.update(-part.stat().st_size)
        part.unlink()
        if not again:
            raise _Damaged(
                f"{file.path}: came damaged twice from {hub.endpoint}",
                hint=f"a proxy or mirror may be changing it: try another network or HF_ENDPOINT; {GOING_ON}",
            )
        hub.say(f"{file.path}: came damaged; fetching it again")
    if file.path.endswith(".index.json") and (problem := verify.index_problem(part, file.path)):
        raise RequestError(f"{hub.repo_id}: {problem}")
    record.prove(file, target.settle(file, part))


def _complete(hub: Hub, file: KnownFile, part: Path, bar: _Progress) -> str:
    """Fetch what `part` lacks and return the digest of the whole. Nothing that came is held back from the disk."""
    hasher, have, tries = file.new_hash(), 0, 0
    with part.open("a+b", buffering=0) as out:
        out.seek(0)
        while block := out.read(verify.BLOCK):
            hasher.update(block)
            have += len(block)
        while have < file.size:
            before, failure = have, None
            try:
                for chunk in hub.chunks(file, have):
                    view = memoryview(chunk)
                    while view:  # a disk that fills up takes a part of it
                        view = view[out.write(view) :]
                    hasher.update(chunk)
                    have += len(chunk)
                    bar.update(len(chunk))
            except XetFailed as error:
                if hub.use_xet:
                    hub.say(f"{file.path}: xet storage: {error}; going on over plain HTTP")
                hub.use_xet = False
                continue
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:  # huggingface_hub's HTTP errors are of this kind
                failure = error
            if have < file.size:
                tries = 1 if have > before else tries + 1
                hub.wait_out(file.path, failure, tries)
        os.fsync(out.fileno())  # the record must not outlive the bytes that it vouches for
    return hasher.hexdigest()


def _fetch_from_modelscope(
    files: list[KnownFile], target: Target, record: Record, say: Callable[[str], object]
) -> None:
    """The published files from ModelScope, by its own client, which resumes its own partial files. Raises WanError."""
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        hint = "pip install modelscope"
        raise RequestError("--source modelscope: the modelscope package is not installed", hint=hint) from None
    for _attempt in range(2):
        try:
            snapshot_download(PUBLISHED, local_dir=str(target.folder), allow_file_pattern=[file.path for file in files])
        except Exception as error:  # its client documents no exceptions
            if isinstance(error, OSError) and error.errno in (*DISK_FULL, *NOT_WRITABLE):
                raise
            line = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise RunError(f"modelscope: {line}", hint=GOING_ON) from error
        damaged = []
        for file in files:
            if problem := verify.examine(target.path(file), file):
                say(str(problem))
                target.path(file).unlink(missing_ok=True)
                damaged.append(file)
            else:
                record.prove(file, target.path(file))
        files = damaged
        if not files:
            return
    raise RunError(f"modelscope: {_names(files)} damaged or missing, twice", hint="try --source hub")


def _names(files: Sequence[KnownFile]) -> str:
    more = f" and {len(files) - 1} more files are" if files[1:] else " is"
    return files[0].path + more
