"""`make sensitivity`: how far one record moves the clipped sum under an adapter that amplifies.

For each model, with and without the cache of frozen layers, in float32 and bfloat16: where the
longest record of the batch decides how far all are padded, and where each record has a shape of its
own. The target of the latter is 1 clip norm, up to the rounding of clipping and sum.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.amplifying import CASES, CLIPPING, RECORDS, measured


def main(path: Path) -> int:
    """Writes `path`; returns 1 if a record moves the sum by more than the clip norm."""
    rows = []
    for case in CASES:
        for cached in (False, True):
            for precision in ("float32", "bfloat16"):
                with tempfile.TemporaryDirectory() as folder:
                    found = measured(Path(folder), case, cached=cached, precision=precision)
                rows.append(
                    {
                        "model": case,
                        "prefix_cache": cached,
                        "precision": precision,
                        "before": round(found.before, 4),
                        "after": round(found.after, 7),
                        "holds": found.after <= 1 + CLIPPING,
                    }
                )
                print(rows[-1], flush=True)
    document = {"command": "make sensitivity", "records": len(RECORDS), "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
