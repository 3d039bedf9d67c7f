"""Prompt extension: a fake endpoint on loopback with every way to fail, a tiny chat model, and the record of both."""

import contextlib
import gc
import http.server
import json
import threading
import time
import weakref

import pytest
from conftest import TINY

from wan22 import cli, prompt_extend
from wan22.config import RequestError, RunError
from wan22.prompt_extend import DASHSCOPE_URL, OPENAI_URL, SYSTEM_PROMPTS, Extension, Patience, _Endpoint, clean

KEY = "sk-Zq7vXw93bTestKey"
LONG = "A red ball rolls slowly over an oak table in warm evening light, the camera follows it from the side."


class FakeEndpoint(http.server.ThreadingHTTPServer):
    """Answers each request by the next of `answers`, the last one again and again: (status, body, headers)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.seen, self.pause = [(200, chat(LONG), {})], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.seen.append((self.path, dict(self.headers), json.loads(self.rfile.read(length))))
        answers = self.server.answers
        status, body, headers = answers.pop(0) if len(answers) > 1 else answers[0]
        if body is None:  # says nothing
            self.server.pause.wait(10)
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST

    def log_message(self, *_):
        pass


def chat(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def endpoint(monkeypatch):
    for variable, place, _ in prompt_extend.KEYS:
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(place, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(prompt_extend, "PATIENCE", Patience(tries=3, wait_s=0.01, longest_wait_s=0.05, answer_s=1))
    server = FakeEndpoint()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.pause.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def generate(capsys, tmp_path, monkeypatch):
    """`wan22 generate` on the tiny checkpoint: code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = cli.main(["generate", "--ckpt_dir", str(TINY), "--size", "64*48", "--frame_num", "1", "--steps", "1",
                         "--seed", "7", *map(str, words)])  # fmt: skip
        out, err = capsys.readouterr()
        return code, out, err

    return run


EXTEND = ("--prompt", "a red ball", "--use_prompt_extend", "--prompt_extend_method", "dashscope")


def show(capsys, name):
    assert cli.main(["show", name]) == 0
    return capsys.readouterr().out


# The command -------------------------------------------------------------------------------------------------------


def test_both_prompts_are_recorded_and_from_needs_no_endpoint(endpoint, generate, capsys, tmp_path):
    code, out, err = generate(*EXTEND, "--prompt_extend_target_lang", "en", "--output", "one.mp4", "--sidecar")
    assert (code, out) == (0, "one.mp4\n")
    assert f"extended prompt: {LONG}" in err
    ((path, headers, body),) = endpoint.seen
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (body["model"], body["messages"][1]["content"]) == ("qwen-plus", "a red ball")
    assert body["messages"][0]["content"] == SYSTEM_PROMPTS["en"]
    request = json.loads(show(capsys, "one.mp4"))["request"]
    assert (request["prompt"], request["original_prompt"]) == (LONG, "a red ball")

    assert generate("--from", "one.mp4", "--output", "two.mp4")[0] == 0
    assert len(endpoint.seen) == 1
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    assert generate("--from", "one.mp4", "--output", "three.mp4", "--prompt", "a blue cube")[0] == 0
    assert json.loads(show(capsys, "three.mp4"))["request"]["original_prompt"] is None
    # Extended again, it is what was asked for that is extended.
    endpoint.answers = [(401, b"", {})]
    assert generate("--from", "one.mp4", "--output", "four.mp4", *EXTEND[2:])[0] == 1
    assert endpoint.seen[-1][2]["messages"][1]["content"] == "a red ball"
    assert endpoint.seen[-1][2]["messages"][0]["content"] == SYSTEM_PROMPTS["zh"]
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes()


def test_names_come_from_what_was_asked_for(endpoint, generate):
    code, out, _ = generate(*EXTEND)
    assert (code, out.startswith("a-red-ball-")) == (0, True)


def test_dry_run_asks_nobody(endpoint, generate):
    code, out, _ = generate(*EXTEND, "--dry-run")
    assert (code, endpoint.seen) == (0, [])
    assert "dashscope, qwen-plus, zh" in out


FAILURES = {
    "401": ([(401, {"error": {"message": f"Incorrect key: {KEY}"}}, {})], "refuses the key in OPENAI_API_KEY", 1),
    "404": ([(404, {"error": {"message": f"no model; you sent {KEY}"}}, {})], "HTTP 404: no model; you sent ***", 1),
    "500 forever": ([(500, KEY.encode(), {})], "HTTP 500, 3 times in a row", 3),
    "garbage": ([(200, b"<html>" + KEY.encode(), {})], "not a chat completion", 1),
    "another protocol": ([(200, {"choices": []}, {})], "not a chat completion", 1),
    "no text": ([(200, chat(None), {})], "not a chat completion", 1),
    "too long": ([(200, b" " * (2 << 20), {})], "not a chat completion", 1),
    "empty": ([(200, chat(" \n"), {})], "extension is empty", 1),
    "nothing but thoughts": ([(200, chat("<think>hmm"), {})], "extension is empty", 1),
    "elsewhere": ([(302, b"", {"Location": "/elsewhere"})], "points elsewhere", 1),
    "silence": ([(200, None, {})], "no answer within 0.2 s, 3 times in a row", 3),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line_without_the_key(endpoint, generate, tmp_path, monkeypatch, name):
    endpoint.answers, said, tries = FAILURES[name]
    if name == "silence":
        monkeypatch.setattr(prompt_extend, "PATIENCE", Patience(tries=3, wait_s=0.01, answer_s=0.2))
    code, out, err = generate(*EXTEND, "--output", "v.mp4")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (1, "", 1)
    assert said in errors[0]
    assert "hint: " in err
    assert KEY not in out + err
    assert len(endpoint.seen) == tries
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["401", "500 forever", "empty"])
def test_fallback_warns_and_goes_on(endpoint, generate, capsys, name):
    endpoint.answers, said, _ = FAILURES[name]
    code, out, err = generate(*EXTEND, "--prompt_extend_fallback", "--output", "v.mp4")
    assert (code, out) == (0, "v.mp4\n")
    assert "warning: the prompt is not extended: " in err
    assert said in err
    assert KEY not in err
    request = json.loads(show(capsys, "v.mp4"))["request"]
    assert (request["prompt"], request["original_prompt"]) == ("a red ball", None)


def test_json_events(endpoint, generate):
    code, out, err = generate(*EXTEND, "--json", "--output", "v.mp4")
    events = [json.loads(line) for line in out.splitlines()]
    note = next(event for event in events if "original_prompt" in event)
    assert (code, note["prompt"], note["original_prompt"]) == (0, LONG, "a red ball")
    assert events[-1]["phases"][0]["name"] == "extend the prompt"
    assert KEY not in out + err


@pytest.mark.parametrize("words", [["--prompt_extend_model", "x"], ["--prompt_extend_fallback"],
                                   ["--prompt_extend_target_lang", "en"]])  # fmt: skip
def test_a_flag_that_nothing_would_read(generate, words):
    code, _, err = generate("--prompt", "x", *words)
    assert (code, words[0] in err, "--use_prompt_extend" in err) == (2, True, True)


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt_extend_method", "magic"],
        ["--prompt_extend_target_lang", "fr"],
        ["--prompt_extend_url", "http://127.0.0.1/v1"],  # with local_qwen
        ["--prompt_extend_method", "dashscope", "--prompt_extend_url", "file:///etc/passwd"],
        ["--prompt_extend_method", "dashscope", "--prompt_extend_url", f"https://u:{KEY}@host/v1"],
        ["--prompt_extend_method", "dashscope", "--prompt_extend_url", f"https://host/v1?key={KEY}"],
        ["--prompt_extend_method", "dashscope", "--prompt_extend_url", "https://host:port/v1"],
        ["--prompt_extend_model", "nobody/has-this-model"],
        ["--prompt_extend_model", "no such name"],
    ],
)
def test_wrong_flags(endpoint, generate, words):
    code, out, err = generate("--prompt", "x", "--use_prompt_extend", *words)
    assert (code, out, err.count("error: ")) == (2, "", 1)
    assert KEY not in err


def test_without_a_key(endpoint, generate, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, err = generate(*EXTEND)
    assert (code, "DASH_API_KEY" in err) == (2, True)
    assert generate(*EXTEND, "--prompt_extend_fallback")[0] == 0
    monkeypatch.setenv("DASH_API_KEY", f"{KEY}\nX-Other: 1")
    code, _, err = generate(*EXTEND)
    assert (code, KEY in err) == (2, False)


# The endpoint ------------------------------------------------------------------------------------------------------


def ask(endpoint):
    return _Endpoint.find(None).ask("m", [{"role": "user", "content": "x"}])


def test_waits_as_long_as_asked(endpoint):
    endpoint.answers = [(429, b"{}", {"Retry-After": "3600"}), (503, b"", {}), (200, chat("yes"), {})]
    start = time.perf_counter()
    assert ask(endpoint) == "yes"
    assert 0.05 <= time.perf_counter() - start < 1  # the hour is cut to the patience there is
    assert len(endpoint.seen) == 3


def test_without_what_an_endpoint_does_not_take(endpoint):
    endpoint.answers = [(400, {"error": {"message": "temperature is not supported"}}, {}), (200, chat("yes"), {})]
    assert ask(endpoint) == "yes"
    assert [set(body) for _, _, body in endpoint.seen] == [
        {"model", "messages", "temperature", "seed"}, {"model", "messages"}]  # fmt: skip


def test_nobody_there(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9: .*3 times in a row"):
        ask(endpoint)


def test_the_key_is_nowhere_in_an_exception(endpoint):
    import traceback

    endpoint.answers = FAILURES["401"][0]
    with pytest.raises(RunError) as caught:
        ask(endpoint)
    told = "".join(traceback.format_exception(caught.value))
    assert KEY not in told + repr(_Endpoint.find(None))


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        ({"DASH_API_KEY": "a"}, None, DASHSCOPE_URL),
        ({"DASHSCOPE_API_KEY": "a", "OPENAI_API_KEY": "b"}, None, DASHSCOPE_URL),
        ({"OPENAI_API_KEY": "b"}, None, OPENAI_URL),  # never DashScope, whose key it is not
        ({"OPENAI_API_KEY": "b", "DASH_API_URL": "https://x/v1"}, None, OPENAI_URL),
        ({"OPENAI_API_KEY": "b", "OPENAI_BASE_URL": "http://localhost:8000/v1/"}, None, "http://localhost:8000/v1"),
        ({"DASH_API_KEY": "a", "DASH_API_URL": "https://dashscope-intl.aliyuncs.com/api/v1"}, None,
         "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"),
        ({"DASH_API_KEY": "a"}, "https://here/v1", "https://here/v1"),
    ],
)  # fmt: skip
def test_a_key_goes_to_its_own_service(monkeypatch, variables, url, expected):
    for names in prompt_extend.KEYS:
        for name in names[:2]:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = _Endpoint.find(url)
    assert found._url == f"{expected}/chat/completions"
    assert found._key == next(iter(variables.values()))


# The answer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("  A ball.\n\nIt rolls.\r\n", "A ball. It rolls."),
        ('"A ball."', "A ball."),
        ("“一个红球。”", "一个红球。"),
        ("Prompt: A ball.", "A ball."),
        ("**Extended Prompt:** \"A ball.\"", "A ball."),
        ("优化后的提示词：一个红球。", "一个红球。"),
        ("<think>\nWhat ball?\n</think>\n\nA ball.", "A ball."),
        ("What ball?</think>A ball.", "A ball."),
        ("```text\nA ball.\n```", "A ball."),
        ('"Stop" says the sign, then "go"', '"Stop" says the sign, then "go"'),
        ("A prompt: the word on a sign", "A prompt: the word on a sign"),
        ("A\x1b[31m ball\x00", "A [31m ball"),
    ],
)
def test_cleaning(answer, prompt):
    assert clean(answer) == prompt


@pytest.mark.parametrize("answer", ["", "\n", '""', "Prompt:", "<think>x</think>", "<think>x", "```\n```"])
def test_nothing_left(answer):
    with pytest.raises(RunError, match="empty"):
        clean(answer)


def test_system_prompts_ask_for_what_matters():
    for word in ("80 to 100", "look", "moves", "light", "camera", "alone"):
        assert word in SYSTEM_PROMPTS["en"]
    for word in ("80到100", "外观", "运动", "光", "镜头", "只输出"):
        assert word in SYSTEM_PROMPTS["zh"]


# A model here ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory):
    """A random Qwen2 of 30 thousand weights, and a tokenizer of letters with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("chat") / "model"
    letters = [*pre_tokenizers.ByteLevel.alphabet(), "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(sorted(letters))}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=fast.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for letter, place in fast.get_vocab().items():  # it babbles, but in letters
        if not (letter.isascii() and letter.isalpha()):
            model.lm_head.weight.data[place] = 0
    model.generation_config.do_sample = True  # as Qwen's own are: the likeliest answer must be asked for
    model.generation_config.temperature = 0.7
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(prompt_extend, "MAX_NEW_TOKENS", 12)


def test_a_local_model_runs_is_freed_and_says_the_same_again(tiny_chat, short, generate, capsys, monkeypatch):
    import torch
    from transformers import Qwen2ForCausalLM

    from wan22 import pipeline

    seen, alive_at_encoding = [], []
    generating, encoding = Qwen2ForCausalLM.generate, pipeline.Pipeline.encode

    def watched(model, **settings):
        seen.append((weakref.ref(model), settings["input_ids"]))
        assert not torch.is_grad_enabled()
        return generating(model, **settings)

    def encode(pipe, *rest, **settings):
        gc.collect()
        alive_at_encoding.extend(ref() is not None for ref, _ in seen)
        return encoding(pipe, *rest, **settings)

    monkeypatch.setattr(Qwen2ForCausalLM, "generate", watched)
    monkeypatch.setattr(pipeline.Pipeline, "encode", encode)
    words = ("--prompt", "a red ball", "--use_prompt_extend", "--prompt_extend_model", tiny_chat)
    code, _, err = generate(*words, "--output", "one.mp4")
    assert code == 0, err
    assert alive_at_encoding == [False]
    request = json.loads(show(capsys, "one.mp4"))["request"]
    assert request["original_prompt"] == "a red ball"
    assert request["prompt"] not in ("", "a red ball")
    assert str(tiny_chat) not in show(capsys, "one.mp4")
    assert generate(*words, "--output", "two.mp4")[0] == 0
    assert json.loads(show(capsys, "two.mp4"))["request"] == request
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(tiny_chat).decode(seen[0][1][0])
    assert text.startswith(f"system: {SYSTEM_PROMPTS['zh']}<|end|>\nuser: a red ball<|end|>\nassistant:")


def test_a_local_model_that_cannot_run(tiny_chat, tmp_path, generate, monkeypatch):
    import shutil

    import torch

    base = shutil.copytree(tiny_chat, tmp_path / "base")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        with contextlib.suppress(FileNotFoundError):
            (base / name).unlink()
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    words = ("--prompt", "x", "--use_prompt_extend", "--output", "v.mp4")
    code, _, err = generate(*words, "--prompt_extend_model", base)
    assert (code, "no chat template" in err) == (2, True)
    broken = shutil.copytree(tiny_chat, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    code, _, err = generate(*words, "--prompt_extend_model", broken)
    assert (code, err.count("error: "), err.count("\n")) == (1, 1, 2)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(prompt_extend, "_generate", full)
    code, _, err = generate(*words, "--prompt_extend_model", tiny_chat)
    assert (code, "out of GPU memory with" in err) == (1, True)
    assert generate(*words, "--prompt_extend_model", tiny_chat, "--prompt_extend_fallback")[0] == 0


def test_published_names():
    assert Extension().model_name == "Qwen2.5_14B"
    assert prompt_extend.SHORT_NAMES["Qwen2.5_14B"] == "Qwen/Qwen2.5-14B-Instruct"
    with pytest.raises(RequestError, match="not on this machine") as caught:
        Extension().check()
    assert caught.value.hint == "fetch it: wan22 download Qwen/Qwen2.5-14B-Instruct"
    Extension(fallback=True).check()
