"""Every field of a run, with its default. The other configurations start from here."""

from ml_collections import ConfigDict, config_dict

from dpo_jax import losses
from dpo_jax.structs import UserError

FIELDS = (
  "prompt",
  "chosen",
  "rejected",
  "completion",
  "label",
  "answers",
  "scores",
  "margin",
  "chosen_score",
  "rejected_score",
  "instruction",
  "input",
  "answer_a",
  "answer_b",
  "preference",
  "weight",
)


def section(**fields) -> ConfigDict:
  """One section of a configuration."""
  return ConfigDict(fields)


def parse(arg: str, known: tuple[str, ...]) -> dict[str, str]:
  """`key=value,key=value` after the colon of --config, as a dictionary."""
  given = {}
  for part in filter(None, arg.split(",")):
    key, equals, value = part.partition("=")
    if key not in known or not equals:
      raise UserError(f"the configuration's argument {part!r} is not one of {'=…, '.join(known)}=…")
    given[key] = value
  return given


def number(given: dict[str, str], key: str, default: float) -> float:
  """The number given for `key`, or the default."""
  try:
    return float(given.get(key, default))
  except ValueError:
    raise UserError(f"the configuration's {key}={given[key]} is not a number") from None


def loss(name: str, **given) -> ConfigDict:
  """The loss section: a name, and a place for every argument and modifier, None where not given.

  So `--config.loss.name=robust --config.loss.label_smoothing=0.2` works on any configuration, and
  an argument the chosen loss does not read is an error, never silence.
  """
  taken = {key: float for known in losses.LOSSES for key in losses.arguments(known)}
  types = taken | losses.modifiers()
  section = ConfigDict(
    {"name": name} | {key: config_dict.placeholder(types[key]) for key in sorted(types)}
  )
  section.update(given)
  return section


def get_config() -> ConfigDict:
  """The defaults themselves; not a run, since no model and no data are named."""
  return ConfigDict(
    {
      "seed": 0,
      "model": section(
        path="",  # Hugging Face folder to start from; "" starts from `scratch`
        tokenizer="",  # folder of the tokenizer; "" takes model.path
        scratch=ConfigDict(),  # fields of a config.json, for a model trained from nothing
        compute_dtype="float32",  # of matrix products: float32 or bfloat16
        param_dtype="float32",  # of the policy's parameters
        remat="dots",  # what the backward pass recomputes: none, dots or full
        attention="auto",  # auto, or tiles (CPU), cudnn (GPU), splash (TPU), blocked, xla
      ),
      "reference": section(
        path="",  # Hugging Face folder of the reference; "" is the policy as it starts
        param_dtype="float32",
        sync_every=0,  # steps after which the reference follows the policy (TR-DPO); 0 is never
        store="",  # folder where its log-probs are kept for this run and others; "" for none
        sync_alpha=0.6,  # how far it goes: 1 makes it the policy, 0.6 so much of the way
      ),
      "lora": section(
        rank=0,  # of adapters that are trained in place of the model; 0 trains the model itself
        alpha=16.0,  # their update counts alpha / rank
        rs=False,  # or alpha / sqrt(rank), which keeps its size at high ranks
        dropout=0.0,  # probability that an adapter does not see an input, in training
        target="all-linear",  # maps that get one, such as q_proj,v_proj, or query, or mlp.c_proj
        path="",  # adapter folder to go on from, with its own rank, alpha, rs and target
      ),
      "data": section(
        path="",  # preferences (or texts, for loss sft) to train on
        eval_path="",  # held-out rows; "" sets eval_fraction of data.path aside, by prompt
        eval_fraction=0.1,
        eval_limit=512,  # at most so many held-out rows
        fields=section(**dict.fromkeys(FIELDS, "")),  # their names, in rows of another form
        template="",  # values that the chat template reads, as JSON: {"enable_thinking": false}
        max_length=512,  # tokens of a prompt and one answer together
        prompt_floor=64,  # tokens of a prompt that are never cut; cutting starts at its left
        truncation="drop",  # pairs whose answers do not fit: drop, or cut
        layout="shared",  # shared (prompt once, packed), packed, or padded
        balance=True,  # batches of about as many tokens each: rows are exchanged with neighbours
        row_length=0,  # tokens of a row; 0 is a length that suits the data
      ),
      "loss": loss("sigmoid"),
      "on_policy": section(
        reward="",  # a named reward or module:function; "" learns from data.path as it stands
        num=4,  # answers sampled to a prompt of data.path, at every step
        max_tokens=64,  # of an answer
        temperature=1.0,
        prefer="rank",  # pairs of the samples: rank (best, worst), or bradley_terry (by chance)
      ),
      "optimizer": section(
        learning_rate=1e-5,
        schedule="linear",  # constant, linear or cosine, after the warm-up
        warmup_steps=config_dict.placeholder(int),  # None is 10, at most a tenth of the steps
        final_fraction=0.0,  # of the peak learning rate, at the last step
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,  # 0 for no clipping
      ),
      "train": section(
        steps=0,  # 0 is as many as `epochs` takes
        epochs=1.0,
        batch_size=32,  # pairs of one update, over all devices and micro-batches
        accumulate=1,  # micro-batches an update is added up from
        # weight of the term that spreads tokens over experts; None is what the model's folder says
        router_balance=config_dict.placeholder(float),
      ),
      "eval": section(
        every=100,  # steps; 0 only at the end
        batch_size=0,  # pairs; 0 as in train
        samples=0,  # answers sampled to held-out prompts, for KL, entropy, repetition; 0 for none
      ),
      "checkpoint": section(every=500, keep=2),  # steps (0 only at the end); how many of the latest
      "parallel": section(
        mode="mesh",  # mesh, or pmap (copies of everything, rows divided)
        devices=0,  # 0 takes all there are; those that the next three leave hold copies
        fsdp=1,  # devices among which parameters and rows are divided
        sequence=1,  # devices among which the tokens of a row are divided
        tensor=1,  # devices among which parameters are divided, and the products with them
        offload_optimizer=False,  # keeps its state in the host's memory between updates
        coordinator="",  # of several processes: the first's HOST:PORT, or auto (TPU pod, SLURM)
        processes=0,  # how many there are, with HOST:PORT
        process=0,  # which of them this is, from 0
      ),
    }
  )
