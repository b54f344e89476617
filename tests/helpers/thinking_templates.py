"""Chat templates that leave out the thinking of earlier turns, small, after what is publicly known of four families.

Each does as its family does in what matters for training: where thinking stands, when it is left out, what the generation
prompt opens, and how tool calls and their results look. Line breaks are spaces here, which the tests' tokenizer has.
"""

from helpers.tiny_models import make_tokenizer


# An answer as its thinking, which may stand beside it or in it, and its content.
_PARTS = """\
{%- set content = m.content -%}
{%- set thinking = m.reasoning_content if m.reasoning_content is string else '' -%}
{%- if not thinking and '</think>' in content -%}
  {%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip() -%}
  {%- set content = content.split('</think>')[-1].strip() -%}
{%- endif -%}
"""

# Thinking is rendered after the last question only; there, an answer without any gets an empty block. With
# enable_thinking=false the prompt brings the empty block.
QWEN3 = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'user' and not m.content.startswith('<tool_response>') -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools %}{{ '{s}tools:' }}{% for t in tools %}{{ t.function.name }};{% endfor %}{{ '{e} ' }}{% endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    PARTS
    {{- '{s}assistant ' -}}
    {%- if loop.index0 > ns.last and (loop.last or thinking) -%}
      {{- '<think> ' ~ thinking.strip() ~ ' </think> ' -}}
    {%- endif -%}
    {{- content -}}
    {%- for call in m.tool_calls or [] -%}
      {{- ' <tool_call>' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson) ~ '</tool_call>' -}}
    {%- endfor -%}
    {{- '{e} ' -}}
  {%- elif m.role == 'tool' -%}{{- '{s}user <tool_response>' ~ m.content ~ '</tool_response>{e} ' -}}
  {%- else -%}{{- '{s}' ~ m.role ~ ' ' ~ m.content ~ '{e} ' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '{s}assistant ' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>  </think> ' -}}{%- endif -%}
{%- endif -%}
"""

# Every answer has a block, which is empty before the last question and where there is no thinking. No token closes a
# turn: the next role does.
GLM45 = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- '[gMASK]' -}}
{%- if tools %}{{ '|system|tools:' }}{% for t in tools %}{{ t.function.name }};{% endfor %}{% endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{- '|user|' ~ m.content -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '/nothink' -}}{%- endif -%}
  {%- elif m.role == 'assistant' -%}
    PARTS
    {{- '|assistant| <think>' ~ (thinking.strip() if loop.index0 > ns.last else '') ~ '</think>' -}}
    {%- if content.strip() -%}{{- ' ' ~ content.strip() -}}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {{- ' <tool_call>' ~ call.function.name ~ (call.function.arguments | tojson) ~ '</tool_call>' -}}
    {%- endfor -%}
  {%- elif m.role == 'tool' -%}{{- '|observation|<tool_response>' ~ m.content ~ '</tool_response>' -}}
  {%- else -%}{{- '|' ~ m.role ~ '|' ~ m.content -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '|assistant|' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- ' <think></think>' -}}{%- endif -%}
{%- endif -%}
"""

# No answer keeps its thinking, not even the last, but the generation prompt opens a block.
DEEPSEEK_R1 = """\
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{- '<|User|>' ~ m.content -}}
  {%- elif m.role == 'assistant' -%}
    {{- '<|Assistant|>' ~ m.content.split('</think>')[-1].strip() -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '<|call|>' ~ call.function.name ~ (call.function.arguments | tojson) ~ '<|/call|>' -}}
    {%- endfor -%}
    {{- '<|eos|>' -}}
  {%- elif m.role == 'tool' -%}{{- '<|output|>' ~ m.content ~ '<|/output|>' -}}
  {%- else -%}{{- m.content -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think> ' -}}{%- endif -%}
"""

# Messages in channels: thinking is the analysis before the last answer, or before a tool call that no answer follows. The
# last answer ends with |return|, earlier ones with |end|. Content beside both thinking and calls is refused.
HARMONY = """\
{%- if tools %}{{ '|start|developer|message|' }}{% for t in tools %}{{ t.function.name }};{% endfor %}{{ '|end|' }}{% endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- if '|channel|' in m.content -%}{{- raise_exception('channels belong into the field thinking') -}}{%- endif -%}
    {%- if m.tool_calls -%}
      {%- set ns = namespace(answered=false) -%}
      {%- for later in messages[loop.index:] -%}
        {%- if later.role == 'assistant' and not later.tool_calls -%}{%- set ns.answered = true -%}{%- endif -%}
      {%- endfor -%}
      {%- if m.content and m.thinking -%}{{- raise_exception('content and thinking beside tool calls') -}}{%- endif -%}
      {%- if (m.content or m.thinking) and not ns.answered -%}
        {{- '|start|assistant|channel|analysis|message|' ~ (m.thinking or m.content) ~ '|end|' -}}
      {%- endif -%}
      {%- set call = m.tool_calls[0].function -%}
      {{- '|start|assistant to=' ~ call.name ~ '|channel|commentary|message|' ~ (call.arguments | tojson) ~ '|call|' -}}
    {%- elif loop.last and not add_generation_prompt -%}
      {%- if m.thinking -%}{{- '|start|assistant|channel|analysis|message|' ~ m.thinking ~ '|end|' -}}{%- endif -%}
      {{- '|start|assistant|channel|final|message|' ~ m.content ~ '|return|' -}}
    {%- else -%}{{- '|start|assistant|channel|final|message|' ~ m.content ~ '|end|' -}}
    {%- endif -%}
  {%- elif m.role == 'tool' -%}{{- '|start|tool to=assistant|message|' ~ m.content ~ '|end|' -}}
  {%- else -%}
    {%- set effort = '(' ~ reasoning_effort ~ ')' if reasoning_effort is defined and m.role == 'system' else '' -%}
    {{- '|start|' ~ m.role ~ '|message|' ~ m.content ~ effort ~ '|end|' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '|start|assistant' -}}{%- endif -%}
"""

TEMPLATES = {
    "qwen3": QWEN3.replace("PARTS", _PARTS),
    "glm45": GLM45.replace("PARTS", _PARTS),
    "deepseek_r1": DEEPSEEK_R1,
    "harmony": HARMONY,
}


def thinking_tokenizer(family: str):
    """A tokenizer with one token per character and the template of a family."""
    return make_tokenizer(TEMPLATES[family])
