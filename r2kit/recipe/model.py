"""The `model` part of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator

from r2kit.recipe.base import Fraction, Spec


class ModelSpec(Spec):
    """The backbone and the weights it starts from."""

    name: str = "res2netplus50"
    """Any backbone that `r2kit models` or timm knows."""
    structure: str | None = None
    """JSON file with a ScaleNet's channel table, such as `r2kit allocate` writes, relative to the current folder; null
    for the network's own. It also sets the depth. Only for the scalenet names."""
    pretrained: StrictBool | StrictStr = False
    """true: the published ImageNet weights. A path: a local file of weights or a run folder. false: random weights."""
    warm_start: bool = False
    """Start res2netplus50d or res2netplus101d from weights of its ReLU twin (`pretrained`: true or a file of those),
    converted so that the function stays; the activation turns from ReLU into Mish while training."""
    warm_start_until: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of training after which the activation is Mish itself; only epochs after it can be the best one."""
    in_chans_rule: Literal["repeat", "mean", "zero", "random"] = "repeat"
    """How weights made for 3 bands start a network with another number of bands."""
    drop_rate: Fraction = 0.0
    """Dropout before the classifier."""
    drop_path_rate: Fraction = 0.0
    """Stochastic depth: largest chance, at the last block, that a residual branch is left out of a training step."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.structure is not None and not self.has_channel_table:
            raise ValueError(
                f"structure: only a ScaleNet has a channel table, and model.name is '{self.name}'; e.g. "
                "model.name=scalenet50, or leave structure out"
            )
        if self.warm_start and self.pretrained is False:
            raise ValueError(
                "warm_start: needs weights to start from: model.pretrained=true for the published ones of the ReLU "
                "twin, or model.pretrained=path/to/file"
            )
        return self

    @property
    def has_channel_table(self) -> bool:
        """Whether the name is a ScaleNet's, whose blocks are given by a channel table."""
        return self.name.startswith("scalenet")
