import json

import pytest
from pydantic import ValidationError

from r2kit.errors import RecipeError
from r2kit.recipe import DataSpec, Recipe
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
    allowed = "one of auto, bluemarble, folder, table, torchvision; did you mean 'folder'?"
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


def test_starting_point_is_the_defaults_and_names_every_key(tmp_path):
    text = new_recipe()
    assert load_recipe(write(tmp_path, text, "recipe.yaml")) == Recipe()
    for key in all_keys():
        assert f"# {key.rsplit('.', 1)[-1]}: " in text
    # Taking every comment sign off the values gives a valid recipe too.
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#   ") and line[:1] != "#"]
    active = [line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in lines]
    assert load_recipe(write(tmp_path, "\n".join(active), "recipe.yaml")) == Recipe()


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
