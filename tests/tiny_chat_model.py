"""A tiny random model that can chat: a byte-level tokenizer of 3008 tokens and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import LLAMA, write_hf

from llama_jax.convert.gguf_tokenizer import tokenizer_files

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thinking is off by default, as by enable_thinking=False elsewhere; "free" leaves it to the model.
TOOL_TEMPLATE = """\
{%- if tools or builtin_tools %}{{ '<|im_start|>system\\n' }}
{%- for tool in tools or [] %}{{ tool | tojson + '\\n' }}{% endfor %}
{{- 'Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- elif enable_thinking != 'free' %}{{ '<think>\\n' }}{% endif %}{% endif %}"""
METADATA = Path(__file__).parent / "data" / "tokenizer" / "byte_level_gguf.json"


def write_chat_model(
    folder: Path, *, context: int = 256, layers: int = 1, template: str | None = TEMPLATE, **generation: object
) -> Path:
    """Writes a Hugging Face folder; its random weights make the same random text everywhere.

    Args:
      layers: with one, a prompt's attention is that of its last token alone, which the kernels of decoding compute.
    """
    metadata = json.loads(METADATA.read_text())
    hf = LLAMA | {
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "num_hidden_layers": layers,
        "max_position_embeddings": context,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    write_hf(folder, hf)
    for name, content in tokenizer_files(metadata).items():
        (folder / name).write_text(content)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **generation}))
    return folder
