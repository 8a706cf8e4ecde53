"""Writes the vectors: `python tests/vectors/generate.py [folder]`, or `make vectors`.

Everything is derived from labels, so the files change only if the protocol changes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

# So that it runs as a script; the tests have this folder's parent on their path already.
sys.path.insert(0, str(Path(__file__).parents[1]))

from vectors import attempts, messages, primitives, statements  # needs the path
from vectors.cases import Case  # needs the path

SUBJECTS: dict[str, Callable[[], list[Case]]] = {
    "shamir": primitives.shamir_cases,
    "keys": primitives.key_cases,
    "digests": primitives.digest_cases,
    "masks": primitives.mask_cases,
    "quantise": primitives.quantise_cases,
    "statements": statements.statement_cases,
    "messages": messages.message_cases,
    "attempt": attempts.attempt_cases,
}


def main(folder: Path) -> None:
    """Writes one file for each subject."""
    for subject, make in SUBJECTS.items():
        cases = make()
        assert len({case["name"] for case in cases}) == len(cases), f"{subject}: a name twice"
        document = {"version": "umbel/1", "subject": subject, "cases": cases}
        text = json.dumps(document, indent=1, ensure_ascii=True) + "\n"
        (folder / f"{subject}.json").write_text(text, encoding="ascii")
        print(f"{subject}: {len(cases)} cases")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
