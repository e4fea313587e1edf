# SPDX-License-Identifier: Apache-2.0
"""Gradients that do not fit each other are refused by the variants of SAM, in a sentence that says which."""

import pytest
import torch

from lightning_optkit.regularization import gsam, look_sam, look_sam_direction, wsam

FUNCTIONS = {gsam: "perturbed", look_sam: "direction", look_sam_direction: "perturbed", wsam: "perturbed"}


@pytest.mark.parametrize(
    "other", [torch.ones(2), torch.ones(3, 2), torch.ones(2, 3, dtype=torch.complex64)], ids=["1d", "turned", "complex"]
)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_one_that_does_not_fit_is_named(function, other):
    grads = [None, torch.ones(2, 3)]
    with pytest.raises(ValueError, match=rf"^{function.__name__}\(grads=.*, {FUNCTIONS[function]}=.*\): number 1 has"):
        function(grads, [torch.ones(4), other])


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_one_too_few_is_refused(function):
    with pytest.raises(ValueError, match=rf"^{function.__name__}\({FUNCTIONS[function]}=<1>\): there must be one"):
        function([torch.ones(2), torch.ones(3)], [torch.ones(2)])
