"""Messages that quote what stands in files."""

from hypothesis import given
from hypothesis import strategies as st

from mila_mm.errors import LostPeerError, UserError, printable, printable_path


@given(st.text(max_size=300))
def test_what_is_printed_steers_nothing(text: str) -> None:
    assert printable(text, 4000).isprintable()
    assert printable_path(text).isprintable()
    lines = str(UserError(f'line one\n{text}')).split('\n')
    assert all(line.isprintable() for line in lines)


def test_printable_text_is_kept_and_long_text_shortened() -> None:
    assert printable('Änderung 変更 a.pth') == 'Änderung 変更 a.pth'
    assert len(printable('x' * 5000)) == 120
    assert printable_path('/' + 'x' * 200) == '/' + 'x' * 200


def test_lines_of_a_message_stay_lines() -> None:
    error = LostPeerError('what\nwhat to do\x1b[0m')
    assert str(error) == 'what\nwhat to do\\x1b[0m'
    assert str(UserError()) == ''
