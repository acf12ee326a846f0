"""Chat templates of the kinds in use, as short as their traits allow; made for tests."""

# Llama 3: a header for every turn, texts trimmed, BOS written by the template.
LLAMA3 = (
  "{{ bos_token }}{% for m in messages %}"
  "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
  "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Mistral: no head of an answer's turn at all, the system's words in the last user turn, and only
# where that is the last turn of all; calls of tools have a form of their own.
MISTRAL = (
  "{% set told = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
  "{% set turns = messages[1:] if told else messages %}{{ bos_token }}{% for m in turns %}"
  "{% if m['role'] == 'user' %}"
  "{% if tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
  "{{ '[INST] ' + (told + '\n\n' if told and loop.last else '') + m['content'] + '[/INST]' }}"
  "{% elif m['tool_calls'] %}"
  "{% for call in m['tool_calls'] %}{{ '[TOOL_CALLS] ' + call['function'] | tojson }}{% endfor %}"
  "{{ eos_token }}"
  "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}"
  "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)

# Qwen 3: ChatML; thoughts behind the last user turn alone, an empty thought written for answers
# without one, and into the prompt where thinking is switched off.
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

# Gemma: the assistant is called model, and a system turn is refused.
GEMMA = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if m['role'] == 'system' %}{{ raise_exception('system turns are not known') }}{% endif %}"
  "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
  "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Writes a head for every turn and knows nothing of one that is to come.
NO_PROMPT = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
)

# Phi 3: ends the turn, and then the text, where no answer is awaited.
TWO_ENDS = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
  "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)

# A reasoner: opens the thought for the model, and forgets what was thought in every turn.
REASONER = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] }}"
  "{{ '<|end|>' if m['role'] == 'assistant' }}{% endfor %}"
  "{{ '<|assistant|><think>\n' if add_generation_prompt }}"
)

# Says nothing of system turns.
NO_SYSTEM = (
  "{% for m in messages if m['role'] != 'system' %}"
  "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
  "{{ '<|assistant|>' if add_generation_prompt }}"
)

_TURNS = ("<|user|>", "<|assistant|>", "<|end|>")
# Name: template, special tokens, and the names of those that the template itself uses.
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
