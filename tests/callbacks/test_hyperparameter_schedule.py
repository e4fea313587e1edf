# SPDX-License-Identifier: Apache-2.0
"""HyperparameterSchedule: the value that each optimizer step saw, whatever it is kept in."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_optkit.averaging import EMA, LAWA, SWA, PowerEMA
from lightning_optkit.callbacks import (
    ElasticNet,
    Fuse,
    GradientClipping,
    HyperparameterSchedule,
    LRSchedule,
    ParameterGroups,
    ScheduleFree,
    WeightAveraging,
)
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipValue
from lightning_optkit.layers import AddLayerNorm, AddRMSNorm, DropBlock2d, DropConnect, DropPath, LockedDropout
from lightning_optkit.optimizers import (
    SGD,
    Adafactor,
    Adagrad,
    AdamW,
    AdEMAMix,
    Lion,
    Muon,
    Prodigy,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
)
from lightning_optkit.schedules import constant, cosine, linear, one_cycle, piecewise_constant, warmup

pytestmark = [  # Lightning's warnings about these short runs
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You (defined|passed in) a .*Skipping val loop"),
]
RUN = 6  # optimizer steps of three epochs of two windows of two batches of two


def scheduled(name, schedule, *args, **kwargs):
    return HyperparameterSchedule(name, schedule, *args, verbose=False, **kwargs)


def expected(schedule, base, positions=range(RUN), total=RUN):
    return pytest.approx([base * schedule(position, total) for position in positions], rel=1e-9)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.2, betas=(0.8, 0.99))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


ENTRIES = {
    "weight_decay": (adamw, "weight_decay", None, 0.2),
    "beta1": (adamw, "betas", 0, 0.8),
    "betas[1]": (adamw, "betas", 1, 0.99),
    "momentum": (sgd, "momentum", None, 0.9),
    "alpha": (lambda m: torch.optim.RMSprop(m.parameters()), "alpha", None, 0.99),
    "alpha of AdEMAMix": (lambda m: AdEMAMix(m.parameters(), alpha=2.0), "alpha", None, 2.0),
    "rho": (lambda m: torch.optim.Adadelta(m.parameters()), "rho", None, 0.9),
    "beta2_decay": (lambda m: Adafactor(m.parameters()), "beta2_decay", None, -0.8),
    "eps": (adamw, "eps", None, 1e-8),
    "l1": (lambda m: Lion(m.parameters(), l1=0.01), "l1", None, 0.01),
}


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
@pytest.mark.parametrize("name", ENTRIES)
def test_each_step_sees_its_value(fit, regression, recorder, name, fused):
    configure, key, index, base = ENTRIES[name]
    schedule = warmup(cosine(0.5), 2)
    entry = name.removesuffix(" of AdEMAMix")
    fit(regression(configure), *[Fuse(verbose=False)] * fused, scheduled(entry, schedule), recorder)
    seen = recorder.values(key)
    assert (seen if index is None else [pair[index] for pair in seen]) == expected(schedule, base)
    if index is not None:
        kept = {pair[1 - index] for pair in seen}
        assert kept == {(0.8, 0.99)[1 - index]} and {type(pair) for pair in seen} == {tuple}


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_the_weights_are_those_of_torch_with_the_value_set_by_hand(fit, regression, fused):
    class ByHand(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            group = trainer.optimizers[0].param_groups[0]
            group["weight_decay"] = 0.2 * linear()(trainer.global_step, RUN)
            group["betas"] = (0.8 * linear()(trainer.global_step, RUN), 0.99)

    ours, theirs = regression(adamw), regression(adamw)
    callbacks = [scheduled("weight_decay", linear()), scheduled("beta1", linear())]
    fit(ours, *[Fuse(verbose=False)] * fused, *callbacks)
    fit(theirs, ByHand())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-7)


def test_momentum_moves_against_the_rate_in_one_cycle(fit, regression, recorder):
    module = regression(sgd)
    down = scheduled("momentum", one_cycle(div_factor=0.85 / 0.95, final_div_factor=1.0), base=0.85)
    fit(module, LRSchedule(one_cycle(), verbose=False), down, recorder)
    by_torch = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(by_torch, max_lr=0.1, total_steps=RUN)
    for rate, momentum in zip(recorder.values("lr"), recorder.values("momentum"), strict=True):
        assert rate == pytest.approx(by_torch.param_groups[0]["lr"])
        assert momentum == pytest.approx(by_torch.param_groups[0]["momentum"])
        by_torch.step()
        cycle.step()


def test_each_group_keeps_its_own_base(fit, regression, recorder):
    def two_groups(module):
        first, _, last = module.net
        return torch.optim.AdamW(
            [{"params": first.parameters()}, {"params": last.parameters(), "weight_decay": 0.0}], weight_decay=0.4
        )

    fit(regression(two_groups), scheduled("weight_decay", linear()), recorder)
    assert recorder.values("weight_decay") == expected(linear(), 0.4)
    assert recorder.values("weight_decay", group=1) == [0.0] * RUN


def test_a_base_serves_all_groups(fit, regression, recorder):
    fit(regression(sgd), scheduled("weight_decay", linear(0.0, 1.0), base=0.1), recorder)
    assert recorder.values("weight_decay") == expected(linear(0.0, 1.0), 0.1)


def test_counts_in_epochs(fit, regression, recorder):
    fit(regression(adamw), scheduled("weight_decay", linear(), "epoch"), recorder)
    assert recorder.values("weight_decay") == expected(linear(), 0.2, [0, 0, 1, 1, 2, 2], 3)


# --- what is not in the groups ---


class Regularized(nn.Module):
    """Dropouts of several kinds, one of them off."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.AlphaDropout(0.2))
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.unused = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.GRU(8, 2, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x):
        x = self.inner(x)[:, None]
        return self.recurrent(self.attention(x, x, x)[0])[0][:, 0]

    def rates(self):
        inner = [self.inner[1].p, self.inner[2].p]
        return [*inner, self.attention.dropout, self.unused.dropout, self.recurrent.dropout]


@pytest.fixture
def regularized(regression):
    module = regression(sgd)
    module.net = Regularized()
    return module


class Dropouts(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(pl_module.net.rates())


def test_dropout_is_that_of_every_module(fit, regularized):
    watch, bases = Dropouts(), [0.4, 0.2, 0.1, 0.0, 0.3]
    fit(regularized, scheduled("dropout", linear(0.0, 0.6)), watch)
    for batch, rates in enumerate(watch.seen):
        assert rates == pytest.approx([base * 0.6 * (batch // 2) / RUN for base in bases])
    assert regularized.net.rates() == bases


def test_dropout_with_one_base(fit, regularized):
    watch = Dropouts()
    fit(regularized, scheduled("dropout", constant(0.5), base=0.3), watch)
    assert watch.seen[0] == pytest.approx([0.15, 0.15, 0.15, 0.0, 0.15])


def test_dropout_of_this_package_is_scheduled_alike(fit, regression):
    layers = [DropPath(0.2), DropBlock2d(0.3, 1), LockedDropout(0.4), DropConnect(nn.Linear(2, 2), p=0.5)]
    sums = [AddLayerNorm(2, dropout=0.6), AddRMSNorm(2, dropout=0.7), AddLayerNorm(2)]
    module, seen = regression(sgd), []
    module.extra = nn.ModuleList([*layers, *sums])

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([layer.p for layer in layers] + [layer.dropout for layer in sums])

    fit(module, scheduled("dropout", linear(1.0, 0.5)), Watch())
    bases = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.0]
    for step, rates in enumerate(seen[::2]):
        assert rates == pytest.approx([base * linear(1.0, 0.5)(step, RUN) for base in bases])
    assert [layer.p for layer in layers] + [layer.dropout for layer in sums] == bases


class Broken(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("broken")


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_everything_is_as_it_was_after_an_exception(make_trainer, data, regularized, fused):
    callbacks = [scheduled("dropout", constant(0.5)), scheduled("gradient_clip_val", constant(0.5)), Broken()]
    trainer = make_trainer(*[Fuse(verbose=False)] * fused, *callbacks, gradient_clip_val=0.4)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(regularized, data())
    assert regularized.net.rates() == [0.4, 0.2, 0.1, 0.0, 0.3]
    assert trainer.gradient_clip_val == 0.4


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_the_clip_value_is_that_of_each_step(fit, regression, fused, algorithm):
    factors = piecewise_constant([2, 4], [1.0, 0.1, 0.5])

    class ByHand(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.gradient_clip_val = 0.05 * factors(trainer.global_step)

    ours, theirs, unclipped = regression(sgd), regression(sgd), regression(sgd)
    clip = dict(gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    trainer = fit(ours, *[Fuse(verbose=False)] * fused, scheduled("gradient_clip_val", factors), **clip)
    fit(theirs, ByHand(), **clip)
    fit(unclipped, **clip)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours.net[0].weight, unclipped.net[0].weight, atol=1e-4)
    assert trainer.gradient_clip_val == 0.05


def test_the_clip_of_a_one_pass_optimizer(fit, regression):
    clips = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            clips.append(trainer.optimizers[0].clip)

    module = regression(lambda m: AdamW(m.parameters(), clip=ClipNorm(2.0)))
    trainer = fit(module, scheduled("gradient_clip_val", linear(1.0, 0.5)), Watch())
    assert [clip.max_norm for clip in clips[::2]] == expected(linear(1.0, 0.5), 2.0)
    assert trainer.optimizers[0].clip == ClipNorm(2.0)


@pytest.mark.parametrize("clip", [ClipNorm(0.05), ClipPerTensor(0.03), ClipValue(0.01)], ids=repr)
@pytest.mark.parametrize("order", [1, -1])
def test_the_clip_of_gradient_clipping_folded_or_in_its_own_pass(fit, regression, clip, order):
    def run(*others):
        module = regression(sgd)
        fit(module, *[GradientClipping(clip), *others][::order])
        return module.state_dict()

    schedule = scheduled("gradient_clip_val", piecewise_constant([2, 4], [1.0, 0.1, 0.5]))
    own, folded, fixed = run(schedule), run(schedule, Fuse(verbose=False)), run()
    torch.testing.assert_close(own, folded, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(own["net.0.weight"], fixed["net.0.weight"], atol=1e-4)


@pytest.mark.parametrize("order", [1, -1])
def test_the_l1_of_elastic_net_folded_or_in_its_own_pass(fit, regression, order):
    def run(*others, law=linear):
        module, elastic = regression(sgd), ElasticNet(l1=0.05, verbose=False)
        fit(module, *[elastic, scheduled("l1", law()), *others][::order])
        assert elastic.l1 == 0.05
        return module.state_dict()

    own, fixed, whole_groups = run(), run(law=constant), ParameterGroups(verbose=False)
    torch.testing.assert_close(own, run(Fuse(verbose=False), whole_groups), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own, run(Fuse(verbose=False)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(own["net.0.weight"], fixed["net.0.weight"], atol=1e-4)


def test_a_base_for_the_l1_of_elastic_net_is_applied_once(fit, regression):
    def run(l1, **arguments):
        module, schedule = regression(sgd), scheduled("l1", linear(), **arguments)
        fit(module, Fuse(verbose=False), ElasticNet(l1=l1, verbose=False), schedule)
        return module.state_dict()

    torch.testing.assert_close(run(0.01, base=0.05), run(0.05), rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, -1], ids=["after", "before"])
def test_the_decay_of_the_average(fit, regression, recorder, order):
    def averages(*callbacks):
        module = regression(adamw)
        fit(module, *callbacks, recorder)
        return module.state_dict()

    schedule = linear(0.5, 1.0)
    ordered = [WeightAveraging(EMA(0.9)), scheduled("average_decay", schedule)][::order]
    folded = averages(Fuse(verbose=False), *ordered)
    assert recorder.values("average_decay") == expected(schedule, 0.9)
    ordered = [WeightAveraging(EMA(0.9)), scheduled("average_decay", schedule)][::order]
    apart = averages(*ordered)
    torch.testing.assert_close(folded, apart, rtol=1e-5, atol=1e-6)
    fixed = averages(WeightAveraging(EMA(0.9)))
    assert not torch.allclose(apart["net.0.weight"], fixed["net.0.weight"], atol=1e-4)


@pytest.mark.parametrize("base", [None, 0.9])
@pytest.mark.parametrize("average", [PowerEMA(0.1), SWA(1)], ids=str)
@pytest.mark.parametrize("fuses", [True, False])
def test_an_average_without_that_decay_is_refused(fit, regression, average, base, fuses):
    schedule = HyperparameterSchedule("average_decay", linear(0.5, 1.0), base=base, verbose=False)
    callbacks = [Fuse(verbose=False)] if fuses else []
    message = r"\(name='average_decay'\): " + (
        r".* does not use it; schedule that of an EMA" if fuses else "nothing here has"
    )
    with pytest.raises(ValueError, match=message):
        fit(regression(adamw), *callbacks, WeightAveraging(average), schedule)


@pytest.mark.parametrize("first", [LAWA(2), SWA(1)], ids=str)
def test_the_decay_of_the_first_average_is_scheduled_or_it_is_refused(fit, regression, recorder, first):
    """A LAWA is no rival, behind an SWA the EMA keeps its own decay."""
    averages = [WeightAveraging(first, evaluate=False), WeightAveraging(EMA(0.9))]
    if isinstance(first, LAWA):
        fit(regression(adamw), *averages, scheduled("average_decay", linear(0.5, 1.0)), recorder)
        assert recorder.values("average_decay") == expected(linear(0.5, 1.0), 0.9)
    else:
        with pytest.raises(ValueError, match=r"^HyperparameterSchedule\(name='average_decay'\): nothing here has it"):
            fit(regression(adamw), *averages, scheduled("average_decay", linear(0.5, 1.0)))


# --- resuming, logging ---


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_resumed_equals_uninterrupted(fit, regression, tmp_path, fused):
    def callbacks():
        names = ("weight_decay", "beta1", "beta2")
        return [*[Fuse(verbose=False)] * fused, *(scheduled(name, warmup(linear(), 0.3), "sample") for name in names)]

    whole, resumed = regression(adamw), regression(adamw)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = fit(whole, *callbacks(), save, enable_checkpointing=True)
    again = fit(resumed, *callbacks(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    first, second = (t.optimizers[0].param_groups[0] for t in (trainer, again))
    assert (first["weight_decay"], first["betas"]) == (second["weight_decay"], second["betas"])


def test_logs_the_value_of_each_step(fit, regression, tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [scheduled("beta1", linear()), scheduled("eps", linear(), log=False)]
    fit(regression(adamw), *callbacks, logger=logger, log_every_n_steps=1)
    with open(logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    assert "eps" not in rows[0]
    logged = [float(row["betas[0]"]) for row in rows if row["betas[0]"]]
    assert list(dict.fromkeys(logged)) == pytest.approx([0.8 * linear()(t, RUN) for t in range(RUN)], rel=1e-6)


# --- bad input ---


def test_an_unknown_name_lists_those_that_exist(fit, regression, regularized):
    sentence = (
        r"^HyperparameterSchedule\(name='wd'\): nothing here has it; there are momentum, dampening, weight_decay, "
        r"dropout, gradient_clip_val\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        fit(regularized, scheduled("wd", linear()), gradient_clip_val=1.0)
    with pytest.raises(ValueError, match=r"there are betas\[0\], betas\[1\], eps, weight_decay\.$"):
        fit(regression(adamw), scheduled("betas[2]", linear()))


@pytest.mark.parametrize("name", ["nesterov", "ns_steps", "params", "gradient_clip_val", "dropout", "average_decay"])
def test_what_is_no_number_or_not_there_is_unknown(fit, regression, name):
    with pytest.raises(ValueError, match=rf"^HyperparameterSchedule\(name='{name}'\): nothing here has it"):
        fit(regression(sgd), scheduled(name, linear()))


KEPT = {  # what a rule learns or starts from, and counts
    "d": Prodigy,
    "d_max": Prodigy,
    "d_numerator": Prodigy,
    "d0": Prodigy,
    "slice_p": Prodigy,
    "lr_max": ScheduleFreeAdamW,
    "train_mode": ScheduleFreeSGD,
    "warmup_steps": ScheduleFreeSGD,
    "beta3_warmup": AdEMAMix,
    "alpha_warmup": AdEMAMix,
    "ns_steps": Muon,
    "initial_accumulator_value": Adagrad,
    "rounding_seed": SGD,
}


@pytest.mark.parametrize("base", [None, 0.5])
@pytest.mark.parametrize("name", KEPT)
def test_what_a_rule_keeps_for_itself_is_refused_before_anything_runs(fit, regression, recorder, name, base):
    rule = KEPT[name]
    sentence = (
        rf"^HyperparameterSchedule\(name='{name}'\): {rule.__name__} keeps it for itself; there are [^.]*weight_decay"
    )
    module = regression(lambda m: rule([p for p in m.parameters() if rule is not Muon or p.ndim == 2]))
    with pytest.raises(ValueError, match=sentence) as caught:
        fit(module, scheduled(name, linear(), base=base), ScheduleFree(), recorder)
    offered = str(caught.value).split("there are ")[1]
    assert not set(KEPT) & set(offered.rstrip(".").split(", "))
    assert not recorder.steps


@pytest.mark.parametrize(
    ("configure", "name"),
    [
        (lambda m: torch.optim.Adagrad(m.parameters(), initial_accumulator_value=0.1), "initial_accumulator_value"),
        (lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2]), "ns_steps"),
        (lambda m: Unknown(m.parameters(), dict(lr=0.1, lr_max=0.5, d=1.0, weight_decay=0.1)), "lr_max"),
        (lambda m: Unknown(m.parameters(), dict(lr=0.1, lr_max=0.5, d=1.0, weight_decay=0.1)), "d"),
    ],
)
def test_what_a_rule_of_another_package_keeps_is_refused_too(fit, regression, configure, name):
    with pytest.raises(ValueError, match=rf"^HyperparameterSchedule\(name='{name}'\): \w+ keeps it for itself; "):
        fit(regression(configure), scheduled(name, linear()))


class Unknown(torch.optim.Optimizer):
    """A rule that nobody here knows."""


def test_a_setting_of_one_rule_may_have_the_name_of_what_another_learns(fit, regression, recorder):
    configure = lambda m: Adafactor(m.parameters(), d=2.0)  # noqa: E731
    fit(regression(configure), scheduled("d", constant()), recorder)
    assert recorder.values("d") == [2.0] * RUN


def test_a_base_of_zero_needs_a_value(fit, regression):
    with pytest.raises(ValueError, match=r"^HyperparameterSchedule\(name='weight_decay'\): it is 0 everywhere, and"):
        fit(regression(sgd), scheduled("weight_decay", linear()))


def test_a_value_outside_its_range_raises_before_training(fit, regression, recorder):
    upward = piecewise_constant([3], [1.0, 1.2])
    sentence = r"momentum would be 1.08 at step 3; it must be in \[0, 1\)\.$"
    with pytest.raises(ValueError, match=rf"^HyperparameterSchedule\(schedule=piecewise_constant\(.+\)\): {sentence}"):
        fit(regression(sgd), scheduled("momentum", upward), recorder)
    assert not recorder.steps


def test_a_value_behind_the_last_step_must_be_in_its_range_too(fit, regression, recorder):
    with pytest.raises(ValueError, match=r"gradient_clip_val would be 0 at step 6; it must be in \(0, inf\)\.$"):
        fit(regression(sgd), scheduled("gradient_clip_val", cosine()), recorder, gradient_clip_val=1.0)
    assert not recorder.steps


@pytest.mark.parametrize(
    ("name", "base", "interval"),
    [("momentum", 1.0, r"\[0, 1\)"), ("dropout", 1.5, r"\[0, 1\]"), ("gradient_clip_val", 0.0, r"\(0, inf\)")],
)
def test_rejects_a_base_outside_its_range(name, base, interval):
    with pytest.raises(ValueError, match=rf"^HyperparameterSchedule\(base={base}\): base must be in {interval}\.$"):
        scheduled(name, linear(), base=base)


def test_a_name_is_a_string():
    with pytest.raises(
        TypeError,
        match=r"^HyperparameterSchedule\(name=3\): name must be a hyper-parameter, such as \"weight_decay\"\.$",
    ):
        scheduled(3, linear())


def test_the_learning_rate_has_a_callback_of_its_own():
    with pytest.raises(ValueError, match=r"^HyperparameterSchedule\(name='lr'\): use LRSchedule for the learning rate"):
        scheduled("lr", linear())


def test_two_of_one_name_raise(fit, regression):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `HyperparameterSchedule`"):
        fit(regression(adamw), scheduled("beta1", linear()), scheduled("betas[0]", linear()))


def test_a_schedule_longer_than_the_run(fit, regression):
    with pytest.raises(
        ValueError, match=r"^HyperparameterSchedule\(schedule=cosine\(.+\)\): the run has 6 optimizer st"
    ):
        fit(regression(adamw), scheduled("eps", cosine(steps=7)))
