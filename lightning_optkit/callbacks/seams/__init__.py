# SPDX-License-Identifier: Apache-2.0
"""How the callbacks hook into Lightning; none of it is a strategy."""
