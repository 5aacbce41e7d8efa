import json

import pytest

from r2kit.errors import RunError
from r2kit.recipe import Recipe
from r2kit.run import Run, write_atomic


def test_default_folders_count_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = Run.create(Recipe(name="sat")), Run.create(Recipe(name="sat"))
    assert (first.path.as_posix(), second.path.as_posix()) == ("runs/sat-1", "runs/sat-2")
    (tmp_path / "runs" / "sat-9").mkdir()
    assert Run.create(Recipe(name="sat")).path.name == "sat-10"


def test_a_run_keeps_its_recipe_and_facts(tmp_path):
    recipe = Recipe(seed=7)
    run = Run.create(recipe, tmp_path / "run")
    assert Run(run.path).recipe == recipe
    run.write_info(best_epoch=3)
    assert run.info["seed"] == 7
    assert run.info["best_epoch"] == 3
    assert {"torch", "timm", "lightning"} <= set(run.info["versions"])


def test_a_folder_in_use_is_refused(tmp_path):
    run = Run.create(Recipe(), tmp_path / "run")
    (run.path / "extra").write_text("mine")
    with pytest.raises(RunError, match="holds a run already; give --overwrite, --resume auto"):
        Run.create(Recipe(), run.path)
    Run.create(Recipe(), run.path, overwrite=True)
    assert not (run.path / "extra").exists()


def test_a_folder_that_is_no_run_is_never_emptied(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="exists and is not a run folder"):
            Run.create(Recipe(), tmp_path, overwrite=overwrite)
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Run.create(Recipe(), tmp_path / "file" / "run")


def test_open_says_what_is_missing(tmp_path):
    Run.create(Recipe(), tmp_path / "sat-1")
    with pytest.raises(RunError, match="no such run folder; did you mean 'sat-1'"):
        Run.open(tmp_path / "sat1")
    with pytest.raises(RunError, match=r"not a run folder: it has no recipe\.yaml"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match=r"not finished, model\.safetensors is missing; go on with"):
        Run.open(tmp_path / "sat-1")


def test_a_damaged_record_is_one_line(tmp_path):
    run = Run.create(Recipe(), tmp_path / "run")
    run.info_file.write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        _ = run.info
    run.info_file.write_text(json.dumps([1]))
    with pytest.raises(RunError, match="holds no record"):
        _ = run.info
    run.recipe_file.write_text("dat: 1\n")
    with pytest.raises(RunError, match="not one of this version of r2kit"):
        _ = run.recipe


def test_atomic_write_leaves_no_draft(tmp_path):
    write_atomic(tmp_path / "a.txt", "one")
    write_atomic(tmp_path / "a.txt", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "two"


def test_a_folder_with_a_recipe_alone_is_told_what_it_lacks(finished_run, tmp_path):
    with pytest.raises(RunError, match=r"it has no recipe\.yaml"):
        Run.open(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(finished_run.recipe_file.read_bytes())
    with pytest.raises(RunError, match=r"it has no run\.json"):
        Run.open(tmp_path)
