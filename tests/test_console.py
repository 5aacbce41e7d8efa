import pytest

from r2kit.console import counted, duration, make_console, sentence, table


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


def test_nouns_follow_their_number():
    assert [counted(n, "class", "classes") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert counted(1200, "object") == "1,200 objects"


def test_a_sentence_begins_with_a_capital_and_keeps_the_rest():
    assert sentence("mean IoU of A") == "Mean IoU of A"
    assert sentence("") == ""
