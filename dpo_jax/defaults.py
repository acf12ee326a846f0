"""Every field of a run's configuration, with its default. The files of configs/ start from here."""

from ml_collections import ConfigDict, config_dict

from dpo_jax import losses
from dpo_jax.structs import UserError
from dpo_jax.utils import config_flags

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
  "system",
  "history",
  "tools",
  "messages",
  "conversations",
  "text",
)

# What the arguments and modifiers of losses mean; docs/losses.md has their formulas.
LOSS_FIELDS = {
  "name": "name of the loss: sigmoid is DPO; docs/losses.md lists all",
  "beta": "reward units per nat: larger keeps the policy nearer the reference",
  "clip": "bound of the difference of rewards, in reward units",
  "desirable_weight": "weight of desirable completions",
  "gamma": "target margin, in reward units",
  "label_smoothing": "probability that a label is wrong",
  "distance": "what is compared with the gap of the scores: squared, backward_kl or forward_kl",
  "gold_weight": "weight of the log-prob of the best completion",
  "margin_scale": "reward units per unit of the data's scores",
  "mix": "share of the policy in the mixture that bounds the rejected completion",
  "odds_weight": "weight of the odds ratio",
  "penalty": "weight of the penalty where the chosen completion loses probability",
  "retain_weight": "weight of the completions to keep",
  "reward_alpha": "shape of the reward (1 - p^-α) / α; 0 is log p",
  "tau": "temperature of the mixture of two losses",
  "undesirable_weight": "weight of undesirable completions",
  "sft_weight": "adds the mean negative log-prob of the chosen completion with this weight",
  "ld_alpha": "weight of tokens beyond the length of the shorter completion",
  "wpo": "True weights pairs by how likely the policy is to generate them",
  "link": "divergence: reverse_kl, forward_kl, jensen_shannon or alpha",
  "link_alpha": "α of the divergence alpha",
  "reference_free": "True treats the reference as uniform; it is not loaded",
  "running_decay": "decay of statistics over earlier batches",
}


def section(**fields) -> ConfigDict:
  """Makes one section of a configuration."""
  return ConfigDict(fields)


def parse(arg: str, known: tuple[str, ...]) -> dict[str, str]:
  """Parses `key=value,key=value`, what follows the colon in --config=NAME:…, into a dictionary.

  Raises:
    UserError: a part has no value, or a key that is not known.
  """
  given = {}
  for part in filter(None, arg.split(",")):
    key, equals, value = part.partition("=")
    if key not in known or not equals:
      raise UserError(f"the configuration's argument {part!r} is not one of {'=…, '.join(known)}=…")
    given[key] = value
  return given


def number(given: dict[str, str], key: str, default: float) -> float:
  """Returns the number given for `key`, or the default.

  Raises:
    UserError: the given value is not a number.
  """
  try:
    return float(given.get(key, default))
  except ValueError:
    raise UserError(f"the configuration's {key}={given[key]} is not a number") from None


def loss(name: str, **given) -> ConfigDict:
  """Makes the loss section: the name, and every argument and modifier; None means not set.

  So `--config.loss.name=robust --config.loss.label_smoothing=0.2` works with any configuration. An
  argument that the chosen loss does not read is an error.

  Raises:
    UserError: `name`, or the name on the command line, is a module:function that is no loss.
  """
  section = ConfigDict({"name": name})
  # The arguments of every loss, since a flag can only set a field that exists: also of one of the
  # user's own, which the command line may name in place of this one.
  add_arguments(section, name, config_flags.requested("loss.name") or "")
  section.update(given)
  return section


def add_arguments(section: ConfigDict, *names: str) -> None:
  """Adds to a loss section the arguments that losses have and it lacks; None means not set.

  Raises:
    UserError: one of the names is a module:function that is no loss.
  """
  types = {key: kind for name in names for key, kind in losses.types(name).items()}
  with section.unlocked():
    for key in sorted(types.keys() - section.keys()):
      section[key] = config_dict.placeholder(types[key])


def replace_aliases(config: ConfigDict) -> None:
  """Replaces every alias in a configuration, such as the loss `dpo`, by the name it stands for.

  So what a run stores, and compares when it is resumed, does not depend on which one was written.
  """
  config.loss.name = losses.canonical(config.loss.name)


def get_config() -> ConfigDict:
  """Returns the defaults. They cannot be run as they are: they name no model and no data."""
  return ConfigDict(
    {
      "seed": 0,  # random seed: initial weights, order of examples, samples, dropout
      "model": section(
        path="",  # Hugging Face folder to start from; "" starts from `scratch`
        tokenizer="",  # folder of the tokenizer; "" is model.path
        scratch=ConfigDict(),  # fields of a config.json, for a model with random initial weights
        compute_dtype="float32",  # type of matrix products: float32 or bfloat16
        # type of the policy's parameters and moments; bfloat16 is rounded stochastically
        param_dtype="float32",
        # what the backward pass recomputes: none, dots (all but outputs of linear maps), narrow
        # (also outputs wider than the model), full (all), or auto (the first of the last three that
        # fits)
        remat="auto",
        attention="auto",  # auto, or tiles (CPU), cudnn (GPU), splash (TPU), blocked, xla
      ),
      "reference": section(
        path="",  # Hugging Face folder of the reference; "" is the initial policy
        param_dtype="float32",  # type of the reference's parameters
        sync_every=0,  # steps between syncs of the reference with the policy (TR-DPO); 0 is never
        store="",  # folder for stored log-probs of the reference, shared by runs; "" for none
        sync_alpha=0.6,  # at a sync, reference = 0.6 policy + 0.4 reference; 1 copies the policy
        # True: at a sync (every 400 steps is usual) the reference becomes, in place of that mix, a
        # moving average of the policy, corrected for its lag
        bema=False,
        bema_power=0.5,  # the policy's share in the average is (bema_lag + step)^-bema_power
        bema_bias_power=0.2,  # strength of the correction, (bema_lag + step)^-bema_bias_power
        bema_lag=10.0,  # steps that the average counts as old at the start
      ),
      "lora": section(
        rank=0,  # rank of the adapters; 0 trains the whole model, without adapters
        alpha=16.0,  # the update of an adapter is scaled by alpha / rank
        rs=False,  # True scales it by alpha / sqrt(rank), which keeps its size at high ranks
        dropout=0.0,  # probability with which an input of an adapter is dropped, in training
        target="all-linear",  # layers with adapters, such as q_proj,v_proj, or query, or mlp.c_proj
        path="",  # adapter folder to start from, with its own rank, alpha, rs and target
      ),
      "data": section(
        path="",  # file of preferences (or texts, for loss sft) to train on
        # file of held-out rows; "" holds out eval_fraction of the prompts, or uses eval_sets
        eval_path="",
        eval_fraction=0.1,  # share of the prompts held out, without eval_path and eval_sets
        eval_limit=512,  # the most held-out rows that training evaluates, of every evaluation set
        # several sources in place of path, by name: {"a": "a.jsonl", "b": {"path": "b.jsonl"}};
        # with fields, verdict, weight (share of the examples), and count or fraction (of rows)
        mix=ConfigDict(),
        eval_sets=ConfigDict(),  # evaluation sets by name: eval/NAME/…; with fields, verdict
        drop_duplicates=False,  # True drops rows that occurred before: same prompt and completions
        # names of the fields in rows of another format, such as data.fields.prompt=question
        fields=section(**dict.fromkeys(FIELDS, "")),
        # how `preference` names the better of two completions: index1 (1 or 2), index0 (0 or 1),
        # first_is_better (1 or 0), signed (below 0 is the first), positive_is_first, words, words0
        # (response_0), onehot; "" finds it out from all its values, or stops
        verdict="",
        on_bad_row="stop",  # at a row that cannot be read: stop, or drop (and count)
        # which messages of a completion are scored: assistant (all it wrote), or last (its last)
        train_on="assistant",
        template="",  # values that the chat template reads, as JSON: {"enable_thinking": false}
        max_length=512,  # most tokens of a prompt and one completion together
        prompt_floor=64,  # prompts are cut from the left, but this many tokens always stay
        truncation="drop",  # pairs whose completions do not fit: drop, or cut
        layout="shared",  # shared (prompt once, packed), packed, or padded
        balance=True,  # evens out tokens per batch: neighboring batches exchange examples
        row_length=0,  # tokens per row; 0 is a length that suits the data
      ),
      "loss": loss("sigmoid"),
      "on_policy": section(
        reward="",  # name of a reward, or module:function; "" trains on data.path as it is
        num=4,  # completions sampled per prompt of data.path, at every step
        max_tokens=64,  # most tokens of a completion
        temperature=1.0,  # temperature of sampling
        prefer="rank",  # pairs of samples: rank (best, worst), or bradley_terry (sampled)
      ),
      "optimizer": section(
        learning_rate=1e-5,  # peak learning rate, after the warm-up
        schedule="linear",  # constant, linear or cosine, after the warm-up
        # steps until the peak; None is 10, at most a tenth of all
        warmup_steps=config_dict.placeholder(int),
        final_fraction=0.0,  # learning rate at the last step / peak learning rate
        b1=0.9,  # AdamW: decay of the mean of gradients
        b2=0.999,  # AdamW: decay of the mean of their squares
        eps=1e-8,  # AdamW: added to the denominator
        weight_decay=0.0,  # AdamW: only on matrices and adapters, not norms, biases, embeddings
        clip_norm=1.0,  # gradients with a larger norm are scaled down to it; 0 for no clipping
      ),
      "train": section(
        steps=0,  # updates; 0 is as many as `epochs` needs
        epochs=1.0,  # passes over the training data, if steps is 0
        # pairs per update, over all devices and micro-batches; at most as many as there are
        batch_size=32,
        # micro-batches per update, whose gradients are summed; 0 is as few as the memory of the
        # devices suffices for (1 on a CPU)
        accumulate=0,
        # weight of the load-balancing loss of experts; None takes it from the model's config.json
        router_balance=config_dict.placeholder(float),
      ),
      "eval": section(
        every=100,  # steps between evaluations; 0 is only at the end
        batch_size=0,  # pairs per forward pass; 0 takes the size of a training micro-batch
        samples=0,  # completions sampled for held-out prompts: KL, entropy, repetition; 0 for none
      ),
      "checkpoint": section(
        every=500,  # steps between checkpoints; 0 is only at the end, and by `minutes`
        minutes=10.0,  # minutes after which a checkpoint is made between those; 0 is never
        keep=2,  # number of latest checkpoints that are kept; the best is kept too
      ),
      "export": section(
        # True exports the checkpoint with the best held-out accuracy (or loss), not the last; every
        # evaluation then makes a checkpoint
        best=False,
      ),
      "parallel": section(
        mode="mesh",  # mesh, or pmap (parameters replicated, rows divided)
        # number of devices, 0 is all; beyond the product of fsdp, sequence and tensor, parameters
        # are copied and rows are divided
        devices=0,
        fsdp=1,  # devices that parameters and rows are divided among
        sequence=1,  # devices that the tokens of a row are divided among
        tensor=1,  # devices that parameters, and the products with them, are divided among
        offload_optimizer=False,  # keeps optimizer state in host memory between updates
        coordinator="",  # several processes: HOST:PORT of the first, or auto (TPU pod, SLURM)
        processes=0,  # number of processes, with HOST:PORT
        process=0,  # number of this process, from 0
      ),
    }
  )
