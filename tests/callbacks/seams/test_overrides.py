# SPDX-License-Identifier: Apache-2.0
"""Overrides of one module instance, removed in any order."""

import itertools
import types

import lightning.pytorch as pl
import pytest

from lightning_optkit.callbacks.seams.overrides import override, restore


class Module(pl.LightningModule):
    def configure_optimizers(self):
        return ["the class's"]


def put_before(module, name):
    """A function that returns its name, then calls the previous one."""
    original = module.configure_optimizers

    def function():
        return [name, *original()]

    override(module, "configure_optimizers", function)
    return function


def test_an_override_is_called_first_and_leaves_no_trace():
    module = Module()
    before = dict(vars(module))
    function = put_before(module, "ours")
    assert module.configure_optimizers() == ["ours", "the class's"]
    restore(module, "configure_optimizers", function)
    assert vars(module) == before
    assert module.configure_optimizers() == ["the class's"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_three_are_undone_in_any_order(order):
    module = Module()
    before = dict(vars(module))
    functions = [put_before(module, index) for index in range(3)]
    assert module.configure_optimizers() == [2, 1, 0, "the class's"]
    for place, index in enumerate(order):
        restore(module, "configure_optimizers", functions[index])
        left = [i for i in (2, 1, 0) if i not in order[: place + 1]]
        assert vars(module).get("configure_optimizers") is (functions[left[0]] if left else None)
    assert vars(module) == before


def pieces_of_a_run():
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    return {
        "strategy": (trainer.strategy, "batch_to_device"),
        "precision": (trainer.precision_plugin, "convert_input"),
        "loop": (trainer.fit_loop, "setup_data"),
        "epoch loop": (trainer.fit_loop.epoch_loop, "on_run_start"),
        "validation loop": (trainer.fit_loop.epoch_loop.val_loop, "run"),
    }


@pytest.mark.parametrize("piece", ["strategy", "precision", "loop", "epoch loop", "validation loop"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(2))), ids=str)
def test_two_share_a_method_of_whatever_lightning_calls(piece, order):
    owner, name = pieces_of_a_run()[piece]
    before, calls = dict(vars(owner)), []

    def through(who, inner):
        def function(*args):
            calls.append(who)
            return inner(*args)

        return function

    functions = [through(0, lambda *args: "its own")]
    override(owner, name, functions[0])
    functions.append(through(1, getattr(owner, name)))
    override(owner, name, functions[1])
    assert getattr(owner, name)(None) == "its own" and calls == [1, 0]
    restore(owner, name, functions[order[0]])
    assert vars(owner)[name] is functions[order[1]]
    restore(owner, name, functions[order[1]])
    assert {key: value for key, value in vars(owner).items() if callable(value)} == {
        key: value for key, value in before.items() if callable(value)
    }


def test_what_the_user_put_there_comes_back():
    module = Module()
    users = types.MethodType(lambda self: ["the user's"], module)  # as LightningCLI does
    module.configure_optimizers = users
    function = put_before(module, "ours")
    assert module.configure_optimizers() == ["ours", "the user's"]
    restore(module, "configure_optimizers", function)
    assert module.configure_optimizers is users


def test_what_the_user_put_on_top_stays_when_ours_goes():
    module = Module()
    function = put_before(module, "ours")
    users = types.MethodType(lambda self: ["the user's"], module)
    module.configure_optimizers = users
    restore(module, "configure_optimizers", function)
    assert module.configure_optimizers is users


def test_restoring_twice_or_before_overriding_does_nothing():
    module = Module()
    before = dict(vars(module))
    restore(module, "configure_optimizers", None)
    restore(module, "configure_optimizers", lambda: None)
    function = put_before(module, "ours")
    restore(module, "configure_optimizers", function)
    restore(module, "configure_optimizers", function)
    assert vars(module) == before


def test_other_instances_keep_the_method_of_the_class():
    module, other = Module(), Module()
    put_before(module, "ours")
    assert other.configure_optimizers() == ["the class's"]
