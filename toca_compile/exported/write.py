"""``export``: a model, traced and planned as ``optimize`` does it, to a file."""

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toca_compile.compiler.lay_out import LaidOut
from toca_compile.compiler.layouts import layouts_of
from toca_compile.diffusers import FirstCall, first_calls, for_run, is_pipeline
from toca_compile.errors import ExportError, PolicyError, TocaError
from toca_compile.exported import archive, ranges
from toca_compile.exported.as_one import as_one, check
from toca_compile.exported.known import known_rows
from toca_compile.exported.recorder import Recorder
from toca_compile.exported.signature import arrangement, fixed, leaves, mapped, told
from toca_compile.exported.table import About
from toca_compile.in_place import handle_of
from toca_compile.ir.graph import source_line
from toca_compile.ir.plan import Policy
from toca_compile.ir.signature import called, fingerprint
from toca_compile.ir.table import Table
from toca_compile.ir.types import Layout
from toca_compile.lowerings.aot import compile_step, compile_variant
from toca_compile.model import has_hooks, unwrapped, wrap
from toca_compile.ops.sized_by_values import OP as SIZED_BY_VALUES
from toca_compile.policies.given import checked_policy
from toca_compile.policies.storage import as_data
from toca_compile.progress import working
from toca_compile.session import Session

FORMS = ("segments", "program")
_SCALARS = (bool, int, float, str, type(None))


def export(
    model: Any,
    policy: Policy | str | None,
    example_inputs: Any,
    path: str | PathLike[str],
    *,
    dynamic: Any = None,
    **options: Any,
) -> dict[str, Path]:
    """Write a model with its caches to a file that runs without its code, without Dynamo and without a compiler
    (``toca_compile.load``).

    Args:
        model: a diffusion transformer in eval mode, or what ``optimize`` made of one; or a diffusers pipeline, whose
            transformer is what is exported. Of several transformers each has a file of its own.
        policy: as of ``optimize``; None: that of an optimised model.
        example_inputs: what the model is called with: a tuple of arguments, a dictionary of them by name, or a pair of
            both. Their shapes, and what is no tensor among them, are compiled in. Of a pipeline: the arguments of its
            call, which is made as far as the first call of each transformer.
        path: of the file, ``*.pt2``. It is written whole, or not at all. Of several transformers the names stand before
            the suffix: ``video.pt2`` is then ``video.transformer.pt2`` and ``video.transformer_2.pt2``.
        dynamic: as ``dynamic_shapes`` of ``torch.export``: by argument (of the transformer), which dimensions may have
            another size, ``{"x": {0: Dim("batch", min=2, max=8)}, …}``. One size can be open, the batch or how many
            tokens there are, in as many dimensions as it stands, also as ``2 * batch``; its range begins at 2. The
            policy is asked for its plan at each size; what sites do may not follow from it, but for on how many tokens.
            None: all are fixed.
        options: ``grid`` and ``hoist``, as of ``optimize``; and ``form``: ``"segments"``, an entry for each segment and
            kind of step, between which the table chooses, and equal blocks share one; or ``"program"``, whole steps as
            one entry, which branches inside and holds everything for each block anew. They are as fast on a CPU
            (``benchmarks/results/export.md``); of a plan with many kinds of steps, such as ToCa's, a program takes
            several times as long to compile. And ``timesteps`` of the samplings to come, as the scheduler has them:
            what follows from them, and from the labels of ``example_inputs``, is then in the file; of a pipeline, whose
            scheduler knows them, it is where it follows from no label. Others are computed when they are met.

    Returns:
        The files, by the names of a pipeline's transformers; that of a bare model by an empty one.

    Raises:
        ExportError: the model or the policy cannot be held by a file; the message says why.
        TocaError: as of ``optimize`` and of a first call.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"the file must be called *.pt2, not {Path(path).name}")
    if not Path(path).absolute().parent.is_dir():
        raise ExportError(f"there is no folder {Path(path).absolute().parent}")
    form = options.pop("form", FORMS[0])
    if form not in FORMS:
        raise ExportError(f"form must be one of {', '.join(map(repr, FORMS))}, not {form!r}")
    as_program = form == "program"
    for name, given in (("dynamic", dynamic), ("timesteps", options.get("timesteps"))):
        if as_program and given is not None:
            raise ExportError(
                f"a program has fixed sizes, and computes what follows from the time: {name} is for form='segments'"
            )
    traced = traces(model, policy, example_inputs, dynamic=dynamic, in_memory=as_program, **options)
    several, target = len(traced) > 1, Path(path)
    paths = {name: target.with_suffix(f".{name}.pt2") if several else target for name in traced}
    for name, one in traced.items():
        (_compile_program if as_program else _compile)(one, paths[name])
    return paths


def _compile(traced: "Traced", path: Path) -> None:
    files = {}
    entries = traced.laid.entries
    for i, (name, entry) in enumerate(entries.items(), 1):
        with working(f"compiling entry {i} of {len(entries)}"):
            files[name] = compile_variant(entry.variant, entry.examples, entry.sizes)
    archive.write(path, traced.about, traced.table, traced.tensors, files, traced.known)


def _compile_program(traced: "Traced", path: Path) -> None:
    one = as_one(traced)
    with tempfile.TemporaryDirectory() as folder, working("compiling the program of a step"):
        files = {one.whole.entry: compile_step(one.module, one.like)}
        trial = Path(folder) / path.name
        archive.write(trial, traced.about, one.table, {}, files)
        check(one, archive.entries(trial, one.table, traced.about)[one.whole.entry])
        archive.write(path, traced.about, one.table, traced.tensors, files)


def traces(
    model: Any,
    policy: Policy | str | None,
    example_inputs: Any,
    *,
    dynamic: Any = None,
    timesteps: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, "Traced"]:
    """What ``export`` writes, before it is compiled, by the names of a pipeline's transformers. ``in_memory``: as of
    ``lay_out``."""
    if timesteps is not None and dynamic is not None:
        raise ExportError("what follows from timesteps has one size: with dynamic it is computed when it is met")

    def traced(model: Any, policy: Policy | str | None, call: tuple[Any, Mapping[str, Any]]) -> Traced:
        if dynamic is None or not isinstance(model, nn.Module):
            return Traced(model, policy, call, **options)
        plain = unwrapped(model)
        names = _parameters(plain)
        span = ranges.read(dynamic, names, call)
        calls = {size: span.call(names, call, size) for size in span.points}
        ranges.prove(plain, calls[span.open.most], names, span)
        several = []
        for size, one in calls.items():
            try:
                several.append(Traced(model, policy, one, **options))
            except TocaError:
                raise
            except Exception as error:  # the model's own, of inputs of this size
                raise ExportError(f"{type(plain).__name__} fails where {span.open.name} is {size}: {error}") from error
        return ranges.fitted(several, span)

    if not is_pipeline(model):
        one = traced(model, policy, arguments(example_inputs))
        if timesteps is not None:
            one.known = known_rows(one, [float(t) for t in timesteps])
            if not one.known:
                raise ExportError(
                    "nothing can be computed of timesteps beforehand: the timestep of example_inputs must be one of "
                    "them, as it is or in units of 1000, and hoist must be on"
                )
        return {"": one}
    if not isinstance(example_inputs, Mapping):
        raise ExportError("example_inputs of a pipeline must be a dictionary of the arguments of its call")
    made = {}
    for name, call in first_calls(model, example_inputs).items():
        own = handle_of(call.model)
        wanted = checked_policy(policy) if policy is not None else own._session.policy if own is not None else None
        made[name] = one = traced(call.model, _fit(wanted, call), (call.args, call.kwargs))
        times = call.known.times if timesteps is None else [float(t) for t in timesteps]
        kept = dynamic is None and not options.get("in_memory")  # a program computes it in each step
        if kept and times and (timesteps is not None or not one.table.labels):
            one.known = known_rows(one, times)
    return made


def _fit(policy: Policy | None, call: FirstCall) -> Policy | None:
    """A policy as the live pipeline takes it for the run that begins with a call.

    Raises:
        PolicyError: it was made for something else.
    """
    if policy is None:
        return None
    if hasattr(policy, "for_call"):
        inputs = called(leaves((), call.args, call.kwargs))
        weights = fingerprint(unwrapped(call.model)) if getattr(policy, "made_for", None) is not None else None
        policy = policy.for_call(replace(call.known, size=inputs.size, dtype=inputs.dtype, model=weights))
    return for_run(policy, call.steps, call.guided)


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and those by name."""
    given = example_inputs
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, Tensor):
        return (given,), {}
    if (
        isinstance(given, Sequence)
        and len(given) == 2
        and isinstance(given[0], tuple)
        and isinstance(given[1], Mapping)
    ):
        return given[0], dict(given[1])
    if isinstance(given, Sequence):
        return tuple(given), {}
    raise ExportError(f"example_inputs must be a tuple or a dictionary of arguments, not {type(given).__name__}")


class Traced:
    """A model as it is written: the table of its steps, what they call, and its tensors.

    Attributes:
        laid: the plan in the graph; its entries are what is to be compiled.
        tensors: weights and constants, by name; those without a name in the model have one in brackets.
        known: what follows from the time, as far as that is known (``known.py``).
        recorder: of the one graph.
        policy: that it follows.
        tables: of positions among the arguments, as layouts.
    """

    about: About
    table: Table
    laid: LaidOut
    tensors: dict[str, Tensor]
    known: dict[str, Any]
    recorder: Recorder
    policy: Policy
    tables: tuple[Layout, ...]

    def __init__(
        self,
        model: nn.Module,
        policy: Policy | str | None,
        call: tuple[Any, Mapping[str, Any]],
        *,
        in_memory: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ExportError(
                f"export takes a torch.nn.Module or what optimize made of one, not {type(model).__name__}"
            )
        handle = handle_of(model)
        if policy is None:
            if handle is None:
                raise PolicyError("a policy is needed: the model is not an optimised one that has its own")
            policy = handle._session.policy
        if handle is not None:
            options = {"grid": handle._session.grid, "hoist": handle._session.hoist, **options}
        plain = unwrapped(model)
        if has_hooks(plain):
            raise ExportError(
                f"{type(plain).__name__} has hooks, or a forward, put around it (offloading, timers, what changes its "
                "arguments or results), which no file can hold: remove them"
            )
        session = _Session(policy, lowering="eager", **options)
        args, kwargs = (mapped(given, _apart) for given in call)
        with torch.no_grad():
            out = wrap(plain, session)(*args, **kwargs)
        recorder = _the_graph(session, type(plain).__name__)
        given = inspect.signature(plain.forward).parameters
        parameters = _parameters(plain)
        found = leaves(parameters, args, kwargs)
        self.recorder, self.policy = recorder, session.applied
        self.tables = layouts_of(found.values(), None)
        self.laid = recorder.laid_out(in_memory=in_memory)
        self.known = {}
        self.table = table = self.laid.table
        self._name_inputs(table, recorder, plain, found)
        defaults = {n: p.default for n, p in given.items() if isinstance(p.default, _SCALARS)}
        device = next((v.device for v in recorder.inputs if isinstance(v, Tensor) and v.device.type != "cpu"), None)
        self.about = About(
            model=type(plain).__name__,
            torch=torch.__version__,
            machine=archive.machine(device or torch.device("cpu")),
            policy=_policy(self.policy),
            parameters=parameters,
            defaults=defaults,
            given=fixed(found, defaults),
            returns=arrangement(out, _Results(recorder.results, found)),
            config=_config(plain),
            names=self._aliases,
        )

    def _name_inputs(self, table: Table, recorder: Recorder, model: nn.Module, found: Mapping[str, Any]) -> None:
        """What stands at which place before anything is computed."""
        own: dict[int, str] = {}
        self._aliases: dict[str, str] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, value in named:
            if own.setdefault(id(value), name) != name:
                self._aliases[name] = own[id(value)]
        paths = {id(value): path for path, value in found.items() if isinstance(value, Tensor)}
        self.tensors = {}
        for place, value in enumerate(recorder.inputs):
            if place in recorder.owned:
                name = own.get(id(value), f"(input {place})")
                table.weights[place] = name
                self.tensors[name] = _compact(value)
            elif id(value) in paths:
                table.inputs[place] = paths[id(value)]
                table.kinds[place] = {
                    "shape": list(value.shape),
                    "stride": list(value.stride()),
                    "dtype": str(value.dtype).removeprefix("torch."),
                    "device": str(value.device),
                }
            else:
                raise ExportError(
                    "the model reads a tensor that is neither an argument nor its own: make it a buffer "
                    "(register_buffer)"
                )
        for place, value in self.laid.constants.items():
            table.weights[place] = f"(constant {place})"
            self.tensors[f"(constant {place})"] = _compact(value)


def _parameters(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's arguments, in order."""
    given = inspect.signature(model.forward).parameters
    return tuple(n for n, p in given.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


class _Session(Session):
    runs = Recorder


class _Results:
    """Which tensor of a model's result is which: the number of a result of the graph, or the path of an argument."""

    def __init__(self, results: Sequence[Any], found: Mapping[str, Any]) -> None:
        self._known: dict[int, Any] = {id(v): path for path, v in found.items() if isinstance(v, Tensor)}
        self._known |= {id(v): i for i, v in enumerate(results) if isinstance(v, Tensor)}

    def __call__(self, value: Tensor) -> Any:
        if id(value) not in self._known:
            raise ExportError("the model returns a tensor that its graph does not make")
        return self._known[id(value)]


def _the_graph(session: Session, name: str) -> Recorder:
    """The one graph of a model.

    Raises:
        ExportError: there are several, or it does what a file cannot.
    """
    if session.broken or len(session.executors) != 1 or session.graphs != 1:
        raise ExportError(f"{name} cannot be exported: {session.split(session.graphs) or 'it is not one graph'}")
    (recorder,) = session.executors
    assert isinstance(recorder, Recorder)
    if recorder.program.written:
        raise ExportError(f"{name} cannot be exported: it changes one of its inputs in place (as a cache of keys)")
    calls = recorder.program.module.graph.find_nodes(op="call_function", target=SIZED_BY_VALUES)
    if calls:
        raise ExportError(
            f"{name} cannot be exported: the size of what {source_line(calls[0])} makes follows from values, and no "
            "file knows that part: give it a size (pad, or mask)"
        )
    return recorder


def _apart(value: Any) -> Any:
    """An argument that is no other's object, so that the graph's inputs tell which argument they are."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _compact(value: Tensor) -> Tensor:
    """A tensor without the rest of its memory, in its own strides, of which dimensions may share memory."""
    plain = value.detach()
    if not plain.numel():
        return plain.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(plain.shape, plain.stride(), strict=True))
    return plain.as_strided((span,), (1,)).clone().as_strided(plain.shape, plain.stride())


def _policy(policy: Policy) -> Any:
    try:
        return json.loads(json.dumps(as_data(policy)))
    except (PolicyError, TypeError, TocaError):
        return told(policy)


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping):
        return None
    # What begins with an underscore says where it came from.
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(own, default=repr))
