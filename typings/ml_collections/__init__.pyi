"""Types of ml_collections for pyright: the part that this project uses.

The library's own annotations give every field the union of all types that a field may have, so no
field could be used as what it is. Here a field is Any: its type is known at run time only.
"""

from . import config_dict as config_dict
from . import config_flags as config_flags
from .config_dict import ConfigDict as ConfigDict
