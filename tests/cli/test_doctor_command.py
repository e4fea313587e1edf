# SPDX-License-Identifier: Apache-2.0
"""`optkit doctor` and its Python twin: healthy modules have no fault, broken ones theirs, and nothing is changed."""

import copy
import json
import sys

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.utilities import CombinedLoader
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok
from lightning_optkit.cli import main
from lightning_optkit.cli.doctor import _WORDS, doctor
from lightning_optkit.cli.doctor_command import show
from lightning_optkit.diagnostics.rules import OF_LEARNING

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(pl.LightningModule):
    """Tells which of three features is the largest, with one fault, or none."""

    def __init__(self, fault: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.fault = fault
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.05), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 3)
        if fault == "dead":
            nn.init.constant_(self.body[3].bias, -30.0)

    def training_step(self, batch, batch_idx):
        x = batch[0] * {"scale": 1e4, "nan": float("nan")}.get(self.fault, 1.0)
        hidden = self.body(x).detach() if self.fault == "detached" else self.body(x)
        out = self.head(hidden)
        return F.cross_entropy(out.softmax(1) if self.fault == "softmax" else out, batch[1])

    def configure_optimizers(self):
        rate = {"low": 1e-7, "high": 30.0, "scale": 1e-5}.get(self.fault, 3e-3)
        optimizer = torch.optim.AdamW((self.head if self.fault == "left out" else self).parameters(), lr=rate)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10_000))
        if self.fault == "one cycle":
            warmup = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, 10_000, div_factor=1e6)
        return [optimizer], [{"scheduler": warmup, "interval": "step"}]

    def train_dataloader(self):
        x = torch.randn(128, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 32)


def faults(examination):
    return [each.verdict and each.verdict.symptom for each in examination.findings if each.state == "fault"]


def test_a_healthy_module_has_no_fault_although_its_schedule_warms_up_for_long(frozen):
    module = Net()
    before = frozen(module.state_dict())
    examination = doctor(module, accelerator="cpu")
    assert examination.is_healthy and {each.state for each in examination.findings} == {"ok"}
    assert [each.check for each in examination.findings] == [
        "parameters", "modes", "input", "loss at the start", "gradient over depth", "units", "one batch",
    ]  # fmt: skip
    assert examination.steps < 300 and frozen(module.state_dict()) == before
    assert "6 of 6 in an optimizer, 1,443 numbers" in examination.findings[0].seen


def test_a_cycle_is_examined_at_its_largest_rate():
    examination = doctor(Net("one cycle"), accelerator="cpu")
    assert examination.is_healthy and {each.state for each in examination.findings} == {"ok"}


@pytest.mark.parametrize(
    ("fault", "symptom"),
    [
        ("dead", "dead_units"),
        ("scale", "unnormalized_input"),
        ("detached", "no_gradient"),
        ("softmax", "loss_does_not_match_output"),
        ("left out", "not_optimized"),
        ("high", "lr_too_high"),
        ("nan", "nonfinite"),
    ],
)
def test_a_fault_is_named(fault, symptom):
    assert faults(doctor(Net(fault), max_steps=100, accelerator="cpu"))[0] == symptom


def test_a_batch_that_cannot_be_fitted_is_a_fault_though_no_rule_says_why():
    examination = doctor(Net("low"), max_steps=64, accelerator="cpu")
    (last,) = [each for each in examination.findings if each.state == "fault"]
    assert last.check == "one batch" and last.verdict.symptom == "lr_too_low"


def test_one_batch_of_one_class_says_nothing_of_the_others():
    class Rare(Net):
        def train_dataloader(self):
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
            return DataLoader(TensorDataset(x, torch.zeros(64, dtype=torch.long)), 64)

    assert "class_imbalance" not in faults(doctor(Rare(), accelerator="cpu"))


@pytest.mark.parametrize("fault", ["", "scale"])
def test_a_rule_that_fails_is_a_warning_and_its_check_is_not_known(monkeypatch, errors_are_warnings, fault):
    def dead_units(run):
        raise LookupError("of ours")

    rules = tuple(dead_units if rule.__name__ == "dead_units" else rule for rule in OF_LEARNING)
    for place in ("lightning_optkit.diagnostics.rules.OF_LEARNING", "lightning_optkit.cli.doctor.OF_LEARNING"):
        monkeypatch.setattr(place, rules)
    with pytest.warns(UserWarning, match="^doctor: the rule dead_units failed .* report .* or do without") as caught:
        examination = doctor(Net(fault), accelerator="cpu")
    assert len([each for each in caught if "dead_units" in str(each.message)]) == 1
    assert {each.check: each.state for each in examination.findings}["units"] == "unknown"
    assert faults(examination)[:1] == (["unnormalized_input"] if fault else [])


def test_what_cannot_be_summed_up_is_not_known(monkeypatch, errors_are_warnings):
    monkeypatch.setitem(_WORDS, "input", lambda seen: seen.nothing)
    with pytest.warns(UserWarning, match="^doctor: the summary of input failed"):
        examination = doctor(Net(), accelerator="cpu")
    (finding,) = [each for each in examination.findings if each.check == "input"]
    assert (finding.seen, finding.state) == ("not known", "unknown") and examination.is_healthy


def test_an_error_of_the_module_is_not_ours(errors_are_warnings):
    module = Net()
    module.head = nn.Linear(7, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        doctor(module, accelerator="cpu")


class Regression(Net):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.head(self.body(batch["x"]))[:, 0], batch["y"])


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader([{"x": row, "y": 40 + 20 * row[0]} for row in x], 32)


def test_a_scale_that_did_no_harm_is_a_hint():
    data = Data()
    examination = doctor(
        Regression(), datamodule=data, max_steps=300, accelerator="cpu", callbacks=[ok.Fuse(verbose=False)]
    )
    (target,) = [each for each in examination.findings if each.check == "target"]
    assert target.seen.startswith("mean 4") and target.verdict.symptom == "unscaled_target"
    assert "train_dataloader" not in vars(data)


class Begins(pl.LightningModule):
    """Fits a batch whose loss begins high, or not."""

    def __init__(self, loss, outputs, targets, *, bias=0.0, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss, self.targets = nn.Sequential(nn.Linear(8, 64), nn.ReLU()), loss, targets
        self.head, self.scale = nn.Linear(64, outputs), scale
        nn.init.constant_(self.head.bias, bias)

    def training_step(self, batch, batch_idx):
        out = self.scale * self.head(self.net(batch[0]))
        return self.loss(out.squeeze(1) if out.shape[1] == 1 else out, batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        x = torch.randn(len(self.targets), 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, self.targets), len(self.targets))


def normal(mean, count=64):
    return mean + torch.randn(count, generator=torch.Generator().manual_seed(2))


CLASSES_OF_BATCH, RARE = torch.arange(64) % 16, torch.arange(256) // 255
LARGE, FAR = "the first outputs are too large", "the targets are far from the first outputs"


def doubled_sum(out, target):
    return 2 * F.mse_loss(out, target, reduction="sum")


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        (lambda: Begins(F.cross_entropy, 16, CLASSES_OF_BATCH), None),
        (lambda: Begins(F.cross_entropy, 16, CLASSES_OF_BATCH, scale=60.0), LARGE),
        (lambda: Begins(F.cross_entropy, 16, CLASSES_OF_BATCH % 4), None),  # a few classes of many
        (lambda: Begins(F.cross_entropy, 5000, torch.tensor([3, 4])), None),
        (lambda: Begins(F.cross_entropy, 2, RARE), None),  # an entropy of 0.03, and log 2 without any knowledge
        (lambda: Begins(F.binary_cross_entropy_with_logits, 1, RARE.float()), None),
        (lambda: Begins(F.binary_cross_entropy_with_logits, 1, CLASSES_OF_BATCH % 2.0, scale=60.0), LARGE),
        (lambda: Begins(F.mse_loss, 1, normal(0.0)), None),
        (lambda: Begins(F.mse_loss, 1, normal(4.0)), FAR),
        (lambda: Begins(F.mse_loss, 1, normal(4.0), bias=4.0), None),
        (lambda: Begins(F.mse_loss, 1, normal(0.0), bias=4.0), LARGE),
        (lambda: Begins(F.l1_loss, 1, normal(6.0)), FAR),
        (lambda: Begins(doubled_sum, 1, normal(0.0)), None),
        (lambda: Begins(doubled_sum, 1, normal(4.0)), FAR),
        (lambda: Begins(F.mse_loss, 1, normal(4.0, count=8)), None),  # a variance of too few
    ],
)
def test_a_loss_that_begins_far_above_that_of_a_constant_is_a_hint(module, cause):
    examination = doctor(module(), accelerator="cpu")
    (start,) = [each for each in examination.findings if each.check == "loss at the start"]
    assert start.state == ("hint" if cause else "ok")
    if cause:
        assert start.verdict.symptom == {LARGE: "bad_init_scale", FAR: "unscaled_target"}[cause]
        assert start.verdict.cause.startswith(cause) and examination.is_healthy


def test_a_table_of_words_that_begins_with_deviation_1_and_is_the_last_layer_too_begins_high(capsys):
    class Tied(Begins):
        def __init__(self):
            super().__init__(F.cross_entropy, 20, torch.arange(64) % 20)
            self.words = nn.Embedding(20, 64)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(F.layer_norm(self.net(batch[0]), (64,)) @ self.words.weight.T, batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW([*self.net.parameters(), self.words.weight], lr=3e-3)

    examination = doctor(Tied(), accelerator="cpu")
    show(Console(width=100), examination)
    assert f"hint: bad_init_scale\n  {LARGE}" in capsys.readouterr().out


def test_a_high_start_with_a_reason_is_marked_and_explained_once(capsys):
    examination = doctor(Regression(), datamodule=Data(), accelerator="cpu")
    (start,) = [each for each in examination.findings if each.check == "loss at the start"]
    assert (start.state, start.verdict) == ("hint", None)
    show(Console(width=100), examination)
    shown = capsys.readouterr().out
    assert shown.count("unscaled_target") == 1 and FAR not in shown


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match=r"^doctor\(max_steps=5\)"):
        doctor(Net(), max_steps=5)
    with pytest.raises(ValueError, match=r"^doctor\(max_seconds=0.0\)"):
        doctor(Net(), max_seconds=0.0)


@pytest.fixture
def examined(tmp_path, monkeypatch, capsys):
    """examined(fault, *words): the status and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "users_net", sys.modules[__name__])

    def run(fault, *words):
        content = {
            "model": {"class_path": "users_net.Net", "init_args": {"fault": fault}},
            "trainer": {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        try:
            main(["doctor", "--config", "run.yaml", "--max_steps", "64", *words])
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def test_the_command_prints_a_table_and_its_status_is_the_result(examined):
    status, text = examined("")
    assert status == 0 and "one batch" in text and "No fault found" in text
    status, text = examined("left out")
    assert status == 1 and "fault: not_optimized in body.0" in text and "try:  torch.optim.AdamW" in text


def test_the_command_prints_json(examined):
    status, text = examined("left out", "--json")
    found = json.loads(text)
    assert status == 1 and not found["is_healthy"] and found["steps"] == 64
    assert next(row["verdict"]["symptom"] for row in found["checks"] if row["verdict"]) == "not_optimized"


def test_a_run_without_a_step_is_a_fault(capsys):
    class Manual(Net):
        automatic_optimization = False

    examination = doctor(Manual(), max_seconds=0.5, accelerator="cpu")
    (fault,) = [each for each in examination.findings if each.state == "fault"]
    assert examination.steps == 0 and (fault.check, fault.seen) == ("parameters", "no step was taken")
    show(Console(), examination)
    assert "call the step of an optimizer?" in " ".join(capsys.readouterr().out.split())


def test_a_first_optimizer_without_gradients_beside_one_that_steps_is_named_by_its_layer():
    class Adversarial(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.head(self.body(batch[0]).detach()), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(each.parameters(), lr=0.1) for each in (self.body, self.head)]

    examination = doctor(Adversarial(), max_steps=64, accelerator="cpu")
    (fault,) = [each for each in examination.findings if each.state == "fault"]
    assert fault.check == "parameters" and fault.verdict.symptom == "no_gradient" and fault.verdict.layer == "body.3"


class Rewrapped(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).detach().requires_grad_()


class CopyOptimized(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(copy.deepcopy(self.body).parameters(), lr=0.1)


@pytest.mark.parametrize(("module", "symptom"), [(Rewrapped, "no_gradient"), (CopyOptimized, "not_optimized")])
def test_a_run_without_a_step_has_the_verdict_that_says_why(module, symptom):
    examination = doctor(module(), max_seconds=0.5, accelerator="cpu")
    (fault,) = [each for each in examination.findings if each.state == "fault"]
    assert examination.steps == 0 and fault.verdict.symptom == symptom


def test_a_run_without_a_step_does_not_take_all_the_time():
    class NeverSteps(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))

    examination = doctor(NeverSteps(), max_seconds=120, accelerator="cpu")
    assert faults(examination) == ["not_optimized"] and examination.seconds < 60


@pytest.mark.parametrize("columns", [40, 80])
def test_what_was_seen_has_room_on_a_narrow_terminal(columns, capsys):
    examination = doctor(Net("dead"), max_steps=64, accelerator="cpu")
    show(Console(width=columns), examination)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= columns
    words = " ".join(said.split())
    assert all(word in words for each in examination.findings for word in each.seen.split())


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "sequential"])
def test_a_combined_loader_gives_its_batch(mode):
    class OfTwo(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch if mode == "sequential" else batch["a"], batch_idx)

    loader = CombinedLoader({"a": Net().train_dataloader(), "b": Net().train_dataloader()}, mode)
    examination = doctor(OfTwo(), loader, accelerator="cpu")
    assert examination.is_healthy and examination.findings[-1].state == "ok"


def test_a_data_set_without_a_batch_is_named():
    with pytest.raises(ValueError, match=r"^doctor: the loader of training data gives no batch"):
        doctor(Net(), DataLoader([]), accelerator="cpu")


def test_too_few_steps_tell_nothing():
    examination = doctor(Net(), max_seconds=1e-4, accelerator="cpu")
    assert examination.is_healthy and examination.findings[-1].seen.endswith("too few to tell")
    assert examination.findings[-1].state == "unknown"


class WithoutGradient(Net):
    """Its loss has none; of "inside", an error of the user's own line has the same words."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.requires_grad_(kind != "frozen")

    def training_step(self, batch, batch_idx):
        if self.kind == "inside":
            return torch.autograd.grad(torch.ones(()), torch.ones(()))[0]
        with torch.set_grad_enabled(self.kind != "no_grad"):
            loss = super().training_step(batch, batch_idx)
        return loss.detach() if self.kind == "detach" else loss


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("detach", "was detached"), ("no_grad", "was detached"), ("frozen", "every parameter is frozen")],
)
def test_a_loss_without_gradient_is_a_fault(kind, cause):
    examination = doctor(WithoutGradient(kind), accelerator="cpu", max_steps=40)
    (fault,) = [each for each in examination.findings if each.state == "fault"]
    assert fault.verdict.symptom == "no_gradient" and cause in fault.verdict.cause
    assert fault.seen == "no step was taken" and json.loads(examination.to_json())["is_healthy"] is False


def test_the_same_words_of_the_users_own_line_are_the_users_error():
    with pytest.raises(RuntimeError, match="does not require grad"):
        doctor(WithoutGradient("inside"), accelerator="cpu", max_steps=40)
