# SPDX-License-Identifier: Apache-2.0
"""Intercepting losses: every way to call a loss, several transforms, and modules whose loss cannot be intercepted."""

import inspect
import itertools

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optkit.callbacks.seams.losses import SMOOTHING, TARGETS, WATCHING, LossCall, intercept, release


class Module(pl.LightningModule):
    """`training_step(*anything)` is the given function."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step()

    def validation_step(self, batch, batch_idx):
        return self.step()


class Watcher:
    """A transform that records the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, call, loss):
        self.calls.append(call)
        return loss(call)


torch.manual_seed(0)
LOGITS = torch.randn(6, 3)
LOG_PROBABILITIES = LOGITS.log_softmax(1)
TARGET = torch.tensor([0, 2, -100, 1, 1, 0])
VALID = TARGET.clamp(0)
WEIGHT = torch.tensor([1.0, 2.0, 0.5])
SOFT = torch.rand(6, 3)
ONES = (SOFT > 0.5).float()

WAYS = {
    "positional": (lambda: F.cross_entropy(LOGITS, VALID, WEIGHT, None, 1, None, "sum", 0.2), "cross_entropy"),
    "by name": (lambda: F.cross_entropy(target=TARGET, input=LOGITS, weight=WEIGHT), "cross_entropy"),
    "module": (lambda: nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1)(LOGITS, VALID), "cross_entropy"),
    "no reduction": (lambda: F.cross_entropy(LOGITS, TARGET, reduction="none").sum(), "cross_entropy"),
    "old reduction": (lambda: F.cross_entropy(LOGITS, TARGET, size_average=False), "cross_entropy"),
    "soft": (lambda: F.cross_entropy(LOGITS, SOFT, WEIGHT), "cross_entropy"),
    "images": (lambda: F.cross_entropy(LOGITS.view(2, 3, 3), VALID.view(2, 3)), "cross_entropy"),
    "one example": (lambda: F.cross_entropy(LOGITS[0], TARGET[0]), "cross_entropy"),
    "nll": (lambda: F.nll_loss(LOG_PROBABILITIES, TARGET, WEIGHT, reduction="sum"), "nll_loss"),
    "nll module": (lambda: nn.NLLLoss()(LOG_PROBABILITIES, TARGET), "nll_loss"),
    "binary, logits": (
        lambda: nn.BCEWithLogitsLoss(weight=SOFT, pos_weight=WEIGHT)(LOGITS, ONES),
        "binary_cross_entropy_with_logits",
    ),
    "binary": (lambda: F.binary_cross_entropy(LOGITS.sigmoid(), ONES, SOFT), "binary_cross_entropy"),
}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@ways
def test_every_way_of_calling_a_loss_is_seen_and_changes_nothing_by_itself(way):
    function, name = WAYS[way]
    module, watcher = Module(function), Watcher()
    intercept(module, "Watcher", watcher, WATCHING)
    assert torch.equal(module.training_step(None, 0), function())
    (call,) = watcher.calls
    assert call.name == name


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_the_arguments_have_their_names():
    module, watcher = Module(WAYS["positional"][0]), Watcher()
    intercept(module, "Watcher", watcher, WATCHING)
    module.training_step(None, 0)
    assert watcher.calls == [LossCall("cross_entropy", LOGITS, VALID, WEIGHT, None, 1, "sum", 0.2)]
    module.step = WAYS["old reduction"][0]
    module.training_step(None, 0)
    assert watcher.calls[1].reduction == "sum"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_nll_loss_takes_what_cross_entropy_takes(reduction, weight):
    arguments = dict(weight=weight, reduction=reduction)
    smoothed = LossCall("nll_loss", LOG_PROBABILITIES, TARGET, label_smoothing=0.1, **arguments)
    soft = LossCall("nll_loss", LOG_PROBABILITIES, SOFT, **arguments)
    torch.testing.assert_close(smoothed.compute(), F.cross_entropy(LOGITS, TARGET, label_smoothing=0.1, **arguments))
    torch.testing.assert_close(soft.compute(), F.cross_entropy(LOGITS, SOFT, **arguments))


@pytest.mark.parametrize("order", list(itertools.permutations([TARGETS, SMOOTHING, WATCHING])), ids=str)
def test_transforms_compose_in_their_order_whoever_comes_first(order):
    said, module = [], Module(WAYS["by name"][0])

    def transform(rank):
        def say(call, loss):
            said.append(rank)
            return loss(call)

        return say

    for rank in order:
        intercept(module, f"Say{rank}", transform(rank), rank)
    module.training_step(None, 0)
    assert said == [TARGETS, SMOOTHING, WATCHING]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mixture_of_losses_is_smoothed_and_watched_twice(reduction):
    watcher, partners = Watcher(), torch.tensor([1, 0, 3, 2, 5, 4])
    arguments = dict(weight=WEIGHT, reduction=reduction)

    def mix(call, loss):
        return 0.3 * loss(call) + 0.7 * loss(call.changed(target=call.target[partners]))

    def smooth(call, loss):
        return loss(call.changed(label_smoothing=0.1))

    module = Module(lambda: F.cross_entropy(LOGITS, TARGET, **arguments))
    for owner, transform, order in (("W", watcher, WATCHING), ("S", smooth, SMOOTHING), ("M", mix, TARGETS)):
        intercept(module, owner, transform, order)
    expected = [F.cross_entropy(LOGITS, t, label_smoothing=0.1, **arguments) for t in (TARGET, TARGET[partners])]
    assert torch.equal(module.training_step(None, 0), 0.3 * expected[0] + 0.7 * expected[1])
    assert [call.label_smoothing for call in watcher.calls] == [0.1, 0.1]


def test_only_training_goes_through_the_seam():
    module, watcher = Module(WAYS["by name"][0]), Watcher()
    intercept(module, "Watcher", watcher, WATCHING)
    module.validation_step(None, 0)
    assert not watcher.calls


def test_autocast_is_as_it_was():
    module, watcher = Module(lambda: F.cross_entropy(LOGITS @ torch.eye(3), TARGET)), Watcher()
    intercept(module, "Watcher", watcher, WATCHING)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = module.training_step(None, 0), module.step()
    assert watcher.calls[0].input.dtype == torch.bfloat16
    assert torch.equal(loss, expected) and loss.dtype == expected.dtype


# --- reached or not ---


def by_hand():
    return -LOG_PROBABILITIES.gather(1, VALID[:, None]).mean()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: nn.MSELoss()(LOGITS, SOFT), r"^A\(\), B\(\): needs .* computed mse_loss, a regression loss\.$"),
        (by_hand, r"^A\(\), B\(\): training_step returned a loss that cannot be reached; compute it by one of .*"),
    ],
    ids=["regression", "by hand"],
)
def test_a_loss_that_cannot_be_reached_raises_after_the_first_training_step(step, message):
    module = Module(step)
    intercept(module, "B", Watcher(), SMOOTHING)
    intercept(module, "A", Watcher(), TARGETS)
    with pytest.raises(RuntimeError, match=message):
        module.training_step(None, 0)


def test_a_first_step_without_a_loss_and_later_steps_with_another_one_are_fine():
    module = Module(lambda: None)
    intercept(module, "A", Watcher(), TARGETS)
    for step in (lambda: None, WAYS["by name"][0], by_hand):
        module.step = step
        module.training_step(None, 0)


def test_a_second_use_must_reach_the_loss_again():
    module, watcher = Module(WAYS["by name"][0]), Watcher()
    intercept(module, "A", watcher, TARGETS)
    module.training_step(None, 0)
    release(module, watcher)
    intercept(module, "A", watcher, TARGETS)
    module.step = by_hand
    with pytest.raises(RuntimeError, match=r"^A\(\)"):
        module.training_step(None, 0)


# --- undone ---


class Bound:
    def transform(self, call, loss):
        return loss(call)


def test_released_in_any_order_nothing_is_left():
    module = Module(WAYS["by name"][0])
    before = dict(vars(module))
    bound, watcher = Bound(), Watcher()
    for first, second in ((bound.transform, watcher), (watcher, bound.transform)):
        intercept(module, "A", bound.transform, TARGETS)
        intercept(module, "B", watcher, WATCHING)
        release(module, first)
        module.training_step(None, 0)
        release(module, second)
        release(module, second)
        assert vars(module) == before
    assert len(watcher.calls) == 1


def test_an_exception_in_training_step_ends_the_seam():
    module = Module(lambda: 1 / 0)
    intercept(module, "A", Watcher(), TARGETS)
    with pytest.raises(ZeroDivisionError):
        module.training_step(None, 0)
    assert not torch.overrides._get_current_function_mode_stack()


def test_lightning_sees_the_signature_of_the_module():
    module = Module(WAYS["by name"][0])
    expected = inspect.signature(module.training_step)
    intercept(module, "A", Watcher(), TARGETS)
    assert inspect.signature(module.training_step) == expected


# --- compiled ---


@pytest.mark.parametrize("compiled", ["net", "net and loss"])
def test_a_compiled_submodule_is_seen_through(compiled):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            y = self.linear(x)
            return y if compiled == "net" else F.cross_entropy(y, TARGET)

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = Net()
    fast = torch.compile(net, backend=count)
    module = Module(lambda: fast(LOGITS) if compiled != "net" else F.cross_entropy(fast(LOGITS), TARGET))

    def smooth(call, loss):
        return loss(call.changed(label_smoothing=0.1))

    intercept(module, "A", smooth, SMOOTHING)
    expected = F.cross_entropy(net.linear(LOGITS), TARGET, label_smoothing=0.1)
    for _ in range(4):
        torch.testing.assert_close(module.training_step(None, 0), expected)
    assert len(graphs) <= 2  # the second one, with the loss inside, knows that it was intercepted
