"""How Umbel's packages are installed, as advice in an error.

Umbel is on no package index. A line that names it there would install whatever somebody else
registers under the name.
"""


def install(*extras: str) -> str:
    """The command that installs what one or more extras of pyproject.toml name."""
    return f'pip install -c constraints.txt ".[{",".join(extras)}]" in the folder of your clone'
