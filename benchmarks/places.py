"""Places per second and reads per place: `embed_places` relative to a loop over `open_s2(...).anysat.embed(...)`.

python benchmarks/places.py [PLACES] [--memory COUNT ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pystac

import xr_anysat
from xr_anysat.demo.scene import make_scene
from xr_anysat.stac import reader

LEFT, TOP, SIDE = 688_140, 5_104_580, 480
OPTIONS: dict[str, Any] = {"frames": 4, "model": "tiny", "weights": "random", "patch_size": 40, "tile": 24}


def scene_items(folder: Path) -> list[pystac.Item]:
    """STAC items of a synthetic scene."""
    scene = make_scene(folder, size=(SIDE, SIDE), dates=12)
    return list(pystac.ItemCollection.from_file(str(scene.items)))


def points(count: int) -> geopandas.GeoDataFrame:
    """Random points in the scene."""
    rng = np.random.default_rng(0)
    at = geopandas.points_from_xy(
        LEFT + rng.uniform(300, 10 * SIDE - 300, count), TOP - rng.uniform(300, 10 * SIDE - 300, count)
    )
    return geopandas.GeoDataFrame(geometry=at, crs="EPSG:32632").to_crs("EPSG:4326")


def count_reads() -> list[int]:
    """Count the files that are opened from now on, and the pixels that are read."""
    counts = [0, 0]
    real = reader.ItemReader._read

    def counted(self: Any, name: str, uri: str, geoboxes: Any, **options: Any) -> Any:
        counts[0] += 1
        counts[1] += sum(geobox.shape[0] * geobox.shape[1] for geobox in geoboxes)
        return real(self, name, uri, geoboxes, **options)

    reader.ItemReader._read = counted  # type: ignore[method-assign]
    return counts


def compare(count: int) -> None:
    """Print both, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        items, places, counts = scene_items(Path(folder)), points(count), count_reads()
        found = {}
        for name in ("embed_places", "a loop"):
            counts[:] = 0, 0
            start = time.perf_counter()
            if name == "embed_places":
                xr_anysat.embed_places(places, "2022", catalog=items, max_cloud=None, **OPTIONS)
            else:
                for point in places.geometry:
                    cube = xr_anysat.open_s2(
                        point=(point.x, point.y), buffer_m=120, datetime="2022", catalog=items, max_cloud=None
                    )
                    cube.anysat.embed(norm="pastis", anchor="cube", **OPTIONS).compute()
            seconds = time.perf_counter() - start
            found[name] = (count / seconds, counts[0] / count, counts[1] / count)
            print(
                f"{name}: {count / seconds:.1f} places/s, {counts[0] / count:.2f} files opened and "
                f"{counts[1] / count:,.0f} pixels read per place"
            )
        ours, loop = found.values()
        print(
            f"embed_places: {ours[0] / loop[0]:.1f} times the places per second, 1/{loop[1] / ours[1]:.0f} of the "
            f"files, {ours[2] / loop[2]:.2f} times the pixels"
        )


def memory(count: int) -> None:
    """Print the peak memory of a process that embeds so many places into a stored table."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        items, places = scene_items(Path(folder)), points(count)
        start = time.perf_counter()
        xr_anysat.embed_places(places, "2022", out=f"{folder}/out", catalog=items, max_cloud=None, **OPTIONS)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{count} places: {peak:,.0f} MB at most, {count / (time.perf_counter() - start):.1f} places/s")


def main() -> None:
    """Run the comparison, or the measurement of memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", nargs="?", type=int, default=200)
    parser.add_argument("--memory", nargs="*", type=int)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        memory(given.one)
    elif given.memory is not None:
        for count in given.memory or (500, 2000, 8000):  # each in a process of its own
            subprocess.run([sys.executable, __file__, "--one", str(count)], check=True)
    else:
        compare(given.places)


if __name__ == "__main__":
    main()
