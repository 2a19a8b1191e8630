"""The whole way once, on made-up data: a catalog, search, lazy cube, frames, embedding, picture.

Run it by ``python -m xr_anysat demo``. It needs no account, no data and no network: the catalog is a
STAC API of this machine, for as long as it is needed.
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

from xr_anysat.config import option
from xr_anysat.errors import AnySatError
from xr_anysat.model import checkpoint
from xr_anysat.model.weights import encoder_spec
from xr_anysat.shared.checks import require_packages

MEANINGLESS = "RANDOM WEIGHTS: SUCH EMBEDDINGS CARRY NO LEARNED MEANING"

# A vector a 10 m pixel. The token of a patch also tells where in its window the patch lies, so a map of
# patch tokens shows the windows; a pixel's own token follows the ground.
OUTPUT = "local"

PATCH_SIZE = 20

# Fixed constants, so that the scene's place and size change nothing
NORM = "pastis"

YEAR = 2022

PROBE_SECONDS = 2.0

DOWNLOAD_SECONDS = 60.0

START_SECONDS = 30.0

# Percent of clouds; a scene that is all cloud need not be read
MAX_CLOUD = 90


@dataclass(frozen=True)
class Weights:
    """The weights that the demo found.

    Attributes
    ----------
    argument : str, tuple or None
        What to hand to ``embed(weights=...)``.
    label : str
        In words.
    learned : bool
        False for random weights.
    """

    argument: str | tuple[str, int] | None
    label: str
    learned: bool


def check_dependencies() -> None:
    """Raise an AnySatError that names the pip command, if the demo extra is not installed."""
    modules = ("matplotlib", "sklearn", "rasterio", "rioxarray", "odc.stac", "pystac_client", "scipy")
    rustac = () if find_rustac() else ("rustac",)
    require_packages("the demo", *modules, install="'xr_anysat[demo]'", missing=rustac)


def run(
    out: str | Path, *, size: int = 240, model: str = "base", weights: str | None = None, seed: int = 0
) -> None:
    """Make a scene, serve it, open it by search, embed it; write ``embedding.zarr`` and ``embedding.png``.

    A STAC Item of the embedding is written too, ``embedding.stac.json``.

    Parameters
    ----------
    out : str or Path
        Folder of all results; what an earlier run left there is written over.
    size : int
        Side of the scene in 10 m pixels, even.
    model : str
        ``base``, ``small`` or ``tiny``.
    weights : str or None
        A checkpoint, or ``"random"``. None takes the official weights if they are here or can be
        had within a minute, and says in capitals if not.
    seed : int
        Of the scene.

    Raises
    ------
    AnySatError
        If the demo's dependencies are missing, or an argument is impossible.
    """
    check_dependencies()
    from xr_anysat.demo.scene import make_scene
    from xr_anysat.stac.search import open_s2

    out = Path(out)
    started = time.perf_counter()

    found = find_weights(weights, model)
    say(f"1/4  Writing a Sentinel-2 year of {size} × {size} pixels of 10 m")
    scene = make_scene(out / "scene", size=(size, size), year=YEAR, seed=seed)

    say("2/4  Searching a STAC catalog of this machine, compositing frames: the median of what is clear")
    with serve_items(scene.items) as url, progress():
        cube = open_s2(
            point=scene.center,
            buffer_m=5 * size,
            datetime=str(YEAR),
            catalog=url,
            max_cloud=MAX_CLOUD,
            chunks=128,
        )
        # In memory but still in chunks, so that the embedding is lazy
        frames = cube.anysat.frames(8).persist()

    say(f"3/4  Embedding with AnySat {model}, {found.label}")
    if not found.learned:
        say(MEANINGLESS)
    embedding = frames.anysat.embed(
        frames=None, norm=NORM, patch_size=PATCH_SIZE, output=OUTPUT, model=model, weights=found.argument
    )
    if not found.learned:
        embedding.attrs["warning"] = MEANINGLESS
    store = out / "embedding.zarr"
    if store.exists():  # of other options perhaps, and then refused
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
    say(f"Time         {time.perf_counter() - started:.1f} s, {seconds:.1f} s of them to embed")
    say(f"Speed        {size * size / seconds:,.0f} pixels/s")
    if peak := peak_memory():
        say(f"Memory peak  {peak / 2**30:.2f} GiB")
    say(f"Files        {scene.folder}, {store}, {picture}")
    if not found.learned:
        say(MEANINGLESS)


def say(line: str) -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True)


def progress() -> AbstractContextManager[Any]:
    """Show a progress bar; a pipe or a log gets fewer of its updates."""
    from dask.diagnostics.progress import ProgressBar

    bar: AbstractContextManager[Any] = ProgressBar(dt=0.1 if sys.stdout.isatty() else 1)
    return bar


def peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes; None where it cannot be known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- catalog ------------------------------------------------------------------------------------


def find_rustac() -> str | None:
    """Path of the ``rustac`` program: that of this Python, else the one that the shell finds."""
    return shutil.which("rustac", path=str(Path(sys.executable).parent)) or shutil.which("rustac")


@contextmanager
def serve_items(items: Path) -> Iterator[str]:
    """Serve STAC items by ``rustac serve``, to this machine only, as long as the context lasts.

    Parameters
    ----------
    items : Path
        A GeoJSON FeatureCollection of items, whose hrefs are URLs (``file://…``).

    Yields
    ------
    str
        The URL of the STAC API.

    Raises
    ------
    AnySatError
        If ``rustac`` is missing or does not start.
    """
    program = find_rustac()
    if program is None:
        raise AnySatError("a STAC API of this machine needs rustac: pip install 'xr_anysat[demo]'")
    with tempfile.TemporaryFile() as said:
        for _ in range(3):  # another program may take the free port first
            port = free_port()
            address = f"127.0.0.1:{port}"
            server = subprocess.Popen(
                [program, "serve", "--create-collections", "--addr", address, str(items)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
            try:
                if answers(server, port):
                    yield f"http://{address}"
                    return
            finally:
                server.terminate()
                server.wait(10)
        said.seek(0)
        error = said.read().decode(errors="replace").strip()
    raise AnySatError(
        f"rustac serve does not answer within {START_SECONDS:.0f} s: {error[-300:] or 'it says nothing'}"
    )


def free_port() -> int:
    """Find a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server answers; False if it ends, or takes too long."""
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


def find_weights(asked: str | None, model: str) -> Weights:
    """Take the weights asked for; else the official ones; else random ones, as only the demo does."""
    asked = option("weights", asked)
    if asked is not None:
        source = encoder_spec(model, asked).source
        if source.kind == "random":
            return Weights(asked, "random weights", learned=False)
        name = "official weights" if source.kind == "official" else f"weights of {source.path.name}"
        return Weights(asked, name, learned=True)
    if model != checkpoint.OFFICIAL.model:
        say(f"No official weights of {model!r} are published.")
    elif official_weights():
        return Weights("official", "official weights", learned=True)
    return Weights("random", "random weights", learned=False)


def official_weights() -> bool:
    """Tell whether the official weights are here, if need be after a download of limited time."""
    if checkpoint.official_path(download=False) is not None:
        return True
    if checkpoint.offline() or not reachable():
        say("The official weights are not on this machine, and their hub is out of reach.")
        return False
    say(f"Downloading the official weights (504 MB), for at most {DOWNLOAD_SECONDS:.0f} s")
    # In a process of its own, as nothing else ends a download for certain
    code = "from xr_anysat.model import checkpoint; checkpoint.official_path()"
    try:
        subprocess.run([sys.executable, "-c", code], timeout=DOWNLOAD_SECONDS, check=True)
    except subprocess.SubprocessError:
        say(f"The download did not finish. Without a limit: python -c {code!r}")
        return False
    return True


def reachable() -> bool:
    """Tell whether the hub of the official weights answers at once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(checkpoint.OFFICIAL.repo, checkpoint.OFFICIAL.filename)
    answers = []

    def ask() -> None:
        with suppress(Exception):  # whatever it is, there is no answer
            answers.append(get_hf_file_metadata(url, timeout=PROBE_SECONDS))

    # In a thread that is not waited for: the timeout does not cover the look-up of the host's name
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return bool(answers)


# --- picture ------------------------------------------------------------------------------------


def read_landcover(path: Path) -> xr.DataArray:
    """Read the true land cover, (y, x), 0 where unknown."""
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
    """Draw frames, embedding and land cover into a PNG, as :func:`xr_anysat.preview` does.

    Parameters
    ----------
    path : Path
        The PNG.
    frames : xarray.DataArray
        (time, band, y, x) in DN, with ``doy`` and ``n_obs``.
    embedding : xarray.DataArray
        (D, y, x).
    landcover : xarray.DataArray
        (y, x), codes of :data:`xr_anysat.demo.scene.CLASSES`.
    title, warning : str
        What to write above.
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
