"""What the compiler finds in a model: its residual branches, what each may do and why not more, the graphs.

    python examples/inspect_a_model.py                                  # a small DiT with random weights
    python examples/inspect_a_model.py package.module:factory           # yours
    python examples/inspect_a_model.py package.module:factory --graph infer-axes

The factory takes no arguments and returns the model, in eval mode, and the keyword arguments of one call. Nothing is
compiled by Inductor, so this takes seconds; weights may be random, since only the graph matters.
"""

import argparse
import importlib
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from toca_compile import ToCa, TocaError, explain, optimize


def small_dit() -> tuple[nn.Module, dict[str, Any]]:
    """A DiT of two blocks, and a call of it."""
    model = DiTTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_elementwise_affine=False,
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 10]),
    }  # fmt: skip
    return model.eval(), call


def imported(path: str) -> Any:
    """What ``package.module:name`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def main() -> None:
    """Call the model twice, a full and a partial step, and print the report and one graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factory", nargs="?", help="package.module:factory; without, a small DiT")
    parser.add_argument("--graph", metavar="NAME", help="print this stage instead of a list of their names")
    given = parser.parse_args()
    model, call = imported(given.factory)() if given.factory else small_dit()
    opt = optimize(model, ToCa(2, 2, fresh_ratio=0.25, schedule="constant"), lowering="eager")
    try:
        with torch.no_grad():
            opt(**call)
            opt(**call)
    except TocaError as error:
        raise SystemExit(f"nothing to cache in this model: {error}") from error
    report = explain(opt)
    print(report)
    for site in report.sites:
        print(f"{site.name}: {'some tokens alone' if site.reason is None else f'all tokens or none: {site.reason}'}")
    graphs = report.graphs()
    if given.graph is None:
        print("\nstages, each printed by --graph NAME:", *graphs, sep="\n  ")
    elif given.graph in graphs:
        print(f"\n{given.graph}\n{graphs[given.graph]}")
    else:
        raise SystemExit(f"no stage {given.graph!r}; there are {', '.join(graphs)}")


if __name__ == "__main__":
    main()
