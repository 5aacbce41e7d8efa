"""Random numbers as a function of where they are used, never of what ran before."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed that depends on every part.

    Randomness drawn this way from (seed, epoch, sample) or (seed, step) does not depend on the number of workers, and
    a run that is continued draws what the unbroken run would have drawn.

    Args:
        parts: Whole numbers >= 0, for example the recipe's seed, the epoch and the row of the sample.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
