"""Guards: what a compiler took for granted of a size that is to be open, held against every value that it takes."""

from collections.abc import Sequence
from itertools import chain

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from toca_compile.errors import ExportError
from toca_compile.ir.state import sizes_of
from toca_compile.ir.table import OpenSizes


def hold(env: ShapeEnv, size: sympy.Symbol, numbers: Sequence[Sequence[sympy.Symbol]], sizes: OpenSizes) -> None:
    """That what was taken for granted of a size is true of all that there are, each with the host numbers that the
    variant is called with there.

    Args:
        numbers: of each host number, the sizes that tell it.

    Raises:
        ExportError: it is not; the message has the first guard that is false.
    """
    taken = [guard.expr for guard in env.guards]
    taken += [sympy.Eq(one, env.replace(one)) for one in (size, *chain(*numbers)) if env.replace(one) != one]
    for guard in taken:
        why = _why_not(guard, size, numbers, sizes) if size in guard.free_symbols else None
        if why is not None:
            raise ExportError(
                f"the code would not hold for every {sizes.name}: the compiler takes {guard} for granted, where {why}"
            )


def _why_not(
    guard: sympy.Basic, size: sympy.Symbol, numbers: Sequence[Sequence[sympy.Symbol]], sizes: OpenSizes
) -> str | None:
    asked = [i for i, told in enumerate(numbers) if guard.free_symbols & set(told)]
    parts = [numbers[i] for i in asked]
    if not guard.free_symbols <= {size, *chain(*parts)}:
        return f"{size} is a size from {sizes.values[0]} to {sizes.values[-1]}"

    def true(value: int, told: Sequence[int]) -> bool:
        known = {size: sympy.Integer(value)}
        for symbols, number in zip(parts, told, strict=True):
            known |= dict(zip(symbols, map(sympy.Integer, sizes_of(number)[1:]), strict=True))
        # All at once: one after the other, what is left would be told by the symbols' being positive.
        return bool(guard.xreplace(known) == sympy.true)

    for called in dict.fromkeys(tuple(call[i] for i in asked) for call in sizes.numbers):
        columns = [column for column in called if column is not None]
        if len(columns) < len(called):
            return f"{size} is a size, and only a run tells the numbers beside it"
        for value, *told in dict.fromkeys(zip(sizes.values, *columns, strict=True)):
            # One selected token is as any number to the code, whatever a guard says, as at a fixed size.
            if not true(value, told) and not true(value, [2 if number == 1 else number for number in told]):
                return f"{size} is a size that may be {value}" + (f", with numbers {told} of a step" if told else "")
    return None
