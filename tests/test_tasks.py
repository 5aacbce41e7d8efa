import itertools
import math

import pandas as pd
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from r2kit.recipe import AugmentSpec, Recipe
from r2kit.schedules import Plan
from r2kit.tasks import ClassificationTask, classification_metrics


def outputs(count=23, classes=4):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(count, classes, generator=generator)
    label = torch.randint(0, classes - 1, (count,), generator=generator)  # the last class never occurs
    logits[:, -1] = -9
    return torch.arange(count), logits, label


def test_metrics_agree_with_torchmetrics():
    index, logits, label = outputs()
    found = classification_metrics(index, logits, label, 4)
    assert found["val_acc"] == pytest.approx(multiclass_accuracy(logits, label, 4, average="micro").item())
    assert found["val_f1"] == pytest.approx(multiclass_f1_score(logits, label, 4, average="macro").item())
    assert found["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, label).item(), rel=1e-6)


def test_metrics_count_a_padded_image_once_and_ignore_the_order():
    index, logits, label = outputs()
    want = classification_metrics(index, logits, label, 4)
    padded = torch.cat([torch.randperm(23, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5])])
    assert classification_metrics(index[padded], logits[padded], label[padded], 4) == want


def test_warmup_cosine():
    plan = Plan("cosine", 4, 20, 10)
    rates = [plan.share(step) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert Plan("cosine", 0, 1, 1).share(0) == 1.0
    assert not math.isnan(Plan("cosine", 5, 5, 1).share(5))


def small_net():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    )
    net.get_classifier = lambda: net[3]
    return net


@pytest.mark.parametrize(("best_by", "better"), [("metric", 0), ("loss", 1)])
def test_what_makes_an_epoch_the_best(best_by, better):
    task = ClassificationTask(Recipe.model_validate({"train": {"best_by": best_by}}), small_net(), 2)
    epochs = [{"val_acc": 0.81, "val_loss": 0.52}, {"val_acc": 0.80, "val_loss": 0.49}]
    assert max(range(2), key=lambda i: task.score(epochs[i])) == better
    assert task.score({"val_acc": 0.81, "val_loss": 0.49}) > max(task.score(epoch) for epoch in epochs)


def test_frozen_means_gradients_and_batch_statistics():
    recipe = Recipe.model_validate({"train": {"freeze": "backbone"}})
    task = ClassificationTask(recipe, small_net(), 2)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    task.train()
    assert task.model.training
    assert not task.model[1].training
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=1.0)
    batch = {"image": torch.randn(4, 3, 8, 8), "label": torch.tensor([0, 1, 1, 0])}
    task.loss(task(batch["image"]), batch["label"], "train").backward()
    optimizer.step()
    changed = {key for key, value in task.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"3.weight", "3.bias"}
    assert task.freezer.parameters == 3 * 4 * 9 + 4 + 8


def test_accuracy_on_mixed_images_is_named_after_the_dominant_label(finished_run):
    columns = pd.read_csv(finished_run.metrics_csv).columns
    assert "train_acc_dominant" in columns  # this run mixes
    assert "train_acc" not in columns
    plain = finished_run.recipe.model_copy(update={"augment": AugmentSpec()})
    assert "train_acc" in ClassificationTask(plain, torch.nn.Linear(1, 1), 3).columns
