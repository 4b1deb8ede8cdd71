"""A model that was exported, in a process with torch alone: no code of the model, no Dynamo, no compiler."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from toca_compile.errors import ExportError
from toca_compile.exported.known import Part, as_table
from toca_compile.exported.signature import Fields, arranged, fixed, leaves
from toca_compile.exported.table import About
from toca_compile.ir.history import Numbers, Past
from toca_compile.ir.state import sizes_of
from toca_compile.ir.table import Call, Number, Row, Step, Table, Test, at
from toca_compile.ir.types import StepKind
from toca_compile.runtime.conditioning import Conditioning
from toca_compile.runtime.controls import RunControls
from toca_compile.runtime.step_control import Run, RunConstants, StepControl

Entries = Mapping[str, Callable[[list[Tensor]], Sequence[Tensor]]]

KEY = (0, 0, 0)  # of the one graph that there is, in a run


class LoadedModel(RunControls, nn.Module):
    """A model with its caches, called as the exported one was: each call is the next step of its run.

    Args:
        about, table: of the file.
        tensors: the weights and constants, by name.
        entries: what the table's calls call.
        known: what follows from the timesteps that were known at export (``known.py``).
    """

    def __init__(
        self,
        about: About,
        table: Table,
        tensors: Mapping[str, Tensor],
        entries: Entries,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._known = as_table(known) if known else None
        self._about, self._table, self._tensors, self._entries = about, table, dict(tensors), dict(entries)
        self._of_runs = StepControl()
        self._conditioning = Conditioning(table.clock, table.labels, (), at_once=False)
        self._sizes: dict[int, Tensor] = {}
        self._size = 0  # the open one, of the call that runs
        self._by_size: dict[int, dict[str, int]] = {}  # numbers that follow from it, of sizes that were called
        self._values: list[Any] = [None] * table.places
        for place, name in table.weights.items():
            self._values[place] = self._tensors[name]

    @cached_property
    def _parts(self) -> list[Part]:
        calls = (self._table.calls[i] for i in self._table.timed)
        return [Part(call, self._entries[call.entry]) for call in calls]

    @property
    def _key(self) -> tuple[int, int, int]:
        """Of the graph in a run: each size has runs of its own, as it is a graph of its own to the live model."""
        return (self._size, *KEY[1:])

    @property
    def _control(self) -> StepControl:
        return self._of_runs

    @property
    def policy(self) -> Any:
        """The policy that the model was exported with; of one that JSON does not hold, its name."""
        from toca_compile.policies.storage import from_data

        told = self._about.policy
        return from_data(told) if isinstance(told, Mapping) else told

    @property
    def config(self) -> Any:
        """The configuration of the exported model, if it had one."""
        return _as_fields(self._about.config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are floating-point numbers."""
        return next((t.dtype for t in self._tensors.values() if t.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self._about.machine["device"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next step.

        Raises:
            ExportError: the model was not exported for such arguments.
        """
        found = leaves(self._about.parameters, args, kwargs)
        with self._control.lock, torch.no_grad():
            given = self._checked(found)
            self._control.begin_call(found)
            failed, shapes = True, []
            try:
                results = self._step(given)
                failed, shapes = False, [tuple(r.shape) for r in results if isinstance(r, Tensor)]
            finally:
                self._control.end_call(failed, shapes)
        return arranged(self._about.returns, lambda which: results[which] if type(which) is int else found[which])

    def update_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Put other weights in the place of the model's, all or some, such as those with a LoRA fused. Every run is
        forgotten.

        Args:
            state_dict: tensors by the names that the model's state dict has for them.

        Raises:
            ExportError: a name or a shape is not the model's; then nothing is changed.
        """
        new = {}
        for name, value in state_dict.items():
            own = self._about.names.get(name, name)
            if own not in self._tensors:
                raise ExportError(f"the exported model has no weight {name!r} that its code reads")
            if self._tensors[own].shape != value.shape:
                shapes = tuple(value.shape), tuple(self._tensors[own].shape)
                raise ExportError(f"the weight {name!r} is {shapes[0]}, and the exported model's is {shapes[1]}")
            new[own] = value
        with self._control.lock, torch.inference_mode(False), torch.no_grad():
            for name, value in new.items():
                self._tensors[name].copy_(value)
        self._known = None  # it was made with those before
        self.reset()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights, by the names of the exported model."""
        named = {name: self._tensors[own] for name, own in self._about.names.items()}
        return {**{name: t for name, t in self._tensors.items() if not name.startswith("(")}, **named}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As ``update_weights``."""
        self.update_weights(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "LoadedModel":
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        moved = fn(like)
        if (moved.device, moved.dtype) != (like.device, like.dtype):
            raise ExportError(f"it was compiled for {like.dtype} on {like.device}: export it anew for another")
        return self

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers calls this when a pipeline is done: of the thread that it ran in, nothing is kept."""
        self._control.reset(mine=True)

    def _checked(self, found: Mapping[str, Any]) -> dict[int, Tensor]:
        """The graph's inputs among a call's values, as it takes them."""
        about, table = self._about, self._table
        told, want = fixed(found, about.defaults), about.given
        for path in sorted({*told, *want}):
            if told.get(path) != want.get(path) or (path in told) != (path in want):
                raise ExportError(
                    f"{about.model} was exported for {path}={want.get(path, 'a tensor, or nothing')!r}, and is called "
                    f"with {path}={told[path]!r}" if path in told else f"{path} is missing or no tensor"
                )  # fmt: skip
        given = {}
        self._size = size = self._open(found)
        for place, path in table.inputs.items():
            value, kind = found.get(path), table.kinds[place]
            if not isinstance(value, Tensor):
                raise ExportError(f"{about.model} was exported for a tensor {path}, and is called without")
            have = [list(value.shape), str(value.dtype).removeprefix("torch."), str(value.device)]
            asked = [[at(s, size) for s in kind["shape"]], kind["dtype"], kind["device"]]
            if have != asked:
                raise ExportError(
                    f"{about.model} was exported for {path} of shape {asked[0]}, {asked[1]}, on {asked[2]}, and is "
                    f"called with {have[0]}, {have[1]}, on {have[2]}: export it for that as well"
                )
            given[place] = laid_as(value, [at(s, size) for s in kind["stride"]])
        return given

    def _open(self, found: Mapping[str, Any]) -> int:
        """The open size, as the first argument that shows it tells it; 0 where none is open."""
        open, table = self._table.open, self._table
        if open is None:
            return 0
        for place, path in table.inputs.items():
            value, shape = found.get(path), table.kinds[place]["shape"]
            which = next((i for i, size in enumerate(shape) if not isinstance(size, int)), None)
            if which is None or not isinstance(value, Tensor) or value.dim() != len(shape):
                continue
            slope, offset = shape[which]
            size, rest = divmod(value.shape[which] - offset, slope)
            if rest or not open.least <= size <= open.most:
                least, most = (at(shape[which], n) for n in (open.least, open.most))
                raise ExportError(
                    f"{self._about.model} was exported for {open.name} from {open.least} to {open.most} (dimension "
                    f"{which} of {path} from {least} to {most}), and is called with {path} of shape "
                    f"{list(value.shape)}: export it for that as well"
                )
            return size
        return open.least

    def _step(self, given: Mapping[int, Tensor]) -> list[Any]:
        table, control = self._table, self._control
        values = list(self._values)
        for place, value in given.items():
            values[place] = value
        steps = None if table.endless else len(table.steps)
        key = self._key
        run, _ = control.enter_graph(key[0], 0, steps, given, [values[i] for i in table.clock])
        if run.last and key not in run.last:
            raise ExportError(
                f"{table.open and table.open.name} changed in the midst of a run, which has caches of its size"
            )
        step = table.steps[min(run.step, len(table.steps) - 1)]
        run.last[key] = run.step
        past = run.computed.get(key, Past())
        moves = self._moves(past, run.step)
        kept = self._begin(step, values, run)
        done, test = 0, table.test
        if test is not None and step.computed is not None:
            done, skips = test.stays, test.skip.may(past, run.step)
            self._calls(step, slice(done), moves, values, run)
            if skips is None:
                entered = list(values)
                self._calls(step, slice(done, test.at), moves, values, run)
                skips = self._skips(test, past, moves, values, run)
                if skips:
                    done = test.at
                else:  # blocks that were computed from a forecast are none of the step
                    values[:] = entered
            if not skips:
                step = step.computed
                kept = self._begin(step, values, run)
        self._calls(step, slice(done, None), moves, values, run)
        if step.computed is None:
            self._computed(run, past)
        # What a cache holds is changed by the next step; what was handed out must not be. Nor may what a caller writes
        # to be what follows from the time, or is constant, of which machine code gives views as tensors of their own.
        results: list[Tensor | None] = [None] * len(table.results)
        for i, told in enumerate(table.results):
            if told is not None:
                made = laid_as(values[told[0]], [at(size, self._size) for size in told[1]])
                results[i] = made.clone() if any(made.data_ptr() in memory for memory in kept) else made
        return results

    def _computed(self, run: Run, past: Past) -> None:
        """Note that a step computed what it could skip."""
        test = self._table.test
        if test is not None:
            run.drift[self._key] = 0.0
            run.computed[self._key] = test.skip.after(past, run.step)

    def _begin(self, step: Step, values: list[Any], run: Run) -> list[range]:
        """Note what a step does, and put there what does not change in a run, and what follows from the time: its
        addresses, if the model hands out more than one result."""
        table, control = self._table, self._control
        row = table.rows[step.row]
        control.record(run).note(self._key, frozenset(StepKind(kind) for kind in row.kinds), self._tokens(row))
        if table.constant:
            watched = [values[i] for i in table.watched]
            kept = run.kept.get(self._key)
            if kept is None or not kept.holds(watched):
                made: dict[int, Tensor] = {}
                for call in (table.calls[i] for i in table.constant):
                    results = self._entries[call.entry]([values[place] for place in call.values])
                    made.update(zip(call.results, results, strict=True))
                    for place in call.results:
                        values[place] = made[place]
                kept = run.kept[self._key] = RunConstants.of(watched, made)
            for place, value in kept.values.items():
                values[place] = value
        if row.timed:
            tables = control.tables.setdefault(self._key, [] if self._known is None else [self._known])
            self._conditioning.fill(values, self._parts, frozenset(row.timed), tables, full=True)
        if len(table.results) < 2:
            return []
        held = [values[place] for place in row.timed]
        if self._key in run.kept:
            held += run.kept[self._key].values.values()
        storages = [value.untyped_storage() for value in held if isinstance(value, Tensor)]
        return [range(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]

    def _calls(self, step: Step, which: slice, moves: Mapping[str, int], values: list[Any], run: Run) -> None:
        row = self._table.rows[step.row]
        for number, numbers in zip(row.calls[which], step.numbers[which], strict=True):
            call = self._table.calls[number]
            made = self._entries[call.entry](self._arguments(call, numbers, moves, values, run))
            for place, value in zip(call.results, made, strict=False):
                values[place] = value
            for place in call.free:
                values[place] = None

    def _arguments(
        self, call: Call, numbers: Sequence[Number], moves: Mapping[str, int], values: Sequence[Any], run: Run
    ) -> list[Tensor]:
        arguments = [values[place] for place in call.values]
        left = iter(numbers)
        for slot in call.slots:
            if slot is not None:
                arguments.append(self._buffer(slot, run))
            else:
                number = next(left)
                arguments.append(self._sized(moves[number] if isinstance(number, str) else number))
        return arguments

    def _buffer(self, number: int, run: Run) -> Tensor:
        name = (*self._key, number)
        if name not in run.buffers:
            kept = self._table.buffers[number]
            # Not inference tensors: those could not be written by a later step outside inference mode.
            with torch.inference_mode(False):
                shape = [at(size, self._size) for size in kept.shape]
                run.buffers[name] = torch.zeros(shape, dtype=getattr(torch, kept.dtype), device=kept.device)
        return run.buffers[name]

    def _sized(self, number: int) -> Tensor:
        if number not in self._sizes:
            self._sizes[number] = torch.empty(sizes_of(number), dtype=torch.int8, device=self.device)
        return self._sizes[number]

    def _moves(self, past: Past, step: int) -> dict[str, int]:
        """The host numbers that only a call tells, by name."""
        test, sized = self._table.test, self._sized_numbers
        if test is None:
            return sized
        return sized | _named(test.skip.memory.numbers(past, step, past.made))

    @property
    def _sized_numbers(self) -> dict[str, int]:
        """Those that the call's size tells."""
        table, size = self._table, self._size
        if table.open is None:
            return {}
        if size not in self._by_size:
            which = table.open.values.index(size)
            self._by_size[size] = {name: values[which] for name, values in table.sized.items()}
        return self._by_size[size]

    def _tokens(self, row: Row) -> dict[str, int]:
        """How many tokens each site computes."""
        sized = self._sized_numbers
        return {site: sized[n] if isinstance(n, str) else n for site, n in row.tokens.items()}

    def _skips(self, test: Test, past: Past, moves: dict[str, int], values: Sequence[Any], run: Run) -> bool:
        """Whether a step skips the blocks that its plan lets it skip."""
        table, key = self._table, self._key
        call = table.calls[test.call]
        numbers = test.numbers[min(run.step, len(table.steps) - 1)]
        (measured,) = self._entries[call.entry](self._arguments(call, numbers, moves, values, run))
        judged = test.skip.judged(measured, run.drift.get(key, 0.0), run.step, len(table.steps))
        run.drift[key] = judged.added
        if judged.share is not None:
            moves.update(_named(test.skip.memory.steered(past, judged.share)))
        return judged.skips


def _named(numbers: Numbers) -> dict[str, int]:
    """As the table calls them."""
    return {kind.named(i): number for (kind, i), number in numbers.items()}


def laid_as(value: Tensor, stride: Sequence[int]) -> Tensor:
    """A tensor with these strides, of which code may rely."""
    pairs = zip(value.stride(), stride, value.shape, strict=True)
    if all(ours == theirs or size == 1 for ours, theirs, size in pairs):
        return value
    return torch.empty_strided(value.shape, list(stride), dtype=value.dtype, device=value.device).copy_(value)


def _as_fields(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Fields((k, _as_fields(v)) for k, v in value.items())
    return [_as_fields(v) for v in value] if isinstance(value, list) else value
