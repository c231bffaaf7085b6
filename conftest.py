"""What pytest needs to know before it collects tests and chapters."""

import os
from pathlib import Path

ROOT = Path(__file__).parent

# Sums in a fixed order give the same digits; the kernels that run the chapters inherit
# these. One of several workers takes one thread, whatever it inherits from the process
# that started it: more of them than cores wait for each other.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = (
        "1" if os.environ.get("PYTEST_XDIST_WORKER") else os.environ.get(variable, "2")
    )
os.environ["TQDM_DISABLE"] = "1"  # progress bars are for people
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network


def pytest_configure(config):
    # wherever pytest is started from
    config.option.nbval_sanitize_with = str(ROOT / "tests" / "sanitize.cfg")
    if config.pluginmanager.hasplugin("nbval"):
        import nbval.plugin

        nbval.plugin.RunningKernel = started_again(nbval.plugin.RunningKernel)


def started_again(start, attempts=5):
    """`start`, called again where the kernel dies before it answers: it is told which
    ports to take, and another worker's kernel may have taken one since."""

    def kernel(*args, **kwargs):
        for attempt in range(1, attempts + 1):
            try:
                return start(*args, **kwargs)
            except RuntimeError:
                if attempt == attempts:
                    raise

    return kernel


def pytest_collectstart(collector):
    # a chapter: progress and warnings on stderr differ between machines
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
