import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import r2kit
from r2kit.errors import ModelError
from r2kit.optim import describe_groups, make_optimizer, parameter_groups, set_momentum
from r2kit.recipe import TrainSpec


@pytest.fixture(scope="module")
def net():
    return r2kit.create_model("test_resnet", num_classes=3)


def names_of(model, group):
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_norms_and_biases_do_not_decay(net):
    decay, plain = parameter_groups(net, TrainSpec(weight_decay=0.1))
    assert all(parameter.ndim > 1 for parameter in decay["params"])
    assert all(parameter.ndim <= 1 for parameter in plain["params"])
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decay["params"]) + len(plain["params"]) == len(list(net.parameters()))


def test_three_learning_rates(net):
    groups = parameter_groups(net, TrainSpec(lr_scales=(0.1, 0.3, 1.0)))
    scale = {name: group["lr_scale"] for group in groups for name in names_of(net, group)}
    wanted = {"conv1": 0.1, "bn1": 0.1, "layer1": 0.1, "layer2": 0.1, "layer3": 0.3, "layer4": 0.3, "fc": 1.0}
    assert scale == {name: wanted[name.split(".")[0]] for name, _ in net.named_parameters()}
    assert describe_groups(groups) == "3 learning rates, from 0.1 to 1 of train.lr"


def test_layer_decay_is_timms(net):
    ours = parameter_groups(net, TrainSpec(layer_decay=0.5, weight_decay=0.02))
    theirs = param_groups_layer_decay(net, weight_decay=0.02, layer_decay=0.5)
    key = lambda group: (group["lr_scale"], group["weight_decay"])  # noqa: E731
    assert {key(g): names_of(net, g) for g in ours} == {key(g): names_of(net, g) for g in theirs}
    assert {g["lr_scale"] for g in ours} == {0.5**i for i in range(6)}


def test_layer_decay_of_a_decoder_around_a_backbone():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-test_resnet", encoder_weights=None, encoder_depth=4, decoder_channels=(8, 8, 8, 8))
    groups = parameter_groups(model, TrainSpec(layer_decay=0.5))
    scale = {name: group["lr_scale"] for group in groups for name in names_of(model, group)}
    assert {scale[name] for name in scale if not name.startswith("encoder.")} == {1.0}
    assert scale["encoder.model.conv1.0.weight"] == min(scale.values()) < 0.1


@pytest.mark.parametrize(("key", "value"), [("lr_scales", (0.1, 0.3, 1.0)), ("layer_decay", 0.5)])
def test_rates_by_depth_need_a_backbone(key, value):
    with pytest.raises(ModelError, match=rf"train\.{key}: the network has no backbone"):
        parameter_groups(nn.Linear(1, 1), TrainSpec(**{key: value}))


def test_each_group_trains_at_its_share(net):
    spec = TrainSpec(optimizer="sgd", lr_scales=(0.1, 0.3, 1.0), nesterov=False, momentum=0.8)
    optimizer = make_optimizer(parameter_groups(net, spec), spec, 0.5, fused=False)
    assert {round(group["lr"], 6) for group in optimizer.param_groups} == {0.05, 0.15, 0.5}
    assert not optimizer.param_groups[0]["nesterov"]
    assert optimizer.param_groups[0]["momentum"] == 0.8
    set_momentum(optimizer, 0.7)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.7}


def test_the_papers_sgd_is_torchs():
    spec = TrainSpec(
        optimizer="sgd", nesterov=False, lr=0.1, weight_decay=1e-4, schedule="step", epochs=100, warmup_epochs=0.0
    )
    ours, theirs = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    first = make_optimizer(parameter_groups(ours, spec), spec, 0.1, fused=False)
    second = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(3):
        for model, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_adamw_takes_the_momentum_as_its_first_beta(net):
    spec = TrainSpec()
    optimizer = make_optimizer(parameter_groups(net, spec), spec, 1e-3, fused=True)
    set_momentum(optimizer, 0.85)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.85, 0.999)}
