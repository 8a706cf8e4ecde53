"""The error for a wrong configuration has file, field, what was found and what is accepted."""

from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel_common.canonical import Name, Value
from umbel_common.errors import ConfigError
from umbel_common.toml_values import parse_toml


class Local(Value, frozen=True, tag_field="mode", tag="local"):
    epsilon: Annotated[float, msgspec.Meta(gt=0)]


class Open(Value, frozen=True, tag_field="mode", tag="open"):
    reason: str


class Site(Value, frozen=True):
    name: str
    records: int = 1


class Config(Value, frozen=True):
    title: str
    privacy: Local | Open
    sites: tuple[Site, ...] = ()
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads > 8:
            raise ValueError("threads must be at most 8")


class Choice(Value, frozen=True):
    kind: Literal["a", "b"] = "a"
    mixed: tuple[str, ...] | Literal["all"] = "all"
    perhaps: float | str | None = None
    names: tuple[Name, ...] | None = None


class Pair(Value, frozen=True):
    title: str
    first: Site
    second: Site


GOOD = 'title = "t"\n[privacy]\nmode = "local"\nepsilon = 3\n[[sites]]\nname = "a"\n'


def refusal(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_toml(text, Config, "run.toml")
    assert caught.value.file == "run.toml"
    return caught.value


def test_a_right_text_becomes_its_value() -> None:
    assert parse_toml(GOOD, Config, "run.toml") == Config(
        title="t", privacy=Local(epsilon=3.0), sites=(Site(name="a"),)
    )


def test_broken_toml_is_shown_with_its_line() -> None:
    assert "line 1" in refusal("title = t").diagnostics()


@pytest.mark.parametrize(
    ("old", "new", "field", "found", "accepted"),
    [
        ('"t"', "5", "title", "5", "a text in quotes"),
        ("epsilon = 3", 'epsilon = "three"', "privacy.epsilon", "'three'", "a number"),
        ("epsilon = 3", "epsilon = 0", "privacy.epsilon", "0", "a number > 0.0"),
        ('name = "a"', 'name = "a"\nrecords = 1.5', "sites[0].records", "1.5", "a whole number"),
        ('name = "a"', "name = []", "sites[0].name", "a list", "a text in quotes"),
    ],
)
def test_a_wrong_value_names_field_found_and_accepted(
    old: str, new: str, field: str, found: str, accepted: str
) -> None:
    error = refusal(GOOD.replace(old, new))
    assert (error.field, error.found, error.accepted) == (field, found, accepted)


@pytest.mark.parametrize(
    ("old", "new", "field", "close"),
    [
        ("title", "titel = 1\ntitle", "titel", "title"),
        ("epsilon", "epsilom = 1\nepsilon", "privacy.epsilom", "epsilon"),
        ("name", "recrods = 1\nname", "sites[...].recrods", "records"),
    ],
)
def test_an_unknown_field_suggests_the_closest_known_one(
    old: str, new: str, field: str, close: str
) -> None:
    error = refusal(GOOD.replace(old, new, 1))
    assert error.remedy == f"did you mean {close}?"
    assert error.field in (field, field.replace("...", "0"))


def test_an_unknown_field_like_no_other_lists_the_known_ones() -> None:
    error = refusal("zzz = 1\n" + GOOD)
    assert error.accepted == "title, privacy, sites, threads"
    assert error.remedy is not None
    assert "did you mean" not in error.remedy


def test_a_missing_field_names_the_table_that_lacks_it() -> None:
    error = refusal(GOOD.replace("epsilon = 3", ""))
    assert error.field == "privacy.epsilon"
    assert "[privacy]" in (error.remedy or "")
    assert refusal(GOOD.replace('title = "t"', "")).field == "title"


def test_an_unknown_alternative_is_refused_by_its_field() -> None:
    error = refusal(GOOD.replace('"local"', '"loca"'))
    assert (error.field, error.found) == ("privacy.mode", "'loca'")


def test_what_a_value_itself_refuses_is_told_in_its_words() -> None:
    assert refusal("threads = 9\n" + GOOD).accepted == "threads must be at most 8"


@given(st.text())
def test_any_text_is_accepted_or_a_config_error(text: str) -> None:
    try:
        parse_toml(text, Config, "run.toml")
    except ConfigError as error:
        assert "run.toml" in error.diagnostics()  # noqa: PT017  # accepted or this, nothing else


def test_a_choice_names_its_words() -> None:
    error = refusal(GOOD.replace('mode = "local"', 'mode = "locale"'))
    assert (error.field, error.found, error.accepted) == (
        "privacy.mode",
        "'locale'",
        "local, open",
    )
    with pytest.raises(ConfigError) as caught:
        parse_toml('kind = "c"', Choice, "run.toml")
    assert (caught.value.field, caught.value.accepted) == ("kind", "a, b")


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ('mixed = "some"', "all, a list in [ ]"),
        ("perhaps = []", "a number or a text in quotes"),
        ('names = ["A b"]', "letters, digits and hyphens, such as north-clinic"),
    ],
)
def test_what_is_accepted_is_said_in_words(text: str, accepted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_toml(text, Choice, "run.toml")
    assert accepted in str(caught.value.accepted)


def test_all_missing_fields_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_toml("[first]\n", Pair, "run.toml")
    assert caught.value.field == "title, first.name, second.name"
    assert caught.value.remedy == "add each of them"
