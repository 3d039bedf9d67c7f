"""Streams that are full or gone, folders and files that may not be read, a current folder that is gone: one line, the
right exit code, and no video lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from wan22.cli import explained, main
from wan22.config import DoesNotFit, RequestError
from wan22.many.gallery import write_gallery, write_sheet
from wan22.video import check_writable, open_output

PROGRAM = [sys.executable, "-m", "wan22"]
SETTINGS = ["generate", "--ckpt_dir", str(TINY), "--size", "32x32", "--frames", "1", "--steps", "1", "--prompt", "a",
            "--seed", "1", "--device", "cpu", "--shift", "3"]  # fmt: skip
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)  # pytest's is for nobody else
    return tmp_path


@pytest.fixture
def forbidden(monkeypatch):
    """A way to make a path forbidden; root may all, so that it is someone else's for the time of the test."""
    paths = []

    def forbid(path, mode=0):
        paths.append((path, path.stat().st_mode))
        path.chmod(mode)

    was = os.geteuid()
    yield forbid, lambda: was or os.seteuid(65534)
    os.seteuid(was)
    for path, mode in reversed(paths):
        path.chmod(mode)


def make_video(path):
    import numpy as np

    with open_output(path, width=16, height=16, fps=16, record={"request": {"prompt": "a"}}) as output:
        output.write(np.zeros((1, 16, 16, 3), np.uint8))
    return path


# --- streams ---------------------------------------------------------------------------------------------------------
@FULL
@pytest.mark.parametrize("words", [["--version"], ["plan", "--gpu-memory", "80GiB", "--host-memory", "200GiB"]])
def test_stdout_is_full(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: stdout: could not be written: the disk is full\n"


def test_nobody_reads_stdout():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*PROGRAM, "--version"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_come_in_the_order_in_which_they_are_said(unbuffered):
    said = "import sys; from wan22.streams import open_streams; open_streams(); "
    said += "print('first', file=sys.stderr); print('second', flush=True); print('third', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", said], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, check=True)  # fmt: skip
    assert done.stdout.splitlines() == ["first", "second", "third"]


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return {"stderr": writing}


def no_stderr():
    return {"preexec_fn": lambda: os.close(2)}


@pytest.mark.parametrize("of", [closed_pipe, no_stderr])
def test_nobody_reads_stderr(elsewhere, of):
    done = subprocess.run([*PROGRAM, *SETTINGS, "--output", "a.mp4"], stdout=subprocess.PIPE, text=True, **of())
    assert (done.returncode, done.stdout) == (0, "a.mp4\n")
    assert os.listdir(elsewhere) == ["a.mp4"]


# --- folders and files -----------------------------------------------------------------------------------------------
def test_the_current_folder_is_gone(elsewhere, capsys, monkeypatch):
    gone = elsewhere / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code = main([*SETTINGS, "--output", str(elsewhere / "a.mp4")])
    monkeypatch.chdir(elsewhere)
    assert code == 2
    assert "the current folder does not exist any more" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


def test_files_that_may_not_be_read(elsewhere, forbidden, capsys):
    forbid, as_nobody = forbidden
    folder, weights = elsewhere / "folder", shutil.copytree(TINY, elsewhere / "weights")
    folder.mkdir()
    video = make_video(elsewhere / "a.mp4")
    prompts = elsewhere / "p.txt"
    prompts.write_text("a ball")
    for path in (folder, weights / "google", video, prompts):
        forbid(path)
    main(["show", str(TINY)])  # imports come before: a Python in root's home cannot be read either
    main(["batch", "nowhere.txt", "--model", "demo"])
    main(["sheet", "nowhere.mp4"])
    capsys.readouterr()
    as_nobody()
    for words in (["show", "a.mp4"], ["show", "folder"], ["show", "folder/a.mp4"], ["status", "folder"],
                  ["gallery", "folder"], ["sheet", "a.mp4"], ["batch", "p.txt"], ["batch", "folder/p.txt"],
                  ["show", "weights"]):  # fmt: skip
        code = main([*words, *(["--model", "demo"] if words[0] == "batch" else [])])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), (words, err)
        assert "Permission denied" in err, words
        assert err.count("\n") == 1, err


def test_folders_that_may_not_be_written(elsewhere, forbidden):
    forbid, as_nobody = forbidden
    folder = elsewhere / "read-only"
    folder.mkdir()
    video = make_video(elsewhere / "a.mp4")
    write_sheet([video], elsewhere / "new" / "sheet.png")
    forbid(folder, 0o555)
    as_nobody()
    with pytest.raises(RequestError, match=r"index\.html: Permission denied"):
        write_gallery(Path("read-only"))  # from here: nobody may go through the folders above
    with pytest.raises(RequestError, match=r"sheet\.png: Permission denied"):
        write_sheet([Path("a.mp4")], Path("read-only/sheet.png"))


def test_errors_of_the_system_name_their_file():
    assert explained(PermissionError(13, "Permission denied", "a.mp4")) == ("a.mp4: Permission denied", [], 2)
    assert explained(OSError(5, "Input/output error", "a.mp4")) == ("a.mp4: Input/output error", [], 1)


@pytest.mark.parametrize("if_exists", ["error", "replace", "number"])
def test_no_device_is_replaced(elsewhere, if_exists):
    os.mkfifo(elsewhere / "a.mp4")
    for path in (os.devnull, elsewhere / "a.mp4"):
        with pytest.raises(RequestError, match="cannot write"):
            check_writable(path, if_exists=if_exists)


# --- convert ---------------------------------------------------------------------------------------------------------
def test_convert_names_its_source(elsewhere, capsys):
    (elsewhere / "t.txt").write_text("x")
    for source in ("t.txt", "nowhere"):
        assert main(["convert", source, "X"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {source}: ")


def test_convert_without_room_leaves_nothing(elsewhere, tiny, monkeypatch):
    from wan22 import convert

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_shard", full)
    with pytest.raises(DoesNotFit, match="X"):
        convert.convert(tiny, elsewhere / "X", progress=False)
    assert list(elsewhere.iterdir()) == []
