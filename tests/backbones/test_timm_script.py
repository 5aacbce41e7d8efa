import sys
from pathlib import Path

import pytest

from r2kit.backbones.timm_script import main

SCRIPT = """
import argparse
import timm
import neighbour

parser = argparse.ArgumentParser()
parser.add_argument("--model")
args = parser.parse_args()
if __name__ == "__main__":
    model = timm.create_model(args.model, device="meta", num_classes=neighbour.CLASSES)
    print(type(model).__name__, model.num_classes)
"""


def test_a_script_sees_our_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("CLASSES = 7\n")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    main([str(tmp_path / "train.py"), "--model", "res2netplus50"])
    assert capsys.readouterr().out == "Res2Net 7\n"


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "name a script"), (["no/train.py"], "no such file: no/train.py")]
)
def test_a_missing_script_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
