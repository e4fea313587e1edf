# SPDX-License-Identifier: Apache-2.0
"""Counts of runs, with the intervals that they allow to claim."""

from collections import Counter

SILENT = "(none)"


def wilson(hits, total, z=1.96):
    """The 95 % interval of a share, after Wilson 1927.

    >>> [round(bound, 2) for bound in wilson(57, 60)]
    [0.86, 0.98]
    """
    if not total:
        return 0.0, 1.0
    share, z2 = hits / total, z * z / total
    middle, half = share + z2 / 2, z * (share * (1 - share) / total + z2 / total / 4) ** 0.5
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def at_most(total):
    """The 95 % bound of a share of which no case was seen.

    >>> round(at_most(300), 3)
    0.01
    """
    return 1 - 0.05 ** (1 / total) if total else 1.0


def claim(hits, total):
    """In words: 57/60 = 95 % (86 to 98).

    >>> claim(57, 60)
    '57/60 = 95 % (86 to 98)'
    """
    low, high = wilson(hits, total)
    return f"{hits}/{total} = {hits / max(total, 1):.0%} ({100 * low:.0f} to {100 * high:.0f})".replace("%", " %")


def confusion(rows):
    """Lines of a table: per fault, how often it was named, and what else came first."""
    faults = {}
    for row in rows:
        faults.setdefault(row["fault"], []).append(row)
    lines = ["| fault | accepted | named first | named at all | otherwise first |", "|---|---|---|---|---|"]
    for fault, runs in faults.items():
        others = Counter(row["primary"] or SILENT for row in runs if not row["named"])
        first = sum(row["named"] for row in runs)
        somewhere = sum(bool({*row["symptoms"]} & {*row["accepted"]}) for row in runs)
        other = ", ".join(f"{name} {count}" for name, count in others.most_common())
        accepted = ", ".join(sorted(runs[0]["accepted"]))
        lines.append(f"| {fault} | {accepted} | {claim(first, len(runs))} | {somewhere} | {other} |")
    return lines


def summary(rows):
    """Lines with the totals of a benchmark."""
    healthy = [row for row in rows if row["fault"] is None and row["counts"]]
    alarms = [row for row in healthy if row["primary"]]
    lines = []
    if healthy:
        bound = f"; below {at_most(len(healthy)):.1%}" if not alarms else ""
        lines.append(f"alarms on healthy runs: {claim(len(alarms), len(healthy))}{bound}")
        lines += [f"  {row['family']}, {row['trap']}, seed {row['seed']}: {_said(row)}" for row in alarms]
    for name, is_held_out in (("calibration", False), ("held out", True)):
        faulty = [r for r in rows if r["fault"] is not None and r["held_out"] == is_held_out and r["counts"]]
        if faulty:
            lines.append(f"faults named first, {name}: {claim(sum(r['named'] for r in faulty), len(faulty))}")
    sick = [row for row in rows if row["fault"] is None and not row["counts"]]
    if sick:
        named = ", ".join(f"{row['family']} with {row['trap']}: {row['primary'] or SILENT}" for row in sick)
        lines.append(f"meant to be healthy, but learned nothing: {named}")
    left_out = sum(row["fault"] is not None and not row["counts"] for row in rows)
    if left_out:
        lines.append(f"faulty runs left out, since they learn as well as their healthy twins: {left_out}")
    return [*lines, "", *confusion([row for row in rows if row["fault"] is not None and row["counts"]])]


def _said(row):
    """An alarm; of a rate, with what was learned at it and at one that is three times as low or high."""
    other = row.get("at_other_rate")
    return row["primary"] + ("" if other is None else f" (score {row['score']:.2f}, at the other rate {other:.2f})")
