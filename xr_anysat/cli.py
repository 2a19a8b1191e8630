"""The command line: `embed` and `plan` for an area of a catalog, `demo`, `weights`, `verify`.

Nothing is decided here. An option that is not given is not passed on, so that configuration, environment
and defaults hold as they do in Python. Paths and results go to standard output, all else to standard error.
"""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

import xr_anysat
from xr_anysat.config import MODEL, option
from xr_anysat.demo import probe as probe_of
from xr_anysat.demo.run import run
from xr_anysat.errors import AnySatError, AnySatWarning, CubeError, OptionError
from xr_anysat.model import checkpoint
from xr_anysat.model.weights import EncoderSpec, encoder_spec, with_known_hash
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.text import format_bytes
from xr_anysat.stac.search import open_s2

if TYPE_CHECKING:
    from distributed import Client

QUIET_SECONDS = 60.0
"""Between two lines of progress, where there is no terminal to draw a bar on."""

# A line a paragraph: typer keeps line breaks
EPILOG = (
    "Options that are not given come from the environment (XR_ANYSAT_MODEL, …), else they have the defaults told "
    "here.\n\nExit status: 0 done; 1 failed; 2 the command line asks for what is impossible; 130 interrupted "
    "(Ctrl-C); 143 terminated. After 1, 130 and 143 what embed has finished stays: the same command goes on with it."
)

app = typer.Typer(
    help="AnySat embeddings of any Sentinel-2 area.",
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,  # `main` says what failed
)
weights_app = typer.Typer(
    help="The model's weights: fetch them, or say where they are.", no_args_is_help=True
)
app.add_typer(weights_app, name="weights")
bench_app = typer.Typer(help="Measure what embeddings are worth.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


# ---------------------------------------------------------------------- options

FRAMES, MODELS, STORE = "Frames and windows", "Model", "Store"  # headings of --help


def _option(
    kind: Any, function: Callable[..., Any], name: str, help: str, panel: str | None, *names: str, **more: Any
) -> Any:
    """An option of a command that is the argument `name` of `function`, whose default it tells."""
    default = inspect.signature(function).parameters[name].default
    if default is not None:
        help += f" Default: {default}."
    return Annotated[
        kind | None, typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)
    ]


def _number_of_frames(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdecimal():
        raise ValueError(f"{text!r} is neither a number nor all")
    return int(text)


def _place(kind: Any, name: str, help: str, *names: str, **more: Any) -> Any:
    return _option(kind, open_s2, name, help, "Where and when", *names, **more)


def _how(kind: Any, name: str, help: str, panel: str, **more: Any) -> Any:
    return _option(kind, xr_anysat.embed, name, help, panel, **more)


PLACE: dict[str, Any] = {
    "bbox": _place(
        tuple[float, float, float, float], "bbox", "Area in degrees, also as W,S,E,N.", metavar="W S E N"
    ),
    "point": _place(
        tuple[float, float],
        "point",
        "Middle of a square area, in degrees, also as LON,LAT.",
        metavar="LON LAT",
    ),
    "buffer_m": _place(float, "buffer_m", "Metres from --point to the edges.", "--buffer", metavar="M"),
    "datetime": _place(str, "datetime", "2022, 2022-06 or 2022-04-01/2022-10-01.", metavar="PERIOD"),
    "catalog": _place(
        str, "catalog", "earth-search, planetary-computer, cdse or a STAC API's URL.", metavar="NAME"
    ),
    "max_cloud": _place(float, "max_cloud", "Clouds that a scene may have.", metavar="PERCENT"),
    "chunks": _place(int, "chunks", "Side of what is read at once.", metavar="PIXELS"),
}
"""Options of a command that are arguments of `open_s2`."""

EMBEDDING: dict[str, Any] = {
    "frames": _how(
        str, "frames", "Frames that the period is cut into; all: every date is one.", FRAMES, metavar="N",
        parser=_number_of_frames,
    ),
    "period": _how(str, "period", "What is cut into frames, if not --datetime.", FRAMES, metavar="PERIOD"),
    "norm": _how(
        str, "norm", "Normalization, or a .json file of Statistics.to_json().", FRAMES, metavar="NAME"
    ),
    "patch_size": _how(int, "patch_size", "Side of a patch, a multiple of 10.", FRAMES, metavar="METRES"),
    "tile": _how(int, "tile", "Side of a window.", FRAMES, metavar="PIXELS"),
    "overlap": _how(int, "overlap", "What a window shares with the next.", FRAMES, metavar="PIXELS"),
    "output": _how(str, "output", "patch, dense, local or tile.", FRAMES, metavar="NAME"),
    "model": _how(str, "model", "base, small or tiny.", MODELS, metavar="NAME"),
    "weights": _how(
        str, "weights", "A checkpoint, or random. Default: the official ones.", MODELS, metavar="PATH"
    ),
    "device": _how(str, "device", "auto, cpu, cuda, cuda:1 or mps.", MODELS, metavar="NAME"),
    "precision": _how(str, "precision", "float32, bfloat16, float16 or int8.", MODELS, metavar="NAME"),
}  # fmt: skip
"""Options of a command that are arguments of `embed`."""

DEMO: dict[str, Any] = {
    "size": _option(int, run, "size", "Side of the scene in 10 m pixels, even.", None, metavar="N"),
    "model": _option(str, run, "model", "base, small or tiny.", None, metavar="NAME"),
    "weights": _option(
        str, run, "weights", "A checkpoint, or random. Default: official, else random.", None, metavar="PATH"
    ),
    "seed": _option(int, run, "seed", "Of the scene.", None, metavar="N"),
}
"""Options of a command that are arguments of the demo's `run`."""

PROBE: dict[str, Any] = {
    "cube": _option(
        str, probe_of.run, "cube", "A Zarr store. Default: a made-up scene.", None, metavar="STORE"
    ),
    "labels": _option(
        str, probe_of.run, "labels", "Points or polygons on it, of known class.", None, metavar="FILE"
    ),
    "column": _option(str, probe_of.run, "column", "Of the labels: the class.", None, metavar="NAME"),
    "model": _option(str, probe_of.run, "model", "base, small or tiny.", None, metavar="NAME"),
    "weights": _option(
        str,
        probe_of.run,
        "weights",
        "A checkpoint, or random. Default: the official ones.",
        None,
        metavar="PATH",
    ),
    "patch_size": _option(int, probe_of.run, "patch_size", "Side of a patch.", None, metavar="METRES"),
    "tile": _option(int, probe_of.run, "tile", "Side of a window.", None, metavar="PIXELS"),
    "frames": _option(int, probe_of.run, "frames", "Frames that the period is cut into.", None, metavar="N"),
    "cells": _option(int, probe_of.run, "cells", "Cells of each class, at most.", None, metavar="N"),
    "size": _option(
        int, probe_of.run, "size", "Side of the made-up scene in pixels, even.", None, metavar="N"
    ),
    "seed": _option(int, probe_of.run, "seed", "Of the scene and the cells.", None, metavar="N"),
}
"""Options of a command that are arguments of the probe's `run`."""

Codec = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="int8 or float16, for fewer bytes.", rich_help_panel=STORE),
]


def _with_options(kinds: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes ``**options`` those of `kinds`, each None if not given."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = inspect.signature(command, eval_str=True).parameters.values()
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                *(inspect.Parameter(n, keyword, default=None, annotation=k) for n, k in kinds.items()),
                *(p.replace(kind=keyword) for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD),
            ]
        )
        return command

    return give


def explicit_options(options: dict[str, Any], among: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the user gave, as the function takes them."""
    given = {name: options[name] for name in among if options.get(name) is not None}
    if given.get("frames") == "all":
        given["frames"] = None
    if str(given.get("norm", "")).endswith(".json"):
        try:
            text = Path(given["norm"]).read_text()
        except OSError as error:
            raise OptionError(f"norm={given['norm']!r} cannot be read: {error}") from error
        given["norm"] = xr_anysat.Statistics.from_json(text)
    return given


# ---------------------------------------------------------------------- commands


def _version(asked: bool) -> None:
    if asked:
        print(f"xr_anysat {xr_anysat.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code something failed, for a bug report.")
    ] = False,
) -> None:
    context.obj["debug"] = debug
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(epilog=EPILOG)
@_with_options(PLACE | EMBEDDING)
def embed(
    context: typer.Context,
    out: Annotated[
        str, typer.Option(metavar="STORE", help="Where to: area.zarr, s3://….", rich_help_panel=STORE)
    ],
    codec: Codec = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Refuse a store that is there.", rich_help_panel=STORE)
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Of a dask cluster that does the work, tcp://….", rich_help_panel=STORE
        ),
    ] = None,
    **options: Any,
) -> None:
    """Embed an area into a Zarr store; run it again after an interruption, and it goes on."""
    from xr_anysat.store.codecs import check_codec
    from xr_anysat.store.location import parse_location

    target = parse_location(out)
    check_codec(codec, "float32")  # what embed makes
    how = explicit_options(options, EMBEDDING)
    try:
        _fetch_weights(how)
        cube = _open(options)
        with _about_options():
            emb = cube.anysat.embed(**how)
        say(_summary(cube, emb))
        if "norm_statistics" in emb.attrs:
            say(
                "The whole area is read for its statistics first (norm='per_tile_zscore'), if the store has none"
            )
        with _cluster(scheduler) as client, _progress(cube.sizes["y"] * cube.sizes["x"]) as progress:
            if client is not None:
                from xr_anysat.distributed import prepare

                prepare(client, emb)
            xr_anysat.to_zarr(emb, out, codec, resume=not no_resume, progress=progress)
    except Interrupted as stop:
        again = [a for a in context.obj["arguments"] if a != "--no-resume"]
        stop.add_note(f"Go on by the same command:\n  {shlex.join([*context.obj['program'], *again])}")
        raise
    say(f"{format_bytes(_size(target.address))} in {target}. To open it in Python:")
    say(f"  import xr_anysat; emb = xr_anysat.open({target.address!r})")
    print(target.address)


@app.command()
@_with_options(PLACE | EMBEDDING)
def plan(
    codec: Codec = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine for a few seconds, to tell the time.")
    ] = False,
    **options: Any,
) -> None:
    """Say what embed would do: blocks, memory, bytes and operations. Nothing is computed."""
    how = explicit_options(options, EMBEDDING)
    cube = _open(options)
    with _about_options():
        print(xr_anysat.plan(cube, codec=codec, calibrate=calibrate, **how))


@app.command()
@_with_options(DEMO)
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the results.")] = "demo", **options: Any
) -> None:
    """Make a small scene, embed it and draw a picture; needs no data, account or network."""
    run(out, **explicit_options(options, DEMO))


@app.command()
@_with_options({name: EMBEDDING[name] for name in ("model", "weights")})
def verify(
    repo: Annotated[
        str | None,
        typer.Argument(
            metavar="REPO",
            help="A checkout of upstream's repository, or owner/name on GitHub. Default: gastruc/anysat.",
            show_default=False,
        ),
    ] = None,
    **options: Any,
) -> None:
    """Run upstream's own code beside ours, on the same weights. It runs the code of REPO."""
    given = explicit_options(options, EMBEDDING)
    report = xr_anysat.verify(**given) if repo is None else xr_anysat.verify(repo, **given)
    print(report)
    if not report.passed:
        raise typer.Exit(1)


@weights_app.command()
def fetch() -> None:
    """Download the official checkpoint (504 MB), if it is not here, and print its path."""
    print(checkpoint.official_path())


@weights_app.command()
def path() -> None:
    """Print the path of the official checkpoint; fails if it is not on this machine."""
    found = checkpoint.official_path(download=False)
    if found is None:
        raise AnySatError(
            "the official checkpoint is not on this machine: fetch it, xr-anysat weights fetch, or put it at "
            f"{str(checkpoint.manual_path())!r}"
        )
    print(found)


@weights_app.command()
@_with_options({name: EMBEDDING[name] for name in ("model", "weights")})
def info(**options: Any) -> None:
    """Tell which weights embed would use, and where they are."""
    spec, official = _spec(explicit_options(options, EMBEDDING)), checkpoint.OFFICIAL
    source, sha256, file = str(spec.source), spec.sha256, "made from the seed"
    if spec.source.kind == "official":
        source = f"official, {official.filename} of {official.repo}"
        sha256 = sha256 or f"{official.sha256_prefix}…{official.sha256_suffix}"
        file = str(checkpoint.official_path(download=False) or "not on this machine")
    elif spec.source.kind == "file":
        file = source
    if Path(file).is_file():
        file += f", {format_bytes(Path(file).stat().st_size)}"
    download = "forbidden (option offline)" if checkpoint.offline() else "allowed"
    lines = {"model": spec.size, "weights": source, "sha256": sha256, "file": file}
    for name, value in {**lines, "cache": checkpoint.cache_dir(), "download": download}.items():
        print(f"{name:10}{value}")


@bench_app.command()
@_with_options(PROBE)
def probe(
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures there, too.")
    ] = None,
    **options: Any,
) -> None:
    """Compare a linear probe on embeddings with one on plain frames, by blocked cross-validation."""
    report = probe_of.run(**explicit_options(options, PROBE))
    if json is not None:
        Path(json).write_text(report.to_json())
    print(report)


# ---------------------------------------------------------------------- steps


def _spec(how: dict[str, Any]) -> EncoderSpec:
    """The encoder that `embed` would take."""
    return encoder_spec(option("model", how.get("model", MODEL)), option("weights", how.get("weights")))


def _fetch_weights(how: dict[str, Any]) -> None:
    """Have official weights here before hours of work, so that the store records which they are."""
    spec = _spec(how)
    if spec.source.kind == "official" and spec.sha256 is None:
        say("Looking for the official weights (504 MB)")
        with_known_hash(spec)


def _open(options: dict[str, Any]) -> xr.DataArray:
    say("Searching the catalog")
    return open_s2(**explicit_options(options, PLACE))


@contextmanager
def _about_options() -> Iterator[None]:
    """Take what is wrong with a cube as the user's options: it is made by them."""
    try:
        yield
    except CubeError as error:
        raise OptionError(str(error)) from error


def _summary(cube: xr.DataArray, emb: xr.DataArray) -> str:
    height, width = cube.sizes["y"], cube.sizes["x"]
    return (
        f"{height:,} × {width:,} pixels, {cube.sizes['time']} dates in {emb.attrs['n_frames']} frames; "
        f"AnySat {emb.attrs['model']} makes {emb.shape} {emb.dtype}"
    )


@contextmanager
def _cluster(address: str | None) -> Iterator[Client | None]:
    """Connect to a cluster, which then does what is computed, as long as the context lasts."""
    if address is None:
        yield None
        return
    distributed = import_optional("distributed", "--scheduler", "'xr_anysat[distributed]'")
    try:
        client = distributed.Client(address)
    except ValueError as error:
        raise OptionError(
            f"scheduler={address!r}: {error}; wanted the like of tcp://10.0.0.1:8786"
        ) from error
    except OSError as error:
        raise AnySatError(
            f"the scheduler {address} does not answer: {error}. Start one by dask scheduler, and workers by "
            f"dask worker {address}"
        ) from error
    with client:
        yield client


def _size(address: str) -> int:
    """Bytes of a store."""
    from fsspec.core import url_to_fs

    files, place = url_to_fs(address)
    size: int = files.du(place)
    return size


# ---------------------------------------------------------------------- what is said


def say(line: str) -> None:
    """Print to standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def progress_line(done: int, total: int, there: int, seconds: float, pixels: int) -> str:
    """How far it is: blocks, pixels a second, time left.

    Parameters
    ----------
    done, total, there : int
        Blocks that are finished, that there are, and that an earlier run had finished.
    seconds : float
        Since the first block was begun.
    pixels : int
        Of 10 m, of the whole area.

    Examples
    --------
    >>> progress_line(30, 120, 10, 100.0, 1_000_000)
    '30 of 120 blocks, 1,667 pixels/s, 0:07:30 left'
    >>> progress_line(120, 120, 10, 550.0, 1_000_000)
    '120 of 120 blocks, 1,667 pixels/s, in 0:09:10'
    """
    made = done - there
    said = [f"{done:,} of {total:,} blocks"]
    if made and seconds:
        said.append(f"{pixels * made / total / seconds:,.0f} pixels/s")
        left = timedelta(seconds=round((total - done) * seconds / made))
        said.append(f"{left} left" if done < total else f"in {timedelta(seconds=round(seconds))}")
    return ", ".join(said)


@contextmanager
def _progress(pixels: int) -> Iterator[Callable[[int, int], None]]:
    """What to hand to ``to_zarr(progress=...)``: a bar on a terminal, else a line now and then."""
    there: int | None = None
    began = last = 0.0
    live = sys.stderr.isatty()
    columns = (SpinnerColumn(), BarColumn(20), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) if live else nullcontext() as bar:
        task = bar.add_task("Starting", total=None) if bar else None

        def show(done: int, total: int) -> None:
            nonlocal there, began, last
            now = time.monotonic()
            if there is None:
                there, began, last = done, now, now
                if done:
                    say(f"{done:,} of {total:,} blocks are there from an earlier run")
            line = progress_line(done, total, there, now - began, pixels)
            if bar is not None and task is not None:
                bar.update(task, completed=done, total=total, description=line)
            elif now - last >= QUIET_SECONDS or done == total > there:
                last = now
                say(line)

        yield show


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Say a warning of ours in a line; whose code it comes from means nothing to a user of a shell."""
    if issubclass(category, AnySatWarning):
        say(f"warning: {message}")
    else:
        say(warnings.formatwarning(message, category, *where[:2]).rstrip())


def _say_with_notes(line: str, error: BaseException) -> None:
    say(line)
    for note in getattr(error, "__notes__", ()):
        say(note)


# ---------------------------------------------------------------------- the process


class Interrupted(BaseException):
    """SIGINT or SIGTERM. No KeyboardInterrupt, which typer takes for itself."""

    def __init__(self, number: int) -> None:
        self.number = number


def _interrupt(number: int, _frame: Any) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _leave)
    raise Interrupted(number)


def _leave(number: int, _frame: Any) -> NoReturn:
    """A second signal: what is still being told to a cluster is not waited for."""
    # not by print: the first one may have interrupted one
    os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"\n")  # the cursor, which a progress bar hides
    os.write(2, b"Left at once; what is finished stays\n")
    os._exit(128 + number)


@contextmanager
def _signals() -> Iterator[None]:
    """Raise `Interrupted` on SIGINT and SIGTERM as long as the context lasts."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other one may ask for signals
        for each in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(each) != signal.SIG_IGN:  # as a shell has it for what runs in the background
                before[each] = signal.signal(each, _interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def split_coordinates(arguments: Sequence[str]) -> list[str]:
    """``--bbox=1,2,3,4`` and ``--bbox 1,2,3,4`` as ``--bbox 1 2 3 4``, and ``--point`` likewise.

    Examples
    --------
    >>> split_coordinates(["embed", "--bbox=-3.8,40.3,-3.6,40.5", "--point", "-3.7,40.4", "--norm", "raw"])
    ['embed', '--bbox', '-3.8', '40.3', '-3.6', '40.5', '--point', '-3.7', '40.4', '--norm', 'raw']
    """
    apart: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--bbox", "--point") and equals:
            apart += [name, *value.split(",")]
        elif apart and apart[-1] in ("--bbox", "--point"):
            apart += argument.split(",")
        else:
            apart.append(argument)
    return apart


def main(arguments: Sequence[str]) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str
        Without the program's name.

    Returns
    -------
    int
        Exit status: 0 done, 1 failed, 2 what is asked for is impossible. After SIGINT and SIGTERM the
        process ends here, with 128 and the signal's number.
    """
    module = Path(sys.argv[0]).name == "__main__.py"
    program = ["python", "-m", "xr_anysat"] if module else ["xr-anysat"]
    shared: dict[str, Any] = {"arguments": list(arguments), "program": program, "debug": False}
    with warnings.catch_warnings(), _signals():
        warnings.showwarning = _show_warning
        try:
            app(args=split_coordinates(arguments), prog_name=shlex.join(program), obj=shared)
        except SystemExit as done:  # typer's way to end
            return done.code if isinstance(done.code, int) else 0
        except Interrupted as stop:
            _say_with_notes(f"\nInterrupted by {signal.Signals(stop.number).name}", stop)
            sys.stdout.flush()
            # Blocks in flight may take minutes more; threads cannot be stopped, and Python waits for them. What
            # they were about to write is missing as a whole, so nothing is lost by leaving them.
            os._exit(128 + stop.number)
        except Exception as error:
            if shared["debug"]:
                traceback.print_exception(error)
            else:
                kind = "" if isinstance(error, AnySatError) else f"{type(error).__name__}: "
                _say_with_notes(f"error: {kind}{error}", error)
            return 2 if isinstance(error, OptionError) else 1
    return 0
