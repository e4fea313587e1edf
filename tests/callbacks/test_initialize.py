# SPDX-License-Identifier: Apache-2.0
"""Initialize in real Trainers: when it draws, what it draws, what it prints, and that nothing else changes."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_optkit.callbacks import Fuse, Initialize, Preprocess
from lightning_optkit.data import Standardize
from lightning_optkit.init import (
    depth_scaled,
    fixup,
    he,
    initialize,
    lsuv,
    mup_width,
    orthogonal,
    truncated_normal,
    xavier,
    zero_residual,
)
from lightning_optkit.optimizers import AdamW

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*the signal (dies|blows up).*"),
]

ROWS = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


class Classifier(pl.LightningModule):
    """Everything in a training_step that must have no lasting effect: metrics, lists, BatchNorm, dropout, logging."""

    def __init__(self, width=8, configure=sgd, norm=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(4, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU(), nn.Dropout(0.5)]
            self.net = nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
        self.accuracy, self.outputs, self.configure = MulticlassAccuracy(3), [], configure

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log_dict({"loss": loss})
        self.log("accuracy", self.accuracy(logits, y))
        self.outputs.append(float(loss.detach()))
        self.last = loss
        return loss

    def configure_optimizers(self):
        return self.configure(self)


def loader(shuffle=True):
    return DataLoader(TensorDataset(ROWS, LABELS), batch_size=2, shuffle=shuffle)


@pytest.fixture
def start(make_trainer):
    """start(module, callbacks..., steps=0, ckpt_path=None, **trainer): the Trainer of a fit of that many steps."""

    def start_(module, *callbacks, steps=0, ckpt_path=None, train=None, **kwargs):
        trainer = make_trainer(*callbacks, **{"epochs": None, "max_steps": steps, **kwargs})
        trainer.fit(module, loader() if train is None else train, ckpt_path=ckpt_path)
        return trainer

    return start_


def weights(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def drawn(scheme, module=None, seed=0):
    module = module or Classifier()
    initialize(module, scheme, generator=torch.Generator().manual_seed(seed))
    return weights(module)


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


# --- when it draws ---


def test_a_resumed_run_is_left_alone_and_equals_an_uninterrupted_one(start, tmp_path, frozen, printed):
    def train(steps, ckpt_path=None):
        module = Classifier()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            trainer = start(
                module, Initialize(he, seed=1), steps=steps, ckpt_path=ckpt_path, train=loader(shuffle=False)
            )
        return trainer, module

    trainer, _ = train(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    printed()
    _, module = train(2, tmp_path / "two.ckpt")
    torch.testing.assert_close(dict(module.state_dict()), dict(saved), rtol=0, atol=0)
    assert "Initialize: nothing drawn, since the run resumes from a checkpoint." in printed()


def test_a_second_fit_of_the_same_trainer_goes_on(start, printed):
    module = Classifier(norm=False)
    trainer = start(module, Initialize(he), steps=2)
    before = weights(module)
    trainer.fit(module, loader())
    torch.testing.assert_close(weights(module), before, rtol=0, atol=0)
    assert "nothing drawn, since the trainer has trained already" in printed()


def test_batch_norm_statistics_of_an_earlier_training_are_a_sign(start, printed):
    trained = Classifier()
    trained.net[1].num_batches_tracked += 5
    before = weights(trained)
    start(trained, Initialize(he))
    torch.testing.assert_close(weights(trained), before, rtol=0, atol=0)
    assert "nothing drawn, since 'net.1' holds statistics of an earlier training" in printed()
    start(trained, Initialize(he, seed=0, even_if_trained=True))
    torch.testing.assert_close(weights(trained), drawn(he), rtol=0, atol=0)


@pytest.mark.parametrize(("norm", "said"), [
    (True, "'net.1' is a norm with trained weights"),
    (False, "its parameters hold gradients of an earlier training"),
])  # fmt: skip
def test_other_signs_of_an_earlier_training(start, printed, norm, said):
    trained = Classifier(norm=norm)
    if norm:
        trained.net[1] = nn.LayerNorm(8)
        trained.net[1].weight.data[3] += 0.1
    else:  # by another Trainer
        start(trained, steps=1)
    before = weights(trained)
    start(trained, Initialize(he))
    torch.testing.assert_close(weights(trained), before, rtol=0, atol=0)
    assert f"nothing drawn, since {said} (even_if_trained=True draws)" in printed()
    start(trained, Initialize(he, seed=0, even_if_trained=True))
    torch.testing.assert_close(weights(trained)["net.0.weight"], drawn(he)["net.0.weight"], rtol=0, atol=0)


def test_for_fine_tuning_only_what_is_named_and_not_frozen(start):
    module = Classifier()
    module.net[1].num_batches_tracked += 5
    module.net[6].bias.requires_grad_(False)
    before = weights(module)
    start(module, Initialize(xavier, only="net.6"))
    changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert changed == {"net.6.weight"}


def test_a_module_on_the_meta_device_is_materialized_with_ties_kept(start):
    def tied():
        module = Classifier()
        module.net[2], module.net[3] = nn.Linear(8, 8), nn.ReLU()
        module.net[4].weight = module.net[2].weight
        return module

    with torch.device("meta"):
        module = tied()
        module.accuracy = MulticlassAccuracy(3)
    module.accuracy = MulticlassAccuracy(3)
    torch.manual_seed(3)
    start(module, Initialize(he, seed=0))
    after = torch.rand(1)
    expected = tied()
    drawn(he, expected)
    assert module.net[2].weight is module.net[4].weight
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=0)
    torch.testing.assert_close(dict(module.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0)
    assert not any(value.is_meta for value in module.state_dict().values())
    plain = tied()
    torch.manual_seed(3)
    start(plain)
    assert torch.equal(after, torch.rand(1))


def test_what_nobody_can_fill_is_refused(start):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(4))

    with torch.device("meta"):
        module = Classifier()
        module.token = Own()
    module.accuracy = MulticlassAccuracy(3)
    with pytest.raises(NotImplementedError) as raised:  # Lightning then tries to move the module to the CPU
        start(module, Initialize(he))
    message = (
        "Initialize(...): 'token' (Own) is on the meta device and has no reset_parameters() to fill it; define one"
    )
    assert str(raised.value.__context__).startswith(message)


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


# --- muP ---


def scheduled(make):
    def configure(module):
        optimizer = make(module)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]

    return configure


OPTIMIZERS = {
    "SGD": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), {4.0, 1.0, 0.25}),
    "Adam": (lambda m: torch.optim.Adam(m.parameters(), lr=0.1), {1.0, 0.25}),
    "named, grouped": (
        lambda m: torch.optim.AdamW(
            [{"params": list(m.net[0].named_parameters()), "lr": 0.1}, {"params": list(m.net[2:].named_parameters())}],
            lr=0.1,
        ),
        {1.0, 0.25},
    ),
    "one-pass": (lambda m: AdamW(m.parameters(), lr=0.1), {1.0, 0.25}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("fused", [False, True])
def test_mup_gives_every_parameter_its_rate_before_schedulers_count_the_groups(start, kind, fused):
    make, factors = OPTIMIZERS[kind]
    narrow, module = Classifier(8, norm=False), Classifier(32, scheduled(make), norm=False)
    callbacks = [Fuse(verbose=False)] if fused else []
    trainer = start(module, *callbacks, Initialize(partial(mup_width, base=narrow), seed=0), steps=2)
    column = "sgd" if kind == "SGD" else "adam"
    rows = mup_width(Classifier(32, norm=False), narrow, generator=torch.Generator().manual_seed(0))
    wanted = {f"{row.module}.{row.parameter}": 0.1 * getattr(row, column) for row in rows}
    names = {param: name for name, param in module.named_parameters()}
    found = {names[p]: group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert found == pytest.approx(wanted) and {round(lr / 0.1, 6) for lr in found.values()} == factors


def test_decay_apart_from_the_rate_is_the_same_for_all_of_mups_groups(start):
    narrow = Classifier(8, norm=False)
    module = Classifier(32, lambda m: AdamW(m.parameters(), lr=0.1, weight_decay=0.01, decouple_lr=True), norm=False)
    trainer = start(module, Initialize(partial(mup_width, base=narrow), seed=0), steps=2)
    groups = trainer.optimizers[0].param_groups
    assert [group["decay_lr"] for group in groups] == pytest.approx([group["lr"] for group in groups])
    assert len({group["decay_lr"] for group in groups}) > 1


def test_mup_on_resuming_splits_the_groups_and_draws_nothing(start, tmp_path):
    def train(steps, ckpt_path=None):
        module = Classifier(32, sgd, norm=False)
        trainer = start(
            module, Initialize(partial(mup_width, base=Classifier(8, norm=False))), steps=steps, ckpt_path=ckpt_path
        )
        return trainer, module

    trainer, module = train(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, again = train(2, tmp_path / "two.ckpt")
    torch.testing.assert_close(weights(again), weights(module), rtol=0, atol=0)
    rates = [[group["lr"] for group in t.optimizers[0].param_groups] for t in (trainer, resumed)]
    assert rates[0] == rates[1] and len(set(rates[0])) == 3


def test_a_scheduler_that_overrides_the_rates_is_refused(start):
    def configure(module):
        optimizer = sgd(module)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)]

    add_param_group = torch.optim.Optimizer.add_param_group
    with pytest.raises(
        ValueError, match=r"Initialize\(scheme=mup_width\): a scheduler has set a group's learning rate to"
    ):
        start(Classifier(32, configure, norm=False), Initialize(partial(mup_width, base=Classifier(8, norm=False))))
    assert torch.optim.Optimizer.add_param_group is add_param_group


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
