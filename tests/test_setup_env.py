"""setup_env.py: which build of torch is chosen, and that pip takes it from there, tried
against package indexes on the loopback."""

import contextlib
import functools
import http.server
import os
import socket
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import setup_env  # noqa: E402

VERSION = setup_env.locked("torch")


def make_wheel(folder, name, version, requires=""):
    """The smallest wheel that pip installs: a module that knows its version."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")
    return path.name


@pytest.fixture
def indexes(tmp_path):
    """Two package indexes, as folders that a server lists: the address that ends in
    /cpu has CPU builds, the one in /pypi all the rest."""
    make_wheel(tmp_path / "cpu" / "torch", "torch", f"{VERSION}+cpu")
    make_wheel(tmp_path / "pypi" / "torch", "torch", VERSION)
    make_wheel(tmp_path / "old" / "torch", "torch", "1.0+cpu")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        serve = functools.partial(server.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def silent_server():
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


class TestChoice:
    def test_linux_without_gpu_takes_the_cpu_build(self, indexes):
        index = f"{indexes}/cpu"
        chosen = setup_env.choose_torch("Linux", False, VERSION, index)
        assert chosen[:2] == ("cpu", index)

    def test_newest_is_any_version(self, indexes):
        index = f"{indexes}/old"
        assert setup_env.choose_torch("Linux", False, "", index)[:2] == ("cpu", index)

    @pytest.mark.parametrize("place", ["old", "pypi", "absent"])
    def test_an_index_without_this_build_is_left_alone(self, indexes, place):
        build, index, reason = setup_env.choose_torch(
            "Linux", False, VERSION, f"{indexes}/{place}"
        )
        assert (build, index) == ("cuda", None) and "PyPI" in reason

    @pytest.mark.parametrize("index", ["closed port", "no address", "http://[bad"])
    def test_an_index_that_does_not_answer(self, index):
        # the port is found here: every worker of xdist must collect the same names
        index = closed_port() if index == "closed port" else index
        chosen = setup_env.choose_torch("Linux", False, VERSION, index)
        assert chosen[:2] == ("cuda", None)

    def test_an_index_that_hangs_is_given_up(self):
        with silent_server() as index:
            assert not setup_env.offers(index, VERSION, timeout=0.2)

    @pytest.mark.parametrize("system", ["Darwin", "Windows"])
    def test_elsewhere_pypi_has_the_small_build(self, system):
        chosen = setup_env.choose_torch(system, False, VERSION, "http://[bad")
        assert chosen[:2] == ("cpu", None)

    def test_with_a_gpu_no_index_is_asked(self):
        chosen = setup_env.choose_torch("Linux", True, VERSION, "http://[bad")
        assert chosen[:2] == ("cuda", None)

    def test_a_gpu_is_seen_by_its_driver(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        (tmp_path / "nvidia-smi").touch(mode=0o755)
        assert setup_env.has_nvidia_gpu()
        (tmp_path / "nvidia-smi").unlink()
        monkeypatch.setattr(os.path, "exists", lambda path: "nvidia" in path)
        assert setup_env.has_nvidia_gpu()
        monkeypatch.setattr(os.path, "exists", lambda path: False)
        assert not setup_env.has_nvidia_gpu()


BACKEND = """
import shutil

def build_editable(folder, config_settings=None, metadata_directory=None):
    shutil.copy("tiny/{wheel}", folder)
    return "{wheel}"
"""


@pytest.fixture
def project(tmp_path, monkeypatch, indexes):
    """A project that requires torch and nothing else, and pip without any settings but
    the index on the loopback in the place of PyPI."""
    root = tmp_path / "project"
    needs = "Provides-Extra: all\nRequires-Dist: torch\n"
    wheel = make_wheel(root / "tiny", "tiny", "1", needs)
    (root / "backend.py").write_text(BACKEND.format(wheel=wheel))
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\n'
        'backend-path = ["."]\n'
    )
    (root / "constraints.txt").write_text(f"torch=={VERSION}\n")
    (root / "chapters").mkdir()
    (root / "chapters" / ".jupyterlab.json").write_text("{}")
    monkeypatch.setattr(setup_env, "ROOT", root)
    monkeypatch.setattr(setup_env, "LOCK", root / "constraints.txt")
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(setup_env.platform, "system", lambda: "Linux")
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{indexes}/pypi")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return root


def set_up(monkeypatch, index, folder):
    """The version of torch in the environment that setup_env.py makes."""
    arguments = ["--torch-index", index, "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["setup_env.py", *arguments])
    setup_env.main()
    code = "import torch; print(torch.__version__)"
    python = [setup_env.python_in(folder), "-c", code]
    return subprocess.run(python, capture_output=True, text=True).stdout.strip()


class TestSetUp:
    def test_from_the_index_of_cpu_builds(
        self, project, indexes, monkeypatch, capfd, tmp_path
    ):
        index = f"{indexes}/cpu"
        assert set_up(monkeypatch, index, tmp_path / "env") == f"{VERSION}+cpu"
        said = capfd.readouterr().out
        assert "about 0.5 GB to download" in said and "1.8 GB on disk" in said
        assert "Collecting" not in said and "Successfully" not in said
        settings = tmp_path / "env" / "share" / "jupyter" / "lab" / "settings"
        assert (settings / "overrides.json").read_text() == "{}"

    def test_without_that_index_from_pypi(self, project, monkeypatch, capfd, tmp_path):
        assert set_up(monkeypatch, closed_port(), tmp_path / "env") == VERSION
        said = capfd.readouterr().out
        assert "does not answer" in said and "up to 3.0 GB to download" in said
        assert "5.7 GB on disk" in said

    def test_an_index_that_breaks_off_is_replaced_by_pypi(
        self, project, indexes, monkeypatch, capfd, tmp_path
    ):
        """It lists the file, and does not have it."""
        listing = tmp_path / "broken" / "torch"
        listing.mkdir(parents=True)
        name = f"torch-{VERSION}%2Bcpu-py3-none-any.whl"
        (listing / "index.html").write_text(f'<a href="none/{name}">{name}</a>')
        index = f"{indexes}/broken"
        assert set_up(monkeypatch, index, tmp_path / "env") == VERSION
        assert "failed: torch comes from PyPI" in capfd.readouterr().out

    def test_no_room(self, project, indexes, monkeypatch, tmp_path):
        monkeypatch.setattr(
            setup_env.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1e9)
        )
        with pytest.raises(SystemExit, match="Too little room"):
            set_up(monkeypatch, f"{indexes}/cpu", tmp_path / "env")
        assert not (tmp_path / "env").exists()

    def test_pip_that_fails_ends_it(
        self, project, indexes, monkeypatch, capfd, tmp_path
    ):
        monkeypatch.setenv("PIP_INDEX_URL", closed_port())
        with pytest.raises(SystemExit) as stopped:
            set_up(monkeypatch, closed_port(), tmp_path / "env")
        assert stopped.value.code == 1
        said = capfd.readouterr()
        log = tmp_path / "env" / "pip.log"
        assert "ERROR: " in said.err and f"all that it did is in {log}" in said.out
        assert "Connection refused" in log.read_text(encoding="utf-8")

    def test_one_sees_how_much_is_downloaded(self, monkeypatch, capfd, tmp_path):
        """A process that puts 3 MB, then 2 MB into the folder."""
        monkeypatch.setattr(setup_env, "TICK", 0.3)
        code = (
            "import pathlib, sys, time; folder = pathlib.Path(sys.argv[1]);"
            "(folder / 'a').write_bytes(bytes(3_000_000)); time.sleep(1);"
            "(folder / 'deep').mkdir(); (folder / 'deep' / 'b').write_bytes(bytes("
            "2_000_000)); time.sleep(1); sys.exit(7)"
        )
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path])
        assert setup_env.wait(process, tmp_path) == 7
        said = capfd.readouterr().out
        assert "  3 MB downloaded, " in said and "  5 MB downloaded, " in said
        last = [line for line in said.splitlines() if "5 MB downloaded" in line][-1]
        assert last.endswith(" s: unpacking, or waiting for the network")

    def test_an_old_python_is_told(self, project, indexes, monkeypatch, tmp_path):
        monkeypatch.setattr(sys, "version_info", (3, 10, 0))
        with pytest.raises(SystemExit, match="needs Python 3.11 or newer"):
            set_up(monkeypatch, f"{indexes}/cpu", tmp_path / "env")
