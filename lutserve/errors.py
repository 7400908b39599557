"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input: says what was given, what is allowed and what to do.

    The command line prints it as one line and exits with status 2.
    """
