"""Checks of a learner's own code: they run it on random shapes, and say what is wrong
as a teacher would.

Every check knows the right answer from a closed formula written beside it, not from the
package; and it knows the mistakes that people make, so that the message can name the
mistake instead of printing two tensors. A check returns a Verdict: true or false, and
readable. In graded work: `verdict = check.lora_delta(mine); assert verdict, verdict`.
"""

from . import (
    chapter01,
    chapter02,
    chapter03,
    chapter04,
    chapter05,
    chapter06,
    chapter07,
    chapter08,
    chapter09,
    chapter10,
    chapter11,
    chapter12,
    chapter13,
    chapter14,
    chapter15,
    chapter16,
    chapter17,
    chapter18,
)
from .chapter01 import *  # noqa: F403
from .chapter02 import *  # noqa: F403
from .chapter03 import *  # noqa: F403
from .chapter04 import *  # noqa: F403
from .chapter05 import *  # noqa: F403
from .chapter06 import *  # noqa: F403
from .chapter07 import *  # noqa: F403
from .chapter08 import *  # noqa: F403
from .chapter09 import *  # noqa: F403
from .chapter10 import *  # noqa: F403
from .chapter11 import *  # noqa: F403
from .chapter12 import *  # noqa: F403
from .chapter13 import *  # noqa: F403
from .chapter14 import *  # noqa: F403
from .chapter15 import *  # noqa: F403
from .chapter16 import *  # noqa: F403
from .chapter17 import *  # noqa: F403
from .chapter18 import *  # noqa: F403
from .teacher import Verdict

__all__ = [
    "Verdict",
    *chapter01.__all__,
    *chapter02.__all__,
    *chapter03.__all__,
    *chapter04.__all__,
    *chapter05.__all__,
    *chapter06.__all__,
    *chapter07.__all__,
    *chapter08.__all__,
    *chapter09.__all__,
    *chapter10.__all__,
    *chapter11.__all__,
    *chapter12.__all__,
    *chapter13.__all__,
    *chapter14.__all__,
    *chapter15.__all__,
    *chapter16.__all__,
    *chapter17.__all__,
    *chapter18.__all__,
]
