# SPDX-License-Identifier: Apache-2.0
"""Initialize in real Trainers: what it draws, what it prints, and that nothing else changes."""

from functools import partial

import pytest
import torch
from initialize_cases import LABELS, ROWS, Classifier, drawn, sgd, starting, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import Initialize, Preprocess
from lightning_optkit.data import Standardize
from lightning_optkit.init import depth_scaled, fixup, he, lsuv, orthogonal, truncated_normal, xavier, zero_residual

pytestmark = pytest.mark.filterwarnings("ignore:.*the signal (dies|blows up).*")

start = pytest.fixture(starting)


@pytest.mark.parametrize("scheme", [he, xavier, orthogonal, partial(truncated_normal, std=0.02)])
def test_the_weights_are_those_of_the_pure_function(start, scheme):
    module = Classifier()
    start(module, Initialize(scheme, seed=0))
    torch.testing.assert_close(weights(module), drawn(scheme), rtol=0, atol=0)


def test_without_a_seed_it_is_that_of_seed_everything(start):
    torch.manual_seed(11)
    module = Classifier()
    start(module, Initialize(he))
    torch.testing.assert_close(weights(module), drawn(he, seed=11), rtol=0, atol=0)


def test_drawn_after_configure_model_and_before_configure_optimizers(start):
    seen = []

    class Late(Classifier):
        def configure_model(self):
            self.head = nn.Linear(3, 3)

        def configure_optimizers(self):
            seen.append(weights(self))
            return super().configure_optimizers()

    module, expected = Late(), Late()
    start(module, Initialize(he, seed=0))
    expected.configure_model()
    torch.testing.assert_close(seen, [drawn(he, expected)], rtol=0, atol=0)


def test_several_schemes_in_order(start):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc2(self.fc1(x).relu())

    def make():
        module = Classifier()
        module.net = nn.Sequential(Block(), Block(), nn.Linear(4, 3))
        return module

    module, expected, fixed = make(), make(), make()
    callback = Initialize([truncated_normal, depth_scaled], seed=0)
    start(module, callback)
    drawn(truncated_normal, expected)
    depth_scaled(expected)
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=0)
    assert [row.scheme for row in callback.rows][-2:] == ["depth_scaled, 1/sqrt(2)"] * 2
    start(fixed, Initialize(fixup))
    assert not fixed.net[0].fc2.weight.any() and not fixed.net[2].weight.any()


def test_a_branch_that_is_meant_to_be_silent_is_no_warning(start, recwarn):
    module = Classifier(norm=False)
    with pytest.warns(UserWarning, match=r"after he, silence the signal dies in net.5;"):
        start(module, Initialize([he, silence]))
    head = partial(zero_residual, pattern=r"net\.5$")
    recwarn.clear()
    start(Classifier(norm=False), Initialize([he, head]))
    assert not [warning for warning in recwarn if "the signal dies" in str(warning.message)]


def silence(model):
    """A custom scheme."""
    nn.init.zeros_(model.net[5].weight)


def test_lsuv_takes_a_batch_of_the_trainers_own_loader(start):
    module, callback = Classifier(norm=False), Initialize(lsuv)
    start(
        module,
        Preprocess(Standardize()),
        callback,
        train=DataLoader(TensorDataset(ROWS * 50 + 9, LABELS), batch_size=8),
    )
    standard = Standardize().fit(ROWS * 50 + 9)(ROWS * 50 + 9)
    with torch.no_grad():
        hidden = module.net[0](standard)
        variances = [hidden.var(), module.net[3](hidden.relu()).var()]
    torch.testing.assert_close(torch.stack(variances), torch.ones(2), rtol=0, atol=0.05)
    linear = [row for row in callback.after if row.kind == "Linear"]
    assert all(abs(row.variance - 1) < 0.02 for row in linear) and len(linear) == 3


def test_the_order_of_callbacks_does_not_matter_to_what_lsuv_sees(start):
    first, second = Classifier(), Classifier()
    start(first, Preprocess(Standardize()), Initialize(lsuv, seed=1))
    start(second, Initialize(lsuv, seed=1), Preprocess(Standardize()))
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


# --- nothing else changes ---


def test_the_run_is_as_if_the_module_had_been_drawn_by_hand(start, frozen):
    def train(*callbacks, by_hand=False):
        torch.manual_seed(2)
        module = Classifier()
        if by_hand:
            drawn(he, module, seed=7)
        trainer = start(module, *callbacks, steps=4)
        return frozen(module.state_dict()), module.outputs, trainer.callback_metrics, torch.rand(2)

    expected, found = train(by_hand=True), train(Initialize(he, seed=7))
    assert found[:2] == expected[:2]
    torch.testing.assert_close(found[2:], expected[2:], rtol=0, atol=0)


def test_the_trial_step_leaves_no_trace(start):
    module = Classifier()
    states = []

    def configure(module):
        states.append((dict(vars(module)), [*module.outputs], module.accuracy.update_called, module.training))
        return sgd(module)

    module.configure = configure
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    start(module, Initialize(lsuv))
    attributes, outputs, metric_used, training = states[0]
    assert outputs == [] and not metric_used and training and "last" not in attributes
    assert not {"log", "log_dict"} & set(attributes)
    torch.testing.assert_close(dict(module.named_buffers()), buffers, rtol=0, atol=0)
    assert not any(child._forward_hooks for child in module.modules())


# --- the table, and warnings ---


def test_it_prints_mean_and_variance_before_and_after(start, printed):
    callback = Initialize(he)
    start(Classifier(), callback)
    table = printed()
    assert "Initialize: he, activations of one training batch" in table
    header = next(line for line in table.splitlines() if line.startswith("layer"))
    assert [header.count(word) for word in ("mean before", "variance before", "mean after", "variance after")] == [
        1
    ] * 4
    for row in callback.after:
        assert f"{row.layer}" in table and f"{row.variance:.3g}" in table
    assert [row.layer for row in callback.before] == [row.layer for row in callback.after]


def test_a_scheme_of_one_s_own_may_be_an_object(start, printed):
    class Halves:
        def __call__(self, tensor):
            return nn.init.constant_(tensor, 0.5)

    module = Classifier()
    start(module, Initialize(Halves()))
    assert torch.equal(module.net[0].weight, torch.full((8, 4), 0.5))
    assert "Initialize: Halves, activations of one training batch" in printed()


@pytest.mark.parametrize(("std", "verdict"), [(1e-4, "dies"), (1e3, "blows up")])
def test_it_warns_where_the_signal_dies_or_blows_up(start, std, verdict):
    tiny = partial(truncated_normal, std=std)
    with pytest.warns(
        UserWarning, match=rf"after truncated_normal the signal {verdict} in net.0, net.1.*; standardize"
    ):
        start(Classifier(norm=False), Initialize(tiny))


def test_quiet_without_a_table(start, printed):
    class Untouched(Classifier):
        def training_step(self, batch, batch_idx):
            raise AssertionError("must not be run")

    start(Untouched(), Initialize(he, verbose=False))
    assert "activations" not in printed()


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def test_a_step_that_cannot_be_tried_costs_the_table_only(start):
    module = Manual()
    with pytest.warns(
        UserWarning, match=r"without a table of activations. Initialize\(forward=None\): training_step could"
    ):
        start(module, Initialize(he, seed=0), accumulate_grad_batches=1)
    torch.testing.assert_close(weights(module), drawn(he), rtol=0, atol=0)


def test_schemes_that_need_data_say_how_to_run_the_module(start, printed):
    with pytest.raises(
        RuntimeError, match=r"it steps an optimizer by itself\); pass forward=lambda module, batch: \.\.\."
    ):
        start(Manual(), Initialize(lsuv), accumulate_grad_batches=1)
    start(Manual(), Initialize(lsuv, forward=lambda module, batch: module(batch[0])), accumulate_grad_batches=1)
    assert "net.0" in printed()


# --- undone, and refused ---


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_module_is_as_before(start, fails):
    module = Classifier()
    if fails:
        module.training_step = lambda batch, batch_idx: 1 / 0
        with pytest.raises(ZeroDivisionError):
            start(module, Initialize(he, verbose=False), steps=1)
    else:
        start(module, Initialize(he), steps=1)
    assert not {"configure_optimizers", "log", "log_dict"} & set(vars(module))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Initialize("he"),
            TypeError,
            r"Initialize\(scheme='he'\): scheme must be a function of lightning_optkit.i",
        ),
        (lambda: Initialize([]), TypeError, r"Initialize\(scheme=\[\]\)"),
        (
            lambda: Initialize(he, seed=-1),
            ValueError,
            r"Initialize\(seed=-1\): seed must be an integer >= 0",
        ),
        (lambda: Initialize(he, seed=True), TypeError, r"Initialize\(seed=True\)"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_unknown_submodule_and_a_second_initialize_are_refused(start):
    with pytest.raises(ValueError, match=r"Initialize\(only='head'\): only must name a submodule of Classifier"):
        start(Classifier(), Initialize(he, only="head"))
    with pytest.raises(ValueError, match=r"Initialize\(\.\.\.\): given twice"):
        start(Classifier(), Initialize(he), Initialize(xavier))


def test_a_strategy_that_flattens_parameters_is_refused(start, make_trainer):
    class FSDPStrategy(type(make_trainer().strategy)):
        pass

    with pytest.raises(
        ValueError, match=r"Initialize\(\.\.\.\) under FSDPStrategy: it keeps parameters in a form of its own"
    ):
        start(Classifier(), Initialize(he), strategy=FSDPStrategy(device="cpu"))
