"""What a site demands of the sets of sites that a server names to it.

The law: a site counts for itself, at every stage, and never takes the server's word that a set is
large enough. Steps of `participant` that these checks are:

- `Rules.check_cohort`: S1.1
- `Rules.check_enough`: S2.4, S3.3 and S4.3
- `check_distinct`: S2.2, S3.2, S4.1 and S5.1
- `check_nested`: S3.2 and S4.2
"""

from collections import Counter
from collections.abc import Collection
from typing import Annotated

import msgspec

from umbel_common.canonical import Value
from umbel_common.errors import require


class Rules(Value, frozen=True):
    """One attempt's rules: the plan's threshold under the site's own policy."""

    threshold: Annotated[int, msgspec.Meta(ge=1)]
    """Number of shares that recover a secret."""
    colluding: Annotated[int, msgspec.Meta(ge=0)]
    """Number of sites that are assumed to collude with the server."""
    minimum_cohort: Annotated[int, msgspec.Meta(ge=1)]
    """Fewest sites among which this site's delta may hide, in every stage."""

    def check_cohort(self, cohort: Collection[str], site: str) -> None:
        """Refuses a cohort that this site does not join, before any secret is drawn.

        Raises:
            RemoteProtocolError: `not-in-cohort`, `cohort-too-small`, `threshold-too-high` or
                `threshold-too-low`.
        """
        size = len(cohort)
        require(
            site in cohort,
            "not-in-cohort",
            "this site is not in the cohort",
            field="cohort",
            found=site,
        )
        require(
            size >= self.minimum_cohort,
            "cohort-too-small",
            "a cohort is smaller than this site allows",
            found=size,
            accepted=f"at least {self.minimum_cohort}",
        )
        require(
            self.threshold <= size,
            "threshold-too-high",
            "a cohort cannot reach the threshold",
            found=self.threshold,
            accepted=f"at most {size}",
        )
        # Any two survivor sets that t sites each signed then share an honest signer, and an honest
        # site signs once: the server cannot have two sets unmasked in one attempt.
        require(
            2 * self.threshold > size + self.colluding,
            "threshold-too-low",
            "two survivor sets could both gather enough signatures",
            found=f"threshold {self.threshold}, {size} sites, {self.colluding} colluding",
            accepted=f"a threshold of at least {(size + self.colluding) // 2 + 1}",
        )

    def check_enough(self, check: str, sites: Collection[str]) -> None:
        """Refuses a stage that too few sites have reached; `check` is the code for that stage.

        Raises:
            RemoteProtocolError: `check`.
        """
        floor = max(self.threshold, self.minimum_cohort)
        require(
            len(sites) >= floor,
            check,
            "too few sites are left in this attempt",
            found=len(sites),
            accepted=f"at least {floor}",
        )


def check_distinct(sites: Collection[str]) -> None:
    """Refuses a site that is named twice.

    Raises:
        RemoteProtocolError: `duplicate-site`.
    """
    repeated = tuple(site for site, times in Counter(sites).items() if times > 1)
    require(not repeated, "duplicate-site", "a site is named twice", found=repeated)


def check_nested(sites: Collection[str], before: Collection[str]) -> None:
    """Refuses a site that an earlier stage did not have.

    Raises:
        RemoteProtocolError: `not-nested`.
    """
    strangers = tuple(sorted(set(sites) - set(before)))
    require(
        not strangers,
        "not-nested",
        "a stage names a site that an earlier stage did not",
        found=strangers,
        accepted=tuple(before),
    )
