"""What the notebooks use: live source, claims, tables, figures, and the runner that
saves chapters."""

import matplotlib
import nbformat
import pytest

from minipeft.course import approx, figures, notebook, show, table
from minipeft.course.show import source

matplotlib.use("Agg")


class Shown:
    """Noise for a reader who sees the text beside it."""

    size = 3  # a reason

    def first(self):
        """More noise,

        over several lines.
        """
        return "kept" """ in one string"""

    def only_a_docstring(self):
        """Nothing else is in here, so it stays."""


class TestShow:
    """The source of what runs."""

    def test_source_is_live_and_without_docstrings(self):
        text = source(Shown)
        assert "noise" not in text.lower() and "several lines" not in text
        assert (
            "size = 3  # a reason" in text
            and 'return "kept"' in text
            and "so it stays" in text
        )
        compile(text, "shown", "exec")
        assert "Noise" in source(Shown, docstrings=True)
        assert source(Shown.first).startswith("def first(self):")
        assert show(Shown, Shown.first).data.startswith("```python\nclass Shown:")

    def test_shown_source_of_the_package_still_runs(self):
        from minipeft import LinearDelta, Slot
        from minipeft.methods.lora import Lora

        for thing in (LinearDelta, Slot, Lora):
            compile(source(thing), "shown", "exec")


class TestTables:
    """Tables and numbers."""

    def test_tables(self):
        lines = table(
            [["a", 1200, "x"], ["b", 3, "y"]], ["name", "count", "text"]
        ).data.splitlines()
        assert lines == [
            "| name | count | text |",
            "| --- | ---: | --- |",
            "| a | 1,200 | x |",
            "| b | 3 | y |",
        ]

    def test_numbers_made_by_training_are_not_compared(self):
        import re
        from pathlib import Path

        from nbval.plugin import get_sanitize_patterns

        patterns = get_sanitize_patterns(
            (Path(__file__).parent / "sanitize.cfg").read_text(encoding="utf-8")
        )

        def clean(text):
            for regex, replacement in patterns:
                text = re.sub(regex, replacement, text)
            return text

        def table_of(loss, share):
            return clean(f"| x | {approx(loss)} | {approx(share, '{:.0f} %')} |")

        assert table_of(0.123, 87) == table_of(-4.5, 9)
        assert clean("13,631,488 and 0.1695 stay") == "13,631,488 and 0.1695 stay"
        assert clean("took 3.1 s at 5,000 tokens/s") == clean(
            "took 12 s at 7.1k tokens/s"
        )


class TestFigures:
    """What a figure says and shows."""

    def test_figures_say_what_they_show(self, tmp_path):
        figures.curves(
            {"a": [3, 2, 1], "b": ([1, 2, 4], [1, 2, 3])},
            "Title",
            "x (steps)",
            "y (nats)",
            logx=2,
            levels={"c": 2},
            save=tmp_path / "a.png",
        )
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
        ax = figures.axes("Title", "x (steps)", "y (nats)", logx=2)
        ax.plot([1, 8], [3, 7])
        figures.finish(ax, legend=False, save=tmp_path / "b.png", ylim=(0, None))
        assert ax.get_ylim()[1] > 7, "what was drawn is cut off"
        assert (ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()) == (
            "Title",
            "x (steps)",
            "y (nats)",
        )
        assert "4" in [tick.get_text() for tick in ax.get_xticklabels()]

    def test_open_limits_end_where_the_data_end(self, monkeypatch):
        from minipeft.course import figures

        seen = []
        monkeypatch.setattr(
            figures.plt, "show", lambda: seen.append(figures.plt.gca().get_ylim())
        )
        figures.curves({"a": [3.0, 2.0, 1.0]}, "title", "x", "y", ylim=(0, None))
        assert seen[0][0] == 0 and seen[0][1] >= 3


class TestRunner:
    """Chapters are run and saved clean."""

    def test_a_chapter_is_run_and_saved_clean(self, tmp_path):
        cells = [
            nbformat.v4.new_code_cell(
                "import sys\nprint('seen')\nprint('noise', file=sys.stderr)\n"
                "print('too')"
            ),
            nbformat.v4.new_code_cell("1 + 1"),
        ]
        path = tmp_path / "00_x.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        notebook.run(path)
        first, second = nbformat.read(path, as_version=4).cells
        assert [output.text for output in first.outputs] == [
            "seen\ntoo\n"
        ] and second.outputs[0].data["text/plain"] == "2"
        assert [first.execution_count, second.execution_count] == [1, 2]
        assert "execution" not in first.metadata and not list(
            tmp_path.glob("*.partial")
        )

    def test_a_chapter_that_fails_is_left_as_it_was(self, tmp_path):
        path = tmp_path / "00_x.ipynb"
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path
        )
        before = path.read_bytes()
        with pytest.raises(Exception, match="ZeroDivisionError"):
            notebook.run(path)
        assert path.read_bytes() == before

    def test_progress_bars_are_text_even_where_widgets_are_installed(self, tmp_path):
        path = tmp_path / "00_x.ipynb"
        bar = (
            "import minipeft.course\nfrom tqdm.auto import tqdm\nprint(sum(tqdm([1, 2],"
            " disable=False)))"
        )
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(bar)]), path
        )
        notebook.run(path)
        assert [
            output.text for output in nbformat.read(path, as_version=4).cells[0].outputs
        ] == ["3\n"]


class TestChecks:
    """The checks by name."""

    def test_no_two_chapters_have_a_check_of_the_same_name(self):
        from minipeft.course import check

        assert len(check.__all__) == len(set(check.__all__)), (
            "the later one would hide the earlier"
        )
