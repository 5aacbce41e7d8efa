"""Run one of timm's own scripts with the backbones of r2kit registered.

timm knows no plugins: a network exists for its `train.py`, `validate.py`, `benchmark.py` or `inference.py` when the
module that registers it was imported in the same process. This does so and then runs the script as if called directly::

    python -m r2kit.backbones.timm_script path/to/train.py --model res2netplus50 --data-dir ...
    torchrun --nproc-per-node 4 --module r2kit.backbones.timm_script path/to/train.py --model res2netplus50 ...
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import r2kit.backbones  # noqa: F401  registers

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the script `arguments[0]` with the other arguments.

    Raises:
        SystemExit: With code 2 if no script is named or it does not exist; otherwise whatever the script raises.
    """
    if not arguments or not Path(arguments[0]).is_file():
        what = f"no such file: {arguments[0]}" if arguments else "name a script"
        print(f"error: {what}; usage: python -m r2kit.backbones.timm_script path/to/train.py ...", file=sys.stderr)
        raise SystemExit(2)
    script = Path(arguments[0])
    sys.argv = list(arguments)
    sys.path.insert(0, str(script.parent.resolve()))  # as Python does for a script; train.py imports its neighbours
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
