# SPDX-License-Identifier: Apache-2.0
"""`optkit fit` and its relatives: bare names, plans, and mistakes that are said in a sentence."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

import lightning_optkit as ok
from lightning_optkit.cli import doctor_command, main, trainer_commands
from lightning_optkit.cli.bare_names import bare_names
from lightning_optkit.diagnostics.lr_range import LRRange

pytestmark = pytest.mark.filterwarnings("ignore")

USER = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    fitted = []

    def __init__(self, breaks: bool = False):
        super().__init__()
        self.breaks, self.net = breaks, nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        if self.breaks:
            raise ValueError("of the user")
        return self.net(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).pow(2).mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(32, 4)), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def on_fit_start(self):
        Net.fitted.append(self)
"""
QUIET = dict(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, max_epochs=1)


@pytest.fixture
def net(users_net):
    """The module that the configurations name; found in the current folder."""
    users_net(USER)
    return lambda: sys.modules["users_net"].Net


def run(command, *words, callbacks=(), **rest):
    content = {"model": {"class_path": "users_net.Net"}, "trainer": {**QUIET, "callbacks": [*callbacks]}} | rest
    with open("run.yaml", "w") as file:
        yaml.safe_dump(content, file)
    main([command, "--config", "run.yaml", *words])


def bare(name, **init_args):
    return {"class_path": name, "init_args": init_args}


def test_bare_names_are_ours_unless_torch_or_lightning_has_them(net):
    callbacks = [
        bare("Fuse"),
        bare("GradientClipping", clip=bare("ClipUnitwise", ratio=0.02)),
        bare("LRSchedule", schedule=bare("lightning_optkit.schedules.cosine")),
        bare("lightning_optkit.WeightAveraging", average=bare("SWA", start=2)),
    ]
    seen = []

    class See(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((type(trainer.optimizers[0]), [type(each) for each in trainer.callbacks[:4]]))

    sys.modules["see"] = type(sys)("see")
    See.__qualname__, See.__module__ = "See", "see"
    sys.modules["see"].See = See
    run("fit", callbacks=[*callbacks, bare("see.See")], optimizer=bare("AdamW", lr=0.1))
    ours = [ok.Fuse, ok.GradientClipping, ok.LRSchedule, ok.WeightAveraging]
    assert seen[0][1] == ours and seen[0][0].__name__ == "AdamW" and len(net().fitted) == 1
    del sys.modules["see"]


def test_the_names_are_bare_only_inside():
    with bare_names():
        assert ok.AdamW not in torch.optim.AdamW.__subclasses__()
        assert ok.Lion in ok.OnePassOptimizer.__subclasses__()
    assert ok.AdamW in torch.optim.AdamW.__subclasses__()
    assert "__subclasses__" not in vars(torch.optim.AdamW) and nn.LayerNorm.__subclasses__()


def test_a_name_of_lightning_is_lightnings(net):
    run("fit", callbacks=[bare("EMAWeightAveraging", decay=0.5)])
    assert net().fitted[0].trainer.callbacks[0].__class__ is EMAWeightAveraging


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_other_functions_of_a_trainer(net, command):
    run(command)
    assert net().fitted == []


@pytest.mark.parametrize("command", ["explain", "find-lr"])
def test_the_first_batch_is_reached_and_no_step_is_left(net, command, capsys, tmp_path):
    schedule = bare("LRSchedule", schedule=bare("lightning_optkit.schedules.linear"))
    writers = [bare("ModelCheckpoint", dirpath="."), bare("Report", path="report.html"), bare("LearningRateMonitor")]
    shown = dict(enable_checkpointing=True, enable_progress_bar=True, logger=True)
    content = {**QUIET, **shown, "callbacks": [bare("Fuse"), schedule, bare("LRFinder"), *writers]}
    torch.manual_seed(3)
    run(command, "--seed_everything=1", trainer=content)
    (module,) = net().fitted
    torch.manual_seed(1)
    pl.seed_everything(1, verbose=False)
    assert torch.equal(module.net.weight, type(module)().net.weight)
    left = {path.name for path in tmp_path.iterdir()} - {"users_net.py", "run.yaml", "__pycache__"}
    said = capsys.readouterr().out
    assert left == set() and "Epoch" not in said
    if command == "explain":
        assert "AdamW" in said and "one pass" in said and "Run: 8 optimizer steps." in said
        assert [line.split() for line in said.splitlines() if line.strip().startswith("4 ")] == [["4", "0.005"]]
    else:
        assert "middle, the choice of LRFinder" in said or "No suggestion" in said


@pytest.mark.parametrize("command", ["explain", "find-lr", "doctor"])
def test_the_answer_alone_is_printed(net, command):
    """In a process of its own: warnings and the lines of Lightning go to its standard error."""
    schedule = bare("LRSchedule", schedule=bare("lightning_optkit.schedules.linear"))
    trainer = dict(accelerator="cpu", max_epochs=1, callbacks=[bare("Fuse"), schedule])
    Path("run.yaml").write_text(yaml.safe_dump({"model": {"class_path": "users_net.Net"}, "trainer": trainer}))
    path = os.pathsep.join([str(Path(ok.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    call = [sys.executable, "-m", "lightning_optkit", command, "--config=run.yaml"]
    ended = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert ended.stderr == "" and "Trainable params" not in ended.stdout
    is_plan = "Fuse: lightning_optkit.AdamW" in ended.stdout and "one step moves" in ended.stdout
    assert is_plan == (command == "explain") == ("LRSchedule: lr 0.01 times linear" in ended.stdout)
    assert {"explain": "Run: 8 optimizer steps.", "find-lr": "middle, the choice", "doctor": "(300 steps on"}[
        command
    ] in ended.stdout


def test_what_a_module_says_itself_stays(net, caplog):
    says = (
        "def on_fit_start(self):\n        from lightning.pytorch.utilities import rank_zero_info as said; said('mine')"
    )
    Path("users_net.py").write_text(USER.replace("def on_fit_start(self):", says))
    run("explain")
    assert "mine" in caplog.messages and not any("available" in each for each in caplog.messages)


def test_a_finder_of_the_configuration_keeps_its_settings(net, capsys):
    run("find-lr", callbacks=[bare("LRFinder", num_steps=20, min_lr=1e-4, max_lr=1e-2)])
    said = capsys.readouterr().out
    assert "Tested 20 rates from 0.0001 to 0.01." in said or "No suggestion" in said


def found(monkeypatch, **rates):
    """The test of every finder finds these."""
    result = LRRange((1e-7, 1.0), (1.0, 1.0), (1.0,), rates)
    monkeypatch.setattr(ok.LRFinder, "_tested", lambda *_: result)


ALONE, TOGETHER = (
    dict(middle=4e-5, steepest=1e-3, valley=1e-3, minimum=3e-3),
    dict(middle=4e-3, steepest=1e-3, valley=1e-5, minimum=3e-3),
)


@pytest.mark.parametrize(
    ("rates", "words", "last"),
    [
        (TOGETHER, [], "Use 0.004, by middle, as the rate of the optimizer."),
        (TOGETHER, ["--suggestion", "steepest"], "Use 0.001, by steepest, as the rate of the optimizer."),
        (ALONE, ["--suggestion=steepest"], "Use 0.001, by steepest, as the rate of the optimizer."),
        (ALONE, [], 'decides, in a run LRFinder(suggestion="trained").'),
    ],
)
def test_the_last_line_says_which_rate_to_use(net, capsys, monkeypatch, rates, words, last):
    found(monkeypatch, **rates)
    run("find-lr", *words)
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(last) and ("The rules are far apart, and middle is" in said) == ("trained" in last)


GROUPS = "[{'params': [self.net.weight]}, {'params': [self.net.bias], 'lr': 0.001}]"
MANY = "[{'params': [nn.Parameter(torch.ones(1))], 'lr': 0.01 / (1 + each)} for each in range(5)]"
ONE_CYCLE = "torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=%s, total_steps=99)"
CYCLES = "torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.05, cycle_momentum=False)"


@pytest.mark.parametrize(
    ("groups", "scheduler", "last"),
    [
        ("self.parameters()", ONE_CYCLE % 0.05, "as max_lr of OneCycleLR."),
        ("self.parameters()", CYCLES, "as max_lr of CyclicLR."),
        (GROUPS, None, "as the rate of the optimizer for the group of 0.01, 0.0004 for that of 0.001."),
        (GROUPS, ONE_CYCLE % [0.02, 0.1], "as max_lr of OneCycleLR for the group of 0.1, 0.0008 for that of 0.02."),
        (
            MANY,
            None,
            "as the rate of the optimizer for the group of 0.01, and for the 4 other rates 0.4 times what they are.",
        ),
    ],
)
def test_the_last_line_says_where_the_rates_go(net, capsys, monkeypatch, groups, scheduler, last):
    found(monkeypatch, **TOGETHER)
    plain = "return torch.optim.AdamW(self.parameters(), lr=0.01)"
    source = f"optimizer = torch.optim.AdamW({groups}, lr=0.01)\n        return [optimizer], "
    source += f"[{{'scheduler': {scheduler}, 'interval': 'step'}}]" if scheduler else "[]"
    Path("users_net.py").write_text(USER.replace(plain, source))
    run("find-lr")
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(f"Use 0.004, by middle, {last}")


def test_rates_are_tried_if_asked_for(net, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        run("find-lr", "--suggestion=traned")
    assert "Near it: trained." in capsys.readouterr().err
    run("find-lr", "--suggestion", "trained", callbacks=[bare("LRFinder", suggestion="trained", trial_steps=40)])
    shown = capsys.readouterr().out
    assert "trained, asked for by --suggestion" in shown and "the choice of LRFinder" not in shown


@pytest.mark.parametrize("is_fused", [False, True])
def test_the_plan_explains_steps_as_it_is(net, capsys, is_fused):
    run("explain", callbacks=[bare("Fuse")] if is_fused else [])
    printed = capsys.readouterr().out
    assert ("Steps as it is: by the optimizer's own code" in printed) != is_fused
    assert ("Fuse makes them one pass" in printed) != is_fused


@pytest.mark.parametrize("is_fused", [False, True])
def test_fuse_is_not_advised_where_it_has_no_rule(net, capsys, is_fused):
    run("explain", callbacks=[bare("Fuse")] if is_fused else [], optimizer=bare("torch.optim.Rprop", lr=0.1))
    printed = " ".join(capsys.readouterr().out.split())
    assert "clipping and averages beside it." in printed and "Fuse makes" not in printed


@pytest.mark.parametrize("callbacks", [[], [bare("Fuse", verbose=False)]], ids=["alone", "beside a silent Fuse"])
def test_the_plan_shows_the_stages_of_an_optimizer_of_this_package(net, capsys, callbacks):
    stages = dict(clip=bare("ClipNorm", max_norm=1.0), average=bare("EMA", decay=0.9))
    with pytest.warns(UserWarning, match=r"^AdamW keeps EMA\(decay=0\.9, .*\), which nothing evaluates"):
        run("explain", callbacks=callbacks, optimizer=bare("lightning_optkit.AdamW", lr=0.1, **stages))
    printed = capsys.readouterr().out
    assert printed.count("lightning_optkit.AdamW\ngroup 0: adam\n") == 1
    assert "norm > ClipNorm(max_norm=1.0) > update > decay(0.01) >\n  EMA(decay=0.9, start=1, every=1)\n" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("factor", "said"), [("1.0", ""), ("min(1.0, step / 5)", "; its schedule begins at 0")], ids=["constant", "from 0"]
)
def test_a_suggestion_is_beside_what_it_would_replace(net, capsys, factor, said):
    plain = "return torch.optim.AdamW(self.parameters(), lr=0.01)"
    scheduled = plain.replace("return ", "optimizer = ") + (
        f"\n        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: {factor})"
        '\n        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]'
    )
    assert plain in USER
    Path("users_net.py").write_text(USER.replace(plain, scheduled))
    run("find-lr")
    assert f"The configuration has 0.01{said}." in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "explain"])
def test_a_mistake_in_the_settings_is_one_sentence(net, capsys, command):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(command, callbacks=[bare("Fuse"), bare("Fuse")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"optkit {command}: trainer.callbacks: Fuse(): given twice; ")


@pytest.mark.parametrize("limit", ["limit_train_batches", "max_epochs"])
def test_a_run_without_a_batch_has_no_plan_and_no_rate(net, limit, capsys):
    with pytest.raises(SystemExit, match=r"optkit explain: the run ends before its first batch, so there is no plan"):
        run("explain", f"--trainer.{limit}=0")
    with pytest.raises(SystemExit, match=r"^optkit find-lr: no suggestion: [^\n]*\.$"):  # a text: status 1
        run("find-lr", f"--trainer.{limit}=0")
    assert "middle" not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--trainer.max_epochs=two"], ["--bogus=1"]])
def test_a_wrong_command_line_is_shown_with_the_way_to_help(net, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("fit", *words)
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert "usage: optkit fit --config CONFIG" in said and "optkit fit --help" in said and len(said.splitlines()) < 20


def test_a_checkpoint_that_is_not_there_is_one_sentence(net):
    with pytest.raises(SystemExit, match=r"^optkit fit: Checkpoint file not found: nowhere\.ckpt$"):
        run("fit", "--ckpt_path=nowhere.ckpt")


def test_an_error_of_the_user_keeps_its_traceback(net):
    with pytest.raises(ValueError, match="of the user"):
        run("fit", "--model.breaks=true")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is empty; a configuration"),
        (b"\xff\xfe\x00", "it is no text in UTF-8"),
        (b"model:\n  class_path: Net\n init_args: {}\n", "c.yaml: it cannot be read at line 3, column 2: "),
    ],
)
@pytest.mark.parametrize("command", ["fit", "doctor"])
def test_a_file_that_is_no_configuration_is_said(tmp_path, capsys, command, content, sentence):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        main([command, f"--config={tmp_path / 'c.yaml'}"])
    assert exit_info.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "doctor"])
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("rum.yaml", "rum.yaml: there is no such file. Near it: run.yaml."),
        ("settings/run.yaml", "settings/run.yaml: there is no such file, and no folder settings."),
        ("other.json", "other.json: there is no such file."),
    ],
)
def test_a_configuration_that_is_not_there_is_one_sentence(net, capsys, command, given, sentence):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(command, f"--config={given}")
    assert capsys.readouterr().err == f"optkit {command}: {sentence}\n"


def test_a_configuration_may_be_the_text_itself(net):
    run("fit", "--config", "{trainer: {max_epochs: 2}}")
    assert net().fitted[0].trainer.max_epochs == 2


@pytest.mark.parametrize("command", ["doctor", "find-lr"])
@pytest.mark.parametrize(
    ("breaks", "error"),
    [
        ('raise ValueError("of the user")', "ValueError: of the user"),
        (
            "self.net(batch[0][:, :1])",
            "RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),  # doctor watches functions
    ],
)
def test_before_a_run_an_error_of_the_user_has_the_users_frames_alone(net, command, breaks, error):
    Path("users_net.py").write_text(USER.replace('raise ValueError("of the user")', breaks))
    with pytest.raises(SystemExit) as exit_info:
        run(command, "--model.breaks=true")
    said = [line for line in exit_info.value.code.splitlines() if set(line.strip()) != {"^"}]
    assert said[0] == "Traceback (most recent call last):" and len(said) == 5
    assert said[1].endswith('users_net.py", line 16, in training_step') and said[3].startswith(error)
    assert said[4] == f"optkit {command}: it ended by this error."


def test_an_error_without_a_frame_of_the_user_is_its_sentence(net):
    """As torch's of a complex loss."""
    healthy = "return self.net(batch[0]).pow(2).mean()"
    broken = USER.replace(healthy, f"{healthy}.to(torch.complex64)", 1)
    assert broken != USER
    Path("users_net.py").write_text(broken)
    with pytest.raises(SystemExit) as exit_info:
        run("find-lr")
    assert exit_info.value.code.startswith("RuntimeError: grad can be implicitly created only for real scalar outputs")
    assert "Traceback" not in exit_info.value.code


@pytest.mark.parametrize("command", ["fit", "explain", "doctor", "validate"])
def test_a_file_without_data_is_told_the_key(net, command):
    of_loaders = "train_dataloader(self)", "val_dataloader = test_dataloader = predict_dataloader = train_dataloader"
    Path("users_net.py").write_text(USER.replace(of_loaders[0], "other(self)").replace(of_loaders[1], "pass"))
    with pytest.raises(SystemExit, match=rf"^optkit {command}: `\w+_dataloader` must .* as in data: {{class_path: "):
        run(command)


def test_a_mistake_of_this_package_keeps_its_traceback(net, monkeypatch):
    monkeypatch.setattr(trainer_commands, "_FIRST_BATCH", {"doctor": lambda cli: doctor_command.show(None, None)})
    with pytest.raises(AttributeError, match="width"):
        run("doctor")


@pytest.mark.parametrize("command", ["fit", "doctor", "find-lr"])
def test_ctrl_c_has_the_status_of_a_shell_and_one_line(net, command, capsys):
    interrupted = USER.replace('raise ValueError("of the user")', "raise KeyboardInterrupt")
    Path("users_net.py").write_text(interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as exit_info:
            run(command, "--model.breaks=true")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert exit_info.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == "optkit: ended by Ctrl-C."


def test_what_the_users_code_ends_with_at_ctrl_c_is_its_own(monkeypatch):
    def run_of_user(*_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit("the weights are saved")

    monkeypatch.setattr(trainer_commands, "run", run_of_user)
    with pytest.raises(SystemExit, match=r"^the weights are saved$"):
        main(["fit"])


def test_the_help_of_doctor_says_what_is_allowed(net, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "32 or more" in said and "above 0" in said


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("--max_steps=31", "--max_steps 31: max_steps must be"), ("--max_seconds=0", "--max_seconds 0.0: max_seconds")],
)
def test_an_option_of_doctor_that_is_out_of_range_is_named(net, capsys, option, sentence):
    with pytest.raises(SystemExit, match=r"^2$"):
        run("doctor", option)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"optkit doctor: {sentence}")
