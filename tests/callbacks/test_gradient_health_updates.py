# SPDX-License-Identifier: Apache-2.0
"""Real runs, broken one by one: gradients that do not arrive, parameters that no step changes, lost updates."""

import copy

import pytest
import torch
import torch.nn.functional as F
from gradient_health_cases import Classifier, loader
from torch import nn

from lightning_optkit.callbacks import Fuse, GradientHealth

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GradientHealth.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


class Unusual(Classifier):
    """A complex weight, and an embedding with sparse gradients."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.phase = nn.Parameter(torch.randn(8, dtype=torch.complex64))
            self.table = nn.Embedding(4, 16, sparse=True)

    def hidden(self, x):
        return self.body((x * self.phase).abs()) + self.table((x[:, 0] > 0).long())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_complex_weights_and_sparse_gradients(diagnose):
    assert diagnose(Unusual()) == []


class Detached(Classifier):
    def hidden(self, x):
        return self.body(x).detach()


class WithoutGrad(Classifier):
    @torch.no_grad()
    def hidden(self, x):
        return self.body(x)


@pytest.mark.parametrize("kind", [Detached, WithoutGrad])
@pytest.mark.parametrize("fused", [False, True])
def test_no_gradient(diagnose, kind, fused):
    (verdict,) = diagnose(kind(), *([Fuse(verbose=False)] if fused else []))
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("no_gradient", "body.0", 0)
    assert ("no_grad" in verdict.cause) == (kind is WithoutGrad)


class Late(Classifier):
    """The gradient of a part is left out at first."""

    def __init__(self, first):
        super().__init__()
        self.first, self.seen = first, []
        self.aux = nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        self.seen.append([each.symptom for each in self.health.verdicts])
        is_early = len(self.seen) <= self.first
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (is_early and self.first == 10)):
            hidden = self.body(batch[0])
        loss, aux = F.cross_entropy(self.head(hidden), batch[1]), F.cross_entropy(self.aux(hidden), batch[1])
        if self.first == 20:
            return loss.detach().requires_grad_() if is_early else loss + aux
        return loss if is_early and self.first == 40 else loss + aux


@pytest.mark.parametrize("first", [10, 20, 40])  # under no_grad, no gradient at all, a head that is not used
def test_no_gradient_is_withdrawn_once_one_arrives(make_trainer, first):
    module, health = Late(first), GradientHealth(verbose=False)
    module.health = health
    make_trainer(health, epochs=3, accumulate_grad_batches=1).fit(module, loader())
    assert module.seen[first] == ["no_gradient"] and module.seen[first + 1] == [] and health.verdicts == []


class Rewrapped(Classifier):
    def training_step(self, batch, batch_idx):
        return torch.tensor(super().training_step(batch, batch_idx).item(), requires_grad=True)


class Scored(Classifier):
    def training_step(self, batch, batch_idx):
        guesses = self.head(self.body(batch[0])).argmax(1)
        return F.mse_loss(guesses.float().requires_grad_(), batch[1].float())


class Unrecorded(Classifier):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            loss = super().training_step(batch, batch_idx)
        return loss.requires_grad_()


@pytest.mark.parametrize("kind", [Rewrapped, Scored, Unrecorded])
def test_a_loss_without_a_way_back_to_any_parameter(diagnose, kind):
    (verdict,) = diagnose(kind())
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("no_gradient", None, 0)
    assert "does not depend on any parameter" in verdict.cause and "none of 4 parameters" in verdict.evidence


class OtherOptimized(Classifier):
    """The optimizer holds what the loss does not depend on."""

    def __init__(self, other):
        super().__init__()
        self.other = other
        if other != "no part":
            self.copy = copy.deepcopy(self.head) if other == "copy" else nn.Linear(4, 4)

    def configure_optimizers(self):
        params = copy.deepcopy(self.head).parameters() if self.other == "no part" else self.copy.parameters()
        return torch.optim.SGD(params, lr=0.05)


@pytest.mark.parametrize("other", ["copy", "no part", "unused"])
def test_an_optimizer_of_something_else(diagnose, other):
    (verdict,) = diagnose(OtherOptimized(other))
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("not_optimized", "body.0", 0)
    assert "body.0.weight, body.0.bias, head.weight and 1 more have gradients" in verdict.evidence
    assert ("replaced" if other == "no part" else "no group of any optimizer") in verdict.cause


def test_a_branch_that_is_not_called_is_no_gradient_of_ours(diagnose):
    module = Classifier()
    module.unused = nn.Linear(3, 3)
    assert diagnose(module) == []


def test_not_optimized(diagnose):
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.head.parameters(), lr=0.05)
    (verdict,) = diagnose(module)
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("not_optimized", "body.0", 0)
    module = Classifier()
    module.body.requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.SGD(module.head.parameters(), lr=0.05)
    assert diagnose(module) == []


class InAList(Classifier):
    def __init__(self, is_optimized=False, is_training=True, holder=list):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = holder([nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)])
        self.is_optimized = is_optimized
        for block in self.blocks:
            block.train(is_training)

    def hidden(self, x):
        x = self.body(x)
        for block in self.blocks:
            x = block(x)
        return x

    def configure_optimizers(self):
        params = [p for block in self.blocks for p in block.parameters()] if self.is_optimized else []
        return torch.optim.SGD([*self.parameters(), *params], lr=0.05)


def test_layers_in_a_list(diagnose):
    for holder in (list, tuple):
        (verdict,) = diagnose(InAList(holder=holder))
        assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("not_optimized", "blocks[0]", 0)
        assert "ModuleList" in verdict.remedy and "blocks[2].weight and 1 more" in verdict.evidence
    # Added by hand; kept away from the checkpoint and the optimizer, as a frozen critic is; found by torch.
    assert diagnose(InAList(is_optimized=True)) == diagnose(InAList(is_training=False)) == []
    assert diagnose(InAList(holder=nn.ModuleList)) == []


class NeverZeroes(Classifier):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradient_not_zeroed(diagnose, accumulated):
    (verdict,) = diagnose(NeverZeroes(), accumulate_grad_batches=accumulated)
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("gradient_not_zeroed", "SGD", 1)


class Manual(Classifier):
    def __init__(self, zero):
        super().__init__()
        self.automatic_optimization, self.zero = False, zero

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        self.zero(optimizer)
        return loss


def zero_by_hand(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad.zero_()


@pytest.mark.parametrize(
    "zero",
    [lambda o: o.zero_grad(), lambda o: o.zero_grad(set_to_none=False), zero_by_hand],
    ids=["none", "zero", "hand"],
)
def test_gradients_that_a_module_clears_itself_are_cleared(diagnose, zero):
    assert diagnose(Manual(zero)) == []


@pytest.mark.parametrize(
    "returned", [lambda loss: loss.expand(3), lambda loss: {"loss": loss.expand(3)}, lambda loss: {}]
)
def test_a_module_that_steps_itself_returns_what_it_likes(diagnose, returned):
    class Returns(Manual):
        def training_step(self, batch, batch_idx):
            return returned(super().training_step(batch, batch_idx).detach())

    assert diagnose(Returns(lambda optimizer: optimizer.zero_grad())) == []


def test_a_module_that_steps_itself_and_clears_nothing(diagnose):
    (verdict,) = diagnose(Manual(lambda optimizer: None))
    assert verdict.symptom == "gradient_not_zeroed"


@pytest.mark.parametrize("fused", [False, True])
def test_lost_updates(diagnose, fused):
    module = Classifier()
    module.optimizer = lambda params, lr: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0)
    (verdict,) = diagnose(module, *([Fuse(verbose=False)] if fused else []), precision="bf16-true")
    assert verdict.symptom == "lost_updates"
    if fused:
        cured = Classifier()
        cured.optimizer = module.optimizer
        for rounding in ("kahan", "stochastic", "split24", "split32"):
            assert diagnose(cured, Fuse(rounding=rounding, verbose=False), precision="bf16-true") == []
