"""FindClock: the inputs that reach a sine before any token axis."""

from tests.programs import reading_program
from toca_compile.ir.graph import value_of
from toca_compile.ir.program import Program


def test_the_time_is_the_input_behind_a_sine() -> None:
    (clock,) = reading_program().clock
    assert value_of(clock).shape == (2,)


def test_a_gate_is_no_clock(program: Program) -> None:
    assert program.clock == ()
