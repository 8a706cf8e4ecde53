"""Values on a command line that both commands take."""

import msgspec
import typer

from umbel_common.canonical import Name
from umbel_common.key_statements import OPERATOR


def name(value: str) -> str:
    """A name of a federation, job or party.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        return msgspec.convert(value, Name)
    except msgspec.ValidationError:
        raise typer.BadParameter("lower-case letters, digits and inner hyphens only") from None


def site_name(value: str) -> str:
    """A name of a site.

    Raises:
        typer.BadParameter: it is none.
    """
    if value == OPERATOR:
        raise typer.BadParameter(f"no site may be called {OPERATOR}")
    return name(value)
