"""Prediction on a cluster gives the local engine's files, tries again what failed, and goes on where it stopped."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from r2kit import cluster
from r2kit.console import make_console
from r2kit.data.reader import open_raster
from r2kit.errors import DataError, RunError
from r2kit.maps import MapSettings, predict_maps
from r2kit.predict import predict


def test_failed_pieces_are_tried_again_and_then_named():
    pieces = [cluster.Piece(number, (f"{number}.png",), f"{number}.parquet") for number in range(3)]
    seen: list[list[int]] = []

    def work(some):
        seen.append([piece.number for piece in some])
        return [(piece.number, "no disk" if piece.number == 1 and len(seen) < 2 else "") for piece in some]

    assert cluster.finish(pieces, work, make_console(quiet=True)) == []
    assert seen == [[0, 1, 2], [1]]
    failed = cluster.finish(
        pieces, lambda some: [(p.number, "no disk" if p.number else "") for p in some], make_console(quiet=True)
    )
    assert [piece.number for piece, _ in failed] == [1, 2]
    with pytest.raises(DataError, match=r"2 of 3 pieces failed 3 times; what is done is kept.*no disk"):
        cluster._refuse_failed(failed, 3)


def test_a_piece_that_raises_is_told_and_ends_nothing(finished_run, tmp_path):
    def broken(piece):
        raise OSError("no disk")

    row = cluster.row_of(cluster.Piece(4, ("x.png",), "x"))
    assert cluster._Worker(broken)(row) == {"number": 4, "reason": "OSError: no disk"}


@pytest.fixture
def in_this_process(monkeypatch):
    """Do the pieces here, without Ray, and count them."""
    done: list[int] = []

    def here(task, pieces, device):
        outcomes = []
        for piece in pieces:
            outcomes.append(cluster._Worker(task)(cluster.row_of(piece)))
            done.append(piece.number)
        return [(one["number"], one["reason"]) for one in outcomes]

    monkeypatch.setattr(cluster, "_on_ray", here)
    monkeypatch.setattr(cluster, "require", lambda *names: None)
    return done


def test_pieces_make_the_table_of_the_local_engine(finished_run, image_folder, tmp_path, in_this_process, monkeypatch):
    local = predict(finished_run, image_folder, out=tmp_path / "local", batch_size=4)
    found = cluster.predict_table(finished_run, [image_folder], tmp_path / "far", batch_size=4, device="cpu")
    pd.testing.assert_frame_equal(found, local)
    for suffix in ("csv", "parquet"):
        assert (tmp_path / f"far.{suffix}").read_bytes() == (
            tmp_path / f"local.{suffix}"
        ).read_bytes() or suffix == "parquet"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far.csv", "far.parquet", "local.csv", "local.parquet"]
    assert in_this_process == [0, 1, 2]  # 36 images, 16 in a piece

    # The last piece cannot be written: the others stay, and the next command does that one alone.
    real = pd.DataFrame.to_parquet

    def full(self, path, **options):
        if "000002" in str(path):
            raise OSError("no space left on device")
        return real(self, path, **options)

    in_this_process.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        with pytest.raises(DataError, match=r"1 of 3 pieces failed 3 times.*no space left"):
            cluster.predict_table(finished_run, [image_folder], tmp_path / "far", batch_size=4, device="cpu")
    assert in_this_process == [0, 1, 2, 2, 2]
    in_this_process.clear()
    cluster.predict_table(finished_run, [image_folder], tmp_path / "far", batch_size=4, device="cpu")
    assert in_this_process == [2]


def test_an_image_that_cannot_be_read_is_named_after_the_others(finished_run, image_folder, tmp_path, in_this_process):
    shutil.copytree(image_folder, tmp_path / "tiles")
    (tmp_path / "tiles" / "sand" / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 36 images could not be read"):
        cluster.predict_table(finished_run, [tmp_path / "tiles"], tmp_path / "far", batch_size=4)
    assert len(pd.read_csv(tmp_path / "far.csv")) == 35


def test_what_is_no_piece_of_work_is_refused(finished_run, tmp_path, in_this_process, monkeypatch):
    with pytest.raises(DataError, match="is one map, and there are 2 scenes"):
        cluster.predict_scenes(
            finished_run, [tmp_path / "a.tif", tmp_path / "b.tif"], tmp_path / "m.tif", MapSettings()
        )


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_masks_and_boxes_are_those_of_the_local_engine(request, kind, tmp_path, in_this_process, monkeypatch):
    run = request.getfixturevalue({"segmentation": "pond_run", "detection": "detection_run"}[kind])
    source = Path(run.recipe.data.root)
    shutil.copytree(source / "images", tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    local = predict(run, ["pictures"], out="near/found", batch_size=2)
    far = cluster.predict_table(run, ["pictures"], Path("far/found"), batch_size=2, device="cpu")
    assert len(in_this_process) > 1
    near_files = sorted(path.relative_to("near") for path in Path("near").rglob("*") if path.is_file())
    assert near_files == sorted(path.relative_to("far") for path in Path("far").rglob("*") if path.is_file())
    assert len(near_files) > 1
    for name in near_files:
        if name.suffix != ".parquet":
            assert (Path("far") / name).read_text("latin-1").replace("far/", "near/") == (
                Path("near") / name
            ).read_text("latin-1")
    if "mask" in local and kind == "segmentation":
        far["mask"] = far["mask"].str.replace("far/", "near/")
    pd.testing.assert_frame_equal(far, local)
    # One that cannot be read is named as it was given, after the others are written.
    broken = sorted(Path("pictures").iterdir())[0]
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"1 of {len(list(Path('pictures').iterdir()))} images could not be read"):
        cluster.predict_table(run, ["pictures"], Path("again/found"), batch_size=2, device="cpu")
    assert len(list(Path("again").rglob("*.csv"))) == 1
    with (
        pytest.raises(DataError, match="could replace this image")
        if kind == "segmentation"
        else pytest.raises(RunError, match="tta")
    ):
        cluster.predict_table(run, ["pictures"], Path("pictures"), batch_size=2, device="cpu", tta=kind == "detection")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray deprecates parts of itself in every release
def test_two_workers_of_ray_give_the_files_of_the_local_engine(finished_run, image_folder, make_scene, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        local = predict(finished_run, image_folder, out=tmp_path / "local", batch_size=4)
        found = cluster.predict_table(finished_run, [image_folder], tmp_path / "far", batch_size=4, device="cpu")
        pd.testing.assert_frame_equal(found, local)
        scenes = [make_scene(70, 90), make_scene(64, 100)]
        named = [shutil.copy(scene, tmp_path / f"{number}.tif") for number, scene in enumerate(scenes)]
        settings = MapSettings(device="cpu", workers=1)
        paths = [tmp_path / name for name in ("0.tif", "1.tif")]
        assert [str(path) for path in named] == [str(path) for path in paths]
        far = cluster.predict_scenes(finished_run, paths, tmp_path / "far-maps", settings)
        near = predict_maps(finished_run, paths, tmp_path / "near-maps", settings)
        for one, other in zip(far, near, strict=True):
            with open_raster(one) as a, open_raster(other) as b:
                assert (a.read() == b.read()).all()
                assert a.tags() == b.tags()
        stamp = far[0].stat().st_mtime_ns
        cluster.predict_scenes(finished_run, paths, tmp_path / "far-maps", settings)
        assert far[0].stat().st_mtime_ns == stamp  # finished already
    finally:
        ray.shutdown()
