# SPDX-License-Identifier: Apache-2.0
"""What the callbacks that write a value over the run share."""
