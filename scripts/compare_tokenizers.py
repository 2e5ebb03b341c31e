"""Encodes llama.cpp's tokenizer tests with our tokenizers and tells where the token ids differ.

    python scripts/compare_tokenizers.py llama_cpp_python-*.tar.gz [tekken.json ...]

The vocabularies and the expected ids are llama.cpp's models/ggml-vocab-*.gguf, .inp and .out, out of
llama-cpp-python's source package (fetch it with `pip download --no-deps --no-binary :all: llama-cpp-python`).
The expected ids were made with the models' own tokenizers; a text that differs is printed with both.
Mistral's tekken.json files (some are in mistral-common's package) are compared with that package.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rvllm.errors import ModelError
from rvllm.text.tokenizers.gguf import from_metadata
from rvllm.text.tokenizers.tekken import from_tekken
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.weights.gguf.container import read_gguf

SEPARATOR = "\n__ggml_vocab_test__\n"


def compare(vocabulary: Path) -> tuple[int, list[str]]:
    """(how many texts there are, what differs) of one vocabulary."""
    texts = Path(f"{vocabulary}.inp").read_text(encoding="utf-8").split(SEPARATOR)
    expected = Path(f"{vocabulary}.out").read_text(encoding="utf-8").splitlines()
    tokenizer = Tokenizer(from_metadata(read_gguf(vocabulary).metadata, str(vocabulary)))
    wrong = []
    for text, line in zip(texts, expected, strict=False):
        theirs = [int(number) for number in line.split()]
        ours = tokenizer.encode(text, add_special_tokens=False)
        if ours != theirs:
            wrong.append(f"{text[:60]!r}: {ours[:12]} instead of {theirs[:12]}")
    return min(len(texts), len(expected)), wrong


def compare_tekken(file: Path, texts: Sequence[str]) -> list[str]:
    """What differs between a tekken.json's ids and those of mistral-common, which must be installed."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    theirs = Tekkenizer.from_file(file)
    backend = from_tekken(file).backend
    pairs = [(text, backend.encode(text).ids, theirs.encode(text, bos=True, eos=False)) for text in texts]
    return [f"{text[:60]!r}: {ours[:12]} instead of {ids[:12]}" for text, ours, ids in pairs if ours != ids]


def main() -> int:
    """Compares every vocabulary of the package; 1 when anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="llama-cpp-python's source package (.tar.gz)")
    parser.add_argument("tekken", type=Path, nargs="*", help="tekken.json files of mistral-common")
    args = parser.parse_args()
    failed = total = 0
    with tempfile.TemporaryDirectory() as folder, tarfile.open(args.package) as package:
        for member in package:
            name = member.name.rpartition("/")[2]
            if "/models/ggml-vocab-" in member.name and member.isfile():
                file = package.extractfile(member)
                assert file is not None
                (Path(folder) / name).write_bytes(file.read())
        for vocabulary in sorted(Path(folder).glob("*.gguf")):
            if not Path(f"{vocabulary}.out").is_file():
                continue
            name = vocabulary.stem.removeprefix("ggml-vocab-")
            total += 1
            try:
                count, wrong = compare(vocabulary)
            except ModelError as error:
                print(f"{name:16} {str(error).rpartition('/')[2]}")
                failed += 1
                continue
            failed += bool(wrong)
            print(f"{name:16} {count - len(wrong)} of {count} texts equal")
            for line in wrong[:4]:
                print(f"    {line}")
        texts = next(Path(folder).glob("*.inp")).read_text(encoding="utf-8").split(SEPARATOR)
    print(f"{total - failed} of {total} tokenizers equal llama.cpp's tests")
    for file in args.tekken:
        wrong = compare_tekken(file, texts)
        failed += bool(wrong)
        print(f"{file.name:24} {len(texts) - len(wrong)} of {len(texts)} texts equal mistral-common")
        for line in wrong[:4]:
            print(f"    {line}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
