"""Any model uncached and with the policies that suit any, side by side. Needs the ``demo`` extra."""

from collections.abc import Callable

from torch import Tensor

from toca_compile.api import optimize
from toca_compile.demo.sampling import Sampling
from toca_compile.policies import BlockCache, Fora
from toca_compile.quality.compare import Row, measure, print_table, uncached, write_pictures
from toca_compile.quality.settings import ComparisonSettings


def run(sampling: Sampling, settings: ComparisonSettings) -> list[Row]:
    """Sample, time, print the table, and write the pictures where samples are such; returns the table's rows."""
    from rich.console import Console

    console, model, steps = Console(), sampling.model, settings.steps

    def sampler(net: object) -> Callable[[Callable[[], None]], Tensor]:
        return lambda _: sampling.sampler(net, steps, settings.seed, settings.samples)

    policies = {
        "one forecast for all blocks": BlockCache(steps, first=0, interval=3, order=2, basis="newton"),
        "everything reused": Fora(steps, 3),
    }
    rows = [Row("uncached", sampler(uncached(model, settings.lowering)))]
    for name, policy in policies.items():
        opt = optimize(model, policy, lowering=settings.lowering)
        rows.append(Row(name, sampler(opt), opt))
    measure(rows, repeats=settings.repeats, device=settings.device, ticks=steps, console=console)
    print_table(console, rows, peak=sampling.peak)
    drawn = rows[0].samples
    if settings.out is not None and drawn is not None and drawn.dim() in (4, 5) and drawn.shape[-1] in (1, 3):
        write_pictures(settings.out, rows)
        console.print(f"pictures: {settings.out}/")
    return rows
