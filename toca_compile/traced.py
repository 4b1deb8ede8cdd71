"""What Dynamo traced of models, and whose it is: models of one class share it, as far as its guards hold.

Dynamo gives a graph without weights, which are inputs of it. A second model of a class (the other transformer of a
pipeline that has two, one optimised twice) is therefore not traced again: the graph goes through our passes with that
model's policy, session and tensors, as if it had just been traced.
"""

import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import local
from types import TracebackType
from typing import Any, ClassVar

from torch import fx

from toca_compile.backend import (
    compile_lock,
    dynamo_context,
    graph_of,
    guards_hold,
    input_names,
    is_traced_elsewhere,
    remove_from_cache,
)
from toca_compile.runtime.executor import Executor
from toca_compile.session import Session


@dataclass(frozen=True)
class _Argument:
    """Where an input came from. What Dynamo has for that refers to the tensor weakly, and torch swaps none that is
    referred to (``set_swap_module_params_on_conversion``)."""

    source: Any


class Traced:
    """A graph as Dynamo traced it.

    Attributes:
        names: how its inputs are found, if it takes no more to call it without Dynamo's code.
        cached: whether anything of it could be.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        # Dynamo takes away where inputs came from when it has called its backend.
        self._metas = [dict(node.meta) for node in graph.graph.nodes]
        for meta in self._metas:
            if "grapharg" in meta:
                meta["grapharg"] = _Argument(getattr(meta["grapharg"], "source", None))
        self.names = input_names(graph)
        self.cached = False

    def make(self, session: Session, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What a session makes of it, for a model's tensors."""
        for node, meta in zip(self._graph.graph.nodes, self._metas, strict=True):
            node.meta = {**meta, **node.meta}
        made = graph_of(session, self._graph, inputs)
        self.cached |= isinstance(made, Executor)
        return made


class Caller:
    """A session while its model is called: it has something of its own for each graph that was traced.

    Dynamo keeps for as long as the process lives what a backend returns, which refers to nobody, but asks who calls.

    Attributes:
        seen: asked for, the inputs and results of the graphs that run.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.made: dict[Traced, Callable[..., Any]] = {}
        self.seen: list[tuple[Sequence[Any], Sequence[Any]]] | None = None
        self._before: list[Caller | None] = []

    def __enter__(self) -> None:
        self._before.append(_CALLING.now)
        _CALLING.now = self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _CALLING.now = self._before.pop()

    def __call__(self, traced: Traced, inputs: Sequence[Any]) -> Any:
        run = self.made.get(traced)
        if run is None:
            with compile_lock:
                run = self.made[traced] = traced.make(self.session, inputs)
        results = run(*inputs)
        if self.seen is not None:
            self.seen.append((inputs, results))
        return results


class _Calling(local):
    now: Caller | None = None


_CALLING = _Calling()


def context(whole: bool = False) -> Any:
    """As ``dynamo_context``, for whoever calls what is compiled in it. What was compiled in one such context is not
    found in another."""

    def toca_traced(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        caller = _CALLING.now
        if caller is None:
            return graph.forward
        traced = Traced(graph)
        caller.made[traced] = traced.make(caller.session, inputs)
        known = weakref.ref(traced)

        def run(*inputs: Any) -> Any:
            caller, traced = _CALLING.now, known()
            assert caller is not None
            assert traced is not None
            return caller(traced, inputs)

        return run

    return dynamo_context(toca_traced, whole)


def waiting(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of what Dynamo compiles, which waits where another thread is about to trace or compile."""

    def wait(*args: Any) -> Any:
        try:
            return call(*args)
        except RuntimeError as error:
            if not is_traced_elsewhere(error):
                raise
        with compile_lock:
            return call(*args)

    return wait


def _entry(self: Any, args: Any, kwargs: Any) -> Any:  # named as in a method: module paths begin with it
    return call(self, *args, **kwargs)  # type: ignore[name-defined]  # noqa: F821  (a global that Tracing gives)


class Tracing:
    """Calls of one kind, and what Dynamo made of them: a code object of its own, and with it guards of its own, so that
    neither other models of a class nor shapes seen once count towards Dynamo's limits, or stay."""

    alive: ClassVar["weakref.WeakSet[Tracing]"] = weakref.WeakSet()

    def __init__(self, kind: Any, call: Callable[..., Any], context: Any) -> None:
        self.kind = kind
        self.graphs: dict[Traced, None] = {}
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.code = _entry.__code__.replace()
        function = types.FunctionType(self.code, {"__builtins__": __builtins__, "call": call})
        self.call = waiting(context(function))
        weakref.finalize(self, remove_from_cache, self.code).atexit = False
        with compile_lock:
            Tracing.alive.add(self)

    @staticmethod
    def found(kind: Any, *call: Any) -> "Tracing | None":
        """One of the same kind of calls that holds for a call of a model."""
        with compile_lock:
            alike = [tracing for tracing in Tracing.alive if tracing.kind == kind]
        return next((tracing for tracing in alike if tracing.holds(*call)), None)

    def holds(self, model: Any, args: Any, kwargs: Any) -> bool:
        """Whether it is one graph, of the whole model, and Dynamo's guards hold for this one and its inputs."""
        if len(self.graphs) != 1 or not all(traced.cached for traced in self.graphs):
            return False
        return guards_hold(self.code, {"self": model, "args": args, "kwargs": kwargs})
