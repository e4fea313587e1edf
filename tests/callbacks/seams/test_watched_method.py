# SPDX-License-Identifier: Apache-2.0
import copy
import inspect
import pickle

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.watched_method import WatchedMethod


class Module(pl.LightningModule):
    def training_step(self, batch, batch_idx):
        return batch + batch_idx


def watched(module, added):
    method = WatchedMethod(module, "training_step", lambda original, *args, **kwargs: original(*args, **kwargs) + added)
    override(module, "training_step", method)
    return method


def test_it_calls_what_it_replaces_and_looks_like_it():
    module = Module()
    inner = watched(module, 10)
    outer = watched(module, 100)
    assert module.training_step(1, batch_idx=2) == 113
    assert inspect.signature(module.training_step) == inspect.signature(Module().training_step)
    assert is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    assert is_overridden("training_step", module)
    restore(module, "training_step", outer)
    assert module.training_step(1, 2) == 13
    restore(module, "training_step", inner)
    assert "training_step" not in vars(module)


def test_copies_and_pickles_have_the_method_of_the_class():
    module = Module()
    watched(module, 10)
    watched(module, 100)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.training_step(1, 2) == 3 and other.training_step.__self__ is other


def doubled(batch, batch_idx):
    return 2 * batch


def test_copies_keep_what_others_put_there():
    module = Module()
    module.training_step = doubled
    watched(module, 10)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.training_step is doubled
