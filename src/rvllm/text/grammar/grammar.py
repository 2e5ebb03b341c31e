"""What a request asks of its output's form, as a grammar the engine can follow.

The engine takes grammars in llguidance's own form: a Lark text, or a JSON object of several grammars. What
is wrong with a schema, regex or grammar is found here, before the request is queued.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from rvllm.engine.grammar import MAX_ITEMS, MAX_STATES
from rvllm.engine.ipc.messages import Vocabulary
from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.errors import UsageError
from rvllm.text.grammar.dates import with_real_dates
from rvllm.text.grammar.limits import check_rules, check_schema
from rvllm.text.grammar.schema import REWRITTEN, without_idle_keywords

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from rvllm.text.tokenizers.tokenizer import Tokenizer

# Whitespace between the tokens of JSON where it is free: an indented new line or one space. Unbounded, a
# model that likes spaces would never come to an end.
WHITESPACE = r"(\n[ \t]{0,40}| )"
LONGEST = 1 << 20  # characters of a schema, regex or grammar
MAX_CHOICES = 10_000
KEPT_LENGTH = 1 << 14  # characters of the longest of which the grammar is remembered

_FREE_TEXT = r"/(.|\n)*/"


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What the engine needs before the first grammar; takes some 0.2 s for 150,000 tokens."""
    eos = tokenizer.eos_token_id
    return Vocabulary(tokenizer.backend.to_str(), [] if eos is None else [eos])


def check_tokenizer(tokenizer: Tokenizer | None) -> None:
    """Raises UsageError when a model's tokens cannot be constrained."""
    if tokenizer is None:
        raise UsageError("structured outputs need a tokenizer, and this server runs without one")
    if tokenizer.spelling.kind == "other":
        raise UsageError(
            "structured outputs need a byte-level or SentencePiece tokenizer; this model has neither"
        )


def grammar_of(params: StructuredOutputsParams | None) -> str | None:
    """The grammar that the parameters ask for, checked; None when they ask for none.

    Raises UsageError naming the parameter and what is wrong with it.
    """
    if params is None:
        return None
    given = params.given()
    if given is None:
        return None
    name, value = given
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST:
        raise UsageError(f"{name} has {len(text)} characters, more than {LONGEST}")
    if name == "json" or (name == "structural_tag" and isinstance(value, dict)):
        check_schema(value, name)
    elif name == "grammar":
        check_rules(text, name)
    make = _grammar if len(text) <= KEPT_LENGTH else _grammar.__wrapped__
    spacing = None if params.disable_any_whitespace else params.whitespace_pattern or WHITESPACE
    return make(name, text, spacing)


def _json_options(spacing: str | None) -> dict[str, Any]:
    """How JSON may be spaced, by a pattern or (None) not at all, as llguidance's JSON compiler takes it."""
    return {"whitespace_flexible": False} if spacing is None else {"whitespace_pattern": spacing}


@lru_cache(maxsize=256)
def _grammar(name: str, text: str, spacing: str | None) -> str:
    from llguidance import LLMatcher

    options = _json_options(spacing)
    try:
        if name == "json":
            text = "{}" if text == "true" else _tidied(text)
            found = LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]
        elif name == "json_object":
            found = LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=options)  # type: ignore[arg-type]
        elif name == "regex":
            found = LLMatcher.grammar_from_regex(text)
        elif name == "choice":
            found = _choice(text)
        elif name == "structural_tag":
            found = structural_tags(text, spacing)
        else:
            found = _lark_or_gbnf(text)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: {error or 'nested too deeply'}") from None
    check(found, name)
    return found


def _tidied(text: str) -> str:
    """A schema's text with patterns for its dates and without idle keywords, where it has any of these."""
    if not any(f'"{word}"' in text for word in REWRITTEN):
        return text
    try:
        return json.dumps(_tidy(json.loads(text)), ensure_ascii=False, allow_nan=False)
    except ValueError:  # numbers that Python would write otherwise
        return text


def _tidy(schema: Any) -> Any:
    return with_real_dates(without_idle_keywords(schema))


def check(grammar: str, name: str) -> None:
    """Raises UsageError, its first word `name`, with the reason why a grammar cannot be followed."""
    from llguidance import LLMatcher

    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        raise UsageError(f"{name}: {messages[0].strip()}")


@lru_cache(maxsize=1)
def native_vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """The tokens as llguidance takes them."""
    from llguidance import LLTokenizer

    vocabulary = vocabulary_of(tokenizer)
    return LLTokenizer(vocabulary.tokenizer, n_vocab=tokenizer.vocab_size, eos_token=vocabulary.eos_token_ids)


def try_out(grammar: str, tokenizer: Tokenizer) -> None:
    """Compiles a checked grammar and makes its first mask, as the engine will, and forgets it.

    The engine must live, and compiling recurses in native code: what a process with a smaller stack has
    survived is safe there. What is wrong with the grammar for the model's tokens, the engine tells.
    """
    from llguidance import LLMatcher, LLParserLimits

    vocabulary = native_vocabulary(tokenizer)
    limits = LLParserLimits(max_lexer_states=MAX_STATES, max_items_in_row=MAX_ITEMS, verbose_errors=False)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        row = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.uint32)
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)


def _choice(text: str) -> str:
    choices = json.loads(text)
    if not choices or not all(isinstance(choice, str) for choice in choices):
        raise UsageError("choice must be a list of at least one string")
    if len(choices) > MAX_CHOICES:
        raise UsageError(f"choice takes at most {MAX_CHOICES} strings, got {len(choices)}")
    # As one terminal: a rule with so many branches takes a parser thousands of times as long.
    return "start: CHOICE\nCHOICE: " + " | ".join(literal(choice) for choice in dict.fromkeys(choices))


def _lark_or_gbnf(text: str) -> str:
    """A Lark grammar as it is; one of llama.cpp's GBNF or EBNF (`root ::= ...`) translated."""
    if "::=" not in text:
        return text
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise UsageError("grammar: nested too deeply") from None
    except Exception as error:  # the translator's own errors, and what it stumbles over
        raise UsageError(f"grammar: {error}") from None


def literal(text: str) -> str:
    """A text as Lark's string."""
    return json.dumps(text, ensure_ascii=False) if text else '""'


def json_rule(schema: Any, spacing: str | None = WHITESPACE) -> str:
    """A schema as Lark's `%json`, spaced by `spacing` (None: not at all)."""
    body = _tidy(schema) if isinstance(schema, dict) else {"allOf": [schema]}
    return "%json " + json.dumps({**body, "x-guidance": _json_options(spacing)}, ensure_ascii=False)


class Spelled:
    """Literal text in a grammar. A vocabulary's added tokens stand in it as tokens.

    llguidance takes none of them for the text they look like, so that no text can forge them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.backend.get_added_tokens_decoder()
        self._tokens = {token.content: i for i, token in added.items() if len(token.content) > 1}

    def of(self, text: str) -> str:
        """The text as a part of a Lark rule; "" for none."""
        parts, plain = [], ""
        while text:
            token = max((t for t in self._tokens if text.startswith(t)), key=len, default=None)
            if token is None:
                plain, text = plain + text[0], text[1:]
                continue
            parts += [literal(plain)] if plain else []
            parts.append(f"<[{self._tokens[token]}]>")
            plain, text = "", text[len(token) :]
        return " ".join(parts + ([literal(plain)] if plain else []))


def with_lead(grammar: str, begin: str, end: str, tokenizer: Tokenizer, *, opened: bool) -> str:
    """A grammar whose text may be preceded by thoughts from `begin` to `end`.

    opened: the prompt has `begin` already, so thoughts must end before the grammar starts.
    """
    spelled = Spelled(tokenizer)
    last = spelled.of(end)
    if last == literal(end):
        thoughts = f"thoughts[suffix={last}]: {_FREE_TEXT}"
    else:
        thoughts = f"thoughts: FREE {last}\nFREE: {_FREE_TEXT}"
    head = "thoughts gap" if opened else f"({spelled.of(begin)} thoughts gap)?"
    main = f"start: {head} @answer\n{thoughts}\ngap: /\\n{{0,2}}/"
    others: list[dict[str, Any]] = []
    if grammar.lstrip().startswith("{"):
        answer, *others = json.loads(grammar)["grammars"]
    else:
        answer = {"lark_grammar": grammar}
    both = [{"lark_grammar": main}, {**answer, "name": "answer"}, *others]
    return json.dumps({"grammars": both}, ensure_ascii=False)


def structural_tags(text: str, spacing: str | None = WHITESPACE) -> str:
    """vLLM's `structural_tag`: free text in which every trigger is followed by one of its structures.

    An object with `triggers` and `structures`: begin, which a trigger begins, JSON of schema, then end.
    """
    value, rules = json.loads(text), list[str]()
    try:
        triggers = [str(trigger) for trigger in value["triggers"]]
        for i, structure in enumerate(value["structures"]):
            begin, end = str(structure["begin"]), str(structure["end"])
            trigger = next((t for t in triggers if t and begin.startswith(t)), None)
            if trigger is None:
                raise UsageError(f"structural_tag: no trigger begins {begin!r}")
            form = json_rule(structure.get("schema", {}), spacing)
            rules += [
                f"trigger_{i}[lazy]: TEXT {literal(trigger)}",
                f"tag_{i}: trigger_{i} {literal(begin[len(trigger) :])} {form} {literal(end)}",
            ]
    except (KeyError, TypeError, AttributeError):
        raise UsageError(
            "structural_tag must be an object with triggers (strings) and structures (begin, schema, end)"
        ) from None
    if not rules:
        raise UsageError("structural_tag: structures must not be empty")
    names = " | ".join(f"tag_{i}" for i in range(len(rules) // 2))
    return "\n".join([f"start: ({names})* rest", "rest: TEXT", f"TEXT: {_FREE_TEXT}", *rules])
