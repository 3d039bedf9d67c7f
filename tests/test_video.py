"""Files from frames: whole or not there, true in colour, their record inside. Names and records are tested apart."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan22.config import Encoding, RequestError, RunError
from wan22.output.record import stored_text
from wan22.output.sheet import frame_sheet, grid
from wan22.video import check_writable, iter_frames, open_output, read_frames, read_record, write_sidecar

W, H, FPS = 96, 64, 16
OUTPUTS = pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.png", "x"])
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals, shells and permissions of POSIX")
VIDEOS = pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x"])
NASTY = {
    "prompt": "a \"red\" circle = 日落; #1 \\n \\\\ \n\r\t\0 \x1b \u2028 🎬 \ud800 %s %% {} $HOME `ls` 'quoted'",
    "negative_prompt": "=;#\\\n[STREAM]\n;FFMETADATA1\ntitle=no\n",
    "seed": 2**63 - 1,
    "shift": 0.1 + 0.2,
    "loras": [],
    "none": None,
}


def clip(num_frames: int = 17, width: int = W, height: int = H) -> np.ndarray:
    """uint8 [F, H, W, 3]: colours that flow, and a disc that moves right."""
    t = np.linspace(0, 1, num_frames)[:, None, None]
    y, x = np.linspace(0, 1, height)[None, :, None], np.linspace(0, 1, width)[None, None, :]
    waves = [np.sin(3 * x + 4 * t + 0 * y), np.sin(2 * y - 3 * t + 1 * x), np.sin(4 * x * y + 5 * t)]
    frames = (127 + 110 * np.stack(waves, axis=-1)).astype(np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for index, frame in enumerate(frames):
        centre = width * (0.2 + 0.6 * index / max(num_frames - 1, 1))
        frame[(columns - centre) ** 2 + (rows - height / 2) ** 2 < (height / 5) ** 2] = (220, 40, 40)
    return frames


def save(path: Path, frames: np.ndarray, record: dict | None = None, chunk: int = 4, **how) -> Path:
    """Write in chunks, as they come from a VAE: one frame first, then four at a time."""
    how = {"width": frames.shape[2], "height": frames.shape[1], "fps": FPS, "record": record or {}} | how
    with open_output(path, **how) as output:
        output.write(frames[:1])
        for start in range(1, len(frames), chunk):
            output.write(frames[start : start + chunk])
    return output.path


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


# What comes back ---------------------------------------------------------------------------------------------------


@OUTPUTS
def test_a_nasty_record_comes_back(tmp_path, name: str) -> None:
    record = NASTY | {"long": "长 = \\ ; # \n" * 2000}
    assert read_record(save(tmp_path / name, clip(5), record)) == record
    assert os.listdir(tmp_path) == [name]


@VIDEOS
@pytest.mark.parametrize("num_frames", [1, 2, 17])
def test_frames_come_back(tmp_path, name: str, num_frames: int) -> None:
    frames = clip(num_frames, 320, 256)
    back, fps = read_frames(save(tmp_path / name, frames))
    assert back.dtype == np.uint8
    assert back.shape == frames.shape
    assert fps == FPS
    quality = psnr(back, frames)
    print(f"{name}, {num_frames} frames: {quality:.1f} dB")
    assert quality > {"x.mp4": 37, "x.gif": 22, "x": 80}[name]


@VIDEOS
def test_frames_that_stand_still_are_not_lost(tmp_path, name: str) -> None:
    frames = np.repeat(clip(3), [5, 1, 7], axis=0)
    back, _ = read_frames(save(tmp_path / name, frames))
    assert len(back) == 13


@pytest.mark.parametrize("fps", [8, 12, 16, 24, 25, 30, 23.976])
def test_the_rate_comes_back(tmp_path, fps: float) -> None:
    for name in ("x.mp4", "x.gif", "x"):
        back, read = read_frames(save(tmp_path / name, clip(9), fps=fps, if_exists="replace"))
        assert len(back) == 9
        assert read == pytest.approx(fps, abs=0.01)


def test_a_gif_keeps_time(tmp_path) -> None:
    with Image.open(save(tmp_path / "x.gif", clip(33))) as image:
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
    assert set(durations) == {60, 70}
    assert sum(durations) == pytest.approx(33 / FPS * 1000, abs=10)
    assert image.info["loop"] == 0


def test_frames_in_any_memory_layout(tmp_path) -> None:
    frames = clip(5)
    turned = np.ascontiguousarray(frames.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)[:, ::-1]
    back, _ = read_frames(save(tmp_path / "x.mp4", turned))
    assert psnr(back, frames[:, ::-1]) > 33


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128)]
COLOURS += [(220, 40, 40), (40, 170, 60), (40, 80, 220), (240, 140, 30), (140, 50, 180), (12, 12, 12), (245, 245, 245)]


@pytest.mark.parametrize("size", [(64, 64), (480, 720)])
def test_colours_are_true(tmp_path, size: tuple[int, int]) -> None:
    """At both heights: players guess the matrix of an untagged file by it."""
    width, height = size
    frames = np.empty((len(COLOURS), height, width, 3), np.uint8)
    frames[:] = np.array(COLOURS, np.uint8)[:, None, None]
    back, _ = read_frames(save(tmp_path / "x.mp4", frames))
    off = np.abs(back.astype(int) - frames).max()
    print(f"{width}x{height}: largest error of a flat colour {off}")
    assert off <= 2


def test_the_stream_says_what_it_is(tmp_path) -> None:
    import imageio_ffmpeg

    path = save(tmp_path / "x.mp4", clip(5))
    said = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, text=True).stderr
    assert "h264" in said
    assert "yuv420p(tv, bt709" in said
    assert f"{W}x{H}" in said
    data = path.read_bytes()
    assert b"colrnclx\x00\x01\x00\x01\x00\x01\x00" in data
    assert data.index(b"moov") < data.index(b"mdat")  # starts to play before it is all there


@OUTPUTS
def test_the_same_frames_and_record_are_the_same_bytes(tmp_path, name: str) -> None:
    frames, digests = clip(33), set()
    for index, chunk in enumerate((1, 4, 32)):
        (tmp_path / str(index)).mkdir()
        path = save(tmp_path / str(index) / name, frames, NASTY, chunk=chunk)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        digests.add(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
    assert len(digests) == 1


def test_a_folder_of_frames(tmp_path) -> None:
    frames = clip(12)
    path = save(f"{tmp_path}/new/frames/", frames, {"seed": 1})
    assert sorted(os.listdir(path)) == [f"{index:05d}.png" for index in range(12)] + ["record.json"]
    assert json.loads((path / "record.json").read_text()) == {"wan22": {"seed": 1}, "fps": FPS}
    assert (np.asarray(Image.open(path / "00007.png")) == frames[7]).all()
    assert path.stat().st_mode & 0o777 == 0o777 & ~_umask()


@POSIX
def test_a_file_has_the_usual_permissions(tmp_path) -> None:
    for name in ("x.mp4", "x.gif", "x.png"):
        assert save(tmp_path / name, clip(2)).stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


# Sheets ------------------------------------------------------------------------------------------------------------


def test_a_sheet_shows_frames_evenly_spaced_in_time(tmp_path) -> None:
    frames = clip(34)
    path = save(tmp_path / "x.png", frames, {"seed": 1})
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * (H + 4) + 4, 4 * (W + 4) + 4, 3)
    shown = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33]
    for place, index in enumerate(shown):
        top, left = 4 + place // 4 * (H + 4), 4 + place % 4 * (W + 4)
        assert (sheet[top : top + H, left : left + W] == frames[index]).all()
    assert (sheet[:4] == sheet[0, 0]).all()


def test_a_sheet_of_few_or_large_frames() -> None:
    assert frame_sheet(clip(1)).size == (W + 8, H + 8)
    assert frame_sheet(clip(5)).size == (4 * (W + 4) + 4, 2 * (H + 4) + 4)
    assert frame_sheet(np.zeros((9, 720, 1280, 3), np.uint8), columns=3).size == (3 * 484 + 4, 3 * 274 + 4)
    with pytest.raises(ValueError, match="uint8"):
        frame_sheet(clip(1).astype(float))
    with pytest.raises(ValueError, match="F ≥ 1"):
        frame_sheet(clip(1)[:0])


def test_a_grid_of_sheets() -> None:
    sheets = [frame_sheet(clip(4), columns=2), frame_sheet(clip(2), columns=2)]
    assert grid(sheets, columns=1, gap=10).size == (2 * W + 12 + 20, 2 * (2 * H + 12) + 30)


# Whole or not there ------------------------------------------------------------------------------------------------


@OUTPUTS
def test_an_error_leaves_nothing(tmp_path, name: str) -> None:
    def interrupted() -> None:
        with open_output(tmp_path / name, width=W, height=H, fps=FPS, record={}) as output:
            output.write(clip(9))
            assert len(os.listdir(tmp_path)) == 1
            assert not output.path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


@OUTPUTS
def test_no_frames_are_no_video(tmp_path, name: str) -> None:
    with pytest.raises(RunError, match="there were no frames"):
        save(tmp_path / name, clip(1)[:0])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("wrong", [clip(2)[0], clip(2, 64, 64), clip(2).astype(np.float32), clip(2)[..., :1]])
def test_wrong_frames_are_refused(tmp_path, wrong: np.ndarray) -> None:
    with (
        pytest.raises(ValueError, match=rf"not uint8 \[F, {H}, {W}, 3\]"),
        open_output(tmp_path / "x.mp4", width=W, height=H, fps=FPS, record={}) as output,
    ):
        output.write(wrong)
    assert os.listdir(tmp_path) == []


WRITE_FOREVER = """
import sys, time
import numpy as np
from wan22.video import open_output
with open_output(sys.argv[1], width=96, height=64, fps=16, record={}) as output:
    while True:
        output.write(np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), np.uint8))
        print("written", flush=True)
        time.sleep(0.02)
"""


@POSIX
@pytest.mark.parametrize("name", ["x.mp4", "x"])
def test_a_kill_leaves_no_target(tmp_path, name: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, tmp_path / name], stdout=subprocess.PIPE) as process:
        for _ in range(5):
            assert process.stdout.readline() == b"written\n"
        process.kill()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".{name}.partial-")


def test_encoding_goes_on_while_frames_come(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, H, W, 3), np.uint8)
    with open_output(tmp_path / "x.mp4", width=W, height=H, fps=FPS, record={}) as output:
        output.write(noise)
        deadline, size = time.monotonic() + 20, 0
        while size < 10_000 and time.monotonic() < deadline:
            time.sleep(0.02)
            size = sum(video.stat().st_size for video in tmp_path.glob(".x.mp4.partial-*/*.mp4"))
        assert size >= 10_000  # compressed and on its way to the disk, though more may come
        output.write(noise[:4])
    assert len(read_frames(tmp_path / "x.mp4")[0]) == 104


@POSIX
def test_ctrl_c_is_not_ffmpegs_to_answer(tmp_path) -> None:
    """A terminal sends it to the whole group; a run that chooses to finish first must still have its encoder."""
    with open_output(tmp_path / "x.mp4", width=W, height=H, fps=FPS, record={}) as output:
        output.write(clip(4))
        assert os.getpgid(output._process.pid) != os.getpgid(0)


# Nothing is overwritten unasked ------------------------------------------------------------------------------------


@OUTPUTS
def test_what_appears_meanwhile_is_left_alone(tmp_path, name: str) -> None:
    def write(if_exists) -> Path:
        with open_output(
            tmp_path / name, width=W, height=H, fps=FPS, record={"seed": 1}, if_exists=if_exists
        ) as output:
            output.write(clip(5))
            (tmp_path / name).write_text("precious")
        return output.path

    with pytest.raises(RunError, match="appeared meanwhile"):
        write("error")
    numbered = write("number")
    assert numbered == tmp_path / name.replace("x", "x-2")
    assert read_record(numbered) == {"seed": 1}
    assert (tmp_path / name).read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == sorted([name, numbered.name])


@OUTPUTS
def test_replace(tmp_path, name: str) -> None:
    for seed in range(3):
        check_writable(tmp_path / name, if_exists="replace")
        assert save(tmp_path / name, clip(9 - seed), {"seed": seed}, if_exists="replace") == tmp_path / name
        assert read_record(tmp_path / name) == {"seed": seed}
        assert os.listdir(tmp_path) == [name]
    if name == "x":
        assert len(list((tmp_path / name).glob("*.png"))) == 7


def test_replace_never_deletes_a_folder_that_is_not_ours(tmp_path) -> None:
    folder = save(tmp_path / "x", clip(2))
    (folder / "thesis.doc").write_text("precious")
    with pytest.raises(RequestError, match=r"thesis\.doc"):
        check_writable(folder, if_exists="replace")
    with pytest.raises(RequestError, match=r"thesis\.doc"):
        save(folder, clip(2), if_exists="replace")
    home = tmp_path / "home"
    home.mkdir()
    (home / "00000.png").write_text("precious")
    with pytest.raises(RequestError, match="no record"):
        check_writable(home, if_exists="replace")
    save(tmp_path / "x.mp4", clip(2)).rename(tmp_path / "file")
    with pytest.raises(RequestError, match="not a folder of frames"):
        check_writable(tmp_path / "file", if_exists="replace")
    assert (folder / "thesis.doc").read_text() == (home / "00000.png").read_text() == "precious"


def test_an_empty_folder_may_be_filled(tmp_path) -> None:
    (tmp_path / "frames.v2").mkdir()
    check_writable(tmp_path / "frames.v2")
    assert len(read_frames(save(tmp_path / "frames.v2", clip(3)))[0]) == 3


# Before any work is done -------------------------------------------------------------------------------------------


@POSIX
def test_check_writable(tmp_path, monkeypatch) -> None:
    for name in ("new.mp4", "NEW.MP4", "a/b/c/new.gif", "new.png", "frames", "frames/", "日落.mp4"):
        check_writable(f"{tmp_path}/{name}")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file.mp4").touch()
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    cases = {
        "file.mp4": "it exists already",
        "full": "it exists already",
        "folder.mp4": "it is a folder",
        "file.mp4/x.mp4": "Not a directory",
        "dangling/x.mp4": "No such file",
        "dangling": "it exists already",
        "x.avi": "unknown suffix .avi",
        "frames.v2/": "unknown suffix .v2",
        "x.mp4/": "unknown suffix .mp4",
        "x" * 252 + ".mp4": "File name too long",
        "nu\0ll.mp4": "null",
        ".": "it is no name",
    }
    monkeypatch.chdir(tmp_path)
    for name, reason in cases.items():
        with pytest.raises(RequestError) as caught:
            check_writable(name)
        assert reason in str(caught.value), name
        assert name.rstrip("/").replace("\0", r"\x00") in str(caught.value)
        assert "\n" not in str(caught.value)
    check_writable("file.mp4", if_exists="replace")
    check_writable("file.mp4", if_exists="number")
    with pytest.raises(RequestError, match="is a folder"):
        check_writable("folder.mp4", if_exists="replace")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file.mp4", "folder.mp4", "full"]


@POSIX
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    if os.geteuid() == 0:  # permission bits do not stop root; these folders do
        folder = Path("/proc/self")
    else:
        folder = tmp_path / "locked"
        folder.mkdir(0o500)
    for name in ("x.mp4", "new/x.gif", "frames"):
        with pytest.raises(RequestError, match="cannot write"):
            check_writable(folder / name)
    with pytest.raises(RunError, match="could not write"):
        save(folder / "x.mp4", clip(2))


def test_no_ffmpeg_is_told_before_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "missing"))
    with pytest.raises(RequestError, match="no ffmpeg"):
        check_writable(tmp_path / "x.mp4")
    check_writable(tmp_path / "x.gif")


# Disks that fill and encoders that die -----------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("head -c 9 >/dev/null; echo '[mp4 @ 0x12] it broke' >&2; echo 'Conversion failed!' >&2; exit 1", "it broke"),
        ("exit 3", "ffmpeg exited with 3"),
        ("kill -9 $$", "ended by a signal: Killed"),
        ("cat >/dev/null; echo late >&2; exit 1", "late"),
        ("cat >/dev/null; exit 0", "No such file or directory"),
        ("cat >/dev/null; for last; do :; done; echo short >$last; exit 0", "does not read back"),
        ("head -c 99999 /dev/zero | tr '\\0' 'x' | fold >&2; cat >/dev/null; echo at last >&2; exit 1", "at last"),
        ("cat >/dev/null; echo 'Error: No space left on device' >&2; echo 'so I stop' >&2; exit 1", "the disk is full"),
    ],
)
def test_an_ffmpeg_that_fails_is_one_clear_error(tmp_path, monkeypatch, script: str, message: str) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    with pytest.raises(RunError) as caught:
        save(tmp_path / "x.mp4", np.repeat(clip(17), 20, axis=0))
    assert message in str(caught.value)
    assert "x.mp4" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path) == ["ffmpeg"]


@OUTPUTS
def test_a_disk_that_fills(tmp_path, name: str) -> None:
    """Whole, or one clear error and nothing, at whatever byte the disk is full."""
    disk, frames = tmp_path / "disk", np.random.default_rng(0).integers(0, 256, (9, H, W, 3), np.uint8)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here; the test below limits a file's size instead")
    try:
        outcomes = []
        for kilobytes in (8, 60, 100, 140, 160, 180, 200, 300, 1000):
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)
            try:
                path = save(disk / name, frames, {"seed": 1})
            except RunError as error:
                outcomes.append(str(error))
                assert os.listdir(disk) == []
            else:
                assert read_record(path) == {"seed": 1}
                assert name == "x.png" or len(read_frames(path)[0]) == 9
                subprocess.run(["rm", "-r", path], check=True)
                outcomes.append("whole")
        assert outcomes == sorted(outcomes)  # "could not …" until there is room, "whole" from then on
        assert set(outcomes) == {f"could not write {disk / name}: the disk is full", "whole"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@OUTPUTS
@pytest.mark.parametrize("limit", [10, 5_000])
def test_a_file_that_may_not_grow(tmp_path, name: str, limit: int) -> None:
    resource = pytest.importorskip("resource")

    def forked() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = (
        "import sys, numpy as np; from wan22.video import open_output\n"
        "with open_output(sys.argv[1], width=192, height=192, fps=16, record={}) as output:\n"
        "    output.write(np.random.default_rng(0).integers(0, 256, (9, 192, 192, 3), np.uint8))"
    )
    command = [sys.executable, "-c", code, tmp_path / name]
    done = subprocess.run(command, preexec_fn=forked, capture_output=True, text=True)
    assert done.stderr.rstrip().endswith(f"DiskFull: could not write {tmp_path / name}: the disk is full")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_only_when_synced(tmp_path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("wan22.output.names.os.fsync", full)
    with pytest.raises(RunError, match="the disk is full"):
        save(tmp_path / "x.mp4", clip(2))
    assert os.listdir(tmp_path) == []


# Files from elsewhere ----------------------------------------------------------------------------------------------


def test_a_file_cut_short_is_told(tmp_path) -> None:
    whole = save(tmp_path / "x.mp4", clip(17)).read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.mp4").write_bytes(whole[:length])
        for read in (read_record, read_frames):
            with pytest.raises(RequestError, match=r"cut\.mp4"):
                read(tmp_path / "cut.mp4")


def test_what_is_no_video_is_one_line(tmp_path) -> None:
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n")
    (tmp_path / "bent.gif").write_bytes(b"GIF89a" + bytes(99))
    (tmp_path / "bent.mp4").write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x09mdat!")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "sheet.png", clip(2))
    for name in ("list.mp4", "bent.gif", "bent.mp4", "empty", "sheet.png", "missing.mp4"):
        with pytest.raises(RequestError, match=name) as caught:
            read_frames(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_gif_from_elsewhere_reads(tmp_path) -> None:
    images = [Image.fromarray(frame) for frame in clip(5)]
    images[0].save(tmp_path / "x.gif", save_all=True, append_images=images[1:], duration=100)
    frames, fps = read_frames(tmp_path / "x.gif")
    assert len(frames) == 5
    assert fps == pytest.approx(10)
    with pytest.raises(RequestError, match="no record"):
        read_record(tmp_path / "x.gif")


@POSIX
def test_a_signal_that_becomes_an_exit_leaves_nothing(tmp_path) -> None:
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))" + WRITE_FOREVER
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "x.mp4"], stdout=subprocess.PIPE) as process:
        for _ in range(5):
            assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert os.listdir(tmp_path) == []


# Encodings and sidecars --------------------------------------------------------------------------------------------


def test_crf_and_codec(tmp_path) -> None:
    frames = clip(9, 192, 128)
    sizes, quality = {}, {}
    for codec, name in (("libx264", b"avc1"), ("libx265", b"hvc1")):
        for crf in (10, 40):
            path = save(tmp_path / f"{codec}-{crf}.mp4", frames, NASTY, encoding=Encoding(crf, codec))
            assert read_record(path) == NASTY
            assert name in path.read_bytes()
            sizes[codec, crf] = path.stat().st_size
            quality[codec, crf] = psnr(read_frames(path)[0], frames)
        again = save(tmp_path / "again.mp4", frames, NASTY, encoding=Encoding(40, codec), if_exists="replace")
        assert again.read_bytes() == path.read_bytes()
        assert sizes[codec, 10] > sizes[codec, 40]
        assert quality[codec, 10] > quality[codec, 40]
    assert save(tmp_path / "plain.mp4", frames, NASTY).read_bytes() == (tmp_path / "libx264-10.mp4").read_bytes()
    # What a player needs, in the new codec too: the colours told, red is red.
    red = np.full((5, 64, 96, 3), (220, 40, 40), np.uint8)
    back = read_frames(save(tmp_path / "red.mp4", red, encoding=Encoding(10, "libx265")))[0]
    assert np.abs(back.astype(int) - red).max() <= 3


@pytest.mark.parametrize("wrong", [{"crf": -1}, {"crf": 52}, {"crf": 1.5}, {"crf": True}, {"codec": "libx266"}])
def test_encodings_that_are_none(wrong: dict) -> None:
    with pytest.raises(RequestError, match=r"--crf|--codec"):
        Encoding(**wrong)


@POSIX
def test_a_codec_that_this_ffmpeg_has_not(tmp_path, monkeypatch) -> None:
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho ' V....D libx264   H.264'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    check_writable(tmp_path / "x.mp4")
    check_writable(tmp_path / "x.gif", encoding=Encoding(codec="libx265"))
    with pytest.raises(RequestError, match="no such encoder"):
        check_writable(tmp_path / "x.mp4", encoding=Encoding(codec="libx265"))


@VIDEOS
def test_frames_one_by_one_are_the_same(tmp_path, name: str) -> None:
    path = save(tmp_path / name, np.repeat(clip(5), 2, axis=0))
    frames = list(iter_frames(path))
    assert (np.stack(frames) == read_frames(path)[0]).all()
    assert len(frames) == 10


@OUTPUTS
def test_sidecar(tmp_path, name: str) -> None:
    path = save(tmp_path / name, clip(3), NASTY)
    sidecar = write_sidecar(path, "error")
    assert sidecar == tmp_path / "x.json"
    assert sidecar.read_text(encoding="utf-8") == stored_text(path)
    assert read_record(sidecar) == NASTY
    assert sorted(os.listdir(tmp_path)) == sorted([name, "x.json"])
    assert write_sidecar(path, "error") == sidecar  # it says that already
    sidecar.write_text("{}")
    with pytest.raises(RunError, match="not overwritten"):
        write_sidecar(path, "error")
    assert write_sidecar(path, "number") == tmp_path / "x-2.json"
    assert sidecar.read_text() == "{}"
    assert write_sidecar(path, "replace") == sidecar
    assert read_record(sidecar) == NASTY
