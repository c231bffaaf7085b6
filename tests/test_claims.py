"""Every quoted claim has one source, one home and one verdict."""

import ast
import json
from pathlib import Path

import pytest

from minipeft.course import claim
from minipeft.course.claims import load_claims, page, typeset

CHAPTERS = Path(__file__).parents[1] / "chapters"
NOTEBOOKS = [*sorted(CHAPTERS.glob("[0-9][0-9]_*.ipynb")), CHAPTERS / "claims.ipynb"]
CLAIMS = load_claims()["claims"]


def names_judged(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code" and "claim(" in "".join(cell["source"]):
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if (
                    isinstance(node, ast.Call)
                    and getattr(node.func, "id", "") == "claim"
                ):
                    yield ast.literal_eval(node.args[0])


class TestHomes:
    @pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
    def test_a_notebook_judges_the_claims_that_are_at_home_in_it(self, notebook):
        home = "claims" if notebook.stem == "claims" else notebook.name[:2]
        expected = [name for name, entry in CLAIMS.items() if entry["home"] == home]
        assert sorted(names_judged(notebook)) == sorted(expected)

    def test_at_most_eight_claims_stand_in_a_chapter(self):
        for notebook in NOTEBOOKS[:-1]:
            assert len(list(names_judged(notebook))) <= 8, notebook.name

    def test_what_is_pending_has_a_chapter_to_come(self):
        ready = {path.name[:2] for path in NOTEBOOKS}
        for name, entry in CLAIMS.items():
            assert entry.get("pending", False) == (
                entry["home"] not in {*ready, "claims"}
            ), name

    def test_no_sentence_is_judged_twice(self):
        words = [
            " ".join(e.get("quote", e.get("statement")).lower().split())
            for e in CLAIMS.values()
        ]
        for i, one in enumerate(words):
            for other in words[i + 1 :]:
                assert one not in other and other not in one, (one, other)


class TestQuotations:
    def test_every_source_has_a_title_and_is_used(self):
        sources = load_claims()["sources"]
        assert all(source["title"] for source in sources.values())
        assert {e["source"] for e in CLAIMS.values() if "quote" in e} == set(sources)

    def test_what_nobody_said_stands_in_no_quotation_marks(self):
        for name, entry in CLAIMS.items():
            assert ("quote" in entry) != ("statement" in entry), name
            text = claim(name, "computed", True).data
            assert text.startswith("> “" if "quote" in entry else "> "), name
            assert ("“" in text.split("\n")[0]) == ("quote" in entry), name

    def test_notebooks_name_no_source_beside_the_file(self):
        for notebook in NOTEBOOKS:
            for name in names_judged(notebook):
                assert name in CLAIMS, (notebook.name, name)

    def test_formulas_are_typeset_and_nothing_else_changes(self):
        def words(text):
            for mark in ("\\(", "\\)", "$", " "):
                text = text.replace(mark, "")
            for name, bar in (("\\Vert", "\\|"), ("\\vert", "|")):
                text = text.replace(name, bar)
            return text

        for name, entry in CLAIMS.items():
            quote = entry.get("quote", "")
            shown = typeset(quote)
            assert words(shown) == words(quote), name
            assert "\\" not in "".join(shown.split("$")[::2]), name
            assert ("$" in shown) == ("\\" in quote), name
            formulas = shown.split("$")[1::2]
            assert all(f == f.strip() and "|" not in f for f in formulas), name


class TestCards:
    def test_the_three_verdicts_look_different(self):
        name = next(iter(CLAIMS))
        right = claim(name, "4", True).data
        wrong = claim(name, "4", False).data
        depends = claim(name, "4", "DEPENDS", "On the day.").data
        assert "✅ RIGHT" in right and "❌ WRONG" in wrong and "⚖️ DEPENDS" in depends
        assert "On the day." in depends

    def test_wrong_arguments_are_named(self):
        name = next(iter(CLAIMS))
        with pytest.raises(ValueError, match=f"did you mean '{name}'"):
            claim(name + "x", "4", True)
        with pytest.raises(ValueError, match="DEPENDS must say on what"):
            claim(name, "so so", "DEPENDS")
        with pytest.raises(ValueError, match="expected True, False or one of"):
            claim(name, "so so", "PERHAPS", "why")


def test_the_page_of_claims_is_up_to_date():
    """`make chapters` writes it."""
    written = (CHAPTERS / "claims.md").read_text(encoding="utf-8")
    assert written == page(CHAPTERS)
