# SPDX-License-Identifier: Apache-2.0


class InputError(Exception):
    """An argument of the command line is wrong; the message is one line that names it."""
