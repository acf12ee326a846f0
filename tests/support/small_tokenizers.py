"""Builds small tokenizers of each family, trained on a few lines, quickly enough for every test."""

import json
import pathlib

from tokenizers import (
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

LINES = [
  "the answer is good and the answer is bad",
  "Human: is it good? Assistant: it is bad, and that is the answer",
  "a question and an answer, a good one and a bad one\n\nand more",
] * 4

CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
  " + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The system message is written into the last user turn, and only if that is the last of all turns.
SYSTEM_LAST = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
  "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
  "{% for message in turns %}{% if message['role'] == 'user' %}"
  "{% if loop.last and system is defined %}{{ '[INST] ' + system + ' | ' + message['content']"
  " + '[/INST]' }}{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
  "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(folder: pathlib.Path, *, special: tuple[str, ...] = (), **settings) -> pathlib.Path:
  """Builds a tokenizer like GPT-2's: bytes, spaces before words, no BOS; `special` as given."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=[*(special or ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(LINES, trainer)
  return save(folder, tokenizer, {"eos_token": "<|endoftext|>"} | settings)


def by_merges(folder: pathlib.Path, *merges: tuple[str, str], **settings) -> pathlib.Path:
  """Builds a byte tokenizer with these merges, in order of priority, also across words."""
  vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  for pair in merges:
    vocab["".join(pair)] = len(vocab)
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
  return save(folder, tokenizer, settings)


def byte_fallback(folder: pathlib.Path, **settings) -> pathlib.Path:
  """Builds a tokenizer like Llama's: a space first, bytes for unknown characters, and BOS."""
  special = ["<unk>", "<s>", "</s>"]
  words = BPE_WORDS
  vocab = {token: i for i, token in enumerate(special)}
  for token in [f"<0x{byte:02X}>" for byte in range(256)] + words:
    vocab.setdefault(token, len(vocab))
  merges = [(word[:-1], word[-1]) for word in words if len(word) > 1]
  tokenizer = Tokenizer(
    models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  tokenizer.add_special_tokens(special)
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
  )
  return save(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>"} | settings)


# Letters, and every prefix of a word: its merges add one letter at a time.
BPE_WORDS = list(
  dict.fromkeys(
    [*"▁abcdefghijklmnopqrstuvwxyzHA.,:?"]
    + [word[:n] for word in ("▁answer", "▁good", "▁bad", "the") for n in range(1, len(word) + 1)]
  )
)


def word_level(folder: pathlib.Path, **settings) -> pathlib.Path:
  """Builds a tokenizer of words between spaces; an unknown word is `<unk>`."""
  words = ["<unk>", "<s>", "</s>", "the", "answer", "is", "good", "bad", "and"]
  tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(words[:3])
  names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
  return save(folder, tokenizer, names | settings)


def save(folder: pathlib.Path, tokenizer: Tokenizer, settings: dict) -> pathlib.Path:
  """Writes tokenizer.json and tokenizer_config.json to a folder, and returns it."""
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
  return folder
