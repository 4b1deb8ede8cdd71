"""Token-wise feature caching for diffusion transformers: try it, measure it, look inside.

Every command exits with 0, or with 2 after one line on stderr where its input is at fault.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from textwrap import wrap
from typing import Any

from toca_compile.errors import TocaError
from toca_compile.progress import plain_line, shown, working

_WORKERS = "processes of Ray (the extra scale); 0: in this one"
_POLICY = "a level, a preset or a policy of the default table (see toca-compile presets), or a file of save_policy"
_RECOMMENDED = "blocks, Newton o2 N=3"


class _Help(argparse.HelpFormatter):
    """Each flag with its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100, max_help_position=28)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        none = default is None or default is False or default == [] or default is argparse.SUPPRESS
        if not action.option_strings or none or "(default" in text or "by default" in text:
            return text
        told = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {told.replace('%', '%%')})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 2 where the input is at fault."""
    given = _parser().parse_args(argv)
    traceback = given.traceback or os.environ.get("TOCA_TRACEBACK", "0") not in ("", "0")
    try:
        # Commands that print what others read stay quiet unless somebody watches a terminal.
        with shown() if given.run in (_demo, _evaluate, _tune, _plan, _batch) else contextlib.nullcontext():
            given.run(given)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output, such as head, has enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TocaError, ModuleNotFoundError, OSError) as error:
        if traceback:
            raise
        missing = isinstance(error, ModuleNotFoundError)
        remedy = "; install the extra: pip install 'toca-compile[demo]'" if missing else ""
        print(f"toca-compile: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="toca-compile", description=first, epilog=rest, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    always = argparse.ArgumentParser(add_help=False)
    always.add_argument("--traceback", action="store_true", help="show where an error came from (or TOCA_TRACEBACK=1)")
    shared = argparse.ArgumentParser(add_help=False, parents=[always])
    shared.add_argument("--model", metavar="NAME", help="what to sample (default: the trained DiT that comes with the "
                        "package): a folder or hub id of a diffusers pipeline, or package.module:factory, a function "
                        "that returns a pipeline, a pipeline and a dictionary of its call's arguments, or a model and "
                        "its sampler")  # fmt: skip
    shared.add_argument("--prompt", default="a cat in a library", metavar="TEXT", help="for pipelines that take one")
    shared.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps of a sampling")
    shared.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, …")

    def command(name: str, text: str, parent: argparse.ArgumentParser, more: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}", parents=[parent], formatter_class=_Help
        )

    demo = command("demo", "sample a model uncached and with caching, side by side", shared)
    demo.add_argument("--out", type=Path, default=Path("toca-demo"), metavar="FOLDER", help="for the pictures")
    demo.add_argument("--samples", type=int, default=8, metavar="N", help="pictures in a sampling")
    demo.add_argument("--repeats", type=int, default=3, metavar="N", help="timed samplings of each model, in turn")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise")
    demo.add_argument("--lowering", default="inductor", choices=("inductor", "eager"), help="what compiles all models")
    demo.set_defaults(run=_demo)

    evaluate = command("evaluate", "quality and speed of many policies, as a table", shared,
                       "Writes table.md, table.csv and front.png. A run that was cut off goes on.")  # fmt: skip
    evaluate.add_argument("--policy", nargs="+", default=[], metavar="NAME|FILE", help=f"{_POLICY}; by default the "
                          "whole default table")  # fmt: skip
    evaluate.add_argument("--out", type=Path, default=Path("toca-evaluate"), metavar="FOLDER", help="for the results")
    evaluate.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the noise; the "
                          "spread in the table is that over them")  # fmt: skip
    evaluate.add_argument("--samples", type=int, default=64, metavar="N", help="pictures a seed, a multiple of --batch")
    evaluate.add_argument("--batch", type=int, default=16, metavar="N", help="pictures at once")
    evaluate.add_argument("--fewer", type=int, nargs="*", default=[25, 17, 13, 10], metavar="N", help="step counts of "
                          "the uncached rows that policies are held against")  # fmt: skip
    evaluate.add_argument("--lowering", default="inductor", choices=("inductor", "eager"), help="what compiles all "
                          "models")  # fmt: skip
    evaluate.add_argument("--data", type=Path, metavar="FOLDER", help="Fashion-MNIST's idx files, for KID (shipped "
                          "model alone)")  # fmt: skip
    evaluate.add_argument("--no-features", action="store_true", help="no feature distance and no KID, whose network is "
                          "a package of its own")  # fmt: skip
    evaluate.add_argument("--workers", type=int, default=0, metavar="N", help=_WORKERS)
    evaluate.set_defaults(run=_evaluate)

    tune = command("tune", "search a policy for a target", shared,
                   "Give one target. Writes policy.json, which evaluate --policy and load_policy take. A search that "
                   "was cut off goes on.")  # fmt: skip
    target = tune.add_mutually_exclusive_group(required=True)
    target.add_argument("--flops", type=float, metavar="X", help="at least X times fewer FLOPs, at the best PSNR")
    target.add_argument("--latency", type=float, metavar="X", help="at least X times faster, at the best PSNR; needs "
                        "--lowering inductor")  # fmt: skip
    target.add_argument("--psnr", type=float, metavar="DB", help="at least DB decibels to the uncached samples, at the "
                        "fewest FLOPs")  # fmt: skip
    tune.add_argument("--out", type=Path, default=Path("toca-tune"), metavar="FOLDER", help="for policy.json and the "
                      "trials")  # fmt: skip
    tune.add_argument("--seconds", type=float, default=1200.0, metavar="S", help="seconds after which the search stops")
    tune.add_argument("--trials", type=int, metavar="N", help="stop after so many samplings (default: no limit)")
    tune.add_argument("--seeds", type=int, nargs="+", default=[100], metavar="N", help="of the noise that trials are "
                      "judged on")  # fmt: skip
    tune.add_argument("--samples", type=int, default=8, metavar="N", help="pictures a seed")
    tune.add_argument("--lowering", default="eager", choices=("inductor", "eager"), help="what compiles all models")
    tune.add_argument("--workers", type=int, default=0, metavar="N", help=_WORKERS)
    tune.set_defaults(run=_tune)

    plan = command("plan", "search the best steps to compute for exactly so many", shared,
                   "Writes policy.json, which evaluate --policy and load_policy take: full steps, and how the others "
                   "are forecast, with what they were made for. A search that was cut off goes on.")  # fmt: skip
    plan.add_argument("--budget", type=int, required=True, metavar="N", help="how many steps compute everything")
    plan.add_argument("--out", type=Path, default=Path("toca-plan"), metavar="FOLDER", help="for policy.json and the "
                      "trials")  # fmt: skip
    plan.add_argument("--seconds", type=float, default=1200.0, metavar="S", help="seconds after which the search stops")
    plan.add_argument("--trials", type=int, default=200, metavar="N", help="stop after so many samplings")
    plan.add_argument("--seeds", type=int, nargs="+", default=[100], metavar="N", help="of the noise that trials are "
                      "judged on")  # fmt: skip
    plan.add_argument("--samples", type=int, default=8, metavar="N", help="pictures a seed")
    plan.add_argument("--lowering", default="eager", choices=("inductor", "eager"), help="what compiles all models")
    plan.set_defaults(run=_plan)

    batch = command("batch", "sample a pipeline once for each line of a file", always,
                    "A line is an object with the arguments of a call of the pipeline, such as {\"prompt\": \"a cat\", "
                    "\"seed\": 3, \"num_inference_steps\": 30}; \"name\" is that of its files. What is done already is "
                    "not done again, and what failed is reported while the rest go on.")  # fmt: skip
    batch.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl", help="the requests")
    batch.add_argument("--model", required=True, metavar="NAME", help="a folder or hub id of a diffusers pipeline, or "
                       "package.module:factory, a function that returns one")  # fmt: skip
    batch.add_argument("--policy", default="balanced", metavar="NAME|FILE", help=_POLICY)
    batch.add_argument("--out", type=Path, default=Path("toca-batch"), metavar="FOLDER", help="for the samples")
    batch.add_argument("--workers", type=int, default=0, metavar="N", help=_WORKERS)
    batch.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, …")
    batch.add_argument("--lowering", default="inductor", choices=("inductor", "eager"), help="what compiles the model")
    batch.set_defaults(run=_batch)

    looking = (
        "Inputs are made by the names of forward's parameters, as diffusers has them; for any other model, the factory "
        "gives them. A folder without weights gets random ones, and at most two blocks of a kind."
    )
    subject = argparse.ArgumentParser(add_help=False, parents=[always])
    subject.add_argument("model", metavar="MODEL", help="the folder of a diffusers transformer or pipeline, or "
                         "package.module:factory, a function that returns the model, alone or with example inputs (a "
                         "tuple, or a dictionary by name)")  # fmt: skip
    explain = command("explain", "what the compiler finds in a model, and what a policy would do with it", subject,
                      f"MODEL is called once, with small example inputs. {looking}")  # fmt: skip
    explain.add_argument("--policy", default=_RECOMMENDED, metavar="NAME|FILE", help=_POLICY)
    explain.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps of a sampling")
    explain.set_defaults(run=_explain)
    passes = command("passes", "what each compiler pass finds in a model, and the variants of a run", subject,
                     f"MODEL is called a few times, with small example inputs. {looking}")  # fmt: skip
    passes.add_argument("--pass", dest="stage", metavar="NAME", help="print this one alone: a pass such as find-sites, "
                        "or a variant such as 'template1[reuse, partial]'")  # fmt: skip
    passes.add_argument("--policy", metavar="NAME|FILE", help=f"whose variants to print: {_POLICY}; by default a short "
                        "run of ToCa")  # fmt: skip
    passes.set_defaults(run=_passes)
    rules = command("rules", "the ops that have an axis rule, or which of them a model uses and which it lacks", always,
                    f"With MODEL, it is called once, with small example inputs. {looking}")  # fmt: skip
    rules.add_argument("model", metavar="MODEL", nargs="?", help="as for explain")
    rules.set_defaults(run=_rules)
    presets = command("presets", "the policies that --policy knows by name", always)
    presets.set_defaults(run=_presets)
    return parser


def _version() -> str:
    try:
        own = metadata.version("toca-compile")
    except metadata.PackageNotFoundError:
        own = "(not installed)"
    return f"toca-compile {own}, torch {metadata.version('torch')}"


def _demo(given: argparse.Namespace) -> None:
    from toca_compile.demo import emoji_flux, fashion_dit, side_by_side
    from toca_compile.demo.sampling import check_device, load_sampling
    from toca_compile.quality.settings import ComparisonSettings

    check_device(given.device)
    names = (field.name for field in fields(ComparisonSettings))
    settings = ComparisonSettings(**{name: getattr(given, name) for name in names})
    path = Path(given.model) if given.model else fashion_dit.default_model()
    if (path / "config.json").exists() and not emoji_flux.is_model(path):
        fashion_dit.run(settings, path)
        return
    side_by_side.run(load_sampling(given.model, given.device, given.prompt), settings)


def _evaluate(given: argparse.Namespace) -> None:
    from rich.console import Console

    from toca_compile.demo import fashion_dit, fashion_mnist
    from toca_compile.demo.sampling import load_sampling
    from toca_compile.quality.evaluation import evaluate
    from toca_compile.quality.settings import EvaluationSettings

    policies = _policies(given.policy, given.steps)
    sampling = load_sampling(given.model, given.device, given.prompt)
    features = real = accuracy = None
    if sampling.shipped:
        labels = fashion_dit.labels(given.batch).repeat(max(given.samples // given.batch, 1))
        classifier = fashion_mnist.load_classifier(fashion_dit.default_model().parent / "fashion_classifier")
        accuracy = lambda pictures: fashion_mnist.accuracy(classifier, pictures, labels)  # noqa: E731
        try:
            features = None if given.no_features else fashion_mnist.Features()
        except TocaError as error:
            plain_line(f"no feature distance and no KID in the table: {error}")
    if features is not None and given.data is not None:
        real = features(fashion_mnist.read_pictures(given.data, "t10k")[0][:2000])
    settings = EvaluationSettings(
        steps=given.steps, fewer=given.fewer, seeds=given.seeds, samples=given.samples, batch=given.batch,
        lowering=given.lowering, peak=sampling.peak, features=features, real=real, console=Console(), accuracy=accuracy,
        workers=given.workers,
    )  # fmt: skip
    evaluate(sampling.model, sampling.sampler, policies, out=given.out, settings=settings)


def _tune(given: argparse.Namespace) -> None:
    from rich.console import Console

    from toca_compile.demo.sampling import load_sampling
    from toca_compile.policies import save_policy
    from toca_compile.quality.settings import TuningSettings
    from toca_compile.quality.tuning import Target, tune

    target = Target(given.flops, given.latency, given.psnr)
    sampling = load_sampling(given.model, given.device, given.prompt)
    settings = TuningSettings(
        steps=given.steps, seeds=given.seeds, samples=given.samples, lowering=given.lowering, seconds=given.seconds,
        trials=given.trials, peak=sampling.peak, console=Console(), workers=given.workers,
    )  # fmt: skip
    policy = tune(sampling.model, sampling.sampler, target=target, out=given.out, settings=settings)
    save_policy(policy, given.out / "policy.json")
    print(f"{given.out / 'policy.json'}")


def _plan(given: argparse.Namespace) -> None:
    from rich.console import Console

    from toca_compile.demo.sampling import load_sampling
    from toca_compile.policies import save_policy
    from toca_compile.quality.planning import plan
    from toca_compile.quality.settings import PlanningSettings

    sampling = load_sampling(given.model, given.device, given.prompt)
    settings = PlanningSettings(
        steps=given.steps, seeds=given.seeds, samples=given.samples, lowering=given.lowering, seconds=given.seconds,
        trials=given.trials, peak=sampling.peak, console=Console(),
    )  # fmt: skip
    policy = plan(sampling.model, sampling.sampler, budget=given.budget, out=given.out, settings=settings)
    save_policy(policy, given.out / "policy.json")
    print(f"{given.out / 'policy.json'}")


def _batch(given: argparse.Namespace) -> None:
    from functools import partial

    from toca_compile.demo.sampling import load_pipeline
    from toca_compile.serving.offline import batch

    lines = [line for line in given.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        requests = [json.loads(line) for line in lines]
    except ValueError as error:
        raise TocaError(f"{given.prompts} must hold one JSON object a line: {error}") from error
    if given.workers < 0:
        raise TocaError(f"--workers must be 0 or more, not {given.workers}")
    (policy,) = _policies([given.policy], 50).values()
    pipeline = partial(load_pipeline, given.model, given.device)
    options = {"out": given.out, "workers": given.workers, "lowering": given.lowering}
    result = batch(pipeline, requests, policy, **options)
    print(f"{given.out}: {result}")
    if result.failed:
        raise TocaError(f"{len(result.failed)} of {len(requests)} requests failed")


def _explain(given: argparse.Namespace) -> None:
    import torch

    from toca_compile.api import explain, optimize
    from toca_compile.demo.load_model import load

    (policy,) = _policies([given.policy], given.steps).values()
    with working(f"loading {given.model}"):
        model, (args, kwargs) = load(given.model)
    opt = optimize(model, policy, lowering="eager")
    with torch.no_grad():
        opt(*args, **kwargs)
    print(explain(opt))


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


def _rules(given: argparse.Namespace) -> None:
    import torch

    from toca_compile.api import explain, optimize
    from toca_compile.demo.load_model import load
    from toca_compile.policies import FullCompute
    from toca_compile.report.rules import list_rules

    if given.model is None:
        print(list_rules())
        return
    model, (args, kwargs) = load(given.model)
    opt = optimize(model, FullCompute(), lowering="eager", strict=False)
    with torch.no_grad():
        opt(*args, **kwargs)
    print(explain(opt).rules())


def _presets(given: argparse.Namespace) -> None:
    from toca_compile.policies import LEVELS, PRESETS, Level, ready_made
    from toca_compile.report.text import written

    table = ready_made(50)
    width = max(map(len, (*PRESETS, *table)))
    print("levels, which fit the number of steps; steps computed of 50:")
    for name in LEVELS:
        print(f"  {name:<{width}}  {len(Level(name, 50).full_steps())}")
    print("\npublished configurations, for --policy and toca_compile.preset(name, …):")
    for name, policy in PRESETS.items():
        print(f"  {name:<{width}}  {type(policy).__name__}, {policy.num_steps} steps: full every {policy.interval}, "
              f"{policy.fresh_ratio:.0%} of the tokens between")  # fmt: skip
    print("\nthe default table of toca-compile evaluate, at 50 steps:")
    for name, ready in table.items():
        indent = " " * (width + 4)
        print(*wrap(f"  {name:<{width}}  {written(ready)}", 100, subsequent_indent=indent), sep="\n")


def _policies(names: Sequence[str], steps: int) -> dict[str, Any]:
    """Policies by name: levels, those of the default table, presets, or files."""
    from toca_compile.policies import LEVELS, PRESETS, Level, load_policy, preset, ready_made

    table = ready_made(steps)
    known = {**{name: Level(name, steps) for name in LEVELS}, **table}
    known |= {name: preset(name, num_steps=steps) for name in PRESETS}
    found: dict[str, Any] = {}
    for name in names:
        path = Path(name)
        if name not in known and path.suffix != ".json":
            raise TocaError(f"no policy {name!r}: toca-compile presets lists those with a name, a file ends in .json")
        found[path.stem if path.suffix == ".json" else name] = known[name] if name in known else load_policy(path)
    return found or table


if __name__ == "__main__":
    sys.exit(main())
