# SPDX-License-Identifier: Apache-2.0
"""Faults of settings, data and initial weights: they count only in runs that they hurt."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnostics.benchmark.faults import Fault, has_body, layers_of

_PLAIN = (
    "mlp",
    "tanh_mlp",
    "deep_mlp",
    "cnn",
    "wine",
    "regression",
    "autoencoder",
)  # no norm hides the scale of weights


class BadBatch(pl.Callback):
    """The inputs of one batch, in the middle of the run, are far too large: a wrong unit, or a broken file."""

    def __init__(self, factor, step=100):
        self._factor, self._step = factor, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self._step:
            batch[0].mul_(self._factor)


def _bad_batch(setup, factor):
    setup.callbacks.append(BadBatch(factor))


def _scaled_weights(setup, factor):
    with torch.no_grad():
        for layer in layers_of(setup):
            layer.weight *= factor


def _sigmoids(setup, kind):
    """Sigmoids in a deep chain, whose derivative is at most 1/4."""
    width = next(m for m in setup.head.modules() if isinstance(m, nn.Linear)).in_features
    first = next(m for m in setup.body if isinstance(m, nn.Linear))
    layers = [first]
    for _ in range(kind):
        layers += [nn.Sigmoid(), nn.Linear(width if len(layers) > 1 else first.out_features, width)]
    setup.body = nn.Sequential(*layers, nn.Sigmoid())


def _dead_bias(setup, bias):
    with torch.no_grad():
        for layer in layers_of(setup)[:-1]:
            if layer.bias is not None:
                layer.bias.fill_(-bias)


def _rate(setup, factor):
    setup.lr_factor = factor


def _inputs(change):
    def apply(setup, strength):
        x, y, x_val, y_val = setup.data
        setup.data = (change(x, strength, setup), y, change(x_val, strength, setup), y_val)

    return apply


def _one_feature(x, factor, setup):
    x = x.clone()
    x.reshape(len(x), -1)[:, ::5] *= factor
    return x


def _constant_inputs(x, how, setup):
    if how == "zeros":
        return torch.zeros_like(x)
    if how == "one row":
        return x[:1].expand_as(x).clone()
    return x.mean() + torch.zeros_like(x)


def _noise(x, scale, setup):
    return scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(setup.seed))


def _raw_target(setup, scale):
    setup.target = lambda y: 10 * scale + scale * y


def _shuffled(setup, share):
    x, y, x_val, y_val = setup.data
    generator = torch.Generator().manual_seed(setup.seed)
    count = int(share * len(y))
    order = torch.cat([torch.randperm(count, generator=generator), torch.arange(count, len(y))])
    setup.data = (x, y[order], x_val, y_val)


def _activation_before_loss(setup, name):
    function = {"softmax": lambda out: out.softmax(1), "sigmoid": torch.sigmoid, "relu": F.relu, "tanh": torch.tanh}[
        name
    ]
    loss = setup.loss
    setup.loss = lambda out, y: loss(function(out), y)


def _bounded(setup, name):
    function = {"sigmoid": torch.sigmoid, "relu": F.relu, "tanh": torch.tanh}[name]
    setup.forward = lambda body, head, x: function(head(body(x)))


def _negative_likelihood(setup, how):
    setup.loss = lambda out, y: F.nll_loss(out.softmax(1) if how == "softmax" else out, y)


def _broadcast(setup, how):
    head = setup.head[0]
    setup.head = head
    setup.loss = lambda out, y: F.mse_loss(out, y) if how == "column" else F.l1_loss(out, y)


def _is_classes(setup):
    return setup.kind == "classes"


def _is_dense(setup):
    return setup.family in ("mlp", "tanh_mlp", "deep_mlp")


LEARNING = (
    Fault("small_init", frozenset({"bad_init_scale", "vanishing_gradient"}), (0.2, 0.1, 0.03), _scaled_weights,
          lambda s: s.family in _PLAIN and has_body(s), False),
    Fault("sigmoid_chain", frozenset({"vanishing_gradient", "bad_init_scale"}), (4, 6, 8), _sigmoids, _is_dense, False),
    Fault("large_init", frozenset({"bad_init_scale", "exploding_gradient", "saturated_units"}), (4.0, 8.0, 16.0),
          _scaled_weights, lambda s: s.family in _PLAIN and has_body(s), False),
    Fault("dead_bias", frozenset({"dead_units"}), (3.0, 10.0, 30.0), _dead_bias,
          lambda s: s.family in ("mlp", "deep_mlp", "cnn", "regression"), False),
    Fault("rate_too_high", frozenset({"lr_too_high"}), (30.0, 100.0, 1000.0), _rate, is_mechanical=False),
    Fault("rate_too_low", frozenset({"lr_too_low"}), (1e-2, 1e-3, 1e-4), _rate, is_mechanical=False),
    Fault("bad_batch", frozenset({"loss_spike"}), (1e3, 1e4, 1e5), _bad_batch,
          lambda s: s.family != "embedding", False),
    Fault("scaled_feature", frozenset({"unnormalized_input"}), (100.0, 1e3, 1e4), _inputs(_one_feature),
          lambda s: s.family != "embedding", False),
    Fault("scaled_inputs", frozenset({"unnormalized_input"}), (100.0, 1e3, 1e4),
          _inputs(lambda x, factor, setup: x * factor), lambda s: s.family != "embedding", False),
    Fault("offset_inputs", frozenset({"unnormalized_input"}), (30.0, 100.0, 1e3),
          _inputs(lambda x, offset, setup: x + offset), lambda s: s.family != "embedding", False),
    Fault("raw_target", frozenset({"unscaled_target"}), (30.0, 100.0, 1e3), _raw_target,
          lambda s: s.family in ("regression", "autoencoder"), False),
    Fault("shuffled_labels", frozenset({"label_shuffle"}), (1.0, 0.97, 0.95), _shuffled, is_mechanical=False),
    Fault("lost_inputs", frozenset({"input_ignored"}), ("zeros", "one row", "mean"), _inputs(_constant_inputs),
          lambda s: s.family not in ("embedding", "autoencoder"), False),
    # In law the same as labels that are shuffled in training and validation: inputs and targets are independent. So
    # each name is right.
    Fault("noise_inputs", frozenset({"input_ignored", "label_shuffle"}), (0.3, 1.0, 2.0),
          _inputs(_noise), lambda s: s.family not in ("embedding", "autoencoder"), False),
    Fault("activation_before_loss", frozenset({"loss_does_not_match_output"}), ("softmax", "sigmoid", "relu"),
          _activation_before_loss, _is_classes, False),
    Fault("sigmoid_before_logits", frozenset({"loss_does_not_match_output"}), ("sigmoid", "relu", "tanh"),
          _activation_before_loss, lambda s: s.kind == "binary", False),
    Fault("nll_without_log", frozenset({"loss_does_not_match_output"}), ("softmax", "logits"), _negative_likelihood,
          _is_classes, False),
    Fault("bounded_output", frozenset({"loss_does_not_match_output"}), ("relu", "sigmoid", "tanh"),
          _bounded, lambda s: s.kind == "regression", False),
    Fault("broadcast_loss", frozenset({"loss_does_not_match_output"}), ("column", "l1"), _broadcast,
          lambda s: s.family == "regression", True),
)  # fmt: skip
