"""What is sized by values is one op between values of known sizes, and what cannot be is split there as before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import config

import toca_compile
from tests.models import PlainDiT, randomize
from tests.runs import TIMES, kinds, optimized, steps
from tests.sampling import noise
from toca_compile import BlockCache, ExportError
from toca_compile.errors import UnknownSizeError
from toca_compile.ops.sized_by_values import OP
from toca_compile.passes.tracing.sized_by_values import outlined


def followed(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Dynamo's one graph of a function."""
    found = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm.forward

    with config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    (gm,) = found
    return gm


def call(gm: fx.GraphModule, **inputs: Tensor) -> Tensor:
    """The result for inputs by their names in the function."""
    places = (node.name.removeprefix("l_").removesuffix("_") for node in gm.graph.find_nodes(op="placeholder"))
    (result,) = gm(*(inputs[place] for place in places))
    assert isinstance(result, Tensor)
    return result


def count(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=OP))


def attended(x: Tensor, text: Tensor, there: Tensor) -> Tensor:
    """Attention with the words that are there, padded."""
    at = torch.nonzero(there).flatten()
    q = torch.cat([x, text[at]])
    q = F.scaled_dot_product_attention(q[None], q[None], q[None])[0]
    return 2 * F.pad(q, (0, 0, 0, x.shape[0] + text.shape[0] - q.shape[0]))


def in_two_blocks(x: Tensor, text: Tensor, there: Tensor) -> Tensor:
    """The places are found once, and read in each block."""
    at = torch.nonzero(there).flatten()
    for _ in range(2):
        keys = torch.cat([x, text[at]])[None]
        x = x + F.scaled_dot_product_attention(x[None], keys, keys)[0].relu()
    return x


def chosen(x: Tensor, text: Tensor, there: Tensor) -> Tensor:
    """Rows are written where a mask says, in a part of a tensor that is read later; one row is found among them."""
    out = torch.zeros(2, *text.shape)
    out[1][there] = text[there].tanh()
    out[0].index_add_(0, torch.nonzero(~there).flatten(), text[~there]).mul_(3)
    rows = text[there].abs()
    return torch.cat([x, out.flatten(0, 1), rows.index_select(0, rows.sum(1).argmax()[None])]) + 1


def in_two_parts(x: Tensor, text: Tensor, there: Tensor) -> Tensor:
    """One part of an attention's result is read before the other is made, and one is needed for the other."""
    q = torch.cat([x, text[there]])
    q = F.scaled_dot_product_attention(q[None], q[None], q[None])[0]
    image = q[: x.shape[0]]
    read = image.relu() + 1
    words = F.pad(q[x.shape[0] :], (0, 0, 0, text.shape[0] - (q.shape[0] - x.shape[0])))
    return torch.cat([read, words + (q * words.sum(0)).sum(0)])


def cast(x: Tensor, text: Tensor, there: Tensor) -> Tensor:
    """In half precision where torch.autocast says so."""
    with torch.autocast("cpu", torch.bfloat16):
        kept = text[there] @ text.T
        made = kept.sum(0)
    return made + x.sum()


@pytest.mark.parametrize(
    ("function", "ops"), [(attended, 1), (in_two_blocks, 2), (chosen, 3), (in_two_parts, 1), (cast, 1)]
)
@torch.no_grad()
def test_it_is_computed_as_before(function: Callable[..., Tensor], ops: int) -> None:
    x, text, there = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    gm = followed(function, x, text, there)
    made = outlined(gm)
    assert count(made) == ops
    assert not count(gm)  # which Dynamo may run as it is
    for there_now in (there, ~there, there | True):
        kept = x.clone(), text.clone(), there_now.clone()
        result, expected = call(made, **dict(zip(("x", "text", "there"), kept, strict=True))), function(*kept)
        assert torch.equal(result, expected)
        assert result.dtype == expected.dtype
        assert torch.equal(kept[1], text)  # is not changed


def test_a_graph_without_is_itself() -> None:
    gm = followed(lambda x: x.relu() + 1, torch.randn(3))
    assert outlined(gm) is gm


def given_back(x: Tensor, there: Tensor) -> Tensor:
    return x[there]


def changed_between(x: Tensor, there: Tensor) -> Tensor:
    """Moved behind the change, the places would be others."""
    there = there.clone()
    at = torch.nonzero(there).flatten()
    there.logical_not_()
    return x + x[at].sum(0) + there[:, None]


def changed_behind(x: Tensor, there: Tensor) -> Tensor:
    """A part of it is read before the last one is made, where something else changes, too."""
    rows, kept = x[there].relu(), x.clone()
    first = rows.sum(0) * kept
    kept.mul_(2)
    return first + rows.mean(0) + kept


def changed_places(x: Tensor, there: Tensor) -> Tensor:
    at = torch.nonzero(there).flatten()
    at.clamp_(max=1)
    return x + x[at].sum(0)


@pytest.mark.parametrize("function", [given_back, changed_between, changed_behind, changed_places])
def test_what_cannot_stand_in_one_place_is_refused(function: Callable[..., Tensor]) -> None:
    gm = followed(function, torch.randn(4, 8), torch.tensor([1, 0, 1, 1]).bool())
    with pytest.raises(UnknownSizeError, match=r"test_sized_by_values\.py:\d+ makes follows from values"):
        outlined(gm)


class Told(PlainDiT):
    """``do`` says what becomes of the tokens before the blocks and behind them."""

    do = "gather"

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.prepare(x, t, y)
        there = torch.arange(h.shape[1]) % 3 > 0
        if self.do == "drop":
            all_there, h = h, h[:, there]
        for block in self.blocks:
            h = block(h, c)
        if self.do == "gather":
            h = h + self.blocks[0].norm1(h[:, there]).mean(1, keepdim=True)
        if self.do == "drop":
            h = all_there.masked_scatter(there[None, :, None].expand_as(all_there), h)
        return self.finish(h, c)


@torch.no_grad()
def test_blocks_beside_it_are_skipped_as_one() -> None:
    model = randomize(Told(depth=2))
    opt = optimized(model, BlockCache(8, interval=2, order=1))
    assert torch.equal(steps(opt, noise(), TIMES[:1]), steps(model, noise(), TIMES[:1]))
    opt.reset()
    steps(opt, noise(), TIMES)
    assert kinds(opt) == "fsfsfsfs"
    assert len(toca_compile.explain(opt).sites) == 4
    assert "split it" not in str(toca_compile.explain(opt))


@torch.no_grad()
def test_a_model_whose_tokens_are_so_many_as_values_tell_is_split_there() -> None:
    """Nothing could be cached within the op."""

    class Dropping(Told):
        do = "drop"

    model = randomize(Dropping(depth=2))
    opt = optimized(model, toca_compile.FullCompute())
    assert torch.equal(steps(opt, noise(), TIMES[:2]), steps(model, noise(), TIMES[:2]))
    report = toca_compile.explain(opt)
    assert len(report.sites) == 4
    assert "split it" in str(report)
    assert toca_compile.summary(opt).recompiles == 0
    assert len(opt.steps) == 2


@torch.no_grad()
def test_a_number_of_tokens_that_is_read_on_the_host_splits_it_too() -> None:
    """Dynamo may be told to follow that, whatever we tell it; what the first graph gives has no size then."""

    class Cut(Told):
        do = "cut"

        def prepare(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
            h, c = super().prepare(x, t, y)
            return h[:, : int((t > 0).sum().item()) + 8], c

        def finish(self, x: Tensor, c: Tensor) -> Tensor:
            return x

    model, given = randomize(Cut(depth=1)), (noise(), torch.full((2,), 875), torch.arange(2))
    opt = optimized(model, toca_compile.FullCompute())
    with config.patch(capture_scalar_outputs=True):
        assert torch.equal(opt(*given), model(*given))
    assert "split it" in str(toca_compile.explain(opt))


@torch.no_grad()
def test_a_result_of_a_size_that_is_read_on_the_host_is_refused() -> None:
    """Once, whichever way it is traced."""

    class Cropped(PlainDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            made: Tensor = super().forward(x, t, y)
            return made[..., : int((t > 0).sum().item())]

    model, given = randomize(Cropped(depth=1)), (noise(), torch.full((2,), 875), torch.arange(2))
    with config.patch(capture_scalar_outputs=True):
        with pytest.raises(UnknownSizeError, match="gives it back"):
            optimized(model, toca_compile.FullCompute())(*given)
        assert torch.equal(optimized(model, toca_compile.FullCompute(), strict=False)(*given), model(*given))


def test_a_file_holds_none(tmp_path: Path) -> None:
    given = noise(), torch.full((2,), 875), torch.arange(2)
    with pytest.raises(ExportError, match=r"test_sized_by_values\.py:\d+ makes follows from values"):
        toca_compile.export(randomize(Told(depth=1)), toca_compile.Fora(8, 2), given, tmp_path / "model.pt2")


@torch.no_grad()
def test_a_linear_layer_of_rows_so_chosen_takes_part() -> None:
    """A layer's weights are given to the op as any tensor."""
    layer = nn.Linear(8, 8)

    def routed(x: Tensor) -> Tensor:
        takes = layer(x).sum(1) > 0
        out = x.clone()
        out[takes] = layer(x[takes])
        return out

    x = torch.randn(16, 8)
    made = outlined(followed(routed, x))
    assert count(made) == 1
    weights = {"layer_parameters_weight": layer.weight, "layer_parameters_bias": layer.bias}
    for given in (x, x - 1):
        assert torch.equal(call(made, x=given, **weights), routed(given))
