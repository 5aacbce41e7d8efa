"""The model card and the way to the hub: true to the stored figures, readable by timm, and sent nowhere in a test."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from r2kit import result
from r2kit.catalog import CATALOG
from r2kit.cli import main
from r2kit.data.preprocess import Preprocess
from r2kit.errors import RunError
from r2kit.models import build_model
from r2kit.push import push, timm_config
from r2kit.recipe import ModelSpec
from r2kit.report.card import card_of, licence_words
from r2kit.run import Run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


class FakeApi:
    """Records what would have been sent."""

    calls: list = []  # noqa: RUF012  reset by the fixture

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = {file.name: file.read_bytes() for file in folder_path.iterdir()}
        self.calls.append(("upload", repo_id, files))


@pytest.fixture
def hub(monkeypatch):
    FakeApi.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return FakeApi.calls


def test_every_run_has_a_card_whose_numbers_are_the_stored_ones(finished_run):
    text = finished_run.card.read_text(encoding="utf-8")
    figures = json.loads(finished_run.metrics_json.read_text())
    flat = " ".join(text.replace("\u00a0", " ").split())
    assert result.with_interval(figures["accuracy"]) in flat
    assert finished_run.info["data"]["fingerprint"] in flat
    for title in ("Intended use", "Data", "Result", "Limits", "Licence of the weights", "How to use it"):
        assert f"\n## {title}\n" in text
    assert "Trained from random weights" in flat
    assert str(finished_run.path.parent) not in text
    assert str(finished_run.recipe.data.root) not in text  # where the data lay is nobody's business
    data = huggingface_hub.ModelCard(text).data
    assert data.pipeline_tag == "image-classification"
    assert data.library_name == "timm"
    assert data.eval_results[0].metric_value == pytest.approx(figures["accuracy"]["value"], abs=1e-4)


@pytest.mark.parametrize(
    ("fixture", "pipeline"),
    [
        ("several_run", "image-classification"),
        ("pond_run", "image-segmentation"),
        ("salient_run", "image-segmentation"),
        ("detection_run", "object-detection"),
    ],
)
def test_every_task_has_a_card(request, fixture, pipeline):
    run = request.getfixturevalue(fixture)
    text = run.card.read_text(encoding="utf-8")
    card = huggingface_hub.ModelCard(text)
    assert card.data.pipeline_tag == pipeline
    assert run.recipe.task.kind in card.data.tags
    assert "95" in text.split("## Result")[1].split("## Limits")[0]  # intervals
    assert ("hf-hub:" in text) == (fixture == "several_run")


def test_names_from_strangers_stay_in_their_line(finished_run, tmp_path):
    evil = "x |\n# Injected <script>alert(1)</script> `rm`"
    shutil.copytree(finished_run.path, tmp_path / "run")
    for name in ("preprocess.json", "metrics.json"):
        file = tmp_path / "run" / name
        file.write_text(file.read_text().replace('"sand"', json.dumps(evil)))
    text = card_of(Run.open(tmp_path / "run"))
    assert "\n# Injected" not in text
    assert "<script>" not in text
    assert text.count("\n# ") == 1


def test_licences_of_starting_weights(finished_run, tmp_path, monkeypatch):
    for name, pretrained, words in (
        ("resnest50d", True, "`timm/resnest50d.in1k`: their licence is apache-2.0"),
        ("res2net50d", True, "their keeper states no licence"),
        ("resnet18", True, "published weights of `resnet18`"),
        ("resnet18", "somewhere/mine.pth", "weights in `mine.pth`, whose licence r2kit does not know"),
    ):
        run = Run(finished_run.path)
        spec = run.recipe.model.model_copy(update={"name": name, "pretrained": pretrained})
        run.recipe = run.recipe.model_copy(update={"model": spec})
        assert words in licence_words(run)


def test_push_sends_what_a_stranger_needs_and_no_predictions(finished_run, hub):
    files = push(finished_run, "someone/quick", private=True)
    assert [call[0] for call in hub] == ["token", "create", "upload"]
    assert hub[1] == ("create", "someone/quick", True, True)
    sent = hub[2][2]
    assert set(sent) == {name for name, _ in files}
    assert set(sent) == {
        "README.md",
        "config.json",
        "metrics.csv",
        "metrics.json",
        "model.safetensors",
        "preprocess.json",
        "recipe.yaml",
        "report.html",
        "run.json",
    }
    assert b"hf-hub:someone/quick" in sent["README.md"]
    assert b"hf_secret" not in b"".join(sent.values())


def test_timm_opens_what_was_pushed(finished_run, hub, tmp_path):
    push(finished_run, "someone/quick")
    for name, content in hub[2][2].items():
        (tmp_path / name).write_bytes(content)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(image), finished_run.model()(image))
        torch.testing.assert_close(Run.open(tmp_path).model()(image), finished_run.model()(image))
    assert tuple(model.pretrained_cfg["mean"]) == pytest.approx(finished_run.preprocess.mean)
    assert model.pretrained_cfg["label_names"] == list(finished_run.preprocess.classes)


def test_timm_keeps_the_stem_of_many_bands(finished_run, tmp_path):
    run = Run(finished_run.path)
    bands = tuple(f"b{i}" for i in range(5))
    run.preprocess = Preprocess(bands, (0.5,) * 5, (0.2,) * 5, 1.0, (32, 32), "squash", "bilinear", ("x", "y"))
    model = build_model(ModelSpec(name="test_resnet"), num_classes=2, bands=bands).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(timm_config(run)))
    image = torch.randn(1, 5, 32, 32)
    with torch.no_grad():
        found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(image)
        np.testing.assert_allclose(found, model(image), rtol=1e-5)


def test_a_dry_run_needs_no_token_and_sends_nothing(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    with pytest.raises(SystemExit) as stop:
        main(["push", str(finished_run.path), "someone/quick", "--dry-run"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert "model.safetensors" in told
    assert "nothing was sent" in told


def test_what_cannot_be_pushed_is_one_line(finished_run, hub, monkeypatch, capsys):
    for name in ("quick", "a/b/c", "some one/quick"):
        with pytest.raises(RunError, match="is no name of a repository"):
            push(finished_run, name)
    for error in (OSError("no route"), huggingface_hub.errors.HTTPError("no route\nand more")):
        monkeypatch.setattr(FakeApi, "create_repo", lambda *given, error=error, **named: (_ for _ in ()).throw(error))
        with pytest.raises(RunError, match=r"someone/quick: the hub did not take it: no route; see hf auth whoami"):
            push(finished_run, "someone/quick")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SystemExit) as stop:
        main(["push", str(finished_run.path), "someone/quick"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error == "error: r2kit push needs a token of the Hugging Face hub: run hf auth login, or set HF_TOKEN\n"


def test_networks_that_r2kit_registers_are_imported_first(finished_run):
    run = Run(finished_run.path)
    name = next(entry.name for entry in CATALOG if entry.owner == "r2kit")
    run.recipe = run.recipe.model_copy(update={"model": run.recipe.model.model_copy(update={"name": name})})
    assert "import r2kit.backbones\nimport timm" in card_of(run)
    assert "import r2kit.backbones" not in card_of(finished_run)
