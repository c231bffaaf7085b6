"""Data: real sets fetched and checked, a user's own files, rows, batches."""

import functools
import hashlib
import io
import json
import random
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pooch
import pytest
import torch
from test_training import Letters
from tolerance import printed, tolerance

from minipeft.lanternwick.scoring import chrf
from minipeft.lanternwick.tasks import Example
from minipeft.lm import fetch
from minipeft.lm.data import Batches, DataError, encode, load_data

BODY = random.Random(0).randbytes(300_000)


class Source(BaseHTTPRequestHandler):
    """A web server for one test; `server.plan` says what it does wrong, one entry a
    request."""

    def do_GET(self):
        self.server.requests += 1
        plan = self.server.plan.pop(0) if self.server.plan else "serve"
        if plan == "404":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(
            self.server.body[:100_000] if plan == "break" else self.server.body
        )

    def log_message(self, *args):
        pass


@pytest.fixture
def source(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Source)
    server.body, server.plan, server.requests = BODY, [], 0
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    server.url = f"http://127.0.0.1:{server.server_port}/thing.bin"
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    # pooch waits before it tries again
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(
        fetch,
        "SOURCES",
        {"set/thing.bin": (server.url, hashlib.sha256(BODY).hexdigest())},
    )
    server.cache = tmp_path / "cache" / "set"
    yield server
    server.shutdown()
    server.server_close()


def names(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


class TestFetching:
    def test_it_happens_once(self, source):
        path = fetch.fetch("set/thing.bin")
        assert path == source.cache / "thing.bin" and path.read_bytes() == BODY
        assert fetch.fetch("set/thing.bin") == path and source.requests == 1
        assert names(source.cache) == ["thing.bin"]

    def test_it_shows_its_progress(self, source, monkeypatch, capsys):
        # conftest turns all bars off
        bar = functools.partial(pooch.downloaders.tqdm, disable=False)
        monkeypatch.setattr(pooch.downloaders, "tqdm", bar)
        fetch.fetch("set/thing.bin")
        assert "300k/300k" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "plan", [["break"], ["404", "break"], ["break", "break"]], ids=str
    )
    def test_it_tries_three_times(self, source, plan):
        source.plan = [*plan]
        assert fetch.fetch("set/thing.bin").read_bytes() == BODY
        assert source.requests == len(plan) + 1

    @pytest.mark.parametrize(
        "plan, message",
        [
            (["404"] * 3, "the server answers 404 Not Found"),
            (["break"] * 3, "the connection broke"),
            (["404", "404", "break"], "the connection broke"),
        ],
        ids=str,
    )
    def test_what_fails_leaves_nothing_and_can_be_repeated(self, source, plan, message):
        source.plan = plan
        with pytest.raises(DataError, match=message):
            fetch.fetch("set/thing.bin")
        assert names(source.cache) == []
        assert fetch.fetch("set/thing.bin").read_bytes() == BODY

    @pytest.mark.parametrize("body", [BODY[:-1] + b"?", b"", BODY + b"!"], ids=len)
    def test_a_wrong_hash_is_not_kept(self, source, body):
        source.body = body
        with pytest.raises(DataError, match="hash"):
            fetch.fetch("set/thing.bin")
        assert names(source.cache) == []
        source.body = BODY
        assert fetch.fetch("set/thing.bin").read_bytes() == BODY

    def test_a_damaged_file_in_the_cache_is_named(self, source):
        source.cache.mkdir(parents=True)
        (source.cache / "thing.bin").write_bytes(b"half")
        with pytest.raises(DataError, match="thing.bin is not the file.*delete it"):
            fetch.fetch("set/thing.bin")
        assert source.requests == 0

    def test_offline_says_what_to_do(self, source, monkeypatch):
        monkeypatch.setattr(
            fetch,
            "SOURCES",
            {"set/thing.bin": ("http://127.0.0.1:9/thing.bin", "0" * 64)},
        )
        with pytest.raises(DataError) as error:
            fetch.fetch("set/thing.bin")
        for part in (
            "cannot fetch http://127.0.0.1:9/thing.bin: no connection",
            str(source.cache / "thing.bin"),
            "MINIPEFT_CACHE",
            "no network",
        ):
            assert part in str(error.value)

    @pytest.fixture
    def packed(self, source, monkeypatch):
        """Two files in a zip; (their contents, the zip's bytes)."""
        files = {"a.pos": b"fine film\n", "a.neg": b"dull film\n"}
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in files.items():
                archive.writestr(f"thing/{name}", content)
        url = source.url.replace(".bin", ".zip")
        hashes = {
            f"set/{name}": (url, hashlib.sha256(content).hexdigest())
            for name, content in files.items()
        }
        monkeypatch.setattr(fetch, "SOURCES", hashes)
        return files, packed.getvalue()

    def test_a_zip_gives_all_its_files_at_once(self, source, packed):
        files, source.body = packed
        for name, content in files.items():
            assert fetch.fetch(f"set/{name}").read_bytes() == content
        assert source.requests == 1
        assert names(source.cache) == sorted(files)
        assert names(source.cache.parent) == ["set"]

    @pytest.mark.parametrize("what", ["junk", "cut", "without a file", "changed"])
    def test_a_wrong_zip_leaves_nothing(self, source, packed, what):
        files, good = packed
        other = io.BytesIO()
        with zipfile.ZipFile(other, "w") as archive:
            archive.writestr("thing/a.pos", files["a.pos"])
            if what == "changed":
                archive.writestr("thing/a.neg", b"a fine film\n")
        source.body = {"junk": b"not a zip at all", "cut": good[:-30]}.get(
            what, other.getvalue()
        )
        message = {"without a file": "a.neg", "changed": "another set/a.neg"}
        with pytest.raises(DataError, match=message.get(what, "is not a zip")):
            fetch.fetch("set/a.pos")
        assert names(source.cache) == []
        assert names(source.cache.parent) == []


# ---- the real sets -------------------------------------------------------------------


@pytest.fixture
def cached(real, monkeypatch):
    monkeypatch.setenv("MINIPEFT_CACHE", str(real))
    return real


class TestPublicData:
    """The real sets."""

    def test_e2e_nlg(self, cached):
        cached / "e2e_nlg"
        task = load_data("e2e_nlg")
        assert (
            len(task.train) == 42061
            and len(task.test) == 630
            and len(task.valid) == 547
        )
        assert sum(len(e.meta["references"]) for e in task.test) == 4693
        prompts = [
            {e.prompt for e in part} for part in (task.train, task.valid, task.test)
        ]
        assert not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
        assert (
            task.test[0].prompt
            == "Record: name: Blue Spice ; type: coffee shop ; area: city centre\nText:"
        )
        assert (
            task.test[0].completion
            == " A coffee shop in the city centre area called Blue Spice."
        )
        some = task.test[:20]
        assert task.score([e.meta["references"][-1] for e in some], some) == {
            # exp of a mean of four logarithms of 100
            "bleu": pytest.approx(100, abs=tolerance(torch.float64, 460, terms=4))
        }
        import sacrebleu

        said = [e.meta["references"][0] + " Really." for e in some]
        most = max(len(e.meta["references"]) for e in some)
        # repeats change nothing
        streams = [
            [e.meta["references"][min(i, len(e.meta["references"]) - 1)] for e in some]
            for i in range(most)
        ]
        assert task.score(said, some)["bleu"] == pytest.approx(
            sacrebleu.corpus_bleu(said, streams).score, abs=printed(2)
        )
        references = [e.meta["references"] for e in some]
        assert chrf(said, references) == pytest.approx(
            sacrebleu.corpus_chrf(said, streams).score, abs=printed(2)
        )

    def test_sentence_polarity(self, cached):
        cached / "sentence_polarity"
        task = load_data("sentence_polarity")
        texts = [
            {e.prompt for e in part} for part in (task.train, task.valid, task.test)
        ]
        assert [len(t) for t in texts] == [8530, 1066, 1066] and len(
            set.union(*texts)
        ) == 10662
        assert {e.completion for e in task.test} == {" glad", " sad"} and load_data(
            "sentence_polarity"
        ).test == task.test
        assert 45 < task.score([" glad"] * 1066, task.test)["accuracy"] < 55

    def test_tinyshakespeare(self, cached):
        whole = (cached / "tinyshakespeare" / "input.txt").read_text()
        task = load_data("tinyshakespeare")
        blocks = [e.completion for e in task.train + task.valid + task.test]
        assert (
            "\n\n".join(blocks).split() == whole.split()
            and task.score is None
            and all(e.prompt == "" for e in task.test)
        )


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def records(n=20):
    return "".join(
        json.dumps({"prompt": f"What is {i % 12}? ", "completion": f"It is {i}."})
        + "\n"
        for i in range(n)
    )


class TestOwnFiles:
    """A user's own file."""

    def test_own_jsonl(self, tmp_path):
        path = write(tmp_path / "my.jsonl", records() + "\n")
        task, again = load_data(path), load_data(str(path))
        assert [
            len({e.prompt for e in part})
            for part in (task.train, task.valid, task.test)
        ] == [10, 1, 1]
        # equal prompts are in one split
        assert (
            len(
                {e.prompt for part in (task.train, task.valid, task.test) for e in part}
            )
            == 12
        )
        assert task.train == again.train and task.test == again.test
        example = task.train[0]
        assert (
            not example.prompt.endswith(" ")
            and example.completion.startswith(" It")
            and example.meta["file"] == str(path)
        )
        assert task.score([example.completion.strip()], [example]) == {"exact": 100.0}

    def test_own_text_by_paragraph(self, tmp_path):
        texts = [
            f"Paragraph {i}.\nIt has two lines, " + "and goes on " * 40
            for i in range(20)
        ]
        task = load_data(
            write(
                tmp_path / "my.txt",
                b"\xef\xbb\xbf"
                + "\r\n\r\n".join(t.replace("\n", "\r\n") for t in texts).encode(),
            )
        )
        parts = [
            [e.completion for e in part] for part in (task.train, task.valid, task.test)
        ]
        assert [len(p) for p in parts] == [16, 2, 2] and sorted(
            sum(parts, [])
        ) == sorted(texts)

    def test_own_text_by_line(self, tmp_path):
        task = load_data(
            write(tmp_path / "my.txt", "\n".join(f"line {i}" for i in range(12)))
        )
        assert len(task.train) == 10 and {
            e.meta["line"] for e in task.train + task.valid + task.test
        } == set(range(1, 13))
        assert {e.completion for e in task.train} <= {f"line {i}" for i in range(12)}

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("a.txt", b"", "a.txt is empty"),
            ("a.txt", b"  \n \n", "a.txt is empty"),
            (
                "a.txt",
                b"fine\nfine\ncaf\xe9\n",
                "a.txt, line 3: not UTF-8 .0xe9 at byte 4.*iconv",
            ),
            ("a.txt", "zwei\n".encode("utf-16"), "a.txt, line 1: not UTF-8"),
            ("a.txt", b"one\ntw\0o\n", "a.txt, line 2: holds a zero byte"),
            (
                "a.txt",
                b"one\n" + b"x" * 1_000_001,
                "a.txt, line 2: too long, 1,000,001 characters",
            ),
            (
                "a.txt",
                b"one\ntwo\n",
                "a.txt: found 2 texts.* expected at least 3.* Blank lines separate",
            ),
            (
                "a.jsonl",
                records() + '{"prompt": "x", "completion"\n',
                "a.jsonl, line 21 is not JSON",
            ),
            (
                "a.jsonl",
                records(2) + '{"prompt": "x"}\n',
                'a.jsonl, line 3: expected .*"completion".* found',
            ),
            (
                "a.jsonl",
                records(2) + '{"prompt": "x", "completion": 7}\n',
                "a.jsonl, line 3: expected",
            ),
            (
                "a.jsonl",
                records(2) + '{"prompt": "x", "completion": " "}\n',
                "a.jsonl, line 3: expected",
            ),
            ("a.jsonl", records(2) + "[1]\n", "a.jsonl, line 3: expected"),
            (
                "a.jsonl",
                records(2) + '{"text": "x"}\n',
                "a.jsonl, line 3: a text among prompts",
            ),
            ("a.jsonl", "", "a.jsonl is empty"),
        ],
    )
    def test_wrong_files_are_named_with_their_line(
        self, tmp_path, name, content, message
    ):
        with pytest.raises(DataError, match=message):
            load_data(write(tmp_path / name, content))

    def test_wrong_names(self):
        with pytest.raises(DataError, match="did you mean 'e2e_nlg'"):
            load_data("e2e_nlp")
        with pytest.raises(DataError, match=".txt, .jsonl or .csv"):
            load_data("my.xlsx")
        for nothing in (None, 3, ["sql"], {}):
            with pytest.raises(DataError, match="is not a name: expected one of mood"):
                load_data(nothing)
        with pytest.raises(DataError, match="cannot read .*nowhere.txt: No such file"):
            load_data("nowhere.txt")


def some(n=23):
    return [Example("p" * (1 + i % 4), f" c{i}", {}) for i in range(n)]


class TestRows:
    """From examples to rows."""

    def test_a_row(self):
        ids, labels = encode(Letters(), Example("ab", " c", {}))
        assert ids == [1, *Letters().encode("ab"), *Letters().encode(" c"), 2]
        assert labels == [-100] * 3 + ids[3:]

    def test_too_long_is_an_error_that_names_it(self):
        long = Example("p" * 10, " c", {"file": "my.jsonl", "line": 7})
        with pytest.raises(
            DataError, match="my.jsonl, line 7: 14 tokens, but a row holds 8.*truncate"
        ):
            Batches([long], Letters(), max_length=8)
        with pytest.raises(DataError, match="the example 'ppp"):
            encode(Letters(), Example("p" * 10, " c", {}), 8)
        # the completion alone is too long: nothing sensible is left to cut
        with pytest.raises(DataError, match="row holds 8"):
            encode(Letters(), Example("p", " c" * 5, {}), 8, truncate=True)

    @pytest.mark.parametrize("most", [1, 0, -1, 5.5, "8", True])
    @pytest.mark.parametrize("prompt", ["", "a"])
    def test_rows_that_hold_nothing(self, most, prompt):
        with pytest.raises(DataError, match="max_length = .* at least 2 or None"):
            Batches([Example(prompt, " c d e", {})], Letters(), max_length=most)

    def test_truncation_is_stated(self, capsys):
        batches = Batches(
            [Example("abcdefghij", " c", {})], Letters(), max_length=8, truncate=True
        )
        assert (
            "1 of 1 prompts lost their beginning to fit into 8 tokens"
            in capsys.readouterr().out
        )
        ids, labels = batches.rows[0]
        assert (
            ids == [1, *Letters().encode("ghij"), *Letters().encode(" c"), 2]
            and labels == [-100] * 5 + ids[5:]
        )

    def test_long_text_becomes_windows_that_predict_every_token_once(self):
        text = "".join(chr(97 + i % 26) for i in range(50))
        rows = Batches([Example("", text, {})], Letters(), max_length=16).rows
        assert all(len(ids) <= 16 for ids, _ in rows) and len(rows) == 4
        predicted = [label for _, labels in rows for label in labels[1:]]
        assert predicted == [*Letters().encode(text), 2]
        assert [i for ids, _ in rows for i in ids[:1]] == [
            1,
            *(rows[k][0][-1] for k in range(3)),
        ]


class TestBatches:
    """From rows to batches."""

    @pytest.mark.parametrize("bucket", [False, True])
    def test_batches_are_a_function_of_seed_and_step(self, bucket):
        a, b = (Batches(some(), Letters(), 4, seed=1, bucket=bucket) for _ in range(2))
        steps = [7, 0, 31, 3, 7]
        for step in steps:
            assert all(
                torch.equal(a.batch(step)[k], b.batch(step)[k]) for k in a.batch(step)
            )
        fresh = Batches(some(), Letters(), 4, seed=1, bucket=bucket)
        assert torch.equal(fresh.batch(31)["input_ids"], a.batch(31)["input_ids"])
        other = Batches(some(), Letters(), 4, seed=2, bucket=bucket)
        assert any(
            a.batch(s)["input_ids"].tolist() != other.batch(s)["input_ids"].tolist()
            for s in range(5)
        )

    @pytest.mark.parametrize("bucket", [False, True])
    def test_an_epoch_shows_each_row_once_and_the_next_one_another_order(self, bucket):
        batches = Batches(some(24), Letters(), 4, bucket=bucket)
        epochs = [
            [
                tuple(row[row != 0].tolist())
                for step in range(e * 6, e * 6 + 6)
                for row in batches.batch(step)["input_ids"]
            ]
            for e in (0, 1)
        ]
        everything = sorted(tuple(ids) for ids, _ in batches.rows)
        assert (
            len(batches) == 6
            and sorted(epochs[0]) == sorted(epochs[1]) == everything
            and epochs[0] != epochs[1]
        )

    def test_padding_is_on_the_right(self):
        batch = Batches(some(), Letters(), 4).batch(0)
        assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(
            ("input_ids", "labels", "attention_mask"), batch["input_ids"].shape
        )
        for ids, labels, mask in zip(*batch.values()):
            n = mask.sum()
            assert (
                mask[:n].all()
                and (ids[n:] == 0).all()
                and (labels[n:] == -100).all()
                and ids[n - 1] == 2 == labels[n - 1]
            )

    def test_fewer_rows_than_a_batch(self):
        assert Batches(some(3), Letters(), 16).batch(5)["input_ids"].shape[0] == 3
        with pytest.raises(DataError, match="no examples"):
            Batches([], Letters())

    def test_in_order_gives_every_row_once(self):
        batches = Batches(some(), Letters(), 4)
        rows = [
            tuple(row[row != 0].tolist())
            for batch in batches.in_order()
            for row in batch["input_ids"]
        ]
        assert sorted(rows) == sorted(tuple(ids) for ids, _ in batches.rows)

    def test_bucketing_pads_less(self):
        examples = [
            Example("p" * random.Random(i).randint(1, 60), " c", {}) for i in range(200)
        ]
        padding = [
            sum(
                (batch := rows.batch(s))["attention_mask"].numel()
                - batch["attention_mask"].sum().item()
                for s in range(len(rows))
            )
            for rows in (
                Batches(examples, Letters(), 8, bucket=b) for b in (False, True)
            )
        ]
        assert padding[1] < padding[0] / 3
        # yet the short ones do not all come first
        rows = Batches(examples, Letters(), 8, bucket=True)
        widths = [rows.batch(s)["input_ids"].shape[1] for s in range(len(rows))]
        assert 0.3 < sum(a < b for a, b in zip(widths, widths[1:])) / len(widths) < 0.7

    def test_lanternwick_by_name(self):
        for name in ("mood", "records", "sql", "voice", "extract", "newcomers"):
            task = load_data(name)
            assert task.name == name and task.train and task.test
