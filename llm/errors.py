"""The one exception whose text a user reads."""


class UserError(Exception):
    """Something that the user can put right. Its text is one line in Spanish: the thing, and the way out."""
