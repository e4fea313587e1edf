# SPDX-License-Identifier: Apache-2.0
"""Measures modules, parameters and batches of a step, in plain torch, for `diagnostics.rules`."""
