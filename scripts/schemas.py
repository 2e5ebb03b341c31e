"""JSON schemas against a real model at random temperatures: every finished output must be an instance.

python scripts/schemas.py [--model qwen2.5-coder-0.5b] [--rounds 1] [--max-tokens 200] [--every 1]

The schemas are those of support/text/json_schemas.py. Prints how many outputs finished, which of them were no
instances, and what the token masks cost; ends with 1 when an output was invalid or ended in an error.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import jsonschema

from rvllm import LLM, SamplingParams
from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.errors import RvllmError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.text.json_schemas import SCHEMAS

TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.5, 2.0)


def problem(schema: object, text: str) -> str | None:
    """What is wrong with a finished output; None when it is an instance."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    try:
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).partition("\n")[0]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--rounds", type=int, default=1, help="outputs for each schema")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="take each n-th schema")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    schemas = [schema for schema in SCHEMAS[:: args.every] for _ in range(args.rounds)]
    prompts = [f"A JSON value for the schema {json.dumps(schema)[:600]}:\n" for schema in schemas]
    params = [
        SamplingParams(
            temperature=dice.choice(TEMPERATURES),
            seed=dice.getrandbits(32),
            max_tokens=args.max_tokens,
            structured_outputs=StructuredOutputsParams(json=json.dumps(schema)),
        )
        for schema in schemas
    ]
    with LLM(args.model, device=args.device, max_model_len=1024, max_num_seqs=32) as llm:
        began = time.perf_counter()
        try:
            outputs = [found.outputs[0] for found in llm.generate(prompts, params)]
        except RvllmError as error:
            print(f"failed: {error}")
            return 1
        seconds, stats = time.perf_counter() - began, llm.engine.stats()
    finished = [(s, o.text) for s, o in zip(schemas, outputs, strict=True) if o.finish_reason == "stop"]
    wrong = [(s, text, why) for s, text in finished if (why := problem(s, text)) is not None]
    for schema, text, why in wrong:
        print(f"INVALID {json.dumps(schema)}\n  {text!r}\n  {why}")
    tokens = sum(len(output.token_ids) for output in outputs)
    print(
        f"{len(SCHEMAS[:: args.every])} schemas, {len(outputs)} outputs: {len(finished)} finished, "
        f"{len(wrong)} of them invalid, {len(outputs) - len(finished)} cut at {args.max_tokens} tokens\n"
        f"{tokens} tokens in {seconds:.1f} s; {stats.masks} masks: "
        f"p50 {1e3 * stats.mask_p50_seconds:.3f} ms, p99 {1e3 * stats.mask_p99_seconds:.3f} ms, "
        f"{stats.mask_seconds:.2f} s in all, "
        f"of which the device waited {stats.mask_exposed_seconds:.2f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
