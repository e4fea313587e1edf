# SPDX-License-Identifier: Apache-2.0
"""The rows of a campaign, written while it runs: one that is stopped has lost nothing."""

import json


def written(rows, path=None):
    """The rows in a list; each is appended to the file as soon as it is there."""
    kept, file = [], path and path.open("w")
    for row in rows:
        kept.append(row)
        if file:
            file.write(json.dumps(row) + "\n")
            file.flush()
    return kept
