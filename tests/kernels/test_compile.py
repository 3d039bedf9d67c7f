"""Every kernel compiles for Ampere and Hopper, on a machine without either: what the interpreter lets pass, such as a
name that Triton cannot see, the compiler does not. In a process of its own, where nothing is interpreted."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from wan22.kernels import attention_hopper, dispatch

SCRIPT = """
import importlib
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

norm, residual, rope, gelu, rows, product, attention, silu, double = (
    importlib.import_module(f"wan22.kernels.{name}") for name in ("norm_modulate", "gated_residual", "qk_norm_rope",
    "gelu", "quantize_rows", "product_8bit", "attention_8bit", "norm_silu", "double_pixels"))
row = {"C": 320, "BLOCK": 512, "LARGEST": 0}
turned_row = {"C": 320, "BLOCK": 512}
EIGHT = ((448.0, "*fp8e4nv"), (127.0, "*i8"))
block = {"D": 64, "ROWS": 64, "COLUMNS": 64, "SHIFT": 8.0, "v_token": 1}
pixel = {"C": 96, "BLOCK": 128, "PIXELS": 16}
FLAGS = ("GATED", "NORMED", "PLUS_ONE")
VALUES = {"x": "*bf16", "y": "*bf16", "q": "*i8", "k": "*i8", "eps": "fp32", "multiply": "fp32", "root": "fp32",
          "normed": "*bf16"}
WORK = [  # kernel, constants, tensors whose dtype is not float32
    (norm._kernel, row, {"x": "*fp32", "out": "*bf16"}),
    *((norm._kernel, row | {"LARGEST": most}, {"x": "*fp32", "out": kind}) for most, kind in EIGHT),
    *((residual._kernel, row | dict(zip(FLAGS, flags)), {"x": "*fp32"}) for flags in ((1, 1, 0), (0, 1, 1), (1, 0, 0))),
    *((residual._kernel, row | dict(zip(FLAGS, (1, 1, 0))) | {"LARGEST": most}, {"x": "*fp32", "normed": kind})
      for most, kind in EIGHT),
    *((rope._kernel, turned_row | {"HALF": 32, "ROPE": turned}, {"out": "*bf16"}) for turned in (True, False)),
    (gelu._kernel, {"BLOCK": 1024}, {"out": "*bf16"}),
    *((kernel, row | {"LARGEST": most}, {"out": kind}) for most, kind in EIGHT
      for kernel in (gelu._quantize_kernel, rows._kernel)),
    *((product._kernel, {"C": 320, "GROUP": 8, **{name: number for name, number in blocks.items() if name.isupper()}},
       {"x": "*i8", "weight": "*i8", "bias": "*bf16", "out": "*bf16"}) for blocks in (product.LARGE, product.SMALL)),
    *((attention._rotate_kernel, {"D": 64, "ROWS": 64, "BLOCK": shared, "BLOCKS": 8}, {"out": "*i8"})
      for shared in (True, False)),
    (attention._statistics_kernel, {"D": 64, "ROWS": 64, "CHUNK": 1024}, {"x": "*bf16", "parts": "*fp32"}),
    *((attention._transpose_kernel, {"D": 64, "ROWS": 64, "LARGEST": most, "ORDERED": ordered},
       {"v": "*bf16", "out": kind}) for ordered, (most, kind) in ((False, EIGHT[0]), (True, EIGHT[1]))),
    *((attention._attend_kernel, block | {"PV": pv}, {"v": kind, "out": "*bf16"})
      for pv, kind in enumerate(("*bf16", "*fp8e4nv", "*i8"))),
    *((silu._kernel, pixel | dict(zip(("NORMED", "SUMMED", "BIASED", "KEPT"), flags)),
       {"x": "*fp32", "out": "*bf16", "bias": "*bf16"})
      for flags in ((1, 0, 0, 0), (1, 0, 1, 0), (1, 1, 1, 1), (0, 1, 1, 0))),
    *((double._kernel, pixel | {"EACH": each, "SUMMED": 2 - each, "BIASED": 1}, {"x": "*fp32", "out": "*bf16"})
      for each in (1, 2)),
]
POINTERS = ("x", "y", "q", "k", "v", "out", "gate", "shift", "scale", "new_x", "normed", "weight", "cos", "sin", "mean",
            "factor", "matrix", "q_scale", "k_scale", "v_scale", "v_mean", "out_scale", "normed_scale", "x_scale",
            "weight_scale", "bias", "gamma", "total")
for capability in (80, 90):
    for kernel, constants, kinds in WORK:
        kinds = VALUES | kinds
        if capability < 89 and "*fp8e4nv" in kinds.values():
            continue
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32" if name in POINTERS else "i32")
                     for name in names}
        aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        print(capability, kernel.__module__, compiled.metadata.shared, len(compiled.asm["cubin"]))
from wan22.kernels import attention_hopper as hopper
if hopper.GLUON:
    from triton.experimental.gluon._runtime import GluonASTSource
    for width in hopper.DIMS:
        constants = {"D": width, "ROWS": hopper.QUERIES, "COLUMNS": hopper.TILE, "SLOTS": hopper.SLOTS}
        shapes = {"q": (hopper.QUERIES, width), "k": (hopper.TILE, width), "v": (width, hopper.TILE)}
        kinds = {name: f"tensordesc<i8[{height}, {across}],{hopper.tile(across)!r}>"
                 for name, (height, across) in shapes.items()} | {"out": "*bf16"}
        names = hopper.attend_kernel.arg_names
        signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32" if name in POINTERS else "i32")
                     for name in names}
        aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name].startswith("*")}
        source = GluonASTSource(hopper.attend_kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        ptx = compiled.asm["ptx"]
        assert ptx.count("wgmma.wait_group.sync.aligned 1") == 4, "a block's scores are multiplied together"
        # Probabilities stay with their threads: blocks exchange the largest of each of two rows; at the end, a sum.
        assert ptx.count("shfl.sync") == 1 + 2 * (2 * 4 + 4), "a warp's number; two warpgroups: loop, last block, end"
        assert "stmatrix" not in ptx
        print(90, hopper.attend_kernel.__module__, compiled.metadata.shared, len(compiled.asm["cubin"]))
"""


def test_kernels_compile(tmp_path):
    if dispatch.triton is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    (tmp_path / "compile_all.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", tmp_path / "compile_all.py"], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len([line for line in lines if "attention_hopper" not in line]) == 56
    assert len(lines) - 56 == 2 * attention_hopper.GLUON
