"""The command line: one command per verb. Results go to stdout and files, progress and troubles to stderr."""

import errno
import functools
import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerboost import __version__
from layerboost.errors import (
    INTERRUPTED,
    EnvironmentTrouble,
    LayerBoostError,
    UsageError,
    VerificationError,
    out_of_memory,
)
from layerboost.layer_plan import LayerPlan, short
from layerboost.progress import SPEAKS, say, tell

app = typer.Typer(
    help="Make a pretrained LLM faster: keep softmax attention where it matters, window or remove it elsewhere, heal.",
    epilog="Exit codes: 0 done, 2 usage, 3 checkpoint, 4 plan, 5 data, 6 environment, 7 training, 8 verification, "
    "130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ModelArgument = Annotated[str, typer.Argument(help="Folder or hub id of the original model.", metavar="MODEL")]
HybridArgument = Annotated[str, typer.Argument(help="Folder of a hybrid checkpoint.", metavar="HYBRID")]
Settings = Annotated[
    list[str] | None, typer.Argument(help="Settings as key=value; docs list them.", metavar="KEY=VALUE")
]
Against = Annotated[str, typer.Option(help="The original model.", metavar="MODEL")]
ShapeName = Annotated[str | None, typer.Option(help="A known shape with random weights, in place of a model.")]
ShapeLayers = Annotated[int | None, typer.Option(help="Of the shape.")]
ShapeWidth = Annotated[float | None, typer.Option(help="Factor on the shape's width.")]
ShapeVocabulary = Annotated[int | None, typer.Option(help="Of the shape.")]
ShapeHeads = Annotated[int | None, typer.Option(help="Query heads of the shape.")]
ShapeKVHeads = Annotated[int | None, typer.Option(help="Key/value heads of the shape.")]
ShapeHeadDim = Annotated[int | None, typer.Option(help="Size of a head of the shape.")]
ShapePlan = Annotated[str | None, typer.Option(help="plan.json, or percent full/sliding/none like 25/50/25.")]
ShapeWindow = Annotated[int | None, typer.Option(help="Of the sliding share.")]
OutFile = Annotated[Path, typer.Option(help="File to write.")]
OutFolder = Annotated[Path, typer.Option(help="Folder to write.")]


# what these have measured or learned is kept when they are stopped
_RESUMED = ("analyze", "plan", "heal", "compare", "run", "demo")


def verb(function: Callable[..., None]) -> Callable[..., None]:
    return app.command()(troubles(function))


def troubles(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose troubles are one line and a documented exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            _part()
        except LayerBoostError as trouble:
            # a slip of the user's is the same in every process
            (say if type(trouble) is UsageError else tell)(f"error: {trouble}")
            raise typer.Exit(trouble.exit_code) from None
        except KeyboardInterrupt:
            goes_on = function.__name__ in _RESUMED
            say(f"interrupted; {'the same command goes on from here' if goes_on else 'nothing was written'}")
            raise typer.Exit(INTERRUPTED) from None
        except OSError as trouble:
            if trouble.errno in (None, errno.EPIPE):  # whoever read what is said here has left
                raise
            tell(f"error: {trouble.filename or 'a file'}: {trouble.strerror}")
            raise typer.Exit(EnvironmentTrouble.exit_code) from None
        except (MemoryError, RuntimeError) as trouble:
            if not out_of_memory(trouble):
                raise
            first = str(trouble).partition("\n")[0][:200]
            tell(f"error: out of memory ({first}); use shorter sequences, a smaller batch or a smaller model")
            raise typer.Exit(EnvironmentTrouble.exit_code) from None

    return wrapped


def _part() -> None:
    """Where several processes end once all is done; after a trouble, who started them ends them all.

    FSDP keeps the threads of gloo beyond their group, and one that meets an interpreter on its way out aborts the
    process; so this one leaves without Python's farewell.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from layerboost.passes import part

        part()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _model_or_settings(model: str | None, settings: list[str] | None) -> tuple[str | None, list[str]]:
    """Where no model is named, the first setting stands in its place."""
    if model is not None and "=" in model and not Path(model).exists():
        return None, [model, *(settings or [])]
    return model, settings or []


def _shape(name: str | None, *values: Any) -> Any:
    """A shape from the flags, or None; flags of a shape without one are an error."""
    from layerboost.artifacts import validate
    from layerboost.model.shapes import Shape

    keys = ("layers", "width", "vocabulary", "heads", "kv_heads", "head_dim", "plan", "window")
    given = {key: value for key, value in zip(keys, values, strict=True) if value is not None}
    if name is not None:
        return validate(Shape, {"name": name, **given}, "shape", UsageError)
    if given:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} is for --shape; a checkpoint has its own")
    return None


def _quiet() -> None:
    """transformers' own bars and hints would stand between our lines."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()


@verb
def analyze(
    model: ModelArgument,
    out: OutFile,
    settings: Settings = None,
    until_resolved: Annotated[
        bool, typer.Option("--until-resolved", help="More data until the plan at kv_reduction is stable.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Layers from disk, one at a time.")] = False,
) -> None:
    """Measure the damage of removing or windowing each layer's attention."""
    _quiet()
    from layerboost import analyze as analyze_verb
    from layerboost.artifacts import Sensitivity, check_output_file
    from layerboost.recipe import configured

    flags = {key: True for key, given in (("until_resolved", until_resolved), ("stream", stream)) if given}
    config = configured(analyze_verb.Config, settings or [], flags=flags)
    check_output_file(out, Sensitivity)
    found = analyze_verb.run(model, config, out=out)
    labels = sorted({c.plan.label: None for layer in found.layers for c in layer})
    table = Table("layer", *[f"{label}\ntext / recall KL" for label in labels])
    for index, layer in enumerate(found.layers):
        cells = {c.plan.label: f"{c.damage['text_kl'].mean:.3f} / {c.damage['recall_kl'].mean:.3f}" for c in layer}
        table.add_row(str(index), *[cells.get(label, "") for label in labels])
    _print(table)
    resolution = found.resolution
    if resolution is not None:
        say(f"layers by loss, largest first; = joins what cannot be told apart at {resolution.confidence:.0%}:")
        for label, groups in resolution.ranking.items():
            say(f"  {label}: {' > '.join(' = '.join(map(str, group)) for group in groups)}")
        if resolution.stopped:
            say(
                f"stopped: {resolution.stopped}; the plan at kv_reduction {resolution.kv_reduction} came out the same "
                f"on {resolution.stability:.0%} of resampled data"
            )


@verb
def plan(
    sensitivity: Annotated[Path, typer.Argument(help="sensitivity.json, from analyze.", metavar="SENSITIVITY")],
    out: OutFile,
    settings: Settings = None,
    planner: Annotated[
        str | None,
        typer.Option(help="greedy (default with --model), milp (without), gates, tiers, uniform, periodic, random."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The model, to measure whole plans on.", metavar="MODEL")
    ] = None,
    kv_reduction: Annotated[str | None, typer.Option(help="Share of the KV cache to save: 0.6 or 60%.")] = None,
    kv_bytes: Annotated[str | None, typer.Option(help="Most bytes of KV cache per token: 20000 or 20kB.")] = None,
    full_layers: Annotated[int | None, typer.Option(help="Most layers that keep their attention.")] = None,
    throughput: Annotated[str | None, typer.Option(help="Tokens per second over the base's, on --device.")] = None,
    device: Annotated[str | None, typer.Option(help="What throughput is foretold on: h100, here, or a file.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Most loss, nats per token.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per sequence that the KV cache is counted for.")] = None,
    engine: Annotated[str | None, typer.Option(help="Whose cache is counted: transformers (default) or vllm.")] = None,
    pilots: Annotated[int | None, typer.Option(help="Heal so many of the best plans briefly, and compare.")] = None,
) -> None:
    """Choose a mixer for every layer."""
    _quiet()
    from layerboost import plan as plan_verb
    from layerboost.artifacts import Plan, check_output_file
    from layerboost.heal import Config as HealConfig
    from layerboost.pilot import Pilots
    from layerboost.recipe import configured

    flags = {
        "planner": planner, "kv_reduction": kv_reduction, "kv_bytes": kv_bytes, "full_layers": full_layers,
        "throughput": throughput, "device_profile": device, "max_loss": max_loss, "context": context, "engine": engine,
        "pilots": pilots,
    }  # fmt: skip
    given = {key: value for key, value in flags.items() if value is not None}
    config = configured(plan_verb.Config, settings or [], flags=given)
    check_output_file(out, Plan)
    healing = HealConfig(text=config.text, seed=config.seed, device=config.device, tokens=config.pilot_tokens)
    pilots_of = Pilots(healing, out.with_name(f".{out.name}-pilot"))
    found = plan_verb.run(sensitivity, config, model=model, out=out, pilot=pilots_of)
    table = Table("layer", "mixer", "why")
    for index, layer in enumerate(found.layers):
        table.add_row(str(index), layer.label, layer.reason)
    _print(table)
    front = Table("KV kept", "loss", "plan", title="what other budgets would give")
    for point in found.front:
        front.add_row(
            f"{point.kv_share:.1%}", f"{point.loss:.4f}", " ".join(map(short, point.layers)),
            style="bold" if point.chosen else None,
        )  # fmt: skip
    _print(front)
    say("F: attention as it was; W and a number: a window of so many tokens; N: no attention")
    for line in _plan_facts(found):
        say(line)
    say(f"wrote {out}")


def _plan_facts(plan: Any) -> Iterator[str]:
    """What the chosen plan should give, and what was measured of it."""
    expected, held, measured = plan.predicted, plan.predicted["kv_bytes"], plan.measured
    share = f" ({expected['kv_share']:.1%})" if expected["kv_share"] is not None else ""
    yield (
        f"KV cache of {expected['context']:,} tokens, as {expected['engine']} keeps it: {held['hybrid']:,} of "
        f"{held['base']:,} bytes{share}"
    )
    losses = {"measured on the whole plan": measured.get("loss"), "if damages added up": expected["loss"]}
    told = [f"{loss:.4f} {how}" for how, loss in losses.items() if loss is not None]
    if told:
        yield f"loss: {', '.join(told)}"
    if "throughput" in expected:
        yield f"tokens per second over the base's, foretold: {expected['throughput']:.2f}"
    if expected["receptive_field"] is not None:
        yield f"looks back {expected['receptive_field']:,} tokens, through all layers together"
    if "cost" in measured:
        cost = measured["cost"]
        yield f"finding it took {_duration(cost['seconds'])} and {cost['forwards']:,.0f} forwards"


@verb
def convert(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="plan.json.", metavar="PLAN")],
    out: OutFolder,
) -> None:
    """Apply a plan to the weights."""
    _quiet()
    from layerboost import convert as convert_verb

    say(f"wrote {convert_verb.run(model, plan, out=out)}")


@verb
def heal(
    hybrid: HybridArgument,
    out: OutFolder,
    teacher: Annotated[str, typer.Option(help="The original model.", metavar="MODEL")],
    settings: Settings = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens, such as 200k or 10M.")] = None,
) -> None:
    """Distil the original model into the hybrid."""
    _quiet()
    from layerboost import heal as heal_verb
    from layerboost.recipe import configured

    given = {} if tokens is None else {"tokens": tokens}
    found = heal_verb.run(hybrid, teacher, configured(heal_verb.Config, settings or [], flags=given), out=out)
    first, best = found.curve[0], found.best
    closed = [
        f"{100 * share:.0f} % of the {name} gap" for name, share in found.closed(best).items() if share is not None
    ]
    say(
        f"validation KL {first.kl:.3f} -> {best.kl:.3f}, recall {first.recall:.3f} -> {best.recall:.3f} (base "
        f"{found.base_recall:.3f})" + (f": closed {', '.join(closed)}" if closed else "")
    )
    say(f"wrote {out}")


@verb
def evaluate(hybrid: HybridArgument, against: Against, out: OutFile, settings: Settings = None) -> None:
    """Compare base, converted and healed on held-out data."""
    _quiet()
    from layerboost import evaluate as evaluate_verb
    from layerboost.artifacts import Evaluation, check_output_file
    from layerboost.recipe import configured

    config = configured(evaluate_verb.Config, settings or [])
    check_output_file(out, Evaluation)
    found = evaluate_verb.run(hybrid, against, config, out=out)
    for table in _evaluation_tables(found):
        _print(table)


@verb
def bench(
    out: OutFile,
    hybrid: Annotated[str | None, typer.Argument(help="Folder of a hybrid checkpoint.", metavar="[HYBRID]")] = None,
    settings: Settings = None,
    against: Annotated[str | None, typer.Option(help="The original model.", metavar="MODEL")] = None,
    engine: Annotated[str | None, typer.Option(help="transformers (default), or vllm: under load.")] = None,
    shape: ShapeName = None,
    layers: ShapeLayers = None,
    width: ShapeWidth = None,
    vocabulary: ShapeVocabulary = None,
    heads: ShapeHeads = None,
    kv_heads: ShapeKVHeads = None,
    head_dim: ShapeHeadDim = None,
    plan: ShapePlan = None,
    window: ShapeWindow = None,
) -> None:
    """Measure speed and KV cache against the original."""
    _quiet()
    from layerboost import bench as bench_verb
    from layerboost.artifacts import Bench, check_output_file
    from layerboost.recipe import configured

    hybrid, settings = _model_or_settings(hybrid, settings)
    config = configured(bench_verb.Config, settings, flags={} if engine is None else {"engine": engine})
    check_output_file(out, Bench)
    chosen = _shape(shape, layers, width, vocabulary, heads, kv_heads, head_dim, plan, window)
    if chosen is not None:
        if hybrid is not None or against is not None:
            raise UsageError("--shape stands in place of a hybrid and its original; leave them out")
        found = bench_verb.run_shape(chosen, config, out=out)
    elif hybrid is None or against is None:
        raise UsageError("name a hybrid and its original after --against, or a known shape after --shape")
    else:
        found = bench_verb.run(hybrid, against, config, out=out)
    for table in _bench_tables(found):
        _print(table)


@verb
def predict(
    model: Annotated[str | None, typer.Argument(help="A hybrid, or an original and --plan.", metavar="[MODEL]")] = None,
    settings: Settings = None,
    device: Annotated[str, typer.Option(help="Known device, `here` for a short probe, or a file.")] = "h100",
    devices: Annotated[int, typer.Option(help="How many share the model.", min=1)] = 1,
    shape: ShapeName = None,
    layers: ShapeLayers = None,
    width: ShapeWidth = None,
    vocabulary: ShapeVocabulary = None,
    heads: ShapeHeads = None,
    kv_heads: ShapeKVHeads = None,
    head_dim: ShapeHeadDim = None,
    plan: ShapePlan = None,
    window: ShapeWindow = None,
) -> None:
    """Estimate what a plan gives under load on a device, before anything runs."""
    _quiet()
    from layerboost import predict as predict_verb
    from layerboost.recipe import configured

    model, settings = _model_or_settings(model, settings)
    config = configured(predict_verb.Config, settings)
    if shape is None and plan is None and window is not None:
        raise UsageError("--window is of the sliding share of --plan; name a plan, or leave it out")
    if shape is not None and model is not None:
        raise UsageError("--shape stands in place of a model; leave one of the two out")
    if model is not None and plan is not None:
        _shape(None, layers, width, vocabulary, heads, kv_heads, head_dim, None, None)  # which are of no use here
        found = predict_verb.run(model, config, plan=plan, window=window, device=device, devices=devices)
    elif (chosen := _shape(shape, layers, width, vocabulary, heads, kv_heads, head_dim, plan, window)) is not None:
        found = predict_verb.run_shape(chosen, config, device=device, devices=devices)
    elif model is not None:
        found = predict_verb.run(model, config, device=device, devices=devices)
    else:
        raise UsageError("name a hybrid, an original and its --plan, or a known shape after --shape")
    _print(_prediction_table(found))
    counts = Counter(short(layer.label) for layer in found.layers)
    say(f"the hybrid's layers: {', '.join(f'{count} {label}' for label, count in counts.items())}")


@verb
def compare(
    job: Annotated[Path, typer.Argument(help="A YAML file; docs/compare.md has its keys.", metavar="JOB")],
    out: OutFolder,
) -> None:
    """Compare every way of choosing layers and replacements, before and after the same healing."""
    _quiet()
    from layerboost import compare as compare_verb

    compare_verb.run(compare_verb.load_job(job), out=out)
    typer.echo((out / "comparison.md").read_text())


@verb
def stability(
    sensitivities: Annotated[list[Path], typer.Argument(help="sensitivity.json files.", metavar="SENSITIVITY...")],
    out: OutFile,
) -> None:
    """How well rankings of layers agree across probes, and across data, seeds, lengths and sizes of models."""
    from layerboost import stability as stability_verb
    from layerboost.artifacts import Stability, check_output_file

    check_output_file(out, Stability)
    typer.echo(stability_verb.run(sensitivities, out=out))


@verb
def calibrate(
    benches: Annotated[list[Path], typer.Argument(help="bench.json files of vLLM.", metavar="BENCH...")],
    out: Annotated[Path, typer.Option(help="Device file to write, for predict --device.")],
    cells: Annotated[str | None, typer.Option(help="Loads to fit, such as 0,5,9; at most 4. Others check.")] = None,
    clock: Annotated[str, typer.Option(help="seconds, or cpu_seconds.")] = "seconds",
) -> None:
    """Fit a device to measured loads, and say how well it predicts the others."""
    _quiet()
    from layerboost import predict as predict_verb

    rows = predict_verb.calibrate_on(benches, cells, clock, out=out)
    table = Table("", "load", "ratio measured", "predicted", "error", "base tokens/s measured", "predicted", "error")
    for number, row in enumerate(rows):
        table.add_row(
            f"{number}{' fitted' if row.fitted else ''}", row.name, f"{row.ratio:.2f}", f"{row.predicted_ratio:.2f}",
            f"{row.ratio_error:+.1%}", f"{row.base:,.0f}", f"{row.predicted_base:,.0f}", f"{row.base_error:+.1%}",
        )  # fmt: skip
    _print(table)
    typer.echo(predict_verb.summary(rows))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@troubles
def serve(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="A hybrid, or a model that could become one.", metavar="PATH")],
) -> None:
    """Serve a checkpoint on vLLM, on 127.0.0.1; what follows PATH goes to vLLM."""
    _quiet()
    from layerboost import serve as serve_verb

    serve_verb.run(path, context.args)


@verb
def export(
    hybrid: HybridArgument,
    out: OutFolder,
    portable: Annotated[bool, typer.Option("--portable", help="With its own code, for trust_remote_code.")] = False,
    native: Annotated[bool, typer.Option("--native", help="As a stock model, for plans of one window.")] = False,
) -> None:
    """Write a hybrid for people without LayerBoost."""
    _quiet()
    from layerboost import export as export_verb

    if portable == native:
        raise UsageError("name the form to export to: either --portable or --native")
    say(f"wrote {export_verb.run(hybrid, 'portable' if portable else 'native', out=out)}")


@verb
def verify(
    path: Annotated[str, typer.Argument(help="A hybrid, an export, or a server's http address.", metavar="PATH")],
    against: Annotated[str, typer.Option(help="The hybrid; or, for one not healed, the original.", metavar="MODEL")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="DANGEROUS: run the code that comes with PATH.")
    ] = False,
) -> None:
    """Prove that a checkpoint computes what the hybrid here computes."""
    _quiet()
    from typing import get_args

    from layerboost import verify as verify_verb

    if dtype not in get_args(verify_verb.DTYPES):
        raise UsageError(f"dtype must be one of {', '.join(get_args(verify_verb.DTYPES))}, found {dtype!r}")
    checks = verify_verb.run(path, against, dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    table = Table("check", "found", "holds")
    for check in checks:
        table.add_row(check.name, escape(check.found), "yes" if check.holds else "NO")
    _print(table)
    failed = sum(not check.holds for check in checks)
    if failed:
        raise VerificationError(f"{failed} of {len(checks)} checks do not hold for {path}")


@verb
def families(
    everything: Annotated[bool, typer.Option("--all", help="Also what transformers has beside them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the model families, and how each was verified."""
    _quiet()
    from layerboost.model.overview import overview

    found = overview(everything)
    if as_json:
        typer.echo(json.dumps([vars(entry) for entry in found], indent=1))
        return
    table = Table("model_type", "transformers class", "supported", "how it was verified, or why not")
    words = {True: "yes", False: "no", None: "not known"}
    for entry in found:
        table.add_row(entry.family, entry.model_class, words[entry.supported], entry.how)
    _print(table)


@verb
def run(
    model: ModelArgument,
    out: OutFolder,
    settings: Settings = None,
    recipe: Annotated[str | None, typer.Option(help="YAML file, or the name of a shipped recipe.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, with estimates.")] = False,
) -> None:
    """Do all of it, resumably, and write a report."""
    _quiet()
    from layerboost.recipe import load_recipe

    chosen = load_recipe(recipe, settings or [])
    if dry_run:
        _dry_run(model, chosen, out)
    else:
        _run(model, chosen, out)


@verb
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, with estimates.")] = False,
) -> None:
    """Run everything on the small model that comes with LayerBoost; no download."""
    _quiet()
    from layerboost.recipe import load_recipe

    chosen = load_recipe("demo", settings or [])
    if dry_run:
        _dry_run("reference", chosen, out)
    else:
        _run("reference", chosen, out)


@verb
def report(run: Annotated[Path, typer.Argument(help="Run folder, or a bench.json of vLLM.", metavar="RUN")]) -> None:
    """Write the run's report again, or a page for a bench."""
    from layerboost import report as report_verb

    say(f"wrote {report_verb.run(run)}")


@verb
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a checkpoint.", metavar="PATH")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what a checkpoint is, in one screen."""
    from layerboost import inspect as inspect_verb

    facts = inspect_verb.run(path)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    kv, origin = facts["kv_bytes"], facts["provenance"].get("base", {})
    table = Table(show_header=False, box=None)
    table.add_row(
        "model", f"{escape(facts['name'])} ({facts['model_type']}{'' if facts['hybrid'] else ', not a hybrid'})"
    )
    table.add_row("digest", facts["digest"][:16])
    if origin:
        healing = facts["provenance"].get("healing")
        table.add_row("made from", f"{escape(origin.get('name', ''))}, digest {origin.get('digest', '')[:16]}")
        table.add_row("healed", f"{healing['tokens']:,} tokens" if healing else "no")
    table.add_row("parameters", f"{facts['parameters']:,}")
    table.add_row("layers", _layer_runs(facts["layers"]))
    table.add_row("engines need", ", ".join(facts["needs"]) or "nothing new")
    share = f", {kv['hybrid'] / kv['base']:.0%} of the original" if facts["hybrid"] and kv["base"] else ""
    table.add_row("KV cache", f"{kv['hybrid']:,} bytes at {kv['context']:,} tokens{share}")
    reach = facts["receptive_field"]
    table.add_row("looks back", "everything" if reach is None else f"{reach:,} tokens, through all layers together")
    table.add_row("files", {None: "no manifest", True: "intact", False: "NOT as they were written"}[facts["intact"]])
    _print(table)


def _layer_runs(layers: list[dict[str, Any]]) -> str:
    """`0-1 sliding_attention 64 · 2 full_attention`."""
    labels = [LayerPlan(**layer).label for layer in layers]
    runs: list[tuple[int, int, str]] = []
    for index, label in enumerate(labels):
        if runs and runs[-1][2] == label:
            runs[-1] = (runs[-1][0], index, label)
        else:
            runs.append((index, index, label))
    return " · ".join(f"{first if first == last else f'{first}-{last}'} {label}" for first, last, label in runs)


def _run(model: str, recipe: Any, out: Path) -> None:
    from layerboost import pipeline
    from layerboost.artifacts import Bench, Evaluation, load

    pipeline.run(model, recipe, out=out)
    evaluation, bench = load(Evaluation, out / "evaluation.json"), load(Bench, out / "bench.json")
    for table in (*_evaluation_tables(evaluation), *_bench_tables(bench)):
        _print(table)
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo(f"hybrid: {out / 'healed'}")


def _dry_run(model: str, recipe: Any, out: Path) -> None:
    from layerboost import pipeline
    from layerboost.artifacts import free_bytes
    from layerboost.estimate import estimate, measure_speed
    from layerboost.model.loading import find_config, is_local, pick_device

    pipeline.check_place(out)
    config = find_config(model)
    pipeline.check_settings(config, recipe)
    found = estimate(config, recipe, measure_speed(pick_device(recipe.device), config.hidden_size))
    files = {
        "analyze": "sensitivity.json", "plan": "plan.json", "convert": "hybrid/", "heal": "healed/",
        "evaluate": "evaluation.json", "bench": "bench.json",
    }  # fmt: skip
    started = is_local(model) and out.exists()  # else nothing is current, and the weights need not be read
    todo = pipeline.still_to_do(model, recipe, out=out) if started else list(files)
    table = Table("stage", "writes", "about")
    for stage, path in files.items():
        about = _duration(found.seconds.get(stage, 0.0)) if stage in todo else "current, is skipped"
        table.add_row(stage, str(out / path), about)
    table.add_row("report", str(out / "report.html"), _duration(0.0))
    _print(table)
    rough = "rough, and without lm-eval tasks" if recipe.analyze.tasks or recipe.evaluate.tasks else "rough"
    typer.echo(
        f"{found.parameters:,} parameters; about {found.memory_bytes / 1e9:.1f} GB of memory, and "
        f"{found.disk_bytes / 1e6:,.0f} MB of disk where {free_bytes(out) / 1e6:,.0f} MB are free; times are {rough}. "
        "Nothing was done."
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"


def _evaluation_tables(evaluation: Any) -> list[Table]:
    return [_quality_table(evaluation), *([_task_table(evaluation)] if evaluation.tasks else [])]


def _task_table(evaluation: Any) -> Table:
    table = Table("lm-eval task", *evaluation.tasks, "healed - base")
    for row in evaluation.task_rows():
        table.add_row(escape(row.name), *row.scores, row.difference)
    return table


def _quality_table(evaluation: Any) -> Table:
    table = Table("held-out quality", *evaluation.models, title_justify="left")
    models = evaluation.models.values()

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    row("KL to the base, nats/token", *[m.kl.show() for m in models])
    row("NLL, nats/token", *[m.nll.show() for m in models])
    row("perplexity", *[f"{m.perplexity:.2f}" for m in models])
    for probe, found in evaluation.models["base"].recall.items():
        name = f"recall {probe}, {found.count} answers" if probe != "mean" else "recall mean"
        row(name, *[m.recall[probe].show(percent=True) for m in models])
    return table


def _prediction_table(found: Any) -> Table:
    title = f"{found.model}, {found.device.name} ({found.device.how}): an estimate"
    table = Table("", "base", "hybrid", "ratio", title=title)
    base, hybrid = found.base, found.hybrid

    def row(name: str, figure: str, form: str = ",.0f") -> None:
        ours, theirs = getattr(hybrid, figure), getattr(base, figure)
        table.add_row(name, format(theirs, form), format(ours, form), f"{ours / theirs:.2f}" if theirs else "")

    load = found.load
    row(
        f"output tokens/s, {load.concurrency} at once, {load.prompt_tokens}+{load.output_tokens} tokens",
        "tokens_per_second",
    )
    row("requests in work at once, mean", "running", ",.1f")
    row(f"KV bytes per token at {load.prompt_tokens + load.output_tokens}", "kv_bytes_per_token")
    row("share of the KV memory lost to padding of groups", "kv_padding", ".1%")
    row("requests that had to start again", "preemptions")
    row("GFLOP per token, attention left out", "token_flops_giga", ",.3g")
    table.add_row("KV memory, bytes", f"{found.kv_memory['base']:,}", f"{found.kv_memory['hybrid']:,}", "")
    return table


def _bench_tables(bench: Any) -> list[Table]:
    return [_serving_table(bench), _serving_details(bench)] if bench.serving else [_cost_table(bench)]


def _cost_table(bench: Any) -> Table:
    table = Table("cost", "base", "healed", "ratio (min to max)")
    kv = bench.kv_bytes_per_token
    less = f"{kv['healed'] / kv['base']:.2f}" if kv["base"] else ""
    table.add_row(f"KV bytes per token at {bench.context}", f"{kv['base']:,.0f}", f"{kv['healed']:,.0f}", less)
    for phase in ("decode", "prefill"):
        seconds = [f"{bench.median_seconds(name, phase):.3f}" for name in ("base", "healed")]
        table.add_row(f"{phase}, seconds", *seconds, bench.speed[phase].show())
    table.add_row("parameters", *[f"{bench.parameters[name]:,}" for name in ("base", "healed")], "")
    return table


def _serving_table(bench: Any) -> Table:
    title = f"{bench.settings['model']} on vLLM {bench.settings['vllm']}: output tokens per second, base and hybrid"
    table = Table("KV", "requests at once", "tokens", "base", "hybrid", "ratio", "ratio, CPU time", title=title)
    for cell in bench.serving:
        load = cell.load
        table.add_row(
            cell.kv, str(load.concurrency), f"{load.prompt_tokens}+{load.output_tokens}",
            *[f"{cell.tokens_per_second(name):,.1f}" for name in ("base", "healed")],
            cell.throughput.show(), cell.cpu_throughput.show(),
        )  # fmt: skip
    return table


def _serving_details(bench: Any) -> Table:
    table = Table(
        "KV", "requests at once", "KV bytes/token", "KV tokens", "KV MB used", "running", "preempted", "TTFT, s",
        "TPOT, ms", "steps", "peak GB", title="base / hybrid, medians",
    )  # fmt: skip

    def pair(cell: Any, figure: str, form: str = ",.0f", factor: float = 1.0) -> str:
        return " / ".join(format(cell.median(name, figure) * factor, form) for name in ("base", "healed"))

    for cell in bench.serving:
        load, held, capacity = cell.load, cell.kv_bytes_per_token, cell.kv_capacity
        table.add_row(
            cell.kv,
            f"{load.concurrency}, {load.prompt_tokens}+{load.output_tokens}",
            f"{held['base']:,.0f} / {held['healed']:,.0f}",
            f"{capacity['base']:,} / {capacity['healed']:,}",
            pair(cell, "kv_used", ",.1f", cell.kv_memory / 1e6),
            pair(cell, "running"),
            pair(cell, "preemptions"),
            pair(cell, "ttft", ".2f"),
            pair(cell, "tpot", ".1f", 1e3),
            pair(cell, "steps"),
            pair(cell, "peak_memory", ".2f", 1e-9),
        )
    return table


def _print(table: Table) -> None:
    if not SPEAKS:
        return
    # a pipe has no width: keep whole cells there
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"layerboost {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None: ...


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves as Ctrl-C does
    for name in ("torchao", "torch.utils._pytree"):  # which speak of kernels for GPUs wherever peft finds torchao
        logging.getLogger(name).setLevel(logging.ERROR)
    app()


if __name__ == "__main__":
    main()
