# SPDX-License-Identifier: Apache-2.0
"""ParameterGroups: whatever optimizer a module returns, split in place, with its schedulers, with Fuse, and resumed."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import Fuse, HyperparameterSchedule, LRSchedule, ParameterGroups
from lightning_optkit.optimizers import AdamW, parameter_groups
from lightning_optkit.schedules import linear, warmup_cosine
from lightning_optkit.step import OnePassOptimizer

pytestmark = [  # Lightning's warnings about these short runs
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args"),
]
LR, DECAY = 0.05, 0.3
ARGUMENTS = dict(weight_decay=DECAY, layer_decay=0.5, overrides={"net.0.bias": {"lr": 0.04}})


def adamw(module, params=None, **arguments):
    return torch.optim.AdamW(params or module.parameters(), lr=LR, betas=(0.8, 0.95), **arguments)


def by_hand(module):
    return adamw(module, list(parameter_groups(module, lr=LR, **ARGUMENTS)))


def groups(**arguments):
    return ParameterGroups(**{**ARGUMENTS, **arguments}, verbose=False)


def same_weights(first, second, **tolerance):
    torch.testing.assert_close(first.state_dict(), second.state_dict(), **{"rtol": 0, "atol": 0, **tolerance})


# --- the same numbers as groups by hand ---


@pytest.mark.parametrize(
    "configure",
    [
        adamw,
        lambda m: [adamw(m)],
        lambda m: {"optimizer": adamw(m)},
        lambda m: ([adamw(m)], []),
        lambda m: adamw(m, list(m.named_parameters())),
        lambda m: AdamW(m.parameters(), lr=LR, betas=(0.8, 0.95)),
        lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(LR), betas=(0.8, 0.95), foreach=False),
    ],
    ids=["optimizer", "list", "dict", "two lists", "named parameters", "one-pass", "tensor lr"],
)
def test_an_unchanged_module_steps_as_with_groups_by_hand(fit, regression, configure):
    ours, theirs = regression(configure), regression(by_hand)
    trainer = fit(ours, groups())
    fit(theirs)
    same_weights(ours, theirs, rtol=1e-6, atol=1e-6)
    optimizer = trainer.optimizers[0]
    assert type(optimizer).__name__ == "AdamW"
    assert [group["name"] for group in optimizer.param_groups] == [
        "layer0_decay",
        "net.0.bias_layer0_no_decay",
        "layer1_decay",
        "layer1_no_decay",
    ]
    found = [(float(group["lr"]), group["weight_decay"], group["betas"]) for group in optimizer.param_groups]
    rates, decays = [LR / 2, 0.04, LR, LR], [DECAY, 0.0, DECAY, 0.0]
    for group, lr, weight_decay in zip(found, rates, decays, strict=True):
        assert group == (pytest.approx(lr), weight_decay, (0.8, 0.95))


@pytest.mark.parametrize("order", [1, -1], ids=["Fuse first", "Fuse last"])
def test_beside_fuse_in_either_order(fit, regression, order):
    fused, plain = regression(lambda m: adamw(m, fused=True)), regression(by_hand)
    kept = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            kept.append(type(trainer.optimizers[0]))

    trainer = fit(fused, *[Fuse(verbose=False), groups()][::order], Watch())
    fit(plain)
    assert issubclass(kept[0], OnePassOptimizer)
    same_weights(fused, plain, rtol=1e-5, atol=1e-6)
    optimizer = trainer.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW  # torch's again, in every group
    assert [group["fused"] for group in optimizer.param_groups] == [True] * 4
    assert all("cautious" not in group for group in optimizer.param_groups)


def test_tensor_rates_are_not_shared(fit, regression):
    rate = torch.tensor(LR)
    module = regression(lambda m: torch.optim.AdamW(m.parameters(), lr=rate, foreach=False))
    trainer = fit(module, ParameterGroups(verbose=False))
    assert len({id(group["lr"]) for group in trainer.optimizers[0].param_groups} | {id(rate)}) == 3


def test_the_optimizer_stays_the_same_object_and_is_split_before_it_has_state(fit, regression):
    made, sizes = [], []

    def configure(module):
        made.append(adamw(module))
        return made[0]

    class Watch(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            sizes.append((len(trainer.optimizers[0].param_groups), len(trainer.optimizers[0].state)))

    trainer = fit(regression(configure), groups(), Watch())
    assert trainer.optimizers[0] is made[0] and sizes == [(4, 0)]


def test_groups_of_the_user_are_split_further(fit, regression):
    def configure(module):
        first, _, last = module.net
        given = [
            {"params": first.parameters(), "lr": 0.01, "name": "stem"},
            {"params": last.parameters(), "betas": (0.5, 0.6)},
        ]
        return adamw(module, given, weight_decay=0.7)

    trainer = fit(regression(configure), ParameterGroups(verbose=False))
    found = [(g["name"], g["lr"], g["weight_decay"], g["betas"]) for g in trainer.optimizers[0].param_groups]
    assert found == [
        ("stem_decay", 0.01, 0.7, (0.8, 0.95)),
        ("stem_no_decay", 0.01, 0.0, (0.8, 0.95)),
        ("group1_decay", LR, 0.7, (0.5, 0.6)),
        ("group1_no_decay", LR, 0.0, (0.5, 0.6)),
    ]


def test_a_parameter_that_is_not_of_the_module(fit, regression):
    stranger = nn.Parameter(torch.ones(1))
    trainer = fit(regression(lambda m: adamw(m, [*m.parameters(), stranger])), ParameterGroups(verbose=False))
    last = next(g for g in trainer.optimizers[0].param_groups if any(p is stranger for p in g["params"]))
    assert last["name"] == "other_decay" and len(last["params"]) == 1


@pytest.mark.parametrize("make", [torch.optim.Rprop, torch.optim.Adagrad], ids=["no decay", "state from the start"])
def test_optimizers_that_differ(fit, regression, make):
    ours, theirs = (
        regression(lambda m: make(m.parameters(), lr=0.01)),
        regression(lambda m: make(m.parameters(), lr=0.01)),
    )
    trainer = fit(ours, ParameterGroups(overrides={"net.2.*": {"lr": 0.01}}, verbose=False))
    fit(theirs)
    same_weights(ours, theirs)
    names = [group["name"] for group in trainer.optimizers[0].param_groups]
    has_decay = make is torch.optim.Adagrad
    assert names == (["decay", "net.2_decay", "no_decay", "net.2_no_decay"] if has_decay else ["all", "net.2"])


# --- schedulers that come with the optimizer ---

SCHEDULERS = {
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: torch_schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "CosineAnnealingLR": lambda o: torch_schedulers.CosineAnnealingLR(o, 6),
    "LinearLR": lambda o: torch_schedulers.LinearLR(o, total_iters=4),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: torch_schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": lambda o: torch_schedulers.SequentialLR(
        o, [torch_schedulers.LinearLR(o, total_iters=2), torch_schedulers.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: torch_schedulers.ChainedScheduler(
        [torch_schedulers.ConstantLR(o, total_iters=2), torch_schedulers.ExponentialLR(o, 0.5)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_schedulers_keep_working(fit, regression, recorder, name, fused):
    def configure(make):
        def configure_optimizers(module):
            optimizer = make(module)
            config = {"scheduler": SCHEDULERS[name](optimizer), "interval": "step", "monitor": "train_loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

        return configure_optimizers

    rates = []
    for make, callbacks in ((adamw, [groups(), *[Fuse(verbose=False)] * fused]), (by_hand, [])):
        recorder.steps.clear()
        fit(regression(configure(make)), *callbacks, recorder)
        rates.append([recorder.values("lr", group=group) for group in range(4)])
    for ours, theirs in zip(*rates, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert len(set(rates[0][0])) > 2


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_schedulers_that_set_the_rate_themselves(fit, regression, recorder, name):
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9)
        if name == "OneCycleLR":
            scheduler = torch_schedulers.OneCycleLR(optimizer, max_lr=1.0, total_steps=6)
        else:
            scheduler = torch_schedulers.CyclicLR(optimizer, base_lr=0.1, max_lr=1.0, step_size_up=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    fit(regression(configure), recorder)
    expected = recorder.values("lr"), recorder.values("momentum")
    recorder.steps.clear()
    fit(regression(configure), ParameterGroups(layer_decay=0.5, verbose=False), recorder)
    assert recorder.values("lr", group=0) == pytest.approx([rate / 2 for rate in expected[0]])
    assert recorder.values("lr", group=2) == pytest.approx(expected[0])
    assert recorder.values("momentum", group=0) == recorder.values("momentum", group=2) == expected[1]


# --- with the other callbacks, resumed ---


@pytest.mark.parametrize("order", [1, -1])
def test_schedules_keep_the_base_of_each_group(fit, regression, recorder, order):
    schedule = warmup_cosine(2)
    others = [LRSchedule(schedule, verbose=False), HyperparameterSchedule("weight_decay", linear(), verbose=False)]
    fit(regression(adamw), *[groups(), *others, Fuse(verbose=False)][::order], recorder)
    for group, (lr, decay) in enumerate([(LR / 2, DECAY), (0.04, 0.0), (LR, DECAY), (LR, 0.0)]):
        assert recorder.values("lr", group=group) == pytest.approx([lr * schedule(t, 6) for t in range(6)])
        assert recorder.values("weight_decay", group=group) == pytest.approx([decay * linear()(t, 6) for t in range(6)])


@pytest.mark.parametrize("order", [None, 1, -1], ids=["torch", "Fuse first", "Fuse last"])
def test_resumed_equals_uninterrupted(fit, regression, tmp_path, order):
    def callbacks():
        pair = [groups()] if order is None else [Fuse(verbose=False), groups()][::order]
        return [*pair, LRSchedule(warmup_cosine(0.3), verbose=False)]

    whole, resumed = regression(adamw), regression(adamw)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = fit(whole, *callbacks(), save, enable_checkpointing=True)
    again = fit(resumed, *callbacks(), ckpt_path=tmp_path / "epoch=0.ckpt")
    same_weights(whole, resumed)
    first, second = (t.optimizers[0].param_groups for t in (trainer, again))
    assert [{k: v for k, v in g.items() if k != "params"} for g in first] == [
        {k: v for k, v in g.items() if k != "params"} for g in second
    ]


def test_a_second_fit_of_the_same_optimizer_is_not_split_again(fit, regression):
    for callbacks in ([], [Fuse(verbose=False)]):
        made = []

        def configure(module, made=made):
            made.extend([] if made else [adamw(module)])
            return made[0]

        module = regression(configure)
        fit(module, *callbacks, groups())
        fit(module, *callbacks, groups())
        assert [group["lr"] for group in made[0].param_groups] == pytest.approx([LR / 2, 0.04, LR, LR])


def test_learning_rate_monitor_uses_the_names(fit, regression, tmp_path):
    logger = CSVLogger(tmp_path)
    fit(regression(adamw), groups(), LearningRateMonitor(), logger=logger, log_every_n_steps=1)
    with open(logger.experiment.metrics_file_path) as file:
        assert "lr-AdamW/layer0_decay" in file.readline()


def test_prints_the_table(fit, regression, printed):
    fit(regression(adamw), ParameterGroups(weight_decay=0.25))
    assert "ParameterGroups:\ngroup     tensors  parameters    lr  weight decay  names\n" in printed()
    assert "no_decay        2          10  0.05             0  net.0.bias, net.2.bias" in printed()


CONFIG = """
seed_everything: false
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_optkit.callbacks.ParameterGroups
      init_args:
        weight_decay: 0.2
        no_decay: [bias, torch.nn.LayerNorm]
        layer_decay: 0.5
        overrides: {net.2.weight: {lr: 0.7}}
    - class_path: lightning_optkit.callbacks.Fuse
optimizer:
  class_path: torch.optim.AdamW
  init_args: {lr: 0.1}
lr_scheduler:
  class_path: torch.optim.lr_scheduler.ExponentialLR
  init_args: {gamma: 0.5}
"""


class FromConfig(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=2)


def test_the_flat_group_of_lightning_cli(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = ["--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(FromConfig, run=False, save_config_callback=None, args=arguments)
    cli.trainer.fit(cli.model)
    found = [(g["name"], g["lr"], g["weight_decay"]) for g in cli.trainer.optimizers[0].param_groups]
    assert found == [
        ("layer0_decay", pytest.approx(0.1 / 4 / 4), 0.2),  # two layers behind, two epochs at gamma 1/2
        ("layer0_no_decay", pytest.approx(0.1 / 4 / 4), 0.0),
        ("layer1_no_decay", pytest.approx(0.1 / 2 / 4), 0.0),
        ("net.2.weight_layer2_decay", pytest.approx(0.7 / 4), 0.2),
        ("layer2_no_decay", pytest.approx(0.1 / 4), 0.0),
    ]
    assert "configure_optimizers" in vars(cli.model)  # the CLI's own


# --- no side effects, bad input ---


class Broken(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("broken")


@pytest.mark.parametrize("breaks", [False, True])
def test_the_module_is_as_it_was(fit, regression, breaks):
    module = regression(adamw)
    if breaks:
        with pytest.raises(RuntimeError, match="broken"):
            fit(module, groups(), Broken())
    else:
        fit(module, groups())
    assert "configure_optimizers" not in vars(module)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (adamw, {"overrides": {"net.0.*": {"momentum": 0.5}}}, r"AdamW has no 'momentum'; there are amsgrad, betas, "),
        (adamw, {"overrides": {"head.*": {"lr": 0.5}}}, r"matches no parameter; names are such as net.0.weight"),
        (
            lambda m: torch.optim.Rprop(m.parameters()),
            {"weight_decay": 0.1},
            r"\(weight_decay=0.1\): Rprop has no weight",
        ),
        (lambda m: torch.optim.LBFGS(m.parameters()), {}, r"\(...\): LBFGS takes a single group\.$"),
        (adamw, {"layer_decay": 0.5, "layers": ["net.0"]}, r"layers must cover every parameter, not all but net.2.wei"),
    ],
)
def test_what_the_optimizer_cannot_do(fit, regression, make, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(regression(make), ParameterGroups(**arguments, verbose=False))


def test_an_optimizer_that_has_stepped(fit, regression):
    def configure(module):
        optimizer = adamw(module)
        module.loss((torch.ones(2, 4), torch.ones(2, 2))).backward()
        optimizer.step()
        return optimizer

    with pytest.raises(
        ValueError, match=r"^ParameterGroups\(...\): AdamW has stepped already; group its parameters bef"
    ):
        fit(regression(configure), groups())


def test_two_of_them_raise(fit, regression):
    with pytest.raises(ValueError, match=r"^ParameterGroups\(...\): given twice; one groups every optimizer\.$"):
        fit(regression(adamw), groups(), groups())


def test_rejects_bad_arguments():
    with pytest.raises(ValueError, match=r"^ParameterGroups\(layer_decay=0.0\): layer_decay must be in \(0, 1\]\.$"):
        ParameterGroups(layer_decay=0.0)
