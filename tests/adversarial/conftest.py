"""A lying server and real trainers, with a tiny model and real journals and ledgers on disk.

An attack is written once, as the attacker runs it, and marked with the checks that stop it:
`@pytest.mark.attack("this-check", "that-check")`. It runs once without these checks, and must reach
its goal. Then it runs once with each of them alone, and that check must stop it.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

import pytest
from adversarial.federation import Federation
from adversarial.weaken import STOPPED_AS, Protection, Stopped, weaken
from support.proofs import remembered_check_round, remembered_self_test

from umbel_client.training.bit_test import check_round
from umbel_client.training.self_test import self_test


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs an attack without its checks, then once with each of them alone; all of this again on an
    attempt that its sites prepared, but for attacks that are marked as made for one way."""
    definition = metafunc.definition
    marker = definition.get_closest_marker("attack")
    if marker is not None:
        ids = ["without " + " or ".join(marker.args), *(f"against {name}" for name in marker.args)]
        metafunc.parametrize("kept", [None, *marker.args], ids=ids, scope="function")
    if "prepares" in metafunc.fixturenames and marker is not None:
        made_for = definition.get_closest_marker("way")
        both = [False, pytest.param(True, marks=pytest.mark.full)]
        metafunc.parametrize("prepares", made_for.args if made_for else both, ids=_way)


def _way(prepares: bool) -> str:
    return "prepared" if prepares else "unprepared"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Compares the outcome of an attack with the expected one."""
    if pyfuncitem.get_closest_marker("attack") is None:
        return (yield)
    kept = pyfuncitem.callspec.params["kept"]
    stopped_by = None
    try:
        yield
    except Stopped as stopped:
        stopped_by = stopped.check
    # Without its checks, an attack must reach its goal; with one check, that check must stop it. An
    # attack that gains noise says by the barrier's name what stopped it.
    assert stopped_by in ({None} if kept is None else {STOPPED_AS.get(kept, kept), kept})
    return True


@pytest.fixture
def kept() -> str | None:
    """The one check that an attack runs against; None: it runs without all checks that it names."""
    return None


@pytest.fixture
def protection(
    request: pytest.FixtureRequest,
    kept: str | None,
    monkeypatch: pytest.MonkeyPatch,
    replace_everywhere: Callable[[object, object], None],
) -> Protection:
    """The checks that hold: all, or those that an attack leaves."""
    marker = request.node.get_closest_marker("attack")
    if marker is None:
        replace_everywhere(self_test, remembered_self_test)
        replace_everywhere(check_round, remembered_check_round)
        return Protection(frozenset())
    protection = Protection(frozenset(marker.args) - {kept})
    weaken(protection, monkeypatch, replace_everywhere)
    # An attack is one on the protocol: no site tries its noise and its model's bits before.
    for test in (self_test, check_round):
        replace_everywhere(test, lambda *arguments, **options: None)
    return protection


@pytest.fixture
def prepares() -> bool:
    """Whether the sites prepare each attempt."""
    return False


@pytest.fixture
def open_federation(
    tmp_path: Path, tiny_model: Path, protection: Protection, prepares: bool
) -> Iterator[Callable[..., Federation]]:
    """Makes a federation of some sites; `policies`: a site, or "*", -> lines of its policy."""
    made: list[Federation] = []

    def make(
        count: int = 3, policies: Mapping[str, str] | None = None, **plan_parts: object
    ) -> Federation:
        made.append(
            Federation(tmp_path, tiny_model, protection, count, policies or {}, **plan_parts)
        )
        made[-1].prepares = prepares
        return made[-1]

    yield make
    for federation in made:
        for trainer in federation.trainers.values():
            trainer.close()


@pytest.fixture
def federation(open_federation: Callable[..., Federation]) -> Federation:
    """Three sites that have accepted nothing yet."""
    return open_federation()
