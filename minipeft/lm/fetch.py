"""Real files from their public sources, fetched once: checked by sha256, never
half-written. pooch does the work."""

import os
import tempfile
import zipfile
from pathlib import Path

from .pretrained import cache_folder

RAW = "https://raw.githubusercontent.com"
E2E = f"{RAW}/tuetschek/e2e-dataset/master"
POLARITY = f"{RAW}/nltk/nltk_data/gh-pages/packages/corpora/sentence_polarity.zip"
SHAKESPEARE = f"{RAW}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# file in the cache: (its source, sha256). A source that ends in .zip holds it as <zip's
# name>/<file's name>
SOURCES = {
    "e2e_nlg/trainset.csv": (
        f"{E2E}/trainset.csv",
        "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
    ),
    "e2e_nlg/devset.csv": (
        f"{E2E}/devset.csv",
        "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    ),
    "e2e_nlg/testset_w_refs.csv": (
        f"{E2E}/testset_w_refs.csv",
        "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
    ),
    "sentence_polarity/rt-polarity.pos": (
        POLARITY,
        "c2dc6b2f55bcf725725372916287cc3f8f9b19402edaa9167de5287cb3ade421",
    ),
    "sentence_polarity/rt-polarity.neg": (
        POLARITY,
        "614274f81185a850e5a88d533d4679f916d6f62e9af6f0b4ec71fb94bf466ea5",
    ),
    "tinyshakespeare/input.txt": (
        SHAKESPEARE,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}


class DataError(ValueError):
    """Something is wrong with the data: the message says what, where, and what to
    do."""


def fetch(name):
    """The path of the file `name` (a key of SOURCES) in the cache folder. If it is not
    there, it is fetched and checked first.

    Raises DataError: the network or the server fails, or a hash is wrong."""
    import pooch

    source, expected = SOURCES[name]
    path = cache_folder() / name
    if path.is_file():
        if (found := pooch.file_hash(path)) != expected:
            raise DataError(
                f"{path} is not the file it should be (sha256 {found}, expected"
                f" {expected}): delete it and try again"
            )
        return path
    try:
        if source.endswith(".zip"):
            fetch_zip(source)
        else:
            download(source, expected, path)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise DataError(
            f"cannot fetch {source}: {reason(error)}\nWhat to do: try again; or get the"
            f" file elsewhere and save it as\n  {path}\nor set MINIPEFT_CACHE to a"
            f" folder that holds {name}. Lanternwick's own tasks need no network."
        ) from error
    return path


def download(url, sha256, path, processor=None):
    """Write `url` to `path` once it is whole and has this hash (None: any); two more
    tries if that fails."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    files = pooch.create(
        path.parent,
        base_url="",
        registry={path.name: sha256},
        urls={path.name: url},
        retry_if_failed=2,
    )
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=30)
    return files.fetch(path.name, processor=processor, downloader=downloader)


def fetch_zip(source):
    """Fetch a zip file and put every file of SOURCES that it holds into the cache."""
    import pooch

    names = [name for name, (url, _) in SOURCES.items() if url == source]
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        folder = Path(folder)
        unpacked = {
            name: folder / Path(source).stem / Path(name).name for name in names
        }
        unzip = pooch.Unzip(
            members=[file.relative_to(folder).as_posix() for file in unpacked.values()],
            extract_dir=".",
        )
        download(source, None, folder / Path(source).name, unzip)
        for name, file in unpacked.items():
            found, expected = pooch.file_hash(file), SOURCES[name][1]
            if found != expected:
                raise ValueError(
                    f"it holds another {name}, changed there or on the way (sha256"
                    f" {found}, expected {expected})"
                )
        for name, file in unpacked.items():
            path = cache_folder() / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, path)


# requests' errors, which pooch passes on
REASONS = {
    "BadZipFile": "it is not a zip file",
    "ChunkedEncodingError": "the connection broke",
    "ConnectionError": "no connection to the server",
    "ConnectTimeout": "the server does not answer",
    "ReadTimeout": "the server does not answer",
}


def reason(error):
    """Why a download failed, in a few words."""
    answer = getattr(error, "response", None)
    if answer is not None:
        return f"the server answers {answer.status_code} {answer.reason}"
    return REASONS.get(type(error).__name__) or " ".join(str(error).split())
