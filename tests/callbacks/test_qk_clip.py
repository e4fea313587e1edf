# SPDX-License-Identifier: Apache-2.0
"""QKClip in real Trainers, against the algorithm of the report written out around a plain loop."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, QKClip, WeightAveraging
from lightning_optkit.optimizers import Muon
from lightning_optkit.regularization import max_logits
from tests.workers import launch

DATA = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
TARGET = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Attention(nn.Module):
    """Attention with separate projections; two heads share the keys if `num_key_heads` is 1."""

    def __init__(self, num_key_heads=2):
        super().__init__()
        self.num_heads, self.num_key_heads = 2, num_key_heads
        self.q_proj, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.k_proj, self.v_proj = nn.Linear(8, 4 * num_key_heads), nn.Linear(8, 4 * num_key_heads)

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (-1, 4)).transpose(-2, -3) for proj in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(2 // self.num_key_heads, dim=-3) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(-2, -3).flatten(-2))


class Whole(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x):
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y = self.attention(x, key=x, value=x, need_weights=False)[0]
        return y if self.attention.batch_first else y.transpose(0, 1)


NETS = {
    "whole": lambda: Whole(batch_first=True),
    "time first": Whole,
    "no bias": lambda: Whole(bias=False),
    "other keys": lambda: Whole(kdim=8, vdim=8, batch_first=True, add_bias_kv=True),
    "separate": Attention,
    "shared keys": lambda: Attention(1),
}


class Model(pl.LightningModule):
    def __init__(self, net, configure=lambda module: torch.optim.SGD(module.parameters(), lr=0.01)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.ModuleDict({"attention": NETS[net]()}).double()
        with torch.no_grad():
            for p in self.net.parameters():
                p *= 3
        self.configure = configure

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net["attention"](batch[0]), batch[1])

    def configure_optimizers(self):
        return self.configure(self)


def loader():
    return DataLoader(TensorDataset(DATA, TARGET), batch_size=2)


def clip_of(net, threshold):
    separate = net in ("separate", "shared keys")
    return QKClip(threshold, names="net.attention" if separate else None)


def projected(module, x):
    """(q, k, parameters of q, of k): by the layout of torch's own attention, or by name."""
    net = module.net["attention"]
    if isinstance(net, Attention):
        q_params, k_params = ([layer.weight.data, layer.bias.data] for layer in (net.q_proj, net.k_proj))
        return net.q_proj(x), net.k_proj(x), q_params, k_params
    whole = net.attention
    if whole.in_proj_weight is None:
        weights = [whole.q_proj_weight.data, whole.k_proj_weight.data]
    else:
        weights = list(whole.in_proj_weight.data.chunk(3)[:2])
    biases = [None, None] if whole.in_proj_bias is None else list(whole.in_proj_bias.data.chunk(3)[:2])
    q, k = (x @ w.T + (0 if b is None else b) for w, b in zip(weights, biases, strict=True))
    params = [[t for t in pair if t is not None] for pair in zip(weights, biases, strict=True)]
    if whole.bias_k is not None:
        k = torch.cat([k, whole.bias_k.data.expand(len(x), 1, 8)], dim=1)
        params[1].append(whole.bias_k.data.view(-1))
    return q, k, *params


@pytest.mark.parametrize("net", NETS)
def test_follows_the_algorithm_for_two_hundred_steps(make_trainer, net):
    module, expected = Model(net), Model(net)
    callback = clip_of(net, 4.0)
    trainer = make_trainer(callback, epochs=100)
    trainer.fit(module, loader())
    assert trainer.global_step == 200
    optimizer, clipped = torch.optim.SGD(expected.parameters(), lr=0.01), 0
    for step in range(200):
        optimizer.zero_grad()
        largest = torch.full((2,), -torch.inf, dtype=torch.float64)
        for part in (0, 1):  # accumulate_grad_batches=2, four batches per epoch
            rows = slice(2 * (2 * (step % 2) + part), 2 * (2 * (step % 2) + part) + 2)
            (expected.training_step((DATA[rows], TARGET[rows]), 0) / 2).backward()
            with torch.no_grad():
                q, k, *_ = projected(expected, DATA[rows])
                for head in range(2):
                    keys = k[..., -4:] if k.shape[-1] == 4 else k[..., 4 * head : 4 * head + 4]
                    largest[head] = max(largest[head], (q[..., 4 * head : 4 * head + 4] @ keys.mT).max() / 2)
        optimizer.step()
        *_, k, q_params, k_params = projected(expected, DATA[:1])
        for head, top in enumerate(largest.tolist()):
            if top > 4.0:
                clipped += 1
                shares = k.shape[-1] == 4
                for param in q_params:
                    param[4 * head : 4 * head + 4] *= (4.0 / top) ** (1.0 if shares else 0.5)
                for param in k_params if not shares else ():
                    param[4 * head : 4 * head + 4] *= (4.0 / top) ** 0.5
    assert clipped > 3
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(list(callback.max_logits.values()), [largest])


@pytest.mark.parametrize("net", NETS)
def test_with_muon_logits_stay_below_the_threshold(make_trainer, net):
    module = Model(net, lambda module: Muon(module.parameters(), lr=1e-6))
    make_trainer(clip_of(net, 2.0), epochs=2, accumulate_grad_batches=4).fit(module, loader())
    q, k, *_ = projected(module, DATA)
    assert max_logits(q.detach(), k.detach(), 2).max() < 2.0 * (1 + 1e-3)


def test_the_logits_of_all_processes_count(tmp_path):
    worker = Path(__file__).parent / "qk_clip_worker.py"
    for world_size in (1, 2):
        launch(worker, tmp_path / f"{world_size}", world_size, processes=world_size, timeout=250)
    expected, logits = torch.load(tmp_path / "1.0")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        initial = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).in_proj_weight.detach()
    assert expected["attention.in_proj_weight"][:8].norm() < 0.8 * initial[:8].norm()  # it was clipped
    for rank in (0, 1):
        for how in ("", ".sharded"):
            weights, seen = torch.load(tmp_path / f"2.{rank}{how}")
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(seen, logits, rtol=1e-12, atol=0)
        assert torch.load(tmp_path / f"2.{rank}.refused") == (
            "QKClip(...): tensor parallelism splits the heads of an attention over processes; each must see all of "
            "them, as with tensor_parallel_size=1."
        )


@pytest.mark.parametrize(("net", "frozen"), [("whole", "in_proj"), ("separate", "q_proj"), ("separate", "k_proj.bias")])
def test_an_attention_with_a_frozen_projection_is_left_alone(make_trainer, net, frozen):
    module = Model(net)
    for name, param in module.named_parameters():
        param.requires_grad_(frozen not in name)
    before = {name: param.clone() for name, param in module.named_parameters() if not param.requires_grad}
    assert before
    plain = Model(net)
    for name, param in plain.named_parameters():
        param.requires_grad_(frozen not in name)
    make_trainer(clip_of(net, 1e-3), epochs=1).fit(module, loader())
    make_trainer(epochs=1).fit(plain, loader())
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_undone_after_the_fit_and_not_active_in_validation(make_trainer):
    module, callback = Model("whole"), QKClip(1.0)
    module.validation_step = module.training_step
    make_trainer(callback, epochs=1, limit_val_batches=1.0).fit(module, loader(), loader())
    attention = module.net["attention"].attention
    assert not attention._forward_pre_hooks and callback._seen == {}
    before = attention.in_proj_weight.detach().clone()
    module.train()
    module.training_step((DATA, TARGET), 0).backward()
    assert torch.equal(attention.in_proj_weight, before)


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        ("separate", {}, r"QKClip\(names=None\): the module has no MultiheadAttention"),
        ("separate", {"names": "net.nothing"}, r"QKClip\(names='net.nothing'\): no module has such a name"),
        (
            "separate",
            {"names": "net.attention", "q": "query"},
            r"attention must have a projection 'query'.*q_proj, out",
        ),
        ("separate", {"names": "net.attention.out"}, r"QKClip\(num_heads=None\): net.attention.out has no num_heads"),
        ("separate", {"names": "net.attention", "num_heads": 3}, r"QKClip\(num_heads=3\): .*divide the 8 .*\.q_proj"),
        (
            "shared keys",
            {"names": "net.attention", "num_heads": 1},
            r"\(num_heads=1\): .*fit the 4 of a key of .*k_proj",
        ),
        ("whole", {"num_heads": 3}, r"^QKClip\(num_heads=3\): net.attention.attention has 2 heads\.$"),
    ],
)
def test_modules_that_cannot_be_watched_are_refused_when_the_fit_starts(make_trainer, net, options, message):
    class Untrained(Model):
        def training_step(self, batch, batch_idx):
            raise AssertionError("it was not refused before")

    with pytest.raises(ValueError, match=message):
        make_trainer(QKClip(**options), epochs=1).fit(Untrained(net), loader())


def test_projections_without_a_size_or_frozen_are_left_for_later(make_trainer):
    model = Model("separate")
    model.net["attention"].q_proj = nn.LazyLinear(8).double()
    model.net["attention"].k_proj.requires_grad_(False)
    make_trainer(QKClip(names="net.attention"), epochs=1).fit(model, loader())
    assert model.net["attention"].q_proj.weight.shape == (8, 8)


def test_an_average_that_would_miss_the_clip_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"QKClip"):
        callbacks = QKClip(), Fuse(verbose=False), WeightAveraging(EMA(0.5))
        make_trainer(*callbacks, epochs=1).fit(Model("whole"), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"QKClip\(threshold=0.0\): threshold must be in \(0, inf\)"),
        ({"names": ""}, r"QKClip\(names=''\): names must be"),
        ({"num_heads": 0}, r"QKClip\(num_heads=0\): num_heads must be an integer >= 1"),
        ({"scale": -1.0}, r"QKClip\(scale=-1.0\): scale must be in"),
        ({"k": "q_proj"}, r"QKClip\(k='q_proj'\): k must be another projection than q"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QKClip(**options)
