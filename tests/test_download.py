"""Downloads against a Hub on the loopback interface that plays every fault a real one has; nothing else is asked."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
from conftest import ROOT
from hub import API, COMMIT, GOOD_TOKEN, FakeHub, Fault
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from wan22.config import DoesNotFit, RequestError, RunError
from wan22.download import SHORT_NAMES, check, download
from wan22.network import verify
from wan22.network.hub import Patience
from wan22.network.verify import KnownFile

QUICK = Patience(tries=3, wait_s=0.01, stall_s=0.5)
REPO = "owner/name"
SHARD = "high_noise_model/diffusion_pytorch_model-00001-of-00001.safetensors"
INDEX = "high_noise_model/diffusion_pytorch_model.safetensors.index.json"
SIZE = 1_000_000


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


FILES = {
    SHARD: noise(SIZE),
    INDEX: json.dumps({"weight_map": {"a": SHARD.rpartition("/")[2]}}).encode(),
    "high_noise_model/config.json": b'{"dim": 16}',
    "low_noise_model/config.json": b'{"dim": 16}',  # the same content, as published: one blob in the cache
    "low_noise_model/model.safetensors": noise(SIZE // 2, 1),
    "google/umt5-xxl/spiece.model": noise(30_000, 2),
    "Wan2.1_VAE.pth": noise(50_000, 3),
}
UNNEEDED = {"README.md": b"# hello", "assets/logo.png": noise(5000), ".gitattributes": b"*.pth lfs", "LICENSE": b"MIT"}


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """None of the machine's own Hub settings: no token, no cache, online, plain HTTP."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub():
    with FakeHub() as server:
        server.add(REPO, FILES | UNNEEDED)
        yield server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights"


@pytest.fixture
def published(monkeypatch, hub):
    """FILES as the published repository, and as its manifest."""
    files = [
        KnownFile(path, len(content), verify.hashlib.sha256(content).hexdigest()) for path, content in FILES.items()
    ]
    monkeypatch.setattr(verify, "published_files", lambda: list(files))
    hub.add(verify.PUBLISHED, FILES | UNNEEDED)
    return files


@pytest.fixture
def row(request, capfd):
    """Prints a row of docs/reliability.md's table, where pytest is run with -s."""

    def tell(name, played, ended, served, kept, again):
        if request.config.getoption("capture") == "no":
            with capfd.disabled():
                lost = kept + again - ALL  # fetched again although it was on disk
                print(f"\n| {name} | {played} | {ended} | {served:,} | {kept:,} | {again:,} | {lost} |", end=" ")

    return tell


def fetch(hub, folder, repo=REPO, **options):
    return download(repo, ckpt_dir=folder, endpoint=hub.url, patience=QUICK, **options)


def assert_whole(folder, files=None):
    for path, content in (files or FILES).items():
        assert (folder / path).read_bytes() == content, path


def on_disk(folder):
    """Bytes of content that a download left, finished or not."""
    parts = folder / ".wan22" / "parts"
    finished = sum((folder / path).stat().st_size for path in FILES if (folder / path).is_file())
    return finished + sum(path.stat().st_size for path in parts.rglob("*") if path.is_file())


# --- what is fetched ---


def test_fetches_what_inference_needs_and_nothing_twice(hub, folder, capfd):
    result = fetch(hub, folder)
    assert_whole(folder)
    assert result.commit == COMMIT
    assert {file.path for file in result.fetched} == set(FILES)
    assert not [path for path in UNNEEDED if (folder / path).exists()]
    assert dict(hub.bytes_served) == {path: len(content) for path, content in FILES.items()}
    out, err = capfd.readouterr()
    assert (out, "100%" in err, "B/s" in err) == ("", True, True)

    hub.bytes_served.clear()
    again = fetch(hub, folder)
    assert (again.fetched, again.bytes_needed, dict(hub.bytes_served)) == ((), 0, {})


def test_published_is_checked_against_the_manifest(hub, folder, published):
    fetch(hub, folder, repo="Wan2.2-T2V-A14B")
    assert_whole(folder)
    hub.log.clear()
    assert fetch(hub, folder, repo=verify.PUBLISHED).fetched == ()
    assert hub.log == [], "a whole folder asks nobody"

    hub.repos[verify.PUBLISHED].files = {**FILES, SHARD: noise(SIZE, 9)}
    (folder / SHARD).unlink()
    with pytest.raises(RunError, match="not the published file"):
        fetch(hub, folder, repo=verify.PUBLISHED)
    assert "00001-of-00001" not in str(hub.log), "not a byte of 10 GB was fetched to find out"


def test_a_pair_by_its_short_name(hub, folder):
    pair = SHORT_NAMES["lightning"]
    files = {name: noise(2000, number) for number, name in enumerate(pair.files)}
    hub.add(pair.repo_id, {**files, "Wan2.2-I2V-A14B-4steps/high_noise_model.safetensors": noise(2000)})
    result = fetch(hub, folder, repo="Lightning")
    assert [file.path for file in result.files] == list(pair.files)
    assert_whole(folder, files)
    for known in SHORT_NAMES.values():
        assert known.files is None or ["high" in name for name in known.files] == [True, False]


def test_only(hub, folder):
    fetch(hub, folder, only="high_noise_model")
    assert {path.relative_to(folder).parts[0] for path in folder.iterdir()} == {".wan22", "high_noise_model"}
    assert check(folder).whole, "what was not asked for is not missed"
    fetch(hub, folder, only=["*.pth", "README.md"])
    assert (folder / "Wan2.1_VAE.pth").exists()
    assert (folder / "README.md").exists()
    with pytest.raises(RequestError, match="--only middle: no such file") as error:
        fetch(hub, folder, only="middle")
    assert "high_noise_model" in error.value.hint


def test_dry_run_writes_nothing(hub, folder):
    plan = fetch(hub, folder, dry_run=True)
    assert not folder.exists()
    assert sum(hub.bytes_served.values()) == 0
    assert plan.bytes_needed == plan.bytes_total == sum(map(len, FILES.values()))
    assert plan.fits
    assert plan.lines()[-1].startswith("1.6 MB to fetch")
    assert {entry["path"] for entry in json.loads(json.dumps(plan.to_dict()))["files"] if entry["fetch"]} == set(FILES)

    folder.mkdir()
    (folder / "Wan2.1_VAE.pth").write_bytes(FILES["Wan2.1_VAE.pth"])
    assert fetch(hub, folder, dry_run=True).bytes_needed == plan.bytes_needed - 50_000


@pytest.mark.parametrize("repo", ["nothing", "owner/name@../x", "a/b/c", "owner/na me", ""])
def test_a_name_that_cannot_be(hub, folder, repo):
    with pytest.raises(RequestError, match="OWNER/NAME") as error:
        fetch(hub, folder, repo=repo)
    assert "lightning" in error.value.hint


# --- faults ---

CUT = SIZE * 6 // 10
ALL = sum(map(len, FILES.values()))
WHOLE, RUN, REQUEST = None, RunError, RequestError


def status(number, **headers):
    return Fault("status", status=number, headers={key.replace("_", "-"): value for key, value in headers.items()})


FAULTS = {  # name: the file (API: the listing), what is played in turn, how it ends, what is said
    "dropped connection": (SHARD, [Fault("drop", at=CUT)], WHOLE, "connection was dropped"),
    "dropped 8 times, with progress each": (SHARD, [Fault("drop", at=70_000)] * 8, WHOLE, "connection was dropped"),
    "dropped for ever": (SHARD, [Fault("drop")] * 9, RUN, "dropped, 3 times in a row"),
    "stall": (SHARD, [Fault("stall", at=CUT)], WHOLE, "stalled"),
    "stall for ever": (SHARD, [Fault("stall")] * 9, RUN, "stalled, 3 times in a row"),
    "stall of the listing, for ever": (API, [Fault("stall")] * 9, RUN, "listing owner/name@main: .* stalled"),
    "500 twice": (SHARD, [status(500)] * 2, WHOLE, "HTTP 500"),
    "500 for ever": (SHARD, [status(500)] * 9, RUN, f"{SHARD}: .* HTTP 500, 3 times in a row"),
    "502 of the listing, twice": (API, [status(502)] * 2, WHOLE, "HTTP 502"),
    "503 of the listing, for ever": (API, [status(503)] * 9, RUN, "listing owner/name@main: .* HTTP 503"),
    "429, Retry-After: 1": (SHARD, [status(429, Retry_After="1")], WHOLE, "HTTP 429; trying again in 1 s"),
    "429 for ever": (SHARD, [status(429)] * 9, RUN, "HTTP 429, 3 times in a row"),
    "429, Retry-After: 3600": (API, [status(429, Retry_After="3600")], RUN, "HTTP 429"),
    "429, RateLimit: t=0": (API, [status(429, RateLimit='"api";r=0;t=0')], WHOLE, "HTTP 429; trying again in 1 s"),
    "a page instead of the listing": (API, [Fault("page")] * 9, RUN, "listing .* its answer is not a Hub's"),
    "403": (SHARD, [status(403)], REQUEST, "refuses access"),
    "wrong bytes once": (SHARD, [Fault("flip", at=CUT)], WHOLE, "came damaged; fetching it again"),
    "wrong bytes of a small file": (INDEX, [Fault("flip", at=3)], WHOLE, "came damaged; fetching it again"),
    "wrong bytes twice": (SHARD, [Fault("flip", at=CUT)] * 2, RUN, f"{SHARD}: came damaged twice"),
    "truncated answer": (SHARD, [Fault("short", at=CUT)], WHOLE, "closed before the end"),
    "truncated answer for ever": (SHARD, [Fault("short", at=CUT)] * 9, RUN, "less of the file than it lists"),
    "drop, then the range ignored": (SHARD, [Fault("drop", at=CUT), Fault("no_range")], WHOLE, "dropped"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(hub, folder, name, capfd, row):
    """Each fault ends with every byte or with one line that names it; going on fetches exactly what is missing."""
    path, faults, end, said = FAULTS[name]
    for fault in faults:
        hub.play(path, fault)
    start = time.perf_counter()
    if end is WHOLE:
        fetch(hub, folder)
        text = capfd.readouterr().err
    else:
        with pytest.raises(end) as error:
            fetch(hub, folder)
        assert error.value.hint
        text = str(error.value)
        assert "\n" not in text
    assert re.search(said, text), text
    assert "in 1 s" not in said or time.perf_counter() - start >= 1

    hub.forget_faults()
    hub.wait_until_idle()
    played, served, kept = sum(hub.played.values()), sum(hub.bytes_served.values()), on_disk(folder)
    fetch(hub, folder)
    assert_whole(folder)
    again = sum(hub.bytes_served.values()) - served
    assert again == ALL - kept, "what is on disk is not fetched again"
    row(name, played, "whole" if end is WHOLE else f"exit {end.exit_code}", served, kept, again)


@pytest.mark.parametrize(
    ("repo", "token", "said", "hint"),
    [
        ("owner/nothing", None, "owner/nothing does not exist on .*, or is private .401", "hf auth login"),
        ("owner/nothing", GOOD_TOKEN, "owner/nothing does not exist on .* .404", "check the name"),
        ("owner/name@v9", None, "owner/name has no revision 'v9'", None),
        ("owner/gated", None, "owner/gated is gated: .*401", "hf auth login` or set HF_TOKEN"),
        ("owner/gated", "hf_other", "owner/gated is gated: .*403", "accept its terms at .*/owner/gated"),
    ],
)
def test_what_the_hub_refuses(hub, folder, monkeypatch, repo, token, said, hint):
    hub.add("owner/gated", FILES, gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RequestError, match=said) as error:
        fetch(hub, folder, repo=repo)
    assert error.value.exit_code == 2
    assert hint is None or re.search(hint, error.value.hint)
    assert not folder.exists()


def test_a_gated_repository_with_its_token(hub, folder, monkeypatch):
    hub.add("owner/gated", FILES, gated=True)
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    fetch(hub, folder, repo="owner/gated")  # the server fails if the token follows the redirect to the CDN
    assert_whole(folder)


def test_no_server(folder):
    with FakeHub() as gone:
        pass
    with pytest.raises(RunError, match=r"http://127.0.0.1.* cannot be reached .*, 3 times in a row") as error:
        fetch(gone, folder)
    assert "HF_ENDPOINT" in error.value.hint


def test_one_damaged_file_does_not_keep_the_others(hub, folder):
    hub.play("Wan2.1_VAE.pth", Fault("flip", at=5), times=2)
    with pytest.raises(RunError, match=r"Wan2.1_VAE.pth: came damaged twice"):
        fetch(hub, folder, workers=1)
    assert_whole(folder, {path: content for path, content in FILES.items() if path != "Wan2.1_VAE.pth"})


@pytest.mark.parametrize(
    "path", ["../outside.json", "a/../../outside.json", "/etc/outside.json", "C:/outside.json", "a\\b.json"]
)
def test_a_listing_that_names_a_path_outside(hub, folder, tmp_path, path):
    hub.repos[REPO].listed_as = {"high_noise_model/config.json": path}
    with pytest.raises(RequestError, match="outside its folder: refused"):
        fetch(hub, folder)
    assert not folder.exists()
    assert list(tmp_path.rglob("outside*")) == []


@pytest.mark.parametrize("name", ["../../../outside", "main", "0123"])
def test_a_commit_or_hash_that_is_none(hub, name, monkeypatch):
    """Both become names of files in the cache: a server must not choose where."""
    hub.repos[REPO].commit = name
    with pytest.raises(RunError, match="is it a Hub"):
        fetch(hub, None)
    hub.repos[REPO].commit = COMMIT
    monkeypatch.setattr("hub.git_blob", lambda content: name)
    with pytest.raises(RunError, match="is it a Hub"):
        fetch(hub, None)


def test_an_index_that_names_a_path_outside(hub, folder):
    hub.repos[REPO].files = {**FILES, INDEX: b'{"weight_map": {"a": "../../../etc/passwd"}}'}
    hub.pace = 0.01
    with pytest.raises(RequestError, match=rf"{INDEX}: names '../../../etc/passwd', a path outside its folder"):
        fetch(hub, folder, workers=1)
    assert not (folder / INDEX).exists()
    assert hub.bytes_served[SHARD] < SIZE, "the index is looked at before the weights come"


# --- killed, out of disk, not allowed, two at once ---


def command(hub, folder, *flags, **options):
    """The script that needs nothing but huggingface_hub, as a process of its own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    words = [sys.executable, ROOT / "download_T2V_A14B_weights.py", REPO, "--ckpt_dir", folder, *flags]
    return subprocess.Popen(list(map(str, words)), env=env, stdout=-1, stderr=-1, text=True, **options)


def test_killed_at_any_byte_and_going_on(hub, folder, row):
    """SIGKILL four times, then to the end: every run asks for exactly the bytes that were not on disk when it began."""
    draw = random.Random(5)
    for _ in range(4):
        hub.pace = 0.03  # seconds every 64 kB
        until = on_disk(folder) + draw.randrange(50_000, 300_000)
        begun = partial_sizes(folder)
        hub.ranges.clear()
        process = command(hub, folder)
        while on_disk(folder) < until:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert all(first[0] == begun.get(path, 0) for path, first in hub.ranges.items() if path != API)
    hub.wait_until_idle()

    kept, finished, begun = on_disk(folder), {path for path in FILES if (folder / path).exists()}, partial_sizes(folder)
    assert 0 < kept < ALL
    served, hub.pace = sum(hub.bytes_served.values()), 0.0
    hub.ranges.clear()
    process = command(hub, folder)
    out, err = process.communicate()
    assert (process.returncode, out) == (0, f"{folder}\n"), err
    assert_whole(folder)
    assert all(first == [begun.get(path, 0)] for path, first in hub.ranges.items() if path != API)
    assert not finished & set(hub.ranges)
    again = sum(hub.bytes_served.values()) - served
    assert again == ALL - kept
    row("SIGKILL at a random byte", 4, "killed", served, kept, again)


def partial_sizes(folder):
    """path → bytes of its partial file."""
    parts = folder / ".wan22" / "parts"
    found = {path: list((parts / path).parent.glob(f"{Path(path).name}.*")) for path in FILES}
    return {path: part[0].stat().st_size for path, part in found.items() if part and part[0].stat().st_size}


def test_interrupted(hub, folder):
    hub.pace = 0.03
    process = command(hub, folder)
    while not on_disk(folder):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: run the same command again and it goes on from here"
    hub.wait_until_idle()
    kept, served = on_disk(folder), sum(hub.bytes_served.values())
    fetch(hub, folder)
    assert sum(hub.bytes_served.values()) - served == ALL - kept


def test_disk_checked_first(hub, folder, monkeypatch):
    room = types.SimpleNamespace(free=ALL - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(
        DoesNotFit, match=rf"needs 1.6 MB more \({ALL} bytes\), 1.6 MB are free \({ALL - 1} bytes\)"
    ) as error:
        fetch(hub, folder)
    assert error.value.exit_code == 3
    assert not folder.exists()
    assert sum(hub.bytes_served.values()) == 0
    assert not fetch(hub, folder, dry_run=True).fits

    room.free = ALL
    hub.play(SHARD, Fault("drop", at=CUT))
    hub.play(SHARD, Fault("drop"), times=2)
    with pytest.raises(RunError):
        fetch(hub, folder, workers=1)
    hub.forget_faults()
    room.free = ALL - on_disk(folder)  # what is there already is not asked for again, and needs no room
    fetch(hub, folder)
    assert_whole(folder)


def test_disk_that_fills_up_at_60_percent(hub, folder, row):
    """RLIMIT_FSIZE stands in for the disk: a write beyond it fails half-way, as on a full one."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (CUT, CUT))  # noqa: E731
    process = command(hub, folder, preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 3, err
    last = err.strip().splitlines()[-2:]
    assert re.fullmatch(rf"error: {folder}: File too large: .* are still to come, .* are free", last[0])
    assert last[1].startswith("hint: free space; what came is kept")

    hub.wait_until_idle()
    served, kept = sum(hub.bytes_served.values()), on_disk(folder)
    assert partial_sizes(folder)[SHARD] == CUT
    hub.bytes_served.clear()
    fetch(hub, folder)
    assert_whole(folder)
    again = sum(hub.bytes_served.values())
    assert again == ALL - kept
    row("disk full at 60 % of a file", 1, "exit 3", served, kept, again)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.8 MB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_disk_that_another_fills(hub, small_disk, row):
    """The room was there at the start; then something else took it."""
    folder, hog = small_disk / "weights", small_disk / "hog"
    hub.pace = 0.02
    process = command(hub, folder)
    while on_disk(folder) < 200_000:
        assert process.poll() is None
        time.sleep(0.002)
    hog.write_bytes(bytes(900_000))
    _, err = process.communicate()
    assert process.returncode == 3, err
    assert re.search(
        rf"error: {folder}: No space left on device: .* are still to come, .* are free\nhint: free space", err
    )

    hub.pace = 0.0
    hub.wait_until_idle()
    served, kept = sum(hub.bytes_served.values()), on_disk(folder)
    assert kept > 200_000
    with pytest.raises(DoesNotFit, match=r"needs .* more"):
        fetch(hub, folder)
    hog.unlink()
    fetch(hub, folder)
    assert_whole(folder)
    again = sum(hub.bytes_served.values()) - served
    assert again == ALL - kept
    row("disk filled up by another", 1, "exit 3", served, kept, again)


@pytest.fixture
def as_nobody(monkeypatch):
    """Root may write anywhere: be someone else for the time of the test."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    readable = os.access(ROOT / "wan22", os.R_OK | os.X_OK, effective_ids=True)
    if readable:
        yield
    os.seteuid(0)
    if not readable:
        pytest.skip("this clone lies where nobody else may look")


def test_a_folder_that_is_read_only(hub, as_nobody):
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o555)
        with pytest.raises(RequestError, match=rf"{folder}/new: cannot write there: Permission denied") as error:
            fetch(hub, folder / "new")
        assert "--ckpt_dir" in error.value.hint
        folder.chmod(0o755)
        fetch(hub, folder)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
        assert check(folder).whole, "checking needs no right to write"
        assert sum(hub.bytes_served.values()) == ALL
        (folder / "high_noise_model").chmod(0o755)
        (folder / INDEX).unlink()
        (folder / "high_noise_model").chmod(0o555)
        with pytest.raises(RequestError, match="cannot write there"):
            fetch(hub, folder)
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_file_where_the_folder_should_be(hub, folder):
    folder.write_bytes(b"mine")
    with pytest.raises(RequestError, match="cannot write there"):
        fetch(hub, folder)
    assert folder.read_bytes() == b"mine"


def test_two_downloads_of_one_folder(hub, folder, capfd):
    hub.pace = 0.02
    first = command(hub, folder)
    while not on_disk(folder):
        assert first.poll() is None
        time.sleep(0.005)
    fetch(hub, folder)
    assert "another download is at work there; waiting" in capfd.readouterr().err
    assert first.wait() == 0
    assert_whole(folder)
    assert sum(hub.bytes_served.values()) == ALL, "no byte came twice"


# --- what is there: proofs and check ---


def test_proven_files_are_not_read_again(hub, folder, published, monkeypatch):
    fetch(hub, folder, repo=verify.PUBLISHED)
    read = []
    digest_of = verify.digest_of
    monkeypatch.setattr(verify, "digest_of", lambda path, *rest: read.append(path.name) or digest_of(path, *rest))
    fetch(hub, folder, repo=verify.PUBLISHED)
    assert read == []
    os.utime(folder / "Wan2.1_VAE.pth")  # touched since: its proof is worth nothing
    fetch(hub, folder, repo=verify.PUBLISHED)
    assert read == ["Wan2.1_VAE.pth"]
    (folder / ".wan22" / "files.json").write_text("{ broken")
    fetch(hub, folder, repo=verify.PUBLISHED)
    assert len(read) == 1 + len(FILES)
    assert sum(hub.bytes_served.values()) == ALL


def test_files_from_elsewhere_are_proven_or_replaced(hub, folder, published, capfd):
    """A copy of another's folder: what is right stays, what is not is fetched."""
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content[:-1] + b"\0" if path == SHARD else content)
    fetch(hub, folder, repo=verify.PUBLISHED)
    assert_whole(folder)
    assert dict(hub.bytes_served) == {SHARD: SIZE}
    assert f"{SHARD}: damaged: SHA-256 is" in capfd.readouterr().err


def test_check_names_each_problem(hub, folder, published):
    fetch(hub, folder, repo=verify.PUBLISHED)
    good = check(folder)
    assert good.whole
    assert (len(good.verified), good.bytes_read, good.unexpected) == (len(FILES), ALL, ())

    stat = (folder / SHARD).stat()
    with (folder / SHARD).open("r+b") as file:
        file.seek(CUT)
        flipped = file.read(1)[0] ^ 1
        file.seek(CUT)
        file.write(bytes([flipped]))
    os.utime(folder / SHARD, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # check trusts no modification time
    os.truncate(folder / "low_noise_model/model.safetensors", 7)
    (folder / "Wan2.1_VAE.pth").unlink()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 30000\n"
    (folder / "google/umt5-xxl/spiece.model").write_bytes(pointer)
    (folder / INDEX).write_bytes(FILES[INDEX].replace(b"diffusion", b"../fusion"))
    (folder / "high_noise_model/model-00007.safetensors").write_bytes(b"old")
    report = check(folder)
    assert {problem.path: problem.kind for problem in report.problems} == {
        SHARD: "hash",
        "low_noise_model/model.safetensors": "size",
        "Wan2.1_VAE.pth": "missing",
        "google/umt5-xxl/spiece.model": "pointer",
        INDEX: "hash",
    }
    assert report.unexpected == ("high_noise_model/model-00007.safetensors",)
    assert report.verified == ("high_noise_model/config.json", "low_noise_model/config.json")
    text = "\n".join(report.lines())
    assert "git lfs pull" in text
    assert "has 7 bytes, should have 500000" in text
    assert json.loads(json.dumps(report.to_dict()))["whole"] is False
    assert check(folder, only="high_noise_model/config.json").whole

    fetch(hub, folder, repo=verify.PUBLISHED)  # and downloading again mends all of it
    assert check(folder).whole


def test_check_of_a_folder_that_was_not_downloaded_here(tmp_path, published):
    with pytest.raises(RequestError, match="no such folder"):
        check(tmp_path / "nothing")
    with pytest.raises(RequestError, match="neither the published layout nor"):
        check(tmp_path)
    clone = tmp_path / "clone"
    for path in (SHARD, INDEX):
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        (clone / path).write_bytes(FILES[path])
    report = check(clone)
    assert set(report.verified) == {SHARD, INDEX}
    assert {problem.kind for problem in report.problems} == {"missing"}
    assert sorted(clone.rglob("*")) == sorted([clone / SHARD, clone / INDEX, clone / "high_noise_model"]), "only reads"


def test_the_manifest_is_the_published_one():
    files = verify.published_files()
    assert (len(files), sum(file.size for file in files)) == (22, 126_199_333_241)
    assert {len(file.digest) for file in files} == {64}


# --- the Hub cache, xet, offline, ModelScope ---


def test_into_the_hub_cache(hub, tmp_path):
    cache = tmp_path / "cache"
    result = fetch(hub, None)
    assert result.folder == cache / "models--owner--name" / "snapshots" / COMMIT
    assert_whole(result.folder)
    assert snapshot_download(REPO, local_files_only=True, cache_dir=cache) == str(result.folder)
    info = scan_cache_dir(cache)
    assert (info.warnings, info.size_on_disk) == ([], ALL - len(FILES["low_noise_model/config.json"]))
    assert check(result.folder).whole
    assert fetch(hub, None).fetched == ()

    shard = (result.folder / SHARD).resolve()
    shard.write_bytes(bytes(SIZE))  # a damaged content is replaced behind its link
    assert [file.path for file in fetch(hub, None).fetched] == [SHARD]
    assert (result.folder / SHARD).is_symlink()
    assert shard.read_bytes() == FILES[SHARD]
    (result.folder / SHARD).unlink()  # killed between the content and its link
    assert fetch(hub, None).fetched == ()
    assert_whole(result.folder)


@pytest.mark.parametrize("hard_links", [True, False])
def test_into_a_hub_cache_without_links(hub, monkeypatch, hard_links):
    """As on Windows without developer mode, and on a file system that has no links at all."""

    def refuse(*_):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    result = fetch(hub, None)
    assert_whole(result.folder)
    assert (result.folder / SHARD).stat().st_nlink == 1 + hard_links
    assert fetch(hub, None).fetched == ()
    (result.folder / SHARD).write_bytes(bytes(SIZE))
    fetch(hub, None)
    assert_whole(result.folder)
    assert sum(hub.bytes_served.values()) == ALL + SIZE


def test_offline(hub, folder, monkeypatch):
    fetch(hub, folder, only="high_noise_model")
    in_cache = fetch(hub, None)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(hub, folder, only="high_noise_model").fetched == ()
    assert fetch(hub, None).folder == in_cache.folder
    with pytest.raises(RequestError, match="nothing of owner/name@main is known there, and HF_HUB_OFFLINE"):
        fetch(hub, folder)  # only a part was ever asked for
    (folder / SHARD).unlink()
    with pytest.raises(RequestError, match=f"{SHARD} is not there whole, and HF_HUB_OFFLINE is set"):
        fetch(hub, folder, only="high_noise_model")
    assert hub.log == []


def test_offline_published(hub, folder, published, monkeypatch):
    """Without any record, the manifest says what a copied folder should hold."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    assert fetch(hub, folder, repo=verify.PUBLISHED).fetched == ()
    (folder / "Wan2.1_VAE.pth").unlink()
    (folder / SHARD).unlink()
    with pytest.raises(RequestError, match="and 1 more files are not there whole"):
        fetch(hub, folder, repo=verify.PUBLISHED)
    assert hub.log == []


@pytest.fixture
def xet_hub(tmp_path, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (tmp_path / "xet").mkdir()
    with FakeHub(xet=tmp_path / "xet") as server:
        server.add(REPO, FILES)
        yield server


def test_xet(xet_hub, folder):
    """hf_xet reads from a store that hf_xet wrote; a part begun over HTTP is gone on with."""
    xet_hub.add("plain/name", FILES)
    xet_hub.repos["plain/name"].xet_hashes.clear()
    xet_hub.play(SHARD, Fault("drop", at=CUT))
    xet_hub.play(SHARD, Fault("drop"), times=2)
    with pytest.raises(RunError):
        fetch(xet_hub, folder, repo="plain/name", only=SHARD)
    fetch(xet_hub, folder)
    assert_whole(folder)
    assert xet_hub.bytes_served[SHARD] == CUT
    assert {path for path, count in xet_hub.bytes_served.items() if len(FILES[path]) > 1000} == {SHARD}, "others by xet"


def test_xet_that_fails_is_replaced_by_http(xet_hub, folder, capfd):
    xet_hub.repos[REPO].xet_hashes[SHARD] = "0" * 64
    fetch(xet_hub, folder, only=SHARD)
    assert_whole(folder, {SHARD: FILES[SHARD]})
    assert "going on over plain HTTP" in capfd.readouterr().err


def test_modelscope_absent(folder, published, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(RequestError, match="modelscope package is not installed") as error:
        download(ckpt_dir=folder, source="modelscope", patience=QUICK)
    assert "pip install" in error.value.hint
    with pytest.raises(RequestError, match="--source modelscope: only"):
        download(REPO, ckpt_dir=folder, source="modelscope")
    with pytest.raises(RequestError, match="--source elsewhere: unknown"):
        download(ckpt_dir=folder, source="elsewhere")


def test_modelscope(folder, published, monkeypatch):
    """Its client brings the files, ours proves them: one that came damaged is asked for again."""
    calls = []

    def snapshot_download(repo_id, local_dir, allow_file_pattern):
        calls.append(list(allow_file_pattern))
        for path in allow_file_pattern:
            place = Path(local_dir) / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(bytes(SIZE) if path == SHARD and len(calls) == 1 else FILES[path])

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.hub", types.ModuleType("modelscope.hub"))
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", fake)
    download(ckpt_dir=folder, source="modelscope", patience=QUICK)
    assert_whole(folder)
    assert [len(paths) for paths in calls] == [len(FILES), 1]


# --- the script ---


def test_script(hub, folder):
    process = command(hub, folder, "--dry-run")
    out, err = process.communicate()
    assert (process.returncode, "1.6 MB to fetch" in out, err) == (0, True, "")
    assert not folder.exists()
    process = command(hub, folder)
    out, err = process.communicate()
    assert (process.returncode, out) == (0, f"{folder}\n"), err
    os.truncate(folder / SHARD, 5)
    process = command(hub, folder, "--check")
    out, err = process.communicate()
    assert (process.returncode, f"{SHARD}: has 5 bytes, should have 1000000" in out) == (1, True), err
    process = command(hub, folder, "--only", "nothing")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: --only nothing: no such file or folder in owner/name\nhint: there are:")


def test_script_without_huggingface_hub(tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('No module named huggingface_hub')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, str(ROOT / "download_T2V_A14B_weights.py")]
    result = subprocess.run(words, env=env, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "huggingface_hub is missing" in result.stderr
    assert "pip install" in result.stderr
    assert "Traceback" not in result.stderr


def test_script_needs_no_heavy_library(tmp_path):
    heavy = {"torch", "numpy", "typer", "transformers", "safetensors"}
    script = (
        f"import sys; sys.path[:0] = sys.argv[1:]; import wan22.download; sys.exit(len({heavy} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(ROOT)], cwd=tmp_path, check=False).returncode == 0
