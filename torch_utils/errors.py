# SPDX-License-Identifier: MIT
"""The one exception that means "the user can fix this": command lines print it as one line, without a trace."""


class UserError(ValueError):
    """A mistake in what the user gave; the message names the value, the rule and the fix."""
