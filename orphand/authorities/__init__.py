# SPDX-License-Identifier: Apache-2.0
"""Who can say whether a container id exists."""
