# SPDX-License-Identifier: Apache-2.0
"""torch.jit.script of the norms that Fuse substitutes for torch's, and of modules that contain them."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok

pytestmark = pytest.mark.filterwarnings("ignore")

NORMS = {
    "LayerNorm": (ok.LayerNorm, nn.LayerNorm, {}),
    "LayerNorm without bias": (ok.LayerNorm, nn.LayerNorm, {"bias": False}),
    "LayerNorm without weight": (ok.LayerNorm, nn.LayerNorm, {"elementwise_affine": False}),
    "RMSNorm": (ok.RMSNorm, nn.RMSNorm, {}),
    "RMSNorm with eps": (ok.RMSNorm, nn.RMSNorm, {"eps": 0.1}),
}


@pytest.mark.parametrize(("ours", "torchs", "arguments"), NORMS.values(), ids=NORMS)
def test_a_scripted_norm_is_that_of_torch(ours, torchs, arguments):
    torch.manual_seed(0)
    norm, same, x = ours(8, **arguments), torchs(8, **arguments), 3 + torch.randn(5, 8, requires_grad=True)
    for mine, other in zip(norm.parameters(), same.parameters(), strict=True):
        torch.nn.init.normal_(mine)
        other.data.copy_(mine.data)
    scripted = torch.jit.script(nn.Sequential(norm))
    assert torch.equal(scripted(x), same(x))
    torch.testing.assert_close(scripted(x), norm(x))
    for layer in (scripted, same):
        layer(x).square().sum().backward()
    for mine, other in zip(norm.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


class Net(pl.LightningModule):
    """`how`: its middle part is scripted or traced before the fit, or scripted in each of its steps."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        middle = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh())
        made = {"script": torch.jit.script, "trace": lambda part: torch.jit.trace(part, torch.zeros(2, 8))}
        self.middle, self.norm = made.get(how, lambda part: part)(middle), nn.RMSNorm(8)
        self.last, self.how = nn.Linear(8, 3), how

    def training_step(self, batch, batch_idx):
        middle = torch.jit.script(self.middle) if self.how == "in the step" else self.middle
        return nn.functional.cross_entropy(self.last(self.norm(middle(batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fitted(how, *callbacks):
    net = Net(how)
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(16, 8), torch.randint(3, (16,)))
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[*callbacks], **quiet)
    trainer.fit(net, DataLoader(data, batch_size=4))
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize("how", ["script", "trace", "in the step"])
def test_a_fit_with_fused_norms_may_hold_and_make_scripted_modules(how):
    torch.testing.assert_close(fitted(how, ok.Fuse(verbose=False)), fitted("plain"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_weights_inside_a_scripted_module_are_averaged_and_clipped_as_elsewhere(how):
    def callbacks():
        return ok.Fuse(verbose=False), ok.GradientClipping(ok.ClipNorm(0.1)), ok.WeightAveraging(ok.EMA(0.9))

    torch.testing.assert_close(fitted(how, *callbacks()), fitted("plain", *callbacks()), rtol=1e-4, atol=1e-5)
