"""What every error that r2kit raises on purpose has in common."""

from r2kit.errors import DataError


def test_words_without_end_are_shortened():
    said = str(DataError(f"a/b.txt:1: the class is '{'7' * 5000}end', unknown"))
    assert said.startswith("a/b.txt:1: the class is '777")
    assert said.endswith("777end', unknown")
    assert "..." in said
    assert len(said) < 300
    assert str(DataError("x" * 900)) == "x" * 900
