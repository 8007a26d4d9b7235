"""Makes the table of docs/reliability.md from the JSON lines of the chaos tests.

Usage: `python tests/chaos/table.py FILE`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(lines: list[str]) -> str:
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for line in lines:
        row = json.loads(line)
        rows.setdefault(row["fault"], {})[row["backend"]] = row
    backends = sorted({b for by in rows.values() for b in by})
    out = [f"| fault | {' | '.join(backends)} | lost or repeated |", f"|---|{'---|' * len(backends)}---|"]
    for fault, by in rows.items():
        cells = []
        for backend in backends:
            row = by.get(backend)
            if row is None:
                cells.append("not run")
                continue
            same = row["weights"] == 0 and row["same_metrics"]
            end = "bitwise" if same else f"weights {row['weights']:.1e}, losses {row['losses']:.1e}"
            cells.append(f"{row['times']:g} times: {end}")
        out.append(f"| {fault} | {' | '.join(cells)} | {sum(r['lost_or_repeated'] for r in by.values()):g} |")
    return "\n".join(out)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text().splitlines()))
