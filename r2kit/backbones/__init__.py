"""The multi-scale backbones. Importing this package registers them with timm."""

from r2kit.backbones import res2netplus  # noqa: F401
