# SPDX-License-Identifier: Apache-2.0
"""Every optimization and regularization strategy for an unchanged Lightning run, at the cost of one pass.

`import lightning_optkit as ok` is enough: it has every public class (`ok.Fuse`, `ok.EMA`, `ok.AdamW`), and functions in
their modules (`ok.schedules.cosine`, `ok.init.he`). Each is imported when it is first used, so that the import itself
loads neither torch nor Lightning. The names are listed in `__init__.pyi`, which type checkers and editors read.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
