"""What the notebooks use: live source, figures, claims, checks of a learner's code.
Nothing below imports this."""

import functools
import logging
import os
import sys
import warnings

try:
    import matplotlib  # noqa: F401
    from IPython import get_ipython
except ImportError as error:
    raise ImportError(
        f"minipeft.course needs {error.name}: pip install 'minipeft[course]'"
    ) from error

# Progress bars are plain text, other libraries' too: a widget, which they take to be
# better, shows nothing in a saved file. "IProgress not found": no need to say so in
# every chapter
with warnings.catch_warnings(action="ignore"):
    import tqdm.auto  # noqa: E402
tqdm.auto.tqdm = tqdm.tqdm
if get_ipython() is not None and "TQDM_DISABLE" not in os.environ:
    # for a reader: stderr is a red band under the cell. The runner of chapters and the
    # tests set TQDM_DISABLE, and leave out what is still drawn on stderr
    init = functools.partialmethod(tqdm.tqdm.__init__, file=sys.stdout)
    tqdm.tqdm.__init__ = init


def ignore_others_deprecations():
    """What other libraries deprecate of each other is nothing that a learner can mend;
    what the learner's own lines use is still told."""
    for category in (FutureWarning, DeprecationWarning):
        others = r"(?!__main__|minipeft)"
        warnings.filterwarnings("ignore", category=category, module=others)


ignore_others_deprecations()
# "Failed to load CPU gemm_4bit_forward": a kernel that nobody here asked for
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from . import check, figures  # noqa: E402
from .claims import claim  # noqa: E402
from .comparison import compare  # noqa: E402
from .figures import approx, table  # noqa: E402
from .finding import finding, needs_llama  # noqa: E402
from .records import (  # noqa: E402
    at_best_rate,
    longer_curves,
    longer_runs,
    matching,
    on_the_way,
    real_size,
    versus,
)
from .show import show  # noqa: E402

__all__ = [
    "approx",
    "at_best_rate",
    "check",
    "claim",
    "compare",
    "figures",
    "finding",
    "longer_curves",
    "longer_runs",
    "matching",
    "needs_llama",
    "on_the_way",
    "real_size",
    "show",
    "table",
    "versus",
]
