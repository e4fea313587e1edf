# SPDX-License-Identifier: Apache-2.0
"""The callbacks of a Trainer by class, and one put among them."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, LambdaCallback

from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of, insert_callback


class Special(LambdaCallback):
    pass


def trainer_with(*callbacks):
    return pl.Trainer(callbacks=[*callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu")  # fmt: skip


def test_those_of_a_class_and_its_subclasses_in_their_order():
    first, plain, second = LambdaCallback(), Callback(), Special()
    trainer = trainer_with(first, plain, second)
    assert callbacks_of(trainer, LambdaCallback) == [first, second]
    assert callbacks_of(trainer, Special) == [second]
    assert callbacks_of(trainer, LambdaCallback, but=first) == [second]
    assert set(callbacks_of(trainer, object)) >= {first, plain, second}


def test_one_is_put_behind_another_and_taken_out_of_a_new_list():
    first, last, ours = Callback(), Callback(), Special()
    trainer = trainer_with(first, last)
    take_out = insert_callback(trainer, ours, behind=first)
    walked = trainer.callbacks
    assert walked.index(ours) == walked.index(first) + 1
    take_out()
    assert ours in walked, "whoever walks the list comes to it"
    assert ours not in trainer.callbacks and last in trainer.callbacks
    take_out()
    assert last in trainer.callbacks


def test_a_callback_that_is_listed_twice_has_itself_beside_it():
    same, other = Special(), Special()
    trainer = trainer_with(same, other, same)
    assert callbacks_of(trainer, Special, but=same) == [other, same]
    assert callbacks_of(trainer, Special, but=other) == [same, same]
    assert callbacks_of(trainer, Special, but=Special()) == [same, other, same]
