import pytest
import torch
from torch import nn

import r2kit
from r2kit.parts import Parts


def parts_of(model, coarse=True):
    parts = Parts(model, coarse=coarse)
    return {name: parts.number[name] for name, _ in model.named_parameters()}, parts


@pytest.fixture(scope="module")
def net():
    return r2kit.create_model("test_resnet", num_classes=3)


def test_stem_stages_and_head_are_numbered_from_the_input(net):
    number, parts = parts_of(net)
    assert parts.count == 6
    assert parts.head == 5
    stage = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4, "fc": 5}
    assert {name: stage[name.split(".")[0]] for name in number} == number


def test_the_family_has_stages_and_blocks():
    for name in ("res2netplus50", "scalenet50", "blresnet50"):
        with torch.device("meta"):
            model = r2kit.create_model(name, num_classes=3)
        assert Parts(model).count == 6, name
        assert Parts(model, coarse=False).count == 18, name


def test_blocks_are_as_timm_numbers_them(net):
    from timm.models import group_parameters

    wanted = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    assert parts_of(net, coarse=False)[0] == wanted


def test_a_decoder_around_a_backbone_is_its_head():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-test_resnet", encoder_weights=None, encoder_depth=4, decoder_channels=(8, 8, 8, 8))
    number, parts = parts_of(model)
    assert parts.count == 5  # of this depth are the stem and three stages
    assert {number[name] for name in number if not name.startswith("encoder.")} == {4}
    assert number["encoder.model.conv1.0.weight"] == 0
    assert number["encoder.model.layer3.0.conv1.weight"] == 3


def test_what_no_pattern_matches_stays_with_the_backbone(net):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.neck, self.fc = nn.Linear(1, 1), nn.BatchNorm1d(1, affine=False), nn.Linear(1, 1)

        def group_matcher(self, coarse=False):
            return {"stem": "^stem"}

        def get_classifier(self):
            return self.fc

    parts = Parts(Odd())
    assert parts.count == 2
    assert parts.of_norm("neck") == 0


def test_a_network_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match="no backbone"):
        Parts(nn.Linear(1, 1))
