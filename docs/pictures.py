"""The pictures of the documents, made from a finished run of recipes/satellite.yaml.

    r2kit finetune recipes/satellite.yaml --out runs/satellite
    python docs/pictures.py runs/satellite

All but one are charts that the run drew of itself; the last is a map that it makes of a scene of Africa.
Recipe, seed and day of the run are written into each file.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin

from r2kit.data.bluemarble import write_scene
from r2kit.maps import MapSettings, predict_map
from r2kit.maps.picture import map_figure
from r2kit.run import Run

IMAGES = Path(__file__).parent / "images"
CHARTS = {
    "satellite_predictions.png": "predictions.png",
    "satellite_gradcam.png": "gradcam.png",
    "satellite_reliability.png": "reliability.png",
    "satellite_blocks.png": "block_accuracy.png",
}
"""Name here -> chart in the run's plots/."""
MAP = "satellite_map.png"
PAINT = {
    "arid": "khaki",
    "cold": "slateblue",
    "ocean": "tab:blue",
    "polar": "lightgrey",
    "temperate": "yellowgreen",
    "tropical": "darkgreen",
}
"""Colours of the climates; a run of other classes has the ten of the map's own."""


def make_pictures(run: Run, folder: Path = IMAGES, *, cell: int = 16) -> list[Path]:
    """Write every picture, and return the files.

    Args:
        run: A finished run.
        folder: Where they are written.
        cell: Pixels of the scene for each cell of the map.

    Raises:
        FileNotFoundError: If the run has not drawn a chart.
    """
    made = []
    for name, chart in CHARTS.items():
        with Image.open(run.plots / chart) as image:
            made.append(_save(image, folder / name, run, f"plots/{chart}"))
    with tempfile.TemporaryDirectory() as work:
        scene = write_scene(Path(work) / "africa.tif", west=-20, south=-36, east=55, north=38)
        found = predict_map(run, scene, Path(work) / "climate.tif", MapSettings(cell=cell))
        known = set(run.preprocess.classes) <= set(PAINT)
        drawn = io.BytesIO()
        map_figure(found, scene, PAINT if known else None).savefig(drawn, format="png", bbox_inches="tight")
    with Image.open(drawn) as image:
        made.append(_save(image, folder / MAP, run, f"a map of Africa in cells of {cell} pixels"))
    return made


def _save(image: Image.Image, file: Path, run: Run, what: str) -> Path:
    """Write a picture with what it is of."""
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", f"{run.recipe.name}, seed {run.recipe.seed}, {run.info['started'][:10]}: {what}")
    image.save(file, optimize=True, pnginfo=note)
    return file


if __name__ == "__main__":
    for file in make_pictures(Run.open(sys.argv[1])):
        print(file)
