# SPDX-License-Identifier: Apache-2.0
"""A bad argument raises at construction, in one sentence: `Rule(argument=value): requirement.`"""

import pytest
import torch

from lightning_optkit import optimizers

REFUSED = [
    ("SGD", dict(momentum=-0.1), r"\(momentum=-0\.1\): momentum must be in \[0, inf\)\.$"),
    ("SGD", dict(nesterov=True), r"\(nesterov=True\): needs momentum > 0 and dampening = 0\.$"),
    ("SGD", dict(lr=float("nan")), r"\(lr=nan\): lr must be in \[0, inf\)\.$"),
    ("Adam", dict(lr=-1.0), r"\(lr=-1\.0\): lr must be in \[0, inf\)\.$"),
    ("AdamW", dict(betas=(0.9, 1.0)), r"\(betas\[1\]=1\.0\): betas\[1\] must be in \[0, 1\)\.$"),
    ("AdamW", dict(eps=-1), r"\(eps=-1\): eps must be in \[0, inf\)\.$"),
    ("Adan", dict(lr=-1.0), r"\(lr=-1\.0\): lr must be in \[0, inf\)\.$"),
    ("Adan", dict(betas=(0.9, 0.9)), r"\(betas=\(0\.9, 0\.9\)\): betas must be three numbers\.$"),
    ("Adan", dict(betas=(0.9, 0.9, 1.0)), r"\(betas\[2\]=1\.0\): betas\[2\] must be in \[0, 1\)\.$"),
    ("Adan", dict(eps=-1.0), r"\(eps=-1\.0\): eps must be in \[0, inf\)\.$"),
    ("Adan", dict(no_prox=1), r"\(no_prox=1\): no_prox must be one of"),
    ("Adan", dict(cautious=True), r"\(cautious=True\): needs no_prox=True; the proximal decay acts everywhere\.$"),
    ("AdEMAMix", dict(lr=-1.0), r"\(lr=-1\.0\): lr must be in \[0, inf\)\.$"),
    ("AdEMAMix", dict(betas=(0.9, 0.9)), r"\(betas=\(0\.9, 0\.9\)\): betas must be three numbers\.$"),
    ("AdEMAMix", dict(betas=(0.9, 1.0, 0.9)), r"\(betas\[1\]=1\.0\): betas\[1\] must be in \[0, 1\)\.$"),
    ("AdEMAMix", dict(alpha=-1.0), r"\(alpha=-1\.0\): alpha must be in \[0, inf\)\.$"),
    ("AdEMAMix", dict(alpha_warmup=0), r"\(alpha_warmup=0\): alpha_warmup must be an integer >= 1\.$"),
    ("ADOPT", dict(lr=-1.0), r"\(lr=-1\.0\): lr must be in \[0, inf\)\.$"),
    ("ADOPT", dict(betas=(1.0, 0.9)), r"\(betas\[0\]=1\.0\): betas\[0\] must be in \[0, 1\)\.$"),
    ("ADOPT", dict(eps=-1.0), r"\(eps=-1\.0\): eps must be in \[0, inf\)\.$"),
    ("ADOPT", dict(clip_exponent=-1.0), r"\(clip_exponent=-1\.0\): clip_exponent must be in \[0, inf\)\.$"),
    ("ADOPT", dict(decouple=1), r"\(decouple=1\): decouple must be one of"),
    ("LAMB", dict(lr=-1.0), r"\(lr=-1\.0\): lr must be in \[0, inf\)\.$"),
    ("LAMB", dict(betas=(1.0, 0.9)), r"\(betas\[0\]=1\.0\): betas\[0\] must be in \[0, 1\)\.$"),
    ("LAMB", dict(norm_bounds=(2.0, 1.0)), r"\(norm_bounds=\(2\.0, 1\.0\)\): norm_bounds must be "),
    ("LAMB", dict(cautious=True), r"\(cautious=True\): cautious must be "),
    ("LAMB", dict(adapt=2), r"\(adapt=2\): adapt must be "),
    ("LARS", dict(lr=-1.0), r"\(lr=-1\.0\): lr must be in \[0, inf\)\.$"),
    ("LARS", dict(momentum=1.0), r"\(momentum=1\.0\): momentum must be in \[0, 1\)\.$"),
    ("LARS", dict(trust_coefficient=0.0), r"\(trust_coefficient=0\.0\): trust_coefficient must be in \(0, inf\)\.$"),
    ("LARS", dict(cautious=True), r"\(cautious=True\): cautious must be "),
    ("Lion", dict(lr=-1.0), r"\(lr=-1\.0\): lr must be in \[0, inf\)\.$"),
    ("Lion", dict(betas=(1.0, 0.9)), r"\(betas\[0\]=1\.0\): betas\[0\] must be in \[0, 1\)\.$"),
    ("Lion", dict(weight_decay=-0.1), r"\(weight_decay=-0\.1\): weight_decay must be in \[0, inf\)\.$"),
    ("AdaBelief", dict(betas=(0.9, 1.0)), r"\(betas\[1\]=1\.0\): betas\[1\] must be in \[0, 1\)\.$"),
    ("AdaBelief", dict(eps=-1.0), r"\(eps=-1\.0\): eps must be in \[0, inf\)\.$"),
    ("CAME", dict(betas=(0.9, 0.9)), r"\(betas=\(0\.9, 0\.9\)\): betas must be three numbers\.$"),
    ("CAME", dict(eps=(0.0, 1.0)), r"\(eps\[0\]=0\.0\): eps\[0\] must be in \(0, inf\)\.$"),
    ("CAME", dict(clip_threshold=0.0), r"\(clip_threshold=0\.0\): clip_threshold must be in \(0, inf\]\.$"),
    ("SOAP", dict(shampoo_beta=1.0), r"\(shampoo_beta=1\.0\): shampoo_beta must be in \[0, 1\)\.$"),
    (
        "SOAP",
        dict(precondition_frequency=0),
        r"\(precondition_frequency=0\): precondition_frequency must be an integer",
    ),
    ("MARS", dict(gamma=-0.1), r"\(gamma=-0\.1\): gamma must be in \[0, inf\)\.$"),
    ("MARS", dict(max_corrected_norm=0.0), r"\(max_corrected_norm=0\.0\): max_corrected_norm must be in \(0, inf\]\.$"),
    ("Signum", dict(momentum=1.0), r"\(momentum=1\.0\): momentum must be in \[0, 1\)\.$"),
    ("SophiaG", dict(rho=0.0), r"\(rho=0\.0\): rho must be in \(0, inf\)\.$"),
    ("SophiaG", dict(eps=0.0), r"\(eps=0\.0\): eps must be in \(0, inf\)\.$"),
    ("StableAdamW", dict(betas=(0.9, 1.0)), r"\(betas\[1\]=1\.0\): betas\[1\] must be in \[0, 1\)\.$"),
    ("StableAdamW", dict(eps=0.0), r"\(eps=0\.0\): eps must be in \(0, inf\)\.$"),
    ("DAdaptAdam", dict(betas=(0.9, 1.0)), r"\(betas\[1\]=1\.0\): betas\[1\] must be in \[0, 1\)\.$"),
    ("DAdaptAdam", dict(eps=0.0), r"\(eps=0\.0\): eps must be in \(0, inf\)\.$"),
    ("DAdaptAdam", dict(d0=-1.0), r"\(d0=-1\.0\): d0 must be in \(0, inf\)\.$"),
    ("DAdaptAdam", dict(growth_rate=0.5), r"\(growth_rate=0\.5\): growth_rate must be in \[1, inf\]\.$"),
    ("DAdaptAdam", dict(decouple=2), r"\(decouple=2\): decouple must be one of False, True\.$"),
    ("DAdaptAdam", dict(use_bias_correction=2), r"\(use_bias_correction=2\): use_bias_correction must be one of "),
    ("Prodigy", dict(lr=-1.0), r"\(lr=-1\.0\): lr must be in \[0, inf\)\.$"),
    ("Prodigy", dict(betas=(1.0, 0.9)), r"\(betas\[0\]=1\.0\): betas\[0\] must be in \[0, 1\)\.$"),
    ("Prodigy", dict(beta3=1.0), r"\(beta3=1\.0\): beta3 must be in \[0, 1\)\.$"),
    ("Prodigy", dict(d0=0.0), r"\(d0=0\.0\): d0 must be in \(0, inf\)\.$"),
    ("Prodigy", dict(d_coef=-1.0), r"\(d_coef=-1\.0\): d_coef must be in \(0, inf\)\.$"),
    ("Prodigy", dict(growth_rate=0.5), r"\(growth_rate=0\.5\): growth_rate must be in \[1, inf\]\.$"),
    ("Prodigy", dict(slice_p=0), r"\(slice_p=0\): slice_p must be an integer >= 1\.$"),
    ("Prodigy", dict(decouple=2), r"\(decouple=2\): decouple must be one of False, True\.$"),
    ("ScheduleFreeSGD", dict(momentum=0.0), r"\(momentum=0\.0\): momentum must be in \(0, 1\)\.$"),
    ("ScheduleFreeAdamW", dict(betas=(0.0, 0.9)), r"\(betas\[0\]=0\.0\): betas\[0\] must be in \(0, 1\)\.$"),
    ("ScheduleFreeAdamW", dict(betas=(0.9, 1.0)), r"\(betas\[1\]=1\.0\): betas\[1\] must be in \[0, 1\)\.$"),
    ("ScheduleFreeAdamW", dict(eps=-1.0), r"\(eps=-1\.0\): eps must be in \[0, inf\)\.$"),
    ("Muon", dict(ns_steps=100), r"\(ns_steps=100\): ns_steps must be less than 100\.$"),
    ("Muon", dict(ns_coefficients=(1.0,)), r"\(ns_coefficients=\(1\.0,\)\): ns_coefficients must be three numbers"),
    ("Muon", dict(adamw_lr=-1.0), r"\(adamw_lr=-1\.0\): adamw_lr must be in \[0, inf\)\.$"),
    ("Muon", dict(adamw_betas=(0.9, 1.0)), r"\(adamw_betas\[1\]=1\.0\): adamw_betas\[1\] must be in \[0, 1\)\.$"),
    ("Muon", dict(adamw_params=["head"]), r"\(adamw_params=\['head'\]\): needs model\.named_parameters\(\)\.$"),
    ("Adafactor", dict(beta2_decay=0.1), r"\(beta2_decay=0\.1\): beta2_decay must be in \(-inf, 0\]\.$"),
    ("Adafactor", dict(eps=(-1.0, 0.0)), r"\(eps\[0\]=-1\.0\): eps\[0\] must be in \[0, inf\)\.$"),
    ("Adafactor", dict(eps=(None, -1.0)), r"\(eps\[1\]=-1\.0\): eps\[1\] must be in \[0, inf\)\.$"),
    ("Adafactor", dict(eps=(None, 0.0, 0.0)), r"\(eps=\(None, 0\.0, 0\.0\)\): eps must be two numbers\.$"),
    ("Adafactor", dict(d=0.5), r"\(d=0\.5\): d must be in \[1, inf\]\.$"),
    ("Adafactor", dict(state_dtype=torch.float16), r"\(state_dtype=torch\.float16\): state_dtype must be one of .*$"),
]
WRONG_TYPES = [
    ("AdEMAMix", dict(beta3_warmup=1.5), r"\(beta3_warmup=1\.5\): beta3_warmup must be an integer >= 1\.$"),
    ("Muon", dict(adamw_params="head"), r"\(adamw_params='head'\): adamw_params must be a list of regular"),
]
ROWS = [*((ValueError, *row) for row in REFUSED), *((TypeError, *row) for row in WRONG_TYPES)]


def test_every_rule_with_arguments_that_torch_lacks_is_refused_something():
    rules = {name: getattr(optimizers, name) for name in optimizers.__all__}
    rules = {name: one for name, one in rules.items() if hasattr(one, "_torch_class")}
    as_torch = {name for name, one in rules.items() if one._torch_class is not None}  # test_as_in_torch.py
    named = {name for _, name, *_ in ROWS}
    assert rules.keys() - as_torch <= named <= rules.keys()


@pytest.mark.parametrize(("error", "name", "kwargs", "message"), ROWS, ids=str)
def test_refuses_in_one_sentence(error, name, kwargs, message):
    with pytest.raises(error, match=rf"^{name}{message}"):
        getattr(optimizers, name)([torch.ones(2, 2, requires_grad=True)], **kwargs)
