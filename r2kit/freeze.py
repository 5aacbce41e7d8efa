"""What stands still during training, and until when: gradients and BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from r2kit.errors import ModelError
from r2kit.parts import Parts, is_norm


class Freezer:
    """Freezes the backbone, and frees it from the head down after given numbers of epochs.

    What is frozen is a function of the epoch alone, so that a run that goes on needs nothing stored. Frozen means that
    neither gradients nor batch statistics move: the norms are put into evaluation mode by `hold`.

    Args:
        model: The network.
        unfreeze: After how many epochs the last part of the backbone is freed, then the one before it, and so on; the
            last entry frees all that is left. Empty: the backbone stays frozen.

    Raises:
        ModelError: If there are more entries than the backbone has parts.
    """

    def __init__(self, model: nn.Module, unfreeze: Sequence[int] = ()) -> None:
        parts = Parts(model)
        if len(unfreeze) > parts.head:
            raise ModelError(
                f"train.unfreeze: {len(unfreeze)} steps, but the backbone has {parts.head} parts (stem and stages); "
                f"give at most {parts.head}"
            )
        self.unfreeze = tuple(unfreeze)
        self.depth = parts.head
        """Parts of the backbone."""
        self._parameters: list[list[nn.Parameter]] = [[] for _ in range(parts.head)]
        self._norms: list[list[nn.Module]] = [[] for _ in range(parts.head)]
        for name, parameter in model.named_parameters():
            if parts.number[name] < parts.head:
                self._parameters[parts.number[name]].append(parameter)
        for name, module in model.named_modules():
            if is_norm(module) and parts.of_norm(name) < parts.head:
                self._norms[parts.of_norm(name)].append(module)
        self.frozen = -1
        """Parts that are frozen now, from the input on; -1 before `apply`."""

    def depth_at(self, epoch: int) -> int:
        """Return how many parts are frozen in an epoch, counted from 0."""
        freed = sum(epoch >= first for first in self.unfreeze)
        return 0 if self.unfreeze and freed == len(self.unfreeze) else self.depth - freed

    def apply(self, epoch: int) -> bool:
        """Freeze what the epoch freezes, free the rest; return whether anything changed."""
        frozen = self.depth_at(epoch)
        if frozen == self.frozen:
            return False
        for part, parameters in enumerate(self._parameters):
            for parameter in parameters:
                parameter.requires_grad_(part >= frozen)
        self.frozen = frozen
        return True

    def hold(self) -> None:
        """Put the frozen norms into evaluation mode; call it whenever the network was put into training mode."""
        for norms in self._norms[: max(0, self.frozen)]:
            for norm in norms:
                norm.eval()

    @property
    def parameters(self) -> int:
        """Number of parameters that are frozen now."""
        return sum(p.numel() for parameters in self._parameters[: max(0, self.frozen)] for p in parameters)
