# SPDX-License-Identifier: MIT
"""Exceptions with a message for people: command lines print it as one line, without a trace."""


class UserError(ValueError):
    """A mistake in what the user gave; the message names the value, the rule and the fix."""


class RunError(Exception):
    """A run that cannot go on, though nothing was wrong with what the user gave; the message says what to do now."""

    exit_code = 1  # of the process; subclasses say their own
    is_common = True  # every rank raises it by itself, at the same point; False = this rank alone may
