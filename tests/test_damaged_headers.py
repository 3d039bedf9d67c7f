"""Headers, indexes and configs with wrong bytes in them, by the hundred: read, or refused in a line; never a crash."""

import collections
import random
import shutil

import checkpoints as made
import pytest
import torch
from safetensors.torch import save_file

from wan22.checkpoint import EXPERTS, INDEX, open_checkpoint, open_piece
from wan22.config import RequestError
from wan22.files.contents import describe
from wan22.files.layouts import EXPERT, find_tensors, publish
from wan22.lora import open_adapter

TIMES = 60  # a file; more by hand
LETTERS = b'0123456789[]{},"-eE.\\/ \x00\xff:ntf'
NUMBERS = (b"\xff" * 8, bytes(8), (1 << 62).to_bytes(8, "little"), (1 << 31).to_bytes(8, "little"))


@pytest.fixture(scope="module")
def experts():
    return {name: made.expert(seed) for seed, name in enumerate(made.EXPERTS)}


@pytest.fixture(scope="module")
def base(experts, tmp_path_factory):
    return made.published(tmp_path_factory.mktemp("base") / "weights", experts)


def damaged(content: bytes, within: int, chance: random.Random) -> bytes:
    """Some bytes of the first `within` flipped, replaced or, as a number, made absurd; or the file cut."""
    kind, result = chance.random(), bytearray(content)
    if kind < 0.15:
        return content[: chance.randrange(len(content))]
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(within)
        if kind < 0.5:
            result[at] ^= 1 << chance.randrange(8)
        elif kind < 0.8:
            result[at] = chance.choice(LETTERS)
        else:
            result[at : at + 8] = chance.choice(NUMBERS)
    return bytes(result)


def tell(*openings) -> collections.Counter[str]:
    """How each opening ended; anything but a RequestError is raised."""
    ends: collections.Counter[str] = collections.Counter()
    for opening, path in openings:
        try:
            opening(path)
            ends["read"] += 1
        except RequestError as error:
            ends["refused" if str(error).isprintable() else "refused in no line"] += 1
    return ends


@pytest.mark.parametrize("form", ["plain", "old", "new", "GGUF", "adapter"])
def test_headers(experts, tmp_path, form):
    path, table = tmp_path / "x.safetensors", experts[EXPERTS[0]]
    shapes = {name: tuple(tensor.shape) for name, tensor in table.items()}
    if form == "GGUF":
        made.gguf_file(path, table, "Q4_K")
        within = publish(find_tensors(path), EXPERT).source.start
    else:
        module = "diffusion_model.blocks.0.self_attn.q"
        pair = {f"{module}.lora_down.weight": torch.ones(4, 256), f"{module}.lora_up.weight": torch.ones(256, 4)}
        save_file({"plain": table, "adapter": pair}.get(form) or made.scaled_fp8(table, form)[0], path)
        within = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    content, chance, ends = path.read_bytes(), random.Random(form), collections.Counter()
    for _ in range(TIMES):
        path.write_bytes(damaged(content, within, chance))
        own = (lambda path: open_adapter(path, shapes)) if form == "adapter" else (
            lambda path: open_piece(EXPERTS[0], path, in_base=False))  # fmt: skip
        ends += tell((describe, path), (own, path))
    print(f"{form}: {dict(ends)}")
    assert ends.keys() <= {"read", "refused"}
    assert ends["refused"] > TIMES / 2


@pytest.mark.parametrize("name", [f"{EXPERTS[0]}/{INDEX}", f"{EXPERTS[0]}/config.json"])
def test_indexes_and_configs(base, tmp_path, name):
    folder = shutil.copytree(base, tmp_path / "weights")
    content, chance, ends = (folder / name).read_bytes(), random.Random(name), collections.Counter()
    for _ in range(TIMES):
        (folder / name).write_bytes(damaged(content, len(content), chance))
        ends += tell((describe, folder / EXPERTS[0]), (open_checkpoint, folder))
    print(f"{name}: {dict(ends)}")
    assert ends.keys() <= {"read", "refused"}
    assert ends["refused"] > TIMES / 2
