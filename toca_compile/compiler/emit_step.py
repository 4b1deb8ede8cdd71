"""EmitStep: a table of steps (``lay_out.py``) as one graph, which finds out by itself what the step is to do.

Each kind of step is a branch, and calls the variants as ever, each of them one submodule. It returns what it changes,
since what is written inside a branch may be lost where the branch is compiled::

    row  = plan[step]
    out, cache0, cache1 = cond(row[0] < 1, kind0, cond(row[0] < 2, kind1, kind2))
    cache0.copy_(…); cache1.copy_(…); step += 1

From torch 2.14 on ``switch(row[0], (kind0, kind1, kind2))`` is in the place of the branches within branches.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, fx, nn

from toca_compile.compiler.lay_out import Entry, LaidOut
from toca_compile.errors import PolicyError, VerifyError
from toca_compile.ir.anchors import ONE, Ring
from toca_compile.ir.graph import is_mutable
from toca_compile.ir.history import CacheSpec, History, Past
from toca_compile.ir.state import Number
from toca_compile.ir.table import Step, Test, at
from toca_compile.ir.verify import written_slots
from toca_compile.runtime.step_state import begun

aten = torch.ops.aten
COND = torch.ops.higher_order.cond
SWITCH = getattr(torch.ops.higher_order, "switch", None)  # from torch 2.14 on

LEAST = 2
"""By how much the size of an input ``rows`` is larger than K: compilers take a size of 0 or 1 for a constant."""

_Kind = tuple[int, int | None]  # of step: its row of the table, and that of what it computes if it does not skip


@dataclass(frozen=True)
class StepProgram:
    """A step as a graph.

    Attributes:
        module: called with the graph's inputs and an empty tensor for each number of tokens (``sizes``); it returns the
            graph's results that are tensors.
        kinds: what the kinds of steps are called, in the order of their branches.
        plan: of each step its kind and its numbers, as the buffer ``plan`` has them.
        sizes: the second dimension of each input ``rows``, of each step.
        written: the names of the buffers that some step changes.
    """

    module: fx.GraphModule
    laid: LaidOut
    kinds: tuple[str, ...]
    plan: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    written: tuple[str, ...]

    @property
    def caches(self) -> dict[str, tuple[Any, int, int]]:
        """Which buffer of which owner each of the module's is."""
        return {f"cache{i}": whose for i, whose in enumerate(self.laid.buffers)}

    def reset(self) -> None:
        """The next step of the module's own buffers is the first of a run."""
        for name in ("step", "past", "drift", *self.caches):
            if hasattr(self.module, name):
                getattr(self.module, name).zero_()

    def rows(self, step: int) -> list[Tensor]:
        """The inputs of a step behind the graph's own."""
        device = self.module.get_buffer("step").device
        sizes = [torch.empty((0, size), dtype=torch.int8, device=device) for size in self.sizes[step]]
        for told in sizes:
            # No guard may tell one K from another: 1 is not special, nor is the first.
            torch._dynamo.decorators.mark_unbacked(told, 1)
        return sizes


def step_program(laid: LaidOut) -> StepProgram:
    """The program of a plan that was laid out with its numbers in memory.

    Raises:
        VerifyError: what was made is not what it stands for.
    """
    made = _Emitter(laid).program()
    verify(made)
    return made


def by_inputs(program: StepProgram) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A step as a graph that is given its buffers behind all else and changes those; and what they are as a run begins,
    by name."""
    root = program.module
    buffers = dict(root.named_buffers())
    read = dict.fromkeys(n.target for n in root.graph.nodes if n.op == "get_attr")
    state = {name: buffers[name] for name in read if name in buffers}
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in root.graph.find_nodes(op="placeholder"):
        env[node] = graph.node_copy(node)
    given = {name: graph.placeholder(name) for name in state}
    for node in root.graph.nodes:
        if node.op == "get_attr" and node.target in given:
            env[node] = given[node.target]
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], env.__getitem__))
        elif node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(root, graph), state


def verify(program: StepProgram) -> None:
    """Nothing is lost: no branch writes to what it is given, all return as much, and each buffer that a variant of any
    step writes is copied to once, behind the branches.

    Raises:
        VerifyError: it is not so.
    """
    root = program.module
    copied = [n.args[0].target for n in root.graph.nodes if n.target is aten.copy_.default]
    calls = [(call, program.laid.entries[call.entry].variant) for call in program.laid.table.calls]
    owed = {
        f"cache{number}"
        for call, variant in calls
        for number, slot in zip(call.slots, variant.slots, strict=True)
        if number is not None and slot in written_slots(variant)
    }
    owed |= set(_decided(program.laid.table.test))
    _require(sorted(copied) == sorted(owed), f"a step writes {sorted(owed)}, and {sorted(copied)} are copied")
    results = {
        len(m.graph.output_node().args[0])  # type: ignore[arg-type]
        for name, m in root.named_modules()
        if isinstance(m, fx.GraphModule) and name.rpartition(".")[2].startswith(("kind", "branch"))
    }
    _require(len(results) <= 1, f"branches return different numbers of values: {sorted(results)}")
    for name, module in root.named_modules():
        if not isinstance(module, fx.GraphModule):
            continue
        module.graph.lint()
        given = {n for n in module.graph.nodes if n.op == "placeholder"}
        for node in module.graph.nodes:
            if node.target in (COND, SWITCH):
                odd = [n for n in node.args[-1] if n.op == "call_function" and not _is_plain(n)]
                _require(module is root or not odd, f"{odd} lie in memory otherwise than a branch is compiled for")
            if is_mutable(node):
                _require(node.args[0] not in given, f"{name or 'the step'} writes to its input {node.args[0]}")


def _is_plain(node: fx.Node) -> bool:
    """Whether a value is a contiguous one of its own."""
    return node.target is aten.clone.default and node.kwargs.get("memory_format") is torch.contiguous_format


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise VerifyError(f"the program of a step is not legal: {message}")


@dataclass
class _Body:
    """A graph that reads by name what stands around it: values ``x3``, buffers ``cache0``, ``rows0``, ``row``."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    named: dict[str, fx.Node] = field(default_factory=dict)
    given: dict[str, fx.Node] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def read(self, name: str) -> fx.Node:
        """What stands under a name; one that is new is an input."""
        if name not in self.named:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                self.named[name] = self.given[name] = self.graph.placeholder(name)
        return self.named[name]

    def once(self, name: str, target: Any, *args: Any) -> fx.Node:
        """A call under a name, made when it is first asked for."""
        if name not in self.named:
            self.named[name] = self.call(target, *args)
        return self.named[name]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call."""
        return self.graph.call_function(target, args, kwargs)

    def parts(self, made: fx.Node, names: Sequence[str]) -> list[fx.Node]:
        """What a call made, under these names as far as they are free."""
        return [
            self.graph.create_node("call_function", operator.getitem, (made, i), name=name)
            for i, name in enumerate(names)
        ]

    def within(self, name: str, module: nn.Module) -> fx.Node:
        """A submodule, as ``cond`` and ``switch`` take it."""
        self.modules[name] = module
        return self.graph.get_attr(name)

    def close(self, outputs: Sequence[fx.Node]) -> "_Body":
        """Return these, and leave out what nobody reads: no variant of a program changes what it is given."""
        self.graph.output(tuple(outputs))
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        self.given = {name: node for name, node in self.given.items() if node.users}
        return self

    def closed(self, names: Sequence[str]) -> fx.GraphModule:
        """The graph as a module with these inputs, in this order."""
        graph, env = fx.Graph(), {}
        for name in names:
            node = graph.placeholder(name)
            if name in self.given:
                env[self.given[name]] = node
        for node in self.graph.nodes:
            if node not in env and node.op != "placeholder":
                env[node] = graph.node_copy(node, env.__getitem__)
        return fx.GraphModule(self.modules, graph)


class _Emitter:
    def __init__(self, laid: LaidOut) -> None:
        self.laid, self.table = laid, laid.table
        if laid.table.test is not None:
            _able(laid.table.test)
        self.functional = {name: functional(entry) for name, entry in laid.entries.items()}
        self.kinds: dict[_Kind, int] = {}
        self.first: dict[_Kind, Step] = {}
        for step in self.table.steps:
            self.first.setdefault(_kind(step), step)
            self.kinds.setdefault(_kind(step), len(self.kinds))
        self.columns, self.sizes = self._columns()
        written = {
            call.slots[i]
            for call in self.table.calls
            for i in self.functional[call.entry][1]
            if call.slots[i] is not None
        }
        self.written = [f"cache{i}" for i in sorted(w for w in written if w is not None)]
        self.written += _decided(self.table.test)
        self.results = [f"x{r[0]}" for r in self.table.results if r is not None]

    # -- numbers --------------------------------------------------------------------------------------------------

    def _asked(self, index: int) -> list[tuple[Any, bool]]:
        """The host numbers of a step in the order of its calls, and whether each is a K."""
        step = self.table.steps[index]
        both = [step] if step.computed is None else [step, step.computed]
        asked: list[tuple[Any, bool]] = []
        for one in both:
            for number, numbers in zip(self.table.rows[one.row].calls, one.numbers, strict=True):
                asked += zip(numbers, self._is_k(number), strict=True)
        test = self.table.test
        if step.computed is not None and test is not None:
            asked += [(number, False) for number in test.numbers[index]]
            if not test.skip.gate.adds_up:
                assert test.skip.threshold is not None
                bound = test.skip.gate.bound(test.skip.threshold, index, len(self.table.steps))
                asked.append((torch.tensor(bound, dtype=torch.float64).view(torch.int64).item(), False))
        return asked

    def _is_k(self, call: int) -> list[bool]:
        slots = self.laid.entries[self.table.calls[call].entry].variant.slots
        return [slot.kind is Number.K for slot in slots if not slot.is_buffer]

    def _columns(self) -> tuple[dict[_Kind, list[Any]], tuple[tuple[int, ...], ...]]:
        """Of each kind of step, where its numbers stand: the name of the input ``rows``, or the column of the plan;
        those that are the same in all its steps stand once. And all values of both."""
        table = self.table
        steps: dict[_Kind, list[int]] = {}
        for i, step in enumerate(table.steps):
            steps.setdefault(_kind(step), []).append(i)
        self.plan: list[list[int]] = [[self.kinds[_kind(step)]] for step in table.steps]
        sizes: list[list[int]] = [[] for _ in table.steps]
        places: dict[_Kind, list[Any]] = {}
        for kind, own in steps.items():
            asked = [self._asked(i) for i in own]
            known: dict[Any, Any] = {}
            for values in zip(*asked, strict=True):
                told, is_k = tuple(value for value, _ in values), values[0][1]
                if isinstance(told[0], str):
                    known.setdefault((told[0], is_k), told[0])
                elif (told, is_k) not in known:
                    column = sizes if is_k else self.plan
                    known[told, is_k] = f"rows{len(sizes[own[0]])}" if is_k else len(self.plan[own[0]])
                    for i, value in zip(own, told, strict=True):
                        column[i].append(value + LEAST if is_k else value)
                places.setdefault(kind, []).append(known[(told[0] if isinstance(told[0], str) else told), is_k])
            places.setdefault(kind, [])
        width, count = max(map(len, self.plan)), max(map(len, sizes), default=0)
        for row in self.plan:
            row += [0] * (width - len(row))
        last = [max(s[j] for s in sizes if len(s) > j) for j in range(count)]
        for own_sizes in sizes:
            own_sizes += last[len(own_sizes) :]
        return places, tuple(map(tuple, sizes))

    def _number(self, body: _Body, place: Any) -> fx.Node:
        """A number where a call takes it: K as a size, others as a tensor."""
        if isinstance(place, int):
            return body.once(f"number{place}", aten.select.int, body.read("row"), 0, place)
        if place.startswith("rows"):
            size = body.once(f"{place} size", aten.sym_size.int, body.read(place), 1)
            return body.once(f"{place} count", operator.sub, size, LEAST)
        assert self.table.test is not None
        kind, index = place.split(" ")
        return _told_by_past(body, self.table.test.skip.memory, Number(kind), int(index))

    # -- bodies ---------------------------------------------------------------------------------------------------

    def program(self) -> StepProgram:
        """All of it."""
        root, state = _Body(), self._state()
        for i in range(self.laid.inputs):
            root.named[f"x{i}"] = root.graph.placeholder(f"x{i}")
        for j in range(len(self.sizes[0])):
            root.named[f"rows{j}"] = root.graph.placeholder(f"rows{j}")
        for place in self.laid.constants:
            root.named[f"x{place}"] = root.graph.get_attr(f"x{place}")
        for name in state:
            root.named.setdefault(name, root.graph.get_attr(name))
        index = root.named["step"]
        if self.table.endless:
            index = root.call(aten.clamp.default, index, None, len(self.table.steps) - 1)
        found = root.call(aten.index_select.default, root.named["plan"], 0, index)
        root.named["row"] = root.call(aten.select.int, found, 0, 0)
        outputs = self._tree(root, list(self.kinds))
        results, changed = outputs[: len(self.results)], outputs[len(self.results) :]
        for name, value in zip(self.written, changed, strict=True):
            root.call(aten.copy_.default, root.named[name], value)
        root.call(aten.add_.Tensor, root.named["step"], 1)
        root.graph.output(tuple(results))
        module = nn.Module()
        for name, part in root.modules.items():
            module.add_module(name, part)
        for name, buffer in state.items():
            module.register_buffer(name, buffer)
        made = fx.GraphModule(module, root.graph)
        names = tuple(self._name(kind) for kind in self.kinds)
        return StepProgram(made, self.laid, names, tuple(map(tuple, self.plan)), self.sizes, tuple(self.written))

    def _state(self) -> dict[str, Tensor]:
        """The buffers, as a run begins."""
        with torch.inference_mode(False):
            state = begun([], 0, Past(), self.table.test, self.laid.device)
            state["plan"] = state["step"].new_tensor(self.plan)
            for i, kept in enumerate(self.table.buffers):
                state[f"cache{i}"] = torch.zeros(
                    [at(size, 0) for size in kept.shape], dtype=getattr(torch, kept.dtype), device=kept.device
                )
            state |= {f"x{place}": value for place, value in self.laid.constants.items()}
        return state

    def _name(self, kind: _Kind) -> str:
        return " or ".join("+".join(self.table.rows[row].kinds) for row in kind if row is not None)

    def _tree(self, body: _Body, kinds: Sequence[_Kind]) -> list[fx.Node]:
        """What the step that it is makes, of these kinds."""
        if len(kinds) == 1:
            leaf = self._leaf(kinds[0])
            names = list(leaf.given)
            made = leaf.closed(names)
            name = f"kind{self.kinds[kinds[0]]}"
            body.modules[name] = made
            call = body.graph.call_module(name, tuple(body.read(n) for n in names))
            return body.parts(call, self._made())
        which = body.once("number0", aten.select.int, body.read("row"), 0, 0)
        if SWITCH is not None and len(kinds) > 2:
            return self._branch(body, which, [self._side([kind]) for kind in kinds])
        middle = len(kinds) // 2
        first = body.call(aten.lt.Scalar, which, self.kinds[kinds[middle]])
        return self._branch(body, first, [self._side(kinds[:middle]), self._side(kinds[middle:])])

    def _side(self, kinds: Sequence[_Kind]) -> tuple[str, _Body]:
        if len(kinds) == 1:
            return f"kind{self.kinds[kinds[0]]}", self._leaf(kinds[0])
        side = _Body()
        return f"branch{self.kinds[kinds[0]]}_{self.kinds[kinds[-1]]}", side.close(self._tree(side, kinds))

    def _branch(self, body: _Body, chosen: fx.Node, sides: Sequence[tuple[str, _Body]]) -> list[fx.Node]:
        """What one of two makes if a predicate is ``chosen``, or of several that with this number."""
        names = list(dict.fromkeys(name for _, side in sides for name in side.given))
        branches = tuple(body.within(name, side.closed(names)) for name, side in sides)
        operands = []
        for name in names:
            value = body.read(name)
            # No two of a branch's inputs may share memory, as the shifts and scales of one layer do; and what Inductor
            # makes of other strides inside a branch is not what it compiles a branch within for.
            given = value.op in ("placeholder", "get_attr") or name == "row"
            plain = {"memory_format": torch.contiguous_format}
            operands.append(value if given else body.call(aten.clone.default, value, **plain))
        call = (COND, chosen, *branches) if len(branches) == 2 else (SWITCH, chosen, branches)
        return body.parts(body.call(*call, tuple(operands)), self._made())

    def _made(self) -> list[str]:
        """What all branches return."""
        return [*self.results, *self.written]

    def _leaf(self, kind: _Kind) -> _Body:
        """One kind of step."""
        body, step, table = _Body(), self.first[kind], self.table
        places = iter(self.columns[kind])
        for number in (*table.constant, *table.timed):
            self._call(body, number, iter(()))
        calls = table.rows[step.row].calls
        test = table.test
        if test is None or step.computed is None:
            for number in calls:
                self._call(body, number, places)
            if test is not None:
                _computed(body, test)
            return body.close(self._returned(body))
        skips, computes = _Body(), _Body()
        others = table.rows[step.computed.row].calls
        given = [(number, [next(places) for _ in self._is_k(number)]) for number in (*calls, *others)]
        for number, own in given[: test.stays]:
            self._call(body, number, iter(own))
        entered = dict(body.named)
        for number, own in given[test.stays : test.at]:
            self._call(body, number, iter(own))
        for number, own in given[test.at : len(calls)]:
            self._call(skips, number, iter(own))
        for number, own in given[len(calls) + test.stays :]:
            self._call(computes, number, iter(own))
        _computed(computes, test)
        (measured,) = self._call(body, test.call, places)
        bound = None if test.skip.gate.adds_up else self._number(body, next(places))
        pred = _must_compute(body, measured, bound, test)
        sides = [(f"branch{self.kinds[kind]}_{name}", side.close(self._returned(side))) for name, side in (
            ("computed", computes), ("skipped", skips))]  # fmt: skip
        # What was made only to be measured is none of a step that computes.
        made = [f"x{place}" for number, _ in given[test.stays : test.at] for place in table.calls[number].results]
        tried = {name: f"tried_{name}" for name in made if name in body.named}
        skips.given = {tried.get(name, name): node for name, node in skips.given.items()}
        body.named |= {told: body.named.pop(name) for name, told in tried.items()}
        body.named |= {name: entered[name] for name in tried if name in entered}
        return body.close(self._branch(body, pred, sides))

    def _returned(self, body: _Body) -> list[fx.Node]:
        """A branch's results and all buffers that any branch changes. None may be one that it was given, or share its
        memory, and all have one layout."""
        outputs = [
            body.call(aten.clone.default, body.read(r), memory_format=torch.contiguous_format) for r in self.results
        ]
        for name in self.written:
            value = body.read(name)
            outputs.append(body.call(aten.clone.default, value) if body.given.get(name) is value else value)
        return outputs

    def _call(self, body: _Body, number: int, places: Any) -> list[fx.Node]:
        """A variant; what it makes."""
        call = self.table.calls[number]
        module, changed = self.functional[call.entry]
        arguments = [body.read(f"x{place}") for place in call.values]
        for slot in call.slots:
            arguments.append(self._number(body, next(places)) if slot is None else body.read(f"cache{slot}"))
        for i in changed:
            _require(call.slots.count(call.slots[i]) == 1, f"{call.entry} is given a buffer twice that it writes")
        body.modules[call.entry] = module
        made = body.graph.call_module(call.entry, tuple(arguments))
        count = len(module.graph.output_node().args[0]) - len(changed)  # type: ignore[arg-type]
        names = [f"x{place}" for place in call.results[:count]] or [f"told{i}" for i in range(count)]
        parts = body.parts(made, [*names, *(f"cache{call.slots[i]}" for i in changed)])
        body.named |= {f"x{place}": value for place, value in zip(call.results, parts[:count], strict=False)}
        body.named |= {f"cache{call.slots[i]}": value for i, value in zip(changed, parts[count:], strict=True)}
        return parts[:count]


def _able(test: Test) -> None:
    """Refuse what only the host can decide.

    Raises:
        PolicyError: the numbers of a step do not follow from tensors.
    """
    memory, gate = test.skip.memory, test.skip.gate
    if isinstance(memory, Ring):
        by = memory.by
        last = by is not None and by.steered and by.weights((0, 1), 2) == [0.0, 1.0]
        if not last or memory.kept != 2 or gate.shares is None:
            raise PolicyError(
                f"the weights of {type(by).__name__} follow from which steps were computed, which only a run tells: a "
                "graph of whole steps cannot hold them, one for each segment can (lowering='inductor'; "
                "form='segments' of a file)"
            )
    if gate.trusted and gate.adds_up:
        raise PolicyError(f"{type(gate).__name__} adds up, and leaves steps out of the sum: no graph can do that")


def functional(entry: Entry) -> tuple[fx.GraphModule, list[int]]:
    """A variant that returns, behind its results, the buffers that it changes, and which of its slots these are."""
    variant = entry.variant
    written = written_slots(variant)
    changed = [i for i, slot in enumerate(variant.slots) if slot in written]
    graph, env, copies = fx.Graph(), {}, []
    nodes = list(variant.module.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    for node in inputs:
        env[node] = graph.node_copy(node)
    for i in changed:
        # Ahead of all that reads it: a view that was taken before the write sees the write.
        node = inputs[len(variant.values) + i]
        env[node] = graph.call_function(aten.clone.default, (env[node],))
        copies.append(env[node])
    for node in nodes:
        if node.op == "output":
            graph.output((*(env[n] for n in node.args[0]), *copies))
        elif node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(variant.module, graph), changed


# -- what only a run tells: ``past`` is how many steps were computed, and the last of them ---


def _last(body: _Body, back: int = 0) -> fx.Node:
    return body.once(f"past {back}", aten.select.int, body.read("past"), 0, -1 - back)


def _times(body: _Body) -> fx.Node:
    return body.once("times", aten.select.int, body.read("past"), 0, 0)


def _now(body: _Body) -> fx.Node:
    return body.once("now", aten.select.int, body.read("step"), 0, 0)


def _decided(test: Test | None) -> list[str]:
    """The buffers of what decides."""
    return [] if test is None else ["past", "drift"] if test.skip.gate.adds_up else ["past"]


def _must_compute(body: _Body, measured: fx.Node, bound: fx.Node | None, test: Test) -> fx.Node:
    """Whether a step computes the blocks that it may skip. ``bound``: of a distance that does not add up, as the bits
    of a number in double precision, in which the host decides."""
    skip, gate = test.skip, test.skip.gate
    distance = measured if gate.shares is None else body.call(aten.select.int, measured, 0, 0)
    distance = body.call(aten._to_copy.default, distance, dtype=torch.float64)
    if bound is None:
        added = _added_up(body, body.call(aten.reshape.default, distance, [1]), gate.polynomial)
        moved = body.call(aten.logical_not.default, body.call(aten.lt.Scalar, added, skip.threshold))
    else:
        moved = body.call(aten.gt.Tensor, distance, body.call(aten.view.dtype, bound, torch.float64))
    moved = body.call(aten.reshape.default, moved, [])
    since = body.call(aten.sub.Tensor, _now(body), _last(body))
    if gate.trusted:
        moved = body.call(aten.logical_and.default, moved, body.call(aten.gt.Scalar, since, gate.trusted))
    must = body.call(aten.logical_or.default, body.call(aten.lt.Scalar, _times(body), gate.asks), moved)
    if skip.limit is not None:
        must = body.call(aten.logical_or.default, must, body.call(aten.gt.Scalar, since, skip.limit))
    if gate.shares is not None:
        _share(body, body.call(aten.select.int, measured, 0, 1), *gate.shares)
    return must


def _share(body: _Body, told: fx.Node, least: float, most: float) -> None:
    """``Gate.share``; 1, that is the last value, where there is none."""
    told = body.call(aten._to_copy.default, told, dtype=torch.float64)
    finite = body.call(aten.lt.Scalar, body.call(aten.abs.default, told), inf)
    known = body.call(aten.logical_and.default, finite, body.call(aten.ge.Scalar, _times(body), 2))
    share = body.call(aten.clamp.default, told, least, most)
    body.named["share"] = body.call(aten.where.self, known, share, body.call(aten.ones_like.default, share))


def _added_up(body: _Body, x: fx.Node, polynomial: Sequence[float]) -> fx.Node:
    """What adds up with this distance."""
    total = body.call(aten.full_like.default, x, polynomial[0])
    for c in polynomial[1:]:
        total = body.call(aten.add.Scalar, body.call(aten.mul.Tensor, total, x), c)
    body.named["drift"] = body.call(aten.add.Tensor, body.read("drift"), total)
    return body.named["drift"]


def _computed(body: _Body, test: Test) -> None:
    """The step is one of those that were computed."""
    past = body.read("past")
    times = body.call(aten.add.Tensor, body.call(aten.slice.Tensor, past, 0, 0, 1), 1)
    later = body.call(aten.slice.Tensor, past, 0, 2, 2 + test.skip.memory.depth)
    body.named["past"] = body.call(aten.cat.default, [times, later, body.read("step")], 0)
    if test.skip.gate.adds_up:
        body.named["drift"] = body.call(aten.zeros_like.default, body.read("drift"))


def _told_by_past(body: _Body, memory: History, kind: Number, index: int) -> fx.Node:
    """A number of ``History.numbers``."""
    name = kind.named(index)
    if name not in body.named:
        told = _of_series(body, memory, kind, index) if isinstance(memory, CacheSpec) else _of_pair(body, kind, index)
        body.named[name] = told
    return body.named[name]


def _of_pair(body: _Body, kind: Number, place: int) -> fx.Node:
    """One of ``Ring.numbers`` of two values, of which the last counts as much as ``share`` says."""
    if kind is Number.KEEP:
        return body.call(aten.zeros_like.default, _now(body))
    weight = body.read("share")
    if place:
        weight = body.call(aten.rsub.Scalar, weight, 1.0)
    whole = body.call(aten.round.default, body.call(aten.mul.Scalar, weight, ONE))
    return body.call(aten._to_copy.default, whole, dtype=torch.int64)


def _of_series(body: _Body, spec: CacheSpec, kind: Number, order: int) -> fx.Node:
    """One of ``CacheSpec.numbers``."""
    now = _now(body)
    if kind is Number.KEEP:
        back = order if spec.basis == "newton" else 1
        spacing = body.call(aten.sub.Tensor, now, _last(body, back - 1))
        known = body.call(aten.ge.Scalar, _times(body), back)
        other = body.call(aten.ones_like.default, now)
    else:
        backs = [0] * order if spec.basis == "taylor" else range(order)
        steps = [body.call(aten.sub.Tensor, now, _last(body, back)) for back in backs]
        spacing = steps[0]
        for step in steps[1:]:
            spacing = body.call(aten.mul.Tensor, spacing, step)
        known = body.call(aten.gt.Scalar, _times(body), order)
        other = body.call(aten.zeros_like.default, now)
    return body.call(aten.where.self, known, spacing, other)


def _kind(step: Step) -> _Kind:
    return step.row, None if step.computed is None else step.computed.row
