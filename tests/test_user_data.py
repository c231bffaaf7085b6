"""Users' files: what a record becomes, and what is wrong with which line."""

import json
import os

import pytest
from transformers import PreTrainedTokenizerFast

from minipeft.lm import load_tokenizer
from minipeft.lm.chat import ChatError, answers, prompt_text, render
from minipeft.lm.data import DataError, encode, load_data
from minipeft.lm.tokenizer import Tokenizer, train_tokenizer
from minipeft.lm.user_data import join, read_user_file, trim

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' +"
    " message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content | trim }} [/INST]{% elif m.role == 'assistant' %}"
    "{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
INDENTED = """
{%- for m in messages %}
    {%- if loop.index0 % 2 == 0 %}
        {{- '<q>' + m['content'] + '</q>' }}
    {%- else %}
        {{- '<a>' + m['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<a>' }}
{%- endif %}
"""
TALK = [
    {"role": "user", "content": "How many?  "},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "<b>Sure?</b>"},
    {"role": "assistant", "content": "Yes,\nthree."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["how many are there? three, surely three"] * 20, 400)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def theirs(tokenizer, template):
    names = {
        f"{name}_token": tokenizer.raw.id_to_token(
            getattr(tokenizer, f"{name}_token_id")
        )
        for name in ("bos", "eos", "pad")
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.raw, chat_template=template, **names
    )


class TestChatTemplates:
    @pytest.mark.parametrize("template", [CHATML, LLAMA2, INDENTED])
    @pytest.mark.parametrize("ask", [False, True])
    def test_text_is_transformers(self, tokenizer, template, ask):
        for length in range(1, 5):
            options = {"add_generation_prompt": ask}
            expected = theirs(tokenizer, template).apply_chat_template(
                TALK[:length], tokenize=False, **options
            )
            text = render(
                TALK[:length], template, bos_token="<s>", eos_token="</s>", **options
            )
            assert text == expected

    @pytest.mark.parametrize("template", [CHATML, LLAMA2, INDENTED, None])
    def test_answers_alone_are_learnt(self, tokenizer, template):
        tokenizer = Tokenizer(tokenizer.raw, chat_template=template)
        found = answers(TALK, tokenizer)
        assert [completion.strip() for _, completion in found] == (
            ["Three.<|im_end|>", "Yes,\nthree.<|im_end|>"]
            if template == CHATML
            else ["Three.", "Yes,\nthree."]
        )
        for prompt, _ in found:
            assert not prompt.startswith("<s>")  # encode puts it there
        assert found[1][0].startswith(found[0][0])
        assert prompt_text(TALK[:3], tokenizer) == found[1][0]

    def test_ids_are_transformers(self, tokenizer):
        """Where the template ends an answer with the end token, as Llama's does."""
        ours = Tokenizer(tokenizer.raw, chat_template=INDENTED)
        (prompt, completion), _ = answers(TALK, ours)
        Example = type("Example", (), {"prompt": prompt, "completion": completion})
        ids, labels = encode(ours, Example, None)
        expected = theirs(tokenizer, INDENTED).apply_chat_template(TALK[:2])
        expected = getattr(expected, "input_ids", expected)
        assert ids == [ours.bos_token_id, *expected]

    @pytest.mark.parametrize(
        "template, message",
        [
            ("{{ raise_exception('no system') }}", "no system"),
            ("{% for %}", "refuses"),
            ("{{ messages.__class__.__mro__ }}", "unsafe"),
            ("{{ messages.append(1) }}", "unsafe"),
            ("{{ 1 / 0 }}", "division"),
        ],
    )
    def test_what_a_template_may_not(self, template, message):
        with pytest.raises(ChatError, match=message):
            render(TALK, template)

    def test_a_saved_tokenizer_keeps_its_template(self, tokenizer, tmp_path):
        Tokenizer(tokenizer.raw, chat_template=CHATML).save_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).chat_template == CHATML
        tokenizer.save_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).chat_template is None
        (tmp_path / "chat_template.jinja").write_text(LLAMA2)
        assert load_tokenizer(tmp_path).chat_template == LLAMA2

    @pytest.mark.parametrize("names", [["tool_use"], ["rag", "it's"], ["Default"]])
    def test_several_templates_without_a_default(self, tokenizer, tmp_path, names):
        """No other is taken in its place; transformers refuses, too."""
        tokenizer.save_pretrained(tmp_path)
        several = [{"name": name, "template": CHATML} for name in names]
        config = {"bos_token": "<s>", "chat_template": several}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours = load_tokenizer(tmp_path)
        assert ours.encode("three")
        words = f"refuses it: none of {', '.join(names)} is called default"
        with pytest.raises(ChatError, match=words):
            prompt_text(TALK[:1], ours)
        several.append({"name": "default", "template": LLAMA2})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(tmp_path).chat_template == LLAMA2


class TestRecords:
    @pytest.mark.parametrize(
        "row, expected",
        [
            ({"text": " as it is \n"}, ("", " as it is \n")),
            ({"prompt": "What?", "completion": "It."}, ("What?", " It.")),
            ({"prompt": "What? ", "completion": "It."}, ("What?", " It.")),
            ({"prompt": "What?  ", "completion": " It. "}, ("What?", " It. ")),
            ({"prompt": "What?\n", "completion": "It.\n"}, ("What?\n", "It.\n")),
            (
                {"prompt": "def f(x):\n", "completion": "    return x\n\n"},
                ("def f(x):\n", "    return x\n\n"),
            ),
            (
                {"prompt": "def f(x):\n    ", "completion": "return x"},
                ("def f(x):\n    ", "return x"),
            ),
            ({"prompt": "a:", "completion": "\n\tb"}, ("a:", "\n\tb")),
            (
                {"instruction": "Count.", "output": "1 2"},
                ("User: Count.\nAssistant:", " 1 2"),
            ),
            (
                {"instruction": "Add.", "input": "1 2", "output": "3"},
                ("User: Add.\n\n1 2\nAssistant:", " 3"),
            ),
            (
                {"instruction": "Add.", "input": "", "output": "3"},
                ("User: Add.\nAssistant:", " 3"),
            ),
        ],
    )
    def test_what_it_becomes(self, tmp_path, row, expected):
        path = write(tmp_path / "a.jsonl", row)
        assert read_user_file(path) == [(*expected, 1)]

    @pytest.mark.parametrize("prompt", ["a", "a ", "a\n", "a\n  ", " ", "a  "])
    def test_generate_treats_a_prompt_as_training_did(self, prompt):
        assert trim(prompt) == join(prompt, "b")[0]

    def test_a_conversation_is_a_record_for_each_answer(self, tmp_path):
        path = write(tmp_path / "a.jsonl", {"messages": TALK})
        assert read_user_file(path) == [
            ("User: How many?  \nAssistant:", " Three.", 1),
            (
                "User: How many?  \nAssistant: Three.\nUser: <b>Sure?</b>\nAssistant:",
                " Yes,\nthree.",
                1,
            ),
        ]

    def test_csv(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_bytes(
            b'\xef\xbb\xbfprompt,completion,note\r\nWhat?,"It, and\r\n""that""",x\r\n'
            b"Who?,Me,\r\n"
        )
        assert read_user_file(path) == [
            ("What?", ' It, and\n"that"', 3),
            ("Who?", " Me", 4),
        ]
        path.write_text("".join(f"{i},{i * i}\n" for i in range(9)))
        with pytest.raises(DataError, match="a.csv, line 2: expected"):
            load_data(path)
        path.write_text(
            "instruction,output\n" + "".join(f"{i}?,{i * i}\n" for i in range(9))
        )
        assert len(load_data(path).train) == 7

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"messages": "hello"}, "messages: expected a list"),
            ({"messages": [{"role": "user"}]}, "messages: expected a list"),
            ({"messages": ["hello"]}, "messages: expected a list"),
            ({"messages": [{"role": 1, "content": "x"}]}, "messages: expected a list"),
            ({"messages": TALK[:1]}, "nothing is learnt"),
            (
                {"messages": [{"role": "usr", "content": "x"}, *TALK]},
                r"messages: unknown role 'usr' \(did you mean 'user'\?\)",
            ),
            (
                {"messages": [*TALK, {"role": "Assistent", "content": "x"}]},
                r"unknown role 'Assistent' \(did you mean 'assistant'\?\)",
            ),
            (
                {"messages": [{"role": "human", "content": "x"}, *TALK]},
                "unknown role 'human'; expected one of system, developer, user,"
                " assistant, tool",
            ),
            ({"messages": []}, "expected {.text"),
            ({"instruction": "x"}, "expected {.text"),
            ({"instruction": "x", "output": ["y"]}, "expected {.text"),
            ({"prompt": "x", "completion": "\ud800"}, "lone surrogate"),
            ({"text": "a\udfffb"}, "lone surrogate"),
            ({"instruction": "\ud83d", "output": "y"}, "lone surrogate"),
            ([[1]] * 3, "expected {.text"),
        ],
    )
    def test_what_is_refused(self, tmp_path, row, message):
        path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, row)
        with pytest.raises(DataError, match=f"a.jsonl, line 2: .*{message}"):
            load_data(path)

    @pytest.mark.parametrize("role", ["system", "developer", "tool"])
    def test_roles_beside_user_and_assistant(self, tmp_path, role):
        row = {"messages": [{"role": role, "content": "Be brief."}, *TALK]}
        prompt, _, _ = read_user_file(write(tmp_path / "a.jsonl", row))[0]
        assert prompt.startswith(f"{role.capitalize()}: Be brief.\n")

    @pytest.mark.parametrize(
        "name, content, found, parts",
        [
            ("a.txt", "One long line. " * 9000, "1 text,", "each line is a text"),
            ("a.txt", "same\n\n" * 40, "1 text,", "Blank lines separate texts.*"),
            ("a.txt", "one\n\ntwo\n\n", "2 texts,", ".*fewer than 10 paragraphs.*"),
            (
                "a.jsonl",
                '{"prompt": "a", "completion": "b"}\n' * 9,
                "1 prompt,",
                "Each line holds one record",
            ),
            ("a.csv", "text\none\ntwo\n", "2 texts,", "Each row holds one record"),
            ("a.csv", "prompt,completion\n", "0 texts,", "Each row holds one record"),
        ],
    )
    def test_too_few_texts(self, tmp_path, name, content, found, parts):
        """How many were found, how many are needed, and what separates them."""
        (tmp_path / name).write_text(content)
        words = f"{name}: found {found}.* at least 3.* {parts}$"
        with pytest.raises(DataError, match=words):
            load_data(tmp_path / name)

    def test_a_line_that_is_too_long_says_what_separates_texts(self, tmp_path):
        (tmp_path / "a.txt").write_text("x" * 1_000_001)
        with pytest.raises(DataError, match=r"1,000,000\)\. Blank lines separate"):
            load_data(tmp_path / "a.txt")

    def test_deep_nesting(self, tmp_path):
        (tmp_path / "a.jsonl").write_text("[" * 100_000)
        with pytest.raises(DataError, match="line 1: JSON nested too deeply|not JSON"):
            load_data(tmp_path / "a.jsonl")

    @pytest.mark.parametrize(
        "text, message",
        [
            ("prompt,completion\na,b,c\n", "line 2: more fields"),
            ('prompt,completion\n"a,b\n', "line 2: unexpected end"),
            ("prompt,completion\na,\n", "line 2: expected"),
            ("prompt,completion\n" + "x" * 200_000 + ",b\n", "line 2: .*limit"),
        ],
    )
    def test_a_wrong_csv(self, tmp_path, text, message):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            load_data(tmp_path / "a.csv")

    @pytest.mark.parametrize(
        "record, message",
        [
            ({"text": "a", "prompt": "b", "completion": "c"}, "text and prompt/compl"),
            (  # as Alpaca's
                {"instruction": "a", "input": "", "output": "b", "text": "c"},
                "text and instruction/output",
            ),
            (
                {"messages": TALK, "prompt": "b", "completion": "c"},
                "prompt/completion and messages",
            ),
            ({"instruction": "a", "input": 5, "output": "b"}, "input: expected a text"),
            (
                {"instruction": "a", "input": ["c"], "output": "b"},
                "input: expected a text",
            ),
            (
                {"messages": [TALK[0], TALK[1] | {"weight": 0}]},
                "weight = 0 is not built: every answer",
            ),
            (
                {"messages": [TALK[0], TALK[1] | {"tool_calls": [{"id": 1}]}]},
                "tool_calls is not built: write the call as content",
            ),
            (
                {"messages": [TALK[0], TALK[1] | {"function_call": {"name": "f"}}]},
                "function_call is not built: write the call as content",
            ),
            (
                {"messages": [TALK[0], TALK[1] | {"train": False}]},
                "train = False is not built: every answer",
            ),
            ({"text": "a", "prompt": "b"}, "holds text and prompt, and only one"),
            (
                {"text": "a", "instruction": "b", "input": "c"},
                "holds text and instruction and input, and only one",
            ),
            ({"messages": TALK, "prompt": "b"}, "holds messages and prompt,"),
            ({"messages": TALK, "tools": [{"a": 1}]}, "holds messages and tools,"),
            (
                {"instruction": "a", "output": "b", "system": "c", "history": [[]]},
                "holds instruction/output and system and history,",
            ),
            (
                {"prompt": "a", "completion": "b", "input": 5},
                "holds prompt/completion and input,",
            ),
        ],
    )
    def test_what_would_be_ignored(self, tmp_path, record, message):
        good = {"instruction": "a", "input": None, "output": "b", "id": 1}
        lines = [json.dumps(one) for one in (good, record)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        with pytest.raises(DataError, match=f"line 2.* {message}"):
            read_user_file(tmp_path / "a.jsonl", load_tokenizer("lanternwick"))

    @pytest.mark.parametrize("nothing", [None, "", " ", [], {}])
    def test_a_field_that_holds_nothing_is_ignored(self, tmp_path, nothing):
        rows = [
            {"text": "a", "prompt": nothing, "output": nothing, "tools": nothing},
            {"text": "b", "input": nothing, "messages": nothing, "title": "c"},
        ]
        found = read_user_file(write(tmp_path / "a.jsonl", *rows))
        assert [text for _, text, _ in found] == ["a", "b"]
        kept = [TALK[0], TALK[1] | {"train": True, "weight": 1, "tool_calls": nothing}]
        assert read_user_file(write(tmp_path / "a.jsonl", {"messages": kept}))

    @pytest.mark.parametrize(
        "name, text, message",
        [
            ("a.csv", "text,text\na,b\n", "two columns are called 'text'"),
            ("a.csv", "prompt,completion,prompt\na,b,c\n", "called 'prompt'"),
            ("a.csv", "\ufefftext,id,text\na,b,c\n", "called 'text'"),
            ("a.csv", "instruction,input,output,input\na,b,c,d\n", "called 'input'"),
            ("a.jsonl", '{"text": "a", "text": "b"}', "'text' stands twice"),
            (
                "a.jsonl",
                '{"messages": [{"role": "user", "role": "system", "content": "a"}]}',
                "line 1.*'role' stands twice in one object.* Each line holds",
            ),
        ],
    )
    def test_what_stands_twice(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_user_file(tmp_path / name)

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_line_ends(self, tmp_path, end):
        rows = {
            "a.csv": ["prompt,completion", "a,b", "c,d", "e,f"],
            "a.jsonl": ['{"prompt": "a", "completion": "b"}'] * 3,
            "a.txt": ["a", "b", "c"],
        }
        for name, lines in rows.items():
            (tmp_path / name).write_bytes("".join(x + end for x in lines).encode())
            found = read_user_file(tmp_path / name)
            assert len(found) == 3
            assert not any("\r" in text for row in found for text in row[:2])

    def test_a_link_to_nowhere(self, tmp_path):
        (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
        with pytest.raises(DataError, match="cannot read") as caught:
            load_data(tmp_path / "a.jsonl")
        assert "did you mean" not in str(caught.value)

    def test_columns_without_a_name(self, tmp_path):
        (tmp_path / "a.csv").write_text(",text,\n1,a,\n2,b,\n")
        assert [text for _, text, _ in read_user_file(tmp_path / "a.csv")] == ["a", "b"]

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
    def test_a_zero_byte_in_the_name(self, suffix):
        with pytest.raises(DataError, match=r"cannot read a\\x00b.*null"):
            load_data(f"a\0b{suffix}")

    @pytest.mark.parametrize("suffix", [".txt", ".csv", ".xlsx", ""])
    def test_a_name_that_is_too_long(self, suffix):
        with pytest.raises(DataError, match="File name too long|no data set"):
            load_data("a" * 300 + suffix)

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
    def test_what_is_not_a_file_does_not_hang(self, tmp_path, suffix):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        with pytest.raises(DataError, match="is a pipe; expected a file"):
            load_data(tmp_path / f"pipe{suffix}")
        (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
        with pytest.raises(DataError, match="is a device; expected a file"):
            load_data(tmp_path / f"zero{suffix}")
        (tmp_path / f"folder{suffix}").mkdir()
        with pytest.raises(DataError, match="is a folder; expected a file"):
            load_data(tmp_path / f"folder{suffix}")
