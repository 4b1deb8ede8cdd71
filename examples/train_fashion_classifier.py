"""Train the classifier that ``toca-compile evaluate`` asks what a sample shows.

    python examples/train_fashion_classifier.py --data /usr/share/datasets/fashion-mnist

A few minutes on 2 cores. Prints the accuracy on the held-out pictures and writes the weights in half precision.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from toca_compile.demo.fashion_mnist import Classifier, accuracy, read_pictures

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE / "fashion_classifier")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    given = parser.parse_args()
    torch.manual_seed(0)
    (x, y), (held_x, held_y) = (read_pictures(given.data, kind) for kind in ("train", "t10k"))
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    steps = given.epochs * (len(x) // given.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for epoch in range(given.epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(given.batch)[: steps // given.epochs]:
            flipped = x[batch].flip(-1) if torch.rand(()) < 0.5 else x[batch]
            loss = torch.nn.functional.cross_entropy(model(flipped), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        print(
            f"epoch {epoch}: loss {loss.item():.3f}, held-out accuracy {accuracy(model, held_x, held_y):.4f}",
            flush=True,
        )
    given.out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in model.state_dict().items()}, given.out / "model.safetensors")


if __name__ == "__main__":
    main()
