"""Warm start: the converted network computes what its source does, and ends as a plain Res2NetPlus."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from r2kit.backbones import create_model
from r2kit.backbones._res2 import StemSpec
from r2kit.backbones.mish import MishBeta
from r2kit.backbones.warmstart import START_BETA, anneal_beta, convert, finalize, set_beta, warm_start
from r2kit.backbones.weights import save_weights
from r2kit.errors import ModelError

SHARP = 1e6
SMALL: dict[str, Any] = {"layers": (1, 2, 2, 1), "channels": (8, 16, 32, 64)}
STEM = StemSpec((8, 8, 16), order="act_norm", act_bias=True)


def trained(name: str = "res2net50d", **options: Any) -> nn.Module:
    """A ReLU network whose every BatchNorm does something, as after training."""
    torch.manual_seed(0)
    model = create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
            module.momentum = None  # statistics of all that it sees, so that activations keep their size
    with torch.no_grad():
        model.train()(torch.randn(8, options.get("in_chans", 3), 64, 64))
    return model.eval()


def small_source(**options: Any) -> nn.Module:
    return trained(**{"num_classes": 5, "stem_width": 8, **SMALL, **options})


def small_target(**options: Any) -> nn.Module:
    return create_model("res2netplus50d", **{"num_classes": 5, "stem": STEM, **SMALL, **options})


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, size: int = 64) -> float:
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(3))
    dtype = next(a.parameters()).dtype
    return float((a.eval()(x.to(dtype)) - b.eval()(x.to(dtype))).abs().max())


IMAGES = [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]


@pytest.mark.parametrize("size", [64, 75])
def test_logits_are_the_sources_at_a_large_beta(size: int) -> None:
    source, target = small_source(), small_target()
    done = convert(source, target, IMAGES, beta=SHARP)
    assert difference(source, target, size) < 1e-4
    assert (done.folded, done.images, done.classifier) == (3 + 6 * 4, 8, True)


def test_the_function_is_the_same_up_to_rounding() -> None:
    """In float64, so that nothing hides behind a tolerance."""
    source, target = small_source().double(), small_target().double()
    convert(source, target, [x.double() for x in IMAGES], beta=1e12)
    assert difference(source, target) < 1e-10


def test_smaller_betas_move_away_steadily() -> None:
    source, target = small_source(), small_target()
    convert(source, target, IMAGES, beta=SHARP)
    apart = []
    for beta in (1e4, 1e3, 1e2, START_BETA):
        assert set_beta(target, beta) > 0
        apart.append(difference(source, target))
    assert apart == sorted(apart)
    assert apart[0] < 1e-2 < apart[-1]


def test_new_norms_hold_the_measured_statistics() -> None:
    """So that training, where a batch's statistics take over, starts near the identity too."""
    source, target = small_source(), small_target()
    convert(source, target, iter(IMAGES), beta=START_BETA)
    seen: list[torch.Tensor] = []
    norm = target.layer2[1].bns[1]
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        target.eval()(torch.cat(IMAGES))
        x = seen[0].double()
        torch.testing.assert_close(norm.running_mean.double(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), x.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm(seen[0]), seen[0], rtol=1e-4, atol=1e-4)
        handle.remove()
        before = target(torch.cat(IMAGES))
        for name, module in target.named_modules():
            if isinstance(module, nn.BatchNorm2d) and not name.endswith(("bn3", "downsample.2")):
                module.train()
        torch.testing.assert_close(target(torch.cat(IMAGES)), before, rtol=0.01, atol=0.01)


def test_training_flags_and_the_source_stay_as_they_are() -> None:
    source, target = small_source(), small_target()
    before = {k: v.clone() for k, v in source.state_dict().items()}
    target.train()
    target.bn1.eval()
    convert(source, target, [{"image": IMAGES[0], "label": torch.zeros(4)}])
    assert target.training
    assert not target.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())


def test_images_stop_at_the_wanted_number() -> None:
    taken = []

    def images() -> Any:
        for i in range(100):
            taken.append(i)
            yield IMAGES[0]

    assert convert(small_source(), small_target(), images(), max_images=10).images == 12
    assert len(taken) == 3


def test_annealing_ends_in_a_plain_network() -> None:
    """A few real steps with gradients, then nothing is left of the morph."""
    source, target = small_source(), small_target()
    convert(source, target, IMAGES)
    plain = create_model("res2netplus50d", num_classes=5, stem=STEM, **SMALL)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.01)
    target.train()
    for step in range(3):
        set_beta(target, anneal_beta(step / 4))
        optimizer.zero_grad()
        nn.functional.cross_entropy(target(IMAGES[0]), torch.arange(4)).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in target.parameters())
        optimizer.step()
    assert {float(m.beta) for m in target.modules() if isinstance(m, MishBeta)} == {1.0}
    with torch.no_grad():
        last = target.eval()(IMAGES[1])
    finalize(target)
    assert not any(isinstance(m, MishBeta) for m in target.modules())
    assert [type(m) for m in target.modules()] == [type(m) for m in plain.modules()]
    assert list(target.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(target.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(IMAGES[1]), last)


def test_finalize_refuses_to_change_the_function() -> None:
    target = small_target()
    convert(small_source(), target, IMAGES[:1])
    with pytest.raises(ModelError, match="beta is 25; anneal it to 1 first"):
        finalize(target)


def test_schedule_is_a_pure_function_of_progress() -> None:
    assert anneal_beta(0.0) == START_BETA
    assert anneal_beta(0.5) == anneal_beta(0.75) == anneal_beta(1.0) == 1.0
    assert anneal_beta(0.25) == pytest.approx(1 / (0.5 / START_BETA + 0.5))
    values = [anneal_beta(i / 20, start=10.0, until=1.0) for i in range(21)]
    assert values == sorted(values, reverse=True)
    gaps = [1 / b - 1 / a for a, b in itertools.pairwise(values)]
    assert max(gaps) == pytest.approx(min(gaps))  # the distance from ReLU grows evenly
    for arguments in ((-0.1,), (1.1,), (0.5, 0.5), (0.5, 25.0, 0.0)):
        with pytest.raises(ValueError, match="out of range"):
            anneal_beta(*arguments)


def test_another_class_count_keeps_the_targets_classifier() -> None:
    source, target = small_source(num_classes=9), small_target()
    before = target.fc.weight.clone()
    assert convert(source, target, IMAGES[:1]).classifier is False
    assert torch.equal(target.fc.weight, before)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ({"layers": (1, 1, 1, 1)}, {}, "does not convert into 'res2netplus50d': 19 normalised convolutions against 27"),
        ({"channels": (8, 16, 32, 32)}, {}, "have no counterpart"),
        ({}, {"stem": StemSpec((8, 8, 16), order="act_norm"), "act_bias": False}, "has no bias"),
        ({}, {"act_layer": "relu"}, "has no Mish that beta could sharpen"),
    ],
)
def test_networks_that_do_not_convert(source: dict, target: dict, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        convert(small_source(**source), small_target(**target), IMAGES[:1])


def test_what_is_no_res2net_does_not_convert() -> None:
    other = create_model("resnet18", num_classes=5)
    with pytest.raises(ModelError, match="'resnet18' is not a Res2Net with a stem of three convolutions"):
        convert(other, small_target(), IMAGES)


def test_images_are_needed_and_must_be_sane() -> None:
    source = small_source()
    with pytest.raises(ModelError, match="no images to measure"):
        convert(source, small_target(), [])
    with pytest.raises(ModelError, match="not finite; are they normalised"):
        convert(source, small_target(), [torch.full((2, 3, 64, 64), float("nan"))])


def test_warm_start_from_a_file(tmp_path: Any) -> None:
    """The whole way that a user takes, with the real networks."""
    source = trained(num_classes=4)
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    save_weights(source, tmp_path / "res2net50d.safetensors", {"preprocess": preprocess})
    file = tmp_path / "res2net50d.safetensors"
    images = [torch.randn(2, 3, 32, 32)]
    model = warm_start("res2netplus50d", images, pretrained=file, num_classes=4, drop_path_rate=0.1, beta=SHARP)
    assert difference(source, model, size=32) < 1e-4
    assert model.load_report.notes[-1] == "converted from res2net50d: 67 norms folded, statistics from 2 images"
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert model.pretrained_cfg["architecture"] == "res2netplus50d"


@pytest.mark.slow
def test_the_101_layer_twin() -> None:
    """In float64: with random weights the source's own float32 rounding moves its logits by 3e-4."""
    source = trained("res2net101d", num_classes=10).double()
    target = create_model("res2netplus101d", num_classes=10).double()
    assert convert(source, target, [x.double() for x in IMAGES], beta=1e9).folded == 135
    assert difference(source, target) < 1e-8


def test_warm_start_says_what_it_needs() -> None:
    with pytest.raises(ModelError, match="'res2netplus50' has no ReLU twin; 'res2netplus50d' and"):
        warm_start("res2netplus50", IMAGES)
    with pytest.raises(ModelError, match="needs weights of 'res2net50d'"):
        warm_start("res2netplus50d", IMAGES, pretrained=False)
