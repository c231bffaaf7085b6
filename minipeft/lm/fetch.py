"""Fetch real files from their public homes, once: resumed where it broke, checked by
sha256, never half-written."""

import hashlib
import os
import urllib.error
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from .hub import cache_folder

RAW = "https://raw.githubusercontent.com"
E2E = f"{RAW}/tuetschek/e2e-dataset/master"
POLARITY = f"{RAW}/nltk/nltk_data/gh-pages/packages/corpora/sentence_polarity.zip"
SHAKESPEARE = f"{RAW}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# file in the cache: (its home, sha256). A home that ends in .zip holds <zip's
# name>/<file's name>
HOMES = {
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
    """Something is wrong with the data, and the message says what, where, and what to
    do."""


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def download(url, part, tries=3):
    """Write `url` to the file `part`; what is there already is not fetched again."""
    part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(tries):
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(
                url, headers={"Range": f"bytes={have}-"} if have else {}
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                # 200: the server sends the whole file again
                have = have if answer.status == 206 else 0
                length = int(answer.headers.get("Content-Length") or 0)
                bar = tqdm(
                    desc=Path(url).name,
                    total=have + length or None,
                    initial=have,
                    unit="B",
                    unit_scale=True,
                )
                with bar, open(part, "ab" if have else "wb") as file:
                    while block := answer.read(1 << 16):
                        file.write(block)
                        bar.update(len(block))
            if part.stat().st_size >= have + length:
                return
            reason = "the connection broke"
        except urllib.error.HTTPError as error:
            # nothing comes after what we have: it is whole
            if error.code == 416 and have:
                return
            reason = f"the server answers {error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
    raise DataError(f"cannot fetch {url}: {reason}")


def fetch(name):
    """The path of the file `name` (a key of HOMES) in the cache; if it is absent:
    fetched, checked, put there whole."""
    home, wanted = HOMES[name]
    path = cache_folder() / name
    if path.is_file():
        if (found := sha256(path.read_bytes())) != wanted:
            raise DataError(
                f"{path} is not the file it should be (sha256 {found}, not {wanted}):"
                " delete it and try again"
            )
        return path
    part = path.with_name(Path(home).name + ".part")
    try:
        download(home, part)
        files = {name: part.read_bytes()}
        if home.endswith(".zip"):
            with zipfile.ZipFile(part) as archive:
                files = {
                    key: archive.read(f"{Path(home).stem}/{Path(key).name}")
                    for key, (url, _) in HOMES.items()
                    if url == home
                }
        for key, content in files.items():
            if (found := sha256(content)) != HOMES[key][1]:
                part.unlink()
                raise DataError(
                    f"{home} does not hold the {key} that is expected (sha256 {found},"
                    f" not {HOMES[key][1]}): changed there or on the way. It was not"
                    " kept"
                )
        for key, content in files.items():
            beside = path.with_name(Path(key).name + ".tmp")
            beside.write_bytes(content)
            os.replace(beside, path.with_name(Path(key).name))
        part.unlink()
    except (DataError, OSError, zipfile.BadZipFile, KeyError) as error:
        if isinstance(error, (zipfile.BadZipFile, KeyError)):
            part.unlink()
        raise DataError(
            f"{error}\nTo go on: try again (what has arrived is kept); or get the file"
            f" elsewhere and save it as\n  {path}\nor set MINIPEFT_CACHE to a folder"
            f" that holds {name}. Lanternwick's own tasks need no network."
        ) from error
    return path
