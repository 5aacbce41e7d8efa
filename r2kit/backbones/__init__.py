"""The multi-scale backbones. Importing this package registers them with timm."""

from r2kit.backbones import blresnet, res2net, res2netplus, resnest, scalenet  # noqa: F401
from r2kit.backbones.create import create_model
from r2kit.backbones.measure import count_macs, count_parameters

__all__ = ["count_macs", "count_parameters", "create_model"]
