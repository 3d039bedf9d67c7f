"""Many requests: what a batch file may say, and that every good item is made exactly once whatever dies."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY

from wan22 import batch, cli, cli_many, pipeline
from wan22.config import ATTENTIONS, Precision, Request, RequestError
from wan22.many import journal, worker
from wan22.many.items import parse_seeds, read_items, recorded_base, split_line
from wan22.many.local import LocalEngine
from wan22.many.worker import Work
from wan22.options import Base
from wan22.output.record import read_record
from wan22.pipeline import Pipeline, video_name

BASE = Base({}, {}, {})
PARSE = functools.partial(cli_many.parse_line, cli.typer.main.get_command(cli.app))
SMALL = ["--ckpt_dir", str(TINY), "--size", "64x48", "--frames", "5", "--steps", "2"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Workers beside each other on small machines only get in each other's way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def given(*words):
    """A batch's flags, as its command gets them."""
    command = cli.typer.main.get_command(cli.app).commands["batch"]
    params = command.make_context("batch", ["x.txt", *cli.normalize([*map(str, words)])[0]]).params
    return {**params, "prompt": None, "from_file": None}


def read(path, *words, seeds=(), repeat=1, tiny=None):
    return read_items(path, given(*words), BASE, tiny, PARSE, seeds=list(seeds), repeat=repeat)


# --- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "prompt", "words"),
    [("a cat", "a cat", []), ("It's a dog's --seed 7 --size 480p", "It's a dog's", ["--seed", "7", "--size", "480p"]),
     ("a -- b - c", "a -- b - c", []), ('"Hello" says he', '"Hello" says he', []),
     ('"a --x b" --seed 1', "a --x b", ["--seed", "1"]),
     ("说 “你好” --negative-prompt 'no text'", "说 “你好”", ["--negative-prompt", "no text"])],
)  # fmt: skip
def test_lines(line, prompt, words):
    assert split_line(line) == (prompt, words)


def test_text(tmp_path, tiny):
    path = tmp_path / "p.txt"
    lines = ["# no", "", "it's one --seed 7 --size 480p", "two", "two", "three --seed x", "four --size 65x48",
             "five --ckpt_dir /x", 'six --prompt "x', "--seed 1", "seven --help", "eight --guidance 2"]  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode() + b"\n\xff\n")
    items, bad = read(path, "--steps", "5", tiny=tiny)
    assert [item.where for item in items] == ["line 3", "line 4", "line 5", "line 12"]
    assert [one.where for one in bad] == [f"line {n}" for n in (6, 7, 8, 9, 10, 11, 13)]
    first = items[0].request
    assert (first.prompt, first.seed, first.width, first.num_steps) == ("it's one", 7, 832, 5)
    assert (items[3].request.guidance_high, items[3].request.guidance_low) == (2, 2)
    # Without a seed it follows from the content; the same line twice is two videos, and both the same again tomorrow.
    assert items[1].request.seed != items[2].request.seed
    assert read(path, "--steps", "5", tiny=tiny) == (items, bad)
    assert read(path, "--steps", "6", tiny=tiny)[0][1].request.seed != items[1].request.seed


def test_tables(tmp_path, tiny):
    (tmp_path / "p.csv").write_text('prompt,seed,size,num_steps\n"a, b",3,480p,\nc,,64x48,7\nd,1,2,3,4\n')
    items, bad = read(tmp_path / "p.csv", tiny=tiny)
    assert [(item.request.prompt, item.request.width, item.request.num_steps) for item in items] == [
        ("a, b", 832, 40), ("c", 64, 7)]  # fmt: skip
    assert [one.where for one in bad] == ["row 4"]
    rows = [{"prompt": "--x", "seed": 1, "shift": 5.5, "width": 64, "height": 48}, {"prompt": "y", "colour": 1}, [1],
            {"seed": 2}, {"prompt": {"a": 1}}, {"prompt": "y", "num_frames": "many"}, {"prompt": "\ud800"}]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{torn")
    items, bad = read(tmp_path / "p.jsonl", tiny=tiny)
    assert [(item.request.prompt, item.request.shift, item.request.width) for item in items] == [("--x", 5.5, 64)]
    assert [one.where for one in bad] == [f"line {n}" for n in range(2, 9)]


def test_a_file_that_is_none(tmp_path, tiny):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "p.csv").write_text("a,b\n1,2\n")
    (tmp_path / "twice.csv").write_text("prompt,seed,seed\na,1,2\n")
    for name in ("none.txt", "empty.txt", "p.csv", "p.doc", "twice.csv"):
        with pytest.raises(RequestError, match=name):
            read(tmp_path / name, tiny=tiny)


def test_seeds_and_repeats(tmp_path, tiny):
    assert parse_seeds("1..3,9, 2") == [1, 2, 3, 9]
    for wrong in ("", "3..1", "a", "1..", "1..9999999999"):
        with pytest.raises(RequestError):
            parse_seeds(wrong)
    (tmp_path / "p.txt").write_text("a\nb --seed 5\n")
    assert [item.request.seed for item in read(tmp_path / "p.txt", seeds=[1, 2], tiny=tiny)[0]] == [1, 2, 5]
    items, _ = read(tmp_path / "p.txt", repeat=3, tiny=tiny)
    assert [item.request.seed for item in items[3:]] == [5, 6, 7]
    assert len({item.request.seed for item in items}) == 6


def test_shards(monkeypatch):
    assert batch.parse_shard("2/8") == (1, 8)
    for wrong in ("0/8", "9/8", "x", "1/0", "1"):
        with pytest.raises(RequestError):
            batch.parse_shard(wrong)
    for name in ("ID", "COUNT", "MIN", "MAX", "STEP"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    assert batch.parse_shard(None) == (0, 1)

    def task(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        return batch.parse_shard(None)

    assert task(ID=7, COUNT=4, MIN=5, MAX=8, STEP=1) == (2, 4)
    assert task(ID=9, COUNT=3, MIN=5, MAX=9, STEP=2) == (2, 3)
    assert task(ID=7, COUNT=3, MIN=1, MAX=7, STEP=1) == (0, 1)  # --array=1,5,7: claims share the work


# --- the journal -----------------------------------------------------------------------------------------------------
def test_a_torn_journal(tmp_path):
    first = journal.Journal(tmp_path)
    first.add("item", name="a.mp4", where="line 1", request={})
    first.add("item", name="b.mp4", where="line 2", request={})
    with open(tmp_path / journal.NAME, "ab") as file:
        file.write(b'{"time": 1, "event": "do')
    second = journal.Journal(tmp_path)
    second.add("failed", name="b.mp4", error="no")
    assert [event["event"] for event in journal.read(tmp_path)] == ["item", "item", "failed"]
    found = journal.status(tmp_path)
    assert [item["name"] for item in found["waiting"]] == ["a.mp4"]
    assert found["failed"][0]["error"] == "no"
    assert "1 waiting" in journal.as_text(found)
    assert journal.duration(11_220) == "3 h 07 min"


def test_several_gpus_on_one_video_are_for_generate(tmp_path, monkeypatch, capsys):
    """A batch says so, wherever it is asked for them: as a flag, by a preset, in a line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.toml").write_text("[placement]\ngpus = 2\n")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    for words in (["--gpus", "2"], ["--preset", "two.toml"]):
        assert cli.main(["batch", "prompts.txt", *SMALL, *words]) == 2
        err = capsys.readouterr().err
        assert "gpus is for one video" in err
        assert "--gpus-per-worker" in err
    (tmp_path / "prompts.txt").write_text("a cat --gpus 2\n")
    _, bad = read(tmp_path / "prompts.txt")
    assert "--gpus is for the whole batch: --gpus-per-worker N" in bad[0].error


# --- whole batches ---------------------------------------------------------------------------------------------------
def jobs_of(path, *words):
    flags = given(*SMALL, *words)
    from wan22.options import read_checkpoint

    items, bad = read_items(path, flags, BASE, read_checkpoint(flags, BASE, "t2v-A14B"), PARSE, seeds=[],
                            repeat=1)  # fmt: skip
    jobs, bad = batch.plan_jobs(items, bad, flags, BASE)
    return flags, jobs, bad


def local(flags, folder):
    return LocalEngine(["cpu"], Work(flags, BASE, folder))


def test_a_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one\ntwo --seed 7\nbad --size 65x48\n")
    words = ["batch", "p.txt", *SMALL]
    assert cli.main([*words, "--dry-run"]) == 1  # as without it: a line is bad
    out, err = capsys.readouterr()
    assert len(out.split()) == 2
    assert err.splitlines()[0] == "2 to make, 1 bad"
    assert "bad    line 3  --size" in err
    assert cli.main([*words, "--dry-run", "--json"]) == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event["event"], event["where"]) for event in events] == [
        ("plan", "line 1"), ("plan", "line 2"), ("bad", "line 3")]  # fmt: skip
    assert cli.main([*words, "--json"]) == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    folder = tmp_path / "p-videos"
    made = sorted(folder.glob("*.mp4"))
    assert Counter(event["event"] for event in events) == {
        "bad": 1, "start": 2, "step": 4, "done": 2, "finished": 1}  # fmt: skip
    assert len(made) == 2
    assert sorted(path.name for path in folder.iterdir() if path not in made) == ["batch.jsonl", "index.html"]
    assert read_record(made[1])["request"]["seed"] == 7

    # Finished items are not made again; a folder of videos is a batch too; the same bits as generate's.
    before = {path: path.stat().st_mtime_ns for path in made}
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert "2 there already, 1 bad" in err
    assert out.split() == [f"p-videos/{path.name}" for path in sorted(made, key=lambda path: "two" in path.name)]
    assert before == {path: path.stat().st_mtime_ns for path in made}
    assert cli.main(["batch", "p-videos", "--ckpt_dir", str(TINY), "--output", "p-videos"]) == 0
    assert cli.main(["generate", *SMALL, "--prompt", "two", "--seed", "7", "--output", "two.mp4"]) == 0
    assert (tmp_path / "two.mp4").read_bytes() == made[1].read_bytes()
    capsys.readouterr()
    assert cli.main(["generate", *SMALL, "--prompt", "two", "--seed", "7", "--dry-run"]) == 0
    assert f" {made[1].name}\n" in capsys.readouterr().out  # the same name, where nobody says another
    assert cli.main(["status", "p-videos", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["done"]), len(found["failed"]), found["seconds_left"]) == (2, 0, None)
    assert cli.main(["status", str(tmp_path)]) == 2


def test_a_folder_is_made_again_with_its_own_attention(tmp_path, monkeypatch):
    """On a GPU `auto` is decided in the worker, and a record names what it came to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one\n")
    assert cli.main(["batch", "p.txt", *SMALL, "--attention", "math"]) == 0
    assert cli.main(["batch", "p-videos", "--ckpt_dir", str(TINY), "--output", "again"]) == 0
    first, second = (next((tmp_path / folder).glob("*.mp4")) for folder in ("p-videos", "again"))
    assert read_record(first)["precision"]["attention"] == "math"
    assert first.read_bytes() == second.read_bytes()


def test_a_folder_is_made_again_without_a_flag(tmp_path, monkeypatch, capsys):
    """Precision, encoding and the demo are the records'; where these differ, what does is bad."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one\n")
    words = ["--dtype", "bf16", "--step-cache", "0.1", "--crf", "30", "--codec", "libx265", "--sidecar", "--save-every",
             "0"]  # fmt: skip
    assert cli.main(["generate", "--prompt", "one", "--seed", "1", *SMALL, *words, "--output", "old/v.mp4"]) == 0
    assert cli.main(["batch", "old", "--ckpt_dir", str(TINY), "--output", "again"]) == 0
    assert (tmp_path / "old" / "v.mp4").read_bytes() == next((tmp_path / "again").glob("*.mp4")).read_bytes()
    # A flag says otherwise: of the encoding that is a wish, of the precision another video.
    capsys.readouterr()
    assert cli.main(["batch", "old", "--ckpt_dir", str(TINY), "--output", "other", "--dtype", "float32"]) == 1
    assert "it was made with --dtype bf16, not float32" in capsys.readouterr().err
    assert cli.main(["generate", "--prompt", "two", "--seed", "1", *SMALL, "--output", "old/w.mp4"]) == 0
    assert cli.main(["batch", "old", "--ckpt_dir", str(TINY), "--output", "other", "--dry-run"]) == 1
    assert "--dtype bf16, not float32; --step-cache 0.1, not 0.0" in capsys.readouterr().err


def test_what_a_folder_agrees_on(tmp_path):
    def folder(name, *records):
        (tmp_path / name).mkdir()
        for number, record in enumerate(records):
            (tmp_path / name / f"{number}.json").write_text(json.dumps({"request": {"fps": 16}, **record}))
        return recorded_base(tmp_path / name, BASE)

    fast = {"weights": "bf16", "attention": "fa3", "scope": None, "step_cache": 0.0, "vae": "bf16"}
    demo = {"model": "demo", "precision": fast, "encoding": {"crf": 5, "codec": "libx265"}}
    assert folder("a", demo, demo) == replace(BASE, model="demo", precision=fast, encoding=demo["encoding"])
    assert folder("b", demo, {**demo, "model": "x", "precision": {**fast, "attention": "cudnn"}}) == replace(
        BASE, encoding=demo["encoding"])  # fmt: skip
    assert folder("c", {"precision": {"weights": "made up"}, "encoding": [1], "model": None}) == BASE
    assert folder("d") == BASE


def test_names_do_not_depend_on_which_exact_backend_it_is():
    """A GPU's is not known before it has tried them, and a batch names its videos before that."""
    names = {attention: video_name(Path(), Request("x", seed=1), Precision("bf16", attention), "").name
             for attention in ATTENTIONS}  # fmt: skip
    assert len({names[name] for name in ("auto", "torch", "cudnn", "fa3", "math")}) == 1
    assert len({names[name] for name in ("auto", "int8", "sage", "int8-bf16")}) == 4


def test_srun_is_refused_as_torchrun_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one\n")
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    for variables in ({"RANK": "0", "WORLD_SIZE": "2"}, slurm):
        for words in (["batch", "p.txt", *SMALL], ["decode", "x.latents.safetensors"]):
            with monkeypatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                assert cli.main(words) == 2
                assert capsys.readouterr().err.count("error:") == 1
                patch.setenv(next(iter(variables)), "1")  # the other one says it no second time
                assert cli.main(words) == 2
                assert capsys.readouterr().err == ""
    monkeypatch.setenv("SLURM_PROCID", "0")  # a job's script itself, or a step of one task
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert cli.main(["batch", "p.txt", *SMALL, "--dry-run"]) == 0


class _Pipe:
    """What a worker is given, and what it says."""

    def __init__(self, given):
        self.given, self.said = iter(given), []

    def recv(self):
        return next(self.given)

    def send(self, said):
        self.said.append(said)


def test_prompts_are_encoded_a_group_at_a_time(tmp_path, monkeypatch):
    """However long the file, no more are kept than a group's; and the encoder comes once a group."""
    asked, kept = [], []
    encode, make = pipeline.encode_all, Pipeline.generate_file

    def counted(checkpoint, dtype, device, ids, *more):
        asked.append(list(ids))
        return encode(checkpoint, dtype, device, ids, *more)

    def made(pipe, *args):
        path = make(pipe, *args)
        kept.append(len(pipe._contexts))
        return path

    monkeypatch.setattr(pipeline, "encode_all", counted)
    monkeypatch.setattr(Pipeline, "generate_file", made)
    monkeypatch.setattr(worker, "AHEAD", 3)
    (tmp_path / "p.txt").write_text("\n".join([*"abcdefg", "long " * 600]))
    flags, jobs, _ = jobs_of(tmp_path / "p.txt", "--steps", "1")
    requests = [job.item.request for job in jobs]
    orders = [(job.name, job.item.request) for job in [*jobs[:2], *jobs[3:], jobs[2]]]  # c was another's, who failed
    pipe = _Pipe([*orders, None])
    worker.live(pipe, Work(flags, BASE, tmp_path, ahead=tuple(requests)))
    negative = requests[0].negative_prompt
    assert [kind for kind, _ in pipe.said].count("done") == 8
    long = requests[-1].prompt
    assert [set(some) - {negative} for some in asked] == [set("abc"), set("def"), {"g", long}, set("cde")]
    assert max(kept) == 4
    warned = [data["text"] for kind, data in pipe.said if kind == "event" and data["event"] == "warning"]
    assert [text for text in warned if "is cut" in text] != []


def test_two_batches_share_a_folder_and_a_worker_is_killed(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join("abcdef"))
    done, killed, results = Counter(), [], {}

    def run(who):
        flags, jobs, bad = jobs_of(tmp_path / "p.txt", "--save-every", "0")

        def tell(event, **data):
            if event == "done":
                done[data["name"]] += 1
            if who == "first" and event == "step" and not killed:
                killed.append(one.workers[0].process.pid)
                os.kill(killed[0], signal.SIGKILL)

        one = batch.Batch(jobs, tmp_path / "out", local(flags, tmp_path / "out"), tell)
        results[who] = one.run(bad)

    threads = [threading.Thread(target=run, args=(who,)) for who in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert killed
    assert sorted(done.values()) == [1] * 6
    for outcomes in results.values():
        assert sorted(outcome.what for outcome in outcomes if outcome.what not in ("done", "there")) == []
        assert len(outcomes) == 6
    left = sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".mp4")
    assert left == ["batch.jsonl"]
    assert [event["event"] for event in journal.read(tmp_path / "out")].count("died") == 1


def test_an_item_that_kills_workers_is_set_aside(tmp_path):
    (tmp_path / "p.txt").write_text("poison\ngood\n")
    flags, jobs, bad = jobs_of(tmp_path / "p.txt")

    def tell(event, name=None, **data):
        if event == "start" and name.startswith("poison"):
            os.kill(data["worker"], signal.SIGKILL)

    outcomes = {one.name.split("-")[0]: one for one in
                batch.Batch(jobs, tmp_path / "out", local(flags, tmp_path / "out"), tell).run(bad)}  # fmt: skip
    assert (outcomes["poison"].what, outcomes["good"].what) == ("failed", "done")
    assert "workers died" in outcomes["poison"].error
    assert "1 made, 1 failed" in batch.table(list(outcomes.values()))
    found = journal.status(tmp_path / "out")
    assert [len(found[part]) for part in ("done", "running", "failed", "waiting")] == [1, 0, 1, 0]


class Scripted:
    """An engine of one worker that answers an item as told."""

    devices, work, last_words = ["cpu"], Work({}, BASE, Path()), None

    def __init__(self, *answers):
        self.answers, self.given, self.ready, self.job, self.who = list(answers), [], True, None, 1

    def start(self, place, ahead):
        return self

    def wait(self, workers, seconds):
        time.sleep(0.005)
        return workers

    def give(self, name, request):
        self.given.append((time.monotonic(), name.split("-")[0]))

    def hear(self):
        if self.job:
            yield self.answers.pop(0)

    def death(self):
        return None

    guilty = trouble = terminate = stop = close = death


FULL = ("failed", {"error": "v.mp4: the disk is full", "may_pass": True, "full": True})
FAILED = ("failed", {"error": "no luck", "may_pass": True, "full": False})
DONE = ("done", {"seconds": 1.0})


def test_a_full_disk_is_waited_out(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "PAUSE", 0.1)
    (tmp_path / "p.txt").write_text("a\nb\nc")
    _, jobs, bad = jobs_of(tmp_path / "p.txt")
    told = []
    engine = Scripted(FULL, FULL, DONE, FAILED, DONE, DONE)
    outcomes = batch.Batch(jobs, tmp_path / "out", engine, lambda event, **_: told.append(event)).run(bad)
    assert [one.what for one in outcomes] == ["done"] * 3
    # The same item after each pause; what fails for another reason comes last.
    assert "".join(name for _, name in engine.given) == "aaabcb"
    times = [at for at, _ in engine.given]
    assert times[1] - times[0] >= 0.1
    assert times[2] - times[1] >= 0.2
    assert (told.count("waiting"), told.count("retry")) == (2, 1)


def test_patience_with_a_full_disk_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "PAUSE", 0.02)
    monkeypatch.setattr(batch, "PATIENCE", 0.05)
    (tmp_path / "p.txt").write_text("a")
    _, jobs, bad = jobs_of(tmp_path / "p.txt")
    engine = Scripted(*[FULL] * 9)
    outcomes = batch.Batch(jobs, tmp_path / "out", engine, lambda event, **_: None).run(bad)
    assert [one.what for one in outcomes] == ["failed"]
    assert len(engine.given) == 4


def test_changes():
    assert batch.changes(Request("a", seed=3, num_steps=40)) == {"prompt": "a", "seed": 3}


# --- scripts ---------------------------------------------------------------------------------------------------------
SCRIPTS = ROOT / "scripts"


def fake(folder, body):
    """A command that stands for another, first on the path."""
    folder.mkdir(exist_ok=True)
    for name, text in body.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_batch_sh(tmp_path):
    dies_once = 'echo "$@" >>calls; [ $(wc -l <calls) -ge 2 ] || kill -9 $$; exit 1'
    environment = fake(tmp_path / "bin", {"wan22": dies_once})

    def run(*words, **more):
        return subprocess.run(["sh", str(SCRIPTS / "batch.sh"), *words], cwd=tmp_path, env={**environment, **more},
                              capture_output=True, text=True)  # fmt: skip

    result = run("a b.txt", "--steps", "3")
    assert (result.returncode, "once more" in result.stderr) == (1, True)  # begun again after a kill, not after exit 1
    assert (tmp_path / "calls").read_text() == "batch a b.txt --steps 3\n" * 2
    (tmp_path / "calls").unlink()
    assert run("x.txt", TRIES="1").returncode == 137
    assert run().returncode == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_slurm_array_sh(tmp_path):
    """With SLURM's variables faked: the task's part, and the queue again after SIGTERM."""
    environment = fake(tmp_path / "bin", {
        "wan22": 'echo "$@" >>calls; [ -z "$SLOW" ] && exit 0; trap "echo kept >>calls; exit 143" TERM; touch up; '
                 'while :; do sleep 0.05; done',
        "scontrol": 'echo scontrol "$@" >>calls',
    })  # fmt: skip
    environment |= {f"SLURM_{name}": value for name, value in
                    (("JOB_ID", "12"), ("ARRAY_JOB_ID", "10"), ("ARRAY_TASK_ID", "2"), ("ARRAY_TASK_COUNT", "4"))}
    command = ["bash", str(SCRIPTS / "slurm_array.sh"), "p.txt", "--size", "480p"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == 0
    assert (tmp_path / "calls").read_text() == "batch p.txt --size 480p\n"
    with subprocess.Popen(command, cwd=tmp_path, env={**environment, "SLOW": "1"}) as process:
        for _ in range(200):
            if (tmp_path / "up").exists():
                break
            time.sleep(0.05)
        process.terminate()
        assert process.wait(20) == 143
    assert (tmp_path / "calls").read_text().splitlines()[2:] == ["kept", "scontrol requeue 10_2"]


def beside_python(name):
    """A program that pip has put beside the Python at work, or that is on the path; None where there is none."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.skipif(beside_python("shellcheck") is None, reason="there is no shellcheck here")
def test_scripts_are_clean():
    """All there are, and what the task for the cloud runs."""
    scripts = [*SCRIPTS.rglob("*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 4
    subprocess.run([beside_python("shellcheck"), *scripts], check=True)
    task = yaml.safe_load((SCRIPTS / "cloud" / "sky.yaml").read_text(encoding="utf-8"))
    for part in ("setup", "run"):
        script = "".join(f"{name}=x\n" for name in task["envs"]) + task[part]
        # An option is meant to be several words, and a variable may be meant for the other part.
        subprocess.run([beside_python("shellcheck"), "--shell=bash", "--exclude=SC2086,SC2034,SC2154", "-"],
                       input=script, text=True, check=True)  # fmt: skip


def test_the_cloud_task_runs(tmp_path):
    """Its `run`, with folders of this machine: videos in the bucket's place, and passed over the next time."""
    task = yaml.safe_load((SCRIPTS / "cloud" / "sky.yaml").read_text(encoding="utf-8"))
    assert list(task["file_mounts"]) == ["/videos"]
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "wan22").write_text(f'#!/bin/sh\nexec {sys.executable} -m wan22 "$@"\n')
    (tmp_path / "wan22").chmod(0o755)
    run = task["run"].replace("/videos", str(tmp_path / "videos")).replace("~/weights", str(TINY))
    run = run.replace("~/wan22/bin/wan22", str(tmp_path / "wan22"))
    environment = {**os.environ, **task["envs"], "BATCH": str(tmp_path / "prompts.txt"), "PYTHONPATH": str(ROOT),
                   "OPTIONS": "--size 64x48 --frames 5 --steps 2"}  # fmt: skip
    for said in ("1 made", "1 there already"):
        result = subprocess.run(["bash", "-c", run], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (result.returncode, said in result.stderr) == (0, True), result.stderr
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1


def test_openi_py(tmp_path):
    """With the platform's package faked: a task that was broken off, and the next one that is given its results."""
    (tmp_path / "c2net").mkdir()
    (tmp_path / "c2net" / "context.py").write_text(
        "from types import SimpleNamespace\n"
        "def prepare():\n"
        f"    return SimpleNamespace(dataset_path={str(tmp_path / 'data')!r}, output_path={str(tmp_path / 'output')!r},"
        f" pretrain_model_path={str(TINY.parent)!r})\n"
        f"def upload_output():\n    open({str(tmp_path / 'uploaded')!r}, 'a').write('x')\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("a\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, str(SCRIPTS / "cloud" / "openi.py"), "--model", TINY.name, "--added", "by the platform",
             "--options", "--size 64x48 --frames 5 --steps 2"]  # fmt: skip

    def run(*more):
        return subprocess.run([*words, *more], env=environment, capture_output=True, text=True, check=False)

    assert run("--batch", "none.txt").returncode == 2
    result = run("--batch", "mine.txt")
    assert (result.returncode, "1 made" in result.stderr) == (0, True), result.stderr
    (tmp_path / "output").rename(tmp_path / "data" / "earlier")
    assert "1 there already" in run("--batch", "mine.txt").stderr
    assert len(list((tmp_path / "output" / "videos").glob("*.mp4"))) == 1
    assert (tmp_path / "uploaded").read_text() == "xx"
