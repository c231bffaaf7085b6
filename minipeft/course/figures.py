"""One style for all figures: titles that say what one sees, axes with units, colours
that everybody can tell apart, letters of 10 points or more, and an alternative text."""

import re
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from .alt_text import contrast, describe

# Okabe and Ito's hues (2008), made to be told apart with any kind of colour vision,
# darkened to a contrast of 3:1 or more with white; yellow, for areas, excepted.
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY = (
    "#00639C",
    "#C67C00",
    "#008F68",
    "#C2679B",
    "#3498DB",
    "#B5322A",
    "#F0E442",
    "#757575",
)
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY)
MARKERS = "osD^vP*X"  # so that a figure can be read in black and white too

STYLE = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.facecolor": "white",  # it may lie over a line
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "font.size": 10,
}


def axes(
    title: str, xlabel: str = "", ylabel: str = "", *, size=None, logx=False, logy=False
):
    """One pair of axes in the course's style; logx=2: powers of two."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=size)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if logx:
        ax.set_xscale("log", base=2 if logx == 2 else 10)
    if logx == 2:
        # 1, 2, 4 rather than powers
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if logy:
        ax.set_yscale("log")
    return ax


def finish(ax=None, legend=True, outside=False, save=None, **limits) -> None:
    """Add the legend, show the figure (or save it to a file), forget it. limits: xlim=,
    ylim=, xticks=, ..."""
    ax = ax or plt.gca()
    ax.set(**limits)  # only now: ylim=(0, None) means up to the largest value drawn
    for axis, names in ((ax.xaxis, "xticklabels"), (ax.yaxis, "yticklabels")):
        if names in limits:  # a logarithmic axis names others, between these
            axis.set_minor_formatter(NullFormatter())
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log" and high < 50 * low and "yticks" not in limits:
        name_plainly(ax.yaxis)
    if legend and ax.get_legend_handles_labels()[1]:
        place = (
            {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
            if outside
            else {"loc": "best"}
        )
        ax.legend(**place)
    raise_small_letters(ax.figure)
    if save:
        ax.figure.savefig(save, dpi=144, format="png", metadata={"Software": None})
    elif get_ipython() is None:
        plt.show()
    else:
        alt = {"image/png": {"alt": describe(ax.figure)}}
        display(ax.figure, metadata=alt)
    plt.close("all")


def name_plainly(axis) -> None:
    """0.1, 0.2, 0.5 on a logarithmic axis rather than powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def raise_small_letters(figure, points=10) -> None:
    """No text in the figure is smaller than this."""
    for text in figure.findobj(Text):
        text.set_fontsize(max(points, text.get_fontsize()))


def letters_on(colour, alpha=0.85) -> str:
    """Black or white: what reads better on this colour over white."""
    seen = [alpha * part + 1 - alpha for part in to_rgb(colour)]
    return max(("black", "white"), key=lambda letters: contrast(letters, seen))


def curves(
    runs: dict,
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    levels=None,
    marks=False,
    smooth=1,
    outside=False,
    save=None,
    size=None,
    logx=False,
    logy=False,
    **limits,
) -> None:
    """Lines, one for each entry of runs: {label: y} or {label: (x, y)}; levels: {label:
    y}, dashed lines to compare with; smooth: a running mean over so many points, the
    points themselves faint behind it. marks: a mark at each point; without it several
    lines have a few marks each, so that they differ in shape too. Where an entry of y
    is a list of values, one a seed, the line goes through its mean, and each seed is a
    point."""
    ax = axes(title, xlabel, ylabel, size=size, logx=logx, logy=logy)
    for number, (label, run) in enumerate(runs.items()):
        x, y = run if isinstance(run, tuple) else (range(1, len(run) + 1), run)
        seeds = [np.atleast_1d(values) for values in y]
        x, y = np.asarray(list(x), float), np.array([s.mean() for s in seeds], float)
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)] if marks or len(runs) > 1 else None
        if smooth > 1 and len(y) > smooth:
            ax.plot(x, y, color=colour, alpha=0.25, linewidth=1)
            y, x = np.convolve(y, np.ones(smooth) / smooth, "valid"), x[smooth - 1 :]
        step = 1 if marks else max(1, len(x) // 8)
        ax.plot(
            x,
            y,
            label=label,
            color=colour,
            marker=marker,
            markevery=(number * step // len(runs), step),
            linewidth=1.8,
            markersize=5,
        )
        for place, values in zip(x, seeds):
            if len(values) > 1:
                seed_points(ax, place, values, colour, width=0)
    for number, (label, level) in enumerate((levels or {}).items()):
        ax.axhline(
            level,
            label=label,
            color="black",
            linestyle=("--", ":", "-.")[number % 3],
            linewidth=1.2,
        )
    finish(ax, outside=outside, save=save, **limits)


def bars(
    values: dict,
    title: str,
    ylabel: str,
    *,
    colours=None,
    form="{:.0f}",
    rotate=0,
    size=None,
    **limits,
) -> None:
    """Bars with their values written on them. A list of values, one a seed, is drawn as
    its mean, and each seed as a point."""
    ax = axes(title, "", ylabel, size=size)
    means = [float(np.mean(value)) for value in values.values()]
    drawn = ax.bar(list(values), means, color=colours or BLUE, width=0.65)
    ax.bar_label(drawn, [form.format(mean) for mean in means], padding=2)
    for place, value in enumerate(values.values()):
        if np.ndim(value):
            seed_points(ax, place, value)
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.12)
    if rotate:
        ax.tick_params(axis="x", rotation=rotate)
    finish(ax, **limits)


def seed_points(ax, place: float, values, colour="black", width=0.3) -> None:
    """One value a seed, as points side by side around `place`."""
    values = np.asarray(list(values), float)
    aside = np.linspace(-width / 2, width / 2, len(values)) if len(values) > 1 else [0]
    ax.scatter(
        place + np.asarray(aside),
        values,
        s=18,
        color=colour,
        edgecolor="white",
        linewidth=0.6,
        zorder=3,
    )


def against_steps(losses: dict, scores: dict, title: str, size=(8.4, 4.2)) -> None:
    """Two panels: on the left losses along the way, on the right scores at the end of
    runs of several lengths. Both are {label: {steps: values, one a seed}}: a line goes
    through the means; each seed is a thin line on the left, a point on the right."""
    longest = max(max(by_steps) for by_steps in losses.values())
    loss, score = "validation loss\n(nats a token, log scale)", "test answers right (%)"
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=size)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
        left.set_title(f"On the way to {longest:,} steps", weight="normal")
        right.set_title("At the end of a run", weight="normal")
    left.set(xlabel="steps (log scale)", ylabel=loss, yscale="log")
    name_plainly(left.yaxis)
    right.set(xlabel="steps of the run (log scale)", ylabel=score)
    for ax, lines in ((left, losses), (right, scores)):
        ticks = sorted(set().union(*lines.values()))
        ax.set_xscale("log")
        apart = 0 if ax is left else 0.01 * np.log(2 * ticks[-1] / ticks[0])
        for number, (label, by_steps) in enumerate(lines.items()):
            look = {"color": COLOURS[number], "marker": MARKERS[number], "label": label}
            # a little apart, so that equal scores can be seen
            at = np.array([*by_steps]) * np.exp(apart * (number - (len(lines) - 1) / 2))
            means = [np.mean(values) for values in by_steps.values()]
            ax.plot(at, means, **look, linewidth=1.8, markersize=6, zorder=4)
            if ax is left:
                ax.plot(at, [*by_steps.values()], color=COLOURS[number], linewidth=0.7)
            else:
                for place, values in zip(at, by_steps.values()):
                    seed_points(ax, place, values, COLOURS[number], width=0)
        ax.margins(x=0.08)
        ax.set_xticks(ticks)
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
    with plt.rc_context(STYLE):
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    finish(right, legend=False)


DISTANCES = (8, 14, 22, 32, 44, 58, 74, 92, 112, 134)  # in points
# Right, left, up, down, the diagonals, and between these
TURNS = np.radians([0, 180, 90, 270, 45, 135, 315, 225, *np.arange(22.5, 360, 45)])
DIRECTIONS = np.stack([np.cos(TURNS), np.sin(TURNS)], 1)


def named_points(points: dict, title, xlabel, ylabel, marked=(), **options) -> None:
    """Points with their names beside them, each where it covers no other; a thin line
    leads from a name to its point where it stands apart.

    points: {name: (x, y)}; where y is a list of values, one a seed, the mark is at the
    mean, and each seed is a small point. marked: names drawn as orange circles; the
    others are grey crosses. options: logx= and size= of `axes`, the rest of `finish`.
    """
    look = {key: options.pop(key) for key in ("logx", "size") if key in options}
    save = options.pop("save", None)
    ax = axes(title, xlabel, ylabel, **look)
    for name, (x, y) in points.items():
        colour = ORANGE if name in marked else "#555555"
        if np.size(y) > 1:
            seed_points(ax, x, y, colour, width=0)
        points = points | {name: (x, np.mean(y))}
        shape = "o" if name in marked else "x"
        ax.plot(*points[name], shape, color=colour, label=name)
    ax.margins(x=0.15)
    ax.set(**options)
    ax.figure.draw_without_rendering()  # now points have their places on the page
    seeds = [part.get_offsets() for part in ax.collections]
    marks = ax.transData.transform(np.vstack([*points.values(), *seeds]))
    marks = [around(place, 5) for place in marks]
    names, lines = [], np.empty((0, 2))
    for name in sorted(points, key=lambda name: -points[name][1]):
        box, line = named(ax, name, points[name], marks, names, lines)
        names.append(box)
        lines = np.vstack([lines, line])
    finish(ax, legend=False, save=save)


def around(place, size):
    return Bbox([place - size, place + size])


def named(ax, name, point, marks, names, lines):
    """Write the name near its point, free of the boxes of all marks and names, and so
    that no line crosses a name, if there is such a place. lines: the points that these
    go through. Returns the name's box and its line's points."""
    place, pixels = ax.transData.transform(point), ax.figure.dpi / 72
    text = ax.annotate(name, point, xytext=(0, 0), textcoords="offset points")
    size = Text.get_window_extent(text).size
    text.remove()
    places = []
    for far, side in product(DISTANCES, DIRECTIONS):
        # from its middle, half its size lies before its corner or side
        away = side * far * pixels + np.clip(1.4 * side, -1, 1) * size / 2
        box = around(place + away, size / 2).padded(2)
        inside = ax.bbox.containsx(box.x0) and ax.bbox.containsx(box.x1)
        inside = inside and ax.bbox.containsy(box.y0) and ax.bbox.containsy(box.y1)
        if inside and not box.count_overlaps(marks + names):
            places.append((away / pixels, box, leader(box, place, far)))
    if not places:
        raise ValueError(f"no free place for the name {name!r}: make the figure larger")

    def clear(place):
        _, box, line = place
        return not within(box, lines) and not any(
            within(other, line) for other in names
        )

    away, box, line = next(filter(clear, places), places[0])
    write_beside(ax, name, point, away, len(line) > 0)
    return box, line


def leader(box, place, far):
    """Points along the line from a name's box to its point, if that stands apart."""
    middle = box.min + box.size / 2
    steps = int(np.hypot(*(place - middle)) // 3) if far > DISTANCES[0] else 0
    line = np.linspace(middle, place, steps)
    return line[[not box.contains(*at) for at in line]] if steps else line


def within(box, line):
    """Whether a box has one of these points in it."""
    return bool(((line > box.min) & (line < box.max)).all(1).any())


def write_beside(ax, name, point, away, with_line):
    ax.annotate(
        name,
        point,
        xytext=away,
        textcoords="offset points",
        ha="center",
        va="center",
        arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7}
        if with_line
        else None,
    )


def matrices(parts: list, title: str, note: str = "") -> None:
    """A row of matrices drawn to scale. parts: strings ("=", "+ α/r ·") and (name,
    rows, columns, colour, caption)."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8, 2.9))
    at, tallest = 0.0, max(part[1] for part in parts if not isinstance(part, str))
    gap = 0.09 * tallest
    for part in parts:
        if isinstance(part, str):
            ax.text(at, 0, part, ha="left", va="center", fontsize=15)
            at += gap + 0.062 * tallest * len(part)
            continue
        name, rows, columns, colour, caption = part
        thick = min(rows, columns) > 0.15 * tallest  # the name fits inside
        ax.add_patch(
            Rectangle(
                (at, -rows / 2),
                columns,
                rows,
                facecolor=colour,
                alpha=0.85,
                edgecolor="black",
            )
        )
        ax.text(
            at + columns / 2,
            0,
            name,
            ha="center",
            va="center",
            fontsize=13,
            color=letters_on(colour) if thick else "black",
            weight="bold",
        )
        ax.text(
            at + columns / 2,
            -rows / 2 - 0.07 * tallest,
            caption,
            ha="center",
            va="top",
            fontsize=10,
        )
        at += columns + gap
    ax.set(xlim=(-gap, at), ylim=(-0.78 * tallest, 0.58 * tallest), aspect="equal")
    with plt.rc_context(STYLE):
        ax.set_title(title)
    ax.axis("off")
    if note:
        ax.text(
            at / 2,
            -0.76 * tallest,
            note,
            ha="center",
            va="bottom",
            fontsize=10,
            color="#444444",
        )
    finish(ax, legend=False)


def boxes(places: dict, arrows: list, title: str, size=(8, 3.2)) -> None:
    """A drawing of boxes and arrows. places: {label: (x, y, width, colour)}, x and y
    the middle of a box, a colour of None for words without a box; arrows: [(label,
    label)] or [(label, label, colour)], from box to box."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=size)
        ax.set_title(title)
    tall, drawn = 0.62, []
    for label, (x, y, width, colour) in places.items():
        if colour:
            box = Rectangle((x - width / 2, y - tall / 2), width, tall, zorder=2)
            box.set(facecolor=colour, alpha=0.85, edgecolor="black")
            drawn.append(ax.add_patch(box))
        ax.text(
            x,
            y,
            label.strip(),
            ha="center",
            va="center",
            fontsize=10,
            zorder=3,
            color=letters_on(colour) if colour else "black",
        )
    frame(ax)
    ax.figure.draw_without_rendering()  # now words have their size on the page
    words = [Text.get_window_extent(text).height for text in ax.texts]
    pixels = ax.transData.transform((0, 1))[1] - ax.transData.transform((0, 0))[1]
    tall = max(tall, 1.2 * max(words) / pixels)
    for box in drawn:
        box.set(y=box.get_y() - (tall - box.get_height()) / 2, height=tall)
    for start, end, *colour in arrows:
        (x0, y0, w0, _), (x1, y1, w1, _) = places[start], places[end]
        if y0 == y1:
            x0, x1 = (
                (x0 + w0 / 2, x1 - w1 / 2) if x0 < x1 else (x0 - w0 / 2, x1 + w1 / 2)
            )
        else:
            y0, y1 = (
                (y0 + tall / 2, y1 - tall / 2)
                if y0 < y1
                else (y0 - tall / 2, y1 + tall / 2)
            )
        ax.annotate(
            "",
            (x1, y1),
            (x0, y0),
            zorder=1,
            arrowprops={
                "arrowstyle": "-|>",
                "color": (colour or ["black"])[0],
                "linewidth": 1.3,
            },
        )
    frame(ax)
    finish(ax, legend=False)


def frame(ax) -> None:
    """All that is drawn, to scale, and no axes."""
    ax.relim()
    ax.autoscale_view()
    ax.margins(0.04, 0.12)
    ax.set_aspect("equal")
    ax.axis("off")


def heat(
    values,
    rows: list,
    columns: list,
    title: str,
    xlabel: str,
    ylabel: str,
    form="{:.0f}",
    top=None,
) -> None:
    """A grid of numbers, coloured and written out; top: from here on all are coloured
    alike."""
    values = np.asarray(values, float)
    if top is not None:
        top = max(top, np.nanmin(values))
    ax = axes(
        title, xlabel, ylabel, size=(1.6 + 0.75 * len(columns), 1.4 + 0.5 * len(rows))
    )
    ax.imshow(values, cmap="viridis", aspect="auto", vmax=top)
    ax.set(
        xticks=range(len(columns)),
        xticklabels=columns,
        yticks=range(len(rows)),
        yticklabels=rows,
    )
    middle = (np.nanmin(values) + (top or np.nanmax(values))) / 2
    for (i, j), value in np.ndenumerate(values):
        ax.text(
            j,
            i,
            form.format(value),
            ha="center",
            va="center",
            color="white" if value < middle else "black",
        )
    ax.grid(visible=False)
    finish(ax)


def approx(number: float, form: str = "{:.2f}") -> str:
    """A number that training has made: its last digits depend on the processor. `≈`
    tells readers and tests so."""
    return "≈ " + form.format(number)


# What a cell of numbers holds: 1,200, ≈ 0.15, +60 %, 5.8 GB, 3.0 ± 2.0, 1e-4
DIGITS = r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
UNIT = r" ?(?:%|°|[kMGT]?i?B|ms|s|min|points)"
NUMBER = re.compile(rf"(?:≈ ?)?[-+−]?{DIGITS}(?: ± {DIGITS})?(?:{UNIT})?")
MISSING = ("", "-", "–", "—")


def are_numbers(column) -> bool:
    """Whether a table's column holds numbers, those too that are written as texts, in
    **bold** say; some may be missing."""
    texts = [cell for cell in column if isinstance(cell, str) and cell not in MISSING]
    written = all(NUMBER.fullmatch(text.strip("*")) for text in texts)
    return written and any(cell not in MISSING for cell in column)


def table(rows: list, header: list) -> Markdown:
    """A table; columns of numbers are set right, texts left and on one line."""
    text = [
        [
            cell.replace("\n", " ") if isinstance(cell, str) else f"{cell:,}"
            for cell in row
        ]
        for row in rows
    ]
    marks = ["---:" if are_numbers(column) else "---" for column in zip(*rows)]
    lines = [header, marks or ["---"] * len(header), *text]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))
