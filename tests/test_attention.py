"""Attention's backends: right ones are taken, absent and wrong ones are told."""

import math
import types

import pytest
import torch

from wan22 import attention
from wan22.attention import BACKENDS, Backend, Shape, attend, choose, find, probe_inputs, reference, relative_error
from wan22.capability import resolve
from wan22.config import ATTENTIONS, Precision, RequestError
from wan22.kernels.attention_8bit import attend_8bit_plain

CPU = torch.device("cpu")
SHAPE = Shape(length=300, heads=2, head_dim=16)


def add(monkeypatch, **functions):
    for name, function in functions.items():
        monkeypatch.setitem(BACKENDS, name, Backend(lambda function=function: function))


def test_names():
    """What a Precision may say is a backend."""
    assert set(BACKENDS) == set(ATTENTIONS) - {"auto"}
    with pytest.raises(RequestError, match="--attention fast: unknown"):
        Precision(attention="fast")
    assert Precision().resolve("cpu").attention == "torch"
    assert Precision().resolve("cuda").attention == "auto"  # till it is measured there
    assert Precision(attention="fa3").resolve("cpu").attention == "fa3"


@pytest.mark.parametrize("name", ["torch", "math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch(name, dtype):
    q, k, v = probe_inputs(SHAPE, CPU, dtype)
    assert not v.is_contiguous()
    error = relative_error(find(name)(q, k, v), reference(q, k, v))
    print(f"{name} {dtype}: relative error {error:.2e}")
    assert error < attention.LARGEST_ERROR[dtype]
    assert choose(name, SHAPE, CPU, dtype) == name


def test_model_default_is_torch():
    assert find("torch") is attend


def test_absent(monkeypatch):
    for name, package in (("fa3", "fa3_fwd_interface"), ("fa4", "flash_attn"), ("sage", "sageattention")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        monkeypatch.setitem(__import__("sys").modules, "flash_attn_interface", None)
        with pytest.raises(RequestError, match=f"--attention {name}: not here") as caught:
            choose(name, SHAPE, CPU, torch.float32)
        assert "pip install" in caught.value.hint


def test_packages_are_called_as_they_want(monkeypatch):
    """Module paths, layouts and return values, as their published interfaces have them."""
    q, k, v = probe_inputs(SHAPE, CPU, torch.float32)
    modules = {
        "fa3_fwd_interface": types.SimpleNamespace(flash_attn_func=attend),
        "flash_attn.cute": types.SimpleNamespace(flash_attn_func=lambda q, k, v: (attend(q, k, v), None)),
        "sageattention": types.SimpleNamespace(sageattn=lambda q, k, v, tensor_layout: attend(q, k, v)
                                               if tensor_layout == "NHD" else None),
    }  # fmt: skip
    monkeypatch.setattr(attention.importlib, "import_module", modules.__getitem__)
    for name in ("fa3", "fa4", "sage"):
        assert torch.equal(find(name)(q, k, v), attend(q, k, v))

    def only_the_second(module):
        if module == "fa3_fwd_interface":
            raise ModuleNotFoundError(name=module)
        return types.SimpleNamespace(flash_attn_func=lambda q, k, v: attend(q, k, v))

    monkeypatch.setattr(attention.importlib, "import_module", only_the_second)
    assert torch.equal(find("fa3")(q, k, v), attend(q, k, v))


def test_wrong_numbers(monkeypatch):
    add(
        monkeypatch, cudnn=lambda q, k, v: attend(q, k, v) * 1.02, fa3=lambda q, k, v: torch.full_like(q, math.nan),
        fa4=lambda q, k, v: attend(q, k[:, :-1], v[:, :-1]),
    )  # fmt: skip
    for name, said in (("cudnn", "relative error 2.0e-02"), ("fa3", "not finite"), ("fa4", "relative error")):
        with pytest.raises(RequestError, match=f"--attention {name}: wrong numbers here.*{said}"):
            choose(name, SHAPE, CPU, torch.float32)


def test_memory_that_is_left_unwritten(monkeypatch):
    """As a published SageAttention does on Hopper: some rows are whatever lay there before."""
    left = []

    def lazy(q, k, v):
        out = attend(q, k, v).contiguous()
        out[:, -5:-1] = left.pop()[:, -5:-1]  # CPU memory is not handed back as a GPU's allocator does
        return out

    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, **kwargs: left.append(full(*args, **kwargs)) or left[-1])
    add(monkeypatch, flash=lazy)
    with pytest.raises(RequestError, match="not finite"):
        choose("flash", SHAPE, CPU, torch.float32)


def test_a_backend_that_fails(monkeypatch):
    def fails(q, k, v):
        raise RuntimeError("no kernel image\nfor this device")

    add(monkeypatch, efficient=fails)
    with pytest.raises(RequestError, match="fails here: no kernel image for this device"):
        choose("efficient", SHAPE, CPU, torch.float32)


def test_auto_takes_the_fastest_that_is_right(monkeypatch):
    import time

    def slow(seconds, wrong=0.0):
        def function(q, k, v):
            time.sleep(seconds)
            return attend(q, k, v) + wrong
        return function

    def absent(q, k, v):
        raise RuntimeError

    for name in list(BACKENDS):
        monkeypatch.setitem(BACKENDS, name, Backend(BACKENDS[name].find, auto=False))
    add(monkeypatch, cudnn=slow(0.03), flash=slow(0.01), efficient=slow(0, wrong=1.0), fa3=absent)
    monkeypatch.setitem(BACKENDS, "sage", Backend(lambda: slow(0), exact=False, auto=True))
    assert choose("auto", SHAPE, CPU, torch.float32) == "torch"  # nothing is measured on a CPU
    monkeypatch.setattr(attention, "PROBE_FLOPS", {"meta": 0, "cpu": 1e8})
    assert attention.fastest(SHAPE, CPU, torch.float32) == "flash"
    add(monkeypatch, flash=absent, cudnn=absent)
    assert attention.fastest(SHAPE, CPU, torch.float32) == "torch"


def test_auto_is_never_an_approximation():
    assert {name for name, backend in BACKENDS.items() if not backend.exact} == {"sage", "int8", "int8-bf16"}
    assert not any(backend.auto for backend in BACKENDS.values() if not backend.exact)
    for device, capability in (("cpu", None), ("cuda", (8, 0)), ("cuda", (9, 0))):
        resolved = resolve(Precision(), device, capability)
        assert (resolved.weights in ("float32", "bf16"), resolved.scope, resolved.step_cache) == (True, None, 0)


def test_ours_in_8_bits_can_be_asked_for():
    q, k, v = (torch.randn(1, 64, 2, 32) for _ in range(3))
    for name, pv in (("int8", "int8"), ("int8-bf16", "bf16")):
        assert torch.equal(find(name)(q, k, v), attend_8bit_plain(q, k, v, pv))
        assert choose(name, SHAPE, CPU, torch.float32) == name


def test_approximations_leave_cross_attention_exact(monkeypatch):
    monkeypatch.setitem(BACKENDS, "sage", Backend(lambda: reference, exact=False))
    assert attention.functions("sage") == (reference, attend)
    monkeypatch.setitem(BACKENDS, "fa3", Backend(lambda: reference))
    assert attention.functions("fa3") == (reference, reference)


def test_the_choice_reaches_the_model_and_the_record(tiny):
    from wan22.pipeline import Pipeline

    pipeline = Pipeline(tiny, Precision(attention="math"))
    request = pipeline.resolve(pipeline.request("x", width=32, height=32, num_frames=1, num_steps=1, seed=0))
    assert pipeline.record(request)["precision"]["attention"] == "math"
    block = pipeline.experts.get("high_noise_model").blocks[0]
    assert block.self_attn.attend is not attend
    assert block.self_attn.attend is not None
    absent = Pipeline(tiny, Precision(attention="fa4"))
    with pytest.raises(RequestError, match="--attention fa4"):
        absent.resolve(request)
