# SPDX-License-Identifier: Apache-2.0
"""GSAM in real Trainers against an explicit loop."""

import pytest
import torch
from two_gradient_cases import Classifier, assert_close, batches, trained, written_out

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import GSAM, SAM, Fuse, WeightAveraging


def combined(g, g_p, batch, alpha=0.7):
    cosine = (g @ g_p) / (g.norm() * g_p.norm())
    return g_p - alpha * (g - cosine * g.norm() * g_p / g_p.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_equals_the_loop_that_is_written_out_over_200_batches(make_trainer, accumulate, dtype, tolerance):
    found = trained(make_trainer, GSAM(rho=0.2, alpha=0.7), accumulate=accumulate, dtype=dtype)
    assert_close(found, written_out(combined, 0.2, accumulate=accumulate, dtype=dtype), tolerance)


def test_without_the_gap_it_is_sam(make_trainer):
    found = trained(make_trainer, GSAM(rho=0.2, alpha=0.0), steps=20)
    assert_close(found, trained(make_trainer, SAM(rho=0.2), steps=20), 1e-6)
    other = trained(make_trainer, GSAM(rho=0.2, alpha=0.5), steps=20)
    assert any((other[name].double() - found[name].double()).abs().max() > 1e-3 for name in found)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_in_mixed_precision(make_trainer, precision):
    found = trained(make_trainer, GSAM(rho=0.2, alpha=0.7), steps=20, precision=precision)
    assert_close(found, written_out(combined, 0.2, steps=20), 0.05)


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_a_gradient_that_overflows_makes_the_scaler_skip(make_trainer):
    before = Classifier().net.state_dict()
    found = trained(make_trainer, GSAM(), steps=4, module=Classifier(huge=True), precision="16-mixed")
    for name, value in before.items():
        assert "running" in name or "tracked" in name or torch.equal(found[name], value)


def test_with_a_clip_an_average_and_fuse_it_is_as_without_fuse(make_trainer):
    results = []
    for fuse in ([], [Fuse(verbose=False)]):
        module = Classifier()
        trainer = make_trainer(*fuse, GSAM(), WeightAveraging(EMA(0.5)), epochs=1, gradient_clip_val=0.5)
        torch.manual_seed(0)
        trainer.fit(module, torch.utils.data.DataLoader(batches(10), batch_size=None))
        results.append(module.net.state_dict())
    assert_close(*results, 1e-5)


def test_an_exception_in_the_second_run_leaves_the_true_weights(make_trainer):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if len(self.seen) == 4:
                raise KeyError("stop")
            return loss

    module = Failing()
    with pytest.raises(KeyError):
        trained(make_trainer, GSAM(), steps=4, module=module)
    assert torch.equal(module.net[0].weight, module.seen[2]) and not torch.equal(module.seen[2], module.seen[3])
    assert module.net[1].num_batches_tracked == 2


def test_a_run_takes_one_of_the_family(make_trainer):
    with pytest.raises(ValueError, match=r"^SAM\(\.\.\.\): GSAM takes a second gradient too; a run takes one\.$"):
        make_trainer(SAM(), GSAM()).fit(Classifier(), torch.utils.data.DataLoader([0]))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^GSAM\(alpha=-1\.0\): alpha must be in \[0, inf\)\.$"):
        GSAM(alpha=-1.0)
    with pytest.raises(ValueError, match=r"^GSAM\(rho=0\.0\): rho must be in \(0, inf\)\.$"):
        GSAM(rho=0.0)
