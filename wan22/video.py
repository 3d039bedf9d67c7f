"""Frames → a file with the record of its making inside, and back.

`open_output` picks a writer by the name it is given:

| output             | frames                          | record                           |
|--------------------|---------------------------------|----------------------------------|
| `NAME.mp4`         | H.264 or HEVC, as chunks come   | the container's `comment` tag    |
| `NAME.gif`         | one palette for the whole video | a comment extension              |
| `NAME.png`         | a sheet of them (sheet.py)      | an iTXt chunk, keyword `Comment` |
| `NAME/`, no suffix | `00000.png`, `00001.png` …      | `record.json`                    |

Each is made in a hidden folder beside its target and moved when it is whole: what has its name is always a whole file.
How the record is stored and found again is record.py's. Legend: `F` pixel frames, `H W` pixels.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from wan22.config import DiskFull, Encoding, RequestError, RunError
from wan22.output.names import (
    beside,
    exists,
    is_empty_folder,
    move_to_free,
    next_free,
    not_written,
    staging_prefix,
    sync,
    sync_entry,
)
from wan22.output.record import RECORD_NAME, read_document, read_record, stored_text, to_text

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "IfExists", "VideoWriter", "check_folder", "check_sidecar", "check_writable", "is_mp4", "iter_frames",
    "open_output", "read_frames", "read_record", "write_sidecar",
]  # fmt: skip

IfExists = Literal["error", "number", "replace"]  # a target that exists: refuse, take the next free number, replace it

# Fixed: x264's bytes depend on how many there are, and the same video is the same file on every machine. x265 has frame
# threads to fix, writes its version and options into the stream unless told not to, and QuickTime knows its streams
# only by the name hvc1.
_THREADS = 4
_CODEC_OPTIONS = {
    "libx264": ["-threads", str(_THREADS)],
    "libx265": ["-x265-params", f"pools={_THREADS}:frame-threads=1:info=0:log-level=error", "-tag:v", "hvc1"],
}
SIDECAR = ".json"  # the ending of the record beside an output
_FRAME_NAME = re.compile(r"\d{5,}\.png")

# Untagged files are guessed to be BT.601 by some players and BT.709 by others, and reds turn orange. Ours are BT.709 in
# limited range and say so: to older ffmpegs by the encoder's options, to newer ones by the frames' properties.
_TO_BT709 = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
)
_TAG_BT709 = ["-color_range", "tv", "-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709"]

# Ctrl-C is for us to answer; ffmpeg, in our group, would take it for the end of the video.
_OWN_GROUP: dict[str, Any] = {"process_group": 0}
if sys.platform == "win32":
    _OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}


# Writing -----------------------------------------------------------------------------------------------------------


def open_output(
    path: str | Path,
    *,
    width: int,
    height: int,
    fps: float,
    record: dict[str, Any],
    if_exists: IfExists = "error",
    encoding: Encoding = Encoding(),  # noqa: B008 (frozen)
) -> VideoWriter:
    """The writer for a path: a context manager with `.write(frames)`, and afterwards `.path`, the name it got.

        with open_output("sunset.mp4", width=1280, height=720, fps=16, record=record) as output:
            for frames in chunks:  # uint8 [F, H, W, 3]
                output.write(frames)

    Leaving it normally publishes the file; leaving it by an exception leaves nothing. Raises RequestError for a name of
    an unknown kind, and RunError, from each of the three steps, for a full disk, an ffmpeg that dies and the like.
    encoding: of an mp4; the other kinds have one way to be written.
    """
    return _kind(path)(
        Path(path), width=width, height=height, fps=fps, record=record, if_exists=if_exists, encoding=encoding
    )


def is_mp4(path: str | Path) -> bool:
    """Whether `open_output` would make an mp4 of it. Raises RequestError for a name of an unknown kind."""
    return _kind(path) is _Mp4Writer


def check_writable(
    path: str | Path, *, if_exists: IfExists = "error", encoding: Encoding = Encoding()  # noqa: B008 (frozen)
) -> None:
    """RequestError, before any work is done, where `open_output` could not write. Leaves nothing behind."""
    target, kind = Path(path), _kind(path)
    check_folder(target)
    taken = exists(target) and not (kind is _FolderWriter and is_empty_folder(target))
    if taken and not (target.is_file() or target.is_dir() or target.is_symlink()):  # of which a video takes the name
        raise RequestError(f"cannot write {target}: it is a device or a pipe, not a file", hint="name a file")
    if taken and if_exists == "error":
        raise RequestError(f"cannot write {target}: it exists already", hint=_overwrite_hint(target))
    if taken and if_exists == "replace" and kind is _FolderWriter:
        _check_ours(target)
    if kind is _Mp4Writer:
        _check_codec(_ffmpeg(), encoding.codec)


def check_folder(target: Path) -> None:
    """RequestError where no file of that name could be made; leaves nothing behind."""
    if not target.name:
        raise RequestError(f"cannot write {target}: it is no name", hint="name a file, or a new folder")
    try:
        exists(target)
        if target.is_dir():
            next(target.iterdir(), None)
        folder = target.absolute().parent
        while not exists(folder) and folder != folder.parent:  # a Windows drive may not exist
            folder = folder.parent
        # Permission bits do not tell: root ignores them, read-only and network file systems have a mind of their own.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"cannot write {target}: {reason}") from None


def check_sidecar(path: str | Path, *, if_exists: IfExists) -> None:
    """RequestError, before any work is done, where the sidecar of `path` would be in the way of something."""
    target = beside(Path(path), SIDECAR)
    if if_exists == "error" and exists(target):
        raise RequestError(f"cannot write {target}: it exists already", hint="--overwrite replaces it")


def write_sidecar(path: str | Path, if_exists: IfExists) -> Path:
    """The record of a finished file in `NAME.json` beside it, byte for byte what is stored inside.

    Renamed when whole; by `if_exists`, one that says something else is an error, left alone for the next free number,
    or replaced. Raises RequestError where there is no record in the file, and RunError.
    """
    read_document(path)
    text, target = stored_text(Path(path)), beside(Path(path), SIDECAR)
    assert text is not None  # read_document has read it
    with suppress(OSError):
        if target.read_bytes() == text.encode():
            return target  # of a run that was killed just before its end
    asked = target
    with _reporting(target), ExitStack() as cleanup:
        folder = tempfile.mkdtemp(prefix=staging_prefix(target), dir=target.absolute().parent)
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        staged = Path(folder) / "record.json"
        staged.write_text(text, encoding="utf-8", newline="\n")
        sync(staged)
        if if_exists == "replace":
            os.replace(staged, target)
        else:
            while not move_to_free(staged, target):
                if if_exists == "error":
                    raise RunError(f"could not write {target}: it appeared meanwhile, and is not overwritten")
                target = next_free(asked)
    sync_entry(target)
    return target


class VideoWriter:
    """What `open_output` returns. A subclass makes its file in `_staging`; this one shows it whole or not at all."""

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: float,
        record: dict[str, Any],
        if_exists: IfExists,
        encoding: Encoding,
    ) -> None:
        self.path = self._asked = path
        self._encoding = encoding
        self._width, self._height, self._fps, self._if_exists = width, height, fps, if_exists
        self._text = to_text(record, fps)
        self._count = 0
        self._cleanup = ExitStack()

    def write(self, frames: np.ndarray) -> None:
        """Add frames: uint8 [F, H, W, 3] of the size announced, any number at a time."""
        expected = (self._height, self._width, 3)
        if frames.ndim != 4 or frames.shape[1:] != expected or frames.dtype != "uint8":
            raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}, not uint8 [F, {str(list(expected))[1:]}")
        with _reporting(self.path):
            self._encode(frames)
        self._count += len(frames)

    def __enter__(self) -> Self:
        with _reporting(self.path):
            folder = self.path.absolute().parent
            folder.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=staging_prefix(self.path), dir=folder))
            self._cleanup.callback(shutil.rmtree, self._staging, ignore_errors=True)  # what led here matters more
            try:
                self._start()
            except BaseException:
                self._cleanup.close()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._cleanup:
            if kind is None:
                with _reporting(self.path):
                    self._publish()

    def _publish(self) -> None:
        if not self._count:
            raise RunError(f"could not write {self.path}: there were no frames")
        staged = self._finish()
        try:  # believe the file, not exit codes
            whole = stored_text(staged) == self._text
        except ValueError:
            whole = False
        if not whole:
            raise RunError(f"could not write {self.path}: what was written does not read back")
        sync(staged)
        if self._if_exists == "replace":
            _replace(staged, self.path)
        else:
            while not move_to_free(staged, self.path):
                if self._if_exists == "error":
                    raise RunError(f"could not write {self.path}: it appeared meanwhile, and is not overwritten")
                self.path = next_free(self._asked)
        sync_entry(self.path)

    def _start(self) -> None:
        raise NotImplementedError

    def _encode(self, frames: np.ndarray) -> None:
        raise NotImplementedError

    def _finish(self) -> Path:
        """Complete the file (or folder) in `_staging` and say where it is."""
        raise NotImplementedError


class _Mp4Writer(VideoWriter):
    """Frames go down a pipe to an ffmpeg, which encodes while the next ones are made."""

    def _start(self) -> None:
        # The record goes by a file: Windows takes 32 767 characters of arguments in all, Linux 131 072 bytes in one.
        metadata = self._staging / "record.txt"
        escaped = re.sub(r"([=;#\\\n])", r"\\\1", self._text)
        metadata.write_text(f";FFMETADATA1\ncomment={escaped}\n", encoding="utf-8", newline="\n")
        self._video = self._staging / "video.mp4"
        rate = Fraction(self._fps).limit_denominator(1001)
        command = [_ffmpeg(), "-hide_banner", "-nostdin", "-loglevel", "error", "-xerror"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{self._width}x{self._height}", "-r", str(rate)]
        command += ["-i", "pipe:0", "-f", "ffmetadata", "-i", str(metadata), "-map", "0:v", "-map_metadata", "1"]
        codec, crf = self._encoding.codec, self._encoding.crf
        command += ["-vf", _TO_BT709, *_TAG_BT709, "-c:v", codec, "-crf", str(crf), *_CODEC_OPTIONS[codec]]
        # xerror: ffmpeg 4.x exits 0 otherwise when the disk fills at the very end; bitexact: no ffmpeg version and no
        # date; faststart: what a player needs first comes first; write_colr: the colours' tag, in older ffmpegs too.
        command += ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-movflags", "+faststart+write_colr", "-f", "mp4"]
        self._process = subprocess.Popen(
            [*command, str(self._video)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **_OWN_GROUP,
        )
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        self._pipe, self._errors = self._process.stdin, self._process.stderr
        self._said: deque[bytes] = deque(maxlen=50)
        # Drained as it comes: a full stderr pipe would stop ffmpeg, and then us.
        self._listener = threading.Thread(target=self._said.extend, args=(self._errors,), daemon=True)
        self._listener.start()
        self._cleanup.callback(self._stop)

    def _encode(self, frames: np.ndarray) -> None:
        import numpy as np

        try:
            for frame in frames:
                self._pipe.write(np.ascontiguousarray(frame).data)
        except OSError:  # ffmpeg has closed its end
            self._fail()

    def _finish(self) -> Path:
        try:
            self._pipe.close()
        except OSError:
            self._fail()
        if self._process.wait() != 0:
            self._fail()
        return self._video

    def _fail(self) -> NoReturn:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)  # it is about to exit, and its last words come first
        self._stop()
        reason = _last_words(self._said)
        code = self._process.returncode
        if not reason and code < 0:
            reason = f"ffmpeg was ended by a signal: {signal.strsignal(-code)}"
        raise _run_error(self.path, reason or f"ffmpeg exited with {code}")

    def _stop(self) -> None:
        """End ffmpeg, if it still runs, and close both pipes."""
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # bytes still buffered for a process that is gone
            self._pipe.close()
        self._listener.join()
        self._errors.close()


class _CollectingWriter(VideoWriter):
    """For what can only be made when all frames are there. They take 3 · F · H · W bytes."""

    def _start(self) -> None:
        self._chunks: list[np.ndarray] = []

    def _encode(self, frames: np.ndarray) -> None:
        self._chunks.append(frames.copy())


class _GifWriter(_CollectingWriter):
    def _finish(self) -> Path:
        import numpy as np
        from PIL import Image

        frames = np.concatenate(self._chunks)
        # One palette for all frames, so that still colours stand still; from a quarter of a million of their pixels
        # (every odd-numberth: sides are even, and an even step could meet the same few columns in every row).
        pixels = frames.reshape(-1, 3)
        sample = pixels[:: -(-len(pixels) // 2**18) | 1]
        palette = Image.fromarray(sample[None]).quantize(256, method=Image.Quantize.MEDIANCUT)
        images = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
        # A GIF counts in hundredths of a second: 16 a second are a pattern of 6 and 7, at most half of one off.
        clock = np.diff(np.round(np.arange(len(images) + 1) * 100 / self._fps)) * 10
        staged = self._staging / "video.gif"
        rest = {"append_images": images[1:], "duration": clock.astype(int).tolist(), "loop": 0}
        images[0].save(staged, save_all=True, comment=self._text.encode(), **rest)
        return staged


class _SheetWriter(_CollectingWriter):
    def _finish(self) -> Path:
        import numpy as np
        from PIL.PngImagePlugin import PngInfo

        from wan22.output.sheet import frame_sheet

        info = PngInfo()
        info.add_itxt("Comment", self._text)
        staged = self._staging / "sheet.png"
        frame_sheet(np.concatenate(self._chunks)).save(staged, pnginfo=info)
        return staged


class _FolderWriter(VideoWriter):
    def _start(self) -> None:
        self._folder = self._staging / "frames"  # not the staging folder itself, which only its owner may enter
        self._folder.mkdir()

    def _encode(self, frames: np.ndarray) -> None:
        from PIL import Image

        for index, frame in enumerate(frames, self._count):
            Image.fromarray(frame).save(self._folder / f"{index:05d}.png", compress_level=1)

    def _finish(self) -> Path:
        (self._folder / RECORD_NAME).write_text(self._text, encoding="utf-8", newline="\n")
        return self._folder


_WRITERS: dict[str, type[VideoWriter]] = {".mp4": _Mp4Writer, ".gif": _GifWriter, ".png": _SheetWriter}


def _kind(path: str | Path) -> type[VideoWriter]:
    """By suffix; a folder of frames where there is none, and in a folder with another one. Raises RequestError."""
    target = Path(path)
    suffix, is_folder = target.suffix.lower(), os.path.isdir(target)
    if not suffix or (is_folder and suffix not in _WRITERS):
        return _FolderWriter
    if is_folder:
        raise RequestError(f"cannot write {target}: it is a folder", hint=_overwrite_hint(target))
    if suffix not in _WRITERS or os.fspath(path).endswith(("/", os.sep)):  # Path drops a slash, and with it the intent
        hint = f"known: {', '.join(_WRITERS)}; without one, a folder of frames"
        raise RequestError(f"cannot write {path}: unknown suffix {suffix}", hint=hint)
    return _WRITERS[suffix]


def _overwrite_hint(target: Path) -> str:
    return f"name a file in it, as {target / 'video.mp4'}" if target.is_dir() else "--overwrite replaces it"


def _ffmpeg() -> str:
    """Where ffmpeg is: $IMAGEIO_FFMPEG_EXE, else the one imageio-ffmpeg brings or finds. Raises RequestError."""
    import imageio_ffmpeg

    try:
        found = shutil.which(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        found = None
    if found is None:
        raise RequestError("there is no ffmpeg to write a video with", hint="point IMAGEIO_FFMPEG_EXE at one")
    return found


def _check_codec(ffmpeg: str, codec: str) -> None:
    """RequestError where this ffmpeg, which may be the system's, was built without the codec's encoder."""
    if codec == Encoding.codec:
        return  # no ffmpeg that imageio-ffmpeg brings is without it, and asking costs a process
    command = [ffmpeg, "-hide_banner", "-nostdin", "-encoders"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, **_OWN_GROUP)
    if not re.search(rf"^ *V\S* +{codec}\b", listed.stdout, re.MULTILINE):
        hint = f"say --codec {Encoding.codec}, or point IMAGEIO_FFMPEG_EXE at another ffmpeg"
        raise RequestError(f"--codec {codec}: {ffmpeg} has no such encoder", hint=hint)


_PREFIX = re.compile(r"^(\[[^\]]*\] *)+")  # [libx264 @ 0x55d0c8a3e2c0]
_SAYS_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "File size limit exceeded")


def _last_words(lines: Iterable[bytes]) -> str:
    """ffmpeg's last line that says why, if there is one: a full disk first, since other complaints follow from it."""
    words = [_PREFIX.sub("", line.decode("utf-8", "replace")).strip() for line in lines]
    telling = [line for line in words if line and line != "Conversion failed!"]
    full = [line for line in telling if any(says in line for says in _SAYS_FULL)]
    return (full or telling or [""])[-1]


def _run_error(path: Path, reason: str) -> RunError:
    if any(says in reason for says in _SAYS_FULL):
        return DiskFull(f"could not write {path}: the disk is full")
    return RunError(f"could not write {path}: {reason}")


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Any OSError within as a RunError about `path`."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


def _check_ours(folder: Path) -> None:
    """RequestError unless it holds frames, their record and nothing else: replacing must never delete anything else."""
    if not folder.is_dir():
        raise RequestError(f"cannot replace {folder}: it is not a folder of frames")
    read_record(folder)
    for child in folder.iterdir():
        if child.name != RECORD_NAME and not _FRAME_NAME.fullmatch(child.name):
            raise RequestError(f"cannot replace {folder}: there is more than frames in it, {child.name} for one")


def _replace(staged: Path, target: Path) -> None:
    if staged.is_file():
        os.replace(staged, target)
    elif not move_to_free(staged, target):  # a folder does not replace another in one step
        _check_ours(target)
        old = staged.with_name("old")
        os.rename(target, old)
        try:
            os.rename(staged, target)
        except OSError:
            os.rename(old, target)
            raise


# Reading -----------------------------------------------------------------------------------------------------------


def read_frames(path: str | Path) -> tuple[np.ndarray, float]:
    """A video's frames, uint8 [F, H, W, 3], and how many of them a second: an mp4, a GIF or a folder of ours.

    Raises RequestError. The rate of a GIF, whose own clock is coarse, is the record's where there is one.
    """
    import numpy as np

    path = Path(path)
    with _explaining(path):
        kind = _content(path)
        if kind == "mp4":
            about, chunks = _open_mp4(path)
            width, height = about["size"]
            frames = np.frombuffer(bytearray().join(chunks), np.uint8).reshape(-1, height, width, 3)
            if not len(frames):
                raise ValueError("not a frame of it can be decoded")
            return frames, about["fps"]
        fps = read_document(path)["fps"] if kind == "folder" else _gif_rate(path)
        return np.stack(list(_FRAMES[kind](path))), fps


def iter_frames(path: str | Path) -> Iterator[np.ndarray]:
    """The same frames one by one, each uint8 [H, W, 3], so that memory holds one; a folder needs no record.

    Raises RequestError, from the iteration on.
    """
    path = Path(path)
    with _explaining(path):
        yield from _FRAMES[_content(path)](path)


def _content(path: Path) -> str:
    """`mp4`, `gif` or `folder`, by what is there and not by its name. Raises RequestError, OSError."""
    if path.is_dir():
        return "folder"
    with open(path, "rb") as file:
        start = file.read(12)
    if start[:4] == b"GIF8":
        return "gif"
    # Only an mp4 by content goes to ffmpeg, which also follows playlists to other files and over the network.
    if start[4:8] == b"ftyp":
        return "mp4"
    raise RequestError(f"{path}: neither an mp4, nor a GIF, nor a folder of frames")


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Whatever goes wrong within as a RequestError about `path`."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:  # Pillow and ffmpeg fail on a broken file in many ways
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise RequestError(f"{path}: cannot be read as a video: {reason}") from error


def _open_mp4(path: Path) -> tuple[dict[str, Any], Iterator[bytes]]:
    """What ffmpeg says of it (`size`, `fps`), and its frames."""
    import imageio_ffmpeg

    stored_text(path)  # for its ValueError: ffmpeg would read a file that is cut short to where it ends
    exact = ["-sws_flags", "bicubic+accurate_rnd+full_chroma_int"]  # the default is up to two levels darker
    reader = imageio_ffmpeg.read_frames(os.path.abspath(path), pix_fmt="rgb24", output_params=exact)
    return next(reader), reader


def _mp4_frames(path: Path) -> Iterator[np.ndarray]:
    import numpy as np

    about, chunks = _open_mp4(path)
    width, height = about["size"]
    for chunk in chunks:
        yield np.frombuffer(chunk, np.uint8).reshape(height, width, 3)


def _gif_rate(path: Path) -> float:
    from PIL import Image, ImageSequence

    try:
        return read_document(path)["fps"]
    except RequestError:  # not one of ours
        with Image.open(path) as image:
            durations = [frame.info.get("duration", 0) / 1000 for frame in ImageSequence.Iterator(image)]  # seconds
        return len(durations) / max(sum(durations), 0.01)


def _gif_frames(path: Path) -> Iterator[np.ndarray]:
    import numpy as np
    from PIL import Image, ImageSequence

    try:
        fps = read_document(path)["fps"]
    except RequestError:
        fps = 0  # not one of ours: each once
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            pixels = np.asarray(frame.convert("RGB"))
            # Frames alike are stored as one that stays.
            for _ in range(max(1, round(frame.info.get("duration", 0) / 1000 * fps))):
                yield pixels


def _folder_frames(path: Path) -> Iterator[np.ndarray]:
    import numpy as np
    from PIL import Image

    names = sorted((int(child.stem), child) for child in path.iterdir() if _FRAME_NAME.fullmatch(child.name))
    if not names:
        raise RequestError(f"{path}: there are no frames in it", hint="their names are 00000.png, 00001.png …")
    for _, child in names:
        with Image.open(child) as image:
            yield np.asarray(image.convert("RGB"))


_FRAMES: dict[str, Callable[[Path], Iterator[np.ndarray]]] = {
    "mp4": _mp4_frames, "gif": _gif_frames, "folder": _folder_frames,
}  # fmt: skip
