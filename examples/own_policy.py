"""Policies of one's own: a composition of the parts that there are, and a class with a ``plan``.

    python examples/own_policy.py

Prints what each does to a small random model, step by step, and how far it is from the uncached output.
"""

from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel

import toca_compile
from toca_compile.ir.actions import Action, Compute, Reuse
from toca_compile.ir.plan import Plan, Policy, StepPlan, step_kind
from toca_compile.ir.types import Site
from toca_compile.policies import Composition, Forecast, Partial, Rule, Selector, Share, Spread

STEPS = 8


def late_tokens(num_steps: int) -> Composition:
    """Composed: every output is forecast between full steps, but in the deeper half of the model the MLPs recompute the
    quarter of their tokens that the last forecast missed most. It can be saved as JSON, as all compositions can."""
    return Composition(
        num_steps,
        when=Spread(3),
        rules=(Rule(Partial(order=1, update=False), kinds=("mlp",), depths=(0.5, 1.0)), Rule(Forecast(1))),
        which=Selector("error"),
        how_many=Share(0.25),
    )


@dataclass(frozen=True)
class TakingTurns:
    """A class of one's own needs ``plan`` alone: at odd steps the blocks of odd depth are computed and the others
    reused, at even steps the other way round; the first step computes all. Host data: no tensor is ever seen here."""

    num_steps: int

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """What each site does at each step."""
        rows = [tuple(self._does(step, site) for site in sites) for step in range(self.num_steps)]
        return Plan(tuple(StepPlan(step_kind(row), row) for row in rows))

    def _does(self, step: int, site: Site) -> Action:
        computed = step == 0 or site.depth % 2 == step % 2
        return Compute() if computed else Reuse()


def small_model() -> DiTTransformer2DModel:
    """A DiT of four blocks with random weights."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_layers=4, num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_elementwise_affine=False,
    ).eval()  # fmt: skip


@torch.no_grad()
def run(net: torch.nn.Module) -> torch.Tensor:
    """The outputs of one run with latents that drift, ``[steps, 2, 4, 8, 8]``."""
    x, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 10])
    outputs = []
    for step in range(STEPS):
        t = torch.full((2,), 900 - 100 * step)
        outputs.append(net(0.98**step * x, timestep=t, class_labels=labels).sample)
    return torch.stack(outputs)


def main() -> None:
    """Run both."""
    model = small_model()
    wanted = run(model)
    policies: dict[str, Policy] = {"late_tokens": late_tokens(STEPS), "TakingTurns": TakingTurns(STEPS)}
    opt = toca_compile.optimize(model, toca_compile.FullCompute(), lowering="eager")
    for name, policy in policies.items():
        opt.policy = policy  # the model is traced once, whatever the policy
        error = (run(opt) - wanted).abs().mean() / wanted.abs().mean()
        report = toca_compile.explain(opt)
        print(f"{name}: steps {report.schedule}, {report.flop_speedup():.2f}× fewer FLOPs, error {error:.2%}")
        for site in [s.name for s in report.sites]:
            print(f"    {site:28} tokens computed: {[record.k[site] for record in opt.steps]}")


if __name__ == "__main__":
    main()
