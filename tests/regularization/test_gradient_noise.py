# SPDX-License-Identifier: Apache-2.0
"""The amount and the distribution of the noise."""

import pytest
import torch

from lightning_optkit.regularization import gradient_noise_, gradient_noise_std


def test_the_variance_is_annealed_as_in_the_paper():
    for step in (0, 1, 10, 1000):
        assert gradient_noise_std(step, eta=0.3, gamma=0.55) ** 2 == pytest.approx(0.3 / (1 + step) ** 0.55)
    assert gradient_noise_std(7, eta=0.0) == 0.0
    assert gradient_noise_std(7, eta=4.0, gamma=0.0) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_noise_has_the_deviation_and_no_mean(dtype):
    grads = [torch.ones(20000, dtype=dtype), torch.ones(100, 100, dtype=dtype)]
    gradient_noise_(grads, 0.5, torch.Generator().manual_seed(0))
    for grad in grads:
        noise = grad.double() - 1
        assert noise.std() == pytest.approx(0.5, rel=0.03) and abs(noise.mean()) < 0.02
    assert not torch.equal(grads[0][:100], grads[1][0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: gradient_noise_std(-1), r"^gradient_noise_std\(step=-1\): step must be an integer >= 0\.$"),
        (lambda: gradient_noise_std(0, eta=-1.0), r"^gradient_noise_std\(eta=-1\.0\): eta must be in \[0, inf\)\.$"),
        (lambda: gradient_noise_std(0, gamma=-1.0), r"^gradient_noise_std\(gamma=-1\.0\): gamma must be in \[0, inf\)"),
        (lambda: gradient_noise_([], -1.0), r"^gradient_noise_\(std=-1\.0\): std must be in \[0, inf\)\.$"),
        (
            lambda: gradient_noise_([torch.ones(1).to_sparse()], 1.0),
            r"^gradient_noise_\(grads\[0\]=<torch\.sparse_coo>\): grads\[0\] must be dense",
        ),
    ],
)
def test_bad_input_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()
