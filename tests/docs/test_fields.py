"""docs/fields.md has every field of every file, as the code has it."""

from support.fields import PAGE, page


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == page(), "python tests/support/fields.py writes it"
