# SPDX-License-Identifier: Apache-2.0
"""The one exception that stands for a mistake in what the user gave."""


class InputError(ValueError):
    """A path, file or option cannot be used as given.

    The message is one line: the argument, what it was, and what to do about it. The command
    line prints it as it is; everything else that is raised is a defect and keeps its traceback.
    """
