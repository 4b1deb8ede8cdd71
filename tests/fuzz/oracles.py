"""What must hold of any model under any policy, told without the compiler's own code.

* **constant**: the same inputs at every step give the uncached output, whatever is reused, forecast or recomputed;
* **full**: a step whose record says that it is full gives the uncached output (``FullCompute``: bit for bit);
* **blend**: a run that reuses, or recomputes some tokens, is the model run densely with every branch's output blended by
  ``opt.fresh_tokens()`` with what it was;
* **replay**: a policy gives the same outputs again after others were followed in between; **restart**: after a run that
  was given up; **contexts**: beside another run.

And: errors are ``TocaError``s, nothing is warned of, there are as many records as calls, and each tells how many tokens
were computed (**counts**).
"""

import dataclasses
import logging
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import toca_compile
from tests.fuzz.blended import Ambiguous, Blended, Twin, actions
from tests.fuzz.grammar import Spec, written
from tests.fuzz.models import build, inputs, made
from toca_compile import FullCompute, NoSiteError, PolicyError, TocaError, UnsupportedGraphError, VerifyError
from toca_compile.policies import Queries

# What a plain run may say: choices that the user should know of, none of them a fault.
HARMLESS = (
    "ranked by age alone",
    "how the tokens lie in a picture",
    "joined between the blocks",
    "in this graph no site can",
    "so nothing is cached",  # a drawn policy may compute every step
    "changes its input",
    "changes one of its inputs",  # a fragment behind a graph break runs as it is
)


@dataclass(frozen=True)
class Failure:
    """One thing that must hold and did not. ``kind`` is kept when the case is made smaller."""

    kind: str
    policy: Any
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}\n  policy = {written(self.policy)}"


@dataclass
class Tally:
    """Counts of what was run and seen."""

    models: int = 0
    runs: int = 0
    unusable: int = 0
    sites: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    applied: Counter[str] = field(default_factory=Counter)
    not_applied: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Count in what another process counted."""
        self.models, self.runs = self.models + other.models, self.runs + other.runs
        self.unusable += other.unusable
        for name in ("sites", "refusals", "applied", "not_applied", "failures"):
            getattr(self, name).update(getattr(other, name))

    def __str__(self) -> str:
        lines = [f"models {self.models}, runs {self.runs}, unusable draws {self.unusable}"]
        for name in ("sites", "applied", "not_applied", "refusals", "failures"):
            lines += [f"{name}:", *(f"  {count:6}  {what}" for what, count in getattr(self, name).most_common())]
        return "\n".join(lines)


class Unusable(Exception):
    """The description's model does not run without the compiler: nothing is learned of it."""


class _Off(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


class Subject:
    """One model under test: traced once, then run under one policy after another."""

    def __init__(self, spec: Spec, tally: Tally, lowering: str = "eager") -> None:
        self.spec, self.tally, self.lowering = spec, tally, lowering
        self.opt: Any = None
        self._plain: dict[tuple[bool, int], Tensor] = {}
        try:
            self.model, self.twin = build(spec), made(Twin(spec))
            self.noise = self._rounding()
        except Exception as error:
            raise Unusable(f"{type(error).__name__}: {error}") from error

    def plain(self, constant: bool, step: int) -> Tensor:
        """The uncached output at one call."""
        key = (constant, 0 if constant else step)
        if key not in self._plain:
            self._plain[key] = self.twin(*inputs(self.spec, key[1] + 1, constant)[key[1]])
        return self._plain[key]

    def _rounding(self) -> float:
        """How far rounding moves the output: the model's distance to itself in float64, with nothing rounded on the
        way, or to itself at inputs moved in their last digits, whichever is more."""
        exact = _without_islands(self.spec)
        far = 0.0
        for constant, step in ((True, 0), (False, 2)):
            given = inputs(self.spec, step + 1, constant)[step]
            here = self.plain(constant, step).double()
            wide = build(exact, torch.float64)(*(_as(x, torch.float64) for x in given)).double()
            near = self.twin(*(x * (1 + 2e-7) if x.is_floating_point() else x for x in given)).double()
            far = max(far, float((wide - here).abs().max()), float((near - here).abs().max()))
        return far if self.spec.dtype != "float64" else far + 1e-7

    def examine(self, policies: Sequence[Any]) -> list[Failure]:
        """All oracles on all policies. The first run is ``FullCompute``, which no model can be refused."""
        self.tally.models += 1
        found = []
        traced = self._guarded(FullCompute(), self._traced)
        if traced is not None:
            found = [traced] if isinstance(traced, Failure) else []
            self.tally.failures.update(failure.kind for failure in found)
            return found
        last: tuple[Any, list[Tensor]] | None = None
        for policy in policies:
            if isinstance(policy, FullCompute):
                continue
            outcome = self._guarded(policy, lambda p=policy: self._under(p))
            if isinstance(outcome, Failure):
                found.append(outcome)
            elif isinstance(outcome, list):
                last = last or (policy, outcome)
        if last is not None and not found:
            again = [self._replayed] if len(policies) > 1 else []
            for work in (*again, self._restarted, self._in_contexts):
                outcome = self._guarded(last[0], lambda work=work: work(*last))
                found += [outcome] if isinstance(outcome, Failure) else []
        self.tally.failures.update(failure.kind for failure in found)
        return found

    # -- runs -------------------------------------------------------------------------------------------------------

    def _guarded(self, policy: Any, work: Callable[[], Any]) -> Any:
        """What the work gives: a failure, also in place of an exception or a warning; "refused" where it may refuse."""
        with _listening() as heard:
            try:
                outcome = work()
            except (PolicyError, NoSiteError, UnsupportedGraphError) as error:
                self.tally.refusals[_reason(error)] += 1
                outcome = "refused"
            except _Off as off:
                outcome = Failure(off.kind, policy, off.detail)
            except Exception as error:
                if "ran uncached" in str(error) and "break" in repr(self.spec):
                    # Dynamo may give up on what is left of a model behind a graph break.
                    self.tally.refusals["TocaError: ran uncached"] += 1
                    return "refused"
                first = str(error).split("\n", 1)[0][:300]
                outcome = Failure(_kind(error), policy, f"{first}\n{_place(error)}")
        loud = [line for line in heard if not any(h in line for h in HARMLESS)]
        if loud and not isinstance(outcome, Failure):
            outcome = Failure("warning", policy, loud[0])
        return outcome

    def _traced(self) -> None:
        """The first run: every step is full, and at constant inputs bit for bit the model."""
        torch._dynamo.reset()
        self.opt = toca_compile.optimize(self.model, FullCompute(), lowering=self.lowering)
        for constant in (True, False):
            for i, given in enumerate(inputs(self.spec, 2, constant)):
                out, wanted = self.opt(*given), self.plain(constant, i)
                if not torch.equal(out, wanted):
                    raise _Off("bits", f"FullCompute at step {i}: {_distance(out, wanted)}")
        self.tally.applied["bits"] += 1
        for site in toca_compile.explain(self.opt).sites:
            self.tally.sites[
                f"{site.kind}: {' '.join(sorted(site.actions - {'skip', 'compute', 'reuse', 'forecast'})) or '–'}"
            ] += 1

    def _under(self, policy: Any) -> list[Tensor]:
        """A run at constant inputs and one at changing ones; the outputs of the second."""
        self.opt.policy = policy
        steps = policy.num_steps
        swell = _swell(policy)
        self._run(policy, inputs(self.spec, steps, True), lambda i, out: self._compare(
            "constant", out, self.plain(True, i), f"constant inputs, step {i} ({self.opt.steps[-1].kind})", swell
        ))  # fmt: skip
        self.tally.applied["constant"] += 1
        blend = self._blend(policy)
        self.opt.reset()
        outs: list[Tensor] = []

        names = Counter(site.name for site in toca_compile.explain(self.opt).sites)

        def step(i: int, out: Tensor) -> None:
            outs.append(out)
            told = self.opt.steps[-1].k
            for name, mask in self.opt.fresh_tokens().items():
                if names[name] == 1 and bool((mask.sum(1) != told[name]).any()):
                    raise _Off(
                        "counts", f"step {i}: {name} is told to compute {told[name]}, not {mask.sum(1).tolist()}"
                    )
            if str(self.opt.steps[-1].kind) == "full":
                self._compare("full", out, self.plain(False, i), f"full step {i}", 1.0)
            if blend is not None:
                blend(i, out)

        self._run(policy, inputs(self.spec, steps, False), step)
        self.opt.reset()
        return outs

    def _run(self, policy: Any, calls: Sequence[tuple[Tensor, ...]], look: Callable[[int, Tensor], None]) -> None:
        self.tally.runs += 1
        self._calls = calls
        for i, given in enumerate(self._given(calls)):
            out = self.opt(*given)
            look(i, out)
        records = [r.index for r in self.opt.steps]
        if records != list(range(len(calls))):
            raise _Off("steps", f"{len(calls)} calls, records {records}")

    def _given(self, calls: Sequence[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """What the model is called with: the calls' own tensors, or one text that is overwritten from call to call."""
        text = calls[0][2].clone()
        for x, t, y in calls:
            if self.spec.given_text == "in_place":
                text.copy_(y)
            yield x, t, text if self.spec.given_text == "in_place" else y

    def _replayed(self, policy: Any, before: list[Tensor]) -> None:
        """The same policy once more, after others."""
        self.opt.policy = policy
        self._run(policy, inputs(self.spec, policy.num_steps, False), lambda i, out: self._compare(
            "replay", out, before[i], f"after other policies, step {i}", 1e-3
        ))  # fmt: skip
        self.tally.applied["replay"] += 1

    def _restarted(self, policy: Any, before: list[Tensor]) -> None:
        """A run that is given up, and the next one where the time jumps back: no reset is needed on the host."""
        calls = inputs(self.spec, policy.num_steps, False)
        if self.spec.clock != "sine" or len(calls) < 3:
            return
        self.opt.policy = policy
        self.opt.reset()
        for given in self._given(calls[:3]):
            self.opt(*given)
        for i, given in enumerate(self._given(calls)):
            self._compare("restart", self.opt(*given), before[i], f"after a run that was given up, step {i}", 1e-3)
        self.tally.applied["restart"] += 1

    def _in_contexts(self, policy: Any, before: list[Tensor]) -> None:
        """Two runs in turns, each in a context of its own."""
        self.opt.policy = policy
        self.opt.reset()
        both = [self._given(inputs(self.spec, policy.num_steps, constant)) for constant in (False, True)]
        for i, (changing, constant) in enumerate(zip(*both, strict=True)):
            with self.opt.cache_context("changing"):
                self._compare("contexts", self.opt(*changing), before[i], f"two runs in turns, step {i}", 1e-3)
            with self.opt.cache_context("constant"):
                out = self.opt(*constant)
            self._compare(
                "contexts", out, self.plain(True, i), f"two runs in turns, constant, step {i}", _swell(policy)
            )
        self.opt.reset()
        self.tally.applied["contexts"] += 1

    def _blend(self, policy: Any) -> Callable[[int, Tensor], None] | None:
        """What holds each step of a run against the blended model; None where the policy is more than a blend."""
        report = toca_compile.explain(self.opt)
        asked = [a for a in actions(policy) if isinstance(a, Queries)]
        done = {a.keys for does in report.plan.does for a in does if isinstance(a, Queries)}
        try:
            if done - {a.keys for a in asked} - {"fresh" for a in asked if a.refresh}:
                raise Ambiguous("keys that cannot be updated are made anew")
            blended = Blended(self.twin, policy, report.sites)
        except Ambiguous as reason:
            self.tally.not_applied[f"blend: {reason}"] += 1
            return None
        over: list[str] = []

        def look(i: int, out: Tensor) -> None:
            kind = str(self.opt.steps[-1].kind)
            try:
                wanted = None if over else blended(i, self._calls[i], self.opt.fresh_tokens(), kind)
            except Ambiguous as reason:
                over.append(str(reason))
                self.tally.not_applied[f"blend: {reason}"] += 1
            if not over and wanted is not None:
                swell = 4.0 if not blended.orders else _swell(policy)
                self._compare("blend", out, wanted, f"step {i} ({kind}) against the blended model", swell)
                if i == len(self._calls) - 1:
                    self.tally.applied[f"blend{blended.label}"] += 1

        return look

    def _compare(self, kind: str, got: Tensor, wanted: Tensor, what: str, swell: float) -> None:
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise _Off(kind, f"{what}: {tuple(got.shape)} {got.dtype}, not {tuple(wanted.shape)} {wanted.dtype}")
        scale = max(float(wanted.abs().max()), 1e-3)
        bound = 1e-4 * scale + 4 * swell * self.noise
        off = (got.double() - wanted.double()).abs()
        if not bool((off <= bound).all()):
            raise _Off(kind, f"{what}: {_distance(got, wanted)}, bound {bound:.2g}")


def examine(
    spec: Spec, policies: Sequence[Any], tally: Tally | None = None, lowering: str = "eager"
) -> list[Failure]:  # fmt: skip
    """What fails of one model under these policies.

    Raises:
        Unusable: the model itself fails, uncached.
    """
    tally = Tally() if tally is None else tally
    with torch.inference_mode() if spec.inference_mode else torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the same arithmetic with and without the compiler
        try:
            subject = Subject(spec, tally, lowering)
            if not all(subject.plain(False, i).isfinite().all() for i in range(8)):
                tally.not_applied["the model itself is not finite"] += 1
                return []
            return subject.examine(policies)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch._dynamo.reset()


def _swell(policy: Any) -> float:
    """By how much a series may swell what rounding leaves in its differences: Σ 2ⁱ·xⁱ/i! over its orders."""
    order = max((getattr(a, "order", 0) for a in actions(policy)), default=0)
    return sum(2.0**i * policy.num_steps**i / math.factorial(i) for i in range(order + 1)) * 4


# -- small things --------------------------------------------------------------------------------------------------------


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What the package warns of."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("toca_compile")
    before = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield heard
    finally:
        log.removeHandler(handler)
        log.propagate = before


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _without_islands(spec: Spec) -> Spec:
    blocks = tuple(
        dataclasses.replace(block, branches=tuple(dataclasses.replace(b, island="") for b in block.branches))
        for block in spec.blocks
    )
    return dataclasses.replace(spec, blocks=blocks)


def _distance(got: Tensor, wanted: Tensor) -> str:
    off = (got.double() - wanted.double()).abs()
    return f"off by {float(off.max()):.3g} of {float(wanted.abs().max()):.3g} ({int((off > 1e-6).sum())} of {off.numel()} numbers)"


def _reason(error: Exception) -> str:
    """A refusal without what is particular to the model."""
    words = [w for w in str(error).split() if not any(ch.isdigit() for ch in w) and "." not in w.strip(".")]
    return f"{type(error).__name__}: {' '.join(words)[:110]}"


def _kind(error: Exception) -> str:
    """The kind of failure that an exception is: its type, and the function of ours that it came from."""
    if isinstance(error, VerifyError):
        return "verify"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    name = f"{type(error).__name__} in {frames[-1].name}" if frames else type(error).__name__
    return f"error {name}" if not isinstance(error, TocaError) else f"error {name}: {' '.join(str(error).split()[:4])}"


def _place(error: BaseException) -> str:
    """Where an exception came from: the last frames that are not torch's own."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/torch/" not in f.filename] or list(frames)
    return "\n".join(f"    {f.filename.split('/site-packages/')[-1]}:{f.lineno} {f.name}" for f in ours[-4:])
