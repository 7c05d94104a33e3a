"""Chat templates in the styles that released models have, written short, with what each says of one conversation.

They are text with gaps for messages, and the text is in the public descriptions of the formats.
"""

from __future__ import annotations

from typing import NamedTuple

SPECIAL = (
    *("<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<end_of_utterance>", "<image>", "<|im_start|>"),
    *("<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|image_pad|>"),
)
"""Special tokens of all of them."""
TALK = [
    {"role": "user", "content": " Which? "},
    {"role": "assistant", "content": "A red\ncat."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "a"},
]


class Style(NamedTuple):
    """A template, and what is expected of it.

    Fields:
        learned: what the two answers of `TALK` train.
        asking: what is generated behind.
        opening: what stands before the user's first message.
    """

    template: str
    learned: tuple[str, str]
    asking: str
    opening: str = ""


LOOP = "{% for m in messages %}"
END = "{% endfor %}"
VICUNA = (
    "A chat. " + LOOP + "{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT: "
    "{{ m.content }}</s>{% else %}{{ m.content }} {% endif %}"
    + END
    + "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + "
    "messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}"
    "{% endif %}{% if m.role == 'user' %}<s>[INST] "
    "{{ system + m.content.strip() if loop.first else m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}" + END
)
LLAMA3 = (
    LOOP + "{% set t = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set t = '<|begin_of_text|>' + t %}{% endif %}{{ t }}"
    + END
    + "{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + LOOP
    + ""
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    + END
    + ""
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>"
    + LOOP
    + "{% if m.role == 'system' %}{% elif m.role == 'user' %}[INST]{% if loop.last and messages[0].role == "
    "'system' %}{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}</s>"
    "{% endif %}" + END
)
SMOLVLM = (
    "<|im_start|>" + LOOP + "{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}{% for p in "
    "m.content %}{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n" + END + "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PHI = (
    LOOP
    + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    + END
    + "{% if add_generation_prompt %}<|assistant|>\n"
    "{% else %}<|endoftext|>{% endif %}"
)
# Thoughts of earlier answers are taken out, and the last answer always has some.
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    + LOOP
    + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    + END
    + LOOP
    + "{% if m.role == 'assistant' %}{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}"
    "{% else %}{{ c }}{% endif %}<|im_end|>\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    + END
    + "{% if add_generation_prompt %}<|im_start|>assistant\nTHINK{% endif %}"
)
MARKED = (
    LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n" + END + "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
# No generation prompt, although answers have a header.
FORGETFUL = LOOP + "<|{{ m.role }}|>\n{{ m.content }}</s>\n" + END

STYLES = {
    "vicuna": Style(VICUNA, (" A red\ncat.</s>", " a</s>"), "ASSISTANT:", "A chat. "),
    "llama2": Style(LLAMA2, (" A red\ncat. </s>", " a </s>"), ""),
    "llama3": Style(
        LLAMA3,
        ("A red\ncat.<|eot_id|>", "a<|eot_id|>"),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|>",
    ),
    "gemma": Style(GEMMA, ("A red\ncat.<end_of_turn>", "a<end_of_turn>"), "<start_of_turn>model\n", "<bos>"),
    "mistral": Style(MISTRAL, ("A red\ncat.</s>", "a</s>"), "", "<s>"),
    "smolvlm": Style(SMOLVLM, (" A red\ncat.<end_of_utterance>", " a<end_of_utterance>"), "Assistant:", "<|im_start|>"),
    "phi": Style(PHI, ("A red\ncat.<|end|>", "a<|end|>"), "<|assistant|>\n"),
    "qwen3": Style(
        QWEN3.replace("THINK", ""),
        ("A red\ncat.<|im_end|>", "<think>\n\n</think>\n\na<|im_end|>"),
        "<|im_start|>assistant\n",
    ),
    "qwen3 that opens a thought": Style(
        QWEN3.replace("THINK", "<think>\n"),
        ("A red\ncat.<|im_end|>", "\n</think>\n\na<|im_end|>"),
        "<|im_start|>assistant\n<think>\n",
    ),
    "marked": Style(MARKED, ("A red\ncat.<|im_end|>", "a<|im_end|>"), "<|im_start|>assistant\n"),
    "forgetful": Style(FORGETFUL, ("A red\ncat.</s>", "a</s>"), "<|assistant|>\n"),
}
