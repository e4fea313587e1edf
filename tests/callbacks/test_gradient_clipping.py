# SPDX-License-Identifier: Apache-2.0
"""GradientClipping in real Trainers: the same numbers folded or not, in every precision, and none but its own."""

import copy
import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_optkit.callbacks import Fuse, GradientClipping
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue, ZClip
from lightning_optkit.optimizers import AdamW
from tests.workers import launch

CLIPS = {
    "norm": ClipNorm(0.1),
    "value": ClipValue(0.01),
    "tensor": ClipPerTensor(0.05),
    "unit": ClipUnitwise(0.02),
    "auto": AutoClip(30),
    "z": ZClip(0.5, alpha=0.5, warmup_steps=2),
}
FOLDED = {"folded": [Fuse], "own pass": []}


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def fused_adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.02, fused=True)


def assert_equal(module, expected, tolerance=0.0):
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=0, atol=tolerance)


class Gradients(Callback):
    """What each optimizer step was given, before any clip."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("configure", [sgd, fused_adamw])
@pytest.mark.parametrize("name", CLIPS)
def test_folded_or_in_its_own_pass_the_numbers_are_the_same(regression, fit, name, configure, precision):
    own, folded, unclipped = (regression(configure) for _ in range(3))
    trainer = fit(own, GradientClipping(CLIPS[name]), precision=precision)
    fit(folded, GradientClipping(CLIPS[name]), Fuse(verbose=False), precision=precision)
    fit(unclipped, precision=precision)
    assert trainer.global_step == 6
    assert_equal(folded, own, tolerance=1e-6)
    assert max((p - q).abs().max() for p, q in zip(own.parameters(), unclipped.parameters(), strict=True)) > 1e-4


@pytest.mark.parametrize(
    "clip", [dict(gradient_clip_val=0.1), dict(gradient_clip_val=0.01, gradient_clip_algorithm="value")]
)
@pytest.mark.parametrize("callbacks", FOLDED.values(), ids=FOLDED)
def test_it_is_lightnings_own_clip_where_lightning_has_it(regression, fit, clip, callbacks):
    expected, module = regression(sgd), regression(sgd)
    fit(expected, **clip)
    ours = ClipValue(0.01) if "gradient_clip_algorithm" in clip else ClipNorm(0.1)
    fit(module, GradientClipping(ours), *(make() for make in callbacks))
    assert_equal(module, expected, tolerance=1e-6)


@pytest.mark.parametrize("callbacks", FOLDED.values(), ids=FOLDED)
def test_logs_norms_and_how_often_it_clipped(regression, fit, callbacks, tmp_path):
    logger, seen = CSVLogger(tmp_path), Gradients()
    clip = GradientClipping(ClipNorm(1.0))
    fit(regression(sgd), clip, seen, *(make(verbose=False) for make in callbacks), logger=logger, log_every_n_steps=1)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file) if row["grad_norm"]]
    assert [row["grad_norm"] for row in rows] == pytest.approx(seen.norms, rel=1e-5)
    assert [row["grad_norm_clipped"] for row in rows] == pytest.approx([min(n, 1.0) for n in seen.norms], rel=1e-5)
    shares = [sum(n > 1.0 for n in seen.norms[: i + 1]) / (i + 1) for i in range(6)]
    assert [row["clip_fraction"] for row in rows] == pytest.approx(shares)
    assert 0 < shares[-1] < 1


def test_nothing_is_measured_without_a_logger(regression, fit, monkeypatch):
    from lightning_optkit.callbacks import gradient_clipping

    monkeypatch.setattr(gradient_clipping, "norm_of", lambda _: pytest.fail("measured for nobody"))
    fit(regression(sgd), GradientClipping(ClipValue(0.1)))


@pytest.mark.parametrize("callbacks", FOLDED.values(), ids=FOLDED)
@pytest.mark.parametrize("name", ["auto", "z"])
def test_a_resumed_run_is_the_uninterrupted_one(regression, fit, name, callbacks, tmp_path):
    def run(module, epochs, ckpt_path=None):
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        others = [make(verbose=False) for make in callbacks]
        arguments = dict(epochs=epochs, enable_checkpointing=True, ckpt_path=ckpt_path)
        fit(module, GradientClipping(copy.deepcopy(CLIPS[name])), *others, checkpoint, **arguments)

    expected, module, resumed = (regression(sgd) for _ in range(3))
    run(expected, 4)
    run(module, 2)
    run(resumed, 4, tmp_path / "epoch=1.ckpt")
    assert_equal(resumed, expected)
    assert (resumed.net[0].weight - module.net[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("callbacks", FOLDED.values(), ids=FOLDED)
def test_leaves_module_and_optimizer_as_they_were(regression, fit, callbacks, fails):
    module = regression(fused_adamw)
    before = set(vars(module))
    optimizers = []

    class Peek(Callback):
        def on_train_batch_end(self, trainer, *_):
            optimizers[:] = trainer.optimizers
            if fails:
                raise KeyError("stop")

    arguments = (GradientClipping(ClipNorm(0.1)), *(make(verbose=False) for make in callbacks), Peek())
    if fails:
        with pytest.raises(KeyError):
            fit(module, *arguments)
    else:
        fit(module, *arguments)
    assert "configure_gradient_clipping" not in vars(module)
    assert {name for name in vars(module) if name.startswith("configure")} == {
        name for name in before if name.startswith("configure")
    }
    assert type(optimizers[0]) is torch.optim.AdamW
    assert optimizers[0]._step_supports_amp_scaling is True
    assert not hasattr(optimizers[0], "clip")


def test_an_optimizer_of_this_package_gets_the_clip_for_the_fit(regression, fit):
    expected, module = (regression(lambda m: AdamW(m.parameters(), lr=0.02)) for _ in range(2))
    trainer = fit(module, GradientClipping(ClipNorm(0.1)))
    fit(expected, gradient_clip_val=0.1)
    assert_equal(module, expected, tolerance=1e-6)
    assert trainer.optimizers[0].clip is None


def test_each_fit_starts_with_what_the_user_gave(regression, fit):
    clipping, results = GradientClipping(AutoClip(30)), []
    for _ in range(2):
        module = regression(sgd)
        fit(module, clipping)
        results.append(module)
    assert_equal(*results)
    assert clipping.clip.state_dict()["seen"] == 0


def test_two_processes_equal_one(tmp_path):
    worker = Path(__file__).parent / "gradient_clipping_worker.py"
    for world_size in (1, 2):
        launch(worker, tmp_path / f"{world_size}.pt", world_size, processes=world_size, timeout=250)
    one, two = (torch.load(tmp_path / f"{world_size}.pt") for world_size in (1, 2))
    expected = {name: weights for name, _, weights in one}
    assert len(expected) == 3 * len(CLIPS) - 1 + 6  # folded, in its own pass, with NaN except by value; and left out
    assert len(two) == 2 * len(expected) == 2 * sum(shards for _, shards, _ in two)
    assert all(each.isfinite().all() for weights in expected.values() for each in weights.values())
    for name, _, weights in two:  # both with copies of the parameters and with shards of them
        torch.testing.assert_close(weights, expected[name], rtol=0, atol=1e-6, msg=name)


# --- bad input ---


@pytest.mark.parametrize("callbacks", FOLDED.values(), ids=FOLDED)
@pytest.mark.parametrize("clip", [ClipUnitwise(0.02), ClipNorm(0.1)], ids=str)
def test_parameters_left_out_by_name_keep_their_gradients(regression, fit, clip, callbacks):
    module, expected = regression(sgd), regression(sgd)
    names = [name for name, _ in expected.named_parameters()]
    last = names[-1].rsplit(".", 1)[0]

    def clip_the_others(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip([p for name, p in expected.named_parameters() if not name.startswith(f"{last}.")])

    expected.configure_gradient_clipping = clip_the_others
    fit(expected)
    fit(module, GradientClipping(clip, leave_out=[f"{last}.*"]), *(make() for make in callbacks))
    assert_equal(module, expected, tolerance=1e-6)
    whole = regression(sgd)
    fit(whole, GradientClipping(clip))
    assert max((p - q).abs().max() for p, q in zip(module.parameters(), whole.parameters(), strict=True)) > 1e-4


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_folded_or_not_the_same_is_left_out_in_mixed_precision(regression, fit, precision):
    own, folded = regression(sgd), regression(sgd)
    names = [name for name, _ in own.named_parameters()]
    fit(own, GradientClipping(ClipUnitwise(0.02), leave_out=names[-2:]), precision=precision)
    fit(folded, GradientClipping(ClipUnitwise(0.02), leave_out=names[-2:]), Fuse(verbose=False), precision=precision)
    assert_equal(folded, own, tolerance=1e-6)


def test_what_is_left_out_is_part_of_the_step_and_nothing_stays_behind(regression, fit):
    class Peek(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            (optimizer,) = trainer.optimizers
            assert [name for name, p in pl_module.named_parameters() if p in optimizer.leaves_out()] == [last]
            stages = [(plan.num_tensors, "ClipUnitwise" in str(plan.stages)) for plan in optimizer.explain().groups]
            seen.append(sorted(stages))

    module, seen = regression(lambda m: AdamW(m.parameters(), lr=0.02)), []
    *others, last = (name for name, _ in module.named_parameters())
    trainer = fit(module, GradientClipping(ClipUnitwise(0.02), leave_out=[last]), Peek(), epochs=1)
    assert seen and set(map(tuple, seen)) == {((1, False), (len(others), True))}
    assert trainer.optimizers[0].leaves_out is None and trainer.optimizers[0].clip is None


def test_a_non_finite_gradient_that_is_left_out_skips_the_step(regression, fit):
    module = regression(sgd)
    last = [*module.named_parameters()][-1]
    before = last[1].detach().clone()
    last[1].register_hook(lambda grad: grad * float("nan"))
    fit(module, GradientClipping(ClipUnitwise(), leave_out=[last[0]]), Fuse(verbose=False), epochs=1)
    assert torch.equal(last[1], before) and all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("leave_out", "error", "message"),
    [
        (
            ["nowhere.*"],
            ValueError,
            r"GradientClipping\(leave_out=\['nowhere.\*'\]\): the pattern matches no parameter",
        ),
        ("head", TypeError, r"GradientClipping\(leave_out='head'\): leave_out must be a list of patterns"),
        ([3], TypeError, r"GradientClipping\(leave_out=3\): leave_out must be a list of patterns"),
    ],
)
def test_patterns_to_leave_out_that_mean_nothing_are_refused(regression, fit, leave_out, error, message):
    with pytest.raises(error, match=message):
        fit(regression(sgd), GradientClipping(ClipUnitwise(), leave_out=leave_out))


def test_refuses_what_is_no_clip():
    with pytest.raises(
        TypeError, match=r"^GradientClipping\(clip=1.0\): clip must be a clip such as ClipNorm\(1.0\)\.$"
    ):
        GradientClipping(1.0)
    with pytest.raises(TypeError, match=r"clip must be a clip such as ClipNorm\(1.0\); ClipNorm is a class"):
        GradientClipping(ClipNorm)


@pytest.mark.parametrize("callbacks", FOLDED.values(), ids=FOLDED)
def test_refuses_to_clip_twice(regression, fit, callbacks):
    clipping = GradientClipping(ClipNorm(0.5))
    others = [make(verbose=False) for make in callbacks]
    start = r"^GradientClipping\(ClipNorm\(max_norm=0.5\)\): "
    with pytest.raises(ValueError, match=start + r"Trainer\(gradient_clip_val=0.1\) clips too; keep one\. Without G"):
        fit(regression(sgd), clipping, *others, gradient_clip_val=0.1)
    with pytest.raises(ValueError, match=start + r"given twice, also as GradientClipping\(ClipValue\(.*keep one\.$"):
        fit(regression(sgd), clipping, GradientClipping(ClipValue(1.0)), *others)

    class Clips(regression):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            pass

    with pytest.raises(ValueError, match=start + r"the module clips in configure_gradient_clipping; keep one\.$"):
        fit(Clips(sgd), clipping, *others)
    with pytest.raises(ValueError, match=start + r"AdamW\(clip=ClipNorm\(max_norm=1.0\)\) clips too; keep one\.$"):
        fit(regression(lambda m: AdamW(m.parameters(), clip=ClipNorm(1.0))), clipping, *others)


def manual(regression, clip_gradients=None):
    class Manual(regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            if clip_gradients is not None:
                self.clip_gradients(optimizer, clip_gradients, "norm")
            optimizer.step()

    return Manual(sgd)


def test_a_module_that_clips_in_its_training_step_is_refused(regression, fit):
    clipping, module = GradientClipping(ClipNorm(1.0)), manual(regression, clip_gradients=0.5)
    message = (
        r"GradientClipping\(.*\): clip_gradients\(gradient_clip_val=0\.5\) in training_step clips too; keep one\.$"
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(module, clipping, Fuse(verbose=False), accumulate_grad_batches=1)
    assert all(torch.equal(before[name], now) for name, now in module.state_dict().items())
    fit(module, Fuse(verbose=False), accumulate_grad_batches=1)  # its own clip alone
    assert not all(torch.equal(before[name], now) for name, now in module.state_dict().items())


def test_manual_optimization_needs_a_one_pass_optimizer(regression, fit):
    arguments = dict(accumulate_grad_batches=1)
    with pytest.raises(ValueError, match="under manual optimization SGD is out of reach; add Fuse"):
        fit(manual(regression), GradientClipping(ClipNorm(0.1)), **arguments)
    module, expected = manual(regression), regression(sgd)
    fit(module, GradientClipping(ClipNorm(0.1)), Fuse(verbose=False), **arguments)
    fit(expected, gradient_clip_val=0.1, **arguments)
    assert_equal(module, expected, tolerance=1e-6)
    assert isinstance(module, pl.LightningModule)
