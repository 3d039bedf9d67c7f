"""The page over a folder, and the sheet: whole, safe from what prompts say, and shown by a browser."""

import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from wan22 import cli
from wan22.config import Request
from wan22.many import journal
from wan22.many.gallery import again, write_gallery
from wan22.video import open_output

HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=alert(1)> \"&amp;' --seed `id` 红球 '; rm ~"
VOID = {"meta", "img", "link", "br"}


def make(path, prompt, seed=3):
    record = {"request": Request(prompt, width=64, height=48, num_frames=5, seed=seed).to_dict(), "model": "x"}
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    frames[..., 0], frames[:, 10:30, 10:40, 1] = 200, np.arange(5)[:, None, None] * 50
    with open_output(path, width=64, height=48, fps=16, record=record) as output:
        output.write(frames)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "my videos & more"
    place.mkdir()
    make(place / "a #1 100%.mp4", HOSTILE)
    make(place / "b.gif", "a red ball")
    (place / "other.png").write_bytes(b"no picture")
    log = journal.Journal(place)
    log.add("item", name="c.mp4", where="line 3", request={"prompt": HOSTILE, "seed": 9, "num_steps": 3})
    log.add("failed", name="c.mp4", error="<b>2 workers died over it</b>")
    log.add("bad", where="line 4", error="--size 1: not a size")
    log.add("item", name="a #1 100%.mp4", where="line 1", request={})
    log.add("done", name="a #1 100%.mp4", seconds=125)
    return place


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts, self.attributes = [], [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.setdefault(tag, []).append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page(folder):
    page = Page(write_gallery(folder).read_text(encoding="utf-8"))
    assert page.open == []
    assert "script" not in page.tags
    assert page.attributes["video"] == [
        {"src": "./a%20%231%20100%25.mp4", "controls": None, "loop": None, "muted": None, "playsinline": None,
         "preload": "metadata", "width": "64", "height": "48"}]  # fmt: skip
    assert [one["src"] for one in page.attributes["img"]] == ["./b.gif"]
    assert HOSTILE in page.texts
    text = "\n".join(page.texts)
    assert "2 videos, 2 failed" in text
    assert "took 2 min" in text
    assert "line 4: --size 1: not a size" in text
    made_again = [shlex.split(one) for one in page.texts if one.startswith("wan22 ")]
    assert ["wan22", "generate", "--from", "b.gif", "--output", "again-b.gif"] in made_again
    # Only the page itself was added, and nothing in it points elsewhere.
    assert "http" not in text.replace("http-equiv", "")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["a #1 100%.mp4", "b.gif", "other.png", "batch.jsonl", "index.html"])  # fmt: skip


@pytest.mark.parametrize(
    "request_", [Request("x", seed=1), Request(HOSTILE, guidance_high=2.0, guidance_low=3.0, seed=5, num_steps=7),
                 Request("-x", width=64, height=48, solver="euler", shift=5.5, lead_steps=2, guidance_lead=1.0,
                         guidance_start=0.1, guidance_stop=0.75)]
)  # fmt: skip
def test_the_command_says_the_request(request_):
    from wan22.batch import changes
    from wan22.options import Base, make_request, read_request

    words = shlex.split(again(changes(request_)))
    command = cli.typer.main.get_command(cli.app).commands["generate"]
    flags = command.make_context("generate", words[2:]).params
    assert make_request(read_request(flags, Base({}, {}, {}))) == request_


def test_the_sheet(folder, tmp_path, capsys):
    files = [str(folder / name) for name in ("a #1 100%.mp4", "b.gif")]
    assert cli.main(["sheet", *files, "-o", str(tmp_path / "s.png")]) == 0
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width >= 3 * 240
        assert sheet.getpixel((40, 40))[0] > 100
    assert cli.main(["sheet", *files, "-o", str(tmp_path / "s.png")]) == 2
    assert cli.main(["sheet", str(tmp_path / "none.mp4"), "-o", str(tmp_path / "t.png")]) == 2
    assert cli.main(["gallery", str(tmp_path / "none")]) == 2


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_a_sheet_of_what_cannot_be_decoded(folder, tmp_path, capsys):
    """Its boxes are whole, its pictures are not."""
    file = folder / "a #1 100%.mp4"
    data = bytearray(file.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 1000] = b"\xff" * 1000
    file.write_bytes(data)
    output = tmp_path / f"{'n' * 251}.png"
    assert cli.main(["sheet", str(folder / "b.gif"), str(file), "--output", str(output)]) == 2
    err = capsys.readouterr().err
    assert err.splitlines() == [f"error: {file}: cannot be read as a video: not a frame of it can be decoded"]
    assert cli.main(["sheet", str(folder / "b.gif"), "--output", str(output)]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [output.name]


def test_a_journal_that_somebody_edited(folder):
    with open(folder / journal.NAME, "a") as file:
        file.write('{"event": "start", "name": "d.mp4"}\n{"event": "start", "name": "d.mp4", "time": "late"}\n'
                   '{"event": "done", "name": "e.mp4", "time": 1, "seconds": "many"}\n[]\n{"event": 5}\n')
    assert [item["name"] for item in journal.status(folder)["waiting"]] == ["d.mp4"]
    assert write_gallery(folder).is_file()


def test_a_browser_shows_it(folder, tmp_path):
    page = write_gallery(folder)
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=3000"]  # fmt: skip
    dumped = subprocess.run([*words, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert "<title>my videos &amp; more</title>" in dumped
    assert dumped.count("<article") == 4


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_a_phone_shows_it(folder, tmp_path):
    """At a phone's width: both videos are drawn, and nothing stands out at the side."""
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--hide-scrollbars", "--window-size=390,2400", f"--screenshot={tmp_path / 'page.png'}",
             "--virtual-time-budget=5000", write_gallery(folder).as_uri()]  # fmt: skip
    subprocess.run(words, capture_output=True, timeout=120, check=True)
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = np.abs(pixels - (200, 0, 0)).max(-1) < 30
    rows = red.mean(1) > 0.5
    runs = np.diff(np.concatenate([[0], rows.astype(int), [0]]))
    heights = np.flatnonzero(runs == -1) - np.flatnonzero(runs == 1)
    assert (heights > 20).sum() >= 2, heights
    assert np.ptp(pixels[:, -4:], axis=(0, 1)).max() == 0  # the margin is empty all the way down
