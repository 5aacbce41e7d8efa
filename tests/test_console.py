import pytest

from r2kit.console import duration, make_console, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (59.4, "59 s"), (370, "6 min 10 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_table_is_plain_text_where_there_is_no_terminal():
    console = make_console()
    with console.capture() as captured:
        console.print(table("images", ["class", "train"], [["a[b]", 3]]))
    assert "\x1b" not in captured.get()
    assert "3" in captured.get()
