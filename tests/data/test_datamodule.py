import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from PIL import Image

from r2kit.data.bluemarble import BlueMarble
from r2kit.data.datamodule import DataModule
from r2kit.data.preprocess import Preprocess
from r2kit.errors import DataError
from r2kit.recipe import AugmentSpec, BlueMarbleSpec, DataSpec

MakeFolder = Callable[..., Path]
EMBEDDED = DataSpec(image_size=32, limit=120, bluemarble=BlueMarbleSpec(tile=64, max_per_class=40))


def module(spec: DataSpec, augment: AugmentSpec | None = None, **options) -> DataModule:
    data = DataModule(spec, augment or AugmentSpec(), **{"seed": 0, "batch_size": 8, **options})
    data.setup()
    return data


def folder_spec(root: Path, **options) -> DataSpec:
    return DataSpec(**{"root": str(root), "image_size": 16, "workers": 0, **options})


def test_embedded_tiles_from_recipe_to_batch(tiles: BlueMarble) -> None:
    data = module(EMBEDDED)
    source = data.source
    data.setup("fit")
    assert data.source is source  # a second call does nothing
    counts = data.counts()
    assert list(counts.columns) == ["train", "val", "test"]
    assert list(counts.index) == ["arid", "cold", "ocean", "polar", "temperate", "tropical"]
    assert counts.to_numpy().sum() == 120
    assert data.split.kind == "blocks"
    assert data.skipped == []
    assert data.band_statistics().attrs["images"] == len(data.split.train)
    assert data.preprocess.size == (32, 32)
    assert data.preprocess.scale == 255.0
    loader = data.train_dataloader()
    assert loader.num_workers == 0  # `auto`: the tiles are in memory
    seen = torch.cat([batch["index"] for batch in loader])
    assert set(seen.tolist()) <= set(data.split.train.tolist())
    images = torch.cat([batch["image"] for batch in data.loader(data.split.train, train=False)])
    assert images.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 0.15
    for part, one in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        assert torch.cat([batch["index"] for batch in one]).tolist() == data.split.rows(part).tolist()


def test_statistics_are_of_the_training_images_only(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2})
    data = module(folder_spec(root))
    pixels = np.concatenate([data.source.read(row).reshape(-1, 3) for row in data.split.train])
    np.testing.assert_allclose(data.band_statistics()["mean"], pixels.mean(0))
    np.testing.assert_allclose(np.array(data.preprocess.mean) * 255, pixels.mean(0))
    np.testing.assert_allclose(np.array(data.preprocess.std) * 255, pixels.std(0))


def test_statistics_of_weights_are_used_and_must_fit(make_folder: MakeFolder) -> None:
    data = module(folder_spec(make_folder({"a": 9, "b": 9})))
    data.preprocess = data.preprocess.with_stats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch = next(iter(data.val_dataloader()))
    raw = data.source.read(int(batch["index"][0]))
    torch.testing.assert_close(batch["image"][0], data.preprocess.apply(raw), rtol=0, atol=0)
    data.train_dataloader()
    data.preprocess = data.preprocess.with_stats((40.0,) * 3, (1.0,) * 3)
    with pytest.raises(DataError, match="band 'red' would reach the network with mean"):
        data.train_dataloader()


def test_the_split_of_a_run_comes_back(make_folder: MakeFolder, tmp_path: Path) -> None:
    spec = folder_spec(make_folder({"a": 12, "b": 12}))
    first = module(spec, seed=1)
    first.split.save(tmp_path / "split.parquet", first.source.manifest)
    again = module(spec, seed=2, preprocess=first.preprocess, split_file=tmp_path / "split.parquet")
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(again.split.rows(part), first.split.rows(part))
    assert again.preprocess is first.preprocess
    assert not np.array_equal(module(spec, seed=2).split.test, first.split.test)


def test_other_data_through_the_preprocessing_of_a_run(make_folder: MakeFolder) -> None:
    # The run knew classes in another order, and one more; the labels must be the run's.
    half = (0.5, 0.5, 0.5)
    prep = Preprocess(
        ("red", "green", "blue"), half, half, 255.0, (16, 16), "squash", "bilinear", ("water", "sand", "forest")
    )
    spec = folder_spec(make_folder({"forest": 2, "water": 1}))
    data = module(spec, preprocess=prep, all_test=True)
    assert data.split.kind == "all"
    (batch,) = data.test_dataloader()
    assert batch["label"].tolist() == [2, 2, 0]
    assert data.counts()["test"].to_dict() == {"water": 1, "sand": 0, "forest": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"classes": ("forrest", "water")},
            "class 'forest' is unknown to the run, which knows forrest, water; did you",
        ),
        ({"bands": ("nir", "red", "green")}, "bands red, green, blue, but the run was trained on nir, red, green"),
        ({"scale": 1.0}, "pixels are divided by 255, but by 1 in the run"),
    ],
)
def test_data_that_does_not_fit_a_run(make_folder: MakeFolder, change: dict, message: str) -> None:
    half = (0.5, 0.5, 0.5)
    values = {"bands": ("red", "green", "blue"), "scale": 255.0, "classes": ("forest", "water"), **change}
    prep = Preprocess(**values, mean=half, std=half, size=(16, 16), resize="squash", interpolation="bilinear")
    spec = folder_spec(make_folder({"forest": 2, "water": 2}))
    with pytest.raises(DataError, match=message):
        module(spec, preprocess=prep, all_test=True)


def test_a_value_for_no_measurement_that_the_run_does_not_know_is_refused(
    tmp_path: Path, write_tiff: Callable[..., Path]
) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        raw = rng.integers(1, 4000, (16, 16, 2)).astype(np.int16)
        write_tiff(tmp_path / "ab"[number % 2] / f"{number}.tif", raw, nodata=-9999)
    stats = {"mean": (2000.0,) * 2, "std": (500.0,) * 2, "scale": 1.0, "size": (16, 16), "resize": "squash"}
    prep = Preprocess(bands=("band1", "band2"), interpolation="bilinear", classes=("a", "b"), **stats)
    with pytest.raises(DataError, match="-9999 stands for no measurement, and the run knows of no such value; such"):
        module(folder_spec(tmp_path), preprocess=prep, all_test=True)
    with pytest.raises(DataError, match="-9999 stands for no measurement, and the run has 0 for it"):
        module(folder_spec(tmp_path), preprocess=replace(prep, nodata=0.0), all_test=True)
    module(folder_spec(tmp_path), preprocess=replace(prep, nodata=-9999.0), all_test=True)


def test_split_file_and_all_test_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        DataModule(DataSpec(), AugmentSpec(), seed=0, batch_size=2, split_file=Path("x"), all_test=True)


def test_skipped_files_are_listed(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 5, "b": 5})
    (root / "a" / "000.png").write_bytes(b"")
    data = module(folder_spec(root, on_bad_file="skip"))
    assert data.skipped == [(str(root / "a" / "000.png"), "is empty (0 bytes)")]
    assert data.counts().to_numpy().sum() == 9


def test_augmentation_can_be_switched_off(make_folder: MakeFolder) -> None:
    data = module(folder_spec(make_folder({"a": 9, "b": 9})), AugmentSpec(preset="none"))
    for batch in data.train_dataloader():
        for image, row in zip(batch["image"], batch["index"], strict=True):
            assert torch.equal(image, data.preprocess.apply(data.source.read(int(row))))


class Recorder(lightning.LightningModule):
    """Keeps what the trainer hands to each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.train_batches: list[tuple[int, int, dict]] = []
        self.val_batches: list[dict] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.train_batches.append((self.current_epoch, batch_idx, batch))
        return self.layer(batch["image"].mean().view(1, 1)).sum()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.val_batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(data: DataModule, epochs: int) -> Recorder:
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainer's advice on loggers and workers
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(recorder, datamodule=data)
    return recorder


def test_the_trainer_sets_epochs_and_mixes_training_batches_only(make_folder: MakeFolder) -> None:
    spec = folder_spec(make_folder({"a": 20, "b": 20}))
    augment = AugmentSpec(mixup=0.5, cutmix=0.4, mix_off_epochs=1)
    recorder = fit(module(spec, augment), epochs=3)

    plain = module(spec, augment)
    loader, expected = plain.train_dataloader(), []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for position, batch in enumerate(loader):
            expected.append(plain.mix(batch, epoch, position) if epoch < 2 else batch)
    assert len(recorder.train_batches) == len(expected) >= 9
    for (_, _, got), wanted in zip(recorder.train_batches, expected, strict=True):
        for key in ("index", "image", "label"):
            assert torch.equal(got[key], wanted[key])
    kinds = [batch["label"].is_floating_point() for epoch, _, batch in recorder.train_batches]
    assert any(kinds[:-4])
    assert not any(batch["label"].is_floating_point() for epoch, _, batch in recorder.train_batches if epoch == 2)
    assert not any(batch["label"].is_floating_point() for batch in recorder.val_batches)


def test_mixed_labels_are_blends_of_the_classes(make_folder: MakeFolder) -> None:
    data = module(folder_spec(make_folder({"a": 9, "b": 9, "c": 9})), AugmentSpec(mixup=1.0, mixup_alpha=1.0))
    batch = next(iter(data.train_dataloader()))
    mixed = data.mix(batch, 0, 0)
    assert mixed["label"].shape == (8, 3)
    torch.testing.assert_close(mixed["label"].sum(1), torch.ones(8))
    assert mixed["label"].max() < 1 or len(set(batch["label"].tolist())) == 1 or mixed["label"].min() == 0
    assert torch.equal(mixed["index"], batch["index"])
    assert not batch["label"].is_floating_point()


def test_large_jpegs_are_decoded_by_what_the_network_sees(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 9, "b": 9}, suffix=".jpg", size=(100, 140))
    data = module(folder_spec(root))
    assert data.source.read(0).shape == (50, 70, 3)  # 16 pixels wanted: half the size is still three times that
    for batch in data.val_dataloader():
        for image, row in zip(batch["image"], batch["index"], strict=True):
            assert torch.equal(image, data.preprocess.apply(data.source.read(int(row))))


def test_listed_transforms_count_in_pixels_of_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(9):
            pixels = np.tile(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8), (8, 8, 1))  # repeats every 16 pixels
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.jpg", quality=100, subsampling=0)
    crop = {"name": "RandomCrop", "height": 32, "width": 32, "p": 1.0}
    data = module(folder_spec(tmp_path, image_size=32), AugmentSpec(preset="none", transforms=(crop,)))
    assert data.source.read(0).shape == (128, 128, 3)
    image = next(iter(data.train_dataloader()))["image"]
    # Decoded at half the size, the pattern would repeat every 8 pixels.
    repeats = [(image[..., :16] - image[..., shift : shift + 16]).abs().mean() for shift in (8, 16)]
    assert repeats[1] < 0.05 * repeats[0]
    plain = module(folder_spec(tmp_path, image_size=32))
    assert plain.source.read(0).shape == (64, 64, 3)
