"""Programs, as the passes see them: captured from small models without running any policy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import ToCa
from toca_compile.compiler.pass_manager import PassManager
from toca_compile.compiler.pipeline import PIPELINE
from toca_compile.errors import PassError, UnsupportedGraphError
from toca_compile.ir.actions import Keep, Partial, Reuse
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Form, Pass, Program, Variant
from toca_compile.ir.selectors import Selector
from toca_compile.passes.variants.rewrite import rewrite

REUSED, ROWS = Form(Reuse(), Keep(CacheSpec())), Form(Partial(), Keep(CacheSpec()))


class Tiny(nn.Module):
    """Patches of a 4×6 picture, attention and MLP twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 2, stride=2)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(4, 12), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2)
        )

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            q, k, v = layer["qkv"](h)[:, None].chunk(3, -1)
            h = h + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            h = h + gate * layer["down"](nn.functional.relu(layer["up"](h)))
        return h


class Reading(nn.Module):
    """Tokens that read a text, whose keys and values are the same at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.mlp = nn.Linear(8, 8), nn.Linear(6, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        x = x + t.sin()[:, None, None]
        k, v = self.kv(text)[:, None].chunk(2, -1)
        x = x + nn.functional.scaled_dot_product_attention(self.q(x)[:, None], k, v)[:, 0]
        return x + self.mlp(x).relu()


def tiny_program(passes: Sequence[Pass] = PIPELINE) -> Program:
    """``Tiny`` after some passes."""
    return program_of(Tiny(), torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4), manager=PassManager(passes))


def reading_program(manager: PassManager | None = None) -> Program:
    """``Reading`` after all passes."""
    return program_of(Reading(), torch.randn(2, 12, 8), torch.randn(2, 5, 6), torch.ones(2), manager=manager)


def program_of(model: nn.Module, *inputs: Any, manager: PassManager | None = None) -> Program:
    """The program that passes make of a model.

    Raises:
        PassError, UnsupportedGraphError: as the passes do.
    """
    found: list[Program] = []
    errors: list[Exception] = []

    def backend(gm: fx.GraphModule, args: list[Any]) -> Any:
        static = tuple(isinstance(a, nn.Parameter) for a in args)
        try:
            found.append((manager or PassManager(PIPELINE)).run(Program(gm, static, tuple(args))))
        except (PassError, UnsupportedGraphError) as error:
            errors.append(error)
        return gm.forward

    with torch.no_grad():
        torch.compile(model.eval(), backend=backend)(*inputs)
    for error in errors:
        raise error
    return found[0]


def variant_of(program: Program, *forms: Form, dense: bool = False, selector: Selector | None = None) -> Variant:
    """The variant of the first segment with sites, which do what ``forms`` says."""
    segment = next(s for s in program.segments if s.sites)
    assert program.types is not None
    sites = [program.sites[i] for i in segment.sites]
    return rewrite(segment, sites, forms, program.types, selector or Selector(weight=0.1), dense=dense)


def text_of(program: Program, *forms: Form, dense: bool = False) -> str:
    """That variant as text."""
    return print_graph(variant_of(program, *forms, dense=dense).module.graph)


def printed_stages() -> dict[str, str]:
    """The texts of all passes and variants of a small model, by their names."""
    torch._dynamo.reset()
    policy = ToCa(num_steps=3, fresh_ratio=0.3, schedule="constant")
    opt = toca_compile.optimize(randomize(PlainDiT(depth=2)), policy, lowering="eager")
    sample(opt, 3, noise())
    return toca_compile.explain(opt).graphs()
