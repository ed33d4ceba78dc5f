# SPDX-License-Identifier: Apache-2.0
"""`python -m orphand`."""

import sys

from orphand.cli import main

sys.exit(main())
