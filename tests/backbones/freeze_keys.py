"""The fingerprints of every network's state dict: published checkpoints load only while they stay what they are.

`python -m tests.backbones.freeze_keys` writes state_dict_keys.json anew; a changed line there breaks people's files.
"""

import hashlib
import json
from pathlib import Path

import timm
from torch import nn

FILE = Path(__file__).with_name("state_dict_keys.json")


def fingerprint(model: nn.Module) -> str:
    """Return the number of tensors and a digest of their sorted names and shapes."""
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{len(lines)} {digest[:16]}"


def frozen() -> dict[str, str]:
    """Return the fingerprints on file by name."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def main() -> None:
    """Write the file."""
    import r2kit.backbones  # noqa: F401
    from r2kit.catalog import CATALOG

    prints = {e.name: fingerprint(timm.create_model(e.name, device="meta")) for e in CATALOG if e.owner == "r2kit"}
    FILE.write_text(json.dumps(prints, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
