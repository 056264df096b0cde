"""The error that bad input raises."""


class RainbowError(ValueError):
    """Bad input: one line that says what is wrong, where, and what would be right."""
