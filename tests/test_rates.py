"""The plan's seconds come from what was measured, and from nothing else."""

import contextlib
import io
import json

import pytest
from conftest import TINY

from wan22 import cli, plan
from wan22.machine import Room
from wan22.measuring import rates

GIB = 1 << 30
TINY_WORDS = ["--ckpt_dir", str(TINY), "--size", "64x48", "--frames", "5"]


@pytest.fixture
def card(monkeypatch):
    def have(name):
        monkeypatch.setattr(plan, "gpu_memory", lambda device: Room(80 * GIB, 79 * GIB, name))

    return have


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What bench prints on this machine, of the tiny checkpoint."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["bench", *TINY_WORDS, "--device", "cpu", "--quick", "--decode", "--text", "--json"]) == 0
    path = tmp_path_factory.mktemp("rates") / "bench.json"
    path.write_text(out.getvalue())
    return path


def run(capsys, *words):
    code = cli.main(["plan", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(("words", "told"), [
    ([], "time: about 12 min 54 s: 80 forwards of 9.61 s, decode 4.79 s"),
    (["--steps", "4", "--guidance", "1"], "time: about 43.2 s: 4 forwards of 9.61 s, decode 4.79 s"),
    (["--size", "480p"], "time: about 3 min 23 s: 80 forwards of 2.51 s, decode 2.08 s"),
    (["--precision", "fast"], "time: at most 9 min 35 s: 80 forwards of 7.16 s, decode 2.24 s"),
    (["--dtype", "fp8"], "time: about 11 min 33 s: 80 forwards of 8.6 s, decode 4.79 s"),
])  # fmt: skip
def test_a_card_that_was_measured(words, told, capsys, card, monkeypatch):
    card("NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("wan22.options.capability_of", lambda device: (9, 0))
    code, out, _ = run(capsys, "--host-memory", "200GiB", *words)
    lines = out.splitlines()
    assert (code, lines[-2]) == (0, told)
    assert lines[-1] == "  as measured on NVIDIA H100 80GB HBM3; reading weights comes besides"
    assert max(map(len, lines)) <= 80
    table = json.loads(run(capsys, "--host-memory", "200GiB", "--json", *words)[1])
    assert list(table["seconds"]) == ["denoise", "decode"]


@pytest.mark.parametrize(("name", "words"), [
    ("a card that nobody measured", []), ("NVIDIA H100 80GB HBM3", ["--gpus", "2"]),
    ("NVIDIA H100 80GB HBM3", ["--offload", "disk"]),
    ("NVIDIA H100 80GB HBM3", ["--ckpt_dir", str(TINY)]),
])  # fmt: skip
def test_what_was_not_measured_is_not_told(name, words, capsys, card):
    card(name)
    assert "time:" not in run(capsys, "--host-memory", "200GiB", *words)[1]
    assert json.loads(run(capsys, "--host-memory", "200GiB", "--json", *words)[1])["seconds"] is None


def test_rates_of_a_bench(capsys, measured):
    """The size that was measured comes out as it was; another in proportion, attention by the square."""
    rows = {(row["kind"], row.get("name")): row for row in map(json.loads, measured.read_text().splitlines())}
    forward = rows["forward", "wan22"]["seconds"]
    words = ["--gpu-memory", "0", "--rates", measured, "--steps", "2"]
    seconds = json.loads(run(capsys, *TINY_WORDS, *words, "--json")[1])["seconds"]
    assert seconds["denoise"] == pytest.approx(4 * forward)
    assert seconds["decode"] == pytest.approx(rows["phase", "decode"]["seconds"])
    assert seconds["text"] == rows["phase", "text"]["seconds"]
    parts = rows["parts", None]["seconds"]
    attention = parts["attention"] / sum(parts.values()) * forward
    twice = json.loads(run(capsys, *TINY_WORDS[:2], "--size", "128x48", "--frames", 5, *words, "--json")[1])["seconds"]
    assert twice["denoise"] == pytest.approx(4 * (4 * attention + 2 * (forward - attention)))
    assert "forwards of" in run(capsys, *TINY_WORDS, *words)[1]


def test_the_run_of_a_file_that_is_meant_is_taken(measured, tmp_path):
    rows = [json.loads(line) for line in measured.read_text().splitlines()]
    other = [dict(row) for row in rows]
    other[0] = other[0] | {"precision": other[0]["precision"] | {"weights": "bf16"}}
    both = tmp_path / "both.json"
    both.write_text("\n".join(json.dumps(row) for row in (*other, *rows)))
    assert [one.key[0] for one in rates.read(both)] == ["bf16", "float32"]


def broken(text, old, new):
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda text: "", "not what bench measured"),
    (lambda text: "forward 9.6 s\n", "not what bench measured"),
    (lambda text: "[1, 2]\n", "not what bench measured"),
    (lambda text: "[" * 100_000, "not what bench measured"),
    (lambda text: "\n".join(text.splitlines()[:3]), "not what bench measured"),
    (lambda text: broken(text, '"tokens": ', '"tokens": -'), "not what bench measured"),
    (lambda text: broken(text, '"seconds": ', '"seconds": NaN, "was": '), "not what bench measured"),
    (lambda text: broken(text, '"tokens": ', f'"tokens": 1{400 * "0"}'), "not what bench measured"),
    (lambda text: broken(text, '"tokens": ', '"tokens": 1e-300, "were": '), "not what bench measured"),
    (lambda text: broken(text, '"seconds": ', '"seconds": 1e308, "was": '), "not what bench measured"),
    (lambda text: broken(text, '"layers": ', '"layers": true, "were": '), "not what bench measured"),
    (lambda text: broken(text, '"parts", "seconds": {', '"parts", "seconds": {"x": -1e999, '), "not what bench"),
    (lambda text: broken(text, '"weights": "float32"', '"weights": "bf16"'), "none of float32, exact attention"),
    (lambda text: broken(text, '"dim": ', '"dim": 1'), "none of float32, exact attention"),
])  # fmt: skip
def test_a_file_that_holds_no_rates(spoil, said, capsys, measured, tmp_path):
    path = tmp_path / "spoilt.json"
    path.write_text(spoil(measured.read_text()))
    code, out, err = run(capsys, *TINY_WORDS, "--gpu-memory", "0", "--rates", path)
    assert (code, out) == (2, "")
    assert f"error: --rates {path}: {said}" in err
    assert err.splitlines()[1].startswith("hint: ")
    assert "wan22 bench --decode --text --json > FILE" in err


def test_no_file_of_rates(capsys, tmp_path, measured):
    for path in (tmp_path / "none.json", tmp_path):
        code, _, err = run(capsys, *TINY_WORDS, "--gpu-memory", "0", "--rates", path)
        assert (code, err.count("\n")) == (2, 1)
        assert str(path) in err
    for name, data in (("bytes.json", b"\xff\xfe\x00"), ("large.json", b"\n" * (rates.MOST_BYTES + 1))):
        path = tmp_path / name
        path.write_bytes(data)
        code, _, err = run(capsys, *TINY_WORDS, "--gpu-memory", "0", "--rates", path)
        assert (code, f"--rates {path}: not what bench measured" in err) == (2, True)
    code, _, err = run(capsys, "--gpus", "2", "--gpu-memory", "79GiB", "--rates", measured)
    assert (code, "--rates is of one GPU" in err) == (2, True)
