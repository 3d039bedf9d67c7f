"""Records that must survive any file, and files that must not hurt a reader. Writing them is test_video.py's."""

import json
import struct
import subprocess
import sys
import time

import pytest

from wan22.config import RequestError
from wan22.output.record import read_record, stored_text, to_text

GOOD = to_text({"seed": 1}, 16).encode()
HEADER = b"\0\0\0\x10ftypisom\0\0\0\0"


def box(kind: bytes, *content: bytes) -> bytes:
    inside = b"".join(content)
    return struct.pack(">I4s", 8 + len(inside), kind) + inside


def mp4(comment: bytes) -> bytes:
    data = box(b"\xa9cmt", box(b"data", struct.pack(">II", 1, 0), comment))
    return HEADER + box(b"moov", box(b"udta", box(b"meta", bytes(4), box(b"ilst", data))))


def gif(comment: bytes) -> bytes:
    blocks = b"".join(bytes([len(comment[i : i + 255])]) + comment[i : i + 255] for i in range(0, len(comment), 255))
    return b"GIF89a\1\0\1\0\x80\0\0" + bytes(6) + b"!\xfe" + blocks + b"\0;"


def png(comment: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", len(content), kind) + content + bytes(4)

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"iTXt", b"Comment" + bytes(5) + comment)


KINDS = pytest.mark.parametrize("make", [mp4, gif, png])


@KINDS
def test_the_smallest_files_read(tmp_path, make) -> None:
    path = tmp_path / "any name at all"
    path.write_bytes(make(GOOD))
    assert read_record(path) == {"seed": 1}


@KINDS
def test_every_cut_and_every_bent_byte_is_told_or_harmless(tmp_path, make) -> None:
    whole, path, said = make(GOOD), tmp_path / "x", set()
    broken = [whole[:length] for length in range(len(whole))]
    broken += [whole[:i] + bytes([value]) + whole[i + 1 :] for i in range(len(whole)) for value in (0, 1, 127, 255)]
    for data in broken:
        path.write_bytes(data)
        try:
            read_record(path)
        except RequestError as error:
            said.add(str(error))
    assert len(said) > 2
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in said)


@KINDS
@pytest.mark.parametrize(
    "comment",
    [
        b"",
        b"made with another tool",
        b"\xff\xfe not text",
        b"[]",
        b"{}",
        b'{"wan22": 3, "fps": 16}',
        b'{"wan22": {}}',
        b'{"wan22": {}, "fps": "16"}',
        b'{"prompt": {"3": {"class_type": "KSampler"}}}',  # other tools put JSON there, too
        b"[" * 200_000,
        b'{"wan22":' * 100_000,
        b'{"wan22": {}, "fps": ' + b"9" * 5000 + b"}",
    ],
    ids=range(12),
)
def test_what_is_not_ours_is_one_line(tmp_path, make, comment: bytes) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(make(comment))
    with pytest.raises(RequestError) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_absurd_files_are_refused_quickly(tmp_path) -> None:
    cases = {
        "large": HEADER + struct.pack(">I4sQ", 1, b"mdat", 2**63),
        "small": HEADER + struct.pack(">I4s", 4, b"mdat"),
        "many": HEADER + box(b"free") * 2_000_000,
        "deep": HEADER + struct.pack(">I4s", 2**31, b"moov"),
        "blocks": b"GIF89a\1\0\1\0\0\0\0" + b"!\xf9\0" * 2_000_000,
        "endless": b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe" + b"\xff" * 20_000_000,
        "chunks": b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sI", 0, b"tEXt", 0) * 2_000_000,
        "long": b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**31 - 1, b"iTXt"),
        "empty": b"",
        "text": b"just text",
    }
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        start = time.perf_counter()
        with pytest.raises(RequestError, match=name):
            read_record(path)
        assert time.perf_counter() - start < 1, name


def test_a_huge_comment_is_not_read(tmp_path) -> None:
    path = tmp_path / "huge.mp4"
    with open(path, "wb") as file:  # sparse: 3 GB that take no room
        file.write(HEADER)
        sizes = [size + (3 << 30) for size in (48, 40, 32, 20, 12)]
        kinds = [(b"moov", b""), (b"udta", b""), (b"meta", bytes(4)), (b"ilst", b""), (b"\xa9cmt", b"")]
        for (kind, rest), size in zip(kinds, sizes, strict=True):
            file.write(struct.pack(">I4s", size, kind) + rest)
        file.write(struct.pack(">I4s", 3 << 30, b"data"))
        file.truncate(16 + sizes[0])
    with pytest.raises(RequestError, match="damaged"):
        read_record(path)


def test_missing_and_folder(tmp_path) -> None:
    with pytest.raises(RequestError, match=r"nothing\.mp4: cannot be read: No such file"):
        read_record(tmp_path / "nothing.mp4")
    with pytest.raises(RequestError, match="no record of wan22"):
        read_record(tmp_path)
    (tmp_path / "record.json").write_bytes(GOOD)
    assert read_record(tmp_path) == {"seed": 1}
    (tmp_path / "record.json").write_bytes(b"\xff")
    with pytest.raises(RequestError, match="damaged"):
        read_record(tmp_path)


def test_the_text_is_one_line_of_json_in_utf8() -> None:
    record = {"prompt": 'a "b"\n\\ \0 日落 \ud800 \u2028 🎬', "seed": 2**63 - 1, "shift": 0.1 + 0.2, "none": None}
    text = to_text(record, 16)
    assert json.loads(text) == {"wan22": record, "fps": 16}
    assert "日落" in text
    assert "\n" not in text
    text.encode()
    with pytest.raises(ValueError, match="JSON"):
        to_text({"shift": float("nan")}, 16)


def test_reading_imports_nothing_heavy(tmp_path) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(mp4(GOOD))
    code = (
        "import sys; from wan22.video import read_record; read_record(sys.argv[1]);"
        "assert not {'numpy', 'torch', 'PIL', 'imageio_ffmpeg'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert stored_text(path) == GOOD.decode()
