"""Explain predictions: which part of an image speaks for a class, in panels and in one number."""

from r2kit.explain.command import Explanation, explain
from r2kit.explain.look import Explainer, Look, energy_inside, pointed_inside
from r2kit.explain.methods import METHODS, Method, available, evidence, gradcam, target_layer

__all__ = [
    "METHODS",
    "Explainer",
    "Explanation",
    "Look",
    "Method",
    "available",
    "energy_inside",
    "evidence",
    "explain",
    "gradcam",
    "pointed_inside",
    "target_layer",
]
