"""The console command ``toca-compile``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from toca_compile.errors import TocaError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 2 where the input is at fault."""
    parser = argparse.ArgumentParser(prog="toca-compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="sample a trained DiT uncached and with caching; table and pictures")
    demo.add_argument("--model", type=Path, help="folder of a DiTTransformer2DModel with scheduler/ in it")
    demo.add_argument("--out", type=Path, default=Path("toca-demo"), help="folder for the pictures")
    demo.add_argument("--steps", type=int, default=50)
    demo.add_argument("--samples", type=int, default=8)
    demo.add_argument("--repeats", type=int, default=3, help="timed samplings of each model, interleaved")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    try:
        from toca_compile import demo as command

        command.run(
            model_path=given.model, out=given.out, steps=given.steps, samples=given.samples, repeats=given.repeats,
            seed=given.seed, device=given.device,
        )  # fmt: skip
    except TocaError as error:
        print(f"toca-compile: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"toca-compile: {error}; install the extra: pip install 'toca-compile[demo]'", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
