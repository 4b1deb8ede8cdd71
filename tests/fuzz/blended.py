"""The literal form of a run: the model executed densely and eagerly, each branch's output blended by a mask with what it
was, forecast from its full steps, and ranges of blocks stood in for. Only the masks come from the run under test."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.grammar import Spec
from tests.fuzz.mixes import TOKENWISE
from tests.fuzz.models import Attend, Joint, Place, Transformer, as_it_is, both_as_they_are, mixed_as_it_is
from toca_compile.policies import Composition, Compute, Queries, SkipBlocks


class Ambiguous(Exception):
    """It cannot be told what a site or a range keeps; the message says why."""


class Twin(Transformer):
    """The model with a range of blocks that may be stood in for."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.around: Callable[..., Any] | None = None

    def run_block(self, i: int, block: Any, h: Tensor, s: Tensor | None, given: Any) -> tuple[Tensor, Tensor | None]:
        """As the literal form says."""
        if self.around is None:
            return block(h, s, *given)
        return self.around(i, h, s, lambda: block(h, s, *given))

    @property
    def branches(self) -> dict[str, Place]:
        """The places of all branches, by the path under which they keep. One ending in ``!`` is a sum of branches."""
        found: dict[str, Place] = {}
        stage: Any
        for stage in self.blocks:
            if stage.spec.skip == "add":
                found[f"{stage.path}.skip"] = stage.place
            if stage.joint is not None:
                found[f"{stage.joint.path}#picture"], found[f"{stage.joint.path}#words"] = (
                    stage.place,
                    stage.joint.words,
                )
                found[stage.joint.mlp.path], found[stage.joint.mlp_words.path] = stage.place, stage.joint.words
            elif stage.spec.style == "sum":
                found[f"{stage.path}.branches!"] = stage.place
            elif stage.spec.style != "encoder":
                found |= {branch.path: branch.place for branch in stage.branches}
        return found


@dataclass
class Series:
    """A value kept at some steps with its differences as TaylorSeer defines them, each token's of its own age; or, for
    a polynomial, all values."""

    basis: str
    order: int = 0
    steps: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    differences: list[Tensor] = field(default_factory=list)
    when: Tensor | None = None  # the step at which each token was last computed, laid as the value
    made: int = 0

    def keep(self, value: Tensor, step: int, early: bool) -> None:
        """The whole value, computed at this step."""
        new = self._differences(value, step)
        if early or not self.steps:
            new = [new[0], *(self.differences[1:] or [torch.zeros_like(new[0])] * self.order)]
        self.made = 0 if early or not self.steps else min(self.order, self.made + 1)
        self.differences, self.when = new, torch.full((1,) * value.dim(), float(step))
        self.steps.append(step)
        self.values.append(value)

    def blend(self, value: Tensor, mask: Tensor, step: int, update: bool) -> Tensor:
        """The value at the masked tokens, and the forecast at the others."""
        expected = self.at(step)
        if not bool(mask.any()):
            return expected
        if update:
            new = self._differences(value, step)
            self.differences = [torch.where(mask, a, b) for a, b in zip(new, self.differences, strict=True)]
            assert self.when is not None
            self.when = torch.where(mask, float(step), self.when)
        return torch.where(mask, value, expected)

    def at(self, step: int) -> Tensor:
        """The forecast at a later step."""
        assert self.when is not None
        if self.basis == "taylor":
            age = step - self.when
            terms = [d * age**i / math.factorial(i) for i, d in enumerate(self.differences[: self.made + 1])]
            return sum(terms[1:], terms[0]).to(self.values[-1].dtype)
        steps, values = self.steps[-self.made - 1 :], self.values[-self.made - 1 :]
        if self.made == 0:
            return self.differences[0].to(values[0].dtype)
        total = torch.zeros_like(values[0], dtype=torch.float64)
        for at, value in zip(steps, values, strict=True):  # Lagrange: through the last full steps
            total += value.double() * math.prod((step - other) / (at - other) for other in steps if other != at)
        return total.to(values[0].dtype)

    def _differences(self, value: Tensor, step: int) -> list[Tensor]:
        new = [value.double()]
        assert self.when is not None or not self.differences
        for old in self.differences[: self.order]:
            new.append((new[-1] - old) / (step - self.when))
        return new


class Blended:
    """One run's literal form.

    Raises:
        Ambiguous: the policy, or a site of the model, is more than this form tells.
    """

    def __init__(self, twin: Twin, policy: Any, sites: Sequence[Any]) -> None:
        self.twin, self.sites = twin, sites
        self.parts = policy if isinstance(policy, Composition) else policy.composition()
        done = actions(policy)
        self.skips = next((a for a in done if isinstance(a, SkipBlocks)), None)
        self.orders = any(getattr(a, "order", 0) for a in done)
        self.update = all(getattr(a, "update", True) for a in done)
        self._check(done)
        self.basis = self.parts.basis
        self.kept: dict[str, Series] = {}
        self.range: list[Series] = []
        self.keys: dict[str, tuple[Tensor, Tensor]] = {}
        self.held: dict[str, Tensor] = {}
        self.ran: set[str] = set()  # the branches that are sites, in this step
        self.step = 0

    @property
    def label(self) -> str:
        """What the form told beside a blend, for the counts."""
        done = actions(self.parts)
        told = [" with skips"] if self.skips is not None else []
        told += [" with forecasts"] if self.orders else []
        told += [" with cached keys"] if self.keys else []
        told += [" of tokens kept once"] if not all(getattr(a, "update", True) for a in done) else []
        return ",".join(told)

    def _check(self, done: Sequence[Any]) -> None:
        if len({getattr(a, "update", True) for a in done}) > 1:
            raise Ambiguous("tokens kept by some rules and not by others")
        cached = any(isinstance(a, Queries) and a.keys != "fresh" for a in done)
        if (self.orders or cached) and self.skips is None:
            if self.parts.alternate or any(r.depths != (0.0, 1.0) for r in self.parts.rules):
                raise Ambiguous("forecasts or cached keys by depth or in turns")
        for block in self.twin.spec.blocks:
            attends = [b for b in block.branches if b.body in ("attention", "cross", "fused")]
            if block.pool and not (attends and len(block.branches) > 1):
                raise Ambiguous("a block on fewer tokens that is one branch of those before it")
        if self.skips is not None:
            if self.twin.spec.text == "joint" or self.twin.spec.shared_weights:
                raise Ambiguous("several streams through skipped blocks")
            if self.orders or cached:
                raise Ambiguous("forecasts or cached keys beside skipped blocks")
            blocks = self.twin.spec.blocks
            if any(block.pool for block in blocks):
                raise Ambiguous("a range of blocks that begins or ends with fewer tokens")
            if any(block.skip == "cat" for block in blocks):
                raise Ambiguous("a range of blocks may begin behind what joins an earlier stream")
            if any(block.skip for block in blocks) and any(r.add == "in_place" for b in blocks for r in b.branches):
                raise Ambiguous("an earlier stream that blocks among the skipped ones may have added to")
            end = blocks[-1 - self.skips.last].branches[-1] if self.skips.last < len(blocks) else None
            if end is not None and end.place == "post":
                # What is kept is the sum in front of that norm, which runs at every step: here both would be kept.
                raise Ambiguous("a range of blocks that ends in a norm of the stream")

    def __call__(self, step: int, given: Sequence[Tensor], fresh: dict[str, Tensor], kind: str) -> Tensor:
        """The output of one step, whose sites computed the tokens ``fresh``."""
        masks = masks_of(self.twin, self.sites, fresh)
        self.step, self.ran = step, set()
        kinds = {owner_of(self.twin, s): s.kind for s in self.sites}
        keepers: list[Any] = [m for m in self.twin.modules() if hasattr(m, "keep")]
        try:
            for part in keepers:
                part.keep = lambda path, value, lay: self._keep(path, value, lay, masks.get(path), kinds.get(path))
                self._watch_keys(part, masks, kinds)
            for site in self.sites:
                if site.kind == "parallel":
                    self._hold(site, masks[owner_of(self.twin, site)])
            skipped = self._skipped(masks, kind) if self.skips is not None else frozenset()
            if self.skips is not None:
                self.twin.around = lambda i, h, s, run: self._around(i, h, s, run, skipped, kind == "skip")
            return self.twin(*given)
        finally:
            self.twin.around = None
            for part in keepers:
                part.keep = as_it_is
            for attend in self.twin.modules():
                if isinstance(attend, Attend):
                    attend.keep_keys, attend.hold = both_as_they_are, mixed_as_it_is

    def _hold(self, site: Any, mask: Tensor) -> None:
        """A site of attention beside an MLP, partial in the MLP alone: the attention is that of the last full step."""
        path = owner_of(self.twin, site).rstrip("!")
        inner = [(n, m) for n, m in self.twin.named_modules() if isinstance(m, Attend) and n.startswith(f"{path}.")]
        partial = bool(mask.any()) and not bool(mask.all())
        if partial and any(m.spec.core in ("mha", "linear", "prefix", "sigmoid") or m.cross for _, m in inner):
            raise Ambiguous("a partial site that holds more than softmax attention")
        does = self._does(site.kind)
        fresh = isinstance(does, Queries) and "queries" in site.actions
        if partial and isinstance(does, Queries) and does.keys != "fresh":
            raise Ambiguous("cached keys that are more than an attention's own")

        def holder(name: str) -> Callable[[Tensor], Tensor]:
            def hold(out: Tensor) -> Tensor:
                if bool(mask.all()):
                    self.held[name] = out
                return out if fresh or not partial else self.held[name]

            return hold

        for name, attend in inner:
            attend.hold = holder(name)

    def _keep(
        self, path: str, value: Tensor, lay: Callable[[Tensor], Tensor], mask: Tensor | None, kind: str | None
    ) -> Tensor:  # fmt: skip
        if mask is None:
            return value
        if path in self.ran:
            raise Ambiguous("a branch that runs in several blocks, of which one is a site")
        self.ran.add(path)
        series = self.kept.setdefault(path, Series(self.basis, getattr(self._does(kind), "order", 0)))
        if bool(mask.all()):
            series.keep(value, self.step, self.step < self.parts.differences_from)
            return value
        if series.when is None:
            raise Ambiguous("a site that computed nothing at step 0")
        return series.blend(value, lay(mask[..., None]), self.step, self.update)

    def _does(self, kind: str | None) -> Any:
        """What sites of that kind do between full steps."""
        return next((rule.do for rule in self.parts.rules if not rule.kinds or kind in rule.kinds), None)

    def _watch_keys(self, part: Any, masks: dict[str, Tensor], kinds: dict[str, str]) -> None:
        """Keys and values of an attention that takes them from the cache."""
        path = getattr(part, "path", "")
        cached = any(isinstance(rule.do, Queries) and rule.do.keys != "fresh" for rule in self.parts.rules)
        if (
            isinstance(part, Joint)
            and cached
            and any(bool(m.any()) for p, m in masks.items() if p.startswith(f"{path}#"))
        ):
            if not all(bool(m.all()) for p, m in masks.items() if p.startswith(f"{path}#")):
                raise Ambiguous("cached keys that are more than an attention's own")
        does = self._does(kinds.get(path))
        if not isinstance(does, Queries) or does.keys == "fresh" or path not in masks:
            return
        mask = masks[path]
        partial = bool(mask.any()) and not bool(mask.all())
        body = getattr(part, "body", None)
        if not isinstance(body, Attend) or body.cross or body.spec.core == "mha" or not _plain_keys(part):
            if partial:
                raise Ambiguous("cached keys that are more than an attention's own")
            return
        phase = self.parts.when.phases(self.parts.num_steps, kinds[path])[self.step]
        fresh = not partial or (does.refresh and phase % does.refresh == 0)
        chosen = mask[:, None, :, None]

        def keep_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if not bool(mask.any()):
                return k, v
            if fresh:
                self.keys[path] = (k, v)
            elif does.keys == "update":
                old = self.keys[path]
                self.keys[path] = torch.where(chosen, k, old[0]), torch.where(chosen, v, old[1])
            return self.keys[path]

        body.keep_keys = keep_keys

    # -- ranges of blocks ---------------------------------------------------------------------------------------------

    def _skipped(self, masks: dict[str, Tensor], kind: str) -> frozenset[int]:
        """The blocks that a step skipped, or the range that it could have."""
        blocks = range(len(self.twin.blocks))
        if kind == "skip":
            by_block = {
                i: [bool(m.any()) for path, m in masks.items() if path.startswith(f"blocks.{i}.")] for i in blocks
            }
            if any(len(set(found)) != 1 for found in by_block.values()) or set(self.twin.branches) - set(masks):
                raise Ambiguous("skipped sites that are no whole blocks of the model")
            return frozenset(i for i, found in by_block.items() if not found[0])
        assert self.skips is not None
        return frozenset(blocks[self.skips.first : len(blocks) - self.skips.last])

    def _around(
        self, i: int, h: Tensor, s: Tensor | None, run: Callable[[], Any], skipped: frozenset[int], skips: bool
    ) -> Any:  # fmt: skip
        assert self.skips is not None
        expected = frozenset(range(self.skips.first, len(self.twin.blocks) - self.skips.last))
        if skipped != expected:
            raise Ambiguous("skipped sites that are no whole blocks of the model")
        if i not in skipped:
            return run()
        if i == min(skipped):
            self.entered = h.clone()  # blocks may add to the stream in place
        if skips:
            if i > min(skipped):
                return h, s
            kept = self.range[0].values[-1]
            return (h + kept if self.skips.residual else kept.clone()), s
        h, s = run()
        if i == max(skipped):
            self.range = [Series(self.basis)]
            self.range[0].keep(h - self.entered if self.skips.residual else h.clone(), self.step, True)
        return h, s


def _plain_keys(part: Any) -> bool:
    """Whether a branch's keys and values are made token by token, and read by one attention of all tokens."""
    spec, attention = part.spec, part.spec.attention
    mixed = {spec.before, spec.inside} - TOKENWISE - {""} or spec.norm == "tokens"
    whole = (
        attention.scope == "all"
        and attention.keys in ("own", "single")
        and attention.core not in ("linear", "prefix", "bmm")
    )
    return not mixed and whole


def actions(policy: Any) -> list[Any]:
    """What a policy does between full steps."""
    parts = (
        policy if isinstance(policy, Composition) else policy.composition() if hasattr(policy, "composition") else None
    )
    return [rule.do for rule in (*parts.rules, *parts.alternate)] if parts is not None else [Compute()]


# -- which mask belongs to which branch --------------------------------------------------------------------------------


def owner_of(twin: Twin, site: Any) -> str:
    """The path of the branch that is the site.

    Raises:
        Ambiguous: none, or several.
    """
    branches, name = twin.branches, site.name.split("[")[0]
    owners = [
        path for path in branches
        if (name == path[:-1] if path.endswith("!") else f"{name}.".startswith(f"{path.split('#')[0]}."))
    ]  # fmt: skip
    deepest = max((len(path.split("#")[0]) for path in owners), default=0)
    owners = [path for path in owners if len(path.split("#")[0]) == deepest]
    if len(owners) > 1:  # the streams of one attention
        owners = [path for path in owners if branches[path].tokens == site.tokens]
    if len(owners) != 1:
        raise Ambiguous("a site that is no single branch of the model")
    if name.rpartition(".")[2] in ("before", "inside", "after"):
        raise Ambiguous("a site that is an op within a branch, which adds to what it is given")
    return owners[0]


def masks_of(twin: Twin, sites: Sequence[Any], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each branch that is a site, by the path under which it keeps: bool ``[batch, tokens]``."""
    branches = twin.branches
    masks: dict[str, Tensor] = {}
    if len({s.name for s in sites}) < len(sites):
        raise Ambiguous("several sites of one name")
    if any(s.name not in fresh for s in sites):
        raise Ambiguous("a site that the last step did not reach")
    for site in sites:
        mask, owner = fresh[site.name], owner_of(twin, site)
        if owner in masks:
            raise Ambiguous("several sites in one branch")
        masks[owner] = _laid(mask, branches[owner], twin)
    return masks


def _laid(mask: Tensor, place: Place, twin: Twin) -> Tensor:
    """A site's mask as ``[batch, tokens]`` of the stream: sites may number frames, places or windows as samples."""
    b, n = twin.spec.batch, place.tokens
    if bool(mask.all()) or not bool(mask.any()):
        return torch.full((b, n), bool(mask.all()))
    f, s = place.frames, place.spots
    candidates: list[Tensor] = []
    if place.layout in ("bsfc", "fbsc"):
        order = {"bsfc": (b, s, f), "fbsc": (f, b, s)}[place.layout]
        back = {"bsfc": (0, 2, 1), "fbsc": (1, 0, 2)}[place.layout]
        if mask.shape == (order[0] * order[1], order[2]) or (mask.shape == (b, n) and place.layout == "bsfc"):
            candidates.append(mask.reshape(order).permute(back).reshape(b, n))
        inner = {"bsfc": (b, f, s), "fbsc": (b, s, f)}[place.layout]
        if mask.shape == (inner[0] * inner[1], inner[2]):
            laid = mask.reshape(inner)
            candidates.append((laid if place.layout == "bsfc" else laid.transpose(1, 2)).reshape(b, n))
    else:
        if mask.shape in ((b, n), (1, n)):
            candidates.append(mask.expand(b, n))
        if mask.shape == (1, b):  # a model that shows no attention may have its samples for tokens
            candidates.append(mask.T.expand(b, n))
        splits = {(f, s), (f * place.height, place.width)}
        splits |= {(w, n // w) for w in (2, 3, 5) if n % w == 0 and "scope='window'" in repr(twin.spec)}
        for outer, inside in splits:
            if 1 in (outer, inside) or outer * inside != n:
                continue
            if mask.shape == (b * outer, inside):
                candidates.append(mask.reshape(b, n))
            if mask.shape == (b * inside, outer):
                candidates.append(mask.reshape(b, inside, outer).transpose(1, 2).reshape(b, n))
    if not candidates or any(not torch.equal(candidates[0], c) for c in candidates[1:]):
        raise Ambiguous("a mask whose places are not told by its shape")
    return candidates[0]
