# SPDX-License-Identifier: Apache-2.0
"""Laws hold however slow the machine is: hypothesis's deadline of 200 ms an example is off."""

from hypothesis import HealthCheck, settings

settings.register_profile("orphand", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("orphand")
