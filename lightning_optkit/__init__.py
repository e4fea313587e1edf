# SPDX-License-Identifier: Apache-2.0
"""Every optimization and regularization strategy for an unchanged Lightning run, at the cost of one pass.

`import lightning_optkit as ok` is enough: it has every public class (`ok.Fuse`, `ok.EMA`, `ok.AdamW`), and functions in
their modules (`ok.schedules.cosine`, `ok.init.he`). Each is imported when it is first used, so that the import itself
loads neither torch nor Lightning. The names are listed in `__init__.pyi`, which type checkers and editors read.
"""

from typing import Any

import lazy_loader

__version__ = "0.1.0"

_loaded, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__ or name.startswith("_"):
        return _loaded(name)
    from lightning_optkit._near_names import refuse_name

    refuse_name(name, __name__, __all__)
