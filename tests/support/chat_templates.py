"""Short chat templates for tests, each with the traits of a kind in use."""

# Llama 3: every turn has a header, contents are trimmed, and the template writes BOS.
LLAMA3 = (
  "{{ bos_token }}{% for m in messages %}"
  "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
  "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Mistral: assistant turns have no header. The system message is written into the last user turn,
# and only where that is the last of all turns. Tool calls have a format of their own.
MISTRAL = (
  "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
  "{% set turns = messages[1:] if system else messages %}{{ bos_token }}{% for m in turns %}"
  "{% if m['role'] == 'user' %}"
  "{% if tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
  "{{ '[INST] ' + (system + '\n\n' if system and loop.last else '') + m['content'] + '[/INST]' }}"
  "{% elif m['tool_calls'] %}"
  "{% for call in m['tool_calls'] %}{{ '[TOOL_CALLS] ' + call['function'] | tojson }}{% endfor %}"
  "{{ eos_token }}"
  "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}"
  "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)

# Qwen 3: ChatML. Thoughts are kept only after the last user turn. A completion without a thought
# gets an empty one, and so does the prompt when thinking is switched off.
QWEN3 = (
  "{% set ns = namespace(last=-1) %}"
  "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
  "{% endfor %}"
  "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}"
  "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set text = m['content'] %}"
  "{% if m['role'] == 'assistant' %}{% set thought = m['reasoning_content'] or '' %}"
  "{% if '</think>' in text %}"
  "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
  "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
  "{% if loop.index0 > ns.last %}"
  "{% if loop.last or thought %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
  "{% endif %}{% endif %}{{ text }}"
  "{% for call in m['tool_calls'] or [] %}"
  "{{ '<tool_call>\n' + call['function'] | tojson + '\n</tool_call>' }}{% endfor %}"
  "{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
  "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
  "{% endif %}{% endif %}"
)

# Gemma: the assistant is named model, and a system turn raises an exception.
GEMMA = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if m['role'] == 'system' %}{{ raise_exception('system turns are not known') }}{% endif %}"
  "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
  "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Every turn has a header, and add_generation_prompt is ignored.
NO_PROMPT = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
)

# Phi 3: ends the turn and then also the sequence, unless a completion is to follow.
TWO_ENDS = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
  "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)

# A reasoning model: the prompt opens the thought, and the thoughts of all turns are removed.
REASONER = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] }}"
  "{{ '<|end|>' if m['role'] == 'assistant' }}{% endfor %}"
  "{{ '<|assistant|><think>\n' if add_generation_prompt }}"
)

# System turns are left out without an error.
NO_SYSTEM = (
  "{% for m in messages if m['role'] != 'system' %}"
  "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
  "{{ '<|assistant|>' if add_generation_prompt }}"
)

_TURNS = ("<|user|>", "<|assistant|>", "<|end|>")
# Name -> (template, special tokens, names of the special tokens that the template itself uses).
KINDS = {
  "llama3": (
    LLAMA3,
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
  ),
  "mistral": (
    MISTRAL,
    ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    {"bos_token": "<s>", "eos_token": "</s>"},
  ),
  "qwen3": (
    QWEN3,
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    {"eos_token": "<|im_end|>"},
  ),
  "gemma": (
    GEMMA,
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    {"bos_token": "<bos>", "eos_token": "<eos>"},
  ),
  "no_prompt": (NO_PROMPT, ("<|endoftext|>", *_TURNS), {"eos_token": "<|endoftext|>"}),
  "two_ends": (TWO_ENDS, ("<|endoftext|>", *_TURNS), {"eos_token": "<|endoftext|>"}),
  "reasoner": (REASONER, ("<|endoftext|>", *_TURNS), {"eos_token": "<|endoftext|>"}),
  "no_system": (NO_SYSTEM, ("<|endoftext|>", *_TURNS), {"eos_token": "<|endoftext|>"}),
}
