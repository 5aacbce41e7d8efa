"""Every recipe under recipes/ goes through two training steps, with its own network, on data made here."""

import pytest

from r2kit.recipe_file import load_recipe, packaged_recipes
from r2kit.train import dry_run

pytestmark = [
    # Lightning names the number of loader processes; r2kit chooses it.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning 2.6 against the newest torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_two_steps(name, image_folder, mask_folder, objects_folder, capsys):
    recipe = load_recipe(name)
    target = recipe.target
    root = {"class": image_folder, "mask": mask_folder, "boxes": objects_folder}[target]
    small = ["train.batch_size=4", "data.image_size=32", "data.workers=0", "data.split=auto"]
    small += ["data.source=auto", "data.name=null"]  # neither a table of one's own nor a set from the network
    if recipe.model.name.startswith("cifar_"):  # maps as large as the image: the slowest network by far
        small += ["data.image_size=16"]
    if target == "boxes":
        small += ["data.image_size=64", "task.width=32", "task.regions=16", "data.boxes.classes=[square,bar]"]
        small += ["train.batch_size=2", "task.max_detections=5", "data.limit=12"]
    dry_run(packaged_recipes()[name], overrides=[f"data.root={root}", *small])
    assert "two training steps" in capsys.readouterr().out
