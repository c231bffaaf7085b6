"""Files are read in one place, and written whole or not at all."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from minipeft import io
from minipeft.errors import FileError

DEEP = "[" * 200_000 + "]" * 200_000


class TestChecks:
    def test_the_nearest_choice_ignores_case_and_type(self):
        assert io.did_you_mean("LORA", ["lora", "ia3"]) == " (did you mean 'lora'?)"
        assert io.did_you_mean("Nf4", ["nf4"]) == " (did you mean 'nf4'?)"
        assert io.did_you_mean(None, ["lora"]) == ""
        assert io.did_you_mean("--dta", ["--data"]) == " (did you mean '--data'?)"
        assert io.did_you_mean("--bogus", ["--out", "--json"]) == ""
        assert io.did_you_mean("x" * 10**7, ["lora"]) == ""

    @pytest.mark.parametrize("value", [[1], {}, None, 3, "y"])
    def test_a_choice_may_be_anything(self, value):
        with pytest.raises(ValueError, match="unknown kind .*expected one of a, b"):
            io.check_choice("kind", value, {"a": 1, "b": 2})
        io.check_choice("kind", "a", {"a": 1, "b": 2})

    @pytest.mark.parametrize(
        "value, bounds, expected",
        [
            (True, {}, "a number"),
            ("4", {"whole": True}, "a whole number"),
            (1.5, {"whole": True, "least": 1}, "a whole number at least 1"),
            (None, {"least": 0}, "a number at least 0"),
            (float("nan"), {}, "a number"),
            (float("-inf"), {"most": 1}, "a number at most 1"),
            (0, {"above": 0, "most": 1}, "a number above 0 and at most 1"),
            (1, {"least": 0, "below": 1}, "a number at least 0 and below 1"),
        ],
    )
    def test_numbers(self, value, bounds, expected):
        with pytest.raises(ValueError) as error:
            io.check_number("n", value, **bounds)
        assert str(error.value) == f"n = {value!r}: expected {expected}"

    @pytest.mark.parametrize(
        "value, bounds",
        [(1, {"whole": True, "least": 1}), (0.0, {"least": 0}), (-3, {"below": 0})],
    )
    def test_good_numbers(self, value, bounds):
        io.check_number("n", value, **bounds)

    def test_long_values_are_cut(self):
        assert len(io.brief("x" * 10**8)) <= 80
        assert len(io.brief(list(range(10**6)))) <= 80
        assert len(io.brief({i: i for i in range(1000)})) <= 80
        assert io.brief("short") == "'short'"


class TestReading:
    @pytest.mark.parametrize(
        "content, message",
        [
            (b"", "not JSON"),
            (b"{", "not JSON"),
            (b"[]", r"expected an object, found \[\]"),
            (b"null", "expected an object, found None"),
            (b"\xff\xfe{}", "not UTF-8 .0xff at byte 1."),
            (DEEP.encode(), "nested too deeply"),
            (b'{"a":' * 100_000, "nested too deeply"),
            (b"9" * 5000, "not JSON"),
        ],
        ids=lambda value: str(value)[:12],
    )
    def test_json(self, tmp_path, content, message):
        file = tmp_path / "x.json"
        file.write_bytes(content)
        with pytest.raises(FileError, match=message) as error:
            io.read_json(file)
        assert str(file) in str(error.value) and len(str(error.value)) < 300

    def test_a_byte_order_mark_is_no_harm(self, tmp_path):
        (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-8-sig")
        assert io.read_json(tmp_path / "x.json") == {"a": 1}

    @pytest.mark.parametrize("read", [io.read_json, io.read_text, io.read_safetensors])
    def test_only_regular_files(self, tmp_path, read):
        os.mkfifo(tmp_path / "fifo")
        for path, kind in [
            (tmp_path, "a folder"),
            (tmp_path / "fifo", "a pipe"),
            ("/dev/zero", "a device"),
        ]:
            with pytest.raises(FileError, match=f"{path} is {kind}; expected a file"):
                read(path)
        with pytest.raises(FileError, match="cannot read .*nowhere"):
            read(tmp_path / "nowhere")

    def test_the_caller_chooses_the_error(self, tmp_path):
        with pytest.raises(KeyError):
            io.read_json(tmp_path / "nowhere", error=KeyError)

    @pytest.mark.parametrize("damage", ["empty", "cut", "junk", "header"])
    def test_safetensors(self, tmp_path, damage):
        file = tmp_path / "x.safetensors"
        save_file({"a": torch.ones(100)}, file)
        whole = file.read_bytes()
        file.write_bytes(
            {
                "empty": b"",
                "cut": whole[:-50],
                "junk": b"junk" * 100,
                "header": b"\xff" * 8 + whole[8:],
            }[damage]
        )
        with pytest.raises(FileError, match="x.safetensors .* is cut short or damaged"):
            io.read_safetensors(file)

    def test_safetensors_without_metadata(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        tensors, metadata = io.read_safetensors(tmp_path / "x.safetensors")
        assert metadata == {} and tensors["a"].tolist() == [1, 1]


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
class TestPermissions:
    """A file of weights can be read by whoever can read the others beside it."""

    @pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0, 0o666)])
    def test_those_of_any_new_file(self, tmp_path, mask, mode):
        before = os.umask(mask)
        try:
            with io.replacing(tmp_path / "a.safetensors") as part:
                save_file({"x": torch.ones(1)}, part)
            assert os.umask(mask) == mask  # as it was
        finally:
            os.umask(before)
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


class TestWriting:
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path):
        io.write_text(tmp_path / "x", "old")
        with pytest.raises(RuntimeError):
            with io.replacing(tmp_path / "x") as part:
                part.write_text("half")
                raise RuntimeError
        with pytest.raises(TypeError):
            io.write_json(tmp_path / "x", {1: object()})
        assert os.listdir(tmp_path) == ["x"]
        assert (tmp_path / "x").read_text() == "old"

    def test_a_full_disk_is_one_sentence(self, tmp_path):
        if sys.platform == "win32":
            pytest.skip("needs resource limits")
        code = (
            "import resource, torch; from minipeft import io;"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"io.write_safetensors({str(tmp_path / 'x')!r}, {{'a': torch.ones(9999)}})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        last = done.stderr.decode().strip().splitlines()[-1]
        assert "FileError: cannot write" in last, last
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("existed", [True, False])
    def test_all_files_or_none(self, tmp_path, existed):
        out = tmp_path / "out"
        if existed:
            (out / "deep").mkdir(parents=True)
            for name in ("a", "deep/b", "mine"):
                (out / name).write_text("old")
        before = sorted(tmp_path.rglob("*"))

        def fill(part):
            (part / "deep").mkdir()
            for name in ("a", "deep/b", "deep/c", "mine"):
                (part / name).write_text("new")

        with pytest.raises(OSError):
            with io.all_or_nothing(out) as part:
                fill(part)
                raise OSError(28, "No space left on device")
        assert sorted(tmp_path.rglob("*")) == before
        with io.all_or_nothing(out, lambda place: place.name == "mine") as part:
            fill(part)
        found = {
            path.relative_to(out).as_posix(): path.read_text()
            for path in out.rglob("*")
            if path.is_file()
        }
        mine = {"mine": "old"} if existed else {}
        assert found == {name: "new" for name in ("a", "deep/b", "deep/c")} | mine

    @pytest.mark.parametrize(
        "error",
        [
            lambda part: OSError(errno.ENOSPC, "No space left on device"),
            lambda part: OSError(errno.EFBIG, "File too large", f"{part}/a/b"),
            lambda part: OSError(errno.ENOSPC, "No space", "/src", None, f"{part}/a/b"),
            lambda part: io.FileError(f"cannot write {part}/a/b: No space left"),
        ],
    )
    def test_errors_name_the_place_and_no_hidden_folder(self, tmp_path, error):
        out = tmp_path / "out"
        with pytest.raises((OSError, io.FileError)) as failed:
            with io.all_or_nothing(out) as part:
                raise (error := error(part))
        assert failed.value is error
        assert str(out) in str(error) and ".tmp" not in str(error)
        assert part.name not in str(error) and "/src" not in str(error)

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
    def test_a_file_that_cannot_be_replaced_is_named(self, tmp_path, number):
        with pytest.raises(OSError) as failed:
            with io.replacing(tmp_path / "x.json"):
                raise OSError(number, "cannot")
        assert failed.value.filename == str(tmp_path / "x.json")

    @pytest.mark.parametrize(
        "error", [OSError("no such address"), ConnectionResetError(104, "Reset")]
    )
    def test_an_error_of_another_kind_stays(self, tmp_path, error):
        before = str(error)
        with pytest.raises(OSError) as failed:
            with io.replacing(tmp_path / "x.json"):
                raise error
        assert failed.value is error and str(error) == before

    def test_two_writers_share_no_temporary_name(self, tmp_path):
        with io.replacing(tmp_path / "x") as one, io.replacing(tmp_path / "x") as two:
            one.write_text("one")
            two.write_text("two")
            assert one != two and one.parent == two.parent == tmp_path
        assert (tmp_path / "x").read_text() == "one"  # the last to end

    def test_what_killed_writers_left_can_be_removed(self, tmp_path):
        (tmp_path / ".x.1-ab.part").touch()
        (tmp_path / ".y.1-ab.part").touch()
        io.remove_parts(tmp_path / "x")
        assert os.listdir(tmp_path) == [".y.1-ab.part"]

    def test_json_comes_back(self, tmp_path):
        io.write_json(tmp_path / "x.json", {"é": [1, None]}, sort_keys=True)
        assert json.loads((tmp_path / "x.json").read_text()) == {"é": [1, None]}

    @pytest.mark.parametrize("where", ["/proc/x", "/dev/null/x", "/sys/x"])
    def test_a_folder_that_cannot_be_written(self, where):
        with pytest.raises(FileError, match=f"{where}"):
            io.make_folder(where)

    def test_a_file_in_the_folders_place(self, tmp_path):
        (tmp_path / "x").touch()
        with pytest.raises(FileError, match="x is a file; expected a folder"):
            io.make_folder(tmp_path / "x")


class TestLock:
    def test_the_second_writer_is_refused(self, tmp_path):
        with io.locked(tmp_path):
            with pytest.raises(FileError, match="is in use"):
                with io.locked(tmp_path):
                    pass
        with io.locked(tmp_path):  # free again
            pass

    def test_a_killed_holder_leaves_no_lock(self, tmp_path):
        code = (
            "import os, signal; from minipeft import io;"
            f"lock = io.locked({str(tmp_path)!r}); lock.__enter__();"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", code])
        with io.locked(tmp_path):
            pass
