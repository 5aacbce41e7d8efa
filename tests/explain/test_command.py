"""`r2kit explain`, through the real command line, for every kind of task."""

import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from r2kit.cli import app, main
from r2kit.data.preprocess import Preprocess
from r2kit.errors import DataError, ModelError, RunError
from r2kit.explain import METHODS, Explainer, energy_inside, explain
from r2kit.explain.question import as_input, mask_as_input
from r2kit.run import Run

pytest.importorskip("captum", reason="captum (extra explain) is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def panels(folder):
    return sorted(file.name for file in folder.glob("panel_*.png"))


@pytest.mark.parametrize("method", METHODS)
def test_files_give_a_page_a_table_and_a_picture_each(finished_run, image_folder, tmp_path, method):
    files = [str(image_folder / "sand" / "000.png"), str(image_folder / "water" / "001.png")]
    arguments = ["explain", str(finished_run.path), *files, "--method", method, "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert panels(tmp_path / "out") == ["panel_001_000.png", "panel_002_001.png"]
    table = pd.read_csv(tmp_path / "out" / "explain.csv")
    assert table["path"].tolist() == files
    assert set(table["class"]) <= set(finished_run.preprocess.classes)
    assert table["score"].between(1 / 3, 1).all()  # the predicted class of three
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/jpeg") == 4
    assert "<script" not in page
    assert 'src="http' not in page


def test_held_out_images_and_another_run_beside(finished_run, tmp_path):
    out = tmp_path / "out"
    found = explain(finished_run, against=finished_run, target="sand", limit=3, out=out)
    assert len(found.table) == 3
    assert set(found.table["class"]) == {"sand"}
    assert found.table["answer"].tolist() == found.table["against_answer"].tolist()
    explain(finished_run, target="sand", limit=2, out=out)
    assert len(panels(out)) == 2  # those of before are gone
    assert "other run" not in (out / "index.html").read_text()


def test_evidence_inside_given_masks(finished_run, image_folder, tmp_path):
    (tmp_path / "masks").mkdir()
    mask = np.zeros((24, 24), dtype=np.uint8)
    mask[:, :12] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "003.png")
    image = image_folder / "sand" / "003.png"
    found = explain(finished_run, [image], target="sand", masks=tmp_path / "masks", out=tmp_path / "out")
    look = Explainer(finished_run).look(np.asarray(Image.open(image)), "sand")
    inside = look.heat[:, :16].sum() / look.heat.sum()  # half of the 32 columns of the network's input
    assert found.table["inside"][0] == pytest.approx(inside, rel=1e-5)
    assert found.table["covered"][0] == 0.5
    assert "lies inside the object" in found.sentences[0]
    Image.fromarray(mask[:20]).save(tmp_path / "masks" / "005.png")
    with pytest.raises(DataError, match=r"005.png: its mask has 20 x 24 pixels, the image 24 x 24"):
        explain(finished_run, image.with_name("005.png"), masks=tmp_path / "masks", out=tmp_path / "out")
    with pytest.raises(DataError, match=r"has no mask for 004: a file named 004.png or the like"):
        explain(finished_run, [image.with_name("004.png")], masks=tmp_path / "masks", out=tmp_path / "out")


def test_a_segmentation_is_explained_in_its_tiles_with_its_own_masks(pond_run, tmp_path):
    found = explain(pond_run, target="pond", against=pond_run, limit=4, out=tmp_path / "out")
    assert len(found.table) == 3  # that many are held out
    known = found.table[found.table["inside"].notna()]
    assert len(known) >= 2
    assert known["answer"].str.match(r"pond, [\d.e-]+ % of the pixels").all()
    assert known["inside"].tolist() == known["against_inside"].tolist()
    assert "0.0 points more inside" in found.sentences[-1]
    assert found.sentences[-1].endswith("not shown")


def test_a_large_image_may_be_looked_at_in_a_few_of_its_tiles(pond_run, monkeypatch):
    seen = []
    monkeypatch.setattr("r2kit.explain.look.ask", lambda *given, **named: seen.append(given[3].shape))
    explainer, raw = Explainer(pond_run), np.zeros((96, 160, 3), dtype=np.uint8)
    for tiles, count in ((None, 15), (4, 4), (100, 15)):
        seen.clear()
        assert explainer.look(raw, tiles=tiles) is None
        assert seen == [(1, 3, 32, 32)] * count


def test_what_is_not_found_is_said(pond_run, detection_run, monkeypatch, tmp_path):
    for run, words in ((pond_run, "no pixel is predicted as 'pond'"), (detection_run, "no box of 'bar' is found")):
        monkeypatch.setattr("r2kit.explain.look.ask", lambda *given, **named: None)
        target = "pond" if run is pond_run else "bar"
        found = explain(run, target=target, limit=1, out=tmp_path / target)
        assert found.table["note"].tolist() == [words]
        assert words.replace("'", "&#39;") in (tmp_path / target / "index.html").read_text()


def test_salient_objects(salient_run, tmp_path):
    found = explain(salient_run, limit=2, out=tmp_path / "out")
    assert (found.table["class"] == "pond").all()  # whatever most pixels are


@pytest.mark.parametrize("method", [None, pytest.param("occlusion", marks=pytest.mark.slow)])
def test_the_surest_box_of_a_detector(detection_run, tmp_path, method):
    module = detection_run.datamodule()
    module.setup()
    explainer = Explainer(detection_run, method=method)
    raws = (module.source.read(int(row))[:64, :64] for row in module.split.test)
    raw, look = next((raw, look) for raw in raws if (look := explainer.look(raw)) is not None)
    scores = look.question.scores(as_input(explainer.preprocess, raw))
    assert scores.shape == (1, 2)
    assert scores[0, look.question.target].item() == pytest.approx(look.question.score)
    assert look.heat.shape == (64, 64)
    assert look.heat.max() == pytest.approx(1.0)
    if method is None:
        assert explainer.method == "hirescam"
        found = explain(detection_run, against=detection_run, limit=3, out=tmp_path / "out")
        known = found.table[found.table["score"].notna()]
        assert known["against_score"].tolist() == pytest.approx(known["score"].tolist())
        assert "lies inside the box" in found.sentences[0]


def test_several_labels(several_run, tmp_path):
    found = explain(several_run, target="field", limit=1, out=tmp_path / "out")
    assert found.table["class"].tolist() == ["field"]


def test_bands_are_chosen_for_display(finished_run, image_folder, tmp_path):
    raw = np.zeros((32, 32, 3), dtype=np.uint8)
    raw[..., 0] = 200
    turned = Explainer(finished_run, bands=["blue", "green", 1]).look(raw, "sand").picture
    assert np.abs(turned[16, 16].astype(int) - [0, 0, 200]).max() <= 1
    grey = Explainer(finished_run, bands=["red"]).look(raw, "sand").picture
    assert np.abs(grey[16, 16].astype(int) - 200).max() <= 1
    with pytest.raises(DataError, match=r"--bands: one band \(grey\) or three .* got 2"):
        Explainer(finished_run, bands=["red", "blue"])
    with pytest.raises(DataError, match=r"--bands: no band 'nir'; there are red, green, blue"):
        explain(finished_run, [image_folder / "sand" / "000.png"], bands=["nir"], out=tmp_path)


def test_energy_inside():
    heat = np.array([[3.0, 1.0], [0.0, 0.0]], dtype=np.float32)
    assert energy_inside(heat, np.array([[True, False], [True, False]])) == 0.75
    assert energy_inside(heat, np.zeros((2, 2), dtype=bool)) is None
    assert energy_inside(np.zeros((2, 2), dtype=np.float32), np.ones((2, 2), dtype=bool)) is None


@pytest.mark.parametrize("resize", ["squash", "crop", "pad", "tile"])
def test_masks_lie_where_their_images_lie(resize):
    preprocess = Preprocess(("a",), (0.0,), (1.0,), 1.0, (32, 32), resize, "nearest", ("x", "y"))
    mask = np.zeros((20, 28), dtype=bool)
    mask[5:12, 3:20] = True
    image = as_input(preprocess, mask[..., None].astype(np.float32))[0, 0].numpy()
    np.testing.assert_array_equal(mask_as_input(preprocess, mask), image > 0.5)


def test_wrong_arguments_are_one_line(finished_run, pond_run, detection_run, tmp_path, capsys):
    with pytest.raises(ModelError, match=r"--method: 'grad-cam' is none; use gradcam, .*did you mean 'gradcam'"):
        explain(finished_run, method="grad-cam")
    with pytest.raises(
        ModelError, match=r"--target: no class 'sannd'; there are field, sand, water; did you mean 'sand'"
    ):
        explain(finished_run, target="sannd", out=tmp_path)
    with pytest.raises(RunError, match=r"--against: .* is of task segmentation, and .* of classification"):
        explain(finished_run, against=pond_run)
    shutil.copytree(finished_run.path, tmp_path / "other")
    file = tmp_path / "other" / "preprocess.json"
    file.write_text(file.read_text().replace('"sand"', '"dune"'))
    with pytest.raises(RunError, match=r"--against: .*other knows no class 'sand'"):
        explain(finished_run, against=Run.open(tmp_path / "other"))
    with pytest.raises(ModelError, match=r"--method: gradcam averages gradients .* use hirescam, integrated-grad"):
        explain(detection_run, method="gradcam")
    with pytest.raises(SystemExit) as stop:
        main(["explain", str(finished_run.path), str(tmp_path / "none.png")])
    assert stop.value.code == 2
    assert "no such file or folder" in capsys.readouterr().err
