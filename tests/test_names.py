"""Names from prompts, and moves that harm nothing."""

import errno
import os
import unicodedata

import pytest

from wan22.output import names
from wan22.output.names import default_output, move_to_free, next_free, safe_name

SAFE = [
    ("A beautiful sunset over the ocean", "A-beautiful-sunset-over-the-ocean"),
    ("海上美丽的日落，金色的光", "海上美丽的日落-金色的光"),
    ("  spaces  and\ttabs\nand lines\r\n", "spaces-and-tabs-and-lines"),
    ('<>:"/\\|?*', "video"),
    ("a/b\\c:d*e?f", "a-b-c-d-e-f"),
    ("", "video"),
    ("...", "video"),
    ("../../etc/passwd", "etc-passwd"),
    (".hidden", "hidden"),
    ("--output x", "output-x"),
    ("ends with dots... ", "ends-with-dots"),
    ("3.5 seconds", "3-5-seconds"),
    ("null\0byte\x1b[31m\x7f", "null-byte-31m"),
    ("turned \u202egpj.exe", "turned-gpj-exe"),
    ("half \ud800 pair", "half-pair"),
    ("cafe\u0301", "café"),
    ("emoji 🎬 film", "emoji-film"),
    ("snake_case", "snake_case"),
    ("CON", "CON_"),
    ("con", "con_"),
    ("nul.txt", "nul-txt"),
    ("Aux", "Aux_"),
    ("COM1", "COM1_"),
    ("lpt9", "lpt9_"),
    ("COM¹", "COM¹_"),
    ("CONIN$", "CONIN_"),
    ("com10", "com10"),
    ("console", "console"),
]


@pytest.mark.parametrize(("text", "name"), SAFE)
def test_safe_names(text: str, name: str) -> None:
    assert safe_name(text) == name


@pytest.mark.parametrize("length", [5, 6, 7, 8, 20, 80, 200])
@pytest.mark.parametrize("text", ["word " * 100, "日落" * 100, "x" * 999, "é" * 200, "🎬ü-" * 99, "a" + "\u0301" * 300])
def test_a_long_name_is_cut_to_bytes_and_stays_clean(text: str, length: int) -> None:
    name = safe_name(text, max_length=length)
    assert 0 < len(name.encode()) <= length
    assert name == name.strip("-. ")
    assert unicodedata.is_normalized("NFC", name)


def test_a_long_name_ends_at_a_word() -> None:
    assert safe_name("a small red circle slowly moving", max_length=20) == "a-small-red-circle"
    assert safe_name("a small red circle", max_length=11) == "a-small-red"
    assert safe_name("a " + "x" * 50, max_length=20) == "a-" + "x" * 18  # a word's end, but not near


def test_default_output(tmp_path) -> None:
    digest = "0123456789abcdef"
    assert default_output(tmp_path, "red: a circle!", digest) == tmp_path / "red-a-circle-01234567.mp4"
    longest = default_output(tmp_path, "长" * 9999, digest).name
    assert len(longest.encode()) < 100
    (tmp_path / longest).touch()


def test_next_free(tmp_path) -> None:
    path = tmp_path / "a.b.mp4"
    assert next_free(path) == path
    path.touch()
    assert next_free(path) == tmp_path / "a.b-2.mp4"
    (tmp_path / "a.b-2.mp4").symlink_to("nowhere")  # a link to nothing is something
    assert next_free(path) == tmp_path / "a.b-3.mp4"
    folder = tmp_path / "frames"
    folder.mkdir()
    assert next_free(folder) == tmp_path / "frames-2"
    longest = tmp_path / ("界" * 83 + ".mp4")  # 253 bytes
    longest.touch()
    free = next_free(longest)
    assert free.name.endswith("界-2.mp4")
    free.touch()  # not too long
    with pytest.raises(OSError, match="too long"):
        next_free(tmp_path / ("x" * 256))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_move_never_overwrites(tmp_path, monkeypatch, links: bool) -> None:
    if not links:  # as on FAT

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(names.os, "link", refuse)
    staged, target = tmp_path / "staged", tmp_path / "target"
    staged.write_text("new")
    target.write_text("old")
    assert not move_to_free(staged, target)
    assert (staged.read_text(), target.read_text()) == ("new", "old")
    target.unlink()
    assert move_to_free(staged, target)
    assert target.read_text() == "new"
    with pytest.raises(OSError):
        move_to_free(target, tmp_path / "no folder" / "x")


def test_a_moved_folder_replaces_only_an_empty_one(tmp_path) -> None:
    staged, target = tmp_path / "staged", tmp_path / "target"
    staged.mkdir()
    (staged / "new").touch()
    target.mkdir()
    (target / "old").touch()
    assert not move_to_free(staged, target)
    assert os.listdir(target) == ["old"]
    (target / "old").unlink()
    (tmp_path / "file").touch()
    assert not move_to_free(staged, tmp_path / "file")
    assert move_to_free(staged, target)
    assert os.listdir(target) == ["new"]
