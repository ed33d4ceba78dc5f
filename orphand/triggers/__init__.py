# SPDX-License-Identifier: Apache-2.0
"""What makes a scan run now. A trigger is never evidence."""
