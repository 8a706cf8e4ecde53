"""Gives the processes of a test a home folder of their own, and so a register of ledgers.

Umbel has no setting for the place of its register: it asks the system where the user's home is. So
the tests change what the system answers, in each Python process that inherits this folder in
PYTHONPATH.
"""

import os
import pwd

_entry_of = pwd.getpwuid


def _elsewhere(user: int) -> pwd.struct_passwd:
    fields = list(_entry_of(user))
    fields[5] = os.environ.get("UMBEL_HOME_OF_TESTS", fields[5])
    return pwd.struct_passwd(fields)


pwd.getpwuid = _elsewhere
