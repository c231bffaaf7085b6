"""A user's own file, read into prompts and completions.

    my.txt      plain text: paragraphs, or single lines where there are few
    my.jsonl    one record a line
    my.csv      one record a row, its header names the fields

A record is one of

    {"text": ...}
    {"prompt": ..., "completion": ...}
    {"instruction": ..., "input": ..., "output": ...}     "input" may be absent
    {"messages": [{"role": "user", "content": ...}, ...]}

Instructions and messages go through the tokenizer's chat template; of a conversation
only the assistant's answers are learnt. Whatever is wrong is a DataError that names
file and line.
"""

import csv
import io

from ..io import brief, check_choice, parse_json, read_bytes
from .chat import ROLES, ChatError, answers
from .fetch import DataError

LONGEST_LINE = 1_000_000  # characters; what is longer is not text that somebody wrote
SUFFIXES = (".txt", ".jsonl", ".csv")
FEW = 10  # paragraphs
# fields of a record, besides messages; of several only one can be learnt
FORMS = (("text",), ("prompt", "completion"), ("instruction", "output"))
FIELDS = [*(field for form in FORMS for field in form), "input"]
# fields that change what a record means to other programs, and are not built here
OTHERS = ("system", "history", "tools", "functions", "conversations", "rejected")
PARTS = {
    ".txt": "Blank lines separate texts; in a file with fewer than"
    f" {FEW} paragraphs each line is a text",
    ".jsonl": "Each line holds one record",
    ".csv": "Each row holds one record",
}
EXPECTED = (
    '{"text": "..."}, {"prompt": "...", "completion": "..."}, {"instruction": "...",'
    ' "output": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]},'
    " none empty"
)


def read_user_file(path, tokenizer=None):
    """[(prompt, completion, line number)]; a text is a completion without a prompt."""
    if path.suffix == ".txt":
        texts = paragraphs(path)
        if len(texts) < FEW:
            texts = [(number, line) for number, line in lines_of(path) if line.strip()]
        return [("", text, number) for number, text in texts]
    rows = csv_rows(path) if path.suffix == ".csv" else json_rows(path)
    records = []
    for number, row in rows:
        where = f"{path}, line {number}"
        for prompt, completion in pairs(row, where, tokenizer):
            records.append((prompt, completion, number))
    for prompt, _, number in records:
        if bool(prompt) != bool(records[0][0]):
            raise DataError(
                f"{path}, line {number}: a text among prompts, or a prompt among texts"
            )
    return records


def json_rows(path):
    """Yields (line number, what the line holds)."""
    for number, line in lines_of(path):
        if not line.strip():
            continue
        yield number, parse_json(line, f"{path}, line {number}", object, refuse_line)


def refuse_line(problem):
    """A DataError that says what a line should hold."""
    return DataError(f"{problem}. {PARTS['.jsonl']}")


def csv_rows(path):
    """Yields (number of the row's last line, {column: text})."""
    text = "\n".join(line for _, line in lines_of(path))
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        columns = rows.fieldnames or []
        for other in (
            mark for mark in ";\t|" if [mark in c for c in columns] == [True]
        ):
            raise DataError(
                f"{path}, line 1: found {brief(columns[0])}, whose fields are separated"
                f" by {other!r}: expected commas"
            )
        twice = [name for name in FIELDS if columns.count(name) > 1]
        if twice:
            raise DataError(f"{path}: two columns are called {brief(twice[0])}")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row:
                raise DataError(f"{where}: more fields than the header has")
            yield rows.line_num, row
    except csv.Error as error:
        line = rows.reader.line_num
        raise DataError(f"{path}, line {line}: {error}") from None


def pairs(row, where, tokenizer=None):
    """One record -> [(prompt, completion)]."""

    def filled(key):
        return isinstance(row.get(key), str) and has(row, key)

    if not isinstance(row, dict):
        raise DataError(f"{where}: expected {EXPECTED}; found {brief(row)}")
    forms = [form for form in FORMS if all(map(filled, form))]
    if has(row, "messages"):
        forms.append(("messages",))
    if not forms:
        raise DataError(f"{where}: expected {EXPECTED}; found {brief(row)}")
    used = {field for form in forms for field in form}
    if "output" in used:
        used.add("input")
    forms += [(f,) for f in (*FIELDS, *OTHERS) if f not in used and has(row, f)]
    if len(forms) > 1:
        names = " and ".join("/".join(form) for form in forms)
        raise DataError(
            f"{where}: holds {names}, and only one of them can be learnt: remove the"
            " other fields"
        )
    try:
        if forms == [("text",)]:
            found = [("", row["text"])]
        elif forms == [("prompt", "completion")]:
            found = [join(row["prompt"], row["completion"])]
        elif forms == [("messages",)]:
            found = answers(check_messages(row["messages"], where), tokenizer)
        else:
            turns = [("user", question(row, where)), ("assistant", row["output"])]
            messages = [{"role": role, "content": text} for role, text in turns]
            found = answers(messages, tokenizer)
    except ChatError as error:
        raise DataError(f"{where}: {error}") from None
    for text in (text for pair in found for text in pair):
        check_unicode(text, where)
    return found


def has(row, field):
    """True if a record's field holds anything."""
    value = row.get(field)
    return bool(value.strip() if isinstance(value, str) else value)


def question(row, where):
    """The instruction, with its input if there is one."""
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise DataError(f"{where}: input: expected a text; found {brief(given)}")
    if given and given.strip():
        return f"{row['instruction']}\n\n{given}"
    return row["instruction"]


def check_messages(messages, where):
    """The messages, if each has a content that is text, and one of ROLES."""

    def refuse(reason):
        return DataError(f"{where}: messages: {reason}")

    def is_message(one):
        if not isinstance(one, dict):
            return False
        texts = one.get("role"), one.get("content")
        return all(isinstance(text, str) and text for text in texts)

    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise refuse(
            'expected a list of {"role": "user", "content": "..."}; found'
            f" {brief(messages)}"
        )
    for message in messages:
        check_choice("role", message["role"], ROLES, refuse)
        for field in ("weight", "train"):
            if message.get(field) not in (None, 1):
                raise refuse(
                    f"{field} = {brief(message[field])} is not built: every answer of"
                    " the assistant is learnt"
                )
        for field in ("tool_calls", "function_call"):
            if has(message, field):
                raise refuse(f"{field} is not built: write the call as content")
    return messages


def check_unicode(text, where):
    """DataError if the text cannot be written as UTF-8: half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text[error.start]!a} is half of a character (a lone surrogate);"
            " write the file as UTF-8"
        ) from None


def trim(prompt):
    """A prompt without spaces at its end, since a word carries the space before it.
    Spaces that begin a line stay: they are indentation."""
    stripped = prompt.rstrip(" ")
    return prompt if stripped == "" or stripped.endswith("\n") else stripped


def join(prompt, completion):
    """(prompt, completion) with the space between them, if one is missing, before the
    completion. Newlines and indentation at the border stay as they are."""
    trimmed = trim(prompt)
    if trimmed and not trimmed[-1].isspace() and not completion[0].isspace():
        completion = " " + completion
    return trimmed, completion


def lines_of(path):
    """Yields (number, line) of a UTF-8 file."""
    raw = read_bytes(path, DataError).removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise DataError(f"{path} is empty")
    if b"\n" not in raw:  # some spreadsheets end lines so
        raw = raw.replace(b"\r", b"\n")
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            line = line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not UTF-8 (0x{line[error.start]:02x} at byte"
                f" {error.start + 1} of the line). Save it as UTF-8, for example: iconv"
                " -f latin1 -t utf-8 old > new"
            ) from error
        if "\0" in line:
            raise DataError(
                f"{path}, line {number}: holds a zero byte; this is not UTF-8 text"
            )
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}, line {number}: too long, {len(line):,} characters (at most"
                f" {LONGEST_LINE:,}). {PARTS.get(path.suffix, '')}".rstrip(". ")
            )
        yield number, line


def paragraphs(path, enough=400):
    """[(line number, text)]: the file's paragraphs, short neighbours together until
    they are `enough` characters."""
    found = []
    open_lines = []
    for number, line in [*lines_of(path), (0, "")]:
        if line.strip() or open_lines:
            open_lines.append((number, line))
        length = sum(len(line) for _, line in open_lines)
        if line.strip() or not open_lines or (number and length < enough):
            continue
        text = "\n".join(line for _, line in open_lines).strip("\n")
        found.append((open_lines[0][0], text))
        open_lines = []
    return found
