# SPDX-License-Identifier: Apache-2.0
"""Runs every claim of this folder and writes docs/claims.md from what they found.

python examples/claims/run.py [NAME ...] [--only-write]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"

HEAD = """# The chapter's claims, measured

What *Neural Networks and Deep Learning* (chapter 7) and the papers say, tried on real data with the parts of this
package. Written by `make claims` ({minutes:.0f} minutes of measuring); every script holds one claim, prints what it
finds, for and against, and keeps its numbers in `docs/claims/`. Small networks, few seeds: evidence, not proof. A
second run on one machine gives the same numbers; another CPU rounds differently, which can move a run as much as
another seed.
"""


def table_row(cells: list[str]) -> str:
    """One row of a Markdown table; a bar within a cell would begin another one."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def section(fragment: dict[str, Any]) -> str:
    """One claim as Markdown."""
    lines = [
        f"## {fragment['title']}",
        "",
        f"**Claim.** {fragment['claim']}",
        "",
        f"**Setup.** {fragment['setup']}",
        "",
    ]
    lines += [f"![{fragment['title']}]({fragment['figure']})", "", f"*{fragment['caption']}*", ""]
    lines += [table_row(fragment["header"]), f"|{'---|' * len(fragment['header'])}"]
    lines += [table_row(row) for row in fragment["rows"]]
    lines += ["", "**Found.**", "", *(f"- {finding}" for finding in fragment["findings"]), ""]
    lines += [f"`python {fragment['script']}`, {fragment['seconds']} s.", ""]
    return "\n".join(lines)


def assemble(fragments: list[dict[str, Any]]) -> str:
    """The whole page, claims in their order."""
    ordered = sorted(fragments, key=lambda fragment: (fragment["order"], fragment["title"]))
    head = HEAD.format(minutes=sum(fragment["seconds"] for fragment in ordered) / 60)
    return "\n".join([head, *map(section, ordered)]).rstrip() + "\n"


def main() -> int:
    scripts = {path.stem: path for path in sorted(HERE.glob("*.py")) if path.stem != "run" and path.stem[0] != "_"}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"claims to measure: {', '.join(scripts)}; default: all"
    )
    parser.add_argument("--only-write", action="store_true", help="put together what is there, without measuring")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(scripts))
    if unknown:
        parser.error(f"no claim is called {unknown[0]!r}; there are {', '.join(scripts)}")
    names = [] if arguments.only_write else arguments.names or list(scripts)
    for place, name in enumerate(names, start=1):
        print(f"[{place}/{len(names)}] {name}", flush=True)
        started = time.perf_counter()
        if subprocess.run([sys.executable, str(scripts[name])]).returncode:
            print(f"{name} failed after {time.perf_counter() - started:.0f} s; docs/claims.md is left as it was.")
            return 1
    fragments = [json.loads(path.read_text()) for path in sorted((DOCS / "claims").glob("*.json"))]
    (DOCS / "claims.md").write_text(assemble(fragments))
    print(f"docs/claims.md: {len(fragments)} claims")
    return 0


if __name__ == "__main__":
    sys.exit(main())
