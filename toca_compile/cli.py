"""The console command ``toca-compile``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toca_compile.errors import TocaError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 2 where the input is at fault."""
    given = _parser().parse_args(argv)
    try:
        given.run(given)
    except TocaError as error:
        print(f"toca-compile: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"toca-compile: {error}; install the extra: pip install 'toca-compile[demo]'", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, such as head, has enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="toca-compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", type=Path, help="folder of a DiTTransformer2DModel with scheduler/ in it")
    shared.add_argument("--steps", type=int, default=50)
    shared.add_argument("--device", default="cpu")

    demo = commands.add_parser("demo", parents=[shared], help="sample a trained DiT uncached and with caching")
    demo.add_argument("--out", type=Path, default=Path("toca-demo"), help="folder for the pictures")
    demo.add_argument("--samples", type=int, default=8)
    demo.add_argument("--repeats", type=int, default=3, help="timed samplings of each model, interleaved")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    evaluate = commands.add_parser("evaluate", parents=[shared], help="quality and speed of many policies, as a table")
    evaluate.add_argument("--policy", nargs="+", default=[], metavar="NAME|FILE", help="of the default table, presets, "
                          "or files of save_policy; without, the default table")  # fmt: skip
    evaluate.add_argument("--out", type=Path, default=Path("toca-evaluate"), help="results; an earlier run goes on")
    evaluate.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    evaluate.add_argument("--samples", type=int, default=64, help="pictures a seed")
    evaluate.add_argument("--batch", type=int, default=16)
    evaluate.add_argument("--fewer", type=int, nargs="*", default=[25, 17, 13, 10], help="steps of the uncached rows")
    evaluate.add_argument("--lowering", default="inductor")
    evaluate.add_argument("--data", type=Path, help="Fashion-MNIST's idx files, for KID")
    evaluate.add_argument("--no-features", action="store_true", help="PSNR and accuracy alone")
    evaluate.set_defaults(run=_evaluate)

    tune = commands.add_parser("tune", parents=[shared], help="search a policy for a target")
    target = tune.add_mutually_exclusive_group(required=True)
    for name in ("flops", "latency", "psnr"):
        target.add_argument(f"--{name}", type=float)
    tune.add_argument("--out", type=Path, default=Path("toca-tune"), help="policy.json and the trials")
    tune.add_argument("--seconds", type=float, default=1200.0)
    tune.add_argument("--trials", type=int, help="at most so many samplings")
    tune.add_argument("--seeds", type=int, nargs="+", default=[100])
    tune.add_argument("--samples", type=int, default=8)
    tune.add_argument("--lowering", default="eager")
    tune.set_defaults(run=_tune)

    passes = commands.add_parser(
        "passes", help="print what each compiler pass finds in a model, and the variants of a run",
        description="MODEL is called a few times, with small example inputs, and what the compiler found is printed. "
        "Inputs are made by the names of forward's parameters, as diffusers has them; for any other model, the factory "
        "gives them. A folder without weights gets random ones, and at most two blocks of a kind.",
    )  # fmt: skip
    passes.add_argument("model", metavar="MODEL", help="the folder of a diffusers transformer, or "
                        "package.module:factory, a function that returns the model, alone or with example inputs (a "
                        "tuple, or a dictionary by name)")  # fmt: skip
    passes.add_argument("--pass", dest="stage", metavar="NAME", help="print this one alone: a pass such as find-sites, "
                        "or a variant such as 'template1[reuse, partial]'")  # fmt: skip
    passes.add_argument("--policy", metavar="NAME|FILE", help="whose variants to print: a preset, a policy of the "
                        "default table, or a file of save_policy; by default a short run of ToCa")  # fmt: skip
    passes.set_defaults(run=_passes)
    return parser


def _demo(given: argparse.Namespace) -> None:
    from toca_compile.demo import fashion_dit

    fashion_dit.run(
        model_path=given.model, out=given.out, steps=given.steps, samples=given.samples, repeats=given.repeats,
        seed=given.seed, device=given.device,
    )  # fmt: skip


def _evaluate(given: argparse.Namespace) -> None:
    from rich.console import Console

    from toca_compile.demo import fashion_dit, fashion_mnist
    from toca_compile.quality.evaluation import evaluate
    from toca_compile.quality.settings import EvaluationSettings

    model, sampler = fashion_dit.model_and_sampler(given.model, given.device)
    labels = fashion_dit.labels(given.batch).repeat(given.samples // given.batch)
    classifier = fashion_mnist.load_classifier(fashion_dit.default_model().parent / "fashion_classifier")
    features = None if given.no_features else fashion_mnist.Features()
    real = None
    if features is not None and given.data is not None:
        real = features(fashion_mnist.read_pictures(given.data, "t10k")[0][:2000])
    settings = EvaluationSettings(
        steps=given.steps, fewer=given.fewer, seeds=given.seeds, samples=given.samples, batch=given.batch,
        lowering=given.lowering, features=features, real=real, console=Console(),
        accuracy=lambda pictures: fashion_mnist.accuracy(classifier, pictures, labels),
    )  # fmt: skip
    evaluate(model, sampler, _policies(given.policy, given.steps), out=given.out, settings=settings)


def _tune(given: argparse.Namespace) -> None:
    from rich.console import Console

    from toca_compile.demo import fashion_dit
    from toca_compile.policies import save_policy
    from toca_compile.quality.settings import TuningSettings
    from toca_compile.quality.tuning import Target, tune

    model, sampler = fashion_dit.model_and_sampler(given.model, given.device)
    settings = TuningSettings(
        steps=given.steps, seeds=given.seeds, samples=given.samples, lowering=given.lowering, seconds=given.seconds,
        trials=given.trials, console=Console(),
    )  # fmt: skip
    target = Target(given.flops, given.latency, given.psnr)
    policy = tune(model, sampler, target=target, out=given.out, settings=settings)
    save_policy(policy, given.out / "policy.json")
    print(f"{given.out / 'policy.json'}")


def _passes(given: argparse.Namespace) -> None:
    import torch

    from toca_compile.api import explain, optimize
    from toca_compile.demo.load_model import load
    from toca_compile.policies import ToCa

    policy = ToCa(num_steps=3, interval=3, fresh_ratio=0.3, schedule="constant")
    if given.policy is not None:
        (policy,) = _policies([given.policy], steps=50).values()
    model, (args, kwargs) = load(given.model)
    opt = optimize(model, policy, lowering="eager")
    texts: dict[str, str] = {}
    step, steps = 0, 1
    while step < steps and given.stage not in texts:
        with torch.no_grad(), opt.cache_context("passes", step_index=step):
            opt(*args, **kwargs)
        report = explain(opt)
        texts, step, steps = report.graphs(), step + 1, len(report.plans[0].steps)
    if given.stage is not None and given.stage not in texts:
        raise TocaError(f"no pass or variant {given.stage!r}; there are {', '.join(texts)}")
    print(texts[given.stage] if given.stage is not None else "\n\n".join(f"{n}\n\n{t}" for n, t in texts.items()))


def _policies(names: Sequence[str], steps: int) -> dict[str, Any]:
    """Policies by name: of the default table, presets, or files."""
    from toca_compile.policies import load_policy, preset, ready_made

    table = ready_made(steps)
    found: dict[str, Any] = {}
    for name in names:
        path = Path(name)
        found[path.stem if path.suffix == ".json" else name] = (
            table[name] if name in table else load_policy(path) if path.suffix == ".json"
            else preset(name, num_steps=steps)
        )  # fmt: skip
    return found or table


if __name__ == "__main__":
    sys.exit(main())
