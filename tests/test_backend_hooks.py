"""Canaries: what ``backend.py`` takes from Dynamo that is not public. One test a hook, named after it; where one fails, a
version of torch has changed it, and the file says what depends on it."""

import re
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from toca_compile import backend
from toca_compile.backend import (
    BackendCompilerFailed,
    OptimizedModule,
    TorchDynamoException,
    compile_lock,
    compiled_module,
    dynamo_limits,
    guards_hold,
    input_names,
    is_traced_elsewhere,
    remove_from_cache,
    sizes_followed,
    skip_code,
    split_by_sizes,
    uninlined,
    why_not_asked,
    why_recompiled,
)

ROOT = Path(__file__).resolve().parent.parent
seen: list[Any] = []


def record(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    seen.append(gm)
    return gm.forward


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    seen.clear()


def test_optimized_module() -> None:
    """Keeps the model as ``_orig_mod`` and its context as ``dynamo_ctx``; ``_initialize`` chooses what is called."""
    model = nn.Linear(2, 2)
    wrapped = torch.compile(model, backend=record)
    assert isinstance(wrapped, OptimizedModule)
    assert wrapped._orig_mod is model
    assert callable(wrapped.dynamo_ctx)
    assert "_initialize" in vars(OptimizedModule)


def test_remove_from_cache() -> None:
    """Forgets what was compiled of a code object."""

    def double(x: Tensor) -> Tensor:
        return x * 2

    compiled = torch._dynamo.optimize(record, dynamic=False)(double)
    for _ in range(2):
        compiled(torch.ones(2))
    assert len(seen) == 1
    remove_from_cache(double.__code__)
    compiled(torch.ones(2))
    assert len(seen) == 2


class Linear(nn.Module):
    """Keeps its last input where it is asked to."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.inner, self.keeps = nn.Linear(2, 2), keeps

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        """The linear, scaled."""
        if self.keeps:
            self.last = x
        made = []
        made.append(self.inner(x) * scale)  # a list of its own is no effect
        return {"out": made[0]}


def test_input_names() -> None:
    """An expression for each input of the graph; none where the code has effects."""
    told: list[Any] = []

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        told.append((input_names(gm), inputs))
        return gm.forward

    def call(self: Any, args: Any, kwargs: Any) -> Any:
        return self(*args, **kwargs)

    for keeps in (False, True):
        model, args, kwargs = Linear(keeps), (torch.ones(2),), {"scale": torch.ones(1)}
        with torch.no_grad():
            torch._dynamo.optimize(look, dynamic=False)(call)(model, args, kwargs)
        names, inputs = told[-1]
        if keeps:
            assert names is None
        else:
            scope = {"L": {"self": model, "args": args, "kwargs": kwargs}}
            assert all(eval(name, dict(scope)) is value for name, value in zip(names, inputs, strict=True))
            assert len(names) == 4


def test_guards_hold() -> None:
    """Whether what Dynamo made of a function is right for other local variables; of two things it is not asked."""

    def double(x: Tensor) -> Tensor:
        return x * 2

    assert not guards_hold(double.__code__, {"x": torch.ones(2)})
    compiled = torch._dynamo.optimize(record, dynamic=False)(double)
    compiled(torch.ones(2))
    assert guards_hold(double.__code__, {"x": torch.zeros(2)})
    assert not guards_hold(double.__code__, {"x": torch.zeros(3)})
    with torch.enable_grad():
        assert not guards_hold(double.__code__, {"x": torch.zeros(2, requires_grad=True)})
    compiled(torch.ones(3))
    assert not guards_hold(double.__code__, {"x": torch.zeros(2)})


def test_compile_lock() -> None:
    """Whoever has it may go on compiling, and no other thread begins to."""

    def double(x: Tensor) -> Tensor:
        return x * 2

    def elsewhere() -> None:
        torch._dynamo.optimize(record, dynamic=False)(double)(torch.ones(2))

    with compile_lock:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(0.5)
        assert not seen
        torch._dynamo.optimize(record, dynamic=False)(lambda x: x * 3)(torch.ones(2))
        assert len(seen) == 1
    thread.join(30)
    assert len(seen) == 2


def test_is_traced_elsewhere() -> None:
    """What torch says where a compiled function is called while something is traced, in whatever thread."""
    compiled, started, over = torch._dynamo.optimize(record)(lambda x: x * 2), threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        started.set()
        over.wait(30)
        return x

    thread = threading.Thread(target=torch.fx.symbolic_trace, args=(slow,))
    thread.start()
    started.wait(30)
    with pytest.raises(RuntimeError) as raised:
        compiled(torch.ones(2))
    over.set()
    thread.join()
    assert is_traced_elsewhere(raised.value)
    assert not is_traced_elsewhere(RuntimeError("out of memory"))
    compiled(torch.ones(2))
    assert len(seen) == 1


def test_skip_code() -> None:
    """A function so marked is run as it is, and what it calls is compiled."""

    def double(x: Tensor) -> Tensor:
        return x * 2

    def outer(x: Tensor) -> Tensor:
        return double(x + 1)

    skip_code(outer.__code__)
    torch._dynamo.optimize(record, dynamic=False)(outer)(torch.ones(2))
    (graph,) = seen
    assert [n.target.__name__ for n in graph.graph.nodes if n.op == "call_function"] == ["mul"]


def test_guard_failures() -> None:
    """Of a function that is compiled anew, by its code: the check that failed."""
    factors = [2]

    def scaled(x: Tensor) -> Tensor:
        return x * factors[0]

    compiled = torch._dynamo.optimize(record, dynamic=False)(scaled)
    compiled(torch.ones(2))
    assert why_recompiled(scaled.__code__) == ""
    factors[0] = 3
    compiled(torch.ones(2))
    assert len(seen) == 2
    assert "== 2" in why_recompiled(scaled.__code__)


def test_uninlined() -> None:
    """What such a function compiles is asked of its own backend, where what calls it is compiled by another."""
    compiled = torch._dynamo.optimize(record, dynamic=False)(lambda x: x * 2)
    inner = uninlined(lambda x: compiled(x))
    outer = torch.compile(lambda x: inner(x + 1) - 1, backend="eager")
    assert torch.equal(outer(torch.ones(2)), torch.full((2,), 3.0))
    assert len(seen) == 1


def test_peek_interpreter_stack() -> None:
    """There is one within a transform of torch.func alone."""
    said: list[str] = []

    def look(x: Tensor) -> Tensor:
        said.append(why_not_asked())
        return x

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    assert not said[0]
    assert "torch.func" in said[1]


def test_code_objects_have_caches_of_their_own() -> None:
    """A copy of a function's code is compiled apart: the model's signatures rest on it."""

    def double(x: Tensor) -> Tensor:
        return x * 2

    for _ in range(3):
        own = types.FunctionType(double.__code__.replace(), {"__builtins__": __builtins__})
        torch._dynamo.optimize(record, dynamic=False)(own)(torch.ones(2))
    assert len(seen) == 3


def test_fn_of_compile_wrapper() -> None:
    """The frame that calls a compiled model, in which ``fn`` is bound to the model."""
    found: list[Any] = []

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(compiled_module())
        return gm.forward

    class Twice(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model, own = Twice(), Twice()
    torch.compile(model, backend=look)(torch.ones(2))
    torch._dynamo.reset()
    own.compile(backend=look)
    own(torch.ones(2))
    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=look)(torch.ones(2))
    assert found == [model, own, None]


def test_backend_compiler_failed() -> None:
    """Wraps what a backend raises, as ``inner_exception``."""
    error = ValueError("mine")

    def fails(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        raise error

    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(lambda x: x + 1, backend=fails)(torch.ones(2))
    assert caught.value.inner_exception is error


def test_config_patch() -> None:
    """Sets Dynamo's limits for a while."""
    before = torch._dynamo.config.recompile_limit
    with dynamo_limits({"recompile_limit": 77}):
        assert torch._dynamo.config.recompile_limit == 77
    assert torch._dynamo.config.recompile_limit == before


def test_sizes_that_follow_from_values() -> None:
    """Dynamo splits a function at them and counts that, or follows them."""

    def there(x: Tensor) -> Tensor:
        return x[x > 0].sum() * 2

    x, before = torch.tensor([1.0, -1.0]), split_by_sizes()
    assert torch._dynamo.optimize(record, dynamic=False)(there)(x) == 2
    assert split_by_sizes() == before + 1
    torch._dynamo.reset()
    seen.clear()
    with dynamo_limits(sizes_followed(True)):
        assert torch._dynamo.optimize(record, dynamic=False)(there)(x) == 2
    assert len(seen) == 1
    assert split_by_sizes() == before + 1


def test_torch_dynamo_exception() -> None:
    """Raised by a function that is to be one graph and cannot be: by a break, and by a choice that follows from values."""

    def chooses(x: Tensor) -> Tensor:
        rows = x[x.sum(1) > 0][None, None]
        return torch.nn.functional.scaled_dot_product_attention(rows, rows, rows)

    for breaks in (lambda x: torch._dynamo.graph_break() or x, chooses):
        with pytest.raises(TorchDynamoException), dynamo_limits(sizes_followed(True)):
            torch._dynamo.optimize(record, nopython=True, dynamic=False)(breaks)(torch.ones(4, 4))


def test_compile_subgraph_reason() -> None:
    """Of a graph before a break: why, and at which line of the user's."""

    def breaks(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch.compile(breaks, backend=record)(torch.ones(2))
    reason = seen[0].compile_subgraph_reason
    assert reason.graph_break
    assert str(reason.reason)
    assert reason.user_stack[-1].filename == __file__


def test_grapharg_source() -> None:
    """Tells inputs that belong to the model from those of a call."""
    found: list[tuple[bool, ...]] = []

    def asks(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(backend._static_inputs(gm, [None] * len(inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(nn.Linear(2, 2), backend=asks)(torch.ones(1, 2))
    assert sorted(found[0]) == [False, True, True]


def test_frame_of_the_backends_caller() -> None:
    """A string backend is called by the object that stands for one torch.compile call."""
    owners = []

    def asks(gm: torch.fx.GraphModule, inputs: Any, *, options: Any = None) -> Any:
        owners.append(sys._getframe(1).f_locals.get("self"))
        return gm.forward

    first, second = (torch.compile(lambda x: x + 1, backend=asks, options={"a": i}) for i in range(2))
    for compiled in (first, second):
        compiled(torch.ones(2))
        compiled(torch.ones(3))
    assert None not in owners
    assert owners[0] is owners[1]
    assert owners[-1] is not owners[0]


def test_compile_wrapper() -> None:
    """The frame between the user's call of a compiled function and Dynamo: what lies below is no fragment."""
    names: list[str] = []

    def looks(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        frame = sys._getframe(1)
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        return gm.forward

    torch.compile(lambda x: x + 1, backend=looks)(torch.ones(2))
    assert "compile_wrapper" in names


def test_lookup_backend() -> None:
    """Inductor as a backend, for graphs that are not cached."""
    assert callable(lookup_backend("inductor"))


def test_no_other_file_reaches_into_dynamo() -> None:
    allowed = {
        "toca_compile/backend.py",
        "toca_compile/lowerings/inductor.py",  # sources of symbols
        "toca_compile/quality/evaluation.py",  # counters
        "toca_compile/compiler/emit_step.py",  # a size of which nothing may be taken for granted, ``mark_unbacked``
    }
    for path in [*(ROOT / "toca_compile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        name = str(path.relative_to(ROOT))
        assert name in allowed or not re.search(r"torch\._dynamo|_getframe", path.read_text()), name
