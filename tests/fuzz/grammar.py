"""Random descriptions of diffusion transformers and of policies: frozen dataclasses whose defaults are the simplest
choice, so that a description gets simpler by going back to them, and that JSON or ``repr`` can tell."""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import toca_compile
from tests.fuzz.mixes import TABLE
from toca_compile import PolicyError, policies

LAYOUTS = ("bnc", "nbc", "flat", "bcn", "bchw", "bfsc", "bsfc", "fbsc")


@dataclass(frozen=True)
class Attention:
    """How queries meet keys. ``scope``: among which tokens; ``gate``: each head's, by what its queries are made of."""

    core: str = "sdpa"  # matmul einsum bmm linear prefix mha sigmoid flex
    scope: str = "all"  # window shifted tiles space time packed packed_into
    mask: str = ""  # additive boolean padding causal tril per_head
    rope: str = ""  # halves interleaved complex plane
    qk_norm: str = ""  # rms layer l2
    keys: str = "own"  # grouped single pooled memory strided
    fused: bool = True
    project: bool = True
    gate: str = ""  # sigmoid tanh


@dataclass(frozen=True)
class Branch:
    """``x + gate · after(body(before(norm(x) · scale + shift)))``, or without one or the other.

    ``place``: of the norm; ``inside``: an op on the hidden units of an MLP, or on queries, keys or values (``on``).
    ``island``: what runs in another precision; ``wrap``: what surrounds the body.
    """

    body: str = "mlp"  # attention cross swiglu geglu conv fused experts routed shared mixer gmlp
    attention: Attention = Attention()
    norm: str = "layer"  # none rms manual tokens group l2
    place: str = "pre"  # post sandwich
    modulation: str = "none"  # shared block token frame input
    gate: str = "none"  # shared block token frame input static tanh
    before: str = ""
    inside: str = ""
    on: str = "q"
    after: str = ""
    add: str = "plain"  # reversed in_place alpha scaled lerp
    island: str = ""  # bfloat16 autocast
    wrap: str = ""  # checkpoint break


@dataclass(frozen=True)
class Block:
    """Branches one after another, side by side, or summed before they are added; or torch's own encoder layer.

    ``skip``: how the stream of an earlier block comes in again, at the start. ``pool``: how two tokens become one before
    the block, whose output is added where they were.
    """

    branches: tuple[Branch, ...] = (Branch(),)
    style: str = "serial"  # parallel sum joint encoder
    skip: str = ""  # cat add
    breaks: bool = False
    pool: str = ""  # merge mean


@dataclass(frozen=True)
class Spec:
    """A model called as ``model(x, t, y)``. Tokens are ``frames`` × ``height`` × ``width``. ``time_token``: the time is
    one more, too; ``streams``: how many there are side by side, which each branch mixes (hyper-connections)."""

    blocks: tuple[Block, ...] = (Block((Branch(body="attention"), Branch())),)
    seed: int = 0
    batch: int = 2
    frames: int = 1
    height: int = 3
    width: int = 4
    channels: int = 8
    layout: str = "bnc"
    given: str = "tokens"  # picture
    clock: str = "sine"  # linear none
    time: str = "b"  # b1 scalar
    text: str = ""  # cross before after joint: y is then text, else labels
    given_text: str = "same"  # at every call: copied changed in_place
    dtype: str = "float32"  # float64
    inference_mode: bool = False
    words: int = 5
    registers: int = 0
    shared_weights: bool = False
    time_token: bool = False
    streams: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the picture."""
        return self.frames * self.height * self.width


def draw(seed: int) -> Spec:
    """The model of that seed."""
    r = random.Random(seed)
    frames = r.choice([1, 1, 1, 2, 3, 4])
    height, width = r.choice(
        [(3, 4), (4, 4), (2, 6), (5, 3), (4, 6)] if frames == 1 else [(2, 3), (2, 2), (1, 5), (4, 1)]
    )
    batch = r.choice([1, 2, 2, 2, 3, frames, frames * height * width if r.random() < 0.3 else 2])
    text = r.choice(["", "", "", "cross", "before", "after", "joint"])
    registers = r.choice([0, 0, 0, 0, 2]) if text in ("", "cross") else 0
    layout = "bnc"
    if text in ("", "cross") and not registers and r.random() < 0.45:
        layout = r.choice(LAYOUTS[1:])
    depth = r.choice([1, 1, 1, 2, 2, 2, 3])
    first = _block(r, text, frames)
    blocks = [first]
    for i in range(1, depth):
        blocks.append(blocks[-1] if r.random() < 0.6 else _block(r, text, frames))
        if r.random() < 0.2:
            blocks[i] = dataclasses.replace(blocks[i], skip=r.choice(["cat", "add"]))
    some = next((block for block in blocks if block.style != "encoder"), Block())
    blocks = blocks if some in blocks else [*blocks, some]
    blocks = [_with_more(_with_op(block, seed) if block == some else block, seed) for block in blocks]
    spec = Spec(
        tuple(blocks), seed, batch, frames, height, width, r.choice([8, 8, 16]), layout,
        r.choice(["tokens", "tokens", "picture"]) if frames == 1 else "tokens",
        r.choice(["sine", "sine", "sine", "linear", "none"]), r.choice(["b", "b", "b", "b1", "scalar"]), text,
        r.choice(["same", "same", "copied", "changed", "in_place"]), "float64" if r.random() < 0.05 else "float32",
        r.random() < 0.15, r.choice([5, 5, 7, frames * height * width]), registers,
        len(set(blocks)) == 1 and depth > 1 and r.random() < 0.2,
    )  # fmt: skip
    return _with_structure(spec, random.Random(f"structure {seed}"))


def _with_structure(spec: Spec, r: random.Random) -> Spec:
    """With what is not of one branch, drawn apart as well: what mixes tokens in an attention's place, pictures packed
    into one sequence, the time as a token, streams side by side, blocks on fewer tokens."""
    mixer, packed = r.choice(["mixer", "gmlp"]), r.choice(["packed", "packed_into"])
    few, what = (
        r.choice(["merge", "mean"]),
        r.choice(["", "", "", "mixer", "packed", "time", "streams", "pool", "pool"]),
    )
    everywhere = r.random() < 0.5

    def changed(branch: Branch, first: bool) -> Branch:
        if what == "mixer" and branch.body == "attention" and (first or everywhere):
            return dataclasses.replace(branch, body=mixer, attention=Attention())
        if what == "packed" and branch.body in ("attention", "fused") and (first or everywhere):
            return dataclasses.replace(branch, attention=dataclasses.replace(branch.attention, scope=packed))
        if what == "streams":
            return dataclasses.replace(branch, place="pre", add="plain")
        if what == "pool":  # what a token is modulated by would be pooled, too
            told = {"token": "block", "frame": "block", "input": "block"}
            modulation, gate = (told.get(kind, kind) for kind in (branch.modulation, branch.gate))
            return dataclasses.replace(branch, modulation=modulation, gate=gate)
        return branch

    plain = spec.text in ("", "cross") and not spec.registers
    inner = what == "pool" and plain and spec.layout == "bnc" and spec.height * spec.width % 2 == 0
    if what == "time" and spec.layout == "bnc":
        return dataclasses.replace(spec, time_token=True)
    serial = all(block.style == "serial" and not block.skip for block in spec.blocks)
    if what == "streams" and not (serial and spec.layout == "bnc"):
        return spec
    blocks = [
        dataclasses.replace(
            block,
            branches=tuple(changed(branch, i == 0) for branch in block.branches),
            pool=few if inner and block.style == "serial" and not block.skip and (i == len(spec.blocks) // 2) else "",
        )
        for i, block in enumerate(spec.blocks)
    ]
    return dataclasses.replace(spec, blocks=tuple(blocks), streams=2 if what == "streams" else 1)


def _with_op(block: Block, seed: int) -> Block:
    """With one op of the table, each in its turn: of so many, chance leaves some out."""
    ops = list(TABLE)
    *before, last = block.branches
    place = ("before", "inside", "after")[seed // len(ops) % 3]
    changes: dict[str, Any] = {place: ops[seed % len(ops)]}
    return dataclasses.replace(block, branches=(*before, dataclasses.replace(last, **changes)))


def _with_more(block: Block, seed: int) -> Block:
    """With what came to the grammar last, drawn apart, so that other models of a seed stay what they were."""
    r = random.Random(f"more {seed}")
    gate, rope, shared = (r.choice(["sigmoid", "tanh"]), r.random() < 0.3, r.random() < 0.5)
    if r.random() < 0.7:
        return block
    branches = tuple(
        dataclasses.replace(
            branch,
            body="shared" if shared and branch.body in ("mlp", "routed") else branch.body,
            attention=dataclasses.replace(branch.attention, gate=gate, rope="plane" if rope else branch.attention.rope)
            if branch.body in ("attention", "cross")
            else branch.attention,
        )
        for branch in block.branches
    )
    return dataclasses.replace(block, branches=branches) if block.style != "encoder" else block


def _block(r: random.Random, text: str, frames: int) -> Block:
    style = r.choice(["serial"] * 7 + ["parallel", "parallel", "sum", "encoder"])
    if text == "joint" and r.random() < 0.7:
        return Block((_branch(r, "attention", frames), _branch(r, "mlp", frames)), "joint")
    if style == "encoder":
        return Block((Branch(),), "encoder")
    bodies = r.choice([
        ("attention", "mlp"), ("attention", "mlp"), ("attention", "mlp"), ("mlp", "attention"), ("fused",),
        ("attention",), ("attention", "attention", "mlp"), ("attention", "mlp", "mlp"),
    ])  # fmt: skip
    if text == "cross":
        bodies = (*bodies[:1], "cross", *bodies[1:])
    breaks = r.random() < 0.04
    return Block(tuple(_branch(r, body, frames) for body in bodies), style, "", breaks)


def _branch(r: random.Random, body: str, frames: int) -> Branch:
    def rare(choices: Sequence[Any], odds: float, usual: Any) -> Any:
        return r.choice(choices) if r.random() < odds else usual

    if body == "mlp":
        body = rare(["swiglu", "geglu", "conv", "glu", "cross_tokens", "experts", "routed"], 0.5, "mlp")
    conditioned = ["none", "shared", "block", "block", "token", "frame", "input"]
    ops = list(TABLE)
    return Branch(
        body, _attention(r, frames) if body in ("attention", "cross", "fused") else Attention(),
        rare(["none", "rms", "manual", "tokens", "group", "l2"], 0.5, "layer"), rare(["post", "sandwich"], 0.2, "pre"),
        r.choice(conditioned), r.choice([*conditioned, "static", "tanh"]),
        rare(ops, 0.15, ""), rare(ops, 0.35 if body in ("mlp", "attention") else 0.15, ""), r.choice("qkv"),
        rare(ops, 0.12, ""), rare(["reversed", "in_place", "alpha", "scaled", "lerp"], 0.25, "plain"),
        rare(["bfloat16", "autocast"], 0.06, ""), rare(["checkpoint", "break"], 0.05, ""),
    )  # fmt: skip


def _attention(r: random.Random, frames: int) -> Attention:
    def rare(choices: Sequence[str], odds: float) -> str:
        return r.choice(choices) if r.random() < odds else ""

    return Attention(
        r.choice(["sdpa", "sdpa", "sdpa", "matmul", "einsum", "bmm", "linear", "prefix", "mha", "sigmoid", "flex"]),
        r.choice(["all", "all", "space", "time", "tiles"])
        if frames > 1
        else r.choice(["all"] * 6 + ["window", "shifted", "tiles"]),
        rare(["additive", "boolean", "padding", "causal", "tril", "per_head"], 0.3),
        rare(["halves", "interleaved", "complex"], 0.25), rare(["rms", "layer", "l2"], 0.25),
        rare(["grouped", "single", "pooled", "memory", "strided"], 0.25) or "own", r.random() < 0.5, r.random() < 0.85,
    )  # fmt: skip


def features(value: Any, name: str = "") -> Iterator[str]:
    """What a description is made of: each field with its value, and how many parts a field has. Of the places where an
    op of the table may stand, each with some op, and each op at some place."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            held = getattr(value, f.name)
            if f.name in ("before", "inside", "after") and held:
                yield from (f"op={held!r}", f"{f.name} has an op")
            elif f.name != "seed":
                yield from features(held, f"{type(value).__name__}.{f.name}")
    elif isinstance(value, tuple):
        yield f"{name}: {len(value)}"
        for part in value:
            yield from features(part, name)
    else:
        yield f"{name}={value!r}"


def covering(seeds: Sequence[int]) -> list[int]:
    """Some of the seeds, whose models have every feature that those of all seeds have: first the one that has most for
    its size, then the one that adds most to it for its own, and so on, less those that later ones made needless."""
    specs = {seed: draw(seed) for seed in seeds}
    sizes = {seed: 1 + sum(len(block.branches) for block in spec.blocks) for seed, spec in specs.items()}
    found = {seed: set(features(spec)) for seed, spec in specs.items()}
    left, chosen = dict(found), list[int]()
    while left:
        best = max(left, key=lambda seed: len(left[seed]) / sizes[seed])
        chosen.append(best)
        seen = left.pop(best)
        left = {seed: rest - seen for seed, rest in left.items() if rest - seen}
    for seed in sorted(chosen, key=lambda seed: -sizes[seed]):
        if found[seed] <= set[str]().union(*(found[other] for other in chosen if other != seed)):
            chosen.remove(seed)
    return sorted(chosen)


# -- policies -----------------------------------------------------------------------------------------------------------

NAMES: Mapping[str, Any] = {
    **{name: getattr(policies, name) for name in policies.__all__},
    "ToCa": toca_compile.ToCa,
    "RatioSchedule": type(toca_compile.ToCa().ratios),
    "Selector": type(policies.Composition().which),
}
SCORES = ("attention", "entropy", "v_norm", "k_norm", "error", "random", "none")
KINDS = ("self_attention", "cross_attention", "joint_attention", "mlp", "mixer", "parallel")


def draw_policy(r: random.Random) -> Any:
    """A policy: half of the time a ready-made one, else parts put together."""
    while True:
        try:
            return _ready_made(r) if r.random() < 0.45 else _composition(r)
        except PolicyError:
            continue  # parts that contradict each other are refused when they are put together


def _ready_made(r: random.Random) -> Any:
    steps, interval = r.choice([4, 6, 7]), r.choice([2, 3, 4, 5])
    ratio, order = r.choice([0.1, 0.25, 0.4, 0.6, 0.95]), r.choice([0, 1, 2, 3])
    make = r.choice(["Fora", "ToCa", "ToCa", "ToCa", "DuCa", "TaylorSeer", "TaylorToCa", "TaylorToCa", "BlockCache"])
    if make == "Fora":
        return toca_compile.Fora(steps, interval)
    if make in ("ToCa", "DuCa"):
        return NAMES[make](
            steps, interval, ratio, r.choice(["toca", "constant", "periodic", "counter"]), r.choice(SCORES),
            r.choice([0.0, 0.25, 1.0]), cell=r.choice([1, 2, 3]), bonus=r.choice([0.0, 0.6]), score_stride=r.choice([1, 1, 3]),
            count=r.choice(["up", "down"]), warmup=r.choice([1, 1, 2]), shared_pair=r.random() < 0.2, seed=r.randint(0, 9),
        )  # fmt: skip
    if make == "TaylorSeer":
        return toca_compile.TaylorSeer(
            steps, interval, order, r.choice([1, 2]), r.choice(["counter", "spread"]), basis=r.choice(["taylor", "newton"])
        )  # fmt: skip
    if make == "TaylorToCa":
        return toca_compile.TaylorToCa(
            steps, interval, order, ratio, r.choice(SCORES), r.choice([0.0, 0.5]), r.choice([None, "fresh", "update", "keep"]),
            r.random() < 0.8, r.random() < 0.7, r.choice([1, 2]), seed=r.randint(0, 9),
        )  # fmt: skip
    return toca_compile.BlockCache(
        steps, r.choice([0, 1]), r.choice([0, 0, 1]), r.choice([None, 0.05, 0.5]), interval=interval, order=order,
        basis=r.choice(["taylor", "newton"]),
    )  # fmt: skip


def _composition(r: random.Random) -> Any:
    p = policies
    steps = r.choice([4, 6, 7])
    when = r.choice([
        p.Every(r.choice([2, 3, 6]), r.choice([1, 2])), p.Every(steps), p.Every(steps),
        p.Periodic(r.choice([2, 4]), 1, {r.choice(KINDS): r.choice([1, 2, 3])}), p.Spread(r.choice([2, 3]), r.choice([0.5, 1.0])),
        p.IntervalFunction(r.choice([3, 5])), p.Listed((0, 2, steps - 1)), p.Adaptive(r.choice([0.05, 0.5])),
    ])  # fmt: skip
    if isinstance(when, p.Adaptive):
        rules: tuple[Any, ...] = (p.Rule(p.SkipBlocks(1, 0, True, r.choice([0, 1]))),)
        alternate: tuple[Any, ...] = ()
    else:
        rules = tuple(_rule(r) for _ in range(r.choice([1, 1, 2, 3])))
        skip = p.Rule(p.SkipBlocks(r.choice([0, 1]), r.choice([0, 1]), r.random() < 0.5))
        alternate = r.choice([(), (), (), (skip,), (_rule(r),)])
    which = NAMES["Selector"](
        r.choice(SCORES), r.choice([0.0, 0.2]), r.choice([1, 2]), r.choice([0.0, 0.0, 0.5]), r.choice([1, 1, 2]), r.randint(0, 9),
        r.random() < 0.15,
    )  # fmt: skip
    factors = NAMES["RatioSchedule"](*r.choice([((1.0, 0.0), (1.0, 0.0)), ((1.5, -1.0), (1.2, -0.5))]))
    share = p.Share(r.choice([0.1, 0.3, 0.5, 0.8]), factors)
    return p.Composition(steps, when, rules, alternate, which, share, r.choice(["taylor", "taylor", "newton"]))


def _rule(r: random.Random) -> Any:
    p = policies
    order, update = r.choice([0, 0, 0, 1, 2]), r.random() < 0.75
    keys = r.choice(["fresh", "fresh", "update", "keep"])
    refresh = r.choice([0, 0, 2]) if keys != "fresh" else 0
    queries = p.Queries(keys, refresh, order, update)
    do = r.choice(
        [
            queries,
            queries,
            p.Partial(order, update),
            p.Partial(order, update),
            p.Reuse(),
            p.Forecast(order),
            p.Compute(),
        ]
    )
    return p.Rule(
        do, (r.choice(KINDS),) if r.random() < 0.4 else (), r.choice([(0.0, 1.0), (0.0, 1.0), (0.0, 0.5), (0.4, 1.0)])
    )


# -- as text ------------------------------------------------------------------------------------------------------------

PARTS: Mapping[str, Any] = {c.__name__: c for c in (Spec, Block, Branch, Attention)}


def written(value: Any) -> str:
    """Code that makes the description or the policy again, with what is not default alone."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [
            f"{f.name}={written(getattr(value, f.name))}"
            for f in dataclasses.fields(value)
            if default_of(f) is dataclasses.MISSING or getattr(value, f.name) != default_of(f)
        ]
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def read(code: str) -> Any:
    """What ``written`` told."""
    return eval(code, {"__builtins__": {}}, {**NAMES, **PARTS})


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """What a field is if nothing is said; ``MISSING`` where something must be."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
