"""The command line: `embed` and `plan` for an area of a catalog, `places` for a table, `check`, `demo`, `bench`, ….

It makes no decisions. Only options that the user passes reach the functions, so configuration, environment and defaults
apply as in Python. Paths and results go to standard output, everything else to standard error.
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
from xr_anysat.demo import probe as probe_of
from xr_anysat.demo.run import run
from xr_anysat.embedding.options import EmbedOptions, checked_encoder
from xr_anysat.errors import AnySatError, AnySatWarning, CubeError, OptionError
from xr_anysat.model import checkpoint
from xr_anysat.model.weights import EncoderSpec, resolve_device, with_known_hash
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.text import format_bytes
from xr_anysat.stac.search import open_s2
from xr_anysat.store.reading import MISSING

if TYPE_CHECKING:
    from distributed import Client

QUIET_SECONDS = 60.0
"""Time between two lines of progress, where there is no terminal for a bar."""

# One line per paragraph: typer keeps line breaks
EPILOG = (
    "Options that are not given come from the environment (XR_ANYSAT_MODEL, …), otherwise their defaults apply."
    "\n\nExit status: 0 done; 1 failed; 2 invalid command line; 130 interrupted (Ctrl-C); 143 terminated. After 1, 130 "
    "and 143 the blocks that embed has finished are kept: repeat the command to resume."
)

app = typer.Typer(
    help="AnySat embeddings of any Sentinel-2 area.",
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,  # `main` reports failures
)
weights_app = typer.Typer(help="Download or find the weights of the model.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")
bench_app = typer.Typer(help="Measure the quality of embeddings.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


# ---------------------------------------------------------------------- options

STORE = "Store"  # a heading of --help


def _number_of_frames(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdecimal() or not int(text):
        raise typer.BadParameter(f"{text!r}: expected a positive whole number, or all for every date")
    return int(text)


def _options(
    function: Callable[..., Any], panel: str | None, kinds: dict[str, tuple[Any, str, str]]
) -> dict[str, Any]:
    """Options of a command that are arguments of `function`, with its defaults in their help.

    `kinds` has for each name its type or parser, its metavar and its help. The unit of an argument is not part of the
    option: ``buffer_m`` is ``--buffer``.
    """
    parameters = inspect.signature(function).parameters
    options = {}
    for name, (kind, metavar, text) in kinds.items():
        default = parameters[name].default
        parser = kind if inspect.isfunction(kind) else None
        option = typer.Option(
            f"--{name.removesuffix('_m').replace('_', '-')}",
            help=text if default is None else f"{text} Default: {default}.",
            metavar=metavar,
            parser=parser,
            rich_help_panel=panel,
            show_default=False,
        )
        options[name] = Annotated[(str if parser else kind) | None, option]
    return options


MODEL_NAMES, CHECKPOINT = "base, small or tiny.", "A checkpoint, or random. Default: the official weights."

PLACE = _options(open_s2, "Area and period", {
    "bbox": (tuple[float, float, float, float], "W S E N", "Area in degrees, also as W,S,E,N."),
    "point": (tuple[float, float], "LON LAT", "Center of a square area, in degrees, also as LON,LAT."),
    "buffer_m": (float, "M", "Distance from --point to the edges, in meters."),
    "datetime": (str, "PERIOD", "2022, 2022-06 or 2022-04-01/2022-10-01."),
    "catalog": (str, "NAME", "earth-search, planetary-computer, cdse or the URL of a STAC API."),
    "max_cloud": (float, "PERCENT", "Maximum cloud cover of a scene."),
    "chunks": (int, "PIXELS", "Side of the chunks that are read."),
    "crs": (str, "EPSG:CODE", "A projected CRS in meters; utm: the zone of the area's center."),
})  # fmt: skip
"""Options of a command that are arguments of `open_s2`."""

EMBEDDING = _options(xr_anysat.embed, "Frames and windows", {
    "frames": (_number_of_frames, "N", "Number of frames of the period; all: every date is a frame."),
    "period": (str, "PERIOD", "Period of the frames. Default: --datetime."),
    "norm": (str, "NAME", "Normalization, or a .json file of Statistics.to_json()."),
    "patch_size": (int, "METERS", "Side of a patch, a multiple of 10."),
    "tile": (int, "PIXELS", "Side of a window."),
    "overlap": (int, "PIXELS", "Overlap of neighboring windows."),
    "output": (str, "NAME", "patch, dense, local or tile."),
}) | _options(xr_anysat.embed, "Model", {
    "model": (str, "NAME", MODEL_NAMES),
    "weights": (str, "PATH", CHECKPOINT),
    "device": (str, "NAME", "auto, cpu, cuda, cuda:1 or mps."),
    "precision": (str, "NAME", "float32, bfloat16, float16 or int8."),
})  # fmt: skip
"""Options of a command that are arguments of `embed`."""

OF_PLACES = {name: PLACE[name] for name in ("catalog", "max_cloud", "crs")} | {
    name: option for name, option in EMBEDDING.items() if name != "period"
}
"""Options of a command that are arguments of `embed_places`."""

DEMO = _options(run, None, {
    "size": (int, "N", "Side of the scene in 10 m pixels, even."),
    "model": (str, "NAME", MODEL_NAMES),
    "weights": (str, "PATH", "A checkpoint, or random. Default: official weights if available, otherwise random."),
    "seed": (int, "N", "Seed of the scene."),
})  # fmt: skip
"""Options of a command that are arguments of the demo's `run`."""

PROBE = _options(probe_of.run, None, {
    "cube": (str, "STORE", "A Zarr store. Default: a synthetic scene."),
    "labels": (str, "FILE", "Points or polygons of known class, in the area of the cube."),
    "column": (str, "NAME", "Column of the labels that has the class."),
    "model": (str, "NAME", MODEL_NAMES),
    "weights": (str, "PATH", CHECKPOINT),
    "patch_size": (int, "METERS", "Side of a patch, a multiple of 10."),
    "tile": (int, "PIXELS", "Side of a window."),
    "frames": (int, "N", "Number of frames of the period."),
    "cells": (int, "N", "Maximum number of cells per class."),
    "size": (int, "N", "Side of the synthetic scene in pixels, even."),
    "seed": (int, "N", "Seed of the scene and of the choice of cells."),
})  # fmt: skip
"""Options of a command that are arguments of the probe's `run`."""

Codec = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="int8 or float16, to store fewer bytes.", rich_help_panel=STORE),
]


def _with_options(kinds: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of `kinds` to a command that takes ``**options``; each is None if it is not given."""

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


def explicit_options(options: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """The options that the user passed, as arguments of the function."""
    given = {name: options[name] for name in kinds if options.get(name) is not None}
    if given.get("frames") == "all":
        given["frames"] = None
    if str(given.get("norm", "")).endswith(".json"):
        try:
            text = Path(given["norm"]).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"norm={given['norm']!r} cannot be read: {error}") from error
        given["norm"] = xr_anysat.Statistics.from_json(text)
    return given


# ---------------------------------------------------------------------- commands


def _print_version(requested: bool) -> None:
    if requested:
        print(f"xr_anysat {xr_anysat.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure, for a bug report.")
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
        str,
        typer.Option(
            metavar="STORE", help="Path or URL of the result: area.zarr, s3://….", rich_help_panel=STORE
        ),
    ],
    codec: Codec = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Refuse an existing store.", rich_help_panel=STORE)
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A dask cluster to compute on, tcp://….", rich_help_panel=STORE),
    ] = None,
    **options: Any,
) -> None:
    """Embed an area into a Zarr store. After an interruption, repeat the command to resume."""
    from xr_anysat.store.codecs import check_codec
    from xr_anysat.store.location import parse_location

    target = parse_location(out)
    check_codec(codec, "float32")  # the dtype of an embedding
    how = explicit_options(options, EMBEDDING)
    spec = checked_encoder(EmbedOptions(**how))
    if scheduler is None:
        resolve_device(spec.device)  # before anything is written; with a cluster, workers have the device
    try:
        _fetch_weights(spec)
        cube = _open(options)
        with _about_options():
            emb = cube.anysat.embed(**how)
        say(_summary(cube, emb))
        if "norm_statistics" in emb.attrs:
            say(
                "norm='per_tile_zscore': the whole area is read first for its statistics, unless the store has them"
            )
        with _cluster(scheduler) as client, _progress(cube.sizes["y"] * cube.sizes["x"]) as progress:
            if client is not None:
                from xr_anysat.distributed import prepare

                prepare(client, emb)
            xr_anysat.to_zarr(emb, out, codec, resume=not no_resume, progress=progress)
    except Interrupted as stop:
        again = [a for a in context.obj["arguments"] if a != "--no-resume"]
        stop.add_note(f"To resume, repeat the command:\n  {shlex.join([*context.obj['program'], *again])}")
        raise
    say(f"{format_bytes(_size(target.address))} in {target}. To open it in Python:")
    say(f"  import xr_anysat; emb = xr_anysat.open({target.address!r})")
    print(target.address)


@app.command()
@_with_options(PLACE | EMBEDDING)
def plan(
    codec: Codec = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure this machine for a few seconds, to estimate the time."),
    ] = False,
    **options: Any,
) -> None:
    """Report what embed would do: blocks, memory, bytes and operations. Nothing is computed."""
    how = explicit_options(options, EMBEDDING)
    checked_encoder(EmbedOptions(**how))
    cube = _open(options)
    with _about_options():
        print(xr_anysat.plan(cube, codec=codec, calibrate=calibrate, **how))


@app.command(epilog=EPILOG)
@_with_options(OF_PLACES)
def places(
    context: typer.Context,
    table: Annotated[
        str, typer.Argument(metavar="FILE", help="Points or polygons: .gpkg, .geojson, .parquet, ….")
    ],
    datetime: Annotated[
        str,
        typer.Option(
            metavar="PERIOD", help="One period for all, or a column with a year, period or date per row."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Path or URL of the result: fields-anysat.parquet.", rich_help_panel=STORE
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="DAYS", help="Days around the dates of a column.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar="NAME", help="int8, to store fewer bytes.", rich_help_panel=STORE)
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed rows again, too.", rich_help_panel=STORE)
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A dask cluster to compute on, tcp://….", rich_help_panel=STORE),
    ] = None,
    **options: Any,
) -> None:
    """Embed a table of points and polygons. Without --out, report what it would take."""
    rows, how = _read_table(table), explicit_options(options, OF_PLACES)
    if out is None:
        say("Searching the catalog")
        print(xr_anysat.plan_places(rows, datetime, window=window, codec=codec, **how))
        return
    spec = checked_encoder(EmbedOptions(**{k: v for k, v in how.items() if k in EMBEDDING}))
    if scheduler is None:
        resolve_device(spec.device)
    try:
        _fetch_weights(spec)
        with _cluster(scheduler), _progress(len(rows), "groups", "places") as progress:
            xr_anysat.embed_places(
                rows, datetime, out=out, window=window, codec=codec, progress=progress,
                retry="failed" if retry_failed else None, **how,
            )  # fmt: skip
    except Interrupted as stop:
        stop.add_note(
            f"To resume, repeat the command:\n  {shlex.join([*context.obj['program'], *context.obj['arguments']])}"
        )
        raise
    status = xr_anysat.open_table(out)["status"].value_counts()
    say(f"{', '.join(f'{count:,} {name}' for name, count in status.items())}. To open the table in Python:")
    say(f"  import xr_anysat; table = xr_anysat.open_table({out!r})")
    print(out)


@app.command()
def check(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Path or URL of a store: area.zarr, s3://….")],
    remove_damaged: Annotated[
        bool,
        typer.Option(
            "--remove-damaged", help="Delete damaged blocks. Repeat the embed command to compute them again."
        ),
    ] = False,
) -> None:
    """Read every block of a store, and report damaged and missing blocks. Fails if there are any."""
    with warnings.catch_warnings():  # missing blocks are reported below
        warnings.filterwarnings("ignore", r".* are not finished", AnySatWarning)
        emb = xr_anysat.open(store)
    problems = emb.anysat.check(remove_damaged=remove_damaged)
    if problems.empty:
        print(f"{store}: no problems found")
        return
    print(problems.to_string(index=False))
    if not remove_damaged and (problems["problem"] != MISSING).any():
        say(
            "Remove the damaged blocks with --remove-damaged, and repeat the embed command to compute them again"
        )
    else:
        say("Repeat the embed command to compute these blocks")
    raise typer.Exit(1)


@app.command()
@_with_options(DEMO)
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the results.")] = "demo", **options: Any
) -> None:
    """Make a small synthetic scene, embed it and draw a picture. Needs no data, account or network."""
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
    """Compare with upstream's own code, on the same weights. This runs the code of REPO."""
    given = explicit_options(options, EMBEDDING)
    report = xr_anysat.verify(**given) if repo is None else xr_anysat.verify(repo, **given)
    print(report)
    if not report.passed:
        raise typer.Exit(1)


@weights_app.command()
def fetch() -> None:
    """Download the official checkpoint (504 MB) if it is not on this machine, and print its path."""
    print(checkpoint.official_path())


@weights_app.command()
def path() -> None:
    """Print the path of the official checkpoint, or fail if it is not on this machine."""
    found = checkpoint.official_path(download=False)
    if found is None:
        raise AnySatError(
            "the official checkpoint is not on this machine: download it with xr-anysat weights fetch, or copy it to "
            f"{str(checkpoint.manual_path())!r}"
        )
    print(found)


@weights_app.command()
@_with_options({name: EMBEDDING[name] for name in ("model", "weights")})
def info(**options: Any) -> None:
    """Show which weights embed would use, and where they are."""
    how, official = explicit_options(options, EMBEDDING), checkpoint.OFFICIAL
    spec = checked_encoder(EmbedOptions(**how))
    source, sha256, file = str(spec.source), spec.sha256, "none, made from the seed"
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
        str | None, typer.Option("--json", metavar="FILE", help="Write the scores to this file, too.")
    ] = None,
    **options: Any,
) -> None:
    """Compare a linear probe on embeddings with one on plain frames, by blocked cross-validation."""
    if json is not None:
        _check_writable(Path(json))
    report = probe_of.run(**explicit_options(options, PROBE))
    if json is not None:
        Path(json).write_text(report.to_json())
    print(report)


# ---------------------------------------------------------------------- steps


def _fetch_weights(spec: EncoderSpec) -> None:
    """Download official weights before hours of work, so that the store records their hash."""
    if spec.source.kind == "official" and spec.sha256 is None:
        say("Looking for the official weights (504 MB)")
        with_known_hash(spec)


def _check_writable(file: Path) -> None:
    """Refuse a file that cannot be written, before the work of which it gets the result."""
    existed = file.exists()
    try:
        file.open("a").close()
    except OSError as error:
        raise OptionError(
            f"{str(file)!r} cannot be written: {error.strerror}. Expected a file in an existing, "
            "writable folder"
        ) from error
    if not existed:
        file.unlink()


def _read_table(file: str) -> Any:
    """Read a table of places from a file."""
    geopandas = import_optional("geopandas", "places", "'xr_anysat[places]'")
    try:
        return (geopandas.read_parquet if file.endswith("parquet") else geopandas.read_file)(file)
    except Exception as error:  # of any library that reads files
        raise OptionError(f"{file!r} cannot be read as a table of places: {error}") from error


def _open(options: dict[str, Any]) -> xr.DataArray:
    say("Searching the catalog")
    return open_s2(**explicit_options(options, PLACE))


@contextmanager
def _about_options() -> Iterator[None]:
    """Report an invalid cube as invalid options, because the options select the cube."""
    try:
        yield
    except CubeError as error:
        raise OptionError(str(error)) from error


def _summary(cube: xr.DataArray, emb: xr.DataArray) -> str:
    height, width = cube.sizes["y"], cube.sizes["x"]
    return (
        f"{height:,} × {width:,} pixels, {cube.sizes['time']} dates in {emb.attrs['n_frames']} frames; "
        f"AnySat {emb.attrs['model']} gives {emb.shape} {emb.dtype}"
    )


@contextmanager
def _cluster(address: str | None) -> Iterator[Client | None]:
    """Connect to a cluster, which computes everything while the context is open."""
    if address is None:
        yield None
        return
    distributed = import_optional("distributed", "--scheduler", "'xr_anysat[distributed]'")
    try:
        client = distributed.Client(address)
    except ValueError as error:
        raise OptionError(
            f"scheduler={address!r}: {error}; expected an address such as tcp://10.0.0.1:8786"
        ) from error
    except OSError as error:
        raise AnySatError(
            f"the scheduler {address} does not answer: {error}. Start a scheduler with dask scheduler, and "
            f"workers with dask worker {address}"
        ) from error
    with client:
        yield client


def _size(address: str) -> int:
    """Bytes of a store."""
    from fsspec.core import url_to_fs

    files, place = url_to_fs(address)
    size: int = files.du(place)
    return size


# ---------------------------------------------------------------------- messages


def say(line: str) -> None:
    """Print to standard error without buffering."""
    print(line, file=sys.stderr, flush=True)


def progress_line(
    done: int,
    total: int,
    earlier: int,
    seconds: float,
    amount: int,
    parts: str = "blocks",
    unit: str = "pixels",
) -> str:
    """Describe the progress: blocks, pixels per second, time left.

    Parameters
    ----------
    done, total, earlier : int
        Number of finished blocks, of all blocks, and of blocks that an earlier run finished.
    seconds : float
        Time since the first block was started.
    amount : int
        Number of 10 m pixels of the whole area, or of other units.
    parts, unit : str
        What is counted.

    Examples
    --------
    >>> progress_line(30, 120, 10, 100.0, 1_000_000)
    '30 of 120 blocks, 1,667 pixels/s, 0:07:30 left'
    >>> progress_line(120, 120, 10, 550.0, 1_000_000)
    '120 of 120 blocks, 1,667 pixels/s, in 0:09:10'
    """
    computed = done - earlier
    words = [f"{done:,} of {total:,} {parts}"]
    if computed and seconds:
        words.append(f"{amount * computed / total / seconds:,.0f} {unit}/s")
        left = timedelta(seconds=round((total - done) * seconds / computed))
        words.append(f"{left} left" if done < total else f"in {timedelta(seconds=round(seconds))}")
    return ", ".join(words)


@contextmanager
def _progress(
    amount: int, parts: str = "blocks", unit: str = "pixels"
) -> Iterator[Callable[[int, int], None]]:
    """Value of ``to_zarr(progress=...)``: draws a bar on a terminal, otherwise prints a line now and then."""
    earlier: int | None = None
    started = last = 0.0
    live = sys.stderr.isatty()
    columns = (SpinnerColumn(), BarColumn(20), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) if live else nullcontext() as bar:
        task = bar.add_task("Starting", total=None) if bar else None

        def show(done: int, total: int) -> None:
            nonlocal earlier, started, last
            now = time.monotonic()
            if earlier is None:
                earlier, started, last = done, now, now
                if done:
                    say(f"{done:,} of {total:,} {parts} are finished from an earlier run")
            line = progress_line(done, total, earlier, now - started, amount, parts, unit)
            if bar is not None and task is not None:
                bar.update(task, completed=done, total=total, description=line)
            elif now - last >= QUIET_SECONDS or done == total > earlier:
                last = now
                say(line)

        yield show


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print a warning of this library as one line, without the line of code, which means nothing in a shell."""
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
    """SIGINT or SIGTERM. It is not a KeyboardInterrupt, which typer would catch."""

    def __init__(self, number: int) -> None:
        self.number = number


def _interrupt(number: int, _frame: Any) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _leave)
    raise Interrupted(number)


def _leave(number: int, _frame: Any) -> NoReturn:
    """End the process at a second signal, without waiting for messages to a cluster."""
    # Not with print: the first signal may have interrupted one
    os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"\n")  # show the cursor, which a progress bar hides
    os.write(2, b"Stopped immediately; finished blocks are kept.\n")
    os._exit(128 + number)


@contextmanager
def _signals() -> Iterator[None]:
    """Raise `Interrupted` on SIGINT and SIGTERM while the context is open."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
        for each in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(each) != signal.SIG_IGN:  # which a shell sets for processes in the background
                before[each] = signal.signal(each, _interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def split_coordinates(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``--bbox=1,2,3,4`` and ``--bbox 1,2,3,4`` as ``--bbox 1 2 3 4``, and ``--point`` likewise.

    Examples
    --------
    >>> split_coordinates(["embed", "--bbox=-3.8,40.3,-3.6,40.5", "--point", "-3.7,40.4", "--norm", "raw"])
    ['embed', '--bbox', '-3.8', '40.3', '-3.6', '40.5', '--point', '-3.7', '40.4', '--norm', 'raw']
    """
    split: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--bbox", "--point") and equals:
            split += [name, *value.split(",")]
        elif split and split[-1] in ("--bbox", "--point"):
            split += argument.split(",")
        else:
            split.append(argument)
    return split


def main(arguments: Sequence[str]) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str
        Arguments without the name of the program.

    Returns
    -------
    int
        Exit status: 0 done, 1 failed, 2 invalid command line. SIGINT and SIGTERM end the process, with 128 plus the
        number of the signal.
    """
    module = Path(sys.argv[0]).name == "__main__.py"
    program = ["python", "-m", "xr_anysat"] if module else ["xr-anysat"]
    shared: dict[str, Any] = {"arguments": list(arguments), "program": program, "debug": False}
    with warnings.catch_warnings(), _signals():
        warnings.showwarning = _show_warning
        try:
            app(args=split_coordinates(arguments), prog_name=shlex.join(program), obj=shared)
        except SystemExit as done:  # raised by typer
            return done.code if isinstance(done.code, int) else 0
        except Interrupted as stop:
            _say_with_notes(f"\nInterrupted by {signal.Signals(stop.number).name}", stop)
            sys.stdout.flush()
            # Unfinished blocks may take minutes more: threads cannot be stopped, and Python would wait for them.
            # Each block is written as a whole, so leaving them loses no finished work.
            os._exit(128 + stop.number)
        except Exception as error:
            if shared["debug"]:
                traceback.print_exception(error)
            else:
                kind = "" if isinstance(error, AnySatError) else f"{type(error).__name__}: "
                _say_with_notes(f"error: {kind}{error}", error)
            return 2 if isinstance(error, OptionError) else 1
    return 0
