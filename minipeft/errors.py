"""The errors that this package raises on purpose; each names what was wrong."""


class TargetError(ValueError):
    """A target name finds no layer, or one that the method cannot adapt."""


class NotMergeableError(ValueError):
    """An adapter that cannot be written into this layer's weight."""


class ConfigError(ValueError):
    """A configuration with an impossible value, or a request for what is not built."""


class FileError(ValueError):
    """A file that cannot be read or written; the message says which, and why."""


class AdapterFileError(FileError):
    """A file that is not an adapter, is damaged, or does not fit this model."""
