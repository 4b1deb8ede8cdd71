"""What a user waits for before the first picture: compiling with empty and with filled caches, and analysis.

    python benchmarks/startup.py                     # about 10 minutes on 2 cores
    python benchmarks/startup.py --parts analysis

Each number is of a process of its own that has imported what it needs and made its model. ``calls`` are the first five
steps of a sampling (full, partial, partial, full, partial), of which the same steps of a later sampling are taken away;
``torch.compile`` has five calls of the plain model, likewise. With filled caches another process has compiled the same
before. Analysis is capture and all other passes in the first call without Inductor, the rest of which is Dynamo's.
Results go to ``benchmarks/results/startup.{json,md}``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, dit, save

import toca_compile
from toca_compile import FullCompute, ToCa
from toca_compile.compiler.pass_manager import PassManager

Rows = list[dict[str, Any]]
Model = tuple[Any, dict[str, Any]]
CALLS = 5


def flux(double: int, single: int, width: int = 256) -> Model:
    """A FLUX on 256 tokens and a text of 64."""
    from diffusers import FluxTransformer2DModel

    head, ids = 64 if width > 64 else 16, torch.zeros(16, 16, 3)
    ids[..., 1], ids[..., 2] = torch.arange(16)[:, None], torch.arange(16)[None]
    model: Any = FluxTransformer2DModel(
        num_attention_heads=width // head, attention_head_dim=head, num_layers=double, num_single_layers=single,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 256, 64), "encoder_hidden_states": torch.randn(1, 64, 64),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.full((1,), 0.5), "guidance": torch.full((1,), 3.5),
        "img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(64, 3), "return_dict": False,
    }  # fmt: skip
    return model, inputs


def wan(depth: int) -> Model:
    """A Wan on 6 frames."""
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12, freq_dim=8,
        ffn_dim=24, num_layers=depth, rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 6, 8, 8), "timestep": torch.full((1,), 500),
        "encoder_hidden_states": torch.randn(1, 5, 12), "return_dict": False,
    }  # fmt: skip
    return model, inputs


def ltx2(depth: int) -> Model:
    """An LTX-2: a picture's stream and a sound's."""
    from diffusers import LTX2VideoTransformer3DModel

    model: Any = LTX2VideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=depth, caption_channels=12, rope_double_precision=False,
    )  # fmt: skip
    text = torch.randn(1, 5, 12)
    inputs = {
        "hidden_states": torch.randn(1, 24, 4), "audio_hidden_states": torch.randn(1, 7, 4),
        "encoder_hidden_states": text, "audio_encoder_hidden_states": text, "timestep": torch.full((1,), 500.0),
        "encoder_attention_mask": torch.ones(1, 5), "num_frames": 2, "height": 3, "width": 4, "audio_num_frames": 7,
        "fps": 25.0, "return_dict": False,
    }  # fmt: skip
    return model, inputs


COMPILED: dict[str, Callable[[], Model]] = {
    "DiT 4 × 384": lambda: (dit(384, 4, 32), arguments(2, 32)),
    "DiT 12 × 384": lambda: (dit(384, 12, 32), arguments(2, 32)),
    "DiT 28 × 384": lambda: (dit(384, 28, 32), arguments(2, 32)),
    "FLUX 2 + 2 × 256": lambda: flux(2, 2),
    "FLUX 19 + 38 × 256": lambda: flux(19, 38),
}
ANALYSED: dict[str, Callable[[], Model]] = {
    "FLUX, 5 + 9 blocks": lambda: flux(5, 9, 64),
    "FLUX, 19 + 38 blocks": lambda: flux(19, 38, 64),
    "Wan, 10 blocks": lambda: wan(10),
    "Wan, 40 blocks": lambda: wan(40),
    "LTX-2, 12 blocks": lambda: ltx2(12),
    "LTX-2, 48 blocks": lambda: ltx2(48),
}


def timed(manager: type[PassManager]) -> list[float]:
    """Grows by the seconds of each time that the passes run."""
    seconds, run = list[float](), manager.run

    def running(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(*given, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    manager.run = running  # type: ignore[method-assign]
    return seconds


def child(model: str, how: str) -> None:
    """One measurement; prints the seconds."""
    net, inputs = {**COMPILED, **ANALYSED}[model]()
    net.eval()
    with torch.no_grad():
        start = time.perf_counter()
        if how == "analysis":
            passes = timed(PassManager)
            toca_compile.optimize(net, FullCompute(), lowering="eager")(**inputs)
            print(time.perf_counter() - start, sum(passes))
            return
        run = torch.compile(net, dynamic=False) if how == "torch" else toca_compile.optimize(net, ToCa(CALLS, 3, 0.1))
        for _ in range(CALLS):
            run(**inputs)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(CALLS):
            run(**inputs)
        print(first - (time.perf_counter() - start))


def seconds(model: str, how: str, cache: str) -> list[float]:
    """What a process found."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", model, how]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return list(map(float, done.stdout.splitlines()[-1].split()))


def calls() -> Rows:
    """With empty caches, and with those that this left."""
    rows: Rows = []
    for model in COMPILED:
        row: dict[str, Any] = {"model": model}
        for how, name in (("toca", ""), ("torch", "torch.compile's ")):
            with tempfile.TemporaryDirectory() as cache:
                row |= {f"{name}{state} s": seconds(model, how, cache)[0] for state in ("cold", "warm")}
        rows.append(row)
        print(row, flush=True)
    return rows


def analysis() -> Rows:
    """Of models of two depths."""
    rows: Rows = []
    for model in ANALYSED:
        with tempfile.TemporaryDirectory() as cache:
            whole, passes = seconds(model, "analysis", cache)
            rows.append({"model": model, "first call s": whole, "analysis s": passes, "target": 10.0})
        print(rows[-1], flush=True)
    return rows


PARTS = {"calls": calls, "analysis": analysis}


def main() -> None:
    """Run the chosen parts and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    save("startup", "cpu", {name: PARTS[name]() for name in given.parts})


if __name__ == "__main__":
    main()
