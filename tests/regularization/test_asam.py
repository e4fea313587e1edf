# SPDX-License-Identifier: Apache-2.0
"""The ascent of ASAM against its formula, and its invariances."""

import pytest
import torch

from lightning_optkit.regularization import asam, sam

GENERATOR = torch.Generator().manual_seed(0)
PARAMS = [torch.randn(shape, generator=GENERATOR) for shape in ((3, 4), (5,))]
GRADS = [torch.randn(p.shape, generator=GENERATOR) for p in PARAMS]


def test_it_is_the_formula():
    w, g = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (PARAMS, GRADS))
    stretch = w.abs() + 0.01
    expected = 0.5 * stretch**2 * g / torch.linalg.vector_norm(stretch * g)
    actual = torch.cat([step.flatten() for step in asam(PARAMS, GRADS, rho=0.5, eta=0.01)])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)


def test_rescaling_a_weight_rescales_its_step_alike():
    """A loss that knows c * w: the gradient by w is c times larger."""
    scaled = asam([PARAMS[0] / 8, PARAMS[1]], [8 * GRADS[0], GRADS[1]], rho=0.5, eta=0.0)
    plain = asam(PARAMS, GRADS, rho=0.5, eta=0.0)
    torch.testing.assert_close(scaled, [plain[0] / 8, plain[1]])


def test_far_from_zero_weights_of_one_size_make_it_sam():
    ones = [torch.ones_like(p) for p in PARAMS]
    torch.testing.assert_close(asam(ones, GRADS, rho=0.1, eta=0.0), sam(GRADS, rho=0.1))


def test_a_missing_gradient_gives_no_step():
    assert asam(PARAMS, [GRADS[0], None])[1] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rho=0.0), r"^asam\(rho=0\.0\): rho must be in \(0, inf\)\.$"),
        (dict(eta=-1.0), r"^asam\(eta=-1\.0\): eta must be in \[0, inf\)\.$"),
        (dict(grads=GRADS[:1]), r"^asam\(grads=<1>\): there must be one for each of the 2 parameters\.$"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        asam(**{"params": PARAMS, "grads": GRADS, **arguments})
