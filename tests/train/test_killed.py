"""Every kind of task, and strategies together, killed at random moments: the end is that of the unbroken run."""

import pytest

from r2kit.recipe_file import load_recipe, to_yaml
from r2kit.run import Run
from tests.train.test_keep import interrupt, same_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a detector on a busy machine

ALWAYS = ["data.workers=2", "train.epochs=12", "train.batch_size=4", "train.checkpoint_every=2", "model.drop_rate=0.1"]
CASES = {
    "multilabel": ("several_recipe", "train.ema=true augment.mixup=0.4 augment.cutmix=0.4 train.accumulate=2"),
    "segmentation": ("pond_recipe", "train.ema=true train.layer_decay=0.8 train.progressive_size=[0.5]"),
    "saliency": ("salient_recipe", "train.schedule=plateau train.plateau_patience=1 train.lr=0.3"),
    "detection": ("detection_recipe", "train.epochs=4 train.ema=true augment.mosaic=0.5 augment.copy_paste=0.5"),
    "images that grow, rates at plateaus": (
        "quick_recipe",
        "train.schedule=plateau train.plateau_patience=1 train.progressive_size=[0.5,0.75] data.image_size=64 "
        "train.lr=0.1 train.epochs=30",
    ),
    "stages freed, averaged": (
        "quick_recipe",
        "train.freeze=backbone train.unfreeze=[2,5,9] train.lr_scales=[0.1,0.3,1] train.ema=true train.accumulate=2 "
        "train.gradient_clip=1 train.epochs=30",
    ),
    "left to the machine": (
        "quick_recipe",
        "train.lr=auto train.batch_size=auto train.layer_decay=0.7 train.schedule=one_cycle train.optimizer=sgd "
        "train.early_stop=20 train.epochs=60 model.drop_path_rate=0.1",
    ),
    "a limit of time that is not reached": (
        "quick_recipe",
        "train.time_limit=2h train.epochs=30 train.ema=true train.warmup_epochs=2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_any_kind_killed_at_random_moments_ends_as_the_unbroken_one(attempts, request, tmp_path, case):
    base, overrides = CASES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(load_recipe(request.getfixturevalue(base), [*ALWAYS, *overrides.split()])))
    done = attempts.run("finetune", recipe, "--out", tmp_path / "whole")
    assert done["status"] == 0, done["said"]
    names = ["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"]
    seen = interrupt(attempts, recipe, tmp_path / "run", seed=7, kills=10, span=1.0, names=names)
    print(f"\n{case}:", *(f"{name} {status};" for name, status, _ in seen))
    assert sum(status != 0 for _, status, _ in seen) >= 4
    same_training(Run.open(tmp_path / "run"), Run.open(tmp_path / "whole"))
