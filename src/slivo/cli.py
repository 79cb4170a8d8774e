"""The command line: thin commands over the library.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slivo.errors import OutputError, RecipeError, SlivoError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from slivo.recipe import Loaded, Result
    from slivo.recipe.stop import Stop

app = typer.Typer(
    name="slivo",
    help="Prune, then distil: make a trained network smaller and faster, and keep its accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DEBUG = "--debug"

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; new or empty.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change the recipe, as stages.0.prune.keep.macs=0.4.", show_default=False
    ),
]
Args = Annotated[
    list[str] | None,
    typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the model's callable.", show_default=False),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of an input with its batch, as 2,3,224,224; of another dtype than the network's, as 2,16:int64.",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Argument(help="'package.module:callable', or an artifact: its folder or packed file.", show_default=False),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of the command ``slivo``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that wait for one another by spinning take twenty times as long where others use the machine, too; read
    # when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Models and data of one's own are named by import; they are often in the folder one is in.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        app(args=[argument for argument in given if argument != _DEBUG], prog_name="slivo")
    except SlivoError as error:
        if _DEBUG in given:
            raise
        _fail(str(error), 2 if isinstance(error, RecipeError | OutputError) else 1)


def _fail(message: str, code: int) -> None:
    from slivo import console

    console.error(message)
    raise SystemExit(code)


def _version(asked: bool) -> None:
    if asked:
        import slivo

        typer.echo(f"slivo {slivo.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show the traceback of an error; anywhere in the line.")] = False,
) -> None:
    del version, debug


@app.command()
def demo(
    out: Out = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Run so many times, from --seed on, and show medians.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Prune, distill and quantize a network on real handwritten digits; about a minute, no network."""
    from slivo.recipe import load

    loaded = load("prune-then-distill")
    folder = out or _free(Path("runs") / "demo")
    if seeds == 1:
        _finish(_run(loaded, folder, seed=seed, resume=False, quiet=quiet))
    else:
        _run_seeds(loaded, folder, range(seed, seed + seeds), quiet=quiet)


def _run_seeds(loaded: Loaded, folder: Path, numbers: Sequence[int], *, quiet: bool) -> None:
    """Run a recipe with several seeds; the median must meet the target."""
    from slivo import console

    results = []
    for number in numbers:
        if not quiet:
            console.out().print(f"seed {number}")
        results.append(_run(loaded, folder / f"seed-{number}", seed=number, resume=False, quiet=quiet))
    summaries = [result.summary for result in results]
    macs, size, drop = console.seeds(summaries, "accuracy")
    target = loaded.recipe.target
    asked = ((macs, target.macs), (size, target.bytes), (drop, target.max_drop))
    if any(limit is not None and value > limit + 1e-6 for value, limit in asked):
        _fail("the median misses the target", 1)


@app.command()
def run(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a recipe that ships.", show_default=False)
    ] = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    settings: Settings = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.", show_default="0")] = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe; with --resume and --out alone, go on with the run in that folder."""
    from slivo.recipe import load

    if recipe is None and not (resume and out is not None):
        raise typer.BadParameter("give a recipe, or --resume with --out", param_hint="RECIPE")
    book = _book(out) if resume and out is not None else {}
    loaded = load(recipe if recipe is not None else book["recipe"], settings or ())
    folder = out or Path("runs") / loaded.recipe.name
    if resume and not book:
        book = _book(folder)
    chosen = seed if seed is not None else int(book.get("seed") or 0)
    _finish(_run(loaded, folder, seed=chosen, resume=resume, quiet=quiet))


def _book(folder: Path) -> dict[str, Any]:
    from slivo.recipe import folder as files

    return files.read_json(folder / files.RUN)


def _run(loaded: Loaded, folder: Path, *, seed: int, resume: bool, quiet: bool) -> Result:
    """Run a recipe with its progress shown."""
    from slivo import console, recipe

    with _interruptible(folder) as stop, console.watching(quiet=quiet) as watch:
        return recipe.run(loaded, folder, seed=seed, resume=resume, watch=watch, stop=stop)


@contextmanager
def _interruptible(folder: Path, how: str = "") -> Iterator[Stop]:
    """Say how to go on with a run that Ctrl-C or SIGTERM breaks off."""
    from slivo.recipe.stop import stopping

    def told() -> str:
        if not folder.is_dir():
            return "interrupted"
        return f"interrupted; go on with: {how or f'slivo run --resume --out {folder}'}"

    def end(stop: Stop) -> None:
        # What a progress bar does to a terminal is undone, since nothing else will be.
        show = "\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{show}error: {told()}\n".encode())
        os._exit(stop.code)

    with stopping(end) as stop:
        try:
            yield stop
        except KeyboardInterrupt:
            _fail(told(), stop.code)


def _finish(result: Result) -> None:
    """Write the report, show the result, and fail if the target was missed."""
    from slivo import console

    page: Path | None = None
    try:
        from slivo import report

        page = report.write(result.folder)
    except SlivoError as error:
        console.error(f"no report: {error}")
    console.result(result.summary, result.misses, result.folder, page)
    if not result.met:
        _fail(f"the target was missed: {'; '.join(result.misses)}", 1)


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that ships.", show_default=False)],
    trials: Annotated[int, typer.Option(min=1, help="How many recipes to try, over all workers and starts.")] = 50,
    cost: Annotated[
        list[str] | None,
        typer.Option(
            help="To lower: macs, params, bytes or latency; may be repeated.", show_default="the recipe's, or macs"
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A database that workers share.", show_default="SQLite in the folder"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the search.", show_default="runs/NAME-search")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that work here.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="End after that long.", show_default="none")
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Try variations of a recipe, and show those that nothing beats; the same command goes on, or joins in."""
    from slivo import console
    from slivo import search as searching
    from slivo.recipe import load

    loaded = load(recipe, settings or ())
    folder = out or Path("runs") / f"{loaded.recipe.name}-search"
    with _interruptible(folder, "the same command"), console.searching(quiet=quiet) as shown:
        found = searching.search(
            loaded, folder, trials=trials, costs=cost or (), storage=storage, jobs=jobs, seed=seed, timeout=timeout,
            watch=shown.watch, tell=shown.trial, note=shown.note,
        )  # fmt: skip
    page: Path | None = None
    try:
        from slivo import report

        page = report.write_search(found.folder)
    except SlivoError as error:
        console.error(f"no report: {error}")
    console.found(found, page)
    if found.best is None:
        _fail("no trial is done", 1)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The folder of a run, or of a search.")]) -> None:
    """Write report.html of a run or a search anew, from what it wrote down."""
    from slivo import report as page

    searched = (folder / "search.json").is_file()
    typer.echo(str(page.write_search(folder) if searched else page.write(folder)))


@app.command()
def inspect(model: Model, args: Args = None, inputs: Inputs = None) -> None:
    """Show what a network costs, and its axes: what can be cut, and who moves together."""
    import slivo
    from slivo import console
    from slivo.report import text

    network, example = _model(model, args or (), inputs or ())
    graph, seen = slivo.trace(network, example), slivo.inspect(network, example)
    rows = [
        [axis.name, str(axis.size), text.count(axis.macs), text.count(axis.params), axis.fixed or ""]
        for axis in graph.axes
    ]
    console.table(("axis", "size", "MACs", "parameters", "fixed because"), rows, right=(1, 2, 3))
    console.tree(graph)
    facts = [
        ("parameters", text.count(seen.params)),
        ("MACs", text.count(seen.macs)),
        ("bytes", text.size(seen.bytes)),
        ("latency here, in PyTorch", text.milliseconds(seen.latency_ms)),
        ("MACs that can be reached", text.percent(seen.prunable_macs)),
        ("operators without a rule", ", ".join(graph.unknown_ops) or "none"),
    ]
    console.table(("", ""), [list(fact) for fact in facts])


@app.command()
def export(
    artifact: Annotated[Path, typer.Argument(help="An artifact: its folder or packed file.", show_default=False)],
    to: Annotated[str, typer.Option(help="Format to write: onnx.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write.", show_default="the artifact's name + .onnx")
    ] = None,
    inputs: Inputs = None,
) -> None:
    """Write an artifact for another runtime, checked against the artifact."""
    from slivo.export import onnx

    if to != "onnx":
        raise typer.BadParameter(f"{to!r} is no format to export to; there is: onnx", param_hint="--to")
    network, example = _model(str(artifact), (), inputs or ())
    typer.echo(str(onnx.export(network, out or artifact.with_name(f"{artifact.name}.onnx"), example)))


@app.command()
def pack(
    artifact: Annotated[Path, typer.Argument(help="The folder of an artifact.", show_default=False)],
    file: Annotated[
        Path | None, typer.Argument(help="File to write.", show_default="the artifact's name + .slivo")
    ] = None,
) -> None:
    """Pack an artifact into one file without loss, each tensor in the codec that makes it smallest."""
    import slivo
    from slivo import console

    console.packed(slivo.pack(artifact, file or artifact.with_name(f"{artifact.name}.slivo")))


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="A packed file.", show_default=False)],
    artifact: Annotated[
        Path | None, typer.Argument(help="Folder to write; without one, show what is in the file.", show_default=False)
    ] = None,
) -> None:
    """Unpack a file into the folder of an artifact, or show what is in it."""
    import slivo
    from slivo import console
    from slivo.artifact import PackedFile

    if artifact is not None:
        typer.echo(str(slivo.unpack(file, artifact)))
    else:
        with PackedFile(file) as opened:
            console.packed(opened.packed)


@app.command()
def recipes(
    show: Annotated[
        str | None, typer.Option("--show", metavar="NAME", help="Print one, as YAML.", show_default=False)
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """List the recipes that ship, or print one to start from."""
    from slivo import console
    from slivo.recipe import json_schema, shipped

    if schema:
        import json

        typer.echo(json.dumps(json_schema(), indent=1))
        return

    found = shipped()
    if show is None:
        rows = [[name, text.partition("\n")[0].removeprefix("# ")] for name, text in found.items()]
        console.table(("recipe", "what it does"), rows)
    elif show in found:
        typer.echo(found[show], nl=False)
    else:
        raise typer.BadParameter(f"{show!r} does not ship; there are: {', '.join(found)}", param_hint="--show")


@app.command()
def criteria() -> None:
    """List the pruning criteria."""
    from slivo import console
    from slivo.prune import criteria as module

    found = {name: module.resolve(name) for name in module.names()}
    rows = [[name, each.summary, each.needs] for name, each in found.items()]
    console.table(("criterion", "score of a position", "needs"), rows)


@app.command()
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Folders of artifacts.", show_default=False)],
    teacher: Annotated[Path | None, typer.Option(help="Artifact to compare with.", show_default=False)] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of a run: its teacher, and its task to measure on.", show_default=False)
    ] = None,
    inputs: Inputs = None,
    runtime: Annotated[list[str] | None, typer.Option(help="One of them alone; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Size of a batch; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(help="That a runtime may use.")] = 1,
    repeats: Annotated[int, typer.Option(help="Calls that are timed.")] = 50,
    json: Annotated[Path | None, typer.Option("--json", help="File to write.", show_default=False)] = None,
) -> None:
    """Time artifacts on PyTorch, torch.compile, ONNX Runtime and OpenVINO, as far as they are installed."""
    from slivo import console
    from slivo.files import write
    from slivo.recipe import bench as of_run

    if json is not None and not json.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json.parent}", param_hint="--json")
    rows: list[dict[str, Any]] = []
    for folder in artifacts:
        network, example = _model(str(folder), (), inputs or ())
        rows += [
            {"artifact": str(folder), **vars(row)}
            for row in of_run.bench(
                network, example, folder=run, teacher=teacher, runtimes=runtime or (), batches=batch or (1, 32),
                threads=threads, repeats=repeats,
            )
        ]  # fmt: skip
    console.benches(rows)
    if json is not None:
        import json as module

        write(json, module.dumps(rows, indent=1).encode())


@app.command()
def losses() -> None:
    """List the distillation losses, with their options."""
    from slivo import console
    from slivo import losses as module

    rows = [[loss.name, loss.summary, "\n".join(loss.parameters)] for loss in module.describe()]
    console.table(("loss", "what it is", "options"), rows)


def _free(folder: Path) -> Path:
    """Return the folder, or with a number the first that is not taken."""
    number, free = 1, folder
    while free.exists() and any(free.iterdir()):
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _model(reference: str, args: Sequence[str], shapes: Sequence[str]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a network and inputs for it."""
    import torch

    from slivo import artifact
    from slivo.recipe.models import made, named

    values = dict(_key_value(arg) for arg in args)
    network = made(named(reference, values), 0).eval()
    wanted = [_shape(text, _dtype(network)) for text in shapes]
    if not wanted and Path(reference).exists():
        noted = artifact.read(reference)["meta"].get("inputs", ())
        wanted = [(tuple(each["shape"]), getattr(torch, each["dtype"])) for each in noted]
    if not wanted:
        raise typer.BadParameter("give the shape of each input, as --input 2,3,224,224", param_hint="--input")
    generator = torch.Generator().manual_seed(0)
    return network, tuple(
        torch.randn(shape, generator=generator, dtype=dtype)
        if dtype.is_floating_point
        else torch.zeros(shape, dtype=dtype)
        for shape, dtype in wanted
    )


def _key_value(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise typer.BadParameter(f"{text!r} is not of the form key=value", param_hint="--arg")
    return key, yaml.safe_load(value)


def _dtype(network: nn.Module) -> torch.dtype:
    """Return the floating dtype that a network computes in, for inputs of which none is said."""
    import torch

    found = (each.dtype for each in network.parameters() if each.is_floating_point())
    return next(found, torch.float32)


def _shape(text: str, otherwise: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Read a shape, and a dtype if one is said."""
    import torch

    written, colon, name = text.partition(":")
    dtype = getattr(torch, name, None) if colon else otherwise
    try:
        sizes = tuple(int(part) for part in written.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or not isinstance(dtype, torch.dtype):
        raise typer.BadParameter(
            f"{text!r} is no shape; write sizes with commas, as 2,3,224,224, and a dtype as 2,16:int64",
            param_hint="--input",
        )
    return sizes, dtype
