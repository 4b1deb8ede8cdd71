"""The table of axis rules.

A rule says, for one op, what happens to the dimensions (``axes``), which arguments state the size of the result and
must shrink with it (``size_arg``), what the op costs (``work``), and it brings sample calls, so that
one property test covers every rule: ``op(x)[idx] == op(x[idx])`` along each label that the rule calls carried, and a
counterexample along each that it calls mixed. Samples draw every argument that can move elements: widths, shifts, dims,
equations.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from math import prod
from random import Random
from typing import Any

from torch import fx
from torch._ops import OpOverload

from toca_compile.errors import RuleError
from toca_compile.ir.calls import Call
from toca_compile.ir.spec import AxisSpec

Args = tuple[tuple[Any, ...], dict[str, Any]]
Sample = Callable[[Random], Args]


class Work(Enum):
    """Arithmetic of an op, in the classes that the published FLOPs counts use (ToCa's counting rules)."""

    NONE = 0
    NORM = 2  # per element of the result
    SOFTMAX = 5  # per element of the result
    GELU = 6  # per element of the result
    CONTRACT = -1  # 2 per combination of all labels
    ATTENTION = -2  # both contractions and the softmax of a fused attention


@dataclass(frozen=True)
class Rule:
    """What the compiler knows about one op."""

    op: OpOverload
    axes: Callable[[Call], AxisSpec]
    samples: tuple[Sample, ...]
    size_arg: int | tuple[int, ...] | None = None  # several: they list the sizes of the first dimension's equal parts
    pointwise: bool = False
    trailing: bool = False  # acts on the last dimensions, however many stand before them
    work: Work = Work.NONE

    def spec(self, call: Call) -> AxisSpec:
        """What the op does to the dimensions of one call.

        Raises:
            RuleError: the rule does not cover this call: it raised, or what it says does not fit the operands.
        """
        try:
            spec = self.axes(call)
            said = [tuple(prod(spec.sizes[x] for x in dim) for dim in dims) for dims in (*spec.operands, *spec.results)]
        except Exception as error:  # a rule may be anyone's: whatever it raises, it says nothing of this call
            raise RuleError(f"the rule of {self.op} does not cover this call: {error!r}") from error
        if said != [*call.operands, *call.results]:
            raise RuleError(f"the rule of {self.op} speaks of shapes {said}, not {[*call.operands, *call.results]}")
        return spec

    @property
    def any_rank(self) -> bool:
        """Whether leading dimensions may be merged without a change to the op's arguments."""
        return self.pointwise or self.trailing or isinstance(self.size_arg, int)


RULES: dict[OpOverload, Rule] = {}


def work_of(node: fx.Node) -> Work:
    """The arithmetic of a node of a graph; none where it is no op, or has no rule."""
    rule = RULES.get(node.target) if node.op == "call_function" else None  # type: ignore[call-overload]
    return rule.work if rule is not None else Work.NONE


def is_foreign(node: fx.Node) -> bool:
    """Whether a node is an op of another library, of which no rule tells what it does."""
    op = node.target
    return isinstance(op, OpOverload) and op not in RULES and op.namespace not in ("aten", "prims", "prim")


def computes(node: fx.Node) -> bool:
    """Whether what a node makes is worth keeping: a product, an attention, or whatever another library's op does."""
    return work_of(node) in (Work.CONTRACT, Work.ATTENTION) or is_foreign(node)


def register(
    ops: OpOverload | Iterable[OpOverload],
    *samples: Sample,
    size_arg: int | tuple[int, ...] | None = None,
    pointwise: bool = False,
    trailing: bool = False,
    work: Work = Work.NONE,
) -> Callable[[Callable[[Call], AxisSpec]], Callable[[Call], AxisSpec]]:
    """Decorator: the function is the axis rule of ``ops``.

    Raises:
        RuleError: an op has a rule already.
    """
    listed = [ops] if isinstance(ops, OpOverload) else list(ops)

    def add(axes: Callable[[Call], AxisSpec]) -> Callable[[Call], AxisSpec]:
        for op in listed:
            if op in RULES:
                raise RuleError(f"{op} has a rule already")
            RULES[op] = Rule(op, axes, samples, size_arg, pointwise, trailing, work)
        return axes

    return add
