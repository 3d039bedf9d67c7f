"""Reading tensors out of files: in pieces of any size, by threads, strictly."""

import errno
import itertools
import os
import threading
from io import FileIO

import checkpoints as made
import pytest
import torch
from safetensors.torch import load_file, save_file

from wan22.config import RequestError, RunError
from wan22.files import reading
from wan22.files.layouts import EXPERT, find_tensors, publish
from wan22.files.tensor_files import Safetensors


def read_all(tensors, dtype):
    targets = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in tensors.shapes.items()}
    tensors.read(targets)
    return targets


@pytest.fixture(scope="module")
def expert():
    return made.expert(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "scaled rows", "one scale", "Q8_0", "Q4_K"])
def test_the_buffers_size_changes_no_bit(expert, tmp_path, monkeypatch, form, dtype):
    """A tensor that fits no buffer is cut at whole rows and blocks; what it becomes is what the libraries say."""
    path, meant = tmp_path / "expert", expert
    if form.startswith("Q"):
        meant = made.gguf_file(path, expert, form)
    elif form == "plain":
        save_file(expert, path)
    else:
        stored, _, meant = made.scaled_fp8(expert, "new", rows=form == "scaled rows")
        save_file(stored, path)
    whole = read_all(publish(find_tensors(path), EXPERT), dtype)
    monkeypatch.setattr(reading, "BUFFER_BYTES", 3000)
    monkeypatch.setattr(reading, "DECODED_ELEMENTS", 600)
    pieces = read_all(publish(find_tensors(path), EXPERT), dtype)
    for name, tensor in meant.items():
        assert torch.equal(whole[name], tensor.to(dtype)), name
        assert torch.equal(pieces[name], whole[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "scaled rows", "one scale", "Q8_0"])
def test_a_gpu_gets_the_same_bits(expert, tmp_path, monkeypatch, form, dtype):
    """Through pinned buffers that are used again many times, on streams that wait for the targets' memory."""
    path = tmp_path / "expert"
    if form == "plain":
        save_file(expert, path)
    elif form == "Q8_0":
        made.gguf_file(path, expert, form)
    else:
        save_file(made.scaled_fp8(expert, "new", rows=form == "scaled rows")[0], path)
    monkeypatch.setattr(reading, "BUFFER_BYTES", 30_000)
    monkeypatch.setattr(reading, "DECODED_ELEMENTS", 6_000)
    source = publish(find_tensors(path), EXPERT)
    meant = read_all(source, dtype)
    device, held = torch.device("cuda"), []
    for _ in range(8):
        targets = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in source.shapes.items()}
        torch.cuda._sleep(10_000_000)  # work that still uses the targets' memory
        for target in targets.values():
            target.view(torch.uint8).fill_(255)
        source.read(targets)
        assert all(torch.equal(targets[name].cpu(), tensor) for name, tensor in meant.items())
        held.append(torch.cuda.memory_reserved())
    print(f"reserved: {held[2]:,} bytes, in the end {held[-1]:,}")
    assert held[-1] - held[2] <= 4 << 20  # which thread takes a segment of 2 MiB first is chance; five would be a leak


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e5m2, torch.int64, torch.bool])
def test_every_dtype(tmp_path, dtype):
    table = {"a": torch.arange(-8, 8).view(2, 8), "b": torch.tensor(1), "c": torch.zeros(0, 3)}
    table = {name: tensor.to(dtype) for name, tensor in table.items()}
    save_file(table, tmp_path / "x")
    file = Safetensors(tmp_path / "x")
    for wanted in (dtype, torch.float32):
        targets = {name: torch.empty(tensor.shape, dtype=wanted) for name, tensor in table.items()}
        file.read(targets)
        assert all(torch.equal(targets[name].float(), tensor.float()) for name, tensor in table.items())


@pytest.mark.parametrize("mode", [True, False])
def test_whatever_mode_the_caller_is_in(expert, tmp_path, mode):
    """A thread has a mode of its own, and tensors made in inference mode cannot be changed outside."""
    save_file(expert, tmp_path / "x")
    expected = read_all(Safetensors(tmp_path / "x"), torch.float32)
    with torch.inference_mode(mode):
        read = read_all(Safetensors(tmp_path / "x"), torch.float32)
    assert all(tensor.is_inference() == mode and torch.equal(tensor, expected[name]) for name, tensor in read.items())


def test_a_file_that_ends_while_it_is_read(expert, tmp_path):
    """One line, and soon: what is left of the others is not read first."""
    save_file(expert, tmp_path / "x")
    file = Safetensors(tmp_path / "x")
    os.truncate(tmp_path / "x", 100_000)
    with pytest.raises(RequestError, match="ended while it was read"):
        read_all(file, torch.bfloat16)


def test_a_disk_that_fails(expert, tmp_path, monkeypatch):
    class Failing(FileIO):
        def readinto(self, buffer):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    save_file(expert, tmp_path / "x")
    monkeypatch.setattr(reading, "FileIO", Failing)
    with pytest.raises(RunError, match=r"/x: cannot be read: Input/output error"):
        read_all(Safetensors(tmp_path / "x"), torch.bfloat16)


def test_pieces_are_read_in_order_and_once(expert, tmp_path, monkeypatch):
    save_file(expert, tmp_path / "x")
    spans, fill = [], reading._Lane._fill
    monkeypatch.setattr(reading, "BUFFER_BYTES", 100_000)
    monkeypatch.setattr(reading, "READERS", 1)
    monkeypatch.setattr(reading._Lane, "_fill", lambda self, offset, array: (
        spans.append((offset, offset + len(array))), fill(self, offset, array)))  # fmt: skip
    read = read_all(Safetensors(tmp_path / "x"), torch.bfloat16)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] == (tmp_path / "x").stat().st_size
    assert all(torch.equal(read[name], tensor.bfloat16()) for name, tensor in load_file(tmp_path / "x").items())


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked")
def test_each_piece_is_asked_for_ahead_and_nothing_else(expert, tmp_path, monkeypatch):
    """All that is wanted but for the first pieces, once, in order; not what lies between."""
    save_file(expert, tmp_path / "x")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *words: asked.append(words))
    monkeypatch.setattr(reading, "BUFFER_BYTES", 100_000)
    monkeypatch.setattr(reading, "READERS", 1)
    file = Safetensors(tmp_path / "x")
    wanted = [name for name in file.shapes if name.endswith("weight")]
    file.read({name: torch.empty(file.shapes[name]) for name in wanted})
    entries = sorted((file.entries[name] for name in wanted), key=lambda entry: entry.offset)
    pieces = [piece.span for piece in reading._pieces(reading.Job(e, torch.empty(e.shape)) for e in entries)]
    assert len(pieces) > 2 * reading.AHEAD
    assert asked == [(*span, os.POSIX_FADV_WILLNEED) for span in pieces[reading.AHEAD :]]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked")
def test_warming(expert, tmp_path, monkeypatch):
    save_file(expert, tmp_path / "x")
    asked, stop = [], threading.Event()
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *words: asked.append(words))
    size = (tmp_path / "x").stat().st_size
    assert size > 2 * reading.ASKED_BYTES
    Safetensors(tmp_path / "x").warm(stop)
    assert sum(length for _, length, _ in asked) == size
    assert max(length for _, length, _ in asked) <= 1 << 20  # Linux would cut it
    assert {advice for *_, advice in asked} == {os.POSIX_FADV_WILLNEED}
    stop.set()
    asked.clear()
    Safetensors(tmp_path / "x").warm(stop)
    assert asked == []
