"""A summary of the last sampling: what its steps were, what they took, and what caching saved."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from toca_compile.ir.types import StepKind
from toca_compile.report.report import Report, Subject
from toca_compile.report.text import amount, labelled, megabytes, policy_name, table, title
from toca_compile.runtime.step_control import StepRecord


@dataclass(frozen=True)
class StepSummary:
    """The calls of one kind.

    Attributes:
        calls: how many.
        timed: how many of them tell the time: in the others something was compiled.
        seconds: what the timed ones took together.
        flops: of all of them together.
    """

    calls: int
    timed: int
    seconds: float
    flops: int

    @property
    def mean_seconds(self) -> float | None:
        """Of a timed call; None where there is none."""
        return self.seconds / self.timed if self.timed else None


@dataclass(frozen=True)
class Summary:
    """What the model calls of the last sampling did. Of a pipeline, sums over its ``transformers``.

    Attributes:
        model: the class of the model, or of several.
        policy: as in ``explain``.
        steps: calls by kind (``"full"``, ``"partial"``, …).
        passes: names of the guidance passes, each of which has caches of its own.
        seconds: all calls, without those in which something was compiled.
        compiling_calls, compiling_seconds: those.
        flops, full_flops: of all calls, and of as many full steps.
        seconds_saved: against as many full steps, each as long as the mean of this sampling's own; an estimate. None
            where no full step was timed.
        cache_bytes, peak_cache_bytes: now, and at most.
        conditioning_bytes: what is kept, from one sampling to the next, of what follows from the timestep.
        graphs: how many were compiled; ``breaks``: why torch.compile split the model; ``recompiles``: graphs that it
            made after the first call (another shape, another Python number).
        warnings: what was warned of.
        transformers: of a pipeline, each by its name; empty for a model.
    """

    model: str
    policy: str
    steps: dict[str, StepSummary]
    passes: tuple[str, ...]
    seconds: float
    compiling_calls: int
    compiling_seconds: float
    flops: int
    full_flops: int
    seconds_saved: float | None
    cache_bytes: int
    peak_cache_bytes: int
    conditioning_bytes: int
    graphs: int
    breaks: tuple[str, ...]
    recompiles: int
    warnings: tuple[str, ...]
    transformers: dict[str, "Summary"] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """How many model calls there were."""
        return sum(step.calls for step in self.steps.values())

    @property
    def flops_saved(self) -> int:
        """Against as many full steps."""
        return self.full_flops - self.flops

    @property
    def flop_speedup(self) -> float | None:
        """How many times fewer FLOPs; None before the first call."""
        return self.full_flops / self.flops if self.flops else None

    @property
    def speedup(self) -> float | None:
        """How many times faster, as estimated; None where nothing tells."""
        if self.seconds_saved is None or not self.seconds:
            return None
        return (self.seconds + self.seconds_saved) / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        derived = ("calls", "flops_saved", "flop_speedup", "speedup")
        data = asdict(self) | {name: getattr(self, name) for name in derived}
        data |= {name: list(getattr(self, name)) for name in ("passes", "breaks", "warnings")}
        data["steps"] = {k: asdict(s) | {"mean_seconds": s.mean_seconds} for k, s in self.steps.items()}
        data["transformers"] = {name: part.as_dict() for name, part in self.transformers.items()}
        return data

    def __str__(self) -> str:
        parts = self.transformers or {"": self}
        return "\n\n".join("\n".join(_text(name, part)) for name, part in parts.items())


def summarise(subjects: Mapping[str, Subject]) -> Summary:
    """The summary of one model, or of the transformers of a pipeline."""
    parts = {name: _of(name, subject) for name, subject in subjects.items()}
    if list(parts) == [""]:
        return parts[""]
    every = list(parts.values())
    saved = [p.seconds_saved for p in every if p.seconds_saved is not None]
    return Summary(
        model=", ".join(dict.fromkeys(p.model for p in every)),
        policy=", ".join(dict.fromkeys(p.policy for p in every)),
        steps={k: _joined([p.steps[k] for p in every if k in p.steps]) for k in _kinds(every)},
        passes=tuple(dict.fromkeys(name for p in every for name in p.passes)),
        seconds=sum(p.seconds for p in every),
        compiling_calls=sum(p.compiling_calls for p in every),
        compiling_seconds=sum(p.compiling_seconds for p in every),
        flops=sum(p.flops for p in every),
        full_flops=sum(p.full_flops for p in every),
        seconds_saved=sum(saved) if saved else None,
        cache_bytes=sum(p.cache_bytes for p in every),
        peak_cache_bytes=sum(p.peak_cache_bytes for p in every),
        conditioning_bytes=sum(p.conditioning_bytes for p in every),
        graphs=sum(p.graphs for p in every),
        breaks=tuple(dict.fromkeys(b for p in every for b in p.breaks)),
        recompiles=sum(p.recompiles for p in every),
        warnings=tuple(dict.fromkeys(w for p in every for w in p.warnings)),
        transformers=parts,
    )


def _of(name: str, subject: Subject) -> Summary:
    session, report = subject.session, Report({name: subject})
    records = session.control.records
    by_kind: dict[str, list[StepRecord]] = {k.value: [r for r in records if r.kind is k] for k in StepKind}
    flops = {id(r): report.record_flops(r, name) for r in records}
    steps = {
        kind: StepSummary(
            len(own), sum(not r.compiled for r in own), sum(r.seconds for r in own if not r.compiled),
            sum(flops[id(r)] for r in own),
        )
        for kind, own in by_kind.items() if own
    }  # fmt: skip
    full = steps.get("full")
    mean = full.mean_seconds if full is not None else None
    timed, seconds = sum(s.timed for s in steps.values()), sum(s.seconds for s in steps.values())
    passes = tuple(dict.fromkeys(r.context for r in records))
    constant = report.constant_flops() * len(passes)
    return Summary(
        model=subject.model,
        policy=policy_name(session.policy),
        steps=steps,
        passes=passes,
        seconds=seconds,
        compiling_calls=len(records) - timed,
        compiling_seconds=sum(r.seconds for r in records if r.compiled),
        flops=sum(flops.values()) + constant if records else 0,
        full_flops=sum(report.full_flops(r, name) for r in records),
        seconds_saved=mean * timed - seconds if mean is not None else None,
        cache_bytes=session.control.cache_bytes,
        peak_cache_bytes=session.control.peak_bytes,
        conditioning_bytes=session.control.conditioning_bytes,
        graphs=len(session.executors),
        breaks=tuple(session.breaks),
        recompiles=session.recompiles,
        warnings=tuple(session.warned),
    )


def _kinds(parts: list[Summary]) -> list[str]:
    return [k.value for k in StepKind if any(k.value in p.steps for p in parts)]


def _joined(parts: list[StepSummary]) -> StepSummary:
    return StepSummary(
        sum(p.calls for p in parts), sum(p.timed for p in parts), sum(p.seconds for p in parts),
        sum(p.flops for p in parts),
    )  # fmt: skip


def _text(name: str, part: Summary) -> list[str]:
    lines = title(f"{name}: {part.model}" if name else part.model)
    lines += labelled("policy", part.policy)
    if not part.calls:
        return [*lines, *labelled("steps", "none yet: it was not called"), *_warned(part)]
    rows = [("step", "calls", "seconds", "ms each", "FLOPs each")]
    for kind, step in part.steps.items():
        mean = step.mean_seconds
        each = f"{mean * 1e3:.1f}" if mean is not None else "–"
        rows.append((kind, str(step.calls), f"{step.seconds:.3f}", each, amount(step.flops / step.calls)))
    total = ("all", str(part.calls), f"{part.seconds:.3f}", "", "")
    lines += ["", *table([*rows, total], right=(1, 2, 3, 4)), ""]
    if len(part.passes) > 1:
        lines += labelled("passes", f"{len(part.passes)} a step ({', '.join(part.passes)}), each with its own cache")
    if part.compiling_calls:
        calls = "1 call" if part.compiling_calls == 1 else f"{part.compiling_calls} calls"
        lines += labelled("compiling", f"{part.compiling_seconds:.1f} s in {calls}, whose time is not counted above")
    fewer = f"{part.flop_speedup:.2f}× fewer than with every step full" if part.flop_speedup else ""
    lines += labelled("FLOPs", f"{amount(part.full_flops)} → {amount(part.flops)}, {fewer}")
    if part.speedup is not None and part.seconds_saved is not None:
        lines += labelled(
            "time",
            f"{part.seconds + part.seconds_saved:.3f} → {part.seconds:.3f} s, {part.speedup:.2f}× faster (an estimate: "
            "every step as long as the mean full step of this sampling)",
        )
    else:
        lines += labelled("time", "no full step without compiling, so what was saved is not known: sample again")
    lines += labelled("cache", f"{megabytes(part.peak_cache_bytes)} at most, {megabytes(part.cache_bytes)} now")
    if part.conditioning_bytes:
        lines += labelled(
            "timesteps", f"{megabytes(part.conditioning_bytes)} of embeddings and modulations, kept by time"
        )
    broken = f"{len(part.breaks)} graph breaks: {', '.join(part.breaks)}" if part.breaks else "no graph break"
    again = {0: "no recompile", 1: "1 recompile"}.get(part.recompiles, f"{part.recompiles} recompiles")
    lines += labelled("graphs", f"{part.graphs}, {again}, {broken}")
    return [*lines, *_warned(part)]


def _warned(part: Summary) -> list[str]:
    return [line for warning in part.warnings for line in labelled("warning", warning)]
