# SPDX-License-Identifier: Apache-2.0
"""ElasticNet folded into the step and in its own pass: the same numbers, the closed form, exact zeros."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_optkit import optimizers
from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import ElasticNet, Fuse, HyperparameterSchedule, ParameterGroups, WeightAveraging
from lightning_optkit.schedules import linear

L1, L2, LR = 0.2, 0.3, 0.1
TOLERANCE = 1e-6


def one_group(cls, **arguments):
    return lambda module: cls(module.parameters(), lr=LR, **arguments)


def two_groups(cls, **arguments):
    """Weights and biases apart: the first is folded."""

    def configure(module):
        params = list(module.parameters())
        groups = [dict(params=[p for p in params if (p.dim() > 1) is is_weight]) for is_weight in (True, False)]
        return cls(groups, lr=LR, **arguments)

    return configure


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class Expected(Callback):
    """The same mathematics, written out: around the update of an optimizer that knows nothing of it."""

    def on_fit_start(self, trainer, pl_module):
        self.params = [p for p in pl_module.parameters() if p.dim() > 1]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for p in self.params:
            p.data -= LR * L2 * p.data

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2 == 1:
            for p in self.params:
                p.data = p.data.sign() * (p.data.abs() - LR * L1).clamp(min=0)


CASES = {
    "sgd": (one_group(torch.optim.SGD, momentum=0.9), []),
    "adamw": (one_group(torch.optim.AdamW, weight_decay=0.0), []),
    "adam, fused by torch": (one_group(torch.optim.Adam, fused=True), []),
    "adamw, Fuse, one group": (one_group(torch.optim.AdamW, weight_decay=0.0), [Fuse]),
    "adamw, Fuse, two groups": (two_groups(torch.optim.AdamW, weight_decay=0.0), [Fuse]),
    "sgd, Fuse, two groups": (two_groups(torch.optim.SGD, momentum=0.9), [Fuse]),
    "our adamw, two groups": (two_groups(optimizers.AdamW, weight_decay=0.0), []),
    "our adamw, decay apart from the rate": (two_groups(optimizers.AdamW, weight_decay=0.0, decouple_lr=True), []),
    "rprop": (one_group(torch.optim.Rprop), []),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_decay_update_and_soft_threshold(regression, fit, case):
    configure, more = CASES[case]
    module, expected = regression(configure), regression(configure)
    net = ElasticNet(l1=L1, l2=L2)
    fit(module, *[callback() for callback in more], net)
    fit(expected, Expected())
    assert_close(weights(module), weights(expected))
    zeros = net.sparsity()
    assert zeros.keys() == {"net.0.weight", "net.2.weight"} and 0 < zeros["net.0.weight"] < 1


def test_it_says_where_it_is_done(regression, fit):
    net = ElasticNet(l1=L1, l2=L2)
    fit(regression(CASES["sgd, Fuse, two groups"][0]), Fuse(), net)
    assert net.explain() == ("ElasticNet: SGD, group 0, 2 of 2 parameters: l1 0.2 in the step, l2 0.3 in its own pass")
    fit(regression(CASES["adamw, Fuse, two groups"][0]), Fuse(), net)
    assert net.explain().endswith("AdamW, group 0, 2 of 2 parameters: l1 0.2 in the step, l2 0.3 in the step")
    fit(regression(CASES["adamw"][0]), net)
    assert net.explain().endswith("group 0, 2 of 4 parameters: l1 0.2 in its own pass, l2 0.3 in its own pass")


def test_biases_too_if_asked(regression, fit):
    net = ElasticNet(l1=10.0, exclude_bias_and_norm=False)
    module = regression(CASES["adamw"][0])
    fit(module, Fuse(), net)
    assert all(bool((p == 0).all()) for p in module.parameters())
    assert len(net.sparsity()) == 4 and "in the step" in net.explain()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", ["adamw", "adamw, Fuse, two groups"])
def test_an_average_sees_the_regularized_weights(regression, fit, case, order):
    configure, more = CASES[case]
    seen = []

    class Trace(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx % 2 == 1:
                seen.append(weights(pl_module))

    module = regression(configure)
    both = [ElasticNet(l1=L1), WeightAveraging(EMA(0.5))][::order]
    fit(module, *[callback() for callback in more], *both, Trace())
    average = seen[0]
    for now in seen[1:]:
        average = {name: 0.5 * (average[name] + now[name]) for name in now}
    assert_close(weights(module), average)


@pytest.mark.parametrize("case", ["adamw", "adam, fused by torch", "adamw, Fuse, one group", "adamw, Fuse, two groups"])
def test_a_step_that_the_loss_scaler_skips_shrinks_nothing(regression, fit, case):
    configure, more = CASES[case]
    module, trace = regression(configure, poisoned=[(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]), []
    before = weights(module)
    fit(module, *[callback() for callback in more], ElasticNet(l1=L1, l2=L2), *trace, precision="16-mixed")
    assert_close(weights(module), before, 0)


def test_a_step_that_a_folded_clip_skips_shrinks_nothing(regression, fit):
    module = regression(CASES["adamw"][0], poisoned=[(epoch, batch) for epoch in range(3) for batch in (0, 2)])
    before = weights(module)
    fit(module, Fuse(), ElasticNet(l1=L1), gradient_clip_val=1.0)
    assert_close(weights(module), before, 0)


def test_sparsity_is_logged_when_there_is_a_logger(regression, fit, tmp_path):
    net = ElasticNet(l1=L1)
    trainer = fit(regression(CASES["sgd"][0]), net, logger=CSVLogger(tmp_path))
    metrics = trainer.logged_metrics
    assert {name for name in metrics if "sparsity" in name} == {
        "sparsity", "sparsity/net.0.weight", "sparsity/net.2.weight"
    }  # fmt: skip
    shares = net.sparsity()
    assert float(metrics["sparsity"]) == pytest.approx((32 * shares["net.0.weight"] + 16 * shares["net.2.weight"]) / 48)


@pytest.mark.parametrize("case", ["adamw", "our adamw, two groups"])
def test_the_strengths_given_to_a_resumed_run_are_used(regression, fit, tmp_path, case):
    configure, _ = CASES[case]
    for name, epochs, l1 in (("first", 1, 0.0), ("second", 1, 1e-3)):
        callbacks = [ElasticNet(l1=l1)] if l1 else []
        fit(regression(configure), *callbacks, epochs=epochs).save_checkpoint(tmp_path / name)
    for name in ("first", "second"):
        module = regression(configure)
        fit(module, ElasticNet(l1=10.0), epochs=2, ckpt_path=tmp_path / name)
        assert all(bool((p == 0).all()) for p in module.parameters() if p.dim() > 1)


def test_the_optimizer_is_left_as_it_was(regression, fit):
    for case in ("adamw", "our adamw, two groups"):
        plain = fit(regression(CASES[case][0])).optimizers[0]
        optimizer = fit(regression(CASES[case][0]), ElasticNet(l1=L1, l2=L2)).optimizers[0]
        entries = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in (plain, optimizer)]
        assert entries[0] == entries[1]
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ElasticNet(l1=-1.0), r"^ElasticNet\(l1=-1\.0\): l1 must be in \[0, inf\)\.$"),
        (lambda: ElasticNet(l2=float("nan")), r"^ElasticNet\(l2=nan\): l2 must be in \[0, inf\)\.$"),
        (lambda: ElasticNet(), r"^ElasticNet\(l1=0\.0, l2=0\.0\): one of them must be greater than 0\.$"),
    ],
)
def test_bad_strengths_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("configure", "callbacks", "message"),
    [
        (
            one_group(optimizers.AdamW, l1=0.1),
            [ElasticNet(l1=L1)],
            r"^ElasticNet\(l1=0\.2\): group 0 of AdamW has l1=0\.1 already; use one of the two\.$",
        ),
        (
            one_group(torch.optim.AdamW),
            [ElasticNet(l2=L2)],
            r"^ElasticNet\(l2=0\.3\): group 0 of AdamW has weight_decay=0\.01 already; use one of the two\.$",
        ),
        (
            one_group(torch.optim.AdamW),
            [Fuse(), ElasticNet(l1=L1), WeightAveraging(EMA(0.9))],
            r"^ElasticNet\(\.\.\.\): changes the weights after the step of AdamW, which folds in EMA",
        ),
        (
            lambda module: torch.optim.LBFGS(module.parameters()),
            [ElasticNet(l2=L2)],
            r"^ElasticNet\(\.\.\.\): LBFGS evaluates the loss",
        ),
        (one_group(torch.optim.SGD), [ElasticNet(l1=L1), ElasticNet(l1=L1)], r"^ElasticNet\(\.\.\.\): given twice"),
    ],
)
def test_what_would_be_done_twice_or_wrongly_is_refused(regression, fit, configure, callbacks, message):
    with pytest.raises(ValueError, match=message):
        fit(regression(configure), *callbacks)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["l1", "weight_decay"])
def test_a_schedule_drives_what_is_folded_in(regression, fit, name, order):
    seen = []

    class Trace(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([group[name] for group in optimizer.param_groups])

    callbacks = [ElasticNet(l1=L1, l2=L2), HyperparameterSchedule(name, linear(1.0, 0.5))]
    module = regression(two_groups(torch.optim.AdamW, weight_decay=0.0))
    fit(module, Fuse(), *callbacks[::order], Trace())
    base = L1 if name == "l1" else L2
    assert [value for value, _ in seen] == pytest.approx([base * (1 - 0.5 * step / 6) for step in range(6)])
    assert {value for _, value in seen} == {0.0}


def test_parameter_groups_let_it_fold_beside_an_average(regression, fit):
    """The remedy that the error names."""
    configure = one_group(torch.optim.AdamW, weight_decay=0.1)
    net, module, expected = ElasticNet(l1=L1), regression(configure), regression(configure)
    fit(module, Fuse(), ParameterGroups(), net, WeightAveraging(EMA(0.5)))
    assert "2 of 2 parameters: l1 0.2 in the step" in net.explain()
    fit(expected, ParameterGroups(), ElasticNet(l1=L1), WeightAveraging(EMA(0.5)))
    assert_close(weights(module), weights(expected))


FREEZES = {
    "one layer": lambda module: module.net[0],
    "the other": lambda module: module.net[2],
    "one bias, counted with the rest": lambda module: module.net[0].bias,
}


@pytest.mark.parametrize("everything", [False, True], ids=["weights", "everything"])
@pytest.mark.parametrize("frozen", FREEZES)
def test_sparsity_is_that_of_the_weights_that_train(regression, fit, tmp_path, frozen, everything):
    module = regression(one_group(torch.optim.SGD))
    FREEZES[frozen](module).requires_grad_(False)
    elastic = ElasticNet(l1=L1, exclude_bias_and_norm=not everything, verbose=False)
    trainer = fit(module, elastic, logger=CSVLogger(tmp_path), epochs=1)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad and (everything or p.dim() > 1)}
    zeros = sum(int((p == 0).sum()) for p in trained.values())
    assert trainer.logged_metrics["sparsity"] == pytest.approx(zeros / sum(p.numel() for p in trained.values()))
    assert {key for key in trainer.logged_metrics if "/" in key} == {f"sparsity/{name}" for name in trained}


class FreezeLater(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(trainer.current_epoch == 0)


@pytest.mark.filterwarnings("ignore:.*no parameters.*require")
def test_a_layer_that_is_frozen_later_leaves_the_count(regression, fit, tmp_path):
    module = regression(one_group(torch.optim.SGD))
    trainer = fit(module, FreezeLater(), ElasticNet(l1=L1, verbose=False), logger=CSVLogger(tmp_path), epochs=2)
    weight = module.net[2].weight
    assert trainer.logged_metrics["sparsity"] == pytest.approx(float((weight == 0).float().mean()))


def test_nothing_is_logged_of_weights_that_are_all_frozen(regression, fit, tmp_path):
    module = regression(one_group(torch.optim.SGD))
    for layer in (0, 2):
        module.net[layer].weight.requires_grad_(False)
    trainer = fit(module, ElasticNet(l1=L1, verbose=False), logger=CSVLogger(tmp_path), epochs=1)
    assert not any(key.startswith("sparsity") for key in trainer.logged_metrics)
