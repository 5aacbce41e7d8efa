import csv
import subprocess
import sys

import pytest

import r2kit
from r2kit.errors import MissingExtraError, RecipeError, RunError
from r2kit.recipe_file import load_recipe, to_yaml

optuna = pytest.importorskip("optuna")
from r2kit.tune import Axis, tune  # noqa: E402

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]
SPACE = ["train.lr=1e-4..1e-2:log", "train.optimizer=adamw,sgd"]


def table(path):
    return list(csv.DictReader((path / "trials.csv").read_text().splitlines()))


def test_axes_are_read():
    assert Axis.parse("train.lr=1e-4..1e-2:log") == Axis("train.lr", 1e-4, 1e-2, log=True)
    assert Axis.parse("model.drop_path_rate=0..0.3") == Axis("model.drop_path_rate", 0.0, 0.3)
    assert Axis.parse("train.epochs = 2..10") == Axis("train.epochs", 2.0, 10.0, whole=True)
    assert Axis.parse("x=0.5..2.5") == Axis("x", 0.5, 2.5)
    assert Axis.parse("train.ema=true, false").choices == ("true", "false")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr", "--space: got 'train.lr', allowed is key=low..high"),
        ("train.lr=3", "a list has two or more different values"),
        ("train.lr=a..b", "the ends of a range are numbers"),
        ("train.lr=2..1", "low must be below high"),
        ("train.lr=0..1:log", "above 0 with :log"),
    ],
)
def test_what_is_no_axis_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        Axis.parse(text)


def test_the_space_passes_the_checks_of_a_recipe(quick_recipe, tmp_path):
    for space, message in (
        (["train.lrr=1..2"], r"train\.lrr: unknown key; did you mean 'train\.lr'"),
        (["model.drop_path_rate=0..2"], r"model\.drop_path_rate: got 2"),
        (["train.lr=1..2", "train.lr=3..4"], r"a key is named twice: train\.lr"),
        ([], "name at least one key"),
    ):
        with pytest.raises(RecipeError, match=message):
            tune(quick_recipe, space=space, out=tmp_path / "never", quiet=True)
    assert not (tmp_path / "never").exists()


def test_two_processes_share_a_search_that_goes_on_to_a_recipe(quick_recipe, tmp_path):
    file = tmp_path / "quick.yaml"
    file.write_text(to_yaml(load_recipe(quick_recipe, ["train.epochs=1"])))
    command = [sys.executable, "-m", "r2kit", "tune", str(file), "--trials", "3", "--out", str(tmp_path / "search")]
    command += [part for item in SPACE for part in ("--space", item)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    rows = table(tmp_path / "search")
    assert 3 <= len(rows) <= 4  # both may be at their last trial at once
    assert len({row["train.lr"] for row in rows}) == len(rows)
    for out, _ in said:
        assert "trial " in out
        assert "next: r2kit finetune" in out

    result = tune(file, space=SPACE, trials=len(rows) + 1, out=tmp_path / "search", quiet=True)
    assert len(table(tmp_path / "search")) == len(rows) + 1
    assert result.score == max(float(row["score"]) for row in table(tmp_path / "search"))
    best = load_recipe(result.recipe_file)
    assert load_recipe(file, result.best).model_copy(update={"name": best.name}) == best
    assert not list(tmp_path.rglob("*.ckpt"))
    with pytest.raises(RunError, match="holds a search with another space"):
        tune(file, space=SPACE[:1], out=tmp_path / "search", quiet=True)


def test_the_test_images_are_not_looked_at(quick_recipe, tmp_path, monkeypatch):
    from r2kit.data.datamodule import DataModule

    def never(self):
        raise AssertionError("the test images were read")

    monkeypatch.setattr(DataModule, "test_dataloader", never)
    overrides = ["train.epochs=1", "train.lr=1e-3"]
    result = tune(quick_recipe, space=["train.ema=true,false"], trials=1, overrides=overrides, out=tmp_path / "s")
    assert 0 <= result.score <= 1
    assert r2kit.load_recipe(result.recipe_file).train.lr == 1e-3


def test_a_hopeless_trial_is_ended(quick_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.number == 1)
    tune(quick_recipe, space=SPACE, trials=2, out=tmp_path / "s", quiet=True)
    assert [row["state"] for row in table(tmp_path / "s")] == ["complete", "pruned"]
    assert len((tmp_path / "s" / "trials" / "1" / "metrics.csv").read_text().splitlines()) == 2  # head and one epoch


def test_a_loss_that_explodes_ends_the_trial_and_not_the_search(quick_recipe, tmp_path, capsys):
    overrides = ["train={optimizer: sgd, warmup_epochs: 0, epochs: 2, batch_size: 8}"]
    with pytest.raises(RunError, match="no trial came to its end"):
        tune(quick_recipe, space=["train.lr=1e30,1e31"], trials=2, overrides=overrides, out=tmp_path / "s")
    assert capsys.readouterr().out.count("trial ") == 2


def test_without_optuna_it_is_one_line(quick_recipe, monkeypatch):
    from r2kit import errors

    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'r2kit tune needs optuna, .*: pip install "r2kit\[tune\]"'):
        tune(quick_recipe, space=SPACE)
