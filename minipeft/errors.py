"""The errors that this package raises on purpose; each names what was wrong."""


class TargetError(ValueError):
    """A target name finds no layer, or one that the method cannot adapt."""


class NotMergeableError(ValueError):
    """An adapter that cannot be written into this layer's weight."""


class FileError(ValueError):
    """A file that cannot be read or written; the message says which, and why."""
