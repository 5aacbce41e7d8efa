"""The `model` part of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from r2kit.recipe.base import Fraction, Spec

Count = Annotated[StrictInt, Field(ge=1)]


class BlockSpec(Spec):
    """Blocks of another make than the name says; null keeps what it says.

    r2kit's own Res2Net, Res2NetPlus and CIFAR networks take all four; a network that does not take one is refused.
    """

    layers: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] | None = None
    """Blocks of each stage, e.g. [3, 4, 6, 3]: the depth."""
    base_width: Count | None = None
    """Channels of one split of one group at the first stage: w."""
    scale: Count | None = None
    """Splits of a block: s."""
    cardinality: Count | None = None
    """Groups of each 3x3 convolution: c."""


class ModelSpec(Spec):
    """The backbone and the weights it starts from."""

    name: str = "res2netplus50"
    """Any backbone that `r2kit models` or timm knows."""
    structure: str | None = None
    """JSON file with a ScaleNet's channel table, such as `r2kit allocate` writes, relative to the current folder; null
    for the network's own. It also sets the depth. Only for the scalenet names."""
    block: BlockSpec = BlockSpec()
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
        if self.has_channel_table and self.block != BlockSpec():
            raise ValueError(
                f"block: the blocks of '{self.name}' are given by its channel table; use model.structure, or leave "
                "block out"
            )
        if self.warm_start and self.block != BlockSpec():
            raise ValueError("block: a warm start converts the ReLU twin of the name, block by block; leave block out")
        if self.warm_start and self.pretrained is False:
            raise ValueError(
                "warm_start: needs weights to start from: model.pretrained=true for the published ones of the ReLU "
                "twin, or model.pretrained=path/to/file"
            )
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What makes the network another one than its name says, as its builder takes it."""
        given = {"structure": self.structure, **self.block.model_dump()}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def has_channel_table(self) -> bool:
        """Whether the name is a ScaleNet's, whose blocks are given by a channel table."""
        return self.name.startswith("scalenet")
