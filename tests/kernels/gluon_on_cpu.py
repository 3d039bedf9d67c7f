"""What attention_hopper.py uses of Gluon, on a CPU: threads for the warp groups, and a product that reads its tiles
only when it is waited for, so that a tile overwritten too early, a result used too early and a wait that never ends
show as they would on the chip. Layouts mean nothing here: that they fit, the compiler says (test_compile.py).
"""

import importlib.util
import itertools
import random
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import torch

from wan22.kernels import attention_hopper

SECONDS = 20  # a wait that takes so long does not end
FAILURES: list[BaseException] = []  # of the program that runs


class Block(torch.Tensor):
    """A tensor in registers."""


def block(tensor):
    return tensor.as_subclass(Block)


class Pointer:
    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset):
        return Pointer(self.tensor, self.offset + offset)


def load(pointer, mask=None, other=None):
    at = torch.as_tensor(pointer.offset)
    inside = torch.ones_like(at, dtype=torch.bool) if mask is None else mask
    flat = pointer.tensor.view(-1)
    values = flat[torch.where(inside, at, 0)]
    return block(values if mask is None else torch.where(inside, values, other))


def store(pointer, values, mask):
    at, inside = torch.broadcast_tensors(pointer.offset, mask)
    pointer.tensor.view(-1)[at[inside]] = values.as_subclass(torch.Tensor)[inside]


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self):
        self.changed, self.phase, self.count, self.missing, self.bytes = threading.Condition(), 0, 0, 0, 0

    def init(self, count):
        self.count = self.missing = count

    def change(self, arrivals, length):
        with self.changed:
            self.missing -= arrivals
            self.bytes += length
            assert self.missing >= 0, "one arrival too many"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity):
        until = time.monotonic() + SECONDS
        with self.changed:
            while self.phase % 2 == parity:
                late = FAILURES or time.monotonic() > until
                assert not late, f"a barrier's phase {parity} does not end"
                self.changed.wait(0.01)


class Shared:
    def __init__(self, parts):
        self.parts = parts

    def index(self, at):
        return self.parts[int(at)]


def allocate_shared_memory(dtype, shape, layout):
    if layout == "barriers":
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(list(torch.randint(-99, 99, shape, dtype=dtype)))


class Descriptor:
    def __init__(self, tensor, shape):
        self.tensor, self.shape, self.layout, self.dtype = tensor, shape, "tiles", tensor.dtype

    def copy(self, coordinates, barrier, place):
        time.sleep(random.random() / 2000)
        row, column = (int(at) for at in coordinates)
        part = self.tensor[row : row + self.shape[0], column : column + self.shape[1]]
        place.zero_()
        place[: part.shape[0], : part.shape[1]] = part
        barrier.change(0, -place.numel())


class Product:
    """One under way: it has read nothing yet."""

    def __init__(self, a, b, sums, use_acc):
        self.a, self.b, self.sums, self.use_acc, self.value = a, b, sums, use_acc, None

    def finish(self):
        assert self.value is None
        self.value = block((self.a.double() @ self.b.double()).to(torch.int32).as_subclass(torch.Tensor))
        sums = self.sums.value if isinstance(self.sums, Product) else self.sums
        assert self.value.shape == sums.shape
        if self.use_acc:
            self.value = self.value + sums


UNDER_WAY = threading.local()


def warpgroup_mma(a, b, sums, use_acc, is_async):
    assert is_async
    time.sleep(random.random() / 2000)
    product = Product(a, b, sums, use_acc)
    UNDER_WAY.products = [*getattr(UNDER_WAY, "products", []), product]
    return product


def warpgroup_mma_wait(outstanding, deps):
    left = len(UNDER_WAY.products) - outstanding
    for product in UNDER_WAY.products[:left]:
        product.finish()
    UNDER_WAY.products = UNDER_WAY.products[left:]
    return deps[0].value


def warp_specialize(functions, warps, registers):
    assert len(functions) == len(warps) + 1 == len(registers) + 1
    FAILURES.clear()
    TURNS.clear()
    inference = torch.is_inference_mode_enabled()

    def run(function, args):
        try:
            with torch.inference_mode(inference):
                function(*args)
        except BaseException as why:
            FAILURES.append(why)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if FAILURES:
        raise FAILURES[0]


TURNS: dict[str, Barrier] = {}  # hardware barriers of the program that runs, by number: one waits, one lets


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    """The two that there are, known by their instructions: PTX is not read."""
    lines = [line.split() for line in asm.splitlines() if line[-1:] == ";"]
    names = [line[0] for line in lines]
    if names == [".reg", "cvt.rn.f16x2.f32", "cvt.rn.f16x2.f32", "prmt.b32"]:
        assert (constraints, pack, is_pure) == ("=r,r,r,r,r", 4, True)
        return block((args[0].half().view(torch.int16) & 0xFF).to(dtype))
    what = next(name for name in names if name.startswith("bar."))
    assert not is_pure
    registers = constraints.count(",") // 2 + 1
    assert pack * dtype.itemsize == 4 * registers
    if what == "bar.sync":
        assert (args[0] >= 0).all(), "a sign bit is set, and the barrier another one"
    barrier = TURNS.setdefault(next(line[-1] for line in lines if line[0] == "add.u32"), Barrier())
    with barrier.changed:
        if not barrier.count:
            barrier.init(2)
        phase = barrier.phase % 2
    barrier.change(1, 0)
    if what == "bar.sync":
        barrier.wait(phase)
    return args[0]


class Kernel:
    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __getitem__(self, grid):
        def run(*args, num_warps, **constants):
            args = [Pointer(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            for LANGUAGE.place in itertools.product(*(range(size) for size in grid)):
                self.function(*args, **constants)

        return run


LANGUAGE = SimpleNamespace(
    constexpr=lambda value: value, int8=torch.int8, int32=torch.int32, int64=torch.int64, float32=torch.float32,
    NVMMASharedLayout=lambda **_: None, NVMMADistributedLayout=lambda *_: None, DotOperandLayout=lambda **_: None,
    SliceLayout=lambda *_: None, DistributedLinearLayout=lambda **_: None, cdiv=lambda a, b: -(-a // b),
    static_range=range, barrier=lambda: None, split=lambda x: x.unbind(-1),
    program_id=lambda axis: block(torch.tensor(LANGUAGE.place[axis])), load=load, store=store,
    arange=lambda start, end, _: block(torch.arange(start, end)),
    zeros=lambda shape, dtype, _: block(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, value, dtype, _: block(torch.full(shape, value, dtype=dtype)),
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), maximum=torch.maximum, exp2=torch.exp2,
    where=torch.where, convert_layout=lambda x, _: x, inline_asm_elementwise=inline_asm_elementwise,
    allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize,
)  # fmt: skip
HOPPER = SimpleNamespace(
    fence_async_shared=lambda: None, warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
    mbarrier=SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, parity, pred=True: barrier.wait(parity) if pred else None,
        arrive=lambda barrier, pred=True: barrier.change(1, 0) if pred else None,
        expect=lambda barrier, length: barrier.change(1, length),
    ),
    tma=SimpleNamespace(async_load=lambda descriptor, *rest: descriptor.copy(*rest)),
    TensorDescriptor=SimpleNamespace(from_tensor=lambda tensor, shape, _: Descriptor(tensor, shape)),
)  # fmt: skip


def attention_on_cpu():
    """attention_hopper.py once more, with this in Gluon's place."""
    names = "triton.experimental", "gluon", "language", "nvidia", "hopper"
    paths = ["triton.experimental.gluon.nvidia.hopper", *(".".join(names[: end + 1]) for end in range(len(names)))]
    fakes = {path: ModuleType(path) for path in paths}
    for path, fake in fakes.items():
        vars(fake).update(vars(HOPPER if path.endswith("hopper") else LANGUAGE))
    gluon = fakes["triton.experimental.gluon"]
    gluon.jit, gluon.language = Kernel, LANGUAGE
    fakes["triton.experimental"].gluon = gluon
    spec = importlib.util.spec_from_file_location("attention_hopper_on_cpu", attention_hopper.__file__)
    module = importlib.util.module_from_spec(spec)
    before = {path: sys.modules.get(path) for path in fakes}
    try:
        sys.modules.update(fakes)
        spec.loader.exec_module(module)
    finally:
        for path, real in before.items():
            if real is None:
                del sys.modules[path]
            else:
                sys.modules[path] = real
    assert module.GLUON
    return module
