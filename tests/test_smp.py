"""segmentation-models-pytorch takes the family's networks as encoders, by their names in timm."""

import pytest
import segmentation_models_pytorch as smp
import torch

import r2kit.backbones  # noqa: F401  registers


# Each row has a stem of its own; the Big-Little features are sums inside its stages.
@pytest.mark.parametrize("name", ["res2netplus50", "scalenet50_light", "blresnet50"])
def test_unet_on_thirteen_bands(name):
    torch.manual_seed(0)
    model = smp.Unet(f"tu-{name}", encoder_weights=None, in_channels=13, classes=4, decoder_channels=(64, 32, 16, 8, 8))
    assert model.encoder.out_channels == [13, 64, 256, 512, 1024, 2048]
    logits = model(torch.randn(2, 13, 64, 64))
    assert logits.shape == (2, 4, 64, 64)
    target = torch.randint(0, 4, (2, 64, 64))
    torch.nn.functional.cross_entropy(logits, target).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    reductions = [64 // level.shape[-1] for level in model.encoder(torch.randn(1, 13, 64, 64))]
    assert reductions == [1, 2, 4, 8, 16, 32]


def test_an_output_stride_of_eight_keeps_the_maps_large():
    model = smp.DeepLabV3Plus("tu-res2netplus50", encoder_weights=None, encoder_output_stride=8, classes=2).eval()
    with torch.no_grad():
        features = model.encoder(torch.randn(1, 3, 64, 64))
    assert [map_.shape[-1] for map_ in features] == [64, 32, 16, 8, 8, 8]
