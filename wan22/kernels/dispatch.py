"""Which form of an operation runs: Triton's on a GPU in inference, the plain one anywhere else.

`WAN22_KERNELS` overrides it: `plain` keeps the defining forms on a GPU too, `triton` asks for Triton's on any device,
which on a CPU means its interpreter (`TRITON_INTERPRET=1`, set before this is imported): slow, and for tests.
"""

import os
from typing import Any

import torch
from torch import Tensor

from wan22.config import RequestError

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system: what a kernel's definition asks for, so that its file can be read
    triton = None  # type: ignore[assignment]

    class tl:  # type: ignore[no-redef]
        constexpr = object


MODES = ("auto", "plain", "triton")
MODE = os.environ.get("WAN22_KERNELS") or "auto"


def jit(kernel: Any) -> Any:
    """`triton.jit`, or nothing where there is no Triton. A kernel's arguments bear no types, which Triton would look up
    while it compiles: tensors are pointers to their first element, `tl.constexpr` is known when it compiles."""
    return kernel if triton is None else triton.jit(kernel)


def use_triton(*tensors: Tensor) -> bool:
    """Whether these inputs go to the Triton form: a GPU, and no gradient wanted. Raises RequestError."""
    if MODE not in MODES:
        raise RequestError(f"WAN22_KERNELS={MODE}: unknown", hint=f"known: {', '.join(MODES)}")
    if MODE == "triton" and triton is None:
        raise RequestError("WAN22_KERNELS=triton: there is no Triton here", hint="pip install triton")
    if MODE == "plain" or triton is None or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return False
    return MODE == "triton" or tensors[0].is_cuda


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def row_block(width: int) -> dict[str, int]:
    """Launch options of kernels whose program holds one row of `width` float32 numbers in registers.

    The block is the next power of two, the rest masked: at 5120 the masked part costs no traffic, only predicated
    instructions. 8 warps leave a row of 5120 twenty numbers a thread, so that several rows are in flight on a
    multiprocessor.
    """
    block = max(16, 1 << (width - 1).bit_length())
    return {"BLOCK": block, "num_warps": WARPS or min(16, max(1, block // 1024))}


WARPS = 0  # of row kernels; 0: by width. For measurements.
