"""Inputs that showed a bug. Each stays here under its own name after the bug is mended."""

import os
from pathlib import Path

import msgspec
import pytest
from vectors.cases import identity
from vectors.values import HEADER, IDENTITIES, PLAN, ROSTER

from umbel_client.site.config import ClientConfig
from umbel_common.errors import ConfigError, PlanError, RemoteProtocolError
from umbel_common.plans.check import check_plan
from umbel_common.secagg import participant
from umbel_common.secagg.rules import Rules
from umbel_common.toml_values import parse_toml


@pytest.mark.parametrize(
    "text", ["threads = " + "9" * 5000, "threads = " + "[" * 3000], ids=["digits", "nesting"]
)
def test_a_number_too_long_or_lists_too_deep_are_a_configuration_error(text: str) -> None:
    """tomllib raises a plain ValueError or RecursionError, not a TOMLDecodeError."""
    with pytest.raises(ConfigError):
        parse_toml(text, ClientConfig, Path("client.toml"))


def test_a_plan_whose_factor_is_no_matrix_is_refused() -> None:
    """Its initial adapter would end in an IndexError."""
    flat = msgspec.structs.replace(PLAN.lora.tensors[0], shape=(4,))
    lora = msgspec.structs.replace(PLAN.lora, tensors=(flat, *PLAN.lora.tensors[1:]))
    with pytest.raises(PlanError):
        check_plan(msgspec.structs.replace(PLAN, lora=lora))


def test_keys_of_a_site_that_only_the_header_knows_are_a_breach_of_protocol() -> None:
    """The operator signs a cohort with a site outside the roster, and plays that site."""
    cohort = ("site-a", "site-b", "site-d")
    header = msgspec.structs.replace(HEADER, cohort=cohort)
    rules = Rules(threshold=2, colluding=0, minimum_cohort=2)
    identities = {**IDENTITIES, "site-d": identity("site-d")}
    states, adverts = zip(
        *(
            participant.advertise(header, site, rules, identities[site], bytes(32), os.urandom)
            for site in cohort
        ),
        strict=True,
    )
    with pytest.raises(RemoteProtocolError):
        states[0].receive(adverts, ROSTER, os.urandom)
