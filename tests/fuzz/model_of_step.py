# SPDX-License-Identifier: Apache-2.0
"""A run in which everything may change: random interleavings of user actions between steps, against torch.

Each sequence draws a rule and takes operations one after another: steps with gradients in any layout, state, parameters
and groups moved, replaced, resized, shared or dropped, loads, copies, casts, freezes, threads. After each operation
parameters and state are compared with those of torch's optimizer, whose tensors nobody moved.

Usage: python tests/fuzz/model_of_step.py [--sequences 2000] [--operations 25] [--seconds 300] [--seed 0]
"""

import argparse
import copy
import gc
import io
import json
import sys
import threading
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_optkit import optimizers
from tests.step.moves import MOVES, REPLACEMENTS, by_dtype, by_storage

SHAPES = [(), (0,), (1,), (7,), (17, 5), (3, 4, 5), (40, 450)]
RULES = {
    "SGD": [{}, dict(momentum=0.9), dict(momentum=0.9, nesterov=True, weight_decay=0.1), dict(maximize=True)],
    "Adam": [{}, dict(amsgrad=True), dict(weight_decay=0.1)],
    "AdamW": [{}, dict(amsgrad=True, betas=(0.5, 0.9))],
    "Adagrad": [dict(initial_accumulator_value=0.1, lr_decay=0.01)],
    "RMSprop": [{}, dict(momentum=0.5, centered=True)],
    "Adadelta": [{}],
    "Adamax": [{}],
    "NAdam": [dict(momentum_decay=0.004)],
    "RAdam": [{}],
}
LAYOUTS = {
    "as it is": lambda g: g,
    "transposed": lambda g: g.t().contiguous().t() if g.dim() == 2 else g,
    "gapped": lambda g: torch.stack([g, g], -1)[..., 0],
    "negated lazily": lambda g: torch._neg_view(-g),
    "with an offset": lambda g: torch.cat([g.new_zeros(3), g.reshape(-1)])[3:].view(g.shape),
    "one number": lambda g: g.reshape(-1)[:1].reshape([1] * g.dim()).expand(g.shape) if g.numel() else g,
}
count = {"sequences": 0, "operations": 0}


class Run(RuleBasedStateMachine):
    """Our optimizer, whose tensors are moved, and torch's, whose tensors are not."""

    @initialize(name=st.sampled_from(sorted(RULES)), data=st.data(), seed=st.integers(0, 2**20))
    def begin(self, name, data, seed):
        count["sequences"] += 1
        self.generator = torch.Generator().manual_seed(seed)
        self.kwargs = dict(data.draw(st.sampled_from(RULES[name])), lr=0.05)
        self.classes = getattr(optimizers, name), getattr(torch.optim, name)
        # Both keep NAdam's product of momenta as one fp32 number, and round it by themselves.
        self.dtype, self.tolerance = torch.float64, 1e-6 if name == "NAdam" else 1e-9
        shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
        self.params = [[self.parameter(v) for v in pair] for pair in ((self.randn(s),) * 2 for s in shapes)]
        half = data.draw(st.integers(1, len(shapes)))
        self.optimizers = []
        for side, kind in enumerate(self.classes):
            members = [pair[side] for pair in self.params]
            groups = [dict(params=members[:half])] + ([dict(params=members[half:], lr=0.01)] if members[half:] else [])
            self.optimizers.append(kind(groups, **self.kwargs))

    def randn(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    @staticmethod
    def parameter(value):
        return torch.nn.Parameter(value.clone())

    def state_of(self, side, index):
        """Of a parameter, without creating it."""
        return dict(self.optimizers[side].state).get(self.params[index][side], {})

    # --- steps ---

    @rule(data=st.data(), times=st.integers(1, 2))
    def step(self, data, times):
        for _ in range(times):
            for ours, theirs in self.params:
                layout = data.draw(st.sampled_from([None, *LAYOUTS, "as it is"]))
                if layout is None or not theirs.requires_grad:
                    ours.grad = theirs.grad = None
                    continue
                theirs.grad = self.randn(theirs.shape)
                if layout == "one number":
                    theirs.grad = theirs.grad.mean().expand(theirs.shape).clone() if theirs.numel() else theirs.grad
                ours.grad = LAYOUTS[layout](theirs.grad)
            for optimizer in self.optimizers:
                optimizer.step()

    @rule(threads=st.integers(2, 3))
    def step_in_threads(self, threads):
        for ours, theirs in self.params:
            ours.grad = theirs.grad = None
            if theirs.requires_grad:
                theirs.grad = self.randn(theirs.shape)
                ours.grad = theirs.grad.clone()
        workers = [threading.Thread(target=self.optimizers[0].step) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for _ in range(threads):
            self.optimizers[1].step()

    # --- memory ---

    @rule(move=st.sampled_from(MOVES), data=st.data())
    def move_state(self, move, data):
        for index in range(len(self.params)):
            for tensor in self.state_of(0, index).values():
                if isinstance(tensor, torch.Tensor) and data.draw(st.booleans()):
                    move(tensor)
        gc.collect()

    @rule(how=st.sampled_from(sorted(REPLACEMENTS)), data=st.data())
    def replace_state(self, how, data):
        for index in range(len(self.params)):
            state = self.state_of(0, index)
            for name, tensor in list(state.items()):
                if isinstance(tensor, torch.Tensor) and data.draw(st.booleans()):
                    state[name] = None
                    state[name] = REPLACEMENTS[how](tensor.detach())

    @rule(move=st.sampled_from([m for m in MOVES if m not in (by_dtype, by_storage)]), data=st.data())
    def move_parameters(self, move, data):
        for ours, _ in self.params:
            if data.draw(st.booleans()):
                ours.grad = None
                move(ours)

    @rule(data=st.data(), what=st.sampled_from(["one", "all", "the dict", "copies"]))
    def drop_state(self, data, what):
        index = data.draw(st.integers(0, len(self.params) - 1))
        for side, optimizer in enumerate(self.optimizers):
            if what == "all":
                optimizer.state.clear()
            elif what == "the dict" and side == 0:
                optimizer.state = copy.copy(optimizer.state)
            elif what == "copies" and side == 0:
                for param, state in list(optimizer.state.items()):
                    optimizer.state[param] = {name: copy.deepcopy(value) for name, value in state.items()}
            elif what == "one":
                optimizer.state.pop(self.params[index][side], None)

    # --- groups ---

    @rule(index=st.integers(0, 3), how=st.sampled_from(["item", "list", "tuple", "group", "groups"]))
    def replace_a_parameter(self, index, how):
        index %= len(self.params)
        old = self.params[index]
        new = self.params[index] = [self.parameter(v) for v in (self.randn(old[1].shape),) * 2]
        for side, optimizer in enumerate(self.optimizers):
            for number, group in enumerate(optimizer.param_groups):
                members = [new[side] if p is old[side] else p for p in group["params"]]
                if side == 1 or how == "list":
                    group["params"] = members
                elif how == "item" and isinstance(group["params"], list):
                    group["params"][:] = members
                elif how == "tuple":
                    group["params"] = tuple(members)
                else:
                    optimizer.param_groups[number] = {**group, "params": members}
            if how == "groups" and side == 0:
                optimizer.param_groups = list(optimizer.param_groups)
            optimizer.state.pop(old[side], None)

    @precondition(lambda self: len(self.params) < 6)
    @rule(shape=st.sampled_from(SHAPES))
    def add_a_group(self, shape):
        pair = [self.parameter(v) for v in (self.randn(shape),) * 2]
        self.params.append(pair)
        for side, optimizer in enumerate(self.optimizers):
            optimizer.add_param_group(dict(params=[pair[side]], lr=0.02))

    @precondition(lambda self: len(self.params) > 1)
    @rule(index=st.integers(0, 5))
    def remove_a_parameter(self, index):
        pair = self.params.pop(index % len(self.params))
        for side, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not pair[side]]
            optimizer.state.pop(pair[side], None)

    @rule(lr=st.sampled_from([0.0, 0.01, 0.1]), weight_decay=st.sampled_from([0.0, 0.1]))
    def set_hyperparameters(self, lr, weight_decay):
        for optimizer in self.optimizers:
            optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)

    @rule(index=st.integers(0, 5), frozen=st.booleans())
    def freeze(self, index, frozen):
        for param in self.params[index % len(self.params)]:
            param.grad = None
            param.requires_grad_(not frozen)

    # --- loads and copies ---

    @rule(source=st.sampled_from([0, 1]), through_file=st.booleans())
    def load(self, source, through_file):
        for side, optimizer in enumerate(self.optimizers):
            state_dict = self.optimizers[source if side == 0 else 1].state_dict()
            if through_file and side == 0:
                file = io.BytesIO()
                torch.save(state_dict, file)
                file.seek(0)
                state_dict = torch.load(file, weights_only=False)  # state may be of a class of the user's own
            optimizer.load_state_dict(state_dict)

    @rule()
    def copy_all(self):
        self.params, self.optimizers = copy.deepcopy((self.params, self.optimizers))

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def cast(self, dtype):
        """As a module is cast: the parameters by `data`, the state by what a load makes of it."""
        self.dtype = dtype
        if dtype == torch.float32:
            self.tolerance = 2e-4
        for pair in self.params:
            for param in pair:
                param.grad = None
                param.data = param.data.to(dtype)
        for optimizer in self.optimizers:
            optimizer.load_state_dict(optimizer.state_dict())

    # --- what holds after each of them ---

    @invariant()
    def equals_torch(self):
        if not hasattr(self, "optimizers"):
            return
        count["operations"] += 1
        for index, (ours, theirs) in enumerate(self.params):
            self.compare(ours, theirs, f"parameter {index}")
            state = self.state_of(0, index)
            for name, value in self.state_of(1, index).items():
                if isinstance(value, torch.Tensor) and name in state:
                    self.compare(torch.as_tensor(state[name]), value, f"{name} of parameter {index}")

    def compare(self, ours, theirs, what):
        ours, theirs = ours.detach().double().reshape(-1), theirs.detach().double().reshape(-1)
        torch.testing.assert_close(ours, theirs, rtol=self.tolerance, atol=self.tolerance, msg=lambda m: f"{what}: {m}")


def run(sequences, operations, seed=None, shrinks=False):
    """Runs that many sequences of that many operations; hypothesis' own choice for seed None, always the same.

    `shrinks`: whether a sequence that fails is made shorter, which takes minutes.
    """
    choice = dict(derandomize=True) if seed is None else {}
    chosen = settings(
        max_examples=sequences, stateful_step_count=operations, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink] if shrinks else [Phase.generate],
        **choice,
    )  # fmt: skip
    machine = type("Run", (Run,), {})
    if seed is not None:
        from hypothesis import seed as seeded

        machine = seeded(seed)(machine)
    run_state_machine_as_test(machine, settings=chosen, _min_steps=operations)


def main():
    """Prints one JSON row; hypothesis prints the sequence that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--operations", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    start, batch, seed = time.time(), 50, arguments.seed
    while count["sequences"] < arguments.sequences and time.time() - start < arguments.seconds:
        run(batch, arguments.operations, seed)
        seed += 1
    row = {"fuzz": "model_of_step", "seed": arguments.seed, "seconds": round(time.time() - start, 1), **count}
    print(json.dumps({**row, "differences": 0}))


if __name__ == "__main__":
    main()
