"""Runs a command as several processes of this machine, each on its share of the processors.

  python scripts/launch/local.py 2 python -m dpo_jax.train --config=… --workdir=…

On CPUs a small model trains faster this way (docs/scale.md). Only the first process prints. All
end together, and this program with the status of one that failed; after a training that SIGTERM
has stopped and that saved, this is 75, and 130 after Ctrl-C. COMMAND is one of this project's that
have --config: flags of `config.parallel` are added to it.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the package, uninstalled

from dpo_jax.utils import cli


def main():
  from dpo_jax.distributed import local_launcher
  from dpo_jax.structs import UserError

  words = sys.argv[1:]
  if words[:1] in (["--help"], ["-h"]):
    print(__doc__)
    return 0
  try:
    if len(words) < 2 or not words[0].isdecimal():
      raise UserError("usage: python scripts/launch/local.py PROCESSES COMMAND…, as in its --help")
    return local_launcher.run(words[1:], int(words[0]))
  except OSError as error:
    cli.fail(f"{cli.os_error_line(error)}; COMMAND is a program and its flags, as in --help")
  except UserError as error:
    cli.fail(error)


if __name__ == "__main__":
  sys.exit(main())
