import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import r2kit
from r2kit import cli
from r2kit.allocate import SEED_WIDTH, Budget, allocate
from r2kit.backbones.allocation import read_gammas, save_structure
from r2kit.backbones.measure import count_macs, count_parameters
from r2kit.backbones.scalenet_tables import SCALENET50_LIGHT, read_structure, stages_of
from r2kit.errors import ModelError, R2kitError, RecipeError, RunError

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]

SHALLOW = tuple(stage[0] for stage in stages_of(SCALENET50_LIGHT))
"""One block a stage: the published light table, cut down so that a CPU trains it in seconds."""
WIDTH = 0.5


@pytest.fixture(scope="module")
def recipe(quick_recipe, tmp_path_factory) -> dict:
    """The quick recipe with the shallow ScaleNet, for one epoch."""
    file = tmp_path_factory.mktemp("tables") / "shallow.json"
    save_structure(SHALLOW, file)
    return {
        **quick_recipe,
        "model": {"name": "scalenet50_light", "structure": str(file)},
        "train": {"epochs": 1, "warmup_epochs": 0, "batch_size": 8, "lr": 3e-3},
    }


@pytest.fixture(scope="module")
def result(recipe, tmp_path_factory):
    """A finished allocation; tests read it and do not change it."""
    out = tmp_path_factory.mktemp("allocations") / "first"
    return allocate(recipe, budget="macs=0.95x", seed_width=WIDTH, out=out, quiet=True)


# ------------------------------------------------------------------------------------------------ what is left behind


def test_folder_holds_tables_record_plot_and_the_seed_run(result):
    files = {path.name for path in result.path.iterdir()}
    assert files == {
        "structure.json",
        "even_structure.json",
        "seed_structure.json",
        "allocation.json",
        "shares.png",
        "seed",
    }
    assert (result.path / "shares.png").read_bytes().startswith(b"\x89PNG")
    assert result.seed.info["state"] == "finished"
    # The depth of the recipe's network, every scale of a block half as wide as its 1x1.
    assert read_structure(result.path / "seed_structure.json") == tuple(
        (n, n, n, n, s) for n, s in [(32, 56), (64, 28), (128, 14), (256, 7)]
    )


def test_table_keeps_what_the_trained_seed_ranks_highest(result):
    blocks = read_gammas(result.seed.model())
    assert any(len(gamma.unique()) > 1 for block in blocks for gamma in block.gammas)  # it did train
    structure = read_structure(result.structure_file)
    assert structure == result.learned.structure
    for block, row in zip(blocks, structure, strict=True):
        values = [gamma.abs().sort(descending=True).values for gamma in block.gammas]
        kept = torch.cat([v[:n] for v, n in zip(values, row, strict=False)])
        gone = torch.cat([v[n:] for v, n in zip(values, row, strict=False)])
        assert kept.min() >= gone.max()


def test_record_holds_the_budget_and_the_even_split_beside_the_result(result, recipe):
    record = json.loads((result.path / "allocation.json").read_text())
    named = r2kit.create_model("scalenet50_light", num_classes=3, structure=SHALLOW)
    budget = round(0.95 * count_macs(named, (3, 32, 32)))
    assert record["model"]["macs"] == count_macs(named, (3, 32, 32))
    assert (record["budget"], record["budget_macs"], record["input_size"]) == ("macs=0.95x", budget, [3, 32, 32])
    for name, file in (("learned", "structure.json"), ("even", "even_structure.json")):
        model = r2kit.create_model("scalenet50_light", num_classes=3, structure=str(result.path / file))
        assert record[name]["macs"] == count_macs(model, (3, 32, 32))
        assert record[name]["params"] == count_parameters(model)
        assert 0.9 * budget < record[name]["macs"] <= budget
        assert sum(record[name]["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert record["learned"]["shares"] != record["even"]["shares"]
    assert Path(record["seed_run"]) == result.seed.path


def test_the_same_recipe_gives_the_same_table(result, recipe, tmp_path):
    again = allocate(recipe, budget="macs=0.95x", seed_width=WIDTH, out=tmp_path / "again", quiet=True)
    for name in ("structure.json", "even_structure.json", "seed_structure.json"):
        assert (again.path / name).read_bytes() == (result.path / name).read_bytes()
    first, second = load_file(result.seed.weights_file), load_file(again.seed.weights_file)
    assert all(torch.equal(first[key], second[key]) for key in first)

    # Another budget is drawn from the seed network that is there: nothing is trained again.
    before = again.seed.metrics_csv.stat().st_mtime_ns
    options = {"overrides": [], "out": tmp_path / "again", "quiet": True}
    wider = allocate(recipe, budget="channels=0.5", seed_width=WIDTH, resume=True, **options)
    assert again.seed.metrics_csv.stat().st_mtime_ns == before
    assert [sum(row[:-1]) for row in read_structure(wider.structure_file)] == [32, 64, 128, 256]
    assert wider.even.macs <= wider.learned.macs
    with pytest.raises(RunError, match="another depth or width; give the model and --seed-width"):
        allocate(recipe, budget="channels=0.5", seed_width=0.3, resume=True, **options)
    with pytest.raises(RunError, match=r"holds an allocation; give --overwrite, --resume auto, or another --out"):
        allocate(recipe, budget="channels=0.5", seed_width=WIDTH, **options)


# ------------------------------------------------------------------------------------------- the command, and after it


def test_command_then_the_command_it_prints(recipe, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_structure(SHALLOW, "shallow.json")
    Path("mine.yaml").write_text(
        f"data:\n  root: {image_folder}\n  image_size: 32\n  workers: 0\n"
        "model:\n  name: scalenet50_light\n  structure: shallow.json\n"
        "train:\n  epochs: 1\n  warmup_epochs: 0\n"
    )
    kept = tmp_path / "runs" / "mine-allocation-1"
    with pytest.raises(SystemExit) as ended:
        cli.main(["allocate", "mine.yaml", "train.batch_size=8", "--budget", "channels=0.3", "--seed-width", "0.1"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    command = f"r2kit finetune mine.yaml train.batch_size=8 model.structure={kept.relative_to(tmp_path)}/structure.json"
    for phrase in ("seed network: 4 blocks", "channels by scale", "stage 4", "learned: ", "even split: ", command):
        assert phrase in said, phrase

    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split()[1:], "--out", "run"])
    assert ended.value.code == 0
    run = r2kit.Run.open("run")
    structure = read_structure(kept / "structure.json")
    assert [sum(row[:-1]) for row in structure] == [20, 39, 77, 154]
    assert run.recipe.model.structure == "runs/mine-allocation-1/structure.json"

    # The run outlives the file, also where the file now says something else.
    save_structure(SHALLOW, kept / "structure.json")
    assert run.model().structure == structure
    (kept / "structure.json").unlink()
    moved = Path("run").rename("moved")
    assert r2kit.Run.open(moved).model().structure == structure
    stored = load_file(r2kit.Run.open(moved).weights_file)
    assert all(torch.equal(value, stored[key]) for key, value in r2kit.Run.open(moved).model().state_dict().items())


def test_a_run_goes_on_after_its_table_is_gone(recipe, tmp_path, monkeypatch):
    from r2kit.callbacks import Recorder

    class KilledError(BaseException):
        """Stands for the end of the process."""

    def stop(self, trainer, module):
        raise KilledError

    file = tmp_path / "table.json"
    save_structure([(4, 4, 0, 0, 56), (4, 0, 4, 0, 28), (4, 4, 0, 0, 14), (4, 0, 0, 4, 7)], file)
    options = {"overrides": [f"model.structure={file}"], "out": tmp_path / "run", "quiet": True}
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "on_train_epoch_end", stop)
        with pytest.raises(KilledError):
            r2kit.finetune(recipe, **options)
    file.unlink()
    run = r2kit.finetune(recipe, resume=True, **options)
    assert run.info["state"] == "finished"
    assert len(run.model().structure) == 4


def test_overwrite_removes_an_allocation_and_nothing_else(recipe, tmp_path, monkeypatch):
    from r2kit import allocate as module

    def stop(*args, **options):
        raise RunError("no training in this test")

    monkeypatch.setattr(module, "finetune", stop)
    out = tmp_path / "out"
    (out / "seed").mkdir(parents=True)
    (out / "mine.yaml").write_text("seed: 1\n")
    with pytest.raises(RunError, match="exists and holds no allocation; give another --out"):
        allocate(recipe, budget="channels=0.5", out=out, overwrite=True, quiet=True)
    for name in ("seed_structure.json", "structure.json", "seed/old.txt"):
        (out / name).write_text("[]")
    with pytest.raises(RunError, match="no training"):
        allocate(recipe, budget="channels=0.5", out=out, overwrite=True, quiet=True)
    assert {path.name for path in out.iterdir()} == {"mine.yaml", "seed_structure.json"}


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("macs=2.9G", Budget(macs=2_900_000_000)),
        ("macs=350M", Budget(macs=350_000_000)),
        ("macs= 350 k", Budget(macs=350_000)),
        ("macs=123456", Budget(macs=123_456)),
        ("macs=0.8x", Budget(relative=0.8)),
        ("channels=1.0", Budget(channels=1.0)),
        ("channels=.5", Budget(channels=0.5)),
    ],
)
def test_budgets(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2.9G", r"--budget: got '2\.9G', allowed is macs=2\.9G \(multiply-adds\), macs=0\.8x .* or channels=1\.0"),
        ("mac=2.9G", "--budget: unknown kind 'mac'; did you mean 'macs'"),
        ("channel=1", "--budget: unknown kind 'channel'; did you mean 'channels'"),
        ("latency=3", "--budget: unknown kind 'latency'; allowed is macs="),
        ("macs=big", "--budget: got 'macs=big', allowed after 'macs=' is a number and k, M, G or x"),
        ("macs=2.9T", "allowed after 'macs=' is a number and k, M, G or x"),
        ("macs=0x", "allowed after 'macs=' is a number and k, M, G or x"),
        ("macs=-1G", "allowed after 'macs=' is a number and k, M, G or x"),
        ("macs=0.8", "--budget: 'macs=0.8' is a part of one multiply-add; did you mean 'macs=0.8x'"),
        ("channels=1x", "allowed after 'channels=' is a number such as 1.0"),
    ],
)
def test_wrong_budgets(text, message):
    with pytest.raises(RecipeError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("overrides", "options", "error", "message"),
    [
        ([], {"budget": "macs=1k"}, ModelError, "1,000 multiply-adds cannot be met"),
        ([], {"budget": "macs=900G"}, ModelError, "leaves nothing to choose"),
        ([], {"budget": "channels=4"}, ModelError, "channels=4 leaves nothing to choose, the seed network has 4"),
        ([], {"budget": "channels=1", "seed_width": 0.0}, ModelError, "width of the seed network must be positive"),
        ([], {"budget": "channels=1", "resume": True}, RunError, "--resume auto needs the folder of the allocation"),
        (["model.name=test_resnet", "model.structure=null"], {}, RecipeError, "'test_resnet' has no channel table"),
        (["model.pretrained=true"], {}, RecipeError, "starts from random weights; set model.pretrained=false"),
        (["train.freeze=backbone"], {}, RecipeError, "'backbone' keeps them still; set train.freeze=none"),
        (["data.root=no/such/folder"], {}, R2kitError, "no/such/folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(
    recipe, tmp_path, monkeypatch, overrides, options, error, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        allocate(recipe, overrides=overrides, quiet=True, **{"budget": "channels=1", **options})
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "res2netplus50",
            "[]",
            "model.structure: only a ScaleNet has a channel table, and model.name is 'res2netplus50'",
        ),
        ("scalenet50", None, "structure file .*table.json: cannot be read"),
        ("scalenet50", "[[1, 2,", "structure file .*table.json: not JSON"),
        ("scalenet50", "[[1, 2, 3, 4, 5]]", r"table.json, row 1: side must be one of \(56, 28, 14, 7\)"),
        ("scalenet50", "[[1, 2, 3, 4, 56]]", "no row of side 28"),
    ],
)
def test_wrong_tables_are_one_line_before_a_folder_is_made(quick_recipe, tmp_path, name, content, message):
    file = tmp_path / "table.json"
    if content is not None:
        file.write_text(content)
    overrides = [f"model.name={name}", f"model.structure={file}"]
    with pytest.raises((RecipeError, ModelError), match=message) as caught:
        r2kit.finetune(quick_recipe, overrides=overrides, out=tmp_path / "run", quiet=True)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_command_line_says_one_line_and_exit_code_2(quick_recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["allocate", "satellite", "--budget", "mac=1G"])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.err == "error: --budget: unknown kind 'mac'; did you mean 'macs'?\n"
    with pytest.raises(SystemExit) as ended:
        cli.main(["allocate", "satellite", "--budget", "macs=1G"])
    assert ended.value.code == 2
    assert "model.name: 'res2netplus50' has no channel table" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["allocate", "satellite"])
    assert ended.value.code == 2
    assert "--budget" in capsys.readouterr().err


def test_one_default_of_the_seed_width():
    assert inspect.signature(cli.training.allocate).parameters["seed_width"].default == SEED_WIDTH
