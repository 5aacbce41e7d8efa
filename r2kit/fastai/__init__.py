"""fastai as its users write it, with the networks, the recipes and the runs of r2kit.

**fastai's own learners**, with every network of the family (`archs`)::

    from fastai.vision.all import *
    from r2kit.fastai import *

    learn = vision_learner(dls, res2net50d, metrics=accuracy)
    learn = vision_learner(dls, "res2net50d.in1k", n_in=13)
    learn = vision_learner(dls, res2netplus50, pretrained="weights.safetensors")
    learn = unet_learner(dls, res2netplus50, pretrained=False)

**A learner from a recipe or a run** (`bridge`): the same network, split, images, augmentation, mixing and losses as
`r2kit finetune` would train with, and then any of fastai's training::

    learn = recipe_learner("satellite")           # a file, the name of a packaged recipe, or nested values
    learn.lr_find()
    learn.fine_tune(3, cbs=MixUp())
    learn.show_results()
    ClassificationInterpretation.from_learner(learn).plot_top_losses(9)

    learn = run_learner("runs/satellite-1")       # the trained network, on its own data and split

**And back** (`keep`): a run folder like any other, which `r2kit evaluate`, `predict`, `explain`, `export` and
`report` accept::

    run = save_run(learn, "runs/from-fastai")

For classification, several labels per image, and segmentation; other kinds of task are trained with `r2kit finetune`.

`Learner.export` pickles. Open such a file only if you trust it, and where r2kit is installed. A learner of a recipe or
a run refuses it: its form to keep is the run folder, which holds tensors and plain text.
"""

from __future__ import annotations

from r2kit.errors import require

require("fastai", "fastai", "fastai", "r2kit.fastai")

from r2kit.fastai import archs  # noqa: E402  behind the check, which says how to install it
from r2kit.fastai.archs import ARCHS, cut_body, three_groups  # noqa: E402
from r2kit.fastai.bridge import recipe_learner, run_learner  # noqa: E402
from r2kit.fastai.keep import save_run  # noqa: E402

__all__ = ["cut_body", "recipe_learner", "run_learner", "save_run", "three_groups", *ARCHS]

globals().update({name: getattr(archs, name) for name in ARCHS})
