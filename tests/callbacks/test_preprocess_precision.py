# SPDX-License-Identifier: Apache-2.0
"""Preprocess in lower precision: transformed where digits are left, rounded afterwards."""

import pytest
import torch
from preprocess_cases import ROWS, TARGETS, Seen, inputs_of, loader, running

from lightning_optkit.callbacks import Preprocess
from lightning_optkit.data import Impute, MinMaxScale, OneHot, Standardize

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")

run = pytest.fixture(running)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
@pytest.mark.parametrize("by_hook", [False, True])
def test_lower_precision_rounds_after_the_transform_where_digits_are_left(run, precision, dtype, by_hook):
    far = 1e6 + ROWS  # as good as constant in bfloat16, infinite in float16
    module, preprocess = Seen(), Preprocess([Impute(), Standardize()])
    module.training_step = lambda batch, batch_idx: (module.keep("train", batch), module.net(batch[0]).mean())[1]
    if by_hook:  # that looks at the batch before the transform
        module.on_before_batch_transfer = lambda batch, idx: (module.keep("hook", batch), batch)[1]
    run(module, [preprocess, Preprocess(MinMaxScale())], train=loader(far, TARGETS), precision=precision)
    torch.testing.assert_close(preprocess.transform[1].var, far.double().var(dim=0, correction=0), rtol=1e-9, atol=0)
    scaled = Standardize().fit(far)(far).to(dtype)
    expected = MinMaxScale().fit(scaled)(scaled)
    assert inputs_of(module).dtype == dtype and torch.equal(inputs_of(module), expected)
    assert all(batch[1].dtype == dtype for batch in module.seen["train"])  # other fields are Lightning's business
    if by_hook:
        assert all(batch[0].dtype == torch.float32 for batch in module.seen["hook"])


def test_a_field_that_a_hook_makes_is_transformed_in_lower_precision(run):
    module = Seen()
    module.on_before_batch_transfer = lambda batch, idx: {"x": batch[0]}
    module.training_step = lambda batch, batch_idx: (module.keep("train", batch), module.net.weight.mean())[1]
    run(module, [Preprocess(MinMaxScale(), field="x")], precision="bf16-true")
    rounded, found = ROWS.bfloat16(), torch.cat([batch["x"] for batch in module.seen["train"]])
    assert torch.equal(found, MinMaxScale().fit(rounded)(rounded))


def test_lower_precision_gets_its_own_dtype_also_from_integers(run):
    module, ids = Seen(), torch.arange(10)[:, None] % 4
    module.training_step = lambda batch, batch_idx: (module.keep("train", batch), module.net(batch[0]).mean())[1]
    run(module, [Preprocess(OneHot())], train=loader(ids), precision="bf16-true")
    assert inputs_of(module).dtype == torch.bfloat16
