"""What the notebooks use: live source, figures, claims, checks of a learner's code. Nothing below imports this."""
import warnings

# Without ipywidgets the progress bars are plain text, which is what we want; no need to say so in every chapter.
warnings.filterwarnings("ignore", message="IProgress not found")

from . import check, figures  # noqa: E402
from .claims import claim  # noqa: E402
from .figures import about, table  # noqa: E402
from .show import show  # noqa: E402

__all__ = ["about", "check", "claim", "figures", "show", "table"]
