"""Steps that compute one block instead of forty, while that one says that little has changed.

What the blocks add to the residual stream changes slowly from step to step. The first block is always computed; while
its contribution differs little from what it was at the last computed step, the other blocks' contribution is taken to
go on changing as it did between the last two. (First-block caching: ParaAttention, Cheng 2024; after TeaCache, Liu et
al. 2024. Going on in a straight line: TaylorSeer, Liu et al. 2025, of first order.) An approximation: opt-in, with its
threshold in `Precision.step_cache`.

A cache belongs to one run and wraps one expert at a time, from outside. It keeps its numbers apart for each guidance
branch, and drops them with the expert. The step's first branch decides for both: their difference is multiplied by the
guidance, so they had better be of the same age. The first and last steps of each expert are always computed.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan22.model import ContextKV, WanTransformer

# Of each expert, always computed. Its change from the first to the second leads astray (docs/speed.md).
FIRST_STEPS, LAST_STEPS = 3, 1
MOST_SKIPPED = 2  # in a row: a straight line leads no further (docs/speed.md)
COMPARED_TOKENS = 4096  # of the first block's contribution, evenly spread: comparing all would tell the same


@dataclass
class _Branch:
    """What the last computed step left: its number, the first block's contribution [B, ≤ COMPARED_TOKENS, E] float32,
    the other blocks' [B, L, E] in the weights' dtype, and its change a step since the one computed before, where there
    was one. context: whose branch it is, held so that nothing else takes its identity."""

    context: ContextKV
    index: int
    first: Tensor
    rest: Tensor
    change: Tensor | None


class StepCache:
    """threshold: mean |change of the first block's contribution| ÷ mean |contribution|, below which the rest is not
    computed; at 0 nothing is ever skipped. agree: these two sums of this process's tokens → those of all that work on
    the video together, who must decide alike; asked once a step, by all or none of them."""

    def __init__(
        self, threshold: float, agree: Callable[[list[float]], list[float]] = lambda sums: sums
    ) -> None:
        self.threshold, self._agree = threshold, agree
        self.skipped = 0  # steps
        self._model: weakref.ref[WanTransformer] | None = None
        self._branches: dict[int, _Branch] = {}
        self._index, self._may_skip, self._skip = 0, False, None  # type: int, bool, bool | None

    def attach(self, model: WanTransformer) -> None:
        """Wrap this expert, with nothing remembered."""
        self.detach()
        if self.threshold:
            # Weak, or the module would hold itself and its weights till the garbage collector comes.
            self._model = weakref.ref(model)
            setattr(model, "run_blocks", functools.partial(self._run_blocks, self._model))  # noqa: B010

    def detach(self) -> None:
        """Leave the expert as it was, and remember nothing."""
        if self._model and (model := self._model()):
            del model.run_blocks
        self._model = None
        self._branches.clear()

    def begin_step(self, index: int, may_skip: bool) -> None:
        """The evaluations from now on are of the step of this number."""
        self._index, self._may_skip, self._skip = index, may_skip, None

    def end_step(self) -> bool:
        """Whether the step was computed, and not taken from an earlier one."""
        self.skipped += bool(self._skip)
        return not self._skip

    def change(self, now: Tensor, before: Tensor) -> float:
        """Of the first block's contribution, relative."""
        changed, size = self._agree(torch.stack(((now - before).abs().sum(), before.abs().sum())).tolist())
        return changed / size if size else float("inf")

    def _run_blocks(
        self, held: "weakref.ref[WanTransformer]", x: Tensor, time: Tensor, rope: tuple[Tensor, Tensor],
        context: ContextKV,
    ) -> Tensor:  # fmt: skip
        """As WanTransformer.run_blocks; x is overwritten."""
        model = held()
        assert model is not None
        branch, stride = self._branches.get(id(context)), max(1, x.shape[1] // COMPARED_TOKENS)
        before = x[:, ::stride].clone()
        (head, *blocks), (keys_values, *others) = model.blocks, context
        x = head(x, time, rope, keys_values)
        first = x[:, ::stride] - before
        if self._skip is None:
            known = self._may_skip and branch is not None
            self._skip = known and self.change(first, branch.first) < self.threshold  # type: ignore[union-attr]
        if self._skip and branch is not None:
            x.add_(branch.rest)
            return x if branch.change is None else x.add_(branch.change, alpha=self._index - branch.index)
        rest = x.clone()
        for block, keys_values in zip(blocks, others, strict=True):
            x = block(x, time, rope, keys_values)
        rest = torch.sub(x, rest, out=rest).to(model.dtype)
        change = None
        if branch is not None:
            branch.change = None  # let go first
            change = (rest - branch.rest).div_(self._index - branch.index)
        self._branches[id(context)] = _Branch(context, self._index, first, rest, change)
        return x


def always_computed(experts: Sequence[str]) -> set[int]:
    """experts: whose turn it is, step by step → the steps that no cache may skip."""
    computed: set[int] = set()
    for _, turn in itertools.groupby(range(len(experts)), key=lambda index: experts[index]):
        steps = list(turn)
        computed |= {*steps[:FIRST_STEPS], *steps[-LAST_STEPS:]}
    return computed
