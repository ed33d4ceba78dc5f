# SPDX-License-Identifier: Apache-2.0
"""What orphand has to say: one topic a kind of record, each with a fixed MESSAGE_ID and priority."""

from __future__ import annotations

import syslog
from enum import Enum
from typing import Optional, Protocol

from orphand.model import Case


class Topic(Enum):
    """(MESSAGE_ID, priority). The ids never change: admins' filters and the catalog hang on them."""

    STARTED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6071", syslog.LOG_INFO)
    STOPPED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6072", syslog.LOG_INFO)
    RELOADED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6073", syslog.LOG_INFO)
    CONFIG_REFUSED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6074", syslog.LOG_ERR)
    SUSPECTED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6075", syslog.LOG_WARNING)  # first look that finds it orphaned
    CLEARED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6076", syslog.LOG_INFO)  # a suspect that is managed after all, or gone
    ORPHANED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6077", syslog.LOG_WARNING)  # the grace is over; names the decision
    UNDECIDED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6078", syslog.LOG_WARNING)  # nobody could be asked for it
    ENDING = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6079", syslog.LOG_NOTICE)  # one step of an end
    ENDED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f607a", syslog.LOG_NOTICE)  # verified: nothing is left
    END_REFUSED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f607b", syslog.LOG_WARNING)  # asked again, and somebody knows it
    END_FAILED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f607c", syslog.LOG_ERR)  # something is left; says what to do by hand
    BREAKER_TRIPPED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f607d", syslog.LOG_ALERT)
    BREAKER_RESET = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f607e", syslog.LOG_NOTICE)
    HELD = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f607f", syslog.LOG_NOTICE)  # an admin's hold began
    RESUMED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6080", syslog.LOG_NOTICE)  # a hold ended
    SOURCE_LOST = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6081", syslog.LOG_WARNING)  # events or the journal are gone
    SOURCE_BACK = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6082", syslog.LOG_INFO)
    ALERT_FAILED = ("c5f2a6e1b8d54f0e9a7c3b1d2e4f6083", syslog.LOG_ERR)
    TROUBLE = (
        "c5f2a6e1b8d54f0e9a7c3b1d2e4f6084",
        syslog.LOG_ERR,
    )  # of orphand itself: state not written, a look that failed

    @property
    def message_id(self) -> str:
        """32 hex digits, as MESSAGE_ID= wants them."""
        return self.value[0]

    @property
    def priority(self) -> int:
        """A syslog level."""
        return self.value[1]


class Report(Protocol):
    """Where records go. A record is one topic, one sentence, the case it is about, and more ORPHAND_ fields."""

    def __call__(self, topic: Topic, message: str, case: Optional[Case] = None, **fields: str) -> None:
        """Write the record. Never raises: a full disk must not stop a kill half-way."""
