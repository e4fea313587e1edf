# SPDX-License-Identifier: Apache-2.0
"""Every optimization and regularization strategy for an unchanged Lightning run, at the cost of one pass.

`import lightning_optkit as ok` is enough: every public class stands here (`ok.Fuse`, `ok.EMA`, `ok.AdamW`), functions
stand in their module (`ok.schedules.cosine`, `ok.init.he`). Each is imported when it is first used, so that the import
itself loads neither torch nor Lightning. The names are listed in `__init__.pyi`, which type checkers and editors read.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
