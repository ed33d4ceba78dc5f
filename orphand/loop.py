# SPDX-License-Identifier: Apache-2.0
"""asyncio without TLS, which nothing here uses in the loop: ssl alone brings OpenSSL, 4 MB of a daemon's 30.

To be imported before anything that imports asyncio. Python may be built without ssl, so asyncio can do without.
Whoever wants TLS later (a webhook's thread) imports ssl as ever.
"""

import sys

_absent = "ssl" not in sys.modules
if _absent:
    sys.modules["ssl"] = None  # type: ignore[assignment]
try:
    import asyncio
finally:
    if _absent:
        del sys.modules["ssl"]

__all__ = ["asyncio"]
