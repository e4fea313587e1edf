# SPDX-License-Identifier: Apache-2.0
"""A misspelled option, command or choice: the message of the parser with the names that are near it."""

import re

from lightning_optkit._near_names import near_names

__all__ = ["with_near_options"]


def with_near_options(message: str, shown: str) -> str:
    """The message, with what was meant if that can be told.

    Args:
        message: What the parser would print.
        shown: The help of the parser, which has its options.

    Example:
        >>> with_near_options("unrecognized arguments: --ckpt_pth last.ckpt", "  --ckpt_path CKPT_PATH")
        'unrecognized arguments: --ckpt_pth last.ckpt. Near it: --ckpt_path.'
        >>> with_near_options("argument shell: invalid choice: 'bsh' (choose from 'bash', 'zsh')", "")
        "argument shell: invalid choice: 'bsh' (choose from 'bash', 'zsh'). Near it: bash."
    """
    dashes, near = "", []
    if found := re.match(r"unrecognized arguments: (?:[^-]\S* )*--([\w.-]+)", message):
        dashes, near = "--", near_names(found[1], re.findall(r"(?<![\w-])--([\w.-]*\w)", shown))
    elif found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message):
        near = near_names(found[1], re.findall(r"[\w.-]+", found[2]))
    return f"{message}. Near it: {', '.join(dashes + name for name in near)}." if near else message
