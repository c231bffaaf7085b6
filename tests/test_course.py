"""What the notebooks use: live source, claims, tables, figures, and the runner that
saves chapters."""

import io
import json
import warnings
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
import tqdm
from matplotlib.colors import to_hex
from nbclient import NotebookClient
from tolerance import printed

from minipeft import course
from minipeft.course import approx, figures, finding, notebook, show, table
from minipeft.course.alt_text import contrast, describe
from minipeft.course.records import (
    at_best_rate,
    longer_curves,
    longer_runs,
    matching,
    real_size,
)
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

    @pytest.mark.parametrize(
        "column, right",
        [
            (["≈ 0.15", "≈ -1.2", "≈ 10 %"], True),
            (["60 %", "100 %"], True),
            (["5.8 GB", "92.4 GB"], True),
            (["+1,200", "−3", "1e-4"], True),
            (["3.0 ± 2.0", "10 ± 9 points"], True),
            ([3, "≈ 4"], True),
            (["≈ 1.2", "–", ""], True),
            (["**15.2**", "*28.7*", "143.5"], True),
            (["", "–"], False),
            (["1. loaded", "2. trained"], False),
            (["0.02 (at the edge)", "0.02"], False),
            (["4, 5, 6", "5, 6, 7"], False),
            (["4 bits of 8", "8"], False),
        ],
    )
    def test_columns_of_numbers_are_set_right(self, column, right):
        made = table([["a", cell, "z"] for cell in column], ["a", "b", "c"])
        marks = made.data.splitlines()[1]
        assert marks == f"| --- | {'---:' if right else '---'} | --- |"

    def test_a_table_without_rows(self):
        assert table([], ["a", "b"]).data == "| a | b |\n| --- | --- |"

    def test_numbers_made_by_training_are_not_compared(self):
        import re

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

    @pytest.mark.parametrize("low, high", [(0.008, 0.05), (0.03, 0.09), (0.3, 6)])
    def test_a_short_logarithmic_axis_has_plain_numbers(self, low, high):
        ax = figures.axes("title", "x", "y", logy=True)
        ax.plot([1, 2], [low, high])
        figures.finish(ax, legend=False)
        names = [
            tick.get_text()
            for minor in (False, True)
            for tick in ax.get_yticklabels(minor=minor)
        ]
        shown = [name for name in names if name]
        assert len(shown) >= 2
        assert all(float(name) > 0 for name in shown)

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

    @pytest.mark.parametrize(
        "axis, low, high, named",
        [
            ("y", 0.02, 0.5, (0.05, 0.1, 0.2)),
            ("y", 30, 300, (30, 100, 300)),
            ("x", 0.004, 0.03, (0.005, 0.02)),
        ],
    )
    def test_a_logarithmic_axis_has_the_names_it_is_given_and_no_others(
        self, axis, low, high, named
    ):
        ax = figures.axes("title", "x", "y", logx=axis == "x", logy=axis == "y")
        ax.plot([low, high], [low, high])
        names = [f"{value:g}" for value in named]
        ticks = {f"{axis}ticks": named, f"{axis}ticklabels": names}
        figures.finish(ax, legend=False, **ticks)
        ax.figure.draw_without_rendering()
        both = [getattr(ax, f"get_{axis}ticklabels")(minor=m) for m in (False, True)]
        assert [t.get_text() for part in both for t in part if t.get_text()] == names

    def test_open_limits_end_where_the_data_end(self, monkeypatch):
        from minipeft.course import figures

        seen = []
        monkeypatch.setattr(
            figures.plt, "show", lambda: seen.append(figures.plt.gca().get_ylim())
        )
        figures.curves({"a": [3.0, 2.0, 1.0]}, "title", "x", "y", ylim=(0, None))
        assert seen[0][0] == 0 and seen[0][1] >= 3


def drawn(monkeypatch, draw, *arguments, **settings):
    """The figure that a function of `figures` shows."""
    from minipeft.course import figures

    seen = []
    monkeypatch.setattr(figures.plt, "show", lambda: seen.append(figures.plt.gcf()))
    getattr(figures, draw)(*arguments, **settings)
    return seen[0]


@pytest.mark.parametrize("seeds", [[[1.0, 3.0], [2.0, 6.0]], [(1, 2, 3), (4, 5, 9)]])
def test_curves_go_through_the_mean_and_show_each_seed(monkeypatch, seeds):
    runs = {"LoRA": ([1, 8], seeds)}
    (ax,) = drawn(monkeypatch, "curves", runs, "title", "rank", "%", logx=2).axes
    assert list(ax.lines[0].get_ydata()) == [sum(s) / len(s) for s in seeds]
    points = [tuple(point) for part in ax.collections for point in part.get_offsets()]
    assert points == [(x, y) for x, values in zip([1, 8], seeds) for y in values]


def test_curves_of_single_values_have_no_points_of_seeds(monkeypatch):
    (ax,) = drawn(monkeypatch, "curves", {"a": [3.0, 2.0]}, "title", "x", "y").axes
    assert not ax.collections


CURVES = {"LoRA": [3.0, 1.0, 2.0], "full": ([1, 2, 4], [3.0, 2.5, 0.5])}
PLACES = {"x": (0, 0, 1, figures.GREY), "the layer\nW x": (2, 0, 1.5, figures.BLUE)}
COMMITTED = [
    "chapters/figures/rank_sweep.png",
    "data/base/warmup.png",
    "data/base/curve.png",
]
DRAWN = [
    (
        ("curves", CURVES, "LoRA comes down", "step", "loss"),
        {"levels": {"base": 2.0}, "logy": True},
        "LoRA comes down. Across: step. Up: loss (logarithmic). Lines: LoRA: from 3 to"
        " 2, lowest 1; full: from 3 to 0.5; base: 2.",
    ),
    (
        ("bars", {"LoRA": [1, 2, 6], "DoRA": 2.5}, "Two bars", "score, %"),
        {},
        "Two bars. Up: score, %. Bars: LoRA 3; DoRA 2.5.",
    ),
    (
        ("heat", [[1, 2, 3], [4, 5, 6]], ["a", "b"], ["x", "y", "z"], "A", "c", "r"),
        {},
        "A. Across: c. Up: r. A grid of 2 rows and 3 columns, values from 1 to 6.",
    ),
    (
        ("boxes", PLACES, [("x", "the layer\nW x")], "A slot"),
        {},
        "A slot. A drawing with the labels x; the layer W x.",
    ),
    (
        ("matrices", [("W", 8, 8, figures.GREY, "8×8"), "+"], "Thin"),
        {"note": "to scale"},
        "Thin. A drawing with the labels W; 8×8; +; to scale.",
    ),
    (
        (
            "against_steps",
            {"a": {30: [2, 4], 100: [1, 2]}},
            {"a": {100: [70, 80]}},
            "A",
        ),
        {},
        "A. On the way to 100 steps. Across: steps (log scale) (logarithmic). Up:"
        " validation loss (nats a token, log scale) (logarithmic). Lines: a: from 3 to"
        " 1.5. At the end of a run. Across: steps of the run (log scale) (logarithmic)."
        " Up: test answers right (%). Points: a 75.",
    ),
]


def test_two_panels_against_steps_differ_in_colour_and_shape(monkeypatch):
    losses = {name: {30: [4, 2], 100: [1, 3], 300: [1, 1]} for name in "abcdef"}
    scores = {name: {100: [50, 60], 1000: [90, 100]} for name in "abcdef"}
    figure = drawn(monkeypatch, "against_steps", losses, scores, "title")
    figure.draw_without_rendering()
    left, right = figure.axes
    means = [line for line in left.lines if not line.get_label().startswith("_")]
    seeds = [line for line in left.lines if line not in means]
    assert [line.get_ydata().tolist() for line in means] == [[3, 2, 1]] * 6
    assert [line.get_ydata().tolist() for line in seeds] == [[4, 1, 1], [2, 3, 1]] * 6
    for look in ("get_color", "get_marker"):
        for ax_lines in (means, right.lines):
            assert len({getattr(line, look)() for line in ax_lines}) == 6
    assert [line.get_ydata().tolist() for line in right.lines] == [[55, 95]] * 6
    points = [y for group in right.collections for _, y in group.get_offsets()]
    assert points == [50, 60, 90, 100] * 6
    words = [text.get_text() for text in right.get_xticklabels()]
    assert words == ["100", "1,000"] and right.get_ylabel() == "test answers right (%)"
    (legend,) = figure.legends
    for ax in figure.axes:
        assert not legend.get_window_extent().overlaps(ax.get_window_extent())
    assert all(text.get_fontsize() >= 10 for text in figure.findobj(figures.Text))


def test_a_grid_may_lie_above_its_top(monkeypatch):
    labels = (["row"], ["a", "b"], "title", "x", "y")
    drawn(monkeypatch, "heat", [[7.0, 8.0]], *labels, top=5).draw_without_rendering()


@pytest.mark.parametrize("columns", [2, 4, 6])
def test_boxes_are_as_tall_as_their_words(monkeypatch, columns):
    places = {
        f"two lines\nof words {n}": (2.4 * n, n % 2, 1.9, figures.GREY)
        for n in range(columns)
    }
    figure = drawn(monkeypatch, "boxes", places, [], "title")
    figure.draw_without_rendering()
    (ax,) = figure.axes
    for text, box in zip(ax.texts, ax.patches, strict=True):
        words, around = text.get_window_extent(), box.get_window_extent()
        assert around.y0 < words.y0 and words.y1 < around.y1


class TestNamedPoints:
    """Points whose names stand beside them."""

    def boxes(self, monkeypatch, points, **options):
        figure = drawn(
            monkeypatch, "named_points", points, "title", "x", "y", **options
        )
        figure.draw_without_rendering()
        (ax,) = figure.axes
        names = [text for text in ax.texts if text.get_text() in points]
        assert len(names) == len(points)
        return ax, {
            text.get_text(): figures.Text.get_window_extent(text) for text in names
        }

    @pytest.mark.parametrize("seed", range(4))
    def test_no_name_covers_another_or_a_point(self, monkeypatch, seed):
        draw = np.random.default_rng(seed)
        x, y = 10 ** draw.uniform(3, 6, 20), draw.choice([30.0, 60.0, 90.0], 20)
        points = {f"method {n}": (x[n], y[n] + n / 10) for n in range(20)}
        ax, boxes = self.boxes(monkeypatch, points, logx=True, ylim=(0, 105))
        found = list(boxes.values())
        for n, box in enumerate(found):
            assert not any(box.overlaps(other) for other in found[:n])
            assert ax.get_window_extent().fully_containsx(box.x1)
        for place in ax.transData.transform(list(points.values())):
            assert not any(box.contains(*place) for box in found)

    @pytest.mark.parametrize("seed", range(4))
    def test_no_name_covers_a_seed_or_touches_a_name(self, monkeypatch, seed):
        draw = np.random.default_rng(seed)
        x, y = draw.uniform(0.7, 1.2, 25), draw.choice([55, 90, 90, 91], 25)
        points = {f"method {n}": (x[n], y[n] + draw.normal(0, 3, 3)) for n in range(25)}
        ax, boxes = self.boxes(monkeypatch, points, size=(8, 6.4), ylim=(0, 108))
        places = np.vstack([part.get_offsets() for part in ax.collections])
        found = list(boxes.values())
        for place in ax.transData.transform(places):
            assert not any(box.padded(2).contains(*place) for box in found)
        for n, box in enumerate(found):
            assert not box.padded(2).count_overlaps(found[:n])

    @pytest.mark.parametrize("seed", range(4))
    def test_no_line_to_a_point_crosses_a_name(self, monkeypatch, seed):
        draw = np.random.default_rng(seed)
        points = {f"method {n}": draw.uniform(0.5, 0.6, 2) for n in range(8)}
        points |= {"far away": (0, 0), "far above": (1, 1)}
        ax, boxes = self.boxes(monkeypatch, points, size=(8, 6.4))
        names = [text for text in ax.texts if text.arrow_patch]
        assert names, "nothing stands apart"
        for text in names:
            line = text.arrow_patch.get_path().interpolated(30).vertices
            line = text.arrow_patch.get_transform().transform(line)
            for other, box in boxes.items():
                crossed = other != text.get_text() and any(
                    box.contains(*p) for p in line
                )
                assert not crossed, (text.get_text(), other)

    def test_what_is_marked_is_a_circle(self, monkeypatch):
        points = {"full": (1, 90), "LoRA": (2, 80)}
        ax, _ = self.boxes(monkeypatch, points, marked=["LoRA"], ylim=(0, 100))
        assert [line.get_marker() for line in ax.lines] == ["x", "o"]

    def test_seeds_are_points_around_their_mean(self, monkeypatch):
        ax, _ = self.boxes(monkeypatch, {"full": (1, [80, 90, 100])}, ylim=(0, 120))
        (mean,) = ax.lines
        (seeds,) = ax.collections
        assert mean.get_xydata().tolist() == [[1, 90]]
        assert seeds.get_offsets().tolist() == [[1, 80], [1, 90], [1, 100]]

    def test_where_there_is_no_place_it_says_so(self, monkeypatch):
        points = {f"a long name of a method {n}": (1, 1) for n in range(90)}
        with pytest.raises(ValueError, match="make the figure larger"):
            self.boxes(monkeypatch, points)


class TestReadableByEverybody:
    """Letters, contrasts, shapes, and alternative texts."""

    @pytest.mark.parametrize("call, settings, says", DRAWN, ids=lambda x: str(x)[:12])
    def test_alternative_text_says_what_one_sees(
        self, monkeypatch, call, settings, says
    ):
        figure = drawn(monkeypatch, *call, **settings)
        assert describe(figure) == says

    @pytest.mark.parametrize("call, settings, says", DRAWN, ids=lambda x: str(x)[:12])
    def test_letters_have_ten_points_or_more(self, monkeypatch, call, settings, says):
        figure = drawn(monkeypatch, *call, **settings)
        texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text()]
        assert texts and min(t.get_fontsize() for t in texts) >= 10

    @pytest.mark.parametrize("name", COMMITTED)
    def test_committed_figures_have_the_colours_of_today(self, name):
        picture = figures.plt.imread(Path(__file__).parents[1] / name)[..., :3]
        hue = picture.max(-1) - picture.min(-1) > 0.3  # neither black, white nor grey
        found, count = np.unique(picture[hue], axis=0, return_counts=True)
        flat = found[count > 0.05 * count.sum()]  # rather than the edges of lines
        palette = {to_hex(colour) for colour in figures.COLOURS}
        assert len(flat) and {to_hex(colour) for colour in flat} <= palette

    def test_small_letters_of_a_chapter_are_raised(self):
        ax = figures.axes("title", "x", "y")
        small = ax.text(0, 0, "small", fontsize=6)
        large = ax.text(0, 0, "large", fontsize=15)
        figures.finish(ax)
        assert (small.get_fontsize(), large.get_fontsize()) == (10, 15)

    def test_points_scatter_and_gaps_are_described(self):
        ax = figures.axes("title")
        ax.scatter([1, 2], [3, 4], label="seeds")
        ax.plot([1, 2, 3], [float("nan"), 5, 6], label="late")
        ax.plot([1, 2], [0, 0])
        ax.plot([1], [float("nan")], label="nothing")
        said = describe(ax.figure)
        assert said == "title. Lines: late: from 5 to 6. Points: seeds (2)."
        figures.plt.close("all")

    def test_named_points_are_described_by_name_and_value(self, monkeypatch):
        points = {"LoRA": (1, [90, 92]), "prompt": (2, 3)}
        figure = drawn(monkeypatch, "named_points", points, "title", "cost", "score")
        said = describe(figure)
        assert "Points: LoRA 91; prompt 3." in said and "Lines" not in said

    @pytest.mark.parametrize("names", ["ab", ["LoRA\nattention", "none"], ["2", "1"]])
    def test_lines_over_names_are_described(self, names):
        """matplotlib hands categories back as they were given."""
        ax = figures.axes("title")
        ax.plot(list(names), [3, 4], label="score")
        assert "score: from 3 to 4" in describe(ax.figure)
        figures.plt.close("all")

    @pytest.mark.parametrize("across", [False, True])
    def test_stacked_bars_are_described_series_by_series(self, across):
        """Drawn one by one, and labelled once, with names or with none at the axis."""
        ax = figures.axes("title")
        draw = ax.barh if across else ax.bar
        for row, name in enumerate(["full", "LoRA"]):
            below = 0
            for part, colour in {"weights": figures.BLUE, "Adam": figures.PINK}.items():
                value = 4 if part == "weights" else 9 - 8 * row
                start = {"left" if across else "bottom": below}
                label = part if row == 0 else None
                draw(row, value, color=colour, label=label, **start)
                below += value
        assert "weights: 0 4; 1 4. Bars, Adam: 0 9; 1 1." in describe(ax.figure)
        ticks = ax.set_yticks if across else ax.set_xticks
        ticks([0, 1], ["full", "LoRA"])
        said = describe(ax.figure)
        assert "weights: full 4; LoRA 4. Bars, Adam: full 9; LoRA 1." in said
        figures.plt.close("all")

    @pytest.mark.parametrize("shift", [0.2, -0.4])
    def test_bars_side_by_side_are_called_as_their_group(self, shift):
        ax = figures.axes("title")
        ax.bar([0 - shift, 1 - shift], [5, 6], width=0.4, label="one")
        ax.bar([0 + shift, 1 + shift], [7, 8], width=0.4, label="other")
        ax.set_xticks([0, 1], ["a", "b"])
        assert "one: a 5; b 6. Bars, other: a 7; b 8." in describe(ax.figure)
        figures.plt.close("all")

    def test_bars_without_labels_or_of_several_numbers(self):
        ax = figures.axes("title")
        ax.bar([0, 1], [5, 6], color=figures.BLUE)
        ax.bar([3], [2], color=figures.PINK)
        assert describe(ax.figure) == "title. Bars: 0 5; 1 6; 3 2."
        figures.plt.close("all")

    def test_many_series_are_counted(self):
        ax = figures.axes("title")
        for number in range(12):
            ax.plot([0, 1], [0, 1], label=f"run {number}")
        said = describe(ax.figure)
        assert "run 7" in said and "run 8" not in said and "and 4 more" in said
        figures.plt.close("all")

    @pytest.mark.parametrize("colour", figures.COLOURS)
    def test_colours_stand_out_from_white(self, colour):
        assert contrast(colour) >= 3

    @pytest.mark.parametrize("colour", [*figures.COLOURS, figures.YELLOW])
    def test_letters_stand_out_from_a_box(self, colour):
        seen = [0.85 * c + 0.15 for c in matplotlib.colors.to_rgb(colour)]
        assert contrast(figures.letters_on(colour), seen) >= 4.5

    @pytest.mark.parametrize(
        "one, other, ratio",
        [("#000000", "#FFFFFF", 21), ("#777777", "#FFFFFF", 4.48), ("red", "red", 1)],
    )
    def test_contrast_is_the_standards(self, one, other, ratio):
        """WCAG 2.2's definition; #777 on white is its well-known near miss of 4.5."""
        assert contrast(one, other) == pytest.approx(ratio, abs=printed(2))

    @pytest.mark.parametrize("marks", [False, True])
    @pytest.mark.parametrize("points", [2, 3, 9, 100])
    def test_curves_differ_in_shape_too(self, monkeypatch, marks, points):
        runs = {label: list(range(points)) for label in "abcde"}
        figure = drawn(monkeypatch, "curves", runs, "t", "x", "y", marks=marks)
        lines = figure.axes[0].get_lines()
        assert len({line.get_marker() for line in lines}) == 5
        for line in lines:
            start, step = line.get_markevery()
            assert 1 <= len(range(points)[start::step]) <= (points if marks else 17)

    def test_a_chapter_keeps_alternative_texts(self, tmp_path):
        code = (
            "from minipeft.course import figures\n"
            "figures.bars({'a': 1}, 'One bar', 'score')"
        )
        path = tmp_path / "00_x.ipynb"
        cells = [nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        notebook.run(path)
        (output,) = nbformat.read(path, as_version=4).cells[0].outputs
        alt = "One bar. Up: score. Bars: a 1."
        assert output.metadata == {"image/png": {"alt": alt}}


class TestRunner:
    """Chapters are run and saved clean."""

    @pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning])
    @pytest.mark.parametrize(
        "module, told",
        [
            ("transformers.modeling_utils", False),
            ("torch.nn.modules.module", False),
            ("peft.tuners.tuners_utils", False),
            ("__main__", True),
            ("minipeft.lm.training", True),
        ],
    )
    def test_only_a_learners_own_deprecations_are_told(self, category, module, told):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            course.ignore_others_deprecations()
            warnings.warn_explicit("old", category, "x.py", 1, module)
            warnings.warn_explicit("shapes differ", UserWarning, "x.py", 1, module)
        assert [str(w.message) for w in heard][:-1] == ["old"] * told
        assert str(heard[-1].message) == "shapes differ"

    def test_importing_the_course_is_enough(self, tmp_path, capsys):
        code = (
            "import warnings\nimport minipeft.course\n"
            "for m in ('transformers.modeling_utils', 'peft.x'):\n"
            "    warnings.warn_explicit('old', FutureWarning, 'x.py', 1, m)"
        )
        cells = [nbformat.v4.new_code_cell(code)]
        path = tmp_path / "00_x.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        notebook.run(path)
        assert "stderr" not in capsys.readouterr().out

    def test_progress_goes_to_stdout_in_a_kernel(self, monkeypatch):
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
        code = (
            "import minipeft.course\nfrom tqdm import tqdm\n"
            "from tqdm.auto import tqdm as other, trange\n"
            "for bar in (tqdm, other):\n    list(bar(range(3)))"
        )
        cells = [nbformat.v4.new_code_cell(code)]
        done = NotebookClient(nbformat.v4.new_notebook(cells=cells)).execute()
        outputs = done.cells[0].outputs
        assert {output.name for output in outputs} == {"stdout"}
        assert "".join(output.text for output in outputs).count("3/3") == 2

    def test_noise_is_named_once(self, tmp_path, capsys):
        noisy = "import warnings, sys\nprint('Failed to load', file=sys.stderr)"
        cells = [nbformat.v4.new_code_cell(noisy) for _ in range(2)]
        path = tmp_path / "00_x.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        notebook.run(path)
        assert capsys.readouterr().out.count("stderr: Failed to load") == 1

    def test_the_kernel_starts_without_a_warning(self, tmp_path, capfd):
        """ipykernel warns of unencrypted TCP on the terminal, not in the notebook."""
        path = tmp_path / "00_x.ipynb"
        cells = [nbformat.v4.new_code_cell("print(6 * 7)")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        notebook.run(path)
        assert nbformat.read(path, as_version=4).cells[0].outputs[0].text == "42\n"
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("total", [3, None])
    def test_a_progress_bar_is_no_noise(self, capsys, total):
        """tqdm's lines, with and without an end, as they come: parted by returns."""
        drawn = io.StringIO()
        for _ in tqdm.tqdm(range(3), total=total, file=drawn, disable=False):
            pass
        text = drawn.getvalue() + "\na warning\n"
        output = nbformat.v4.new_output("stream", name="stderr", text=text)
        cell = nbformat.v4.new_code_cell(outputs=[output])
        notebook.print_noise(nbformat.v4.new_notebook(cells=[cell]))
        said = capsys.readouterr().out.split("stderr: ")
        assert said[1:] == ["a warning"]

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


class TestRecords:
    RUNS = [
        {"case": case, "lr": lr, "seed": seed, "valid_loss": loss}
        for case, lr, seed, loss in (
            ("a", 0.1, 2, 0.1),  # lower, but of another seed
            ("a", 0.1, 0, 0.5),
            ("a", 0.2, 1, 0.9),
            ("a", 0.2, 0, 0.4),
            ("b", 0.3, 0, 0.2),
        )
    ]

    def test_runs_at_the_best_rate_of_the_first_seed(self):
        assert at_best_rate(self.RUNS, case="a") == [self.RUNS[3], self.RUNS[2]]
        assert at_best_rate(self.RUNS, case="b") == [self.RUNS[4]]
        assert at_best_rate(self.RUNS[:1]) == [self.RUNS[0]]

    def test_matching_asks_for_every_value(self):
        assert matching(self.RUNS, case="a", seed=0) == [self.RUNS[1], self.RUNS[3]]
        assert matching(self.RUNS) == self.RUNS
        with pytest.raises(KeyError):
            matching(self.RUNS, method="a")


class TestRealSize:
    """The table of the runs on SmolLM2."""

    LORA = {"case": "LoRA r 4", "parameters": 2442240, "lr": 3e-3, "steps": 300}
    IA3 = {"case": "(IA)³", "parameters": 57600, "lr": 1e-2, "steps": 300}
    BEFORE = {"case": "before", "parameters": 0, "lr": None, "steps": 0}

    def record(self):
        runs = [self.BEFORE | {"seed": 0, "bleu": 9, "test_loss": 2.5}]
        for seed in (1, 0):
            ends = {"seed": seed, "bleu": 53.456 + seed, "test_loss": 1.2 + seed / 9}
            runs.append(self.LORA | ends)
            runs.append(self.IA3 | ends | {"test_loss": 1.9 + seed / 9})
        # a run at a rate that the trials did not choose
        runs.append(self.LORA | {"lr": 1e-3, "seed": 0, "bleu": 1.0, "test_loss": 9.0})
        trials = [
            {"case": case, "lr": lr, "valid_loss": loss, "seed": 0}
            for case in ("LoRA r 4", "(IA)³")
            for lr, loss in ((1e-3, 3.0), (3e-3, 1.0), (1e-2, 2.0))
            if case == "LoRA r 4" or lr == 1e-2
        ]
        return {"runs": runs, "trials": trials}

    def test_a_line_a_case_with_its_seeds_and_the_rates_tried(self, tmp_path):
        lines = real_size(self.record(), {"BLEU": "bleu"}).data.splitlines()
        assert lines[0] == "| 300 steps | parameters | rate | BLEU |"
        assert lines[2:] == [
            "| before | 0 |  | 9 |",
            "| LoRA r 4 | 2,442,240 | 0.003 (0.001–0.01) | 53.46, 54.46 |",
            "| (IA)³ | 57,600 | 0.01 (the only one tried) | 53.46, 54.46 |",
        ]
        few = real_size(self.record(), {"BLEU": "bleu"}, ["full", "before"]).data
        assert few.splitlines()[2:] == ["| full | not run |  |  |", lines[2]]
        (tmp_path / "runs.json").write_text(json.dumps(self.record()))
        again = real_size(tmp_path / "runs.json", {"BLEU": "bleu"}).data.splitlines()
        assert again == lines

    def test_the_verdict_is_of_the_seeds_that_both_have(self):
        def verdicts(record):
            shown = real_size(record, {"BLEU": "bleu"}, against="LoRA r 4")
            lines = shown.data.splitlines()
            assert lines[0].endswith("| loss, against LoRA r 4 |")
            return [line.split(" | ")[-1].strip(" |") for line in lines[2:]]

        # 0.7 above with either seed: a difference without any spread
        assert verdicts(self.record()) == ["", "", "behind by 0.7 ± 0.0"]
        record = self.record()
        record["runs"] = [
            run for run in record["runs"] if (run["case"], run["seed"]) != ("(IA)³", 1)
        ]
        assert verdicts(record) == ["", "", "not told apart: one seed (+0.7)"]
        record["runs"] = [run for run in record["runs"] if run["case"] != "LoRA r 4"]
        assert verdicts(record) == ["", ""]  # nothing to compare with


class TestLongerRuns:
    """The table of what benchmarks/longer.py has written."""

    @staticmethod
    def run(case, lr, seed, loss, right):
        return {
            "case": case,
            "task": "sql",
            "examples": None,
            "steps": 300,
            "lr": lr,
            "seed": seed,
            "parameters": 1280,
            "valid_loss": loss,
            "test_loss": loss,
            "right": right,
            "score": 100 * right.count("1") / len(right),
        }

    def record(self):
        runs = [self.run("a", lr, 0, lr, "0001" * 25) for lr in (0.1, 0.2, 0.5)]
        runs += [
            self.run("a", 0.1, seed, 0.1 + seed / 100, "01" * 50) for seed in (1, 2)
        ]
        runs += [
            self.run("b", lr, 0, abs(lr - 0.2), "1" * 100) for lr in (0.1, 0.2, 0.5)
        ]
        runs += [self.run("b", 0.2, seed, 0.001 * seed, "1" * 100) for seed in (1, 2)]
        runs += [self.run("c", 0.3, 0, 0.3, "1" * 100)]
        runs += [self.run("b", 0.2, 0, 9.0, "0" * 100) | {"steps": 1000}]
        return {"long_runs": {"runs": runs}}

    def test_each_case_at_its_best_rate_with_every_seed(self):
        rows = longer_runs(self.record(), ["a", "b", "c"], 300).data.splitlines()
        assert rows[2:] == [
            "| a | 1,280 | 0.1 (0.1–0.5, at the edge) | 0.100, 0.110, 0.120"
            " | 25, 50, 50 |",
            "| b | 1,280 | 0.2 (0.1–0.5) | 0.000, 0.001, 0.002 | 100, 100, 100 |",
            "| c | 1,280 | 0.3 (the only one tried) | 0.300 | 100 |",
        ]

    def test_the_verdict_on_two_cases_is_that_of_compare(self):
        cases = {"first": "a", "second": "b"}
        rows = longer_runs(self.record(), cases, 300, against="first").data.splitlines()
        losses = [{0: 0.1, 1: 0.11, 2: 0.12}, {0: 0.0, 1: 0.001, 2: 0.002}]
        said = str(course.compare(losses[1], losses[0], loss=True))
        assert said.startswith("ahead by 0.1")
        assert f"| {said} | ahead by" in rows[3] and rows[2].endswith("|  |  |")

    def test_another_task_or_number_of_steps_is_another_table(self, tmp_path):
        (tmp_path / "record.json").write_text(json.dumps(self.record()))
        row = longer_runs(tmp_path / "record.json", ["b"], 1000).data.splitlines()[2]
        assert "9.000" in row
        with pytest.raises(ValueError):
            longer_runs(self.record(), ["b"], 300, task="voice")


class TestLongerCurves:
    """The same runs against their steps."""

    RUNS = [
        {"case": case, "task": "sql", "examples": None, "steps": steps, "lr": lr}
        | {"seed": seed, "valid_loss": loss, "along": along, "score": score}
        for case, steps, lr, seed, loss, along, score in (
            ("a", 300, 0.1, 0, 0.5, {"30": 2.0, "100": 1.0}, 80),
            ("a", 300, 0.1, 1, 0.7, {"30": 3.0, "100": 2.0}, 90),
            ("a", 300, 0.2, 0, 0.9, {"30": 9.0, "100": 9.0}, 10),  # not its best rate
            ("a", 1000, 0.1, 0, 0.1, {"30": 4.0, "100": 3.0, "300": 2.0}, 99),
            ("b", 300, 0.1, 0, 0.4, {"30": 5.0, "100": 4.0}, 70),
        )
    ]
    RECORD = {"long_runs": {"runs": [*RUNS, RUNS[0] | {"task": "voice", "score": 0}]}}

    @staticmethod
    def seen(monkeypatch, *arguments, **settings):
        seen = []
        monkeypatch.setattr(
            "minipeft.course.records.against_steps", lambda *what: seen.append(what)
        )
        longer_curves(*arguments, **settings)
        return seen[0]

    def test_losses_of_the_greatest_length_that_all_have_and_every_score(
        self, monkeypatch
    ):
        losses, scores, title = self.seen(
            monkeypatch, self.RECORD, {"first": "a", "second": "b"}, "title"
        )
        assert losses == {
            "first": {30: [2.0, 3.0], 100: [1.0, 2.0], 300: [0.5, 0.7]},
            "second": {30: [5.0], 100: [4.0], 300: [0.4]},
        }
        assert scores == {"first": {300: [80, 90], 1000: [99]}, "second": {300: [70]}}
        assert title == "title"

    def test_a_length_may_be_asked_for(self, monkeypatch, tmp_path):
        (tmp_path / "record.json").write_text(json.dumps(self.RECORD))
        at = tmp_path / "record.json"
        losses = self.seen(monkeypatch, at, ["a"], "title")[0]
        assert losses == {"a": {30: [4.0], 100: [3.0], 300: [2.0], 1000: [0.1]}}
        losses = self.seen(monkeypatch, at, ["a"], "title", steps=300)[0]
        assert [*losses["a"]] == [30, 100, 300]
        losses, scores, _ = self.seen(monkeypatch, at, ["a"], "title", task="voice")
        assert scores == {"a": {300: [0]}}

    def test_shorter_runs_of_the_chapter_stand_where_longer_ones_lack(
        self, monkeypatch
    ):
        shorter = {80: {"a": [{"score": 40}, {"score": 50}]}}
        shorter[300] = {"a": [{"score": 1}]}
        losses, scores, _ = self.seen(
            monkeypatch, self.RECORD, ["a", "b"], "title", shorter=shorter
        )
        assert [*scores["a"].items()] == [(80, [40, 50]), (300, [80, 90]), (1000, [99])]
        assert scores["b"] == {300: [70]} and 80 not in losses["a"]

    def test_cases_without_a_common_length_are_refused(self, monkeypatch):
        record = {"long_runs": {"runs": self.RUNS[3:]}}
        with pytest.raises(ValueError, match="no length that all of a, b have"):
            self.seen(monkeypatch, record, ["a", "b"], "title")


def test_a_text_of_several_lines_stays_one_line_of_a_table():
    made = table([["a\n\nb", 1]], ["text", "number"]).data
    assert made.splitlines()[2:] == ["| a  b | 1 |"]


class TestFinding:
    """What the shipped base shows, and another base may not show."""

    def test_on_the_shipped_base_it_has_to_hold(self, monkeypatch, capsys):
        monkeypatch.delenv("MINIPEFT_BASE", raising=False)
        finding(True, "NF4 costs less than FP4")
        with pytest.raises(AssertionError, match="expected: NF4 costs less than FP4"):
            finding(False, "NF4 costs less than FP4")
        assert capsys.readouterr().out == ""

    def test_on_another_base_it_is_told(self, monkeypatch, capsys):
        monkeypatch.setenv("MINIPEFT_BASE", "stories260K")
        finding(True, "NF4 costs less than FP4")
        finding(np.bool_(False), "three bits cost more than four")
        assert capsys.readouterr().out == (
            "Not on this base: three bits cost more than four\n"
        )
