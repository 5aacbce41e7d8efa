"""The pictures of the documents, made from a finished run of recipes/satellite.yaml.

    r2kit finetune recipes/satellite.yaml --out runs/satellite
    python docs/pictures.py runs/satellite

Each picture is a chart that the run drew of itself; recipe, seed and day of the run are written into the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, PngImagePlugin

from r2kit.run import Run

IMAGES = Path(__file__).parent / "images"
PICTURES = {"satellite_predictions.png": "predictions.png"}
"""Name here -> chart in the run's plots/."""


def make_pictures(run: Run, folder: Path = IMAGES) -> list[Path]:
    """Write every picture, and return the files.

    Raises:
        FileNotFoundError: If the run has not drawn a chart.
    """
    made = []
    for name, chart in PICTURES.items():
        with Image.open(run.plots / chart) as image:
            note = PngImagePlugin.PngInfo()
            day, recipe = run.info["started"][:10], run.recipe
            note.add_text("Comment", f"{recipe.name}, seed {recipe.seed}, {day}: plots/{chart}")
            image.save(folder / name, optimize=True, pnginfo=note)
        made.append(folder / name)
    return made


if __name__ == "__main__":
    for file in make_pictures(Run.open(sys.argv[1])):
        print(file)
