"""Short chat templates with the habits of the common families, each with a tokenizer that has the family's tokens.

A tokenizer has one token per byte besides, so that every text can be told apart and decoded again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from .data import make_byte_tokenizer, make_sentencepiece_tokenizer

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Strings only: what is no string is as good as nothing.
STRINGS = CHATML.replace("m.content", "(m.content if m.content is string else '')")

# Parts only: a string is walked character by character, and nothing of it is written.
PARTS = """{{ '<|im_start|>' }}{% for m in messages %}{{ m.role | capitalize }}:
{%- for part in m.content %}{% if part.type == 'text' %}{{ ' ' + part.text }}{% elif part.type == 'image' %}
{{- '<image>' }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

# A system turn with today's date in any case, tools in the first user turn, trimmed contents, one call per turn.
LLAMA3 = """{{ bos_token }}{% set day = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{% else %}{% set system = '' %}{% endif %}
{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n' + system + '<|eot_id|>' }}
{%- if tools %}{{ '<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n' }}
{%- for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
{{- messages[0].content | trim + '<|eot_id|>' }}{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}{% if m.role in ('tool', 'ipython') %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}{% elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' }}{% else %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# Roles alternate, the system's text is in the first user turn, and there is a space before answers.
LLAMA2 = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}
{% else %}{% set system = false %}{% endif %}{{ bos_token }}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}
{%- else %}{% set content = m.content %}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + content.strip() + ' [/INST]' }}{% elif m.role == 'assistant' %}
{{- ' ' + content.strip() + ' ' + eos_token }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}"""

# As above, but the system's text and the tools are in the last user turn, and calls need an id of nine characters.
MISTRAL = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}
{% set messages = messages[1:] %}{% endif %}{% set ns = namespace(last=-1, turn=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- if (m.role == 'user' or m.role == 'assistant' and not m.tool_calls) %}
{%- if (m.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set ns.turn = ns.turn + 1 %}{% endif %}{% endfor %}{{ bos_token }}
{%- for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- if system is defined and loop.index0 == ns.last %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}{% if not call.id is defined or call.id | length != 9 %}
{{- raise_exception('the id of a call has nine characters') }}{% endif %}
{{- ', ' if not loop.first else '' }}{{ call.function | tojson }}{% endfor %}{{ ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}{% else %}
{{- raise_exception('no such role') }}{% endif %}{% endfor %}"""

# The assistant is the model; a system turn is an error.
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Reasoning is taken out of contents and written in the turns after the last question only; results are user turns.
QWEN3 = """{% if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}{{ '# Tools\n<tools>' }}
{%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}
{%- endif %}{% endfor %}
{%- for m in messages %}{% set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' or m.role == 'system' and not loop.first %}
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{% set reasoning = '' %}
{%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{ content }}{% endif %}
{%- for call in m.tool_calls or [] %}{% if not loop.first or content %}{{ '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""

# Every turn without reasoning has empty tags for it, also those of old.
GLM = """[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}
{%- if '</think>' in m.content %}{{ '<think>' + m.content.split('</think>')[0].split('<think>')[-1].strip() }}
{{- '</think>\n' + m.content.split('</think>')[-1].strip() }}
{%- elif m.reasoning_content %}{{ '<think>' + m.reasoning_content.strip() + '</think>\n' + m.content.strip() }}
{%- else %}{{ '<think></think>\n' + m.content.strip() }}{% endif %}{{ '<|endofturn|>' }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

# The generation prompt begins the reasoning, and what an assistant turn says up to its end is cut away.
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' and m.tool_calls %}{% for call in m.tool_calls %}
{{- '<|tool_call|>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<|tool_end|>' }}{% endfor %}
{{- '<|end▁of▁sentence|>' }}
{%- elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end▁of▁sentence|>' }}
{%- elif m.role == 'tool' %}{{ '<|tool_result|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# Channels; turns end with <|end|>, the last one with <|return|>, calls with <|call|>; a developer turn; the date.
HARMONY = """{% macro system() %}{{ 'Current date: ' + strftime_now('%Y-%m-%d') + '\n' }}
{{- 'Reasoning: ' + (reasoning_effort or 'medium') }}{% endmacro %}
{{- '<|start|>system<|message|>' }}{{ system() }}{{ '<|end|>' }}
{%- if messages[0].role in ('developer', 'system') %}{% set instructions = messages[0].content %}
{%- set messages = messages[1:] %}{% else %}{% set instructions = '' %}{% endif %}
{%- if instructions or tools %}{{ '<|start|>developer<|message|>' + instructions }}
{%- for tool in tools or [] %}{{ '\n// ' + (tool.function.description or '') }}
{{- '\ntype ' + tool.function.name + ' = (_: ' }}
{{- tool.function.parameters | tojson + ') => any;' }}{% endfor %}{{ '<|end|>' }}{% endif %}
{%- for m in messages %}{% if m.role == 'assistant' %}
{%- if m.tool_calls %}{% if m.content or m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.thinking or m.content) + '<|end|>' }}{% endif %}
{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- else %}{% if m.thinking and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}
{%- elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content | tojson }}
{{- '<|end|>' }}{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# Its tokens swallow the blanks after them.
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# No token ends a turn.
ENDLESS = """{% for m in messages %}{{ '### ' + m.role | capitalize + ':\n' + m.content | trim + '\n\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"""

EOS_LAST = ENDLESS.replace("{%- if add", "{%- if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add")

# A system turn comes first; documents are listed in it.
COMMAND = """{{ bos_token }}
{%- if messages[0].role != 'system' %}{{ raise_exception('a system turn is first') }}{% endif %}
{%- for m in messages %}{{ '<|START|><|' + m.role | upper + '|>' + m.content | trim }}
{%- if loop.first and documents %}{{ '\n<results>' }}{% for document in documents %}
{{- '\nDocument: ' ~ loop.index0 }}{% for key, value in document.items() %}{{ '\n' + key + ': ' ~ value }}{% endfor %}
{%- endfor %}{{ '\n</results>' }}{% endif %}{{ ('<|END_TEXT|>' if m.role == 'assistant' else '') + '<|END|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START|><|ASSISTANT|>' }}{% endif %}"""


@dataclass
class Family:
    """A chat template, and the tokens of its tokenizer: ``special`` ones, and ``added`` ones that are not special.

    ``lacks`` are the kinds of rows of which the template leaves something out, or which it rejects.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    rstrip: bool = False  # of special tokens
    sentencepiece: bool = False
    lacks: frozenset[str] = frozenset()
    options: dict[str, Any] = field(default_factory=dict)  # by which rows are read

    @property
    def name(self) -> str:
        return next(name for name, one in FAMILIES.items() if one.template == self.template)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        make = make_sentencepiece_tokenizer if self.sentencepiece else make_byte_tokenizer
        return make(
            self.template, special=self.special, added=self.added, eos=self.eos, bos=self.bos, rstrip=self.rstrip
        )


def _marks(*names: str) -> tuple[str, ...]:
    return tuple(f"<|{name}|>" for name in names)


def _brackets(*names: str) -> tuple[str, ...]:
    return tuple(f"[{slash}{name}]" for name in names for slash in ("", "/"))


_IM = _marks("endoftext", "im_start", "im_end")
_THINK = ("<think>", "</think>")
_TOOLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

_PLAIN = frozenset({"calls", "tools", "documents", "reasoning", "enable_thinking", "date_string"})  # what ChatML lacks
_ALTERNATING = _PLAIN | {"late system", "developer", "two answers"}

FAMILIES = {
    "chatml": Family(CHATML, _IM, "<|im_end|>", lacks=_PLAIN),
    "chatml, base model": Family(CHATML, _IM, "<|endoftext|>", lacks=_PLAIN),
    "strings": Family(STRINGS, _IM, "<|im_end|>", lacks=_PLAIN),
    "parts": Family(
        PARTS,
        ("<|im_start|>", "<end_of_utterance>", "<image>"),
        "<end_of_utterance>",
        "<|im_start|>",
        lacks=_PLAIN,
    ),
    "llama3": Family(
        LLAMA3,
        _marks("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id"),
        "<|eot_id|>",
        "<|begin_of_text|>",
        lacks=_PLAIN - {"calls", "tools", "date_string"} | {"calls with text", "several calls"},
    ),
    "llama2": Family(LLAMA2, ("<unk>", "<s>", "</s>"), "</s>", "<s>", sentencepiece=True, lacks=_ALTERNATING),
    "mistral": Family(
        MISTRAL,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", *_brackets("AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS")),
        "</s>",
        "<s>",
        sentencepiece=True,
        lacks=_ALTERNATING - {"calls", "tools"} | {"calls with text", "calls without id"},
    ),
    "gemma": Family(
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<bos>",
        ("\n\n", "  "),
        lacks=_ALTERNATING | {"system"},
    ),
    "qwen3": Family(
        QWEN3,
        _IM,
        "<|im_end|>",
        added=(*_THINK, *_TOOLS),
        lacks=frozenset({"documents", "date_string", "developer", "earlier reasoning", "earlier tags", "two answers"}),
    ),
    "glm": Family(
        GLM,
        ("[gMASK]", "<sop>", *_marks("system", "user", "assistant", "endofturn", "tool", "developer"), *_THINK),
        "<|endofturn|>",
        lacks=_PLAIN - {"reasoning"} | {"open tags"},
    ),
    "r1": Family(
        R1,
        ("<|begin▁of▁sentence|>", "<|end▁of▁sentence|>"),
        "<|end▁of▁sentence|>",
        "<|begin▁of▁sentence|>",
        (*_marks("User", "Assistant", "tool_call", "tool_end", "tool_result"), *_THINK),
        options={"add_generation_prompt": False},
        lacks=_PLAIN - {"calls"} | {"calls with text", "developer", "tags", "earlier tags", "open tags"},
    ),
    "harmony": Family(
        HARMONY,
        _marks("startoftext", "start", "message", "channel", "end", "return", "call"),
        "<|return|>",
        lacks=_PLAIN - {"calls", "tools", "reasoning"}
        | {"late system", "several calls", "earlier reasoning", "calls continued", "odd tools"},
    ),
    "phi": Family(
        PHI,
        _marks("endoftext", "end", "system", "user", "assistant", "tool", "developer"),
        "<|endoftext|>",
        rstrip=True,
        lacks=_PLAIN,
    ),
    "zephyr": Family(ZEPHYR, ("<unk>", "<s>", "</s>"), "</s>", lacks=_PLAIN),
    "generation": Family(GENERATION, _IM, "<|im_end|>", lacks=_PLAIN),
    "endless": Family(ENDLESS, ("<s>", "</s>"), "</s>", added=("\n\n",), lacks=_PLAIN),
    "eos last": Family(EOS_LAST, ("<s>", "</s>"), "</s>", lacks=_PLAIN),
    "command": Family(
        COMMAND,
        ("<bos>", "<eos>", *_marks("START", "END_TEXT", "END", "SYSTEM", "USER", "ASSISTANT", "TOOL", "DEVELOPER")),
        "<|END|>",
        "<bos>",
        lacks=_PLAIN - {"documents"} | {"no system"},
    ),
}
# Other ways to use them.
FAMILIES |= {
    f"{name}, no generation prompt": replace(FAMILIES[name], options={"add_generation_prompt": False})
    for name in ("chatml", "llama2", "qwen3", "harmony", "phi", "eos last")
}
FAMILIES["qwen3, special tags"] = replace(FAMILIES["qwen3"], special=(*_IM, *_THINK), added=_TOOLS)
