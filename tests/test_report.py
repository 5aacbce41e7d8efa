"""The report: self-contained, escaped, true to the stored files, and fit for a phone."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

import r2kit
from r2kit import result
from r2kit.dense.metrics import class_iou
from r2kit.errors import DataError, RunError
from r2kit.explain import available
from r2kit.report import classification as report
from r2kit.report import write_report
from r2kit.report.places import figure_by_group
from r2kit.result.paired import FIGURES, judge_run
from r2kit.run import Run, write_atomic
from tests.browser import CHROMIUM, lay_out
from tests.browser import run as run_browser
from tests.conftest import make_images

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]

EVIL = "<img src=x onerror=alert(1)>\"'&{{ 7*7 }}$\\frac{"
LONG = "a_very_long_class_name_without_any_place_to_break_it" * 2


class Page(HTMLParser):
    """Tags with their attributes, and the text outside style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open, self.skip = [], "", [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # every tag is closed, in order

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data.replace("\u00a0", " ")


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture(scope="module")
def written(finished_run):
    return finished_run.report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def odd_run(quick_recipe, tmp_path_factory):
    """A run whose classes have the names that a stranger could give them."""
    folder = make_images(tmp_path_factory.mktemp("odd") / "tiles", 12)
    (folder / "sand").rename(folder / EVIL)
    (folder / "water").rename(folder / LONG)
    recipe = {**quick_recipe, "data": {**quick_recipe["data"], "root": str(folder)}}
    recipe["train"] = {"epochs": 1, "warmup_epochs": 0.0, "batch_size": 8, "lr": 1e-6}  # untrained: mistakes to show
    return r2kit.finetune(recipe, out=tmp_path_factory.mktemp("runs") / "odd", quiet=True)


def test_the_page_is_self_contained(written):
    page = Page(written)
    assert page.open == []
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes[name][:80])
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in written
    assert "http" not in re.sub(r'http-equiv="', "", page.text)
    assert any(a.get("http-equiv") == "Content-Security-Policy" for t, a in page.tags if t == "meta")
    assert len(written) < 3_000_000


def test_every_picture_has_words_and_every_chart_a_dark_form(written):
    tags = Page(written).tags
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert all(attributes["alt"] for attributes in images)
    charts = [attributes for tag, attributes in tags if tag == "source"]
    assert len(charts) >= 4
    assert all("screen and (prefers-color-scheme: dark)" in attributes["media"] for attributes in charts)
    anchors = {attributes["href"][1:] for tag, attributes in tags if tag == "a"}
    assert anchors == {attributes["id"] for tag, attributes in tags if tag == "section"}


def test_the_numbers_on_the_page_are_the_stored_ones(finished_run, written):
    figures = json.loads(finished_run.metrics_json.read_text())
    text = " ".join(Page(written).text.split())
    assert result.headline(figures) in text
    assert result.verdict(figures) in text
    for row in figures["per_class"]:
        assert result.percent(row["recall"]["value"]) in text
    info = finished_run.info
    assert f"{info['model']['parameters']:,}".replace(",", "\u2009") in Page(written).text
    assert info["data"]["fingerprint"] in text
    assert f"torch {info['versions']['torch']}" in text
    assert f"Seed {finished_run.recipe.seed}" in text
    assert f"weights of epoch {info['best_epoch'] + 1} were kept" in text


def test_the_plots_are_kept_as_files(finished_run):
    names = {file.stem for file in finished_run.plots.iterdir()}
    assert {"batch", "confusion", "curves", "predictions", "recall", "reliability"} <= names


def test_text_from_strangers_is_escaped(odd_run):
    text = odd_run.report.read_text(encoding="utf-8")
    assert EVIL not in text
    assert "<img src=x" not in text
    page = Page(text)
    assert page.open == []
    assert EVIL in page.text
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert any(EVIL in attributes.get("alt", "") for tag, attributes in page.tags if tag == "img")


def test_a_run_without_a_result_is_refused(run):
    run.metrics_json.unlink()
    with pytest.raises(RunError, match=r"has no result yet; run r2kit evaluate"):
        write_report(run)
    run.metrics_json.write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        write_report(run)


def test_figures_that_are_not_those_of_the_predictions_are_refused(run):
    table = pd.read_parquet(run.predictions("test"))
    table.iloc[:-1].to_parquet(run.predictions("test"))
    with pytest.raises(RunError, match="do not agree; run r2kit evaluate"):
        write_report(run)
    run.predictions("test").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        write_report(run)


def test_without_the_images_the_page_says_what_is_missing(run, monkeypatch):
    def gone(self):
        raise DataError("tiles: no such folder")

    monkeypatch.setattr(Run, "datamodule", gone)
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "tiles: no such folder" in text
    assert "No Grad-CAM panels" in text
    assert "What is taken for what" in text


def test_without_captum_the_page_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr("r2kit.explain.available", lambda: False)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert 'pip install "r2kit[explain]"' in page.text
    assert "r2kit report" in page.text


def test_grad_cam_panels_come_in_pairs(finished_run, written):
    pytest.importorskip("captum", reason="captum (extra explain) is not installed")
    alts = [attributes["alt"] for tag, attributes in Page(written).tags if tag == "img"]
    evidence = [place for place, alt in enumerate(alts) if alt.startswith("evidence for ")]
    assert 1 <= len(evidence) <= 8
    for place in evidence:  # behind the picture of the same image: TRUE → PREDICTED 90 %, or PREDICTED 90 %
        assert alts[place - 1].split(" → ")[-1].startswith(alts[place].removeprefix("evidence for "))
    assert (finished_run.plots / "gradcam.png").is_file()


def placed(run, folder):
    """A copy of a run whose stored images lie in blocks of two."""
    shutil.copytree(run.path, folder)
    copy = Run.open(folder)
    split = json.loads(copy.metrics_json.read_text())["split"]
    table = pd.read_parquet(copy.predictions(split))
    images = table["kind"] == "image" if "kind" in table else pd.Series(True, index=table.index)
    count = int(images.sum())
    table["group"] = table["group"].astype(object)
    for column, values in (
        ("lon", np.linspace(0, 40, count)),
        ("lat", np.linspace(0, 20, count)),
        ("group", [f"b{i // 2}" for i in range(count)]),
    ):
        table.loc[images, column] = values
    table.to_parquet(copy.predictions(split))
    return copy, table


def test_maps_are_drawn_where_images_have_places(finished_run, tmp_path):
    run, table = placed(finished_run, tmp_path / "run")
    figures = {
        **result.compute(table, run.preprocess.classes, split="test"),
        "predictions": "predictions_test.parquet",
    }
    write_atomic(run.metrics_json, json.dumps(figures))
    text = write_report(run).read_text(encoding="utf-8")
    assert "Where it is right" in text
    assert "spatial block" in text
    assert (run.plots / "block_accuracy.png").is_file()
    right = (table["label"] == table["pred"]).groupby(table["group"]).mean()
    assert figure_by_group(judge_run(run)).to_dict() == pytest.approx(right.to_dict())


@pytest.mark.parametrize("fixture", ["several_run", "pond_run", "salient_run", "detection_run"])
def test_every_task_has_its_figure_by_block(request, fixture, tmp_path, monkeypatch):
    run, table = placed(request.getfixturevalue(fixture), tmp_path / "run")

    def gone(self):
        raise DataError("the images are gone")

    monkeypatch.setattr("r2kit.data.datamodule.DataModule.setup", gone)  # the maps need none
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.open == []
    assert "Where it is right" in page.text
    figure = FIGURES[run.recipe.task.kind]
    assert any(a.get("alt", "").lower() == f"{figure.lower()} by block" for _, a in page.tags)
    found = figure_by_group(judge_run(run))
    if fixture == "pond_run":
        count = len(run.preprocess.classes)
        counts = np.stack(table["confusion"]).reshape(-1, count, count)
        slow = [class_iou(counts[rows].sum(0)).mean() for rows in table.groupby("group").indices.values()]
        assert found.to_list() == pytest.approx(slow)
    assert ((found >= 0) & (found <= 1) | found.isna()).all()


def test_recorded_commands_are_quoted(run):
    run.write_info(command="/somewhere/bin/r2kit finetune 'my recipe.yaml' seed=4")
    commands = report.commands_of(run)
    assert commands[1].startswith("r2kit finetune 'my recipe.yaml' seed=4")
    run.write_info(command="pytest 'unbalanced")
    assert not any(command.startswith("pytest") for command in report.commands_of(run))


@pytest.mark.parametrize("fixture", ["finished_run", "several_run", "pond_run", "salient_run", "detection_run"])
def test_what_was_decided_and_done_is_said_not_what_was_asked(request, fixture, tmp_path, monkeypatch):
    shutil.copytree(request.getfixturevalue(fixture).path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    asked = run.recipe.train.model_copy(update={"lr": "auto", "batch_size": "auto", "epochs": 70})
    monkeypatch.setitem(run.__dict__, "recipe", run.recipe.model_copy(update={"train": asked}))
    run.write_info(decided={"batch_size": 6, "accumulate": 2, "lr": 0.00123})
    trained = len(pd.read_csv(run.metrics_csv))
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **rest: Image.new("RGB", (8, 8)).save(target, "PNG"))
    text = " ".join(re.sub(r"<[^>]+>", " ", write_report(run).read_text(encoding="utf-8")).split())
    assert "learning rate, at most 0.00123 " in text
    assert "batch size 2 × 6 " in text  # noqa: RUF001  the sign that a reader sees
    assert re.search(rf"{trained} epochs? of at most 70;", text)
    assert "What it costs" in text
    assert re.search(rf"{trained} epochs? with", run.card.read_text(encoding="utf-8"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to lay the page out")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_its_width_in_a_browser(odd_run, tmp_path, theme):
    found, complaints = lay_out({"odd": odd_run.report.read_text(encoding="utf-8")}, tmp_path, theme=theme)
    dark = theme == "dark"
    assert found == {("odd", 380): (380, dark, 0), ("odd", 1200): (1200, dark, 0)}
    assert complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to lay the page out")
def test_the_pages_of_all_tasks_fit_a_phone(request, tmp_path):
    fixtures = ("finished_run", "several_run", "pond_run", "salient_run", "detection_run")
    pages = {name: request.getfixturevalue(name).report.read_text(encoding="utf-8") for name in fixtures}
    found, complaints = lay_out(pages, tmp_path, theme="light", widths=(380,))
    assert found == {(name, 380): (380, False, 0) for name in fixtures}
    assert complaints == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to print the page")
def test_the_page_prints(odd_run, tmp_path):
    run_browser([f"--print-to-pdf={tmp_path / 'page.pdf'}", f"file://{odd_run.report.resolve()}"], tmp_path)
    pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes()))
    assert 2 <= pages <= 12


@pytest.mark.parametrize("fixture", ["finished_run", "several_run", "pond_run", "salient_run", "detection_run"])
def test_every_task_says_what_a_reader_needs(request, fixture):
    run = request.getfixturevalue(fixture)
    text = run.report.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes[name][:80])
    sections = {attributes["id"] for tag, attributes in page.tags if tag == "section"}
    assert {"result", "data", "gradcam", "training", "reproduce"} <= sections
    anchors = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert anchors == sections
    assert run.info["data"]["fingerprint"] in text
    assert f"torch {run.info['versions']['torch']}" in page.text
    assert "95" in page.text
    if available():
        assert any(a.get("alt", "").startswith("evidence for ") for tag, a in page.tags if tag == "img")
        assert (run.plots / "gradcam.png").is_file()
