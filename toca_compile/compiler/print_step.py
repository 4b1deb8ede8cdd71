"""The program of a step as text: what its buffers are, what each step is, and the graphs, the branches last."""

import operator
from collections.abc import Iterator

from torch import fx, nn

from toca_compile.compiler.emit_step import StepProgram
from toca_compile.ir.printer import print_call

_PER_LINE = 25  # steps


def print_step(program: StepProgram) -> str:
    """One line a call; ``entry0`` and the like are the variants, whose graphs are texts of their own."""
    laid, steps = program.laid, [row[0] for row in program.plan]
    count = f"{len(steps)} steps of {len(program.kinds)} kinds"
    lines = [f"// program: {count}, {len(laid.buffers)} caches, {len(program.sizes[0])} numbers of tokens"]
    for start in range(0, len(steps), _PER_LINE):
        lines.append(f"// steps from {start}: kind {' '.join(map(str, steps[start : start + _PER_LINE]))}")
    lines += [f"// kind{i}: {kind}" for i, kind in enumerate(program.kinds)]
    lines += [f"// {name}: {title}" for name, title in laid.titles.items()]
    for (name, (kind, owner, index)), kept in zip(program.caches.items(), laid.table.buffers, strict=True):
        number = f" {index}" if index else ""
        lines.append(f"// {name}: {kind.value}{number} of {laid.owners[owner]}, {kept.dtype}{list(kept.shape)}")
    printed: set[int] = set()
    for name, module in _graphs("step", program.module, printed):
        inputs = [n.name for n in module.graph.nodes if n.op == "placeholder"]
        lines += ["", f"{name}({', '.join(inputs)}):"]
        lines += [f"    {line}" for line in _lines(module)]
    return "\n".join(lines)


def _graphs(name: str, module: fx.GraphModule, printed: set[int]) -> Iterator[tuple[str, fx.GraphModule]]:
    """A graph and the branches in it, each once; not the variants."""
    if id(module) in printed:
        return
    printed.add(id(module))
    yield name, module
    for own, part in module.named_children():
        if isinstance(part, fx.GraphModule) and own.startswith(("kind", "branch")):
            yield from _graphs(own, part, printed)


def _lines(module: fx.GraphModule) -> Iterator[str]:
    for node in module.graph.nodes:
        if node.op == "placeholder" or node.target is operator.getitem or _is_submodule(module, node):
            continue
        parts = [user for user in node.users if user.target is operator.getitem]
        if parts and len(parts) == len(node.users):
            named = {user.args[1]: user.name for user in parts}
            whole = [named.get(i, "_") for i in range(max(named) + 1)]
            yield f"{', '.join(whole)} = {print_call(node).partition(' = ')[2]}"
        elif node.op == "get_attr":
            yield f"{node.name} = buffer"
        else:
            yield print_call(node)


def _is_submodule(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), nn.Module)
