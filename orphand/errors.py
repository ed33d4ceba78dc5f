# SPDX-License-Identifier: Apache-2.0
"""The errors that orphand raises; whatever an engine does is a testimony, never an error."""


class OrphandError(Exception):
    """The base of all of them."""


class ConfigError(OrphandError):
    """The configuration can't be used; one line an error: FILE:LINE:COLUMN: what and how to mend it."""


class ProcError(OrphandError):
    """A process could not be read."""


class Gone(ProcError):
    """The process has ended, or its pid belongs to another one now."""


class Denied(ProcError):
    """The kernel did not let us look."""
