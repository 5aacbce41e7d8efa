"""The `task` part of a recipe."""

from __future__ import annotations

from typing import Literal

from r2kit.recipe.base import Fraction, Spec


class ClassificationSpec(Spec):
    """One class per image."""

    kind: Literal["classification"] = "classification"
    """What the network predicts."""
    label_smoothing: Fraction = 0.0
    """Share of the target spread evenly over all classes."""
