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
def test_two_steps(name, image_folder, mask_folder, capsys):
    root = {"class": image_folder, "mask": mask_folder}[load_recipe(name).target]
    small = ["train.batch_size=4", "data.image_size=32", "data.workers=0", "data.split=auto"]
    dry_run(packaged_recipes()[name], overrides=[f"data.root={root}", *small])
    assert "two training steps" in capsys.readouterr().out
