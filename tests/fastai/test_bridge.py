"""A learner from a recipe or a run, what fastai does with it, and the way back to a run folder."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from rich.console import Console
from torch import nn

from r2kit.cli import main
from r2kit.errors import DataError, RecipeError, RunError
from r2kit.optim import parameter_groups
from r2kit.recipe import TrainSpec
from r2kit.recipe_file import load_recipe
from r2kit.run import Run
from r2kit.train.again import reproduce
from r2kit.train.fit import fit
from r2kit.train.prepare import prepare
from r2kit.train.signals import StopSignals
from tests.conftest import make_images
from tests.fastai.marks import FASTAI

pytestmark = [*FASTAI, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Twelve pictures of 40 x 40 pixels in two brightnesses, and masks of 0, 255 and a border that is not known."""
    root = tmp_path_factory.mktemp("masks")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir()
    for index in range(12):
        mask = np.zeros((40, 40), dtype=np.uint8)
        mask[10 : 20 + index, 5:30] = 255
        pixels = 60 + mask[..., None] / 2 + rng.normal(0, 20, (40, 40, 3))
        mask[:2] = 7
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """24 pictures: green with the label field, bright with sand, both or none of them."""
    root, rng, rows = tmp_path_factory.mktemp("several"), np.random.default_rng(0), []
    for i in range(24):
        names = [name for name, here in (("field", i % 2), ("sand", i % 3 == 0)) if here]
        pixels = rng.normal(60, 20, (24, 24, 3)) + np.array([0, 90, 0]) * (i % 2) + 60 * (i % 3 == 0)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{i:02d}.png")
        rows.append({"path": f"{i:02d}.png", "label": ";".join(names)})
    pd.DataFrame(rows).to_csv(root / "images.csv", index=False)
    return root / "images.csv"


@pytest.fixture
def recipes(image_folder, masks, table):
    """A recipe of each kind that learners are made for, with everything that varies images and losses."""
    shared = {
        "seed": 3,
        "model": {"name": "test_resnet", "drop_rate": 0.2, "drop_path_rate": 0.1},
        "train": {"epochs": 2, "batch_size": 8, "lr": 3e-3},
    }
    size = {"image_size": 32, "workers": 0}
    return {
        "classification": {
            **shared,
            "data": {"root": str(image_folder), **size},
            "task": {"label_smoothing": 0.1, "class_weights": "effective_number"},
            "augment": {"mixup": 0.4, "cutmix": 0.4, "mix_off_epochs": 1},
        },
        "multilabel": {
            **shared,
            "data": {"root": str(table), **size},
            "task": {"kind": "multilabel", "loss": "asymmetric"},
            "augment": {"mixup": 0.5},
        },
        "segmentation": {
            **shared,
            "data": {"root": str(masks), **size, "masks": {"classes": {"low": 0, "high": 255}, "ignore": [7]}},
            "model": {"name": "test_resnet", "drop_path_rate": 0.1},
            "task": {"kind": "segmentation", "decoder": "fpn", "loss": {"dice": 0.5}, "class_weights": "balanced"},
            "augment": {"cutmix": 0.5},
        },
    }


@pytest.fixture
def plain(recipes, tmp_path):
    """The classification without mixing of its own, and where its learner keeps its files."""
    return {**recipes["classification"], "task": {}, "augment": {}}, tmp_path


def quiet(learn):
    """Let a learner work without printing."""
    learn.logger, learn.create_mbar = (lambda *_: None), False
    learn.remove_cbs(learn.cbs.filter(lambda cb: type(cb).__name__ == "ProgressCallback"))
    return learn


class Spy(Callback):
    """Keeps the training batches and losses of Lightning."""

    def __init__(self):
        self.batches, self.losses = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append({key: value.clone() for key, value in batch.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def by_lightning(recipe, folder):
    """Train with Lightning; return its batches, its losses and its metrics by epoch."""
    checked, console, spy = load_recipe(recipe), Console(quiet=True), Spy()
    job = prepare(checked, console)
    run = Run.create(checked, folder)
    with StopSignals() as signals:
        recorder = fit(job, run, console, signals, extra=[spy])
    return spy.batches, spy.losses, recorder.rows


def by_fastai(fa, recipe, folder):
    """Train with fastai; return its batches, its losses and the rows of its epochs."""
    learn = quiet(fa.recipe_learner(recipe, path=folder))
    batches, losses, key = [], [], learn.recipe.task.target

    class Spying(fa.Callback):
        order = 50

        def before_batch(self):
            if self.training:
                batches.append({"image": self.xb[0].clone(), key: self.yb[0].clone()})

        def after_loss(self):
            if self.training:
                losses.append(float(self.loss.detach()))

    learn.fit_one_cycle(2, cbs=Spying())
    return batches, losses, learn.recipe.rows


@pytest.mark.parametrize("kind", ["classification", "multilabel", "segmentation"])
def test_a_learner_sees_what_lightning_sees(fa, recipes, tmp_path, kind):
    ours, theirs = by_lightning(recipes[kind], tmp_path / "run"), by_fastai(fa, recipes[kind], tmp_path)
    assert len(ours[0]) == len(theirs[0]) >= 2  # two passes
    for mine, other in zip(ours[0], theirs[0], strict=True):
        for key, value in other.items():
            assert torch.equal(mine[key], value), key
    assert not torch.equal(ours[0][0]["image"], ours[0][len(ours[0]) // 2]["image"])  # each pass has its own
    assert theirs[1][0] == pytest.approx(ours[1][0], abs=1e-5)
    assert list(ours[2][0]) == list(theirs[2][0])
    assert all(np.isfinite(list(row.values())).all() for row in theirs[2])


def test_fastai_s_training_and_looking_work_on_a_recipe(fa, plain, image_folder):
    recipe, folder = plain
    learn = quiet(fa.recipe_learner(recipe, path=folder))
    assert learn.lr == 3e-3
    assert list(learn.dls.vocab) == ["field", "sand", "water"]
    head = {id(parameter) for parameter in learn.model.get_classifier().parameters()}
    before = {name: value.clone() for name, value in learn.model.named_parameters()}

    learn.freeze()
    found = learn.lr_find(num_it=6, stop_div=False, show_plot=False)
    assert 0 < found.valley < 10
    assert learn.recipe.passes == learn.recipe.steps == 0  # the trial does not count
    assert all(torch.equal(value, before[name]) for name, value in learn.model.named_parameters())

    learn.fit_one_cycle(1, cbs=fa.MixUp())
    norms = (nn.BatchNorm2d,)
    inside = {id(p) for m in learn.model.modules() if isinstance(m, norms) for p in m.parameters()}
    moved = {id(p) for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}
    assert head <= moved <= head | inside  # fastai trains frozen norms
    learn.fine_tune(1, 1e-2, cbs=fa.CutMix())
    assert learn.recipe.passes == 3
    assert [fit["frozen_groups"] for fit in learn.recipe.fits] == [2, 2, 0]
    assert [fit["callbacks"][-1] for fit in learn.recipe.fits] == ["MixUp", "CutMix", "CutMix"]
    assert all(np.isnan(row["train_acc"]) for row in learn.recipe.rows)  # mixed by fastai: of no class alone
    assert all(np.isfinite(row["train_loss"]) for row in learn.recipe.rows)

    learn.fit(2, 3e-3)
    assert np.isfinite(learn.recipe.rows[-1]["train_acc"])
    loss, accuracy, f1 = learn.validate()
    assert (loss, accuracy, f1) == pytest.approx(
        [learn.recipe.rows[-1][name] for name in ("val_loss", "val_acc", "val_f1")]
    )

    learn.dls.show_batch(max_n=4)
    learn.dls.show_batch(max_n=2, unique=True)
    learn.show_results(max_n=4)
    learn.show_results(ds_idx=0, max_n=4)
    seen = fa.ClassificationInterpretation.from_learner(learn)
    matrix = seen.confusion_matrix()
    assert matrix.sum() == len(learn.dls.valid_ds)
    assert np.trace(matrix) / matrix.sum() == pytest.approx(accuracy)
    seen.plot_top_losses(3)
    seen.plot_confusion_matrix()
    seen.print_classification_report()
    losses, positions = seen.top_losses(2)
    item = learn.dls.valid_ds.items[int(positions[0])]
    image, target = learn.dls.valid_ds[int(positions[0])]
    with torch.no_grad():
        logits = learn.model.eval()(image.as_subclass(torch.Tensor)[None])
    assert float(losses[0]) == pytest.approx(
        float(nn.functional.cross_entropy(logits, target.as_subclass(torch.Tensor)[None])), abs=1e-5
    )
    fa.plt.close("all")

    # The same image by its id and as a file beside the data.
    name, number, probs = learn.predict(item)
    again = learn.predict(image_folder / item)
    assert name == again[0] == learn.dls.vocab[int(number)]
    torch.testing.assert_close(probs, again[2])
    shown = learn.dls.train.decode(learn.dls.train.one_batch())[0]
    assert shown.min() >= 0
    assert shown.max() <= 1


def test_predictions_of_the_training_images_come_in_their_order_and_not_augmented(fa, plain):
    learn = quiet(fa.recipe_learner(plain[0], path=plain[1]))
    first, _ = learn.get_preds(ds_idx=0)
    second, labels = learn.get_preds(dl=learn.dls.train)
    torch.testing.assert_close(first, second)
    expected = learn.recipe.data.labels[learn.dls.train_ds.rows]
    assert labels.tolist() == expected.tolist()


def test_a_learner_of_a_run_is_the_run_s_network_on_its_data(fa, finished_run, tmp_path):
    learn = quiet(fa.run_learner(finished_run.path, path=tmp_path))
    best = pd.read_csv(finished_run.metrics_csv).iloc[finished_run.info["best_epoch"]]
    assert list(learn.validate()) == pytest.approx([best["val_loss"], best["val_acc"], best["val_f1"]], abs=1e-5)
    split = pd.read_parquet(finished_run.split_file)
    assert set(learn.dls.valid_ds.items) == set(split[split["split"] == "val"]["id"])
    assert learn.recipe.source.model.pretrained == str(finished_run.path)


@pytest.fixture(scope="module")
def kept(fa, image_folder, tmp_path_factory):
    """A run folder of a network that fastai trained."""
    folder = tmp_path_factory.mktemp("kept")
    recipe = {
        "name": "kept",
        "seed": 3,
        "data": {"root": str(image_folder), "image_size": 32, "workers": 0},
        "model": {"name": "test_resnet"},
        "train": {"epochs": 30, "batch_size": 8, "lr": 3e-3},
    }
    learn = quiet(fa.recipe_learner(recipe, path=folder))
    learn.fit_one_cycle(2, 5e-3)
    learn.fit_one_cycle(1, 1e-3, cbs=fa.MixUp())
    return learn, fa.save_run(learn, folder / "run")


def command(capsys, *arguments):
    """Return (exit code, standard output, standard error) of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_a_trained_learner_becomes_a_run_that_every_command_accepts(fa, kept, image_folder, tmp_path, capsys):
    learn, run = kept
    _, accuracy, _ = learn.validate()
    code, _, err = command(capsys, "evaluate", run.path, "--split", "val")
    assert (code, err) == (0, "")
    assert json.loads((run.path / "metrics_val.json").read_text())["accuracy"]["value"] == pytest.approx(accuracy)

    file = image_folder / "sand" / "000.png"
    code, _, err = command(capsys, "predict", run.path, file, "--out", tmp_path / "table.csv")
    assert (code, err) == (0, "")
    said = pd.read_csv(tmp_path / "table.csv").iloc[0]
    name, _, probs = learn.predict(file)
    assert said["class"] == name
    assert said[[f"prob_{c}" for c in learn.dls.vocab]].to_numpy(float) == pytest.approx(probs.numpy(), abs=1e-5)

    code, _, err = command(capsys, "report", run.path)
    assert (code, err) == (0, "")
    page = " ".join(run.report.read_text().split())
    assert "3 epochs" in page
    fits = r"2 epochs with Adam, learning rate at most 0\.00\d+ \(ParamScheduler\); then 1 epoch with Adam"
    assert re.search(fits, page)
    assert "(ParamScheduler, MixUp)" in page
    assert "learning rate, at most" not in page
    assert "the same run again" not in page
    card = (run.path / "model_card.md").read_text()
    assert "3 epochs with Adam and fastai" in card
    assert "trains it again" not in card
    rows = pd.read_csv(run.metrics_csv)
    assert rows["epoch"].tolist() == [0, 1, 2]
    assert np.isnan(rows["train_acc"].iloc[-1])


def test_the_run_is_explained(kept, tmp_path, capsys):
    code, out, err = command(capsys, "explain", kept[1].path, "--limit", 2, "--out", tmp_path / "explained")
    assert (code, err) == (0, "")
    assert "written" in out
    assert (tmp_path / "explained" / "index.html").is_file()


@pytest.mark.filterwarnings("ignore")  # exporters deprecate parts of themselves in every release
def test_the_run_is_exported(kept, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    code, _, err = command(capsys, "export", kept[1].path, "--to", "onnx", "--out", tmp_path)
    assert code == 0, err
    assert (tmp_path / "model.onnx").is_file()


def test_the_run_goes_back_into_fastai_and_cannot_be_reproduced(fa, kept, tmp_path):
    learn, run = kept
    again = quiet(fa.run_learner(run, path=tmp_path))
    assert list(again.validate()) == pytest.approx(list(learn.validate()), abs=1e-6)
    with pytest.raises(RunError, match="was trained with fastai, and what fastai did is not in its recipe"):
        reproduce(run.path)
    with pytest.raises(RunError, match="holds a run already"):
        fa.save_run(learn, run.path)


@pytest.mark.parametrize("kind", ["multilabel", "segmentation"])
def test_other_kinds_are_trained_shown_and_kept(fa, recipes, tmp_path, kind):
    learn = quiet(fa.recipe_learner({**recipes[kind], "augment": {}}, path=tmp_path))
    learn.fine_tune(1, 1e-2)
    learn.show_results(max_n=2)
    seen = fa.Interpretation.from_learner(learn)
    seen.plot_top_losses(2)
    fa.plt.close("all")
    run = fa.save_run(learn, tmp_path / "run")
    found = json.loads(run.metrics_json.read_text())
    assert found["task"] == kind
    assert "Trained with fastai" in run.report.read_text()
    item = learn.dls.valid_ds.items[0]
    assert learn.predict(item)[2].shape[0] == 2


# ------------------------------------------------------------------------------------------------- one clear line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": {"kind": "saliency"}}, "task.kind: fastai learners are for classification, multilabel, segmentation"),
        ({"task": {"kind": "detection"}}, "not for detection; train it with r2kit finetune"),
        ({"task": {"kind": "segmentation"}, "data": {"resize": "tile"}}, "does not validate in tiles; use squash"),
        (
            {"model": {"name": "res2netplus50d", "pretrained": True, "warm_start": True}},
            "model.warm_start: the activation turns over the whole training",
        ),
    ],
)
def test_what_a_learner_cannot_do_is_refused_before_the_data_is_read(fa, changes, said):
    data = {"root": "no/such/folder", **changes.get("data", {})}
    with pytest.raises(RecipeError, match=said):
        fa.recipe_learner({**changes, "data": data})


def test_what_fastai_does_otherwise_is_named(fa, plain):
    recipe, folder = plain
    train = {**recipe["train"], "epochs": 9, "ema": True, "freeze": "backbone", "unfreeze": [3], "schedule": "constant"}
    said = r"not used by a fastai learner: train.ema, train.freeze, train.unfreeze; fastai has callbacks"
    with pytest.warns(UserWarning, match=said):
        learn = quiet(fa.recipe_learner({**recipe, "train": train}, path=folder))
    assert all(parameter.requires_grad for parameter in learn.model.parameters())
    learn.fit(1, 2e-3)
    kept = Run.open(fa.save_run(learn, folder / "run").path).recipe.train
    assert (kept.epochs, kept.ema, kept.freeze, kept.unfreeze) == (1, False, "none", ())  # what was done
    assert kept.lr == pytest.approx(2e-3)


def test_images_are_mixed_by_one_of_the_two(fa, recipes, tmp_path):
    learn = quiet(fa.recipe_learner(recipes["classification"], path=tmp_path))
    with pytest.raises(RecipeError, match="fastai's MixUp would mix them once more"):
        learn.fit(1, cbs=fa.MixUp())
    learn = quiet(fa.recipe_learner({**recipes["segmentation"], "augment": {}}, path=tmp_path))
    with pytest.raises(RecipeError, match="CutMix: fastai's mixing is for classes of whole images"):
        learn.fit(1, cbs=fa.CutMix())


def test_items_are_ids_or_files(fa, plain, tmp_path_factory):
    learn = quiet(fa.recipe_learner(plain[0], path=plain[1]))
    with pytest.raises(DataError, match=r"sand/00O.png: neither a file nor an id of this data; did you mean"):
        learn.predict("sand/00O.png")
    other = make_images(tmp_path_factory.mktemp("other") / "tiles", 1) / "sand" / "000.png"
    with pytest.raises(DataError, match="is no id of this data, so it has no label"):
        learn.dls.test_dl([other], with_labels=True)
    other.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"000\.png"):
        learn.predict(other)


def test_a_run_folder_needs_what_only_these_learners_know(fa, plain, tmp_path):
    recipe, folder = plain
    learn = quiet(fa.recipe_learner(recipe, path=folder))
    with pytest.raises(RunError, match=r"learn.export: .* use save_run\(learn, 'runs/NAME'\)"):
        learn.export("model.pkl")
    other = fa.Learner(learn.dls, learn.model, loss_func=learn.loss_func, path=folder)
    with pytest.raises(RunError, match="which only a learner of recipe_learner or run_learner has"):
        fa.save_run(other, tmp_path / "run")
    learn.model = nn.Sequential(learn.model)
    with pytest.raises(RunError, match="another model than that of its recipe"):
        fa.save_run(learn, tmp_path / "run")


def test_the_three_groups_are_those_of_lr_scales(fa, plain):
    learn = fa.recipe_learner(plain[0], path=plain[1])
    ours = parameter_groups(learn.model, TrainSpec(lr_scales=(0.1, 0.5, 1.0)))
    for scale, group in zip((0.1, 0.5, 1.0), learn.splitter(learn.model), strict=True):
        expected = {id(p) for g in ours if g["lr_scale"] == scale for p in g["params"]}
        assert {id(parameter) for parameter in group} == expected
