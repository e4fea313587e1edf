# SPDX-License-Identifier: Apache-2.0
"""Means of checkpoint files, as Lightning writes them and as torch does."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_optkit.averaging import average_checkpoints, load_weights


class Net(pl.LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


@pytest.fixture
def files(tmp_path):
    """Three Lightning checkpoints of one module, with training state in them."""
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        module = Net(width=4)
        module.net[1].num_batches_tracked.fill_(10 + seed)
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / f"{seed}.ckpt")
        checkpoint = torch.load(tmp_path / f"{seed}.ckpt", weights_only=True)
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        torch.save(checkpoint, tmp_path / f"{seed}.ckpt")
        paths.append(tmp_path / f"{seed}.ckpt")
    return paths


def test_the_mean_of_lightning_checkpoints(files, tmp_path):
    members = [torch.load(file, weights_only=True)["state_dict"] for file in files]
    mean = average_checkpoints(files, output=tmp_path / "mean.ckpt")
    for name, value in mean.items():
        stacked = torch.stack([member[name] for member in members])
        if value.dtype.is_floating_point:
            torch.testing.assert_close(value, stacked.double().mean(dim=0).float(), rtol=0, atol=1e-7)
        else:
            assert value == 12  # the last one's
    written = torch.load(tmp_path / "mean.ckpt", weights_only=True)
    assert not {"optimizer_states", "callbacks", "loops", "lr_schedulers", "current_model_state"} & set(written)
    module = Net.load_from_checkpoint(tmp_path / "mean.ckpt", weights_only=True)
    assert module.hparams.width == 4
    torch.testing.assert_close(dict(module.state_dict()), mean, rtol=0, atol=0)


def test_plain_state_dicts_and_files_of_them(tmp_path):
    torch.save({"w": torch.tensor([1.0])}, tmp_path / "a.pt")
    assert average_checkpoints([tmp_path / "a.pt", {"w": torch.tensor([2.0])}])["w"] == 1.5
    average_checkpoints([tmp_path / "a.pt"], output=tmp_path / "mean.pt")
    assert load_weights(tmp_path / "mean.pt")["w"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sums_in_fp32_whatever_the_dtype(dtype):
    """300 and 301 copies: a bf16 sum would stop growing at 256."""
    members = [{"w": torch.ones(2, dtype=dtype)}] * 600
    mean = average_checkpoints(members)["w"]
    assert mean.dtype == dtype
    assert mean.tolist() == [1.0, 1.0]


def test_leaves_its_members_alone():
    first = {"w": torch.ones(2), "n": torch.tensor(3)}
    mean = average_checkpoints([first, {"w": torch.zeros(2), "n": torch.tensor(5)}])
    mean["n"] += 1
    assert first["w"].tolist() == [1, 1]
    assert first["n"] == 3


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"a": torch.ones(1), "c": torch.ones(2)},
            r"'b' is in number 1 \(a state dict\) and not in number 2 \(a state dict\)\.$",
        ),
        (
            {"a": torch.ones(1), "b": torch.ones(3)},
            r"'b' has shape \[2\] in number 1 \(a state dict\), \[3\] in number 2 \(a state dict\)\.$",
        ),
        ({"a": torch.ones(1), "b": torch.ones(2), "d": torch.ones(1)}, r"'d' is in number 2 .* and not in number 1 "),
    ],
)
def test_incompatible_checkpoints_are_named_by_their_first_difference(second, message):
    first = {"a": torch.ones(1), "b": torch.ones(2)}
    begin = r"^average_checkpoints\(checkpoints=\[\.\.\.\]\): soup of incompatible checkpoints; "
    with pytest.raises(ValueError, match=begin + message):
        average_checkpoints([first, second])


class Custom:
    pass


def test_refuses_what_it_cannot_read_safely(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1)}, "hyper_parameters": Custom()}, tmp_path / "bad.ckpt")
    with pytest.raises(
        ValueError, match=r"^average_checkpoints\(checkpoints='.*bad\.ckpt'\): it must hold tensors and plain"
    ):
        average_checkpoints([tmp_path / "bad.ckpt"])
    with pytest.raises(ValueError, match="consolidate a sharded checkpoint first"):
        average_checkpoints([tmp_path])
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    with pytest.raises(
        ValueError, match=r"^average_checkpoints\(checkpoints='none\.ckpt'\): it must hold a state dict\."
    ):
        average_checkpoints([tmp_path / "none.ckpt"])
    with pytest.raises(ValueError, match=r"^average_checkpoints\(checkpoints=\[\]\)"):
        average_checkpoints([])


def damaged(kind, path):
    torch.save({"state_dict": {"w": torch.ones(1000)}}, path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello world" * 10}[kind])
    return path


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
@pytest.mark.parametrize("call", ["load_weights", "average_checkpoints"])
def test_a_damaged_file_is_named(tmp_path, kind, call):
    path = damaged(kind, tmp_path / "damaged.ckpt")
    argument, function = {
        "load_weights": ("checkpoint", lambda: load_weights(path)),
        "average_checkpoints": ("checkpoints", lambda: average_checkpoints([path])),
    }[call]
    message = (
        rf"^{call}\({argument}='.*damaged\.ckpt'\): it must be a whole file written by torch\.save \(\w+: [^\n]*\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        function()


@pytest.mark.parametrize(
    ("checkpoints", "error", "message"),
    [
        (
            "last.ckpt",
            TypeError,
            r"checkpoints='last\.ckpt'\): checkpoints must be a list of files or state dicts, such as",
        ),
        (None, TypeError, r"checkpoints=None\): checkpoints must be a list"),
        ({"w": torch.ones(1)}, TypeError, r"checkpoints=\{.*\}\): checkpoints must be a list"),
        ([3], TypeError, r"checkpoints=3\): checkpoints must be a path, such as"),
        (["no.ckpt"], FileNotFoundError, r"checkpoints='no\.ckpt'\): checkpoints must be a file, and there is none\.$"),
        ([{"state_dict": 3}], ValueError, r"checkpoints=a state dict\): it must hold a state dict\.$"),
    ],
)
def test_what_is_no_list_of_checkpoints_is_refused_by_name(checkpoints, error, message):
    with pytest.raises(error, match=r"^average_checkpoints\(" + message):
        average_checkpoints(checkpoints)
