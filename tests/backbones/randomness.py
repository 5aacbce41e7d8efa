"""Numbers behind which a mistake cannot hide."""

from torch import nn


def randomise_norms(model: nn.Module) -> None:
    """Give every BN statistics, a scale and a shift of its own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
