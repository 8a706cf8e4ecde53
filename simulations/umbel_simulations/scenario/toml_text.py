"""Values as a TOML file has them."""

import tomlkit


def toml_text(value: object) -> str:
    """A text, a number, a truth value or a list of them, as it stands behind `=` in a TOML file."""
    return tomlkit.item(value).as_string()
