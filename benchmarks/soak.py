"""Long use: 2,000 steps, 300 shapes, 300 calls of ``optimize``, 8 threads. Memory and results must stay flat.

    python benchmarks/soak.py [--steps 2000] [--shapes 300] [--models 300] [--threads 8] [--out FILE.md]

Each part runs beside the same model under plain ``torch.compile(backend="eager")`` used likewise, whose growth is
Dynamo's own: what it keeps of every trace. Memory is the process's resident set after a garbage collection, halfway
and at the end; results are held against the uncached model (first steps) or a sampling by an object without a past.
"""

import argparse
import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import toca_compile
from toca_compile import Fora, ToCa

TOKENS = 16


class Model(nn.Module):
    """A small transformer with a clock, for any number of tokens."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.time = nn.Linear(2, width)
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 8)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noise of ``[batch, tokens, 8]`` at the times ``[batch]``."""
        angle = t[:, None] / 100
        h = self.embed(x) + self.time(torch.cat([angle.sin(), angle.cos()], -1))[:, None]
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = (part.unsqueeze(1) for part in qkv(h).chunk(3, -1))
            h = h + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            h = h + mlp(h)
        out: Tensor = self.head(h)
        return out


def sample(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, of: int | None = None) -> Tensor:
    """The first ``steps`` Euler steps of ``of``."""
    of = of or steps
    with torch.no_grad():
        for i in range(steps):
            x = x - model(x, torch.full((len(x),), 1000.0 * (1 - i / of))) / of
    return x


def resident() -> float:
    """Megabytes of memory that the process holds, after a collection."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@dataclass
class Row:
    """One part: memory after a warm-up, halfway and at the end, in MB, and whether all results were right."""

    part: str
    what: str
    seconds: float
    memory: tuple[float, ...]
    right: bool

    def cells(self) -> list[str]:
        """As a row of the table."""
        start, half, end = self.memory
        growth = [f"{half - start:+.1f}", f"{end - half:+.1f}"]
        return [self.part, self.what, f"{self.seconds:.0f}", f"{start:.0f}", *growth, "yes" if self.right else "NO"]


def follow(part: str, what: str, work: Iterator[bool], count: int) -> Row:
    """Do ``count`` pieces of work; the first tenth warms up."""
    began, memory, right = time.perf_counter(), [], True
    marks = {count // 10, count // 10 + (count - count // 10) // 2, count - 1}
    for i, good in enumerate(work):
        right &= good
        if i in marks:
            memory.append(resident())
        if i == count - 1:
            break
    return Row(part, what, time.perf_counter() - began, tuple(memory), right)


def plain(model: nn.Module) -> Any:
    """The rival: Dynamo alone."""
    return torch.compile(model, backend="eager", dynamic=False)


def long_run(use: Callable[[nn.Module], Any], steps: int) -> Iterator[bool]:
    """One sampling of many steps; the same again must give the same picture."""
    model, x = Model().eval(), torch.randn(2, TOKENS, 8)
    net = use(model)
    results = []
    for _ in range(2):
        y = x
        with torch.no_grad():
            for i in range(steps // 2):
                y = y - net(y, torch.full((2,), 1000.0 * (1 - 2 * i / steps))) / steps
                yield bool(y.isfinite().all())
        results.append(y)
    yield torch.equal(*results)


def shapes(use: Callable[[nn.Module], Any]) -> Iterator[bool]:
    """A sampling of two steps at each of many numbers of tokens, the first held against the model."""
    model = Model().eval()
    net = use(model)
    tokens = 2
    while True:
        x = torch.randn(2, tokens, 8)
        yield torch.allclose(sample(net, x, 1, 2), sample(model, x, 1, 2), atol=1e-5)
        sample(net, x, 1, 2)
        tokens += 1


def models(use: Callable[[nn.Module], Any]) -> Iterator[bool]:
    """A new model of the class each time, sampled for some steps and let go in mid-run."""
    while True:
        model, x = Model().eval(), torch.randn(2, TOKENS, 8)
        net = use(model)
        yield torch.allclose(sample(net, x, 1, 4), sample(model, x, 1, 4), atol=1e-5)
        sample(net, x, 3, 4)


def threads(use: Callable[[nn.Module], Any], count: int) -> Iterator[bool]:
    """Threads sample with one object at once, in contexts of the same name; each result is that of a lone sampling."""
    model = Model().eval()
    net = use(model)
    alone = [sample(use(model), torch.full((2, TOKENS, 8), 0.1 * s), 8) for s in range(count)]
    while True:
        results: list[Any] = [None] * count

        def job(s: int, results: list[Any] = results) -> None:
            x = torch.full((2, TOKENS, 8), 0.1 * s)
            with torch.no_grad():
                for i in range(8):
                    t = torch.full((2,), 1000.0 * (1 - i / 8))
                    if hasattr(net, "_session"):
                        with net.cache_context("cond"):
                            x = x - net(x, t) / 8
                    else:
                        x = x - net(x, t) / 8
            results[s] = x

        jobs = [threading.Thread(target=job, args=(s,)) for s in range(count)]
        for thread in jobs:
            thread.start()
        for thread in jobs:
            thread.join()
        yield all(r is not None and torch.equal(r, a) for r, a in zip(results, alone, strict=True))


def main() -> None:
    """Run the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 2000), ("shapes", 300), ("models", 300), ("threads", 8), ("rounds", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    # Dynamo must not refuse the rival what it does not refuse us.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000

    def cached(policy: Any) -> Callable[[nn.Module], Any]:
        return lambda model: toca_compile.optimize(model, policy, lowering="eager")

    toca = {
        n: ToCa(num_steps=n, interval=4, fresh_ratio=0.25, schedule="constant", bonus=0.0)
        for n in (8, given.steps // 2)
    }
    rows = []
    for name, use in (("torch.compile", plain), ("toca_compile", None)):
        parts: list[tuple[str, Iterator[bool], int]] = [
            ("steps", long_run(use or cached(toca[given.steps // 2]), given.steps), given.steps + 1),
            ("shapes", shapes(use or cached(Fora(2, 2))), given.shapes),
            ("models", models(use or cached(Fora(4, 2))), given.models),
            (f"{given.threads} threads", threads(use or cached(toca[8]), given.threads), given.rounds),
        ]
        for part, work, count in parts:
            rows.append(follow(f"{count} {part}" if part in ("shapes", "models") else part, name, work, count))
            work.close()  # type: ignore[attr-defined]
            torch._dynamo.reset()
            print(" | ".join(rows[-1].cells()), flush=True)
    head = ["part", "used by", "seconds", "MB after a tenth", "to the half", "to the end", "results right"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *(r.cells() for r in rows))]
    text = f"`python benchmarks/soak.py`, torch {torch.__version__}, eager lowering\n\n" + "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)
    if not all(row.right for row in rows):
        raise SystemExit("some results were wrong")


if __name__ == "__main__":
    main()
