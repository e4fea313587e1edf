# SPDX-License-Identifier: Apache-2.0
"""How Lightning is hooked: what the callbacks share, none of it a strategy."""
