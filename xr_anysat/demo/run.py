"""The whole pipeline on synthetic data: catalog, search, lazy cube, frames, embedding, picture.

Run it with ``python -m xr_anysat demo``. It needs no account, data or network: the catalog is a temporary STAC API on
this machine.
"""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.config import MODEL, option
from xr_anysat.embedding.options import EmbedOptions, checked_encoder
from xr_anysat.errors import AnySatError, OptionError, WriteError
from xr_anysat.model import checkpoint
from xr_anysat.model.weights import encoder_spec, resolve_device
from xr_anysat.shared.checks import require_packages

MEANINGLESS = "RANDOM WEIGHTS: SUCH EMBEDDINGS CARRY NO LEARNED MEANING"

# One vector per 10 m pixel. The token of a patch depends on the place of the patch in its window, so a map of patch
# tokens shows the windows; the token of a pixel follows the ground.
OUTPUT = "local"

PATCH_SIZE = 20

# Fixed constants: the result does not depend on the place and size of the scene
NORM = "pastis"

YEAR = 2022

PROBE_SECONDS = 2.0

DOWNLOAD_SECONDS = 60.0

START_SECONDS = 30.0

# Percent; scenes with more clouds show nothing and are not read
MAX_CLOUD = 90


@dataclass(frozen=True)
class Weights:
    """The weights that the demo uses.

    Attributes
    ----------
    argument : str, tuple or None
        Value of ``embed(weights=...)``.
    label : str
        Their description.
    learned : bool
        False for random weights.
    """

    argument: str | tuple[str, int] | None
    label: str
    learned: bool


def check_dependencies() -> None:
    """Raise an AnySatError with the pip command if the demo extra is not installed."""
    modules = ("matplotlib", "sklearn", "rasterio", "rioxarray", "odc.stac", "pystac_client", "scipy")
    rustac = () if find_rustac() else ("rustac",)
    require_packages("the demo", *modules, install="'xr_anysat[demo]'", missing=rustac)


def run(
    out: str | Path, *, size: int = 240, model: str = MODEL, weights: str | None = None, seed: int = 0
) -> None:
    """Make a scene, serve it, open it by search and embed it; write ``embedding.zarr`` and ``embedding.png``.

    A STAC Item of the embedding is written to ``embedding.stac.json``.

    Parameters
    ----------
    out : str or Path
        Folder of all results; results of an earlier demo are overwritten.
    size : int
        Side of the scene in 10 m pixels, even.
    model : str
        ``base``, ``small`` or ``tiny``.
    weights : str or None
        A checkpoint, or ``"random"``. None uses the official weights if they are on this machine or can be downloaded
        within a minute; otherwise random weights, with a warning in capital letters.
    seed : int
        Seed of the scene.

    Raises
    ------
    AnySatError
        If dependencies of the demo are missing, or an argument is invalid.
    DeviceError
        If the configured device is not on this machine.
    WriteError
        If `out` cannot be written.
    """
    check_dependencies()
    from xr_anysat.demo.scene import make_scene
    from xr_anysat.stac.search import open_s2

    if not str(out):
        raise OptionError(f"{out=}: expected a folder")
    out, model, weights = Path(out), option("model", model), option("weights", weights)
    options = EmbedOptions(model=model, weights="random" if weights is None else weights)
    resolve_device(checked_encoder(options).device)
    store = out / "embedding.zarr"
    if store.exists() and not (out / "scene" / "items.json").exists():
        raise OptionError(
            f"{str(store)!r} is not of a demo, which would overwrite it: expected a new folder, pass another out="
        )
    started = time.perf_counter()

    say(f"1/4  Writing a Sentinel-2 year of {size} × {size} pixels of 10 m")
    try:
        scene = make_scene(out / "scene", size=(size, size), year=YEAR, seed=seed)
    except OSError as error:
        raise WriteError(
            f"out={str(out)!r} cannot be written: {error}. Expected a folder, new or writable; pass another out="
        ) from error
    found = find_weights(weights, model)

    say("2/4  Searching a STAC catalog on this machine, composing frames: the median of clear pixels")
    with serve_items(scene.items) as url, progress():
        cube = open_s2(
            point=scene.center,
            buffer_m=5 * size,
            datetime=str(YEAR),
            catalog=url,
            max_cloud=MAX_CLOUD,
            chunks=128,
        )
        # In memory, but still chunked, so that the embedding is lazy
        frames = cube.anysat.frames(8).persist()

    say(f"3/4  Embedding with AnySat {model}, {found.label}")
    if not found.learned:
        say(MEANINGLESS)
    embedding = frames.anysat.embed(
        frames=None, norm=NORM, patch_size=PATCH_SIZE, output=OUTPUT, model=model, weights=found.argument
    )
    if not found.learned:
        embedding.attrs["warning"] = MEANINGLESS
    if store.exists():  # a store with other options would be refused
        shutil.rmtree(store)
    began = time.perf_counter()
    with progress():
        embedding = embedding.anysat.to_zarr(store)
    seconds = time.perf_counter() - began
    embedding = embedding.load()

    say("4/4  Drawing")
    picture = out / "embedding.png"
    title = f"AnySat {model}, {found.label}, output {OUTPUT!r}, patches of {PATCH_SIZE} m"
    warning = "" if found.learned else MEANINGLESS
    draw(picture, frames, embedding, read_landcover(scene.landcover), title, warning)

    shape = ", ".join(f"{dim} {n}" for dim, n in embedding.sizes.items())
    say("")
    say(f"Embedding    {shape}; {embedding.dtype}; {embedding.rio.crs}")
    say(f"Time         {time.perf_counter() - started:.1f} s, of which {seconds:.1f} s to embed")
    say(f"Speed        {size * size / seconds:,.0f} pixels/s")
    if peak := peak_memory():
        say(f"Memory peak  {peak / 2**30:.2f} GiB")
    say(f"Files        {scene.folder}, {store}, {picture}")
    if not found.learned:
        say(MEANINGLESS)


def say(line: str) -> None:
    """Print without buffering, also into a pipe."""
    print(line, flush=True)


def progress() -> AbstractContextManager[Any]:
    """Show a progress bar, with fewer updates in a pipe or a log."""
    from dask.diagnostics.progress import ProgressBar

    bar: AbstractContextManager[Any] = ProgressBar(dt=0.1 if sys.stdout.isatty() else 1)
    return bar


def peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- catalog ------------------------------------------------------------------------------------


def find_rustac() -> str | None:
    """Path of the ``rustac`` program: the one beside this Python, otherwise the one on the search path."""
    return shutil.which("rustac", path=str(Path(sys.executable).parent)) or shutil.which("rustac")


@contextmanager
def serve_items(items: Path) -> Iterator[str]:
    """Serve STAC items with ``rustac serve``, on this machine only, while the context is open.

    Parameters
    ----------
    items : Path
        A GeoJSON FeatureCollection of items; their hrefs are URLs (``file://…``).

    Yields
    ------
    str
        The URL of the STAC API.

    Raises
    ------
    AnySatError
        If ``rustac`` is not installed or does not start.
    """
    program = find_rustac()
    if program is None:
        raise AnySatError("a STAC API on this machine needs rustac: pip install 'xr_anysat[demo]'")
    with tempfile.TemporaryFile() as log:
        for _ in range(3):  # another program may take the free port first
            port = free_port()
            address = f"127.0.0.1:{port}"
            server = subprocess.Popen(
                [program, "serve", "--create-collections", "--addr", address, str(items)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
            try:
                if answers(server, port):
                    yield f"http://{address}"
                    return
            finally:
                server.terminate()
                server.wait(10)
        log.seek(0)
        error = log.read().decode(errors="replace").strip()
    raise AnySatError(
        f"rustac serve does not answer within {START_SECONDS:.0f} s: {error[-300:] or 'it printed no error'}"
    )


def free_port() -> int:
    """Find an unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server answers; False if it ends, or takes longer than `START_SECONDS`."""
    limit = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < limit:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except OSError:
            time.sleep(0.02)
        finally:
            connection.close()
    return False


# --- weights ------------------------------------------------------------------------------------


def find_weights(requested: str | None, model: str) -> Weights:
    """Use the requested weights, otherwise the official ones, otherwise random ones (only the demo does this)."""
    if requested is not None:
        source = encoder_spec(model, requested).source
        if source.kind == "random":
            return Weights(requested, "random weights", learned=False)
        name = "official weights" if source.kind == "official" else f"weights of {source.path.name}"
        return Weights(requested, name, learned=True)
    if model != checkpoint.OFFICIAL.model:
        say(f"There are no official weights for model {model!r}.")
    elif official_weights():
        return Weights("official", "official weights", learned=True)
    return Weights("random", "random weights", learned=False)


def official_weights() -> bool:
    """Whether the official weights are on this machine; if not, try to download them for a limited time."""
    if checkpoint.official_path(download=False) is not None:
        return True
    if checkpoint.offline() or not reachable():
        say("The official weights are not on this machine, and the Hugging Face Hub cannot be reached.")
        return False
    say(f"Downloading the official weights (504 MB), for at most {DOWNLOAD_SECONDS:.0f} s")
    # In a separate process, which can always be ended
    code = "from xr_anysat.model import checkpoint; checkpoint.official_path()"
    try:
        subprocess.run([sys.executable, "-c", code], timeout=DOWNLOAD_SECONDS, check=True)
    except subprocess.SubprocessError:
        say("The download did not finish. Without a time limit: python -m xr_anysat weights fetch")
        return False
    return True


def reachable() -> bool:
    """Whether the hub of the official weights answers within `PROBE_SECONDS`."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(checkpoint.OFFICIAL.repo, checkpoint.OFFICIAL.filename)
    answers: list[Any] = []
    # In a thread that can be left behind: the timeout does not cover the look-up of the host name
    thread = threading.Thread(target=_ask_hub, args=(url, answers), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return bool(answers)


def _ask_hub(url: str, answers: list[Any]) -> None:
    """Append what the hub answers; nothing after any error."""
    from huggingface_hub import get_hf_file_metadata

    with suppress(Exception):
        answers.append(get_hf_file_metadata(url, timeout=PROBE_SECONDS))


# --- picture ------------------------------------------------------------------------------------


def read_landcover(path: Path) -> xr.DataArray:
    """Read the true land cover (y, x); 0 is unknown."""
    import rioxarray

    image: Any = rioxarray.open_rasterio(path)
    landcover: xr.DataArray = image.squeeze("band", drop=True).load()
    return landcover


def draw(
    path: Path,
    frames: xr.DataArray,
    embedding: xr.DataArray,
    landcover: xr.DataArray,
    title: str,
    warning: str = "",
) -> None:
    """Draw frames, embedding and land cover into a PNG, in the style of :func:`xr_anysat.preview`.

    Parameters
    ----------
    path : Path
        The PNG file.
    frames : DataArray, (time, band, y, x)
        DN, with ``doy`` and ``n_obs``.
    embedding : DataArray, (D, y, x)
    landcover : DataArray, (y, x)
        Codes of :data:`xr_anysat.demo.scene.CLASSES`.
    title, warning : str
        Text above the picture.
    """
    from matplotlib.colors import to_rgba_array
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    from xr_anysat.demo.scene import CLASS_COLORS, CLASSES
    from xr_anysat.view.calendar import VERMILION
    from xr_anysat.view.preview import INK, WIDTH, draw_map, draw_thumbnails, map_colors

    layout = ConstrainedLayoutEngine(h_pad=0.06)
    figure = Figure(figsize=(WIDTH, 5.2), layout=layout, facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=8.5, weight="bold", color=INK)
    above, below = figure.subfigures(2, 1, height_ratios=(1.6, 3.4), squeeze=False)[:, 0]
    above.suptitle(warning, x=0.01, ha="left", fontsize=7.5, weight="bold", color=VERMILION)
    words = draw_thumbnails(above, frames, frames.sizes["time"])
    above.supxlabel("; ".join(w for w in words if w), x=0.01, ha="left", fontsize=7.5, color=INK)

    left, right = below.subplots(1, 2)
    colors, _ = map_colors(embedding)
    draw_map(left, colors, embedding)
    name = f"Embedding: {embedding.sizes['D']} channels as 3 principal components"
    left.set_title(name, loc="left", fontsize=7.5, color=INK)
    palette = to_rgba_array(["none", *(CLASS_COLORS[code] for code in CLASSES)])
    draw_map(right, palette[landcover.values], landcover)
    right.set_title("True land cover", loc="left", fontsize=7.5, color=INK)
    right.set_ylabel("")
    right.tick_params(labelleft=False)
    present = np.unique(landcover)
    legend = [
        Patch(color=CLASS_COLORS[code], label=name) for code, name in CLASSES.items() if code in present
    ]
    place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1), "borderaxespad": 0}
    right.legend(handles=legend, frameon=False, fontsize=7, **place)
    figure.savefig(path, dpi=240)
