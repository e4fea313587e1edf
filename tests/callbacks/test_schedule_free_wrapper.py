# SPDX-License-Identifier: Apache-2.0
"""ScheduleFreeWrapper in real Trainers against the published recursion, resumed, and around several rules."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from two_gradient_cases import Classifier, SeedEachBatch, assert_close, batches

from lightning_optkit.averaging import EMA, LAWA
from lightning_optkit.callbacks import (
    ElasticNet,
    Fuse,
    GradientClipping,
    Lookahead,
    MaxNorm,
    QKClip,
    ReleaseGradients,
    ScheduleFreeWrapper,
    WeightAveraging,
)
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import AdamW, Prodigy, ScheduleFreeSGD

RULES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5, weight_decay=0.01),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, alpha=0.9),
    "AdamW": lambda params: AdamW(params, lr=0.02, betas=(0.5, 0.9)),
}
OPTIONS = dict(momentum=0.8, weight_decay_at_y=0.05, weight_lr_power=1.5, r=0.5)


def warmup(step):
    return min(1.0, step / 30) if step < 100 else 0.5  # the first rate is 0, and the largest one counts


def without_noise(net):
    """Its parameters but the bias before BatchNorm, whose gradient is rounding alone, in two groups."""
    params = [p for name, p in net.named_parameters() if name != "0.bias"]
    return [dict(params=params[:2]), dict(params=params[2:])]


class With(Classifier):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def configure_optimizers(self):
        optimizer = self.rule(without_noise(self.net))
        optimizer.param_groups[1]["lr"] *= 0.5
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)
        return [optimizer], [dict(scheduler=schedule, interval="step")]


class Validated(With):
    def __init__(self, rule):
        super().__init__(rule)
        self.validated = []

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.net[0].weight.detach().clone())


def written_out(rule, steps, dtype, momentum, weight_decay_at_y, weight_lr_power, r, accumulate=1):
    """Three points per parameter, as in the paper: gradients at y, steps of z, and the average x."""
    net = Classifier().net.to(dtype)
    optimizer = rule(without_noise(net))
    optimizer.param_groups[1]["lr"] *= 0.5
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)
    points = [[[p, p.detach().clone(), p.detach().clone()] for p in g["params"]] for g in optimizer.param_groups]
    sums, largest = [0.0, 0.0], [0.0, 0.0]
    for batch, (inputs, targets) in enumerate(batches(steps)):
        torch.manual_seed(batch)
        (nn.functional.cross_entropy(net(inputs.to(dtype)), targets) / accumulate).backward()
        if (batch + 1) % accumulate:
            continue
        rates = [group["lr"] for group in optimizer.param_groups]
        decays = [[rate * weight_decay_at_y * p.detach() for p, *_ in m] for m, rate in zip(points, rates, strict=True)]
        for members, decay in zip(points, decays, strict=True):
            for (p, z, _), amount in zip(members, decay, strict=True):
                p.data.copy_(z - amount)
        optimizer.step()
        optimizer.zero_grad()
        for place, (members, rate) in enumerate(zip(points, rates, strict=True)):
            largest[place] = max(largest[place], rate)
            weight = ((batch + 1) // accumulate) ** r * largest[place] ** weight_lr_power
            sums[place] += weight
            share = weight / sums[place] if sums[place] else 0.0
            for p, z, x in members:
                z.copy_(p.detach())
                x.copy_((1 - share) * x + share * z)
                p.data.copy_(momentum * x + (1 - momentum) * z)
        schedule.step()
    for members in points:
        for p, _, x in members:
            p.data.copy_(x)
    return net.state_dict()


def loader(count):
    return torch.utils.data.DataLoader(batches(count), batch_size=None)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "fuse"), [(torch.float64, 1e-9, False), (torch.float32, 1e-3, True)], ids=["fp64", "Fuse"]
)
@pytest.mark.parametrize("rule", RULES)
def test_it_equals_the_published_recursion_over_200_steps(make_trainer, rule, dtype, tolerance, fuse):
    module, precision = With(RULES[rule]), "64-true" if dtype == torch.float64 else "32-true"
    callbacks = [*([Fuse(verbose=False)] if fuse else []), ScheduleFreeWrapper(**OPTIONS), SeedEachBatch()]
    make_trainer(*callbacks, epochs=1, accumulate_grad_batches=1, precision=precision).fit(module, loader(200))
    assert_close(module.net.state_dict(), written_out(RULES[rule], 200, dtype, **OPTIONS), tolerance)


def test_accumulated_batches_are_one_step_and_a_folded_clip_stays(make_trainer):
    module = With(RULES["AdamW"])
    callbacks = [GradientClipping(ClipNorm(1e9)), ScheduleFreeWrapper(**OPTIONS), SeedEachBatch()]
    trainer = make_trainer(*callbacks, epochs=1, accumulate_grad_batches=2, precision="64-true")
    trainer.fit(module, loader(30))
    assert_close(module.net.state_dict(), written_out(RULES["AdamW"], 30, torch.float64, **OPTIONS, accumulate=2), 1e-9)


class Points(Callback):
    """By step: y, and x computed from y and z."""

    def __init__(self, callback):
        self.callback, self.y, self.x = callback, {}, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        state, beta = copy.deepcopy(self.callback.state_dict()), self.callback.momentum
        held = dict(pl_module.named_parameters())
        self.y[trainer.global_step] = state["y"]
        self.x[trainer.global_step] = {n: y.lerp(state["z"][n], 1 - 1 / beta) for n, y in state["y"].items()}
        assert all(torch.equal(y, held[name]) for name, y in state["y"].items())


def run(make_trainer, *others, epochs=3, ckpt_path=None, **arguments):
    module, callback = Validated(RULES["SGD"]), ScheduleFreeWrapper(**OPTIONS)
    points = Points(callback)
    trainer = make_trainer(
        callback, points, SeedEachBatch(), *others, epochs=epochs, accumulate_grad_batches=1, **arguments
    )
    trainer.fit(module, loader(4), loader(1), ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return trainer, module, callback, points


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_validation_checkpoints_and_the_module_have_the_average_and_a_resumed_run_is_the_same_bits(
    make_trainer, tmp_path, frozen
):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    light = ModelCheckpoint(tmp_path / "light", save_top_k=-1, filename="{step}", every_n_train_steps=2)
    light.save_weights_only = True
    trainer, module, callback, points = run(
        make_trainer, saving, light, enable_checkpointing=True, limit_val_batches=1.0, val_check_interval=2
    )
    _, undisturbed, _, others = run(make_trainer)
    assert frozen(points.y) == frozen(others.y)
    assert frozen(module.state_dict()) == frozen(undisturbed.state_dict())

    at = [0, 2, 4, 6, 8, 10, 12]
    assert len(module.validated) == len(at)
    for seen, step in zip(module.validated[1:], at[1:], strict=True):
        assert torch.equal(seen, points.x[step]["net.0.weight"])
    for epoch, step in enumerate(at[2::2]):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt")
        assert frozen({name: saved["state_dict"][name] for name in points.x[step]}) == frozen(points.x[step])
    for step in at[1:]:
        saved = torch.load(tmp_path / "light" / f"step={step}.ckpt")
        assert "callbacks" not in saved
        assert frozen({name: saved["state_dict"][name] for name in points.x[step]}) == frozen(points.x[step])

    path = str(tmp_path / "epoch=0.ckpt")
    _, resumed, after, later = run(make_trainer, ckpt_path=path, limit_val_batches=1.0)
    assert frozen(later.y) == frozen({step: y for step, y in points.y.items() if step > 4})
    assert frozen(resumed.state_dict()) == frozen(module.state_dict())
    assert frozen(after.state_dict()) == frozen(callback.state_dict())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert frozen(torch.load(tmp_path / "end.ckpt")["callbacks"]["ScheduleFreeWrapper"]) == frozen(after.state_dict())


def test_a_step_that_fails_leaves_y_in_the_state_and_the_average_in_the_module(make_trainer):
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            if len(points.y) == 3:
                raise RuntimeError("out of luck")
            super().step()
            return loss

    module, callback = With(lambda params: Fails(params, lr=1.0)), ScheduleFreeWrapper()
    points = Points(callback)
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(callback, points, epochs=1, accumulate_grad_batches=1).fit(module, loader(4))
    assert sorted(points.y) == [1, 2, 3]
    assert_close(callback.state_dict()["y"], points.y[3], 1e-6)
    assert_close(dict(module.named_parameters()), points.x[3], 1e-6)
    assert (points.x[3]["net.0.weight"] - points.y[3]["net.0.weight"]).abs().max() > 1e-3


def test_skipped_steps_move_nothing_and_do_not_count(make_trainer):
    module, callback = Classifier(huge=True), ScheduleFreeWrapper()  # the loss scaler finds an overflow in every step
    before = copy.deepcopy(dict(module.named_parameters()))
    trainer = make_trainer(callback, epochs=1, accumulate_grad_batches=1, precision="16-mixed")
    trainer.fit(module, loader(3))
    assert callback.state_dict() == {"y": {}, "z": {}, "weights": []}
    assert_close(dict(module.named_parameters()), before, 0)


def test_a_fresh_average_is_the_mean_of_z_and_unused_parameters_stay(make_trainer):
    class Constant(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

        def training_step(self, batch, batch_idx):
            return self.net[0].weight.sum()

    module, start = Constant(), Constant()
    make_trainer(ScheduleFreeWrapper(), epochs=1, accumulate_grad_batches=1).fit(module, loader(3))
    moved = start.net[0].weight - 0.5 * (1 + 2 + 3) / 3
    torch.testing.assert_close(module.net[0].weight, moved)
    assert torch.equal(module.unused.weight, start.unused.weight)


def test_an_estimated_rate_weighs_the_steps(make_trainer):
    class Estimated(Classifier):
        def configure_optimizers(self):
            return Prodigy(self.parameters(), d0=1e-4, lr=0.5)

    module, callback = Estimated(), ScheduleFreeWrapper()
    trainer = make_trainer(callback, SeedEachBatch(), epochs=1, accumulate_grad_batches=1)
    trainer.fit(module, loader(8))
    ((steps, _, lr_max),) = callback.state_dict()["weights"][0]
    estimate = float(trainer.optimizers[0].param_groups[0]["d"])
    assert estimate > 1e-4 and (steps, lr_max) == (8, 0.5 * estimate)


REFUSED = {
    "schedule-free": (
        lambda params: ScheduleFreeSGD(params, lr=0.1),
        [],
        {},
        r": ScheduleFreeSGD is schedule-free itself; use the ScheduleFree callback for it\.$",
    ),
    "LBFGS": (lambda params: torch.optim.LBFGS(params), [], {}, r": LBFGS evaluates the loss many times"),
    "16 bits": (RULES["SGD"], [], dict(precision="bf16-true"), r": a parameter is torch\.bfloat16; x, y and z must be"),
    "an average": (RULES["SGD"], [WeightAveraging(EMA(0.5))], {}, r": WeightAveraging averages the weights too; use"),
    "LAWA": (RULES["SGD"], [WeightAveraging(LAWA(2), evaluate=False)], {}, r": WeightAveraging averages the weights"),
    "SWA": (RULES["SGD"], [StochasticWeightAveraging(1e-2)], {}, r": StochasticWeightAveraging averages the weights"),
    "folded": (lambda params: AdamW(params, average=EMA(0.5)), [], {}, r": changes the weights after the step of Adam"),
    "Lookahead": (RULES["SGD"], [Lookahead()], {}, r": Lookahead changes the weights after the step, and the average"),
    "MaxNorm": (RULES["SGD"], [MaxNorm(1.0)], {}, r": MaxNorm changes the weights after the step"),
    "QKClip": (RULES["SGD"], [QKClip()], {}, r": QKClip changes the weights after the step"),
    "ElasticNet": (RULES["SGD"], [ElasticNet(l1=0.1)], {}, r": ElasticNet changes the weights after the step"),
    "in backward": (RULES["AdamW"], [ReleaseGradients()], {}, r": acts between the gradients and the update"),
}


@pytest.mark.filterwarnings("ignore:AdamW keeps EMA")  # the average is in no callback, either
@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_stand_beside_is_refused_in_a_sentence(make_trainer, name):
    rule, others, arguments, said = REFUSED[name]

    class Plain(Classifier):
        def configure_optimizers(self):
            return rule(self.net.parameters())

    trainer = make_trainer(ScheduleFreeWrapper(), *others, epochs=1, accumulate_grad_batches=1, **arguments)
    with pytest.raises(ValueError, match=r"ScheduleFreeWrapper\(\.\.\.\)" + said):
        trainer.fit(Plain(), loader(2))


def test_l2_of_elastic_net_stands_beside_it(make_trainer):
    trainer = make_trainer(ScheduleFreeWrapper(), ElasticNet(l2=0.1, verbose=False), epochs=1)
    trainer.fit(module := Classifier(), loader(4))
    assert module.net[0].weight.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(momentum=1.0), r"^ScheduleFreeWrapper\(momentum=1\.0\): momentum must be in \(0, 1\)\.$"),
        (dict(weight_decay_at_y=-1.0), r"weight_decay_at_y must be in \[0, inf\)\.$"),
        (dict(weight_lr_power=-1.0), r"weight_lr_power must be in \[0, inf\)\.$"),
        (dict(r=float("nan")), r"r must be in \[0, inf\)\.$"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScheduleFreeWrapper(**arguments)


@pytest.mark.parametrize(
    "state",
    [
        {"y": {}, "z": {}},
        {"y": {}, "z": {"a": torch.ones(1, dtype=torch.int64)}, "weights": []},
        {"y": {}, "z": {}, "weights": [7]},
        {"y": {}, "z": {}, "weights": [[[1, 2.0]]]},
        {"y": {}, "z": {}, "weights": [[[-1, 2.0, 1.0]]]},
        {"y": {}, "z": {}, "weights": [[[1, float("nan"), 1.0]]]},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(state):
    callback = ScheduleFreeWrapper()
    with pytest.raises((TypeError, ValueError), match=r"^ScheduleFreeWrapper\.load_state_dict\("):
        callback.load_state_dict(state)
    assert callback.state_dict() == {"y": {}, "z": {}, "weights": []}
