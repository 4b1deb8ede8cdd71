"""Any model uncached and with the policies that suit any, side by side. Needs the ``demo`` extra."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from toca_compile.api import optimize
from toca_compile.demo.sampling import Sampling
from toca_compile.policies import BlockCache, Fora
from toca_compile.quality.compare import Row, measure, print_table, write_pictures


def run(
    sampling: Sampling, *, out: Path = Path("toca-demo"), steps: int = 50, samples: int = 8, repeats: int = 3,
    seed: int = 0, device: str = "cpu", lowering: str = "inductor",
) -> list[Row]:  # fmt: skip
    """Sample, time, print the table, and write the pictures where samples are such; returns the table's rows."""
    from rich.console import Console

    console, model = Console(), sampling.model

    def sampler(net: object) -> Callable[[Callable[[], None]], Tensor]:
        return lambda _: sampling.sampler(net, steps, seed, samples)

    policies = {
        "one forecast for all blocks": BlockCache(steps, first=0, interval=3, order=2, basis="newton"),
        "everything reused": Fora(steps, 3),
    }
    plain = torch.compile(model, dynamic=False) if lowering == "inductor" else model
    rows = [Row("uncached", sampler(plain))]
    for name, policy in policies.items():
        opt = optimize(model, policy, lowering=lowering)
        rows.append(Row(name, sampler(opt), opt))
    measure(rows, repeats=repeats, device=device, ticks=steps, console=console)
    print_table(console, rows, peak=sampling.peak)
    drawn = rows[0].samples
    if drawn is not None and drawn.dim() in (4, 5) and drawn.shape[-1] in (1, 3):
        write_pictures(out, rows)
        console.print(f"pictures: {out}/")
    return rows
