"""What a data set's releases may cost, apart from the accountants that compute what they do cost.

A policy states a budget and a ledger holds to it. Only the ledger needs an accountant, and with it
torch: reading a site's configuration does not wait for that.
"""

from umbel_common.canonical import Value


class Budget(Value, frozen=True):
    """What all releases from one data set may cost together; infinite where anything may leave."""

    epsilon: float
    delta: float
