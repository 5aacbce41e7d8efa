"""r2kit: transfer learning with multi-scale image backbones."""

from __future__ import annotations

__version__ = "0.1.0"
