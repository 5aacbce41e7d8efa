import numpy as np
import pandas as pd
import pytest
from PIL import Image

from r2kit.errors import RecipeError
from r2kit.optimism import optimism


@pytest.fixture
def recipe(tmp_path):
    """Images of 12 flights, each of a colour of its own that says nothing about the class of other flights."""
    rng, rows = np.random.default_rng(0), []
    for flight in range(12):
        colour = rng.integers(30, 220, 3)
        for i in range(8):
            pixels = np.clip(colour + rng.normal(0, 6, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{flight}-{i}.png")
            rows.append({"path": f"{flight}-{i}.png", "label": "ab"[flight % 2], "group": f"flight{flight}"})
    pd.DataFrame(rows).to_csv(tmp_path / "images.csv", index=False)
    return {
        "data": {"root": str(tmp_path / "images.csv"), "image_size": 16, "workers": 0, "test_fraction": 0.3},
        "model": {"name": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 8, "lr": 3e-3},
    }


def test_both_splits_stand_side_by_side_in_the_report(recipe, tmp_path):
    run = optimism(recipe, out=tmp_path / "gap", quiet=True)
    found = run.info["optimism"]
    assert run.path == tmp_path / "gap" / "honest"
    assert found["gap"] == pytest.approx(found["random"]["value"] - found["honest"]["value"])
    assert found["low"] < found["gap"] < found["high"]
    assert found["units"] == "groups"
    assert found["sentence"].endswith("so no optimism is shown.") == (found["low"] <= 0)
    assert "Optimism gap: the same network under a random split reaches" in run.report.read_text()
    split = pd.read_parquet(tmp_path / "gap" / "random" / "split.parquet")
    flight = split["id"].str.split("-").str[0]
    assert split.groupby(flight)["split"].nunique().max() > 1  # the leak was kept, and nothing else differs
    # Asked again, nothing is trained again.
    before = (run.path / "model.safetensors").stat().st_mtime_ns
    assert optimism(recipe, out=tmp_path / "gap", quiet=True).info["optimism"] == found
    assert (run.path / "model.safetensors").stat().st_mtime_ns == before


def test_data_without_blocks_or_groups_has_no_gap(quick_recipe, tmp_path):
    with pytest.raises(RecipeError, match="they need coordinates or a column group"):
        optimism(quick_recipe, out=tmp_path / "gap", quiet=True)
    with pytest.raises(RecipeError, match=r"detection has no optimism gap"):
        optimism({"task": {"kind": "detection"}}, out=tmp_path / "gap", quiet=True)
