# SPDX-License-Identifier: Apache-2.0
"""A file of the command line that is not there."""

from pathlib import Path

from lightning_optkit._near_names import near_names

__all__ = ["about_missing_file"]


def about_missing_file(path: Path) -> str:
    """What to say of it: the names in its folder that are near, or that there is no such folder.

    Args:
        path: Of nothing that exists.

    Example:
        >>> about_missing_file(Path("no/folder/of_that.yaml"))
        'there is no such file, and no folder no/folder.'
    """
    if not path.parent.is_dir():
        return f"there is no such file, and no folder {path.parent}."
    near = near_names(path.name, [each.name for each in path.parent.iterdir() if each.is_file()])
    return " ".join(["there is no such file.", *([f"Near it: {', '.join(near)}."] if near else [])])
