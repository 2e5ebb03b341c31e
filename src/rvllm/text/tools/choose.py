"""Which format a model's tool calls have: the one that its chat template writes calls in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from rvllm.errors import UsageError
from rvllm.text.chat.template import template_traits
from rvllm.text.chat.traits import ARGUMENTS, CALL, TOOL, VALUE
from rvllm.text.tools.events import CallArguments, CallStart
from rvllm.text.tools.formats import (
    ActionJson,
    CommandR,
    DeepSeek,
    Functionary,
    Hermes,
    Kimi,
    Llama3,
    Mistral,
    ToolParser,
)
from rvllm.text.tools.gemma import FunctionGemma, Gemma4
from rvllm.text.tools.marked import (
    Apertus,
    GigaChat3,
    Granite,
    InternLm,
    LongCat,
    Nemotron,
    Phi4,
    ToolCalls,
    Xlam,
)
from rvllm.text.tools.pythonic import Olmo3, Pythonic
from rvllm.text.tools.tagged import Dsml, Glm, Hunyuan3, MiniCpm5, MiniMaxM2, Qwen3Coder, SeedOss


@dataclass(frozen=True)
class Frame:
    """What stands around calls: `call_before` ends with the arguments' key or the like.

    NAME in `call_before` stands for the function's name; `between` parts calls.
    """

    before: str
    call_before: str
    call_after: str
    between: str
    after: str


@dataclass(frozen=True)
class Members:
    """How arguments stand one by one: `before` with KEY for the name, the value, `after`.

    IS_STRING in `before` stands for whether the value is a string, true or false. between: parts arguments.
    bare_strings: strings stand as they are, without JSON's quotes. quote: what stands around them instead.
    """

    before: str
    after: str
    between: str = ""
    bare_strings: bool = True
    quote: str = ""

    def around(self, key: str, is_string: bool) -> tuple[str, str]:
        """What stands before and after an argument's value."""
        quote = self.quote if is_string else ""
        before = self.before.replace("KEY", key).replace("IS_STRING", str(is_string).lower())
        return before + quote, quote + self.after


@dataclass(frozen=True)
class ToolFormat:
    """A family's way to write calls.

    signs: texts that chat templates have together that only tell of calls in this format.
    members: how arguments are written where they are not one JSON object.
    """

    name: str
    parser: type[ToolParser]
    frame: Frame
    signs: tuple[str, ...]
    aliases: tuple[str, ...] = field(default=())
    members: Members | None = None


_BEGIN, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_KIMI = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_QWEN_MEMBERS = Members("<parameter=KEY>\n", "\n</parameter>\n")
_CALL, _JSON_CALL = "<tool_call>\n", '{"name": "NAME", "arguments": '

_DSML = "｜DSML｜"
_DSML_MEMBERS = Members(f'<{_DSML}parameter name="KEY" string="IS_STRING">', f"</{_DSML}parameter>\n")


def _dsml(name: str, word: str) -> ToolFormat:
    frame = Frame(
        f"<{_DSML}{word}>\n", f'<{_DSML}invoke name="NAME">\n', f"</{_DSML}invoke>\n", "", f"</{_DSML}{word}>"
    )
    return ToolFormat(name, Dsml, frame, (f"<{_DSML}{word}>",), (), _DSML_MEMBERS)


# In the order in which a template is looked through: the first whose signs are all there decides.
FORMATS = (
    ToolFormat("deepseek_v3", DeepSeek, Frame(
        _CALLS_BEGIN, f"{_BEGIN}function{_SEP}NAME\n```json\n", f"\n```{_END}", "\n", _CALLS_END,
    ), (f"function{_SEP}",)),
    ToolFormat("deepseek_v31", DeepSeek, Frame(
        _CALLS_BEGIN, f"{_BEGIN}NAME{_SEP}", _END, "", _CALLS_END,
    ), (_BEGIN,)),
    ToolFormat("kimi_k2", Kimi, Frame(
        _KIMI[0], "<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>",
        "<|tool_call_end|>", "", _KIMI[1],
    ), ("<|tool_call_argument_begin|>",)),
    ToolFormat("mistral_args", Mistral, Frame("", "[TOOL_CALLS]NAME[ARGS]", "", "", ""), ("[ARGS]",)),
    ToolFormat("mistral", Mistral, Frame(
        "[TOOL_CALLS][", _JSON_CALL, "}", ", ", "]",
    ), ("[TOOL_CALLS]",)),
    ToolFormat("command_r", CommandR, Frame(
        "<|START_ACTION|>[\n",
        '    {"tool_call_id": "INDEX", "tool_name": "NAME", "parameters": ', "}", ",\n",
        "\n]<|END_ACTION|>",
    ), ("<|START_ACTION|>",), ("cohere", "cohere_command3", "cohere_command4")),
    ToolFormat("command_r_action", ActionJson, Frame(
        "Action:\n```json\n[\n",
        '    {\n        "tool_name": "NAME",\n        "parameters": ', "\n    }", ",\n", "\n]```",
    ), ("Action:", '"tool_name"')),
    _dsml("deepseek_v32", "function_calls"),
    _dsml("deepseek_v4", "tool_calls"),
    ToolFormat("minicpm5", MiniCpm5, Frame(
        "", '<function name="NAME">', "</function>", "\n", "",
    ), ("<function name=", "<param name="), (), Members('<param name="KEY">', "</param>")),
    ToolFormat("hy_v3", Hunyuan3, Frame(
        "<tool_calls:opensource>\n", "<tool_call:opensource>NAME<tool_sep:opensource>\n",
        "</tool_call:opensource>\n", "", "</tool_calls:opensource>",
    ), ("<tool_sep:opensource>",), (), Members(
        "<arg_key:opensource>KEY</arg_key:opensource>\n<arg_value:opensource>", "</arg_value:opensource>\n",
    )),
    ToolFormat("gemma4", Gemma4, Frame(
        "", "<|tool_call>call:NAME{", "}<tool_call|>", "", "",
    ), ("<|tool_call>",), (), Members("KEY:", "", ",", quote='<|"|>')),
    ToolFormat("functiongemma", FunctionGemma, Frame(
        "", "<start_function_call>call:NAME{", "}<end_function_call>", "", "",
    ), ("<start_function_call>",), (), Members("KEY:", "", ",", quote="<escape>")),
    ToolFormat("gigachat3", GigaChat3, Frame(
        "", f"function call<|role_sep|>\n{_JSON_CALL}", "}", "\n", "",
    ), ("function call<|role_sep|>",)),
    ToolFormat("gigachat31", GigaChat3, Frame(
        "", f"<|function_call|>{_JSON_CALL}", "}", "", "",
    ), ("<|function_call|>",)),
    ToolFormat("longcat", LongCat, Frame(
        "", f"<longcat_tool_call>{_JSON_CALL}", "}</longcat_tool_call>", "\n", "",
    ), ("<longcat_tool_call>",)),
    ToolFormat("internlm", InternLm, Frame(
        "", '<|action_start|><|plugin|>\n{"name": "NAME", "parameters": ', "}<|action_end|>", "\n", "",
    ), ("<|action_start|>",)),
    ToolFormat("apertus", Apertus, Frame(
        "<|tools_prefix|>[", '{"NAME": ', "}", ", ", "]<|tools_suffix|>",
    ), ("<|tools_prefix|>",)),
    ToolFormat("olmo3", Olmo3, Frame(
        "<function_calls>\n", "NAME(", ")", "\n", "\n</function_calls>",
    ), ("<function_calls>",), (), Members("KEY=", "", ", ", bare_strings=False)),
    ToolFormat("minimax_m2", MiniMaxM2, Frame(
        "<minimax:tool_call>", '\n<invoke name="NAME">\n', "</invoke>", "", "\n</minimax:tool_call>",
    ), ("<minimax:tool_call>",), ("minimax",), Members('<parameter name="KEY">', "</parameter>\n")),
    ToolFormat("seed_oss", SeedOss, Frame(
        "", "<seed:tool_call>\n<function=NAME>\n", "</function>\n</seed:tool_call>", "\n", "",
    ), ("<seed:tool_call>",), (), Members("<parameter=KEY>", "</parameter>\n")),
    ToolFormat("qwen3_coder", Qwen3Coder, Frame(
        "", f"{_CALL}<function=NAME>\n", "</function>\n</tool_call>", "\n", "",
    ), ("<function=", "<parameter="), (
        "qwen3_xml", "qwen3_coder_xml", "nemotron3", "mimo", "step3p5",
    ), _QWEN_MEMBERS),
    ToolFormat("glm45", Glm, Frame(
        "", "<tool_call>NAME\n", "</tool_call>", "\n", "",
    ), ("<arg_key>",), ("glm47", "glm", "poolside_v1"), Members(
        "<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n",
    )),
    ToolFormat("nemotron_json", Nemotron, Frame(
        "<TOOLCALL>[", _JSON_CALL, "}", ", ", "]</TOOLCALL>",
    ), ("<TOOLCALL>",), ("llama_nemotron_json",)),
    ToolFormat("hunyuan_a13b", ToolCalls, Frame(
        "<tool_calls>[", _JSON_CALL, "}", ", ", "]</tool_calls>",
    ), ("<tool_calls>",), ("jamba", "minimax_m1")),
    ToolFormat("phi4_mini_json", Phi4, Frame(
        "functools[", _JSON_CALL, "}", ", ", "]",
    ), ("functools",), ("phi4",)),
    ToolFormat("phi4_marked", Phi4, Frame(
        "", f"<|tool_call|>{_JSON_CALL}", "}<|/tool_call|>", "", "",
    ), ("<|/tool_call|>",)),
    ToolFormat("granite", Granite, Frame(
        "<|tool_call|>[", _JSON_CALL, "}", ", ", "]",
    ), ("<|tool_call|>",)),
    ToolFormat("granite_20b_fc", Granite, Frame(
        "", f"<function_call> {_JSON_CALL}", "}", "\n", "",
    ), ("<function_call>",), ("granite-20b-fc",)),
    ToolFormat("hermes", Hermes, Frame(
        "", f"{_CALL}{_JSON_CALL}", "}\n</tool_call>", "\n", "",
    ), ("<tool_call>",), ("qwen", "granite4")),
    ToolFormat("functionary_v31", Functionary, Frame(
        "", "<function=NAME>", "</function>", "", "",
    ), ("<function=", "</function>"), ("llama3_function",)),
    ToolFormat("lfm2", Pythonic, Frame(
        "<|tool_call_start|>[", "NAME(", ")", ", ", "]<|tool_call_end|>",
    ), ("<|tool_list_start|>",), (), Members("KEY=", "", ", ", bare_strings=False)),
    ToolFormat("llama4_pythonic", Pythonic, Frame(
        "[", "NAME(", ")", ", ", "]",
    ), ("func_name1(",), ("pythonic",), Members("KEY=", "", ", ", bare_strings=False)),
    ToolFormat("xlam", Xlam, Frame(
        "[", _JSON_CALL, "}", ", ", "]",
    ), ("[{", '"name": "func_name1"')),
    ToolFormat("llama3_json", Llama3, Frame(
        "", '{"name": "NAME", "parameters": ', "}", "; ", "",
    ), ('"parameters":',), ("llama3", "llama4_json")),
)  # fmt: skip
# Formats that are not read: what each is, and a text that only its templates have.
UNREAD = {
    "harmony, the channels of gpt-oss": "<|channel|>commentary",
    "the open and close marks of Kimi K3": "<|open|>",
    "the nested marks of MiniMax M3": "]<]minimax[>[",
    "the messages of Solar Open": "<|tool_call:begin|>",
    "the steptml marks of Step 3": "<steptml:invoke",
    "the marks of Inkling": "<|content_invoke_tool",
    "the recipients of Functionary 3.2": ">>>all",
    "the recipients of Muse": "<atem:function_calls>",
    "the marks of ERNIE 4.5, whose answers stand in <response>": "<response>",
}
CHOICES = ("auto", "none", *(name for f in FORMATS for name in (f.name, *f.aliases)))
_BARE = (Hermes, Pythonic, Llama3, Xlam)  # whose calls may stand without a mark at the beginning of an answer


def tool_format(chosen: str, template: str | None) -> ToolFormat | None:
    """The format of `--tool-call-parser`; with "auto", the one that the chat template writes calls in.

    The template is given a call, and what it makes of it is read back. Only a template that shows no calls
    is judged by the words it is written in.
    Raises UsageError for an unknown name.
    """
    if chosen == "none":
        return None
    if chosen == "auto":
        return None if template is None else _written_by(template)
    found = next((f for f in FORMATS if chosen in (f.name, *f.aliases)), None)
    if found is None:
        raise UsageError(f"--tool-call-parser: {chosen!r} is not one of {', '.join(CHOICES)}")
    return found


def unread_format(template: str | None) -> str | None:
    """What a template's format of calls is, where it is known and not read; None else."""
    return next((what for what, sign in UNREAD.items() if template and sign in template), None)


def _written_by(template: str) -> ToolFormat | None:
    if "tools" not in template:
        return None
    try:
        traits = template_traits(template)
    except UsageError:  # requests will say so
        return _signed(template)
    turn = traits.written_call
    if turn is None or VALUE not in turn:
        return _signed(template)
    marked = [f for f in FORMATS if _reads(f, turn)]
    if marked:
        return next((f for f in marked if _framed(f, turn)), marked[0])
    begins = [at for at in (turn.find("{"), turn.find("["), turn.find(CALL + "(") - 1) if at >= 0]
    bare = [f for f in FORMATS if f.parser in _BARE and any(_reads(f, turn[at:]) for at in begins)]
    if not bare:
        return None
    signed = _signed(template)  # a template may leave the marks out that it asks for
    if signed is not None:
        return signed
    header = "".join(traits.answer_header.split())
    if not any("".join(turn[:at].split()) == header for at in begins):
        return None  # a mark stands in front that no format knows
    return next((f for f in bare if _framed(f, turn)), bare[0])


def _reads(known: ToolFormat, turn: str) -> bool:
    """Whether a format finds the trial's call, and nothing else, in a turn."""
    parser = known.parser([CALL], {CALL: TOOL["function"]["parameters"]})  # type: ignore[index]
    events = parser.feed(turn, final=True)
    starts = [event.name for event in events if isinstance(event, CallStart)]
    text = "".join(event.text for event in events if isinstance(event, CallArguments))
    try:
        return starts == [CALL] and json.loads(text) == ARGUMENTS
    except ValueError:
        return False


def _framed(known: ToolFormat, turn: str) -> bool:
    """Whether a turn has the format's marks, spaces apart."""
    begin = (known.frame.before + known.frame.call_before).replace("NAME", CALL).replace("INDEX", "0")
    return "".join(begin.split()) in "".join(turn.split())


def _signed(template: str) -> ToolFormat | None:
    """The format that the template's words tell of."""
    if "tools" not in template:
        return None
    plain = template.replace('\\"', '"').replace("'+'", "")
    return next((f for f in FORMATS if all(sign in plain for sign in f.signs)), None)
