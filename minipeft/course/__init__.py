"""What the notebooks use: live source, figures, claims, checks of a learner's code.
Nothing below imports this."""

import warnings

try:
    import IPython  # noqa: F401
    import matplotlib  # noqa: F401
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

from . import check, figures  # noqa: E402
from .claims import claim  # noqa: E402
from .comparison import compare  # noqa: E402
from .figures import approx, table  # noqa: E402
from .records import at_best_rate, matching  # noqa: E402
from .show import show  # noqa: E402

__all__ = [
    "approx",
    "at_best_rate",
    "check",
    "claim",
    "compare",
    "figures",
    "matching",
    "show",
    "table",
]
