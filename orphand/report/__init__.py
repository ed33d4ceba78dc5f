# SPDX-License-Identifier: Apache-2.0
"""How orphand tells what it saw and did."""
