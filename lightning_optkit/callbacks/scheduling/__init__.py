# SPDX-License-Identifier: Apache-2.0
"""Shared by the callbacks that schedule a value over the run."""
