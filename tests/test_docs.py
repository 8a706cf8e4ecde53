"""The documentation says what the code does."""

import re
from pathlib import Path

from umbel_common import errors

ROOT = Path(__file__).parent.parent


def leaves(kind: type[errors.UmbelError]) -> list[type[errors.UmbelError]]:
    children = kind.__subclasses__()
    return [kind] if not children else [leaf for child in children for leaf in leaves(child)]


def test_every_exit_code_is_documented_and_no_other() -> None:
    table = (ROOT / "docs" / "errors.md").read_text()
    documented = {
        name: int(code)
        for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE)
    }
    of_code = {kind.__name__: kind.exit_code for kind in leaves(errors.UmbelError)}
    assert documented == {"UmbelError": 1, **of_code}


def test_every_exit_code_is_in_the_range_of_its_kind() -> None:
    ranges = {
        range(10, 20): "ConfigError DataError ModelError PlanError",
        range(20, 30): "IdentityError SignatureError",
        range(30, 40): "PolicyRefusal BudgetError CalibrationError LedgerError",
        range(40, 50): "RemoteProtocolError LocalProtocolError RoundAborted JobFailed",
        range(50, 60): "StorageError RunExists VerificationError",
    }
    for kind in leaves(errors.UmbelError):
        (home,) = [codes for codes, names in ranges.items() if kind.__name__ in names.split()]
        assert kind.exit_code in home


def test_no_two_errors_share_an_exit_code() -> None:
    codes = [kind.exit_code for kind in leaves(errors.UmbelError)]
    assert len(codes) == len(set(codes))
