"""The fast form of the networks: the same outputs and gradients in less time and memory, behind `optimize`."""

from r2kit.backbones.fast.optimize import is_fast, optimize, optimize_with_reason, plain

__all__ = ["is_fast", "optimize", "optimize_with_reason", "plain"]
