# SPDX-License-Identifier: Apache-2.0
"""orphand finds containers that nobody manages any more, says why, and ends them safely."""

__version__ = "0.1.0"
