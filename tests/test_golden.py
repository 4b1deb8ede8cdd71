"""Golden files: what the compiler finds in small models of six kinds, and the variants of a template of each.

``EXPECTTEST_ACCEPT=1`` writes them anew; without it a difference fails. The user's line that a refusal names is left
out, since those of other packages change with their versions.
"""

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import toca_compile
from examples.opensora.stdit3 import STDiT3
from tests.models import diffusers_dit, randomize
from tests.pipelines import flux, pixart
from toca_compile import Composition, PolicyError
from toca_compile.policies import Clusters, Every, Forecast, Partial, Queries, Reuse, Rule, Selector, Share, SkipBlocks

pytest.importorskip("diffusers")

FOLDER = Path(__file__).parent / "golden"
TYPED = re.compile(r" : (int|(\d+ × )?[a-z]+\d*\[[\d, ]*\] \(?\[|\([a-z]+\d*\[.*\]\) \(\[)")
# Every second of four steps is full: the last is one on which there are differences for a forecast.
STEPS = 4
RULES = {
    "partial": Partial(),
    "reuse": Reuse(),
    "queries": Queries("update"),
    "forecast": Forecast(1),
    "skip": SkipBlocks(),
}


def sd3() -> Any:
    import diffusers

    return randomize(diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=8,
    ))  # fmt: skip


def video() -> Any:
    return randomize(STDiT3(width=24, heads=2, depth=2, caption_channels=8, in_channels=2))


IDS = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
POOLED = {"encoder_hidden_states": torch.ones(1, 5, 12), "pooled_projections": torch.ones(1, 12)}
SIZES = {"resolution": None, "aspect_ratio": None}
# A model, what it is called with beside the timestep, and for each file a site of the template to print.
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, str]]] = {
    "dit": (
        lambda: diffusers_dit(2),
        {"hidden_states": torch.ones(2, 2, 8, 8), "class_labels": torch.tensor([1, 2])},
        {"dit": "transformer_blocks.0.ff.net"},
    ),
    "pixart": (
        pixart,
        {
            "hidden_states": torch.ones(2, 4, 8, 8),
            "encoder_hidden_states": torch.ones(2, 5, 12),
            "added_cond_kwargs": SIZES,
        },
        {"pixart": "transformer_blocks.0.ff.net"},
    ),
    "flux": (
        lambda: flux(2, 2),
        {"hidden_states": torch.ones(1, 16, 16), **POOLED, **IDS},
        {"flux-double": "transformer_blocks.0.ff.net", "flux-single": "single_transformer_blocks.0"},
    ),
    "sd3": (sd3, {"hidden_states": torch.ones(1, 4, 8, 8), **POOLED}, {"sd3": "transformer_blocks.0.ff.net"}),
    "stdit3": (
        video,
        {"x": torch.ones(1, 2, 3, 4, 6), "y": torch.ones(1, 5, 8)},
        {"stdit3": "spatial_blocks.0.mlp"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_golden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOCA_VERIFY", "0")  # what is printed is checked elsewhere
    build, inputs, files = MODELS[name]
    found, texts = variants_of(build(), inputs)
    axes = re.findall(r"^  (\w.* = \d+)$", found, re.M)
    names = [n for line in axes for entry in line.split(", ") for n in entry.split(" = ")[0].split()]
    assert len(names) == len(set(names)) > 10
    for text in (t for made in texts.values() for n, t in made.items() if n != "refused"):
        lines = [line for line in text.splitlines() if " = " in line and not line.startswith("//")]
        assert all(TYPED.search(line) for line in lines), text
    for file, site in files.items():
        sections = {"found": found, **variants_at(site, texts)}
        compare(FOLDER / f"{file}.txt", "\n\n".join(f"==== {title}\n{text}" for title, text in sections.items()))


def test_golden_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same site of the first model, whose tokens are selected in another way."""
    monkeypatch.setenv("TOCA_VERIFY", "0")
    build, inputs, files = MODELS["dit"]
    policy = Composition(STEPS, Every(2), (Rule(Partial(1)),), which=Clusters(4, 0.25, 2))
    opt = toca_compile.optimize(build(), policy, lowering="eager")
    with torch.no_grad():
        for step in range(STEPS):
            opt(**inputs, timestep=torch.full((2,), 900 - 100 * step))
    made = {n: t for n, t in toca_compile.explain(opt).graphs().items() if "[" in n}
    shown = variants_at(files["dit"], {"partial": made})
    compare(FOLDER / "dit-clusters.txt", "\n\n".join(f"==== {title}\n{text}" for title, text in shown.items()))


def variants_of(model: Any, inputs: dict[str, Any]) -> tuple[str, dict[str, dict[str, str]]]:
    """What was found in a model, without the graph itself; and the variants of each rule in the order of their steps."""
    opt: Any = None
    texts: dict[str, dict[str, str]] = {}
    graphs: dict[str, str] = {}
    for i, (name, rule) in enumerate(RULES.items()):
        # The seed is read by no variant here; policies that rank tokens otherwise share none.
        which = Selector("attention", 0.1, seed=i)
        policy = Composition(STEPS, Every(2), (Rule(rule),), which=which, how_many=Share(0.5))
        opt = toca_compile.optimize(model, policy, lowering="eager") if opt is None else opt
        try:
            opt.policy = policy
            with torch.no_grad():
                for step in range(STEPS):
                    opt(**inputs, timestep=torch.full((len(next(iter(inputs.values()))),), 900 - 100 * step))
        except PolicyError as error:
            texts[name] = {"refused": str(error)}
            continue
        graphs = toca_compile.explain(opt).graphs()
        texts[name] = {n: t for n, t in graphs.items() if "[" in n}
    found = list(
        itertools.takewhile(lambda line: not re.search(r" = (input|parameter)\b", line), graphs["hoist"].splitlines())
    )
    return "\n".join(found).rstrip(), texts


def variants_at(site: str, texts: dict[str, dict[str, str]]) -> dict[str, str]:
    """Of the template that holds a site: the full step that scores are taken on, and the last variant of each rule."""

    def own(rule: str) -> list[str]:
        return [n for n, t in texts[rule].items() if re.search(rf"\b(?<!_){re.escape(site)} ", t.splitlines()[0])]

    shown = {f"full: {(first := own('partial')[0])}": texts["partial"][first]}
    for rule, made in texts.items():
        if rule == "skip":
            shown |= {f"{rule}: {n}": t for n, t in made.items() if not n.startswith("template")}
        elif "refused" in made:
            shown[f"{rule}: refused"] = made["refused"]
        elif own(rule) and own(rule)[-1] not in {title.split(": ")[1] for title in shown}:
            shown[f"{rule}: {own(rule)[-1]}"] = made[own(rule)[-1]]
    return shown


def compare(path: Path, text: str) -> None:
    """Hold a text against a file, or write the file."""
    text = re.sub(r" \(\w+\.py:\d+\)", "", text) + "\n"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path.name} is missing: EXPECTTEST_ACCEPT=1 writes it"
    expected = path.read_text(encoding="utf-8")
    assert renamed(text) == renamed(expected), f"{path.name} has changed: EXPECTTEST_ACCEPT=1 writes it anew"


def renamed(text: str) -> list[str]:
    """The lines of a text with each value's number (``mul_5``) replaced by its place in its section: torch's versions
    number the values of one graph differently."""
    lines: list[str] = []
    for section in text.split("\n==== "):
        places: dict[str, str] = {}
        for name in re.findall(r"^(\w+) = ", section, re.M):
            places.setdefault(name, f"{re.sub(r'_[0-9]+$', '', name)}_{len(places)}")
        told = "".join(places.get(word, word) for word in re.split(r"(\w+)", section))
        lines += [re.sub(r" +:", " :", line) for line in told.splitlines()]
    return lines


def test_drift_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPECTTEST_ACCEPT", raising=False)
    path = tmp_path / "golden.txt"
    with pytest.raises(AssertionError, match="missing"):
        compare(path, "one\ntwo")
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    compare(path, "one\ntwo (a.py:3)")
    monkeypatch.delenv("EXPECTTEST_ACCEPT")
    compare(path, "one\ntwo (a.py:4)")
    with pytest.raises(AssertionError, match="has changed"):
        compare(path, "one\nthree")
    assert renamed("a_1 = input\na_2 = op(a_1) : f32") == renamed("a = input\na_10 = op(a)   : f32")
    assert renamed("a_1 = input\na_2 = op(a_1)") != renamed("a_1 = input\na_2 = op(a_2)")
