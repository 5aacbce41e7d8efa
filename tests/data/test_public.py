import inspect
from pathlib import Path
from typing import get_args
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from r2kit.cli import main
from r2kit.data.public import PUBLIC_SETS, fetch
from r2kit.data.sources import open_source
from r2kit.errors import DataError, RecipeError
from r2kit.recipe import DataSpec
from r2kit.recipe.data import PublicName
from r2kit.recipe_file import load_recipe


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; its folder of downloads."""
    monkeypatch.setenv("R2KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "public" / "downloads"


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of MNIST: two zeros, type 8 (unsigned bytes), number of axes, their lengths, the values."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_a_set_of_folders_is_used_where_torchvision_put_it(downloads: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    for name in ("Forest", "River", "SeaLake"):
        folder = downloads / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{name}_{i}.jpg")
    source = open_source(DataSpec(name="eurosat", workers=0))
    assert source.classes == ("Forest", "River", "SeaLake")
    assert len(source.manifest) == 9
    assert source.read(0).shape == (64, 64, 3)
    main_ends_well(["data", "stats", "torchvision:eurosat"])
    assert "bands of 9 images" in capsys.readouterr().out


def main_ends_well(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert not caught.value.code


def test_other_sets_become_a_folder_with_their_own_parts(downloads: Path) -> None:
    rng = np.random.default_rng(0)
    raw = downloads / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = {"train": rng.integers(0, 255, (40, 28, 28)), "t10k": rng.integers(0, 255, (20, 28, 28))}
    for part, pixels in images.items():
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(pixels)) % 10)
    source = open_source(DataSpec(name="fashion_mnist", workers=0))
    assert source.manifest["split"].value_counts().to_dict() == {"train": 40, "test": 20}
    assert "T-shirt-top" in source.classes
    row = source.manifest.index[source.manifest["id"] == "test/T-shirt-top/000010.png"][0]
    np.testing.assert_array_equal(source.read(row)[..., 0], images["t10k"][10])
    (raw / "train-images-idx3-ubyte").unlink()  # it is written once
    assert fetch("fashion_mnist") == downloads.parent / "fashion_mnist"
    assert [path.name for path in downloads.parent.iterdir() if path.name.endswith(".part")] == []


def test_without_a_network_one_line_names_the_folder_instead(downloads: Path, monkeypatch) -> None:
    def unplugged(*_args, **_options) -> None:
        raise URLError(OSError("Name or service not known"))

    monkeypatch.setattr(datasets.EuroSAT, "download", unplugged)
    monkeypatch.setattr(datasets.CIFAR10, "download", unplugged)
    for name in ("eurosat", "cifar10"):
        with pytest.raises(
            DataError, match=rf"data\.name={name}: cannot be downloaded \(Name or service .*data\.root=F"
        ):
            open_source(DataSpec(name=name, workers=0))
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: None)  # what came is not what was meant
    with pytest.raises(DataError, match=r"cannot be downloaded \(Dataset not found or corrupted"):
        open_source(DataSpec(name="cifar10", workers=0))


def test_every_set_takes_the_arguments_that_it_is_given() -> None:
    assert set(PUBLIC_SETS) == set(get_args(PublicName))
    for known in PUBLIC_SETS.values():
        for arguments in known.parts.values() or [{}]:
            inspect.signature(known.factory).bind("root", download=False, **arguments)


def test_names_and_folders_exclude_each_other() -> None:
    for override, message in (
        (["data.source=torchvision"], "data.name: source 'torchvision' needs the name of a public set"),
        (["data.name=eurosat", "data.root=here"], "data.root: name=eurosat and root are both given"),
        (["data.name=eurosat", "data.source=bluemarble"], "data.name: source 'bluemarble' has no name"),
        (["data.name=eurosta"], "did you mean 'eurosat'"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe({}, override)
    assert load_recipe({}, ["data.name=eurosat"]).data.resolved_source == "torchvision"
