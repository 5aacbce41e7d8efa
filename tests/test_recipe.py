import json

import pytest
from pydantic import ValidationError

from r2kit.errors import RecipeError
from r2kit.recipe import (
    ClassificationSpec,
    DataSpec,
    DetectionSpec,
    InstanceSpec,
    MultilabelSpec,
    Recipe,
    SaliencySpec,
    SegmentationSpec,
)
from r2kit.recipe_file import (
    all_keys,
    find_recipe,
    load_recipe,
    new_recipe,
    packaged_recipes,
    to_schema,
    to_yaml,
)


def problems(source, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return caught.value.problems


def write(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_is_read_the_1_2_way(tmp_path):
    recipe = load_recipe(write(tmp_path, "train:\n  lr: 1e-3\nmodel:\n  name: no\n"))
    assert recipe.train.lr == 0.001
    assert recipe.model.name == "no"


def test_name_is_the_file_name_unless_given(tmp_path):
    assert load_recipe(write(tmp_path, "seed: 1\n")).name == "mine"
    assert load_recipe(write(tmp_path, "name: other\n")).name == "other"


def test_all_problems_at_once_with_line_and_key(tmp_path):
    path = write(
        tmp_path,
        "data:\n  imag_size: 64\n  val_fraction: 2\n  source: foldr\ntrain:\n  epochs: yes\nmodell: 3\naugment: 5\n",
    )
    found = problems(path, ["train.lrr=3", "model.pretrained=[1]"])
    assert f"{path}:2: data.imag_size: unknown key; did you mean 'data.image_size'?" in found
    assert f"{path}:3: data.val_fraction: got 2 (a whole number), allowed is a number above 0 and below 1" in found
    allowed = "one of auto, bluemarble, folder, rasters, table, torchvision; did you mean 'folder'?"
    assert f"{path}:4: data.source: got foldr (text), allowed is {allowed}" in found
    assert f"{path}:6: train.epochs: got yes (text), allowed is a whole number at least 1" in found
    assert f"{path}:7: modell: unknown key; did you mean 'model'?" in found
    assert "command line: train.lrr: unknown key; did you mean 'train.lr'?" in found
    assert "command line: model.pretrained: got [1] (a list), allowed is true or false or text" in found
    assert any(line.startswith(f"{path}:8: augment: got 5") for line in found)
    assert len(found) == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", "command line: epochs: unknown key; did you mean 'train.epochs'?"),
        ("train", "command line: 'train': overrides are written key.path=value, e.g. train.epochs=3"),
        ("seed.x=1", "command line: seed.x: 'seed' holds one value and has no keys below it"),
        ("train.lr=[1", "command line: train.lr: '[1' is not valid YAML"),
        ("train.lr=.inf", "command line: train.lr: got inf (a number), allowed is a number above 0"),
        ("train.lr=true", "command line: train.lr: got true (true/false), allowed is a number above 0"),
        ("data.image_size=[3, 64]", "command line: data.image_size: got [3, 64] (a list)"),
        ("train.warmup_epochs=10", "command line: train.warmup_epochs: 10 must be less than epochs (10)"),
        ("data.source=folder", "recipe: data.root: source 'folder' needs the folder of the images"),
        ("data.fold=2", "data.fold: 2: it needs folds, e.g. data.folds=5"),
        ("data={folds: 3, fold: 3}", "data.fold: 3: allowed is 0 to 2"),
        ("data={folds: 2, val_fraction: 0.5}", "data.val_fraction: 0.5 and one of 2 folds leave less than a tenth"),
        ("data={split_file: a.csv, folds: 3}", "data.split_file: the file is the split; leave out split and folds"),
        ("data.source=table", "recipe: data.root: source 'table' needs the CSV or Parquet file"),
        ("data.allow_outside=true", "data.allow_outside: only tables name paths; source 'bluemarble' cannot honour it"),
        ("data.test_fraction=0.8", "data.val_fraction: 0.15 and test_fraction 0.8 leave less than a tenth"),
    ],
)
def test_an_override_passes_the_same_checks(override, message):
    assert message in problems({}, [override])[0]


def test_mix_shares_cannot_exceed_all_batches():
    assert "add up to more than 1" in problems({}, ["augment.mixup=0.7", "augment.cutmix=0.7"])[0]


def test_duplicate_key_and_broken_yaml_name_the_line(tmp_path):
    path = write(tmp_path, "seed: 1\nseed: 2\n")
    assert problems(path)[0].startswith(f"{path}:2: not valid YAML: found duplicate key")
    path = write(tmp_path, "data:\n  root: [a\n")
    assert problems(path)[0].startswith(f"{path}:")


def test_yaml_tags_are_refused_and_nothing_runs(tmp_path):
    path = write(tmp_path, f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    assert "not valid YAML" in problems(path)[0]
    assert not (tmp_path / "made").exists()


def test_a_list_or_binary_file_is_no_recipe(tmp_path):
    assert "a recipe is a mapping" in problems(write(tmp_path, "- 1\n"))[0]
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    assert "cannot be read as UTF-8 text" in problems(path)[0]


def test_empty_sections_mean_their_defaults(tmp_path):
    assert load_recipe(write(tmp_path, "name: recipe\ndata:\ntrain:\n")) == Recipe()


def test_root_alone_selects_the_folder():
    assert load_recipe({}, ["data.root=tiles"]).data.resolved_source == "folder"
    assert load_recipe({}, ["data.root=tiles/index.CSV"]).data.resolved_source == "table"
    assert load_recipe({}).data.resolved_source == "bluemarble"
    assert DataSpec(image_size=(32, 48)).size == (32, 48)


def test_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = load_recipe({}, ["data.image_size=[64, 96]", "model.pretrained=w.safetensors", "train.lr=1e-4", "name=x"])
    assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe


KINDS = {
    "classification": ClassificationSpec,
    "multilabel": MultilabelSpec,
    "segmentation": SegmentationSpec,
    "saliency": SaliencySpec,
    "detection": DetectionSpec,
    "instance": InstanceSpec,
}


@pytest.mark.parametrize("kind", KINDS)
def test_starting_point_is_the_defaults_and_names_every_key(tmp_path, kind):
    text, recipe = new_recipe(kind), Recipe(task=KINDS[kind]())
    assert load_recipe(write(tmp_path, text, "recipe.yaml")) == recipe
    for key in all_keys():
        if not key.startswith("task."):
            assert f"# {key.rsplit('.', 1)[-1]}: " in text
    for key in all_keys(KINDS[kind]):
        assert f"# {key.rsplit('.', 1)[-1]}: " in text
    # Taking every comment sign off the values gives a valid recipe too.
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#   ") and line[:1] != "#"]
    lines = [line for line in lines if line != f"  kind: {kind}"]  # said already where it is not the default
    active = [line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in lines]
    assert load_recipe(write(tmp_path, "\n".join(active), "recipe.yaml")) == recipe


def test_starting_point_of_an_unknown_task():
    with pytest.raises(RecipeError, match=r"allowed is one of classification, multilabel, seg.*did you mean 'segment"):
        new_recipe("segmentatoin")


def test_the_kind_of_task_says_which_keys_there_are(tmp_path):
    path = write(tmp_path, "task:\n  kind: segmentation\n  decodr: fpn\n  loss:\n    dice: much\n")
    found = problems(path, ["task.label_smoothing=0.1"])
    assert f"{path}:3: task.decodr: unknown key; did you mean 'task.decoder'?" in found
    assert f"{path}:5: task.loss.dice: got much (text), allowed is a number at least 0" in found
    assert "command line: task.label_smoothing: unknown key; task.kind=classification has it" in found
    assert len(found) == 3
    path = write(tmp_path, "task:\n  kind: segmentatoin\n")
    allowed = "one of " + ", ".join(KINDS)
    assert problems(path) == [
        f"{path}:2: task.kind: got segmentatoin (text), allowed is {allowed}; did you mean 'segmentation'?"
    ]
    assert problems({}, ["task=3"])[0].startswith("command line: task: got 3 (a whole number), allowed is keys below")


def test_overrides_of_a_task_may_come_before_its_kind():
    recipe = load_recipe({}, ["task.decoder=fpn", "task.kind=segmentation"])
    assert recipe.task == SegmentationSpec(decoder="fpn")
    assert recipe.target == "mask"
    assert "task.decoder: unknown key; task.kind=segmentation has it" in problems({}, ["task.decoder=fpn"])[0]
    assert load_recipe({"task": {"label_smoothing": 0.1}}).task == ClassificationSpec(label_smoothing=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_stride": 8}, "task.output_stride: only deeplabv3 and deeplabv3plus have a choice"),
        ({"loss": {"cross_entropy": 0.0}}, "task.loss.cross_entropy: every loss has weight 0"),
    ],
)
def test_a_segmentation_that_contradicts_itself(values, message):
    assert message in problems({"task": {"kind": "segmentation", **values}})[0]


def test_schema_documents_every_key_and_forbids_others():
    schema = to_schema()
    json.dumps(schema)
    for definition in [schema, *schema["$defs"].values()]:
        assert definition["additionalProperties"] is False
        for name, entry in definition["properties"].items():
            assert entry.get("description") or "$ref" in entry, name


def test_specs_are_frozen():
    with pytest.raises(ValidationError):
        Recipe().seed = 3


def test_unknown_recipe_names_the_nearest():
    assert "satellite" in packaged_recipes()
    assert find_recipe("satellite").name == "satellite.yaml"
    with pytest.raises(RecipeError, match="did you mean 'satellite'"):
        find_recipe("satelite")
    with pytest.raises(RecipeError, match="is a folder"):
        find_recipe("tests")


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_packaged_recipes_are_right(name):
    load_recipe(name)
