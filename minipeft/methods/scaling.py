"""Checks of rank and alpha that several methods share."""

import math
import os
import warnings

from .. import weights
from ..config import ConfigError
from ..io import brief


def check_alpha(**values):
    """Raise ConfigError for a scaling that would switch an adapter off, or break it."""
    for name, value in values.items():
        if not 1e-38 < abs(value) < 1e38:
            raise ConfigError(
                f"{name} = {brief(value)}: expected a number that is not 0 and that 32"
                " bits hold; the adapter is multiplied by it"
            )


def check_rank(r, layer, useful=True):
    """Raise ConfigError for a rank that does not fit in memory, and warn of one above
    the smaller side of the layer, unless it is `useful` there."""
    d_in, d_out = weights.features(layer)
    needed = 4 * r * (d_in + d_out)  # bytes in 32 bits
    is_meta = any(parameter.is_meta for parameter in layer.parameters())
    if needed > total_memory() and not is_meta:
        raise ConfigError(
            f"r = {r:,} would take {needed // 10**9:,} GB for one layer of {d_in} x"
            f" {d_out}, more than this machine has"
        )
    if r > min(d_in, d_out) and not useful:
        warnings.warn(
            f"r = {r} is above {min(d_in, d_out)}, the smaller side of a layer of"
            f" {d_in} x {d_out}: no change of its weight has a higher rank than that",
            stacklevel=2,
        )


def total_memory():
    """Bytes of this machine's memory; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
